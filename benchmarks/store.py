"""Rates of the store: writing against a flat file, look-ups and opening. Reading has a page of its own: reads.py.

    python benchmarks/store.py [--rounds 5] [--utterances 400]

All contestants of a table take turns in one run on warm files; medians over rounds, ratios within a round. Rates on a
shared machine move by a factor of two from day to day: the ratios are what to trust.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

import featstore as fs
from featstore.index import Index, hash_keys, merge, read_catalogue, write_catalogue
from featstore.segment import Segment, SegmentWriter
from featstore.storage import new_id

DIM, FRAMES = 1024, 500  # 10 s utterances at 50 Hz
SPEC = fs.Spec(made_by="net", version=1, kind="continuous", frame_rate=50, dim=DIM, dtype="float16")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def table(title: str, unit: str, rates: dict[str, list[float]], base: str) -> None:
    print(f"\n{title}")
    for name, values in rates.items():
        ratio = statistics.median(one / other for one, other in zip(values, rates[base], strict=True))
        print(f"  {name:34} {statistics.median(values):12,.0f} {unit}   {ratio:6.3f} x {base}")


def write_rates(home: Path, arrays: list[np.ndarray], rounds: int) -> None:
    """Bytes per second, each ended by fsync. The flat file: one open, one write an array, one fsync. The store: from a
    declared feature to a closed writer, that is with NaN check, checksums, index, commit and fold."""
    size = sum(array.nbytes for array in arrays) / 2**20
    rates: dict[str, list[float]] = {"flat file": [], "store": [], "store, one commit an utterance": []}

    def flat() -> None:
        with (home / "flat").open("wb", buffering=0) as file:
            for array in arrays:
                file.write(array.data)
            os.fsync(file.fileno())

    few = arrays[:max(1, len(arrays) // 20)]
    for _ in range(rounds):  # each leaves its pages to the next: a fresh page may cost more than the write
        rates["flat file"].append(size / seconds(flat))
        (home / "flat").unlink()
        for name, some, every_s in (("store", arrays, 60.0), ("store, one commit an utterance", few, 0.0)):
            store = declared(home / "written.zarr")
            rates[name].append(size * len(some) / len(arrays) / seconds(partial(fill, store, some, every_s)))
            shutil.rmtree(store.path)
    table(f"write {size:,.0f} MiB of ({FRAMES}, {DIM}) float16, ended by fsync", "MiB/s", rates, "flat file")


def declared(path: Path) -> fs.Store:
    store = fs.create(path)
    with store.writer() as w:
        w.declare("net", SPEC)
    return store


def fill(store: fs.Store, arrays: list[np.ndarray], every_s: float) -> None:
    with store.writer(commit_every_s=every_s) as w:
        for number, array in enumerate(arrays):
            w.write(f"take {number}", "net", array)


def index_rates(home: Path) -> None:
    """100,000 keys in one segment: building, mapping, looking up."""
    keys = [f"speaker{i % 100}/song {i % 7}/{i:06}" for i in range(100_000)]
    writer = SegmentWriter(home / "index" / "segments" / new_id(), "float32", 0)
    frame = np.zeros(1, np.float32)
    written = seconds(lambda: [writer.append(key, [frame], generation=1) for key in keys])
    committed = seconds(lambda: writer.commit({}))
    segment = Segment(writer.folder)
    built = seconds(lambda: Index.build([Segment(writer.folder)]))
    write_catalogue(home / "index", merge([segment]))
    mapped = seconds(lambda: Index.build([segment], None, read_catalogue(home / "index", [segment])))
    index = Index.build([segment])
    one = seconds(lambda: [index.find(key) for key in keys[:20_000]]) / 20_000
    hashed = seconds(lambda: hash_keys(keys))
    hashes = hash_keys(keys)
    many = seconds(lambda: index.positions(hashes))
    print("\nindex of 100,000 keys")
    print(f"  append one-frame rows {1e6 * written / len(keys):.1f} us each, commit {1e3 * committed:.0f} ms")
    print(f"  build from the segment {1e3 * built:.0f} ms, map a catalogue {1e3 * mapped:.1f} ms")
    print(f"  one look-up {1e6 * one:.1f} us; hash all keys {1e3 * hashed:.0f} ms, find all {1e3 * many:.0f} ms")


def open_rates(home: Path, count: int = 1000) -> None:
    """A store whose feature has 1,000 segments, without and with a catalogue."""
    store = declared(home / "many.zarr")
    folder = store.features["net"].folder
    frames = np.zeros((1, DIM), np.float16)
    for number in range(count):
        writer = SegmentWriter(folder / "segments" / new_id(), "float16", DIM)
        writer.append(f"take {number}", [frames], generation=1)
        writer.commit({"feature": "net", "spec": SPEC.to_json(), "replaces": []})

    def opened() -> None:
        if len(fs.open(store.path).features["net"]) != count:
            raise RuntimeError("rows are missing")

    plain = [seconds(opened) for _ in range(3)]
    fresh = fs.open(store.path).features["net"]
    write_catalogue(folder, merge(fresh.segments))
    with_catalogue = [seconds(opened) for _ in range(3)]
    print(f"\nopen a feature of {count:,} segments: {1e3 * min(plain):.0f} ms "
          f"({1e6 * min(plain) / count:.0f} us each); with a catalogue {1e3 * min(with_catalogue):.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each table (default 5)")
    parser.add_argument("--utterances", type=int, default=200, help="of 1 MB each (default 200)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    noise = np.random.default_rng(0).standard_normal((FRAMES * 4, DIM)).astype(np.float16)
    arrays = [np.ascontiguousarray(noise[n * 7 % 1500:][:FRAMES]) for n in range(args.utterances)]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        home = Path(folder)
        index_rates(home)
        open_rates(home)
        write_rates(home, arrays, args.rounds)


if __name__ == "__main__":
    main()
