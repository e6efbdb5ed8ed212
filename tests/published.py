"""Vocoders in the folders that their authors publish: names, wrappers and settings of each, from a model of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featstore_extractors.signal import mel_filters
from featstore_zoo.bigvgan.model import TAPS, low_pass

AMPHION = {"hifigan": "hifigan", "nsf_hifigan": "nsfhifigan", "bigvgan": "bigvgan", "melgan": "melgan",
           "apnet": "apnet", "diffwave": "diffwave"}


def old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weight norm as torch had it before 2.1."""
    return {name.replace("parametrizations.weight.original0", "weight_g")
            .replace("parametrizations.weight.original1", "weight_v"): tensor for name, tensor in tensors.items()}


def theirs(name: str, model: Any) -> dict[str, Tensor]:
    """The tensors of a model under the names of its authors, with weight norm in torch's present words."""
    found: dict[str, Tensor] = {}
    for ours, tensor in model.state_dict().items():
        found[_their_name(name, ours)] = tensor.clone()
    if name == "bigvgan":
        taps = torch.tensor(low_pass(0.25, 0.3, TAPS), dtype=torch.float32)[None, None]
        for alpha in [key for key in found if key.endswith("act.alpha")]:
            home = alpha.removesuffix("act.alpha")
            found |= {home + "upsample.filter": taps.clone(), home + "downsample.lowpass.filter": taps.clone()}
    if name == "vocos":
        contract = model.config
        found |= {"head.istft.window": torch.hann_window(contract.win_length),
                  "feature_extractor.mel_spec.spectrogram.window": torch.hann_window(contract.win_length),
                  "feature_extractor.mel_spec.mel_scale.fb": torch.tensor(mel_filters(contract).T).float()}
    return found


def _their_name(name: str, ours: str) -> str:
    if name == "bigvgan":
        head, _, last = ours.rpartition(".")
        if last in ("alpha", "beta"):
            return f"{head}.act.{last}"
        parts = ours.split(".")
        return ".".join([*parts[:2], "0", *parts[2:]]) if parts[0] == "ups" else ours
    if name == "vocos":
        return f"head.{ours}" if ours.startswith("out.") else f"backbone.{ours}"
    if name == "apnet":
        for mine, other in (("amplitude.input", "ASP_input_conv"), ("amplitude.blocks", "ASP_ResNet"),
                            ("amplitude.outputs.0", "ASP_output_conv"), ("phase.input", "PSP_input_conv"),
                            ("phase.blocks", "PSP_ResNet"), ("phase.outputs.0", "PSP_output_R_conv"),
                            ("phase.outputs.1", "PSP_output_I_conv")):
            ours = ours.replace(mine, other)
    return ours


def architecture(name: str, config: Any) -> dict[str, Any]:
    """What the authors' settings say of the network alone."""
    if name == "melgan":
        return {"ratios": config.upsample_rates, "ngf": config.channels, "n_residual_layers": config.residual_layers}
    if name == "apnet":
        kernels = {f"{part}_kernel_size": config.kernel for part in (
            "ASP_input_conv", "ASP_output_conv", "PSP_input_conv", "PSP_output_R_conv", "PSP_output_I_conv")}
        return kernels | {f"{stream}_{field}": value for stream in ("ASP", "PSP") for field, value in (
            ("channel", config.channels), ("resblock_kernel_sizes", config.block_kernels),
            ("resblock_dilation_sizes", config.block_dilations))}
    if name == "diffwave":
        return {"residual_channels": config.channels, "residual_layers": config.layers,
                "dilation_cycle_length": config.dilation_cycle, "upsample_factors": config.mel_rates,
                "noise_schedule_factors": [config.first_beta, config.last_beta, config.noise_steps],
                "inference_noise_schedule": config.fast_betas}
    found = {"resblock": str(getattr(config, "resblock", 1)), "upsample_rates": config.upsample_rates,
             "upsample_kernel_sizes": config.upsample_kernels, "upsample_initial_channel": config.channels,
             "resblock_kernel_sizes": config.block_kernels, "resblock_dilation_sizes": config.block_dilations}
    if name == "nsf_hifigan":
        return found | {"harmonic_num": config.harmonics}
    if name == "bigvgan":
        found |= {"activation": config.activation, "snake_logscale": config.log_scale}
        if not config.tanh:
            found |= {"use_tanh_at_final": config.tanh, "use_bias_at_final": config.final_bias}
    return found


