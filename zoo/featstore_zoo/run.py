"""The folder of a run: everything that a trained model is, so that it can be moved, resumed and used without its store.

    runs/x/  config.json          which model, its Config, the mel contract, timing, steps
             recipe.toml          the features it reads: requests that make them and their identities; training
             model.safetensors    the weights to use (the averaged ones, where training keeps an average)
             statistics.safetensors, singers.json        where a model has them
             README.md            the model card
             checkpoints/  log/  samples/                what training keeps

Weights are safetensors alone: nothing is unpickled. Every file is put in place in one step, so that a killed training
leaves the run as it was before or as it is after.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import secrets
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from featstore import Spec, Store
from featstore.errors import (
    BadRequest,
    CannotLoad,
    ContractMismatch,
    FeatstoreError,
    IdentityMismatch,
    MissingFeature,
    nearest,
)
from featstore_extractors import checkpoint
from featstore_extractors.signal import MelContract

from . import find, singers
from .singers import Singer

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = 1
ANY = "any"  # among a spec's settings: nobody knows the digest of the weights that made it, as of imported runs
Timing = Literal["edges", "centres"]


class NotARun(FeatstoreError, ValueError):
    """A path holds no run folder, or one of a newer format."""


@dataclass(frozen=True)
class Read:
    """A feature that a run reads from a store, as it was when training began.

    name: under which it stood in the store.
    spec: the full record of what made it; its identity is what counts.
    """

    name: str
    spec: Spec

    @property
    def request(self) -> str:
        """What to ask of `featstore extract -f` to make it: every setting spelt out."""
        return f"{self.name}={request_of(self.spec)}"


@dataclass(frozen=True)
class Settings:
    """What a run is before it has weights.

    model: its name in the zoo, or an import path.
    config: the model's own Config.
    contract: of the log-mel that it takes or gives.
    reads: role (log-mel, wave, f0, content ...) -> features.
    timing: how features were brought to one frame rate.
    training: seed, steps, batch and so on, plain values.
    """

    model: str
    config: Any
    contract: MelContract
    reads: Mapping[str, tuple[Read, ...]] = field(default_factory=dict)
    timing: Timing = "edges"
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def package(self) -> ModuleType:
        return find(self.model)


class Run:
    """A run folder, read when something of it is asked for.

    `run.model` is the network with its weights in eval mode on the CPU; `run.network()` a fresh one without them.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._document = _document(self.path)

    @cached_property
    def settings(self) -> Settings:
        """What the run is. NotARun or CannotLoad says which part cannot be read."""
        document = self._document
        try:
            package = find(document["model"])
            config = package.Config(**document["config"])
            contract = MelContract(**document["contract"])
            recipe = tomllib.loads((self.path / "recipe.toml").read_text("utf-8"))
            reads = {role: tuple(Read(item["name"], Spec.from_json(item["spec"])) for item in items)
                     for role, items in document["reads"].items()}
        except FileNotFoundError as error:
            raise NotARun(f"{error.filename} is missing: the run folder is not whole; copy all of it") from None
        except (KeyError, TypeError, ValueError) as error:  # ValueError: of a Config with other rules, or no TOML
            raise CannotLoad(f"{self.path} cannot be read as a run of {document.get('model')!r} ({error}): it may be "
                             "of another version of featstore or of the model. Use that one, or train it again"
                             ) from error
        return Settings(document["model"], config, contract, reads, document["timing"], recipe.get("training", {}))

    @property
    def kind(self) -> str:
        """"vocoder" or "acoustic"."""
        return str(self.settings.package.KIND)

    @cached_property
    def singers(self) -> dict[str, Singer]:
        """The voices an acoustic run was trained on, by name; none for a vocoder. CannotLoad where they are damaged."""
        return singers.read(self.path)

    @property
    def steps(self) -> int:
        """Training steps that the weights have seen; 0 for imported ones of which nothing is known."""
        return int(self._document["steps"])

    def network(self) -> nn.Module:
        """The model as its Config says, with fresh weights."""
        model: nn.Module = self.settings.package.Model(self.settings.config)
        return model

    @cached_property
    def model(self) -> nn.Module:
        """The model with the run's weights, in eval mode on the CPU.

        Raises:
            CannotLoad: if the weights are missing, damaged, not finite or of another shape.
        """
        model = self.network()
        load_weights(model, self.path / "model.safetensors")
        return model.eval()

    def check_contract(self, contract: MelContract, of: str) -> None:
        """ContractMismatch names the fields in which the run's mel contract and that of `of` differ."""
        check_contract(self.settings.contract, str(self.path), contract, of)

    def check_store(self, store: Store) -> None:
        """MissingFeature or IdentityMismatch where a store does not have just the features that the run reads."""
        for read in (item for items in self.settings.reads.values() for item in items):
            check_read(read, store, str(self.path))

    def __repr__(self) -> str:
        return f"<Run {self.path}: {self._document['model']}, {self.steps:,} steps>"


