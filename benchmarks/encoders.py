"""Content encoders beside the usual way of running them: speed, the pipeline around them, memory, and seams.

    python benchmarks/encoders.py speed    [--rounds 5] [--seconds 5]
    python benchmarks/encoders.py pipeline [--every 8]
    python benchmarks/encoders.py memory   [--minutes 60]
    python benchmarks/encoders.py seams
    python benchmarks/encoders.py box      [--rounds 5]

Random weights of the true architectures, one interleaved run. The reference way is transformers' own forward in fp32
with eager attention, one recording at a time, for Whisper always padded to 30 s. Goals, as ratios: Whisper 30 s >= 1.8
x eager; short >= 4 x our own 30 s for clips of 5 s; bf16 >= 1.35 x SDPA in fp32 for Whisper, >= 1.7 x eager for
ContentVec, where the processor has it; decoding, resampling and writing < 10 % of the encoders' time.
box, with its own weights: 0.03 x real time on one core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import engine
import numpy as np
import soundfile as sf
import torch
import transformers
from architectures import ROOT, hubert, wenet, whisper
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from featstore_extractors import parse
from featstore_extractors.encoder import SAMPLE_RATE

Job = Callable[[np.ndarray], Any]
HALF_PRECISION = "avx512_bf16", "amx_bf16"


def speed(shared: Path, home: Path, rounds: int, seconds: float) -> None:
    """Ratios of every way to the reference way, recording by recording, all ways in turn."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    clips = _clips(shared, 6, 3.0, 12.0)
    same = [wave[: round(seconds * SAMPLE_RATE)] for wave in _clips(shared, 6, seconds, 30.0)]
    print(f"{torch.get_num_threads()} threads, {rounds} rounds; clips of {_range(clips)} s; for short: {seconds:g} s; "
          f"the processor {'has' if _has_half() else 'lacks'} bfloat16 products")
    base, tiny, content, conformer = (whisper(home / "base", "base"), whisper(home / "tiny", "tiny"),
                                      hubert(home / "contentvec"), wenet(home / "wenet"))
    for name, folder in (("tiny", tiny), ("base", base)):
        ways = {"30s": f"whisper,weights={folder}", "short": f"whisper,weights={folder},context=short",
                "30s bf16": f"whisper,weights={folder},precision=bf16"}
        jobs = {"eager": _whisper_of_transformers(folder, "eager"), "sdpa": _whisper_of_transformers(folder, "sdpa"),
                **{way: _ours(request) for way, request in ways.items()}}
        times = _interleaved(jobs, clips, rounds)
        _ratio(f"whisper {name}: 30s over eager", times["eager"], times["30s"], 1.8)
        _ratio(f"whisper {name}: 30s over transformers' sdpa", times["sdpa"], times["30s"], None)
        _ratio(f"whisper {name}: bf16 over transformers' sdpa", times["sdpa"], times["30s bf16"], 1.35)
        _ratio(f"whisper {name}: bf16 over our own 30s", times["30s"], times["30s bf16"], None)
        times = _interleaved({way: jobs[way] for way in ("30s", "short")}, same, rounds)
        _ratio(f"whisper {name}: short over 30s, clips of {seconds:g} s", times["30s"], times["short"], 4.0)
    ways = {"ours": f"contentvec,weights={content}", "bf16": f"contentvec,weights={content},precision=bf16",
            "layer 9": f"contentvec,weights={content},layer=9"}
    times = _interleaved({"eager": _eager_hubert(content), **{way: _ours(r) for way, r in ways.items()}}, clips, rounds)
    _ratio("contentvec: ours over eager", times["eager"], times["ours"], None)
    _ratio("contentvec: bf16 over eager", times["eager"], times["bf16"], 1.7)
    _ratio("contentvec: layer 9 over layer 12", times["ours"], times["layer 9"], None)
    ways = {"fp32": f"wenet,weights={conformer}", "bf16": f"wenet,weights={conformer},precision=bf16"}
    times = _interleaved({way: _ours(request) for way, request in ways.items()}, clips, rounds)
    _ratio("wenet: bf16 over fp32", times["fp32"], times["bf16"], None)
    print(f"  wenet: {statistics.median(times['fp32']) / sum(len(w) / SAMPLE_RATE for w in clips):.3f} x real time")


