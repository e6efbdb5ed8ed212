"""HiFi-GAN (Kong, Kim and Bae, "HiFi-GAN", arXiv 2010.05646): Config, then the network from its smallest part up.

Names of weights are those of the authors' code, so that published checkpoints load after renaming weight norm's
`weight_g` and `weight_v`. That code fills weights with N(0, 0.01) after weight norm was put on them, where it has no
effect; what its recipes were proven with, and what is used here, is torch's own initialisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from featstore_zoo.gan import GanConfig
from featstore_zoo.residual import SLOPE, ResBlock1, ResBlock2, check_blocks, conv, reach
from featstore_zoo.vocoder import Span, Vocoder, check_steps_up, upsampled, widened


@dataclass(frozen=True)
class Config(GanConfig):
    """HiFi-GAN V1 for the mel contract 24k-100. Presets: the paper's v1, v2 and v3, and tfr-enhanced (23.7 M).

    tfr-enhanced is Amphion's recipe: more and smaller steps up, wider, against four kinds of discriminators.

    upsample_rates: their product is hop_length.
    upsample_kernels: of the transposed convolutions; kernel - rate is even.
    channels: before the first step up; each step halves them.
    resblock: 1 has two convolutions per dilation, 2 has one.
    block_kernels, block_dilations: of the parallel residual blocks behind each step.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "v1": {},
        "v2": {"channels": 128},
        "v3": {"resblock": 2, "channels": 256, "upsample_rates": (8, 8, 4), "upsample_kernels": (16, 16, 8),
               "block_kernels": (3, 5, 7), "block_dilations": ((1, 2), (2, 6), (3, 12))},
        "tfr-enhanced": {"channels": 768, "upsample_rates": (8, 4, 2, 2, 2), "upsample_kernels": (16, 8, 4, 4, 4),
                         "block_kernels": (3, 5, 7), "discriminators": ("mpd", "msd", "ms_stft", "ms_sb_cqt"),
                         "mpd_periods": (2, 3, 5, 7, 11, 17, 23, 37), "mpd_last_stride": 3},
        "smoke": {"channels": 64, "block_kernels": (3,), "block_dilations": ((1, 3),),
                  "discriminators": ("mpd",), "discriminator_width": 0.1, "mpd_periods": (2, 3)},
    }

    upsample_rates: tuple[int, ...] = (8, 8, 2, 2)
    upsample_kernels: tuple[int, ...] = (16, 16, 4, 4)
    channels: int = 512
    resblock: Literal[1, 2] = 1
    block_kernels: tuple[int, ...] = (3, 7, 11)
    block_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps_up(self.upsample_rates, self.upsample_kernels, self.channels, self.hop_length)
        check_blocks(self.block_kernels, self.block_dilations)
        if self.resblock not in (1, 2):
            raise ValueError(f"resblock must be 1 or 2, not {self.resblock!r}")

    @property
    def block_reach(self) -> int:
        """Samples that the widest residual block looks to either side."""
        return reach(self.block_kernels, self.block_dilations, layers=3 - self.resblock)


class Model(Vocoder):
    """The generator: log-mel (B, T, n_mels) to waveform (B, T hop_length)."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        block = ResBlock1 if config.resblock == 1 else ResBlock2
        self.conv_pre = conv(config.n_mels, config.channels, 7)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        size = config.channels
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernels, strict=True):
            up = nn.ConvTranspose1d(size, size // 2, kernel, rate, padding=(kernel - rate) // 2)
            self.ups.append(weight_norm(up))
            size //= 2
            self.resblocks.extend(block(size, width, dilations) for width, dilations
                                  in zip(config.block_kernels, config.block_dilations, strict=True))
        self.conv_post = conv(size, 1, 7)

    @property
    def receptive_field(self) -> tuple[int, int]:
        span: Span = widened((0, self.hop_length - 1), 3)
        for rate, kernel in zip(self.config.upsample_rates[::-1], self.config.upsample_kernels[::-1], strict=True):
            span = upsampled(widened(span, self.config.block_reach), kernel, rate)
        span = widened(span, 3)
        return -span[0], span[1]

    def render(self, log_mel: Tensor, source: Tensor | None = None) -> Tensor:
        parallel = len(self.config.block_kernels)
        x = self.conv_pre(log_mel.transpose(1, 2))  # (B, D, T)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))  # T grows by the rate, D is halved
            blocks = self.resblocks[i * parallel : (i + 1) * parallel]
            x = sum(block(x) for block in blocks) / parallel
        x = self.conv_post(F.leaky_relu(x))  # with torch's slope of 0.01 here, as in the authors' code
        return torch.tanh(x).squeeze(1)
