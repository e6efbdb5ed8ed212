"""Compact beside a writer and readers: every order in which their steps can come, with the code that runs outside.

Readers change nothing, so one run has a reader that opens at every point between two steps and reads at every later
one: together the runs are all orders of {compact: list, read, commit, purge}, {writer: snapshot, change, commit} and
{reader: open, read}.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featstore as fs
from featstore import storage
from featstore.compact import Compacted, compact, steps
from featstore.errors import CorruptSegment, MissingFeature, StaleFeature
from featstore.verify import verify

MEL = fs.Spec(made_by="mel", version=1, kind="continuous", frame_rate=50, dim=2, dtype="float16")
DAY = 24 * 3600.0
STAGES, CHANGES = 4, 3
State = dict[str, float]


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Durability has tests of its own; here a sync is only slow."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Path]:
    """A folder in memory where there is one: these are many small files."""
    shared = Path("/dev/shm")
    if os.access(shared, os.W_OK):
        with tempfile.TemporaryDirectory(dir=shared) as folder:
            yield Path(folder)
    else:
        yield tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def template(home) -> Path:
    """Two writers' segments of each collection; the first key was written twice."""
    store = fs.create(home / "template.zarr")
    for keys, value in (("ab", 1), ("ac", 2)):
        with store.writer() as w:
            w.declare("mel", MEL)
            for key in keys:
                w.utterance({"key": key, "speaker": "x"}, source=bytes(32), seconds=0.1)
                w.write(key, "mel", np.full((5, 2), value, np.float16))
    return store.path


def _compacting(store: fs.Store, grace_s: float, monkeypatch) -> Iterator[None]:
    """list, read, commit, purge: of the utterances and of the feature, side by side."""
    folders = [store.path / "utterances", store.features["mel"].folder]
    running = [steps(folder, Compacted(), purge=True, grace_s=grace_s) for folder in folders]
    _until(running, "list")
    yield
    _until(running, "read", rows=3)
    yield
    _until(running, "catalogue")
    yield
    if grace_s:
        _make_old(store.path, monkeypatch)
    _until(running, "")
    yield


def _until(running: list[Iterator[str]], stage: str, rows: int = 1) -> None:
    """Go on until a stage is over, or as far as it gets where another was quicker."""
    for one in running:
        left = rows
        for found in one:
            left -= found == stage
            if not left or (found == "commit" and stage == "read") or found == "catalogue":
                break


def _make_old(path: Path, monkeypatch) -> None:
    """Make what is committed two days old; what a writer is at work on stays as young as it is."""
    then, now, age = time.time() - 2 * DAY, time.time_ns(), storage.age_s
    for home in [*path.glob("utterances/segments/*-*"), *path.glob("features/*/*/segments/*-*")]:
        if (home / "zarr.json").exists():
            os.utime(home / "zarr.json", (then, then))
    monkeypatch.setattr(storage, "age_s", lambda name: age(name) + 2 * DAY * (int(name.split("-")[0], 16) < now))


def _changing(store: fs.Store, change: Callable[[Any], None]) -> Iterator[None]:
    """snapshot, change, commit; if a purge without grace took its files, once more, as its error says."""
    w = store.writer()
    w.declare("mel", MEL)
    yield
    try:
        change(w)
    except FileNotFoundError:
        w = None
    yield
    try:
        if w is None:
            raise CorruptSegment("gone")
        w.close()
    except CorruptSegment:
        for target in w._targets() if w is not None else ():
            if target.segment is not None:
                target.segment.discard()
        with store.writer() as again:
            again.declare("mel", MEL)
            change(again)
    yield


def _add(w) -> None:
    w.write("d", "mel", np.full((5, 2), 9, np.float16))


def _replace(w) -> None:
    w.write("a", "mel", np.full((5, 2), 9, np.float16))


def _delete(w) -> None:
    if "b" in w.snapshot.utterances:
        w.delete("b")  # with all features


BEFORE = {"a": 2.0, "b": 1.0, "c": 2.0}
AFTER: dict[Callable, State] = {_add: BEFORE | {"d": 9.0}, _replace: BEFORE | {"a": 9.0},
                                _delete: {"a": 2.0, "c": 2.0}}


def _state(store: fs.Store) -> State:
    feature = store.features["mel"]
    return {key: float(feature[key].read(check=True)[4, 1]) for key in feature}


class _Reader:
    """A store opened at one point, with what was true then."""

    def __init__(self, path: Path, state: State) -> None:
        self.store, self.then = fs.open(path), state

    def check(self, now: State, purged: bool) -> None:
        """What was true when it was opened; once that was removed from the disk, what is true now, or an error that
        says that it is gone."""
        feature = self.store.features["mel"]
        for key in "abcd":
            try:
                found = float(feature[key].read(check=True)[4, 1]) if key in feature else None
            except (StaleFeature, MissingFeature):
                assert purged and self.then != now
                continue
            allowed = {self.then.get(key), now.get(key)} if purged else {self.then.get(key)}
            assert found in allowed, f"{key}: {found}, expected {allowed}"


def _run(template: Path, path: Path, order: tuple[int, ...], change: Callable, grace_s: float, readers: bool,
         monkeypatch) -> None:
    shutil.copytree(template, path)
    store = fs.open(path)
    with monkeypatch.context() as patch:
        actors = [_compacting(store, grace_s, patch), _changing(fs.open(path), change)]
        done, points = [0, 0], list(range(len(order) + 1))
        waiting: dict[int, list[_Reader]] = {point: [] for point in points}
        for point in points:
            now = AFTER[change] if done[1] == CHANGES else BEFORE
            for reader in waiting[point]:
                reader.check(now, purged=done[0] == STAGES)
            for later in points[point:] if readers else ():
                waiting[later].append(_Reader(path, now))
            if point < len(order):
                next(actors[order[point]])
                done[order[point]] += 1
        fresh = fs.open(path)
        assert _state(fresh) == AFTER[change]
        assert set(fresh.utterances) == {"a", "b", "c", *AFTER[change]} - ({"b"} if change is _delete else set())
        assert verify(fresh).damages == []
        if readers:
            compact(fresh, purge=True, grace_s=0)
            assert _state(fresh) == AFTER[change] and verify(fresh).damages == []
    storage.handles.forget(str(path))
    shutil.rmtree(path)


ORDERS = [tuple(int(step not in chosen) for step in range(STAGES + CHANGES))
          for chosen in itertools.combinations(range(STAGES + CHANGES), STAGES)]


@pytest.mark.parametrize("change", [_replace, _delete], ids=["replace", "delete"])
def test_whatever_a_writer_changes_while_compact_runs_is_there_in_the_end(template, home, monkeypatch, change):
    assert len(ORDERS) == 35
    for order in ORDERS:
        _run(template, home / "s.zarr", order, change, DAY, False, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "grace_s"), [(_add, DAY), (_replace, DAY), (_delete, DAY), (_delete, 0)])
def test_readers_see_what_was_true_whenever_they_open_and_read(template, home, monkeypatch, change, grace_s):
    for order in ORDERS:
        _run(template, home / "s.zarr", order, change, grace_s, True, monkeypatch)
