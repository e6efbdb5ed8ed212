"""NSF-HiFiGAN: the source of a neural source filter (Wang, Takaki and Yamagishi, arXiv 1904.12088) in HiFi-GAN.

HiFi-GAN is Kong et al., arXiv 2010.05646; the two were joined by the openvpi / DiffSinger community, whose names of
weights these are. Config, then the source, then the filter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from featstore_zoo.gan import GanConfig
from featstore_zoo.residual import SLOPE, ResBlock1, check_blocks, conv, reach
from featstore_zoo.vocoder import Span, Vocoder, check_steps_up, mixed, noise, seed_of, upsampled, widened

FRAMES = 2048  # of source made at once: an hour of nine sines would not fit in memory


@dataclass(frozen=True)
class Config(GanConfig):
    """The layout of the DiffSinger community for the mel contract 24k-100. Presets: base, 44k-128, amphion.

    44k-128 is the community's published size at 44.1 kHz, hop 512; amphion is Amphion's recipe (30.8 M).

    upsample_rates: their product is hop_length.
    upsample_kernels: of the transposed convolutions; kernel - rate is even.
    channels: before the first step up; each step halves them.
    block_kernels, block_dilations: of the parallel residual blocks behind each step.
    harmonics: sines above the one at f0. Those above half the sample rate are left out (published sources let them
        alias).
    sine_amplitude, noise_std: of each sine and of the noise on it; unvoiced frames are noise of sine_amplitude / 3.
    amphion_defect: makes Amphion's output from Amphion's weights. Its code overwrites the source with the signal, which
        is thereby doubled in every stage: f0 is not heard, and the source learns nothing. Only for old weights.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {},
        "44k-128": {"sample_rate": 44100, "n_fft": 2048, "win_length": 2048, "hop_length": 512, "n_mels": 128,
                    "fmin": 40.0, "fmax": 16000.0, "upsample_rates": (8, 8, 2, 2, 2),
                    "upsample_kernels": (16, 16, 4, 4, 4)},
        "amphion": {"channels": 768, "upsample_rates": (8, 4, 2, 2, 2), "upsample_kernels": (16, 8, 4, 4, 4),
                    "discriminators": ("mpd", "msd", "ms_stft", "ms_sb_cqt"), "mpd_last_stride": 3},
        "smoke": {"channels": 64, "block_kernels": (3,), "block_dilations": ((1, 3),),
                  "discriminators": ("mpd",), "discriminator_width": 0.1, "mpd_periods": (2, 3)},
    }

    upsample_rates: tuple[int, ...] = (8, 8, 2, 2)
    upsample_kernels: tuple[int, ...] = (16, 16, 4, 4)
    channels: int = 512
    block_kernels: tuple[int, ...] = (3, 7, 11)
    block_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    harmonics: int = 8
    sine_amplitude: float = 0.1
    noise_std: float = 0.003
    amphion_defect: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps_up(self.upsample_rates, self.upsample_kernels, self.channels, self.hop_length)
        check_blocks(self.block_kernels, self.block_dilations)
        if self.harmonics < 0 or not (self.sine_amplitude > 0 and self.noise_std >= 0):
            raise ValueError(f"harmonics {self.harmonics} and noise_std {self.noise_std:g} must be at least 0, and "
                             f"sine_amplitude {self.sine_amplitude:g} above 0")

    @property
    def block_reach(self) -> int:
        """Samples that the widest residual block looks to either side."""
        return reach(self.block_kernels, self.block_dilations)


