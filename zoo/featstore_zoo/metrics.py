"""How far a synthesised voice is from its reference: each metric a pure function of waveforms or f0, with its equation.

Both signals have one sample rate. Silence, or nothing that is voiced in both, gives NaN: never a perfect score.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from featstore_extractors.signal import MelContract

Array = np.ndarray
Alignment = Literal["none", "dtw"]

FRAME_MS = 5.0
CEPSTRA = 24       # mel-cepstral coefficients c1 .. c24, as in most of the literature since Kubichek (1993)
QUIET = 1e-4       # full scale is 1: what never exceeds -80 dB is silence, of which no distance means anything
RESOLUTIONS = ((512, 50, 240), (1024, 120, 600), (2048, 240, 1200))  # n_fft, hop, window (Yamamoto, 2020, table 1)


def mel_cepstral_distortion(reference: Array, converted: Array, sample_rate: int, *,
                            align: Alignment = "dtw") -> float:
    """Mel-cepstral distortion in dB of two waveforms (N,), (M,); 0 for equal ones, NaN where one is silent.

    (10 / ln 10) sqrt(2 sum over d of (c_d - c'_d)^2), d from 1 to `CEPSTRA`, averaged over frames of 5 ms (Kubichek,
    1993, equation 1); c0, the level, is left out. Mel-cepstra are those of WORLD's spectral envelope (`mel_cepstra`).

    align: "dtw" pairs frames on the cheapest warping path; "none" pairs frames of equal time, up to the shorter end.
    """
    if _silent(reference) or _silent(converted):
        return math.nan
    one, other = (mel_cepstra(wave, sample_rate)[:, 1:] for wave in (reference, converted))
    if align == "dtw":
        pairs = dtw_path(one, other)
        one, other = one[pairs[:, 0]], other[pairs[:, 1]]
    count = min(len(one), len(other))
    distance = np.sqrt(2 * np.square(one[:count] - other[:count]).sum(1))
    return float(10 / math.log(10) * distance.mean())


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

    The cepstrum of the logarithm of WORLD's spectral envelope (CheapTrick; Morise, 2015), its frequency axis warped by
    an all-pass filter of `warping(sample_rate)` (Oppenheim and Johnson, 1972).
    """
    pyworld = world()
    x = np.ascontiguousarray(wave, np.float64)
    f0, times = pyworld.dio(x, sample_rate, frame_period=FRAME_MS)
    envelope = pyworld.cheaptrick(x, pyworld.stonemask(x, f0, times, sample_rate), times, sample_rate)  # power, (T, K)
    cepstrum = np.fft.irfft(np.log(envelope) / 2, axis=1)[:, :envelope.shape[1]]
    cepstrum[:, 1:-1] *= 2  # of a real, even spectrum: both sides together
    return cepstrum @ _warp(envelope.shape[1], order, warping(sample_rate))


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
    if len(one) < 2 or not one.std() or not other.std():
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])


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
        return math.nan
    if remove_median:
        one, other = one - np.median(one), other - np.median(other)
    return float(np.sqrt(np.square(one - other).mean()))


def voicing_error(reference: Array, converted: Array) -> float:
    """Share of frames of f0 (T,) that are voiced in one and not in the other; NaN where there are no frames."""
    return float(((reference > 0) != (converted > 0)).mean()) if len(reference) else math.nan


def multi_resolution_stft(reference: Array, converted: Array) -> float:
    """Spectral convergence plus mean log-magnitude difference, averaged over three resolutions; NaN for silence.

    || |S| - |S'| ||_F / || |S| ||_F + mean | log |S| - log |S'| | (Yamamoto, Song and Kim, 2020, equations 4 to 6), of
    waveforms (N,), the longer one cut.
    """
    if _silent(reference) or _silent(converted):
        return math.nan
    count = min(len(reference), len(converted))
    return float(np.mean([_spectral_distance(reference[:count], converted[:count], *sizes) for sizes in RESOLUTIONS]))


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

    if _silent(reference) or _silent(converted):
        return math.nan
    one, other = (np.asarray(soxr.resample(np.asarray(wave, np.float32), sample_rate, 16000))
                  for wave in (reference, converted))
    count = min(len(one), len(other))
    try:
        return float(package.pesq(16000, one[:count], other[:count], "wb"))
    except package.NoUtterancesError:
        return math.nan
    except package.BufferTooShortError:  # shorter than a quarter of a second
        return math.nan


def dtw_path(one: Array, other: Array) -> Array:
    """Pairs (P, 2) of frames of (T, D) and (U, D) on the path of least summed Euclidean distance, in order of time."""
    from librosa.sequence import dtw

    _, path = dtw(one.T, other.T, metric="euclidean")
    return np.asarray(path)[::-1]


def _spectral_distance(one: Array, other: Array, n_fft: int, hop: int, width: int) -> float:
    first, second = (np.maximum(_magnitudes(wave, n_fft, hop, width), 1e-7) for wave in (one, other))
    convergence = np.linalg.norm(first - second) / np.linalg.norm(first)
    return float(convergence + np.abs(np.log(first) - np.log(second)).mean())


def _magnitudes(wave: Array, n_fft: int, hop: int, width: int) -> Array:
    """(T, n_fft // 2 + 1): frames centred every `hop` samples, a periodic Hann window of `width`."""
    left = (n_fft - width) // 2
    window = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width), (left, n_fft - width - left))
    padded = np.pad(np.asarray(wave, np.float64), n_fft // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    return np.abs(np.fft.rfft(frames * window))


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
                         "onto one with a view, or pair frames by dtw_path")
    both: Array = (np.asarray(reference) > 0) & (np.asarray(converted) > 0)
    return both


def _voiced_cents(reference: Array, converted: Array) -> tuple[Array, Array]:
    both = _both_voiced(reference, converted)
    one, other = (1200 * np.log2(np.asarray(f0, np.float64)[both] / 440) for f0 in (reference, converted))
    return one, other


def _silent(wave: Array) -> bool:
    return not len(wave) or float(np.abs(wave).max()) < QUIET
