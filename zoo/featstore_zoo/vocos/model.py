"""Vocos (Siuzdak, arXiv 2306.00814): Config, the ConvNeXt block, then backbone and inverse-STFT head.

Names of weights are those of the authors' code without its prefixes `backbone.` and `head.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from featstore_zoo.gan import GanConfig
from featstore_zoo.vocoder import Vocoder, inverse_stft

LOUDEST = 100.0  # magnitude of a bin: above, early training runs away


@dataclass(frozen=True)
class Config(GanConfig):
    """Vocos of the published size (13.5 M) for the mel contract 24k-100. Presets: base, mel-24khz.

    mel-24khz is for the published weights of that name, whose log-mel is another: HTK scale, floor 1e-7, frames centred
    on their hop. The window of the inverse STFT is the contract's.

    dim, hidden: channels between and inside the blocks. layers: blocks. kernel: of their depthwise convolutions.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {},
        "mel-24khz": {"mel_scale": "htk", "norm": "none", "eps": 0.0, "floor": 1e-7, "padding": "centre"},
        "smoke": {"dim": 96, "hidden": 192, "layers": 3, "discriminators": ("mpd",), "discriminator_width": 0.1,
                  "mpd_periods": (2, 3)},
    }

    discriminators: tuple[str, ...] = ("mpd", "mrd")
    adversarial: Literal["lsgan", "hinge"] = "hinge"
    lambda_feature: float = 1.0
    dim: int = 512
    hidden: int = 1536
    layers: int = 8
    kernel: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.dim, self.hidden, self.layers) < 1 or self.kernel % 2 == 0:
            raise ValueError(f"dim {self.dim}, hidden {self.hidden} and layers {self.layers} must be at least 1, and "
                             f"kernel {self.kernel} odd")
        if 2 * self.hop_length > self.win_length:
            raise ValueError(f"hop_length {self.hop_length} must be at most half of win_length {self.win_length}, or "
                             "the frames of the inverse STFT do not overlap enough")


class ConvNeXtBlock(nn.Module):
    """x + gamma MLP(norm(depthwise(x))) (Liu et al., arXiv 2201.03545); (B, D, T) -> (B, D, T)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(config.dim, config.dim, config.kernel, padding=config.kernel // 2, groups=config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.pwconv1 = nn.Linear(config.dim, config.hidden)
        self.pwconv2 = nn.Linear(config.hidden, config.dim)
        self.gamma = nn.Parameter(torch.full((config.dim,), 1 / config.layers))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).transpose(1, 2))  # (B, T, D)
        y = self.gamma * self.pwconv2(nn.functional.gelu(self.pwconv1(y)))
        return x + y.transpose(1, 2)


class Model(Vocoder):
    """Log-mel (B, T, n_mels) to waveform (B, T hop_length). Nothing bounds it but what it has learnt."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embed = nn.Conv1d(config.n_mels, config.dim, 7, padding=3)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.convnext = nn.ModuleList(ConvNeXtBlock(config) for _ in range(config.layers))
        self.final_layer_norm = nn.LayerNorm(config.dim, eps=1e-6)
        for part in self.modules():
            if isinstance(part, nn.Conv1d | nn.Linear) and part.bias is not None:
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        self.out = nn.Linear(config.dim, config.n_fft + 2)

    @property
    def receptive_field(self) -> tuple[int, int]:
        config = self.config
        around = 3 + config.layers * (config.kernel // 2)
        start = (config.n_fft - config.hop_length) // 2 if config.padding == "frames" else config.n_fft // 2
        left = (config.n_fft - 1 - start) // config.hop_length  # frames whose window reaches samples of this one
        right = (config.hop_length - 1 + start) // config.hop_length
        return around + left, around + right

    def render(self, log_mel: Tensor, source: Tensor | None = None) -> Tensor:
        return inverse_stft(*self.spectrum(log_mel), self.config)

    def spectrum(self, log_mel: Tensor) -> tuple[Tensor, Tensor]:
        """Real and imaginary part (B, T, n_fft // 2 + 1) of the spectrum of each frame."""
        x = self.norm(self.embed(log_mel.transpose(1, 2)).transpose(1, 2)).transpose(1, 2)  # (B, D, T)
        for block in self.convnext:
            x = block(x)
        x = self.out(self.final_layer_norm(x.transpose(1, 2)))  # (B, T, n_fft + 2)
        magnitude, phase = x.float().chunk(2, -1)
        magnitude = magnitude.exp().clamp(max=LOUDEST)
        return magnitude * phase.cos(), magnitude * phase.sin()
