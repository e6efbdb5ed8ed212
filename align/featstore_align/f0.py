"""f0 on another frame grid: in log-Hz, inside voiced stretches only, always by the frames' centres.

A mean in Hz across a voiced and an unvoiced frame (f0 = 0) is the pitch of nobody; and half a frame of lag is heard in
every vibrato. So target frame j, whose centre lies at p source frames after that of source frame 0, i = floor(p), takes

    log f = (1 - w) log f0[i] + w log f0[i + 1],   w = p - i,

where both are voiced; the nearest of the two (of equals the later) where one is not; unvoiced where the nearest is.
Before the first centre and after the last the value is held. A target frame on a source
centre has its value bit for bit.
"""

from __future__ import annotations

import numpy as np

from .conversion import Conversion, Exact, conversion
from .retrans import Array, align

_AUDIBLE = 1e-300   # Hz: what log is given for the zeros of unvoiced frames, whose result is not looked at


def align_f0(f0: Array, source_rate: Exact, target_rate: Exact, *, length: int | None = None, start: int = 0,
             stop: int | None = None, source_start: int = 0, source_length: int | None = None,
             source_centre_s: Exact = 0, target_centre_s: Exact = 0, out: Array | None = None) -> Array:
    """f0 `(..., T)` in Hz, 0 where unvoiced, at `target_rate`: `(..., stop - start)`, numpy or torch as given.

    Arguments as in `retrans`, but for the timing, which is "centres": both centres are always looked at.

    Raises:
        TypeError: f0 that is not floating point, rates that are not exact.
        ValueError: negative, infinite or NaN f0 (unvoiced is 0), and what `retrans` raises.
    """
    grids = conversion(source_rate, target_rate, "centres", source_centre_s, target_centre_s)
    return align("f0", f0, grids, length=length, start=start, stop=stop, source_start=source_start,
                 source_length=source_length, out=out)


def fill_f0(f0: np.ndarray, out: np.ndarray, grids: Conversion, start: int, stop: int, source_start: int,
            source_length: int) -> None:
    """Write target frames `[start, stop)` of f0 `(..., T)` into `out`."""
    _check(f0, grids)
    if start == stop or not out.size:
        return
    left, nearest, w = grids.neighbours(np.arange(start, stop), source_length)
    out[...] = _between(f0, left - source_start, nearest - source_start, w)


def f0_frames(f0: np.ndarray, grids: Conversion, frames: np.ndarray, shift: np.ndarray,
              source_length: np.ndarray) -> np.ndarray:
    """Target frames `(n,)` of several utterances whose f0 stands in one row: each has its own number, the length of its
    source, and its `shift`: where in `f0` that source's frame 0 would be."""
    _check(f0, grids)
    left, nearest, w = grids.neighbours(frames, source_length)
    return _between(f0, left + shift, nearest + shift, w)


def _check(f0: np.ndarray, grids: Conversion) -> None:
    if grids.timing != "centres":
        raise ValueError(f"found a conversion with timing {grids.timing!r}; expected 'centres', by which f0 is always "
                         "aligned: conversion(..., timing='centres')")
    if f0.dtype.kind != "f":
        raise TypeError(f"f0: found {f0.dtype}; expected float16, float32 or float64, in Hz")
    if f0.size:
        low, high = np.minimum.reduce(f0, None), np.maximum.reduce(f0, None)
        if not (low >= 0 and high < np.inf):   # NaN fails both
            raise ValueError(f"f0: found values from {low} to {high}; expected finite Hz, and 0 where unvoiced: "
                             "np.nan_to_num(f0) turns NaN into 0")


def _between(f0: np.ndarray, left: np.ndarray, nearest: np.ndarray, w: np.ndarray) -> np.ndarray:
    """f0 `(..., T)` at `w` of the way from frames `left` to the next ones; that of `nearest` where one is unvoiced."""
    held = f0[..., nearest]
    if not w.any():
        return held
    a = f0[..., left].astype(np.float64)
    b = f0[..., left + (w > 0)].astype(np.float64)
    low, high = np.minimum(a, b), np.maximum(a, b)
    log_a, log_b = np.log(np.maximum(a, _AUDIBLE)), np.log(np.maximum(b, _AUDIBLE))
    log_b -= log_a
    log_b *= w
    log_b += log_a
    value = np.exp(log_b, out=log_b)
    # The bounds give back, bit for bit, a value that is the same on both sides, or that the frame's centre falls on.
    np.maximum(value, low, out=value)
    np.minimum(value, high, out=value)
    return np.where(low > 0, value, held)
