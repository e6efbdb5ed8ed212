"""What a training is before it begins: its fields, the model's Config for a store, the features it reads, the folder.

Everything that can be refused is refused here, before anything is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

import featstore as fs
from featstore.errors import BadRequest, CannotLoad, ContractMismatch, nearest
from featstore.splits import members
from featstore_extractors import checkpoint
from featstore_extractors.signal import MelContract

from . import hearing, singers
from . import run as runs
from .acoustic import Acoustic
from .conditioner import Singer
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
            names: Mapping[str, str] | None = None, content: Sequence[str] | None = None, speaker: str | None = None,
            split: str | None = None, init: str | Path | None = None, recipe: Recipe | None = None, smoke: bool = False
            ) -> Run:
    """A new run folder for a model on a store, all but its weights.

    model: a name in the zoo, with a preset if there is one: "hifigan:v2"; or an import path.
    fields: of its Config and of `Training`, by name.
    names: role -> the feature that plays it, where it is not called like its role: {"log-mel": "mel44"}. An acoustic
        model that is to hear no "f0" or no "loudness" is told "none".
    content: features that an acoustic model hears what is sung from.
    speaker: "one-hot" numbers the speakers of the store; the name of an embedding; "none".
    split: of the store, whose train part is learnt from and whose valid part is validated on; without one, one in
        twenty utterances is held out, at most `valid_utterances`.
    init: a run whose weights to begin with; it has the same architecture and mel contract. Of an acoustic model it also
        gives whatever is not asked for here, the range of its log-mels, and its singers, behind whom new ones come.
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
    acoustic = package.KIND == "acoustic"
    if not acoustic and (content is not None or speaker is not None or "loudness" in (names or {})):
        raise BadRequest(f"{name} is a vocoder, which hears the log-mel: leave out content, loudness and speaker")
    runs.check_free(Path(path))
    given = dict(SMOKE if smoke else {}) | dict(asked.fields) | dict(fields or {})
    known = {f.name for f in dataclasses.fields(Training)}
    first = runs.load(init) if init is not None else None
    roles = {"log-mel": "log-mel", "wave": "wave", "f0": "f0"}
    if first is not None and acoustic:
        roles |= {role: items[0].name for role, items in first.settings.reads.items()}
    roles |= asked.roles(store) | dict(names or {})
    mel = store.feature(roles["log-mel"])
    changed = (_begun_with(first, name) if first is not None and acoustic else {}) | _preset(package, preset)
    if smoke and not asked.model and first is None and "smoke" in getattr(package.Config, "PRESETS", {}):
        changed |= _preset(package, "smoke")
    changed |= {name: value for name, value in given.items() if name not in known}
    training = typed(Training, dict(getattr(package, "TRAINING", {})) | {
        name: value for name, value in given.items() if name in known})
    record = dataclasses.asdict(training) | _parts(store, training, split, asked, package)
    if acoustic:
        heard = hearing.Asked(asked.content if content is None else tuple(content),
                              asked.speaker if speaker is None else speaker, roles, lenient=smoke)
        return _acoustic(Path(path), store, name, heard, changed, record, first)
    config = _config(package, mel, changed)
    wanted = ["log-mel", "wave", *(["f0"] if getattr(package.Model, "needs_f0", False) else [])]
    reads = {role: (runs.Read(roles[role], store.feature(roles[role]).spec),) for role in wanted}
    _check_wave(reads["wave"][0], config)
    settings = runs.Settings(name, config, config.contract, reads, "edges", record)
    if first is not None:
        record["init"] = str(_fitting(first, settings).path.resolve())
    return runs.create(path, settings)


def _acoustic(path: Path, store: fs.Store, name: str, asked: hearing.Asked, changed: dict[str, Any],
              record: dict[str, Any], first: Run | None) -> Run:
    """The run folder of an acoustic model, with its singers and the range of its log-mels."""
    package, mel = runs.package_of(name), store.feature(asked.roles["log-mel"])
    if isinstance(changed.get("content"), str):
        changed["content"] = _read("content", changed["content"], ())
    config = _config(package, mel, hearing.fields_for(store, asked, changed))
    train = hearing.part_of(store, record, "train")
    owned = singers.by_singer(store, train, needed=config.speaker == "one-hot")
    before = first.singers if first is not None else {}
    if config.speaker == "one-hot":
        rows = singers.next_row(before) + len(owned.keys() - before.keys())
        config = dataclasses.replace(config, singers=max(config.singers, rows))
        _check_validated(store, record, owned.keys() | before.keys())
    reads = hearing.reads_of(package, config, store, asked.parts)
    if "wave" in reads:
        _check_wave(reads["wave"][0], config)
    names = {key: items[0].name for key, items in reads.items()}
    store.view(list(names.values()), like=mel.name, utterances=train)  # what is missing or stale is told here
    settings = runs.Settings(name, config, config.contract, reads, "edges", record)
    statistics = hearing.mel_statistics(store, train, mel.name)
    if first is not None:
        record["init"] = str(_fitting(first, settings).path.resolve())
        hearing.check_same(first, reads, store)
        weights = checkpoint.read(first.path / WEIGHTS)
        statistics |= {name: weights[name] for name in ("mel_low", "mel_high")}
    known = singers.described(store, owned, f0=names.get("f0"), embedding=names.get("speaker"), before=before)
    return runs.create(path, settings, statistics, known)


