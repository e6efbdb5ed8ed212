"""What `vocode` and `convert` are given, recordings, folders and stores, and the files that they write.

Features of recordings that are given by path are kept in a store of their own, so that the second time nothing is
extracted. A feature is called there after what made it, so that there may be those of as many runs as one likes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import featstore as fs
from featstore import storage
from featstore.errors import BadAudio, BadRequest, IdentityMismatch, MissingWeights
from featstore.store import open_or_create
from featstore_extractors import RequestError, parse

from .run import Read, check_read, differing, request_of

__all__ = ["FORMATS", "Job", "Made", "Sources", "Stage", "Watch", "check_out", "jobs", "places", "refuse", "sources",
           "staged", "write_audio"]

FORMATS = ("wav", "flac")
SHOWN = 5  # recordings that cannot be used, told one by one
NO_FORMATS = ("mp3", "ogg", "opus", "m4a", "aac", "aif", "aiff", "wma")  # names of files, and hardly of folders


@dataclass(frozen=True)
class Made:
    """One waveform that was written. `seconds`: its length; `took_s`: how long it took.

    semitones: by which it is higher than the recording. remarks: what to know of it.
    """

    key: str
    path: Path
    seconds: float
    took_s: float
    semitones: float = 0.0
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """How far a song is: `done`, 0 to 1, of `what`, "acoustic model" or "waveform"; begun anew where memory was short.

    title: of the song, which is the `number`-th, from 1, of `count`.
    """

    title: str
    number: int
    count: int
    what: str
    done: float


Watch = Callable[[str, float], None]  # hears `what` and `done` of a stage


def staged(watch: Callable[[Stage], None] | None, job: Job, number: int, count: int) -> Watch:
    """What tells `watch` of a song."""
    if watch is None:
        return lambda what, done: None
    return lambda what, done: watch(Stage(job.title, number, count, what, done))


@dataclass(frozen=True)
class Job:
    """An utterance of a store, and the names under which it has the features, by role; `reason` why it has them not."""

    store: fs.Store
    key: str
    names: Mapping[str, str]
    title: str
    reason: str = ""


@dataclass(frozen=True)
class Sources:
    """How features of recordings come about.

    home: the store that they are kept in; None for `sources()`.
    weights: of encoders, by the name of the feature: where they are not found by their digest.
    requests: what makes a feature, by its name: for an extractor of one's own, which a run knows no import path of.
    device: where encoders run.
    """

    home: storage.Place | None = None
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    requests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    device: str = "cpu"
    progress: Callable[[fs.Progress], None] | None = None


def sources() -> Path:
    """The store in which features of recordings that were given by path are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "featstore" / "sources.zarr"


def jobs(inputs: Sequence[str | storage.Place], reads: Mapping[str, Read], what: str, how: Sources | None = None
         ) -> list[Job]:
    """The utterances of recordings, folders of them and stores, with the features `reads`, by role, of `what`.

    Recordings that cannot be used have a `reason`, as long as there is one that can.

    Raises:
        MissingFeature, IdentityMismatch: a store has not just these.
        MissingWeights: of an encoder, which says their digest.
        BadAudio: no recording can be used.
        BadRequest: there is nothing.
    """
    found = [job for one in inputs for job in _jobs(storage.place(one), reads, what, how or Sources())]
    if not found:
        raise BadRequest(f"no recordings are in {', '.join(map(str, inputs))}: give files of sound, folders of them, "
                         "or stores")
    if all(job.reason for job in found):
        refuse(found)
    return found


def refuse(found: Sequence[Job], more: str = "") -> None:
    """Raises BadAudio if there are recordings that cannot be used."""
    failed = [job for job in found if job.reason]
    if not failed:
        return
    if len(found) == 1:
        raise BadAudio(f"{failed[0].title} cannot be used: {failed[0].reason}. Give a recording that has sound")
    told = "; ".join(f"{job.title}: {job.reason}" for job in failed[:SHOWN])
    left = f"; and {len(failed) - SHOWN:,} more" if len(failed) > SHOWN else ""
    raise BadAudio(f"{len(failed):,} of {len(found):,} recordings cannot be used: {told}{left}{more}")


def _jobs(where: storage.Place, reads: Mapping[str, Read], what: str, how: Sources) -> list[Job]:
    if (where / "zarr.json").exists():
        store = fs.open(where)
        names = {role: _named(read, store, what) for role, read in reads.items()}
        return [Job(store, key, names, key) for key in store.utterances]
    if not where.exists():
        raise BadRequest(f"{where} does not exist: give recordings, folders of them, or stores")
    if not isinstance(where, Path):
        raise BadRequest(f"{where} is no store: of URLs only stores are taken, recordings must be on this machine")
    return _extracted(where, reads, what, how)


def _named(read: Read, store: fs.Store, what: str) -> str:
    """The name under which a store has just the feature that `what` reads: another one will do, too."""
    for name in (read.name, *store.features):
        if name in store.features and store.features[name].spec.identity == read.spec.identity:
            return name
    check_read(read, store, what)  # which names what differs, and forgives what nobody knows of imported weights
    return read.name


