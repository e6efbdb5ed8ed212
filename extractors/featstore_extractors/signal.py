"""Log-mel spectrogram, energy, loudness and the waveform itself, in numpy.

Two frame grids. Mel contracts: frame k covers samples [k hop, (k + 1) hop), so T = N // hop and frame 0 is centred at
hop / 2. Energy and loudness: frame i is centred on sample i hop, so T = N // hop + 1 and frame 0 is centred at 0 s.

Spectra are computed in float64, and whatever sums over bins or samples does so in a fixed order, never by BLAS: a
matrix product gives other bits with another number of threads, and then the same recording would give other bytes.
Frames go through fixed blocks of `ROWS`, so that a piece of a long recording gives the very bits of the whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np

Array = np.ndarray
Run = Callable[[list[Array]], list[Array]]

ROWS = 128  # frames in a block: of 64 to 512 the fastest for 1024 and 2048 points together, in 2 MB of cache
CORE_S = 60  # seconds of core in a piece of a long recording

MelScale = Literal["slaney", "htk"]
MelNorm = Literal["slaney", "none"]
LogBase = Literal["e", "10"]
MelPadding = Literal["frames", "centre"]
Weighting = Literal["none", "A"]


@dataclass(frozen=True)
class MelContract:
    """What a log-mel spectrogram is: everything on which an acoustic model and a vocoder must agree. Default `24k-100`.

    A periodic Hann window of `win_length` samples in the middle of `n_fft`; the magnitude sqrt(re^2 + im^2 + eps), or
    its square where `power` is 2; `n_mels` triangles between `fmin` and `fmax` Hz; the logarithm of max(., floor).

    mel_scale: "slaney" (linear below 1 kHz; Slaney, Auditory Toolbox, 1998) or "htk" (2595 lg(1 + f / 700)).
    norm: "slaney" (every triangle has area 1 over Hz) or "none" (every triangle has height 1).
    log_base: "e" or "10".
    padding: "frames" reflects (n_fft - hop) / 2 samples at either end, so that frame k covers samples
        [k hop, (k + 1) hop) and T = N // hop; "centre" reflects n_fft / 2, so that frame k is centred on sample k hop
        and T = N // hop + 1.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "24k-100": {},
        "44k-128": {"sample_rate": 44100, "n_fft": 2048, "win_length": 2048, "hop_length": 512, "n_mels": 128,
                    "fmin": 40.0, "fmax": 16000.0},
        "22k-80": {"sample_rate": 22050, "n_mels": 80, "fmax": 8000.0},
    }

    sample_rate: int = 24000
    n_fft: int = 1024
    win_length: int = 1024
    hop_length: int = 256
    n_mels: int = 100
    fmin: float = 0.0
    fmax: float = 12000.0
    mel_scale: MelScale = "slaney"
    norm: MelNorm = "slaney"
    power: int = 1
    eps: float = 1e-9
    log_base: LogBase = "e"
    floor: float = 1e-5  # -100 dB: below 16-bit noise, so that silence is flat and not -inf
    padding: MelPadding = "frames"

    @classmethod
    def preset(cls, name: str) -> Self:
        """The contract of that name: 24k-100, 44k-128 or 22k-80."""
        if name not in cls.PRESETS:
            raise ValueError(f"no mel contract {name!r}; there are {', '.join(cls.PRESETS)}")
        return cls(**cls.PRESETS[name])

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """The contract in a stored spec's settings; what else stands there is passed over.

        Raises:
            ValueError: if a part of the contract is missing.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        missing = [name for name in names if name not in settings]
        if missing:
            raise ValueError(f"no mel contract: {', '.join(missing)} not among {', '.join(sorted(settings))}")
        return cls(**{name: settings[name] for name in names})

    def __post_init__(self) -> None:
        _whole_numbers(self, ("sample_rate", "n_fft", "win_length", "hop_length", "n_mels", "power"))
        for name in ("fmin", "fmax", "eps", "floor"):  # 0 and 0.0 are one contract, not two
            object.__setattr__(self, name, float(getattr(self, name)))
        _choices(self, mel_scale=MelScale, norm=MelNorm, log_base=LogBase, padding=MelPadding)
        if self.win_length > self.n_fft:
            raise ValueError(f"win_length {self.win_length} must not exceed n_fft {self.n_fft}")
        if self.hop_length > self.n_fft:
            raise ValueError(f"hop_length {self.hop_length} must not exceed n_fft {self.n_fft}, or samples are skipped")
        if self.padding == "frames" and (self.n_fft - self.hop_length) % 2:
            raise ValueError(f"n_fft {self.n_fft} - hop_length {self.hop_length} is odd: frames cannot be centred on "
                             "their own samples; change hop_length by one or use padding=centre")
        if not 0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            raise ValueError(f"fmin {self.fmin:g} and fmax {self.fmax:g} Hz: expected 0 <= fmin < fmax <= "
                             f"{self.sample_rate / 2:g}, half the sample rate")
        if self.power not in (1, 2):
            raise ValueError(f"power must be 1 (magnitude) or 2 (power), not {self.power}")
        if not (0 <= self.eps < math.inf and 0 < self.floor < math.inf):
            raise ValueError(f"eps {self.eps:g} must be >= 0 and floor {self.floor:g} > 0")

    def differs(self, other: MelContract) -> dict[str, tuple[Any, Any]]:
        """The fields in which two contracts differ, `{field: (mine, other's)}`; empty if a vocoder serves both."""
        names = [f.name for f in dataclasses.fields(MelContract)]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    @property
    def frame_rate(self) -> Fraction:
        """Frames per second, exact."""
        return Fraction(self.sample_rate, self.hop_length)

    @property
    def centre_s(self) -> Fraction:
        """The time on which frame 0 is centred, seconds, exact."""
        return Fraction(self.hop_length if self.padding == "frames" else 0, 2 * self.sample_rate)

    @property
    def window(self) -> tuple[int, int]:
        """(core, context) of a piece of a long recording, in samples, both whole numbers of frames."""
        return _window(self.sample_rate, self.hop_length, self._pad)

    @property
    def _pad(self) -> int:
        return (self.n_fft - self.hop_length) // 2 if self.padding == "frames" else self.n_fft // 2


@dataclass(frozen=True)
class LogMel(MelContract):
    """Log-mel spectrogram: waveform (N,) -> (T, n_mels); frame k covers samples [k hop, (k + 1) hop), T = N // hop.

    Its fields are the contract's own, so that a stored spec says `n_mels` and a request sets it. A waveform too short
    for the reflection ((n_fft - hop) / 2 + 1 samples) or for one frame raises ValueError.
    """

    name: ClassVar[str] = "log-mel"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "continuous"
    dtype: ClassVar[str] = "float32"

    @property
    def dim(self) -> int:
        return self.n_mels

    @property
    def pad(self) -> float:
        return math.log(self.floor) if self.log_base == "e" else math.log10(self.floor)

    def load(self, device: str) -> Run:
        return lambda waves: [self._log_mel(wave) for wave in waves]

    def _log_mel(self, wave: Array) -> Array:
        log = np.log if self.log_base == "e" else np.log10
        out = np.empty((_mel_frames(wave, self), self.n_mels), np.float32)
        for start, mel in _mel(wave, self):
            rows = out[start : start + ROWS]
            rows[:] = log(mel).T[: len(rows)]
        return out


@dataclass(frozen=True)
class MelEnergy(MelContract):
    """Energy on the mel grid: waveform (N,) -> (T,), the root of the sum over bins of mel^2: `energy:mel`."""

    name: ClassVar[str] = "energy"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "continuous"
    dim: ClassVar[int] = 0
    dtype: ClassVar[str] = "float32"

    def load(self, device: str) -> Run:
        return lambda waves: [self._energy(wave) for wave in waves]

    def _energy(self, wave: Array) -> Array:
        out = np.empty(_mel_frames(wave, self), np.float32)
        for start, mel in _mel(wave, self):
            rows = out[start : start + ROWS]
            rows[:] = np.sqrt(np.sum(np.square(mel), axis=0))[: len(rows)]
        return out


@dataclass(frozen=True)
class StftEnergy:
    """Energy of spectra: waveform (N,) -> (T,), the root of the sum over bins of squared magnitude: `energy:stft`.

    Frame i is centred on sample i hop, T = N // hop + 1, zeros beyond the ends, Hann window of `width` samples.
    """

    name: ClassVar[str] = "energy"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "continuous"
    centre_s: ClassVar[Fraction] = Fraction(0)
    dim: ClassVar[int] = 0
    dtype: ClassVar[str] = "float32"

    sample_rate: int = 24000
    hop: int = 256
    width: int = 1024
    method: str = "stft"  # tells its identity from that of `Energy` on the same grid

    def __post_init__(self) -> None:
        if self.method != "stft":
            raise ValueError(f"energy: method={self.method!r}: ask for energy:rms or energy:mel instead")
        _check_grid(self)

    @property
    def frame_rate(self) -> Fraction:
        return Fraction(self.sample_rate, self.hop)

    @property
    def window(self) -> tuple[int, int]:
        return _window(self.sample_rate, self.hop, self.width)

    def load(self, device: str) -> Run:
        return lambda waves: [self._energy(wave) for wave in waves]

    def _energy(self, wave: Array) -> Array:
        padded, first, _ = _centred(wave, self.hop, self.width)
        out = np.empty(len(first), np.float32)
        for start, power in _power(padded, _hann(self.width), self.hop, len(first)):
            rows = out[start : start + ROWS]
            rows[:] = np.sqrt(np.sum(power, axis=1))[: len(rows)]
        return out


@dataclass(frozen=True)
class Energy:
    """Linear RMS: waveform (N,) -> (T,), frame i over the `width` samples around sample i hop, T = N // hop + 1.

    At the ends the mean is taken over the samples that exist, so that a steady tone has no dip there. The default is
    200 frames per second; `hop=256` has the rate of a 24k-100 mel, half a hop earlier, as `centre_s` states.
    Presets: rms (this), mel (`MelEnergy`), stft (`StftEnergy`).
    """

    PRESETS: ClassVar[tuple[str, ...]] = ("rms", "mel", "stft")
    name: ClassVar[str] = "energy"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "continuous"
    centre_s: ClassVar[Fraction] = Fraction(0)
    dim: ClassVar[int] = 0
    dtype: ClassVar[str] = "float32"

    sample_rate: int = 24000
    hop: int = 120
    width: int = 1024  # 43 ms: two periods of the lowest voice

    @classmethod
    def preset(cls, name: str) -> Energy | MelEnergy | StftEnergy:
        """rms; mel or stft: as others compute it, from the mel or the linear spectrogram."""
        if name not in cls.PRESETS:
            raise ValueError(f"no energy {name!r}; there are {', '.join(cls.PRESETS)}")
        return {"rms": cls, "mel": MelEnergy, "stft": StftEnergy}[name]()

    def __post_init__(self) -> None:
        _check_grid(self)

    @property
    def frame_rate(self) -> Fraction:
        return Fraction(self.sample_rate, self.hop)

    @property
    def window(self) -> tuple[int, int]:
        return _window(self.sample_rate, self.hop, self.width)

    def load(self, device: str) -> Run:
        return lambda waves: [np.sqrt(_mean_square(wave, self.hop, self.width)).astype(np.float32) for wave in waves]


@dataclass(frozen=True)
class Loudness:
    """Loudness in dBFS: waveform (N,) -> (T,), 20 lg(RMS), never below `floor`; grid and ends as for `Energy`.

    A square wave of full scale is 0 dBFS, a sine -3.01. `weighting="A"` weights every frame's spectrum by the curve of
    IEC 61672-1 (0 dB at 1 kHz), under a Hann window, since the side lobes of a bare cut would carry the bass, which the
    curve is there to remove, into every band.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"A": {"weighting": "A"}}
    name: ClassVar[str] = "loudness"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "continuous"
    centre_s: ClassVar[Fraction] = Fraction(0)
    dim: ClassVar[int] = 0
    dtype: ClassVar[str] = "float32"

    sample_rate: int = 24000
    hop: int = 120
    width: int = 1024
    weighting: Weighting = "none"
    floor: float = -100.0  # dBFS, below 16-bit noise

    def __post_init__(self) -> None:
        _check_grid(self)
        _choices(self, weighting=Weighting)
        object.__setattr__(self, "floor", float(self.floor))
        if not -300 <= self.floor < 0:
            raise ValueError(f"floor must be between -300 and 0 dBFS, not {self.floor:g}")

    @property
    def frame_rate(self) -> Fraction:
        return Fraction(self.sample_rate, self.hop)

    @property
    def pad(self) -> float:
        return self.floor

    @property
    def window(self) -> tuple[int, int]:
        return _window(self.sample_rate, self.hop, self.width)

    def load(self, device: str) -> Run:
        return lambda waves: [self._loudness(wave) for wave in waves]

    def _loudness(self, wave: Array) -> Array:
        if self.weighting == "A":
            square = _weighted_mean_square(wave, self.hop, self.width, self.sample_rate)
        else:
            square = _mean_square(wave, self.hop, self.width)
        return (10 * np.log10(np.maximum(square, 10 ** (self.floor / 10)))).astype(np.float32)


