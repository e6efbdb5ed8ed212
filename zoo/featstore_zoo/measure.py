"""One utterance against its reference, in every metric that was asked for: what a worker process of `evaluate` does."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from featstore.errors import BadRequest
from featstore_extractors import parse

from . import amphion_metrics, dtw, metrics, recognition
from .metrics import Undefined
from .pairs import Pair, Recording

Array = np.ndarray
Align = Literal["dtw", "none"]

FRAMES_PER_S = round(1000 / metrics.FRAME_MS)
AMPHION_F0 = "f0:praat,threshold=0.6,hop=256,sample_rate=22050"


class Metric(NamedTuple):
    """What a metric is called, its unit, which end of it is better, its digits, what it is, and of what it tells."""

    label: str
    unit: str
    better: Literal["lower", "higher"]
    digits: int
    says: str
    of: str


MELODY, SOUND, VOICE, AMPHIONS = GROUPS = ("melody", "sound", "voice and words", "Amphion's definitions")
METRICS: dict[str, Metric] = {
    "f0_corr": Metric("F0CORR", "", "higher", 3, "Pearson correlation of log f0 where voiced in both", MELODY),
    "f0_rmse": Metric("F0RMSE", "cents", "lower", 0, "root mean square of 1200 log2(f0′ / f0) where voiced in both",
                      MELODY),
    "f0_rmse_relative": Metric("F0RMSE, own key", "cents", "lower", 0,
                               "as F0RMSE in cents, the median of each recording removed first", MELODY),
    "f0_rmse_hz": Metric("F0RMSE", "Hz", "lower", 1, "root mean square of f0′ − f0 where voiced in both", MELODY),
    "gross_pitch_error": Metric("GPE", "%", "lower", 1, "gross pitch error: frames voiced in both whose f0 is over "
                                                        "20 % off", MELODY),
    "voicing_error": Metric("V/UV error", "%", "lower", 1, "frames voiced in one and not in the other", MELODY),
    "voicing_f1": Metric("V/UV F1", "", "higher", 3, "F1 of voiced frames, 2 TP / (2 TP + FP + FN)", MELODY),
    "mcd": Metric("MCD", "dB", "lower", 2, "mel-cepstral distortion: mean of (10 / ln 10) √(2 Σ (c′ − c)²), c1 to c24 "
                                           "of WORLD's envelope, along the alignment", SOUND),
    "stft": Metric("MR-STFT", "", "lower", 3, "spectral convergence plus mean difference of log magnitudes, at three "
                                              "resolutions (512, 1024, 2048), by equal times", SOUND),
    "si_sdr": Metric("SI-SDR", "dB", "higher", 1, "scale-invariant signal-to-distortion ratio, by equal times", SOUND),
    "periodicity_rmse": Metric("Periodicity RMSE", "", "lower", 3, "root mean square difference of the peak of "
                                                                   "autocorrelation, 0 to 1", SOUND),
    "energy_rmse": Metric("Energy RMSE", "dB", "lower", 2, "root mean square difference of the level in dB", SOUND),
    "energy_corr": Metric("Energy corr.", "", "higher", 3, "Pearson correlation of the level in dB", SOUND),
    "similarity": Metric("Similarity", "", "higher", 3, "cosine of speaker embeddings to the target, or without one "
                                                        "to the reference", VOICE),
    "source_similarity": Metric("Source similarity", "", "lower", 3, "cosine of speaker embeddings to the reference, "
                                                                     "where there is a target", VOICE),
    "stoi": Metric("STOI", "", "higher", 3, "short-time objective intelligibility, up to 1, by equal times", VOICE),
    "pesq": Metric("PESQ", "", "higher", 2, "wide-band PESQ (ITU-T P.862.2), 1 to 4.64, by equal times", VOICE),
    "cer": Metric("CER", "%", "lower", 1, "character error rate of what a recogniser hears, of all characters", VOICE),
    "wer": Metric("WER", "%", "lower", 1, "word error rate of what a recogniser hears, of all words", VOICE),
    "amphion_mcd": Metric("MCD", "dB", "lower", 2, "as Amphion's evaluation defines it", AMPHIONS),
    "amphion_f0_rmse": Metric("F0RMSE", "cents", "lower", 0, "as Amphion's evaluation defines it", AMPHIONS),
    "amphion_f0_corr": Metric("F0CORR", "", "higher", 3, "as Amphion's evaluation defines it", AMPHIONS),
    "amphion_voicing_f1": Metric("V/UV F1", "", "higher", 3, "as Amphion's evaluation defines it", AMPHIONS),
    "amphion_energy_rmse": Metric("Energy RMSE", "dB", "lower", 2, "as Amphion's evaluation defines it", AMPHIONS),
    "amphion_energy_corr": Metric("Energy corr.", "", "higher", 3, "as Amphion's evaluation defines it", AMPHIONS),
    "amphion_stft": Metric("MR-STFT", "", "lower", 3, "as Amphion's evaluation defines it", AMPHIONS),
}
PERCENT = frozenset(name for name, metric in METRICS.items() if metric.unit == "%")
TEXT = ("cer", "wer")
AMPHION = tuple(name for name in METRICS if name.startswith("amphion_"))
STANDARD = tuple(name for name in METRICS if name not in (*TEXT, *AMPHION, "source_similarity"))


@dataclass(frozen=True)
class Settings:
    """How pairs are measured. names: of METRICS. f0, speaker: requests of extractors. language: of all texts."""

    sample_rate: int
    names: tuple[str, ...]
    align: Align = "dtw"
    f0: str = "f0:swift"
    speaker: str = "speaker"
    recogniser: str | None = None
    language: str | None = None


@dataclass(frozen=True)
class Job:
    """A pair with what is known of it beforehand: `heard`, the texts by system and, under "", the reference's; the
    target's speaker embedding by system; the page to write, if any."""

    pair: Pair
    heard: Mapping[str, str] = field(default_factory=dict)
    targets: Mapping[str, Array] = field(default_factory=dict)
    page: Path | None = None
    small: bool = False


