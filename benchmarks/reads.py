"""Reading the store against everything else: crops, warm and cold; whole utterances in order; aligned batches.

    python benchmarks/reads.py [--rounds 5] [--utterances 200] [--folder F] [--quick]

All candidates of a table take turns in one run on the same data; medians over rounds with their range, ratios within a
round. A peer that is not installed is named as missing. zarrs and tensorstore start threads that no fork survives:
nothing here forks. Goals (issue 4): crops mapped >= 0.5 and read >= 0.4 of a flat memmap; cold within 1.3 of announced
preads; a batch within 4 copies of its output and 10 times faster than .npy with repetition and average.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

import featstore as fs
import featstore_align  # noqa: F401  # for the module below
from featstore import storage

DIM, FRAMES, CROP = 1024, 500, 100        # 10 s utterances at 50 Hz, crops of 2 s
ROW = DIM * 2                             # bytes of a frame
MEL, BATCH, TARGET = Fraction(24000, 256), 32, 188   # frames of 2 s at the mel rate
SPEC = fs.Spec(made_by="net", version=1, kind="continuous", frame_rate=50, dim=DIM, dtype="float16")
RETRANS = sys.modules["featstore_align.retrans"]  # the package has a function of that name

COMPILED = "featstore_align.compiled"

Read = Callable[[int, int], Any]          # (utterance, first frame) -> the crop
Picks = list[tuple[int, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each table (default 5)")
    parser.add_argument("--utterances", type=int, default=200, help="of 1 MB each (default 200)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 40 utterances, to see that it runs")
    args = parser.parse_args()
    rounds, count = (2, 40) if args.quick else (args.rounds, args.utterances)
    noise = np.random.default_rng(0).standard_normal((FRAMES * 4, DIM)).astype(np.float16)
    arrays = [np.ascontiguousarray(noise[n * 7 % 1500:][:FRAMES]) for n in range(count)]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        home = Path(folder)
        store = written(home / "crops.zarr", {"net": SPEC}, [{"net": array} for array in arrays])
        write_flat(home, arrays)
        crops(home, store, arrays, rounds)
        cold(home, store, count, rounds)
        in_order(home, store, arrays, rounds)
        batches(home, rounds, min(count, 100))


def key(number: int) -> str:
    return f"singer {number % 9}/take {number:04}"


def written(path: Path, specs: dict[str, fs.Spec], rows: list[dict[str, np.ndarray]]) -> fs.Store:
    store = fs.create(path)
    with store.writer() as w:
        for name, spec in specs.items():
            w.declare(name, spec)
        for number, arrays in enumerate(rows):
            w.utterance({"key": key(number)}, source=bytes(32))
            for name, array in arrays.items():
                w.write(key(number), name, array)
    return store


def write_flat(home: Path, arrays: list[np.ndarray]) -> None:
    with (home / "flat.raw").open("wb") as file:
        for number, array in enumerate(arrays):
            file.write(array.data)
            np.save(home / f"{number}.npy", array)
        os.fsync(file.fileno())


# --- crops, warm -----------------------------------------------------------------------------------------------------

def crops(home: Path, store: fs.Store, arrays: list[np.ndarray], rounds: int) -> None:
    """Random crops per second, each an array of its own, warm."""
    readers: dict[str, tuple[int, Read]] = {}
    for name, reads, make in PEERS:
        package = MODULES.get(name, "numpy")
        if all(importlib.util.find_spec(module) for module in package.split()):
            readers[name] = reads, make(home, store, arrays)
        else:
            print(f"missing: {name} ({package} is not installed)")
    rng = np.random.default_rng(0)
    for name, (_, read) in readers.items():
        if not np.array_equal(read(3, 17), arrays[3][17:17 + CROP]):
            raise RuntimeError(f"{name} gave other frames")
        for number in range(len(arrays)):
            read(number, 0)
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, (reads, read) in readers.items():
            reads = max(10, reads * len(arrays) // 200)
            picks = chosen(rng, len(arrays), reads)
            rates[name].append(reads / seconds(lambda: each(read, picks)))  # noqa: B023
    size = len(arrays) * FRAMES * ROW / 2**20
    table(f"random crops of ({CROP}, {DIM}) float16 from {size:,.0f} MiB, warm", "crops/s", rates, FLAT)
    goals(rates)


def each(read: Read, picks: Picks) -> None:
    """One crop after the other: none is kept, so that memory is used again as it is in training."""
    for pick in picks:
        read(*pick)


def goals(rates: dict[str, list[float]]) -> None:
    """The ratios that the issue asks for, from the medians."""
    middle = {name: statistics.median(values) for name, values in rates.items()}
    slow = {name: value for name, value in middle.items() if name in SLOW}
    best = max(slow, key=lambda name: slow[name])
    print(f"  mapped: {middle[MAPPED] / middle[FLAT]:.2f} x memmap (goal 0.5), "
          f"{middle[MAPPED] / slow[best]:.1f} x {best}, the best of {len(slow)} others (goal 5)", end="")
    print(f", {middle[MAPPED] / middle[H5PY]:.1f} x h5py (goal 2)" if H5PY in middle else "")
    print(f"  read: {middle[READ] / middle[FLAT]:.2f} x memmap (goal 0.4)")


def flat_memmap(home: Path, store: fs.Store, arrays: list[np.ndarray]) -> Read:
    flat = np.memmap(home / "flat.raw", np.float16, "r", shape=(len(arrays) * FRAMES, DIM))
    return lambda n, a: np.array(flat[n * FRAMES + a:n * FRAMES + a + CROP])


def rows(home: Path, store: fs.Store, arrays: list[np.ndarray], mapped: bool = False) -> Read:
    """Rows are looked up once, as everybody else's handles are."""
    feature = fs.open(store.path, mapped=mapped).features["net"]
    held = [feature[key(number)] for number in range(len(arrays))]
    return lambda n, a: held[n][a:a + CROP]


