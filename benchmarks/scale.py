"""A store at scale: a million utterances, a hundred thousand segments, a day of commits.

    python benchmarks/scale.py [--keys 1000000] [--segments 100000] [--commits 1440] [--quick]

Every figure comes from a process of its own, so that memory is what that step took. `--quick`: a hundredth of it all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

import featstore as fs
from featstore import segment, storage, writer
from featstore.index import Collection, Index, drop_replaced, hash_keys, write_catalogue
from featstore.segment import Segment, SegmentWriter, group, key_hashes
from featstore.storage import bytes_under, new_id

TINY = fs.Spec(made_by="tiny", version=1, kind="f0", frame_rate=Fraction(50), dim=0, dtype="float32")
SCALE = 1024  # the day is simulated with sizes divided by this; so are shards
DAY = {"speaker": 20_000, "energy": 400_000, "f0": 1_000_000, "log-mel": 50_000_000, "contentvec": 80_000_000,
       "whisper": 256_000_000}  # bytes of a commit


def key_of(number: int) -> str:
    return f"speaker{number % 1000:04}/song {number % 7}/{number:08}"


def memory() -> float:
    """MiB of this process that are in memory now, pages of mapped files among them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    start, processor = time.perf_counter(), time.process_time()
    yield
    times = [time.perf_counter() - start, time.process_time() - processor]
    shown = [f"{took:.2f} s" if took >= 1 else f"{1e3 * took:.1f} ms" for took in times]
    print(f"  {name:58} {shown[0]:>10} {shown[1]:>10} {memory():7.0f} MiB", flush=True)


def build(home: Path, keys: int) -> None:
    """Utterances and one feature of four frames each, written as an extraction would."""
    frames = np.arange(4, dtype=np.float32)
    store = fs.create(home / "keys.zarr")
    w = store.writer()
    with timed(f"write {keys:,} utterances and rows, commits included"):
        w.declare("f0", TINY)
        for number in range(keys):
            key = key_of(number)
            record = {"key": key, "audio": f"{key}.wav", "root": "/corpus", "speaker": key[:11], "duration_s": 0.08,
                      "sample_rate": 24000, "channels": 1}
            w.utterance(record, source=number.to_bytes(32, "little"), stamp=number + 1, seconds=0.08)
            w.write(key, "f0", frames)
    with timed("close: fold and catalogues"):
        w.close()
    folders = [store.path / "utterances", store.features["f0"].folder]
    parts = [part.folder for folder in folders for part in drop_replaced(Collection(folder).segments)]
    print(f"  bytes an utterance: {bytes_under(store.path) / keys:.0f} on disk, of which segments that answer "
          f"{sum(map(bytes_under, parts)) / keys:.0f}, catalogues "
          f"{sum(bytes_under(folder / 'catalogue') for folder in folders) / keys:.0f}, the rest was folded; "
          f"{len(parts)} segments answer")


def look(home: Path, keys: int) -> None:
    """Open it in a fresh process and look up every key, one by one and all at once."""
    names = [key_of(number) for number in range(keys)]
    before = memory()
    with timed("open, first look-up of a row and its frames"):
        store = fs.open(home / "keys.zarr")
        feature = store.features["f0"]
        store[names[7], "f0"][:]
    with timed(f"look up {keys:,} keys one by one: `key in feature`"):
        found = sum(name in feature for name in names)
    print(f"  memory grew by {memory() - before:.0f} MiB")
    with timed("the same as rows: `feature[key]`"):
        for name in names:
            feature[name]
    with timed("existence of all at once, hashing included"):
        there = int((feature.index.positions(hash_keys(names)) >= 0).sum())
    if found != keys or there != keys:
        raise RuntimeError(f"{found} and {there} of {keys} keys were found")
    with timed("len and repr"):
        repr(store)
    with timed("a view of all utterances"):
        store.view(["f0"], like="f0")


def list_all(home: Path, keys: int) -> None:
    store = fs.open(home / "keys.zarr")
    with timed("all keys in order: list(store.utterances)"):
        list(store.utterances)
    with timed("speakers (as `info` does)"):
        store.utterances.speakers()


def append(home: Path, keys: int) -> None:
    """A small run on top: what it costs to write and what readers then pay."""
    store = fs.open(home / "keys.zarr")
    w = store.writer()
    with timed("open a writer, add 1,000 utterances"):
        for number in range(keys, keys + 1000):
            w.write(key_of(number), "f0", np.ones(4, np.float32))
    with timed("close: fold, catalogues written anew"):
        w.close()
    newest = Collection(store.features["f0"].folder).catalogue
    if newest is None:
        return  # too few rows for one
    storage.remove_tree(newest.home)  # as if the run had left none
    with timed("open with an older catalogue and 1,000 newer rows"):
        len(fs.open(store.path).features["f0"])