@dataclass(frozen=True)
class Wave:
    """The waveform itself: (N,) -> (N,), stored as int16 with one scale per utterance; kind "samples".

    `run` gives float32; what is stored is `quantise(block, scale)` of it, block by block if need be, with the scale of
    the whole utterance, `scale_of(peak)`; stored x scale = waveform.

    Up to |x| = 1 the scale is 1 / 32768, that of 16-bit files, whose samples therefore come back exactly at their own
    sample rate. Beyond, the scale is peak / 32767, so that nothing clips. The error is at most half a step, but for x
    within half a step of +1, which may be off by a whole one. No dither: the same waveform gives the same bytes.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "16k": {"sample_rate": 16000}, "22k": {"sample_rate": 22050}, "24k": {"sample_rate": 24000},
        "44k": {"sample_rate": 44100}, "48k": {"sample_rate": 48000},
    }
    name: ClassVar[str] = "wave"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "samples"
    centre_s: ClassVar[Fraction] = Fraction(0)
    dim: ClassVar[int] = 0
    dtype: ClassVar[str] = "int16"

    sample_rate: int = 24000

    def __post_init__(self) -> None:
        _whole_numbers(self, ("sample_rate",))

    @property
    def frame_rate(self) -> Fraction:
        return Fraction(self.sample_rate)

    @property
    def window(self) -> tuple[int, int]:
        return CORE_S * self.sample_rate, 0

    def load(self, device: str) -> Run:
        return lambda waves: [np.asarray(wave, np.float32) for wave in waves]

    @staticmethod
    def scale_of(peak: float) -> float:
        """The step of a waveform whose largest |x| is `peak`."""
        return 1 / 32768 if peak <= 1 else float(peak) / 32767

    @staticmethod
    def quantise(block: Array, scale: float) -> Array:
        """int16 (n,) of a stretch of waveform (n,), rounded to the nearest step."""
        return np.clip(np.rint(block / np.float64(scale)), -32768, 32767).astype(np.int16)


def mel_filters(contract: MelContract) -> Array:
    """The triangles of a mel contract, (n_mels, n_fft // 2 + 1) float64."""
    def to_mel(hz: Array) -> Array:
        if contract.mel_scale == "htk":
            return 2595 * np.log10(1 + hz / 700)
        return np.where(hz < 1000, 3 * hz / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / math.log(6.4))

    def to_hz(mel: Array) -> Array:
        if contract.mel_scale == "htk":
            return 700 * (10 ** (mel / 2595) - 1)
        return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))

    ends = to_mel(np.array([contract.fmin, contract.fmax]))
    corner = to_hz(np.linspace(ends[0], ends[1], contract.n_mels + 2))[:, None]  # triangle m: corners m, m + 1, m + 2
    hz = np.arange(contract.n_fft // 2 + 1) * (contract.sample_rate / contract.n_fft)
    rising = (hz - corner[:-2]) / (corner[1:-1] - corner[:-2])
    falling = (corner[2:] - hz) / (corner[2:] - corner[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling))
    return filters * (2 / (corner[2:] - corner[:-2])) if contract.norm == "slaney" else filters


def a_weighting(hz: Array) -> Array:
    """The A-weighting of IEC 61672-1 (annex E) as a factor of amplitude, 1 at 1 kHz, for frequencies (n,) in Hz."""
    def curve(f: Array | float) -> Any:
        square = np.square(f)
        return 12194.217**2 * square**2 / ((square + 20.598997**2) * (square + 12194.217**2)
                                           * np.sqrt((square + 107.65265**2) * (square + 737.86223**2)))

    return curve(hz) / curve(1000.0)


def _mel_frames(wave: Array, contract: MelContract) -> int:
    needed = max(contract._pad + 1, contract.hop_length)
    if len(wave) < needed:
        raise ValueError(f"too short: {len(wave)} samples at {contract.sample_rate} Hz, a mel frame needs {needed}")
    return len(wave) // contract.hop_length + (contract.padding == "centre")


def _mel(wave: Array, contract: MelContract) -> Iterator[tuple[int, Array]]:
    """(first frame, floored mel (n_mels, ROWS) float32) block by block; rows beyond T are to be dropped."""
    passes, order = _banded_filters(contract)
    hann = _hann(contract.win_length)
    left = (contract.n_fft - contract.win_length) // 2
    hann = np.pad(hann, (left, contract.n_fft - contract.win_length - left))
    padded = np.pad(wave, contract._pad, mode="reflect")
    bins = np.empty((contract.n_fft // 2 + 1, ROWS), np.float32)
    term = np.empty((contract.n_mels, ROWS), np.float32)
    for start, power in _power(padded, hann, contract.hop_length, _mel_frames(wave, contract)):
        power += contract.eps
        bins[:] = (np.sqrt(power, out=power) if contract.power == 1 else power).T
        mel = np.zeros((contract.n_mels, ROWS), np.float32)
        for index, weight in passes:
            part = np.take(bins, index, axis=0, out=term[: len(index)], mode="clip")
            part *= weight
            mel[: len(index)] += part
        yield start, np.maximum(mel, np.float32(contract.floor))[order]


@lru_cache(maxsize=8)
def _banded_filters(contract: MelContract) -> tuple[list[tuple[Array, Array]], Array]:
    """The filter bank as passes over its bands, and the order that sorts their sums back.

    With the widest filter first, pass j adds the j-th bin of each filter that has one, and those are a prefix: every
    sum runs over its own bins in one order, at the speed of a matrix product (which multiplies 98 % zeros).
    """
    filters = mel_filters(contract)
    first = np.argmax(filters > 0, axis=1)
    width = np.sum(filters > 0, axis=1)
    widest_first = np.argsort(-width, kind="stable")
    passes = []
    for j in range(int(width.max())):
        active = widest_first[: np.sum(width > j)]
        passes.append((first[active] + j, filters[active, first[active] + j].astype(np.float32)[:, None]))
    return passes, np.argsort(widest_first)


def _power(padded: Array, taper: Array, hop: int, count: int) -> Iterator[tuple[int, Array]]:
    """(first frame, squared magnitudes (ROWS, bins) float64); frame k is samples [k hop, k hop + len(taper))."""
    frames = _frames(padded, len(taper), hop, count)
    tapered = np.zeros((ROWS, len(taper)))
    for start in range(0, count, ROWS):
        rows = frames[start : start + ROWS]
        np.multiply(rows, taper, out=tapered[: len(rows)])
        tapered[len(rows) :] = 0
        parts = np.fft.rfft(tapered).view(np.float64)
        np.square(parts, out=parts)
        yield start, parts[:, 0::2] + parts[:, 1::2]


def _mean_square(wave: Array, hop: int, width: int) -> Array:
    """Mean of x^2 over the samples there are within `width` around sample i hop: (N,) -> (N // hop + 1,) float64."""
    padded, first, stop = _centred(wave, hop, width)
    frames = _frames(padded, width, hop, len(first))
    total = np.empty(len(first))
    for start in range(0, len(first), ROWS):
        total[start : start + ROWS] = np.sum(np.square(frames[start : start + ROWS], dtype=np.float64), axis=1)
    return total / (stop - first)


def _weighted_mean_square(wave: Array, hop: int, width: int, sample_rate: int) -> Array:
    """As `_mean_square`, A-weighted: by Parseval from the spectrum under a Hann window."""
    padded, first, stop = _centred(wave, hop, width)
    taper = _hann(width)
    sides = np.full(width // 2 + 1, 2.0)  # a bin stands for its mirror image too, but for 0 Hz and the Nyquist bin
    sides[0] = 1
    if width % 2 == 0:
        sides[-1] = 1
    gain = sides * a_weighting(np.arange(len(sides)) * (sample_rate / width)) ** 2
    total = np.empty(len(first))
    for start, power in _power(padded, taper, hop, len(first)):
        rows = total[start : start + ROWS]
        rows[:] = np.sum(power * gain, axis=1)[: len(rows)]
    covered = np.concatenate([[0.0], np.cumsum(taper**2)])  # of the window, up to each of its samples
    shift = np.arange(len(first)) * hop - width // 2
    return total / (width * np.maximum(covered[stop - shift] - covered[first - shift], 1e-12))


def _centred(wave: Array, hop: int, width: int) -> tuple[Array, Array, Array]:
    """The waveform with zeros at both ends, and first and stop sample of what exists of each frame."""
    if not len(wave):
        raise ValueError("too short: no samples")
    left = np.arange(len(wave) // hop + 1) * hop - width // 2
    padded = np.pad(wave, (width // 2, width))
    return padded, np.maximum(left, 0), np.minimum(left + width, len(wave))


def _frames(padded: Array, width: int, hop: int, count: int) -> Array:
    return np.lib.stride_tricks.sliding_window_view(padded, width)[::hop][:count]


def _hann(length: int) -> Array:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)  # periodic


def _window(sample_rate: int, hop: int, reach: int) -> tuple[int, int]:
    return -(-CORE_S * sample_rate // hop) * hop, -(-reach // hop) * hop


def _check_grid(extractor: Energy | StftEnergy | Loudness) -> None:
    _whole_numbers(extractor, ("sample_rate", "hop", "width"))
    if extractor.width < max(2, extractor.hop):
        raise ValueError(f"width {extractor.width} must be at least hop {extractor.hop}, or samples would be skipped")


def _whole_numbers(extractor: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(extractor, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def _choices(extractor: Any, **literals: Any) -> None:
    for name, literal in literals.items():
        if getattr(extractor, name) not in get_args(literal):
            raise ValueError(f"{name} must be one of {', '.join(get_args(literal))}, not {getattr(extractor, name)!r}")
