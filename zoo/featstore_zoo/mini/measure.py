"""What the content encoder knows, on readers it has never heard: phones beside log-mel, and of voice little.

Phones are those that espeak-ng's rules give for the transcripts. A probe learns from all held-out readers but one and
is asked that one, by CTC, each in turn. A phone lasts several frames, so that both features are also read as means of
a few frames; log-mel besides with its neighbours, which makes its probes larger than the encoder's: it is not for want
of context or of parameters that they err more.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import featstore as fs
from featstore_extractors import parse

from .. import learners, probe
from .phones import NUMBER, PHONES, SILENCE
from .speech import HELD_OUT, manifest
from .voices import transcribed

Array = np.ndarray
BRITISH = ("vctk_", "librivox_austen")  # readers by the rules of British English; the others by American ones
LONGEST_S = 20.0
DRAWS = 2000
MEANS = (1, 3, 5)                      # frames whose mean a probe reads
BESIDE = {"log-mel": (1, 4)}           # frames on either side that a probe reads beside its own


@dataclass(frozen=True)
class Sentence:
    """An utterance of a held-out reader: its key, and its phones as one letter each."""

    key: str
    reader: str
    phones: str


@dataclass(frozen=True)
class Errors:
    """Phone errors (U,) and phones (U,) by utterance, for a feature with some context and a probe."""

    name: str
    parameters: int
    wrong: Array
    count: Array

    def rate(self, chosen: Array | slice = slice(None)) -> float:
        return float(self.wrong[chosen].sum() / self.count[chosen].sum())


def prepared(audio: Path, out: Path, weights: Path | None) -> tuple[fs.Store, list[Sentence]]:
    """A store, made anew, of the held-out readers with log-mel, f0, the encoder's content and phones; and sentences."""
    out.mkdir(parents=True, exist_ok=True)
    listed = [{"utterance": f"{row['speaker']}/{row['utterance']}", "path": str((audio / row["path"]).resolve()),
               "speaker": row["speaker"], "text": row["text"]} for row in manifest(audio) if row["speaker"] in HELD_OUT]
    (out / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed), "utf-8")
    path = out / "held_out.zarr"
    shutil.rmtree(path, ignore_errors=True)
    given = "" if weights is None else f",weights={weights}"
    fs.extract(fs.corpus(out / "held_out.jsonl"), fs.create(path),
               parse("log-mel", "f0", f"mini{given}", f"phones=mini:phones{given}"))
    store = fs.open(path)
    found = []
    for key, u in store.utterances.items():
        voice = "gmw/en" if str(u.speaker).startswith(BRITISH) else "gmw/en-US"
        if u.text and u.duration_s <= LONGEST_S and not str(u.speaker).endswith("_noisy"):
            found.append(Sentence(key, str(u.speaker), "".join(_letter(n) for n in transcribed(u.text, voice))))
    return store, found


def phone_errors(store: fs.Store, sentences: Sequence[Sentence], brief: bool = False, seed: int = 0,
                 told: Callable[[str], None] = print) -> list[Errors]:
    """Of every feature, reading of its frames, and probe; brief: of the encoder's content by one of them."""
    view = store.view(["log-mel", "mini"], like="mini")
    frames = {s.key: view[s.key] for s in sentences}
    found = []
    for feature in ("mini",) if brief else ("mini", "log-mel"):
        whole = [np.asarray(frames[s.key][feature], np.float32) for s in sentences]
        for name, rows in _readings(feature, whole, brief):
            for kind in learners.PROBES[1:] if brief else learners.PROBES:
                wrong = _left_out(kind, rows, sentences, seed)
                found.append(Errors(f"{name}, {kind}", _size(kind, rows[0].shape[1]), wrong, _counts(sentences)))
                told(f"{found[-1].name}: {found[-1].rate():.1%} of the phones are wrong "
                     f"({found[-1].parameters:,} parameters)")
    return found


def _readings(feature: str, whole: Sequence[Array], brief: bool) -> Iterator[tuple[str, list[Array]]]:
    for count in MEANS[1:2] if brief else MEANS:
        yield f"{feature}{f' over {count}' if count > 1 else ''}", [_mean(rows, count) for rows in whole]
    for context in () if brief else BESIDE.get(feature, ()):
        yield f"{feature} +-{context}", [_beside(rows, context) for rows in whole]


def _left_out(kind: learners.Probe, rows: Sequence[Array], sentences: Sequence[Sentence], seed: int) -> Array:
    """Phone errors (U,), each reader's by a probe that learnt from the others."""
    wrong = np.zeros(len(sentences))
    for reader in sorted({s.reader for s in sentences}):
        asked = [i for i, s in enumerate(sentences) if s.reader == reader]
        learnt = [i for i, s in enumerate(sentences) if s.reader != reader]
        texts = learners.transcribe(kind, [rows[i] for i in learnt], [sentences[i].phones for i in learnt],
                                    [rows[i] for i in asked], seed)
        for i, text in zip(asked, texts, strict=True):
            wrong[i] = learners.edits(text, sentences[i].phones)
    return wrong


