"""Vocoders small enough for a test, and other programs' weights under our names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from featstore_zoo import find

CONTRACT = {"n_mels": 20, "n_fft": 64, "win_length": 64, "hop_length": 16}
STEPS_UP = {"upsample_rates": (4, 2, 2), "upsample_kernels": (8, 4, 4), "channels": 32, "block_kernels": (3, 5),
            "block_dilations": ((1, 3, 5), (1, 3, 5))}
SMALL: dict[str, dict[str, Any]] = {
    "hifigan": CONTRACT | STEPS_UP,
    "nsf_hifigan": CONTRACT | STEPS_UP,
    "bigvgan": CONTRACT | STEPS_UP,
    "melgan": CONTRACT | {"upsample_rates": (4, 4), "channels": 4},
    "apnet": CONTRACT | {"channels": 16, "block_kernels": (3, 5), "block_dilations": ((1, 3), (1, 3))},
    "vocos": CONTRACT | {"dim": 16, "hidden": 24, "layers": 2},
    "diffwave": CONTRACT | {"channels": 16, "layers": 6, "dilation_cycle": 3, "mel_rates": (4, 4),
                            "schedule": "fast"},
}


def small(name: str, **changes: Any) -> Any:
    """A seeded model of a few thousand weights, in eval mode, without a weight that is exactly 0."""
    package = find(name)
    torch.manual_seed(1)
    model = package.Model(package.Config(**(SMALL[name] | changes))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(0, 0.1)
    return model


def inputs(model: Any, frames: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, torch.Generator]:
    """log-mel (B, T, n_mels), f0 (B, T) with an unvoiced frame in the middle, and a generator."""
    generator = torch.Generator().manual_seed(seed)
    log_mel = torch.randn(batch, frames, model.config.n_mels, generator=generator) - 4
    f0 = torch.linspace(200, 400, batch * frames).reshape(batch, frames)
    f0[:, frames // 2] = 0
    return log_mel, f0, generator


def reference(folder: Path, rename: Callable[[str], str | None] = lambda name: name) -> tuple[dict, dict, dict]:
    """(weights, inputs, outputs) of a parity file, weights under our names; `rename` gives None for what we lack."""
    tensors = load_file(folder)
    parts: tuple[dict, dict, dict] = ({}, {}, {})
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "sd":
            ours = rename(name)
            if ours is not None:
                parts[0][normed(ours)] = value
        else:
            parts[1 if kind == "in" else 2][name] = value
    return parts


def normed(name: str) -> str:
    """The name of a weight norm's part in torch's own words."""
    return (name.replace("weight_g", "parametrizations.weight.original0")
            .replace("weight_v", "parametrizations.weight.original1"))
