"""What a training is before it begins: its fields, the model's Config for a store, the features it reads, the folder.

Everything that can be refused is refused here, before anything is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import featstore as fs
from featstore.errors import BadRequest, ContractMismatch, nearest
from featstore.splits import members
from featstore_extractors.signal import MelContract

from . import run as runs
from .recipe import Recipe
from .run import Run

Precision = Literal["32", "bf16", "16"]
Balance = Literal["none", "speaker", "corpus"]
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Training:
    """How a model is trained. A package may have other defaults, in `TRAINING`.

    steps: updates of the weights; batch: crops in each, over all devices; frames: of a crop.
    accumulate: batches whose gradients make one update.
    learning_rate: times `decay` every `decay_every` steps; beta1, beta2, weight_decay: of AdamW (1711.05101).
    clip: gradients longer than this are shortened to it, model and discriminators each; 0 leaves them.
    ema: of the weights that are used and kept: their average over about 1 / (1 - ema) steps, and over fewer while
        training is young; 0 takes them as they are.
    precision: 32, or bf16 and 16, in which products are computed while weights stay in 32.
    compile: through torch.compile.
    balance: whether speakers or corpora are drawn equally often, whatever they recorded.
    validate_every, save_every: steps. patience: validations without a better one after which it ends; 0: never.
    valid_utterances, valid_s: how many are validated on, and of each how many seconds.
    skips: steps in a row with gradients that are not finite, after which training is given up.
    """

    steps: int = 200_000
    batch: int = 16
    frames: int = 32
    accumulate: int = 1
    seed: int = 0
    learning_rate: float = 2e-4
    beta1: float = 0.8
    beta2: float = 0.99
    weight_decay: float = 0.01
    decay: float = 0.999
    decay_every: int = 1000
    clip: float = 0.0
    ema: float = 0.999
    precision: Precision = "32"
    compile: bool = False
    balance: Balance = "none"
    validate_every: int = 5000
    save_every: int = 1000
    patience: int = 0
    valid_utterances: int = 8
    valid_s: float = 8.0
    skips: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "frames", "accumulate", "decay_every", "validate_every", "save_every", "skips"):
            if getattr(self, name) < 1:
                raise BadRequest(f"{name} {getattr(self, name)}: expected at least 1")
        if self.valid_utterances < 0 or self.patience < 0 or self.valid_s <= 0:
            raise BadRequest(f"valid_utterances {self.valid_utterances} and patience {self.patience} must not be "
                             f"negative, valid_s {self.valid_s:g} must be above 0")
        if not 0 <= self.ema < 1 or self.clip < 0 or self.learning_rate <= 0 or not 0 < self.decay <= 1:
            raise BadRequest(f"ema {self.ema:g} must be in [0, 1), clip {self.clip:g} not negative, learning_rate "
                             f"{self.learning_rate:g} above 0, decay {self.decay:g} in (0, 1]")
        for name, kind in (("precision", Precision), ("balance", Balance)):
            if getattr(self, name) not in get_args(kind):
                raise BadRequest(f"{name} {getattr(self, name)!r}: expected one of {', '.join(get_args(kind))}")


def prepare(path: str | Path, store: fs.Store, model: str, *, fields: Mapping[str, Any] | None = None,
            names: Mapping[str, str] | None = None, split: str | None = None, init: str | Path | None = None,
            recipe: Recipe | None = None, smoke: bool = False) -> Run:
    """A new run folder for a model on a store, all but its weights.

    model: a name in the zoo, with a preset if there is one: "hifigan:v2"; or an import path.
    fields: of its Config and of `Training`, by name.
    names: role -> the feature that plays it, where it is not called like its role: {"log-mel": "mel44"}.
    split: of the store, whose train part is learnt from and whose valid part is validated on; without one, one in
        twenty utterances is held out, at most `valid_utterances`.
    init: a run whose weights to begin with; it has the same architecture and mel contract.
    recipe: what is asked for where the arguments say nothing.
    smoke: twenty steps of a small configuration, whatever the preset, to see that everything works.

    Raises:
        BadRequest: an unknown field, or a value that makes no sense.
        ContractMismatch: fields that contradict the mel contract of the store's log-mel.
        MissingFeature, IdentityMismatch: the store lacks what the model reads, or the recipe asks for another.
    """
    asked = recipe or Recipe()
    name, _, preset = asked.named(model).partition(":")
    package = runs.package_of(name)
    if package.KIND != "vocoder":
        raise BadRequest(f"{name} is of kind {package.KIND}: only vocoders can be trained so far")
    given = dict(SMOKE if smoke else {}) | dict(asked.fields) | dict(fields or {})
    known = {f.name for f in dataclasses.fields(Training)}
    roles = {"log-mel": "log-mel", "wave": "wave", "f0": "f0"} | asked.roles(store) | dict(names or {})
    mel = store.feature(roles["log-mel"])
    small = smoke and not asked.model and "smoke" in getattr(package.Config, "PRESETS", {})
    changed = _preset(package, preset) | (_preset(package, "smoke") if small else {})
    config = _config(package, mel, changed | {name: value for name, value in given.items() if name not in known})
    wanted = ["log-mel", "wave", *(["f0"] if getattr(package.Model, "needs_f0", False) else [])]
    reads = {role: (runs.Read(roles[role], store.feature(roles[role]).spec),) for role in wanted}
    _check_wave(reads["wave"][0], config)
    own = getattr(package, "TRAINING", {})
    training = typed(Training, dict(own) | {name: value for name, value in given.items() if name in known})
    record = dataclasses.asdict(training)
    split = split or asked.split
    if split:
        for part in ("train", "valid"):
            members(store, f"{split}/{part}", store.utterances)  # BadRequest where there is none, or nothing in it
        record["split"] = split
    else:
        again = asked.held_out and all(key in store.utterances for key in asked.held_out)
        record["held_out"] = list(asked.held_out) if again else _held_out(store, training)
    settings = runs.Settings(name, config, config.contract, reads, "edges", record)
    if init is not None:
        record["init"] = str(_fitting(Path(init), settings).resolve())
    return runs.create(path, settings)


def _fitting(init: Path, settings: runs.Settings) -> Path:
    """A run whose weights another of these settings can begin with."""
    first = runs.load(init)
    first.check_contract(settings.contract, "the store")
    runs.load_weights(settings.package.Model(settings.config), init / WEIGHTS)
    return init


SMOKE = {"steps": 20, "batch": 2, "validate_every": 20, "save_every": 20, "valid_utterances": 1, "valid_s": 1.0,
         "learning_rate": 1e-3, "ema": 0.0}


def _config(package: ModuleType, mel: fs.Feature, asked: Mapping[str, Any]) -> Any:
    """The model's Config for the contract of the store's log-mel, which what is asked for may not contradict."""
    held = MelContract.from_settings(mel.spec.settings)
    contract = {f.name: getattr(held, f.name) for f in dataclasses.fields(MelContract)}
    for name in (name for name in contract if name in asked):
        if _read(name, asked[name], contract[name]) != contract[name]:
            raise ContractMismatch(f"{name}={asked[name]} was asked for, and the store's {mel.name} has {name} "
                                   f"{contract[name]}: extract another log-mel (--mel NAME names it), or leave it out")
    return typed(package.Config, contract | {name: value for name, value in asked.items() if name not in contract})


def _preset(package: ModuleType, name: str) -> dict[str, Any]:
    """What a preset changes. BadRequest lists those there are."""
    known = getattr(package.Config, "PRESETS", {})
    if name and name not in known:
        there = ", ".join(known) or "none"
        raise BadRequest(f"no preset {name!r} of {package.__name__.rpartition('.')[2]}; there are {there}")
    return dict(known.get(name, {}))


def typed(kind: Any, values: Mapping[str, Any]) -> Any:
    """`kind(**values)`, texts read as what the fields' defaults are. BadRequest names a field that is not known."""
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    for name in values:
        if name not in defaults:
            raise BadRequest(f"no field {name!r} ({nearest(name, [*defaults, *_training_names(kind)])})")
    try:
        return kind(**{name: _read(name, value, defaults[name]) for name, value in values.items()})
    except BadRequest:
        raise
    except ValueError as error:
        raise BadRequest(str(error)) from error


