"""Writing: what is refused and leaves no trace, which identity a name stands for, and a store that equals a dict."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import featstore as fs
from featstore import segment as segments
from featstore import writer as writers
from featstore.errors import BadRequest, IdentityMismatch, LengthMismatch, MissingUtterance

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MEL = fs.Spec(made_by="mel", version=1, kind="continuous", frame_rate=50, dim=3, dtype="float16")
MEL2 = dataclasses.replace(MEL, settings={"layer": 20})
F0 = fs.Spec(made_by="f0", version=1, kind="f0", frame_rate=200, dim=0, dtype="float32")


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Durability has tests of its own; here a sync is only slow."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def store(tmp_path) -> fs.Store:
    return fs.create(tmp_path / "songs.zarr")


def _ones(frames: int = 4, value: float = 1) -> np.ndarray:
    return np.full((frames, 3), value, np.float16)


def _contents(store: fs.Store) -> dict:
    """All a reader can see: utterances, and each feature's identity and arrays."""
    store.refresh()
    seen = {"": sorted(store.utterances)}
    return seen | {name: (feature.short, {key: feature[key].read().tobytes() for key in list(feature.keys())})
                   for name, feature in store.features.items()}


KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda key: len(key.encode()) <= 500)


ODD = ["../x", "/", "a\nb", "\0", ".", "..", "~", "CON", "é", "e\u0301", "ключ " * 45, "x" * 500, "/etc/passwd",
       "a/../../b", "%2e%2e", "zarr.json"]


@given(keys=st.sets(KEYS | st.sampled_from(ODD), min_size=1, max_size=8))
@QUICK
def test_any_key_is_kept_and_none_becomes_a_file_name(tmp_path, keys):
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    store = fs.create(folder / "a.zarr")
    with store.writer() as w:
        w.declare("x", MEL)
        for number, key in enumerate(sorted(keys)):
            w.write(key, "x", _ones(value=number))
    assert list(store.utterances) == sorted(keys)
    assert all(store[key, "x"][0, 0] == number for number, key in enumerate(sorted(keys)))
    assert list(folder.iterdir()) == [folder / "a.zarr"]
    fixed = {"features", "utterances", "x", "segments", "served", "frames", "index", "keys", "c", "0", "zarr.json"}
    names = {name for _, folders, files in os.walk(folder / "a.zarr") for name in folders + files}
    assert all(set(name) <= set("0123456789abcdef-") for name in names - fixed)


@pytest.mark.parametrize(("key", "words"), [("", "has 0 bytes"), ("x" * 501, "has 501 bytes, expected 1 to 500"),
                                            ("é" * 251, "has 502 bytes"), ("a\udcff", "is not Unicode text")])
def test_impossible_key_is_refused(store, key, words):
    with store.writer() as w:
        w.declare("x", MEL)
        with pytest.raises(BadRequest, match=words):
            w.write(key, "x", _ones())
        with pytest.raises(BadRequest, match=words):
            w.utterance({"key": key})
    assert len(store.utterances) == 0


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "-x", "F0", "f_0", "x" * 65, "f0\n", "ё", "x@y"])
def test_feature_name_that_is_none_is_refused(store, name):
    with store.writer() as w, pytest.raises(BadRequest, match=r"feature name .* expected a-z or 0-9"):
        w.declare(name, MEL)
    assert store.features == {}


BAD = [
    ("x", _ones() * np.float16("nan"), ValueError, "new: x has 12 values that are NaN or infinite of 12"),
    ("x", np.array([[0, 0, np.inf]], np.float32), ValueError, "has 1 values that are NaN or infinite of 3"),
    ("x", np.full((4, 3), 70000, np.float32), ValueError, "reaches 7e[+]04, more than float16 can hold.*dtype=float32"),
    ("x", np.full((4, 3), 10**6), ValueError, "reaches 1e[+]06, more than float16 can hold"),
    ("x", np.ones((4, 2), np.float16), LengthMismatch, r"has shape \(4, 2\), expected \(T, 3\)"),
    ("x", np.ones(4, np.float16), LengthMismatch, r"has shape \(4,\), expected \(T, 3\)"),
    ("x", np.zeros((0, 3), np.float16), LengthMismatch, "has no frames"),
    ("x", [], LengthMismatch, "has no frames"),
    ("x", iter([_ones(), _ones(), _ones() * np.float16("inf")]), ValueError, "NaN or infinite"),
    ("f0", np.array([100, -1, 0], np.float32), ValueError, "has negative values; f0 is in Hz"),
    ("f0", np.ones((3, 1), np.float32), LengthMismatch, r"has shape \(3, 1\), expected \(T,\)"),
    ("wave", np.array([40000]), ValueError, "has values that int16 cannot hold"),
    ("wave", np.array([0.5]), ValueError, "is float64, its spec says int16: round it"),
    ("late", np.full((2, 5), np.nan, np.float32), ValueError, "NaN"),
]