def package_of(model: str) -> ModuleType:
    """The package of a model. BadRequest lists those there are."""
    try:
        return find(model)
    except ValueError as error:
        raise BadRequest(str(error)) from error


def load(path: str | Path) -> Run:
    """The run in a folder. NotARun says what is there instead."""
    return Run(path)


def create(path: str | Path, settings: Settings, statistics: Mapping[str, Tensor] | None = None,
           voices: Mapping[str, Singer] | None = None) -> Run:
    """A new run folder with everything but weights. Refuses one that is there and not empty."""
    root = Path(path)
    check_free(root)
    root.mkdir(parents=True, exist_ok=True)
    if statistics is not None:
        put_tensors(root / "statistics.safetensors", statistics)
    if voices is not None:
        put_file(root / singers.FILE, singers.packed(voices))
    _put_recipe(root, settings)
    _put_config(root, settings, steps=0)
    return Run(root)


def check_free(root: Path) -> None:
    """NotARun where a folder for a new run is there already and not empty."""
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise NotARun(f"{root} exists already: go on with it (--resume), or choose another folder (-o)")


def retrained(run: Run, **training: Any) -> Run:
    """The run with other values of how it is trained, written into its recipe.toml."""
    settings = dataclasses.replace(run.settings, training=dict(run.settings.training) | training)
    _put_recipe(run.path, settings)
    return Run(run.path)


def save(root: Path, settings: Settings, weights: Mapping[str, Tensor], steps: int) -> None:
    """Put weights into a run folder, and after them the steps they have seen."""
    put_tensors(root / "model.safetensors", weights)
    _put_config(root, settings, steps)


