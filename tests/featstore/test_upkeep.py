"""Upkeep: whatever is damaged is found, named and made again; nothing young is removed; copies are equal."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from toys import Mean

import featstore as fs
from featstore import storage, upkeep
from featstore.errors import (
    BadCorpus,
    BadRequest,
    CorruptSegment,
    FeatstoreError,
    IdentityMismatch,
    MissingFeature,
    MissingUtterance,
)
from featstore.index import merge, write_catalogue
from featstore.row import Row
from featstore.store import Collection
from featstore.verify import verify

MEL = fs.Spec(made_by="mel", version=1, kind="continuous", frame_rate=50, dim=3, dtype="float16")
MEL2 = dataclasses.replace(MEL, settings={"layer": 20})
WAVE = fs.Spec(made_by="wave", version=1, kind="samples", frame_rate=200, dim=0, dtype="int16")
SPEAKER = fs.Spec(made_by="speaker", version=1, kind="global", dim=4, dtype="float32")
DAY = 24 * 3600


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Durability has tests of its own; here a sync is only slow."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def store(tmp_path) -> fs.Store:
    return _filled(tmp_path / "songs.zarr", "abc")


def _source(text: str) -> bytes:
    return text.encode().ljust(32, b".")


def _filled(path: Path, keys: str, spec: fs.Spec = MEL) -> fs.Store:
    """Utterances of one second with three features; key `a` is of speaker `sa`."""
    store = fs.create(path)
    with store.writer() as w:
        w.declare("mel", spec)
        w.declare("wave", WAVE)
        w.declare("speaker", SPEAKER)
        for key in keys:
            w.utterance({"key": key, "speaker": f"s{key}", "text": f"words of {key}"}, source=_source(key), stamp=7,
                        seconds=1.0)
            w.write(key, "mel", np.full((50, 3), ord(key), np.float16))
            w.write(key, "wave", np.arange(200, dtype=np.int16), scale=0.5 + ord(key))
            w.write(key, "speaker", np.full(4, ord(key), np.float32))
            w.commit()
    return store


def _contents(store: fs.Store) -> dict:
    """All a reader can see, sources and scales included."""
    seen: dict = {"": dict(store.utterances)}
    for name, feature in store.features.items():
        rows = {key: feature[key] for key in feature}
        seen[name] = feature.identity, {k: (r.read().tobytes(), r.scale, r.source) for k, r in rows.items()}
    return seen


def _age(path: Path, seconds: float = 2 * DAY) -> None:
    """Make all in a folder look as if it had been written before."""
    then = time.time() - seconds
    for item in (path, *path.rglob("*")):
        os.utime(item, (then, then))


def _aged(monkeypatch, path: Path) -> None:
    """Make a whole store two days old, ids included; what is written from now on is new."""
    _age(path)
    now, age = time.time_ns(), storage.age_s
    monkeypatch.setattr(storage, "age_s",
                        lambda name: age(name) + 2 * DAY * (int(name.split("-")[0], 16) < now))


def _only(paths) -> Path:
    (path,) = paths
    return path


def _segments(feature: fs.Feature) -> list[Path]:
    return [s.folder for s in feature.segments if s.id not in
            {name for other in feature.segments for name in other.facts["replaces"]}]


def _flip(path: Path, at: int = 5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_a_whole_store_has_no_damage_and_progress_ends_at_the_total(store):
    steps = []
    found = verify(store, progress=lambda done, total: steps.append((done, total)))
    assert found.damages == [] and found.rows == 12 and found.bytes == steps[-1][0] == steps[-1][1]
    assert steps == sorted(steps)
    assert found.replaced == 12 and found.replaced_bytes > 0, "a writer folds its own small segments"
    assert found.uncommitted == 0


def test_each_identity_that_is_kept_is_checked(store):
    with store.writer() as w:
        w.declare("mel", MEL2, replace=True)
        w.write("a", "mel", np.ones((50, 3), np.float16))
    old = store.feature(f"mel@{MEL.identity[:9]}")
    _flip(_segments(old)[0] / "frames" / "c" / "0" / "0", at=301)
    damage = _only(verify(store).damages)
    assert (damage.feature, damage.utterance) == (f"mel@{MEL.identity[:9]}", "b")
    upkeep.repair(store, verify(store))
    assert sorted(store.feature(f"mel@{MEL.identity[:9]}")) == ["a", "c"] and list(store.features["mel"]) == ["a"]


def test_all_damaged_rows_are_found_not_only_the_first(store):
    shard = _segments(store.features["mel"])[0] / "frames" / "c" / "0" / "0"
    for at in (10, 610):
        _flip(shard, at)
    _flip(_segments(store.features["speaker"])[0] / "frames" / "c" / "0" / "0", 20)
    found = verify(store)
    names = [(damage.feature.partition("@")[0], damage.utterance) for damage in found.damages]
    assert names == [("mel", "a"), ("mel", "c"), ("speaker", "b")]
    assert all("checksum" in damage.reason for damage in found.damages)
    assert found.rows == 12


def test_a_flipped_bit_is_found_repaired_and_made_again_by_extract(tmp_path):
    corpus = _recordings(tmp_path / "wavs")
    store = fs.create(tmp_path / "s.zarr")
    fs.extract(corpus, store, {"mean": Mean()}, workers=0)
    before = _contents(store)
    _flip(_only((store.path / "features" / "mean").glob("*/segments/*/frames/c/0")), at=500)
    found = verify(store)
    assert [damage.utterance for damage in found.damages] == ["b"]
    upkeep.repair(store, found)
    assert sorted(store.features["mean"]) == ["a", "c"]
    report = fs.extract(corpus, store, {"mean": Mean()}, workers=0)
    assert (report.done, report.fresh) == (1, 2)
    assert _contents(store) == before and verify(store).damages == []


@pytest.mark.parametrize("part", ["index/c/0/0", "keys/c/0", "frames/c/0", "zarr.json"])
def test_features_stay_fresh_when_the_utterances_are_damaged(tmp_path, part):
    corpus = _recordings(tmp_path / "wavs")
    store = fs.create(tmp_path / "s.zarr")
    fs.extract(corpus, store, {"mean": Mean()}, workers=0)
    before = _contents(store)
    path = _only((store.path / "utterances" / "segments").glob("*-*")) / part
    _flip(path, at=0)
    found = verify(store)
    assert found.damages
    upkeep.repair(store, found)
    assert verify(store).damages == [] and sorted(store.utterances) == ["a", "b", "c"]
    report = fs.extract(corpus, store, {"mean": Mean()}, workers=0)
    assert report.done == 0, "no feature is made again"
    after = _contents(store)
    assert after["mean"] == before["mean"]
    for key, utterance in after[""].items():
        assert utterance.duration_s == pytest.approx(1.0, abs=0.01)
        was = dataclasses.replace(before[""][key], duration_s=utterance.duration_s, sample_rate=utterance.sample_rate,
                                  channels=utterance.channels)
        assert utterance == was, "extract fills in what the corpus tells"


def _recordings(folder: Path) -> fs.Corpus:
    folder.mkdir()
    rng = np.random.default_rng(1)
    for name in "abc":
        soundfile.write(folder / f"{name}.wav", rng.uniform(-0.5, 0.5, 16000), 16000)
        os.utime(folder / f"{name}.wav", (1e9, 1e9))
    return fs.corpus(folder)


@pytest.mark.parametrize("harm", ["flip", "delete", "truncate", "garble"])
def test_no_damage_of_any_file_stops_verify_nor_survives_repair(tmp_path, harm):
    store = _filled(tmp_path / "whole.zarr", "ab")
    for name in ("wave", "speaker"):
        upkeep.remove(store, feature=name)
    upkeep.purge(store, 0)
    for name in ("wave", "speaker"):
        shutil.rmtree(store.path / "features" / name)
    for folder in [store.path / "utterances", *(feature.folder for feature in store.features.values())]:
        write_catalogue(folder, merge(Collection(folder).segments))
    before = _contents(store)
    names = [p.relative_to(store.path) for p in sorted(store.path.rglob("*")) if p.is_file()
             and p != store.path / "zarr.json" and "served" not in p.parts]
    assert len(names) > 20
    for name in names if harm != "garble" else [name for name in names if name.suffix == ".json"]:
        harmed = tmp_path / "harmed.zarr"
        shutil.copytree(store.path, harmed)
        _harm(harmed / name, harm)
        _finds_and_repairs(fs.open(harmed), before, str(name))
        storage.handles.forget(str(harmed))
        shutil.rmtree(harmed)


def _harm(path: Path, harm: str) -> None:
    data = path.read_bytes()
    if harm == "delete":
        path.unlink()
    elif harm == "garble":
        path.write_bytes(b"\xff{" + data[2:])
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1:]
        path.write_bytes(flipped if harm == "flip" else data[:middle])


def _finds_and_repairs(store: fs.Store, before: dict, name: str) -> None:
    found = verify(store)
    if not found.damages:
        gone = name.endswith("zarr.json") and not (store.path / name).exists()  # then it is as if never committed
        assert gone or _contents(store) == before, f"{name} was harmed and not found, and readers see other contents"
    assert all(damage.reason and damage.segment and "Traceback" not in damage.reason for damage in found.damages)
    upkeep.repair(store, found)
    assert verify(fs.open(store.path)).damages == [], name
    seen = _contents(fs.open(store.path))
    for feature in seen.keys() - {""}:
        assert seen[feature][1].items() <= before[feature][1].items(), f"{name}: {feature} has rows it never had"
    if "utterances" in name:
        assert seen.keys() == before.keys() and all(seen[f] == before[f] for f in seen if f), name
        assert sorted(seen[""]) == ["a", "b"], name


def test_rows_that_can_be_read_are_saved_from_a_segment_with_damaged_keys(store):
    before = _contents(store)
    _flip(_segments(store.features["mel"])[0] / "keys" / "c" / "0", at=0)
    with pytest.raises(CorruptSegment):
        _contents(fs.open(store.path))
    found = verify(store)
    assert "keys" in _only(found.damages).reason
    upkeep.repair(store, found)
    assert _contents(fs.open(store.path)) == before


def test_tombstones_are_saved_too(tmp_path):
    store = _filled(tmp_path / "s.zarr", "ab")
    with store.writer() as w:
        w.delete("a", "mel")
    newest = _segments(store.features["mel"])[-1]
    _flip(newest / "keys" / "c" / "0", at=0)
    upkeep.repair(store, verify(store))
    assert list(store.features["mel"]) == ["b"]


def test_a_segment_that_a_catalogue_lists_is_missed(store):
    feature = store.features["mel"]
    write_catalogue(feature.folder, merge(feature.segments))
    lost = _segments(feature)[0]
    shutil.rmtree(lost)
    damage = _only(verify(store).damages)
    assert damage.segment == lost.name and "gone" in damage.reason
    upkeep.repair(store, verify(store))
    assert verify(store).damages == []


def test_a_row_written_anew_since_verify_is_not_given_up(store):
    _flip(_segments(store.features["mel"])[0] / "frames" / "c" / "0" / "0", 10)
    found = verify(store)
    with store.writer() as w:
        w.write("a", "mel", np.zeros((50, 3), np.float16))
    upkeep.repair(store, found)
    assert sorted(store.features["mel"]) == ["a", "b", "c"] and verify(store).damages == []


def test_a_live_writers_folder_is_left_alone_within_the_grace_period(store):
    with store.writer() as w:
        w.utterance({"key": "d"})
        w.write("d", "mel", np.zeros((50, 3), np.float16))
        assert verify(store).uncommitted == 2
        upkeep.purge(store)
        upkeep.repair(store, verify(store))
        assert verify(store).uncommitted == 2
    assert "d" in store.features["mel"]


def test_what_a_killed_writer_left_goes_after_the_grace_period(store, monkeypatch):
    segment = _segments(store.features["mel"])[0]
    shutil.copytree(segment, segment.with_name(storage.new_id()), ignore=shutil.ignore_patterns("zarr.json"))
    assert verify(store).uncommitted == 1
    _aged(monkeypatch, store.path)
    before = _contents(store)
    assert upkeep.purge(store) > 0
    found = verify(store)
    assert (found.uncommitted, found.replaced) == (0, 0) and _contents(store) == before


def test_an_old_folder_that_is_still_written_to_is_kept(store, monkeypatch):
    w = store.writer()
    w.write("a", "mel", np.zeros((50, 3), np.float16))
    _aged(monkeypatch, store.path)
    w.write("b", "mel", np.zeros((50, 3), np.float16))
    upkeep.purge(store)
    assert verify(store).uncommitted == 1
    w.close()
    assert store["b", "mel"][0, 0] == 0


def test_purge_frees_what_was_replaced_and_contents_stay(store, monkeypatch):
    before, size = _contents(store), verify(store).replaced_bytes
    assert upkeep.purge(store) == 0, "all of it is young"
    _aged(monkeypatch, store.path)
    reader = fs.open(store.path)
    assert upkeep.purge(store) == size
    assert _contents(store) == _contents(reader) == before
    assert upkeep.purge(store) == 0 and verify(store).replaced == 0


def test_the_age_of_what_is_replaced_is_that_of_what_replaced_it(store, monkeypatch):
    _aged(monkeypatch, store.path)
    upkeep.purge(store)
    upkeep.remove(store, feature="mel")
    assert upkeep.purge(store) == 0, "a reader may still hold what was removed just now, however old it is"
    assert len(list((store.path / "features" / "mel").glob("*/segments/*-*"))) == 2


def test_rows_that_cannot_answer_any_more_are_freed(store):
    upkeep.purge(store, 0)
    old = _segments(store.features["mel"])[0]
    with store.writer() as w:
        for key in "abc":
            w.write(key, "mel", np.ones((50, 3), np.float16))
    before = _contents(store)
    assert upkeep.purge(store, 0) > 0 and not old.exists()
    assert _contents(store) == before


def test_an_identity_that_was_replaced_goes_with_its_rows_removed(store, monkeypatch):
    with store.writer() as w:
        w.declare("mel", MEL2, replace=True)
        w.write("a", "mel", np.ones((50, 3), np.float16))
    upkeep.purge(store, 0)
    assert len(store.identities("mel")) == 2, "it has rows: --replace keeps the old beside the new"
    upkeep.remove(store, feature=f"mel@{MEL.identity[:9]}")
    upkeep.purge(store)
    assert len(store.identities("mel")) == 2
    upkeep.purge(store, 0)
    assert store.identities("mel") == [MEL2.identity[:16]] and store.features["mel"].identity == MEL2.identity
    assert [p.name for p in (store.path / "features" / "mel").iterdir() if p.name.startswith(".")] == []


def test_a_purge_killed_at_any_removal_leaves_the_same_contents(store, monkeypatch):
    with store.writer() as w:
        w.declare("mel", MEL2, replace=True)
        w.write("a", "mel", np.ones((50, 3), np.float16))
    upkeep.remove(store, feature=f"mel@{MEL.identity[:9]}")
    before = _contents(store)
    rmtree, left = shutil.rmtree, [0]

    def killed(path, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", killed)
    for steps in range(100):
        left[0] = steps % 3
        try:
            upkeep.purge(store, 0)
        except KeyboardInterrupt:
            assert _contents(fs.open(store.path)) == before
            assert verify(fs.open(store.path)).damages == []
        else:
            break
    assert steps > 3 and verify(store).replaced == 0 and len(store.identities("mel")) == 1


def test_the_newest_catalogue_stays_and_is_renewed_when_its_segments_go(store):
    folder = store.features["mel"].folder
    for _ in range(3):
        write_catalogue(folder, merge(Collection(folder).segments))
    before = _contents(store)
    upkeep.purge(store, 0)
    facts = json.loads((_only((folder / "catalogue").glob("*-*")) / "zarr.json").read_text())
    assert facts["attributes"]["featstore"]["segments"] == [s.id for s in Collection(folder).segments]
    assert _contents(store) == before and verify(store).damages == []


def test_the_spool_of_dead_runs_goes(store):
    (store.path / "spool" / "run").mkdir(parents=True)
    (store.path / "spool" / "run" / "x").write_bytes(bytes(1000))
    assert upkeep.purge(store) == 0
    _age(store.path / "spool")
    assert upkeep.purge(store) == 1000 and list((store.path / "spool").iterdir()) == []


def test_a_copy_is_equal_and_copying_again_does_nothing(store, tmp_path):
    steps = []
    assert upkeep.copy(store, tmp_path / "b.zarr", progress=lambda *at: steps.append(at)) == 12
    other = fs.open(tmp_path / "b.zarr")
    assert _contents(other) == _contents(store) and steps[-1][0] == steps[-1][1]
    for name in ("stamp", "seconds", "source"):
        assert (other.utterances.index.records[name] == store.utterances.index.records[name]).all()
    assert upkeep.copy(store, tmp_path / "b.zarr") == 0
    assert _contents(fs.open(tmp_path / "b.zarr")) == _contents(store)


def test_a_copy_that_was_interrupted_goes_on(store, tmp_path, monkeypatch):
    def stop(done, total):
        if done > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upkeep.copy(store, tmp_path / "b.zarr", progress=stop)
    assert 0 < upkeep.copy(store, tmp_path / "b.zarr") < 9
    assert _contents(fs.open(tmp_path / "b.zarr")) == _contents(store)


def test_two_stores_merge(store, tmp_path):
    upkeep.copy(store, tmp_path / "all.zarr")
    upkeep.copy(_filled(tmp_path / "more.zarr", "cde"), tmp_path / "all.zarr")
    assert _contents(fs.open(tmp_path / "all.zarr")) == _contents(_filled(tmp_path / "five.zarr", "abcde"))


def test_a_key_that_stands_for_two_recordings_is_refused_and_one_that_changed_is_renewed(store, tmp_path):
    def sing(store, root, take):
        with store.writer() as w:
            w.utterance({"key": "song", "root": root, "audio": "song.wav"}, source=_source(take), seconds=1.0)
            w.write("song", "mel", np.full((50, 3), len(take), np.float16))

    sing(store, "/alice", "take 1")
    upkeep.copy(store, tmp_path / "b.zarr")
    before = _contents(fs.open(tmp_path / "b.zarr"))
    other = _filled(tmp_path / "c.zarr", "a")
    sing(other, "/bob", "another song")
    with pytest.raises(BadCorpus, match=r"song is /bob/song.wav in .* and /alice/song.wav in .*Nothing"):
        upkeep.copy(other, tmp_path / "b.zarr")
    assert _contents(fs.open(tmp_path / "b.zarr")) == before
    sing(store, "/alice", "take two")
    upkeep.copy(store, tmp_path / "b.zarr")
    assert _contents(fs.open(tmp_path / "b.zarr")) == _contents(store)


def test_a_store_that_serves_another_identity_is_left_as_it_was(store, tmp_path):
    other = _filled(tmp_path / "b.zarr", "xy", MEL2)
    before = _contents(other)
    with pytest.raises(IdentityMismatch, match="layer"):
        upkeep.copy(store, other.path)
    assert _contents(fs.open(other.path)) == before


def test_named_features_and_identities_are_copied(store, tmp_path):
    with store.writer() as w:
        w.declare("mel", MEL2, replace=True)
        w.write("a", "mel", np.ones((50, 3), np.float16))
    upkeep.copy(store, tmp_path / "b.zarr", [f"mel@{MEL.identity[:9]}"])
    other = fs.open(tmp_path / "b.zarr")
    assert list(other.features) == ["mel"] and other.features["mel"].identity == MEL.identity
    assert len(other.utterances) == len(other.features["mel"]) == 3
    with pytest.raises(BadRequest, match="one identity"):
        upkeep.copy(store, tmp_path / "c.zarr", ["mel", f"mel@{MEL.identity[:9]}"])
    with pytest.raises(MissingFeature, match=r"has: .*mel"):
        upkeep.copy(store, tmp_path / "c.zarr", ["mell"])
    with pytest.raises(BadRequest, match="another path"):
        upkeep.copy(store, store.path)
    assert not (tmp_path / "c.zarr").exists()


def test_a_stale_row_stays_stale_in_the_copy(store, tmp_path):
    with store.writer() as w:
        w.utterance({"key": "a", "text": "sung again"}, source=_source("new a"), stamp=9, seconds=3.0)
    upkeep.copy(store, tmp_path / "b.zarr")
    other = fs.open(tmp_path / "b.zarr")
    assert _contents(other) == _contents(store)
    assert other.why("a", "mel").state == "stale" and other.why("b", "mel").state == "fresh"
    assert upkeep.copy(store, tmp_path / "b.zarr") == 0


def test_damage_is_not_copied(store, tmp_path):
    _flip(_segments(store.features["mel"])[0] / "frames" / "c" / "0" / "0", 301)
    with pytest.raises(CorruptSegment, match="b: mel does not match its checksum"):
        upkeep.copy(store, tmp_path / "b.zarr")
    assert "b" not in fs.open(tmp_path / "b.zarr").features.get("mel", ())
    upkeep.repair(store, verify(store))
    upkeep.copy(store, tmp_path / "b.zarr")
    assert _contents(fs.open(tmp_path / "b.zarr")) == _contents(store)


def test_long_rows_are_copied_in_pieces(tmp_path, monkeypatch):
    store = fs.create(tmp_path / "a.zarr")
    with store.writer() as w:
        w.declare("wave", WAVE)
        w.write("long", "wave", np.arange(10 << 20).astype(np.int16))
    sizes, blocks = [], Row.blocks
    monkeypatch.setattr(Row, "blocks", lambda row, n=None: (sizes.append(b.nbytes) or b for b in blocks(row, n)))
    monkeypatch.setattr(Row, "read", lambda row, check=False: pytest.fail("read as a whole"))
    upkeep.copy(store, tmp_path / "b.zarr")
    assert len(sizes) == 3 and max(sizes) == 8 << 20


def test_a_feature_that_was_removed_can_be_extracted_again_and_its_bytes_are_freed(store):
    upkeep.purge(store, 0)
    before = _contents(store)
    removed = upkeep.remove(store, feature="mel")
    assert removed.rows == 3 and "mel" not in store.features and len(store.utterances) == 3
    assert removed.bytes <= upkeep.purge(store, 0) < removed.bytes + 8000
    assert store.identities("mel") == []
    with store.writer() as w:
        w.declare("mel", MEL)
        for key in "abc":
            w.write(key, "mel", np.full((50, 3), ord(key), np.float16))
    assert _contents(store) == before


@pytest.mark.parametrize("spec", [MEL, MEL2])
def test_a_removed_name_is_free_at_once(store, spec):
    upkeep.remove(store, feature="mel")
    with store.writer() as w:
        w.declare("mel", spec)
        w.write("a", "mel", np.ones((50, 3), np.float16))
    assert list(store.features["mel"]) == ["a"] and store["a", "mel"][0, 0] == 1
    upkeep.purge(store, 0)
    assert list(store.features["mel"]) == ["a"] and store["a", "mel"][0, 0] == 1
    assert verify(store).damages == []


def test_removing_one_identity_leaves_the_one_that_is_served(store):
    with store.writer() as w:
        w.declare("mel", MEL2, replace=True)
        w.write("a", "mel", np.ones((50, 3), np.float16))
    assert upkeep.remove(store, feature=f"mel@{MEL.identity[:9]}").rows == 3
    assert list(store.features["mel"]) == ["a"] and store.features["mel"].identity == MEL2.identity


def test_removing_a_speaker_leaves_the_others(store):
    before = _contents(store)
    with store.writer() as w:
        w.declare("mel", MEL2, replace=True)
        w.write("a", "mel", np.ones((50, 3), np.float16))
    assert upkeep.remove(store, speaker="sa").rows == 5, "the utterance, three features, one of them twice"
    assert sorted(store.utterances) == ["b", "c"] and store.utterances.speakers() == {"sb", "sc"}
    assert list(store.features["mel"]) == [] and sorted(store.feature(f"mel@{MEL.identity[:9]}")) == ["b", "c"]
    assert {k: v for k, v in before["wave"][1].items() if k != "a"} == _contents(store)["wave"][1]
    upkeep.purge(store, 0)
    assert sorted(store.utterances) == ["b", "c"] and verify(store).damages == []


def test_bytes_are_those_that_a_purge_frees(store):
    upkeep.purge(store, 0)
    assert upkeep.remove(store, utterances=["a"]).bytes == 0, "its rows lie between those of others"
    removed = upkeep.remove(store, utterances=["b", "c", "b"])
    assert removed.rows == 8 and removed.bytes > 0
    assert removed.bytes <= upkeep.purge(store, 0)
    assert len(store.utterances) == 0 and verify(store).rows == 0


def test_unknown_names_change_nothing_and_say_what_there_is(store):
    before = _contents(store)
    asked: list[tuple[dict, type, str]] = [
        ({"feature": "mle"}, MissingFeature, "has: mel"),
        ({"feature": "mel@000"}, MissingFeature, MEL.identity[:9]),
        ({"speaker": "sx"}, MissingUtterance, "has: s[abc], s[abc], s[abc]"),
        ({"utterances": ["a", "d"]}, MissingUtterance, "Nothing was removed"),
        ({}, BadRequest, "one of the three"),
        ({"feature": "mel", "speaker": "sa"}, BadRequest, "one of the three")]
    for options, error, words in asked:
        with pytest.raises(error, match=words) as caught:
            upkeep.remove(store, **options)
        assert isinstance(caught.value, FeatstoreError)
    assert _contents(fs.open(store.path)) == before
