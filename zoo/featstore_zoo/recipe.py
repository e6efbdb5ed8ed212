"""What a training is asked for in a file: recipe.toml of a run, or one of your own.

    [model]      name = "hifigan:v1"    fields = {channels = 256}       of the model's Config
    [training]   steps = 50000, batch = 16, split = "main"              of `Training`; split, held_out
    [features]   mel44 = "log-mel:44k-128"    f0 = "f0:harvest"         names in the store, and what must have made them

A run's own recipe begins the same training anew; what a file leaves out has its default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import featstore as fs
from featstore.errors import BadRequest
from featstore_extractors import parse

from . import run as runs

ROLES = ("log-mel", "wave", "f0")
ELSEWHERE = ("split", "held_out", "init")  # in [training], and no field of `Training`


@dataclass(frozen=True)
class Recipe:
    """What a file asks for. `fields`: of model and training, by name; `features`: name -> request."""

    path: Path = Path()
    model: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    features: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    held_out: tuple[str, ...] = ()

    def named(self, model: str) -> str:
        """The model with its preset, where the recipe is for this one. BadRequest if it is for another."""
        wanted, given = (name.partition(":")[0].replace("-", "_") for name in (self.model or model, model))
        if wanted != given:
            raise BadRequest(f"{self.path} is for the model {self.model}, and {model} was asked for: name that one, or "
                             "leave the recipe out")
        return model if ":" in model or not self.model else self.model

    def roles(self, store: fs.Store) -> dict[str, str]:
        """Role -> feature of a store, for those that the recipe names; other features are passed over.

        Raises:
            MissingFeature, IdentityMismatch: the store does not have just that one.
        """
        found = {}
        for name, request in self.features.items():
            if request.partition(":")[0].partition(",")[0].strip() not in ROLES:
                continue
            spec = fs.Spec.of(parse(f"{name}={request}")[name])
            runs.check_read(runs.Read(name, spec), store, str(self.path))
            found[spec.made_by] = name
        return found


def read(path: Path) -> Recipe:
    """The recipe in a TOML file, or in the folder of a run.

    Raises:
        BadRequest: there is none, it is no TOML, or a table is not what it should be.
    """
    place = path / "recipe.toml" if path.is_dir() else path
    try:
        document = tomllib.loads(place.read_text("utf-8"))
    except FileNotFoundError:
        raise BadRequest(f"{place} does not exist: give a TOML file, or the folder of a run") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{place} is not TOML: {error}") from None
    model, training, features = (_table(document, name, place) for name in ("model", "training", "features"))
    fields = _table(model, "fields", place) | {n: v for n, v in training.items() if n not in ELSEWHERE}
    if not all(isinstance(value, str) for value in features.values()):
        raise BadRequest(f"{place}: expected lines such as f0 = \"f0:harvest\" in [features]")
    return Recipe(place, str(model.get("name", "")), fields, features, training.get("split"),
                  tuple(training.get("held_out", ())))


def _table(document: Mapping[str, Any], name: str, place: Path) -> dict[str, Any]:
    found = document.get(name, {})
    if not isinstance(found, dict):
        raise BadRequest(f"{place}: {name} = {found!r}, expected a table [{name}]")
    return dict(found)
