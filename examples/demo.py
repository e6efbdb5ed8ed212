"""The main job on the recordings beside this file: a folder of audio to a keyed Zarr store, once.

    python examples/demo.py [STORE]        (default: build/demo.zarr)
"""

from __future__ import annotations

import sys
from pathlib import Path

import featstore as fs
from featstore_extractors import parse

HERE = Path(__file__).resolve().parent


def main(path: Path) -> None:
    corpus = fs.corpus(HERE / "corpus")
    print(corpus)
    path.parent.mkdir(parents=True, exist_ok=True)
    store = fs.open(path) if path.exists() else fs.create(path)
    extractors = parse("log-mel", "f0", "energy", "loudness", "wave", "speaker", "mini")

    report = fs.extract(corpus, store, extractors)
    print(f"{report.done} recordings extracted in {report.elapsed_s:.1f} s, {report.fresh} were fresh already")
    for failure in report.failures:
        print(f"  {failure.utterance}: {failure.feature or 'recording'}: {failure.reason}")

    print(store)
    for feature in store.features.values():
        print(f"  {feature}")
    key = next(iter(store.utterances))
    f0 = store[key, "f0"][:]
    print(f"{key}: {store.utterances[key].duration_s:.2f} s, {(f0 > 0).mean():.0%} voiced, "
          f"median f0 {sorted(f0[f0 > 0])[int((f0 > 0).sum()) // 2]:.1f} Hz, "
          f"log-mel {store[key, 'log-mel'].shape}, content {store[key, 'mini'].shape}; "
          f"{store.why(key, 'f0').state}: {store.why(key, 'f0').reason}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "build" / "demo.zarr")
