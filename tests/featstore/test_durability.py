"""What survives: a full disk, kill -9, a power cut (by the order of syncs); and the bytes on disk, frozen."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

import featstore as fs
from featstore import segment as segments
from featstore import shards, storage
from featstore import writer as writers
from featstore.compact import compact
from featstore.errors import CorruptSegment, DiskFull
from featstore.verify import verify

DATA = Path(__file__).resolve().parents[1] / "data"
MEL = fs.Spec(made_by="mel", version=1, kind="continuous", frame_rate=50, dim=3, dtype="float16")


def _ones(frames: int = 4, value: float = 1) -> np.ndarray:
    return np.full((frames, 3), value, np.float16)


def _seen(path: Path) -> dict[str, float]:
    feature = fs.open(path).features["x"]
    return {key: float(feature[key].read(check=True)[0, 0]) for key in sorted(feature.keys())}


class _Disk:
    """Fails the n-th write after `fill(n)` with "no space left", half of its bytes written; and all that follow."""

    def __init__(self, monkeypatch) -> None:
        self.left: int | None = None
        real = os.write

        def write(file, data) -> int:
            if self.left is None:
                return real(file.fileno(), data)
            self.left -= 1
            if self.left >= 0:
                return real(file.fileno(), data)
            real(file.fileno(), data[:len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        def write_all(file, data) -> None:
            while len(data):
                data = data[write(file, data):]

        def write_file(path, data) -> None:
            with storage.disk_room(path), path.open("wb", buffering=0) as file:
                write_all(file, memoryview(data))

        monkeypatch.setattr(shards, "_write_all", write_all)
        monkeypatch.setattr(storage, "write", write_file)

    def fill(self, writes: int) -> None:
        self.left = writes

    def free(self) -> None:
        self.left = None


@pytest.fixture
def disk(monkeypatch) -> _Disk:
    monkeypatch.setattr(segments, "INNER_BYTES", 60)
    monkeypatch.setattr(segments, "SHARD_BYTES", 240)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    return _Disk(monkeypatch)


@pytest.mark.parametrize("codec", ["raw", "zstd", "pcodec"])
def test_write_on_a_full_disk_is_refused_and_the_writer_goes_on(tmp_path, disk, codec):
    store = fs.create(tmp_path / "a.zarr")
    with store.writer() as w:
        w.declare("x", MEL, codec=codec)
        w.write("a", "x", _ones(50, 1))
        w.commit()
        w.write("b", "x", _ones(11, 2))
        for writes in range(4):
            disk.fill(writes)
            with pytest.raises(DiskFull, match=r"no space left .*committed before is kept. Free some room"):
                w.write("c", "x", _ones(150, 3))
            assert _seen(store.path) == {"a": 1}
        disk.free()
        w.write("d", "x", _ones(70, 4))
        w.write("c", "x", _ones(150, 5))
    assert _seen(store.path) == {"a": 1, "b": 2, "c": 5, "d": 4}
    assert store["c", "x"].shape == (150, 3)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("writes", range(9))
def test_commit_on_a_full_disk_can_be_repeated_when_there_is_room(tmp_path, disk, writes, codec):
    store = fs.create(tmp_path / "a.zarr")
    w = store.writer()
    w.declare("x", MEL, codec=codec)
    w.write("a", "x", _ones(5, 1))
    w.commit()
    w.write("a", "x", _ones(90, 2))
    w.write("b", "x", _ones(33, 3))
    disk.fill(writes)
    with pytest.raises(DiskFull, match="Free some room"):
        w.commit()
    assert _seen(store.path) == {"a": 1}
    disk.free()
    w.write("c", "x", _ones(47, 4))                                     # also between the two
    w.commit()
    assert _seen(store.path) == {"a": 2, "b": 3, "c": 4}
    w.close()
    assert _seen(store.path) == {"a": 2, "b": 3, "c": 4} and store["c", "x"].shape == (47, 3)


def test_fold_on_a_full_disk_leaves_the_segments_as_they_are(tmp_path, disk, monkeypatch):
    store = fs.create(tmp_path / "a.zarr")
    w = store.writer()
    w.declare("x", MEL)
    for number in range(4):
        w.write(f"k{number}", "x", _ones(40, number))
        w.commit()
    disk.fill(2)
    w.close()
    disk.free()
    assert _seen(store.path) == {f"k{number}": number for number in range(4)}


def test_data_of_a_failed_sync_is_never_committed(tmp_path, monkeypatch):
    store = fs.create(tmp_path / "a.zarr")
    w = store.writer()
    w.declare("x", MEL)
    w.write("a", "x", _ones(value=1))
    w.commit()
    w.write("b", "x", _ones(value=2))
    sync = os.fsync

    def fails(fd) -> None:
        if "/features/x/" in str(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(errno.EIO, "Input/output error")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        w.commit()
    monkeypatch.setattr(os, "fsync", sync)                              # the kernel reports a lost page only once
    with pytest.raises(CorruptSegment, match=r"the disk failed to keep .* run the same command again"):
        w.commit()
    assert _seen(store.path) == {"a": 1}


def test_small_file_system_fills_up_and_is_used_again(tmp_path):
    mounted = tmp_path / "small"
    mounted.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", mounted], capture_output=True, text=True,
                          check=False) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip() if done else 'no mount'}")
    try:
        (mounted / "ballast").write_bytes(bytes(1_000_000))
        store = fs.create(mounted / "a.zarr")
        w = store.writer()
        w.declare("x", MEL)
        written = committed = 0
        with pytest.raises(DiskFull, match="no space left"):
            while True:
                w.write(f"k{written:04}", "x", _ones(10_000, written % 50))
                written += 1
                if written % 5 == 0:
                    w.commit()
                    committed = written
        kept = _seen(store.path)
        assert len(kept) == committed >= 5
        assert all(value == int(key[1:]) % 50 for key, value in kept.items())
        (mounted / "ballast").unlink()
        w.write(f"k{written:04}", "x", _ones(10_000, written % 50))
        w.commit()
        assert list(_seen(store.path)) == [f"k{number:04}" for number in range(written + 1)]
        w.close()
        storage.handles.forget(str(mounted))
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)


NURSERY = """
import os, signal, sys, traceback
from hashlib import blake2b
import numpy as np, featstore as fs
from featstore import segment, writer
from featstore.compact import compact
os.fsync = lambda fd: None       # the page cache survives a kill; without syncs there are more moments to be killed in
writer.FOLD_COUNT = 4
segment.INNER_BYTES, segment.SHARD_BYTES, writer.LINK_BYTES = 512, 4096, 4096
writer.CATALOGUE_ROWS = 5
SPEC = fs.Spec(made_by="mel", version=1, kind="continuous", frame_rate=50, dim=8, dtype="uint8")