@pytest.mark.parametrize(("name", "frames", "error", "words"), BAD)
@pytest.mark.parametrize("inner", [16, 128 * 1024])
def test_refused_array_leaves_no_trace(store, monkeypatch, name, frames, error, words, inner):
    monkeypatch.setattr(segments, "INNER_BYTES", inner)
    monkeypatch.setattr(segments, "SHARD_BYTES", 4 * inner)
    if not isinstance(frames, np.ndarray | list):
        frames = [_ones(), _ones(), _ones() * np.float16("inf")]
    with store.writer() as w:
        w.declare("x", MEL)
        w.declare("f0", F0)
        w.declare("wave", fs.Spec(made_by="wave", version=1, kind="samples", frame_rate=16000, dim=0, dtype="int16"))
        w.declare("late", fs.Spec(made_by="late", version=1, kind="continuous", frame_rate=50))
        w.write("before", "x", _ones(5, 2))
        with pytest.raises(error, match=words):
            w.write("new", name, iter(frames) if isinstance(frames, list) else frames)
        w.write("after", "x", _ones(6, 3))
        w.write("after", "f0", np.ones(3, np.float32))
    assert sorted(store.utterances) == ["after", "before"] and "late" not in store.features
    assert sorted(store.features["x"].keys()) == ["after", "before"]
    assert np.array_equal(store["before", "x"][:], _ones(5, 2)) and np.array_equal(store["after", "x"][:], _ones(6, 3))
    frames_on_disk = sum(s.facts["frames"] for s in store.features["x"].segments)
    assert frames_on_disk == 11


def test_refused_first_array_does_not_settle_the_dim(store):
    with store.writer() as w:
        w.declare("x", fs.Spec(made_by="x", version=1, kind="continuous", frame_rate=50))
        for bad in (np.full((2, 5), np.nan, np.float32), []):
            with pytest.raises(ValueError, match=r"NaN|no frames"):
                w.write("a", "x", bad)
        w.write("a", "x", _ones())
    assert (store.features["x"].dim, store.features["x"].dtype) == (3, np.float16)


def test_duration_that_is_not_the_audios_is_refused(store):
    with store.writer() as w:
        w.declare("x", MEL)
        w.utterance({"key": "a"}, seconds=2.0)
        for frames in (94, 106):
            with pytest.raises(LengthMismatch, match=rf"a: x lasts {frames / 50:.3f} s \({frames} frames at 50 Hz\), "
                                                     r"its audio 2.000 s; at most 0.1 s and one frame"):
                w.write("a", "x", _ones(frames))
        w.write("a", "x", _ones(95))
        w.write("a", "x", _ones(105))
    assert store["a", "x"].shape == (105, 3)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint8"])
def test_array_of_another_dtype_is_stored_in_the_specs(store, dtype):
    with store.writer() as w:
        w.declare("x", MEL)
        w.write("a", "x", np.array([[1, 2, 3]], dtype))
    assert store["a", "x"].dtype == np.float16 and store["a", "x"][:].tolist() == [[1, 2, 3]]


def test_closed_writer_refuses(store):
    with store.writer() as w:
        w.declare("x", MEL)
    for call in (lambda: w.write("a", "x", _ones()), lambda: w.utterance({"key": "a"}), lambda: w.delete("a"),
                 lambda: w.declare("y", MEL), w.commit):
        with pytest.raises(ValueError, match=r"is closed; store.writer"):
            call()
    w.close()


def test_exception_in_the_block_keeps_what_was_written(store):
    with pytest.raises(RuntimeError, match="stop"), store.writer() as w:
        w.declare("x", MEL)
        w.write("a", "x", _ones())
        raise RuntimeError("stop")
    assert np.array_equal(store["a", "x"][:], _ones())


def test_nothing_is_visible_before_its_commit(store):
    other = fs.open(store.path)
    w = store.writer(commit_every_s=1e9)
    w.declare("x", MEL)
    w.write("a", "x", _ones())
    assert _contents(other) == {"": [], "x": (MEL.identity[:16], {})}
    w.commit()
    assert _contents(other)["x"][1] == {"a": _ones().tobytes()}
    w.close()