@dataclass(frozen=True)
class Measured:
    """The values of one utterance of one system; what has none has a reason. weights: characters and words of texts."""

    system: str
    utterance: str
    speaker: str | None
    condition: str | None
    seconds: float
    values: Mapping[str, float]
    reasons: Mapping[str, str]
    weights: Mapping[str, int]
    text: str | None = None
    heard: str | None = None


class Signal:
    """A waveform, and what is asked of it, found once. Curves are on one grid: frame i at i * 5 ms."""

    def __init__(self, wave: Array, measurer: Measurer) -> None:
        self.wave, self._by = wave, measurer
        self.rate: int = measurer.settings.sample_rate

    @cached_property
    def cepstra(self) -> Array:
        return metrics.mel_cepstra(self.wave, self.rate)[:, 1:]

    @cached_property
    def f0(self) -> Array:
        return self._by.f0_of(self.wave)

    @cached_property
    def level(self) -> Array:
        return metrics.level(self.wave, self.rate)

    @cached_property
    def periodicity(self) -> Array:
        return metrics.periodicity(self.wave, self.rate)

    @cached_property
    def amphion_f0(self) -> Array:
        return self._by.amphion_f0(self.wave)

    @cached_property
    def voice(self) -> Array | Undefined:
        return self._by.voice(self.wave)


