"""MelGAN (Kumar et al., arXiv 1910.06711): Config, then one sequence of layers, named as in the authors' code.

That code fills weights with N(0, 0.02) after weight norm was put on them, where it has no effect; what is used here is
torch's own initialisation, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from featstore_zoo.gan import GanConfig
from featstore_zoo.vocoder import Span, Vocoder, check_rates, upsampled, widened

SLOPE = 0.2
EDGE = 3  # samples reflected at either end of the first and of the last convolution


@dataclass(frozen=True)
class Config(GanConfig):
    """MelGAN for the mel contract 24k-100. Presets: base, paper.

    paper trains as published, on discriminators alone: hinge and feature matching, no spectral loss, which takes some
    million steps. The default adds log-mel L1 x 45, so that it learns within hours.

    upsample_rates: their product is hop_length.
    channels: after the last step up; each step halves them.
    residual_layers: blocks behind each step, of dilation 1, 3, 9 and so on.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {}, "paper": {"lambda_mel": 0.0},
        "smoke": {"channels": 8, "residual_layers": 1, "discriminator_width": 0.1}}

    discriminators: tuple[str, ...] = ("msd",)
    adversarial: Literal["lsgan", "hinge"] = "hinge"
    lambda_feature: float = 10.0
    upsample_rates: tuple[int, ...] = (8, 8, 2, 2)
    channels: int = 32
    residual_layers: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates(self.upsample_rates, self.hop_length, with_kernels=False)
        if self.channels < 1 or self.residual_layers < 1:
            raise ValueError(f"channels {self.channels} and residual_layers {self.residual_layers} must be at least 1")


class ResBlock(nn.Module):
    """1 x 1 shortcut plus a dilated convolution with reflected ends; (B, D, T) -> (B, D, T)."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.LeakyReLU(SLOPE), nn.ReflectionPad1d(dilation),
            weight_norm(nn.Conv1d(channels, channels, 3, dilation=dilation)),
            nn.LeakyReLU(SLOPE), weight_norm(nn.Conv1d(channels, channels, 1)))
        self.shortcut = weight_norm(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.block(x)


class Model(Vocoder):
    """The generator: log-mel (B, T, n_mels) to waveform (B, T hop_length)."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        size = config.channels * 2 ** len(config.upsample_rates)
        layers = [nn.ReflectionPad1d(EDGE), weight_norm(nn.Conv1d(config.n_mels, size, 7))]
        for rate in config.upsample_rates:
            up = nn.ConvTranspose1d(size, size // 2, 2 * rate, rate, padding=-(-rate // 2), output_padding=rate % 2)
            size //= 2
            layers += [nn.LeakyReLU(SLOPE), weight_norm(up)]
            layers += [ResBlock(size, 3**i) for i in range(config.residual_layers)]
        layers += [nn.LeakyReLU(SLOPE), nn.ReflectionPad1d(EDGE), weight_norm(nn.Conv1d(size, 1, 7)), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    @property
    def receptive_field(self) -> tuple[int, int]:
        span: Span = widened((0, self.hop_length - 1), 3)
        for rate in self.config.upsample_rates[::-1]:
            reach = sum(3**i for i in range(self.config.residual_layers))
            span = upsampled(widened(span, reach), 2 * rate, rate, padding=-(-rate // 2))
        span = widened(span, EDGE)
        return -span[0], span[1]

    def render(self, log_mel: Tensor, source: Tensor | None = None) -> Tensor:
        frames = log_mel.shape[1]
        x = F.pad(log_mel.transpose(1, 2), (0, max(0, self._fewest - frames)), mode="replicate")  # (B, n_mels, T)
        return self.model(x)[:, 0, : frames * self.hop_length]

    @property
    def _fewest(self) -> int:
        """Frames below which there is too little to reflect; shorter input is lengthened by its last frame."""
        furthest = 3 ** (self.config.residual_layers - 1)
        return max(EDGE, furthest // self.config.upsample_rates[0]) + 1