def test_writer_commits_by_time_and_by_size(store, monkeypatch):
    with store.writer(commit_every_s=0) as w:
        w.declare("x", MEL)
        w.write("a", "x", _ones())
        assert "a" in fs.open(store.path).features["x"]
    monkeypatch.setattr(writers, "COMMIT_BYTES", 60)
    with store.writer(commit_every_s=1e9) as w:
        w.write("b", "x", _ones(8))
        assert "b" not in fs.open(store.path).features["x"]
        w.write("c", "x", _ones(1))
        assert "c" in fs.open(store.path).features["x"]


def test_writer_folds_its_own_small_segments(store):
    with store.writer() as w:
        w.declare("x", MEL)
        for number in range(40):
            w.write(f"k{number % 25}", "x", _ones(value=number))
            w.commit()
    assert len(set(store.features["x"].index.records["segment"])) == 1  # one segment answers for all
    assert all(store[f"k{number % 25}", "x"][0, 0] == number for number in range(15, 40))


def test_folding_leaves_equal_generations_in_their_order(store):
    with store.writer() as w:
        w.declare("x", MEL)
        w.write("other", "x", _ones())
    first, second = store.writer(commit_every_s=1e9), store.writer(commit_every_s=1e9)
    first.write("a", "x", _ones(value=1))
    second.write("a", "x", _ones(value=2))                              # of the same generation; begun later
    first.commit()
    second.commit()
    first.write("b", "x", _ones())
    first.close()                                                       # its two segments become one, later than both
    assert fs.open(store.path)["a", "x"][0, 0] == 2
    second.close()


def test_many_rows_leave_a_catalogue_that_changes_nothing(store, monkeypatch):
    monkeypatch.setattr(writers, "CATALOGUE_ROWS", 3)
    with store.writer() as w:
        w.declare("x", MEL)
        for number in range(8):
            w.utterance({"key": f"k{number}"}, source=bytes([1]) * 32)
            w.write(f"k{number}", "x", _ones(value=number))
    with store.writer() as w:                                           # the recordings change: a new row each
        for number in range(8):
            w.utterance({"key": f"k{number}"}, source=bytes([2]) * 32)
            w.write(f"k{number}", "x", _ones(value=10 + number))
    folders = [store.features["x"].folder / "catalogue", store.path / "utterances" / "catalogue"]
    assert all(len(list(folder.glob("*-*"))) == 2 for folder in folders)
    with_catalogue = _contents(store)
    assert [store[f"k{n}", "x"][0, 0] for n in range(8)] == list(range(10, 18))
    for folder in folders:
        shutil.rmtree(folder)
    assert _contents(store) == with_catalogue


def test_row_of_the_current_audio_wins_whatever_the_catalogue_saw(store, monkeypatch):
    monkeypatch.setattr(writers, "CATALOGUE_ROWS", 0)
    one, two = bytes([1]) * 32, bytes([2]) * 32
    with store.writer() as w:
        w.declare("x", MEL)
        w.utterance({"key": "a"}, source=one)
        w.write("a", "x", _ones(value=1))
    with store.writer() as w:
        w.utterance({"key": "a"}, source=two)
        w.write("a", "x", _ones(value=2))
    with store.writer() as w:
        w.utterance({"key": "a"}, source=one)                           # the old recording is put back
    assert store["a", "x"][0, 0] == 1 and store.why("a", "x").state == "fresh"


def test_other_settings_under_one_name_are_refused_with_both_ways_out(store):
    with store.writer() as w:
        w.declare("mel", MEL)
        w.write("a", "mel", _ones())
    before = _contents(store)
    with store.writer() as w, pytest.raises(IdentityMismatch) as caught:
        w.declare("mel", MEL2)
    message = str(caught.value)
    assert "songs.zarr has 'mel' with layer=None; you ask for layer=20. Nothing was changed." in message
    assert "keep both:  give it another name, such as -f mel-2=mel" in message
    assert "replace:    add --replace (1 utterances; the old one is served until" in message
    assert _contents(store) == before


def test_name_moves_when_its_replacement_is_complete_not_before(store):
    with store.writer() as w:
        w.declare("mel", MEL)
        w.write("a", "mel", _ones(value=1))
        w.write("b", "mel", _ones(value=1))
    reader = fs.open(store.path)
    w = store.writer()
    w.declare("mel", MEL2, replace=True)
    w.write("a", "mel", _ones(value=2))
    w.commit()
    assert fs.open(store.path)["a", "mel"][0, 0] == 1
    assert fs.open(store.path)["a", f"mel@{MEL2.identity[:8]}"][0, 0] == 2
    w.write("b", "mel", _ones(value=2))
    w.close()
    assert [store[key, "mel"][0, 0] for key in "ab"] == [2, 2]
    assert reader["a", "mel"][0, 0] == 1                                # opened before: keeps its identity
    assert store["a", f"mel@{MEL.identity[:8]}"][0, 0] == 1 and len(store.identities("mel")) == 2


