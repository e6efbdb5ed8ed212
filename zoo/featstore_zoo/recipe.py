"""What a training is asked for in a file: recipe.toml of a run, or one of your own.

    [model]      name = "hifigan:v1"    fields = {channels = 256}       of the model's Config
                 content = ["whisper"]  speaker = "one-hot"             what an acoustic model hears
    [training]   steps = 50000, batch = 16, split = "main"              of `Training`; split, held_out
    [features]   mel44 = "log-mel:44k-128"    f0 = "f0:harvest"         names in the store, and what must have made them
    [identities] whisper = "3f2a91..."        [roles] loudness = "soft" just that one; the part it plays under its name

A run's own recipe begins the same training anew; what a file leaves out has its default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import featstore as fs
from featstore.errors import BadRequest, IdentityMismatch
from featstore_extractors import parse

from . import run as runs

ROLES = ("log-mel", "wave", "f0", "loudness", "energy", "speaker")
ELSEWHERE = ("split", "held_out", "init")  # in [training], and no field of `Training`


@dataclass(frozen=True)
class Recipe:
    """What a file asks for. `fields`: of model and training, by name; `features`: name -> request, `identities`: name
    -> identity; `parts`: role -> name; `content`, `speaker`: as `prepare` takes them."""

    path: Path = Path()
    model: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    features: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    held_out: tuple[str, ...] = ()
    content: tuple[str, ...] | None = None
    speaker: str | None = None
    identities: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)

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
            maker = request.partition(":")[0].partition(",")[0].strip()
            if maker in ROLES:
                found[maker] = name
            if maker not in ROLES and name not in self.identities:
                continue
            if name in store.features and store.features[name].identity == self.identities.get(name):
                continue  # without a look at weights and packages, which may not be on this machine
            if maker in ROLES:
                runs.check_read(runs.Read(name, fs.Spec.of(parse(f"{name}={request}")[name])), store, str(self.path))
                continue
            raise IdentityMismatch(f"{self.path} asks for {name}@{self.identities[name][:9]} ({request}); {store.path} "
                                   f"serves {name}@{store.feature(name).identity[:9]}. Extract that one beside it (-f "
                                   f"other={request}), or leave [identities] out of the recipe")
        return found | dict(self.parts)


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
    identities, parts = (_table(document, name, place) for name in ("identities", "roles"))
    content = model.get("content")
    if content is not None and not (isinstance(content, list) and all(isinstance(name, str) for name in content)):
        raise BadRequest(f"{place}: content = {content!r}, expected names of features: [\"whisper\", \"contentvec\"]")
    fields = _table(model, "fields", place) | {n: v for n, v in training.items() if n not in ELSEWHERE}
    if not all(isinstance(value, str) for value in features.values()):
        raise BadRequest(f"{place}: expected lines such as f0 = \"f0:harvest\" in [features]")
    return Recipe(place, str(model.get("name", "")), fields, features, training.get("split"),
                  tuple(training.get("held_out", ())), None if content is None else tuple(content),
                  None if model.get("speaker") is None else str(model["speaker"]), identities, parts)


def _table(document: Mapping[str, Any], name: str, place: Path) -> dict[str, Any]:
    found = document.get(name, {})
    if not isinstance(found, dict):
        raise BadRequest(f"{place}: {name} = {found!r}, expected a table [{name}]")
    return dict(found)
