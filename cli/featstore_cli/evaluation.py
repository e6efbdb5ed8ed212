"""The command that judges what was converted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import cli, display
from .request import PlaceType, json_option

if TYPE_CHECKING:
    from featstore.storage import Place
    from featstore_zoo.evaluate import Evaluation


@cli.command()
@click.option("--reference", required=True, type=PlaceType(), metavar="STORE|DIR", help="The recordings themselves.")
@click.option("--converted", "made", multiple=True, required=True, metavar="[NAME=]DIR", help="Of a system; again.")
@click.option("--target", type=PlaceType(), metavar="STORE|DIR", help="Recordings of the voice that was to be heard.")
@click.option("--split", metavar="S/PART", help="Of a reference that is a store: main/test.")
@click.option("--pairs", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="CSV",
              help="Columns reference, converted [, system].  [default: by name]")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the report.")
@click.option("-m", "--metric", "names", multiple=True, metavar="NAME", help="Only this; again.  [default: all]")
@click.option("--align", type=click.Choice(["dtw", "none"]), default="dtw", show_default=True)
@click.option("--variant", type=click.Choice(["amphion"]), help="Metrics as it defines them, too.")
@click.option("--f0", default="f0:swift", show_default=True, metavar="REQUEST")
@click.option("--speaker", default="speaker", show_default=True, metavar="REQUEST", help="The embedding.")
@click.option("--recogniser", metavar="NAME|DIR|ID", help="For CER, WER: whisper:small, a Whisper, pocketsphinx.")
@click.option("--language", metavar="CODE", help="Of all that is said.  [default: what recordings say]")
@click.option("--frechet", multiple=True, metavar="FEATURE", help="Distance over it, between stores; again.")
@click.option("--sample-rate", type=click.IntRange(8000), metavar="HZ", help="[default: the lowest there is]")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes.  [default: one per core]")
@click.option("--device", default="cpu", show_default=True, help="Of a Whisper.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@json_option
def evaluate(reference: Place, made: tuple[str, ...], target: Place | None, split: str | None, pairs: Path | None,
             out: Path | None, names: tuple[str, ...], align: Any, variant: str | None, f0: str, speaker: str,
             recogniser: str | None, language: str | None, frechet: tuple[str, ...], sample_rate: int | None,
             workers: int | None, device: str, seed: int, as_json: bool) -> None:
    """Judge converted recordings by their references: metrics with intervals, a report.

    \b
    Example: featstore evaluate --reference wavs/ --converted a=out_a/ --converted b=out_b/ -o report/
    """
    from featstore_zoo import evaluate as e
    from featstore_zoo import report

    if out is None and not as_json:
        raise click.UsageError("give a folder for the report (-o report/), or --json")
    found = e.evaluate(reference, _systems(made), out, target=target, split=split, listed=pairs, names=names,
                       align=align, variant=variant, f0=f0, speaker=speaker, recogniser=recogniser, language=language,
                       frechet=frechet, sample_rate=sample_rate, workers=workers, device=device, seed=seed,
                       progress=_say_done())
    if as_json:
        display.say_json({name: part for name, part in found.to_json().items() if name != "utterances"})
        return
    _say_means(found)
    for line in report.missing(found):
        display.say(display.visible(f"left out: {line}"))
    count = len({one.utterance for one in found.measured})
    display.say(f"{out}/index.html: {count:,} utterance{'s' if count > 1 else ''}")


def _systems(made: tuple[str, ...]) -> dict[str, Place]:
    """Name -> place of NAME=PLACE, or of PLACE, whose last part is then the name."""
    from featstore.storage import place

    found: dict[str, Place] = {}
    for text in made:
        name, equals, where = text.partition("=")
        name, where = (name, where) if equals and "/" not in name else (text.rstrip("/").rpartition("/")[2], text)
        if name in found:
            raise click.UsageError(f"--converted: two systems are called {name!r}: give them names, NAME=DIR")
        found[name] = place(where)
    return found


def _say_means(found: Evaluation) -> None:
    from featstore_zoo.measure import METRICS

    rows = []
    for name in found.settings.names:
        metric = METRICS[name]
        cells = []
        for system in found.systems:
            mean, low, high, _ = found.summary(system, name).interval
            span = f" ({low:.{metric.digits}f} to {high:.{metric.digits}f})" if low == low else ""
            cells.append(f"{mean:.{metric.digits}f}{span}" if mean == mean else "-")
        rows.append((f"{metric.label}, {metric.unit}" if metric.unit else metric.label, *cells, metric.better))
    for name, by in found.frechet.items():
        rows.append((f"Fréchet distance, {name}", *(f"{by[system]:.3f}" for system in found.systems), "lower"))
    display.table(rows, ("mean (95 % interval)", *found.systems, "better"))


def _say_done() -> Callable[[str, int, int], None]:
    """A line that counts on a terminal; elsewhere one now and then, on stderr."""
    last = [time.monotonic()]

    def show(what: str, done: int, count: int) -> None:
        now = time.monotonic()
        if sys.stderr.isatty():
            click.echo(f"\r{done:,} of {count:,} {what}   ", err=True, nl=done == count)
        elif now - last[0] >= display.LINE_S:
            last[0] = now
            click.echo(f"{done:,} of {count:,} {what}", err=True)

    return show
