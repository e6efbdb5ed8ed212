"""What features are asked in a probing study: the answers, who is kept apart, how a reply is scored, what chance gives.

Every target counts per *unit*, the utterances that may not be divided between learning and testing. A score is a
function of sums over units, so that its interval comes from drawing units anew (Efron, 1979): frames of one voice are
no independent witnesses.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from featstore import StoredUtterance
from featstore.splits import Split

Array = np.ndarray
Measure = Literal["accuracy", "r2", "errors", "distance"]

FOLDS = 4         # each unit is tested once, by a probe that learnt from the units of the other folds
FEWEST = 4        # units that a class needs: one for each fold
QUIET_DB = -100.0  # energy below this is silence, as the floor of a log-mel is
LETTERS = 3       # utterances in which a character must occur to be one that a probe can learn
TEXT_S = 1800.0   # seconds of speech that text is learnt from and tested on
LONGEST_S = 20.0  # of one utterance of them: a batch is as long as its longest


@dataclass(frozen=True)
class Target:
    """One question. `rows` says what an example is: a frame that was drawn, an utterance, or a pair of utterances.

    examples: (n,) numbers of frames or utterances; of pairs the clean ones.
    answers: (n,) class numbers, or values; texts of the target "text"; of pairs the noisy ones.
    units: (n,) number of the unit of each example. apart: what a unit is.
    chance: what a feature that knows nothing gets. higher: whether more is better at it.
    held: (n,) number of the condition of each example, if each is to be asked by who learnt from other conditions.
    """

    name: str
    question: str
    measure: Measure
    rows: Literal["frames", "utterances", "pairs"]
    examples: Array
    answers: Array
    units: Array
    apart: str
    chance: float
    higher: bool = True
    classes: int = 0
    held: Array | None = None

    def score(self, sums: Array) -> Array:
        """Scores (B,) from sums over units (B, K): of `accuracy` right and all by class, else two numbers.

        accuracy: the mean over classes of the share that is right. r2: 1 - squared error / squared distance from the
        mean of what was learnt from. errors: edits per character. distance: mean over frames.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.measure == "accuracy":
                return np.nanmean(sums[:, :self.classes] / sums[:, self.classes:], axis=1)
            ratio = sums[:, 0] / sums[:, 1]
        return 1 - ratio if self.measure == "r2" else ratio

    def per_unit(self, counts: Array) -> Array:
        """Sums over units (U, K) of the counts of examples (n, K)."""
        sums = np.zeros((int(self.units.max()) + 1, counts.shape[1]))
        np.add.at(sums, self.units, counts)
        return sums

    def folds(self, split: Split | None, keys: Sequence[str], frame_of: Array, seed: int) -> list[tuple[Array, Array]]:
        """What is learnt from and what is tested, as places in `examples`. No unit is in both.

        split: learn from its part train, test on test (on valid where that is empty); None: FOLDS folds by `seed`.
        """
        if split is None:
            from sklearn.model_selection import StratifiedGroupKFold

            strata = self.answers if self.measure == "accuracy" else np.zeros(len(self.examples))
            strata = strata if self.held is None else strata * (self.held.max() + 1) + self.held
            parts = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
            return self._elsewhere(parts.split(self.examples, strata, self.units))
        places = split.places(keys)
        own = places[frame_of[self.examples] if self.rows == "frames" else self.examples]
        tested = 2 if (own == 2).any() else 1
        learn, test = np.flatnonzero(own == 0), np.flatnonzero(own == tested)
        if self.name == "text":  # a split keeps songs or speakers apart, and one sentence is read by many
            test = test[~np.isin(self.units[test], self.units[learn])]
        return self._elsewhere([(learn, test)])

    def _elsewhere(self, folds: Iterable[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
        """The folds, or each of them for each condition: learn from the others, test on that one."""
        if (held := self.held) is None:
            return list(folds)
        return [(learn[held[learn] != place], test[held[test] == place])
                for learn, test in folds for place in np.unique(held)]


@dataclass(frozen=True)
class Labels:
    """What utterances share, as numbers (U,): recordings, voices (a noisy copy counts with its clean one), sentences.

    twins: (clean, noisy), numbers of utterances that are one performance.
    """

    recordings: Array
    voices: Array
    sentences: Array
    twins: list[tuple[int, int]]
    speakers: list[str | None]


def labels_of(utterances: Sequence[StoredUtterance]) -> Labels:
    """The labels of the utterances of a study, from what the store knows of each."""
    pairs = twins(utterances)
    clean_of = {noisy: clean for clean, noisy in pairs}
    speakers = [utterances[clean_of.get(number, number)].speaker for number in range(len(utterances))]
    recordings, voices, sentences = [], [], []
    for number, u in enumerate(utterances):
        first = utterances[clean_of.get(number, number)]
        song = [("song", str(first.extra["song"]))] if first.extra.get("song") else []
        audio = [("audio", u.source)] if u.source.strip("0") else []
        one = [*song, *audio, ("file", first.root, first.audio or first.key)]
        voice = ("voice", speakers[number]) if speakers[number] is not None else None
        recordings.append(one)
        voices.append([*one, voice] if voice else one)
        sentences.append([*one, ("text", plain_text(u.text or ""))])
    return Labels(_joined(recordings), _joined(voices), _joined(sentences), pairs, speakers)


def twins(utterances: Sequence[StoredUtterance]) -> list[tuple[int, int]]:
    """Pairs (clean, noisy) of one performance, as numbers: by the field `clean`, which is a key, or by the names.

    By the names: "p287_noisy/001" belongs to "p287/001", "noisy_testset/001" to "clean_testset/001". Pairs whose
    lengths differ by more than 50 ms are none.
    """
    place = {u.key: number for number, u in enumerate(utterances)}
    found = []
    for number, u in enumerate(utterances):
        named = [u.extra.get("clean"), re.sub("[_-]?noisy", "", u.key), u.key.replace("noisy", "clean")]
        other = next((place[key] for key in named if isinstance(key, str) and key != u.key and key in place), None)
        if other is not None and abs(utterances[other].duration_s - u.duration_s) <= 0.05:
            found.append((other, number))
    return found


def plain_text(text: str) -> str:
    """Letters, digits and apostrophes in lower case, words with one space between them."""
    known = unicodedata.normalize("NFKC", text).lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return " ".join("".join(c if c.isalnum() or c == "'" else " " for c in known).split())


def speaker(utterances: Sequence[StoredUtterance], labels: Labels, split: Split | None) -> Target | str:
    """Who speaks or sings. Or why that cannot be asked, as in the functions below."""
    units: dict[str, set[int]] = {}
    for name, unit in zip(labels.speakers, labels.recordings.tolist(), strict=True):
        if name is not None:
            units.setdefault(name, set()).add(unit)
    if split is None:
        known = sorted(name for name, own in units.items() if len(own) >= FEWEST)
    else:
        places = split.places([u.key for u in utterances])
        seen = [{labels.speakers[i] for i in np.flatnonzero(own)} - {None} for own in (places == 0, places > 0)]
        known = sorted(name for name in seen[0] & seen[1] if name is not None)
    if len(known) < 2:
        where = (f"have {FEWEST} recordings or more" if split is None else
                 f"are in train and test of the split {split.name} (by {split.by})")
        return f"{len(known)} speakers {where}; two are needed"
    number = {name: i for i, name in enumerate(known)}
    return _classes("speaker", "who speaks or sings", "utterances", labels.speakers, number, labels.recordings,
                    "recordings")


def speaker_across(utterances: Sequence[StoredUtterance], labels: Labels) -> Target | str:
    """Who speaks or sings, asked in a condition that was not learnt from: what a feature knows of a voice, and not of
    the microphone and room that recordings of a speaker mostly share.

    Conditions are the field `condition`, and a noisy copy's is another than its clean one's. Speakers with FEWEST
    recordings or more in each of two are asked.
    """
    copies = {noisy for _, noisy in labels.twins}
    where = [(str(u.extra.get("condition") or ""), number in copies) for number, u in enumerate(utterances)]
    units: dict[tuple[str, tuple[str, bool]], set[int]] = {}
    for name, place, unit in zip(labels.speakers, where, labels.recordings.tolist(), strict=True):
        if name is not None:
            units.setdefault((name, place), set()).add(unit)
    often = {pair for pair, own in units.items() if len(own) >= FEWEST}
    twice = {name for name, count in Counter(name for name, _ in often).items() if count > 1}
    if len(twice) < 2:
        return (f"{len(twice)} speakers have {FEWEST} recordings or more in each of two conditions (the field "
                "condition, or noisy copies); two are needed")
    kept = [name if name in twice and (name, place) in often else None
            for name, place in zip(labels.speakers, where, strict=True)]
    number = {name: i for i, name in enumerate(sorted(twice))}
    asked = _classes("speaker across", "who speaks or sings, in a condition that was not learnt from", "utterances",
                     kept, number, labels.recordings, "recordings")
    places = sorted(set(where))
    return replace(asked, held=np.array([places.index(where[i]) for i in asked.examples]))


def condition(utterances: Sequence[StoredUtterance], labels: Labels) -> Target | str:
    """How it was recorded: the field `condition`."""
    values = [str(u.extra["condition"]) if u.extra.get("condition") else None for u in utterances]
    units: dict[str, set[int]] = {}
    for value, unit in zip(values, labels.voices.tolist(), strict=True):
        if value is not None:
            units.setdefault(value, set()).add(unit)
    known = sorted(value for value, own in units.items() if len(own) >= FEWEST)
    if len(known) < 2:
        return (f"{len(known)} values of the field condition have {FEWEST} speakers or more; two are needed")
    number = {value: i for i, value in enumerate(known)}
    return _classes("condition", "how it was recorded", "utterances", values, number, labels.voices, "speakers")


def f0(hz: Array, frame_of: Array, labels: Labels) -> Target | str:
    """The melody: f0 in octaves, in frames that are voiced; hz (n,)."""
    voiced = np.flatnonzero(hz > 0)
    units = labels.voices[frame_of[voiced]]
    return _values("f0", "the melody: log f0 where voiced", voiced, np.log2(hz[voiced]), units)


def energy(db: Array, frame_of: Array, labels: Labels) -> Target | str:
    """How loud a frame is, dB; db (n,)."""
    return _values("energy", "how loud: energy in dB", np.arange(len(db)), np.maximum(db, QUIET_DB),
                   labels.voices[frame_of])


def voicing(hz: Array, frame_of: Array, labels: Labels) -> Target | str:
    """Whether a frame is voiced; hz (n,), 0 where it is not."""
    units = _numbered(labels.voices[frame_of])
    if len(np.unique(units)) < FEWEST or not 0 < (hz > 0).mean() < 1:
        return f"voiced and unvoiced frames of {FEWEST} speakers or more are needed"
    return Target("voicing", "whether a frame is voiced", "accuracy", "frames", np.arange(len(hz)),
                  (hz > 0).astype(int), units, "speakers", 0.5, classes=2)


def text(utterances: Sequence[StoredUtterance], labels: Labels) -> Target | str:
    """The characters, by CTC. Utterances with a rare character or over LONGEST_S are left out, as are those beyond
    TEXT_S seconds of all."""
    texts = [plain_text(u.text or "") if u.duration_s <= LONGEST_S else "" for u in utterances]
    common = {c for c, n in Counter(c for t in texts for c in set(t)).items() if n >= LETTERS}
    usable = [i for i, t in enumerate(texts) if t and set(t) <= common]
    seconds = np.cumsum([utterances[i].duration_s for i in usable])
    chosen = [i for i, end in zip(usable, seconds, strict=True) if end <= TEXT_S]
    units = _numbered(labels.sentences[chosen])
    if len(np.unique(units)) < FEWEST * 2:
        return f"{len(np.unique(units))} sentences have text; {FEWEST * 2} are needed"
    return Target("text", "what is said: character errors by CTC", "errors", "utterances", np.array(chosen),
                  np.array([texts[i] for i in chosen], object), units, "sentences", 1.0, higher=False)


def robustness(labels: Labels) -> Target | str:
    """How far noise moves frames: cosine distance of a noisy frame from the clean one."""
    if not labels.twins:
        return ("no recording has a noisy copy: name pairs p/001 and p_noisy/001, or give the noisy one a field "
                "`clean` with the key of the clean one")
    clean, noisy = np.array(labels.twins).T
    return Target("robustness", "how far noise moves it: cosine distance", "distance", "pairs", clean, noisy,
                  np.arange(len(clean)), "recordings", 1.0, higher=False)


def _classes(name: str, question: str, rows: Literal["frames", "utterances"], values: Sequence[str | None],
             number: dict[str, int], units: Array, apart: str) -> Target:
    chosen = np.array([i for i, value in enumerate(values) if value in number])
    return Target(name, question, "accuracy", rows, chosen, np.array([number[str(values[i])] for i in chosen]),
                  _numbered(units[chosen]), apart, 1 / len(number), classes=len(number))


def _values(name: str, question: str, frames: Array, values: Array, units: Array) -> Target | str:
    units = _numbered(units)
    if not len(units) or units.max() + 1 < FEWEST:
        return f"frames of {FEWEST} speakers or more are needed"
    return Target(name, question, "r2", "frames", frames, values, units, "speakers", 0.0)


def _numbered(labels: Array) -> Array:
    """The labels as numbers from 0 without gaps."""
    return np.unique(labels, return_inverse=True)[1] if len(labels) else np.zeros(0, int)


def _joined(labels: Iterable[Iterable[object]]) -> Array:
    """The number of the group of each item: items that share a label, directly or through others, are of one group."""
    labels = [list(own) for own in labels]
    first: dict[object, int] = {}
    above = list(range(len(labels)))
    top = _finder(above)
    for number, own in enumerate(labels):
        for label in own:
            one, other = top(first.setdefault(label, number)), top(number)
            above[max(one, other)] = min(one, other)
    return _numbered(np.array([top(number) for number in range(len(labels))]))


def _finder(above: list[int]) -> Callable[[int], int]:
    def top(number: int) -> int:
        while above[number] != number:
            above[number] = number = above[above[number]]
        return number

    return top
