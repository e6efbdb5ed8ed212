"""How far a synthesised voice is from its reference: each metric a pure function of waveforms or f0, with its equation.

Both signals have one sample rate. Silence, or nothing that is voiced in both, gives NaN with a reason (`Undefined`):
never a perfect score. What is compared frame by frame is on one grid; `dtw.path` says which frames belong together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from featstore_extractors.signal import MelContract

from . import dtw

Array = np.ndarray
Alignment = Literal["none", "dtw"]

FRAME_MS = 5.0
CEPSTRA = 24       # mel-cepstral coefficients c1 .. c24, as in most of the literature since Kubichek (1993)
QUIET = 1e-4       # full scale is 1: what never exceeds -80 dB is silence, of which no distance means anything
GROSS = 0.2        # of f0: farther off is a gross error (de Cheveigné and Kawahara, 2002)
PERIOD_MS = 40.0   # a window of two periods at 50 Hz
LEVEL_MS = 25.0
BLOCK = 2048       # frames that are transformed at a time
MOST_DB = 100.0    # of SI-SDR: what 16 bits hold is 98 dB, and an equal signal would be infinitely far above
RESOLUTIONS = ((512, 50, 240), (1024, 120, 600), (2048, 240, 1200))  # n_fft, hop, window (Yamamoto, 2020, table 1)


class Undefined(float):
    """NaN, and why there is no number."""

    reason: str

    def __new__(cls, reason: str) -> Undefined:
        self = super().__new__(cls, math.nan)
        self.reason = reason
        return self


def mel_cepstral_distortion(reference: Array, converted: Array, sample_rate: int, *,
                            align: Alignment = "dtw") -> float:
    """Mel-cepstral distortion in dB of two waveforms (N,), (M,); 0 for equal ones, NaN where one is silent.

    (10 / ln 10) sqrt(2 sum over d of (c_d - c'_d)^2), d from 1 to `CEPSTRA`, averaged over frames of 5 ms (Kubichek,
    1993, equation 1); c0, the level, is left out. Mel-cepstra are those of WORLD's spectral envelope (`mel_cepstra`).

    align: "dtw" pairs frames on the cheapest warping path; "none" pairs frames of equal time, up to the shorter end.
    """
    if why := silent(reference, converted):
        return Undefined(why)
    one, other = (mel_cepstra(wave, sample_rate)[:, 1:] for wave in (reference, converted))
    if align == "dtw":
        one, other = along(dtw.path(one, other), one, other)
    count = min(len(one), len(other))
    return cepstral_distortion(one[:count], other[:count])


def cepstral_distortion(one: Array, other: Array) -> float:
    """Mean distance in dB of cepstra (T, D) of equal time: (10 / ln 10) sqrt(2 sum over d of (c_d - c'_d)^2)."""
    return float(10 / math.log(10) * np.sqrt(2 * np.square(one - other).sum(1)).mean())


def along(pairs: Array, one: Array, other: Array) -> tuple[Array, Array]:
    """Frames of two sequences, (P, ...) each, as pairs (P, 2) of `dtw.path` put them together."""
    return one[pairs[:, 0]], other[pairs[:, 1]]


def mel_distortion(reference: Array, made: Array, contract: MelContract) -> float:
    """Mel-cepstral distortion in dB of two log-mels (T, n_mels) of one contract, frame by frame; 0 for equal ones.

    As `mel_cepstral_distortion`, with the cosine transform of log-mels for mel-cepstra: c_d = 2/M sum over bands of
    log|S_m| cos(pi d (m + 1/2) / M). Of waveforms that one differs in its numbers: envelopes are WORLD's there.
    """
    bands = contract.n_mels
    unit = (1.0 if contract.log_base == "e" else math.log(10)) / contract.power  # to the natural log of magnitude
    waves = np.cos(np.pi * np.outer(np.arange(bands) + 0.5, np.arange(1, min(CEPSTRA, bands - 1) + 1)) / bands)
    cepstra = (np.asarray(reference, np.float64) - made) * unit @ waves * (2 / bands)
    return float(10 / math.log(10) * np.sqrt(2 * np.square(cepstra).sum(1)).mean())


def mel_cepstra(wave: Array, sample_rate: int, order: int = CEPSTRA) -> Array:
    """Mel-cepstra (T, order + 1) of a waveform (N,), a frame every 5 ms.

    The cepstrum of the logarithm of WORLD's spectral envelope (CheapTrick; Morise, 2015), `warped` by
    `warping(sample_rate)`.
    """
    pyworld = world()
    x = np.ascontiguousarray(wave, np.float64)
    f0, times = pyworld.dio(x, sample_rate, frame_period=FRAME_MS)
    envelope = pyworld.cheaptrick(x, pyworld.stonemask(x, f0, times, sample_rate), times, sample_rate)  # power, (T, K)
    return np.concatenate([_cepstra_of(power, order, warping(sample_rate)) for power in _blocks(envelope)])


def _cepstra_of(power: Array, order: int, alpha: float) -> Array:
    cepstrum = np.fft.irfft(np.log(power) / 2, axis=1)[:, :power.shape[1]]
    cepstrum[:, 1:-1] *= 2  # of a real, even spectrum: both sides together
    return warped(cepstrum, order, alpha)


def warped(cepstrum: Array, order: int, alpha: float) -> Array:
    """Cepstra (T, K) on a frequency axis warped by an all-pass filter, (T, order + 1) (Oppenheim and Johnson, 1972)."""
    return cepstrum @ _warp(cepstrum.shape[1], order, alpha)


def world() -> Any:
    """The package pyworld, imported without the warning it gives. ImportError names the extra."""
    from featstore_extractors.imports import with_pkg_resources

    with_pkg_resources()
    try:
        import pyworld
    except ImportError:
        raise ImportError("f0 and spectral envelopes of WORLD need pyworld: pip install 'featstore[signal]'") from None
    return pyworld


@lru_cache(maxsize=16)
def warping(sample_rate: int) -> float:
    """The all-pass constant whose warped frequency axis is closest to the mel scale up to half the sample rate.

    Closest by least squares, to three digits, to the mel scale of Fant (1968), 1000 log2(1 + f / 1000): 0.41 at 16 kHz,
    0.466 at 24 kHz, as is usual.
    """
    omega = np.linspace(0, np.pi, 1000)
    mel = np.log2(1 + omega / np.pi * sample_rate / 2 / 1000)
    mel *= np.pi / mel[-1]
    alphas = np.arange(0, 1, 0.001)[:, None]
    warped = omega + 2 * np.arctan2(alphas * np.sin(omega), 1 - alphas * np.cos(omega))
    return float(alphas[np.square(warped - mel).sum(1).argmin(), 0])


def f0_correlation(reference: Array, converted: Array) -> float:
    """Pearson correlation of log f0 (T,) over frames that are voiced in both; NaN where fewer than two are, or one is
    constant. f0 in Hz on one grid, 0 where unvoiced."""
    one, other = _voiced_cents(reference, converted)
    if len(one) < 2:
        return Undefined("fewer than two frames are voiced in both")
    return _pearson(one, other, "f0")


def f0_rmse(reference: Array, converted: Array, *, unit: Literal["cents", "Hz"] = "cents",
            remove_median: bool = False) -> float:
    """Root mean square difference of f0 (T,) over frames that are voiced in both; NaN where none is.

    unit: "cents" (1200 log2 of the ratio) or "Hz".
    remove_median: of each first, so that a constant shift of key does not count.
    """
    if unit == "cents":
        one, other = _voiced_cents(reference, converted)
    else:
        one, other = (f0[_both_voiced(reference, converted)].astype(np.float64) for f0 in (reference, converted))
    if not len(one):
        return Undefined("no frame is voiced in both")
    if remove_median:
        one, other = one - np.median(one), other - np.median(other)
    return float(np.sqrt(np.square(one - other).mean()))


def voicing_error(reference: Array, converted: Array) -> float:
    """Share of frames of f0 (T,) that are voiced in one and not in the other; NaN where there are no frames, or none
    is voiced in either: silence agrees with silence, and says nothing."""
    if not (np.any(reference) or np.any(converted)):
        return Undefined("no frame is voiced in either")
    return float(((reference > 0) != (converted > 0)).mean())


def voicing_f1(reference: Array, converted: Array) -> float:
    """F1 of voiced frames of f0 (T,), 2 TP / (2 TP + FP + FN); NaN where no frame is voiced in either."""
    one, other = np.asarray(reference) > 0, np.asarray(converted) > 0
    if not (one.any() or other.any()):
        return Undefined("no frame is voiced in either")
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def gross_pitch_error(reference: Array, converted: Array) -> float:
    """Share of the frames voiced in both whose f0 (T,) is more than 20 % off the reference's; NaN where none is.

    | f0' / f0 - 1 | > 0.2, the bound of de Cheveigné and Kawahara ("YIN", 2002). A conversion into another key may have
    one of 1: it is to be compared with what it was to sing.
    """
    both = _both_voiced(reference, converted)
    if not both.any():
        return Undefined("no frame is voiced in both")
    ratio = np.asarray(converted, np.float64)[both] / np.asarray(reference, np.float64)[both]
    return float((np.abs(ratio - 1) > GROSS).mean())


def periodicity(wave: Array, sample_rate: int) -> Array:
    """How periodic (T,) a waveform (N,) is every 5 ms, 0 to 1; 0 in silence. Frame i is centred on sample i * 5 ms.

    The highest value, over lags of 50 to 1100 Hz, of the autocorrelation of a windowed frame divided by that of its
    window (Boersma, "Accurate short-term analysis of the fundamental frequency", 1993, equation 9).
    """
    frames, window = _frames(wave, sample_rate, PERIOD_MS)
    return np.concatenate([_peaks(block, window, sample_rate) for block in _blocks(frames)])


def _peaks(frames: Array, window: Array, sample_rate: int) -> Array:
    quiet = np.sqrt(np.square(frames).mean(1)) < QUIET
    centred = (frames - frames.mean(1, keepdims=True)) * window
    low, high = int(sample_rate / 1100), min(math.ceil(sample_rate / 50), len(window) // 2)
    found, own = (_autocorrelation(x)[:, :high + 1] for x in (centred, window[None]))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = found / found[:, :1] / (own / own[:, :1])
    return np.where(quiet, 0.0, np.clip(np.nan_to_num(ratio[:, low:]).max(1), 0, 1))


def level(wave: Array, sample_rate: int) -> Array:
    """Level (T,) in dBFS of a waveform (N,) every 5 ms, not below that of `QUIET`; frames as `periodicity`.

    20 log10 of the root of the mean square under a Hann window of 25 ms.
    """
    frames, window = _frames(wave, sample_rate, LEVEL_MS)
    power = np.concatenate([np.square(block) @ window for block in _blocks(frames)]) / window.sum()
    return 10 * np.log10(np.maximum(power, QUIET**2))


def rmse(one: Array, other: Array) -> float:
    """Root mean square difference of two curves (T,) on one grid: of periodicity, or of level in dB."""
    if not len(one):
        return Undefined("there are no frames")
    return float(np.sqrt(np.square(np.asarray(one, np.float64) - other).mean()))


def correlation(one: Array, other: Array) -> float:
    """Pearson correlation of two curves (T,) on one grid; NaN where one is constant."""
    if len(one) < 2:
        return Undefined("there are fewer than two frames")
    return _pearson(one, other, "a curve")


def speaker_similarity(one: Array, other: Array) -> float:
    """Cosine of the angle between two speaker embeddings (D,); NaN where one is zero, as that of silence is."""
    size = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.dot(one, other)) / size if size else Undefined("there is no voice to embed")


def frechet_distance(one: Array, other: Array) -> float:
    """Fréchet distance of two sets of embeddings (N, D), (M, D), each taken for a normal distribution.

    | m - m' |^2 + tr(C + C' - 2 (C C')^(1/2)) (Dowson and Landau, 1982; Heusel et al., 2017, equation 6; on audio
    Kilgour et al., 2019). Its bias is large where there are fewer embeddings than a few times D.
    """
    if min(len(one), len(other)) < 2:
        return Undefined("there are fewer than two embeddings")
    first, second = (np.asarray(x, np.float64) for x in (one, other))
    c, d = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (first, second))
    values, vectors = np.linalg.eigh(c)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T  # C^(1/2); (C C')^(1/2) has the trace of
    inner = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ d @ root), 0)).sum()  # (C^(1/2) C' C^(1/2))^(1/2)
    shift = np.square(first.mean(0) - second.mean(0)).sum()
    return float(max(0.0, shift + np.trace(c) + np.trace(d) - 2 * inner))


