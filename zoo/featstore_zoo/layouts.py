"""Weights from elsewhere into run folders: finding them, taking them out of what they are wrapped in, converting.

Which layout it is, is told by names and shapes of tensors (`published`). What a shape says is taken from it, what only
a configuration says (sample rate, mel, dilations) from the file beside the weights, and what neither says from `extra`.
A file is never unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.errors import BadRequest, CannotLoad
from featstore_extractors import checkpoint

from . import amphion, card, published, run
from .published import Facts, Layout, Tensors

LAYOUTS = (*published.LAYOUTS, *amphion.LAYOUTS)
WRAPPERS = ("generator", "generator_state_dict", "model", "state_dict", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.", "generator.")
FILES = ("bigvgan_generator.pt", "model.safetensors", "pytorch_model.bin", "model.ckpt", "model", "weights.pt")
PATTERNS = ("g_*", "generator*", "*.pt", "*.ckpt", "*.pth", "*.safetensors")
SETTINGS = ("config.json", "args.json", "config.yaml")
NO_GENERATOR = re.compile(r"do_|.*(discriminator|optimizer)|pytorch_model_\d+\.|model_\d+\.safetensors")
STEPS = (r"step-(\d+)", r"steps_(\d+)", r"^g_(\d+)", r"^weights-(\d+)", r"^(\d+)\.\w+$")
JSON5 = re.compile(r'("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/|,(?=\s*[\]}])', re.DOTALL)


@dataclass(frozen=True)
class Converted:
    """What was made of foreign weights. `remarks`: what a user should know of it."""

    layout: str
    model: str
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """Weights where they were found: the file, what it says beside tensors, and the settings.

    source: the file of settings; None if there is none, though the weights may bring `settings` themselves.
    """

    weights: Path
    tensors: Tensors
    settings: Mapping[str, Any]
    source: Path | None
    steps: int


def convert(path: Path, out: Path, extra: Mapping[str, str] | None = None) -> Converted:
    """Turn the weights at `path`, a file or the folder they were published in, into a run folder.

    extra: fields of the Config that the files do not say, as text; they win over what the files say.

    Raises:
        CannotLoad: no file of weights, an unsafe or damaged one, or a layout that is not known; names what was found.
        BadRequest: settings are missing or contradict the tensors.
        NotARun: `out` exists and is not empty.
    """
    found = _found(Path(path))
    layout, facts = _recognised(found)
    package = run.package_of(layout.model)
    given = dict(extra or {})
    said = {name: given.pop(name) for name in amphion.ASKS if layout.acoustic and name in given}
    config = _config(package, layout, facts, found, given)
    if layout.check:
        layout.check(facts, config)
    model = package.Model(config)
    more = _more(found, config, package, said) if layout.acoustic else None
    renamed = {name: tensor for old, tensor in facts.tensors.items() if (name := layout.rename(old)) is not None}
    if more is not None:
        _set_range(model, renamed, more)
    try:
        checkpoint.load_into(model, published.with_weight_norm(renamed, model.state_dict()), found.weights)
    except ValueError as error:
        raise CannotLoad(f"{error}. It was taken for {facts.title(layout)} weights") from error
    reads = more.reads if more is not None else _reads(config, package)
    made = run.create(out, run.Settings(layout.model, config, config.contract, reads),
                      voices=more.singers if more is not None else None)
    run.save(made.path, made.settings, model.state_dict(), found.steps)
    made = run.load(out)
    stated = _stated_licence(found.weights)
    says = [f"The README.md beside the weights says: {stated}."] if stated else []
    card.note(made, training=f"These are {facts.title(layout)} weights, {found.weights.name}. How they were trained is "
              "for those who published them to say.", licence=" ".join([*says, layout.licence_of(facts)]).strip()
              or card.PLACEHOLDER, **({"licence_id": stated} if stated else {}))
    card.write(made)
    return Converted(facts.title(layout), layout.model, _remarks(out, layout, config, stated, more))


def _more(found: Found, config: Any, package: Any, said: Mapping[str, str]) -> amphion.Beside:
    root = found.source.parent if found.source else found.weights.parent
    return amphion.beside(root, found.settings, config, package.Model.gives, said)


def _set_range(model: Any, tensors: Tensors, more: amphion.Beside) -> None:
    """The range of log-mels among the tensors, where it stands here."""
    import torch

    tensors |= {name: getattr(model, name) for name in ("mel_low", "mel_high")}
    if more.low is not None and more.high is not None:
        tensors |= {"mel_low": torch.from_numpy(more.low), "mel_high": torch.from_numpy(more.high)}


def _recognised(found: Found) -> tuple[Layout, Facts]:
    """The layout of these tensors, and what they say together with the settings. CannotLoad if none is known."""
    if refusal := (published.refusal(found.tensors, found.settings)
                   or amphion.refusal(found.tensors, found.settings)):
        raise CannotLoad(f"{found.weights}: {refusal}")
    fitting = [layout for layout in LAYOUTS if not any(layout.misfit(found.tensors))]
    if fitting:
        return fitting[0], Facts(found.tensors, found.settings, fitting[0].amphion)
    nearest = min(LAYOUTS, key=lambda layout: layout.distance(found.tensors))
    missing, unexpected = nearest.misfit(found.tensors)
    raise CannotLoad(f"{found.weights} has {len(found.tensors)} tensors of no layout that is known ("
                     f"{', '.join(layout.title for layout in LAYOUTS)}). Nearest is {nearest.title}: missing "
                     f"{_some(missing)}; unexpected {_some(unexpected)}")


def _config(package: Any, layout: Layout, facts: Facts, found: Found, extra: dict[str, str]) -> Any:
    """The model's Config. BadRequest for what contradicts and for what is missing, each by its name."""
    from .preparation import typed

    beside = found.source or "the settings in the file"
    try:
        fields = layout.build(facts)
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, CannotLoad):
            raise
        raise CannotLoad(f"{found.weights} or {beside} is not as {facts.title(layout)}: {error}") from error
    if facts.wrong:
        raise BadRequest(f"{beside} contradicts the tensors of {found.weights.name}: {'; '.join(facts.wrong)}. Is it "
                         "the configuration of these weights?")
    missing = [name for name, value in fields.items() if value is None and name not in extra]
    if missing:
        nowhere = f"{found.weights.parent} has no {layout.settings}, and the tensors do not say"
        where = f"{found.source} does not say" if found.source else nowhere
        raise BadRequest(f"{where} {', '.join(missing)}. Put the {layout.settings} that these weights were published "
                         f"with beside them, or give what is missing: --set {missing[0]}=...")
    known = {name: value for name, value in fields.items() if value is not None}
    for name, default in ((f.name, f.default) for f in dataclasses.fields(package.Config) if f.name in known):
        if not isinstance(known[name], str) and not _alike(known[name], default):
            raise BadRequest(f"{beside}: {name} is {known[name]!r}, expected something like {default!r}")
    return typed(package.Config, known | extra)


