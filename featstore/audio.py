"""Recordings as numbers: what a file is, its digest, its samples in mono blocks, and those at another rate.

The rules that decide a number, so that the same bytes give the same waveform however long the file is (raising
`spec.AUDIO_VERSION` is due when one of them changes):

* A file is what its bytes say; the extension is never looked at.
* Integers are scaled to [-1, 1) around 0; float samples beyond 1.0 stay as they are.
* Several channels become their mean. The first 20 s (or 2^25 samples over all channels, if that is shorter) of what is
  read decide once whether they cancel: if the mean's RMS is below 1 % of the loudest channel's, that channel alone is
  taken, and the recording is flagged "antiphase".
* A cut holds the samples [round(start_s rate), round(end_s rate)).
* Resampling is soxr's HQ (20 bits; librosa's default), whose filter is linear-phase: nothing is delayed, n samples
  become floor(n to/from + 1/2).
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import math
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import BadAudio

CHUNK = 1 << 20  # samples, all channels together, decoded at a time: what bounds memory, whatever a header claims
DECIDE_S = 20.0  # of a recording with several channels that are looked at before they are mixed
DECIDE_SAMPLES = 1 << 25
SHORTEST_S = 0.01  # less is no sound that any feature could describe
CUT_SLACK_S = 0.1  # by how much the end of a cut may lie beyond the recording: manifests round
MAX_RATE = 1_000_000  # Hz; more is a broken header
FULL_SCALE = 0.999  # 16-bit decoders differ by whether 32767 is 1.0
CLIPPED = 0.01  # share of samples that begin three in a row at full scale; loud mastering stays far below
QUIET = 10 ** (-90 / 20)  # -90 dBFS, one step of 16 bits
CANCELLED = 0.01
DC = 0.05
UNKNOWN = 1 << 62  # libsndfile's frame count where a header has none is 2^63 - 1

# What libsndfile does not decode, by first bytes: (offset, bytes, name, ffmpeg's demuxer, so that it guesses none).
OTHERS = (
    (4, b"ftyp", "m4a/mp4", "mp4"),
    (0, b"\x1aE\xdf\xa3", "webm/matroska", "matroska"),
    (0, b"\xff\xf1", "aac", "aac"),
    (0, b"\xff\xf9", "aac", "aac"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "wma", "asf"),
    (0, b"MAC ", "ape", "ape"),
    (0, b"wvpk", "wavpack", "wv"),
    (0, b"TTA1", "tta", "tta"),
    (0, b"DSD ", "dsf", "dsf"),
    (0, b"#!AMR", "amr", "amr"),
)


@dataclass(frozen=True)
class Header:
    """What the head of a file says: samples per second, channels, samples per channel, and the container's name."""

    sample_rate: int
    channels: int
    frames: int
    format: str

    @property
    def duration_s(self) -> float:
        return self.frames / self.sample_rate


def probe(path: str | os.PathLike[str]) -> Header:
    """The header of the recording at `path`; its samples are read only where the header has no count of them.

    Raises:
        BadAudio: with a short reason, if it is not audio, holds no samples, or cannot be read.
    """
    with _sound(path) as sound:
        frames = sound.frames if sound.frames is not None else sum(len(block) for block in _chunks(sound))
        if not frames:
            raise BadAudio("no audio: 0 samples")
        return Header(sound.sample_rate, sound.channels, frames, sound.format)


def file_digest(path: str | os.PathLike[str]) -> bytes:
    """SHA-256 of the file's bytes, 32 bytes. Raises BadAudio if they cannot be read."""
    with open(_open(path), "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").digest()


def source_digest(file_digest: bytes, start_s: float = 0.0, end_s: float | None = None) -> bytes:
    """SHA-256 of a file's digest and the cut that is taken of it, 32 bytes: equal where the samples are."""
    cut = f"{float(start_s) + 0.0!r} {'end' if end_s is None else repr(float(end_s))}"  # + 0.0: -0.0 is 0.0
    return hashlib.sha256(file_digest + cut.encode()).digest()


