"""Options that several commands share: requests and recipes, stores, JSON."""

from __future__ import annotations

import contextlib
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from featstore import Extractor, Spec, Store
    from featstore.storage import Place

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def requests_option(required: bool) -> Decorator:
    """-f REQUEST ... or -r RECIPE."""
    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        recipe = click.option("-r", "--recipe", type=click.Path(path_type=Path, exists=True),
                              help="TOML file, or a folder with recipe.toml: [features] f0 = \"f0:harvest\".")
        request = click.option("-f", "--feature", "requests", multiple=True, metavar="REQUEST",
                               help="[NAME=]EXTRACTOR[:PRESET][,KEY=VALUE...]; again for more."
                                    + ("" if required else " Default: what the store has."))
        return request(recipe(command))

    return add


class PlaceType(click.ParamType):
    """A store: a path, or a URL such as s3://bucket/songs.zarr."""

    name = "store"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        from featstore.errors import BadRequest
        from featstore.storage import place

        try:
            return place(value)
        except BadRequest as error:
            self.fail(str(error), param, ctx)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def names_option(help_text: str) -> Decorator:
    """-f NAME ..."""
    return click.option("-f", "--feature", "names", multiple=True, metavar="NAME", help=help_text)


def extractors_of(requests: Sequence[str], recipe: Path | None) -> dict[str, Extractor]:
    """What the requests and the recipe ask for, in their order."""
    from featstore_extractors import parse

    asked = all_requests(requests, recipe)
    if any("." in request for request in asked) and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # for extractors of one's own, by import path
    return parse(*asked)


def specs_of(extractors: Mapping[str, Extractor], download: bool) -> dict[str, Spec]:
    """The full records of what was asked for; weights are fetched only by a command that will use them."""
    from featstore import Spec
    from featstore_extractors.weights import without_downloads

    with contextlib.nullcontext() if download else without_downloads():
        return {name: Spec.of(extractor) for name, extractor in extractors.items()}


def open_store(path: Place) -> Store:
    import featstore as fs

    return fs.open(path)


def all_requests(requests: Sequence[str], recipe: Path | None) -> list[str]:
    """The requests of -f, then those of -r."""
    return [*requests, *_recipe_requests(recipe)]


def ways_out(refused: Exception, store: Store, asked: Mapping[str, tuple[str, Extractor]]) -> str:
    """The message of an IdentityMismatch, with what could be typed instead. `asked`: name -> (request, extractor)."""
    from featstore import Spec

    first, *_, replace = str(refused).splitlines()
    instead = []
    for name, (request, extractor) in asked.items():
        held = store.features.get(name)
        if held is not None and held.segments and held.short != Spec.of(extractor).identity[:16]:
            instead.append(f"-f {_other_name(store, name, request)}={_unnamed(request)}")
    return f"{first}\n  keep both:  {' '.join(instead)}\n{replace}" if instead else str(refused)


def _other_name(store: Store, name: str, request: str) -> str:
    """A name that is free and says what is special: f0-dio for f0:dio, whisper-l20 for whisper,layer=20."""
    head, *pairs = _unnamed(request).split(",")
    settings = [(key.strip(), value) for key, _, value in (pair.partition("=") for pair in pairs)]
    words = [head.partition(":")[2], *(key[:1] + value for key, value in settings if key not in ("weights", "model"))]
    special = re.sub("[^a-z0-9]+", "-", "-".join(filter(None, words)).lower()).strip("-")[:40] or "2"
    other = f"{name[:20]}-{special}"
    while store.identities(other):
        other += "-2"
    return other


def _unnamed(request: str) -> str:
    mark = re.search("[=:,]", request)
    return request[mark.end():] if mark and mark[0] == "=" else request


def _recipe_requests(recipe: Path | None) -> list[str]:
    if recipe is None:
        return []
    if recipe.is_dir():
        recipe /= "recipe.toml"
        if not recipe.exists():
            raise click.UsageError(f"{recipe.parent} has no recipe.toml: give a TOML file, or the folder of a run")
    try:
        features = tomllib.loads(recipe.read_text("utf-8")).get("features", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{recipe} is not TOML: {error}") from None
    if not isinstance(features, dict) or not all(isinstance(value, str) for value in features.values()):
        raise click.UsageError(f"{recipe}: expected a table [features] with lines such as f0 = \"f0:harvest\"")
    return [f"{name}={request}" for name, request in features.items()]
