"""Converted recordings against their references: paired, measured in parallel, with intervals and paired tests.

    report/   utterances.csv  summary.csv  comparison.csv  evaluation.json  index.html  utterances/0001.html ...
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import multiprocessing
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

import featstore as fs
from featstore import memory, storage
from featstore.errors import BadRequest, IdentityMismatch, MissingFeature
from featstore.pipeline import worker_environment

from . import measure, metrics, recognition
from .intervals import Difference, Interval, difference, holm, interval
from .measure import AMPHION, METRICS, STANDARD, TEXT, Align, Job, Measured, Settings
from .metrics import Undefined
from .pairs import Pair, Recording, pair, recordings

Array = np.ndarray
Place = str | storage.Place
Told = Callable[[str, int, int], None]  # what is being done, how many are done, of how many

REPORT = "evaluation.json"  # by which a folder is known as a report of ours, which may be replaced
ALONE = 4                   # fewer utterances are measured in this process: others take seconds to begin
SMALL_FROM_S = 600.0        # more sound than this in all is kept as Vorbis in the pages


@dataclass(frozen=True)
class Summary:
    """A metric of one system over a group of utterances. by: all, speaker or condition. missing: how many lack it."""

    system: str
    by: str
    group: str
    metric: str
    interval: Interval
    missing: int


@dataclass(frozen=True)
class Comparison:
    """Two systems in one metric, on the utterances that both have; p-values corrected over all of an evaluation."""

    metric: str
    one: str
    other: str
    difference: Difference


@dataclass(frozen=True)
class Evaluation:
    """All that was found. frechet: feature -> system -> distance. about: how it was made, for whoever repeats it."""

    measured: tuple[Measured, ...]
    summaries: tuple[Summary, ...]
    comparisons: tuple[Comparison, ...]
    frechet: Mapping[str, Mapping[str, float]]
    settings: Settings
    about: Mapping[str, Any]

    @property
    def systems(self) -> list[str]:
        return list(dict.fromkeys(one.system for one in self.measured))

    def summary(self, system: str, metric: str, by: str = "all", group: str = "") -> Summary:
        """One summary. KeyError where there is none."""
        for found in self.summaries:
            if (found.system, found.metric, found.by, found.group) == (system, metric, by, group):
                return found
        raise KeyError(f"no summary of {metric} of {system} by {by} {group!r}")

    def to_json(self) -> dict[str, Any]:
        """Everything, with None for what is no number."""
        return _plain({"about": self.about, "settings": dataclasses.asdict(self.settings),
                       "metrics": {name: METRICS[name]._asdict() for name in self.settings.names},
                       "summary": [_flat(one, "interval") for one in self.summaries],
                       "comparison": [_flat(one, "difference") for one in self.comparisons],
                       "frechet": self.frechet, "utterances": [dataclasses.asdict(one) for one in self.measured]})


def evaluate(reference: Place, converted: Mapping[str, Place], out: Path | None = None, *, target: Place | None = None,
             split: str | None = None, listed: Path | None = None, names: Sequence[str] = (), align: Align = "dtw",
             variant: str | None = None, f0: str = "f0:swift", speaker: str = "speaker", recogniser: str | None = None,
             language: str | None = None, frechet: Sequence[str] = (), sample_rate: int | None = None,
             workers: int | None = None, device: str = "cpu", seed: int = 0, progress: Told | None = None
             ) -> Evaluation:
    """Compare what systems made of recordings with their references; write a report into the folder `out`, if given.

    reference, target: a store, a folder or a manifest. converted: such places by the name of the system.
    target: recordings of the voices that were to be heard; of several, a converted one's speaker says which.
    split: "main/test": of a reference that is a store, only that part.
    listed: a CSV of pairs, where they are not called alike (`pairs.pair`).
    names: of `measure.METRICS`; none: all that need no recogniser, and those of text where there is one.
    align: "dtw" pairs frames by their mel-cepstra; "none" by equal times.
    variant: "amphion" adds metrics as Amphion's evaluation defines them.
    recogniser: see `recognition.recogniser`; it is loaded once. Where a reference has no text, what is recognised in it
        stands for it.
    frechet: features of the reference, a store, over which Fréchet distances are taken; what was converted must be in
        stores that have them too.
    sample_rate: at which all is compared. None: the lowest of all recordings.
    workers: processes. None: one for each core.
    seed: of the bootstrap.

    Raises:
        BadRequest: something has no counterpart, is not known, or `out` is a folder of something else.
        BadAudio: a recording cannot be read.
        MissingPackage, MissingWeights, ImportError: what a metric needs is not installed.
    """
    if out is not None:
        _check_out(out)
    whole = recordings(reference)
    wanted = whole if split is None else recordings(reference, split)
    made = {system: recordings(place) for system, place in converted.items()}
    pairs = pair(wanted, made, listed, more=whole)
    voices = recordings(target) if target is not None else {}
    rate = sample_rate or min(one.sample_rate for p in pairs for one in (p.reference, *p.converted.values()))
    chosen = _names(names, variant, recogniser, target is not None)
    settings = Settings(rate, chosen, align, f0, speaker, recogniser, language)
    measure.check(settings)
    spectra = {name: _frechet(reference, converted, name, pairs) for name in frechet}
    heard = _transcripts(pairs, settings, device, progress) if recogniser is not None else [{} for _ in pairs]
    about = {"featstore": metadata.version("featstore"), "reference": str(reference), "target": target and str(target),
             "converted": {system: str(place) for system, place in converted.items()}, "split": split,
             "pairs": listed and str(listed), "seed": seed,
             "texts_as_heard": sum("" in texts for texts in heard)}  # of references without a text
    with contextlib.ExitStack() as held:
        staged = None if out is None else held.enter_context(_staged(out))
        processes = workers if workers is not None else memory.cores()
        run = held.enter_context(_processes(settings, 1 if len(pairs) < ALONE and workers is None else processes))
        targets = _targets(voices, pairs, run, progress)
        pages = [staged and staged / "utterances" / f"{number + 1:04d}.html" for number in range(len(pairs))]
        small = _seconds(pairs) > SMALL_FROM_S if staged else False
        jobs = [Job(one, text, targets[number], page, small)
                for number, (one, text, page) in enumerate(zip(pairs, heard, pages, strict=True))]
        done = _told(run(measure.work, jobs), "measured", len(jobs), progress)
        measured = tuple(row for rows in done for row in rows)
        found = Evaluation(measured, tuple(_summaries(measured, settings, seed)),
                           tuple(_comparisons(measured, settings, seed)), spectra, settings, about)
        if staged is not None:
            write(found, staged)
    return found


def write(found: Evaluation, out: Path) -> None:
    """Write the tables of an evaluation, and the page that shows them, into a folder that is there."""
    from . import report

    rows = [{"system": one.system, "utterance": one.utterance, "speaker": one.speaker, "condition": one.condition,
             "seconds": round(one.seconds, 3), **one.values, "text": one.text, "heard": one.heard,
             "reasons": "; ".join(f"{name}: {why}" for name, why in one.reasons.items())} for one in found.measured]
    _write_csv(out / "utterances.csv", rows)
    _write_csv(out / "summary.csv", [_flat(one, "interval") for one in found.summaries])
    _write_csv(out / "comparison.csv", [_flat(one, "difference") for one in found.comparisons])
    (out / "index.html").write_text(report.index(found), "utf-8")
    (out / REPORT).write_text(json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n", "utf-8")


def _names(asked: Sequence[str], variant: str | None, recogniser: str | None, target: bool) -> tuple[str, ...]:
    """The metrics in the order of their table."""
    if variant not in (None, "amphion"):
        raise BadRequest(f"no variant {variant!r}: there is amphion")
    text = set(TEXT) & set(asked)
    if text and recogniser is None:
        need = "need" if len(text) > 1 else "needs"
        raise BadRequest(f"{', '.join(sorted(text))} {need} a recogniser: --recogniser whisper:small, a folder, or "
                         "pocketsphinx (English, offline)")
    names = set(asked) or {*STANDARD, *(TEXT if recogniser else ()), *(["source_similarity"] if target else ())}
    names |= set(AMPHION) if variant else set()
    return tuple(name for name in METRICS if name in names) + tuple(sorted(names - METRICS.keys()))


def _seconds(pairs: Sequence[Pair]) -> float:
    """About how long all recordings are together."""
    return sum(one.duration_s for p in pairs for one in (p.reference, *p.converted.values()))


def _transcripts(pairs: Sequence[Pair], settings: Settings, device: str, progress: Told | None
                 ) -> list[dict[str, str]]:
    """What is heard in each pair, by system; under "" in the reference, where its text is not known."""
    recognise = recognition.recogniser(settings.recogniser or "", device)
    found = []
    for number, one in enumerate(pairs):
        wanted = dict(one.converted) | ({"": one.reference} if one.reference.text is None else {})
        language = measure.language_of(one.reference, settings)
        found.append({system: recognition.transcribe(recognise, recording.read(recognition.SAMPLE_RATE), language)
                      for system, recording in wanted.items()})
        if progress is not None:
            progress("recognised", number + 1, len(pairs))
    return found


Run = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


@contextlib.contextmanager
def _processes(settings: Settings, workers: int) -> Iterator[Run]:
    """What calls a function of `measure` on many things, in their order, in this process or several."""
    if workers <= 1:
        measure.start(settings)
        yield lambda function, items: map(function, items)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), measure.start, (settings,))
    try:
        yield lambda function, items: _in_order(pool, function, items, 2 * workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, function: Callable[[Any], Any], items: Sequence[Any], ahead: int
              ) -> Iterator[Any]:
    """Results in the order of the items, of which no more than `ahead` are under way."""
    pending: dict[Future[Any], int] = {}
    ready: dict[int, Any] = {}
    given = taken = 0
    while taken < len(items):
        while len(pending) < ahead and given < len(items) and given - taken < 64 * ahead:
            with worker_environment(1):
                pending[pool.submit(function, items[given])] = given
            given += 1
        done, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            ready[pending.pop(future)] = future.result()
        while taken in ready:
            yield ready.pop(taken)
            taken += 1


def _told(results: Iterable[Any], what: str, count: int, progress: Told | None) -> Iterator[Any]:
    for number, result in enumerate(results, start=1):
        if progress is not None:
            progress(what, number, count)
        yield result


def _targets(voices: Mapping[str, Recording], pairs: Sequence[Pair], run: Run, progress: Told | None
             ) -> list[dict[str, Array]]:
    """The embedding of each pair's target by system: the mean of the target's recordings."""
    if not voices:
        return [{} for _ in pairs]
    by_speaker: dict[str | None, list[Array]] = {}
    vectors = _told(run(measure.embed, list(voices.values())), "target's recordings heard", len(voices), progress)
    for recording, vector in zip(voices.values(), vectors, strict=True):
        if not isinstance(vector, Undefined):
            by_speaker.setdefault(recording.speaker, []).append(vector)
    if not by_speaker:
        raise BadRequest("the target has no voice in any of its recordings: they are silent, or too short")
    means = {speaker: np.mean(found, axis=0) for speaker, found in by_speaker.items()}
    return [{system: _target_of(recording, means) for system, recording in one.converted.items()} for one in pairs]


def _target_of(recording: Recording, means: Mapping[str | None, Array]) -> Array:
    if len(means) == 1:
        return next(iter(means.values()))
    if recording.speaker not in means:
        known = ", ".join(sorted(str(speaker) for speaker in means))
        raise BadRequest(f"{recording.key}: the target has several speakers ({known}), and this was converted to "
                         f"{recording.speaker or 'nobody that is named'}: give one target, or a folder per speaker")
    return means[recording.speaker]


def _frechet(reference: Place, converted: Mapping[str, Place], name: str, pairs: Sequence[Pair]) -> dict[str, float]:
    """System -> Fréchet distance of a stored feature's vectors to those of the reference, of what is compared."""
    spec = _store_of(reference, name).feature(name).spec
    found = {}
    for system, place in converted.items():
        store = _store_of(place, name)
        if differs := spec.differs(store.feature(name).spec):
            raise IdentityMismatch(f"{name} of {system} was made otherwise than the reference's: {', '.join(differs)}")
        of = [(p.reference.key, p.converted[system].key) for p in pairs if system in p.converted]
        one, other = (_vectors(held, name, keys) for held, keys in
                      zip((_store_of(reference, name), store), zip(*of, strict=True), strict=True))
        found[system] = metrics.frechet_distance(one, other)
    return found


