"""Metrics as Amphion's evaluation computes them (commit d3de90f), to compare with numbers that were published by it.

They are kept as they are, defects included, which `metrics` does not share:

* mel-cepstra are of WORLD's power where amplitude is meant, so distances are twice as large; 1e-8 is added to its
  square, which drowns quiet frames; their all-pass constant is 0.65 at any sample rate.
* the distance along the path, which is found without c0, has c0 in it, and is multiplied by the ratio of lengths.
* f0 is warped onto f0, each without its own unvoiced frames: what was sung at another time is compared as one.
* fewer than two voiced frames are a perfect score.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from . import dtw, metrics

Array = np.ndarray
Align = Literal["dtw", "cut"]

SAMPLE_RATE = 22050  # Hz, where no other is asked for
ORDER, ALPHA, N_FFT, FLOOR = 13, 0.65, 512, 1e-8
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))  # n_fft, hop, window: rectangular


def mel_cepstral_distortion(reference: Array, converted: Array, sample_rate: int) -> float:
    """Its `mcd`, dB, of waveforms (N,), (M,): pymcd's "dtw_sl" at `SAMPLE_RATE`."""
    one, other = (_mel_cepstra(_resampled(wave, sample_rate)) for wave in (reference, converted))
    ratio = max(len(one), len(other)) / min(len(one), len(other))
    first, second = metrics.along(dtw.path(one[:, 1:], other[:, 1:], radius=1), one, other)
    return ratio * metrics.cepstral_distortion(first, second)


def f0_rmse(reference: Array, converted: Array, *, subtract: bool = True, align: Align = "dtw") -> float:
    """Its `f0rmse` of f0 (T,), (U,) in Hz: cents without each one's median, or, not subtracted, Hz with zeros."""
    one, other = _melodies(reference, converted, subtract)
    if min(len(one), len(other)) < 2:
        return 0.0
    one, other = _aligned(one, other, align)
    return float(np.sqrt(np.square(one - other).mean()))


def f0_correlation(reference: Array, converted: Array, *, subtract: bool = True, align: Align = "dtw") -> float:
    """Its `fpc` of f0 (T,), (U,) in Hz: Pearson correlation of what `f0_rmse` compares."""
    one, other = _melodies(reference, converted, subtract)
    if min(len(one), len(other)) < 2:
        return 1.0
    return metrics.correlation(*_aligned(one, other, align))


def voicing_f1(reference: Array, converted: Array, *, align: Align = "dtw") -> float:
    """Its `v_uv_f1` of f0 (T,), (U,) in Hz, warped onto each other."""
    return metrics.voicing_f1(*_aligned(np.asarray(reference, np.float64), np.asarray(converted, np.float64), align))


def energy_rmse(reference: Array, converted: Array, sample_rate: int) -> float:
    """Its `energy_rmse`, dB, of waveforms (N,), (M,)."""
    one, other = _energies(reference, converted, sample_rate)
    return float(np.sqrt(np.square(one - other).mean()))


def energy_correlation(reference: Array, converted: Array, sample_rate: int) -> float:
    """Its `energy_pc` of waveforms (N,), (M,)."""
    return metrics.correlation(*_energies(reference, converted, sample_rate))


def multi_resolution_stft(reference: Array, converted: Array, sample_rate: int) -> float:
    """Its `mstft` of waveforms (N,), the longer one cut: means over resolutions, rectangular windows."""
    one, other = (_resampled(wave, sample_rate) for wave in (reference, converted))
    count = min(len(one), len(other))
    found = []
    for n_fft, hop, width in RESOLUTIONS:
        first, second = (_magnitudes(wave[:count], n_fft, hop, width) for wave in (one, other))
        convergence = np.linalg.norm(first - second) / np.linalg.norm(first)
        found.append(convergence + np.abs(np.log(first) - np.log(second)).mean())
    return float(np.mean(found))


def _mel_cepstra(wave: Array) -> Array:
    """(T, ORDER + 1) every 5 ms at `SAMPLE_RATE`."""
    pyworld = metrics.world()
    x = np.ascontiguousarray(wave, np.float64)
    f0, times = pyworld.dio(x, SAMPLE_RATE, frame_period=metrics.FRAME_MS)
    f0 = pyworld.stonemask(x, f0, times, SAMPLE_RATE)
    power = pyworld.cheaptrick(x, f0, times, SAMPLE_RATE, fft_size=N_FFT)
    cepstrum = np.fft.irfft(np.log(power**2 + FLOOR), axis=1)[:, :power.shape[1]]
    cepstrum[:, 0] /= 2
    return metrics.warped(cepstrum, ORDER, ALPHA)


def _melodies(reference: Array, converted: Array, subtract: bool) -> tuple[Array, Array]:
    one, other = (np.asarray(f0, np.float64) for f0 in (reference, converted))
    if not subtract:
        return one, other
    first, second = (1200 * np.log2(f0[f0 > 0] / 440) for f0 in (one, other))
    return tuple(x - np.median(x) if len(x) else x for x in (first, second))  # type: ignore[return-value]


def _energies(reference: Array, converted: Array, sample_rate: int) -> tuple[Array, Array]:
    """Frame levels in dB, warped onto each other; silence is minus infinity there, and what becomes of it NaN."""
    found = []
    for wave in (reference, converted):
        padded = np.pad(np.asarray(_resampled(wave, sample_rate), np.float64), 512)
        frames = np.lib.stride_tricks.sliding_window_view(padded, 1024)[::256]
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
        with np.errstate(divide="ignore"):
            found.append(20 * np.log10(np.linalg.norm(np.abs(np.fft.rfft(frames * hann)), axis=1)))
    return _aligned(found[0], found[1], "dtw")


def _aligned(one: Array, other: Array, align: Align) -> tuple[Array, Array]:
    if align == "dtw":
        return metrics.along(dtw.path(one, other), one, other)
    count = min(len(one), len(other))
    return one[:count], other[:count]


def _magnitudes(wave: Array, n_fft: int, hop: int, width: int) -> Array:
    left = (n_fft - width) // 2
    window = np.pad(np.ones(width), (left, n_fft - width - left))
    padded = np.pad(np.asarray(wave, np.float64), n_fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    spectrum = np.fft.rfft(frames * window)
    return np.sqrt(np.maximum(spectrum.real**2 + spectrum.imag**2, 1e-7))


def _resampled(wave: Array, sample_rate: int) -> Array:
    import soxr

    if sample_rate == SAMPLE_RATE:
        return np.asarray(wave, np.float32)
    count = math.ceil(len(wave) * SAMPLE_RATE / sample_rate)
    made = np.asarray(soxr.resample(np.asarray(wave, np.float32), sample_rate, SAMPLE_RATE))
    return np.pad(made, (0, max(0, count - len(made))))[:count]  # librosa rounds lengths up
