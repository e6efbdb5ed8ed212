"""One utterance as a picture: its waveform and what was made of it, on one time axis.

A frame stands where its spec says: frame i is centred on centre_s + i / frame_rate. Long recordings are read in pieces
and reduced to COLUMNS columns, curves to their lowest and highest value in each, images to the mean.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import audio, storage
from .errors import BadAudio, BadRequest, MissingFeature, MissingPackage
from .row import Row
from .spec import Spec
from .store import Feature, Store, StoredUtterance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4000     # twice what the picture has across, so that nothing is seen of the reduction
PIECE = 1 << 21    # values read at a time: 8 MiB as float32
FORMATS = ("png", "pdf", "svg")
DPI = 150
WIDTH, LEFT, RIGHT = 12.0, 0.85, 1.0  # inches: the figure, and what is left of and right of the panels
HEAD, TITLE, TIME_AXIS, FOOT = 0.55, 0.3, 0.4, 0.12  # inches: above all, above a panel, below the last on the time axis
KEY_SHOWN = 90     # characters
TITLE_ROOM = 150   # characters on the line above a panel

INK, CURVE = "#404040", "#0072B2"           # Okabe and Ito's palette, told apart by all eyes, here and below
OVER = ("#FFFFFF", "#56B4E9", "#F0E442")    # f0 over a log-mel, outlined in black
OCTAVES = (250, 500, 1000, 2000, 4000, 8000, 16000)  # Hz, marked on a mel axis
ORDER = ("samples", "log-mel", "f0", "energy", "loudness", "curve", "image", "global")
UNITS = {"f0": "Hz", "loudness": "dBFS", "energy": "linear RMS", "samples": "amplitude"}
HEIGHTS = {"samples": 1.1, "log-mel": 3.2, "f0": 1.6, "energy": 1.0, "loudness": 1.0, "curve": 1.0, "image": 1.8,
           "global": 0.7}  # inches


@dataclass(frozen=True)
class Grid:
    """Where `frames` frames lie in time, taken together `block` at a time."""

    frame_rate: Fraction
    centre_s: Fraction
    frames: int
    block: int = 1

    @classmethod
    def of(cls, row: Row) -> Grid:
        """The grid of a stored row, in blocks that leave at most COLUMNS."""
        spec = row.feature.spec
        return cls(spec.frame_rate or Fraction(1), spec.centre_s, len(row), block_for(len(row)))

    @property
    def starts(self) -> np.ndarray:
        """The first frame of each column, (columns,)."""
        return np.arange(0, self.frames, self.block)

    @property
    def centres_s(self) -> np.ndarray:
        """The middle of the frames of each column, seconds, (columns,)."""
        last = np.minimum(self.starts + self.block, self.frames) - 1
        return float(self.centre_s) + (self.starts + last) / (2 * float(self.frame_rate))

    @property
    def edges_s(self) -> tuple[float, float]:
        """Where the first column begins and the last one ends: half a frame before and after the outer centres.

        All columns of an image are equally wide; where the last has fewer frames, it reaches beyond them.
        """
        first = self.centre_s - 1 / (2 * self.frame_rate)
        return float(first), float(first + len(self.starts) * self.block / self.frame_rate)


@dataclass(frozen=True)
class MelAxis:
    """The vertical axis of a log-mel: channel m is the triangle that peaks on corner m + 1 of n_mels + 2, in mel."""

    scale: str
    fmin: float
    fmax: float
    n_mels: int

    @classmethod
    def of(cls, spec: Spec) -> MelAxis | None:
        """The axis that a spec's mel contract gives, or None where there is none."""
        scale, fmin, fmax, n_mels = (spec.settings.get(name) for name in ("mel_scale", "fmin", "fmax", "n_mels"))
        if scale not in ("slaney", "htk") or not isinstance(fmin, int | float) or not isinstance(fmax, int | float):
            return None
        if spec.kind != "continuous" or not spec.dim or n_mels != spec.dim or not 0 <= fmin < fmax:
            return None
        return cls(scale, float(fmin), float(fmax), spec.dim)

    def mel(self, hz: Any) -> np.ndarray:
        """Frequencies in Hz on the mel scale of the contract: HTK's, or Slaney's (Auditory Toolbox, 1998)."""
        hz = np.asarray(hz, float)
        if self.scale == "htk":
            return 2595 * np.log10(1 + hz / 700)
        return np.where(hz < 1000, 3 * hz / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))

    @property
    def edges(self) -> tuple[float, float]:
        """In mel: half a channel below the centre of the first, half a channel above that of the last."""
        low, high = self.mel([self.fmin, self.fmax])
        step = (high - low) / (self.n_mels + 1)
        return float(low + step / 2), float(high - step / 2)

    @property
    def ticks_hz(self) -> list[float]:
        """The octaves that lie on the axis, or else four frequencies from its lowest to its highest."""
        low, high = self.edges
        octaves = [float(hz) for hz in OCTAVES if low <= self.mel(hz) <= high]
        return octaves if len(octaves) > 1 else np.linspace(self.fmin, self.fmax, 6)[1:-1].round().tolist()