def own_errors(store: fs.Store, sentences: Sequence[Sentence]) -> Errors:
    """Of the encoder's own phones, the best over five frames, silences and repetitions left out; no probe learns."""
    wrong = []
    for sentence in sentences:
        path = _mean(np.asarray(store[sentence.key, "phones"][:]), MEANS[-1]).argmax(1)
        text = "".join(_letter(n) for n in path[np.flatnonzero(np.diff(path, prepend=-1))] if n != NUMBER[SILENCE])
        wrong.append(learners.edits(text, sentence.phones))
    return Errors("mini's own phones", 0, np.array(wrong, float), _counts(sentences))


def interval(of: Callable[[Array], float], utterances: int, seed: int = 0) -> tuple[float, float]:
    """95 % of a number by drawing utterances anew."""
    rng = np.random.default_rng(seed)
    draws = [of(rng.integers(0, utterances, utterances)) for _ in range(DRAWS)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def known(store: fs.Store) -> probe.Study:
    """Speaker and f0 by the same probes as `featstore probe`."""
    return probe.study(store, ["log-mel", "mini"], targeted=("speaker", "f0"))


def report(audio: Path, out: Path, weights: Path | None = None, brief: bool = False,
           told: Callable[[str], None] = print) -> dict[str, Any]:
    """All numbers, told line by line, and written to out/measured.json; brief: what an ablation compares."""
    store, sentences = prepared(audio, out, weights)
    readers = sorted({s.reader for s in sentences})
    told(f"{len(sentences)} sentences of {len(readers)} readers held out: {', '.join(readers)}")
    errors = phone_errors(store, sentences, brief, told=told)
    errors.append(own_errors(store, sentences))
    study = known(store)
    result: dict[str, Any] = {"readers": readers, "sentences": len(sentences), "phones": [], "known": []}
    for one in errors:
        low, high = interval(one.rate, len(sentences))
        by = {r: round(one.rate(np.array([s.reader == r for s in sentences])), 4) for r in readers}
        result["phones"].append({"name": one.name, "parameters": one.parameters, "rate": one.rate(), "low": low,
                                 "high": high, "readers": by})
        told(f"phone errors, {one.name}: {one.rate():.1%} [{low:.1%}, {high:.1%}]")
    if not brief:
        result["lower"] = _lower(errors, told)
    for target in study.targets:
        for feature in ("log-mel", "mini"):
            for kind in learners.PROBES:
                found = study.of(target.name, feature, kind)
                result["known"].append({"target": target.name, "feature": feature, "probe": kind, "value": found.value,
                                        "low": found.low, "high": found.high, "chance": target.chance})
                told(f"{target.name}, {feature}, {kind}: {found.value:.3f} [{found.low:.3f}, {found.high:.3f}], "
                     f"chance {target.chance:.3f}")
    (out / "measured.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), "utf-8")
    return result


def _lower(errors: Sequence[Errors], told: Callable[[str], None]) -> dict[str, Any]:
    """By how much the encoder's best probe errs less than the best of log-mel's."""
    best = min((e for e in errors if e.name.startswith("mini") and e.parameters), key=lambda e: e.rate())
    rival = min((e for e in errors if e.name.startswith("log-mel")), key=lambda e: e.rate())
    by = 1 - best.rate() / rival.rate()
    low, high = interval(lambda chosen: 1 - best.rate(chosen) / rival.rate(chosen), len(best.wrong))
    told(f"{best.name} beside the best of log-mel ({rival.name}): lower by {by:.1%} [{low:.1%}, {high:.1%}]")
    return {"mini": best.name, "beside": rival.name, "by": by, "low": low, "high": high}


def _letter(phone: int) -> str:
    return chr(0x100 + int(phone))


def _counts(sentences: Sequence[Sentence]) -> Array:
    return np.array([len(s.phones) for s in sentences], float)


def _beside(rows: Array, context: int) -> Array:
    """(T, D) -> (T, (2 context + 1) D): each frame with its neighbours."""
    padded = np.pad(rows, ((context, context), (0, 0)), mode="edge")
    return np.concatenate([padded[i : i + len(rows)] for i in range(2 * context + 1)], axis=1)


def _mean(rows: Array, count: int) -> Array:
    """(T, D) -> (T, D): of `count` frames around each."""
    padded = np.pad(rows, ((count // 2, count // 2), (0, 0)), mode="edge")
    return np.asarray(np.mean([padded[i : i + len(rows)] for i in range(count)], axis=0, dtype=np.float32))


def _size(kind: str, dim: int) -> int:
    """Parameters of a CTC probe, at most: phones that no sentence has are left out."""
    outputs = len(PHONES)
    return (dim + 1) * outputs if kind == "linear" else (dim + 1) * learners.HIDDEN + (learners.HIDDEN + 1) * outputs