def _store_of(place: Place, name: str) -> fs.Store:
    where = storage.place(place)
    if not (where / "zarr.json").exists():
        raise BadRequest(f"{where} is no store: a Fréchet distance over {name} needs stores that have it. "
                         f"Try: featstore extract {where} {where}.zarr -f {name}")
    return fs.open(where)


def _vectors(store: fs.Store, name: str, keys: Iterable[str]) -> Array:
    """All vectors (N, D) of a feature of some utterances: frames, or one of each. An utterance counts once."""
    feature = store.feature(name)
    if not feature.dim:
        raise MissingFeature(f"{name} is no embedding: it has one value per frame")
    return np.concatenate([np.atleast_2d(feature[key].as_float()) for key in dict.fromkeys(keys)])


def _summaries(measured: Sequence[Measured], settings: Settings, seed: int) -> Iterator[Summary]:
    groups: list[tuple[str, str, list[Measured]]] = [("all", "", list(measured))]
    for by in ("speaker", "condition"):
        known = sorted({value for one in measured if (value := getattr(one, by)) is not None})
        groups += [(by, value, [one for one in measured if getattr(one, by) == value]) for value in known]
    for by, group, rows in groups:
        for system in dict.fromkeys(one.system for one in measured):
            of = [one for one in rows if one.system == system]
            for name in settings.names if of else ():
                values = np.array([one.values[name] for one in of])
                weights = np.array([one.weights[name] for one in of]) if name in TEXT else None
                yield Summary(system, by, group, name, interval(values, weights, seed=seed),
                              int((~np.isfinite(values)).sum()))


