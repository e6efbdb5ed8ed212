"""Log-mel to waveform at inference: whole or in chunks that join without a seam, from files, folders and stores.

A chunk is rendered with the frames that its samples depend on (`receptive_field`) on either side, and what lies outside
is cut off: so a song in chunks is the song made at once, and memory does not grow with it.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

import featstore as fs
from featstore import storage
from featstore.errors import BadRequest, CannotLoad, IdentityMismatch, MissingFeature
from featstore_extractors import parse
from featstore_extractors.signal import LogMel, MelContract, mel_filters

from .run import Read, Run, check_contract, check_read, load

Array = np.ndarray
Precision = Literal["32", "bf16", "16"]

CHUNK = 512           # frames rendered at a time: some 5 s, so that the context on either side is little beside them
GRIFFIN_LIM = "griffin-lim"
ROUNDS = 60           # of Griffin and Lim's iteration
GRIFFIN_LIM_FRAMES = 3000  # made at once: some 30 s, 100 MB
GRIFFIN_LIM_FADE = 16      # frames over which one piece fades into the next
FORMATS = ("wav", "flac")
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True)
class Made:
    """One waveform that was written. `seconds`: its length; `took_s`: how long it took."""

    key: str
    path: Path
    seconds: float
    took_s: float


def synthesise(model: nn.Module, log_mel: Array, f0: Array | None = None, *, seed: int = 0, chunk: int = CHUNK,
               precision: Precision = "32") -> Array:
    """Waveform (T hop,) float32 in [-1, 1] from log-mel (T, n_mels) and, where the vocoder hears it, f0 (T,) in Hz.

    seed: of the vocoders that draw noise. chunk: frames rendered at a time.
    """
    return np.concatenate(list(stream(model, log_mel, f0, seed=seed, chunk=chunk, precision=precision)))


def stream(model: nn.Module, log_mel: Array, f0: Array | None = None, *, seed: int = 0, chunk: int = CHUNK,
           precision: Precision = "32") -> Iterator[Array]:
    """The waveform of `synthesise`, piece by piece of `chunk` frames.

    Raises:
        ContractMismatch, LengthMismatch, ValueError: what the vocoder refuses, as in its `forward`.
    """
    if not len(log_mel):
        raise ValueError("the log-mel has no frames: nothing can be made of it")
    vocoder: Any = model
    device = next(model.parameters()).device
    mel = torch.from_numpy(np.ascontiguousarray(log_mel, np.float32))[None]
    pitch = None if f0 is None or not vocoder.needs_f0 else torch.from_numpy(np.ascontiguousarray(f0, np.float32))[None]
    left, right = vocoder.receptive_field
    hop, frames = vocoder.hop_length, len(log_mel)
    vocoder.check(mel, pitch, _generator(seed))
    for start in range(0, frames, chunk):
        stop = min(start + chunk, frames)
        begin, end = max(0, start - left), min(frames, stop + right)
        with torch.inference_mode(), _autocast(device, precision):  # not around `yield`: it would be the caller's too
            source = vocoder.source(mel, pitch, _generator(seed), (begin, end))
            wave = vocoder.render(mel[:, begin:end].to(device), None if source is None else source.to(device))[0]
            piece = wave[(start - begin) * hop:(stop - begin) * hop].float().cpu().numpy()
        yield piece


def griffin_lim(log_mel: Array, contract: MelContract, *, seed: int = 0, rounds: int = ROUNDS) -> Array:
    """Waveform (T hop,) from a log-mel (T, n_mels) without any network: magnitudes by the filters' pseudo-inverse,
    phases by the fast iteration of Perraudin, Balazs and Søndergaard (2013) after Griffin and Lim (1984).

    What it cannot know, the phase, makes it sound hollow. It is here to compare with, and to hear features before any
    vocoder is trained.
    """
    return np.concatenate(list(_griffin_lim(log_mel, contract, seed, rounds)))


def _griffin_lim(log_mel: Array, contract: MelContract, seed: int, rounds: int = ROUNDS) -> Iterator[Array]:
    """Pieces of the waveform. Up to `GRIFFIN_LIM_FRAMES` are made at once, at some 30 kB each; what is longer fades
    from one piece into the next, whose phases know nothing of each other."""
    hop, size, overlap = contract.hop_length, GRIFFIN_LIM_FRAMES, GRIFFIN_LIM_FADE
    rise = (np.arange(overlap * hop, dtype=np.float32) + 0.5) / (overlap * hop)
    before = np.zeros(0, np.float32)
    for start in range(0, len(log_mel), size - overlap):
        last = start + size >= len(log_mel)
        wave = _phases_found(log_mel[start:start + size], contract, seed, rounds)
        wave[:len(before)] = wave[:len(before)] * rise[:len(before)] + before * (1 - rise[:len(before)])
        yield wave if last else wave[:(size - overlap) * hop]
        if last:
            return
        before = wave[(size - overlap) * hop:]


def _phases_found(log_mel: Array, contract: MelContract, seed: int, rounds: int) -> Array:
    import librosa

    base = math.e if contract.log_base == "e" else 10.0
    mel = np.power(base, np.asarray(log_mel, np.float64)).T
    inverse = np.linalg.pinv(np.asarray(mel_filters(contract), np.float64))
    spectrum = np.maximum(inverse @ mel, 0) ** (1 / contract.power)
    wave = librosa.griffinlim(spectrum, n_iter=rounds, hop_length=contract.hop_length, win_length=contract.win_length,
                              n_fft=contract.n_fft, window="hann", center=True, random_state=seed)
    shift = contract.hop_length // 2 if contract.padding == "frames" else 0  # librosa centres frame k on sample k hop
    count = len(log_mel) * contract.hop_length
    placed = np.zeros(count, np.float32)
    part = wave[:count - shift]
    placed[shift:shift + len(part)] = part
    return placed


def on(model: nn.Module, device: str, *, fold: bool = True, compiled: bool = False) -> nn.Module:
    """A vocoder made ready for inference: weight norm put into the weights, on a device, compiled if asked for."""
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise BadRequest(f"device {device!r}: expected cpu, cuda, cuda:1 or mps")
    if not {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[kind]:
        raise CannotLoad(f"device {device}: this machine, or this build of torch, has no {kind.upper()}; use "
                         "--device cpu")
    ready: Any = model.eval()
    if fold:
        ready.fold()
    ready = ready.to(device)
    if compiled:
        ready.render = torch.compile(ready.render, dynamic=True)
    return ready


def files(inputs: Sequence[str | storage.Place], vocoder: str | Path, out: Path, *, device: str = "cpu", seed: int = 0,
          precision: Precision = "32", compiled: bool = False, chunk: int = CHUNK, form: str | None = None,
          progress: Callable[[Made, int, int], None] | None = None) -> list[Made]:
    """Resynthesise recordings, folders of them, or what stores have, through a vocoder; a file for each utterance.

    vocoder: a run folder, or "griffin-lim".
    out: a .wav or .flac file for one recording, else a folder, in which files are called after their utterances.
    form: wav or flac, in a folder; wav where it is not said.

    Features of recordings are kept in a store of their own (`sources`), so that the second time nothing is extracted.

    Raises:
        IdentityMismatch, MissingFeature: a store does not have what the vocoder was trained on; the field is named.
        BadRequest: nothing to do, two utterances for one file, or a form that is not known.
    """
    run = None if str(vocoder) == GRIFFIN_LIM else load(vocoder)
    reads = _reads(run)
    jobs = [job for one in inputs for job in _jobs(storage.place(one), reads)]
    places = _places(jobs, out, form)
    model = None if run is None else on(run.model, device, compiled=compiled)
    made = []
    for number, (job, place) in enumerate(zip(jobs, places, strict=True)):
        found = _one(job, run, model, place, seed, chunk, precision)
        made.append(found)
        if progress is not None:
            progress(found, number + 1, len(jobs))
    return made


@dataclass(frozen=True)
class _Job:
    """An utterance of a store, and the names under which it has the features, by role."""

    store: fs.Store
    key: str
    names: Mapping[str, str]
    title: str

    @property
    def contract(self) -> MelContract:
        return MelContract.from_settings(self.store.feature(self.names["log-mel"]).spec.settings)


def sources() -> Path:
    """The store in which features of recordings that were given by path are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "featstore" / "sources.zarr"


