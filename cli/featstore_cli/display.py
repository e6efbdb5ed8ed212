"""What people see: tables, progress, errors; and the same as JSON."""

from __future__ import annotations

import json
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import click

if TYPE_CHECKING:
    from featstore import Failure, Progress

LINE_S = 10.0  # between two lines of progress where there is no terminal
SHOWN = 10     # failures listed before the rest is left to the file


def say(text: str = "") -> None:
    click.echo(text)


def say_error(text: str) -> None:
    click.echo(f"Error: {text}", err=True)


def say_json(value: Any) -> None:
    """One JSON value on stdout."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def visible(text: str) -> str:
    """Text on one line: control characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(rows: Iterable[Sequence[object]], heads: Sequence[str]) -> None:
    """Columns, numbers to the right; plain text that can be piped."""
    lines = [[visible(str(cell)) for cell in row] for row in (heads, *rows)]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    right = [all(_is_number(line[i]) for line in lines[1:]) and len(lines) > 1 for i in range(len(heads))]
    for line in lines:
        spaces = [" " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)]
        cells = [space + cell if side else cell + space for cell, space, side in zip(line, spaces, right, strict=True)]
        say("  ".join(cells).rstrip())


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def length(seconds: float) -> str:
    """A duration for people."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def failures(found: Sequence[Failure], log: str) -> None:
    """The first failures, one line each, and where the others are."""
    for failure in found[:SHOWN]:
        what = f" {failure.feature}" if failure.feature else ""
        click.echo(visible(f"  failed: {failure.utterance}{what}: {failure.reason}  ({failure.path})"), err=True)
    if len(found) > SHOWN:
        click.echo(f"  ... and {len(found) - SHOWN:,} more", err=True)
    if found:
        click.echo(f"  all of them: {log}", err=True)


def flags(found: Mapping[str, Sequence[str]]) -> None:
    """Recordings that were stored and may have something wrong with them."""
    for flag, keys in sorted(found.items()):
        more = f" and {len(keys) - 3:,} more" if len(keys) > 3 else ""
        click.echo(visible(f"  {flag}: {', '.join(keys[:3])}{more}"), err=True)


class Bar:
    """A bar on a terminal, a line now and then elsewhere; on stderr.

    left: whether the time that is left is told. silent_s: for how long there is no line.
    """

    def __init__(self, *, left: bool = False, silent_s: float = LINE_S) -> None:
        self._left = left
        self._bar: Any = None
        self._task: Any = None
        self._last = time.monotonic() - LINE_S + silent_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def show(self, done: float, total: float | None, text: str, *, say: bool = False) -> None:
        """total: None where nobody knows: a bar swings, and there is no line. say: a line that is not waited with."""
        if sys.stderr.isatty():
            self._draw(done, total, text)
        elif total is not None and (say or time.monotonic() - self._last >= LINE_S):
            self._last = time.monotonic()
            click.echo(text, err=True)

    def stop(self) -> None:
        """Take the bar away, for other lines to follow, or another bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, done: float, total: float | None, text: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar is None:
            columns = (BarColumn(20), *([TimeRemainingColumn()] if self._left else []),
                       TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total, description=visible(text))


class ExtractProgress(Bar):
    """Shows how far an extraction is."""

    def __init__(self) -> None:
        super().__init__()
        self._warned = False

    def __call__(self, progress: Progress) -> None:
        if progress.stopping and not self._warned:
            self._warned = True
            click.echo("Stopping after what is under way; press again to stop at once (loses at most 60 s).", err=True)
        self.show(progress.done, progress.total, line(progress))


def line(progress: Progress) -> str:
    """One line of progress, what matters most first: a narrow terminal cuts its end."""
    left = f", {length(progress.left_s)} left" if progress.audio_s else ""
    failed = f", {progress.failures:,} failed" if progress.failures else ""
    factor = f", {progress.real_time_factor:.3f} x real time" if progress.audio_s else ""
    return (f"{progress.done:,} of {progress.total:,} utterances{left}{failed}, {length(progress.audio_s)} of "
            f"{length(progress.audio_total_s)}{factor}")


def bytes_progress(label: str) -> Callable[[int, int], None]:
    """A line on a terminal that says how many bytes are done."""
    last = [0.0]

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty() and (time.monotonic() - last[0] > 0.2 or done == total):
            last[0] = time.monotonic()
            click.echo(f"\r{label} {size(done)} of {size(total)}   ", err=True, nl=done == total)

    return show


def _width(text: str) -> int:
    """Columns on a terminal: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "", 1).isdigit()
