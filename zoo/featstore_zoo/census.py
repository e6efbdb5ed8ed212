"""What is in a store: duration, f0 and voiced share, loudness, recordings that may be faulty; by speaker, as a page.

Everything comes from what is stored: f0 and loudness (or energy) frame by frame, flags that the recordings got when
they were decoded. Of a large store MOST utterances are measured, drawn by the seed; durations and flags are of all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore import Store, StoredUtterance
from featstore.errors import BadRequest

from . import page
from .page import Cell, number

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

Array = np.ndarray
Told = Callable[[int, int], None]

MOST = 20_000        # utterances whose frames are read
F0_RANGE = (30.0, 2000.0)  # Hz
CENTS = 10           # width of a bin of f0
SILENT_DB = -60.0    # a frame below it is silence: beneath the noise of most rooms
QUIET_DB = -50.0     # the mean of an utterance below it: nobody spoke near the microphone
STILL = 0.5          # share of silent frames that is worth a flag
SHOWN = 40           # speakers in the picture
ROWS = 2_000         # of a table
NAMES = ("C", "C♯", "D", "D♯", "E", "F", "F♯", "G", "G♯", "A", "A♯", "B")
MEANS = {
    "antiphase": "channels cancel; the loudest was taken", "clipped": "over 1 % of the samples stand at full scale",
    "dc-offset": "the mean is beyond 0.05", "low-band": "sample rate below 8 kHz",
    "over-range": "samples beyond full scale", "silent": "nothing above -90 dBFS",
    "truncated": "the file ends before its header says", "quiet": f"loudness below {QUIET_DB:g} dBFS",
    "mostly-silent": f"over {STILL:.0%} of the frames below {SILENT_DB:g} dBFS", "unvoiced": "no voiced frame",
}


@dataclass
class Voice:
    """What was counted of a speaker. speaker: None for utterances that name none.

    f0: (bins,) voiced frames by pitch, CENTS wide; frames, voiced: all and voiced ones. power: sum over frames of the
    mean square, and levels, silent: frames that it is of, and those below SILENT_DB. loudness: dBFS of each utterance.
    """

    speaker: str | None
    seconds: list[float] = field(default_factory=list)
    flags: Counter[str] = field(default_factory=Counter)
    f0: Array = field(default_factory=lambda: np.zeros(_bin(F0_RANGE[1]) + 1, np.int64))
    frames: int = 0
    voiced: int = 0
    power: float = 0.0
    levels: int = 0
    silent: int = 0
    loudness: list[float] = field(default_factory=list)

    @property
    def hours(self) -> float:
        return math.fsum(self.seconds) / 3600

    @property
    def voiced_share(self) -> float:
        """Of frames, 0 to 1; NaN where there is no f0."""
        return self.voiced / self.frames if self.frames else math.nan

    @property
    def silent_share(self) -> float:
        return self.silent / self.levels if self.levels else math.nan

    @property
    def mean_db(self) -> float:
        """Loudness of all frames together, dBFS: of their mean power."""
        return 10 * math.log10(max(self.power / self.levels, 1e-30)) if self.levels else math.nan

    def f0_at(self, share: float) -> float:
        """f0 in Hz below which a share of the voiced frames lies, to CENTS; NaN without any."""
        if not self.f0.any():
            return math.nan
        place = int(np.searchsorted(np.cumsum(self.f0), share * self.f0.sum()))
        return float(F0_RANGE[0] * 2 ** ((place + 0.5) * CENTS / 1200))


@dataclass(frozen=True)
class Census:
    """What a store holds. features: (name, what it is, utterances, bytes); flagged: key -> flags; measured: utterances
    whose frames were read."""

    store: str
    utterances: int
    voices: tuple[Voice, ...]
    features: tuple[tuple[str, str, int, int], ...]
    flagged: Mapping[str, tuple[str, ...]]
    measured: int
    loudness_by: str | None

    @property
    def hours(self) -> float:
        return math.fsum(voice.hours for voice in self.voices)

    def to_json(self) -> dict[str, Any]:
        """Everything by speaker, as plain values; None for what is not known."""
        speakers = [{"speaker": v.speaker, "utterances": len(v.seconds), "hours": v.hours, "f0_median_hz": v.f0_at(0.5),
                     "f0_low_hz": v.f0_at(0.05), "f0_high_hz": v.f0_at(0.95), "voiced_share": v.voiced_share,
                     "loudness_dbfs": v.mean_db, "silent_share": v.silent_share, "flags": dict(v.flags)}
                    for v in self.voices]
        plain = [{name: None if value != value else value for name, value in row.items()} for row in speakers]  # NaN
        return {"store": self.store, "utterances": self.utterances, "hours": self.hours, "measured": self.measured,
                "loudness_by": self.loudness_by, "speakers": plain, "flagged": {k: list(v) for k, v in
                                                                                self.flagged.items()},
                "features": [dict(zip(("name", "what", "utterances", "bytes"), row, strict=True))
                             for row in self.features]}


def take(store: Store, *, seed: int = 0, progress: Told | None = None) -> Census:
    """Count what the store has. Speakers by duration, longest first.

    Raises:
        BadRequest: the store has no utterances.
    """
    if not len(store.utterances):
        raise BadRequest(f"{store.path} has no utterances to report on: featstore extract CORPUS {store.path} -f f0")
    known = sorted(store.utterances.read_all(), key=lambda u: u.key)
    drawn = set(np.random.default_rng(seed).permutation(len(known))[:MOST].tolist())
    level = next((name for name in ("loudness", "energy") if name in store.features), None)
    voices: dict[str | None, Voice] = {}
    flagged: dict[str, tuple[str, ...]] = {}
    for place, u in enumerate(known):
        voice = voices.setdefault(u.speaker, Voice(u.speaker))
        flags = [*u.flags, *(_measure(store, u, voice, level) if place in drawn else ())]
        voice.seconds.append(u.duration_s)
        voice.flags.update(flags)
        if flags:
            flagged[u.key] = tuple(sorted(flags))
        if progress is not None:
            progress(place + 1, len(known))
    ordered = sorted(voices.values(), key=lambda v: (-v.hours, v.speaker is None, str(v.speaker)))
    features = tuple((name, _what(store, name), len(f), f.nbytes) for name, f in store.features.items())
    return Census(str(store.path), len(known), tuple(ordered), features, flagged, len(drawn), level)


def html(census: Census) -> str:
    """The page: what there is, pictures, speakers, recordings that may be faulty."""
    people = sum(voice.speaker is not None for voice in census.voices)
    said = f"{census.utterances:,} utterances, {people:,} speakers, {_length(census.hours)}."
    if census.measured < census.utterances:
        said += f" f0 and loudness are of {census.measured:,} utterances that were drawn."
    body = page.markup("<p>{}</p>\n").format(said) + _pictures(census) + _speakers(census) + _flagged(census)
    return page.page(f"What is in {census.store}", body + _features(census))


def note(hz: float) -> str:
    """The nearest note of equal temperament, A4 = 440 Hz: "A♯3"."""
    if not hz > 0:
        return ""
    key = round(69 + 12 * math.log2(hz / 440))
    return f"{NAMES[key % 12]}{key // 12 - 1}"


def _measure(store: Store, u: StoredUtterance, voice: Voice, level: str | None) -> list[str]:
    """Add an utterance's frames to its speaker's; what they give rise to suspect."""
    found = []
    if "f0" in store.features and u.key in store.features["f0"]:
        f0 = store[u.key, "f0"].read().astype(np.float64)
        voiced = np.clip(f0[f0 > 0], *F0_RANGE)
        voice.frames, voice.voiced = voice.frames + len(f0), voice.voiced + len(voiced)
        voice.f0 += np.bincount(_bins(voiced), minlength=len(voice.f0))
        found += [] if len(voiced) else ["unvoiced"]
    if level is not None and u.key in store.features[level]:
        value = store[u.key, level].read().astype(np.float64)
        power = 10 ** (value / 10) if level == "loudness" else value**2
        silent = int((power < 10 ** (SILENT_DB / 10)).sum())
        voice.power, voice.levels = voice.power + float(power.sum()), voice.levels + len(power)
        voice.silent += silent
        voice.loudness.append(10 * math.log10(max(float(power.mean()), 1e-30)))
        found += ["quiet"] if voice.loudness[-1] < QUIET_DB else []
        found += ["mostly-silent"] if silent > STILL * len(power) else []
    return found


def _what(store: Store, name: str) -> str:
    feature = store.features[name]
    rate = f"{float(feature.frame_rate):g} Hz" if feature.frame_rate else "one per utterance"
    return f"{feature.kind}, {rate}" + (f", {feature.dim} channels" if feature.dim else "") + f", {feature.dtype}"


def _bins(hz: Array) -> Array:
    return (1200 / CENTS * np.log2(hz / F0_RANGE[0])).astype(np.int64)


def _bin(hz: float) -> int:
    return int(_bins(np.array([hz]))[0])


def _length(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _label(voice: Voice) -> str:
    return "(not named)" if voice.speaker is None else voice.speaker


def _pictures(census: Census) -> Markup:
    said = page.markup("<h2>Pictures</h2>\n<div class=\"columns\">\n")
    seconds = [length for voice in census.voices for length in voice.seconds if length > 0]
    if seconds:
        said += page.figure(_histogram(seconds, "seconds", log=True), "Histogram of durations",
                            "Durations of the utterances.")
    levels = [level for voice in census.voices for level in voice.loudness]
    if levels:
        said += page.figure(_histogram(levels, "dBFS", log=False), "Histogram of loudness",
                            f"Loudness of the utterances, from the stored {census.loudness_by}.")
    sung = [voice for voice in census.voices if voice.voiced][:SHOWN]
    if sung:
        most = f" The {SHOWN} with the most audio." if sum(bool(v.voiced) for v in census.voices) > SHOWN else ""
        said += page.figure(_ranges(sung), "f0 by speaker: " + "; ".join(
            f"{_label(v)} {v.f0_at(0.05):.0f} to {v.f0_at(0.95):.0f} Hz" for v in sung),
            f"f0 by speaker: 90 % of the voiced frames, and the median.{most}")
    return said + page.markup("</div>\n")


def _histogram(values: Sequence[float], unit: str, *, log: bool) -> Figure:
    from matplotlib import rc_context

    with rc_context(page.inked()):
        figure, axes = _figure(4.4, 2.4)
        bins = np.geomspace(min(values), max(values) * 1.001, 30) if log and min(values) < max(values) else 30
        axes.hist(values, bins=bins, color=page.COLOURS[0])
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(unit)
        axes.set_ylabel("utterances")
    return figure


def _ranges(voices: Sequence[Voice]) -> Figure:
    from matplotlib import rc_context

    with rc_context(page.inked()):
        figure, axes = _figure(6.0, 0.9 + 0.19 * len(voices))
        at = np.arange(len(voices))
        axes.hlines(at, [v.f0_at(0.05) for v in voices], [v.f0_at(0.95) for v in voices], color=page.COLOURS[0],
                    linewidth=3)
        axes.plot([v.f0_at(0.5) for v in voices], at, "|", color=page.INK, markersize=8, markeredgewidth=1.6)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks(at, [_label(v) for v in voices])
        axes.invert_yaxis()
        axes.set_xlabel("f0, Hz")
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _speakers(census: Census) -> Markup:
    heads: list[str | tuple[str, str]] = [
        "speaker", "utterances", "duration", ("f0 median", "Hz"), ("f0 range", "Hz, 90 % of voiced frames"),
        ("voiced", "% of frames"), ("loudness", "dBFS"), ("silence", f"% of frames below {SILENT_DB:g} dBFS"), "flags"]
    rows = [[_label(v), Cell(f"{len(v.seconds):,}", value=len(v.seconds)), Cell(_length(v.hours), value=v.hours),
             Cell(number(v.f0_at(0.5), 0), note(v.f0_at(0.5)), v.f0_at(0.5)), _range(v),
             _share(v.voiced_share), Cell(number(v.mean_db, 1), value=v.mean_db), _share(v.silent_share),
             ", ".join(f"{name} {count}" for name, count in sorted(v.flags.items()))] for v in census.voices[:ROWS]]
    return page.markup("<h2>Speakers</h2>\n") + page.table(
        heads, rows, name="speakers", filtered=len(rows) > 15,
        caption=_cut("speakers", len(census.voices)) + "By duration, longest first.")


def _range(voice: Voice) -> Cell:
    low, high = voice.f0_at(0.05), voice.f0_at(0.95)
    if math.isnan(low):
        return Cell("–", value=math.nan)
    return Cell(f"{low:.0f} to {high:.0f}", f"{note(low)} to {note(high)}", high / low)


def _share(share: float) -> Cell:
    return Cell(number(100 * share, 1), value=share)


def _flagged(census: Census) -> Markup:
    counts = Counter(flag for flags in census.flagged.values() for flag in flags)
    if not counts:
        return page.markup("<h2>Flags</h2>\n<p>No recording has a flag.</p>\n")
    rows = [[key, ", ".join(flags)] for key, flags in list(census.flagged.items())[:ROWS]]
    kinds = [[flag, Cell(f"{count:,}", value=count), MEANS.get(flag, "")] for flag, count in sorted(counts.items())]
    return (page.markup("<h2>Flags</h2>\n") + page.table(["flag", "utterances", "meaning"], kinds, name="flags")
            + page.table(["utterance", "flags"], rows, name="flagged", filtered=len(rows) > 15,
                         caption=_cut("flagged utterances", len(census.flagged))))


def _features(census: Census) -> Markup:
    rows = [[name, what, Cell(f"{count:,}", value=count),
             Cell(f"{100 * count / census.utterances:.1f} %", value=count / census.utterances),
             Cell(f"{size / 1e6:,.1f} MB", value=size)] for name, what, count, size in census.features]
    return page.markup("<h2>Features</h2>\n") + page.table(
        ["feature", "what it is", "utterances", "share of utterances", "on disk"], rows, name="features")


def _cut(what: str, count: int) -> str:
    return f"The first {ROWS:,} of {count:,} {what}. " if count > ROWS else ""