def _training_names(kind: Any) -> list[str]:
    return [] if kind is Training else [f.name for f in dataclasses.fields(Training)]


def _read(name: str, value: Any, default: Any) -> Any:
    """A value, or the text of one, as the type of the field's default: numbers, true and false, lists as JSON."""
    wrong = BadRequest(f"{name}={value}: expected something like {json.dumps(default)}")
    if isinstance(default, str):
        return str(value)  # precision = 16
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise wrong from None
    fits = {bool: (bool,), int: (int,), float: (int, float), tuple: (list, tuple)}.get(type(default), (object,))
    if not isinstance(found, fits) or (isinstance(found, bool) and not isinstance(default, bool)):
        raise wrong
    return found


def _check_wave(read: runs.Read, config: Any) -> None:
    if read.spec.kind != "samples" or read.spec.sample_rate != config.sample_rate:
        raise ContractMismatch(f"{read.name} has sample rate {read.spec.sample_rate} and log-mel {config.sample_rate}: "
                               "a vocoder learns from both at one rate. Extract it: -f wave,sample_rate="
                               f"{config.sample_rate}")


def _held_out(store: fs.Store, training: Training) -> list[str]:
    """Every twentieth utterance by the hash of its key, at most as many as are validated on; of a few, one.

    None where none is to be validated on.
    """
    ranked = sorted(store.utterances, key=lambda key: hashlib.sha256(f"{training.seed} {key}".encode()).digest())
    count = min(max(1, len(ranked) // 20), training.valid_utterances)
    return ranked[:count] if len(ranked) > 1 else []


def training_of(run: Run) -> Training:
    """How a run is trained."""
    known = {f.name for f in dataclasses.fields(Training)}
    return Training(**{name: value for name, value in run.settings.training.items() if name in known})