class Measurer:
    """Measures pairs; what has weights is loaded when it is first needed, and once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._loaded: dict[str, tuple[Any, Callable[[list[Array]], list[Array]]]] = {}

    def __call__(self, job: Job) -> list[Measured]:
        """What each system made of an utterance, in the order of their names; its page too, if there is to be one."""
        rate = self.settings.sample_rate
        reference = Signal(job.pair.reference.read(rate), self)
        found, signals, paths = [], {}, {}
        for system, recording in job.pair.converted.items():
            made = Signal(recording.read(rate), self)
            quiet = metrics.silent(reference.wave, made.wave)
            pairs = None if quiet else self._aligned(reference, made)
            found.append(self._measured(job, system, reference, made, pairs, quiet))
            signals[system], paths[system] = made, pairs
        if job.page is not None:
            from . import report

            job.page.write_text(report.utterance(job, self.settings, reference, signals, paths, found), "utf-8")
        return found

    def embed(self, recording: Recording) -> Array | Undefined:
        """The speaker embedding of a recording."""
        return self.voice(recording.read(self.settings.sample_rate))

    def f0_of(self, wave: Array) -> Array:
        """f0 (T,) in Hz every 5 ms."""
        extractor, run = self._extractor(self.settings.f0)
        return run([_resampled(wave, self.settings.sample_rate, extractor.sample_rate)])[0]

    def amphion_f0(self, wave: Array) -> Array:
        """f0 (T,) in Hz as Amphion's evaluation tracks it, but where it belongs in time."""
        extractor, run = self._extractor(AMPHION_F0)
        return run([_resampled(wave, self.settings.sample_rate, extractor.sample_rate)])[0]

    def voice(self, wave: Array) -> Array | Undefined:
        """The speaker embedding (D,), or why there is none."""
        extractor, run = self._extractor(self.settings.speaker)
        heard = _resampled(wave, self.settings.sample_rate, extractor.sample_rate)
        size = extractor.window[0] if getattr(extractor, "window", None) else len(heard)
        pieces = [heard[start:start + size] for start in range(0, len(heard), size)]
        if len(pieces) > 1 and len(pieces[-1]) < size:
            pieces[-1] = heard[-size:]
        try:
            with _one_thread():
                vectors = run(pieces)
            return vectors[0] if len(vectors) == 1 else extractor.combine(vectors, [len(piece) for piece in pieces])
        except ValueError as error:  # silent, or too short for a voice
            return Undefined(str(error))

    def _aligned(self, reference: Signal, made: Signal) -> Array:
        if self.settings.align == "dtw":
            return dtw.path(reference.cepstra, made.cepstra)
        return np.repeat(np.arange(min(len(reference.cepstra), len(made.cepstra)))[:, None], 2, axis=1)

    def _measured(self, job: Job, system: str, reference: Signal, made: Signal, pairs: Array | None, quiet: str
                  ) -> Measured:
        source, other = job.pair.reference, job.pair.converted[system]
        wanted = [name for name in self.settings.names if name not in TEXT]
        if pairs is None:
            values: dict[str, float] = {name: Undefined(quiet) for name in wanted}
        else:
            values = self._values(wanted, reference, made, pairs, job.targets.get(system))
        texts = self._texts(job, system) if set(TEXT) & set(self.settings.names) else {}
        values |= {name: errors.rate for name, errors in texts.items() if name in self.settings.names}
        values = {name: 100 * value if name in PERCENT and math.isfinite(value) else value
                  for name, value in values.items()}
        reasons = {name: value.reason for name, value in values.items() if isinstance(value, Undefined)}
        values = {name: float(values[name]) for name in self.settings.names}
        return Measured(system, job.pair.name, source.speaker or other.speaker, source.condition or other.condition,
                        len(made.wave) / made.rate, values, reasons,
                        {name: errors.of for name, errors in texts.items()},
                        source.text if source.text is not None else job.heard.get(""), job.heard.get(system))

    def _values(self, wanted: Sequence[str], reference: Signal, made: Signal, pairs: Array, target: Array | None
                ) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in wanted:
            found[name] = _WAVES[name](reference, made) if name in _WAVES else \
                self._similarity(name, reference, made, target) if name.endswith("similarity") else \
                _CURVES[name](reference, made, pairs)
        return found

    def _similarity(self, name: str, reference: Signal, made: Signal, target: Array | None) -> float:
        wanted = reference.voice if name == "source_similarity" or target is None else target
        for voice in (wanted, made.voice):
            if isinstance(voice, Undefined):
                return voice
        return metrics.speaker_similarity(np.asarray(wanted), np.asarray(made.voice))

    def _texts(self, job: Job, system: str) -> dict[str, recognition.Errors]:
        source = job.pair.reference
        text = source.text if source.text is not None else job.heard.get("", "")
        language = language_of(source, self.settings)
        return {"cer": recognition.character_errors(text, job.heard.get(system, ""), language),
                "wer": recognition.word_errors(text, job.heard.get(system, ""), language)}

    def _extractor(self, request: str) -> tuple[Any, Callable[[list[Array]], list[Array]]]:
        if request not in self._loaded:
            (extractor,) = parse(request).values()
            self._loaded[request] = extractor, extractor.load("cpu")
        return self._loaded[request]


def check(settings: Settings) -> None:
    """Refuse what cannot be measured before anything is.

    Raises:
        BadRequest: a metric that is not known, an f0 of another frame rate, something that is no speaker embedding.
    """
    unknown = [name for name in settings.names if name not in METRICS]
    if unknown or not settings.names:
        raise BadRequest(f"no metric {(unknown or [''])[0]!r}: there are {', '.join(METRICS)}")
    (tracker,), (speaker,) = parse(settings.f0).values(), parse(settings.speaker).values()
    if tracker.kind != "f0" or tracker.frame_rate != FRAMES_PER_S:
        raise BadRequest(f"{settings.f0}: expected an f0 of {FRAMES_PER_S} frames per second, as it is without hop")
    if speaker.kind != "global":
        raise BadRequest(f"{settings.speaker}: expected a speaker embedding, one vector per recording")


