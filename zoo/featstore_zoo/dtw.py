"""Dynamic time warping of two sequences of frames, in memory that does not grow with their square.

Sequences up to `EXACT` cells (about 40 s of frames of 5 ms) are warped exactly. Longer ones are first warped at half
their rate, and then within `RADIUS` frames of that path (Salvador and Chan, "Toward accurate dynamic time warping in
linear time and space", 2007). Compiled by numba, which librosa brings.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from featstore_align.code_cache import guard

Array = np.ndarray

EXACT = 1 << 26  # cells of one byte each: 64 MiB
RADIUS = 200     # a second of 5 ms either side of the coarser path


def path(one: Array, other: Array, radius: int | None = None) -> Array:
    """Pairs (P, 2) of frames of (T, D) and (U, D) on the path of least summed Euclidean distance, in order of time.

    Of equally cheap paths the shortest is taken, so that the mean distance along it does not depend on which sequence
    is named first. Sequences (T,) are such of one channel.

    radius: search within so many frames of a coarser path, from the coarsest one on (FastDTW); None: exactly as far as
        memory allows.

    Raises:
        ValueError: one has no frames, or they have not the same channels.
    """
    first, second = (np.ascontiguousarray(x, np.float64).reshape(len(x), -1) for x in (one, other))
    if not len(first) or not len(second) or first.shape[1] != second.shape[1]:
        raise ValueError(f"frames {np.shape(one)} and {np.shape(other)}: expected some of each, with equal channels")
    return _path(first, second, radius)


def _path(one: Array, other: Array, radius: int | None) -> Array:
    if radius is None:
        small, reach = len(one) * len(other) <= EXACT, RADIUS
    else:
        small, reach = min(len(one), len(other)) < radius + 2, radius
    if small:
        low, high = np.zeros(len(one), np.int64), np.full(len(one), len(other))
    else:
        low, high = _around(_path(_halved(one), _halved(other), radius), len(one), len(other), reach)
    pairs: Array = _kernel()(one, other, low, high)
    return pairs


def _halved(x: Array) -> Array:
    """Means of two frames each; a last one that has no other is left out."""
    return (x[0:len(x) // 2 * 2:2] + x[1::2]) / 2


def _around(coarse: Array, rows: int, columns: int, radius: int) -> tuple[Array, Array]:
    """First and last + 1 column of each row of (rows, columns) within `radius` of a path at half the rate."""
    count = int(coarse[-1, 0]) + 1
    first = coarse[np.searchsorted(coarse[:, 0], np.arange(count)), 1]
    last = coarse[np.searchsorted(coarse[:, 0], np.arange(count), "right") - 1, 1]
    row = np.arange(rows) // 2
    low = 2 * (first[np.clip(row - radius, 0, count - 1)] - radius)
    high = 2 * (last[np.clip(row + radius, 0, count - 1)] + radius) + 2
    return np.maximum(low, 0), np.minimum(high, columns)


@cache
def _kernel() -> Any:
    try:
        import numba
    except ImportError:
        raise ImportError("time warping needs numba: pip install 'featstore[evaluate]'") from None
    guard()
    try:
        return numba.njit(_warped, nogil=True, cache=True)
    except RuntimeError:  # nowhere to keep the code: it is compiled anew in every process
        return numba.njit(_warped, nogil=True)


def _warped(one: Array, other: Array, low: Array, high: Array) -> Array:
    """The cheapest path through the columns low[i] to high[i] - 1 of each row i; of equally cheap ones the shortest.

    `step` is how the path came to a cell: 0 from the frame before in both, 1 in the first only, 2 in the second only.
    """
    rows, columns = len(one), len(other)
    begin = np.zeros(rows + 1, np.int64)
    for i in range(rows):
        begin[i + 1] = begin[i] + high[i] - low[i]
    step = np.empty(begin[rows], np.uint8)
    cost, before = np.full(columns, np.inf), np.full(columns, np.inf)
    length, length_before = np.zeros(columns, np.int64), np.zeros(columns, np.int64)
    for i in range(rows):
        for j in range(low[i], high[i]):
            distance = 0.0
            for d in range(one.shape[1]):
                distance += (one[i, d] - other[j, d]) ** 2
            least, steps, came = np.inf, 0, 0
            if i == 0 and j == 0:
                least = 0.0
            if i > 0 and low[i - 1] <= j - 1 < high[i - 1]:
                least, steps, came = before[j - 1], length_before[j - 1], 0
            if i > 0 and low[i - 1] <= j < high[i - 1] and (
                    before[j] < least or (before[j] == least and length_before[j] < steps)):
                least, steps, came = before[j], length_before[j], 1
            if j > low[i] and (cost[j - 1] < least or (cost[j - 1] == least and length[j - 1] < steps)):
                least, steps, came = cost[j - 1], length[j - 1], 2
            cost[j], length[j] = least + np.sqrt(distance), steps + 1
            step[begin[i] + j - low[i]] = came
        cost, before = before, cost
        length, length_before = length_before, length
    count = length_before[columns - 1]
    pairs = np.empty((count, 2), np.int64)
    i, j = rows - 1, columns - 1
    for k in range(count - 1, -1, -1):
        pairs[k, 0], pairs[k, 1] = i, j
        came = step[begin[i] + j - low[i]]
        if came != 2:
            i -= 1
        if came != 1:
            j -= 1
    return pairs
