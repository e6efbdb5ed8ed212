"""What survives: a full disk, kill -9, a power cut (by the order of syncs); and the bytes on disk, frozen."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import shutil
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
from featstore.errors import CorruptSegment, DiskFull

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


CHILD = """
import os, sys
from hashlib import blake2b
import numpy as np, featstore as fs
from featstore import segment, writer
os.fsync = lambda fd: None       # the page cache survives a kill; without syncs there are more moments to be killed in
writer.FOLD_COUNT = 4
segment.INNER_BYTES, segment.SHARD_BYTES, writer.LINK_BYTES = 512, 4096, 4096
writer.CATALOGUE_ROWS = 5
store, name, first = fs.open(sys.argv[1]), sys.argv[2], int(sys.argv[3])
spec = fs.Spec(made_by="mel", version=1, kind="continuous", frame_rate=50, dim=8, dtype="uint8")
print("ready", flush=True)
for start in range(first, first + 100000, 12):
    with store.writer(commit_every_s=1e9) as w:
        w.declare("x", spec)
        for number in range(start, start + 12, 3):
            for n in range(number, number + 3):
                for key in (f"{name}/{n}", f"shared/{n % 5}"):
                    w.write(key, "x", np.tile(np.frombuffer(blake2b(key.encode(), digest_size=8).digest(), "u1"),
                                              (1 + n % 400, 1)))
            w.commit()
            print(number + 2, flush=True)
"""


def _right(key: str, frames: np.ndarray) -> bool:
    return len(frames) > 0 and (frames == np.frombuffer(blake2b(key.encode(), digest_size=8).digest(), "u1")).all()


def _kill_two(path: Path, wait_s: float, first: dict[str, int]) -> dict[str, int]:
    """Two writers, killed after `wait_s`: the last number that each said was committed."""
    running = {name: subprocess.Popen([sys.executable, "-c", CHILD, str(path), name, str(start)], text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name, start in first.items()}
    for child in running.values():
        assert child.stdout.readline() == "ready\n", child.stderr.read()
    time.sleep(wait_s)
    last = dict(first)
    for child in running.values():
        child.kill()
    for name, child in running.items():
        out, err = child.communicate()
        assert child.returncode == -9 and not err, err
        numbers = [int(line) for line in out.splitlines(keepends=True) if line.endswith("\n") and line.strip()]
        last[name] = max([first[name] - 1, *numbers])
    return last


def _kill_again_and_again(path: Path, rounds: int) -> int:
    """Rows found in the end; after every pair of kills all that was committed must be there and right."""
    chance, first = random.Random(0), {"one": 0, "two": 0}
    known: dict[str, int] = {"one": -1, "two": -1}
    committed: set[str] = set()
    fs.create(path)
    for _ in range(rounds):
        last = _kill_two(path, chance.uniform(0, 0.25), first)
        for name, number in last.items():
            committed |= {f"{name}/{n}" for n in range(first[name], number + 1)}
        first = {name: number + 1 for name, number in last.items()}
        known |= last
        store = fs.open(path)
        feature = store.features.get("x")
        found = set(feature.keys()) if feature is not None else set()
        assert committed <= found, f"lost: {sorted(committed - found)}"
        wrong = [key for key in found if not _right(key, feature[key].read(check=True))]
        assert wrong == []
        assert found <= set(store.utterances), "a feature without its utterance"
    return len(committed)


def test_killed_writers_lose_nothing_that_was_committed(tmp_path):
    assert _kill_again_and_again(tmp_path / "a.zarr", 10) > 0            # 20 kills


@pytest.mark.slow
def test_writers_killed_a_hundred_times_lose_nothing_that_was_committed(tmp_path):
    assert _kill_again_and_again(tmp_path / "a.zarr", 50) > 100


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
        folder = Path(syncs[at][1]).parent
        before = {path: size for what, path, size in syncs[:at] if what == "sync"}
        inside = [path for path in folder.rglob("*") if path != folder / "zarr.json"]
        late = [str(p) for p in inside if before.get(str(p)) != (p.stat().st_size if p.is_file() else -1)]
        assert late == [], "not synced, or written after it was"
        assert {str(folder), str(folder.parent)} <= before.keys()
        assert ("sync", str(folder), -1) in syncs[at:], "the document's own entry"


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
    assert sorted(made) == sorted(frozen)
    assert [name for name in made if made[name] != frozen[name]] == []


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