def si_sdr(reference: Array, converted: Array) -> float:
    """Scale-invariant signal-to-distortion ratio in dB of waveforms (N,), the longer one cut; at most `MOST_DB`.

    10 log10(| a s |^2 / | a s - s' |^2), a = s' s / | s |^2 (Le Roux, Wisdom, Erdogan and Hershey, "SDR – half-baked or
    well done?", 2019, equation 4; the mean is left in). It asks for sample-true timing: of conversions it says nothing.
    """
    if why := silent(reference, converted):
        return Undefined(why)
    s, made = (x.astype(np.float64) for x in _cut(reference, converted))
    power = float(s @ s)
    if not power:
        return Undefined("the reference is silent as far as the other lasts")
    target = made @ s / power * s
    distortion = float(np.square(target - made).sum())
    signal = float(target @ target)
    least = signal * 10 ** (-MOST_DB / 10)
    return 10 * math.log10(signal / max(distortion, least)) if signal else -MOST_DB


def stoi(reference: Array, converted: Array, sample_rate: int) -> float:
    """Short-time objective intelligibility, up to 1, of waveforms (N,), the longer one cut; NaN below 0.4 s of sound.

    Taal, Hendriks, Heusdens and Jensen (2011), by pystoi; at 10 kHz, of frames within 40 dB of the loudest.

    Raises:
        ImportError: without the package pystoi, naming the extra.
    """
    import warnings

    try:
        import pystoi
    except ImportError:
        raise ImportError("STOI needs the package pystoi: pip install 'featstore[evaluate]'") from None
    if why := silent(reference, converted):
        return Undefined(why)
    one, other = _cut(reference, converted)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = float(pystoi.stoi(one, other, sample_rate)) if len(one) else math.nan
    if told or not len(one):  # it gives 0.00001 then
        return Undefined("fewer than 30 frames of 25.6 ms have sound")
    return found


