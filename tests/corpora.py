"""Corpora for tests, and what a store holds as bytes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import soundfile as sf

import featstore as fs

ROOTS = [str(Path(__file__).resolve().parents[1] / name) for name in (".", "extractors", "align", "cli", "tests")]


def make_corpus(folder: Path, count: int = 6, seconds: float = 0.5, rate: int = 16000) -> Path:
    """`count` recordings of two speakers, told apart by their noise."""
    for i in range(count):
        path = folder / f"spk{i % 2}" / f"u{i:03d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).uniform(-0.5, 0.5, round(rate * seconds))
        sf.write(path, noise, rate, subtype="PCM_16")
    age(folder)
    return folder


def age(folder: Path) -> None:
    """Let files look an hour old: younger than two seconds they are hashed again."""
    for path in folder.rglob("*.wav"):
        hour_ago = time.time() - 3600
        os.utime(path, (hour_ago, hour_ago))


def contents(store: fs.Store) -> dict[tuple[str, str], bytes]:
    """Every array of a store as bytes."""
    return {(key, name): store[key, name].read(check=True).tobytes()
            for name, feature in store.features.items() for key in feature}
