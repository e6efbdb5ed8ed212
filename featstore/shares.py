"""How processes share one corpus: shards, which each of them can tell alone."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator

import numpy as np

from .corpus import Corpus
from .errors import BadRequest
from .plan import estimated_s, told_s

TOGETHER = 20  # cuts of one recording stay in one shard up to this part of it, as each shard hashes the whole file


def shard_named(text: str) -> tuple[int, int]:
    """"2/16" -> (2, 16): the second of sixteen shards. BadRequest for anything else, shard 0 among it."""
    found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if found is None:
        raise BadRequest(f"shard {text!r}: expected i/n, such as 2/16 for the second of 16")
    number, count = int(found[1]), int(found[2])
    _check_shard(number, count)
    return number, count


def shard(corpus: Corpus, number: int, count: int) -> Corpus:
    """The part of a corpus that shard `number` of `count` extracts; shards are numbered from 1.

    Shards are disjoint, together they are the whole, and their durations are about equal. They depend on the corpus
    alone, not on what is stored already, so that jobs which start at different times agree: utterances are dealt out
    from the longest to the shortest, each to the shard that has least so far. How long one is is what the manifest
    says, else what its file's header says (of more than 5,000 files, a sample's; sizes tell the others). Cuts of one
    recording stay together in runs of up to a twentieth of a shard.

    Raises:
        BadRequest: for a number that is not within 1 to `count`.
    """
    _check_shard(number, count)
    if count == 1:
        return corpus
    groups = list(_runs(corpus, _milliseconds(corpus), count))
    owners = _dealt([length for _, length in groups], count)
    mine = (group for (group, _), owner in zip(groups, owners, strict=True) if owner == number - 1)
    positions = sorted(i for group in mine for i in group)
    return Corpus(corpus.root, corpus.name, tuple(corpus.utterances[i] for i in positions),
                  corpus.problems[number - 1::count])


def _check_shard(number: int, count: int) -> None:
    if count < 1:
        raise BadRequest(f"shard {number}/{count}: there is at least one shard; expected i/n, such as 2/16")
    if not 1 <= number <= count:
        raise BadRequest(f"shard {number}/{count}: shards are numbered from 1 to {count}"
                         + (f"; give a job array the numbers 1-{count}" if number == 0 else ""))


def _milliseconds(corpus: Corpus) -> list[int]:
    """How long each utterance is: whole numbers, whose sums are the same on every machine."""
    told = [told_s(utterance) for utterance in corpus]
    unknown = [i for i, seconds in enumerate(told) if seconds is None]
    seconds = np.array([length or 0.0 for length in told])
    seconds[unknown] = estimated_s(corpus, unknown)
    lengths: list[int] = np.rint(seconds * 1000).astype(np.int64).tolist()
    return lengths


def _runs(corpus: Corpus, lengths: list[int], count: int) -> Iterator[tuple[list[int], int]]:
    """Positions that one shard takes together and how long they are: whole recordings alone, runs of one's cuts."""
    most = sum(lengths) // (count * TOGETHER)
    cuts: dict[str, list[int]] = {}
    for i, utterance in enumerate(corpus):
        if utterance.start_s or utterance.end_s is not None:
            cuts.setdefault(utterance.audio, []).append(i)
        else:
            yield [i], lengths[i]
    for positions in cuts.values():
        run, length = [positions[0]], lengths[positions[0]]
        for i in positions[1:]:
            if length + lengths[i] > most:
                yield run, length
                run, length = [], 0
            run.append(i)
            length += lengths[i]
        yield run, length


def _dealt(lengths: list[int], count: int) -> list[int]:
    """Which of `count` shards takes each: from the longest on, always the one with least; equal ones in order."""
    owners = [0] * len(lengths)
    loads = [(0, 0, number) for number in range(count)]  # milliseconds, groups, shard
    for i in np.argsort(-np.array(lengths, np.int64), kind="stable").tolist():
        load, groups, number = loads[0]
        owners[i] = number
        heapq.heapreplace(loads, (load + lengths[i], groups + 1, number))
    return owners