def multi_resolution_stft(reference: Array, converted: Array) -> float:
    """Spectral convergence plus mean log-magnitude difference, averaged over three resolutions; NaN for silence.

    || |S| - |S'| ||_F / || |S| ||_F + mean | log |S| - log |S'| | (Yamamoto, Song and Kim, 2020, equations 4 to 6), of
    waveforms (N,), the longer one cut.
    """
    if why := silent(reference, converted):
        return Undefined(why)
    one, other = _cut(reference, converted)
    return float(np.mean([_spectral_distance(one, other, *sizes) for sizes in RESOLUTIONS]))


def pesq(reference: Array, converted: Array, sample_rate: int) -> float:
    """Wide-band PESQ (ITU-T P.862.2), 1 to 4.64, of waveforms (N,) brought to 16 kHz; NaN where one has no speech.

    It was made for telephone speech: of singing it ranks, but its absolute value says little.

    Raises:
        ImportError: without the package pesq, naming the extra.
    """
    try:
        import pesq as package
    except ImportError:
        raise ImportError("PESQ needs the package pesq: pip install 'featstore[evaluate]'") from None
    import soxr

    if why := silent(reference, converted):
        return Undefined(why)
    one, other = (np.asarray(soxr.resample(np.asarray(wave, np.float32), sample_rate, 16000))
                  for wave in _cut(reference, converted))
    try:
        return float(package.pesq(16000, one, other, "wb"))
    except package.NoUtterancesError:
        return Undefined("PESQ finds no speech")
    except package.BufferTooShortError:
        return Undefined("shorter than a quarter of a second")


