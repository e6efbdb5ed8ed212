"""BigVGAN's activation in one pass over memory, compiled by numba where it is installed (librosa brings it).

torch makes the doubled signal, pads it, cuts it and takes its sine in arrays of their own, each written and read again,
and its convolutions channel by channel use a fraction of the processor: four fifths of the network's time. Here a tile
of one channel goes through all of it within the cache.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray

TILE = 512  # samples made at a time: all that belongs to them stays in the first cache
_S1, _S3, _S5, _S7, _S9, _S11, _S13 = (np.float32((-1) ** (n // 2) * math.pi**n / math.factorial(n))
                                       for n in range(1, 15, 2))  # sine of pi r: 1e-9 at |r| = 1/2
_HALF, _TWO = np.float32(0.5), np.float32(2)


def activated(x: Tensor, alpha: Tensor, beta: Tensor, taps: Tensor) -> Tensor | None:
    """What `Activation` makes of x (B, D, T), to rounding: `low(up + sin^2(alpha up) / beta)`. None without numba.

    alpha, beta: (D,). taps: (12,), of the filter before and behind, which is symmetric.
    """
    if (run := _kernel()) is None:
        return None
    batch, channels, frames = x.shape
    rows = x.float().contiguous().view(-1, frames)
    made = torch.empty_like(rows)
    given = (rows.numpy(), (alpha.float() / math.pi).numpy(), beta.float().reciprocal().numpy(), taps.float().numpy(),
             made.numpy())
    count = min(torch.get_num_threads(), len(rows))
    cuts = [len(rows) * i // count for i in range(count + 1)]
    if count == 1:
        run(*given, 0, len(rows))
    else:
        with ThreadPoolExecutor(count) as threads:  # numba's own threads may not be used by two callers at once
            list(threads.map(lambda first, last: run(*given, first, last), cuts, cuts[1:]))
    return made.view(batch, channels, frames).to(x.dtype)


@cache
def _kernel() -> Any:
    try:
        import numba
    except ImportError:
        return None
    from featstore_align.code_cache import guard

    guard()
    plane, line = numba.float32[:, ::1], numba.float32[::1]
    signature = numba.void(plane, line, line, line, plane, numba.int64, numba.int64)
    how = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}  # NaN stays NaN
    try:
        return numba.njit(signature, cache=True, **how)(_rows)
    except RuntimeError:  # nowhere to keep the code: it is compiled anew in every process
        return numba.njit(signature, **how)(_rows)


def _rows(x: Array, alpha: Array, gain: Array, w: Array, out: Array, first: int, last: int) -> None:
    """Rows `first` to `last - 1` of x and out (B D, T). alpha: over pi. gain: 1 / beta.

    Doubling gives u[2 t] from x[t - 3 .. t + 2] and u[2 t + 1] from x[t - 2 .. t + 3]; halving gives out[t] from
    u[2 t - 5 .. 2 t + 6]. Even and odd samples of u stand in arrays of their own. Ends are held, of x and of u.
    """
    frames, channels = x.shape[1], len(alpha)
    w0, w1, w2, w3, w4, w5 = w[0], w[1], w[2], w[3], w[4], w[5]  # and back again
    near = np.empty(TILE + 12, np.float32)                                      # x from 6 before the tile
    even, odd = np.empty(TILE + 6, np.float32), np.empty(TILE + 6, np.float32)  # u from 3 pairs before it
    for row in range(first, last):
        a, g = alpha[row % channels], gain[row % channels]
        for start in range(0, frames, TILE):
            count = min(TILE, frames - start)
            for i in range(count + 12):
                near[i] = x[row, min(max(start - 6 + i, 0), frames - 1)]
            for i in range(count + 6):
                even[i] = _TWO * (near[i] * w0 + near[i + 1] * w2 + near[i + 2] * w4 + near[i + 3] * w5
                                  + near[i + 4] * w3 + near[i + 5] * w1)
                odd[i] = _TWO * (near[i + 1] * w1 + near[i + 2] * w3 + near[i + 3] * w5 + near[i + 4] * w4
                                 + near[i + 5] * w2 + near[i + 6] * w0)
            for half in (even, odd):
                for i in range(count + 6):
                    r = half[i] * a  # turns of sin^2, whose period is pi
                    r -= np.floor(r + _HALF)
                    q = r * r
                    s = r * (_S1 + q * (_S3 + q * (_S5 + q * (_S7 + q * (_S9 + q * (_S11 + q * _S13))))))
                    half[i] += s * s * g
            if start == 0:
                even[:3] = even[3]
                odd[:3] = even[3]
            for i in range(frames - start + 3, count + 6):
                even[i] = odd[i] = odd[frames - start + 2]
            for i in range(count):
                out[row, start + i] = (
                    even[i + 1] * w1 + even[i + 2] * w3 + even[i + 3] * w5 + even[i + 4] * w4 + even[i + 5] * w2
                    + even[i + 6] * w0 + odd[i] * w0 + odd[i + 1] * w2 + odd[i + 2] * w4 + odd[i + 3] * w5
                    + odd[i + 4] * w3 + odd[i + 5] * w1)
