"""Commands that look into stores and ask listeners: probe, report, listen."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
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
@click.option("--target", "targeted", multiple=True, metavar="NAME",
              help="Only this, as speaker; again.  [default: all]")
@click.option("--split", metavar="S", help="Learn from S/train, test on S/test.  [default: four folds by the seed]")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder to write.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all that is drawn.")
@json_option
def probe(store: Place, mixes: tuple[str, ...], targeted: tuple[str, ...], split: str | None, out: Path, seed: int,
          as_json: bool) -> None:
    """Ask what features of STORE know: of speaker, melody, voicing, energy, text, noise and recording condition.

    Answers come from the store (f0, energy) and from its utterances (speaker, text, condition, clean and noisy pairs).

    \b
    Example: featstore probe songs.zarr -f whisper -f contentvec -f whisper+contentvec -o report/
    """
    from featstore_zoo import probe as p
    from featstore_zoo import probe_report

    study = p.study(open_store(store), mixes, targeted=targeted, split=split, seed=seed, progress=Said())
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


@cli.command()
@click.argument("store", type=PlaceType())
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="HTML file to write.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of what is drawn of large stores.")
@json_option
def report(store: Place, out: Path, seed: int, as_json: bool) -> None:
    """Describe STORE on a page of HTML: duration, f0 and voiced share by speaker, loudness, clipping and silence.

    \b
    Example: featstore report songs.zarr -o songs.html
    """
    from featstore import storage
    from featstore_zoo import census

    _check_parent(out)
    found = census.take(open_store(store), seed=seed, progress=_counted())
    storage.put(out, census.html(found).encode())
    if as_json:
        display.say_json(found.to_json())
        return
    people = sum(voice.speaker is not None for voice in found.voices)
    display.say(f"{found.utterances:,} utterances, {people:,} speakers, {display.length(3600 * found.hours)}, "
                f"{len(found.flagged):,} with flags: {out}")


@cli.group()
def listen() -> None:
    """Listening tests: a page for listeners, and what their answers say.

    \b
    Example: featstore listen make --help
    """


@listen.command("make")
@click.argument("systems", nargs=-1, required=True, metavar="[NAME=]DIR...")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the test; must be new.")
@click.option("--target", metavar="FILE|DIR", help="The voice that was wanted: asks for similarity too.")
@click.option("--task", "tasks", multiple=True, type=click.Choice(["naturalness", "similarity"]),
              help="Only this; again.  [default: what can be asked]")
@click.option("--listeners", type=click.IntRange(1), default=24, show_default=True, help="Orders to make.")
@click.option("--utterances", type=click.IntRange(1), metavar="N", help="Take N, drawn.  [default: all]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all that is drawn.")
def make_test(systems: tuple[str, ...], out: Path, target: str | None, tasks: tuple[str, ...], listeners: int,
              utterances: int | None, seed: int) -> None:
    """Make a listening test of what SYSTEMS made: naturalness from 1 to 5, similarity to a voice from 1 to 4.

    \b
    Example: featstore listen make old=out/old new=out/new natural=wavs/ -o test/
    """
    from featstore_zoo import listen as l

    named = dict(_named(text) for text in systems)
    if len(named) < len(systems):
        raise click.UsageError("two systems have one name: give them others, NAME=DIR")
    made = l.make(named, out, target=target, tasks=tasks, listeners=listeners, utterances=utterances, seed=seed)
    display.say(f"{out / 'index.html'}: {display.size(made.bytes)}, for listeners 1 to {made.listeners}; each judges "
                f"{made.judgements}, and {made.checks} attention checks")
    display.say(f"Give listeners that file and a number each; keep {out / 'key.json'} to yourself. Then: featstore "
                f"listen collect {out} ANSWERS...")


@listen.command("collect")
@click.argument("test", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("answers", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--serve", type=click.IntRange(0, 65535), metavar="PORT",
              help="First serve the test on 127.0.0.1 and collect answers until Ctrl-C; 0 takes a free port.")
@json_option
def collect_answers(test: Path, answers: tuple[Path, ...], serve: int | None, as_json: bool) -> None:
    """What the ANSWERS to TEST say: mean opinions with intervals of 95 %, and who was left out.

    \b
    Example: featstore listen collect test/ answers-*.json
    """
    from featstore_zoo import listen as l

    if serve is not None:
        _serve(test, serve)
    found = l.collect(test, answers)
    if as_json:
        display.say_json(found.to_json())
        return
    display.table([[o.system, o.task, str(o), o.ratings, o.listeners] for o in found.opinions],
                  ["system", "task", "mean opinion", "ratings", "listeners"])
    for name, why in found.excluded:
        display.say(display.visible(f"left out: listener {name}: {why}"))


def _serve(test: Path, port: int) -> None:
    from featstore_zoo.listen_server import Server

    with Server(test, port, told=lambda number: click.echo(f"listener {number} has answered", err=True)) as server:
        click.echo(f"{server.url} until Ctrl-C", err=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _named(text: str) -> tuple[str, str]:
    """NAME=DIR, or a folder called by its own name."""
    name, equals, place = text.partition("=")
    return (name, place) if equals and "/" not in name else (Path(text).name or text, text)


def _check_parent(out: Path) -> None:
    if not out.absolute().parent.is_dir():
        raise click.UsageError(f"the folder {out.parent} does not exist; make it first")


def _counted() -> Callable[[int, int], None]:
    said = Said()
    return lambda done, total: said(f"{done:,} of {total:,} utterances")


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
