"""Commands about models: train, vocode, convert, and what the zoo has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import cli, display
from .request import PlaceType, json_option, open_store

if TYPE_CHECKING:
    from featstore import Progress
    from featstore.storage import Place
    from featstore_zoo.sources import Made, Stage
    from featstore_zoo.training import Told

ONE_DEVICE = click.option("--device", default="cpu", show_default=True, metavar="DEVICE",
                          help="cpu, cuda, cuda:1, mps.")
DEVICE = click.option("--device", default="cpu", show_default=True, metavar="DEVICE",
                      help="cpu, cuda, cuda:0,1 (both train one model), mps.")
OUT = click.option("-o", "--out", required=True, type=click.Path(path_type=Path))


@cli.command()
@click.argument("model")
@click.argument("store", type=PlaceType())
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--content", multiple=True, metavar="NAME", help="A content feature that is heard; again.")
@click.option("--f0", metavar="NAME", help="f0, or none.  [default: f0]")
@click.option("--loudness", metavar="NAME", help="Loudness, or none.  [default: loudness]")
@click.option("--speaker", metavar="NAME", help="An embedding, one-hot or none.  [default: one-hot]")
@click.option("--mel", metavar="NAME", help="The log-mel.  [default: log-mel]")
@click.option("--wave", metavar="NAME", help="The waveform.  [default: wave]")
@click.option("--split", metavar="S", help="Learn from S/train, validate on S/valid.")
@click.option("--init", type=click.Path(path_type=Path), metavar="RUN", help="Begin with the weights of another run.")
@click.option("--resume", is_flag=True, help="Go on with the run in -o.")
@click.option("-r", "--recipe", type=click.Path(path_type=Path), metavar="RECIPE",
              help="TOML file or run folder: [model], [training], [features]; other options win.")
@click.option("--set", "fields", multiple=True, metavar="FIELD=VALUE", help="A field of model or training; again.")
@click.option("--steps", type=click.IntRange(1), help="As --set steps=N; with --resume, how far to go on.")
@click.option("--precision", type=click.Choice(["32", "bf16", "16"]), help="As --set precision=P.")
@DEVICE
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True, help="Processes that read batches.")
@click.option("--smoke", is_flag=True, help="Twenty steps of a small model, to see that everything works.")
def train(model: str, store: Place, out: Path, content: tuple[str, ...], f0: str | None, loudness: str | None,
          speaker: str | None, mel: str | None, wave: str | None, split: str | None, init: Path | None, resume: bool,
          recipe: Path | None, fields: tuple[str, ...], steps: int | None, precision: str | None, device: str,
          workers: int, smoke: bool) -> None:
    """Train MODEL (see `featstore zoo ls`) on the features of STORE into a run folder.

    \b
    Example: featstore train hifigan:v1 songs.zarr -o runs/voc --set batch=16
             featstore train diffwavenet-svc songs.zarr -o runs/a --content whisper
             featstore train diffwavenet-svc songs.zarr -o runs/a --resume
    """
    from featstore_zoo import card, run, training
    from featstore_zoo import recipe as recipes

    opened = open_store(store)
    parts = {"log-mel": mel, "wave": wave, "f0": f0, "loudness": loudness}
    names = {role: name for role, name in parts.items() if name}
    if resume:
        _check_resumed(out, model, {"--content": content, "--f0": f0, "--loudness": loudness, "--speaker": speaker,
                                    "--mel": mel, "--wave": wave, "--split": split, "--init": init, "-r": recipe,
                                    "--set": fields, "--precision": precision})
    else:
        given = dict(_pair(text) for text in fields)
        given |= {name: str(value) for name, value in (("steps", steps), ("precision", precision)) if value is not None}
        training.prepare(out, opened, model, fields=given, names=names, content=content or None, speaker=speaker,
                         split=split, init=init, smoke=smoke, recipe=recipes.read(recipe) if recipe else None)
    begin = time.monotonic()
    with TrainProgress() as progress:
        done = training.train(out, store, device=device, workers=workers, resume=resume, steps=steps,
                              progress=progress)
    card.trained(run.load(out), opened, device, time.monotonic() - begin)
    if not done.terms and not done.interrupted:
        display.say(f"{out}: all of its {done.step:,} steps are done; --steps N goes on to more")
        return
    terms = ", ".join(f"{name} {value:.3f}" for name, value in done.terms.items())
    display.say(f"{out}: {done.step:,} steps, {terms}")
    if done.early:
        display.say("stopped early: validation no longer gets better; the best weights are in checkpoints/best")
    if done.interrupted:
        display.say(f"Interrupted and kept. Go on: featstore train {model} {store} -o {out} --resume")
        raise click.exceptions.Exit(130)


def _check_resumed(out: Path, model: str, given: Mapping[str, Any]) -> None:
    """A run goes on as it was begun: only how far may be said anew."""
    from featstore_zoo import run

    begun = run.load(out).settings.model
    if model.partition(":")[0].replace("-", "_") != begun.replace("-", "_"):
        raise click.UsageError(f"{out} is a run of {begun}, and {model} was asked for: name that one, or give another "
                               "folder (-o)")
    more = [name for name, value in given.items() if value]
    if more:
        raise click.UsageError(f"--resume goes on as {out} was begun: leave out {', '.join(more)}. Only --steps may be "
                               f"given; to change more, begin another run with its weights: --init {out} -o OTHER")


@cli.command()
@click.argument("inputs", nargs=-1, required=True, type=PlaceType())
@click.option("--vocoder", required=True, metavar="RUN|griffin-lim", help="Folder of a run, or no network at all.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="A .wav or .flac file, or a folder.")
@click.option("--format", "form", type=click.Choice(["wav", "flac"]), help="Of files in a folder.  [default: wav]")
@ONE_DEVICE
@click.option("--precision", type=click.Choice(["32", "bf16", "16"]), default="32", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Through torch.compile: a minute first, then faster.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of vocoders that draw noise.")
@json_option
def vocode(inputs: tuple[Place, ...], vocoder: str, out: Path, form: str | None, device: str, precision: Any,
           compiled: bool, seed: int, as_json: bool) -> None:
    """Turn the log-mels of INPUTS (recordings, folders, stores) back into sound, through a vocoder.

    \b
    Example: featstore vocode song.wav --vocoder runs/voc -o resynthesised.wav
             featstore vocode songs.zarr --vocoder griffin-lim -o out/
    """
    from featstore_zoo import vocode as v

    made: list[Made] = []
    with SongProgress() as song:
        try:
            v.files(inputs, vocoder, out, device=device, seed=seed, precision=precision, compiled=compiled, form=form,
                    progress=_kept(made, not as_json), watch=None if as_json else song)
        finally:  # a recording that cannot be used, or Ctrl-C: what was made before is told
            song.stop()
            if made:
                _say_written(made, out, as_json)


@cli.command()
@click.argument("inputs", nargs=-1, required=True, type=PlaceType())
@click.option("--to", required=True, metavar="SINGER|FILE", help="A singer of the run, or a recording of anybody.")
@click.option("--run", "run", required=True, type=click.Path(path_type=Path), help="Folder of an acoustic model.")
@click.option("--vocoder", metavar="RUN|griffin-lim", help="Folder of a vocoder.  [default: griffin-lim]")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="A .wav or .flac file, or a folder.")
@click.option("--format", "form", type=click.Choice(["wav", "flac"]), help="Of files in a folder.  [default: wav]")
@click.option("--key", default="auto", show_default=True, metavar="auto|N", help="Semitones up.")
@click.option("--round", "rounding", type=click.Choice(["semitones", "octaves", "none"]), default="semitones",
              show_default=True, help="Of an automatic key.")
@click.option("--steps", type=click.IntRange(1), help="Of sampling.  [default: the run's]")
@click.option("--sampler", help="ddpm, ddim, dpm-solver++; of CoMoSVC euler, heun.  [default: the run's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of all that is random.")
@ONE_DEVICE
@click.option("--precision", type=click.Choice(["32", "bf16", "16"]), default="32", show_default=True)
@click.option("--window", type=click.IntRange(64), default=1024, show_default=True, help="Frames at a time.")
@click.option("--sources", type=PlaceType(), metavar="STORE", help="Where features are kept.  [default: the cache]")
@click.option("-f", "--feature", "requests", multiple=True, metavar="NAME=REQUEST", help="What makes a feature; again.")
@click.option("--weights", multiple=True, metavar="NAME=FILE", help="Of an encoder that is not found; again.")
@json_option
def convert(inputs: tuple[Place, ...], to: str, run: Path, vocoder: str | None, out: Path, form: str | None, key: str,
            rounding: Any, steps: int | None, sampler: str | None, seed: int, device: str, precision: Any, window: int,
            sources: Place | None, requests: tuple[str, ...], weights: tuple[str, ...], as_json: bool) -> None:
    """Have INPUTS (recordings, folders, stores) sung by somebody else.

    \b
    Example: featstore convert song.wav --to alice --run runs/a --vocoder runs/voc -o out.wav
    """
    from featstore_zoo import convert as c

    made: list[Made] = []
    semitones: c.Key = "auto" if key == "auto" else _semitones(key)
    with display.ExtractProgress() as shown, SongProgress() as song:
        def extracting(told: Progress) -> None:
            song.stop()
            shown(told)
            if told.done >= told.total:
                shown.stop()
                song.prepare()

        how = c.Sources(sources, dict(_pair(text, "--weights", "NAME=FILE") for text in weights),
                        dict(_pair(text, "-f", "NAME=REQUEST") for text in requests), device, extracting)
        try:
            c.files(inputs, to=to, run=run, out=out, vocoder=vocoder, key=semitones, rounding=rounding, steps=steps,
                    sampler=sampler, seed=seed, device=device, precision=precision, window=window, form=form, how=how,
                    progress=_kept(made, not as_json), watch=None if as_json else song)
        finally:
            song.stop()
            if made:
                _say_written(made, out, as_json, converted=True)


def _say_written(made: Sequence[Made], out: Path, as_json: bool, converted: bool = False) -> None:
    if as_json:
        display.say_json([{"key": one.key, "path": str(one.path), "seconds": one.seconds, "took_s": one.took_s}
                          | ({"semitones": one.semitones, "remarks": list(one.remarks)} if converted else {})
                          for one in made])
        return
    seconds, took = sum(one.seconds for one in made), sum(one.took_s for one in made)
    display.say(f"{len(made):,} written to {out}, {display.length(seconds)} in {display.length(took)} "
                f"({seconds / max(took, 1e-9):.1f} x real time)")


@cli.group()
def zoo() -> None:
    """Models: which there are, weights from elsewhere, model cards.

    \b
    Example: featstore zoo ls
    """


@zoo.command("ls")
@json_option
def list_models(as_json: bool) -> None:
    """The models that can be trained, with their presets and sizes.

    \b
    Example: featstore zoo ls
    """
    from featstore_zoo import catalogue

    rows = catalogue()
    if as_json:
        display.say_json([row._asdict() for row in rows])
        return
    display.table([(row.name, row.kind, row.preset, f"{row.parameters / 1e6:.2f} M", row.says) for row in rows],
                  ("model", "kind", "preset", "parameters", "what it is"))


@zoo.command("import")
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--set", "fields", multiple=True, metavar="FIELD=VALUE", help="What the files do not say; again.")
def import_weights(path: Path, out: Path, fields: tuple[str, ...]) -> None:
    """Turn weights from elsewhere (a file, or the folder they were published in) into the folder of a run.

    \b
    Example: featstore zoo import generator_v1 -o runs/hifigan
    """
    from featstore_zoo import layouts

    found = layouts.convert(path, out, dict(_pair(text) for text in fields))
    display.say(f"{out}: {found.model} from {found.layout}")
    for remark in found.remarks:
        display.say(f"  {remark}")


@zoo.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="File to write, .onnx.")
def export_run(run: Path, out: Path) -> None:
    """Write the vocoder of RUN as ONNX, with weight norm put into its weights.

    \b
    Example: featstore zoo export runs/voc -o voc.onnx
    """
    from featstore_zoo import export
    from featstore_zoo import run as runs

    export.to_onnx(runs.load(run), out)
    display.say(f"{out}: {display.size(out.stat().st_size)}")


@zoo.command("card")
@click.argument("run", type=click.Path(path_type=Path))
def show_card(run: Path) -> None:
    """Render the model card of RUN into its README.md and say what it lacks; exit status 1 if it lacks something.

    \b
    Example: featstore zoo card runs/voc
    """
    from featstore_zoo import card
    from featstore_zoo import run as runs

    written = card.write(runs.load(run))
    lacks = card.problems(written.read_text("utf-8"))
    display.say(f"{written}: " + ("complete" if not lacks else f"{len(lacks)} things are missing"))
    for line in lacks:
        display.say(f"  {line}")
    if lacks:
        raise click.exceptions.Exit(1)


class TrainProgress(display.Bar):
    """Shows how far training is; its first and its last step always."""

    def __init__(self) -> None:
        super().__init__(left=True, silent_s=0.0)

    def __call__(self, told: Told) -> None:
        self.show(told.step, told.steps, _told(told), say=told.step == told.steps)


def _told(told: Told) -> str:
    terms = ", ".join(f"{name} {value:.3f}" for name, value in told.terms.items())
    valid = "".join(f"; valid {name} {value:.3f}" for name, value in told.validated.items() if name == "score")
    return f"{told.step:,} of {told.steps:,} steps: {terms}{valid}; waiting for data {100 * told.loader_share:.0f} %"


class SongProgress(display.Bar):
    """Shows how far a song is, and before the first that there is something to wait for."""

    def __init__(self) -> None:
        super().__init__(left=True)
        self._preparing = False

    def __enter__(self) -> SongProgress:
        self.prepare()
        return self

    def prepare(self) -> None:
        """Nobody knows how long what is loaded or extracted takes."""
        self._preparing = True
        self.show(0, None, "models, features")

    def __call__(self, told: Stage) -> None:
        if self._preparing:
            self._preparing = False
            self.stop()
        self.show(told.done, 1, f"{told.number:,} of {told.count:,}  {told.what} {100 * told.done:.0f} %  {told.title}")
        if told.done >= 1:  # what comes next has its own time left
            self.stop()


def _kept(made: list[Made], say: bool) -> Callable[[Made, int, int], None]:
    """Adds to a list what is made, and says it."""
    told = _say_made()

    def show(one: Made, number: int, count: int) -> None:
        made.append(one)
        if say:
            told(one, number, count)

    return show


def _say_made() -> Callable[[Made, int, int], None]:
    def show(made: Made, number: int, count: int) -> None:
        click.echo(f"{number:,} of {count:,}  {made.path}  {made.seconds / max(made.took_s, 1e-9):.1f} x real time",
                   err=True)
        for remark in made.remarks:
            click.echo(f"  {remark}", err=True)

    return show


def _semitones(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.UsageError(f"--key {text!r}: expected auto, or semitones such as +3 or -12") from None


def _pair(text: str, option: str = "--set", expected: str = "FIELD=VALUE") -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"{option} {text!r}: expected {expected}")
    return name.strip(), value.strip()
