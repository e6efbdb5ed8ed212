"""Many crops of one feature aligned by one call, for training: the same bits as one by one, without a call for each."""

from __future__ import annotations

import numpy as np

from .conversion import Conversion, Kind
from .f0 import f0_frames
from .retrans import KINDS, fill, mixed, unknown


def align_batch(kind: Kind, x: np.ndarray, grids: Conversion, *, start: np.ndarray, stop: np.ndarray,
                source_length: np.ndarray, out: np.ndarray,
                ranges: tuple[np.ndarray, np.ndarray] | None = None) -> None:
    """Write target frames `[start[b], stop[b])` of utterance b to the beginning of `out[b]`, for every b.

    Args:
        x: (rows, D) or (rows,): the source frames that `grids.source_ranges` names, crop after crop.
        start, stop, source_length: (B,) integers; `source_length` is that of the whole source.
        out: (B, F, D) or (B, F), contiguous, of x's dtype; what lies beyond a crop is left as it is.
        ranges: what `source_ranges` gave for these crops; None: it is asked once more.

    Raises:
        ValueError: arrays that do not fit together, an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(unknown(kind))
    start, stop, source_length = (np.asarray(numbers, np.int64) for numbers in (start, stop, source_length))
    longest = out.shape[1] if out.ndim > 1 else -1
    if not (len(start) == len(stop) == len(source_length) == len(out) and (start >= 0).all() and (start <= stop).all()
            and (stop - start <= longest).all() and (source_length[start < stop] > 0).all()):
        raise ValueError(f"found {len(start)} crops, of up to {max(stop - start, default=0)} frames, for an out of "
                         f"{out.shape}; expected start, stop and source_length for each of its rows, crops that it "
                         "has room for, and sources of at least one frame")
    first, last = grids.source_ranges(start, stop, source_length, kind) if ranges is None else ranges
    rows = np.cumsum(last - first)
    wanted = (int(rows[-1]) if len(rows) else 0, *out.shape[2:])
    if x.shape != wanted or x.dtype != out.dtype or not (x.flags.c_contiguous and out.flags.c_contiguous):
        raise ValueError(f"x: found {x.dtype} {x.shape}; expected {out.dtype} {wanted}, contiguous as out: the frames "
                         "that source_ranges(...) names, of one crop after the other")
    shift = rows - last  # in which row of x source frame 0 of a crop's utterance would be
    if kind == "continuous":
        if x.size and not mixed(x, grids, shift, start, stop, source_length, out, load=len(start) > 1):
            for b, row in enumerate(rows):
                fill(kind, x[row - last[b] + first[b]:row], -1 if x.ndim == 1 else -2, out[b, :stop[b] - start[b]],
                     grids, int(start[b]), int(stop[b]), int(first[b]), int(source_length[b]))
        return
    count = stop - start
    crop = np.repeat(np.arange(len(start)), count)
    frame = np.arange(len(crop)) - np.repeat(np.cumsum(count) - count, count)   # within its crop
    place = frame + start[crop], source_length[crop]
    if kind == "f0":
        out[crop, frame] = f0_frames(x, grids, place[0], shift[crop], place[1])
    else:
        out[crop, frame] = x[grids.nearest(*place) + shift[crop]]
