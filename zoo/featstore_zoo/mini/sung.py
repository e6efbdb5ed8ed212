"""Spoken into sung: WORLD resynthesis along a melody, with stretched vowels and another vocal tract."""

from __future__ import annotations

from typing import Any

import numpy as np

from .phones import NUMBER, SILENCE, VOWEL_NUMBERS
from .voices import SAMPLE_RATE, Speech

Array = np.ndarray
FRAME_MS = 5.0
HOP = int(SAMPLE_RATE * FRAME_MS / 1000)
SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9))  # major, minor, pentatonic
LOWEST, HIGHEST = 43, 76  # MIDI notes that a song's middle lies between: G2 to E5


def sing(speech: Speech, rng: np.random.Generator) -> tuple[Speech, Array]:
    """The same words as a song, and its f0 in Hz per 5 ms (0 where unvoiced)."""
    import pyworld

    wave = speech.wave.astype(np.float64)
    f0, times = pyworld.dio(wave, SAMPLE_RATE, frame_period=FRAME_MS)
    f0 = pyworld.stonemask(wave, f0, times, SAMPLE_RATE)
    envelope = pyworld.cheaptrick(wave, f0, times, SAMPLE_RATE)
    noise = pyworld.d4c(wave, f0, times, SAMPLE_RATE)
    source, phones, ends = _stretched(speech, len(f0), rng)
    melody = _melody(phones, ends, len(source), rng)
    melody[f0[source] == 0] = 0.0
    tract = float(rng.uniform(0.84, 1.19))
    sung = pyworld.synthesize(melody, np.ascontiguousarray(_warped(envelope, tract)[source]),
                              np.ascontiguousarray(_warped(noise, tract)[source]), SAMPLE_RATE, FRAME_MS)
    peak = max(float(np.abs(sung).max()), 1e-4)
    until = np.minimum(ends * HOP, len(sung))
    until[-1] = len(sung)
    return Speech((sung * (0.5 / peak)).astype(np.float32), phones, until), melody


def _stretched(speech: Speech, frames: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Which of the frames each new one is, and where the phones end among the new ones: vowels are held."""
    ends = np.minimum(np.round(speech.ends / HOP).astype(int), frames)
    ends[-1] = frames
    pace = float(rng.uniform(1.0, 2.2))
    source, until, begin = [], [], 0
    for phone, end in zip(speech.phones, ends, strict=True):
        vowel, silent = int(phone) in VOWEL_NUMBERS, phone == NUMBER[SILENCE]
        factor = pace * rng.uniform(0.8, 2.0) if vowel else rng.uniform(0.4, 1.0) if silent else rng.uniform(1.0, 1.4)
        count = max(1, round((end - begin) * factor)) if end > begin else 0
        source += [min(begin + int(i * (end - begin) / count), frames - 1) for i in range(count)]
        until.append(len(source))
        begin = end
    return np.array(source, int), speech.phones, np.array(until)


def _melody(phones: Array, ends: Array, frames: int, rng: np.random.Generator) -> Array:
    """f0 in Hz per frame: a walk on a scale with a note for each vowel, glides, vibrato and drift."""
    scale, tonic = SCALES[rng.integers(len(SCALES))], int(rng.integers(LOWEST, HIGHEST + 1))
    notes = np.zeros(frames)
    degree, begin, note = int(rng.integers(-3, 4)), 0, float(tonic)
    for phone, end in zip(phones, ends, strict=True):
        if int(phone) in VOWEL_NUMBERS:
            degree = int(np.clip(degree + rng.integers(-2, 3), -5, 5))
            octave, step = divmod(degree, len(scale))
            note = tonic + 12 * octave + scale[step]
        notes[begin:end] = note
        begin = end
    kernel = np.hanning(14)[1:-1]
    glided = np.convolve(np.pad(notes, 6, mode="edge"), kernel / kernel.sum(), mode="same")[6:-6]
    seconds = np.arange(frames) * FRAME_MS / 1000
    vibrato = rng.uniform(0.0, 0.6) * np.sin(2 * np.pi * rng.uniform(4.8, 6.6) * seconds + rng.uniform(0, 6.28))
    drift = 0.15 * np.sin(2 * np.pi * rng.uniform(0.2, 0.8) * seconds)
    return np.asarray(440.0 * 2.0 ** ((glided + vibrato + drift - 69) / 12))


def _warped(frames: Array, factor: float) -> Any:
    """(T, bins) with the frequency axis stretched by `factor`: above 1 is a shorter vocal tract."""
    bins = np.arange(frames.shape[1]) / factor
    low = np.minimum(bins.astype(int), frames.shape[1] - 2)
    part = np.clip(bins - low, 0.0, 1.0)
    return frames[:, low] * (1 - part) + frames[:, low + 1] * part
