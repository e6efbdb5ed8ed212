"""Makes tests/data/store-format-1: a small store whose bytes are frozen, so that old stores still open.

Run it only when the format version is raised, into a folder of the new number, and say so in CHANGELOG.md:

    python tests/data/make_store.py tests/data/store-format-1
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from unittest import mock

import numpy as np

import featstore as fs
from featstore import segment, storage, writer

MEL = fs.Spec(made_by="log-mel", version=1, kind="continuous", frame_rate=50, sample_rate=24000, dim=3,
              dtype="float16", settings={"contract": {"fmin": 0.0, "log": "e"}}, pad=-11.5, centre_s="1/100")
F0 = fs.Spec(made_by="f0", version=2, kind="f0", frame_rate=200, sample_rate=16000, dim=0, dtype="float32")
VOICE = fs.Spec(made_by="speaker", version=1, kind="global", dim=2, dtype="float32", weights="ab" * 32)
KEYS = ["alto1/nino_dios", "bass/ё"]


def mel(number: int) -> np.ndarray:
    """(40, 3) float16."""
    return (np.arange(120, dtype=np.float16) / 8 - number).reshape(40, 3)


def make(folder: Path) -> None:
    """Writes the store with ids and times that are always the same."""
    ids = (f"{n:016x}-{n:012x}" for n in itertools.count(1))
    with (mock.patch.object(storage, "new_id", lambda: next(ids)), mock.patch("time.time_ns", lambda: 1),
          mock.patch.multiple(segment, INNER_BYTES=60, SHARD_BYTES=240), mock.patch.object(writer, "CATALOGUE_ROWS", 1),
          mock.patch.object(writer, "FOLD_BYTES", 0)):
        store = fs.create(folder)
        with store.writer(provenance={"featstore": "0.1.0"}) as w:
            for name, spec in (("log-mel", MEL), ("f0", F0), ("speaker", VOICE)):
                w.declare(name, spec)
            for number, key in enumerate(KEYS):
                w.utterance({"key": key, "audio": f"{key}.wav", "speaker": key.split("/")[0], "duration_s": 0.8,
                             "sample_rate": 24000, "channels": 1, "flags": ["clipped"], "extra": {"song": "é"}},
                            source=bytes(range(number, number + 32)), stamp=7 + number, seconds=0.8)
                w.write(key, "log-mel", mel(number))
                w.write(key, "f0", np.full(160, 110 * (number + 1), np.float32))
                w.write(key, "speaker", np.array([number, 0.5], np.float32))
            w.commit()
            w.write(KEYS[0], "log-mel", mel(5))
            w.delete(KEYS[1], "f0")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
