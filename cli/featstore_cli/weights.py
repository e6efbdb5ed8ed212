"""Commands about pretrained weights: weights ls, weights check. Neither downloads anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import Command, cli, display
from .request import extractors_of, json_option, specs_of

if TYPE_CHECKING:
    from pathlib import Path

    from featstore_extractors.weights import Preset


class Group(click.Group):
    """Of commands that take --debug."""

    command_class = Command


@cli.group(cls=Group)
def weights() -> None:
    """Which pretrained weights there are, which of them are on this machine, and whether they are sound.

    \b
    Example: featstore weights ls
    """


@weights.command(name="ls")
@json_option
def list_presets(as_json: bool) -> None:
    """List the presets and where they are.

    The hub id, its licence as stated there, the parameters, and of what is on this machine size, digest (if it has been
    hashed) and place.

    \b
    Example: featstore weights ls
    """
    from featstore_extractors import weights as w

    rows = [_described(preset) for preset in w.presets()]
    if as_json:
        display.say_json(rows)
        return
    display.table([[row["request"], row["wanted"] or "(your own)", row["licence"] or "",
                    f"{row['parameters']} M" if row["parameters"] else "",
                    "" if row["bytes"] is None else display.size(row["bytes"]), (row["digest"] or "")[7:19],
                    row["path"] or row["problem"] or "not here"] for row in rows],
                  ["request", "weights", "licence", "parameters", "size", "sha256", "where"])
    display.say(f"{sum(row['path'] is not None for row in rows)} of {len(rows)} are here. What a request names is "
                "downloaded when it is first extracted; see docs/weights.md.")


@weights.command()
@click.argument("requests", nargs=-1, metavar="[REQUEST]...")
@json_option
def check(requests: tuple[str, ...], as_json: bool) -> None:
    """Load weights and compare their digests.

    Of each REQUEST (default: all presets that are here) every tensor must fit the encoder, and every byte is hashed and
    compared with what was downloaded or hashed before. Exit status 1 if something is wrong.

    \b
    Example: featstore weights check whisper:medium contentvec,weights=models/contentvec
    """
    results = []
    for request, extractor, preset in _asked(requests):
        results.append(_checked(request, extractor, preset))
        if not as_json:
            _say(results[-1])
    if as_json:
        display.say_json(results)
    elif not results:
        display.say("no weights of any preset are on this machine; featstore weights ls lists them")
    if any(result["problem"] for result in results):
        raise click.exceptions.Exit(1)


def _described(preset: Preset) -> dict[str, Any]:
    """What is known of a preset without reading its weights."""
    from featstore_extractors import weights as w

    published = w.HUB.get(preset.wanted)
    row: dict[str, Any] = {
        "request": preset.request, "wanted": preset.wanted,
        "licence": None if not preset.wanted else (published and published.licence) or "not stated",
        "parameters": published and published.parameters, "path": None, "bytes": None, "digest": None, "problem": None}
    try:
        path = w.local(preset.wanted, extractor=preset.extractor, named=preset.named)
        if path is not None:
            files = w.tensor_files(path)
            known = [w.remembered(file) for file in files]
            row |= {"path": str(path), "bytes": sum(file.stat().st_size for file in files),
                    "digest": w.digest(files) if None not in known else w.recorded(preset.wanted).get(path.name)}
    except (OSError, ValueError) as error:
        row["problem"] = str(error)
    return row


def _asked(requests: tuple[str, ...]) -> list[tuple[str, Any, Preset]]:
    """(request, extractor, its weights) of the requests, or of all presets whose weights are here, each place once."""
    from featstore_extractors import parse
    from featstore_extractors import weights as w

    found, seen = [], set()
    for request in requests:
        [extractor] = extractors_of([request], None).values()
        preset = w.asked(request, extractor)
        if preset is None:
            raise click.UsageError(f"{request} has no weights of its own to check: they ship in a package, or it needs "
                                   "none")
        found.append((request, extractor, preset))
    for preset in [] if requests else w.presets():
        place = _described(preset)
        kind = (preset.extractor, place["path"] or place["problem"])
        if kind[1] is not None and kind not in seen:
            seen.add(kind)
            found.append((preset.request, next(iter(parse(preset.request).values())), preset))
    return found


def _checked(request: str, extractor: Any, preset: Preset) -> dict[str, Any]:
    from featstore_extractors import weights as w

    result: dict[str, Any] = {"request": request, "path": None, "bytes": None, "digest": None, "recorded": False,
                              "problem": None}
    try:
        path: Path | None = w.local(preset.wanted, extractor=preset.extractor, named=preset.named)
        if path is None:
            raise w.absent(preset.wanted, extractor=preset.extractor, named=preset.named, expected=preset.expected)
        files = w.tensor_files(path)
        result |= {"path": str(path), "bytes": sum(file.stat().st_size for file in files),
                   "recorded": path.name in w.recorded(preset.wanted) or None not in map(w.remembered, files)}
        result["digest"], changed = w.changed(path, preset.wanted)
        if changed:
            raise ValueError(changed)
        with w.without_downloads():
            specs_of({request: extractor}, download=False)  # that it has the layers and the projection asked for
            extractor.load("cpu")
    except (OSError, ValueError, RuntimeError) as error:
        result["problem"] = str(error)
    return result


def _say(result: dict[str, Any]) -> None:
    """One line, and where something is missing the ways out below it."""
    if result["problem"]:
        first, *others = str(result["problem"]).splitlines()
        click.echo("\n".join([f"wrong  {display.visible(result['request'])}: {display.visible(first)}",
                              *map(display.visible, others)]))
        return
    told = "as before" if result["recorded"] else "not hashed before"
    display.say(f"ok     {display.visible(result['request'])}  {display.size(result['bytes'])}  {result['digest']}  "
                f"({told})  {display.visible(result['path'])}")
