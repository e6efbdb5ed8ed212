"""Commands that judge features and voices: probe."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import cli, display
from .request import PlaceType, json_option, open_store

if TYPE_CHECKING:
    from featstore.storage import Place


@cli.command()
@click.argument("store", type=PlaceType())
@click.option("-f", "--feature", "mixes", multiple=True, required=True, metavar="NAME[+NAME...]",
              help="A feature, or several as one; again for more.")
@click.option("--split", metavar="S", help="Learn from S/train, test on S/test.  [default: four folds by the seed]")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder to write.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all that is drawn.")
@json_option
def probe(store: Place, mixes: tuple[str, ...], split: str | None, out: Path, seed: int, as_json: bool) -> None:
    """Ask what features of STORE know: of speaker, melody, voicing, energy, text, noise and recording condition.

    Answers come from the store (f0, energy) and from its utterances (speaker, text, condition, clean and noisy pairs).

    \b
    Example: featstore probe songs.zarr -f whisper -f contentvec -f whisper+contentvec -o report/
    """
    from featstore_zoo import probe as p
    from featstore_zoo import probe_report

    study = p.study(open_store(store), mixes, split=split, seed=seed, progress=Said())
    files = probe_report.write(study, out)
    if as_json:
        display.say_json(study.to_json())
        return
    display.table(probe_report.rows(study), probe_report.heads(study))
    for said in study.findings:
        display.say(f"\n{said}")
    for name, why in study.skipped.items():
        display.say(f"\n{name} was not asked: {why}")
    display.say(f"\n{', '.join(map(str, files))}")


class Said:
    """What is under way: over and over on one line of a terminal, a line now and then elsewhere; on stderr."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, what: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r{what:<78}", err=True, nl=False)
        elif time.monotonic() - self._last >= display.LINE_S:
            self._last = time.monotonic()
            click.echo(what, err=True)