def _reads(run: Run | None) -> dict[str, Read]:
    """What a vocoder needs, by role; without one, a log-mel of the standard contract."""
    if run is None:
        (extractor,) = parse("log-mel").values()
        return {"log-mel": Read("log-mel", fs.Spec.of(extractor))}
    wanted = {role: items[0] for role, items in run.settings.reads.items() if role != "wave"}
    return wanted or {"log-mel": Read("log-mel", fs.Spec.of(LogMel(**vars(run.settings.contract))))}


def _jobs(where: storage.Place, reads: Mapping[str, Read]) -> list[_Job]:
    if (where / "zarr.json").exists():
        store = fs.open(where)
        for read in reads.values():
            check_read(read, store, "the vocoder")
        names = {role: read.name for role, read in reads.items()}
        return [_Job(store, key, names, key) for key in store.utterances]
    if not where.exists():
        raise BadRequest(f"{where} does not exist: give recordings, folders of them, or stores")
    if not isinstance(where, Path):
        raise BadRequest(f"{where} is no store: of URLs only stores are taken, recordings must be on this machine")
    return _extracted(where, reads)


def _extracted(where: Path, reads: Mapping[str, Read]) -> list[_Job]:
    """Jobs for a recording or a folder, whose features are brought up to date in the store of sources."""
    corpus = _corpus(where)
    extractors, names = {}, {}
    for role, read in reads.items():
        (extractor,) = parse(read.request).values()
        if differs := read.spec.differs(fs.Spec.of(extractor)):
            told = ", ".join(f"{name}: {was!r}, here {now!r}" for name, (was, now) in differs.items())
            raise IdentityMismatch(f"the vocoder was trained on {read.request}, which is made otherwise here ({told}): "
                                   "install the version of featstore that it was trained with")
        names[role] = f"{read.spec.made_by[:40]}-{read.spec.identity[:12]}"  # as many contracts as there are vocoders
        extractors[names[role]] = extractor
    home = sources()
    home.parent.mkdir(parents=True, exist_ok=True)
    store = fs.open(home) if home.exists() else fs.create(home)
    report = fs.extract(corpus, store, extractors, workers=0 if len(corpus) < 4 else None)
    failed = {failure.utterance: failure.reason for failure in report.failures}
    if failed:
        key, reason = next(iter(failed.items()))
        raise fs.errors.BadAudio(f"{len(failed)} recordings cannot be used, such as {key}: {reason}")
    store.refresh()
    single = where.is_file()
    return [_Job(store, u.key, names, where.stem if single else u.key.partition("/")[2]) for u in corpus]


