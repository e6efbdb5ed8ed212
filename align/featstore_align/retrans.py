"""ReTrans: a feature at one frame rate, re-expressed at another; the nearest frame where values are labels.

The method of Zhang et al., "Leveraging Diverse Semantic-based Audio Pretrained Models for Singing Voice Conversion"
(arXiv 2310.11160), resolution transformation: with c the greatest common divisor of the rates, repeat every source
frame r2/c times and average every r1/c. Here the repetition is never made. Target frame j is the mean of source frames
over its window,

    y[j] = sum_i w[j, i] x[i],    w[j, i] = |window j  and  source frame i| / |window j|,

computed as y = b + sum_i w_i (x_i - b), b being the heaviest tap, always in the order of the source. So every element
of the output depends on its own taps and on nothing else: a crop equals the slice of the whole bit for bit. A constant
gives zero differences, hence itself. And the result stays within its taps: the exact mean lies w_b |x - b| inside the
farthest tap x, and w_b is at least 1 / taps, which is more than the rounding of the sum of differences can amount to;
the last addition rounds once, and rounding keeps order. So nothing need be clamped, which would double the passes over
memory. Values must be finite, and their differences too.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, get_args

import numpy as np

from .conversion import Conversion, Exact, Kind, Rows, Timing, conversion

Array = Any  # numpy.ndarray or torch.Tensor, as given

KINDS = get_args(Kind)
BLOCK = 32_000        # elements per pass, 125 KiB in float32: two blocks stay in the second cache; and torch runs what
#                       has fewer than 32768 elements in the calling thread, which a forked process needs
FEW_TAPS = 8          # up to here float32 sums are within 1e-6 of the exact ones; more taps are summed in float64


def retrans(x: Array, source_rate: Exact, target_rate: Exact, *, length: int | None = None, start: int = 0,
            stop: int | None = None, source_start: int = 0, source_length: int | None = None, timing: Timing = "edges",
            source_centre_s: Exact = 0, target_centre_s: Exact = 0, out: Array | None = None) -> Array:
    """Continuous feature `(..., T, D)` or `(T,)` at `target_rate`: `(..., stop - start, D)`, numpy or torch as given.

    Args:
        x: float16 (summed in float32, rounded once), float32 or float64; torch also bfloat16, on any device, and with
            gradients.
        length: target frames of the whole utterance; None: as many as the source fills. Frames beyond repeat the last
            average, as in the reference; a source shorter than one target frame gives the mean of what is there.
        start, stop: the crop `[start, stop)` of those frames.
        source_start, source_length: where `x` begins in the whole source, and how many frames the whole source has,
            when only a part was read; `source_range` says which part a crop needs.
        timing, source_centre_s, target_centre_s: see `conversion`.
        out: where to write the result: same shape, dtype and device.

    Raises:
        TypeError: rates that are not exact, values that are not floating point (labels: `nearest`).
        ValueError: rates that are not positive, no frames, a crop outside of `length`, a part that does not cover it.
    """
    grids = conversion(source_rate, target_rate, timing, source_centre_s, target_centre_s)
    return align("continuous", x, grids, length=length, start=start, stop=stop, source_start=source_start,
                 source_length=source_length, out=out)


def nearest(x: Array, source_rate: Exact, target_rate: Exact, *, length: int | None = None, start: int = 0,
            stop: int | None = None, source_start: int = 0, source_length: int | None = None, timing: Timing = "edges",
            source_centre_s: Exact = 0, target_centre_s: Exact = 0, out: Array | None = None) -> Array:
    """Discrete feature `(..., T, D)` or `(T,)` of any dtype at `target_rate`: `(..., stop - start, D)`.

    A target frame is the source frame whose centre is nearest to its own, the later one of two; the first and the last
    are held. Arguments and errors as in `retrans`.
    """
    grids = conversion(source_rate, target_rate, timing, source_centre_s, target_centre_s)
    return align("discrete", x, grids, length=length, start=start, stop=stop, source_start=source_start,
                 source_length=source_length, out=out)


def source_range(start: int, stop: int, source_rate: Exact, target_rate: Exact, *, length: int | None = None,
                 source_length: int | None = None, timing: Timing = "edges", source_centre_s: Exact = 0,
                 target_centre_s: Exact = 0, kind: Kind = "continuous") -> tuple[int, int]:
    """Source frames `(first, last)`, last excluded, that target frames `[start, stop)` are made of.

    Args:
        length: target frames of the whole utterance, to check the crop against.
        source_length: frames of the whole source; None: the source goes on for as long as it is needed.
        kind: "continuous" (`retrans`), "f0" (`align_f0`; always by centres) or "discrete" (`nearest`).
    """
    if kind not in KINDS:
        raise ValueError(unknown(kind))
    timing = "centres" if kind == "f0" else timing
    grids = conversion(source_rate, target_rate, timing, source_centre_s, target_centre_s)
    if source_length is not None and source_length < 1:
        raise ValueError(f"source_length: found {source_length}; expected at least one frame")
    if not 0 <= start <= stop or (length is not None and stop > length):
        raise ValueError(_outside(start, stop, length))
    return grids.source_range(start, stop, source_length, kind)


def taps(frame: int, source_rate: Exact, target_rate: Exact, *, source_length: int, length: int | None = None,
         timing: Timing = "edges", source_centre_s: Exact = 0, target_centre_s: Exact = 0,
         kind: Kind = "continuous") -> list[tuple[int, Any]]:
    """Source frames that target frame `frame` is made of, each with its exact weight (a Fraction; they sum to 1).

    For kind "f0" the weights are those of log-Hz between two voiced frames; where one is unvoiced, the heavier one (of
    equals the later) answers alone.
    """
    if kind not in KINDS:
        raise ValueError(unknown(kind))
    timing = "centres" if kind == "f0" else timing
    grids = conversion(source_rate, target_rate, timing, source_centre_s, target_centre_s)
    if source_length < 1:
        raise ValueError(f"source_length: found {source_length}; expected at least one frame")
    if frame < 0 or (length is not None and frame >= length):
        raise ValueError(_outside(frame, frame + 1, length))
    return grids.taps(frame, source_length, kind)


def align(kind: Kind, x: Array, grids: Conversion, *, length: int | None = None, start: int = 0,
          stop: int | None = None, source_start: int = 0, source_length: int | None = None,
          out: Array | None = None) -> Array:
    """`retrans`, `nearest` or `align_f0`, by the feature's kind, between grids prepared once by `conversion`.

    For callers that know a feature's kind and read many crops of it: rates and centres are checked once.
    """
    torch = sys.modules.get("torch")
    tensor = torch is not None and isinstance(x, torch.Tensor)
    if not (tensor or isinstance(x, np.ndarray)):
        raise TypeError(f"x: found {type(x).__name__}; expected a numpy array or a torch tensor")
    if kind not in KINDS:
        raise ValueError(unknown(kind))
    axis = -1 if kind == "f0" or x.ndim == 1 else -2
    stop, source_length = _checked(kind, x, axis, grids, length, start, stop, source_start, source_length)
    shape = (*x.shape[:axis], stop - start, *x.shape[x.ndim + axis + 1:])
    if out is not None:
        fits = isinstance(out, np.ndarray) != tensor and getattr(out, "device", None) == getattr(x, "device", None)
        if not (fits and out.shape == shape and out.dtype == x.dtype):
            where = f" on {x.device}" if tensor else ""
            raise ValueError(f"out: found {_described(out)}; expected {_described(x, shape)}{where}")
    if tensor:
        return _align_tensor(kind, x, grids, start, stop, source_start, source_length, out)
    if out is None:
        out = np.empty(shape, x.dtype)
    fill(kind, x, axis, out, grids, start, stop, source_start, source_length)
    return out


def _checked(kind: Kind, x: Array, axis: int, grids: Conversion, length: int | None, start: int, stop: int | None,
             source_start: int, source_length: int | None) -> tuple[int, int]:
    """The crop's end and the source's length, once everything fits together."""
    if x.ndim == 0:
        raise ValueError("x: found a single number; expected frames, (T,) or (..., T, D)")
    frames = x.shape[axis]
    if source_length is None:
        if source_start:
            raise ValueError(f"found source_start={source_start} without source_length; expected both for a part of a "
                             "source: give the frames of the whole as source_length")
        source_length = frames
    if source_length < 1:
        raise ValueError(f"x: found {tuple(x.shape)}, no frames; expected at least one along axis {axis}: an empty "
                         "feature cannot be aligned")
    if source_start < 0 or source_start + frames > source_length:
        raise ValueError(f"found {frames} frames from source_start={source_start}; expected them within the "
                         f"source_length={source_length} frames of the whole source")
    if length is None:
        length = grids.natural_length(source_length)
    if stop is None:
        stop = length
    if not 0 <= start <= stop <= length:
        raise ValueError(_outside(start, stop, length))
    if start < stop and (source_start or frames < source_length):
        first, last = grids.source_range(start, stop, source_length, kind)
        if first < source_start or last > source_start + frames:
            raise ValueError(f"found source frames [{source_start}, {source_start + frames}); expected at least "
                             f"[{first}, {last}) for target frames [{start}, {stop}): read what source_range(...) says")
    return stop, source_length


def unknown(kind: str) -> str:
    return (f"kind: found {kind!r}; expected {', '.join(map(repr, KINDS))}: samples are cut, never converted, and "
            "what is global has no frames")


def _outside(start: int, stop: int, length: int | None) -> str:
    most = "length" if length is None else length
    return (f"found the crop [{start}, {stop}); expected 0 <= start <= stop <= {most}, the target frames of the whole "
            "utterance: give it as length, or shorten the crop and pad")


def _described(x: Any, shape: tuple[int, ...] | None = None) -> str:
    shape = tuple(getattr(x, "shape", ())) if shape is None else shape
    return f"{type(x).__name__} {shape} of {getattr(x, 'dtype', 'no dtype')}"


def fill(kind: Kind, x: np.ndarray, axis: int, out: np.ndarray, grids: Conversion, start: int, stop: int,
         source_start: int, source_length: int) -> None:
    """Write the frames into `out`, any leading axes one item at a time."""
    if kind == "f0":
        from .f0 import fill_f0
        return fill_f0(x, out, grids, start, stop, source_start, source_length)
    if kind == "continuous" and x.dtype.kind != "f":
        raise TypeError(f"x: found {x.dtype}; expected float16, float32 or float64: labels are aligned by nearest(), "
                        "other numbers need x.astype(np.float32)")
    if start == stop or not out.size:
        return None
    if axis == -1:
        x, out = x[..., None], out[..., None]
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    if x.ndim > 2:
        x = x.reshape(-1, *x.shape[-2:])
        for item, into in zip(x, (out[index] for index in np.ndindex(out.shape[:-2])), strict=True):
            fill(kind, item, -2, into, grids, start, stop, source_start, source_length)
        return None
    if grids.is_copy:
        # A frame beyond the source repeats the last.
        inside = min(stop, source_length)
        if start < inside:
            out[: inside - start] = x[start - source_start: inside - source_start]
        if inside < stop:
            out[max(0, inside - start):] = x[source_length - 1 - source_start]
        return None
    x = np.ascontiguousarray(x)  # take would copy the whole of anything else, at every call
    if kind == "discrete":
        x.take(grids.nearest(np.arange(start, stop), source_length) - source_start, 0, out, "clip")
        return None
    if out.flags.c_contiguous:
        shift, begin, end, whole = (np.array([number]) for number in (-source_start, start, stop, source_length))
        if mixed(x, grids, shift, begin, end, whole, out[None], load=False):
            return None
    for first in range(start, stop, grids.stretch):
        last = min(stop, first + grids.stretch)
        _mix(x, out[first - start: last - start], grids.rows(first, last, source_length), source_start,
             x.dtype == np.float64 or grids.taps_bound > FEW_TAPS)
    return None


def mixed(x: np.ndarray, grids: Conversion, shift: np.ndarray, start: np.ndarray, stop: np.ndarray,
          source_length: np.ndarray, out: np.ndarray, *, load: bool) -> bool:
    """Whether compiled code wrote the frames of several crops into `out`, contiguous: see `compiled._mix`.

    It does where numba is installed, for what is summed in float32. load: import it if nobody has: a second that a
    batch is worth, and a single crop is not.
    """
    if x.dtype not in (np.float16, np.float32) or grids.taps_bound > FEW_TAPS or grids.too_fine:
        return False
    if x.dtype != out.dtype or not (x.flags.behaved and out.flags.behaved):
        return False
    mix = compiled() if load else getattr(sys.modules.get(f"{__package__}.compiled"), "mix", None)
    if mix is None:
        return False
    bits = np.uint16 if x.dtype == np.float16 else np.float32
    x, out = (array[..., None] if array.ndim == ndim else array for array, ndim in ((x, 1), (out, 2)))
    low, high = grids.reaches(source_length)
    mix(x.view(bits), shift, start, stop, source_length, low, high, grids.m, grids.width, grids.left, grids.taps_bound,
        out.view(bits))
    return True


@lru_cache(maxsize=1)
def compiled() -> Any:
    """The sums as machine code; None where numba is not installed or cannot be used."""
    try:
        from .compiled import mix
    except ImportError:
        return None
    return mix


def _mix(x: np.ndarray, out: np.ndarray, rows: Rows, source_start: int, double: bool) -> None:
    """Every row's heaviest source frame; and where there are more, b + sum w (x - b) over it, block by block."""
    base = rows.base - source_start if source_start else rows.base
    x.take(base, 0, out, "clip")  # within x, as was checked: "clip" spares numpy a buffer
    mixed = rows.mixed
    if not len(mixed):
        return
    other = rows.other - source_start if source_start else rows.other
    weight = rows.weight64 if double else rows.weight32
    dim = x.shape[1]
    size = min(max(1, BLOCK // dim), len(mixed))
    wide = np.dtype(np.float64 if double else np.float32)
    low = np.empty((size, dim), x.dtype) if x.dtype != wide else None
    blocks = [np.empty((size, dim), wide) for _ in range(2 if len(other) == 1 else 3)]
    for k in range(0, len(mixed), size):
        which = mixed[k:k + size]
        b, total, *rest = [block[:len(which)] for block in blocks]
        _gather(x, base[which], b, low)
        for tap in range(len(other)):
            term = rest[0] if tap else total
            _gather(x, other[tap, k:k + size], term, low)
            np.subtract(term, b, term)
            np.multiply(term, weight[tap, k:k + size], term)
            if tap:
                np.add(total, term, total)
        np.add(b, total, b)
        if low is None:
            out[which] = b
        else:
            _cast(b, low[:len(which)])
            out[which] = low[:len(which)]


def _gather(x: np.ndarray, frames: np.ndarray, into: np.ndarray, low: np.ndarray | None) -> None:
    if low is None:
        x.take(frames, 0, into, "clip")
    else:
        x.take(frames, 0, low[:len(frames)], "clip")
        _cast(low[:len(frames)], into)


def _cast(source: np.ndarray, target: np.ndarray) -> None:
    """Copy with a change of dtype; by torch where somebody has loaded it: from and to float16 it is 20 times faster
    than numpy, and gives the same bits."""
    from_numpy = getattr(sys.modules.get("torch"), "from_numpy", None)
    if from_numpy is not None and source.size <= BLOCK:
        from_numpy(target).copy_(from_numpy(source))
    else:
        target[...] = source


def _align_tensor(kind: Kind, x: Any, grids: Conversion, start: int, stop: int, source_start: int, source_length: int,
                  out: Any) -> Any:
    """The same for torch: through shared memory on a CPU; elsewhere, and where gradients are wanted, torch's own calls
    in the same order, so that the numbers are the same."""
    torch = sys.modules["torch"]
    gradient = x.requires_grad and torch.is_grad_enabled()
    if kind == "f0" and gradient:
        raise ValueError("f0: found a tensor that asks for gradients; expected f0 as data: give f0.detach()")
    if kind == "f0" and x.dtype == torch.bfloat16:
        raise TypeError("f0: found bfloat16, with steps of up to 13 cents; expected float32: f0.float()")
    if kind == "continuous" and not x.is_floating_point():
        raise TypeError(f"x: found {x.dtype}; expected a floating point dtype: labels are aligned by nearest(), other "
                        "numbers need x.float()")
    shared = x.device.type == "cpu" and not gradient and x.dtype != torch.bfloat16
    if shared or kind == "f0":
        result = align(kind, x.detach().cpu().numpy(), grids, length=stop, start=start, stop=stop,
                       source_start=source_start, source_length=source_length,
                       out=out.detach().numpy() if shared and out is not None else None)
        if shared and out is not None:
            return out
        result = torch.from_numpy(result).to(x.device)
    else:
        result = _gathered(torch, kind, x, grids, start, stop, source_start, source_length)
    return result if out is None else out.copy_(result)


def _gathered(torch: Any, kind: Kind, x: Any, grids: Conversion, start: int, stop: int, source_start: int,
              source_length: int) -> Any:
    axis = -2 if x.ndim > 1 else -1

    def frames(indices: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(indices - source_start)).to(x.device)

    if kind == "discrete" or start == stop:
        return x.index_select(axis, frames(grids.nearest(np.arange(start, stop), source_length)))
    if axis == -1:
        return _gathered(torch, kind, x[:, None], grids, start, stop, source_start, source_length)[:, 0]
    double = x.dtype == torch.float64 or grids.taps_bound > FEW_TAPS
    wide = torch.float64 if double else torch.float32
    parts = []
    for first in range(start, stop, grids.stretch):
        rows = grids.rows(first, min(stop, first + grids.stretch), source_length)
        part = x.index_select(-2, frames(rows.base))
        if len(rows.mixed):
            weight = torch.from_numpy(np.ascontiguousarray(rows.weight64 if double else rows.weight32)).to(x.device)
            which = torch.from_numpy(rows.mixed).to(x.device)
            b = part.index_select(-2, which).to(wide)
            total = None
            for tap, other in enumerate(rows.other):
                term = (x.index_select(-2, frames(other)).to(wide) - b) * weight[tap]
                total = term if total is None else total + term
            part = part.index_copy(-2, which, (b + total).to(x.dtype))
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)