def mapped_rows(home: Path, store: fs.Store, arrays: list[np.ndarray]) -> Read:
    return rows(home, store, arrays, mapped=True)


def by_name(home: Path, store: fs.Store, arrays: list[np.ndarray], mapped: bool = False) -> Read:
    opened = fs.open(store.path, mapped=mapped)
    return lambda n, a: opened[key(n), "net"][a:a + CROP]


def mapped_by_name(home: Path, store: fs.Store, arrays: list[np.ndarray]) -> Read:
    return by_name(home, store, arrays, mapped=True)


def npy(home: Path, store: fs.Store, arrays: list[np.ndarray]) -> Read:
    return lambda n, a: np.load(home / f"{n}.npy", mmap_mode="r")[a:a + CROP].copy()


def shards(store: fs.Store, opened: Callable[[str], Any]) -> list[tuple[Any, int]]:
    """For every utterance its segment's array, opened by somebody else, and its first row there."""
    index = store.features["net"].index
    arrays = [opened(str(segment.folder / "frames")) for segment in index.segments]
    records = [index.find(key(number)) for number in range(len(index))]
    return [(arrays[int(record["segment"])], int(record["offset"])) for record in records if record is not None]


def zarr_python(home: Path, store: fs.Store, arrays: list[np.ndarray]) -> Read:
    import zarr

    where = shards(store, lambda path: zarr.open_array(path, mode="r"))
    return lambda n, a: where[n][0][where[n][1] + a:where[n][1] + a + CROP]


def zarrs(home: Path, store: fs.Store, arrays: list[np.ndarray]) -> Read:
    import zarr

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        where = shards(store, lambda path: zarr.open_array(path, mode="r"))
    return lambda n, a: where[n][0][where[n][1] + a:where[n][1] + a + CROP]


def tensorstore(home: Path, store: fs.Store, arrays: list[np.ndarray]) -> Read:
    import tensorstore

    where = shards(store, lambda path: tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}).result())
    return lambda n, a: np.asarray(where[n][0][where[n][1] + a:where[n][1] + a + CROP].read().result())


