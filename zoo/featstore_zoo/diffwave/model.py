"""DiffWave (Kong, Ping, Huang, Zhao and Catanzaro, arXiv 2009.09761): Config, the parts, the network, its loss.

Names of weights are those of LMNT's code, which others follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featstore_zoo.vocoder import Span, Vocoder, VocoderConfig, noise, seed_of, upsampled, widened


@dataclass(frozen=True)
class Config(VocoderConfig):
    """DiffWave base (2.7 M) for the mel contract 24k-100. Presets: base, fast, ddim, amphion.

    How it samples is no part of the weights: any of schedule, sampler and clamp serves what was trained with another.

    channels, layers: of the residual stack; dilations are 1, 2, 4 ... and start again every `dilation_cycle` layers.
    mel_rates: two steps that bring the log-mel to samples; their product is hop_length.
    noise_steps, first_beta, last_beta: of the noise that training adds, rising linearly.
    schedule: "full" samples in `noise_steps`, "fast" along `fast_betas`.
    sampler: "ddpm" adds noise in every step (Ho et al., arXiv 2006.11239), "ddim" in none (Song et al., 2010.02502).
    clamp: "x0" keeps the waveform that each step aims at within full scale; "xt" keeps the noisy one there, as LMNT's
        and Amphion's code do, which cuts noise off and is for comparison with them.
    mel_input: what the network is given of the log-mel: "log" as it is, or "decibels", LMNT's: of magnitudes normalised
        by the window's energy, -80 to 20 dB brought to 0 to 1, and what lies beyond cut off.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {}, "fast": {"schedule": "fast"}, "ddim": {"sampler": "ddim"}, "amphion": {"clamp": "xt"},
        "smoke": {"channels": 16, "layers": 10, "schedule": "fast"}}

    channels: int = 64
    layers: int = 30
    dilation_cycle: int = 10
    mel_rates: tuple[int, ...] = (16, 16)
    noise_steps: int = 50
    first_beta: float = 1e-4
    last_beta: float = 0.05
    fast_betas: tuple[float, ...] = (1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5)
    schedule: Literal["full", "fast"] = "full"
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    clamp: Literal["x0", "xt"] = "x0"
    mel_input: Literal["log", "decibels"] = "log"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mel_rates) != 2 or math.prod(self.mel_rates) != self.hop_length:
            raise ValueError(f"mel_rates {self.mel_rates} must be two numbers whose product is hop_length "
                             f"{self.hop_length}")
        if any(rate % 2 for rate in self.mel_rates):
            raise ValueError(f"mel_rates {self.mel_rates} must be even, or the steps up do not keep to the samples")
        if min(self.channels, self.layers, self.dilation_cycle) < 1 or self.noise_steps < 2:
            raise ValueError(f"channels {self.channels}, layers {self.layers} and dilation_cycle {self.dilation_cycle} "
                             f"must be at least 1, noise_steps {self.noise_steps} at least 2")
        if not 0 < self.first_beta < self.last_beta < 1 or not all(0 < beta < 1 for beta in self.fast_betas):
            raise ValueError(f"first_beta {self.first_beta:g} < last_beta {self.last_beta:g} and fast_betas "
                             f"{self.fast_betas} must lie between 0 and 1")
        for name, choices in (("schedule", ("full", "fast")), ("sampler", ("ddpm", "ddim")), ("clamp", ("x0", "xt")),
                              ("mel_input", ("log", "decibels"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, not {getattr(self, name)!r}")
        if self.mel_input == "decibels" and self.power != 1:
            raise ValueError("mel_input=decibels is made of magnitudes: power must be 1")
        if self.schedule == "fast" and kept(self.fast_betas)[-1] < kept(self.betas)[-1]:
            raise ValueError(f"fast_betas {self.fast_betas} end in more noise than training adds: make them smaller")

    @property
    def betas(self) -> np.ndarray:
        """Share of noise that training adds in each step, (noise_steps,)."""
        return np.linspace(self.first_beta, self.last_beta, self.noise_steps)

    @property
    def sampling(self) -> tuple[np.ndarray, np.ndarray]:
        """Betas of the steps of sampling, and where they lie between those of training, both (K,)."""
        betas = self.betas if self.schedule == "full" else np.array(self.fast_betas)
        where = np.interp(-np.sqrt(kept(betas)), -np.sqrt(kept(self.betas)), np.arange(self.noise_steps))
        return betas, where


def kept(betas: Any) -> np.ndarray:
    """The share of the signal's power that is left after each step."""
    return np.cumprod(1 - np.asarray(betas, np.float64))


def hann_norm(win_length: int) -> float:
    """The root of the sum of squares of a periodic Hann window, by which torchaudio's `normalized` divides."""
    return math.sqrt(3 / 8 * win_length)


class StepEmbedding(nn.Module):
    """Step (B,), also between two, to (B, 512): sines of 64 periods (equation 7), then two layers.

    The table is computed in float32, as published weights know it: the highest frequency turns 78,000 times by step 49,
    and what is left of its phase in float32 is not the sine of equation 7 but what the network has learnt.
    """

    table: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        phase = torch.arange(steps)[:, None] * 10.0 ** (torch.arange(64) * 4.0 / 63.0)
        self.register_buffer("table", torch.cat([phase.sin(), phase.cos()], 1), persistent=False)
        self.projection1 = nn.Linear(128, 512)
        self.projection2 = nn.Linear(512, 512)

    def forward(self, step: Tensor) -> Tensor:
        low = step.floor().long()
        x = torch.lerp(self.table[low], self.table[step.ceil().long()], (step - low).to(self.table.dtype)[:, None])
        return F.silu(self.projection2(F.silu(self.projection1(x))))


class MelUpsampler(nn.Module):
    """Log-mel (B, n_mels, T) to (B, n_mels, T hop), by two transposed convolutions over the picture."""

    def __init__(self, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.ConvTranspose2d(1, 1, (3, 2 * rate), (1, rate), padding=(1, rate // 2))
                                  for rate in rates)

    def forward(self, log_mel: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(log_mel[:, None]), 0.4)
        return F.leaky_relu(self.conv2(x), 0.4)[:, 0]


class ResidualLayer(nn.Module):
    """A gated dilated convolution of the waveform (B, D, N), told step and log-mel; gives it again, and a skip."""

    def __init__(self, config: Config, dilation: int) -> None:
        super().__init__()
        size = config.channels
        self.dilated_conv = nn.Conv1d(size, 2 * size, 3, padding=dilation, dilation=dilation)
        self.diffusion_projection = nn.Linear(512, size)
        self.conditioner_projection = nn.Conv1d(config.n_mels, 2 * size, 1)
        self.output_projection = nn.Conv1d(size, 2 * size, 1)

    def forward(self, x: Tensor, step: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        y = self.dilated_conv(x + self.diffusion_projection(step)[..., None]) + self.conditioner_projection(condition)
        gate, value = y.chunk(2, 1)
        residual, skip = self.output_projection(gate.sigmoid() * value.tanh()).chunk(2, 1)
        return (x + residual) / math.sqrt(2), skip


class Model(Vocoder):
    """Log-mel (B, T, n_mels) to waveform (B, T hop_length), by sampling."""

    needs_generator = True
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        betas, where = config.sampling
        self.left, self.where = kept(betas).tolist(), where.tolist()  # of signal after each step; its place in training
        self.input_projection = nn.Conv1d(1, config.channels, 1)
        self.diffusion_embedding = StepEmbedding(config.noise_steps)
        self.spectrogram_upsampler = MelUpsampler(config.mel_rates)
        self.residual_layers = nn.ModuleList(ResidualLayer(config, 2 ** (i % config.dilation_cycle))
                                             for i in range(config.layers))
        self.skip_projection = nn.Conv1d(config.channels, config.channels, 1)
        self.output_projection = nn.Conv1d(config.channels, 1, 1)
        for part in self.modules():
            if isinstance(part, nn.Conv1d):
                nn.init.kaiming_normal_(part.weight)
        nn.init.zeros_(self.output_projection.weight)

    @property
    def receptive_field(self) -> tuple[int, int]:
        reach = sum(2 ** (i % self.config.dilation_cycle) for i in range(self.config.layers))
        # Each step looks around what the one before it made.
        span: Span = widened((0, self.hop_length - 1), len(self.left) * reach)
        for rate in self.config.mel_rates[::-1]:
            span = upsampled(span, 2 * rate, rate)
        return -span[0], span[1]

    def source(self, log_mel: Tensor, f0: Tensor | None, generator: torch.Generator | None,
               span: tuple[int, int] | None = None) -> Tensor:
        """The noise of every step, (B, K, T hop_length): K is 1 for ddim, and the number of steps for ddpm."""
        if generator is None:
            raise ValueError("the source is noise: give a generator")
        draws = 1 if self.config.sampler == "ddim" else len(self.left)
        span = span or (0, log_mel.shape[1])
        return noise(seed_of(generator), (log_mel.shape[0], draws), span, self.hop_length).to(log_mel)

    def render(self, log_mel: Tensor, source: Tensor | None = None) -> Tensor:
        """Runs the steps from the last to the first; `source` is their noise, (B, K, T hop_length)."""
        if source is None:
            raise ValueError("render needs the noise: source(log_mel, None, generator)")
        condition, count = self.condition(log_mel), len(self.left)
        x = source[:, 0]
        for n in reversed(range(count)):
            step = torch.full((len(x),), self.where[n], dtype=torch.float32, device=x.device)
            before = self.left[n - 1] if n else 1.0
            fresh = source[:, count - n] if n and self.config.sampler == "ddpm" else None
            x = self._previous(x, self.noise(x, step, condition), fresh, self.left[n], before)
        return x

    def _previous(self, x: Tensor, noise: Tensor, fresh: Tensor | None, left: float, before: float) -> Tensor:
        """x one step less noisy: `left` of the power of x is signal, `before` of what is returned.

        Through the clean waveform that x and its noise imply (Ho et al., equation 7, or Song et al., equation 12 with
        sigma = 0).
        """
        clean = (x - math.sqrt(1 - left) * noise) / math.sqrt(left)
        if self.config.clamp == "x0":
            clean = clean.clamp(-1, 1)
            noise = (x - math.sqrt(left) * clean) / math.sqrt(1 - left)  # what that leaves of x
        if self.config.sampler == "ddim":
            x = math.sqrt(before) * clean + math.sqrt(1 - before) * noise
        else:
            beta = 1 - left / before
            x = (math.sqrt(before) * beta * clean + math.sqrt(1 - beta) * (1 - before) * x) / (1 - left)
            if fresh is not None:
                x = x + math.sqrt((1 - before) / (1 - left) * beta) * fresh
        return x.clamp(-1, 1) if self.config.clamp == "xt" else x

    def condition(self, log_mel: Tensor) -> Tensor:
        """Log-mel (B, T, n_mels) at the rate of samples, (B, n_mels, T hop_length); the same in every step."""
        return self.spectrogram_upsampler(self.scaled(log_mel).transpose(1, 2))

    def scaled(self, log_mel: Tensor) -> Tensor:
        """The log-mel (B, T, n_mels) as the network was taught it, by `mel_input`."""
        if self.config.mel_input == "log":
            return log_mel
        lg = log_mel / math.log(10) if self.config.log_base == "e" else log_mel
        return (0.2 * (lg - math.log10(hann_norm(self.config.win_length))) + 0.8).clamp(0, 1)  # (20 lg x + 80) / 100

    def noise(self, x: Tensor, step: Tensor, condition: Tensor) -> Tensor:
        """The noise (B, N) in a noisy waveform x (B, N) at step (B,) of training, told the log-mel as `condition`."""
        y = F.relu(self.input_projection(x[:, None]))  # (B, D, N)
        step = self.diffusion_embedding(step)
        total = torch.zeros_like(y)
        for layer in self.residual_layers:
            y, skip = layer(y, step, condition)
            total = total + skip
        y = F.relu(self.skip_projection(total / math.sqrt(len(self.residual_layers))))
        return self.output_projection(y)[:, 0]


def losses(model: Model, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """"noise": mean |difference| of noise and what the network finds at a random step (L1, as in LMNT's code).

    batch: "log-mel" (B, T, n_mels), "wave" (B, T hop_length).
    """
    wave = batch["wave"]
    steps = model.config.noise_steps
    step = torch.randint(steps, (len(wave),), generator=generator, device=generator.device).to(wave.device)
    noise = torch.randn(wave.shape, generator=generator, device=generator.device).to(wave)
    left = torch.tensor(kept(model.config.betas), dtype=wave.dtype, device=wave.device)[step][:, None]
    noisy = left.sqrt() * wave + (1 - left).sqrt() * noise
    return {"noise": F.l1_loss(model.noise(noisy, step.float(), model.condition(batch["log-mel"])), noise)}