def test_replacement_that_fails_leaves_the_old_identity(store):
    with store.writer() as w:
        w.declare("mel", MEL)
        w.write("a", "mel", _ones(value=1))
    with pytest.raises(RuntimeError, match="stop"), store.writer() as w:
        w.declare("mel", MEL2, replace=True)
        w.write("a", "mel", _ones(value=2))
        raise RuntimeError("stop")
    assert store["a", "mel"][0, 0] == 1
    with store.writer() as w:                                           # and the next run takes over what is there
        w.declare("mel", MEL2, replace=True)
        assert "a" in w._features["mel"]
    assert store["a", "mel"][0, 0] == 2


def test_name_under_which_nothing_was_stored_is_free(store):
    with store.writer() as w:
        w.declare("mel", MEL)
    with store.writer() as w:
        w.declare("mel", MEL2)
        w.write("a", "mel", _ones())
    assert store.features["mel"].spec == MEL2


def test_one_writer_does_not_take_its_own_name_for_other_settings(store):
    with store.writer() as w:
        w.declare("mel", MEL)
        w.write("a", "mel", _ones())
        with pytest.raises(IdentityMismatch, match="you ask for layer=20"):
            w.declare("mel", MEL2)
    assert len(store.features["mel"]) == 1


def test_declaring_again_keeps_what_is_not_committed(store):
    with store.writer() as w:
        w.declare("mel", MEL)
        w.write("a", "mel", _ones())
        w.declare("mel", MEL)
        w.write("b", "mel", _ones())
    assert sorted(store.features["mel"].keys()) == ["a", "b"]


def test_known_name_needs_no_declaration(store):
    with store.writer() as w:
        w.declare("mel", MEL)
        w.write("a", "mel", _ones())
    with store.writer() as w:
        w.write("b", "mel", _ones())
    assert sorted(store.features["mel"].keys()) == ["a", "b"]


def test_deleted_feature_is_gone_and_may_come_back(store):
    with store.writer() as w:
        w.declare("mel", MEL)
        for key in "abc":
            w.write(key, "mel", _ones())
    with store.writer() as w:
        w.delete("a", "mel")
        w.delete("b", "mel")
        w.write("b", "mel", _ones(7))
        w.write("d", "mel", _ones())
        w.delete("d", "mel")
    assert sorted(store.features["mel"].keys()) == ["b", "c"] and sorted(store.utterances) == ["a", "b", "c", "d"]
    assert store["b", "mel"].shape == (7, 3)


def test_deleted_utterance_is_gone_with_every_identity_of_every_feature(store):
    with store.writer() as w:
        w.declare("mel", MEL)
        w.declare("f0", F0)
        for key in "ab":
            w.write(key, "mel", _ones())
            w.write(key, "f0", np.ones(3, np.float32))
    with store.writer() as w:
        w.declare("mel", MEL2, replace=True)
        w.write("a", "mel", _ones())
        w.write("b", "mel", _ones())
    with store.writer() as w:
        w.delete("a")
        with pytest.raises(MissingUtterance, match="no utterance 'a'"):
            w.delete("a")
    assert list(store.utterances) == ["b"]
    for label in ("mel", f"mel@{MEL.identity[:8]}", "f0"):
        assert list(store.feature(label).keys()) == ["b"]


def test_utterance_that_was_deleted_is_new_when_it_is_written_again(store):
    with store.writer() as w:
        w.declare("mel", MEL)
        w.utterance({"key": "a", "speaker": "x"}, source=bytes([1]) * 32, seconds=9.0)
        w.delete("a")
        w.write("a", "mel", _ones())
    assert store.utterances["a"] == fs.StoredUtterance("a", source="00" * 32)


def test_deletes_and_writes_of_one_writer_keep_their_order(store):
    with store.writer() as w:
        w.declare("mel", MEL)
        w.write("a", "mel", _ones())
    with store.writer() as w:
        w.delete("a", "mel")                                            # before the name is used for writing
        for value in range(5):
            w.write("a", "mel", _ones(value=value))
            w.commit()
        w.delete("a", "mel")
    assert "a" not in store.features["mel"]


