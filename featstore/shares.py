"""How processes share one corpus: shards, which each of them can tell alone, or notes of who is at what.

Notes are hints: without them, or with wrong ones, work is done twice and nothing else happens. Two processes that make
the same array write the same bytes, and either row may answer.
"""

from __future__ import annotations

import base64
import contextlib
import heapq
import json
import os
import random
import re
import socket
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from . import storage
from .corpus import Corpus
from .errors import BadRequest, CorruptSegment, FeatstoreError
from .plan import LONG_S, Plan, estimated_s, told_s
from .segment import REMOVED, key_hashes
from .storage import Place
from .store import Collection, Store
from .work import Task

TOGETHER = 20  # cuts of one recording stay in one shard up to this part of it, as each shard hashes the whole file
BUNDLE_S, BUNDLE = 8.0, 4  # audio and utterances that go to a worker at once: short ones cost more to send than to do
FIRST, MOST = 16, 8192  # utterances in the first block, and in any
BLOCK_S = (1.0, 4.0)    # a block that lasts less is followed by a larger one, one that lasts more by a smaller
LOOK_S = 20.0           # between two looks at the commits while there is nobody else
BEAT_S = 5.0            # between two writings of a note
EXPIRY_S = 120.0        # a note from another machine that is older stands for a process that is dead
STUCK_S = 1200.0        # and one of a process that is there, for one that is stopped or hangs
APART_S = 0.05          # at most between giving a block up and looking for another
TRIES = 8
SUFFIX = "note.json"


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


