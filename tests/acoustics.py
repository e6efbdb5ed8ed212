"""Acoustic models small enough for a test, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featstore_zoo import find

CONTRACT = {"n_mels": 20, "n_fft": 64, "win_length": 64, "hop_length": 16}
HEARD = {"content": (("whisper", 12), ("spin", 10)), "width": 24, "singers": 8}
STEPS_UP = {"upsample_rates": (4, 4), "upsample_kernels": (8, 8), "channels": 16, "block_kernels": (3,),
            "block_dilations": ((1, 3),)}
SMALL: dict[str, dict[str, Any]] = {
    "diffwavenet_svc": CONTRACT | HEARD | {"channels": 16, "layers": 5, "step_dim": 16, "step_hidden": 24,
                                           "sampling_steps": 3},
    "transformer_svc": CONTRACT | HEARD | {"layers": 2, "hidden": 16},
    "como_svc": CONTRACT | HEARD | {"encoder_layers": 2, "hidden": 16, "channels": 16, "layers": 4, "step_dim": 16,
                                    "step_hidden": 24, "sampling_steps": 3},
    "vits_svc": CONTRACT | HEARD | {
        "latent": 24, "hidden": 16, "prior_layers": 2, "posterior_layers": 2, "flow_layers": 2, "flows": 2,
        "speaker_width": 8, "slice_frames": 8, "discriminators": ("mpd",), "discriminator_width": 0.05,
        "mpd_periods": (2, 3), "generator_fields": tuple((STEPS_UP | {"harmonics": 2}).items())},
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


def batch_for(config: Any, frames: int, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """What a model hears and is to give; f0 has unvoiced frames."""
    seeded = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(batch, frames, dim, generator=seeded) for name, dim in config.content}
    f0 = 100 + 300 * torch.rand(batch, frames, generator=seeded)
    f0[:, frames // 2] = 0
    samples = frames * config.hop_length
    return made | {
        "f0": f0,
        "loudness": -60 * torch.rand(batch, frames, generator=seeded),
        "energy": torch.rand(batch, frames, generator=seeded),
        "singer": torch.arange(batch) % config.singers,
        "speaker": torch.randn(batch, config.speaker_dim, generator=seeded),
        "log-mel": torch.randn(batch, frames, config.n_mels, generator=seeded) - 4,
        "wave": 0.1 * torch.randn(batch, samples, generator=seeded),
    }


def cut(batch: dict[str, Tensor], item: int, frames: int, hop: int) -> dict[str, Tensor]:
    """One item of a batch alone, without its padding."""
    made = {}
    for name, value in batch.items():
        one = value[item:item + 1]
        if name == "wave":
            one = one[:, :frames * hop]
        elif name not in ("singer", "speaker", "lengths"):
            one = one[:, :frames]
        made[name] = one
    return made
