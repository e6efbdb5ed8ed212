"""Hours of audio per hour of one accelerator, and how much of its matrix rate the encoders reach.

    python benchmarks/encoders_gpu.py [--device cuda] [--batches 1 8 32] [--seconds 10] [--smoke]

Needs torch, numpy, transformers and safetensors, nothing else installed. Random weights of the true architectures,
clips of noise. The matrix rate is measured on the same chip, one product of two 8192 x 8192 matrices; an encoder's
operations are counted by torch over one batch. Goal: >= 40 % of the bf16 rate for Whisper large-v3 in a batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from architectures import hubert, wenet, whisper
from torch.utils.flop_counter import FlopCounterMode

from featstore_extractors.hubert import ContentVec
from featstore_extractors.wenet import WeNet
from featstore_extractors.whisper import Whisper

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--smoke", action="store_true", help="small networks, to see that it runs")
    args = parser.parse_args()
    if args.device == "cpu" and not args.smoke:
        print("no accelerator here: --smoke runs small networks on the CPU")
        return
    name = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device
    rates = {precision: _matrix_rate(args.device, kind, 512 if args.smoke else 8192)
             for precision, kind in KINDS.items()}
    print(f"{name}, torch {torch.__version__}; matrix rate {rates['bf16'] / 1e12:.1f} TFLOP/s bf16, "
          f"{rates['fp32'] / 1e12:.1f} fp32 (TF32 off)")
    print("| encoder | precision | batch | hours per hour | of the matrix rate |\n| --- | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as scratch:
        for title, build in _encoders(Path(scratch), args.smoke).items():
            for precision in KINDS:
                for batch in [2] if args.smoke else args.batches:
                    speed, share = _measure(build(precision), args.device, batch, args.seconds, rates[precision])
                    print(f"| {title} | {precision} | {batch} | {speed:,.0f} | {share:.0%} |", flush=True)


def _encoders(home: Path, smoke: bool) -> dict[str, Callable[[str], Any]]:
    sizes = ["tiny"] if smoke else ["medium", "large-v3"]
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    made: dict[str, Callable[[str], Any]] = {}
    for size in sizes:
        folder = str(whisper(home / size, size))
        for context in ("30s", "short"):
            made[f"whisper {size}, {context}"] = lambda precision, folder=folder, context=context: Whisper(
                weights=folder, context=context, precision=precision)
    content = str(hubert(home / "contentvec", **(small if smoke else {})))
    made["contentvec"] = lambda precision: ContentVec(weights=content, precision=precision)
    conformer = str(wenet(home / "wenet"))
    made["wenet"] = lambda precision: WeNet(weights=conformer, precision=precision)
    return made


def _measure(extractor: Any, device: str, batch: int, seconds: float, rate: float) -> tuple[float, float]:
    """(hours of audio per hour, share of the matrix rate)."""
    noise = np.random.default_rng(0)
    waves = [noise.normal(0, 0.1, round(seconds * 16000)).astype(np.float32) for _ in range(batch)]
    run = extractor.load(device)
    run(waves)
    with FlopCounterMode(display=False) as counter:
        run(waves)
    took = _median_s(lambda: run(waves), device)
    return batch * seconds / took, counter.get_total_flops() / took / rate


def _matrix_rate(device: str, kind: torch.dtype, size: int) -> float:
    """Operations per second of one square product."""
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 / _median_s(lambda: a @ b, device)


def _median_s(job: Callable[[], object], device: str, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        job()
        _wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