def language_of(recording: Recording, settings: Settings) -> str | None:
    """Two letters of the language, as text is normalised by."""
    language = settings.language or recording.language
    return language.replace("_", "-").partition("-")[0].lower() if language else None


def curve(signal: Array, pairs: Array, side: int) -> Array:
    """A curve (T,) along pairs of frames; extractors differ by a frame in how they end."""
    return signal[np.minimum(pairs[:, side], len(signal) - 1)]


def _on(metric: Callable[..., float], name: str, **options: Any) -> Callable[[Signal, Signal, Array], float]:
    def of(reference: Signal, made: Signal, pairs: Array) -> float:
        return metric(curve(getattr(reference, name), pairs, 0), curve(getattr(made, name), pairs, 1), **options)

    return of


def _mcd(reference: Signal, made: Signal, pairs: Array) -> float:
    return metrics.cepstral_distortion(*metrics.along(pairs, reference.cepstra, made.cepstra))


_CURVES: dict[str, Callable[[Signal, Signal, Array], float]] = {
    "mcd": _mcd,
    "f0_corr": _on(metrics.f0_correlation, "f0"),
    "f0_rmse": _on(metrics.f0_rmse, "f0"),
    "f0_rmse_relative": _on(metrics.f0_rmse, "f0", remove_median=True),
    "f0_rmse_hz": _on(metrics.f0_rmse, "f0", unit="Hz"),
    "voicing_error": _on(metrics.voicing_error, "f0"),
    "voicing_f1": _on(metrics.voicing_f1, "f0"),
    "gross_pitch_error": _on(metrics.gross_pitch_error, "f0"),
    "periodicity_rmse": _on(metrics.rmse, "periodicity"),
    "energy_rmse": _on(metrics.rmse, "level"),
    "energy_corr": _on(metrics.correlation, "level"),
}
_WAVES: dict[str, Callable[[Signal, Signal], float]] = {
    "stft": lambda one, other: metrics.multi_resolution_stft(one.wave, other.wave),
    "si_sdr": lambda one, other: metrics.si_sdr(one.wave, other.wave),
    "stoi": lambda one, other: metrics.stoi(one.wave, other.wave, one.rate),
    "pesq": lambda one, other: metrics.pesq(one.wave, other.wave, one.rate),
    "amphion_mcd": lambda one, other: amphion_metrics.mel_cepstral_distortion(one.wave, other.wave, one.rate),
    "amphion_f0_rmse": lambda one, other: amphion_metrics.f0_rmse(one.amphion_f0, other.amphion_f0),
    "amphion_f0_corr": lambda one, other: amphion_metrics.f0_correlation(one.amphion_f0, other.amphion_f0),
    "amphion_voicing_f1": lambda one, other: amphion_metrics.voicing_f1(one.amphion_f0, other.amphion_f0),
    "amphion_energy_rmse": lambda one, other: amphion_metrics.energy_rmse(one.wave, other.wave, one.rate),
    "amphion_energy_corr": lambda one, other: amphion_metrics.energy_correlation(one.wave, other.wave, one.rate),
    "amphion_stft": lambda one, other: amphion_metrics.multi_resolution_stft(one.wave, other.wave, one.rate),
}


def _resampled(wave: Array, rate: int, to: int) -> Array:
    import soxr

    return wave if rate == to else np.asarray(soxr.resample(wave, rate, to), np.float32)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """torch in one thread: a small network is not faster in more, and its sums are then the same on every machine."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What a worker process holds; `start` runs once in each.

_measurer: Measurer | None = None


def start(settings: Settings) -> None:
    """Make this process ready to measure."""
    global _measurer
    _measurer = Measurer(settings)


def work(job: Job) -> list[Measured]:
    """A job, in a process that `start` made ready."""
    return _ready()(job)


def embed(recording: Recording) -> Array | Undefined:
    """The speaker embedding of a recording, in a process that `start` made ready."""
    return _ready().embed(recording)


def _ready() -> Measurer:
    if _measurer is None:
        raise RuntimeError("start(settings) has not run in this process")
    return _measurer

