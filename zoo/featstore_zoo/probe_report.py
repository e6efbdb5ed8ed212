"""A probing study as files: numbers (probe.json), a picture (probe.png) and a page of HTML (index.html)."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featstore import storage

from . import page
from .probe import CONTROL, RATE, Result, Study, shown
from .targets import Target

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = {"linear": ("o", page.COLOURS[0]), "mlp": ("D", page.COLOURS[1]), "none": ("o", page.COLOURS[0])}
UNITS = {"accuracy": "accuracy, %", "r2": "R²", "errors": "character errors, %", "distance": "cosine distance"}
ACROSS = 4
DPI = 150


def write(study: Study, folder: Path) -> list[Path]:
    """Write probe.json, probe.png and index.html into `folder`, each put in place in one step; a page needs no other.

    Raises:
        ImportError: without matplotlib or jinja2, naming the extra.
    """
    folder.mkdir(parents=True, exist_ok=True)
    picture = draw(study)
    held = io.BytesIO()
    picture.savefig(held, format="png", dpi=DPI, metadata={"Software": None})
    files = {"probe.json": json.dumps(study.to_json(), indent=1, ensure_ascii=False).encode() + b"\n",
             "probe.png": held.getvalue(), "index.html": html(study).encode()}
    for name, content in files.items():
        storage.put(folder / name, content)
    return [folder / name for name in files]


def rows(study: Study) -> list[list[str]]:
    """A row for each feature, mix and probe, a column for each target, for terminals; the last row is chance."""
    found = [[mix, probe, *(_text(study, target, mix, probe) for target in study.targets)]
             for mix in (*study.features, CONTROL) for probe in _probes(study)]
    return [*found, ["chance", "", *(_chance(target) for target in study.targets)]]


def heads(study: Study) -> list[str]:
    return ["feature", "probe", *(target.name for target in study.targets)]


def draw(study: Study) -> Figure:
    """A panel for each target: what the probes of each feature got, with intervals of 95 %, and chance as a line."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = [*study.features, CONTROL]
    down, across = math.ceil(len(study.targets) / ACROSS), min(ACROSS, max(len(study.targets), 1))
    with rc_context(page.inked()):
        figure = Figure(figsize=(1.6 + 2.5 * across, down * (1.0 + 0.28 * len(names))), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
        for panel, target in zip(panels, study.targets, strict=False):
            _panel(panel, study, target, names)
        for panel in panels[len(study.targets):]:
            panel.set_visible(False)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def html(study: Study) -> str:
    """The page: findings, picture, table, how it was asked."""
    names = [*study.features, CONTROL]
    body = page.markup("<h2>Findings</h2>\n")
    for target, said in zip(study.targets, study.findings, strict=True):
        body += page.markup("<p><b>{}</b>. {}</p>\n").format(target.name, said)
    body += page.figure(draw(study), "Results of all probes: " + " ".join(study.findings),
                        "Intervals of 95 %; the line is chance. Arrows in the titles say which way is better.")
    body += page.markup("<h2>Numbers</h2>\n")
    columns: list[str | tuple[str, str]] = ["feature", "probe"]
    columns += [(target.name, UNITS[target.measure]) for target in study.targets]
    table = [[mix, probe, *(_cell(study, target, mix, probe) for target in study.targets)]
             for mix in names for probe in _probes(study)]
    body += page.table(columns, [*table, ["chance", "", *(_chance_cell(target) for target in study.targets)]],
                       name="numbers", caption="Best numbers of each column marked; intervals of 95 % below them.")
    return page.page(f"What features know: {study.store}", body + _method(study), footer=f"seed {study.seed}")


def _panel(panel: Axes, study: Study, target: Target, names: list[str]) -> None:
    unit = 100 if target.measure in ("accuracy", "errors") else 1
    panel.axvline(unit * target.chance, color=page.INK, linewidth=0.8, linestyle="--", label="chance")
    asked = [probe for probe in (*_probes(study), "none") if any(
        r.target == target.name and r.probe == probe for r in study.results)]
    for number, probe in enumerate(asked):
        found = [study.of(target.name, name, probe) for name in names]
        at = np.arange(len(names)) + 0.24 * (number - (len(asked) - 1) / 2)
        value = unit * np.array([r.value for r in found])
        sides = np.abs(np.array([[r.value - r.low for r in found], [r.high - r.value for r in found]])) * unit
        mark, colour = MARKS[probe]
        panel.errorbar(value, at, xerr=sides, fmt=mark, color=colour, markersize=3.5, linewidth=1.2, label=probe)
    panel.set_title(f"{target.name} {'→' if target.higher else '←'}", loc="left")
    panel.set_xlabel(UNITS[target.measure])
    panel.tick_params(left=False)
    if target.measure == "r2":  # a probe that fails on voices it never heard can be far below its control
        panel.set_xlim(max(panel.get_xlim()[0], -0.6), 1.05)


def _method(study: Study) -> Markup:
    facts = page.markup("<h2>How it was asked</h2>\n<dl>\n")
    for target in study.targets:
        count = f"{len(target.examples):,} {target.rows}, {len(np.unique(target.units)):,} {target.apart}"
        classes = f", {target.classes} classes" if target.classes else ""
        facts += page.markup("<dt>{}</dt><dd>{}: {}{}; {}</dd>\n").format(
            target.name, target.question, count, classes, "no probe learns" if target.rows == "pairs" else
            f"no {target.apart} both learnt from and tested")
    for name, why in study.skipped.items():
        facts += page.markup("<dt>{}</dt><dd>not asked: {}</dd>\n").format(name, why)
    how = f"by the split {study.split}" if study.split else "in four folds"
    left_out = f" {study.left_out:,} utterances lack some of the features and are left out." if study.left_out else ""
    said = (f"{study.utterances:,} utterances, {how}, on a grid of {RATE} Hz.{left_out} Intervals hold 95 % of 1,000 "
            "draws of units with replacement; a difference is claimed where that of the difference leaves out zero. "
            "With many comparisons some of these are chance.")
    return facts + page.markup("</dl>\n<p>{}</p>\n").format(said)


def _probes(study: Study) -> list[str]:
    return [probe for probe in ("linear", "mlp") if any(r.probe == probe for r in study.results)] or ["linear"]


def _found(study: Study, target: Target, mix: str, probe: str) -> Result | None:
    if target.rows == "pairs" and probe != _probes(study)[0]:
        return None
    return study.of(target.name, mix, probe)


def _text(study: Study, target: Target, mix: str, probe: str) -> str:
    result = _found(study, target, mix, probe)
    return shown(target, result) if result is not None else ""


def _cell(study: Study, target: Target, mix: str, probe: str) -> object:
    result = _found(study, target, mix, probe)
    if result is None:
        return page.Cell("", value=math.nan)
    text, _, interval = shown(target, result).partition(" [")
    best = (max if target.higher else min)(study.of(target.name, name, p).value for name in study.features
                                           for p in _probes(study))
    return page.Cell(text, f"[{interval}", result.value, best=result.value == best and mix != CONTROL)


def _chance(target: Target) -> str:
    return f"{100 * target.chance:.1f} %" if target.measure in ("accuracy", "errors") else f"{target.chance:g}"


def _chance_cell(target: Target) -> page.Cell:
    return page.Cell(_chance(target), value=target.chance)
