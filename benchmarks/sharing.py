"""Processes that extract one corpus at the same time: what they do twice, and what keeping apart costs one alone.

    python benchmarks/sharing.py [--utterances 2000] [--seconds 1.0] [--processes 4]

Each process has no workers beside it and the default commit interval: what it has done is on no disk before it ends.
Goal: at most 5 % done twice.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile as sf

import featstore as fs
from featstore.shares import Share
from featstore_extractors import parse

REQUESTS = ["log-mel", "energy"]
RUN = """
import sys
import featstore as fs
from featstore.store import open_or_create
from featstore_extractors import parse
report = fs.extract(fs.corpus(sys.argv[1]), open_or_create(sys.argv[2]), parse(*sys.argv[3:]), workers=0)
print([report.done, report.elsewhere, report.elapsed_s])
"""


def together(corpus: Path, store: Path, processes: int, apart_s: float) -> tuple[int, float]:
    """How many utterances were done more than once, and the seconds of the process that took longest."""
    runs = []
    for _ in range(processes):
        runs.append(subprocess.Popen([sys.executable, "-c", RUN, str(corpus), str(store), *REQUESTS],
                                     stdout=subprocess.PIPE, text=True))
        time.sleep(apart_s)
    reports = [json.loads(run.communicate()[0]) for run in runs]
    return sum(done for done, _, _ in reports) - len(fs.open(store).features["energy"]), max(s for _, _, s in reports)


def notes(corpus: Path, store: Path) -> float:
    """Processor seconds a process alone spends on giving out a plan, for each utterance."""
    plan = fs.plan(fs.corpus(corpus), fs.create(store), parse("energy"))
    share = Share(plan, fs.open(store), "alone")
    began = time.process_time()
    count = sum(len(bundle or ()) for bundle in share.bundles(["energy"], patient=True))
    share.close()
    return (time.process_time() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--utterances", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "wavs"
        corpus.mkdir()
        for i in range(args.utterances):
            wave = np.random.default_rng(i).uniform(-0.3, 0.3, round(24000 * args.seconds))
            sf.write(corpus / f"u{i:06d}.wav", wave, 24000, subtype="PCM_16")
        time.sleep(2.1)  # files younger than this are hashed again
        print(f"{args.utterances:,} recordings of {args.seconds:g} s; {' '.join(REQUESTS)}")
        for number, (processes, apart_s) in enumerate([(1, 0.0), (args.processes, 0.0), (args.processes, 1.0)]):
            twice, took = together(corpus, Path(scratch) / f"{number}.zarr", processes, apart_s)
            print(f"{processes} processes, begun {apart_s:g} s apart: {twice} done twice "
                  f"({100 * twice / args.utterances:.2f} %), the longest took {took:.1f} s")
        print(f"a process alone: {1e6 * notes(corpus, Path(scratch) / 'alone.zarr'):.1f} us an utterance")


if __name__ == "__main__":
    main()
