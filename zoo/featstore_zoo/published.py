"""The layouts in which vocoders are published: how each is recognised, and what its tensors and settings say.

    HiFi-GAN      of its authors (jik876): g_*, config.json
    NSF-HiFiGAN   of openvpi / DiffSinger: model.ckpt, config.json
    BigVGAN       of NVIDIA, v1 and v2: bigvgan_generator.pt, g_*, config.json
    Vocos         the folder on the hub: pytorch_model.bin, config.yaml
    DiffWave      of LMNT: weights.pt, which brings its settings
    Amphion       each of them but Vocos, MelGAN and APNet: args.json and checkpoint/epoch-.../ or *.pt

A layout is the names that its tensors have, and a `build` that gives the fields of our Config, None for what nothing
says. What both a tensor and a setting say has to agree; `Facts.wrong` collects what does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from featstore.errors import CannotLoad
from featstore_extractors.signal import mel_filters

Tensors = dict[str, Any]
Fields = dict[str, Any]

LENGTH, DIRECTION = ".parametrizations.weight.original0", ".parametrizations.weight.original1"  # of weight norm
PART = r"(\.weight|\.bias|\.parametrizations\.weight\.original[01])"
BLOCKS = r"\d+\.convs[12]?\.\d+"
MIT_CODE = "These weights bring no licence of their own; the authors publish theirs beside code under the MIT licence."


class Facts:
    """What tensors say of a model, and the settings beside them; `wrong` names the settings that contradict."""

    def __init__(self, tensors: Tensors, settings: Mapping[str, Any], amphion: str = "") -> None:
        self.tensors, self.given = tensors, settings
        self.amphion = isinstance(settings.get("preprocess"), Mapping)
        self.settings = _flat(settings, amphion) if self.amphion else dict(settings)
        self.wrong: list[str] = []

    def title(self, layout: Layout) -> str:
        return f"{'Amphion' if self.amphion else layout.of} {layout.title}"

    def part(self, name: str) -> Facts:
        """The same tensors with the settings of one part alone: `name: {init_args: ...}`, as lightning's CLI has it."""
        found = self.settings.get(name)
        inner = found.get("init_args", {}) if isinstance(found, Mapping) else {}
        part = Facts(self.tensors, inner or {})
        part.wrong = self.wrong
        return part

    def said(self, *names: str) -> Any:
        """The setting of the first of these names that is there and not null; None if there is none."""
        return next((self.settings[name] for name in names if self.settings.get(name) is not None), None)

    def both(self, found: Any, *names: str) -> Any:
        """What the tensors say, `found`; a setting of one of these names has to say so too."""
        said = self.said(*names)
        if said is not None and str(_tuples(said)) != str(found):
            name = next(name for name in names if self.settings.get(name) is not None)
            self.wrong.append(f"{name} is {_text(said)}, the tensors say {_text(found)}")
        return found

    def has(self, module: str) -> bool:
        return any(name.startswith(f"{module}.") for name in self.tensors)

    def shape(self, module: str) -> tuple[int, ...]:
        """The shape of a module's weight, with weight norm or without. CannotLoad if it is not there."""
        for suffix in (DIRECTION, ".weight"):
            if module + suffix in self.tensors:
                return tuple(self.tensors[module + suffix].shape)
        raise CannotLoad(f"the weights have no {module}.weight: the file is not whole, get it again")

    def count(self, pattern: str) -> int:
        """How many numbers `pattern` matches among the names, where they are 0, 1, 2, ..."""
        return max((int(match[1]) for name in self.tensors if (match := re.match(pattern, name))), default=-1) + 1