def silent(reference: Array, converted: Array) -> str:
    """Which of two waveforms never exceeds `QUIET`, in words; "" where neither is silent."""
    quiet = [name for name, wave in (("the reference", reference), ("the converted recording", converted))
             if not len(wave) or float(np.abs(wave).max()) < QUIET]
    return "both are silent" if len(quiet) == 2 else f"{quiet[0]} is silent" if quiet else ""


def _spectral_distance(one: Array, other: Array, n_fft: int, hop: int, width: int) -> float:
    apart = power = logs = count = 0.0
    for blocks in zip(*(_magnitudes(wave, n_fft, hop, width) for wave in (one, other)), strict=True):
        first, second = (np.maximum(block, 1e-7) for block in blocks)
        apart += np.square(first - second).sum()
        power += np.square(first).sum()
        logs += np.abs(np.log(first) - np.log(second)).sum()
        count += first.size
    return float(np.sqrt(apart / power) + logs / count)


def _magnitudes(wave: Array, n_fft: int, hop: int, width: int) -> Iterator[Array]:
    """(T, n_fft // 2 + 1), block by block: frames centred every `hop` samples, a periodic Hann window of `width`."""
    left = (n_fft - width) // 2
    window = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width), (left, n_fft - width - left))
    padded = np.pad(np.asarray(wave, np.float64), n_fft // 2)
    for frames in _blocks(np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]):
        yield np.abs(np.fft.rfft(frames * window))


