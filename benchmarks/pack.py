"""What codecs save and cost: size, error, and rates of writing and reading, beside raw.

    python benchmarks/pack.py [--rounds 5] [--utterances 60]

Two features: the log-mels of examples/corpus, repeated, and smooth float16 of 1024 channels, each of its own size, made
by an autoregressive process (what a content encoder gives shrinks a little more). All codecs take turns in one run on
warm files; medians over rounds, ratios to raw within a round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr

import featstore as fs
from featstore.pack import pack
from featstore_extractors import parse

CORPUS = Path(__file__).resolve().parents[1] / "examples" / "corpus"
CODECS = ["raw", "zstd", "pcodec"]
SECONDS = 2.0


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def log_mels(home: Path, count: int) -> tuple[fs.Spec, list[np.ndarray]]:
    """Those of the corpus' recordings, repeated until there are about `count` times 10 s."""
    store = fs.create(home / "mel.zarr")
    fs.extract(fs.corpus(CORPUS), store, parse("log-mel"), workers=0)
    feature = store.features["log-mel"]
    arrays = [feature[key].read() for key in feature]
    rows = int(10 * count * feature.spec.frame_rate)
    whole = np.concatenate(arrays)
    whole = np.concatenate([whole] * (1 + rows // len(whole)))[:rows]
    return feature.spec, np.array_split(whole, count)


def smooth(count: int) -> tuple[fs.Spec, list[np.ndarray]]:
    """10 s at 50 Hz each: x[t] = 0.9 x[t - 1] + noise, channels of unlike size."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((500 * count, 1024), np.float32) * np.exp(rng.standard_normal(1024, np.float32) / 2)
    for t in range(1, len(noise)):
        noise[t] += np.float32(0.9) * noise[t - 1]
    spec = fs.Spec(made_by="net", version=1, kind="continuous", frame_rate=50, dim=1024, dtype="float16")
    return spec, np.array_split((0.2 * noise).astype(np.float16), count)


def measure(home: Path, title: str, spec: fs.Spec, arrays: list[np.ndarray], rounds: int) -> None:
    store, size = fs.create(home), sum(array.nbytes for array in arrays)
    written = {}
    for codec in CODECS:
        def write(codec: str = codec) -> None:
            with store.writer(commit_every_s=1e9) as w:
                w.declare(codec, spec, codec=codec)
                for number, array in enumerate(arrays):
                    w.write(f"u{number}", codec, array)

        written[codec] = size / seconds(write)
    packed = pack(store, "raw", "int8")
    written["int8"] = packed.rate
    store = fs.open(home)
    names = dict(zip([*CODECS, "int8"], [*CODECS, "raw-int8"], strict=True))
    frames = int(SECONDS * (spec.frame_rate or 1))
    stored = {codec: sum(s.stored for s in store.features[name].segments) for codec, name in names.items()}
    crops: dict[str, list[float]] = {codec: [] for codec in names}
    whole: dict[str, list[float]] = {codec: [] for codec in names}
    rng = np.random.default_rng(1)
    for _ in range(rounds):
        picks = [(f"u{n}", int(rng.integers(0, len(arrays[n]) - frames))) for n in rng.integers(0, len(arrays), 200)]
        for codec, name in names.items():
            feature = store.features[name]
            crops[codec].append(len(picks) / seconds(lambda f=feature, p=picks: [f[u][a:a + frames] for u, a in p]))
            whole[codec].append(size / seconds(lambda f=feature: [f[f"u{n}"].read() for n in range(len(arrays))]))
    through = {codec: through_zarr(store.features[codec], arrays, frames) for codec in CODECS}
    print(f"\n{title}: {size / 1e6:,.0f} MB; crops of {SECONDS:g} s ({frames} frames)")
    print("  codec      size   write MB/s    read MB/s  x raw    crops/s  x raw   crops/s by zarr-python")
    for codec in names:
        rates = [statistics.median(one / other for one, other in zip(table[codec], table["raw"], strict=True))
                 for table in (whole, crops)]
        by_zarr = f"{through[codec]:12,.0f}" if codec in through else ""
        read, cropped = statistics.median(whole[codec]) / 1e6, statistics.median(crops[codec])
        print(f"  {codec:7} {stored[codec] / size:7.3f} {written[codec] / 1e6:12,.0f} {read:12,.0f} {rates[0]:6.2f} "
              f"{cropped:10,.0f} {rates[1]:6.2f} {by_zarr}")
    loss = packed.loss
    if loss is not None:
        print(f"  int8: error {loss.snr_db:.1f} dB below the signal, of the worst channel {loss.worst_db:.1f} dB")


def through_zarr(feature: fs.Feature, arrays: list[np.ndarray], frames: int, count: int = 40) -> float:
    """Crops per second of a codec that only zarr-python decodes."""
    segment = max(feature.segments, key=lambda found: found.facts["frames"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that pcodec is no codec of the specification
        array = zarr.open_array(str(segment.folder / "frames"), mode="r")
        starts = np.random.default_rng(2).integers(0, array.shape[0] - frames, count).tolist()
        return count / seconds(lambda: [array[start:start + frames] for start in starts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of reading (default 5)")
    parser.add_argument("--utterances", type=int, default=60, help="of 10 s, 1 MB of the 1024 channels (default 60)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        home = Path(folder)
        measure(home / "smooth.zarr", "smooth float16, 1024 channels", *smooth(args.utterances), args.rounds)
        mels = log_mels(home, args.utterances)
        measure(home / "log-mel.zarr", "log-mel float32 of examples/corpus", *mels, args.rounds)


if __name__ == "__main__":
    main()