def zarr_per_utterance(home: Path, store: fs.Store, arrays: list[np.ndarray]) -> Read:
    import zarr

    group = zarr.create_group(str(home / "each.zarr"))
    for number, array in enumerate(arrays):
        made = group.create_array(str(number), shape=array.shape, dtype="float16", chunks=(64, DIM), compressors=None)
        made[:] = array
    opened = [zarr.open_array(str(home / "each.zarr" / str(number)), mode="r") for number in range(len(arrays))]
    return lambda n, a: opened[n][a:a + CROP]


def h5py(home: Path, store: fs.Store, arrays: list[np.ndarray]) -> Read:
    import h5py

    with h5py.File(home / "all.h5", "w") as file:
        for number, array in enumerate(arrays):
            file[str(number)] = array
    opened = h5py.File(home / "all.h5", "r")
    sets = [opened[str(number)] for number in range(len(arrays))]
    return lambda n, a: sets[n][a:a + CROP]


def h5py_by_name(home: Path, store: fs.Store, arrays: list[np.ndarray]) -> Read:
    import h5py

    opened = h5py.File(home / "all.h5", "r")
    return lambda n, a: opened[str(n)][a:a + CROP]


def kaldi(home: Path, store: fs.Store, arrays: list[np.ndarray]) -> Read:
    """As float32, since Kaldi has no float16; a matrix is read whole."""
    import kaldiio

    with kaldiio.WriteHelper(f"ark,scp:{home / 'all.ark'},{home / 'all.scp'}") as writer:
        for number, array in enumerate(arrays):
            writer(str(number), array.astype(np.float32))
    places = dict(line.split() for line in (home / "all.scp").read_text().splitlines())
    return lambda n, a: kaldiio.load_mat(places[str(n)])[a:a + CROP]


def lhotse(home: Path, store: fs.Store, arrays: list[np.ndarray]) -> Read:
    from lhotse.features.io import NumpyHdf5Reader, NumpyHdf5Writer

    with NumpyHdf5Writer(home / "lhotse.h5") as writer:
        names = [writer.write(str(number), array) for number, array in enumerate(arrays)]
    reader = NumpyHdf5Reader(home / "lhotse.h5")
    return lambda n, a: reader.read(names[n], left_offset_frames=a, right_offset_frames=a + CROP)


def arrow(home: Path, store: fs.Store, arrays: list[np.ndarray]) -> Read:
    """An IPC file, mapped; one record batch an utterance, a row a frame; the batches are held."""
    import pyarrow as pa

    kind = pa.list_(pa.float16(), DIM)
    with pa.OSFile(str(home / "all.arrow"), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("x", kind)])) as writer:
        for array in arrays:
            column = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), DIM)
            writer.write_batch(pa.record_batch([column], ["x"]))
    file = pa.ipc.open_file(pa.memory_map(str(home / "all.arrow")))
    columns = [file.get_batch(number).column(0) for number in range(len(arrays))]
    return lambda n, a: np.array(columns[n].slice(a, CROP).flatten().to_numpy()).reshape(CROP, DIM)


FLAT, MAPPED, READ = "memmap of a flat file", "featstore mapped, rows held", "featstore, rows held"
NPY, EACH, ZARR = ".npy per utterance", "Zarr array per utterance", "zarr-python on our shards"
ZARRS, TENSORSTORE = "zarrs on our shards", "tensorstore on our shards"
H5PY, KALDI, LHOTSE, ARROW = "h5py, datasets held", "kaldiio (float32)", "lhotse NumpyHdf5", "Arrow IPC, mapped"
PEERS: list[tuple[str, int, Callable[[Path, fs.Store, list[np.ndarray]], Read]]] = [   # reads of a round at 200 takes
    (FLAT, 4000, flat_memmap), (MAPPED, 4000, mapped_rows), (READ, 3000, rows),
    ("featstore mapped, store[key, name][a:b]", 3000, mapped_by_name),
    ("featstore, store[key, name][a:b]", 3000, by_name), (ARROW, 3000, arrow), (H5PY, 2000, h5py),
    ("h5py, file[key][a:b]", 1000, h5py_by_name), (NPY, 1000, npy),
    (LHOTSE, 500, lhotse), (KALDI, 300, kaldi), (TENSORSTORE, 500, tensorstore), (ZARRS, 200, zarrs),
    (ZARR, 60, zarr_python), (EACH, 100, zarr_per_utterance)]
