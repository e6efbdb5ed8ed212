"""Every f0 tracker on voices whose f0 is known: error, octave errors, voicing, lag and speed. For docs/f0.md.

    python benchmarks/f0.py [--shared ../shared] [--trackers harvest,dio] [--write]

Makes its voices with `make_corpus.py` of the shared folder (four singers, two engines, studio and wild, and white noise
at 20 and 10 dB), and asks for agreement with the recordings there whose notes are known. About eight minutes on one
core; trackers whose package is not installed are left out. Frames within 20 ms of a change of voicing are not counted
for voicing, since there a voice is neither.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # "x real time" is of one core
    os.environ.setdefault(variable, "1")

import numpy as np  # noqa: E402  # threads are counted on import
import soundfile  # noqa: E402
import soxr  # noqa: E402

from featstore_extractors.f0 import F0  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TRACKERS = ("harvest", "dio", "pyin", "swift", "crepe", "fcpe", "praat")
COLUMNS = ("condition", "tracker", "right %", "cents", "p95", "> 50 c %", "octave %", "missed %", "false %", "lag ms")
RATE = 200  # frames a second, of the truth and of every tracker here


def corpus(shared: Path, folder: Path, **options: str | int) -> list[tuple[np.ndarray, int, np.ndarray]]:
    """(wave, sample rate, true f0 at 200 Hz) for each file that make_corpus.py makes with `options`."""
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    subprocess.run([sys.executable, "-W", "ignore", shared / "make_corpus.py", "--out", folder, *words], check=True,
                   capture_output=True)
    voices = []
    for path in sorted(folder.glob("spk*/*.flac")):
        wave, rate = soundfile.read(path, dtype="float32")
        voices.append((wave, rate, np.load(folder / "truth" / path.parent.name / f"{path.stem}.npz")["f0"]))
    return voices


def noisy(voices: list, snr_db: float) -> list:
    """The same voices in white noise, `snr_db` below their mean power."""
    rng = np.random.default_rng(7)
    level = 10 ** (-snr_db / 20)
    return [((wave + rng.standard_normal(len(wave)) * wave.std() * level).astype(np.float32), rate, truth)
            for wave, rate, truth in voices]


def conditions(shared: Path, folder: Path, seed: int = 0) -> Iterator[tuple[str, list]]:
    """(name, voices) of every condition."""
    song = {"kind": "singing", "speakers": 4, "utterances": 1, "seconds": 8, "seed": seed}
    espeak = corpus(shared, folder / "espeak", engine="espeak", **song)
    formant = corpus(shared, folder / "formant", engine="formant", **song)
    yield "espeak + WORLD", espeak
    yield "formant", formant
    yield "formant, speech", corpus(shared, folder / "speech", engine="formant", **(song | {"kind": "speech"}))
    yield "both, white 20 dB", noisy(espeak + formant, 20)
    yield "both, white 10 dB", noisy(espeak + formant, 10)
    wild = [voice for engine in ("espeak", "formant")
            for voice in corpus(shared, folder / f"wild-{engine}", engine=engine, condition="wild", **song)]
    yield "both, wild", wild


def lag_ms(f0: np.ndarray, truth: np.ndarray, reach: int = 12) -> float:
    """By how much `f0` (T,) comes after `truth` (T,): where their log-f0 differ least, between frames by a parabola.

    NaN where fewer than 50 frames agree within half a semitone at some shift.
    """
    with np.errstate(divide="ignore"):
        ours, true = (np.where(x > 0, np.log(x), np.nan) for x in (f0, truth))
    costs = []
    for shift in range(-reach, reach + 1):
        apart = ours[max(shift, 0):len(ours) + min(shift, 0)] - true[max(-shift, 0):len(true) - max(shift, 0)]
        near = apart[np.abs(apart) < 0.03]  # half a semitone; NaN compares false
        costs.append(np.mean(near**2) if len(near) >= 50 else np.nan)
    if np.isnan(costs).any():
        return float("nan")
    best = int(np.argmin(costs[1:-1])) + 1
    before, here, after = costs[best - 1:best + 2]
    return (best - reach + 0.5 * (before - after) / (before - 2 * here + after)) * 1000 / RATE


def judged(f0: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray | float]:
    """What to count in one file: per-frame errors and verdicts, and its lag."""
    size = min(len(f0), len(truth))
    f0, truth = f0[:size], truth[:size]
    true = truth > 0
    change = np.flatnonzero(np.diff(true.astype(int)))
    sure = np.ones(size, bool)
    for at in change:
        sure[max(at - 3, 0):at + 5] = False
    both = true & (f0 > 0)
    cents = np.abs(1200 * np.log2(f0[both] / truth[both]))
    right = np.where(true, False, f0 == 0)
    right[both] = cents < 50
    return {"cents": cents, "octave": np.abs(cents % 1200 - 1200 * (cents % 1200 > 600))[cents > 600] < 100,
            "missed": f0[true & sure] == 0, "false": f0[~true & sure] > 0, "right": right[sure],
            "lag": lag_ms(f0, truth)}


def summary(files: list[dict]) -> list[str]:
    """One line of the table, after condition and tracker."""
    of = {key: np.concatenate([file[key] for file in files]) for key in files[0] if key != "lag"}
    cents = of["cents"]
    return [f"{100 * of['right'].mean():.1f}", f"{np.median(cents):.1f}", f"{np.percentile(cents, 95):.0f}",
            f"{100 * np.mean(cents > 50):.1f}", f"{100 * of['octave'].sum() / len(cents):.1f}",
            f"{100 * of['missed'].mean():.1f}", f"{100 * of['false'].mean():.1f}",
            f"{np.nanmedian([file['lag'] for file in files]):+.1f}"]


class Timed:
    """A tracker that counts what it costs."""

    def __init__(self, tracker: str) -> None:
        self.settings = F0(tracker=tracker)
        self.run: Callable = self.settings.load("cpu")
        self.run([np.random.default_rng(0).standard_normal(self.settings.sample_rate).astype(np.float32) / 10])
        self.cpu_s = self.audio_s = 0.0

    def __call__(self, wave: np.ndarray, rate: int) -> np.ndarray:
        if rate != self.settings.sample_rate:
            wave = soxr.resample(wave, rate, self.settings.sample_rate)
        start = time.process_time()
        f0 = self.run([wave])[0]
        self.cpu_s += time.process_time() - start
        self.audio_s += len(wave) / self.settings.sample_rate
        return f0


def available(names: list[str]) -> dict[str, Timed]:
    """The trackers whose packages are installed."""
    found = {}
    for name in names:
        try:
            found[name] = Timed(name)
        except ImportError as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


def read(path: Path) -> tuple[np.ndarray, int]:
    """A recording, mono."""
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return wave.mean(axis=1), rate


def named_notes(track: Timed, audio: Path) -> list[float]:
    """Cents between the median f0 of each Berklee recording and the note in its name."""
    apart = []
    for path in sorted(audio.glob("berklee_*/aa_*.flac")):
        note = path.stem.removeprefix("aa_")
        semitone = {"C": -9, "D": -7, "E": -5, "F": -4, "G": -2, "A": 0, "B": 2}[note[0]]
        semitone += {"b": -1, "s": 1}.get(note[1], 0) + 12 * (int(note[-1]) - 4)
        f0 = track(*read(path))
        apart.append(1200 * np.log2(np.median(f0[f0 > 0]) / 440) - 100 * semitone)
    return apart


def annotated(track: Timed, audio: Path) -> tuple[float, float]:
    """Per cent of right frames on the Vocadito song (50 cents, voicing), and its median cents."""
    rows = np.array([[float(cell) for cell in row] for row in
                     csv.reader((audio / "vocadito_S1/vocadito_1.f0.csv").open(encoding="utf-8"))])
    f0 = track(*read(audio / "vocadito_S1/vocadito_1.flac"))
    f0 = f0[np.clip(np.rint(rows[:, 0] * RATE).astype(int), 0, len(f0) - 1)]
    file = judged(f0, rows[:, 1])
    return 100 * float(np.mean(file["right"])), float(np.median(file["cents"]))


def pauses(track: Timed, audio: Path) -> tuple[float, float]:
    """Per cent of frames called voiced in the pauses of four VCTK sentences: the clean ones, and those in real noise.

    A pause is where the clean recording stays 35 dB below its loudest 25 ms for 100 ms; there are 0.8 s of it, nearly
    all in one sentence, and the noise may hold voices.
    """
    counts = []
    for folder in ("vctk_p287", "vctk_p287_noisy"):
        voiced = []
        for path in sorted((audio / "vctk_p287_noisy").glob("*.flac")):
            clean, rate = read(audio / "vctk_p287" / path.name)
            hop = rate // RATE
            power = (clean[:len(clean) // hop * hop].reshape(-1, hop) ** 2).mean(axis=1)
            power = np.convolve(power, np.ones(5) / 5, "same")
            quiet = np.convolve(power < power.max() * 10 ** -3.5, np.ones(20), "same") == 20
            voiced.append(track(*read(audio / folder / path.name))[:len(quiet)][quiet] > 0)
        counts.append(100 * float(np.mean(np.concatenate(voiced))))
    return counts[0], counts[1]


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [list(head), ["---"] * 2 + ["---:"] * (len(head) - 2), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measure(shared: Path, trackers: dict[str, Timed], seed: int) -> tuple[str, str]:
    """The tables of exact voices and of recordings."""
    exact, real = [], []
    with tempfile.TemporaryDirectory() as folder:
        for condition, voices in conditions(shared, Path(folder), seed):
            for name, track in trackers.items():
                files = [judged(track(wave, rate), truth) for wave, rate, truth in voices]
                exact.append([condition, name, *summary(files)])
                print(" ".join(f"{cell:>9s}" for cell in exact[-1]), flush=True)
    audio = shared / "audio"
    for name, track in trackers.items():
        notes = np.abs(named_notes(track, audio))
        right, cents = annotated(track, audio)
        clean, noise = pauses(track, audio)
        real.append([name, f"{track.settings.sample_rate}", f"{np.sum(notes <= 25)} of {len(notes)}",
                     f"{notes.max():.0f}", f"{right:.1f}", f"{cents:.1f}", f"{clean:.0f}", f"{noise:.0f}",
                     f"{track.audio_s / track.cpu_s:.1f}"])
        print(" ".join(f"{cell:>9s}" for cell in real[-1]), flush=True)
    head = ("tracker", "sample rate", "notes within 25 c", "worst, c", "Vocadito right %", "cents", "pauses voiced %",
            "in noise %", "x real time")
    return table(COLUMNS, exact), table(head, real)


def write(page: Path, tables: tuple[str, str]) -> None:
    """Puts the tables between their markers in the page."""
    text = page.read_text(encoding="utf-8")
    for name, new in zip(("exact", "recordings"), tables, strict=True):
        begin, end = f"<!-- {name}: benchmarks/f0.py --write -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = before + begin + new + "\n" + end + rest.split(end)[1]
    page.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared",
                        help="folder of make_corpus.py and audio/")
    parser.add_argument("--trackers", default=",".join(TRACKERS), help="names, comma between")
    parser.add_argument("--seed", type=int, default=0, help="of the songs and the manner of singing")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/f0.md")
    options = parser.parse_args()
    if not (options.shared / "make_corpus.py").exists():
        parser.error(f"{options.shared} has no make_corpus.py; give --shared FOLDER")
    tables = measure(options.shared, available(options.trackers.split(",")), options.seed)
    print("\n\n".join(("", *tables)))
    if options.write:
        write(ROOT / "docs" / "f0.md", tables)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