def frames(key, n):
    return np.tile(np.frombuffer(blake2b(key.encode(), digest_size=8).digest(), "u1"), (1 + n % 400, 1))

def write(store, name, first, report):
    file = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for start in range(int(first), 10**9, 12):
        with store.writer(commit_every_s=1e9) as w:
            w.declare("x", SPEC)
            for number in range(start, start + 12, 3):
                for n in range(number, number + 3):
                    for key in (f"{name}/{n}", f"shared/{n % 5}"):
                        w.write(key, "x", frames(key, n))
                w.commit()
                os.write(file, f"{number + 2}\\n".encode())

def merge(store, grace_s):
    while True:
        compact(store, purge=True, grace_s=float(grace_s))

children = set()
print("ready", flush=True)
for line in sys.stdin:
    job, *words = line.split()
    if job == "kill":
        children.remove(int(words[0]))
        os.kill(int(words[0]), signal.SIGKILL)
        print(os.waitpid(int(words[0]), 0)[1], flush=True)
        continue
    child = os.fork()
    if not child:
        try:
            {"write": write, "merge": merge}[job](fs.open(words[0]), *words[1:])
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    children.add(child)
    print(child, flush=True)
for child in children:
    os.kill(child, signal.SIGKILL)
"""


class _Nursery:
    """Starts and kills processes that write to a store or compact it; one that ended by itself is an error."""

    def __enter__(self) -> _Nursery:
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdout.readline() == "ready\n", self.process.stderr.read()
        return self

    def start(self, *words: object) -> int:
        return int(self._ask(*words))

    def kill(self, child: int) -> None:
        status = int(self._ask("kill", child))
        assert status == signal.SIGKILL, f"ended by itself: {status}; {self._end()}"

    def _ask(self, *words: object) -> str:
        self.process.stdin.write(" ".join(str(word) for word in words) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def _end(self) -> str:
        self.process.stdin.close()
        self.process.stdin = None
        return self.process.communicate()[1]

    def __exit__(self, kind: object, *_: object) -> None:
        if self.process.stdin is not None:
            said = self._end()
            assert kind is not None or said == ""


def _right(key: str, frames: np.ndarray) -> bool:
    return len(frames) > 0 and (frames == np.frombuffer(blake2b(key.encode(), digest_size=8).digest(), "u1")).all()


def _reported(path: Path) -> int:
    """The last number that a writer said was committed; -1 before the first."""
    numbers = [int(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] \
        if path.exists() else []
    return max(numbers, default=-1)


class _Killed:
    """Four writers and a compaction, killed again and again; after each time the store is looked at as a whole."""

    def __init__(self, folder: Path) -> None:
        self.path, self.reports = folder / "a.zarr", {name: folder / name for name in ("one", "two", "three", "four")}
        self.first = dict.fromkeys(self.reports, 0)
        self.kills = 0
        self.checked: set[str] = set()
        fs.create(self.path)

    def round(self, nursery: _Nursery, wait_s: float) -> None:
        running = [nursery.start("write", self.path, name, self.first[name], report)
                   for name, report in self.reports.items()]
        running.append(nursery.start("merge", self.path, 3600))
        time.sleep(wait_s)
        for child in running:
            nursery.kill(child)
        self.kills += len(self.reports)

    def look(self, everything: bool, at_work: bool = False) -> int:
        """Rows that are there: all that was reported, nothing by halves, nothing that is wrong."""
        reported = {name: _reported(report) for name, report in self.reports.items()}
        store = fs.open(self.path)
        feature = store.features.get("x")
        found = set(feature) if feature is not None else set()
        for name, last in reported.items():
            mine = {int(key.split("/")[1]) for key in found if key.startswith(f"{name}/")}
            lost = set(range(last + 1)) - mine
            assert lost == set(), f"{name}: lost {sorted(lost)}"
            assert at_work or mine <= set(range(last + 4)), f"{name}: {max(mine)} after {last}: more than one commit"
            assert len(mine) % 3 == 0, f"{name}: a commit is visible in part"
            self.first[name] = len(mine)
        some = found if everything else found - self.checked
        some = {key for key in some if not at_work or not key.startswith("shared/")}  # those are written anew meanwhile
        wrong = [key for key in some if not _right(key, feature[key].read(check=True))]
        assert wrong == []
        assert found <= set((fs.open(self.path) if at_work else store).utterances), "a feature without its utterance"
        self.checked |= some
        return len(found)


def _kill_again_and_again(folder: Path, rounds: int) -> _Killed:
    chance, killed = random.Random(0), _Killed(folder)
    with _Nursery() as nursery:
        for number in range(rounds):
            killed.round(nursery, chance.uniform(0, 0.25))
            killed.look(everything=number % 10 == 9)
    return killed


def test_killed_writers_lose_nothing_that_was_committed(tmp_path):
    assert _kill_again_and_again(tmp_path, 5).kills == 20


@pytest.mark.slow
def test_four_writers_killed_fifty_times_lose_nothing_and_show_nothing_by_halves(tmp_path):
    killed = _kill_again_and_again(tmp_path, 52)
    assert killed.kills == 208 and killed.look(everything=True) > 100
    store = fs.open(killed.path)
    assert compact(store, purge=True, grace_s=0).damages == [] and verify(store).damages == []
    assert killed.look(everything=True) > 100


@pytest.mark.slow
def test_readers_and_writers_go_on_while_their_segments_are_merged_and_removed(tmp_path):
    killed = _Killed(tmp_path)
    with _Nursery() as nursery:
        running = [nursery.start("write", killed.path, name, 0, report) for name, report in killed.reports.items()]
        running.append(nursery.start("merge", killed.path, 3))
        old = []
        for number in range(24):
            killed.look(everything=False, at_work=True)
            store = fs.open(killed.path)
            if number % 4 == 0 and "x" in store.features:
                old.append((store, [key for key in store.features["x"] if not key.startswith("shared/")]))
            time.sleep(0.25)
        for store, keys in old:                                         # what they opened first is long gone
            feature = store.features["x"]
            assert [key for key in keys if not _right(key, feature[key].read(check=True))] == []
        for child in running:
            nursery.kill(child)
    assert killed.look(everything=True) > 100


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_harmed_shards_are_named_by_utterance_and_never_read_as_whole(tmp_path, harm):
    chance, rows = random.Random(1), {key: np.random.default_rng(ord(key)).random((40, 3)) for key in "abc"}
    with fs.create(tmp_path / "a.zarr").writer() as w:
        w.declare("x", MEL)
        for key, values in rows.items():
            w.write(key, "x", values.astype(np.float16))
    (shard,) = (tmp_path / "a.zarr" / "features").rglob("frames/c/0/0")
    whole = shard.read_bytes()
    for _ in range(10):
        at = chance.randrange(3 * 240)                                  # of the frames: padding and index have a test
        changed = bytearray(whole)
        changed[at] ^= 1 << chance.randrange(8)
        shard.write_bytes(bytes(changed) if harm == "flip" else whole[:at])
        storage.handles.forget(str(tmp_path))
        store = fs.open(tmp_path / "a.zarr")
        harmed = {"abc"[at // 240]} if harm == "flip" else set("abc")   # of a short file nothing is believed
        assert {damage.utterance for damage in verify(store).damages} == harmed
        for key, values in rows.items():
            if key in harmed:
                with pytest.raises(CorruptSegment, match=f"{key}: x does not match" if harm == "flip" else "bytes"):
                    store[key, "x"].read(check=True)
            else:
                assert np.array_equal(store[key, "x"].read(check=True), values.astype(np.float16))


@pytest.fixture
def syncs(monkeypatch) -> list[tuple[str, str, int]]:
    """What is synced and put in place, in order: ("sync" or "put", path, size)."""
    events: list[tuple[str, str, int]] = []
    sync, replace, link = os.fsync, os.replace, os.link

    def note(what: str, path: str) -> None:
        events.append((what, path, os.stat(path).st_size if os.path.isfile(path) else -1))  # noqa: PTH113, PTH116

    def fsync(fd) -> None:
        sync(fd)
        note("sync", str(Path(f"/proc/self/fd/{fd}").readlink()))

    def put(move):
        def moved(source, target, **more) -> None:
            move(source, target, **more)
            note("put", str(target))
        return moved

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", put(replace))
    monkeypatch.setattr(os, "link", put(link))
    return events


@pytest.mark.skipif(sys.platform != "linux", reason="paths of open files are read from /proc")
def test_everything_is_synced_before_the_document_that_commits_it(tmp_path, monkeypatch, syncs):
    monkeypatch.setattr(segments, "INNER_BYTES", 60)
    monkeypatch.setattr(segments, "SHARD_BYTES", 240)
    store = fs.create(tmp_path.resolve() / "a.zarr")
    with store.writer() as w:
        w.declare("x", MEL)
        w.write("a", "x", _ones(100))
        w.commit()
        w.write("b", "x", _ones(3))
        w.delete("a", "x")
    documents = [at for at, (what, path, _) in enumerate(syncs) if what == "put" and "/segments/" in path
                 and Path(path).parent.parent.name == "segments"]
    assert len(documents) == 6                                          # two commits and a fold, of two collections
    for at in documents:
        _assert_synced_first(syncs, at)


def _assert_synced_first(syncs: list[tuple[str, str, int]], at: int) -> None:
    """Of the document put in place by event `at`: all beside it is on the disk before, its own entry after."""
    folder = Path(syncs[at][1]).parent
    before = {path: size for what, path, size in syncs[:at] if what == "sync"}
    inside = [path for path in folder.rglob("*") if path != folder / "zarr.json"]
    late = [str(p) for p in inside if before.get(str(p)) != (p.stat().st_size if p.is_file() else -1)]
    assert late == [], "not synced, or written after it was"
    assert {str(folder), str(folder.parent)} <= before.keys()
    staged = [path for path in before if path.startswith(f"{folder}/.zarr.json.")]
    assert [before[path] for path in staged] == [syncs[at][2]], "the document's own bytes"
    assert ("sync", str(folder), -1) in syncs[at:], "the document's own entry"


@pytest.mark.skipif(sys.platform != "linux", reason="paths of open files are read from /proc")
def test_what_compact_writes_is_synced_before_it_counts_and_before_the_old_is_removed(tmp_path, monkeypatch, syncs):
    store = fs.create(tmp_path.resolve() / "a.zarr")
    for key in "abc":
        with store.writer() as w:
            w.declare("x", MEL)
            w.write(key, "x", _ones(100))
    with store.writer() as w:
        w.delete("b")
    syncs.clear()
    compact(store)
    documents = [at for at, (what, path, _) in enumerate(syncs) if what == "put" and path.endswith("/zarr.json")
                 and "-" in Path(path).parent.name]
    kinds = sorted(Path(syncs[at][1]).parent.parent.name for at in documents)
    assert kinds == ["catalogue"] * 2 + ["segments"] * 4                # rows and tombstones, of two collections
    for at in documents:
        _assert_synced_first(syncs, at)
    remove, unlink = storage.remove_tree, Path.unlink
    monkeypatch.setattr(storage, "remove_tree", lambda folder: (syncs.append(("remove", str(folder), 0)),
                                                                remove(folder))[1])
    monkeypatch.setattr(Path, "unlink", lambda path, **more: (syncs.append(("unlink", str(path), 0)),
                                                              unlink(path, **more))[1])
    syncs.clear()
    compact(store, purge=True, grace_s=0)
    removed = [at for at, (what, path, _) in enumerate(syncs) if what == "remove" and "/segments/" in path]
    assert len(removed) >= 8
    for at in removed:
        folder = syncs[at][1]
        assert syncs[:at].index(("unlink", f"{folder}/zarr.json", 0)) < syncs[:at].index(("sync", folder, -1), at - 1)


@pytest.mark.skipif(sys.platform != "linux", reason="paths of open files are read from /proc")
def test_a_name_moves_after_its_rows_are_on_the_disk(tmp_path, syncs):
    store = fs.create(tmp_path.resolve() / "a.zarr")
    for version in (1, 2):
        with store.writer() as w:
            w.declare("x", dataclasses.replace(MEL, version=version), replace=True)
            w.write("a", "x", _ones(100))
    moves = [at for at, (what, path, _) in enumerate(syncs) if what == "put" and "/served/0" in path]
    assert len(moves) == 2
    for at in moves:
        step = Path(syncs[at][1]).parent
        assert ("sync", str(step.parent), -1) in syncs[:at], "the entry of the step's folder"
        assert any(what == "sync" and path.startswith(f"{step}/.zarr.json.") and size == syncs[at][2]
                   for what, path, size in syncs[:at]), "the bytes of its document"
        assert ("sync", str(step), -1) in syncs[at:]
    rows = [at for at, (what, path, _) in enumerate(syncs) if what == "put" and "/features/x/" in path
            and Path(path).parent.parent.name == "segments"]
    assert len(rows) == 2 and rows[1] < moves[1], "the new rows are committed before the name stands for them"
    home = str(Path(syncs[rows[1]][1]).parent)
    assert ("sync", home, -1) in syncs[rows[1]:moves[1]]


@pytest.mark.skipif(sys.platform != "linux", reason="paths of open files are read from /proc")
def test_every_folder_and_document_of_a_store_is_synced(tmp_path, syncs):
    root = tmp_path.resolve() / "a.zarr"
    with fs.create(root).writer() as w:
        w.declare("x", MEL)
        w.write("a", "x", _ones())
    synced = {path for what, path, _ in syncs if what == "sync"}
    documents = {str(path.parent) for path in root.rglob("zarr.json")}  # an entry is durable by its folder's sync
    assert documents - synced == set() and str(root.parent) in synced


@pytest.fixture(scope="module")
def golden():
    """The script that made the frozen store."""
    spec = importlib.util.spec_from_file_location("make_store", DATA / "make_store.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_todays_writer_gives_the_frozen_bytes(tmp_path, golden):
    golden.make(tmp_path / "store")
    made, frozen = _files(tmp_path / "store"), _files(DATA / "store-format-1")
    later = {name for name in made if name.endswith("catalogue/zarr.json")}  # stores that lack these are read as well
    assert sorted(made.keys() - later) == sorted(frozen)
    assert [name for name in frozen if made[name] != frozen[name]] == []


@pytest.mark.parametrize("catalogue", ["with", "without"])
def test_frozen_store_opens_and_reads(tmp_path, golden, catalogue):
    shutil.copytree(DATA / "store-format-1", tmp_path / "store")
    if catalogue == "without":
        for folder in list((tmp_path / "store").rglob("catalogue")):
            shutil.rmtree(folder)
    store = fs.open(tmp_path / "store")
    assert {name: feature.spec for name, feature in store.features.items()} == {
        "f0": golden.F0, "log-mel": golden.MEL, "speaker": golden.VOICE}
    assert sorted(store.utterances) == golden.KEYS
    assert store.utterances["bass/ё"] == fs.StoredUtterance(
        "bass/ё", audio="bass/ё.wav", speaker="bass", duration_s=0.8, sample_rate=24000, channels=1,
        flags=("clipped",), extra={"song": "é"}, source=bytes(range(1, 33)).hex())
    assert np.array_equal(store[golden.KEYS[0], "log-mel"].read(check=True), golden.mel(5))
    assert np.array_equal(store[golden.KEYS[1], "log-mel"].read(check=True), golden.mel(1))
    assert list(store.features["f0"].keys()) == [golden.KEYS[0]]
    assert store[golden.KEYS[0], "f0"][:3].tolist() == [110, 110, 110]
    assert store[golden.KEYS[1], "speaker"][:].tolist() == [1, 0.5]


def test_frozen_store_can_be_written_to(tmp_path, golden):
    shutil.copytree(DATA / "store-format-1", tmp_path / "store")
    store = fs.open(tmp_path / "store")
    with store.writer() as w:
        w.write("bass/ё", "f0", np.full(160, 330, np.float32))
    assert store["bass/ё", "f0"][0] == 330 and len(store.features["f0"]) == 2
    assert writers.KEY_BYTES == 500
