"""Weights from elsewhere: published vocoders into run folders, recognised by the names and shapes of their tensors.

    HiFi-GAN      jik876's g_* files, {"generator": ...}, config.json beside them
    BigVGAN       NVIDIA's v1 and v2: bigvgan_generator.pt, g_*, config.json
    NSF-HiFiGAN   of openvpi / DiffSinger: model.ckpt or model, config.json
    Vocos         the hub folder: pytorch_model.bin, config.yaml
    DiffWave      LMNT's: {"model": ..., "params": ...}
    Amphion       its vocoders' folders: args.json, checkpoint/epoch-.../ or *.pt; MelGAN and APNet too

What a tensor's shape says is taken from it, what only a configuration says (sample rate, mel, dilations) from the file
beside the weights, and what neither says from `fields`. A file is never unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.errors import BadRequest, CannotLoad
from featstore_extractors import checkpoint
from featstore_extractors.signal import MelContract

from . import card, run

Tensors = dict[str, Any]
Settings = Mapping[str, Any]

WRAPPERS = ("generator", "generator_state_dict", "model", "state_dict", "model_state_dict")
PREFIXES = ("module.", "generator.", "_orig_mod.")
CHECKPOINTS = ("bigvgan_generator.pt", "model.safetensors", "pytorch_model.bin", "model.ckpt", "model")


@dataclass(frozen=True)
class Converted:
    """What was made of foreign weights. `remarks`: what a user should know of it."""

    layout: str
    model: str
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A way in which weights are published.

    fits: whether tensors of these names are of this layout.
    build: the fields of their model's Config, from tensors and settings.
    rename: the name of a tensor in our model; None for one that is not needed.
    """

    title: str
    model: str
    fits: Callable[[Tensors], bool]
    build: Callable[[Tensors, Settings], dict[str, Any]]
    rename: Callable[[str], str | None] = lambda name: name
    licence: str = ""


def convert(path: Path, out: Path, extra: Mapping[str, str] | None = None) -> Converted:
    """Turn the weights at `path`, a file or the folder they were published in, into a run folder.

    extra: fields of the Config that the files do not say, as text.

    Raises:
        CannotLoad: no file of weights, an unsafe or damaged one, or a layout that is not known; names what was found.
        BadRequest: settings are missing or contradict the tensors.
    """
    weights, beside = _find(Path(path))
    try:
        tensors = _unwrapped(checkpoint.read(weights))
    except (ValueError, FileNotFoundError) as error:
        raise CannotLoad(str(error)) from error
    settings = _settings(beside)
    layout = next((layout for layout in LAYOUTS if layout.fits(tensors)), None)
    if layout is None:
        raise CannotLoad(_unknown(weights, tensors))
    from .training import typed

    package = run.package_of(layout.model)
    config = typed(package.Config, layout.build(tensors, settings) | dict(extra or {}))
    renamed = {name: tensor for old, tensor in tensors.items() if (name := layout.rename(old)) is not None}
    model = package.Model(config)
    try:
        checkpoint.load_into(model, renamed, weights)
    except ValueError as error:
        raise CannotLoad(f"{error}. It was taken for {layout.title} weights") from error
    made = run.create(out, run.Settings(layout.model, config, config.contract, _reads(config, package)))
    run.save(made.path, made.settings, model.state_dict(), steps=_steps(weights))
    remarks = _remarks(beside)
    card.note(made, training=f"Trained elsewhere; these are {layout.title} weights from `{weights.name}`.",
              **({"licence": layout.licence} if layout.licence else {}))
    card.write(made)
    return Converted(layout.title, layout.model, remarks)


def _reads(config: Any, package: Any) -> dict[str, tuple[run.Read, ...]]:
    """What the run reads of a store: a log-mel of its contract, and f0 where it hears it."""
    from featstore import Spec
    from featstore_extractors import parse
    from featstore_extractors.signal import LogMel

    mel = Spec.of(LogMel(**vars(config.contract)))
    reads: dict[str, tuple[run.Read, ...]] = {"log-mel": (run.Read("log-mel", mel),)}
    if getattr(package.Model, "needs_f0", False):
        reads["f0"] = (run.Read("f0", Spec.of(parse("f0")["f0"])),)
    return reads