def make_segments(home: Path, count: int) -> None:
    """A feature of `count` segments of a row each."""
    store = fs.create(home / f"{count}.zarr")
    with store.writer() as w:
        w.declare("f0", TINY)
    folder = store.features["f0"].folder
    with timed(f"make {count:,} segments"):
        for number in range(count):
            one = SegmentWriter(folder / "segments" / new_id(), "float32", 0)
            one.append(key_of(number), [np.ones(1, np.float32)], generation=1)
            one.commit({"feature": "f0", "spec": TINY.to_json(), "replaces": []})


def make_hollow(home: Path, count: int) -> None:
    """A feature of `count` segments and a catalogue of them. They have a document and no data (of which each needs 15
    files and folders), but for the last, which is whole."""
    make_segments(home / "hollow", 1)
    path = home / "hollow" / "1.zarr"
    folder = Path(str(fs.open(path).features["f0"].folder))
    document = group({"feature": "f0", "spec": TINY.to_json(), "replaces": [], "rows": 1, "frames": 1, "bytes": 4})
    last = Collection(folder).segments[0]
    text, records = json.dumps(document).encode(), np.repeat(last.records, count)
    names = [f"{number:016x}-{number:012x}" for number in range(1, count)]
    for name in names:
        (folder / "segments" / name).mkdir()
        (folder / "segments" / name / "zarr.json").write_bytes(text)
    records[["hash", "tag"]] = [key_hashes(key_of(number)) for number in range(count - 1, -1, -1)]
    records["segment"] = np.arange(count)
    records.sort(order="hash")
    listed = [Segment(folder / "segments" / name) for name in (*names, last.id)]
    write_catalogue(folder, Index(listed, np.ascontiguousarray(records["hash"]), records))


def open_segments(path: Path, count: int) -> None:
    with timed(f"open {count:,} segments, first row"):
        store = fs.open(path)
        store[key_of(0), "f0"][:]
    if len(store.features["f0"]) != count:
        raise RuntimeError("rows are missing")


def day(home: Path, commits: int) -> None:
    """A run of 24 h that commits every minute, with all sizes divided by SCALE."""
    os.fsync = lambda fd: None
    segment.INNER_BYTES, segment.SHARD_BYTES = 128, segment.SHARD_BYTES // SCALE
    writer.LINK_BYTES, writer.FOLD_BYTES = segment.SHARD_BYTES, writer.FOLD_BYTES // SCALE
    most = dict.fromkeys(DAY, 0)
    store = fs.create(home / "day.zarr")
    chance = np.random.default_rng(0)
    start = time.perf_counter()
    with store.writer(commit_every_s=1e9) as w:
        for name in DAY:
            w.declare(name, replace(TINY, dtype="uint8", settings={"name": name}))
        for number in range(commits):
            for name, size in DAY.items():
                w.write(f"{number}", name, np.ones(max(1, int(size / SCALE * chance.uniform(0.7, 1.3))), np.uint8))
            w.commit()
            most = {name: max(count, len(w._features[name].own)) for name, count in most.items()}
    print(f"  {commits:,} commits in {time.perf_counter() - start:.0f} s")
    for name, size in DAY.items():
        feature = store.features[name]
        alive = drop_replaced(feature.segments)
        held = sum(part.stored for part in alive)
        copied = sum(part.stored for part in feature.segments if "links" not in part.facts)
        print(f"  {name:12} {size / 1e6:8.2f} MB a commit: at most {most[name]:3} segments, {len(alive):2} in the end; "
              f"every byte written {copied / held:.2f} times")


STEPS: dict[str, Callable[..., None]] = {
    "build": build, "look": look, "list": list_all, "append": append, "segments": make_segments, "hollow": make_hollow,
    "open": open_segments, "day": day}


def alone(step: str, *args: Any) -> None:
    """Run a step in a fresh process."""
    subprocess.run([sys.executable, __file__, "--step", step, *map(str, args)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=1_000_000, help="utterances (default 1,000,000)")
    parser.add_argument("--segments", type=int, default=100_000, help="with a catalogue (default 100,000)")
    parser.add_argument("--commits", type=int, default=1440, help="of the simulated day (default 1,440)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--quick", action="store_true", help="a hundredth of everything")
    parser.add_argument("--step", nargs=3, metavar=("NAME", "FOLDER", "COUNT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        STEPS[args.step[0]](Path(args.step[1]), int(args.step[2]))
        return
    share = 100 if args.quick else 1
    keys, segments, commits = args.keys // share, args.segments // share, max(60, args.commits // share)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        (Path(folder) / "hollow").mkdir()
        print(f"{keys:,} utterances (each line: time, processor time, memory of the process after it)", flush=True)
        for step in ("build", "look", "list", "append"):
            alone(step, folder, keys)
        few = 1000 // share
        print(f"\n{few:,} segments without a catalogue, {segments:,} with one", flush=True)
        alone("segments", folder, few)
        alone("open", Path(folder, f"{few}.zarr"), few)
        alone("hollow", folder, segments)
        alone("open", Path(folder, "hollow", "1.zarr"), segments)
        print(f"\na day of commits, sizes divided by {SCALE}", flush=True)
        alone("day", folder, commits)


if __name__ == "__main__":
    main()
