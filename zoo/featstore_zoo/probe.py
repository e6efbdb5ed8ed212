"""What features know: probes on stored features, with answers from the store itself, and what follows from them.

    study = probe.study(fs.open("songs.zarr"), ["whisper", "contentvec", "whisper+contentvec"])
    print("\\n".join(study.findings))

Features are read on one grid of RATE frames per second, by centres: all of them are asked about the same frames. Of f0
a probe sees octaves and whether a frame is voiced, of everything else the numbers as they are stored. Cost is bounded:
FRAMES frames and UTTERANCES utterances at most, drawn by the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from featstore import Feature, Store, StoredUtterance
from featstore.errors import BadRequest, MissingFeature, nearest
from featstore.index import hash_keys
from featstore.splits import Split

from . import learners, targets
from .learners import Probe
from .targets import Labels, Target

Array = np.ndarray
Told = Callable[[str], None]

RATE = 50             # frames per second: that of Whisper, ContentVec, HuBERT, WavLM
FRAMES = 16_000
UTTERANCES = 2_000
DRAWS = 1_000         # of units, for an interval of 95 %
SHOWN = 5e-4          # half of the last digit that is shown
CONTROL = "constant"  # a feature that knows nothing: what it gets is chance
TARGETS = ("speaker", "speaker across", "f0", "voicing", "energy", "text", "robustness", "condition")


@dataclass(frozen=True)
class Result:
    """How a probe fared with a feature or mix. low, high: 95 % by drawing units anew; draws (DRAWS,): for pairs."""

    target: str
    features: str
    probe: str
    value: float
    low: float
    high: float
    draws: Array = field(repr=False)


@dataclass(frozen=True)
class Study:
    """What came out. skipped: target -> why it could not be asked. left_out: utterances without all features."""

    store: str
    features: tuple[str, ...]
    split: str | None
    seed: int
    utterances: int
    left_out: int
    targets: tuple[Target, ...]
    results: tuple[Result, ...]
    skipped: Mapping[str, str]

    def of(self, target: str, features: str, probe: str = "linear") -> Result:
        """One result. KeyError where there is none."""
        for result in self.results:
            if (result.target, result.features) == (target, features) and result.probe in (probe, "none"):
                return result
        raise KeyError(f"{target} of {features} by {probe}: expected one of {self.features} and {sorted(TARGETS)}")

    @property
    def findings(self) -> list[str]:
        """A sentence or two for each target: what differs beyond chance, and what does not."""
        return [finding(self, target) for target in self.targets]

    def to_json(self) -> dict[str, Any]:
        """Everything but the draws, as plain values."""
        asked = {t.name: {"question": t.question, "measure": t.measure, "chance": t.chance, "higher": t.higher,
                          "examples": len(t.examples), "units": len(np.unique(t.units)), "apart": t.apart,
                          "classes": t.classes} for t in self.targets}
        return {"store": self.store, "features": list(self.features), "split": self.split, "seed": self.seed,
                "rate": RATE, "utterances": self.utterances, "left_out": self.left_out, "targets": asked,
                "skipped": dict(self.skipped), "findings": self.findings,
                "results": [{name: getattr(r, name) for name in ("target", "features", "probe", "value", "low", "high")}
                            for r in self.results]}


def study(store: Store, mixes: Sequence[str], *, targeted: Sequence[str] = (), split: str | None = None, seed: int = 0,
          probes: Sequence[Probe] = learners.PROBES, progress: Told | None = None) -> Study:
    """Ask every target that the store has answers for, of each of `mixes`: "whisper", "whisper+contentvec".

    targeted: only these, of TARGETS.
    split: the name of a split: learn from its train, test on its test. None: folds by the seed, in which no speaker (of
        speakers: no recording, of text: no sentence) is both learnt from and tested.

    Raises:
        MissingFeature, BadRequest: a feature is not there or cannot be asked; no utterance has all of them; no target
            has answers, and why.
    """
    mixes = _checked(store, mixes, targeted)
    names = list(dict.fromkeys(name for mix in mixes for name in mix.split("+")))
    parted = None if split is None else _split(store, split)
    keys, left_out = _keys(store, names, seed)
    utterances = [store.utterances[key] for key in keys]
    labels = targets.labels_of(utterances)
    text, pairs = targets.text(utterances, labels), targets.robustness(labels)
    whole = [target for name, target in (("text", text), ("robustness", pairs)) if not targeted or name in targeted]
    material = _read(store, names, utterances, _needed(*whole), seed)
    found = {"speaker": targets.speaker(utterances, labels, parted),
             "speaker across": targets.speaker_across(utterances, labels), **_of_frames(store, keys, material, labels),
             "text": text, "robustness": pairs, "condition": targets.condition(utterances, labels)}
    found = {name: what for name, what in found.items() if not targeted or name in targeted}
    asked = [target for name in TARGETS if isinstance(target := found.get(name), Target)]
    if not asked:
        why = "; ".join(f"{name}: {reason}" for name, reason in found.items())
        raise BadRequest(f"{store.path} has answers for nothing that is asked ({why})")
    results = []
    with learners.one_thread():
        for target, mix in product(asked, [*mixes, CONTROL]):
            for probe in probes if target.rows != "pairs" else ("none",):
                if progress is not None:
                    progress(f"{target.name}: {mix}, {probe}")
                results.append(_ask(target, mix, probe, material, parted, keys, seed))
    return Study(str(store.path), tuple(mixes), split, seed, len(keys), left_out, tuple(asked), tuple(results),
                 {name: why for name, why in found.items() if isinstance(why, str)})


def finding(study: Study, target: Target) -> str:
    """What the results of a target say: who is best and by how much, who is at chance, whether mixes gain.

    It goes by the linear probe. A difference is claimed where its interval (the same units drawn for both) leaves out
    zero, by as much as is shown of a number.
    """
    results = {mix: study.of(target.name, mix) for mix in (*study.features, CONTROL)}
    sign = 1 if target.higher else -1
    ranked = sorted(study.features, key=lambda mix: -sign * results[mix].value)
    best = ranked[0]
    said = [f"{target.question.capitalize()}: {best} comes first with {shown(target, results[best])}; chance is "
            f"{_number(target, target.chance)}."]
    behind = [(mix, *_difference(target, results[best], results[mix])) for mix in ranked[1:]]
    level = [mix for mix, _, low, _ in behind if not low >= SHOWN]
    if level:
        said.append(f"{_list(level)} cannot be told from it.")
    ahead = [item for item in behind if item[2] >= SHOWN]
    if ahead:
        mix, value, low, high = ahead[0]
        said.append(f"It is ahead of {mix} by {_gap(target, value, low, high)}.")
    lost = [mix for mix in ranked if not _beats_chance(target, results[mix])]
    if lost:
        said.append(f"{_list(lost)} cannot be told from chance.")
    for mix in study.features:  # against the best of its parts alone
        parts = [part for part in mix.split("+") if part in study.features]
        if "+" in mix and parts:
            said.append(_mix(target, results, mix, max(parts, key=lambda part: sign * results[part].value)))
    if target.name == "speaker" and len(study.features) > 1:
        said.append(f"Least of it is in {ranked[-1]} ({shown(target, results[ranked[-1]])}), which is what content "
                    "should be like.")
    return " ".join(said)


def shown(target: Target, result: Result) -> str:
    """A number with its interval: "93.1 % [88.0, 97.2]"."""
    if target.measure in ("accuracy", "errors"):
        return f"{100 * result.value:.1f} % [{100 * result.low:.1f}, {100 * result.high:.1f}]"
    return f"{result.value:.3f} [{result.low:.3f}, {result.high:.3f}]"


@dataclass(frozen=True)
class _Material:
    """What is read of a store, once. frames: name -> (n, D) frames that were drawn, frame_of (n,) whose they are.

    pooled: name -> (U, D) what is said of whole utterances: mean and deviation of frames; whole: name -> utterance ->
    (T, D). answers: f0 in Hz and energy in dB (n,) at the frames, as far as the store has them.
    """

    frame_of: Array
    frames: dict[str, Array]
    pooled: dict[str, Array]
    whole: dict[str, dict[int, Array]]
    answers: dict[str, Array]

    def of_frames(self, mix: str) -> Array:
        return np.hstack([self.frames[name] for name in mix.split("+")])

    def of_utterances(self, mix: str) -> Array:
        return np.hstack([self.pooled[name] for name in mix.split("+")])

    def of_whole(self, mix: str, number: int) -> Array:
        return np.hstack([self.whole[name][number] for name in mix.split("+")])


def _checked(store: Store, mixes: Sequence[str], targeted: Sequence[str]) -> list[str]:
    if not mixes or CONTROL in mixes:
        raise BadRequest(f"features to probe: {list(mixes)}; expected some, such as log-mel and log-mel+f0, and none "
                         f"called {CONTROL!r}, which is always there as a control")
    for name in (name for mix in mixes for name in mix.split("+")):
        kind = store.feature(name).kind
        if kind in ("samples", "discrete"):
            raise BadRequest(f"{name} is of kind {kind}: probes take continuous features, f0 and vectors of utterances")
    for name in targeted:
        if name not in TARGETS:
            raise BadRequest(f"no target {name!r} ({nearest(name, TARGETS)}): expected some of {', '.join(TARGETS)}")
    return list(dict.fromkeys(mixes))


def _split(store: Store, name: str) -> Split:
    name = name.partition("/")[0]
    if name not in store.splits:
        raise BadRequest(f"{store.path} has no split {name!r} ({nearest(name, store.splits)}). Make one: featstore "
                         f"split {store.path} main --by speaker --test 20%; or leave --split out for folds by the seed")
    return store.splits[name]


def _keys(store: Store, names: Sequence[str], seed: int) -> tuple[list[str], int]:
    """Utterances of a known duration that have all features, UTTERANCES at most; how many are none."""
    answers = [name for name in ("f0", "energy", "loudness") if name in store.features]
    features = [store.feature(name) for name in dict.fromkeys([*names, *answers])]
    keys = [key for key in store.utterances if all(key in feature for feature in features)]
    index = store.utterances.index
    seconds = index.records["seconds"][index.positions(hash_keys(keys))] if keys else np.zeros(0)
    keys = [key for key, length in zip(keys, seconds.tolist(), strict=True) if length >= 2 / RATE]
    if not keys:
        raise MissingFeature(f"no utterance of {store.path} has all of {', '.join(f.name for f in features)} and a "
                             "duration. Extract them: featstore "
                             f"extract CORPUS {store.path} {' '.join(f'-f {name}' for name in names)}")
    left_out = len(store.utterances) - len(keys)
    drawn = np.random.default_rng(seed).permutation(len(keys))[:UTTERANCES]
    return [keys[i] for i in sorted(drawn.tolist())], left_out


def _needed(*found: Target | str) -> set[int]:
    """Numbers of the utterances that are read whole."""
    asked = [target for target in found if isinstance(target, Target)]
    numbers = {int(i) for target in asked for i in target.examples}
    return numbers | {int(i) for target in asked if target.rows == "pairs" for i in target.answers}


def _read(store: Store, names: Sequence[str], utterances: Sequence[StoredUtterance], needed: set[int],
          seed: int) -> _Material:
    answers = [name for name in ("f0", "energy", "loudness") if name in store.features]
    view = store.view(list(dict.fromkeys([*names, *answers])), rate=RATE, timing="centres",
                      utterances=[u.key for u in utterances])
    features = {name: store.feature(name) for name in view.names}
    per = max(FRAMES // len(utterances), 1)
    drawn = np.random.default_rng(seed)
    frames: dict[str, list[Array]] = {name: [] for name in view.names}
    pooled: dict[str, list[Array]] = {name: [] for name in view.names}
    whole: dict[str, dict[int, Array]] = {name: {} for name in (*view.names, CONTROL)}
    frame_of = []
    for number, key in enumerate(view):
        read = view[key]
        count = int(view.lengths[number])
        at = np.sort(drawn.permutation(count)[:per])
        frame_of.append(np.full(len(at), number))
        for name, feature in features.items():
            rows = _rows(read[name], feature, count)
            frames[name].append(rows[at])
            pooled[name].append(rows[0] if feature.kind == "global" else _pooled(rows))
            if number in needed:
                whole[name][number] = rows
        if number in needed:
            whole[CONTROL][number] = np.ones((count, 1), np.float32)
    owner = np.concatenate(frame_of)
    drawn_frames = {name: np.concatenate(rows) for name, rows in frames.items()}
    ones = np.ones((len(owner), 1), np.float32), np.ones((len(utterances), 1), np.float32)
    told: dict[str, Array] = {name: np.concatenate(rows) for name, rows in frames.items()
                              if name in answers}
    return _Material(owner, drawn_frames | {CONTROL: ones[0]},
                     {name: np.stack(rows) for name, rows in pooled.items()} | {CONTROL: ones[1]}, whole,
                     _answers(told))


def _rows(read: Array, feature: Feature, count: int) -> Array:
    """Frames (T, D) as a probe sees them: float32; f0 in octaves above 100 Hz and voiced or not; vectors repeated."""
    x = read.astype(np.float32)
    if feature.kind == "global":
        return np.broadcast_to(x, (count, x.size))
    if feature.kind == "f0":
        voiced = x > 0
        return np.stack([np.log2(np.where(voiced, x, 100) / 100), voiced], axis=1).astype(np.float32)
    return x.reshape(count, -1)


def _pooled(rows: Array) -> Array:
    return np.concatenate([rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)]).astype(np.float32)


def _answers(told: Mapping[str, Array]) -> dict[str, Array]:
    """f0 in Hz (n,), energy in dB (n,): of `energy`, which is linear, or else of `loudness`."""
    found = {}
    if "f0" in told:
        octaves, voiced = told["f0"].T
        found["f0"] = np.where(voiced > 0, 100 * 2.0 ** octaves, 0.0)
    if "energy" in told:
        found["energy"] = 20 * np.log10(np.maximum(told["energy"][:, 0], 1e-30))
    elif "loudness" in told:
        found["energy"] = told["loudness"][:, 0].astype(np.float64)
    return found


def _of_frames(store: Store, keys: Sequence[str], material: _Material, labels: Labels) -> dict[str, Target | str]:
    """The targets whose answers are features of the store themselves."""
    found: dict[str, Target | str] = {}
    for name, ask, answer in (("f0", targets.f0, "f0"), ("voicing", targets.voicing, "f0"),
                              ("energy", targets.energy, "energy")):
        if answer in material.answers:
            found[name] = ask(material.answers[answer], material.frame_of, labels)
        else:
            found[name] = f"{store.path} has no {answer}; try: featstore extract CORPUS {store.path} -f {answer}"
    return found


def _ask(target: Target, mix: str, probe: Any, material: _Material, split: Split | None, keys: Sequence[str],
         seed: int) -> Result:
    """Let a probe learn and answer, and count by units."""
    counts = np.zeros((len(target.examples), 2 * target.classes or 2))
    if target.rows == "pairs":
        counts[:] = _distances(target, mix, material)
    else:
        for learn, test in target.folds(split, keys, material.frame_of, seed):
            if len(learn) and len(test):
                counts[test] = _COUNT[target.measure](target, mix, probe, material, learn, test, seed)
    return _result(target, mix, probe, target.per_unit(counts), seed)


def _result(target: Target, mix: str, probe: str, sums: Array, seed: int) -> Result:
    """The score of all units, and of DRAWS times as many units drawn anew: the same ones for whatever is compared."""
    tested = sums[sums.any(axis=1)]
    drawn = np.random.default_rng([seed, len(tested)]).multinomial(len(tested), np.full(len(tested), 1 / len(tested)),
                                                                    DRAWS)
    draws = target.score(drawn @ tested)
    low, high = np.nanquantile(draws, [0.025, 0.975])
    value = float(target.score(tested.sum(0, keepdims=True))[0])
    return Result(target.name, mix, probe, value, float(low), float(high), draws)


def _right(target: Target, mix: str, probe: Any, material: _Material, learn: Array, test: Array, seed: int) -> Array:
    """(m, 2 classes): right, and all, by the class that was expected."""
    x = material.of_frames(mix) if target.rows == "frames" else material.of_utterances(mix)
    found = learners.classify(probe, x[target.examples[learn]], target.answers[learn], target.units[learn],
                              x[target.examples[test]], seed)
    expected = np.eye(target.classes)[target.answers[test]]
    return np.hstack([expected * (found == target.answers[test])[:, None], expected])


def _squares(target: Target, mix: str, probe: Any, material: _Material, learn: Array, test: Array, seed: int) -> Array:
    """(m, 2): squared error, and squared distance from the mean of what was learnt from."""
    x, values = material.of_frames(mix), target.answers
    found = learners.regress(probe, x[target.examples[learn]], values[learn], target.units[learn],
                             x[target.examples[test]], seed)
    return np.stack([values[test] - found, values[test] - values[learn].mean()], axis=1) ** 2


def _edits(target: Target, mix: str, probe: Any, material: _Material, learn: Array, test: Array, seed: int) -> Array:
    """(m, 2): edits, and characters expected."""
    sequences = [material.of_whole(mix, int(number)) for number in target.examples]
    texts = target.answers
    found = learners.transcribe(probe, [sequences[i] for i in learn], [texts[i] for i in learn],
                                [sequences[i] for i in test], seed)
    return np.array([[learners.edits(one, texts[i]), len(texts[i])] for one, i in zip(found, test, strict=True)], float)


_COUNT = {"accuracy": _right, "r2": _squares, "errors": _edits}


def _distances(target: Target, mix: str, material: _Material) -> Array:
    """(pairs, 2): the sum of cosine distances of noisy frames from clean ones, and frames.

    Channels are standardised over the frames that were drawn, or what all frames share would make any two alike; then
    frames of two recordings are 1 apart on average. A frame without direction (a constant) is 1 from any other.
    """
    drawn, counts = material.of_frames(mix), []
    for clean, noisy in zip(target.examples.tolist(), target.answers.tolist(), strict=True):
        one, other = (learners.standardised(drawn, material.of_whole(mix, number))[1] for number in (clean, noisy))
        frames = min(len(one), len(other))
        one, other = one[:frames], other[:frames]
        size = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosine = np.where(size > 0, (one * other).sum(1) / np.where(size > 0, size, 1), 0)
        counts.append([(1 - cosine).sum(), frames])
    return np.array(counts, float)


def _difference(target: Target, one: Result, other: Result) -> tuple[float, float, float]:
    """By how much `one` is better, with 95 % of the same draws of units."""
    sign = 1 if target.higher else -1
    low, high = np.nanquantile(sign * (one.draws - other.draws), [0.025, 0.975])
    return sign * (one.value - other.value), float(low), float(high)


def _beats_chance(target: Target, result: Result) -> bool:
    return result.low > target.chance if target.higher else result.high < target.chance


def _mix(target: Target, results: Mapping[str, Result], mix: str, part: str) -> str:
    value, low, high = _difference(target, results[mix], results[part])
    if low >= SHOWN:
        return f"{mix} gains {_gap(target, value, low, high)} over {part}, its best part."
    if high <= -SHOWN:
        return f"{mix} loses {_gap(target, -value, -high, -low)} against {part}, its best part."
    return f"{mix} shows no gain over {part}, its best part."


def _gap(target: Target, value: float, low: float, high: float) -> str:
    if target.measure in ("accuracy", "errors"):
        return f"{100 * value:.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _number(target: Target, value: float) -> str:
    return f"{100 * value:.1f} %" if target.measure in ("accuracy", "errors") else f"{value:g}"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