def _alike(value: Any, example: Any) -> bool:
    """Whether a value is of the kind of an example: a number, true or false, a list of such."""
    if isinstance(example, tuple):
        return isinstance(value, tuple) and (
            not example or all(any(_alike(item, one) for one in example) for item in value))
    if isinstance(example, bool) or isinstance(value, bool):
        return isinstance(example, bool) and isinstance(value, bool)
    if isinstance(example, int):
        return isinstance(value, int)
    return isinstance(value, int | float) if isinstance(example, float) else isinstance(value, type(example))


def _reads(config: Any, package: Any) -> dict[str, tuple[run.Read, ...]]:
    """What the run reads of a store: a log-mel of its contract, and f0 where it hears it."""
    from featstore import Spec
    from featstore_extractors import parse
    from featstore_extractors.signal import LogMel

    mel = Spec.of(LogMel(**vars(config.contract)))
    reads: dict[str, tuple[run.Read, ...]] = {"log-mel": (run.Read("log-mel", mel),)}
    if package.Model.needs_f0:
        reads["f0"] = (run.Read("f0", Spec.of(parse("f0")["f0"])),)
    return reads


def _remarks(out: Path, layout: Layout, config: Any, stated: str, more: amphion.Beside | None) -> tuple[str, ...]:
    use = f"mels of its contract: featstore extract CORPUS STORE -r {out}"
    if more is not None:
        use = f"use it: featstore convert SONG --to {next(iter(more.singers), 'SINGER')} --run {out} -o OUT"
    remarks = [use, *layout.remarks(config), *(more.remarks if more is not None else ())]
    if not stated:
        remarks.append("no licence stands beside the weights; what is known of the layout's is in the card")
    return tuple(remarks)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "") if listed else "nothing"


# --- finding


def _found(path: Path) -> Found:
    weights = path if path.is_file() else _file_in(path)
    try:
        outer = checkpoint.read(weights)
    except (ValueError, FileNotFoundError) as error:
        raise CannotLoad(str(error)) from error
    inside = outer.get("params")  # DiffWave brings its settings along
    source = _beside(weights)
    settings = (dict(inside) if isinstance(inside, Mapping) else {}) | (_settings(source) if source else {})
    told = next((outer[name] for name in ("step", "global_step", "steps") if isinstance(outer.get(name), int)), 0)
    return Found(weights, unwrapped(outer), settings, source, told or _steps_of(weights))


