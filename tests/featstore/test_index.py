"""Which row answers for a key: against a plain loop over the rows, with colliding hashes and with catalogues."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featstore import index as indexes
from featstore import segment as segments
from featstore.index import Collection, Index, drop_catalogues, hash_keys, merge, read_catalogue, write_catalogue
from featstore.segment import REMOVED, Segment, SegmentWriter, key_hashes
from featstore.storage import new_id

KEYS = ["a", "b", "c", "d", "ä/b", "../x"]
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROW = st.tuples(st.sampled_from(KEYS), st.integers(1, 4), st.sampled_from(["row", "row", "tombstone"]),
                st.integers(0, 2))                                       # key, generation, what, audio
SEGMENTS = st.lists(st.lists(ROW, min_size=1, max_size=5, unique_by=lambda row: row[:2]), max_size=5)


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Durability has tests of its own; here a sync is only slow."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def _fresh(tmp_path: Path) -> Path:
    folder = tmp_path / new_id()
    folder.mkdir()
    return folder


def _source(audio: int) -> bytes:
    return bytes([audio]) * 32


def _write(folder: Path, rows, replaces=()) -> Segment:
    """A segment whose row of (key, generation, audio) holds one number that tells it from all others."""
    writer = SegmentWriter(folder / "segments" / new_id(), "int32", 0)
    for key, generation, what, audio in rows:
        if what == "tombstone":
            writer.remove(key, generation=generation)
        else:
            writer.append(key, [np.array([generation * 100 + audio], np.int32)], generation=generation,
                          source=_source(audio))
    writer.commit({"replaces": list(replaces)})
    return Segment(writer.folder)


def _expected(layout, now: dict[str, int]) -> dict[str, tuple[int, int, int]]:
    """key -> (segment, generation, audio) of the row that answers, by the rule as it is written down."""
    answers = {}
    for key in KEYS:
        rows = [(generation, number, what, audio) for number, part in enumerate(layout)
                for k, generation, what, audio in part if k == key]
        cover = max([row[:2] for row in rows if row[2] == "tombstone"], default=(0, -1))
        alive = [row for row in rows if row[2] == "row" and row[:2] > cover]
        current = [row for row in alive if row[3] == now.get(key)]
        if alive:
            generation, number, _, audio = max(current or alive)
            answers[key] = number, generation, audio
    return answers


def _found(index: Index) -> dict[str, tuple[int, int, int]]:
    return {key: (int(record["segment"]), int(record["generation"]), record["source"].tobytes()[0])
            for key in KEYS if (record := index.find(key)) is not None}


def _current(now: dict[str, int]):
    """What the utterances say: which of the records stem from their key's audio of now."""
    by_hash = {key_hashes(key): audio for key, audio in now.items()}

    def current(records: np.ndarray) -> np.ndarray:
        return np.array([by_hash.get((int(r["hash"]), int(r["tag"]))) == r["source"].tobytes()[0] for r in records],
                        bool)
    return current


@pytest.fixture(params=[64, 8], ids=["64-bit", "8-bit"])
def hash_bits(request, monkeypatch):
    """Key hashes whose searched half has 64 or only 8 bits; 6 of 256 may collide, so one bit more is taken off."""
    if request.param == 8:
        def few(key: str) -> tuple[int, int]:
            first, second = key_hashes(key)
            return first & 1, second
        for module in (segments, indexes):
            monkeypatch.setattr(module, "key_hashes", few)
    return request.param


@given(layout=SEGMENTS, now=st.dictionaries(st.sampled_from(KEYS), st.integers(0, 2)))
@QUICK
def test_row_that_answers_follows_the_rule(tmp_path, hash_bits, layout, now):
    folder = _fresh(tmp_path)
    parts = [_write(folder, part) for part in layout]
    current = _current(now) if hash_bits == 64 else None
    index = Index.build(parts, current)
    expected = _expected(layout, now if current else {})
    assert _found(index) == expected
    assert sorted(index.live_keys()) == sorted(expected) and len(index) == len(expected)