@dataclass(frozen=True)
class Layout:
    """A way in which weights are published.

    of: who publishes. settings: the file that says what tensors do not.
    needs: modules without which it is not of this layout. names: pattern of all names of tensors.
    build: the fields of our model's Config, None for what is not said.
    rename: the name of a tensor in our model; None for one that is a constant there.
    amphion: its name in Amphion's settings.
    check: raises CannotLoad where constants among the tensors are not ours.
    acoustic: an acoustic model, beside whose weights more stands (`amphion.beside`); otherwise a vocoder.
    """

    title: str
    of: str
    model: str
    settings: str
    needs: tuple[str, ...]
    names: str
    build: Callable[[Facts], Fields]
    licence: str
    rename: Callable[[str], str | None] = lambda name: name
    amphion: str = ""
    check: Callable[[Facts, Any], None] | None = None
    remarks: Callable[[Any], tuple[str, ...]] = field(default=lambda config: ())
    acoustic: bool = False

    def misfit(self, tensors: Tensors) -> tuple[list[str], list[str]]:
        """What is missing, and what is there that this layout does not have."""
        missing = [need for need in self.needs if not any(name.startswith(f"{need}.") for name in tensors)]
        return missing, [name for name in tensors if not re.fullmatch(self.names, name)]

    def distance(self, tensors: Tensors) -> float:
        """How far tensors are from this layout: the shares of what is missing and of what is unexpected."""
        missing, unexpected = self.misfit(tensors)
        return len(missing) / len(self.needs) + len(unexpected) / max(1, len(tensors))

    def licence_of(self, facts: Facts) -> str:
        """What is known of the licence of weights that are published in this layout; "" if nothing is."""
        return AMPHION_LICENCE if facts.amphion and not self.acoustic else self.licence


def refusal(tensors: Tensors, settings: Mapping[str, Any]) -> str:
    """Why weights of a kind that we know are not taken; "" for all others."""
    facts = Facts(tensors, settings)
    if not tensors:
        return "it holds no tensors"
    if all(re.match(r"(\w+\.)?(discriminators|discriminator|mpd|msd|mrd|cqtd|ms\w+d)\.", name) for name in tensors):
        return ("it holds discriminators, which only training needs. The generator is in another file: g_* for do_*, "
                "pytorch_model.bin for pytorch_model_1.bin, bigvgan_generator.pt")
    if facts.has("source_conv") or settings.get("mini_nsf"):
        return ("it is a PC-NSF-HiFiGAN (mini_nsf: one sine, added after the second step up), which is not built here. "
                "Take an NSF-HiFiGAN of openvpi from before 2025, such as nsf_hifigan_44.1k_hop512_128bin_2024.02")
    sigma = settings.get("noise_sigma") or 0
    if sigma != 0:
        return f"noise_sigma is {sigma}: a network that hears noise beside its mel is not built here"
    if facts.has("backbone.norm.scale") or any("codebook_weights" in name for name in tensors):
        return "it is a Vocos of EnCodec's tokens, not of log-mels: it has no mel contract"
    if facts.has("diffusion_embedding") and not facts.has("spectrogram_upsampler"):
        return "it is an unconditional DiffWave, which hears no mel: it is not a vocoder"
    if facts.has("resblocks.0.convs") and (facts.has("m_source") or facts.has("resblocks.0.activations")):
        return "resblock is 2, which is built here for HiFi-GAN alone, not for NSF-HiFiGAN and BigVGAN"
    if facts.has("conv_post") and (outputs := facts.shape("conv_post")[0]) != 1:
        return f"conv_post has {outputs} outputs instead of 1, as in iSTFTNet and multi-band networks: not built here"
    numbered = all(name.startswith(("0.", "1.")) for name in tensors)  # an acoustic model, which gives them back
    if facts.amphion and facts.said("use_min_max_norm_mel") and not numbered and not facts.has("condition_encoder"):
        return "use_min_max_norm_mel: it hears mels scaled by the statistics of a data set, which no contract can say"
    return ""


def with_weight_norm(tensors: Tensors, wanted: Mapping[str, Any]) -> Tensors:
    """The tensors, and where the network has weight norm and they the plain weight, that in its two parts."""
    import torch

    found = dict(tensors)
    for name in (name.removesuffix(LENGTH) for name in wanted if name.endswith(LENGTH)):
        plain = found.get(f"{name}.weight")
        if plain is not None and name + LENGTH not in found:
            del found[f"{name}.weight"]
            length = torch.norm_except_dim(plain.float(), 2, 0)
            found |= {name + LENGTH: length, name + DIRECTION: torch.where(length > 0, plain.float(), 1.0)}
    return found


