"""python -m featstore_zoo.mini: makes what ships in the box, from data that it makes too."""

from __future__ import annotations

import warnings
from pathlib import Path

import click

HERE = Path("mini")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Train the box's models, and measure them. A command that is stopped goes on where it was."""


@cli.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), default=HERE / "encoder", show_default=True)
@click.option("--audio", type=click.Path(path_type=Path, exists=True), help="Folder of recordings with a manifest.csv.")
@click.option("--sentences", default=0, help="Synthetic sentences; default: those of the box.")
@click.option("--steps", default=0, help="Of training; default: those of the box.")
@click.option("--minutes", default=90.0, show_default=True, help="Of training in this call.")
@click.option("--without", multiple=True, metavar="OBJECTIVE", help="Leave one out: ctc invariance real voice pitch.")
@click.option("--data", type=click.Path(path_type=Path), help="Shards made before, in place of OUT/data.")
@click.option("--seed", default=0, show_default=True)
@click.option("--workers", default=2, show_default=True, help="Processes that make data.")
def encoder(out: Path, audio: Path | None, sentences: int, steps: int, minutes: float, without: tuple[str, ...],
            data: Path | None, seed: int, workers: int) -> None:
    """The content encoder: makes its data, trains, and writes OUT/mini.safetensors.

    \b
    Example: python -m featstore_zoo.mini encoder --audio ../shared/audio -o mini/encoder
    """
    from . import encoder as training
    from . import erase, speech

    paths = speech.make(data or out / "data", audio, sentences or speech.SENTENCES, seed, workers, click.echo)
    weights = training.without(without)
    run = training.Training(out, training.Data.read(paths), weights, steps or training.STEPS, seed)
    if run.run(minutes, click.echo):
        click.echo(f"{erase.finish(run)}: ready")
    else:
        click.echo(f"step {run.step} of {run.steps}: the same command goes on")


@cli.command()
@click.argument("audio", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--out", type=click.Path(path_type=Path), default=HERE / "measured", show_default=True)
@click.option("--weights", type=click.Path(path_type=Path, exists=True), help="Others than the box's.")
@click.option("--brief", is_flag=True, help="Only what an ablation compares.")
def measure(audio: Path, out: Path, weights: Path | None, brief: bool) -> None:
    """What the content encoder knows, beside log-mel, on readers of AUDIO that it has never heard.

    \b
    Example: python -m featstore_zoo.mini measure ../shared/audio
    """
    from . import measure as measuring

    measuring.report(audio, out, weights, brief, click.echo)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated", category=UserWarning)  # pyworld's
    cli(prog_name="python -m featstore_zoo.mini")