def _begun_with(first: Run, model: str) -> dict[str, Any]:
    """The fields of a run's Config, but for its mel contract: what a model hears that begins with its weights."""
    if first.settings.model.replace("-", "_") != model.replace("-", "_"):
        raise BadRequest(f"{first.path} is a run of {first.settings.model}, and {model} was asked for: the weights "
                         "of one are none of the other's")
    left = {f.name for f in dataclasses.fields(MelContract)} | {"f0_early_s"}  # here f0 is where it belongs
    return {name: value for name, value in dataclasses.asdict(first.settings.config).items() if name not in left}


def _fitting(first: Run, settings: runs.Settings) -> Run:
    """A run whose weights another of these settings can begin with."""
    first.check_contract(settings.contract, "the store")
    begin_with(settings.package.Model(settings.config), first)
    return first


def begin(run: Run, model: nn.Module) -> None:
    """Give the fresh model of a run what it begins with: weights of another run, the range of its log-mels."""
    start = run.settings.training.get("init")
    if start:
        begin_with(model, runs.load(start))
    if run.kind == "acoustic":
        statistics, learner = hearing.statistics_of(run.path), cast(Acoustic, model)
        learner.set_range(statistics["mel_low"], statistics["mel_high"])


def begin_with(model: nn.Module, first: Run) -> None:
    """Fill a model with the weights of a run: a student from its teacher, tables of singers with rows for new ones.

    A new row is the mean of those of the singers that are known; known ones stay as they are.

    Raises:
        CannotLoad: they do not fit; names what does not.
    """
    config: Any = model.config
    stage = getattr(first.settings.config, "stage", None)
    if stage is None or stage == config.stage:
        _fill(model, first)
        return
    if stage != "teacher":
        raise CannotLoad(f"{first.path} is a {stage} and a {config.stage} was asked for: a student begins with its "
                         "teacher")
    teacher = first.settings.package.Model(dataclasses.replace(config, stage=stage))
    _fill(teacher, first)
    cast(Any, model).learn_from(teacher)


def _fill(model: nn.Module, first: Run) -> None:
    path = first.path / WEIGHTS
    if not path.is_file():
        runs.load_weights(model, path)  # CannotLoad
    weights = checkpoint.read(path)
    for name, part in model.named_modules():
        table = f"{name}.nn.weight"
        if isinstance(part, Singer) and part.role == "singer" and table in weights:
            weights[table] = _grown(weights[table], len(part.nn.weight), len(first.singers))
    try:
        checkpoint.load_into(model, weights, path)
    except ValueError as error:
        raise CannotLoad(f"{error}. The weights of {first.path} are of another size: leave out the fields that "
                         "differ, or begin without them") from error


def _grown(table: torch.Tensor, rows: int, known: int) -> torch.Tensor:
    """A table (S, D) with rows for new singers, all behind the known ones."""
    used = table[:known or len(table)]
    fresh = max(0, rows - len(used))
    return torch.cat([used, used.mean(0, keepdim=True).expand(fresh, -1)])


def _check_validated(store: fs.Store, training: Mapping[str, Any], known: Collection[str]) -> None:
    valid = hearing.part_of(store, training, "valid")
    if valid and not any(store.utterances[key].speaker in known for key in valid):
        raise BadRequest(f"{training.get('split')}/valid has only singers that {training.get('split')}/train lacks, "
                         "and a numbered voice cannot be validated on others: split by song (featstore split --by "
                         "song) where each singer has several, leave --split out (one in twenty is held out), or take "
                         "an embedding (--speaker NAME)")


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


def _parts(store: fs.Store, training: Training, split: str | None, asked: Recipe, package: ModuleType
           ) -> dict[str, Any]:
    """What is learnt from and what is validated on: a split of the store, or keys that are held out."""
    split = split or asked.split
    if split:
        for part in ("train", "valid"):
            members(store, f"{split}/{part}", store.utterances)  # BadRequest where there is none, or nothing in it
        return {"split": split}
    if asked.held_out and all(key in store.utterances for key in asked.held_out):
        return {"held_out": list(asked.held_out)}
    return {"held_out": _held_out(store, training, spare=package.KIND == "acoustic")}


def _held_out(store: fs.Store, training: Training, spare: bool) -> list[str]:
    """Every twentieth utterance by the hash of its key, at most as many as are validated on; of a few, one.

    None where none is to be validated on. spare: the only utterance of a speaker.
    """
    ranked = sorted(store.utterances, key=lambda key: hashlib.sha256(f"{training.seed} {key}".encode()).digest())
    count = min(max(1, len(ranked) // 20), training.valid_utterances)
    if not spare:
        return ranked[:count] if len(ranked) > 1 else []
    speakers = {facts["key"]: facts.get("speaker") for facts, _ in store.utterances.facts()}
    left, chosen = Counter(speakers.values()), []
    for key in ranked if count else ():
        if left[speakers[key]] > 1:
            chosen.append(key)
            left[speakers[key]] -= 1
        if len(chosen) == count:
            break
    return chosen


def training_of(run: Run) -> Training:
    """How a run is trained."""
    known = {f.name for f in dataclasses.fields(Training)}
    return Training(**{name: value for name, value in run.settings.training.items() if name in known})
