"""Compact: few segments, the same contents, whoever else is at work; after a purge nothing of what was removed."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import featstore as fs
from featstore import compact as compaction
from featstore import shards, storage, upkeep
from featstore import writer as writers
from featstore.compact import Compacted, compact, steps
from featstore.errors import DiskFull
from featstore.index import drop_replaced, hash_keys, write_catalogue
from featstore.pack import pack
from featstore.segment import SegmentWriter
from featstore.store import Collection
from featstore.verify import verify

MEL = fs.Spec(made_by="mel", version=1, kind="continuous", frame_rate=50, dim=3, dtype="float16")
VOICE = fs.Spec(made_by="voice", version=1, kind="global", dim=4, dtype="float32")


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Durability has tests of its own; here a sync is only slow."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def _mel(value: float, frames: int = 20) -> np.ndarray:
    return np.full((frames, 3), value, np.float16)


def _put(store: fs.Store, key: str, value: float, speaker: str = "someone") -> None:
    """One utterance with two features, by a writer of its own."""
    with store.writer() as w:
        w.declare("mel", MEL)
        w.declare("voice", VOICE)
        w.utterance({"key": key, "speaker": speaker}, source=key.encode().ljust(32, b"."), seconds=0.4)
        w.write(key, "mel", _mel(value))
        w.write(key, "voice", np.full(4, value, np.float32))


def _filled(path: Path, count: int = 6) -> fs.Store:
    store = fs.create(path)
    for number in range(count):
        _put(store, f"k{(number * 11) % count}", number)
    return store


def _contents(store: fs.Store) -> dict:
    seen: dict = {"": dict(store.utterances)}
    for name, feature in store.features.items():
        rows = {key: feature[key] for key in feature}
        seen[name] = {k: (r.read(check=True).tobytes(), r.scale, r.source) for k, r in rows.items()}
    return seen


def _folders(store: fs.Store) -> list[Path]:
    return [store.path / "utterances", *(feature.folder for feature in store.features.values())]


def _ages(feature: fs.Feature) -> dict:
    return {key: feature.index.find(key)[["generation", "written"]].tolist() for key in feature}


def _kept(folder: Path) -> list:
    return drop_replaced(Collection(folder).segments)


def test_many_segments_become_one_of_each_and_nothing_else_changes(tmp_path):
    store = _filled(tmp_path / "s.zarr")
    before = _contents(store)
    ages = _ages(store.features["mel"])
    done = compact(store)
    assert (done.segments_before, done.segments_after) == (18, 3) and done.damages == []
    assert done.bytes_before == done.bytes_after and done.waiting > 0 and done.freed == 0
    assert _contents(store) == before and verify(store).damages == []
    assert _ages(store.features["mel"]) == ages


def test_rows_lie_in_the_order_of_their_keys(tmp_path):
    store = _filled(tmp_path / "s.zarr")
    compact(store)
    for folder in _folders(store):
        (segment,) = _kept(folder)
        keys = [segment.key(record) for record in segment.records]
        assert keys == sorted(keys) and (np.diff(segment.records["offset"].astype(int)) > 0).all()


def test_compacting_again_does_nothing(tmp_path):
    store = _filled(tmp_path / "s.zarr")
    with store.writer() as w:
        w.delete("k1")
    for purge in (False, True):
        compact(store, purge=purge, grace_s=0)
        files = sorted(store.path.rglob("*"))
        again = compact(store, purge=purge, grace_s=0)
        assert (again.copied, again.segments_before) == (0, again.segments_after)
        assert sorted(store.path.rglob("*")) == files


def test_a_catalogue_of_all_segments_is_left(tmp_path):
    store = _filled(tmp_path / "s.zarr")
    for purge in (False, True):
        compact(store, purge=purge, grace_s=0)
        for folder in _folders(store):
            collection = Collection(folder)
            assert collection.catalogue is not None and len(collection.uncatalogued) == 0
            assert len(list((folder / "catalogue").glob("*-*"))) == 1


def test_zarr_finds_nothing_in_the_folder_that_is_no_group_and_no_array(tmp_path):
    import zarr

    store = _filled(tmp_path / "s.zarr")
    fs.split(store, "main", by="utterance", valid="20%", test="20%")
    pack(store, "mel", "int8")
    compact(store, purge=True, grace_s=0)
    found = [path for path, _ in zarr.open_group(store.path, mode="r").members(max_depth=None)]  # it warns of others
    assert sorted(found) == sorted(path.parent.relative_to(store.path).as_posix()
                                   for path in store.path.glob("*/**/zarr.json"))
    assert "utterances/catalogue" in found and "splits/main" in found


def test_full_segments_are_left_alone_and_groups_reach_the_target_size(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "SEGMENT_BYTES", 6 * 20 * 3 * 2)
    store = _filled(tmp_path / "s.zarr", 20)
    before = _contents(store)
    compact(store)
    folder = store.features["mel"].folder
    sizes = [segment.facts["rows"] for segment in _kept(folder)]
    assert sizes == [6, 6, 6, 2]
    names = [segment.id for segment in _kept(folder)]
    for number in range(5):
        _put(store, f"more{number}", number)
    compact(store)
    assert [segment.id for segment in _kept(folder)][:3] == names[:3]
    assert [segment.facts["rows"] for segment in _kept(folder)][3:] in ([1, 6], [6, 1])
    assert {key: _contents(store)["mel"][key] for key in before["mel"]} == before["mel"]


def test_rows_that_cannot_answer_are_dropped_once_they_are_many_and_by_purge_always(tmp_path):
    store = _filled(tmp_path / "s.zarr", 10)
    compact(store, purge=True, grace_s=0)
    _put(store, "k1", 77)
    before = _contents(store)
    folder = store.features["mel"].folder
    compact(store, purge=True, grace_s=0)
    assert sum(segment.facts["rows"] for segment in _kept(folder)) == 10
    assert _contents(store) == before and verify(store).damages == []


def test_of_two_recordings_of_one_utterance_both_features_stay(tmp_path):
    store = fs.create(tmp_path / "s.zarr")
    _put(store, "a", 1)
    with store.writer() as w:
        w.utterance({"key": "a"}, source=b"another".ljust(32), seconds=0.4)
        w.write("a", "mel", _mel(2))
    compact(store, purge=True, grace_s=0)
    assert store["a", "mel"][0, 0] == 2 and store.why("a", "voice").state == "stale"
    with store.writer() as w:                                           # the first take is in place again
        w.utterance({"key": "a"}, source=b"a".ljust(32, b"."), seconds=0.4)
    assert store["a", "mel"][0, 0] == 1 and store.why("a", "voice").state == "fresh"


def test_every_identity_that_is_kept_is_compacted_and_a_removed_feature_stays_removed(tmp_path):
    store = _filled(tmp_path / "s.zarr")
    other = fs.Spec(made_by="mel", version=2, kind="continuous", frame_rate=50, dim=3, dtype="float16")
    with store.writer() as w:
        w.declare("mel", other, replace=True)
        w.write("k0", "mel", _mel(9))
    upkeep.remove(store, feature="voice")
    before = _contents(store)
    done = compact(store)
    assert done.segments_after == 4                                     # utterances, two of mel, one that empties voice
    old = store.feature(f"mel@{MEL.identity[:9]}")
    assert len(old) == 6 and len(_kept(old.folder)) == 1 and _contents(store) == before
    compact(store, purge=True, grace_s=0)
    assert store.identities("voice") == [] and _contents(store) == before


def test_a_reader_goes_on_when_what_it_opened_is_compacted_and_purged(tmp_path):
    store = _filled(tmp_path / "s.zarr")
    before = _contents(store)
    late, early = fs.open(store.path), fs.open(store.path)
    rows = {key: early["k0", "mel"] if key == "k0" else early[key, "mel"] for key in early.utterances}
    compact(store, purge=True, grace_s=0)
    assert {key: row.read(check=True).tobytes() for key, row in rows.items()} == {
        key: data for key, (data, _, _) in before["mel"].items()}
    assert _contents(late) == before and repr(late) == repr(store)


def test_a_damaged_row_is_named_and_its_segment_left(tmp_path):
    store = _filled(tmp_path / "s.zarr")
    shard = store["k2", "mel"]._segment.folder / "frames" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    done = compact(store)
    assert [(d.utterance, d.feature.partition("@")[0]) for d in done.damages] == [("k2", "mel")]
    assert "checksum" in done.damages[0].reason and len(_kept(store.features["mel"].folder)) == 2
    assert len(_kept(store.features["voice"].folder)) == 1
    found = verify(store)
    assert [d.utterance for d in found.damages] == ["k2"]
    upkeep.repair(store, found)
    assert compact(store).damages == [] and sorted(store.features["mel"]) == ["k0", "k1", "k3", "k4", "k5"]


def test_a_collection_whose_index_is_damaged_is_named_and_the_others_are_compacted(tmp_path):
    store = _filled(tmp_path / "s.zarr")
    index = store["k2", "mel"]._segment.folder / "index" / "c" / "0" / "0"
    index.write_bytes(index.read_bytes()[:-3])
    done = compact(fs.open(store.path), purge=True, grace_s=0)
    (damage,) = done.damages
    assert damage.feature.startswith("mel@") and "not compacted" in damage.reason
    assert len(_kept(store.path / "utterances")) == 1
    upkeep.repair(store, verify(store))
    assert compact(store).damages == [] and len(store.features["mel"]) == 5


def test_a_tombstone_holds_back_a_row_that_a_writer_commits_later(tmp_path):
    store = _filled(tmp_path / "s.zarr")
    slow = store.writer()
    slow.declare("mel", MEL)
    slow.write("k1", "mel", _mel(50))                                   # begun before the removal, committed after it
    with store.writer() as w:
        w.delete("k1")
    compact(store, purge=True)
    slow.close()
    store.refresh()
    assert "k1" not in store.features["mel"] and "k1" not in store.utterances


def test_tombstones_are_forgotten_when_nothing_is_left_that_they_hold_back(tmp_path, monkeypatch):
    store = _filled(tmp_path / "s.zarr")
    with store.writer() as w:
        w.delete("k1")
    assert compact(store, purge=True).tombstones == 0                   # what it covers is replaced, and on disk yet
    (bare,) = [s for s in _kept(store.features["mel"].folder) if (s.records["flags"] == 1).all()]
    assert bare.facts["rows"] == 1 and bare.key_blob == b""
    _aged(monkeypatch, store.path)
    assert compact(store, purge=True).tombstones == 3
    assert compact(store, purge=True, grace_s=0).tombstones == 0
    assert sum(s.facts["rows"] for s in Collection(store.features["mel"].folder).segments) == 5
    _put(store, "k1", 3)
    assert store["k1", "mel"][0, 0] == 3


def _aged(monkeypatch, path: Path) -> None:
    """Make all that is committed two days old."""
    import time

    then = time.time() - 2 * 24 * 3600
    for item in path.rglob("*"):
        home = next((p for p in item.parents if p.parent.name in ("segments", "catalogue")), item)
        if (home / "zarr.json").exists():
            os.utime(item, (then, then))
    now, age = time.time_ns(), storage.age_s
    monkeypatch.setattr(storage, "age_s", lambda name: age(name) + 2 * 24 * 3600 * (int(name.split("-")[0], 16) < now))


def test_a_feature_removed_while_it_is_compacted_stays_removed(tmp_path):
    for stage in ("list", "read", "commit"):
        store = _filled(tmp_path / f"{stage}.zarr")
        folder = store.features["mel"].folder
        running = steps(folder, Compacted(), purge=False, grace_s=0)
        while next(running) != stage:
            pass
        upkeep.remove(fs.open(store.path), feature="mel")
        list(running)
        assert sum(s.facts["rows"] for s in _kept(folder)) == 0, stage
        assert len(store.features["voice"]) == 6


def test_a_feature_removed_at_the_moment_of_the_commit_is_taken_back(tmp_path, monkeypatch):
    store = _filled(tmp_path / "s.zarr")
    folder, commit = store.features["mel"].folder, SegmentWriter.commit

    def beaten(writer, attributes) -> None:
        monkeypatch.setattr(SegmentWriter, "commit", commit)
        upkeep.remove(fs.open(store.path), feature="mel")
        commit(writer, attributes)

    monkeypatch.setattr(SegmentWriter, "commit", beaten)
    list(steps(folder, Compacted(), purge=False, grace_s=0))
    assert sum(s.facts["rows"] for s in _kept(folder)) == 0


@pytest.mark.parametrize("stage", ["list", "read", "commit"])
def test_two_compactions_of_one_collection_do_no_harm(tmp_path, stage):
    store = _filled(tmp_path / "s.zarr")
    with store.writer() as w:
        w.delete("k1", "mel")
    before, folder = _contents(store), store.features["mel"].folder
    slow = steps(folder, Compacted(), purge=True, grace_s=0)
    while next(slow) != stage:
        pass
    compact(fs.open(store.path), purge=True, grace_s=0)
    list(slow)
    store.refresh()
    assert _contents(store) == before and verify(store).damages == []
    compact(store, purge=True, grace_s=0)
    assert _contents(store) == before and len(_kept(folder)) <= 2       # the rows, and what emptied the tombstones


@pytest.fixture
def full(monkeypatch) -> Iterator[Callable[[int], None]]:
    """`full(n)`: the disk is full from the n-th write on; `full(-1)`: it is not."""
    left = [-1]

    def write_all(real):
        def write(file, data) -> None:
            left[0] -= left[0] > 0
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(file, data)
        return write

    def write_file(path, data) -> None:
        with storage.disk_room(path), path.open("wb") as file:
            write_all(lambda f, d: f.write(d))(file, data)

    monkeypatch.setattr(shards, "_write_all", write_all(shards._write_all))
    monkeypatch.setattr(storage, "write", write_file)
    yield lambda writes: left.__setitem__(0, writes)


def test_whenever_the_disk_gets_full_nothing_is_lost_and_the_same_call_goes_on(tmp_path, full):
    store = _filled(tmp_path / "s.zarr", 3)
    with store.writer() as w:
        w.delete("k1")
    before = _contents(store)
    for writes in range(1, 200):
        full(writes)
        try:
            compact(store, purge=True)
        except DiskFull as error:
            assert "is kept" in str(error)
        else:
            break
        finally:
            full(-1)
        assert _contents(fs.open(store.path)) == before, writes
    assert 5 < writes < 199
    assert _contents(store) == before and verify(store).damages == [] and compact(store, purge=True).copied == 0


def test_a_merged_segment_that_does_not_fit_is_refused_before_it_is_written(tmp_path, monkeypatch):
    store = _filled(tmp_path / "s.zarr", 3)
    before = _contents(store)
    monkeypatch.setattr(storage, "free_bytes", lambda path: 10)
    with pytest.raises(DiskFull, match=r"needs about 0.00 GB beside what it has.*run the same command again"):
        compact(store)
    assert _contents(fs.open(store.path)) == before


def test_no_byte_of_a_removed_speaker_is_left_in_the_store(tmp_path, monkeypatch):
    """In frames, records, keys, catalogues, splits, the spool, what killed writers left, and what failed."""
    monkeypatch.setattr(writers, "LINK_BYTES", 1)                       # rows that no record names lie in linked shards
    monkeypatch.setattr(writers, "FOLD_BYTES", 0)
    store = fs.create(tmp_path / "s.zarr")
    frames = {}
    for take in range(3):
        with store.writer() as w:
            w.declare("mel", MEL)
            for key in ("wolf/a", "lamb/b", "wolf/c"):
                frames[key, take] = np.random.default_rng([take, *key.encode()]).random((50, 3)).astype(np.float16)
                w.utterance({"key": key, "speaker": key[:4], "text": f"words of {key[:4]}", "audio": f"{key}.wav"},
                            source=f"{key}{take}".encode().ljust(32, b"."), seconds=1.0)
                w.write(key, "mel", frames[key, take])
                w.commit()
            frames["wolf/a", 3 + take] = np.random.default_rng(99 + take).random((50, 3)).astype(np.float16)
            w.write("wolf/a", "mel", frames["wolf/a", 3 + take])        # the row before it has no record any more
    with store.writer() as w:                                           # another identity of the name, kept beside it
        w.declare("mel", dataclasses.replace(MEL, version=2), replace=True)
        w.write("wolf/a", "mel", frames["wolf/a", 0])
        w.write("lamb/b", "mel", frames["lamb/b", 2])
    fs.split(store, "main", by="speaker", valid=50)
    for folder in [store.path / "utterances", store.features["mel"].folder]:
        write_catalogue(folder, Collection(folder).merged())
    left = store["wolf/a", "mel"]._segment.folder
    shutil.copytree(left, left.with_name(storage.new_id()), ignore=lambda _, names: {"zarr.json"} & set(names))
    (store.path / "spool" / "run").mkdir(parents=True)
    (store.path / "spool" / "run" / "x").write_bytes(frames["wolf/c", 1].tobytes())
    log = store.path.with_name("s.zarr.failures.jsonl")
    log.write_text("".join(json.dumps(line) + "\n" for line in (
        {"utterance": "x1", "feature": None, "path": "/x1.wav", "reason": "cut off", "speaker": "wolf"},
        {"utterance": "wolf/readme", "feature": None, "path": "/wolf/readme", "reason": "no audio"},
        {"utterance": "lamb/d", "feature": None, "path": "/lamb/d.wav", "reason": "cut off", "speaker": "lamb"})))

    removed = upkeep.remove(store, speaker="wolf")
    assert removed.failures == 2 and [failure.utterance for failure in fs.failures(store)] == ["lamb/d"]
    assert compact(store, purge=True, grace_s=0).damages == []
    needles = [b"wolf", b"x1", *(row.tobytes()[at:at + 24] for (key, _), row in frames.items() if key[:4] == "wolf"
                                 for at in (0, 24, 150, 276))]
    found = [path for path in tmp_path.rglob("*") if path.is_file() and any(n in path.read_bytes() for n in needles)]
    assert found == [] and not any("wolf" in str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    hashed = [row.tobytes() for row in hash_keys(["wolf/a", "wolf/c"])]
    told = {path.relative_to(store.path).parts[0] for path in store.path.rglob("*") if path.is_file()
            and any(one in path.read_bytes() for one in hashed)}
    assert told <= {"splits"}, "a split keeps hashes of keys, whoever was removed; nothing else does"
    assert np.array_equal(fs.open(store.path)["lamb/b", "mel"].read(check=True), frames["lamb/b", 2])
    assert verify(store).damages == []


def test_objects_are_compacted_and_erased_as_folders_are(tmp_path):
    pytest.importorskip("fsspec")
    store = fs.create(f"memory://{tmp_path.name}/s.zarr")
    for number in range(4):
        _put(store, f"k{number}", number, speaker="wolf" if number == 1 else "lamb")
    before = _contents(store)
    assert compact(store).segments_after == 3 and _contents(fs.open(store.path)) == before
    upkeep.remove(store, speaker="wolf")
    assert compact(store, purge=True, grace_s=0).tombstones == 3
    assert sorted(store.utterances) == sorted(store.features["mel"]) == ["k0", "k2", "k3"]
    assert verify(store).damages == []
    needles = [b"wolf", b"k1", _mel(1)[:4].tobytes(), hash_keys(["k1"]).tobytes()]
    found = [path for path in store.path.rglob("*") if path.is_file() and any(n in path.read_bytes() for n in needles)]
    assert found == []
    assert compact(store, purge=True, grace_s=0).copied == 0