class Reader:
    """Mono float32 blocks `(n,)` of a recording or a cut of one, at its own sample rate, in bounded memory.

    Each block is `block_s` seconds long but the last. After the last, `samples` is how many there were and `flags`
    says, in sorted words, what may be wrong with them:

        antiphase   the channels cancel: the loudest was taken (or the mean came out as silence later on)
        clipped     more than 1 % of some channel's samples stand three in a row at full scale
        dc-offset   the mean is beyond 0.05
        low-band    the sample rate is below 8 kHz
        over-range  samples beyond 1.0, which are kept
        silent      nothing above -90 dBFS
        truncated   the file ends before its header says; `samples` is what there is

    Raises:
        BadAudio: when opened, as `probe` does, or for a cut that is empty or ends more than 0.1 s beyond the recording;
            while read, if samples are NaN or infinite, nothing decodes, or there is less than 10 ms of audio.
    """

    def __init__(self, path: str | os.PathLike[str], start_s: float = 0.0, end_s: float | None = None,
                 block_s: float = 20.0) -> None:
        self._sound = _sound(path)
        self.sample_rate, self.channels = self._sound.sample_rate, self._sound.channels
        self.samples = 0
        self.flags: tuple[str, ...] = ()
        self._block = max(1, round(block_s * self.sample_rate))
        self._taken: int | None = None  # the channel that stands for all, where they cancel
        self._heard = _Heard(self.channels)
        try:
            self._start, self._stop = self._cut(start_s, end_s)
        except BadAudio:
            self._sound.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._sound.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        held: list[np.ndarray] = []
        count = 0
        for mono in self._mono():
            self.samples += len(mono)
            while count + len(mono) >= self._block:
                head, mono = mono[: self._block - count], mono[self._block - count:]
                yield np.concatenate([*held, head]) if held else head
                held, count = [], 0
            if len(mono):
                held.append(mono)
                count += len(mono)
        self._finish()
        if count:
            yield np.concatenate(held) if len(held) > 1 else held[0]

    def _cut(self, start_s: float, end_s: float | None) -> tuple[int, int | None]:
        """First sample and the one after the last (None: to the end), checked against what the header says."""
        if not (math.isfinite(start_s) and start_s >= 0 and (end_s is None or start_s < end_s < math.inf)):
            raise BadAudio(f"a cut from {start_s} s to {end_s} s is empty")
        start = round(start_s * self.sample_rate)
        stop = None if end_s is None else round(end_s * self.sample_rate)
        frames = self._sound.frames
        if frames == 0:
            raise BadAudio("no audio: 0 samples")
        if frames is not None:
            self._check_end(start, stop, frames)
        return start, stop

    def _check_end(self, start: int, stop: int | None, frames: int) -> None:
        wanted, length = max(start, stop or 0) / self.sample_rate, frames / self.sample_rate
        if start >= frames or wanted > length + CUT_SLACK_S:
            edge = "ends" if stop is not None and start < frames else "starts"
            at = (stop if edge == "ends" and stop is not None else start) / self.sample_rate
            raise BadAudio(f"the cut {edge} at {at:.3f} s, the recording is {length:.3f} s long")

    def _mono(self) -> Iterator[np.ndarray]:
        """Checked mono pieces of any length; the channels are weighed on the first of them before one is given out."""
        pieces = self._pieces()
        if self.channels > 1:
            first, room = [], min(round(DECIDE_S * self.sample_rate), DECIDE_SAMPLES // self.channels)
            for piece in pieces:
                first.append(piece[:room])
                room -= len(first[-1])
                if not room:
                    rest = piece[len(first[-1]):]
                    break
            else:
                rest = np.empty((0, self.channels), np.float32)
            self._taken = _loudest_if_cancelled(first)
            for piece in (*first, rest):
                yield self._mixed(piece)
        for piece in pieces:
            yield self._mixed(piece)

    def _mixed(self, piece: np.ndarray) -> np.ndarray:
        mono = _mean(piece) if self._taken is None else np.ascontiguousarray(piece[:, self._taken])
        self._heard.add(piece, mono)
        return mono

    def _pieces(self) -> Iterator[np.ndarray]:
        """Decoded pieces `(n, channels)` of the cut, all finite."""
        position = 0
        if self._start and self._sound.seek(self._start):
            position = self._start
        for piece in _chunks(self._sound, None if self._stop is None else self._stop - position):
            skipped = min(max(self._start - position, 0), len(piece))
            position += len(piece)
            piece = piece[skipped:]
            if not np.isfinite(piece).all():
                self._refuse_non_finite(piece, position)
            yield piece
        self._ended(position)

    def _refuse_non_finite(self, piece: np.ndarray, position: int) -> None:
        nan = infinite = 0
        while len(piece):
            nan += int(np.isnan(piece).sum())
            infinite += int(np.isinf(piece).sum())
            room = CHUNK if self._stop is None else self._stop - position
            piece = self._sound.read(min(room, max(1, CHUNK // self.channels)))
            position += len(piece)
        raise BadAudio(f"{nan} NaN and {infinite} infinite samples")

    def _ended(self, position: int) -> None:
        """Judge where decoding stopped against where the header or the cut said it would."""
        frames, stop = self._sound.frames, self._stop
        claimed = frames if stop is None or frames is None else min(stop, frames)
        if not position:
            raise BadAudio(f"nothing decodes{f': the header says {claimed} samples' if claimed else ''}")
        if position <= self._start or (stop is not None and stop > position + CUT_SLACK_S * self.sample_rate):
            self._check_end(self._start, stop, position)
        short = claimed is not None and position < claimed
        self._heard.truncated = short or (self._sound.cut_short and (stop is None or stop > position))

    def _finish(self) -> None:
        if self.samples < SHORTEST_S * self.sample_rate:
            raise BadAudio(f"too short: {self.samples} samples ({1000 * self.samples / self.sample_rate:.2f} ms), "
                           f"at least {1000 * SHORTEST_S:.0f} ms are needed")
        self.flags = self._heard.flags(self.sample_rate, self.samples, antiphase=self._taken is not None)


def resampled_length(samples: int, source_rate: int, target_rate: int) -> int:
    """How many samples `samples` become: floor(samples target/source + 1/2), exact."""
    return (2 * samples * target_rate + source_rate) // (2 * source_rate)


class Resampler:
    """A waveform at `source_rate` to one at `target_rate`, block by block.

    Joined, the blocks are the same bits however the input was divided, `resampled_length` samples, and not delayed.
    Equal rates hand every block through untouched.
    """

    def __init__(self, source_rate: int, target_rate: int) -> None:
        self.source_rate, self.target_rate = source_rate, target_rate
        self._taken = self._given = 0
        self._stream: Any = None
        if source_rate != target_rate:
            import soxr

            self._stream = soxr.ResampleStream(source_rate, target_rate, 1, dtype="float32", quality="HQ")

    def push(self, block: np.ndarray, last: bool = False) -> np.ndarray:
        """What the next samples `(n,)`, float32, let through; with `last`, all that is left; then it is spent."""
        if self._stream is None:
            return block
        self._taken += len(block)
        out = self._stream.resample_chunk(np.ascontiguousarray(block, np.float32), last=last)
        if last:
            missing = resampled_length(self._taken, self.source_rate, self.target_rate) - self._given
            out = out[:missing] if len(out) >= missing else np.pad(out, (0, missing - len(out)))
        self._given += len(out)
        return out


class _Heard:
    """What has been heard so far, for the flags."""

    def __init__(self, channels: int) -> None:
        self.peak = self.sum = self.power = 0.0
        self.channel_power = np.zeros(channels)
        self.runs = np.zeros(channels, int)  # triples of neighbours at full scale
        self.tail = np.zeros((0, channels), bool)
        self.truncated = False

    def add(self, piece: np.ndarray, mono: np.ndarray) -> None:
        if not len(mono):
            return
        self.peak = max(self.peak, float(mono.max()), -float(mono.min()))
        self.sum += float(mono.sum(dtype=np.float64))
        if piece.shape[1] > 1:
            self.power += float(_power(mono[:, None])[0])
            self.channel_power += _power(piece)
        if max(float(piece.max()), -float(piece.min())) < FULL_SCALE:
            self.tail = self.tail[:0]
            return
        level = np.abs(piece)
        full = np.concatenate([self.tail, (level >= FULL_SCALE) & (level <= 1.0)])
        self.runs += (full[2:] & full[1:-1] & full[:-2]).sum(axis=0)
        self.tail = full[-2:]

    def flags(self, sample_rate: int, samples: int, antiphase: bool) -> tuple[str, ...]:
        cancelled = self.power < CANCELLED**2 * self.channel_power.max()  # never for one channel: both stay 0
        found = {
            "antiphase": antiphase or cancelled,
            "clipped": self.runs.max() > CLIPPED * samples,
            "dc-offset": abs(self.sum) > DC * samples,
            "low-band": sample_rate < 8000,
            "over-range": self.peak > 1.0,
            "silent": self.peak < QUIET,
            "truncated": self.truncated,
        }
        return tuple(word for word, is_so in sorted(found.items()) if is_so)


def _mean(piece: np.ndarray) -> np.ndarray:
    """Mean of the channels, `(n, channels)` to `(n,)`: always summed in their order, and never beyond float32."""
    if piece.shape[1] == 1:
        return piece[:, 0]
    weight = np.float32(1 / piece.shape[1])
    mono = piece[:, 0] * weight
    for channel in range(1, piece.shape[1]):
        mono += piece[:, channel] * weight
    return mono


def _loudest_if_cancelled(pieces: list[np.ndarray]) -> int | None:
    """The loudest channel where the channels' mean comes to next to nothing beside it, else None."""
    if not pieces:
        return None
    power = np.sum([_power(piece) for piece in pieces], axis=0)
    mixed = sum(float(_power(_mean(piece)[:, None])[0]) for piece in pieces)
    loudest = int(np.argmax(power))
    return loudest if mixed < CANCELLED**2 * power[loudest] else None


def _power(piece: np.ndarray) -> np.ndarray:
    """Sum of squares of each channel, `(n, channels)` to `(channels,)`, in double precision: floats may be huge."""
    return np.einsum("nc,nc->c", piece, piece, dtype=np.float64)


class _Sound(Protocol):
    """An open recording: `read(n)` gives the next `(m, channels)` float32, m < n only at the end."""

    sample_rate: int
    channels: int
    frames: int | None  # as the header says; None where it does not
    format: str
    cut_short: bool  # the container claims more bytes than there are

    def read(self, frames: int) -> np.ndarray: ...
    def seek(self, frame: int) -> bool: ...  # False: it cannot, exactly; the next read still starts where it did
    def close(self) -> None: ...
    def __enter__(self) -> _Sound: ...
    def __exit__(self, *_: object) -> None: ...


def _chunks(sound: _Sound, frames: int | None = None) -> Iterator[np.ndarray]:
    """The next `frames` samples of `sound` (None: all) in pieces of bounded size, fewer where it ends."""
    size = max(1, CHUNK // sound.channels)
    while frames is None or frames > 0:
        wanted = size if frames is None else min(size, frames)
        piece = sound.read(wanted)
        if len(piece):
            yield piece
        if len(piece) < wanted:
            return
        if frames is not None:
            frames -= len(piece)


def _open(path: str | os.PathLike[str]) -> int:
    """A descriptor to read the regular file at `path` by; pipes, devices and folders are never opened."""
    file = Path(os.fsdecode(path))
    try:
        kind = file.stat().st_mode
        if stat.S_ISREG(kind):
            return os.open(file, os.O_RDONLY)
    except OSError as error:
        raise BadAudio(why_unreadable(error, is_link=file.is_symlink())) from None
    except ValueError:
        raise BadAudio("no such file: no file can have that name") from None
    raise BadAudio(not_regular(kind))


def not_regular(mode: int) -> str:
    """The reason to give for what is not a regular file, by its `st_mode`."""
    kinds = {stat.S_IFIFO: "named pipe", stat.S_IFDIR: "folder", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device",
             stat.S_IFBLK: "device"}
    return f"not a regular file ({kinds.get(stat.S_IFMT(mode), 'of an unknown kind')})"


def why_unreadable(error: OSError, is_link: bool = False) -> str:
    """The reason to give for a file or folder that the system would not open."""
    if isinstance(error, PermissionError):
        return "cannot be read: permission denied"
    if isinstance(error, FileNotFoundError):
        return "link to nothing" if is_link else "no such file"
    if error.errno == errno.ELOOP:
        return "link to itself"
    return f"cannot be read: {(error.strerror or str(error)).lower()}"


def _sound(path: str | os.PathLike[str]) -> _Sound:
    """The recording at `path`, opened by the decoder that its first bytes call for."""
    descriptor = _open(path)
    try:
        head = os.pread(descriptor, 16, 0)
        if not head:
            raise BadAudio("empty file")
        for offset, magic, name, demuxer in OTHERS:
            if head[offset:offset + len(magic)] == magic:
                return _Other(descriptor, name, demuxer)
        return _Sndfile(descriptor, head)
    except OSError as error:
        os.close(descriptor)
        raise BadAudio(why_unreadable(error)) from None
    except BaseException:
        os.close(descriptor)
        raise


class _Sndfile:
    """What libsndfile decodes: wav, flac, ogg, opus, mp3, aiff, caf, au and more.

    It gets a descriptor, not a name: names of any bytes then open, "-" is no standard input, and an extension cannot
    talk it into a headerless format.
    """

    def __init__(self, descriptor: int, head: bytes) -> None:
        import soundfile

        self._error = soundfile.LibsndfileError
        try:
            self._file = soundfile.SoundFile(descriptor, closefd=False)
        except soundfile.LibsndfileError as error:
            raise BadAudio(_why_not_audio(error, descriptor, head)) from None
        # soundfile seeks after every read of a seekable file; in an MP3 that changes samples, and fails now and then
        self._file.seekable = lambda: False
        self._descriptor = descriptor
        self.sample_rate, self.channels = int(self._file.samplerate), int(self._file.channels)
        self.frames = int(self._file.frames) if self._file.frames < UNKNOWN else None
        self.format = str(self._file.format).lower()
        if not 0 < self.sample_rate <= MAX_RATE:
            self._file.close()
            raise BadAudio(f"bad header: sample rate {self.sample_rate}")
        self.cut_short = _claims_more(descriptor, head)

    def read(self, frames: int) -> np.ndarray:
        if self.frames is not None:
            frames = min(frames, max(self.frames - self._file.tell(), 0))
        out = np.empty((frames, self.channels), np.float32)
        before = self._file.tell()
        try:
            return self._file.read(out=out) if frames else out
        except self._error:  # broken in the middle: what came before it is in `out`
            return out[: max(self._file.tell() - before, 0)]

    def seek(self, frame: int) -> bool:
        if self.format == "mp3" or self.frames is None:  # libsndfile lands elsewhere in some MP3s
            return False
        try:
            self._file.seek(frame)
        except self._error:
            return False
        return True

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            os.close(self._descriptor)

    def __enter__(self) -> _Sndfile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _why_not_audio(error: Any, descriptor: int, head: bytes) -> str:
    """libsndfile's refusal in our words."""
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        fields = os.pread(descriptor, 4096, 0)
        at = fields.find(b"fmt ")
        if 0 < at <= len(fields) - 16:
            channels, rate = struct.unpack_from("<HI", fields, at + 10)
            for name, value in (("sample rate", rate), ("channels", channels)):
                if value == 0:
                    return f"bad header: {name} 0"
    if error.code == 1:  # format not recognised
        return "not audio"
    return f"not audio that can be read: {str(error.error_string).strip().rstrip('.').lower() or 'unknown reason'}"


def _claims_more(descriptor: int, head: bytes) -> bool:
    """Whether a WAV or AIFF says that more bytes of samples follow than do; libsndfile mends that without a word.

    Sizes from 0x7FFFF000 on stand for "unknown": programs that write to a pipe put them there.
    """
    order, data = {b"RIFF": ("<", b"data"), b"FORM": (">", b"SSND")}.get(head[:4], ("", b""))
    if not order:
        return False
    size, at = os.fstat(descriptor).st_size, 12
    for _ in range(1000):  # a file of nothing but tiny chunks is not searched to its end
        chunk = os.pread(descriptor, 8, at)
        if len(chunk) < 8:
            return False
        length = struct.unpack(f"{order}I", chunk[4:])[0]
        if chunk[:4] == data:
            return at + 8 + length > size and length < 0x7FFFF000
        at += 8 + length + length % 2
    return False


class _Other:
    """What libsndfile does not decode (m4a, webm, aac, wma ...), by PyAV's copy of ffmpeg, where that is installed.

    It reads from our descriptor with a demuxer chosen here, so no name is taken for an address and no list of other
    files is followed. A cut is reached by decoding up to it: seeking is not exact in these formats.
    """

    def __init__(self, descriptor: int, name: str, demuxer: str) -> None:
        try:
            av: Any = importlib.import_module("av")
        except ImportError:
            raise BadAudio(f"{name}: install PyAV: pip install av") from None
        self.format, self.cut_short = name, False
        self._failure = av.error.FFmpegError
        self._file = open(descriptor, "rb", closefd=False)  # noqa: SIM115
        try:
            self._container = av.open(self._file, format=demuxer)
            if not self._container.streams.audio:
                raise BadAudio(f"{name} without audio")
            stream = self._container.streams.audio[0]
            self.sample_rate, self.channels = int(stream.rate or 0), int(stream.channels or 0)
        except self._failure as error:
            raise BadAudio(f"{name} that cannot be read: {error.strerror}") from None
        if not 0 < self.sample_rate <= MAX_RATE or not self.channels:
            raise BadAudio(f"bad header: sample rate {self.sample_rate}, {self.channels} channels")
        self.frames: int | None = None  # durations here include padding that is not decoded: only decoding tells
        self._descriptor = descriptor
        self._decoded = self._frames(stream, av)
        self._left = np.empty((0, self.channels), np.float32)

    def _frames(self, stream: Any, av: Any) -> Iterator[np.ndarray]:
        convert = av.AudioResampler(format="fltp", layout=stream.layout, rate=self.sample_rate)
        try:
            for frame in self._container.decode(stream):
                for part in convert.resample(frame):
                    yield part.to_ndarray().T
        except self._failure:
            self.cut_short = True

    def read(self, frames: int) -> np.ndarray:
        parts, count = [self._left], len(self._left)
        while count < frames and (part := next(self._decoded, None)) is not None:
            parts.append(part)
            count += len(part)
        joined = np.concatenate(parts)
        self._left = joined[frames:]
        return np.ascontiguousarray(joined[:frames])

    def seek(self, frame: int) -> bool:
        return False

    def close(self) -> None:
        if not self._file.closed:
            self._container.close()
            self._file.close()
            os.close(self._descriptor)

    def __enter__(self) -> _Other:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
