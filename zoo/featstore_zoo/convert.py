"""Songs in another voice: recordings, folders and stores through an acoustic model and a vocoder.

    features of the song, from a store  ->  f0 moved to where the target sings  ->  acoustic model (`song`: in windows)
    ->  vocoder (`vocode.stream`: in pieces)  ->  level and silence of the song  ->  wav or flac

A song's level is kept as a whole, never piece by piece: where the model hears loudness its own answer stands, and
where it does not, one gain for all of the song gives the output the song's level. What would clip is turned down, again
all of it. Where the song is silent, so is what comes out.
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

import featstore as fs
from featstore import storage
from featstore.errors import BadAudio, BadRequest, CannotLoad, MissingFeature, nearest
from featstore.view import View
from featstore.work import out_of_memory
from featstore_align import align_f0
from featstore_extractors import parse

from . import vocode
from .run import Read, Run, load
from .singers import Singer
from .song import LEAST, WINDOW
from .sources import Job, Made, Sources, Stage, Watch, check_out, jobs, places, refuse, staged, write_audio
from .vocode import GRIFFIN_LIM, Precision

__all__ = ["Made", "Rounding", "Sources", "Stage", "Target", "file", "files", "target"]

Array = np.ndarray
Rounding = Literal["semitones", "octaves", "none"]

LEVEL, VOCODER_F0 = "level", "vocoder f0"  # roles beside those of the run
TAKEN = ("log-mel", "wave", "speaker", "singer")  # what a song is not asked for, or the target instead
SILENT_DB = -80.0   # dBFS over 43 ms: below it there is dither and converter noise, and nobody sings
HOLD, RAMP = 12, 4  # frames of a silence at either end that sound still fades in; over how many more it is faded
FULL = 0.999        # of full scale: what is turned down comes to this
BLOCK_S = 10        # of waveform written at a time
FURTHEST = 48       # semitones that f0 is moved by: from the lowest voice to the highest

Key = float | Literal["auto"]


@dataclass(frozen=True)
class Target:
    """Whom a song is to be sung by. `row` or `embedding`: what the model is told; `median_hz`: where they sing, or None
    if that is not known."""

    name: str
    row: int | None = None
    embedding: tuple[float, ...] | None = None
    median_hz: float | None = None


def file(source: str | Path, *, to: str | Path, run: str | Path, out: str | Path, **options: Any) -> Made:
    """Convert one recording into a .wav or .flac file; options are those of `files`."""
    (made,) = files([source], to=to, run=run, out=out, **options)
    return made


def files(inputs: Sequence[str | storage.Place], *, to: str | Path, run: str | Path, out: str | Path,
          vocoder: str | Path | None = None, key: Key = "auto", rounding: Rounding = "semitones",
          steps: int | None = None, sampler: str | None = None, seed: int = 0, device: str = "cpu",
          precision: Precision = "32", window: int = WINDOW, form: str | None = None, how: Sources | None = None,
          progress: Callable[[Made, int, int], None] | None = None, watch: Callable[[Stage], None] | None = None
          ) -> list[Made]:
    """Convert recordings, folders of them, or what stores have; a file for each utterance.

    to: a singer of the run, or a recording of anybody for a run that was trained with embeddings.
    run: folder of an acoustic model. vocoder: folder of one, or "griffin-lim", which stands where none is given.
    out: a .wav or .flac file for one recording, else a folder, in which files are called after their utterances.
    key: semitones by which f0 is moved, or "auto": from the median of the song to the target's, as `rounding` says.
    steps, sampler: of a model that samples; as it was trained where not given.
    seed: of all that is random. window: frames that the acoustic model is given at a time.
    form: wav or flac, in a folder; wav where it is not said.
    how: where features of recordings are kept and how they are made.
    progress: hears of each song that is written, its number and how many there are. watch: how far a song is.

    Raises:
        BadRequest: an unknown singer (the nearest are named), an option that the model does not have.
        ContractMismatch: run and vocoder are of different mels; the field is named.
        IdentityMismatch, MissingFeature: a store does not have what the run was trained on.
        BadAudio: recordings are empty or none, told when the others are converted; a reference has no voice.
        CannotLoad: the device has too little memory even for the smallest window.
    """
    conversion = Conversion(load(run), to, vocoder=vocoder, key=key, rounding=rounding, steps=steps, sampler=sampler,
                            seed=seed, device=device, precision=precision, window=window, how=how)
    check_out(Path(out), form)
    found = jobs(inputs, conversion.reads, str(run), how)
    usable = [job for job in found if not job.reason]
    made: list[Made] = []
    for number, (job, place) in enumerate(zip(usable, places(usable, Path(out), form), strict=True), 1):
        made.append(conversion.write(job, place, staged(watch, job, number, len(usable))))
        if progress is not None:
            progress(made[-1], len(made), len(usable))
    refuse(found, f". The others are in {out}")
    return made


class Conversion:
    """Models that are loaded once for all songs to one target; arguments are those of `files`."""

    def __init__(self, run: Run, to: str | Path, *, vocoder: str | Path | None, key: Key,
                 rounding: Rounding, steps: int | None, sampler: str | None, seed: int, device: str,
                 precision: Precision, window: int, how: Sources | None) -> None:
        if run.kind != "acoustic":
            raise BadRequest(f"{run.path} is a {run.kind}, expected an acoustic model: it is given as --vocoder")
        if rounding not in get_args(Rounding):
            raise BadRequest(f"rounding {rounding!r}: expected one of {', '.join(get_args(Rounding))}")
        if window < LEAST:
            raise BadRequest(f"window {window}: expected at least {LEAST} frames")
        self.run, self.key, self.rounding, self.seed = run, key, rounding, seed
        self.precision, self.window, self.contract = precision, window, run.settings.contract
        self.heard = _heard(run)
        if key != "auto" and not -FURTHEST <= key <= FURTHEST:
            raise BadRequest(f"key {key:g}: expected semitones from {-FURTHEST} to {FURTHEST}, or auto")
        if key not in ("auto", 0) and "f0" not in self.heard:
            raise BadRequest(f"key {key}: {run.path} does not hear f0 and sings as high as it likes: leave the key out")
        self.vocoder = _vocoder(run, vocoder)
        self.reads = self._reads()
        _check_names(run, self.reads, how or Sources())
        model: Any = run.model
        _set_sampling(model, steps, sampler, str(run.path))
        self.target = target(run, to, how)
        self.model: Any = vocode.on(model, device, fold=hasattr(model, "fold"))
        self.device = torch.device(device)
        self.speaker: nn.Module | None = vocode.on(self.vocoder.model, device) if self.vocoder else None

    def _reads(self) -> dict[str, Read]:
        """What is read of a song, by role."""
        own = self.run.settings.reads
        level = own.get("loudness", (Read("loudness", fs.Spec.of(parse("loudness")["loudness"])),))[0]
        found = {"log-mel": own["log-mel"][0], **{role: own[role][0] for role in self.heard}, LEVEL: level}
        if self.vocoder is not None and "f0" in self.vocoder.settings.reads:
            found[VOCODER_F0] = self.vocoder.settings.reads["f0"][0]
        return found

    def song(self, job: Job) -> _Song:
        """What is read of an utterance."""
        early_s = getattr(self.run.settings.config, "f0_early_s", 0.0)
        return _Song(job, self.run.settings.timing, early_s)

    def write(self, job: Job, place: Path, watch: Watch = lambda what, done: None) -> Made:
        """Convert an utterance into a file, which appears when it is whole."""
        begin, rate = time.monotonic(), self.contract.sample_rate
        song = self.song(job)
        semitones, remarks = self._key(song)
        song.move(semitones)
        remarks += [f"the recording is {flag}" for flag in song.flags if flag in ("clipped", "truncated")]
        if self.run.settings.config.speaker == "none" and len(self.run.singers) > 1:
            remarks.append(f"{self.run.path} is not told who sings (--speaker none): --to {self.target.name} sets the "
                           "key alone, the voice is one that it made of all it heard")
        with contextlib.ExitStack() as stack:
            kept = stack.enter_context(tempfile.TemporaryFile(dir=_there(place.parent)))
            if song.audible.any():
                heard = self._made(song, kept, watch)
                gain, more = self._gain(song, heard)
                pieces = _blocks(kept, rate * BLOCK_S, gain)
            else:
                more, pieces = ["nothing is heard in the recording: silence was written"], _nothing(song, rate)
            samples = write_audio(place, _as_long(pieces, round(song.seconds * rate)), rate)
        return Made(job.title, place, samples / rate, time.monotonic() - begin, semitones,
                    (*remarks, *more))

    def _key(self, song: _Song) -> tuple[float, list[str]]:
        """Semitones by which a song is moved, and what there is to say of it."""
        if "f0" not in self.heard:
            return 0.0, []
        if self.key != "auto":
            return float(self.key), []
        here, there = song.median_hz, self.target.median_hz
        if here is None:
            return 0.0, ["nothing is sung in the recording: no key"] if song.audible.any() else []
        if there is None:
            return 0.0, [f"where {self.target.name} sings is not known (no f0 of theirs was voiced, or none was kept): "
                         "the song keeps its key; --key N moves it"]
        exact = 12 * math.log2(there / here)
        whole = {"semitones": float(round(exact)), "octaves": 12.0 * round(exact / 12)}
        semitones = whole.get(self.rounding, exact)
        return semitones, [f"key {semitones:+.3g} semitones (median {here:.0f} Hz here, {there:.0f} Hz for "
                           f"{self.target.name}); --key 0 keeps the song's."]

    def _made(self, song: _Song, kept: BinaryIO, watch: Watch) -> _Heard:
        """Write the waveform, in float32 and at the level that the model gives it, into a file.

        Where the device has too little memory for a window, all of it is made in smaller ones, as are songs after it.
        """
        size, samples = self.window, song.frames * self.contract.hop_length
        while True:
            heard, done = _Heard(), 0
            kept.seek(0)
            kept.truncate()
            try:
                for piece, gate, audible in song.gated(self._pieces(song, size, watch), self.contract.hop_length):
                    if not np.isfinite(piece).all():
                        raise CannotLoad(f"{self.run.path} gives samples that are NaN or infinite: its weights are "
                                         "damaged, or products in half precision are too rough (--precision 32)")
                    heard.add(piece, audible)
                    kept.write((piece * gate).astype(np.float32).tobytes())
                    done += len(piece)
                    watch("waveform", done / samples)
                self.window = size
                return heard
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if size // 2 < LEAST:
                    raise CannotLoad(f"{self.device} has too little memory for a window of {size} frames: free some, "
                                     "or convert with --device cpu") from error
            size //= 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _pieces(self, song: _Song, size: int, watch: Watch) -> Iterator[Array]:
        """The waveform (T * hop,) of a song in pieces."""
        with torch.inference_mode(), vocode.autocast(self.device, self.precision):
            made = self.model.song(self.features(song), song.frames, torch.Generator().manual_seed(self.seed), size,
                                   functools.partial(watch, "acoustic model"))
        if self.model.gives == "wave":
            yield from made
            return
        log_mel = made[0].float().numpy()
        if self.speaker is None:
            yield from vocode.griffin_lim_pieces(log_mel, self.contract, seed=self.seed)
            return
        yield from vocode.stream(self.speaker, log_mel, song.f0.get(VOCODER_F0), seed=self.seed,
                                 chunk=min(size, vocode.CHUNK), precision=self.precision)

    def features(self, song: _Song) -> Callable[[int, int], dict[str, Tensor]]:
        """Frames [begin, end) of a song as the model takes them."""
        who: dict[str, Tensor] = {}
        if self.target.row is not None:
            who["singer"] = torch.tensor([self.target.row], device=self.device)
        if self.target.embedding is not None:
            who["speaker"] = torch.tensor([self.target.embedding], dtype=torch.float32, device=self.device)

        def features(begin: int, end: int) -> dict[str, Tensor]:
            found = song.crop(self.heard, begin, end)
            return {role: torch.from_numpy(x)[None].to(self.device) for role, x in found.items()} | who

        return features

    def _gain(self, song: _Song, heard: _Heard) -> tuple[float, list[str]]:
        """One gain for all of a song, and what there is to say of it."""
        gain = 1.0
        if not {"loudness", "energy"} & set(self.heard) and heard.power > 0:
            gain = math.sqrt(song.power / heard.power)
        if gain * heard.peak <= FULL:
            return gain, []
        least = FULL / heard.peak
        return least, [f"turned down by {20 * math.log10(gain / least):.1f} dB, which would have clipped"]


class _Song:
    """An utterance's features on the frames of its log-mel: numbers whole, vectors frame by frame from the store.

    early_s: by how much the f0 that the run hears comes before the log-mel (see `AcousticConfig`).

    audible: (T,) bool, where it is above silence. power: mean square there, of the song itself.
    """

    def __init__(self, job: Job, timing: Any, early_s: float = 0.0) -> None:
        self._job = job
        vectors = {role for role, name in job.names.items() if job.store.feature(name).dim}
        self._view = self._over(vectors, timing)
        self.frames = self._view.length(job.key)
        if not self.frames:
            raise BadAudio(f"{job.title} has no frames: nothing can be made of it")
        whole = self._over(set(job.names) - vectors, timing)[job.key]
        found = {role: whole[name] for role, name in job.names.items() if role not in vectors}
        level = found.pop(LEVEL)
        self.audible = level > SILENT_DB
        power = 10 ** (level[self.audible].astype(np.float64) / 10)
        self.power = float(power.mean()) if len(power) else 0.0
        self.f0 = {role: found.pop(role).astype(np.float32) for role in ("f0", VOCODER_F0) if role in found}
        self._numbers = found
        if early_s and "f0" in self.f0:
            self.f0["f0"] = self._early(early_s)
        told = job.store.utterances[job.key]
        self.flags, self.seconds = told.flags, told.duration_s

    def _over(self, roles: set[str], timing: Any) -> View:
        """What plays these roles, on the frames of the log-mel; that itself only where there is nothing else."""
        names = [self._job.names[role] for role in sorted(roles - {"log-mel"} or {"log-mel"})]
        return self._job.store.view(list(dict.fromkeys(names)), like=self._job.names["log-mel"], timing=timing,
                                    utterances=[self._job.key])

    def _early(self, seconds: float) -> Array:
        """f0 (T,) as a run hears it that learnt from one which came `seconds` before the log-mel."""
        f0: Any = self._job.store.feature(self._job.names["f0"])
        centre_s = f0.spec.centre_s - Fraction(seconds).limit_denominator(10**6)
        found: Array = align_f0(f0[self._job.key].as_float(), f0.frame_rate, self._view.rate, length=self.frames,
                                source_centre_s=centre_s, target_centre_s=self._view.centre_s)
        return found.astype(np.float32)

    @property
    def median_hz(self) -> float | None:
        """Of f0 as the run hears it, over voiced frames; None where there are none."""
        return _median(self.f0["f0"])

    def move(self, semitones: float) -> None:
        """Every f0 higher by `semitones`."""
        self.f0 = {role: f0 * np.float32(2 ** (semitones / 12)) for role, f0 in self.f0.items()}

    def crop(self, roles: Sequence[str], begin: int, end: int) -> dict[str, Array]:
        """Frames [begin, end) of features, by role."""
        numbers = self.f0 | self._numbers
        cut = {role: numbers[role][begin:end] for role in roles if role in numbers}
        if len(cut) < len(roles):
            found = self._view.crop(self._job.key, start=begin, frames=end - begin)
            cut |= {role: found[self._job.names[role]] for role in roles if role not in cut}
        return cut

    def gated(self, pieces: Iterator[Array], hop: int) -> Iterator[tuple[Array, Array, Array]]:
        """Each piece of the waveform with its gain (n,), 0 where the song is silent, and which samples are audible."""
        gate, done = _gate(self.audible), 0
        middle = (np.arange(self.frames) + 0.5) * hop
        for piece in pieces:
            at = np.arange(done, done + len(piece))
            yield piece, np.interp(at, middle, gate), self.audible[np.minimum(at // hop, self.frames - 1)]
            done += len(piece)


class _Heard:
    """What was made, as it is made: its highest |sample|, and its mean square where the song is audible."""

    def __init__(self) -> None:
        self.peak, self._sum, self._count = 0.0, 0.0, 0

    def add(self, piece: Array, audible: Array) -> None:
        self.peak = max(self.peak, float(np.abs(piece).max(initial=0.0)))
        self._sum += float(np.square(piece[audible], dtype=np.float64).sum())
        self._count += int(audible.sum())

    @property
    def power(self) -> float:
        return self._sum / max(1, self._count)


def _gate(audible: Array) -> Array:
    """A gain (T,) for each frame: 1 where there is sound and some frames about it, 0 in silences that are longer."""
    near = np.convolve(audible, np.ones(2 * HOLD + 1), "same") > 0
    return np.convolve(np.pad(near, RAMP, mode="edge"), np.ones(2 * RAMP + 1) / (2 * RAMP + 1), "valid")


def _median(f0: Array) -> float | None:
    """Median of f0 in Hz over voiced frames; None where there are none. The same in semitones as in Hz."""
    voiced = f0[f0 > 0]
    return float(np.median(voiced)) if len(voiced) else None


def _blocks(kept: BinaryIO, count: int, gain: float) -> Iterator[Array]:
    """float32 samples of a file, `count` at a time, times a gain."""
    kept.seek(0)
    while data := kept.read(4 * count):
        yield np.frombuffer(data, np.float32) * np.float32(gain)


def _nothing(song: _Song, rate: int) -> Iterator[Array]:
    left = round(song.seconds * rate)
    while left > 0:
        yield np.zeros(min(left, rate * BLOCK_S), np.float32)
        left -= rate * BLOCK_S


def _as_long(pieces: Iterator[Array], samples: int) -> Iterator[Array]:
    """Pieces of a waveform, and zeros up to `samples`: a song ends within a frame."""
    done = 0
    for piece in pieces:
        part = piece[:max(0, samples - done)]
        done += len(part)
        yield part
    if done < samples:
        yield np.zeros(samples - done, np.float32)


def _there(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- whom, with what


def target(run: Run, to: str | Path, how: Sources | None = None) -> Target:
    """Whom `to` names: a singer of the run, or whoever is heard in a recording.

    Raises:
        BadRequest: neither; the nearest names are told.
        BadAudio: nobody is heard in the recording.
    """
    known = run.singers
    name = str(to)
    if name in known:
        return _known(run, name, known[name])
    speaker = run.settings.config.speaker
    if speaker == "none" and not known:  # it has one voice, of which nobody has said whose it is
        return Target(name)
    if not Path(to).is_file():
        more = "" if speaker != "embedding" else "; or give a recording of whoever shall sing"
        if not known:
            raise CannotLoad(f"{run.path} names no singers: singers.json is missing or empty. Copy the whole folder of "
                             f"the run again{more}")
        raise BadRequest(f"{run.path} has no singer {name!r} ({nearest(name, known)}){more}")
    if speaker != "embedding":
        raise BadRequest(f"{run.path} knows its singers by name and no others, so that --to {name} cannot be a "
                         f"recording ({nearest(name, known)}). Train with --speaker NAME to convert to any voice")
    return _referred(run, Path(to), how)


def _known(run: Run, name: str, told: Singer) -> Target:
    kind, count = run.settings.config.speaker, run.settings.config.singers
    if kind == "one-hot" and not 0 <= told.row < count:
        raise CannotLoad(f"{run.path}: singers.json gives {name} row {told.row}, and the model has {count}: the file "
                         "is of another run. Copy the whole folder again")
    if kind == "embedding" and told.embedding is None:
        raise CannotLoad(f"{run.path}: singers.json has no embedding of {name}; give a recording instead, --to FILE")
    return Target(name, told.row if kind == "one-hot" else None, told.embedding if kind == "embedding" else None,
                  told.median_hz or None)


def _referred(run: Run, path: Path, how: Sources | None) -> Target:
    """Whoever is heard in a recording."""
    reads = {role: run.settings.reads[role][0] for role in ("speaker", "f0") if role in run.settings.reads}
    try:
        (job,) = jobs([path], reads, str(run.path), how)
    except BadAudio as error:
        raise BadAudio(f"nobody to sing like is heard in --to {path}: {error} of one voice") from error
    embedding = tuple(map(float, job.store[job.key, job.names["speaker"]].read()))
    median = _median(job.store[job.key, job.names["f0"]].read()) if "f0" in job.names else None
    return Target(path.stem, embedding=embedding, median_hz=median)


def _heard(run: Run) -> tuple[str, ...]:
    """Keys of a batch that the model hears of a song."""
    reads = run.settings.reads
    wanted = tuple(key for key in getattr(run.settings.config, "reads", tuple(reads)) if key not in TAKEN)
    missing = [key for key in (*wanted, "log-mel") if not reads.get(key)]
    if missing:
        raise MissingFeature(f"{run.path} hears {', '.join(missing)} and does not say what made it: its config.json "
                             "must be of another version. Use that version, train it again, or import it again")
    return wanted


def _vocoder(run: Run, path: str | Path | None) -> Run | None:
    """The run of a vocoder for what an acoustic model gives; None for Griffin-Lim, and where it gives the waveform."""
    gives = getattr(run.settings.package.Model, "gives", "log-mel")
    if gives == "wave":
        if path is not None:
            raise BadRequest(f"{run.path} makes the waveform itself: leave out --vocoder")
        return None
    if path is None or str(path) == GRIFFIN_LIM:
        return None
    made = load(path)
    if made.kind != "vocoder":
        raise BadRequest(f"{path} is of kind {made.kind}, expected a vocoder")
    made.check_contract(run.settings.contract, str(run.path))
    return made


def _check_names(run: Run, reads: Mapping[str, Read], how: Sources) -> None:
    """BadRequest where something is said of a feature that nobody reads."""
    known = {read.name for read in (*reads.values(), *run.settings.reads.get("speaker", ()))}
    for option, given in (("--weights", how.weights), ("-f", how.requests)):
        for name in given:
            if name not in known:
                raise BadRequest(f"{option} {name}=...: {run.path} reads no feature {name!r} ({nearest(name, known)})")


def _set_sampling(model: Any, steps: int | None, sampler: str | None, path: str) -> None:
    """How a model samples, where that is asked for. BadRequest for what it does not have."""
    asked = [option for option, value in (("--steps", steps), ("--sampler", sampler)) if value is not None]
    if asked and "sampling_steps" not in model.SAMPLING:
        raise BadRequest(f"{path} does not sample in steps: leave out {' and '.join(asked)}")
    changes: dict[str, Any] = {} if steps is None else {"sampling_steps": steps}
    if sampler is not None and "heun" in model.SAMPLING:
        if model.config.stage == "student":
            raise BadRequest(f"{path} is a student, which has one way of sampling: leave out --sampler")
        if sampler not in ("euler", "heun"):
            raise BadRequest(f"sampler {sampler!r}: this model has euler and heun")
        changes["heun"] = sampler == "heun"
    elif sampler is not None:
        changes["sampler"] = sampler
    try:
        if changes:
            model.set_sampling(**changes)
    except ValueError as error:
        raise BadRequest(str(error)) from error