def _find(path: Path) -> tuple[Path, Path]:
    """The file of weights, and the folder in which settings may lie beside it."""
    if path.is_file():
        return path, path.parent
    for name in CHECKPOINTS:
        if (path / name).is_file():
            return path / name, path
    numbered = [file for pattern in ("g_*", "*.pt", "*.ckpt") for file in path.glob(pattern) if file.is_file()]
    epochs = sorted((path / "checkpoint").glob("epoch-*_step-*"), key=_step_of)
    if epochs:
        return _find(epochs[-1])[0], path
    if numbered:
        return max(numbered, key=_step_of), path
    there = ", ".join(sorted(item.name for item in path.iterdir())[:12])
    raise CannotLoad(f"{path} has no file of weights that is known ({', '.join(CHECKPOINTS)}, g_*, *.pt, *.ckpt, "
                     f"checkpoint/epoch-*); it has: {there or 'nothing'}. Name the file itself")


def _step_of(path: Path) -> int:
    numbers = re.findall(r"step-(\d+)|(\d+)", path.name)
    return int(next((a or b for a, b in numbers if a), numbers[-1][0] or numbers[-1][1])) if numbers else -1


def _steps(weights: Path) -> int:
    """The training steps that a file's name tells of."""
    return max(_step_of(weights), _step_of(weights.parent) if "step-" in weights.parent.name else -1, 0)


def _settings(folder: Path) -> dict[str, Any]:
    """What is written beside the weights: config.json, args.json or config.yaml."""
    for name in ("config.json", "args.json"):
        for home in (folder, folder.parent, folder.parent.parent):
            if (home / name).is_file():
                return _json(home / name)
    path = folder / "config.yaml"
    if path.is_file():
        import yaml

        try:
            return dict(yaml.safe_load(path.read_text("utf-8")) or {})
        except yaml.YAMLError as error:
            raise CannotLoad(f"{path} is not YAML: {error}") from error
    return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CannotLoad(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CannotLoad(f"{path} holds {type(found).__name__}, expected the settings of a model")
    return found


def _unwrapped(found: Mapping[str, Any]) -> Tensors:
    """The tensors of a generator, whatever they are wrapped in, under names without the wrappers' prefixes.

    Weight norm's old names, weight_g and weight_v, become torch's present ones.
    """
    for name in WRAPPERS:
        inner = found.get(name)
        if isinstance(inner, Mapping) and any(hasattr(value, "shape") for value in inner.values()):
            return _unwrapped(inner)
    tensors = {str(name): value for name, value in found.items() if hasattr(value, "shape")}
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name.removeprefix(prefix): value for name, value in tensors.items()})
    return {_normed(name): value for name, value in tensors.items()}