class Source(nn.Module):
    """Sines at the multiples of f0 (B, T) and noise, mixed to one excitation (B, 1, T hop); equations 3 to 5.

    f0 is held over its frame and the phase runs on from frame to frame, in double precision (one hour at 24 kHz is 1e7
    turns). Overtones start at a random phase. Unvoiced frames are noise alone; there the phase stands still.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.l_linear = nn.Linear(config.harmonics + 1, 1)

    def forward(self, f0: Tensor, seed: int, span: tuple[int, int]) -> Tensor:
        """The excitation of frames [start, stop) of f0, (B, 1, (stop - start) hop)."""
        count = self.config.harmonics + 1
        first = torch.rand(len(f0), count, generator=torch.Generator().manual_seed(mixed(seed))).to(f0)
        first[:, 0] = 0
        pieces = []
        for frames in torch.arange(*span).split(FRAMES):
            start, stop = int(frames[0]), int(frames[-1]) + 1
            hiss = noise(seed, (len(f0), count), (start, stop), self.config.hop_length).to(f0)
            pieces.append(self.excite(f0, first, hiss, start, stop))
        return torch.cat(pieces, 2)

    def excite(self, f0: Tensor, first: Tensor, hiss: Tensor, start: int, stop: int) -> Tensor:
        """(B, 1, (stop - start) hop) for frames [start, stop) of f0 (B, T).

        first: the phase of each sine before the song begins, in turns, (B, K). hiss: normal numbers (B, K, samples).
        """
        config = self.config
        exact = f0.detach().to("cpu" if f0.device.type == "mps" else f0.device, torch.float64)  # MPS has no float64
        step = exact / config.sample_rate  # turns per sample, (B, T)
        begin = (torch.cumsum(step, 1) - step) * config.hop_length  # at the sample before the frame, (B, T)
        begin, step = (begin - begin.floor())[:, start:stop], step[:, start:stop]
        order = torch.arange(1, config.harmonics + 2, dtype=exact.dtype, device=exact.device)
        inside = torch.arange(1, config.hop_length + 1, dtype=exact.dtype, device=exact.device)
        turns = begin[..., None] + step[..., None] * inside  # (B, T, hop)
        phase = turns[..., None] * order + first.to(exact)[:, None, None]  # (B, T, hop, K)
        heard = (step[..., None, None] * order < 0.5).to(exact)
        sines = config.sine_amplitude * (heard * torch.sin(2 * math.pi * (phase - phase.floor()))).to(f0)
        hiss = hiss.unflatten(2, (-1, config.hop_length)).permute(0, 2, 3, 1)  # (B, T, hop, K)
        voiced = (f0[:, start:stop] > 0)[..., None, None]
        excitation = torch.where(voiced, sines + config.noise_std * hiss, config.sine_amplitude / 3 * hiss)
        excitation = self.l_linear(excitation.to(self.l_linear.weight.dtype))
        return torch.tanh(excitation).flatten(1)[:, None]


class SourceConv(nn.Conv1d):
    """The excitation (B, 1, N) brought to the rate of a stage, (B, D, N / stride); `stride` samples become one."""

    def __init__(self, channels: int, stride: int) -> None:
        kernel = 2 * stride if stride > 1 else 1
        super().__init__(1, channels, kernel, stride)
        left = (kernel - stride) // 2
        self.ends = (left, kernel - stride - left)  # both: an odd stride would otherwise lose a sample

    def forward(self, source: Tensor) -> Tensor:
        return super().forward(F.pad(source, self.ends))


class Model(Vocoder):
    """The generator: log-mel (B, T, n_mels) and f0 (B, T) in Hz, 0 where unvoiced, to waveform (B, T hop_length)."""

    needs_f0 = True
    needs_generator = True
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.m_source = Source(config)
        self.conv_pre = conv(config.n_mels, config.channels, 7)
        self.ups, self.noise_convs, self.resblocks = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        size, stride = config.channels, config.hop_length
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernels, strict=True):
            up = nn.ConvTranspose1d(size, size // 2, kernel, rate, padding=(kernel - rate) // 2)
            self.ups.append(weight_norm(up))
            size, stride = size // 2, stride // rate
            self.noise_convs.append(SourceConv(size, stride))
            self.resblocks.extend(ResBlock1(size, width, dilations) for width, dilations
                                  in zip(config.block_kernels, config.block_dilations, strict=True))
        self.conv_post = conv(size, 1, 7)

    @property
    def receptive_field(self) -> tuple[int, int]:
        mel: Span = widened((0, self.hop_length - 1), 3)
        source, stride = mel, 1  # in samples: the source enters at every stage
        for rate, kernel in zip(self.config.upsample_rates[::-1], self.config.upsample_kernels[::-1], strict=True):
            mel = widened(mel, self.config.block_reach)
            reach = stride if stride > 1 else 0
            source = min(source[0], mel[0] * stride - reach), max(source[1], (mel[1] + 1) * stride + reach)
            mel, stride = upsampled(mel, kernel, rate), stride * rate
        mel = widened(mel, 3)
        return (max(-mel[0], math.ceil(-source[0] / self.hop_length)), max(mel[1], source[1] // self.hop_length))

    def source(self, log_mel: Tensor, f0: Tensor | None, generator: torch.Generator | None,
               span: tuple[int, int] | None = None) -> Tensor:
        """The excitation (B, 1, T hop_length)."""
        if f0 is None or generator is None:
            raise ValueError("the source is made of f0 and of noise: give f0 and generator")
        return self.m_source(f0.float(), seed_of(generator), span or (0, f0.shape[1]))

    def render(self, log_mel: Tensor, source: Tensor | None = None) -> Tensor:
        if source is None:
            raise ValueError("render needs the excitation: source(log_mel, f0, generator)")
        parallel = len(self.config.block_kernels)
        x = self.conv_pre(log_mel.transpose(1, 2))  # (B, D, T)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))  # T grows by the rate, D is halved
            x = x + (x if self.config.amphion_defect else self.noise_convs[i](source))
            blocks = self.resblocks[i * parallel : (i + 1) * parallel]
            x = sum(block(x) for block in blocks) / parallel
        x = self.conv_post(F.leaky_relu(x))  # with torch's slope of 0.01 here, as in HiFi-GAN's code
        return torch.tanh(x).squeeze(1)