def put_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors in one step. Tensors that share memory are written twice, since the format has no links."""
    from safetensors.torch import save as packed

    put_file(path, packed({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}))


def put_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write what training goes on from, in one step: tensors, numbers and texts alone, which `torch.load` reads with
    `weights_only=True`."""
    import io

    import torch

    packed = io.BytesIO()
    torch.save(dict(state), packed)
    put_file(path, packed.getvalue())


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model. CannotLoad names what is missing, unexpected, of another shape or not finite."""
    if not path.is_file():
        raise CannotLoad(f"{path} does not exist: the run has no weights yet, or its folder was not copied whole")
    try:
        checkpoint.load_into(model, checkpoint.read(path), path)
    except ValueError as error:
        raise CannotLoad(f"{error}. Copy the run again, or take checkpoints/best") from error


def check_contract(mine: MelContract, what: str, other: MelContract, of: str) -> None:
    """ContractMismatch names the fields in which two mel contracts differ: a mel is never resampled by guessing."""
    differs = mine.differs(other)
    if differs:
        told = ", ".join(f"{name} {here} (in {of}: {there})" for name, (here, there) in differs.items())
        raise ContractMismatch(f"{what} is made for log-mels of {told}. Extract log-mel with the contract of {what} "
                               f"(-r {what}), or take a vocoder of the other one; a mel cannot be converted")


def check_read(read: Read, store: Store, what: str) -> None:
    """Whether a store serves just the feature that `what` reads; the differing fields are named where it does not."""
    if read.name not in store.features:
        raise MissingFeature(f"{what} reads {read.name}, which {store.path} does not have "
                             f"({nearest(read.name, store.features)}). Try: featstore extract CORPUS {store.path} "
                             f"-f {read.request}")
    held = store.features[read.name].spec
    if held.identity == read.spec.identity or not (differs := differing(read.spec, held)):
        return
    told = ", ".join(f"{name}={there!r} (the run: {mine!r})" for name, (mine, there) in differs.items())
    raise IdentityMismatch(f"{what} reads {read.name}@{read.spec.identity[:9]}; {store.path} now serves "
                           f"{read.name}@{held.identity[:9]} with {told}. Extract the run's own beside it (-f "
                           f"other={request_of(read.spec)}), or start another run")


def differing(mine: Spec, held: Spec) -> dict[str, tuple[Any, Any]]:
    """The fields in which what a run reads and what there is differ; of what nobody knows, only those that are said."""
    found = mine.differs(held)
    if mine.settings.get("weights") != ANY:
        return found
    said = {"made_by", "kind", "dim", *mine.settings} - {"weights"}
    return {name: pair for name, pair in found.items() if name in said}


def request_of(spec: Spec) -> str:
    """What to ask of `featstore extract -f` to make a feature of this spec: extractor and every setting it has.

    Weights are named by their digest in the spec alone, never by a path of another machine, so that a request for an
    encoder has no `weights=`.
    """
    from featstore_extractors import TABLE, RequestError, parse

    if spec.made_by not in TABLE:
        return spec.made_by
    try:
        head, known = _head(spec, parse)
    except (RequestError, ImportError):
        head, known = spec.made_by, set(spec.settings)
    named = {name: text for name, value in spec.settings.items()
             if name in known and name != "weights" and (text := _text(value)) is not None}
    return ",".join([head, *(f"{name}={text}" for name, text in named.items())])


def _head(spec: Spec, parse: Callable[..., Any]) -> tuple[str, set[str]]:
    """The extractor that made a spec, with the preset that leads to its class where there are several; its settings."""
    found = {spec.made_by: _settings_of(parse(spec.made_by)[spec.made_by])}
    presets = getattr(type(parse(spec.made_by)[spec.made_by]), "PRESETS", ())
    if not isinstance(presets, Mapping):  # presets of other classes
        for preset in presets:
            found[f"{spec.made_by}:{preset}"] = _settings_of(parse(f"{spec.made_by}:{preset}")[spec.made_by])
    said = set(spec.settings)
    head = max(found, key=lambda name: (len(found[name] & said) - len(found[name] - said), -len(name)))
    return head, found[head]


def _settings_of(extractor: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(extractor)}


def _text(value: Any) -> str | None:
    """A setting as a request says it; None for what a request cannot say, or says by leaving it out."""
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return f"{value[0]}..{value[-1]}" if value == list(range(value[0], value[-1] + 1)) else None  # layers
    if value == "output":  # the layer that is taken where none is named
        return None
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str | int | float) else None


def _document(root: Path) -> dict[str, Any]:
    path = root / "config.json"
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        what = "does not exist" if not root.exists() else "is not a run: it has no config.json"
        raise NotARun(f"{root} {what}. Train one: featstore train MODEL STORE -o {root}; or convert weights from "
                      f"elsewhere: featstore zoo import PATH -o {root}") from None
    except NotADirectoryError:
        raise NotARun(f"{root} is a file, expected the folder of a run") from None
    except ValueError as error:
        raise NotARun(f"{path} is no JSON document ({error}): the run folder is damaged") from None
    found = document.get("format") if isinstance(document, dict) else None
    if not isinstance(found, int):
        raise NotARun(f"{path} is not of a run of featstore: it gives no format version")
    if found > FORMAT:
        raise NotARun(f"{root} has run format {found}; this featstore reads up to {FORMAT}. "
                      "Update it: pip install --upgrade featstore")
    return document


def _put_config(root: Path, settings: Settings, steps: int) -> None:
    document = {"format": FORMAT, "model": settings.model, "config": dataclasses.asdict(settings.config),
                "contract": {f.name: getattr(settings.contract, f.name) for f in dataclasses.fields(MelContract)},
                "timing": settings.timing, "steps": steps,
                "reads": {role: [{"name": read.name, "spec": read.spec.to_json()} for read in items]
                          for role, items in settings.reads.items()}}
    put_file(root / "config.json", json.dumps(document, indent=1).encode())


def _put_recipe(root: Path, settings: Settings) -> None:
    """recipe.toml: what a person may read and `featstore extract -r` and `featstore train -r` take."""
    import tomlkit

    recipe = tomlkit.document()
    reads = [read for items in settings.reads.values() for read in items]
    recipe["features"] = {read.name: request_of(read.spec) for read in reads}
    recipe["identities"] = {read.name: read.spec.identity for read in reads}
    renamed = {role: items[0].name for role, items in settings.reads.items() if items and items[0].name != role}
    if renamed:
        recipe["roles"] = renamed
    changed = {f.name: getattr(settings.config, f.name) for f in dataclasses.fields(settings.config)
               if getattr(settings.config, f.name) != inspect.getattr_static(type(settings.config), f.name, None)}
    recipe["model"] = {"name": settings.model, "fields": {name: _listed(value) for name, value in changed.items()}}
    recipe["training"] = dict(settings.training)
    put_file(root / "recipe.toml", tomlkit.dumps(recipe).encode())


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def put_file(path: Path, data: bytes) -> None:
    """Write a file in one step, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