def _normed(name: str) -> str:
    for old, new in ((".weight_g", ".parametrizations.weight.original0"),
                     (".weight_v", ".parametrizations.weight.original1")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _unknown(weights: Path, tensors: Tensors) -> str:
    names = sorted(tensors)
    known = ", ".join(layout.title for layout in LAYOUTS)
    return (f"{weights} has {len(names)} tensors of no layout that is known ({known}), such as "
            f"{', '.join(names[:8]) or 'none'}")


# --- from tensors and settings to the fields of a Config


def _shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    """The shape of a weight, with weight norm or without. BadRequest if it is not there."""
    for suffix in (".parametrizations.weight.original1", ".weight"):
        if name + suffix in tensors:
            return tuple(tensors[name + suffix].shape)
    raise BadRequest(f"the weights have no {name}.weight")


def _count(tensors: Tensors, pattern: str) -> int:
    """How many numbers `pattern` matches among the names, where they are 0, 1, 2, ..."""
    found = {int(match[1]) for name in tensors if (match := re.match(pattern, name))}
    return max(found, default=-1) + 1


def _has(tensors: Tensors, name: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for key in tensors)


def _first(settings: Settings, *names: str) -> Any:
    """The first of several names that a setting may have. BadRequest where none is there."""
    for name in names:
        if settings.get(name) is not None:
            return settings[name]
    raise BadRequest(f"the settings beside the weights do not say {names[0]}: keep config.json (or args.json) beside "
                     "them")


def contract_of(settings: Settings) -> dict[str, Any]:
    """The mel contract of HiFi-GAN's family: magnitudes, Slaney's scale and areas, natural log of at least 1e-5."""
    rate = int(_first(settings, "sampling_rate", "sample_rate"))
    top = settings.get("fmax", settings.get("mel_fmax"))
    return {"sample_rate": rate, "n_fft": int(_first(settings, "n_fft", "fft_size")),
            "win_length": int(_first(settings, "win_size", "win_length")),
            "hop_length": int(_first(settings, "hop_size", "hop_length")),
            "n_mels": int(_first(settings, "num_mels", "n_mel", "n_mels")),
            "fmin": float(settings.get("fmin", settings.get("mel_fmin", 0)) or 0),
            "fmax": float(top) if top else rate / 2}


def _hifi(tensors: Tensors, settings: Settings) -> dict[str, Any]:
    """What HiFi-GAN, NSF-HiFiGAN and BigVGAN have in common."""
    steps = _count(tensors, r"ups\.(\d+)\.")
    up = "ups.{}.0" if _has(tensors, "ups.0.0") else "ups.{}"
    kernels = tuple(_shape(tensors, up.format(i))[2] for i in range(steps))
    dilations = _first(settings, "resblock_dilation_sizes")
    return {"upsample_rates": tuple(_first(settings, "upsample_rates")), "upsample_kernels": kernels,
            "channels": _shape(tensors, "conv_pre")[0],
            "block_kernels": tuple(_first(settings, "resblock_kernel_sizes")),
            "block_dilations": tuple(tuple(row) for row in dilations)}


def _flat(settings: Settings, model: str) -> dict[str, Any]:
    """Amphion's nested settings, preprocess and model, as the flat ones of the others."""
    if "preprocess" not in settings:
        return dict(settings)
    found = dict(settings["preprocess"])
    return found | dict(settings.get("model", {}).get(model, {}))


def _hifigan(tensors: Tensors, settings: Settings) -> dict[str, Any]:
    flat = _flat(settings, "hifigan")
    return contract_of(flat) | _hifi(tensors, flat) | {"resblock": 1 if _has(tensors, "resblocks.0.convs1") else 2}


def _nsf(tensors: Tensors, settings: Settings) -> dict[str, Any]:
    flat = _flat(settings, "nsfhifigan")
    found = contract_of(flat) | _hifi(tensors, flat)
    found["harmonics"] = _shape(tensors, "m_source.l_linear")[1] - 1
    return found | ({"amphion_defect": True} if "preprocess" in settings else {})


def _bigvgan(tensors: Tensors, settings: Settings) -> dict[str, Any]:
    flat = _flat(settings, "bigvgan")
    found = contract_of(flat) | _hifi(tensors, flat)
    found["activation"] = "snakebeta" if any(name.endswith("beta") for name in tensors) else "snake"
    found["log_scale"] = bool(flat.get("snake_logscale", True))
    found["tanh"] = bool(flat.get("use_tanh_at_final", True))
    return found | {"final_bias": "conv_post.bias" in tensors}


def _bigvgan_name(name: str) -> str | None:
    if "upsample.filter" in name or "downsample.lowpass.filter" in name:
        return None  # constants
    return re.sub(r"^ups\.(\d+)\.0\.", r"ups.\1.", name).replace(".act.", ".")


def _melgan(tensors: Tensors, settings: Settings) -> dict[str, Any]:
    flat = _flat(settings, "melgan")
    blocks = int(_first(flat, "n_residual_layers"))
    return contract_of(flat) | {"upsample_rates": tuple(_first(flat, "ratios")), "channels": int(_first(flat, "ngf")),
                                "residual_layers": blocks}


def _apnet(tensors: Tensors, settings: Settings) -> dict[str, Any]:
    flat = _flat(settings, "apnet")
    kernel = _shape(tensors, "ASP_input_conv")
    dilations = _first(flat, "ASP_resblock_dilation_sizes")
    return contract_of(flat) | {"channels": kernel[0], "kernel": kernel[2],
                                "block_kernels": tuple(_first(flat, "ASP_resblock_kernel_sizes")),
                                "block_dilations": tuple(tuple(row) for row in dilations)}


def _apnet_name(name: str) -> str:
    for old, stream in (("ASP", "amplitude"), ("PSP", "phase")):
        name = name.replace(f"{old}_input_conv", f"{stream}.input").replace(f"{old}_ResNet", f"{stream}.blocks")
    return (name.replace("ASP_output_conv", "amplitude.outputs.0").replace("PSP_output_R_conv", "phase.outputs.0")
            .replace("PSP_output_I_conv", "phase.outputs.1"))


def _vocos(tensors: Tensors, settings: Settings) -> dict[str, Any]:
    """Vocos' own log-mel: torchaudio's magnitudes on the HTK scale, at least 1e-7, frames centred on their hop."""
    mel = _arguments(settings, "feature_extractor")
    rate, n_fft = int(mel.get("sample_rate", 24000)), int(mel.get("n_fft", 1024))
    backbone = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    embed = _shape(backbone, "embed")
    padding = "centre" if mel.get("padding", "center") == "center" else "frames"
    return {"sample_rate": rate, "n_fft": n_fft, "win_length": n_fft, "hop_length": int(mel.get("hop_length", 256)),
            "n_mels": embed[1], "fmin": 0.0, "fmax": rate / 2, "mel_scale": "htk", "norm": "none", "eps": 0.0,
            "floor": 1e-7, "padding": padding, "dim": embed[0], "kernel": embed[2],
            "hidden": _shape(backbone, "convnext.0.pwconv1")[0], "layers": _count(backbone, r"convnext\.(\d+)\.")}


def _arguments(settings: Settings, part: str) -> Settings:
    """The arguments of a part of Vocos' config.yaml; MelSpectrogramFeatures is the only kind that is served."""
    found = settings.get(part, {})
    if not isinstance(found, Mapping) or "Encodec" in str(found.get("class_path", "")):
        raise CannotLoad("these Vocos weights are made for EnCodec's tokens, not for log-mels: they have no contract")
    return dict(found.get("init_args", {}))


def _vocos_name(name: str) -> str | None:
    if name.startswith("feature_extractor.") or name.endswith("istft.window"):
        return None  # constants
    return name.removeprefix("backbone.").removeprefix("head.")


def _diffwave(tensors: Tensors, settings: Settings) -> dict[str, Any]:
    flat = _flat(settings, "diffwave")
    if not flat:
        raise CannotLoad("these DiffWave weights say nothing of their log-mel: LMNT's are made for one in decibels of "
                         "another scale, which no mel contract here can say; Amphion's have an args.json beside them")
    channels = _shape(tensors, "input_projection")[0]
    cycle = int(flat.get("dilation_cycle_length", 10))
    betas = flat.get("noise_schedule_factors", [1e-4, 0.05, 50])
    return contract_of(flat) | {"channels": channels, "layers": _count(tensors, r"residual_layers\.(\d+)\."),
                                "dilation_cycle": cycle, "first_beta": float(betas[0]), "last_beta": float(betas[1]),
                                "steps": int(betas[2]), "clamp": "xt"}


LAYOUTS: tuple[Layout, ...] = (
    Layout("BigVGAN", "bigvgan", lambda t: _has(t, "conv_pre") and _has(t, "ups.0.0"), _bigvgan, _bigvgan_name),
    Layout("Vocos", "vocos", lambda t: _has(t, "backbone.convnext.0") and _has(t, "head.out"), _vocos, _vocos_name),
    Layout("DiffWave", "diffwave", lambda t: _has(t, "diffusion_embedding.projection1"), _diffwave),
    Layout("MelGAN", "melgan", lambda t: _has(t, "model.1") and any(".shortcut." in name for name in t), _melgan),
    Layout("APNet", "apnet", lambda t: _has(t, "ASP_input_conv"), _apnet, _apnet_name),
    Layout("NSF-HiFiGAN", "nsf_hifigan", lambda t: _has(t, "m_source.l_linear") and _has(t, "noise_convs.0"), _nsf),
    Layout("HiFi-GAN", "hifigan", lambda t: _has(t, "conv_pre") and _has(t, "ups.0") and not _has(t, "ups.0.0"),
           _hifigan),
)


def _remarks(beside: Path) -> tuple[str, ...]:
    return (f"its mel contract was read from {beside}; check that it is the one of your log-mels",)


__all__ = ["LAYOUTS", "Converted", "Layout", "MelContract", "contract_of", "convert"]