def flat_settings(name: str, config: Any) -> dict[str, Any]:
    """config.json of HiFi-GAN, NSF-HiFiGAN and BigVGAN; fmax null where it is the highest frequency."""
    found = architecture(name, config) | {
        "num_mels": config.n_mels, "n_fft": config.n_fft, "hop_size": config.hop_length, "win_size": config.win_length,
        "sampling_rate": config.sample_rate, "fmin": config.fmin, "segment_size": 8192, "seed": 1234,
        "fmax": None if config.fmax == config.sample_rate / 2 else config.fmax}
    if name == "nsf_hifigan":  # whose code has 8 harmonics, unsaid
        del found["harmonic_num"]
        found |= {"mini_nsf": False, "noise_sigma": 0.0, "pc_aug": False}
    return found


def put(folder: Path, weights: str, tensors: Any, settings: str = "", text: str = "") -> Path:
    """A folder with a file of weights and one of settings."""
    file = folder / weights
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, file)
    if settings:
        (folder / settings).write_text(text)
    return folder


def folder_of(name: str, model: Any, folder: Path, weights: str) -> Path:
    """HiFi-GAN's, BigVGAN's and NSF-HiFiGAN's: {"generator": ...} under the old names of weight norm."""
    return put(folder, weights, {"generator": old_names(theirs(name, model))}, "config.json",
               json.dumps(flat_settings(name, model.config), indent=4))


def vocos_folder(model: Any, folder: Path) -> Path:
    config = model.config
    text = f"""feature_extractor:
  class_path: vocos.feature_extractors.MelSpectrogramFeatures
  init_args: {{sample_rate: {config.sample_rate}, n_fft: {config.n_fft}, hop_length: {config.hop_length},
              n_mels: {config.n_mels}, padding: center}}
backbone:
  class_path: vocos.models.VocosBackbone
  init_args: {{input_channels: {config.n_mels}, dim: {config.dim}, intermediate_dim: {config.hidden},
              num_layers: {config.layers}}}
head:
  class_path: vocos.heads.ISTFTHead
  init_args: {{dim: {config.dim}, n_fft: {config.n_fft}, hop_length: {config.hop_length}, padding: center}}
"""
    return put(folder, "pytorch_model.bin", theirs("vocos", model), "config.yaml", text)


def lmnt_folder(model: Any, folder: Path) -> Path:
    config = model.config
    params = {"batch_size": 16, "sample_rate": config.sample_rate, "n_mels": config.n_mels, "n_fft": config.n_fft,
              "hop_samples": config.hop_length, "residual_layers": config.layers, "residual_channels": config.channels,
              "dilation_cycle_length": config.dilation_cycle, "unconditional": False,
              "noise_schedule": config.betas.tolist(), "inference_noise_schedule": list(config.fast_betas)}
    return put(folder, "weights.pt", {"step": 1_000_578, "model": theirs("diffwave", model), "params": params,
                                      "optimizer": {"state": {}, "param_groups": []}, "scaler": {}})


def args_json(name: str, config: Any) -> str:
    """Amphion's args.json, which is JSON5: commas before closing brackets."""
    key = AMPHION[name]
    found = {"model_type": "GANVocoder", "model": {"generator": key, key: architecture(name, config)},
             "preprocess": {"n_mel": config.n_mels, "sample_rate": config.sample_rate, "hop_size": config.hop_length,
                            "win_size": config.win_length, "n_fft": config.n_fft, "fmin": config.fmin,
                            "fmax": config.fmax, "use_min_max_norm_mel": False, "lab_dir": "a, ] // b"}}
    return json.dumps(found, indent=4).replace("\n", ",\n").replace("{,", "{").replace("[,", "[").replace(",,", ",")


def amphion_folder(name: str, model: Any, folder: Path) -> Path:
    """An experiment of Amphion's with two epochs and the discriminators' files; the later epoch is the model."""
    early, late = "checkpoint/epoch-0001_step-0000100_loss-9.000000", "checkpoint/epoch-0020_step-0400000_loss-2.500000"
    tensors = {f"module.{key}": tensor for key, tensor in old_names(theirs(name, model)).items()}
    put(folder, f"{early}/pytorch_model.bin", {key: torch.zeros_like(tensor) for key, tensor in tensors.items()})
    put(folder, f"{late}/pytorch_model_1.bin", discriminators())
    return put(folder, f"{late}/pytorch_model.bin", tensors, "args.json", args_json(name, model.config))


def discriminators() -> dict[str, Tensor]:
    return {"discriminators.0.convs.0.weight_g": torch.ones(32, 1, 1, 1),
            "discriminators.0.conv_post.bias": torch.ones(1)}