def plot(store: Store, utterance: str, out: Path, names: Sequence[str] = ()) -> None:
    """Draw an utterance into `out`, a .png, .pdf or .svg, which is replaced in one step.

    names: the features to show, each NAME or NAME@IDENTITY; none: all that the store serves of this utterance.
    The waveform comes first in any case: a stored one, or that of the audio file where it can be read.

    Raises:
        MissingPackage: without matplotlib.
        MissingUtterance, MissingFeature: for what the store does not have.
        BadRequest: if `out` has another suffix, or cannot be a file.
    """
    form = _check_out(out)
    figure = draw(store, utterance, names)
    picture = io.BytesIO()
    with _plain_style():
        figure.savefig(picture, format=form, dpi=DPI)
    staged = out.with_name(f".plot.{secrets.token_hex(6)}")
    try:
        with storage.disk_room(out), staged.open("wb") as file:
            file.write(picture.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        staged.replace(out)
    finally:
        staged.unlink(missing_ok=True)


def draw(store: Store, utterance: str, names: Sequence[str] = ()) -> Figure:
    """The figure that `plot` writes, on a canvas of its own; raises as `plot` does."""
    with _plain_style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        known = store.utterances[utterance]
        rows = _rows(store, utterance, names)
        panels = _panels(known, _waveform(store, known, rows), rows)
        if not panels:
            raise MissingFeature(f"{utterance} has neither features in {store.path} nor audio that can be read. "
                                 f"Try: featstore extract CORPUS {store.path} -f log-mel")
        figure = Figure(dpi=DPI)
        FigureCanvasAgg(figure)
        end_s = known.duration_s or max(panel.end_s for panel in panels)
        _lay_out(figure, panels, end_s or 1.0)
        _head(figure, known, end_s)
        return figure


@contextlib.contextmanager
def _plain_style() -> Iterator[None]:
    """matplotlib's own sizes and colours, whatever the user's style says, for as long as this lasts."""
    try:
        from matplotlib import style
    except ImportError:
        raise MissingPackage("plots need matplotlib: pip install featstore[signal]") from None
    with style.context("default"):
        yield


def block_for(frames: int) -> int:
    """How many frames become one column, so that there are at most COLUMNS."""
    return max(1, -(-frames // COLUMNS))


def readable(text: str) -> str:
    """`text` with escapes for what a line cannot show: control characters and what the picture's font has not."""
    return "".join(c if c == " " or (ord(c) in _glyphs() and unicodedata.category(c)[0] not in "CZ")
                   else c.encode("unicode_escape").decode() for c in text)


def _check_out(out: Path) -> str:
    form = out.suffix[1:].lower()
    if form not in FORMATS:
        raise BadRequest(f"{out}: a plot is written as {', '.join(f'.{name}' for name in FORMATS)}; "
                         f"its name ends in {out.suffix or 'none of them'!r}. Try: {out.stem or 'plot'}.png")
    if out.is_dir():
        raise BadRequest(f"{out} is a folder; give the name of a file")
    if not out.parent.is_dir():
        raise BadRequest(f"the folder {out.parent} does not exist; make it first")
    return form


def _rows(store: Store, utterance: str, names: Sequence[str]) -> list[Row]:
    """The rows to show, the waveforms first, then as ORDER has it."""
    if names:
        rows = [store[utterance, name] for name in dict.fromkeys(names)]
    else:
        rows = [feature[utterance] for feature in store.features.values() if utterance in feature]
    return sorted(rows, key=lambda row: ORDER.index(_look(row.feature)))


def _look(feature: Feature) -> str:
    """How a feature is drawn: a word of ORDER."""
    if feature.kind in ("global", "samples"):
        return feature.kind
    if MelAxis.of(feature.spec) is not None:
        return "log-mel"
    if feature.dim:
        return "image"
    if feature.kind == "f0":
        return "f0"
    return feature.spec.made_by if feature.spec.made_by in ("energy", "loudness") else "curve"


@dataclass(frozen=True)
class _Panel:
    """Something to draw: its look (a word of ORDER), the line above it, and who draws it; seconds where it ends."""

    look: str
    title: str
    draw: Callable[[Axes], None]
    end_s: float = 0.0


@dataclass(frozen=True)
class _Curve:
    """A curve: time of each column, and its lowest and highest value there (NaN: a gap), each (columns,)."""

    time_s: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, row: Row) -> _Curve:
        grid = Grid.of(row)
        return cls(grid.centres_s, *_envelope(_pieces(row, grid.block), grid.block, row.feature.kind == "f0"))

    @cached_property
    def line(self) -> tuple[np.ndarray, np.ndarray]:
        """What a pen follows: the values, or up and down between the lowest and the highest of each column."""
        if np.array_equal(self.low, self.high, equal_nan=True):
            return self.time_s, self.low
        return np.repeat(self.time_s, 2), np.stack([self.low, self.high], axis=1).reshape(-1)

    @property
    def alone(self) -> tuple[np.ndarray, np.ndarray]:
        """Points with a gap on either side, which no line would show."""
        there = np.pad(np.isfinite(self.low), 1)
        single = there[1:-1] & ~there[:-2] & ~there[2:]
        return self.time_s[single], self.high[single]


def _pieces(row: Row, block: int) -> Iterator[np.ndarray]:
    """The frames of a row as float32, in pieces of whole blocks, `scale` applied."""
    width = max(1, row.feature.dim)
    step = max(1, PIECE // (block * width)) * block
    for start in range(0, len(row), step):
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and left out
            piece = row[start:start + step].astype(np.float32) * np.float32(row.scale)
        yield piece


def _envelope(pieces: Iterable[np.ndarray], block: int, voiced: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest of each block of frames, (columns,) each; with `voiced`, of those above 0, NaN if none is."""
    low, high = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for piece in pieces:
        values = piece.reshape(len(piece), -1)
        values = np.where(values > 0, values, np.float32(np.nan)) if voiced else values
        starts = np.arange(0, len(piece), block)
        low.append(np.fmin.reduceat(values.min(axis=1), starts))
        high.append(np.fmax.reduceat(values.max(axis=1), starts))
    return np.concatenate(low), np.concatenate(high)


def _image(row: Row, block: int) -> np.ndarray:
    """Mean of each block of frames, (columns, D); of discrete features, which have no mean, the frame in its middle."""
    columns: list[np.ndarray] = [np.zeros((0, row.feature.dim), np.float32)]
    for piece in _pieces(row, block):
        starts = np.arange(0, len(piece), block)
        counts = np.diff(np.append(starts, len(piece)))
        if row.feature.kind == "discrete":
            columns.append(piece[starts + counts // 2])
        else:
            columns.append(np.add.reduceat(piece, starts, axis=0) / counts[:, None].astype(np.float32))
    return np.concatenate(columns)


def _waveform(store: Store, known: StoredUtterance, rows: list[Row]) -> _Panel | None:
    """A waveform where none was asked for: the stored one of the highest rate, else the audio file's; None without."""
    if any(row.feature.kind == "samples" for row in rows):
        return None
    stored = [feature[known.key] for feature in store.features.values()
              if feature.kind == "samples" and known.key in feature]
    if stored:
        return _panel(max(stored, key=lambda row: row.feature.frame_rate or 0), known)
    try:
        return _audio_file(known) if known.audio else None
    except BadAudio:  # moved, or unmounted: the features are there without it
        return None


def _audio_file(known: StoredUtterance) -> _Panel:
    """The waveform as the file has it now."""
    path = Path(known.root or "", known.audio or "")
    header = audio.probe(path)
    rate = header.sample_rate
    stop = header.frames if known.end_s is None else min(header.frames, round(known.end_s * rate))
    block = block_for(stop - round(known.start_s * rate))
    with audio.Reader(path, known.start_s, known.end_s, block_s=max(1, PIECE // block) * block / rate) as reader:
        low, high = _envelope(reader, block)
    grid = Grid(Fraction(rate), Fraction(0), reader.samples, block)
    now = audio.source_digest(audio.file_digest(path), known.start_s, known.end_s).hex()
    changed = int(known.source or "0", 16) != 0 and now != known.source
    title = f"audio file · {rate} Hz{' · CHANGED SINCE IT WAS EXTRACTED' if changed else ''}"
    curve = _Curve(grid.centres_s, low, high)
    return _Panel("samples", title, lambda axes: _draw_samples(axes, curve), grid.edges_s[1])


def _panels(known: StoredUtterance, first: _Panel | None, rows: list[Row]) -> list[_Panel]:
    """All panels from the top; f0 goes over the log-mels where there are any and the line above has room for it."""
    mels = [row for row in rows if _look(row.feature) == "log-mel"]
    over = [row for row in rows if _look(row.feature) == "f0"][:len(OVER)] if mels else []
    titles = [_title(row, known) for row in mels]
    while over and max(map(len, titles)) + sum(len(_title(row, known)) + 5 for row in over) > TITLE_ROOM:
        over.pop()
    curves = [(_title(row, known), _Curve.of(row)) for row in over]
    panels = [first] if first is not None else []
    return panels + [_panel(row, known, curves) for row in rows if row not in over]


def _panel(row: Row, known: StoredUtterance, over: Sequence[tuple[str, _Curve]] = ()) -> _Panel:
    """The panel of a row, its values read; `over`: titles and curves of the f0 that go over a log-mel."""
    look, title = _look(row.feature), _title(row, known)
    if look == "global":
        vector = np.atleast_1d(row.as_float()).reshape(-1)
        return _Panel(look, title, lambda axes: _draw_vector(axes, vector))
    grid = Grid.of(row)
    end_s = grid.edges_s[1]
    if look in ("log-mel", "image"):
        image = _image(row, grid.block)
        if look == "image":
            return _Panel(look, title, lambda axes: _draw_image(axes, image, grid), end_s)
        return _Panel(look, title, lambda axes: _draw_mel(axes, image, grid, row.feature.spec, over), end_s)
    curve = _Curve.of(row)
    if look == "samples":
        return _Panel(look, title, lambda axes: _draw_samples(axes, curve), end_s)
    steps = row.feature.kind == "discrete"
    return _Panel(look, title, lambda axes: _draw_curve(axes, curve, _unit(row.feature), steps), end_s)


def _title(row: Row, known: StoredUtterance) -> str:
    feature = row.feature
    rate = f"{float(feature.frame_rate):.6g} Hz" if feature.frame_rate else "one per utterance"
    made, now = int(row.source, 16), int(known.source or "0", 16)
    stale = " · STALE: of other audio" if made and now and made != now else ""
    return f"{feature.name} {readable(feature.label)} · {rate} · dim {feature.dim}{stale}"


def _unit(feature: Feature) -> str:
    if feature.spec.made_by == "energy" and "n_mels" in feature.spec.settings:
        return "L2 of mel"
    return UNITS.get(_look(feature), "")


def _draw_samples(axes: Axes, curve: _Curve) -> None:
    axes.plot(*curve.line, color=INK, linewidth=0.6)
    level = np.abs(np.concatenate([curve.low, curve.high]))
    limit = 1.08 * float(level[np.isfinite(level)].max(initial=0)) or 1.0
    axes.set_ylim(-limit, limit)
    axes.set_ylabel(UNITS["samples"])


def _draw_curve(axes: Axes, curve: _Curve, unit: str, steps: bool) -> None:
    axes.plot(*curve.line, color=CURVE, linewidth=1.0, drawstyle="steps-mid" if steps else "default")
    axes.plot(*curve.alone, ".", color=CURVE, markersize=1.5)
    axes.set_ylabel(unit)


def _draw_image(axes: Axes, image: np.ndarray, grid: Grid) -> None:
    from matplotlib.ticker import MaxNLocator

    _show(axes, image, (*grid.edges_s, -0.5, image.shape[1] - 0.5), "viridis", "")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_ylabel("channel")


def _draw_mel(axes: Axes, image: np.ndarray, grid: Grid, spec: Spec, over: Sequence[tuple[str, _Curve]]) -> None:
    from matplotlib.patheffects import withStroke

    axis = MelAxis.of(spec)
    if axis is None:
        return _draw_image(axes, image, grid)
    log = {"e": "ln", "10": "log10"}.get(str(spec.settings.get("log_base")), "log")
    of = {1: " magnitude", 2: " power"}.get(spec.settings.get("power", 0), "")
    _show(axes, image, (*grid.edges_s, *axis.edges), "magma", log + of)
    for (title, curve), colour in zip(over, OVER, strict=False):
        outline = [withStroke(linewidth=2.6, foreground="black")]
        time_s, hz = curve.line
        axes.plot(time_s, axis.mel(hz), color=colour, linewidth=1.2, path_effects=outline, label=title)
        time_s, hz = curve.alone
        axes.plot(time_s, axis.mel(hz), ".", color=colour, markersize=2, path_effects=outline)
    if over:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(over), frameon=False, borderpad=0.3,
                    borderaxespad=0, handlelength=1.8, columnspacing=1.6, fontsize=8)
    axes.set_yticks(axis.mel(axis.ticks_hz), [f"{hz:.0f}" for hz in axis.ticks_hz])
    axes.set_ylim(axis.edges)
    axes.set_ylabel("Hz, on the mel scale")
    return None


def _draw_vector(axes: Axes, vector: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.stairs(vector, np.arange(len(vector) + 1) - 0.5, fill=True, color=CURVE)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set_xlim(-0.5, len(vector) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, min_n_ticks=1))
    axes.set_ylabel("value")
    axes.set_xlabel("channel", fontsize=8)


def _show(axes: Axes, image: np.ndarray, extent: tuple[float, float, float, float], colours: str, unit: str) -> None:
    """An image (columns, D) at `extent` (left, right, bottom, top), the middle 99 % of its values in colours."""
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, [0.5, 99.5]).tolist() if finite.size else (0.0, 1.0)
    if high <= low:
        low, high = low - 0.5, low + 0.5
    image = np.clip(image, low, high)
    shown = axes.imshow(image.T, origin="lower", aspect="auto", extent=extent, cmap=colours, vmin=low, vmax=high)
    bar = axes.inset_axes((1.012, 0, 0.01, 1))
    colourbar = bar.figure.colorbar(shown, cax=bar, extend="both", extendfrac=0.02)
    colourbar.set_label(unit, fontsize=8)
    bar.tick_params(labelsize=7, length=2)


def _lay_out(figure: Figure, panels: list[_Panel], end_s: float) -> None:
    """Give every panel its place, from the top, and let it be drawn; all but vectors share the time axis."""
    timed = [panel for panel in panels if panel.look != "global"]
    below = [TIME_AXIS if panel.look == "global" or panel is timed[-1] else 0.0 for panel in panels]
    height = HEAD + FOOT + sum(TITLE + HEIGHTS[panel.look] for panel in panels) + sum(below)
    figure.set_size_inches(WIDTH, height)
    top = height - HEAD
    for panel, under in zip(panels, below, strict=True):
        top -= TITLE + HEIGHTS[panel.look]
        place = (LEFT / WIDTH, top / height, (WIDTH - LEFT - RIGHT) / WIDTH, HEIGHTS[panel.look] / height)
        axes = figure.add_axes(place, label=panel.title)
        axes.tick_params(labelsize=7, length=2.5)
        panel.draw(axes)
        axes.set_title(panel.title, loc="left", fontsize=8, pad=4, parse_math=False)
        axes.yaxis.label.set_fontsize(8)
        axes.yaxis.set_label_coords(-0.6 / (WIDTH - LEFT - RIGHT), 0.5)
        if panel.look != "global":
            axes.set_xlim(0, end_s)
            axes.tick_params(labelbottom=panel is timed[-1])
            if panel is timed[-1]:
                axes.set_xlabel("time (s)", fontsize=8)
        if panel.look not in ("log-mel", "image"):
            axes.grid(color="#DDDDDD", linewidth=0.5)
            axes.set_axisbelow(True)
        top -= under


def _head(figure: Figure, known: StoredUtterance, end_s: float) -> None:
    """The key, and below it what is known of the recording."""
    facts = [f"speaker {known.speaker}" if known.speaker else "", f"{end_s:.2f} s",
             f"recorded at {known.sample_rate} Hz" if known.sample_rate else "",
             f"flags: {', '.join(known.flags)}" if known.flags else ""]
    key = _shortened(readable(known.key))
    _line(figure, 0.1, key, fontsize=12, fontweight="bold")
    _line(figure, 0.36, " · ".join(_shortened(readable(fact)) for fact in facts if fact), fontsize=9, color=INK)


def _line(figure: Figure, down: float, text: str, **look: Any) -> None:
    """A line of text `down` inches from the top, made smaller where it is too wide."""
    width, height = figure.get_size_inches()
    line = figure.text(LEFT / WIDTH, 1 - down / height, text, va="top", parse_math=False, **look)
    room = (width - LEFT - 0.1) * figure.dpi
    line.set_fontsize(line.get_fontsize() * min(1.0, room / max(1.0, line.get_window_extent().width)))


def _shortened(text: str) -> str:
    return text if len(text) <= KEY_SHOWN else f"{text[:KEY_SHOWN - 31]} ... {text[-26:]}"


@cache
def _glyphs() -> frozenset[int]:
    """The characters of the font that comes with matplotlib, and is its default."""
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())