MODULES = {ARROW: "pyarrow", H5PY: "h5py", "h5py, file[key][a:b]": "h5py", LHOTSE: "lhotse h5py", KALDI: "kaldiio",
           TENSORSTORE: "tensorstore", ZARRS: "zarr zarrs", ZARR: "zarr", EACH: "zarr"}
SLOW = (NPY, KALDI, LHOTSE, TENSORSTORE, ZARRS, ZARR)


# --- crops, cold -----------------------------------------------------------------------------------------------------

def cold(home: Path, store: fs.Store, count: int, rounds: int) -> None:
    """Batches of 32 crops from files that the page cache was told to forget.

    A virtual disk has a cache behind it, which reading ahead would fill with the flat file alone: all files are read
    once before, and the ways begin in turn.
    """
    if not (hasattr(os, "posix_fadvise") and Path("/proc/self/io").exists()):
        print("\ncold reads: missing, this platform cannot forget a file, or does not tell what came from the disk")
        return
    flat = home / "flat.raw"
    frames = [path for path in store.features["net"].folder.glob("segments/*/frames/c/**/*") if path.is_file()]
    view = fs.open(store.path).view(["net"], like="net")
    out = view.read_batch([(key(0), 0)] * BATCH, frames=CROP)

    def preads(picks: Picks, announced: bool) -> None:
        file = os.open(flat, os.O_RDONLY)
        places = [(number * FRAMES + start) * ROW for number, start in picks]
        for place in places if announced else ():
            os.posix_fadvise(file, place, CROP * ROW, os.POSIX_FADV_WILLNEED)
        for place, row in zip(places, out["net"], strict=True):
            os.preadv(file, [row.data.cast("B")], place)
        os.close(file)

    def memmap(picks: Picks) -> None:
        whole = np.memmap(flat, np.float16, "r", shape=(count * FRAMES, DIM))
        for row, (number, start) in zip(out["net"], picks, strict=True):
            row[...] = whole[number * FRAMES + start:number * FRAMES + start + CROP]

    def batch(picks: Picks, view: fs.View = view) -> None:
        view.read_batch([(key(number), start) for number, start in picks], frames=CROP, out=out)

    def mapped(picks: Picks) -> None:
        batch(picks, fs.open(store.path, mapped=True).view(["net"], like="net"))

    ways: dict[str, Callable[[Picks], None]] = {
        "announced preads of the flat file": lambda picks: preads(picks, True), "featstore, read_batch": batch,
        "preads of the flat file": lambda picks: preads(picks, False), FLAT: memmap,
        "featstore mapped, opened and read": mapped}
    rng, times = np.random.default_rng(1), {name: [] for name in ways}
    came: list[float] = []
    for path in (flat, *frames):
        path.read_bytes()
    for number in range(rounds + 1):
        for name in sorted(ways, key=lambda name: (list(ways).index(name) + number) % len(ways)):
            work = ways[name]
            storage.handles.forget(str(store.path))  # maps keep their pages
            for path in (flat, *frames):
                forget(path)
            picks, before = chosen(rng, count, BATCH), from_disk()
            times[name].append(1e3 * seconds(lambda: work(picks)))  # noqa: B023
            came.append((from_disk() - before) / (BATCH * CROP * ROW))
    table(f"{BATCH} random crops of ({CROP}, {DIM}) float16, cold: {min(came):.1f} to {max(came):.1f} of their bytes "
          "came from the disk", "ms", {name: values[1:] for name, values in times.items()},
          "announced preads of the flat file")