def _file_in(folder: Path) -> Path:
    """The file with the generator in a published folder. CannotLoad if there is none, or no telling which."""
    if not folder.is_dir():
        raise CannotLoad(f"{folder} does not exist")
    epochs = [epoch for home in (folder, folder / "checkpoint") for epoch in home.glob("*epoch-*_step-*")]
    if epochs:  # of accelerate, as Amphion writes them; one that is marked final is a copy of the last
        return _file_in(max(epochs, key=lambda epoch: (_steps_of(epoch), not epoch.name.startswith("final"))))
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    files = {file for pattern in PATTERNS for file in folder.glob(pattern)
             if file.is_file() and not NO_GENERATOR.match(file.name)}
    best = max((_steps_of(file) for file in files), default=0)
    latest = [file for file in files if _steps_of(file) == best]
    if len(latest) == 1:
        return latest[0]
    if latest:
        raise CannotLoad(f"{folder} has several files of weights ({_some(file.name for file in latest)}): name the one "
                         "that you mean")
    raise CannotLoad(f"{folder} has no file of weights that is known ({', '.join(FILES)}, {', '.join(PATTERNS)}, "
                     f"checkpoint/epoch-*); it has {_some(item.name for item in folder.iterdir())}. Name the file")


def _steps_of(path: Path) -> int:
    """The training steps that the name of a file or of its folder tells of; 0 if none does."""
    if match := re.search(r"(\d+)msteps", path.name):
        return int(match[1]) * 1_000_000
    for name in (path.name, path.parent.name):
        for pattern in STEPS:
            if match := re.search(pattern, name):
                return int(match[1])
    return 0


def _beside(weights: Path) -> Path | None:
    """The file of settings that belongs to weights: in their folder, or in that of Amphion's experiment."""
    return next((home / name for home in _homes(weights) for name in SETTINGS if (home / name).is_file()), None)


def _homes(weights: Path) -> list[Path]:
    """Folders in which files stand that belong to weights."""
    folder = weights.parent
    return [folder, *list(folder.parents)[:2]] if "epoch-" in folder.name else [folder]


def _settings(path: Path) -> dict[str, Any]:
    """What a file of settings says. Amphion writes JSON5: comments and commas before a bracket are passed over."""
    text = path.read_text("utf-8", "replace")
    try:
        if path.suffix == ".yaml":
            import yaml

            found = yaml.safe_load(text)
        else:
            found = json.loads(JSON5.sub(lambda match: match[1] or "", text))
    except Exception as error:  # of json and of yaml, which share no class
        raise CannotLoad(f"{path} cannot be read ({str(error).splitlines()[0]}): get it again") from error
    if not isinstance(found, dict):
        raise CannotLoad(f"{path} holds a {type(found).__name__}, expected the settings of a model")
    if "format" in found and "contract" in found:
        raise CannotLoad(f"{path.parent} is a run folder of featstore already: use it as it is")
    return found


def _stated_licence(weights: Path) -> str:
    """The licence in the front matter of a README.md, as model hubs have it; "" if none."""
    import yaml

    for home in _homes(weights):
        path = home / "README.md"
        parts = path.read_text("utf-8", "replace").split("---\n", 2) if path.is_file() else []
        if len(parts) == 3 and not parts[0].strip():
            try:
                front = yaml.safe_load(parts[1])
            except yaml.YAMLError:
                return ""
            return str(front.get("license") or "") if isinstance(front, dict) else ""
    return ""


# --- unwrapping


def unwrapped(found: Mapping[str, Any]) -> Tensors:
    """The tensors of a generator, whatever they are wrapped in, under names without the wrappers' prefixes.

    Weight norm's old names, weight_g and weight_v, become torch's present ones.
    """
    for name in WRAPPERS:
        inner = found.get(name)
        if isinstance(inner, Mapping) and _tensors(inner):
            return unwrapped(inner)
    tensors = _tensors(found) or {f"{part}.{name}": tensor for part, inner in found.items()  # as of discriminators
                                  if isinstance(inner, Mapping) for name, tensor in _tensors(inner).items()}
    for prefix in PREFIXES:
        within = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if within and (len(within) == len(tensors) or prefix == "generator."):  # beside discriminators in a training's
            return unwrapped(within)
    return {_normed(name): tensor for name, tensor in tensors.items()}


def _tensors(found: Mapping[Any, Any]) -> Tensors:
    return {str(name): value for name, value in found.items() if hasattr(value, "shape") and hasattr(value, "numel")}


def _normed(name: str) -> str:
    for old, new in ((".weight_g", published.LENGTH), (".weight_v", published.DIRECTION)):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


__all__ = ["Converted", "convert", "unwrapped"]