def _extracted(where: Path, reads: Mapping[str, Read], what: str, how: Sources) -> list[Job]:
    """Jobs for a recording or a folder, whose features are brought up to date in the store of sources."""
    corpus = _corpus(where)
    extractors, names = {}, {}
    for role, read in reads.items():
        made, spec = _extractor(read, what, how)
        names[role] = f"{spec.made_by[:40]}-{spec.identity[:12]}"
        extractors[names[role]] = made
    home = sources() if how.home is None else how.home
    if isinstance(home, Path):
        home.parent.mkdir(parents=True, exist_ok=True)
    store = open_or_create(home)
    report = fs.extract(corpus, store, extractors, device=how.device, workers=0 if len(corpus) < 4 else None,
                        progress=how.progress)
    if report.interrupted:
        raise KeyboardInterrupt
    failed = {failure.utterance: failure.reason for failure in report.failures}
    store.refresh()
    single = where.is_file()
    return [Job(store, u.key, names, where.stem if single else u.key.partition("/")[2], failed.get(u.key, ""))
            for u in corpus]


def _extractor(read: Read, what: str, how: Sources) -> tuple[Any, fs.Spec]:
    """What makes just the feature that was read; the fields in which it cannot be had here are named."""
    try:
        (made,) = parse(f"{read.name}={how.requests.get(read.name) or request_of(read.spec)}").values()
    except RequestError as error:
        raise BadRequest(f"{what} reads {read.name}, made by {read.spec.made_by}, which cannot be asked for here "
                         f"({error}). Say how it is made: -f {read.name}=my_module.MyExtractor") from error
    fields = {f.name for f in dataclasses.fields(made)}
    weights = how.weights.get(read.name) or read.spec.weights
    if weights and "weights" in fields and read.name not in how.requests:
        more = {"dtype": read.spec.dtype} if "dtype" in fields and read.spec.weights else {}
        made = dataclasses.replace(made, weights=weights, **more)
    try:
        spec = fs.Spec.of(made)
    except MissingWeights as error:
        known = f" {read.spec.weights[:15]}..." if read.spec.weights else ""
        raise MissingWeights(f"{what} needs {read.spec.made_by} weights{known}, not found on this machine (hub cache, "
                             f"$FEATSTORE_WEIGHTS). Give --weights {read.name}=FILE") from error
    differs = differing(read.spec, spec)
    if differs:
        told = ", ".join(f"{name}: {was!r}, here {now!r}" for name, (was, now) in differs.items())
        way = ("give the weights it was trained with" if set(differs) <= {"weights", "dim"} else
               "install the version of featstore that it was trained with")
        raise IdentityMismatch(f"{what} was trained on {read.request}, which is made otherwise here ({told}): {way}")
    return made, spec


def _corpus(where: Path) -> fs.Corpus:
    """The recordings below a path, with keys that no other path has."""
    place = where.resolve()
    mark = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
    if where.is_file():
        return fs.Corpus(place.parent, place.name, (fs.Utterance(f"{mark}/{place.stem[:200]}", place.name),))
    return fs.corpus(where, key=mark + "/{key}")


def check_out(out: Path, form: str | None) -> None:
    """BadRequest for a file or a form that is not written: to be told before an hour of encoding."""
    if form is not None and form not in FORMATS:
        raise BadRequest(f"format {form!r}: expected one of {', '.join(FORMATS)}")
    if out.suffix.lower().lstrip(".") in NO_FORMATS and not out.is_dir():
        raise BadRequest(f"{out}: expected a file of {' or '.join(FORMATS)}, or a folder")


def places(found: Sequence[Job], out: Path, form: str | None) -> list[Path]:
    """The file of each job: `out` itself for one, or a file below it."""
    check_out(out, form)
    if out.suffix.lower().lstrip(".") in FORMATS and not out.is_dir():
        if len(found) > 1:
            raise BadRequest(f"{out} is one file and {len(found)} utterances were found: name a folder")
        _spare(found, [out])
        return [out]
    files = [out / f"{_safe(job.title)}.{form or 'wav'}" for job in found]
    twice, count = Counter(files).most_common(1)[0]
    if count > 1:
        raise BadRequest(f"{count} utterances would be written to {twice}: take them in turns, into folders of their "
                         "own")
    _spare(found, files)
    return files


def _spare(found: Sequence[Job], files: Sequence[Path]) -> None:
    """BadRequest where a recording itself would be written over."""
    there = {file.resolve() for file in files if file.exists()}
    if not there:
        return
    for job in found:
        known = job.store.utterances[job.key]
        if known.audio and (source := Path(known.root or "", known.audio)).resolve() in there:
            raise BadRequest(f"{source} is a recording that is read, and would be written over: give another --out")


def _safe(key: str) -> Path:
    """A key as a path below a folder, whatever it holds."""
    parts = [part.replace("\0", "") for part in key.replace("\\", "/").split("/")]
    return Path(*[part if part not in ("", ".", "..") else "_" for part in parts])


def write_audio(place: Path, pieces: Iterator[np.ndarray], sample_rate: int) -> int:
    """Write 16-bit audio as it comes; it appears under its name when it is whole. Returns the samples.

    Samples beyond full scale are held at it; vocoders that end in tanh have none.
    """
    import soundfile as sf

    place.parent.mkdir(parents=True, exist_ok=True)
    staged = place.with_name(f".{place.name}.part")
    count = 0
    try:
        with sf.SoundFile(staged, "w", sample_rate, 1, "PCM_16", format=place.suffix.lstrip(".").upper()) as file:
            for piece in pieces:
                file.write(np.clip(piece, -1.0, 1.0))
                count += len(piece)
        staged.replace(place)
    finally:
        staged.unlink(missing_ok=True)
    return count