def forget(path: Path) -> None:
    """Let the page cache drop a file."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def from_disk() -> int:
    """Bytes that this process has had fetched so far: nothing else tells cold from warm."""
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["read_bytes"])


# --- whole utterances ------------------------------------------------------------------------------------------------

def in_order(home: Path, store: fs.Store, arrays: list[np.ndarray], rounds: int) -> None:
    """Whole utterances one after the other, warm, each an array of its own."""
    opened, mapped = fs.open(store.path).features["net"], fs.open(store.path, mapped=True).features["net"]
    flat = np.memmap(home / "flat.raw", np.float16, "r", shape=(len(arrays), FRAMES, DIM))
    ways: dict[str, Callable[[], Iterator[np.ndarray]]] = {
        FLAT: lambda: (np.array(array) for array in flat),
        "featstore mapped": lambda: (mapped[key(number)].read() for number in range(len(arrays))),
        "featstore": lambda: (opened[key(number)].read() for number in range(len(arrays))),
        NPY: lambda: (np.load(home / f"{number}.npy") for number in range(len(arrays)))}
    if importlib.util.find_spec("webdataset"):
        import webdataset

        with webdataset.TarWriter(str(home / "all.tar")) as writer:
            for number, array in enumerate(arrays):
                writer.write({"__key__": f"{number:06}", "x.npy": array})
        ways["webdataset, .npy in a tar"] = lambda: (sample["x.npy"] for sample in webdataset.WebDataset(
            str(home / "all.tar"), shardshuffle=False, empty_check=False).decode())
    else:
        print("missing: webdataset (it is not installed)")
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            rates[name].append(len(arrays) / seconds(lambda: [len(array) for array in way()]))  # noqa: B023
    table(f"whole utterances ({FRAMES}, {DIM}) float16 in order, warm", "utterances/s",
          {name: values[1:] for name, values in rates.items()}, FLAT)


# --- aligned batches -------------------------------------------------------------------------------------------------

def batches(home: Path, rounds: int, count: int) -> None:
    """32 crops of 2 s of five features on the log-mel's frames, into arrays of an earlier batch."""
    specs = {"whisper": fs.Spec(made_by="n", version=1, kind="continuous", frame_rate=50, dim=1024, dtype="float16"),
             "contentvec": fs.Spec(made_by="n", version=1, kind="continuous", frame_rate=50, dim=768, dtype="float16"),
             "f0": fs.Spec(made_by="n", version=1, kind="f0", frame_rate=200),
             "loudness": fs.Spec(made_by="n", version=1, kind="continuous", frame_rate=200),
             "log-mel": fs.Spec(made_by="n", version=1, kind="continuous", frame_rate=MEL, dim=100)}
    rng = np.random.default_rng(2)
    with contextlib.suppress(ImportError):
        importlib.import_module("torch")  # as whoever trains has it
    data = []
    for _ in range(count):
        f0 = rng.uniform(100, 400, 2000).astype(np.float32)
        f0[500:700] = 0
        data.append({"whisper": rng.standard_normal((500, 1024), np.float32).astype(np.float16),
                     "contentvec": rng.standard_normal((500, 768), np.float32).astype(np.float16), "f0": f0,
                     "loudness": rng.standard_normal(2000, np.float32),
                     "log-mel": rng.standard_normal((937, 100), np.float32)})
    path = written(home / "batch.zarr", specs, data).path
    for number, arrays in enumerate(data):
        for name, array in arrays.items():
            np.save(home / f"{name}-{number}.npy", array)
    views = [fs.open(path, mapped=mapped).view(list(specs), like="log-mel") for mapped in (False, True)]
    out = views[0].read_batch([(key(0), 0)] * BATCH, frames=TARGET)
    other = {name: array.copy() for name, array in out.items()}

    def batch(picks: Picks, mapped: bool = False) -> None:
        views[mapped].read_batch([(key(number), start) for number, start in picks], frames=TARGET, out=out)

    def one_by_one(picks: Picks) -> None:
        found = [views[0].crop(key(number), start=start, frames=TARGET) for number, start in picks]
        for name in specs:
            np.stack([crop[name] for crop in found], out=out[name])

    def without(picks: Picks, *modules: str) -> None:
        """As if nobody had installed numba, or loaded torch."""
        kept, compiled = {name: sys.modules.pop(name, None) for name in modules}, RETRANS.compiled
        RETRANS.compiled = lambda: None
        try:
            batch(picks)
        finally:
            RETRANS.compiled = compiled
            sys.modules.update({name: module for name, module in kept.items() if module is not None})

    def files(picks: Picks) -> None:
        for name, spec in specs.items():
            for row, (number, start) in zip(out[name], picks, strict=True):
                stored = np.load(home / f"{name}-{number}.npy", mmap_mode="r")
                row[...] = repeated(stored, spec.frame_rate, start)

    def copied(picks: Picks) -> None:
        for name in specs:
            np.copyto(out[name], other[name])

    ways: dict[str, Callable[[Picks], None]] = {
        "copy of the output": copied, "featstore, read_batch": batch,
        "featstore mapped, read_batch": lambda picks: batch(picks, True),
        "featstore, read_batch, torch, no numba": lambda picks: without(picks, COMPILED),
        "featstore, read_batch, numpy alone": lambda picks: without(picks, COMPILED, "torch"),
        "featstore, crops one by one": one_by_one,
        ".npy, repetition and average": files}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(max(2, rounds) * 3):
        for name, work in ways.items():
            picks = chosen(rng, count, BATCH, 937 - TARGET)
            taken = 1e3 * seconds(lambda: work(picks))  # noqa: B023
            if number:  # the first round finds nothing warm
                times[name].append(taken)
    for name in () if "torch" in sys.modules else ("featstore, read_batch, torch, no numba",):
        print(f"missing: {name} (torch is not installed)")
        del times[name]
    size = sum(out[name].nbytes for name in specs) / 1e6
    table(f"{BATCH} crops of {TARGET} frames of 5 features at {float(MEL)} Hz, {size:.1f} MB out, stored types, warm",
          "ms", times, "copy of the output")
    ours = statistics.median(times["featstore, read_batch"])
    print(f"  read_batch: {ours / statistics.median(times['copy of the output']):.1f} copies of the output (goal 4), "
          f"{statistics.median(times['.npy, repetition and average']) / ours:.1f} x faster than .npy (goal 10)")