def pipeline(shared: Path, home: Path, every: int, rounds: int) -> None:
    """Whole extraction against the bare encoders on waveforms in memory, of recordings that are one piece."""
    for path in sorted((shared / "audio").rglob("*.flac"))[::every]:
        if sf.info(path).duration <= 30:
            link = home / "part" / "audio" / path.relative_to(shared / "audio")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    engine.overhead(home / "part", [f"whisper,weights={whisper(home / 'base', 'base')},context=short",
                                    f"contentvec,weights={hubert(home / 'contentvec')}"], 1, rounds)


def memory(shared: Path, home: Path, minutes: list[int]) -> None:
    """Peak of the process tree on one long recording, an encoder at a time."""
    for name, folder in (("whisper", whisper(home / "base", "base")), ("contentvec", hubert(home / "contentvec")),
                         ("wenet", wenet(home / "wenet"))):
        engine.memory(shared, [f"{name},weights={folder}"], minutes)


def seams(shared: Path, home: Path) -> None:
    """How much two neighbouring windows disagree where one hands over to the other, beside the step between frames."""
    wave = np.concatenate(_clips(shared, 12, 6.0, 30.0))[: 60 * SAMPLE_RATE]
    for name, folder in (("whisper", whisper(home / "tiny", "tiny")), ("contentvec", hubert(home / "contentvec")),
                         ("wenet", wenet(home / "wenet"))):
        extractor: Any = parse(f"{name},weights={folder},dtype=float32")[name]
        core, context, longest = extractor.window
        run = extractor.load("cpu")
        per = int(SAMPLE_RATE / extractor.frame_rate)
        first = run([wave[: core + context]])[0].astype(np.float64)
        second = run([wave[core - context : core - context + longest]])[0].astype(np.float64)
        before, after = first[(core - context) // per : core // per], second[: context // per]
        told = []
        for place in (0, len(before) // 2, len(before) - 1):
            apart = np.linalg.norm(before[place] - after[place]) / np.linalg.norm(after[place])
            told.append(f"{(len(before) - place) * per / SAMPLE_RATE:.2f} s before it {apart:.4f}")
        step = np.linalg.norm(np.diff(after, axis=0), axis=1).mean() / np.linalg.norm(after, axis=1).mean()
        if name != "whisper":
            whole = run([wave])[0].astype(np.float64)
            there = whole[core // per : (core + core // 2) // per]
            here = second[context // per :][: len(there)]
            told.append(f"windows over one piece {np.linalg.norm(here - there) / np.linalg.norm(there):.4f}")
        print(f"{name}: relative difference of two windows at the seam: {', '.join(told)}; "
              f"from one frame to the next {step:.4f}")


def box(shared: Path, home: Path, rounds: int) -> None:
    """The encoder that ships beside two that do not, on one core, in parts of real time, and how large they are."""
    torch.set_num_threads(1)
    clips = _clips(shared, 6, 3.0, 12.0)
    seconds = sum(len(wave) / SAMPLE_RATE for wave in clips)
    tiny, content = whisper(home / "tiny", "tiny"), hubert(home / "contentvec")
    requests = {"mini": "mini", "whisper tiny": f"whisper,weights={tiny}",
                "whisper tiny, short": f"whisper,weights={tiny},context=short",
                "contentvec": f"contentvec,weights={content}"}
    times = _interleaved({name: _ours(request) for name, request in requests.items()}, clips, rounds)
    print(f"one thread, {rounds} rounds; clips of {_range(clips)} s")
    for name, request in requests.items():
        (extractor,) = parse(request).values()
        spent = statistics.median(times[name])
        print(f"  {name}: {spent / seconds:.4f} x real time, {spent / statistics.median(times['mini']):.1f} x mini; "
              f"{extractor.weights_bytes / 1e6:.1f} MB")


def _clips(shared: Path, count: int, shortest_s: float, longest_s: float) -> list[np.ndarray]:
    """Recordings of about those lengths at 16 kHz, evenly taken from what there is."""
    found = []
    for path in sorted((shared / "audio").rglob("*.flac")):
        wave = engine._decoded(path, SAMPLE_RATE)
        if shortest_s * SAMPLE_RATE <= len(wave) <= longest_s * SAMPLE_RATE:
            found.append(wave)
        if len(found) == 8 * count:
            break
    return found[:: max(1, len(found) // count)][:count]


def _ours(request: str) -> Job:
    (extractor,) = parse(request).values()
    run = extractor.load("cpu")
    return lambda wave: run([wave])


def _whisper_of_transformers(folder: Path, attention: str) -> Job:
    """As transformers' users do it: feature extractor, padded to 30 s; eager attention is the reference."""
    config = transformers.WhisperConfig.from_pretrained(folder, attn_implementation=attention)
    torch.manual_seed(0)
    network = WhisperEncoder(config).eval()
    prepare = transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins)

    def run(wave: np.ndarray) -> np.ndarray:
        mel = prepare(wave, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        with torch.inference_mode():
            return network(mel).last_hidden_state[0, : -(-len(wave) // 320)].numpy()

    return run


def _eager_hubert(folder: Path) -> Job:
    network = transformers.HubertModel.from_pretrained(folder, attn_implementation="eager").eval()

    def run(wave: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(wave)[None], output_hidden_states=True).hidden_states[12][0].numpy()

    return run


def _interleaved(jobs: dict[str, Job], waves: list[np.ndarray], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job over all waves, a list of rounds; within one the jobs take turns at every wave."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job(waves[0])
    for _ in range(rounds):
        spent = dict.fromkeys(jobs, 0.0)
        for wave in waves:
            for name, job in jobs.items():
                began = time.perf_counter()
                job(wave)
                spent[name] += time.perf_counter() - began
        for name, seconds in spent.items():
            times[name].append(seconds)
    return times


def _ratio(what: str, slow: list[float], fast: list[float], goal: float | None) -> None:
    ratios = [one / other for one, other in zip(slow, fast, strict=True)]
    told = "" if goal is None else f"; goal >= {goal:g}"
    print(f"  {what}: {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f}); "
          f"{statistics.median(slow):.2f} s and {statistics.median(fast):.2f} s{told}")


def _has_half() -> bool:
    try:
        return any(name in Path("/proc/cpuinfo").read_text() for name in HALF_PRECISION)
    except OSError:
        return False


def _range(waves: list[np.ndarray]) -> str:
    lengths = [len(wave) / SAMPLE_RATE for wave in waves]
    return f"{min(lengths):.1f} to {max(lengths):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=["speed", "pipeline", "memory", "seams", "box", "all"],
                        default="all")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="speed: length of clips for context=short")
    parser.add_argument("--every", type=int, default=8, help="pipeline: use every n-th recording")
    parser.add_argument("--minutes", type=int, nargs="+", default=[10, 60])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        if args.part in ("speed", "all"):
            speed(args.shared, home, args.rounds, args.seconds)
        if args.part in ("pipeline", "all"):
            pipeline(args.shared, home, args.every, min(args.rounds, 3))
        if args.part in ("memory", "all"):
            memory(args.shared, home, args.minutes)
        if args.part in ("seams", "all"):
            seams(args.shared, home)
        if args.part in ("box", "all"):
            box(args.shared, home, args.rounds)


if __name__ == "__main__":
    main()
