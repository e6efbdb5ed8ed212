"""Folders as Amphion writes them, with small models of ours under its names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import acoustics
import numpy as np
import published
import torch
from torch import Tensor

from featstore_zoo import find

COARSE = {"melody": "coarse", "loudness": "coarse", "content": (("whisper", 12), ("contentvec", 10)), "width": 24,
          "singers": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # layout -> our model, and how it is not the small one
    "DiffWaveNetSVC": ("diffwavenet_svc", {}),
    "TransformerSVC": ("transformer_svc", {}),
    "TransformerSVC (torch's encoder)": ("transformer_svc", {"variant": "plain-unmasked", "hidden": 32}),
    "DiffComoSVC": ("como_svc", {}),
    "DiffComoSVC, student": ("como_svc", {"stage": "student", "sampling_steps": 1}),
    "VitsSVC": ("vits_svc", {}),
}
SINGERS = {"little_singers_Ann": 3, "little_singers_Bo_B": 5}  # names have underscores
STATISTICS = {"little_singers_Ann": {"voiced_positions": {"mean": 250.0, "std": 30.0, "median": 246.9, "min": 80.0,
                                                         "max": 700.0}}}


def model(title: str, **changes: Any) -> Any:
    """A small model that hears as Amphion's do."""
    name, how = MODELS[title]
    more = {}
    if name == "vits_svc":
        fields = dict(acoustics.SMALL[name]["generator_fields"]) | {"amphion_defect": True}
        more["generator_fields"] = tuple(fields.items())
    return acoustics.small(name, **COARSE | how | more | changes)


def theirs(made: Any) -> dict[str, Tensor]:
    """Its tensors under Amphion's names."""
    vits = hasattr(made, "enc_p")
    found = {}
    for name, tensor in made.state_dict().items():
        if name.startswith("mel_"):
            continue
        if vits:
            name = name.replace("emb_g.nn.weight", "emb_g.weight")
        else:
            name = name.replace("condition_encoder.", "0.", 1).replace("acoustic_mapper.", "1.", 1)
        found[name] = tensor.clone()
    if vits:
        found["enc_p.f0_emb.weight"] = torch.zeros(256, 24)
    if "1.output_mlp.weight" in found:
        found["1.pos_encoder.pe"] = torch.zeros(1, 5000, 24)
    return published.old_names(found)


def args(title: str, config: Any, **preprocess: Any) -> dict[str, Any]:
    """args.json of a model."""
    heard = {"merge_mode": "add", "n_bins_melody": 256, "n_bins_loudness": 256, "use_spkid": True}
    parts: dict[str, Any] = {"condition_encoder": heard}
    if hasattr(config, "dilation_cycle"):
        parts["diffusion"] = {
            "scheduler": "ddpm", "model_type": "bidilconv", "scheduler_settings": {
                "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
            "bidilconv": {"dilation_cycle_length": config.dilation_cycle}}
    if title.startswith("Transformer"):
        parts["transformer"] = {"type": "transformer" if "torch" in title else "conformer", "n_heads": 2}
    if title.startswith("DiffComo"):
        parts["comosvc"] = {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80,
                            "rho": 7, "n_timesteps": 40}
    if title == "VitsSVC":
        inner = find("nsf_hifigan").Config(**config.generator_config.__dict__)
        parts |= {"generator": "nsfhifigan", "generator_config": {
            "nsfhifigan": published.architecture("nsf_hifigan", inner)}}
    told = {"sample_rate": config.sample_rate, "n_fft": config.n_fft, "win_size": config.win_length,
            "hop_size": config.hop_length, "n_mel": config.n_mels, "fmin": 0, "fmax": None, "f0_min": 50,
            "f0_max": 1100, "pitch_extractor": "parselmouth", "use_min_max_norm_mel": title != "VitsSVC",
            "whisper_model": "medium"}
    return {"model_type": title, "dataset": ["little_singers"], "model": parts, "preprocess": told | preprocess}


def folder(title: str, made: Any, home: Path, **preprocess: Any) -> Path:
    """An experiment of it."""
    epoch = home / "checkpoint" / "epoch-0020_step-0001234_loss-1.946773"
    published.put(home, f"{epoch.relative_to(home)}/pytorch_model.bin", theirs(made), "args.json",
                  json.dumps(args(title, made.config, **preprocess)))
    (epoch / "optimizer.bin").write_bytes(b"never looked at")
    (home / "singers.json").write_text(json.dumps(SINGERS))
    data = home / "data" / "little_singers"
    (data / "pitches").mkdir(parents=True)
    (data / "pitches" / "statistics.json").write_text(json.dumps(STATISTICS))
    if title != "VitsSVC":
        (data / "mel_min_max_stats").mkdir()
        np.save(data / "mel_min_max_stats" / "mel_min.npy", made.mel_low.numpy().astype(np.float64))
        np.save(data / "mel_min_max_stats" / "mel_max.npy", made.mel_high.numpy().astype(np.float64))
    return home
