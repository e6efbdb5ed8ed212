"""Log-mel to waveform at inference: whole or in chunks that join without a seam, from files, folders and stores.

A chunk is rendered with the frames that its samples depend on (`receptive_field`) on either side, and what lies outside
is cut off: so a song in chunks is the song made at once, and memory does not grow with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

import featstore as fs
from featstore import storage
from featstore.errors import BadRequest, CannotLoad
from featstore.work import out_of_memory
from featstore_extractors import parse
from featstore_extractors.imports import required
from featstore_extractors.signal import LogMel, MelContract, mel_filters

from .run import Read, Run, check_contract, load
from .sources import FORMATS, Job, Made, Stage, Watch, check_out, jobs, places, refuse, sources, staged, write_audio

Array = np.ndarray
Precision = Literal["32", "bf16", "16"]

CHUNK = 512           # frames rendered at a time: some 5 s, so that the context on either side is little beside them
GRIFFIN_LIM = "griffin-lim"
ROUNDS = 60           # of Griffin and Lim's iteration
GRIFFIN_LIM_FRAMES = 3000  # made at once: some 30 s, 100 MB
GRIFFIN_LIM_FADE = 16      # frames over which one piece fades into the next
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


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
        with torch.inference_mode(), autocast(device, precision):  # not around `yield`: it would be the caller's too
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
    return np.concatenate(list(griffin_lim_pieces(log_mel, contract, seed=seed, rounds=rounds)))


def griffin_lim_pieces(log_mel: Array, contract: MelContract, *, seed: int = 0, rounds: int = ROUNDS
                       ) -> Iterator[Array]:
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
    librosa = required("librosa", "signal")
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
    try:
        ready = ready.to(device)
    except RuntimeError as error:
        if out_of_memory(error):
            raise CannotLoad(f"{device} has too little memory for the weights of the model: free some, or use "
                             "--device cpu") from error
        raise CannotLoad(f"device {device!r} cannot be used ({str(error).splitlines()[0]}): expected one that there "
                         "is, such as cpu or cuda:0; one model runs on one device") from error
    if compiled:
        ready.render = torch.compile(ready.render, dynamic=True)
    return ready


def files(inputs: Sequence[str | storage.Place], vocoder: str | Path, out: Path, *, device: str = "cpu", seed: int = 0,
          precision: Precision = "32", compiled: bool = False, chunk: int = CHUNK, form: str | None = None,
          progress: Callable[[Made, int, int], None] | None = None, watch: Callable[[Stage], None] | None = None
          ) -> list[Made]:
    """Resynthesise recordings, folders of them, or what stores have, through a vocoder; a file for each utterance.

    vocoder: a run folder, or "griffin-lim".
    out: a .wav or .flac file for one recording, else a folder, in which files are called after their utterances.
    form: wav or flac, in a folder; wav where it is not said.
    progress: hears of each file that is written, its number and how many there are. watch: how far a recording is.

    Features of recordings are kept in a store of their own (`sources`), so that the second time nothing is extracted.

    Raises:
        IdentityMismatch, MissingFeature: a store does not have what the vocoder was trained on; the field is named.
        BadRequest: nothing to do, two utterances for one file, or a form that is not known.
        BadAudio: recordings are empty or none, told when the others are written.
    """
    run = None if str(vocoder) == GRIFFIN_LIM else load(vocoder)
    reads = _reads(run)
    check_out(out, form)
    found = jobs(inputs, reads, "the vocoder")
    usable = [job for job in found if not job.reason]
    files_of = places(usable, out, form)
    model = None if run is None else on(run.model, device, compiled=compiled)
    made = []
    for number, (job, place) in enumerate(zip(usable, files_of, strict=True), 1):
        made.append(_one(job, run, model, place, seed, chunk, precision, staged(watch, job, number, len(usable))))
        if progress is not None:
            progress(made[-1], number, len(usable))
    refuse(found, f". The others are in {out}")
    return made


def _reads(run: Run | None) -> dict[str, Read]:
    """What a vocoder needs, by role; without one, a log-mel of the standard contract."""
    if run is None:
        (extractor,) = parse("log-mel").values()
        return {"log-mel": Read("log-mel", fs.Spec.of(extractor))}
    wanted = {role: items[0] for role, items in run.settings.reads.items() if role != "wave"}
    return wanted or {"log-mel": Read("log-mel", fs.Spec.of(LogMel(**vars(run.settings.contract))))}


def _one(job: Job, run: Run | None, model: nn.Module | None, place: Path, seed: int, chunk: int,
         precision: Precision, watch: Watch) -> Made:
    begin = time.monotonic()
    contract = MelContract.from_settings(job.store.feature(job.names["log-mel"]).spec.settings)
    if run is not None:
        check_contract(run.settings.contract, str(run.path), contract, f"{job.store.path}")
    parts = _parts(job)
    if model is None:
        pieces = griffin_lim_pieces(parts["log-mel"], contract, seed=seed)
    else:
        pieces = stream(model, parts["log-mel"], parts.get("f0"), seed=seed, chunk=chunk, precision=precision)
    whole = len(parts["log-mel"]) * contract.hop_length
    samples = write_audio(place, _watched(pieces, whole, watch), contract.sample_rate)
    return Made(job.title, place, samples / contract.sample_rate, time.monotonic() - begin)


def _watched(pieces: Iterator[Array], samples: int, watch: Watch) -> Iterator[Array]:
    """The same pieces; `watch` is told of each that has been taken."""
    done = 0
    for piece in pieces:
        yield piece
        done += len(piece)
        watch("waveform", done / samples)


def _parts(job: Job) -> dict[str, Array]:
    """The utterance's features by role, on the frames of its log-mel."""
    view = job.store.view(list(job.names.values()), like=job.names["log-mel"], utterances=[job.key])
    found = view[job.key]
    return {role: found[name] for role, name in job.names.items()}


def _generator(seed: int) -> torch.Generator:
    """The same state for every piece: each asks for its own stretch of one source."""
    return torch.Generator().manual_seed(seed)


def autocast(device: torch.device, precision: Precision) -> Any:
    if precision == "32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, DTYPES[precision])


__all__ = ["FORMATS", "Made", "autocast", "files", "griffin_lim", "griffin_lim_pieces", "on", "sources", "stream",
           "synthesise", "write_audio"]
