"""A corpus again as it sounds over a telephone in a noisy place: what a speaker probe is asked in another condition.

    python benchmarks/telephone.py ../shared/audio/manifest.csv OUT

OUT/all.jsonl: the recordings of speakers that have four or more of up to 20 s, and a copy of each, of the condition
"telephone", that names its clean one. A copy is band-limited to 300 to 3,400 Hz, with noise 10 dB below it: what lies
between the clean and noisy recordings of VCTK's p287, which are aligned to a sample.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
from scipy.signal import butter, sosfilt

Array = np.ndarray
FEWEST, LONGEST_S = 4, 20.0
BAND_HZ, SNR_DB = (300.0, 3400.0), 10.0


def copies(manifest: Path, out: Path) -> tuple[int, int]:
    """Write OUT/all.jsonl and the copies; how many recordings and speakers there are."""
    with manifest.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if float(row["duration_s"]) <= LONGEST_S
                and not row["speaker"].endswith("_noisy")]
    often = {name for name, count in Counter(row["speaker"] for row in rows).items() if count >= FEWEST}
    rows = [row for row in rows if row["speaker"] in often]
    noise = between(manifest.parent / "vctk_p287", manifest.parent / "vctk_p287_noisy")
    drawn = np.random.default_rng(0)
    with (out / "all.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            key, path = f"{row['speaker']}/{row['utterance']}", (manifest.parent / row["path"]).resolve()
            known = {"speaker": row["speaker"], "text": row["text"]}
            wave, rate = sf.read(path, dtype="float64")
            copy = out / "telephone" / f"{key}.flac"
            copy.parent.mkdir(parents=True, exist_ok=True)
            sf.write(copy, telephone(wave, rate, *noise, drawn), rate)
            for line in ({"key": key, "path": str(path), "condition": "as recorded"},
                         {"key": f"telephone/{key}", "path": str(copy.resolve()), "condition": "telephone",
                          "clean": key}):
                file.write(json.dumps(line | known) + "\n")
    return len(rows), len(often)


def between(clean: Path, noisy: Path) -> tuple[Array, int]:
    """The noise (N,) of all pairs of two folders, and its sample rate."""
    pairs = [(sf.read(path), sf.read(noisy / path.name)) for path in sorted(clean.glob("*.flac"))]
    return np.concatenate([other - one for (one, _), (other, _) in pairs]), pairs[0][0][1]


def telephone(wave: Array, rate: int, noise: Array, noise_rate: int, drawn: np.random.Generator) -> Array:
    """A waveform (N,) as it sounds there."""
    heard = np.asarray(soxr.resample(noise, noise_rate, rate))
    start = int(drawn.integers(len(heard)))
    heard = np.resize(np.roll(heard, -start), len(wave))
    heard *= np.sqrt((wave**2).mean() / max((heard**2).mean(), 1e-12)) * 10 ** (-SNR_DB / 20)
    return np.clip(sosfilt(butter(4, BAND_HZ, "bandpass", fs=rate, output="sos"), wave + heard), -1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    recordings, speakers = copies(given.manifest, given.out)
    print(f"{given.out / 'all.jsonl'}: {recordings} recordings of {speakers} speakers, and a copy of each")


if __name__ == "__main__":
    main()