def _flat(settings: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Amphion's settings of preprocessing and of one model, side by side."""
    models = settings.get("model")
    inner = models.get(model) if isinstance(models, Mapping) else None
    return dict(settings["preprocess"]) | (dict(inner) if isinstance(inner, Mapping) else {})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    return re.sub(r",\)", ")", str(_tuples(value))).replace("(", "[").replace(")", "]")


def _each(value: Any, count: int, name: str, facts: Facts) -> Any:
    """A list of the settings that the tensors say the length of."""
    if value is not None and len(value) != count:
        facts.wrong.append(f"{name} has {len(value)} entries ({_text(value)}), the tensors {count}")
    return _tuples(value)


# --- what each says


def contract(facts: Facts, n_mels: int) -> Fields:
    """The mel contract of HiFi-GAN's family: magnitudes, Slaney's scale and areas, natural log of at least 1e-5.

    Their codes agree on it down to the padding; those of openvpi since 2024 lack the 1e-9 under the root, which moves a
    mel by less than its floor.
    """
    rate = facts.said("sampling_rate", "sample_rate")
    fmin, fmax = facts.said("fmin", "mel_fmin"), facts.said("fmax", "mel_fmax")
    if fmax is None and rate and {"fmax", "mel_fmax"} & facts.settings.keys():
        fmax = rate / 2  # null: up to the highest
    if fmin is None and {"fmin", "mel_fmin"} & facts.settings.keys():
        fmin = 0.0
    return {"sample_rate": rate, "n_fft": facts.said("n_fft", "fft_size"),
            "win_length": facts.said("win_size", "win_length"), "hop_length": facts.said("hop_size", "hop_length"),
            "n_mels": facts.both(n_mels, "num_mels", "n_mel", "n_mels"), "fmin": fmin, "fmax": fmax}


def _upsampling(facts: Facts, up: str = "ups.{}") -> Fields:
    """What HiFi-GAN, NSF-HiFiGAN and BigVGAN have in common."""
    stages = facts.count(r"ups\.(\d+)\.")
    blocks = facts.count(r"resblocks\.(\d+)\.") // stages
    convs = "convs1" if facts.has("resblocks.0.convs1") else "convs"
    depths = [facts.count(rf"resblocks\.{block}\.{convs}\.(\d+)\.") for block in range(blocks)]
    dilations = _each(facts.said("resblock_dilation_sizes"), blocks, "resblock_dilation_sizes", facts)
    if dilations and len(dilations) == blocks:
        for row, depth in zip(dilations, depths, strict=True):
            _each(row, depth, "a row of resblock_dilation_sizes", facts)
    kernels = tuple(facts.shape(up.format(stage))[2] for stage in range(stages))
    widths = tuple(facts.shape(f"resblocks.{block}.{convs}.0")[2] for block in range(blocks))
    channels, n_mels, _ = facts.shape("conv_pre")
    facts.both(2 if convs == "convs" else 1, "resblock")
    return contract(facts, n_mels) | {
        "upsample_rates": _each(facts.said("upsample_rates"), stages, "upsample_rates", facts),
        "upsample_kernels": facts.both(kernels, "upsample_kernel_sizes"),
        "channels": facts.both(channels, "upsample_initial_channel"),
        "block_kernels": facts.both(widths, "resblock_kernel_sizes"), "block_dilations": dilations}


def _hifigan(facts: Facts) -> Fields:
    return _upsampling(facts) | {"resblock": 2 if facts.has("resblocks.0.convs") else 1}


def _nsf(facts: Facts) -> Fields:
    harmonics = facts.both(facts.shape("m_source.l_linear")[1] - 1, "harmonic_num")
    return _upsampling(facts) | {"harmonics": harmonics} | ({"amphion_defect": True} if facts.amphion else {})


def _nsf_remarks(config: Any) -> tuple[str, ...]:
    if not config.amphion_defect:
        return ()
    return ("amphion_defect is set: Amphion's code never adds the source to the signal, so these weights do not hear "
            "f0 (--set amphion_defect=false gives another sound than the one they learnt)",)


def _bigvgan(facts: Facts) -> Fields:
    found = _upsampling(facts, "ups.{}.0")
    beta = any(name.endswith(".beta") for name in facts.tensors)
    bias = facts.both("conv_post.bias" in facts.tensors, "use_bias_at_final")
    log_scale, tanh = facts.said("snake_logscale"), facts.said("use_tanh_at_final")
    if tanh is None and facts.settings:
        tanh = True  # settings from before there was a choice
    return found | {"activation": facts.both("snakebeta" if beta else "snake", "activation"), "log_scale": log_scale,
                    "tanh": tanh, "final_bias": bias}


def _bigvgan_name(name: str) -> str | None:
    if name.endswith(".filter"):
        return None
    return re.sub(r"^ups\.(\d+)\.0\.", r"ups.\1.", name).replace(".act.", ".")


def _bigvgan_check(facts: Facts, config: Any) -> None:
    """That the low-pass filters, which are constants in the file, are those that we compute."""
    import torch

    from .bigvgan.model import TAPS, low_pass

    ours = torch.tensor(low_pass(0.5 / 2, 0.6 / 2, TAPS))
    other = [name for name, tensor in facts.tensors.items() if name.endswith(".filter")
             and (tensor.numel() != TAPS or (tensor.flatten() - ours).abs().max() > 1e-4)]
    if other:
        raise CannotLoad(f"{other[0]} and {len(other) - 1} more are other low-pass filters than BigVGAN's: a network "
                         "with filters of its own is not built here")


def _melgan(facts: Facts) -> Fields:
    modules = sorted({int(match[1]) for name in facts.tensors if (match := re.fullmatch(rf"model\.(\d+){PART}", name))})
    first, *ups, last = modules
    rates = tuple(facts.shape(f"model.{up}")[2] // 2 for up in ups)
    layers = len({name.split(".")[1] for name in facts.tensors if ".shortcut." in name}) // max(1, len(ups))
    return contract(facts, facts.shape(f"model.{first}")[1]) | {
        "upsample_rates": facts.both(rates, "ratios"),
        "channels": facts.both(facts.shape(f"model.{last}")[1], "ngf"),
        "residual_layers": facts.both(layers, "n_residual_layers")}


def _apnet(facts: Facts) -> Fields:
    """Amplitude and phase may have other sizes in Amphion's settings; here they have the same."""
    channels, n_mels, kernel = facts.shape("ASP_input_conv")
    blocks = facts.count(r"ASP_ResNet\.(\d+)\.")
    kernels = tuple(facts.shape(f"ASP_ResNet.{block}.convs1.0")[2] for block in range(blocks))
    for stream in ("ASP", "PSP"):
        facts.both(channels, f"{stream}_channel")
        facts.both(kernels, f"{stream}_resblock_kernel_sizes")
    for name in ("ASP_input_conv", "PSP_input_conv", "ASP_output_conv", "PSP_output_R_conv", "PSP_output_I_conv"):
        facts.both(kernel, f"{name}_kernel_size")
    dilations = _each(facts.said("ASP_resblock_dilation_sizes"), blocks, "ASP_resblock_dilation_sizes", facts)
    if _tuples(facts.said("PSP_resblock_dilation_sizes")) != dilations:
        facts.wrong.append("PSP_resblock_dilation_sizes are not ASP_resblock_dilation_sizes, which is not built here")
    n_fft = facts.both(2 * (facts.shape("ASP_output_conv")[0] - 1), "n_fft")
    return contract(facts, n_mels) | {"n_fft": n_fft, "channels": channels, "kernel": kernel, "block_kernels": kernels,
                                      "block_dilations": dilations}


def _apnet_name(name: str) -> str:
    for old, stream in (("ASP", "amplitude"), ("PSP", "phase")):
        name = name.replace(f"{old}_input_conv", f"{stream}.input").replace(f"{old}_ResNet", f"{stream}.blocks")
    return (name.replace("ASP_output_conv", "amplitude.outputs.0").replace("PSP_output_R_conv", "phase.outputs.0")
            .replace("PSP_output_I_conv", "phase.outputs.1"))


def generator_name(name: str) -> str | None:
    """The name of a tensor of any of Amphion's generators, which share none that means another in another."""
    found = _bigvgan_name(name)
    return None if found is None else _apnet_name(found)


def _vocos(facts: Facts) -> Fields:
    """Vocos' own log-mel: torchaudio's magnitudes on the HTK scale, at least 1e-7, frames centred on their hop."""
    for part, served in (("feature_extractor", "MelSpectrogramFeatures"), ("backbone", "VocosBackbone"),
                         ("head", "ISTFTHead")):
        kind = str((facts.settings.get(part) or {}).get("class_path", served)).rpartition(".")[2]
        if kind != served:
            facts.wrong.append(f"{part} is {kind}; {served} alone is built here")
    mel, backbone, head = facts.part("feature_extractor"), facts.part("backbone"), facts.part("head")
    rate = hop = padding = None
    n_fft = mel.both(facts.shape("head.out")[0] - 2, "n_fft")
    if "feature_extractor" in facts.settings:  # what it leaves out is as in the authors' code
        rate, hop = mel.said("sample_rate") or 24000, mel.said("hop_length") or 256
        padding = "frames" if mel.said("padding") == "same" else "centre"
        head.both(hop, "hop_length")
    dim, n_mels, _ = facts.shape("backbone.embed")
    return {"sample_rate": rate, "n_fft": n_fft, "win_length": mel.said("win_length") or n_fft, "hop_length": hop,
            "n_mels": backbone.both(mel.both(n_mels, "n_mels"), "input_channels"),
            "fmin": float(mel.said("f_min") or 0),
            "fmax": float(mel.said("f_max") or rate // 2) if rate else None,
            "mel_scale": mel.said("mel_scale") or "htk", "norm": mel.said("norm") or "none", "eps": 0.0,
            "floor": 1e-7, "padding": padding, "dim": backbone.both(dim, "dim"),
            "kernel": facts.shape("backbone.convnext.0.dwconv")[2],
            "hidden": backbone.both(facts.shape("backbone.convnext.0.pwconv1")[0], "intermediate_dim"),
            "layers": backbone.both(facts.count(r"backbone\.convnext\.(\d+)\."), "num_layers")}


def _vocos_name(name: str) -> str | None:
    if name.startswith("feature_extractor.") or name == "head.istft.window":
        return None
    return name.removeprefix("backbone.").removeprefix("head.")


def _vocos_check(facts: Facts, config: Any) -> None:
    """That the mel filters, which are constants in the file, are those of the contract."""
    import torch

    filters = facts.tensors.get("feature_extractor.mel_spec.mel_scale.fb")
    if filters is None:
        return
    ours = torch.tensor(mel_filters(config)).T  # (bins, n_mels)
    if filters.shape != ours.shape or (filters - ours).abs().max() > 1e-2 * ours.max():  # theirs are made in float32
        raise CannotLoad("feature_extractor.mel_spec.mel_scale.fb are not the filters of mel_scale="
                         f"{config.mel_scale}, norm={config.norm}, fmin={config.fmin:g}, fmax={config.fmax:g}: say of "
                         "which they are (--set mel_scale=slaney, and so on)")


def _diffwave(facts: Facts) -> Fields:
    channels = facts.both(facts.shape("input_projection")[0], "residual_channels")
    rates = tuple(facts.shape(f"spectrogram_upsampler.conv{i}")[3] // 2 for i in (1, 2))
    layers = facts.both(facts.count(r"residual_layers\.(\d+)\."), "residual_layers")
    n_mels = facts.shape("residual_layers.0.conditioner_projection")[1]
    betas = facts.said("noise_schedule_factors") or _linear(facts)
    first, last, steps = betas or (None, None, None)
    fast = facts.said("inference_noise_schedule")
    found = {"channels": channels, "layers": layers, "dilation_cycle": facts.said("dilation_cycle_length"),
             "mel_rates": facts.both(rates, "upsample_factors"), "first_beta": first, "last_beta": last,
             "noise_steps": steps, "clamp": "xt"} | ({"fast_betas": _tuples(fast)} if fast else {})
    return found | (contract(facts, n_mels) if facts.amphion else _decibels(facts, n_mels))


def _linear(facts: Facts) -> tuple[float, float, int] | None:
    """Beginning, end and length of LMNT's noise_schedule, which has to be a straight line."""
    betas = facts.said("noise_schedule")
    if not betas:
        return None
    line = [betas[0] + (betas[-1] - betas[0]) * i / max(1, len(betas) - 1) for i in range(len(betas))]
    if max(abs(a - b) for a, b in zip(betas, line, strict=True)) > 1e-6:
        facts.wrong.append("noise_schedule is no straight line, which alone is built here")
    return betas[0], betas[-1], len(betas)


def _decibels(facts: Facts, n_mels: int) -> Fields:
    """LMNT's log-mel, but for scale and ceiling, which are its network's own (`mel_input`): lg of HTK magnitudes.

    Its decibels are of magnitudes normalised by the window, and 0 below -80: that is the floor of the contract.
    """
    from .diffwave.model import hann_norm

    rate, hop = facts.said("sample_rate"), facts.said("hop_samples")
    window = 4 * hop if hop else None
    return {"sample_rate": rate, "n_fft": facts.said("n_fft"), "win_length": window, "hop_length": hop,
            "n_mels": facts.both(n_mels, "n_mels"), "fmin": 20.0, "fmax": rate / 2 if rate else None,
            "mel_scale": "htk", "norm": "none", "eps": 0.0, "log_base": "10", "padding": "centre",
            "floor": 1e-4 * hann_norm(window) if window else None, "mel_input": "decibels"}


AMPHION_LICENCE = ("Weights that Amphion publishes on the hub (amphion/BigVGAN_singing_bigdata, "
                   "hifigan_speech_bigdata, diffwave) are under the MIT licence; of others, ask who trained them.")

LAYOUTS: tuple[Layout, ...] = (
    Layout("HiFi-GAN", "jik876's", "hifigan", "config.json", ("conv_pre", "ups.0", "resblocks.0", "conv_post"),
           rf"(conv_pre|conv_post|ups\.\d+|resblocks\.{BLOCKS}){PART}", _hifigan, MIT_CODE, amphion="hifigan"),
    Layout("NSF-HiFiGAN", "openvpi's", "nsf_hifigan", "config.json",
           ("conv_pre", "ups.0", "resblocks.0", "conv_post", "m_source.l_linear", "noise_convs.0"),
           rf"(conv_pre|conv_post|ups\.\d+|noise_convs\.\d+|m_source\.l_linear|resblocks\.{BLOCKS}){PART}", _nsf,
           "Weights of the DiffSinger Community Vocoder Project are under CC BY-NC-SA 4.0 (NOTICE.txt beside them): "
           "not for commercial use, and what is made of them is to be shared alike. Of others, ask who trained them.",
           amphion="nsfhifigan", remarks=_nsf_remarks),
    Layout("BigVGAN", "NVIDIA's", "bigvgan", "config.json",
           ("conv_pre", "ups.0.0", "resblocks.0.activations", "activation_post", "conv_post"),
           rf"(conv_pre|conv_post|ups\.\d+\.0|resblocks\.{BLOCKS}){PART}|(resblocks\.\d+\.activations\.\d+|"
           r"activation_post)\.(act\.(alpha|beta)|upsample\.filter|downsample\.lowpass\.filter)", _bigvgan,
           "Weights that NVIDIA publishes (nvidia/bigvgan_*) are under the MIT licence; of others, ask who trained "
           "them.", _bigvgan_name, "bigvgan", _bigvgan_check),
    Layout("Vocos", "gemelo-ai's", "vocos", "config.yaml",
           ("backbone.embed", "backbone.norm", "backbone.convnext.0", "backbone.final_layer_norm", "head.out"),
           r"backbone\.(embed|norm|final_layer_norm|convnext\.\d+\.(dwconv|norm|pwconv1|pwconv2))\.(weight|bias)|"
           r"backbone\.convnext\.\d+\.gamma|head\.out\.(weight|bias)|head\.istft\.window|"
           r"feature_extractor\.mel_spec\.(spectrogram\.window|mel_scale\.fb)", _vocos,
           "Weights that their author publishes (charactr/vocos-mel-24khz) are under the MIT licence; of others, "
           "ask who trained them.", _vocos_name, check=_vocos_check),
    Layout("DiffWave", "LMNT's", "diffwave", "params in the file (of Amphion: args.json)",
           ("input_projection", "diffusion_embedding", "spectrogram_upsampler", "residual_layers.0", "skip_projection",
            "output_projection"),
           r"(input_projection|skip_projection|output_projection|diffusion_embedding\.projection[12]|"
           r"spectrogram_upsampler\.conv[12]|residual_layers\.\d+\.(dilated_conv|diffusion_projection|"
           r"conditioner_projection|output_projection))\.(weight|bias)", _diffwave,
           "These weights bring no licence of their own; LMNT publishes theirs beside code under the Apache licence "
           "2.0.", amphion="diffwave"),
    Layout("MelGAN", "", "melgan", "args.json", ("model.1", "model.3", "model.4.shortcut", "model.4.block"),
           rf"model\.\d+(\.block\.\d+|\.shortcut)?{PART}", _melgan, "", amphion="melgan"),
    Layout("APNet", "", "apnet", "args.json",
           ("ASP_input_conv", "PSP_input_conv", "ASP_ResNet.0", "PSP_ResNet.0", "ASP_output_conv", "PSP_output_R_conv",
            "PSP_output_I_conv"),
           rf"([AP]SP_ResNet\.{BLOCKS}|[AP]SP_input_conv|ASP_output_conv|PSP_output_[RI]_conv){PART}", _apnet, "",
           _apnet_name, "apnet"),
)