def _blocks(frames: Array) -> Iterator[Array]:
    """`BLOCK` frames at a time: what is made of them is many times as large, and of a song would fill the memory."""
    return (frames[start:start + BLOCK] for start in range(0, len(frames), BLOCK))


@lru_cache(maxsize=16)
def _warp(count: int, order: int, alpha: float) -> Array:
    """(count, order + 1): a cepstrum of `count` coefficients times this is the warped one.

    Row n holds the cepstrum of the n-th power of the all-pass filter; from one row to the next by its recursion.
    """
    rows = np.zeros((count, order + 1))
    rows[0, 0] = 1.0
    for n in range(1, count):
        before, row = rows[n - 1], rows[n]
        row[0] = alpha * before[0]
        if order:
            row[1] = (1 - alpha**2) * before[0] + alpha * before[1]
        for m in range(2, order + 1):
            row[m] = before[m - 1] + alpha * (before[m] - row[m - 1])
    return rows


def _both_voiced(reference: Array, converted: Array) -> Array:
    if np.shape(reference) != np.shape(converted):
        raise ValueError(f"f0 of {np.shape(reference)} and {np.shape(converted)}: expected two on one grid; bring them "
                         "onto one with a view, or pair frames by dtw.path")
    both: Array = (np.asarray(reference) > 0) & (np.asarray(converted) > 0)
    return both


def _voiced_cents(reference: Array, converted: Array) -> tuple[Array, Array]:
    both = _both_voiced(reference, converted)
    one, other = (1200 * np.log2(np.asarray(f0, np.float64)[both] / 440) for f0 in (reference, converted))
    return one, other


def _pearson(one: Array, other: Array, what: str) -> float:
    x, y = (np.asarray(values, np.float64) for values in (one, other))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Undefined(f"{what} is constant")
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1, 1))  # equal curves give 1 to the last bit


def _cut(one: Array, other: Array) -> tuple[Array, Array]:
    count = min(len(one), len(other))
    return np.asarray(one)[:count], np.asarray(other)[:count]


def _frames(wave: Array, sample_rate: int, window_ms: float) -> tuple[Array, Array]:
    """(T, width) centred on every 5 ms of (N,), T = floor(N / 5 ms) + 1, silence around it; and a Hann window."""
    width = round(sample_rate * window_ms / 1000)
    padded = np.pad(np.asarray(wave, np.float64), (width // 2, width))
    starts = np.round(np.arange(int(len(wave) / sample_rate * 1000 / FRAME_MS) + 1) * sample_rate * FRAME_MS / 1000)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(width) + 0.5) / width)
    return np.lib.stride_tricks.sliding_window_view(padded, width)[starts.astype(np.int64)], window


def _autocorrelation(x: Array) -> Array:
    """Of rows (R, N), for lags from 0."""
    size = 2 << (x.shape[1] - 1).bit_length()
    spectrum = np.fft.rfft(x, size)
    return np.fft.irfft(spectrum.real**2 + spectrum.imag**2, size)
