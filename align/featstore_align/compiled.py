"""The weighted means of `retrans` as machine code, for batches: numba's, where it is installed.

numpy converts float16 one number at a time, which takes ten times as long as all the rest; here eight or sixteen are
converted on their way through the processor, and what is left is reading the source and writing the result. The sums
are those of `retrans`, in the same order, so that every bit is the same.

Importing this module takes a few tenths of a second, and compiling seconds, once: the code is kept beside this file or
in the user's cache.

Raises:
    ImportError: numba is missing, switched off, or does not know how this processor converts float16.
"""

from __future__ import annotations

import platform
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba.extending import intrinsic

from .code_cache import guard

if numba.config.DISABLE_JIT:
    raise ImportError("numba is switched off")
if platform.machine() in ("x86_64", "AMD64"):
    if not binding.get_host_cpu_features().get("f16c"):
        raise ImportError("this processor does not convert float16")
elif platform.machine() not in ("aarch64", "arm64"):
    raise ImportError(f"float16 on {platform.machine()} is unknown")


@intrinsic
def _widen(context: Any, stored: Any) -> Any:
    """A stored number as float32: the bits of a float16 (uint16), or a float32."""
    if stored == numba.types.float32:
        return stored(stored), lambda context, builder, signature, args: args[0]

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return numba.types.float32(stored), code


@intrinsic
def _narrow(context: Any, value: Any, like: Any) -> Any:
    """A float32 in the type of the stored number `like`, rounded to the nearest."""
    if like == numba.types.float32:
        return value(value, like), lambda context, builder, signature, args: args[0]

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return like(value, like), code


def _mix(x: np.ndarray, shift: np.ndarray, start: np.ndarray, stop: np.ndarray, source_length: np.ndarray,
         low: int, high: np.ndarray, m: int, width: int, left: int, taps: int, out: np.ndarray) -> None:
    """Write target frames `[start[c], stop[c])` of every crop c to the beginning of `out[c]`.

    x: (rows, D) float32, or the bits of float16; source frame i of crop c stands in row `i + shift[c]`.
    low, high: the first and the last target frame with an average of their own. taps: the most that a frame may have.
    """
    dim = x.shape[1]
    other, weight = np.empty(taps, np.int64), np.empty(taps, np.float32)
    for c in range(len(start)):
        for j in range(start[c], stop[c]):
            y = out[c, j - start[c]]
            frame = min(max(j, low), high[c])
            begin = max(0, left + frame * width)
            end = min(source_length[c] * m, left + (frame + 1) * width)
            first, last = begin // m, (end - 1) // m
            heaviest, most = first, np.int64(0)
            for i in range(first, last + 1):
                share = min(end, (i + 1) * m) - max(begin, i * m)
                if share > most:
                    heaviest, most = i, share
            b = x[heaviest + shift[c]]
            n = 0
            for i in range(first, last + 1):
                if i != heaviest:
                    other[n] = i + shift[c]
                    weight[n] = np.float32((min(end, (i + 1) * m) - max(begin, i * m)) / (end - begin))
                    n += 1
            if n == 0:
                for d in range(dim):
                    y[d] = b[d]
            elif n == 1:
                a, w = x[other[0]], weight[0]
                for d in range(dim):
                    y[d] = _narrow(_widen(b[d]) + (_widen(a[d]) - _widen(b[d])) * w, b[d])
            else:
                for d in range(dim):
                    wide = _widen(b[d])
                    total = (_widen(x[other[0], d]) - wide) * weight[0]
                    for k in range(1, n):
                        total += (_widen(x[other[k], d]) - wide) * weight[k]
                    y[d] = _narrow(wide + total, b[d])


guard()
try:
    mix = numba.njit(_mix, nogil=True, error_model="numpy", cache=True)
except RuntimeError:  # nowhere to keep the code: it is compiled anew in every process
    mix = numba.njit(_mix, nogil=True, error_model="numpy")
