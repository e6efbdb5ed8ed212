"""Features as int8: value = stored x scale + offset, with a scale and an offset for each channel.

A lossy feature is one of its own, NAME-int8. Its spec names the identity it was made from, repeats that one's spec, and
holds a digest of the two arrays, which lie beside the segments: `<identity>/scale` and `<identity>/offset`, (D,)
float32. They are frozen: what joins later is stored with them, or refused.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass

import numpy as np

from . import storage
from .errors import BadRequest, CorruptSegment
from .segment import put_plain
from .spec import Spec
from .storage import Place

MADE_BY, VERSION = "int8", 1
SUFFIX = "-int8"
STEPS = 127
HEADROOM = 1 / 8  # the range is wider than what the feature had when it was frozen, by so much: it costs 1 dB
_REFUSED = {"f0": "voicing is told by exact zeros, and a semitone is finer than a step",
            "discrete": "its values are labels",
            "samples": "sound in 8 bits hisses",
            "global": "one vector per utterance takes no room"}


class Outside(ValueError):
    """A value that lies outside the frozen range: of this channel, and the range."""

    def __init__(self, channel: int, value: float, low: float, high: float) -> None:
        super().__init__(f"channel {channel} reaches {value:.6g}, the range is {low:.6g} to {high:.6g}")
        self.channel, self.value, self.low, self.high = channel, value, low, high


@dataclass(frozen=True)
class Quantiser:
    """scale, offset: (D,) float32, or (1,) where frames are single numbers. dtype: of the values."""

    scale: np.ndarray
    offset: np.ndarray
    dtype: np.dtype

    @classmethod
    def covering(cls, low: np.ndarray, high: np.ndarray, dtype: np.dtype) -> Quantiser:
        """For channels whose values go from `low` to `high`, (D,), and a little beyond on either side."""
        largest = float(np.finfo(dtype).max)
        low, high = low.astype(np.float64), high.astype(np.float64)
        least = np.maximum(np.abs(low), np.abs(high)) * 2.0**-10 + 2.0**-24  # of a channel that never changes
        margin = np.maximum(high - low, least) * HEADROOM / 2
        low, high = np.maximum(low - margin, -largest), np.minimum(high + margin, largest)
        scale = ((high - low) / (2 * STEPS)).astype(np.float32)
        return cls(scale, ((high + low) / 2).astype(np.float32), dtype)

    @classmethod
    def load(cls, folder: Place, spec: Spec) -> Quantiser:
        """The arrays in an identity's folder. CorruptSegment if they are not those that its spec tells of."""
        size = max(1, spec.dim or 0)
        try:
            arrays = [(folder / name / "c" / "0").read_bytes() for name in ("scale", "offset")]
        except FileNotFoundError:
            arrays = []
        if [len(data) for data in arrays] != [4 * size, 4 * size] or _digest(arrays) != spec.settings["scale"]:
            raise CorruptSegment(
                f"{folder}: its arrays scale and offset are missing or changed; without them nothing tells the values. "
                "Put both back from a copy of the store, or let them be worked out anew: featstore pack STORE NAME "
                "--codec int8 --replace")
        scale, offset = (np.frombuffer(data, "<f4") for data in arrays)
        return cls(scale, offset, np.dtype(spec.settings["dtype"]))

    def save(self, folder: Place, spec: Spec) -> None:
        """Put the arrays into the folder of the identity that has this spec, durably, unless they are there."""
        with contextlib.suppress(CorruptSegment):
            self.load(folder, spec)
            return
        staged = storage.staging(folder)
        for name in ("scale", "offset"):
            put_plain(staged / name, getattr(self, name).astype("<f4"), ["channel"])
            storage.sync_tree(folder / name)
        storage.sync_folder(folder)
        storage.upload(staged, folder)
        storage.unstage(staged, folder)

    def spec(self, source: Spec) -> Spec:
        """What a feature is made of that holds `source`'s values so."""
        digest = _digest([array.astype("<f4").tobytes() for array in (self.scale, self.offset)])
        return Spec(made_by=MADE_BY, version=VERSION, kind=source.kind, frame_rate=source.frame_rate,
                    sample_rate=source.sample_rate, centre_s=source.centre_s, dim=source.dim, dtype="int8",
                    settings={"of": source.to_json(), "dtype": self.dtype.name, "scale": digest}, pad=source.pad,
                    source=source.identity)

    def encode(self, block: np.ndarray) -> np.ndarray:
        """Values (n, D) or (n,) as int8. Outside if one of them is out of range: none is ever cut off."""
        steps = np.rint((block.astype(np.float32, copy=False) - self.offset) / self.scale)
        if steps.size and max(steps.max(), -steps.min()) > STEPS:
            at = int(np.abs(steps).argmax())
            channel = at % len(self.scale)
            reach = STEPS * float(self.scale[channel])
            middle = float(self.offset[channel])
            raise Outside(channel, float(block.reshape(-1)[at]), middle - reach, middle + reach)
        return steps.astype(np.int8)

    def decode(self, stored: np.ndarray, out: np.ndarray) -> None:
        """Fill `out` with the values of int8, (n, D) or (n,)."""
        values = np.multiply(stored, self.scale, dtype=np.float32)
        values += self.offset
        out[...] = values


def is_int8(spec: Spec) -> bool:
    """Whether a feature was made here."""
    return spec.made_by == MADE_BY and "of" in spec.settings


def check(name: str, spec: Spec) -> None:
    """BadRequest where a feature cannot be had as int8."""
    if is_int8(spec):
        raise BadRequest(f"{name} is int8 already; to bring it up to date, name the feature that it was made "
                         f"of: {name.removesuffix(SUFFIX)}")
    if spec.kind in _REFUSED:
        raise BadRequest(f"{name} is of kind {spec.kind}, which int8 would spoil: {_REFUSED[spec.kind]}. "
                         "--codec zstd and pcodec lose nothing")
    if np.dtype(spec.dtype).kind != "f":
        raise BadRequest(f"{name} is {spec.dtype}; int8 takes floats. --codec zstd and pcodec lose nothing")


def _digest(arrays: list[bytes]) -> str:
    return "sha256:" + hashlib.sha256(b"".join(arrays)).hexdigest()
