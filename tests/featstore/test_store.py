"""A store as its reader sees it: rows, slices, names, messages, other processes, removed segments, damage."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import featstore as fs
from featstore import segment as segments
from featstore import storage
from featstore import writer as writers
from featstore.errors import (
    BadRequest,
    CorruptSegment,
    MissingFeature,
    MissingUtterance,
    NotAStore,
    StaleFeature,
)

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MEL = fs.Spec(made_by="mel", version=1, kind="continuous", frame_rate=50, dim=3, dtype="float16")
F0 = fs.Spec(made_by="f0", version=1, kind="f0", frame_rate=200, dim=0, dtype="float32")
VOICE = fs.Spec(made_by="speaker", version=1, kind="global", dim=4, dtype="float32")


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Durability has tests of its own; here a sync is only slow."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def path(tmp_path) -> Path:
    """Three utterances with three features; one feature has two segments, rows span shards."""
    store = fs.create(tmp_path / "songs.zarr")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "INNER_BYTES", 60)
        patch.setattr(segments, "SHARD_BYTES", 240)
        patch.setattr(writers, "FOLD_BYTES", 0)
        with store.writer() as w:
            for name, spec in (("log-mel", MEL), ("f0", F0), ("speaker", VOICE)):
                w.declare(name, spec)
            for number, key in enumerate(["alto1/nino_dios", "alto1/b", "bass/ё"]):
                w.utterance({"key": key, "speaker": key.split("/")[0], "audio": f"{key}.wav", "flags": ["clipped"],
                             "extra": {"take": number}}, source=bytes([number + 1]) * 32, seconds=2.0)
                w.write(key, "log-mel", _mel(number))
                w.write(key, "f0", np.full(400, 100 + number, np.float32))
                w.write(key, "speaker", np.full(4, number, np.float32))
                w.commit()
    return tmp_path / "songs.zarr"


def _mel(number: int) -> np.ndarray:
    return (np.arange(300, dtype=np.float16).reshape(100, 3) + np.float16(number * 300)).astype(np.float16)


@pytest.fixture
def store(path) -> fs.Store:
    return fs.open(path)


@pytest.fixture(params=[False, True], ids=["read", "mapped"])
def either(path, request) -> fs.Store:
    """Opened in each of the ways in which frames are read."""
    return fs.open(path, mapped=request.param)


def test_repr_answers_the_first_questions(store, path):
    assert repr(store) == "<Store songs.zarr: 3 utterances, 2 speakers, 0.1 min; f0 log-mel speaker>"
    assert repr(store.features["log-mel"]).startswith("<log-mel@")
    assert repr(store.features["log-mel"]).endswith(": continuous, 50 Hz, dim 3, float16, 3 utterances>")
    assert repr(store["bass/ё", "f0"]) == "<f0 of bass/ё: (400,) float32>"


def test_empty_store_says_so(tmp_path):
    assert repr(fs.create(tmp_path / "e.zarr")) == "<Store e.zarr: 0 utterances, 0.0 min; no features>"


def test_utterance_comes_back_with_all_its_fields(store):
    found = store.utterances["bass/ё"]
    assert found == fs.StoredUtterance("bass/ё", audio="bass/ё.wav", speaker="bass", flags=("clipped",),
                                       extra={"take": 2}, source="03" * 32)
    assert list(store.utterances) == ["alto1/b", "alto1/nino_dios", "bass/ё"]
    assert store.utterances.speakers() == {"alto1", "bass"} and store.utterances.hours == pytest.approx(6 / 3600)


def test_feature_says_what_it_is(store):
    feature = store.features["log-mel"]
    assert (feature.frame_rate, feature.kind, feature.dim, feature.dtype) == (Fraction(50), "continuous", 3, np.float16)
    assert feature.spec == MEL and feature.identity == MEL.identity and feature.nbytes == 3 * 600
    assert sorted(feature.keys()) == sorted(store.utterances) and "alto1/b" in feature and "x" not in feature


def test_vector_per_utterance_has_no_frame_axis(store):
    row = store["alto1/b", "speaker"]
    assert row.shape == (4,) and np.array_equal(row[:], np.ones(4)) and row[2] == 1 and row[1:3].shape == (2,)
    assert np.array_equal(row.read(), np.ones(4)) and np.array_equal(np.asarray(row), np.ones(4))


SLICES = st.one_of(st.slices(130), st.integers(-100, 99), st.just(Ellipsis), st.just(()),
                   st.tuples(st.slices(100), st.integers(-3, 2)), st.tuples(st.slices(100), st.slices(3)),
                   st.tuples(st.just(Ellipsis), st.integers(0, 2)), st.lists(st.integers(0, 99), max_size=4))


@given(item=SLICES, number=st.integers(0, 2))
@settings(QUICK, max_examples=300)
def test_any_index_is_numpys_index(either, item, number):
    key = ["alto1/nino_dios", "alto1/b", "bass/ё"][number]
    found, expected = either[key, "log-mel"][item], _mel(number)[item]
    assert found.dtype == expected.dtype and found.shape == expected.shape and np.array_equal(found, expected)


def test_slice_reads_only_its_rows(store, monkeypatch):
    asked = []
    read = storage.read_many
    row = store["alto1/b", "log-mel"]
    row.read()
    monkeypatch.setattr(storage, "read_many", lambda ranges: asked.extend(ranges) or read(ranges))
    row[10:15]
    assert sum(len(out) for _, _, out in asked) == 5 * 3 * 2


def test_blocks_follow_one_another(store):
    row = store["alto1/nino_dios", "log-mel"]
    assert [len(block) for block in row.blocks(30)] == [30, 30, 30, 10]
    assert np.array_equal(np.concatenate(list(row.blocks(30))), _mel(0))


def test_scaled_rows_give_floats_in_full_scale(tmp_path):
    store = fs.create(tmp_path / "a.zarr")
    spec = fs.Spec(made_by="wave", version=1, kind="samples", frame_rate=100, dim=0, dtype="int16")
    with store.writer() as w:
        w.declare("wave", spec)
        w.write("a", "wave", np.array([-32768, 0, 16384], np.int16), scale=2 / 32768)
    row = store["a", "wave"]
    assert row.scale == 2 / 32768 and row.dtype == np.int16
    assert np.array_equal(row.as_float(), np.array([-2, 0, 1], np.float32)) and row.as_float().dtype == np.float32


def test_missing_feature_names_what_there_is_and_the_way_out(store):
    with pytest.raises(MissingFeature, match=r"no feature 'log-mal' \(it has: log-mel,.*-f log-mal"):
        store["alto1/b", "log-mal"]


def test_missing_utterance_names_the_nearest(store):
    with pytest.raises(KeyError, match=r"no utterance 'alto1/nina_dios' \(it has: alto1/nino_dios"):
        store["alto1/nina_dios", "f0"]
    with pytest.raises(MissingUtterance, match="it has: bass/ё"):
        store.utterances["bass/e"]
    assert store.utterances.get("bass/e") is None and store.utterances.get("bass/ё").speaker == "bass"


def test_utterance_without_the_feature_says_how_many_have_it(store):
    with store.writer() as w:
        w.utterance({"key": "new"})
    with pytest.raises(MissingFeature, match=r"new has no f0 .*; 3 of 4 utterances have it. Try: featstore extract"):
        store["new", "f0"]


@pytest.mark.parametrize("item", ["alto1/b", ("a", "b", "c")])
def test_store_is_asked_for_a_pair(store, item):
    with pytest.raises(BadRequest, match=r"expected store\[utterance, feature\]"):
        store[item]


def test_identity_is_pinned_by_a_prefix(store):
    short = MEL.identity[:16]
    for label in (f"log-mel@{short[:4]}", f"log-mel@{short}", f"log-mel@{MEL.identity}"):
        assert np.array_equal(store["bass/ё", label][:], _mel(2))
    assert store.identities("log-mel") == [short] and store.identities("nothing") == []
    with pytest.raises(MissingFeature, match="names 0 identities of log-mel"):
        store.feature("log-mel@ffffffffff")


@pytest.mark.parametrize("name", ["../up", "..", "a/b", "", "log-mel@..", "log-mel@../x", "/etc"])
def test_feature_name_never_leaves_the_store(store, name):
    with pytest.raises(MissingFeature, match=r"no feature|names 0 identities"):
        store.feature(name)


def test_why_says_what_differs(store):
    key = "alto1/b"
    assert store.why(key, "log-mel").state == "fresh" and store.why(key, "log-mel").differs == {}
    assert store.why(key, "log-mel", MEL, bytes([2]) * 32).state == "fresh"
    changed = dataclasses.replace(MEL, settings={"layer": 20}, version=2)
    found = store.why(key, "log-mel", changed)
    assert (found.state, found.differs) == ("stale", {"layer": (None, 20), "version": (1, 2)})
    found = store.why(key, "log-mel", MEL, bytes([9]) * 32)
    assert (found.state, found.differs) == ("stale", {"audio": ("02" * 6, "09" * 6)}) and "audio=" in found.reason
    with store.writer() as w:
        w.utterance({"key": "new"})
    assert store.why("new", "f0").state == "missing"
    with pytest.raises(MissingUtterance, match="no utterance 'alto1/c'"):
        store.why("alto1/c", "f0")


def test_imported_feature_is_never_called_fresh(tmp_path):
    store = fs.create(tmp_path / "a.zarr")
    with store.writer() as w:
        w.declare("hubert", fs.Spec(made_by="imported", version=1, kind="continuous", frame_rate=50, dim=2,
                                    dtype="float32", settings={"digest": "0123456789abcdef"}))
        w.write("a", "hubert", np.zeros((3, 2), np.float32))
    assert store.why("a", "hubert").state == "imported"
    assert store.features["hubert"].label == "imported:012345678"


def test_create_refuses_what_exists_and_what_has_no_parent(path, tmp_path):
    with pytest.raises(NotAStore, match="exists already; open it"):
        fs.create(path)
    with pytest.raises(NotAStore, match="does not exist; make it first"):
        fs.create(tmp_path / "no" / "a.zarr")


def test_what_is_not_a_store_is_named(tmp_path):
    import zarr

    with pytest.raises(NotAStore, match=r"does not exist. Make one: featstore extract"):
        fs.open(tmp_path / "nothing.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotAStore, match=r"is not a store: it has no zarr.json"):
        fs.open(tmp_path / "folder")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotAStore, match="is a file, expected the folder of a store"):
        fs.open(tmp_path / "file")
    zarr.create_group(str(tmp_path / "group.zarr"))
    with pytest.raises(NotAStore, match="is a Zarr group, but not a store of featstore"):
        fs.open(tmp_path / "group.zarr")
    for text, words in (("{", "not a JSON document"), ("[]", "holds list"), ("\xff", "not a JSON document")):
        (tmp_path / "folder" / "zarr.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(NotAStore, match=words):
            fs.open(tmp_path / "folder")


def test_newer_format_is_refused_with_the_cure(path):
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"]["featstore"]["format"] = 7
    (path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(NotAStore, match=r"has store format 7; this featstore reads up to 1. Update it: pip install"):
        fs.open(path)


def test_store_is_a_snapshot(path, store):
    other = fs.open(path)
    with store.writer() as w:
        w.write("new", "f0", np.ones(7, np.float32))
    assert "new" not in other.utterances and "new" not in other.features["f0"]
    other.refresh()
    assert "new" in other.utterances and "new" in store.features["f0"]


def test_zarr_python_walks_the_whole_store(path):
    import zarr

    group = zarr.open_group(str(path), mode="r")
    assert sorted(group.group_keys()) == ["features", "utterances"]
    frames = [np.asarray(array) for name, array in group.members(max_depth=None)
              if name.startswith("features/log-mel") and name.endswith("/frames")]
    assert sorted(array.tobytes() for array in frames) == sorted(_mel(n).tobytes() for n in range(3))


def test_tensorstore_reads_every_feature(store):
    import tensorstore

    for name, feature in store.features.items():
        for segment in feature.segments:
            kvstore = {"driver": "file", "path": str(segment.folder / "frames")}
            found = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
            expected = np.concatenate([block for record in segment.records for block in segment.blocks(record)])
            assert np.asarray(found).tobytes() == expected.tobytes(), name


def _read_in_child(store, queue) -> None:
    queue.put([store[key, "log-mel"][90:].tobytes() for key in store.utterances])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_reads_what_its_parent_opened(either):
    expected = [either[key, "log-mel"][90:].tobytes() for key in either.utterances]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(either, queue))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()


def test_fresh_process_reads_a_store_that_was_sent_to_it(either):
    expected = [either[key, "log-mel"][90:].tobytes() for key in either.utterances]
    code = ("import pickle, sys; store = pickle.loads(sys.stdin.buffer.read()); "
            "sys.stdout.buffer.write(pickle.dumps([store[k, 'log-mel'][90:].tobytes() for k in store.utterances]))")
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(either), capture_output=True, check=True)
    assert pickle.loads(done.stdout) == expected


def test_store_pickles_as_its_path(either):
    either["alto1/b", "log-mel"].read()
    again = pickle.loads(pickle.dumps(either))
    assert len(pickle.dumps(either)) < 300 and again.mapped is either.mapped
    assert np.array_equal(again["alto1/b", "log-mel"][:], _mel(1))


def test_every_way_of_reading_gives_the_bytes_that_zarr_gives(path):
    import zarr

    ways = [fs.open(path), fs.open(path, mapped=True)]
    for name in ways[0].features:
        for segment in ways[0].features[name].segments:
            whole = np.asarray(zarr.open_array(str(segment.folder / "frames"), mode="r")[...])
            for record in segment.records:
                start, key = int(record["offset"]), segment.key(record)
                expected = whole[start:start + int(record["length"])]
                assert [way[key, name].read().tobytes() for way in ways] == [expected.tobytes()] * 2


def test_a_shard_that_ends_early_is_named_by_a_mapped_store_too(path):
    store = fs.open(path, mapped=True)
    segment = store.features["log-mel"].segments[0]
    os.truncate(next((segment.folder / "frames").glob("c/0/*")), 16)
    with pytest.raises(CorruptSegment, match="has 16 bytes, expected"):
        store[segment.key(segment.records[0]), "log-mel"].read()


def test_threads_read_at_once(either):
    from concurrent.futures import ThreadPoolExecutor

    keys = list(either.utterances) * 30
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda key: either[key, "log-mel"].read().tobytes(), keys))
    assert found == [either[key, "log-mel"].read().tobytes() for key in keys]


def test_more_segments_are_read_than_files_are_kept_open(either, monkeypatch):
    monkeypatch.setattr(storage, "OPEN_FILES", 2)
    for number, key in enumerate(["alto1/nino_dios", "alto1/b", "bass/ё"] * 3):
        assert np.array_equal(either[key, "log-mel"][:], _mel(number % 3))


def _compact(path: Path, name: str) -> None:
    """Merge all segments of a feature into one, then remove them: what a compaction with --purge does."""
    feature = fs.open(path).features[name]
    merged = segments.SegmentWriter(feature.folder / "segments" / storage.new_id(), feature.dtype.name, feature.dim)
    for record in feature.index.records:
        source = feature.index.segments[int(record["segment"])]
        merged.copy(source.key(record), record, source.blocks(record))
    merged.commit({"feature": name, "replaces": [segment.id for segment in feature.segments]})
    for segment in feature.segments:
        storage.handles.forget(str(segment.folder))
        shutil.rmtree(segment.folder)


@pytest.mark.parametrize("warm", ["nothing read", "index read", "rows read", "row held"])
def test_reader_whose_segments_were_compacted_away_looks_again(path, warm):
    store = fs.open(path)
    feature = store.features["log-mel"]
    held = [feature[key] for key in store.utterances] if warm == "row held" else []
    if warm == "index read":
        len(feature)
    if warm == "rows read":
        assert all(len(feature[key].read()) for key in store.utterances)
    _compact(path, "log-mel")
    for row in held or [feature[key] for key in store.utterances]:
        number = ["alto1/nino_dios", "alto1/b", "bass/ё"].index(row.utterance)
        assert np.array_equal(row.read(), _mel(number)) and np.array_equal(row[7:9], _mel(number)[7:9])


def test_reader_of_utterances_looks_again_too(path):
    store = fs.open(path)
    assert "alto1/b" in store.utterances
    target = store.path / "utterances"
    merged = segments.SegmentWriter(target / "segments" / storage.new_id(), "uint8", 0)
    index = store.utterances.index
    for record in index.records:
        source = index.segments[int(record["segment"])]
        merged.copy(source.key(record), record, source.blocks(record))
    merged.commit({"replaces": [segment.id for segment in index.segments]})
    for segment in index.segments:
        storage.handles.forget(str(segment.folder))
        shutil.rmtree(segment.folder)
    again = fs.Store(path)
    assert store.utterances["alto1/b"] == again.utterances["alto1/b"]


def test_row_replaced_and_purged_while_it_was_held_is_refused_not_mixed_up(path):
    store = fs.open(path)
    row = store["alto1/b", "log-mel"]
    with fs.open(path).writer() as w:
        w.write("alto1/b", "log-mel", _mel(5)[:97])
    _compact(path, "log-mel")
    with pytest.raises(StaleFeature, match=r"alto1/b: log-mel was written anew .* open the store again"):
        row.read()
    assert np.array_equal(fs.open(path)["alto1/b", "log-mel"][:], _mel(5)[:97])


def test_segment_without_its_document_is_invisible(path):
    feature = fs.open(path).features["log-mel"]
    segment = feature.segments[1]
    (segment.folder / "zarr.json").unlink()
    again = fs.open(path)
    assert len(again.features["log-mel"]) == 2 and len(again.utterances) == 3


@pytest.mark.parametrize("junk", [".zarr.json.0123", "notes.txt", "0123"])
def test_foreign_files_do_not_disturb(path, junk):
    for folder in [path, path / "features", *path.glob("features/*/*/segments"), *path.glob("features/*/served"),
                   path / "utterances" / "segments"]:
        (folder / junk).write_text("x")
    store = fs.open(path)
    assert sorted(store.features) == ["f0", "log-mel", "speaker"] and len(store["bass/ё", "f0"]) == 400


def test_flipped_bit_is_found_when_checked_and_names_the_utterance(path):
    segment = fs.open(path).features["log-mel"].segments[1]
    shard = segment.folder / "frames" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    store = fs.open(path)
    with pytest.raises(CorruptSegment, match=r"alto1/b: log-mel does not match its checksum.*verify STORE --repair"):
        store["alto1/b", "log-mel"].read(check=True)
    assert store["alto1/b", "log-mel"].read().shape == (100, 3)
    assert np.array_equal(store["bass/ё", "log-mel"].read(check=True), _mel(2))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can become another user")
def test_store_that_may_not_be_written_is_read_and_says_so(path):
    with tempfile.TemporaryDirectory() as public:
        Path(public).chmod(0o755)
        shutil.copytree(path, f"{public}/songs.zarr")
        os.seteuid(65534)
        try:
            store = fs.open(f"{public}/songs.zarr")
            assert store["alto1/b", "f0"][0] == 101
            with pytest.raises(PermissionError, match=r"songs.zarr/.* may not be written \(Permission denied\)"):
                store.writer().write("x", "f0", np.ones(3, np.float32))
            with pytest.raises(PermissionError, match=r"b.zarr.* may not be written"):
                fs.create(f"{public}/b.zarr")
        finally:
            os.seteuid(0)


def test_store_that_is_no_longer_where_it_was_is_not_an_empty_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with fs.create("a.zarr").writer() as w:
        w.declare("x", fs.Spec(made_by="mine", version=1, kind="continuous", frame_rate=50, dim=2))
        w.write("u", "x", np.ones((3, 2), np.float32))
    for there in (True, False):
        stores = [fs.open("a.zarr") for _ in range(3)]
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path if there else tmp_path / "elsewhere")
        looks = (lambda s: list(s.utterances), lambda s: len(s.features["x"]), fs.Store.refresh)
        for store, look in zip(stores, looks, strict=True):
            if there:
                look(store)
            else:
                with pytest.raises(fs.errors.NotAStore, match=r"is gone|does not exist"):
                    look(store)
