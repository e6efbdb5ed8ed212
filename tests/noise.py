"""A store of random numbers for tests of training: six singers, 0.05 to 12 s, a feature of each kind."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

import featstore as fs

FLOOR = -11.5  # what pads the log-mel
HOP = 240      # samples of a frame
GRID = ["log-mel", "content", "f0", "wave", "who"]


def make(path: Path, count: int = 60) -> fs.Store:
    """Utterances `singer/number`; singer s0 has the most, s5 those shorter than half a second."""
    noise = np.random.default_rng(0)
    store = fs.create(path)
    with store.writer() as w:
        w.declare("log-mel", fs.Spec(made_by="noise", version=1, frame_rate=Fraction(100), kind="continuous",
                                     centre_s=Fraction(1, 200), pad=FLOOR))
        w.declare("content", fs.Spec(made_by="noise", version=1, frame_rate=Fraction(50), kind="continuous"))
        w.declare("f0", fs.Spec(made_by="noise", version=1, frame_rate=Fraction(200), kind="f0"))
        w.declare("wave", fs.Spec(made_by="noise", version=1, frame_rate=Fraction(24000), kind="samples"))
        w.declare("who", fs.Spec(made_by="noise", version=1, kind="global"))
        for number in range(count):
            singer = 5 if number % 6 == 5 else 0 if number % 2 else number % 5
            frames = int(noise.integers(5, 50) if singer == 5 else noise.integers(60, 1200))
            add(w, f"s{singer}/{number:03d}", frames, noise)
    return fs.open(path)


def add(writer: fs.Writer, key: str, frames: int, noise: np.random.Generator) -> None:
    """One utterance of `frames` frames of 10 ms."""
    seconds = frames / 100
    writer.utterance({"key": key, "speaker": key.partition("/")[0], "duration_s": seconds, "root": "/data/noise",
                      "extra": {"mood": "glad" if frames % 2 else "sad"}}, source=key.encode().ljust(32, b"."),
                     seconds=seconds)
    writer.write(key, "log-mel", noise.normal(size=(frames, 8)).astype(np.float32))
    writer.write(key, "content", noise.normal(size=(max(1, frames // 2), 16)).astype(np.float16))
    writer.write(key, "f0", noise.uniform(100, 400, 2 * frames).astype(np.float32))
    writer.write(key, "wave", noise.normal(0, 0.1, HOP * frames).astype(np.float32))
    writer.write(key, "who", noise.normal(size=4).astype(np.float32))