def _corpus(where: Path) -> fs.Corpus:
    """The recordings below a path, with keys that no other path has."""
    place = where.resolve()
    mark = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
    if where.is_file():
        return fs.Corpus(place.parent, place.name, (fs.Utterance(f"{mark}/{place.stem[:200]}", place.name),))
    return fs.corpus(where, key=mark + "/{key}")


def _places(jobs: Sequence[_Job], out: Path, form: str | None) -> list[Path]:
    if form is not None and form not in FORMATS:
        raise BadRequest(f"format {form!r}: expected one of {', '.join(FORMATS)}")
    if not jobs:
        raise BadRequest("nothing to do: no utterance was found")
    if out.suffix.lower().lstrip(".") in FORMATS and not out.is_dir():
        if len(jobs) > 1:
            raise BadRequest(f"{out} is one file and {len(jobs)} utterances were found: name a folder")
        return [out]
    places = [out / f"{_safe(job.title)}.{form or 'wav'}" for job in jobs]
    twice, count = Counter(places).most_common(1)[0]
    if count > 1:
        raise BadRequest(f"{count} utterances would be written to {twice}: vocode them into folders of their own")
    return places


def _safe(key: str) -> Path:
    """A key as a path below a folder, whatever it holds."""
    parts = [part.replace("\0", "") for part in key.replace("\\", "/").split("/")]
    return Path(*[part if part not in ("", ".", "..") else "_" for part in parts])


def _one(job: _Job, run: Run | None, model: nn.Module | None, place: Path, seed: int, chunk: int,
         precision: Precision) -> Made:
    begin = time.monotonic()
    contract = job.contract
    if run is not None:
        check_contract(run.settings.contract, str(run.path), contract, f"{job.store.path}")
    parts = _parts(job)
    if model is None:
        pieces = _griffin_lim(parts["log-mel"], contract, seed)
    else:
        pieces = stream(model, parts["log-mel"], parts.get("f0"), seed=seed, chunk=chunk, precision=precision)
    samples = write_audio(place, pieces, contract.sample_rate)
    return Made(job.title, place, samples / contract.sample_rate, time.monotonic() - begin)


def _parts(job: _Job) -> dict[str, Array]:
    """The utterance's features by role, on the frames of its log-mel."""
    view = job.store.view(list(job.names.values()), like=job.names["log-mel"], utterances=[job.key])
    found = view[job.key]
    return {role: found[name] for role, name in job.names.items()}


def write_audio(place: Path, pieces: Iterator[Array], sample_rate: int) -> int:
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


def _generator(seed: int) -> torch.Generator:
    """The same state for every piece: each asks for its own stretch of one source."""
    return torch.Generator().manual_seed(seed)


def _autocast(device: torch.device, precision: Precision) -> Any:
    if precision == "32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, DTYPES[precision])


__all__ = ["Made", "MissingFeature", "files", "griffin_lim", "on", "sources", "stream", "synthesise", "write_audio"]
