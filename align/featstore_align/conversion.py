"""From one frame grid to another, in exact arithmetic: which source frames make a target frame, and with what weights.

A grid is a rate and the time on which its frame 0 is centred. Everything is counted in whole steps of 1/m source
frames, m so chosen that every edge and every centre of both grids falls on a step; a weight is a quotient of two whole
numbers. No position is ever rounded, so the thousandth hour is as exact as the first second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from numbers import Integral, Rational
from typing import Literal, get_args

import numpy as np

Exact = int | Fraction | str
Timing = Literal["edges", "centres"]
Kind = Literal["continuous", "f0", "discrete"]

MOST_TAPS = 1 << 13      # laid out at once: a table of weights takes 0.3 MB at most, all 64 that are kept 20
FINEST = 1 << 31         # steps per frame up to which 2**31 frames (a year at 50 Hz) are counted in 64 bits
_EXACT = re.compile(r"\s*[-+]?(\d+(/\d+)?|\d*\.\d+)\s*")


def exact(value: Exact, name: str) -> Fraction:
    """`value` as a fraction: an int, a Fraction, "n/d", or a float that is a whole number.

    Raises:
        TypeError: a float with a fractional part, or something else. (93.75 happens to be exact, 320/3 cannot be: to
            take the one and not the other would be a rule that changes with the hop.)
        ValueError: a string that is no fraction.
    """
    if isinstance(value, Rational | Integral) and not isinstance(value, bool):
        return Fraction(int(value.numerator), int(value.denominator))
    if isinstance(value, str):
        if _EXACT.fullmatch(value) and not re.search(r"/0+\s*$", value):
            return Fraction(value)
        raise ValueError(f"{name}: found {value!r}; expected a whole number or a fraction such as '24000/256'")
    if isinstance(value, float | np.floating):
        if math.isfinite(value) and value == int(value):
            return Fraction(int(value))
        near = Fraction(float(value)).limit_denominator(10_000) if math.isfinite(value) else "24000/256"
        raise TypeError(f"{name}: found {value!r}, a rounded number; expected an exact one. Write '{near}' or "
                        f"Fraction({str(near).replace('/', ', ')}); a frame rate is sample_rate / hop_length, "
                        "as in '24000/256'")
    raise TypeError(f"{name}: found {value!r} ({type(value).__name__}); expected an int, a Fraction or 'n/d'")


@lru_cache(maxsize=64, typed=True)   # typed: 93.75 equals Fraction(375, 4) and must still be refused
def conversion(source_rate: Exact, target_rate: Exact, timing: Timing = "edges",
               source_centre_s: Exact = 0, target_centre_s: Exact = 0) -> Conversion:
    """The conversion between two grids; equal arguments give the same object, which keeps its weights.

    Args:
        source_rate, target_rate: frames per second, exact.
        timing: "edges": frame 0 of both grids starts at time 0 (the paper's algorithm; centres are then not looked at).
            "centres": frame 0 is centred on `source_centre_s` and `target_centre_s`, in seconds, exact.

    Raises:
        TypeError, ValueError: a rate that is no exact positive number, an unknown timing.
    """
    r1, r2 = exact(source_rate, "source_rate"), exact(target_rate, "target_rate")
    for name, rate in (("source_rate", r1), ("target_rate", r2)):
        if rate <= 0:
            raise ValueError(f"{name}: found {rate}; expected a positive number of frames per second")
    centres = exact(source_centre_s, "source_centre_s"), exact(target_centre_s, "target_centre_s")
    if timing not in get_args(Timing):
        raise ValueError(f"timing: found {timing!r}; expected {' or '.join(map(repr, get_args(Timing)))}")
    s, t = (r2 / r1).numerator, (r2 / r1).denominator
    lag = (centres[1] - centres[0]) * r1 if timing == "centres" else (Fraction(t, s) - 1) / 2
    m = math.lcm(lag.denominator, 2 * s)
    width = t * m // s
    middle = int(lag * m)
    return Conversion(r1, r2, timing, s, t, m, width, middle, middle + (m - width) // 2)


@dataclass(eq=False)
class Conversion:
    """One pair of grids. Built by `conversion`, which checks its arguments; lengths and frames are checked by callers.

    With t/s = source_rate / target_rate in lowest terms, target frame j covers `[left + j width, left + (j + 1) width)`
    and source frame i covers `[i m, (i + 1) m)`; frame j's centre lies `(middle + j width) / m` source frames after the
    centre of source frame 0. Taps repeat every s target frames, t source frames further on.
    """

    source_rate: Fraction
    target_rate: Fraction
    timing: Timing
    s: int                  # the paper repeats every frame s times ...
    t: int                  # ... and averages every t
    m: int                  # steps per source frame
    width: int              # steps per target frame
    middle: int             # centre of target frame 0, in steps after that of source frame 0
    left: int               # left edge of target frame 0, in steps after that of source frame 0
    _table: Rows | None = None

    @property
    def taps_bound(self) -> int:
        """The most source frames that a window of this width may touch, wherever it begins."""
        return (self.width - 2) // self.m + 2

    @property
    def stretch(self) -> int:
        """Target frames that `rows` lays out at once."""
        return max(1, MOST_TAPS // self.taps_bound)

    @property
    def is_copy(self) -> bool:
        """Whether target frame j is source frame j, whatever the kind."""
        return self.s == self.t == 1 and self.left == 0

    @cached_property
    def too_fine(self) -> bool:
        """Whether steps may not be counted in 64 bits."""
        return max(self.m, self.width) >= FINEST

    def natural_length(self, source_length: int) -> int:
        """Target frames that `source_length` source frames fill to the end, and at least one."""
        return max(1, source_length * self.s // self.t)

    def reach(self, source_length: int) -> tuple[int, int]:
        """The first and last target frame with an average of their own; those beyond repeat it.

        "edges": the reference's rule, frames wholly inside the source (frame 0 where there is none: the mean of what is
        there). "centres": frames that the source touches, averaged over the part that it covers.
        """
        if self.timing == "edges":
            return 0, max(0, source_length * self.s // self.t - 1)
        return -self.left // self.width, -((self.left - source_length * self.m) // self.width) - 1

    def reaches(self, source_length: np.ndarray) -> tuple[int, np.ndarray]:
        """`reach` of several sources: the first frame is the same for all."""
        if self.timing == "edges":
            return 0, np.maximum(0, source_length * self.s // self.t - 1)
        return -self.left // self.width, -((self.left - source_length * self.m) // self.width) - 1

    def source_range(self, start: int, stop: int, source_length: int | None = None,
                     kind: Kind = "continuous") -> tuple[int, int]:
        """Source frames `[first, last)` that target frames `[start, stop)` are made of; None: endless."""
        if start == stop:
            first = self.source_range(start, start + 1, source_length, kind)[0]
            return first, first
        if kind != "continuous":
            far = None if source_length is None else (source_length - 1) * self.m
            first, last = self._within(start, far), self._within(stop - 1, far)
            if kind == "f0":
                return first // self.m, -(-last // self.m) + 1
            return (2 * first + self.m) // (2 * self.m), (2 * last + self.m) // (2 * self.m) + 1
        first, last = start, stop - 1
        if source_length is not None:
            low, high = self.reach(source_length)
            first, last = min(max(first, low), high), min(max(last, low), high)
        elif self.left < 0:
            low = -self.left // self.width
            first, last = max(first, low), max(last, low)
        left, right = max(0, self.left + first * self.width), self.left + (last + 1) * self.width
        if source_length is not None:
            right = min(right, source_length * self.m)
        return left // self.m, -(-right // self.m)

    def source_ranges(self, start: np.ndarray, stop: np.ndarray, source_length: np.ndarray,
                      kind: Kind = "continuous") -> tuple[np.ndarray, np.ndarray]:
        """`source_range` of several crops, each of its own source."""
        start, stop, source_length = map(self._counted, (start, stop, source_length))
        if kind == "continuous":
            low, high = self.reaches(source_length)
            left = self.left + np.minimum(np.maximum(start, low), high) * self.width
            right = self.left + (np.minimum(np.maximum(stop - 1, low), high) + 1) * self.width
            first = np.maximum(left, 0) // self.m
            last = -(-np.minimum(right, source_length * self.m) // self.m)
        else:
            near, far = self._places(start, source_length), self._places(stop - 1, source_length)
            if kind == "f0":
                first, last = near // self.m, -(-far // self.m) + 1
            else:
                first, last = (2 * near + self.m) // (2 * self.m), (2 * far + self.m) // (2 * self.m) + 1
        last = np.where(start < stop, last, first)
        return first.astype(np.int64, copy=False), last.astype(np.int64, copy=False)

    def taps(self, frame: int, source_length: int, kind: Kind = "continuous") -> list[tuple[int, Fraction]]:
        """Source frames of target frame `frame` and their exact weights, which sum to 1; for f0 those of log-Hz."""
        if kind != "continuous":
            place = self._within(frame, (source_length - 1) * self.m)
            if kind == "discrete":
                return [((2 * place + self.m) // (2 * self.m), Fraction(1))]
            i, step = divmod(place, self.m)
            weights = [(i, Fraction(self.m - step, self.m)), (i + 1, Fraction(step, self.m))]
            return [(i, weight) for i, weight in weights if weight]
        low, high = self.reach(source_length)
        frame = min(max(frame, low), high)
        left = max(0, self.left + frame * self.width)
        right = min(source_length * self.m, self.left + (frame + 1) * self.width)
        return [(i, Fraction(min(right, (i + 1) * self.m) - max(left, i * self.m), right - left))
                for i in range(left // self.m, -(-right // self.m))]

    def nearest(self, frames: np.ndarray, source_length: int | np.ndarray) -> np.ndarray:
        """Source frames whose centres are nearest to those of target frames, of two the later.

        source_length: of the one source of all frames, or of each one's.
        """
        return ((2 * self._places(frames, source_length) + self.m) // (2 * self.m)).astype(np.intp, copy=False)

    def neighbours(self, frames: np.ndarray,
                   source_length: int | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For target frames: the source frame centred on or before theirs, the nearest one, and how far towards the
        next one they are centred, in [0, 1)."""
        places = self._places(frames, source_length)
        left = places // self.m
        step = places - left * self.m
        nearest = left + (2 * step >= self.m)
        return (left.astype(np.intp, copy=False), nearest.astype(np.intp, copy=False),
                (step / self.m).astype(np.float64, copy=False))

    def rows(self, start: int, stop: int, source_length: int) -> Rows:
        """Taps of target frames `[start, stop)`, at most `stretch` of them, laid out for arrays."""
        # Frames whose window lies wholly inside the source follow the period; the few others are worked out.
        inner = -(self.left // self.width), (source_length * self.m - self.left) // self.width
        begin, end = max(start, inner[0]), min(stop, inner[1])
        if end <= begin:
            return self._work_out(np.arange(start, stop), source_length)
        rows = [self._periodic(begin, end)]
        if start < begin:
            rows.insert(0, self._work_out(np.arange(start, begin), source_length))
        if end < stop:
            rows.append(self._work_out(np.arange(end, stop), source_length))
        return rows[0] if len(rows) == 1 else Rows.joined(rows)

    def _places(self, frames: np.ndarray, source_length: int | np.ndarray) -> np.ndarray:
        """Centres of target frames, in steps after that of source frame 0, held at the source's ends."""
        places = self._counted(frames) * self.width
        places += self.middle
        if isinstance(source_length, np.ndarray):
            source_length = self._counted(source_length)
        return np.minimum(np.maximum(places, 0), (source_length - 1) * self.m)

    def _counted(self, frames: np.ndarray) -> np.ndarray:
        """Frame numbers that may be multiplied by steps: Python's integers where 64 bits might not do."""
        return frames.astype(object) if self.too_fine else frames

    def _within(self, frame: int, far: int | None) -> int:
        place = max(0, self.middle + frame * self.width)
        return place if far is None else min(place, far)

    def _periodic(self, start: int, stop: int) -> Rows:
        periods, phase = divmod(start, self.s)
        table, end = self._table, phase + stop - start
        if self.s > self.stretch:
            return self._work_out(np.arange(start, stop), None)
        if table is None or len(table.base) < end:
            size = self.s + min(2 * (stop - start), self.stretch)   # any phase, and frames to grow
            table = self._table = self._work_out(np.arange(size), None)
        return table.part(phase, end, periods * self.t)

    def _work_out(self, frames: np.ndarray, source_length: int | None) -> Rows:
        """Rows of any frames; `source_length` None: as if the source had neither beginning nor end."""
        if source_length is not None:
            frames = np.clip(frames, *self.reach(source_length))
        left = self._counted(frames) * self.width + self.left
        right = left + self.width
        if source_length is not None:
            left, right = np.maximum(left, 0), np.minimum(right, source_length * self.m)
        first = left // self.m
        taps = int(np.max((right - 1) // self.m - first, initial=0)) + 1
        source = first[:, None] + np.arange(taps)                                                   # (frames, taps)
        share = np.minimum(right[:, None], (source + 1) * self.m) - np.maximum(left[:, None], source * self.m)
        heaviest = share.argmax(1)
        base = first + heaviest
        mixed = np.flatnonzero(share[np.arange(len(frames)), heaviest] < right - left)
        order = np.arange(taps - 1)
        order = order + (order >= heaviest[mixed, None])                                            # but the heaviest
        share = np.take_along_axis(share[mixed], order, 1)
        other = np.where(share > 0, first[mixed, None] + order, base[mixed, None])
        # -0.0 where there is no tap: -0.0 (base - base) is -0.0, which added to anything leaves every bit of it.
        weight = np.where(share > 0, share / (right - left)[mixed, None], -0.0)
        return Rows(base.astype(np.intp), mixed, np.ascontiguousarray(other.T, np.intp),
                    np.ascontiguousarray(weight.T, np.float64)[:, :, None])


class Rows:
    """Taps of a stretch of target frames: every frame's heaviest source frame, and for the frames that have more than
    one tap the others with their weights, in the order of the source.

    base (frames,); mixed (mixed,): which frames have more; other (taps - 1, mixed): a frame that has fewer names its
    base with weight -0.0; weight (taps - 1, mixed, 1), in float32 and float64.
    """

    __slots__ = ("base", "before", "mixed", "other", "weight32", "weight64")

    def __init__(self, base: np.ndarray, mixed: np.ndarray, other: np.ndarray, weight64: np.ndarray,
                 weight32: np.ndarray | None = None) -> None:
        self.base, self.mixed, self.other, self.weight64 = base, mixed, other, weight64
        self.weight32 = weight64.astype(np.float32) if weight32 is None else weight32
        self.before: list[int] | None = None   # of the table alone: mixed frames before each frame

    def part(self, start: int, stop: int, shift: int) -> Rows:
        """Frames `[start, stop)`, their sources `shift` frames further on."""
        if self.before is None:
            self.before = np.searchsorted(self.mixed, np.arange(len(self.base) + 1)).tolist()
        some = slice(self.before[start], self.before[stop])
        return Rows(self.base[start:stop] + shift, self.mixed[some] - start, self.other[:, some] + shift,
                    self.weight64[:, some], self.weight32[:, some])

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """One stretch after the other."""
        taps = max(len(part.other) for part in parts)
        starts = np.cumsum([0] + [len(part.base) for part in parts])
        wide = [part._widened(taps) for part in parts]
        return cls(np.concatenate([part.base for part in parts]),
                   np.concatenate([part.mixed + start for part, start in zip(parts, starts, strict=False)]),
                   np.concatenate([other for other, _ in wide], 1), np.concatenate([weight for _, weight in wide], 1))

    def _widened(self, taps: int) -> tuple[np.ndarray, np.ndarray]:
        missing = taps - len(self.other)
        base = np.broadcast_to(self.base[self.mixed], (missing, len(self.mixed)))
        return (np.concatenate([self.other, base]),
                np.concatenate([self.weight64, np.full((missing, len(self.mixed), 1), -0.0)]))
