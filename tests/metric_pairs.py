"""Pairs of recordings that metrics are held to, and their f0."""

from __future__ import annotations

from pathlib import Path

import numpy as np

CORPUS = Path(__file__).resolve().parents[1] / "examples" / "corpus"
RATE = 16000
PAIRS = {  # name: two recordings, seconds of each, noise that is added to the second
    "two speakers": ("vctk_p225/p225_003", "vctk_p226/p226_003", (1.0, 3.0), (1.0, 3.3), 0.0),
    "noise": ("vctk_p225/p225_003", "vctk_p225/p225_003", (1.0, 3.0), (1.0, 3.0), 0.02),
    "two singers": ("berklee_female/aa_A4", "berklee_male/aa_A3", (0.2, 1.7), (0.2, 1.5), 0.0),
}


def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Two waveforms (N,), (M,) at `RATE`."""
    first, second, one, other, noise = PAIRS[name]
    reference, converted = _read(first, *one), _read(second, *other)
    return reference, converted + noise * np.random.default_rng(0).standard_normal(len(converted)).astype(np.float32)


def f0(wave: np.ndarray) -> np.ndarray:
    """f0 (T,) in Hz every 5 ms by DIO: a curve like any other to a metric."""
    from featstore_zoo import metrics

    x = np.asarray(wave, np.float64)
    found, times = metrics.world().dio(x, RATE)
    return np.asarray(metrics.world().stonemask(x, found, times, RATE))


def _read(name: str, begin_s: float, end_s: float) -> np.ndarray:
    import soundfile as sf
    import soxr

    wave, rate = sf.read(CORPUS / f"{name}.flac", dtype="float32")
    return np.asarray(soxr.resample(wave, rate, RATE))[round(begin_s * RATE):round(end_s * RATE)]
