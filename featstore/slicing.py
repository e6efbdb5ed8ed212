"""Where to cut a long recording into rows: at its silences, and where it has none, at its quietest places."""

from __future__ import annotations

import math
import os

import numpy as np

from .audio import QUIET, Reader
from .errors import BadAudio

SHORTEST_S = 3.0  # of a row, unless the recording itself is shorter
LEAST_S = 7.0  # that may be asked for as the longest: twice the shortest, and a second to choose a quiet place in
LEVELS = 100  # frames per second in which the level is measured: 10 ms
NODES = 10  # frames of which one, the quietest, is a place to cut: 100 ms
SILENT_DB = -35.0  # to the recording's mean power: some 30 dB below soft singing, above the noise of most rooms
LONG = 50  # frames; of a longer silence all but the margins may be left out
MARGIN = 10  # frames on either side of a silence that stay with the sound: soft onsets and releases
ROW_COST = 0.05  # rows are no shorter than they need be; small beside a cut in sound (1 at the mean level)


def rows(path: str | os.PathLike[str], start_s: float, end_s: float | None,
         longest_s: float) -> list[tuple[float, float]]:
    """Start and end, in seconds of the recording, of rows of 3 s to `longest_s`, in order and disjoint.

    They cover the cut [start_s, end_s) but for silences longer than 0.5 s. A recording shorter than 3 s is one row. The
    same file gives the same rows. Memory is bounded: 2.9 MB for an hour.

    Raises:
        BadAudio: if the recording cannot be read, or is silent throughout.
    """
    power, length_s = _powers(path, start_s, end_s)
    if power.max() < QUIET**2:
        raise BadAudio("silent throughout: there is nothing to slice")
    if length_s < SHORTEST_S:
        found = [(0.0, length_s)]
    else:
        found = _rows(power, length_s, longest_s)
    return [(round(start_s + a, 9), round(start_s + b, 9)) for a, b in found]


def _powers(path: str | os.PathLike[str], start_s: float, end_s: float | None) -> tuple[np.ndarray, float]:
    """Mean square of every 10 ms `(T,)`, the last of them whole but in a very short recording, and the length in s."""
    parts = []
    with Reader(path, start_s, end_s, block_s=20.0) as reader:  # 20 s are whole frames at any sample rate
        for block in reader:
            frames = max(1, len(block) * LEVELS // reader.sample_rate)
            edges = (np.arange(frames + 1) * reader.sample_rate + LEVELS // 2) // LEVELS
            square = np.square(block[: edges[-1]], dtype=np.float64)
            parts.append(np.add.reduceat(square, edges[:-1]) / np.diff(edges))
    return np.concatenate(parts), reader.samples / reader.sample_rate


def _rows(power: np.ndarray, length_s: float, longest_s: float) -> list[tuple[float, float]]:
    """The cheapest way to cut. A cut costs by how far the level around it exceeds the threshold of silence; what could
    be left out of a silence costs if it is kept; and every row costs a little."""
    threshold = 10 * math.log10(power.mean()) + SILENT_DB
    around = np.convolve(np.pad(power, 3, mode="edge"), np.full(6, 1 / 6), mode="valid")[: len(power)]  # k-3 .. k+2
    loud = np.maximum(_decibel(around) - threshold, 0) / -SILENT_DB
    end = length_s * LEVELS
    silences = _silences(_decibel(power) < threshold, end)
    quietest = {start + int(loud[start:start + NODES].argmin()) for start in range(NODES, len(loud) - NODES, NODES)}
    places = np.array([0.0, *sorted(place for place in quietest.union(*silences) if 0 < place < len(loud)), end])
    cost = np.append(loud[places[:-1].astype(int)], 0.0)
    return [(a / LEVELS, b / LEVELS) for a, b in _cheapest(places, cost, silences, longest_s * LEVELS)]


def _decibel(power: np.ndarray) -> np.ndarray:
    return 10 * np.log10(np.maximum(power, 1e-12))


def _silences(silent: np.ndarray, end: float) -> list[tuple[float, float]]:
    """What may be left out, in frames: the long runs of `silent`, less the margins where sound is beside them."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], silent, [False]]).astype(np.int8)))
    return [(float(a + MARGIN if a else 0), float(b - MARGIN) if b < len(silent) else end)
            for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > LONG]


def _cheapest(places: np.ndarray, cost: np.ndarray, silences: list[tuple[float, float]],
              longest: float) -> list[tuple[float, float]]:
    """The shortest path from the first of `places` to the last, over rows and over leaps inside one silence.

    From every place 3 s to `longest` back a row may lead here: there always is one, since places lie at most 0.2 s
    apart and `longest` leaves a second of choice.
    """
    kept = np.zeros(len(places))  # seconds before each place that could have been left out
    silence = np.full(len(places), -1)
    for number, (a, b) in enumerate(silences):
        kept += np.clip(places - a, 0, b - a) / LEVELS
        silence[(places >= a) & (places <= b)] = number
    first = np.searchsorted(places, places - longest)
    beyond = np.searchsorted(places, places - SHORTEST_S * LEVELS, side="right")
    best = np.full(len(places), np.inf)
    best[0] = 0.0
    before, is_row = np.zeros(len(places), int), np.zeros(len(places), bool)
    entered = {int(silence[0]): 0}  # silence: the cheapest place in it so far
    for here in range(1, len(places)):
        if first[here] < beyond[here]:
            costs = best[first[here]:beyond[here]] - kept[first[here]:beyond[here]]
            there = int(first[here] + costs.argmin())
            best[here] = costs[there - first[here]] + kept[here] + cost[here] + ROW_COST
            before[here], is_row[here] = there, True
        inside = int(silence[here])
        if inside >= 0:
            there = entered.setdefault(inside, here)
            if best[there] < best[here]:
                best[here], before[here], is_row[here] = best[there], there, False
            else:
                entered[inside] = here
    found, here = [], len(places) - 1
    while here > 0:
        if is_row[here]:
            found.append((float(places[before[here]]), float(places[here])))
        here = int(before[here])
    return found[::-1]