def _comparisons(measured: Sequence[Measured], settings: Settings, seed: int) -> list[Comparison]:
    """Every two systems in every metric. Holm's correction is over all of them."""
    rows: dict[str, dict[str, Measured]] = {}
    for row in measured:
        rows.setdefault(row.system, {})[row.utterance] = row
    found = []
    for name in settings.names:
        for one, other in combinations(rows, 2):
            both = [key for key in rows[one] if key in rows[other]]
            values = [np.array([rows[system][key].values[name] for key in both]) for system in (one, other)]
            found.append(Comparison(name, one, other, difference(*values, seed=seed)))
    corrected = holm([comparison.difference.p for comparison in found])
    return [dataclasses.replace(comparison, difference=comparison.difference._replace(corrected=p))
            for comparison, p in zip(found, corrected, strict=True)]


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise BadRequest(f"{out} is a file: give the name of a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / REPORT).exists():
        raise BadRequest(f"{out} has files that are no report of this command: give another folder")


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all went well, an older report's too."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    staged, old = (out.with_name(f".{out.name}.{mark}.{what}") for what in ("part", "old"))
    (staged / "utterances").mkdir(parents=True)
    try:
        yield staged
        if out.exists():
            out.rename(old)
        staged.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for folder in (staged, old):
            shutil.rmtree(folder, ignore_errors=True)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["system"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: "" if isinstance(value, float) and math.isnan(value) else value
                          for name, value in row.items()} for row in rows)


def _flat(one: Summary | Comparison, part: str) -> dict[str, Any]:
    """A summary or comparison as one row."""
    row = {field.name: getattr(one, field.name) for field in dataclasses.fields(one) if field.name != part}
    return {**row, **getattr(one, part)._asdict()}


def _plain(value: Any) -> Any:
    """What JSON knows: None for NaN, lists for tuples."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