class StoreIsADictionary(RuleBasedStateMachine):
    """Random operations of two interleaved writers; a dictionary says what a reader must then see.

    The rule of which row wins: a writer gives a key 1 + the highest generation it has seen, which is what was
    committed when it was opened and what it wrote itself; among equal generations the later segment wins.
    """

    keys = st.sampled_from(["a", "b", "../c", "ключ"])
    who = st.integers(0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="featstore-machine-"))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fsync", lambda fd: None)
        self.patch.setattr(segments, "INNER_BYTES", 32)
        self.patch.setattr(segments, "SHARD_BYTES", 100)
        self.patch.setattr(writers, "FOLD_COUNT", 3)
        self.patch.setattr(writers, "CATALOGUE_ROWS", 2)
        self.store = fs.create(self.home / "a.zarr")
        self.rows: dict[str, list[tuple[int, str, bytes | None]]] = {}  # committed: (generation, segment, bytes)
        self.writers: list[fs.Writer | None] = [None, None]
        self.seen: list[dict[str, int]] = [{}, {}]
        self.alive: list[set[str]] = [set(), set()]                     # what each writer believes to be there
        self.pending: list[list[tuple[str, int, bytes | None]]] = [[], []]

    @initialize()
    def declared(self) -> None:
        with self.store.writer() as w:
            w.declare("x", MEL)
            w.write("there", "x", _ones())
        self.rows["there"] = [(1, "", _ones().tobytes())]

    def writer(self, who: int) -> fs.Writer:
        if self.writers[who] is None:
            self.writers[who] = writer = self.store.writer(commit_every_s=1e9)
            writer.declare("x", MEL)  # a writer looks at a feature when it is first named: here, at once
            self.seen[who] = {key: max(row[0] for row in rows) for key, rows in self.rows.items()}
            self.alive[who] = set(self.answers())
        return self.writers[who]

    def next_generation(self, who: int, key: str) -> int:
        self.seen[who][key] = self.seen[who].get(key, 0) + 1
        return self.seen[who][key]

    @rule(who=who, key=keys, frames=st.integers(1, 30), value=st.integers(0, 1000))
    def write(self, who, key, frames, value) -> None:
        self.writer(who).write(key, "x", _ones(frames, value))
        self.pending[who].append((key, self.next_generation(who, key), _ones(frames, value).tobytes()))
        self.alive[who].add(key)

    @rule(who=who, key=keys)
    def refused(self, who, key) -> None:
        with pytest.raises(ValueError, match="NaN"):
            self.writer(who).write(key, "x", iter([_ones(9), _ones() * np.float16("nan")]))

    @rule(who=who, key=keys)
    def delete(self, who, key) -> None:
        writer = self.writer(who)
        with contextlib.suppress(MissingUtterance):                     # of an utterance it never saw
            writer.delete(key, "x")
        if key in self.alive[who]:
            self.alive[who].discard(key)
            self.pending[who].append((key, self.next_generation(who, key), None))

    @rule(who=who)
    @precondition(lambda self: any(self.writers))
    def commit(self, who) -> None:
        if self.writers[who] is not None:
            target = self.writers[who]._identities.get(self.store.features["x"].folder)
            name = target.segment.folder.name if target is not None and target.segment is not None else ""
            self.writers[who].commit()
            self.committed(who, name)

    @rule(who=who)
    @precondition(lambda self: any(self.writers))
    def close(self, who) -> None:
        if self.writers[who] is not None:
            self.commit(who)
            self.writers[who].close()
            self.writers[who] = None

    def committed(self, who: int, segment: str) -> None:
        for key, generation, data in self.pending[who]:
            self.rows.setdefault(key, []).append((generation, segment, data))
        self.pending[who] = []

    def answers(self) -> dict[str, bytes]:
        winners = {key: max(rows, key=lambda row: row[:2])[2] for key, rows in self.rows.items()}
        return {key: data for key, data in winners.items() if data is not None}

    @rule()
    def reopen(self) -> None:
        self.store = fs.open(self.store.path)

    @rule()
    def drop_catalogues(self) -> None:
        for folder in self.store.path.rglob("catalogue"):
            shutil.rmtree(folder)

    @invariant()
    def reader_sees_the_dictionary(self) -> None:
        seen = fs.open(self.store.path).features
        if "x" in seen:
            found = {key: seen["x"][key].read(check=True).tobytes() for key in list(seen["x"].keys())}
            assert found == self.answers()

    def teardown(self) -> None:
        for writer in self.writers:
            if writer is not None:
                writer.close()
        self.patch.undo()
        shutil.rmtree(self.home)


StoreIsADictionary.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestStoreIsADictionary = StoreIsADictionary.TestCase
