"""APNet (Ai and Ling, arXiv 2305.07952): Config, the residual block, a stream, then the two streams together.

Names of weights against Amphion's: `amplitude.input` is `ASP_input_conv`, `amplitude.blocks` is `ASP_ResNet`,
`amplitude.outputs.0` is `ASP_output_conv`; `phase` likewise with `PSP`, whose outputs are `_R_conv` and `_I_conv`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featstore_zoo.gan import GanConfig
from featstore_zoo.residual import ResBlock1, check_blocks, conv, reach
from featstore_zoo.vocoder import Vocoder, inverse_stft

LOUDEST = 10.0  # log-amplitude of a bin, above any that full scale can give: early training does not overflow


@dataclass(frozen=True)
class Config(GanConfig):
    """APNet of Amphion's size (72 M) for the mel contract 24k-100. Preset: base.

    channels: of either stream. kernel: of first and last convolution.
    block_kernels, block_dilations: of the parallel residual blocks.
    lambda_*: 45 for log-amplitudes, 100 for phases, 20 for consistency, 45 for real and imaginary parts, as published.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {},
        "smoke": {"channels": 64, "block_kernels": (3,), "block_dilations": ((1, 3),),
                  "discriminators": ("mpd",), "discriminator_width": 0.1, "mpd_periods": (2, 3)}}

    channels: int = 512
    kernel: int = 7
    block_kernels: tuple[int, ...] = (3, 7, 11)
    block_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    lambda_amplitude: float = 45.0
    lambda_phase: float = 100.0
    lambda_consistency: float = 20.0
    lambda_parts: float = 45.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_blocks(self.block_kernels, self.block_dilations)
        if self.channels < 1 or self.kernel % 2 == 0:
            raise ValueError(f"channels {self.channels} must be at least 1 and kernel {self.kernel} odd")
        if 2 * self.hop_length > self.win_length:
            raise ValueError(f"hop_length {self.hop_length} must be at most half of win_length {self.win_length}, or "
                             "the frames of the inverse STFT do not overlap enough")

    @property
    def block_reach(self) -> int:
        """Frames that the widest residual block looks to either side."""
        return reach(self.block_kernels, self.block_dilations)


class Spectrum(NamedTuple):
    """What the streams say of each frame, all (B, T, n_fft // 2 + 1)."""

    log_amplitude: Tensor
    phase: Tensor
    real: Tensor
    imaginary: Tensor


class Stream(nn.Module):
    """Log-mel (B, n_mels, T) to `outputs` pictures (B, n_fft // 2 + 1, T)."""

    def __init__(self, config: Config, outputs: int) -> None:
        super().__init__()
        self.input = conv(config.n_mels, config.channels, config.kernel)
        self.blocks = nn.ModuleList(ResBlock1(config.channels, kernel, dilations) for kernel, dilations
                                    in zip(config.block_kernels, config.block_dilations, strict=True))
        self.outputs = nn.ModuleList(conv(config.channels, config.n_fft // 2 + 1, config.kernel)
                                     for _ in range(outputs))

    def forward(self, log_mel: Tensor) -> list[Tensor]:
        x = self.input(log_mel)
        x = sum(block(x) for block in self.blocks) / len(self.blocks)
        x = F.leaky_relu(x)  # with torch's slope of 0.01 here, as in the authors' code
        return [output(x) for output in self.outputs]


class Model(Vocoder):
    """Log-mel (B, T, n_mels) to waveform (B, T hop_length). Nothing bounds it but what it has learnt."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.amplitude = Stream(config, 1)
        self.phase = Stream(config, 2)

    @property
    def receptive_field(self) -> tuple[int, int]:
        config = self.config
        around = 2 * (config.kernel // 2) + config.block_reach
        start = (config.n_fft - config.hop_length) // 2 if config.padding == "frames" else config.n_fft // 2
        left = (config.n_fft - 1 - start) // config.hop_length  # frames whose window reaches samples of this one
        right = (config.hop_length - 1 + start) // config.hop_length
        return around + left, around + right

    def render(self, log_mel: Tensor, source: Tensor | None = None) -> Tensor:
        return self.waveform(self.spectrum(log_mel))

    def spectrum(self, log_mel: Tensor) -> Spectrum:
        """Log-amplitude, phase in radians, real and imaginary part of the spectrum of each frame."""
        x = log_mel.transpose(1, 2)
        [log_amplitude] = (part.transpose(1, 2).float() for part in self.amplitude(x))
        real, imaginary = (part.transpose(1, 2).float() for part in self.phase(x))
        phase = torch.atan2(imaginary, real)
        amplitude = log_amplitude.clamp(max=LOUDEST).exp()
        return Spectrum(log_amplitude, phase, amplitude * phase.cos(), amplitude * phase.sin())

    def waveform(self, spectrum: Spectrum) -> Tensor:
        """Waveform (B, T hop_length) of a spectrum."""
        return inverse_stft(spectrum.real, spectrum.imaginary, self.config)
