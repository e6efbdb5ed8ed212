"""BigVGAN (Lee, Ping, Ginsburg, Catanzaro and Yoon, arXiv 2206.04658): Config, the activation, then the network.

Names of weights are those of the authors' code up to three: `ups.i` is `ups.i.0` there, `alpha` and `beta` are
`act.alpha` and `act.beta`, and the low-pass filters, which are constants, are no weights here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from featstore_zoo.gan import GanConfig
from featstore_zoo.residual import check_blocks, conv
from featstore_zoo.vocoder import Span, Vocoder, check_steps_up, fold, upsampled, widened

from .fused import activated

TAPS = 12  # of the low-pass filters at twice the rate
ACTIVATION_REACH = TAPS // 2 - 1  # samples to either side that a sample depends on through both

V2 = {"tanh": False, "final_bias": False, "discriminators": ("mpd", "ms_sb_cqt"), "mel_loss": "multi",
      "lambda_mel": 15.0}
LARGE = {"channels": 1536, "upsample_rates": (4, 4, 2, 2, 2, 2), "upsample_kernels": (8, 8, 4, 4, 4, 4)}


@dataclass(frozen=True)
class Config(GanConfig):
    """BigVGAN-base for the mel contract 24k-100 (14 M). Presets: base and large (112 M), each as v1 and as v2.

    v2 is the authors' second release: no tanh and no bias at the end, MS-SB-CQT in place of MRD, log-mel L1 at seven
    scales. They published it large only; v2-44k-128 is theirs for 44.1 kHz and hop 512 (122 M).

    upsample_rates: their product is hop_length.
    upsample_kernels: of the transposed convolutions; kernel - rate is even.
    channels: before the first step up; each step halves them.
    block_kernels, block_dilations: of the parallel residual blocks behind each step.
    activation: "snake" x + sin^2(a x) / a (Ziyin et al., arXiv 2006.08195), or "snakebeta" x + sin^2(a x) / b.
    log_scale: whether the logarithms of a and b are learnt.
    tanh: bounds the output smoothly; without it is clipped to [-1, 1].
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {},
        "large": LARGE,
        "v2-base": V2,
        "v2-large": LARGE | V2,
        "v2-44k-128": LARGE | V2 | {
            "sample_rate": 44100, "n_fft": 2048, "win_length": 2048, "hop_length": 512, "n_mels": 128, "fmax": 22050.0,
            "upsample_rates": (8, 4, 2, 2, 2, 2), "upsample_kernels": (16, 8, 4, 4, 4, 4)},
        "smoke": {"channels": 64, "block_kernels": (3,), "block_dilations": ((1, 3),),
                  "discriminators": ("mpd",), "discriminator_width": 0.1, "mpd_periods": (2, 3)},
    }

    discriminators: tuple[str, ...] = ("mpd", "mrd")
    upsample_rates: tuple[int, ...] = (8, 8, 2, 2)
    upsample_kernels: tuple[int, ...] = (16, 16, 4, 4)
    channels: int = 512
    block_kernels: tuple[int, ...] = (3, 7, 11)
    block_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    activation: Literal["snake", "snakebeta"] = "snakebeta"
    log_scale: bool = True
    tanh: bool = True
    final_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps_up(self.upsample_rates, self.upsample_kernels, self.channels, self.hop_length)
        check_blocks(self.block_kernels, self.block_dilations)
        if self.activation not in ("snake", "snakebeta"):
            raise ValueError(f"activation must be snake or snakebeta, not {self.activation!r}")

    @property
    def block_reach(self) -> int:
        """Samples that the widest residual block looks to either side."""
        return max(sum((dilation + 1) * (kernel - 1) // 2 + 2 * ACTIVATION_REACH for dilation in dilations)
                   for kernel, dilations in zip(self.block_kernels, self.block_dilations, strict=True))


class Activation(nn.Module):
    """Snake at twice the rate between two low-pass filters, so that its harmonics do not alias; keeps (B, D, T).

    Ends are held, as in the authors' code. (Even and odd samples in two dense channels, without the zeros of doubling,
    were tried: 2.6 times slower on a CPU than these strided convolutions channel by channel, 5 times backwards.) On
    a CPU, once nothing is trained any more, `fused` does the same eight times as fast.
    """

    filter: Tensor
    fused = False

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        self.log_scale = config.log_scale
        self.alpha = nn.Parameter(torch.zeros(channels) if config.log_scale else torch.ones(channels))
        self.beta = nn.Parameter(self.alpha.detach().clone()) if config.activation == "snakebeta" else None
        taps = torch.tensor(low_pass(0.5 / 2, 0.6 / 2, TAPS), dtype=torch.float32)
        self.register_buffer("filter", taps, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            alpha, beta = (scale[:, 0] for scale in self._scales())
            if (made := activated(x, alpha, beta + 1e-9, self.filter)) is not None:
                return made
        channels = x.shape[1]
        taps = self.filter.to(x.dtype).expand(channels, 1, TAPS)
        x = F.pad(x, (TAPS // 2 - 1, TAPS // 2 - 1), mode="replicate")
        x = 2 * F.conv_transpose1d(x, taps, stride=2, groups=channels)  # twice: every other sample of it was 0
        x = x[..., 3 * TAPS // 2 - 3 : 3 - 3 * TAPS // 2]  # (B, D, 2 T)
        alpha, beta = self._scales()
        x = x + torch.sin(x * alpha).square() / (beta + 1e-9)
        return F.conv1d(F.pad(x, (TAPS // 2 - 1, TAPS // 2), mode="replicate"), taps, stride=2, groups=channels)

    def _scales(self) -> tuple[Tensor, Tensor]:
        alpha, beta = self.alpha[:, None], (self.alpha if self.beta is None else self.beta)[:, None]
        return (alpha.exp(), beta.exp()) if self.log_scale else (alpha, beta)


class AmpBlock(nn.Module):
    """x + conv(act(conv(act(x)))) for each dilation, "anti-aliased multi-periodicity"; (B, D, T) -> (B, D, T)."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...], config: Config) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(conv(channels, channels, kernel, dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(channels, channels, kernel) for _ in dilations)
        self.activations = nn.ModuleList(Activation(channels, config) for _ in range(2 * len(dilations)))

    def forward(self, x: Tensor) -> Tensor:
        for i, (first, second) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            before, between = self.activations[2 * i], self.activations[2 * i + 1]
            x = x + second(between(first(before(x))))
        return x


class Model(Vocoder):
    """The generator: log-mel (B, T, n_mels) to waveform (B, T hop_length)."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.conv_pre = conv(config.n_mels, config.channels, 7)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        size = config.channels
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernels, strict=True):
            up = nn.ConvTranspose1d(size, size // 2, kernel, rate, padding=(kernel - rate) // 2)
            self.ups.append(weight_norm(up))
            size //= 2
            self.resblocks.extend(AmpBlock(size, width, dilations, config) for width, dilations
                                  in zip(config.block_kernels, config.block_dilations, strict=True))
        self.activation_post = Activation(size, config)
        self.conv_post = weight_norm(nn.Conv1d(size, 1, 7, padding=3, bias=config.final_bias))

    def fold(self) -> Self:
        for part in self.modules():
            if isinstance(part, Activation):
                part.fused = True
        return fold(self)

    @property
    def receptive_field(self) -> tuple[int, int]:
        span: Span = widened((0, self.hop_length - 1), 3 + ACTIVATION_REACH)
        for rate, kernel in zip(self.config.upsample_rates[::-1], self.config.upsample_kernels[::-1], strict=True):
            span = upsampled(widened(span, self.config.block_reach), kernel, rate)
        span = widened(span, 3)
        return -span[0], span[1]

    def render(self, log_mel: Tensor, source: Tensor | None = None) -> Tensor:
        parallel = len(self.config.block_kernels)
        x = self.conv_pre(log_mel.transpose(1, 2))  # (B, D, T)
        for i, up in enumerate(self.ups):
            x = up(x)  # T grows by the rate, D is halved
            blocks = self.resblocks[i * parallel : (i + 1) * parallel]
            x = sum(block(x) for block in blocks) / parallel
        x = self.conv_post(self.activation_post(x)).squeeze(1)
        return torch.tanh(x) if self.config.tanh else x.clamp(-1, 1)




def low_pass(cutoff: float, half_width: float, taps: int) -> np.ndarray:
    """A Kaiser-windowed sinc (taps,), frequencies in cycles per sample, whose sum is 1.

    The window's shape follows from the width of the transition by Kaiser's formulas (Oppenheim and Schafer,
    Discrete-Time Signal Processing, 7.5), with taps / 2 - 1 for half the order, as in the authors' code.
    """
    attenuation = 2.285 * (taps // 2 - 1) * math.pi * 4 * half_width + 7.95  # dB
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    elif attenuation >= 21:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    else:
        beta = 0.0
    time = np.arange(taps) - (taps - 1) / 2
    filter_ = np.kaiser(taps, beta) * np.sinc(2 * cutoff * time)
    return filter_ / filter_.sum()