@given(layout=SEGMENTS, now=st.dictionaries(st.sampled_from(KEYS), st.integers(0, 2)), split=st.integers(0, 5))
@QUICK
def test_catalogue_changes_no_answer(tmp_path, layout, now, split):
    folder = _fresh(tmp_path)
    parts = [_write(folder, part) for part in layout]
    write_catalogue(folder, merge(parts[:split]))
    with_catalogue = Index.build(parts, _current(now), read_catalogue(folder, parts))
    assert _found(with_catalogue) == _expected(layout, now)
    for key in KEYS:
        seen = [row[1] for part in layout for row in part if row[0] == key]
        assert with_catalogue.newest(key) == max(seen, default=0)


@given(layout=SEGMENTS)
@QUICK
def test_segment_that_was_replaced_answers_no_more(tmp_path, layout):
    folder = _fresh(tmp_path)
    old = [_write(folder, part) for part in layout]
    write_catalogue(folder, merge(old))
    new = _write(folder, [("a", 1, "row", 9)], replaces=[segment.id for segment in old])
    for base in [None, read_catalogue(folder, [*old, new])]:
        index = Index.build([*old, new], None, base)
        assert list(index.live_keys()) == ["a"] and index.find("a")["source"].tobytes()[0] == 9


def test_equal_generations_are_told_apart_by_the_segments_id(tmp_path):
    parts = [_write(tmp_path, [("a", 3, "row", audio)]) for audio in (2, 0, 1)]
    assert Index.build(parts).find("a")["source"].tobytes()[0] == 1
    assert parts[0].id < parts[1].id < parts[2].id


def test_tombstone_keeps_its_generation_for_the_next_writer(tmp_path):
    index = Index.build([_write(tmp_path, [("a", 1, "row", 0), ("a", 5, "tombstone", 0)])])
    assert index.find("a") is None and len(index) == 0 and index.newest("a") == 5 and index.newest("b") == 0


def test_update_during_a_compaction_is_not_lost(tmp_path):
    first = _write(tmp_path, [("a", 1, "row", 0)])
    second = _write(tmp_path, [("a", 2, "row", 1)])                          # while the first is compacted
    compacted = _write(tmp_path, [("a", 1, "row", 0)], replaces=[first.id])  # later by time, older by generation
    assert Index.build([first, second, compacted]).find("a")["generation"] == 2


def test_many_keys_are_looked_up_at_once(tmp_path, hash_bits):
    keys = [f"speaker{i % 7}/take {i}" for i in range(500)]
    index = Index.build([_write(tmp_path, [(key, 1, "row", 0) for key in keys[:400]]),
                         _write(tmp_path, [(key, 2, "tombstone", 0) for key in keys[:50]])])
    hashes = np.array([segments.key_hashes(key) for key in keys], np.uint64)
    if hash_bits == 64:
        assert (hash_keys(keys) == hashes).all()
    at = index.positions(hashes)
    assert ((at >= 0) == [50 <= i < 400 for i in range(500)]).all()
    assert [index.key(index.records[p]) for p in at[50:400]] == keys[50:400]
    assert [index.find(key) is not None for key in keys] == [50 <= i < 400 for i in range(500)]


def test_empty_index_finds_nothing():
    index = Index.build([])
    assert index.find("a") is None and list(index.live_keys()) == [] and len(index) == 0
    assert (index.positions(hash_keys(["a", "b"])) == -1).all()


@pytest.fixture
def catalogued(tmp_path) -> tuple[Path, list[Segment]]:
    parts = [_write(tmp_path, [("a", 1, "row", 0)]), _write(tmp_path, [("b", 1, "row", 1)])]
    write_catalogue(tmp_path, merge(parts))
    return tmp_path, parts


def test_catalogue_of_a_purged_segment_is_ignored(catalogued):
    folder, parts = catalogued
    shutil.rmtree(parts[0].folder)
    assert read_catalogue(folder, parts[1:]) is None


@pytest.mark.parametrize("leaf", ["zarr.json", "hashes/c/0", "records/c/0/0"])
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_catalogue_that_is_not_whole_is_ignored(catalogued, leaf, how):
    folder, parts = catalogued
    path = next((folder / "catalogue").glob("*-*")) / leaf
    path.write_bytes(path.read_bytes()[:7])
    if how == "missing":
        path.unlink()
    assert read_catalogue(folder, parts) is None
    assert sorted(Index.build(parts, None, read_catalogue(folder, parts)).live_keys()) == ["a", "b"]