class Share:
    """What of a plan this process does next, beside others that extract from the same corpus into the same store.

    Before each block of tasks it reads the notes of the others, then what was committed, and takes what nobody is at.
    Alone it goes through the plan from its start; beside others it begins at random places, and whoever finds, after
    noting a block, that another noted a part of it too gives that part up: they meet again elsewhere. A block is noted
    until its rows are committed. A note that is not renewed for a while, or whose process is gone, does not count.
    """

    def __init__(self, todo: Plan, store: Store, name: str, part: tuple[int, int] | None = None) -> None:
        self.plan, self._todo, self._order = todo, todo.todo.copy(), todo.order()
        self._columns = {feature: column for column, feature in enumerate(todo.features)}
        self._drawn = np.zeros_like(self._todo)              # given out by `bundles`
        self._noted = np.zeros(len(self._todo), bool)        # given out, and neither committed nor given up
        self._held = np.zeros(len(self._todo), bool)         # noted by others
        self._rank = np.full(len(self._todo), -1)
        self._rank[self._order] = np.arange(len(self._order))
        self._sorted = np.argsort(todo.hashes[:, 0], kind="stable")
        self._hashes = todo.hashes[self._sorted, 0]
        identities = [item.spec.identity[:16] for item in todo.features.values()]
        self._notes = Notes(store.path / "spool", name, identities, part)
        self._folders = [store.path / "features" / item.name / item.spec.identity[:16]
                         for item in todo.features.values()]
        self._seen = [set(todo.seen[feature]) for feature in todo.features]
        self._random = random.Random(name)
        self._size, self._next, self._others = FIRST, 0, 0
        self._claimed_at = self._looked_at = -np.inf
        self.elsewhere, self.elsewhere_s = 0, 0.0  # utterances that other processes did, and their audio

    def bundles(self, names: Sequence[str], *, patient: bool) -> Iterator[list[Task] | None]:
        """Tasks for the features `names`, a few at a time; with `patient` None while all that is left is others' work,
        which may yet fall to this process.
        """
        columns = np.zeros(self._todo.shape[1], bool)
        columns[[self._columns[name] for name in names]] = True
        while len(self._order):
            block = self._claim(columns)
            if len(block):
                yield from _bundled([self._task(i, columns) for i in block.tolist()])
            elif not patient or not self._wanted(columns).any():
                return
            else:
                yield None

    def gave_up(self, key: str, names: Container[str | None]) -> None:
        """These features of an utterance cannot be had; None: none of it."""
        hashes = np.array([key_hashes(key)], [("hash", "<u8"), ("tag", "<u8")])
        at = self._positions(hashes)
        columns = [column for name, column in self._columns.items() if name in names or None in names]
        for i in at[at >= 0].tolist():
            self._todo[i, columns] = False
            self._noted[i] &= self._todo[i].any()

    def settled(self) -> None:
        """All that was given out is committed or has failed."""
        if self._noted.any():
            self._noted[:] = False
            self._note()

    def beat(self) -> None:
        """Show that this process is alive, if it is time to."""
        if time.monotonic() - self._notes.written >= BEAT_S and len(self._order):
            self._note()

    def close(self) -> None:
        self._notes.remove()

    def _claim(self, columns: np.ndarray) -> np.ndarray:
        """The positions of a block that nobody else is at, noted; empty if there is none now."""
        for _ in range(TRIES):
            others = self._look()
            waiting = self._order[(self._wanted(columns) & ~self._held)[self._order]]
            if not len(waiting):
                break
            block = self._block(waiting, others)
            self._noted[block] = True
            self._note()
            if self._read():
                lost = self._held[block]
                if lost.any():
                    self._noted[block[lost]] = False
                    self._note()
                    time.sleep(self._random.random() * APART_S)
                    block = block[~lost]
            if len(block):
                self._drawn[np.ix_(block, columns)] = True
                return block
        return np.zeros(0, int)

    def _block(self, waiting: np.ndarray, others: int) -> np.ndarray:
        """Of what is waiting, as many as take some seconds; beside others on from the last block, or anywhere."""
        now = time.monotonic()
        if now - self._claimed_at < BLOCK_S[0]:
            self._size = min(2 * self._size, MOST)
        elif now - self._claimed_at > BLOCK_S[1] and np.isfinite(self._claimed_at):
            self._size = max(1, self._size // 2)
        self._claimed_at = now
        size, first = self._size, 0
        if others:
            size = min(size, max(1, len(waiting) // (2 * (others + 1))))  # less and less, so that all end together
            first = int(np.searchsorted(self._rank[waiting], self._next))
            if first == len(waiting) or self._rank[waiting[first]] != self._next:
                long = int((self.plan.seconds[waiting] > LONG_S).sum())
                first = self._random.randrange(long or len(waiting))
        block = waiting[first:first + size]
        self._next = int(self._rank[block[-1]]) + 1
        return block

    def _wanted(self, columns: np.ndarray) -> np.ndarray:
        """Which utterances have something to do that was not given out."""
        wanted: np.ndarray = (self._todo & ~self._drawn & columns).any(axis=1)
        return wanted

    def _task(self, position: int, columns: np.ndarray) -> Task:
        wanted = self._todo[position] & columns
        return self.plan.task(position, tuple(name for name, column in self._columns.items() if wanted[column]))

    def _look(self) -> int:
        """Read the notes, then what was committed (in this order: a block is noted until then). How many others."""
        before, self._others = self._others, self._read()
        if self._others or before or time.monotonic() - self._looked_at > LOOK_S:
            self._looked_at = time.monotonic()
            self._read_commits()
        return self._others

    def _read(self) -> int:
        notes = self._notes.read()
        self._held[:] = False
        for hashes in notes:
            at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
            self._held[self._sorted[at[self._hashes[at] == hashes]]] = True
        return len(notes)

    def _read_commits(self) -> None:
        """Take off the list what was committed since, by whomever."""
        before = self._todo.any(axis=1)
        for column, folder in enumerate(self._folders):
            for segment in Collection(folder).segments:
                if segment.id in self._seen[column]:
                    continue
                self._seen[column].add(segment.id)
                try:
                    records = segment.records
                except (CorruptSegment, OSError):
                    continue  # merged into another meanwhile, or damaged: then it is done again
                records = records[(records["flags"] & REMOVED) == 0]
                at = self._positions(records)
                records, at = records[at >= 0], at[at >= 0]
                self._todo[at[self.plan.done_by(records, at)], column] = False
        after = self._todo.any(axis=1)
        self._noted &= after
        theirs = before & ~after & ~self._drawn.any(axis=1)
        self.elsewhere += int(theirs.sum())
        self.elsewhere_s += float(self.plan.seconds[theirs].sum())

    def _positions(self, records: np.ndarray) -> np.ndarray:
        """Where the utterance of each record stands in the plan; -1 where it does not."""
        at = np.searchsorted(self._hashes, records["hash"])
        at = self._sorted[np.minimum(at, len(self._hashes) - 1)]
        same = (self.plan.hashes[at] == np.stack([records["hash"], records["tag"]], axis=1)).all(axis=1)
        return np.where(same, at, -1)

    def _note(self) -> None:
        self._notes.write(self.plan.hashes[self._noted, 0])


class Notes:
    """What this process is at, in a file beside those of others: hashes of utterances whose rows are not committed yet.

    part: the shard it does; what other shards of as many do is not looked at, so that many can run.

    Files are written in place and always read anew: on a file system that keeps names and times of other machines'
    files for a while (NFS) contents are seen at once. Who sees half of one tries again.
    """

    def __init__(self, folder: Place, name: str, features: Sequence[str], part: tuple[int, int] | None) -> None:
        self._part, self._features = part, list(features)
        self.path = folder / (f"{name}.{part[0]}-of-{part[1]}.{SUFFIX}" if part else f"{name}.{SUFFIX}")
        self.written = -np.inf
        self._known: dict[str, _Note] = {}

    def write(self, hashes: np.ndarray) -> None:
        """Say what this process is at. A store's folder that cannot be written to is told when rows are."""
        self.written = time.monotonic()
        text = json.dumps({"host": _host(), "pid": os.getpid(), "features": self._features,
                           "utterances": base64.b64encode(hashes.astype("<u8").tobytes()).decode()})
        with contextlib.suppress(OSError, FeatstoreError):
            storage.overwrite(self.path, text.encode())

    def read(self) -> list[np.ndarray]:
        """Of each other process that is alive and makes one of these features: the hashes of what it is at."""
        found: list[np.ndarray] = []
        with contextlib.suppress(OSError, FeatstoreError):
            there = {place.name: place for place in self.path.parent.iterdir() if self._concerns(place.name)}
            mine = there.pop(self.path.name, None)
            now = mine.lstat().st_mtime if mine is not None else None
            for name in self._known.keys() - there.keys():
                del self._known[name]
            notes = storage.concurrently(self.path.parent, self._note, there.values())
            for place, note in zip(there.values(), notes, strict=True):
                if note is not None and note.features & set(self._features) and self._alive(place, note, now):
                    found.append(note.utterances)
        return found

    def remove(self) -> None:
        with contextlib.suppress(OSError, FeatstoreError):
            self.path.unlink(missing_ok=True)
            storage.remove_if_empty(self.path.parent)

    def _concerns(self, name: str) -> bool:
        if not name.endswith(SUFFIX):
            return False
        found = re.search(r"\.(\d+)-of-(\d+)\.", name)
        theirs = (int(found[1]), int(found[2])) if found else None
        return self._part is None or theirs is None or theirs[1] != self._part[1] or theirs == self._part

    def _note(self, place: Place) -> _Note | None:
        for _ in range(TRIES):
            try:
                self._known[place.name] = _Note.read(place.read_bytes())
                break
            except FileNotFoundError:
                return None
            except (OSError, FeatstoreError, ValueError, TypeError, KeyError):  # half written, or no note
                time.sleep(0.001)
        return self._known.get(place.name)

    def _alive(self, place: Place, note: _Note, now: float | None) -> bool:
        """Whether its process still runs: looked up on this machine, told by the age of its note from another.

        now: when this process wrote its own. Ages are differences between times that one file system gave, whatever
        the machines' clocks say.
        """
        with contextlib.suppress(FileNotFoundError):
            age = now - place.lstat().st_mtime if now is not None else 0.0
            if note.host != _host():
                return age < EXPIRY_S
            if _runs_here(note.pid):
                return age < STUCK_S
            place.unlink(missing_ok=True)
        return False


@dataclass(frozen=True)
class _Note:
    """host, pid: of the process. features: identities it makes. utterances: hashes of what it is at."""

    host: str
    pid: int
    features: frozenset[str]
    utterances: np.ndarray

    @classmethod
    def read(cls, text: bytes) -> _Note:
        """ValueError, KeyError or TypeError for what is none."""
        record = json.loads(text)
        hashes = np.frombuffer(base64.b64decode(record["utterances"]), "<u8")
        return cls(record["host"], int(record["pid"]), frozenset(record["features"]), hashes)


def _host() -> str:
    """Names what process numbers are unique in."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    return socket.gethostname()


def _runs_here(pid: int) -> bool:
    if os.name == "nt":
        return True  # os.kill would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _bundled(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    bundle: list[Task] = []
    for task in tasks:
        bundle.append(task)
        if len(bundle) == BUNDLE or sum(one.seconds for one in bundle) >= BUNDLE_S:
            yield bundle
            bundle = []
    if bundle:
        yield bundle
