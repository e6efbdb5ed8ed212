"""Commands that look after a store as a whole: pack."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from . import cli, display
from .request import PlaceType, json_option, open_store

if TYPE_CHECKING:
    from featstore.pack import Packed
    from featstore.storage import Place


@cli.command()
@click.argument("store", type=PlaceType())
@click.argument("feature", metavar="NAME")
@click.option("--codec", required=True, type=click.Choice(["zstd", "pcodec", "raw", "int8"]),
              help="The first three lose nothing; int8 makes NAME-int8, or brings it up to date.")
@click.option("--replace", is_flag=True, help="With int8: choose the range anew, for all that NAME has now.")
@json_option
def pack(store: Place, feature: str, codec: str, replace: bool, as_json: bool) -> None:
    """Store a feature with a codec. zstd takes neural float16 to about 0.93 of its size and pcodec to 0.73 to 0.88;
    int8 halves it, and says how far its values are off. Exit status 1 if some lie outside the range of NAME-int8.

    \b
    Example: featstore pack songs.zarr whisper --codec int8
    """
    from featstore.pack import pack as pack_feature

    if replace and codec != "int8":
        raise click.UsageError(f"--replace chooses another range for int8; {codec} loses nothing and has none")
    done = pack_feature(open_store(store), feature, codec, replace=replace, progress=display.bytes_progress("pack"))
    if as_json:
        display.say_json(dataclasses.asdict(done) | {"ratio": done.ratio, "bytes_per_s": done.rate})
    else:
        _say_packed(done, store)
    if done.refused:
        raise click.exceptions.Exit(1)


def _say_packed(done: Packed, store: Place) -> None:
    what = "utterances" if done.codec == "int8" else "segments"
    sizes = f"{display.size(done.before)} before, {display.size(done.after)} now ({done.ratio:.3f})"
    if done.done:
        pace = f"{display.length(done.elapsed_s)} ({display.size(done.rate)}/s)"
        display.say(f"{done.feature}: {done.done:,} {what} packed with {done.codec} in {pace}; {sizes}")
    elif not done.refused:
        display.say(f"{done.feature}: nothing to do, all {done.fresh:,} {what} are packed with {done.codec}; {sizes}")
    if done.loss is not None:
        display.say(f"  error {done.loss.snr_db:.1f} dB below the signal, of the worst channel "
                    f"({done.loss.worst_channel}) {done.loss.worst_db:.1f} dB")
    if done.done and done.codec != "int8":
        display.say(f"  the space of the old ones is freed, a day later, by: featstore compact {store} --purge")
    for found in done.refused[:display.SHOWN]:
        reach = f"channel {found.channel} reaches {found.value:.6g}, the range is {found.low:.6g} to {found.high:.6g}"
        click.echo(display.visible(f"  not packed: {found.utterance}: {reach}"), err=True)
    if done.refused:
        display.say_error(f"{len(done.refused):,} utterances lie outside the range of {done.feature}, which was frozen "
                          "when it was made; nothing of them was stored. --replace chooses a range for all")