def test_newest_whole_catalogue_serves(catalogued):
    folder, parts = catalogued
    parts.append(_write(folder, [("c", 1, "row", 0)]))
    assert len(read_catalogue(folder, parts).segments) == 2
    write_catalogue(folder, merge(parts, read_catalogue(folder, parts)))
    assert len(read_catalogue(folder, parts).segments) == 3
    (sorted((folder / "catalogue").glob("*-*"))[-1] / "zarr.json").unlink()
    assert len(read_catalogue(folder, parts).segments) == 2


def test_catalogue_is_mapped_not_loaded(catalogued):
    folder, parts = catalogued
    index = Index.build(parts, None, read_catalogue(folder, parts))
    assert isinstance(index.hashes.base, np.memmap) and isinstance(index.records.base, np.memmap)
    assert (index.records["flags"] & REMOVED == 0).all()


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """key -> (generation, audio) as a fresh reader finds it, with the catalogue that serves, if any."""
    return {key: found[1:] for key, found in _found(Collection(folder).index()).items()}


@pytest.mark.parametrize("seed", range(5))
def test_any_history_of_catalogues_folds_and_purges_changes_no_answer(tmp_path, seed):
    chance, rows = random.Random(seed), {}
    for step in range(25):
        parts = [part for part in Collection(tmp_path).segments if part.id not in rows.get("replaced", ())]
        event = chance.choice(["write", "write", "fold", "catalogue", "purge", "late"])
        if event in ("write", "late"):
            key, generation = chance.choice(KEYS), step + 1
            part = _write(tmp_path, [(key, generation, chance.choice(["row", "row", "tombstone"]), step % 3)])
            rows.setdefault("rows", []).append((key, generation, part.records["flags"][0] & REMOVED, step % 3))
            if event == "late":                                       # begun a day before it was committed
                part.folder.rename(part.folder.with_name("0000" + part.folder.name[4:]))
        elif event == "fold" and len(parts) > 1:
            chosen = chance.sample(parts, 2)
            writer = SegmentWriter(tmp_path / "segments" / new_id(), "int32", 0)
            for part in chosen:
                writer.extend(part, part.records)
            gone = [name for part in chosen for name in (part.id, *part.facts["replaces"])]
            writer.commit({"replaces": gone})
            rows.setdefault("replaced", set()).update(gone)
        elif event == "catalogue":
            write_catalogue(tmp_path, Collection(tmp_path).merged())
            drop_catalogues(tmp_path)
        elif event == "purge":
            for name in list(rows.get("replaced", ())):
                shutil.rmtree(tmp_path / "segments" / name, ignore_errors=True)
        latest = {key: (generation, removed, audio) for key, generation, removed, audio in rows.get("rows", ())}
        expected = {key: (found[0], found[2]) for key, found in latest.items() if not found[1]}
        assert _listing(tmp_path) == expected, (step, event)


def test_documents_of_catalogued_segments_are_not_read(tmp_path):
    parts = [_write(tmp_path, [(key, 1, "row", 0)]) for key in KEYS]
    write_catalogue(tmp_path, merge(parts))
    _write(tmp_path, [("a", 2, "row", 1)])
    for part in parts:
        (part.folder / "zarr.json").write_text("never read")
    assert _listing(tmp_path) == {key: (1, 0) for key in KEYS} | {"a": (2, 1)}


def test_catalogue_serves_after_what_it_merged_was_replaced_and_purged(tmp_path):
    parts = [_write(tmp_path, [("a", 1, "row", 0)]), _write(tmp_path, [("b", 1, "row", 0)])]
    write_catalogue(tmp_path, merge(parts))
    _write(tmp_path, [("a", 1, "row", 2)], replaces=[parts[0].id])
    shutil.rmtree(parts[0].folder)
    assert Collection(tmp_path).catalogue is not None
    assert _listing(tmp_path) == {"a": (1, 2), "b": (1, 0)}
    shutil.rmtree(parts[1].folder)                                    # which nothing replaces: it is lost
    assert Collection(tmp_path).catalogue is None and _listing(tmp_path) == {"a": (1, 2)}


def test_catalogue_removed_after_it_was_chosen_is_done_without(catalogued):
    folder, _ = catalogued
    chosen = Collection(folder)
    shutil.rmtree(chosen.catalogue.home)
    assert sorted(chosen.index().live_keys()) == ["a", "b"]