def repeated(stored: np.ndarray, rate: Fraction, start: int) -> np.ndarray:
    """Frames `[start, start + TARGET)` by the paper's repetition and average, of no more source than they need."""
    if rate == MEL:
        return stored[start:start + TARGET]
    s, t = (MEL / rate).numerator, (MEL / rate).denominator
    first, last = start * t // s, -(-(start + TARGET) * t // s)
    wide = np.repeat(np.asarray(stored[first:last], np.float32), s, axis=0)
    wide = wide[start * t - first * s:][:TARGET * t]
    whole = len(wide) // t
    means = wide[:whole * t].reshape(whole, t, *wide.shape[1:]).mean(1)
    return means if whole == TARGET else np.concatenate([means, np.repeat(means[-1:], TARGET - whole, 0)])


# --- measuring -------------------------------------------------------------------------------------------------------

def chosen(rng: np.random.Generator, utterances: int, count: int, starts: int = FRAMES - CROP) -> Picks:
    return list(zip(rng.integers(0, utterances, count).tolist(), rng.integers(0, starts, count).tolist(), strict=True))


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def table(title: str, unit: str, found: dict[str, list[float]], base: str) -> None:
    """Median, range, and the median of the ratios to `base` in each round."""
    print(f"\n{title}")
    digits = 1 if unit == "ms" else 0
    for name, values in found.items():
        ratio = statistics.median(one / other for one, other in zip(values, found[base], strict=True))
        print(f"  {name:40} {statistics.median(values):10,.{digits}f} {unit} "
              f"({min(values):,.{digits}f} to {max(values):,.{digits}f})  {ratio:7.3f} x {base}")


if __name__ == "__main__":
    main()
