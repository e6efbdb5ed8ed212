"""Batches for training: random crops, and whole utterances of about one length. Batch i is a pure function of i.

It depends on the seed, on i and on what the view serves, and on nothing else: there is no state to save, a position is
one integer, and any number of workers or ranks gives the same batches, since a batch is drawn first and cut into ranks
afterwards. Numbers come from numpy's Philox, a generator that counts instead of remembering: its raw bits, which do not
change with numpy's version.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from .errors import BadRequest, PositionMismatch, nearest
from .view import Batch, View

UTTERANCE, SPEAKER = "utterance_index", "speaker_index"  # no feature can have these names: they hold an underscore
NEAR = 0.8  # a bucket's shortest utterance beside its longest: at most a fifth is padding, a tenth on average
_CROPS, _ORDER = 1, 2  # what is drawn: each has numbers of its own


@dataclass(frozen=True)
class _Rows:
    """What a batch is made of: the view's utterances by number, where each row starts, how many frames a row has."""

    numbers: np.ndarray
    starts: np.ndarray
    frames: int


class Batches:
    """A sequence of batches without an end. `batches[i]` is a dict of arrays: the view's features, and

    lengths: (B,) frames of each row that are of its utterance; what follows them is the feature's pad value.
    utterance_index, speaker_index: (B,) places in `utterances` and `speakers`; -1 for a speaker that is not known.

    per_epoch: batches in which every utterance comes once, for `whole`; None for `crops`.
    """

    def __init__(self, view: View, plan: _Crops | _Whole, speakers: Sequence[str | None]) -> None:
        self.view, self._plan = view, plan
        self.utterances = list(view)
        self.speakers = sorted({speaker for speaker in speakers if speaker is not None})
        self._speaker = _places(speakers, self.speakers)
        self.snapshot = view.snapshot

    @property
    def per_epoch(self) -> int | None:
        return self._plan.per_epoch

    def items(self, i: int, *, rank: int = 0, world: int = 1) -> list[tuple[str, int]]:
        """(utterance, first frame) of each row of batch i, or of the part of it that is rank's of `world`."""
        return self._items(self._rows(i, rank, world))

    def room(self, i: int, *, rank: int = 0, world: int = 1) -> Batch:
        """Arrays for batch i, not filled: what `read` takes as `out`."""
        rows = self._rows(i, rank, world)
        size = len(rows.numbers)
        return self.view.room(size, rows.frames) | {UTTERANCE: np.empty(size, np.int64),
                                                    SPEAKER: np.empty(size, np.int64)}

    def read(self, i: int, *, rank: int = 0, world: int = 1, out: Batch | None = None) -> Batch:
        """Batch i, or the part of it that is rank's of `world`: rows in order, of the whole batch's number of frames.

        out: arrays of an earlier batch of that shape, to be written over.
        """
        rows = self._rows(i, rank, world)
        found = self.view.read_batch(self._items(rows), frames=rows.frames, out=out)
        for name, values in ((UTTERANCE, rows.numbers), (SPEAKER, self._speaker[rows.numbers])):
            if out is None:
                found[name] = values
            else:
                found[name][:] = values
        return found

    def check(self, rank: int, world: int) -> None:
        """BadRequest where batches cannot be cut into `world` ranks, or there is no such rank."""
        if not 0 <= rank < world:
            raise BadRequest(f"rank {rank} of {world}: expected 0 to {max(world, 1) - 1}")
        self._plan.check(world)

    def position(self, i: int) -> dict[str, Any]:
        """What to save with a model, as JSON: the number of the next batch, and what batches these are."""
        return {"batch": i, "settings": self._plan.settings, "snapshot": self.snapshot}

    def resume(self, position: Mapping[str, Any]) -> int:
        """The number of the next batch of a position saved before.

        Raises:
            PositionMismatch: names the settings, features and utterances that are not as they were.
        """
        try:
            found, settings, snapshot = int(position["batch"]), position["settings"], position["snapshot"]
            differs = [*_differing(settings, self._plan.settings), *_differing(snapshot, self.snapshot)]
        except (KeyError, TypeError, AttributeError, ValueError):
            raise BadRequest(f"{position!r} is no position: expected what batches.position(i) gave") from None
        if differs:
            raise PositionMismatch(
                f"the position (batch {found:,}) is one of other batches: {'; '.join(differs)}. Batch {found:,} would "
                "not go on from there. Make the view and the batches as they were (a feature pinned as NAME@IDENTITY, "
                "split=, utterances=), or start at a number of your choice")
        return found

    def __getitem__(self, i: int) -> Batch:
        return self.read(i)

    def __iter__(self) -> Iterator[Batch]:
        return (self.read(i) for i in count())

    def __repr__(self) -> str:
        of, *settings = self._plan.settings.items()
        given = ", ".join(f"{name}={value!r}" for name, value in settings if value is not None)
        return f"<Batches: {of[1]} of {self.view!r}, {given}>"

    def _items(self, rows: _Rows) -> list[tuple[str, int]]:
        return [(self.utterances[number], start)
                for number, start in zip(rows.numbers.tolist(), rows.starts.tolist(), strict=True)]

    def _rows(self, i: int, rank: int, world: int) -> _Rows:
        if i < 0:
            raise IndexError(f"batch {i}: batches are counted from 0")
        if (rank, world) == (0, 1):
            return self._plan.rows(i)
        self.check(rank, world)
        rows = self._plan.rows(i)
        size = len(rows.numbers)
        part = slice(size * rank // world, size * (rank + 1) // world)
        return _Rows(rows.numbers[part], rows.starts[part], rows.frames)


def crops(view: View, *, frames: int = 512, batch: int = 32, seed: int = 0, balance: str | None = None,
          weights: Mapping[str, float] | None = None) -> Batches:
    """Random crops of `frames` frames, `batch` to a batch: `b["f0"]` (B, T), `b["log-mel"]` (B, T, D).

    Every second of singing is as likely as any other: an utterance is drawn by its length, and a crop begins anywhere
    in it with equal chance. One that is shorter than a crop counts as one crop and is padded.
    balance: a field of the utterances: "speaker", "corpus", "language", "kind", or one of the corpus' own. Its values
        are then equally likely, and within each of them every second is.
    weights: of the values of `balance`, how likely they are beside the others; 1 where nothing is said.
    """
    if frames < 1 or batch < 1:
        raise BadRequest(f"frames={frames}, batch={batch}: expected at least one frame and one crop")
    if weights is not None and balance is None:
        raise BadRequest("weights are of the values of a field: say which, as in balance='speaker'")
    there = _there(view, seed)
    speakers, labels = _described(view, balance)
    if balance is not None:
        _check_known(view, there, labels, balance)
    settings = {"of": "crops", "frames": int(frames), "batch": int(batch), "seed": int(seed), "balance": balance,
                "weights": {name: float(value) for name, value in sorted(weights.items())} if weights else None}
    names = sorted({label for label in labels if label is not None})
    places = _places(labels, names)[there]
    present, groups = np.unique(places, return_inverse=True)
    shares = _shares([names[place] for place in present.tolist()], weights or {}, balance)
    return Batches(view, _Crops(view.lengths, there, groups, shares, settings), speakers)


def whole(view: View, *, batch_frames: int = 20_000, seed: int = 0) -> Batches:
    """Whole utterances, of about one length in each batch, with at most `batch_frames` frames, padding included.

    Every utterance comes once in an epoch of `per_epoch` batches: batch i is of epoch i // per_epoch. Which utterances
    come together and the order of the batches change with each epoch; how many there are does not.

    Raises:
        BadRequest: an utterance alone has more frames than that.
    """
    there = _there(view, seed)
    most, over = int(view.lengths.max()), int((view.lengths > batch_frames).sum())
    if over:
        key = list(view)[int(view.lengths.argmax())]
        raise BadRequest(f"{key} alone has {most:,} frames, more than batch_frames={batch_frames:,} ({over:,} of "
                         f"{len(view):,} utterances have): give batch_frames={most} or more, leave them out "
                         "(utterances=...), or take fs.crops")
    settings = {"of": "whole", "batch_frames": int(batch_frames), "seed": int(seed)}
    return Batches(view, _Whole(view.lengths, there, settings), _described(view, None)[0])


class _Crops:
    """An utterance by the length of what a crop may show of it, within a group by its share."""

    per_epoch: None = None

    def __init__(self, lengths: np.ndarray, there: np.ndarray, groups: np.ndarray, shares: np.ndarray,
                 settings: dict[str, Any]) -> None:
        self.settings, self._lengths = settings, lengths
        order = np.argsort(groups, kind="stable")
        self._numbers = there[order]
        # max(): what is shorter than a crop is seen whole each time, so one crop's worth makes its frames as likely
        self._ends = np.cumsum(np.maximum(lengths[self._numbers], settings["frames"]))
        last = np.searchsorted(groups[order], np.arange(len(shares)), side="right") - 1
        self._upto = np.append(0, self._ends[last])   # of each group and those before it
        self._shares = np.cumsum(shares / shares.sum())

    def rows(self, i: int) -> _Rows:
        frames, size = self.settings["frames"], self.settings["batch"]
        which, where, start = _uniform(self.settings["seed"], i, _CROPS, 3 * size).reshape(3, size)
        group = np.minimum(np.searchsorted(self._shares, which, side="right"), len(self._shares) - 1)
        first, last = self._upto[group], self._upto[group + 1]
        numbers = self._numbers[np.searchsorted(self._ends, first + _below(where, last - first), side="right")]
        room = np.maximum(self._lengths[numbers] - frames, 0) + 1
        return _Rows(numbers, _below(start, room), frames)

    def check(self, world: int) -> None:
        size = self.settings["batch"]
        if size % world:
            raise BadRequest(f"batch={size} cannot be cut into {world} equal ranks: give a multiple of {world}")


class _Whole:
    """Utterances by length in buckets; within each, batches of nearly equal numbers of rows."""

    def __init__(self, lengths: np.ndarray, there: np.ndarray, settings: dict[str, Any]) -> None:
        self.settings, self._lengths = settings, lengths
        self._numbers = there[np.argsort(-lengths[there], kind="stable")]  # the longest first
        sizes = self._buckets(lengths[self._numbers], settings["batch_frames"])
        self._bucket = np.repeat(np.arange(len(sizes)), [sum(bucket) for bucket in sizes])
        self._bounds = np.append(0, np.cumsum([size for bucket in sizes for size in bucket]))
        self.per_epoch: int = len(self._bounds) - 1
        self._drawn: tuple[int, np.ndarray, np.ndarray] | None = None  # the order of an epoch, kept for its batches

    def rows(self, i: int) -> _Rows:
        epoch, place = divmod(i, self.per_epoch)
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = self._draw(epoch)
        _, numbers, batches = self._drawn
        batch = batches[place]
        chosen = numbers[self._bounds[batch]:self._bounds[batch + 1]]
        return _Rows(chosen, np.zeros(len(chosen), np.int64), int(self._lengths[chosen].max()))

    def check(self, world: int) -> None:
        least = int(np.diff(self._bounds).min())
        if least < world:
            budget = self.settings["batch_frames"]
            raise BadRequest(f"batch_frames={budget:,}: some batches have {least} utterance{'s' * (least != 1)} only, "
                             f"too few for {world} ranks: give {math.ceil(budget * 2 * world / least)} or so, or "
                             "fewer ranks")

    def _draw(self, epoch: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The utterances of an epoch, bucket by bucket, and the order of its batches."""
        count = len(self._numbers)
        bits = _bits(self.settings["seed"], epoch, _ORDER, count + self.per_epoch)
        return (epoch, self._numbers[np.lexsort((bits[:count], self._bucket))],
                np.argsort(bits[count:], kind="stable"))

    @staticmethod
    def _buckets(lengths: np.ndarray, budget: int) -> list[list[int]]:
        """Rows of each batch, by bucket. `lengths` descends.

        A bucket has a full batch at least, and what could not fill a batch of its own joins the bucket before.
        """
        found, first, total = [], 0, len(lengths)
        while first < total:
            rows = budget // int(lengths[first])
            last = int(np.searchsorted(-lengths, -NEAR * lengths[first], side="right"))
            last = min(max(last, first + rows), total)
            if last < total and total - last < budget // int(lengths[last]):
                last = total
            batches = -(-(last - first) // rows)
            bounds = [(last - first) * k // batches for k in range(batches + 1)]
            found.append([bounds[k + 1] - bounds[k] for k in range(batches)])
            first = last
        return found


def _bits(seed: int, i: int, what: int, size: int) -> np.ndarray:
    """(size,) random uint64."""
    return np.random.Philox(key=np.array([seed, i], np.uint64), counter=[0, 0, 0, what]).random_raw(size)


def _uniform(seed: int, i: int, what: int, size: int) -> np.ndarray:
    """(size,) random numbers in [0, 1)."""
    return (_bits(seed, i, what, size) >> np.uint64(11)) * 2.0**-53


def _below(uniform: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Whole numbers in [0, limit)."""
    return np.minimum((uniform * limit).astype(np.int64), limit - 1)


def _there(view: View, seed: int) -> np.ndarray:
    """The utterances that have frames, by number."""
    if not 0 <= seed < 1 << 64:
        raise BadRequest(f"seed={seed}: expected 0 or more, below 2^64")
    there = np.flatnonzero(view.lengths > 0)
    if not len(there):
        raise BadRequest(f"{view!r} has nothing to make batches of")
    return there


def _described(view: View, balance: str | None) -> tuple[list[str | None], list[str | None]]:
    """The speaker of each utterance, and its value of the field `balance` ("" where none is asked for)."""
    speakers: list[str | None] = [None] * len(view)
    labels: list[str | None] = [None if balance is not None else ""] * len(view)
    for number, facts in _facts(view):
        speakers[number] = facts.get("speaker")
        if balance is not None:
            labels[number] = _label(facts, balance)
    return speakers, labels


def _facts(view: View) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """What the store knows of the view's utterances, by their number."""
    utterances = view.store.utterances
    if len(view) * 8 < len(utterances):
        yield from ((number, vars(utterances[key])) for number, key in enumerate(view) if key in utterances)
        return
    place = {key: number for number, key in enumerate(view)}
    for facts, _ in utterances.facts():
        if facts["key"] in place:
            yield place[facts["key"]], facts


def _label(facts: Mapping[str, Any], balance: str) -> str | None:
    """The value of a field, as text; None where it has none. A corpus without that field is where it was read from."""
    value = facts.get(balance) if balance in ("speaker", "language", "kind") else None
    value = value if value is not None else facts.get("extra", {}).get(balance)
    if value is None and balance == "corpus":
        value = facts.get("root")
    return None if value in (None, "") else str(value)


def _places(labels: Sequence[str | None], names: Sequence[str]) -> np.ndarray:
    """Where each label stands in `names`; -1 for None."""
    place: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    return np.array([place.get(label, -1) for label in labels], np.int64)


def _check_known(view: View, there: np.ndarray, labels: Sequence[str | None], balance: str) -> None:
    unknown = [number for number in there.tolist() if labels[number] is None]
    if unknown:
        fields = {"speaker", "corpus", "language", "kind"} | {
            name for _, facts in _facts(view) for name in facts.get("extra", {})}
        raise BadRequest(f"balance={balance!r}: {len(unknown):,} of {len(there):,} utterances have no {balance}, such "
                         f"as {list(view)[unknown[0]]} ({nearest(balance, sorted(fields))}). Leave them out "
                         "(utterances=...), or name it when the corpus is scanned and extract again")


def _shares(names: Sequence[str], weights: Mapping[str, float], balance: str | None) -> np.ndarray:
    for name, value in weights.items():
        if name not in names:
            raise BadRequest(f"weights: no utterance has the {balance} {name!r} ({nearest(name, names)})")
        if not (value >= 0 and math.isfinite(value)):
            raise BadRequest(f"weights: {name!r} has {value}: expected 0 or more")
    shares = np.array([float(weights.get(name, 1)) for name in names])
    if not shares.sum() > 0:
        raise BadRequest("weights: all are 0; expected something to draw")
    return shares


def _differing(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, in words."""
    return [f"{name} was {saved.get(name, 'not there')}, now {now.get(name, 'not there')}"
            for name in dict.fromkeys([*saved, *now]) if saved.get(name) != now.get(name)]
