"""Folding: few segments after many commits, of whatever size, and what a writer does about catalogues."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

import featstore as fs
from featstore import segment as segments
from featstore import storage
from featstore import writer as writers
from featstore.compact import compact
from featstore.index import Collection, drop_replaced
from featstore.verify import verify

MEL = fs.Spec(made_by="mel", version=1, kind="continuous", frame_rate=50, dim=3, dtype="float16")


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Durability has tests of its own; here a sync is only slow."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def store(tmp_path) -> fs.Store:
    return fs.create(tmp_path / "songs.zarr")


def _ones(frames: int = 4, value: float = 1) -> np.ndarray:
    return np.full((frames, 3), value, np.float16)


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 1 KiB instead of 128 MiB, and four segments to a fold instead of ten."""
    for module, name, size in ((segments, "INNER_BYTES", 128), (segments, "SHARD_BYTES", 1024),
                               (writers, "LINK_BYTES", 1024), (writers, "FOLD_BYTES", 512),
                               (writers, "FOLD_COUNT", 4)):
        monkeypatch.setattr(module, name, size)


SIZES = {"tiny": (1, 2), "small": (10, 40), "middle": (50, 120), "large": (200, 300)}  # frames of 8 bytes a commit


def _a_day(store, commits: int, seed: int = 0) -> dict[str, list[int]]:
    """Write features of several sizes, `commits` times. Returns the segments that counted after each commit."""
    chance, counts = np.random.default_rng(seed), {name: [] for name in SIZES}
    with store.writer(commit_every_s=1e9) as w:
        for name in SIZES:
            w.declare(name, replace(MEL, settings={"name": name}, dim=8, dtype="uint8"))
        for number in range(commits):
            for name, (low, high) in SIZES.items():
                w.write(f"k{number}", name, np.full((chance.integers(low, high), 8), number % 251, np.uint8))
            w.commit()
            for name in SIZES:
                counts[name].append(len(w._features[name].own))
    return counts


@pytest.mark.slow
def test_long_run_leaves_few_segments_of_any_size(store, small_shards):
    counts = _a_day(store, 90)
    assert max(max(few) for few in counts.values()) <= 3 * 5            # three of a class, of five classes
    for name in SIZES:
        feature = fs.open(store.path).features[name]
        assert len(drop_replaced(feature.segments)) <= 2 + 3            # the small, the linked, those between
        assert all((feature[f"k{n}"].read(check=True) == n).all() for n in range(90))
        copied = sum(s.facts["bytes"] for s in feature.segments if "links" not in s.facts)
        alive = sum(s.stored for s in drop_replaced(feature.segments))
        assert copied <= (1 if name == "large" else 5) * alive          # how often a row was written
    assert any("links" in s.facts for s in store.features["large"].segments)
    assert verify(fs.open(store.path)).damages == []


def test_linked_segment_is_plain_zarr(store, small_shards):
    _a_day(store, 12)
    index = store.features["large"].index
    record = index.find("k7")
    segment = index.segments[int(record["segment"])]
    assert "links" in segment.facts
    assert store.features["large"].nbytes == 8 * index.records["length"].sum()
    start, stop = int(record["offset"]), int(record["offset"] + record["length"])
    array = zarr.open_array(str(segment.folder / "frames"), mode="r")
    assert (array[start:stop] == 7).all() and array.shape[0] > segment.facts["frames"]
    tensor = tensorstore.open({"driver": "zarr3", "kvstore": {
        "driver": "file", "path": str(segment.folder / "frames")}}).result()
    assert np.array_equal(tensor.read().result(), array[:])


def test_what_was_removed_from_linked_shards_is_erased_by_compact(store, small_shards):
    _a_day(store, 12)
    with store.writer() as w:
        w.delete("k7")
    compact(store, purge=True, grace_s=0)
    found = fs.open(store.path).features["large"]
    assert sorted(found) == sorted(f"k{n}" for n in range(12) if n != 7)
    assert all((found[key].read(check=True) == int(key[1:])).all() for key in found)
    assert not any(bytes([7]) * 200 in path.read_bytes() for path in store.path.rglob("*") if path.is_file())


def test_file_system_without_hard_links_keeps_its_segments(store, small_shards, monkeypatch):
    def refuse(*names: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no hard links here")

    with store.writer() as w:
        w.declare("large", MEL)                                         # documents are created by links too
        monkeypatch.setattr(Path, "hardlink_to", refuse)
        for number in range(12):
            w.write(f"k{number}", "large", _ones(200, number))
            w.commit()
    feature = store.features["large"]
    assert len(feature.segments) == 12 and [feature[f"k{n}"][0, 0] for n in range(12)] == list(range(12))
    assert sorted(p.name for p in (feature.folder / "segments").glob("*-*")) == [s.id for s in feature.segments]


def test_segments_that_somebody_else_compacted_are_not_folded_again(store):
    with store.writer() as w:
        w.declare("x", MEL)
        for number in range(3):
            w.write(f"k{number}", "x", _ones(value=number))
            w.commit()
        parts = fs.open(store.path).features["x"].segments
        compacted = segments.SegmentWriter(parts[0].folder.with_name(storage.new_id()), "float16", 3)
        for part in parts[:2]:
            compacted.extend(part, part.records)
        compacted.commit({"spec": MEL.to_json(), "replaces": [part.id for part in parts[:2]]})
        for part in parts[:2]:
            shutil.rmtree(part.folder)
    assert [store[f"k{number}", "x"][0, 0] for number in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(("rows", "more", "written"), [(40, 1, True), (200, 5, False), (200, 30, True)])
def test_large_catalogue_is_written_anew_when_much_is_new(store, monkeypatch, rows, more, written):
    for name, value in (("CATALOGUE_ROWS", 10), ("CATALOGUE_CHEAP", 100)):
        monkeypatch.setattr(writers, name, value)
    spec = replace(MEL, dim=1, dtype="uint8")
    for first, stop in ((0, rows), (rows, rows + more)):
        with store.writer() as w:
            w.declare("x", spec)
            for number in range(first, stop):
                w.write(f"k{number}", "x", np.ones((1, 1), np.uint8))
    catalogue = Collection(store.features["x"].folder).catalogue
    assert catalogue.rows == rows + more * written and len(store.features["x"]) == rows + more
