"""The log of a training as a picture: objectives, adversaries, and phones found in sentences left out."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import page

PANELS = (("to be made small", ("phones", "ctc", "invariance", "real")), ("adversaries, to be kept from it",
                                                                        ("voice", "pitch")),
          ("phones found, part of frames", ("right_spoken", "right_sung")))


def read(path: Path) -> list[dict[str, float]]:
    """The rows of a log.csv; what a row does not have is left out of it."""
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def draw(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """A panel for each kind of number, over steps."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure((11, 3), layout="constrained")
        for axes, (title, names) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            for name, colour in zip(names, page.COLOURS, strict=False):
                points = [(row["step"], row[name]) for row in rows if name in row]
                if points:
                    axes.plot(*zip(*points, strict=True), label=name, color=colour)
            axes.set(title=title, xlabel="step")
            if title.startswith("to be"):
                axes.set_yscale("log")
            if axes.lines:
                axes.legend(frameon=False)
        figure.savefig(path, dpi=130, metadata={"Software": None})
