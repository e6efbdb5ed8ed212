"""Diffusion over frames: schedules of noise, samplers, EDM's scales, and the network that finds the noise.

Samplers know nothing of networks: they take a function of the noisy x and where it lies, and so are tested where the
answer is known. Time comes before bands, (B, T, D), outside of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from .vocoder import mixed, noise, seed_of

__all__ = ["Denoiser", "Hears", "Sampler", "Schedule", "check_sampling", "consistency", "draws", "edm_scales",
           "edm_solve", "karras_sigmas", "sample"]

Sampler = Literal["ddpm", "ddim", "dpm-solver++"]
Shape = Literal["linear", "cosine"]
Draw = Callable[[int], Tensor]
Hears = Callable[[Tensor, Tensor | float], Tensor]  # x (B, T, D), and (B,) steps or one for all, to (B, T, D)


# --- steps of noise (Ho et al., arXiv 2006.11239) and back


@dataclass(frozen=True)
class Schedule:
    """How much noise training adds by each of `steps`: betas from `first` to `last`, or the cosine of Nichol and
    Dhariwal (arXiv 2102.09672)."""

    steps: int = 1000
    first: float = 1e-4
    last: float = 0.02
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        if self.steps < 2 or not 0 < self.first <= self.last < 1 or self.shape not in get_args(Shape):
            raise ValueError(f"{self.steps} steps, betas {self.first:g} to {self.last:g}, {self.shape!r}: expected at "
                             f"least 2, 0 < first <= last < 1, one of {', '.join(get_args(Shape))}")

    @cached_property
    def kept(self) -> np.ndarray:
        """The share of the signal's power that is left after each step, (steps,) float64."""
        if self.shape == "linear":
            return np.cumprod(1 - np.linspace(self.first, self.last, self.steps))
        wave = np.cos((np.arange(self.steps + 1) / self.steps + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.cumprod(1 - np.minimum(1 - wave[1:] / wave[:-1], 0.999))

    @property
    def half_log_snr(self) -> np.ndarray:
        """log of signal over noise, (steps,)."""
        return 0.5 * np.log(self.kept / (1 - self.kept))

    def noisy(self, clean: Tensor, fresh: Tensor, step: Tensor) -> Tensor:
        """sqrt(kept) clean + sqrt(1 - kept) fresh at step (B,), for (B, T, D)."""
        kept = torch.tensor(self.kept, dtype=clean.dtype, device=clean.device)[step][:, None, None]
        return kept.sqrt() * clean + (1 - kept).sqrt() * fresh

    def path(self, count: int, sampler: Sampler) -> np.ndarray:
        """The steps that sampling in `count` visits, from the noisiest to step 0.

        Evenly, and for DPM-Solver++ evenly in the logarithm of signal over noise, where its error is even.
        """
        if not 1 <= count <= self.steps:
            raise ValueError(f"{count} steps of sampling: expected 1 to {self.steps}, those of training")
        if sampler != "dpm-solver++":
            return np.unique(np.linspace(self.steps - 1, 0, count).round().astype(int))[::-1]
        wanted = np.linspace(self.half_log_snr[-1], self.half_log_snr[0], count)
        return np.unique(np.abs(self.half_log_snr[:, None] - wanted).argmin(0))[::-1]


def sample(noise_of: Callable[[Tensor, int], Tensor], x: Tensor, schedule: Schedule, count: int, sampler: Sampler,
           draw: Draw | None = None, limit: float | None = 1.0) -> Tensor:
    """Clean x (B, T, D) from noise x, in `count` steps.

    noise_of: (x, step) -> the noise in x.
    sampler: "ddpm" (Ho et al., arXiv 2006.11239), "ddim" without noise (Song et al., 2010.02502), or "dpm-solver++"
        of second order, multistep (Lu et al., 2211.01095).
    draw: number of the step -> fresh noise (B, T, D), for ddpm.
    limit: what each step aims at, not the noisy x, is kept in [-limit, limit]; None leaves it.
    """
    path = schedule.path(count, sampler)
    before: Tensor | None = None  # what the step before aimed at
    for i, step in enumerate(path):
        left = float(schedule.kept[step])
        following = float(schedule.kept[path[i + 1]]) if i + 1 < len(path) else 1.0
        clean = (x - math.sqrt(1 - left) * noise_of(x, int(step))) / math.sqrt(left)
        clean = clean if limit is None else clean.clamp(-limit, limit)
        if following == 1.0:
            return clean
        if sampler == "ddpm":
            x = _ancestral(x, clean, left, following, draw, i)
            continue
        aim = clean
        if sampler == "dpm-solver++" and before is not None:
            last, now, then = (_half_log_snr(schedule.kept[k]) for k in (path[i - 1], step, path[i + 1]))
            aim = clean + 0.5 * (then - now) / (now - last) * (clean - before)
        # The exact solution where the aim is constant: noise keeps its direction (DDIM is this with the aim itself).
        ratio = math.sqrt((1 - following) / (1 - left))
        x = ratio * x + (math.sqrt(following) - ratio * math.sqrt(left)) * aim
        before = clean
    return x


def _ancestral(x: Tensor, clean: Tensor, left: float, following: float, draw: Draw | None, number: int) -> Tensor:
    """A draw from the posterior of x one step less noisy, given where it goes (Ho et al., equation 7)."""
    if draw is None:
        raise ValueError("ddpm adds noise in every step: give draw")
    beta = 1 - left / following
    mean = (math.sqrt(following) * beta * clean + math.sqrt(1 - beta) * (1 - following) * x) / (1 - left)
    return mean + math.sqrt((1 - following) / (1 - left) * beta) * draw(number + 1)


def _half_log_snr(kept: float) -> float:
    return 0.5 * math.log(kept / (1 - kept))


def draws(generator: torch.Generator, like: Tensor, start: int = 0) -> Draw:
    """Numbered normal noise (B, T, D) of the shape of `like`, a function of the generator's state, number and frame.

    start: the frame of the song at which `like` begins: a piece has the noise of the whole. Every item of a batch has
    the same, so that an item does not depend on its place or on its neighbours.
    """
    seed, (_, frames, bands) = seed_of(generator), like.shape

    def draw(number: int) -> Tensor:
        made = noise(mixed(seed, number), (1, 1), (start, start + frames), bands)
        return made.view(1, frames, bands).to(like).expand_as(like)

    return draw


def check_sampling(sampler: str, count: int, steps: int) -> None:
    """Raises ValueError unless a Config names a sampler and steps that training has."""
    if sampler not in get_args(Sampler):
        raise ValueError(f"sampler {sampler!r}: expected one of {', '.join(get_args(Sampler))}")
    if not 1 <= count <= steps:
        raise ValueError(f"sampling_steps {count}: expected 1 to {steps}, the steps of noise in training")


# --- levels of noise (Karras et al., "EDM", arXiv 2206.00364)


def karras_sigmas(count: int, least: float, most: float, rho: float) -> list[float]:
    """`count` levels of noise from `most` down to `least`, even in their rho-th root (EDM, equation 5)."""
    ends = most ** (1 / rho), least ** (1 / rho)
    return [(ends[0] + i / max(1, count - 1) * (ends[1] - ends[0])) ** rho for i in range(count)]


def edm_scales(sigma: Tensor, data: float, least: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise) for levels sigma (EDM, table 1), with the boundary of consistency models.

    At `least` the network has no part in the result (Song et al., arXiv 2303.01469, appendix C); c_skip is EDM's own,
    as in CoMoSVC's code, and 1 there but for (least / data)^2.
    """
    total = (sigma.square() + data**2).sqrt()
    return data**2 / total.square(), (sigma - least) * data / total, 1 / total, sigma.log() / 4


def edm_solve(denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Sequence[float], heun: bool = False
              ) -> Tensor:
    """x (B, T, D) at level sigmas[0] brought to 0 along the probability flow, by Euler's or Heun's steps.

    denoise: (x, sigma) -> the clean x. Heun's take two calls a step but the last (EDM, algorithm 1).
    """
    for now, then in pairwise([*sigmas, 0.0]):
        slope = (x - denoise(x, now)) / now
        ahead = x + (then - now) * slope
        if heun and then:
            slope = (slope + (ahead - denoise(ahead, then)) / then) / 2
            ahead = x + (then - now) * slope
        x = ahead
    return x


def consistency(denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Sequence[float], least: float,
                draw: Draw, mean: Tensor | float = 0.0) -> Tensor:
    """Clean x by a consistency model, in as many calls as there are sigmas (Song et al., 2303.01469, algorithm 1).

    mean: of the noise, in units of sigma.
    """
    clean = denoise(x, sigmas[0])
    for i, sigma in enumerate(sigmas[1:], 1):
        clean = denoise(clean + math.sqrt(sigma**2 - least**2) * (draw(i) + mean), sigma)
    return clean


# --- the network (Liu et al., "DiffSVC", arXiv 2105.13871; names of weights are Amphion's)


class StepEncoder(nn.Module):
    """Steps, or any numbers, (B,) to (B, channels): cosines and sines of `dim / 2` periods, then three layers."""

    def __init__(self, dim: int, hidden: int, channels: int) -> None:
        super().__init__()
        self.dim = dim
        self.out = nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                 nn.Linear(hidden, channels))

    def forward(self, step: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(self.dim // 2, device=step.device) * (-math.log(10000.0) / (self.dim // 2)))
        phase = step.float()[:, None] * rates
        return self.out(torch.cat([phase.cos(), phase.sin()], 1))


class Block(nn.Module):
    """A gated dilated convolution of (B, C, T), told the step and the condition; gives it again, and a skip."""

    def __init__(self, channels: int, condition: int, kernel: int, dilation: int) -> None:
        super().__init__()
        conv = nn.Conv1d(channels, 2 * channels, kernel, padding="same", dilation=dilation)
        self.gau = nn.ModuleDict({"conv": conv, "context_proj": nn.Conv1d(condition, 2 * channels, 1)})
        self.out_proj = nn.Conv1d(channels, 2 * channels, 1)

    def forward(self, x: Tensor, step: Tensor, told: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        heard = x + step[..., None]
        heard = heard if keep is None else heard * keep
        residual, skip = self.out_proj(gated(self.gau["conv"](heard).add_(told))).chunk(2, 1)
        return (x + residual).div_(math.sqrt(2)), skip


def gated(x: Tensor) -> Tensor:
    """tanh of the first half of (B, 2 C, T) times the sigmoid of the second; x is used up where nothing is learnt."""
    value, gate = x.chunk(2, 1)
    if x.requires_grad:
        return value.tanh() * gate.sigmoid()
    return value.tanh_().mul_(gate.sigmoid_())


class Stack(nn.Module):
    """The blocks one behind the other, dilations 1, 2, 4 ... that start again every `cycle`; all skips are summed."""

    def __init__(self, bands: int, condition: int, channels: int, layers: int, kernel: int, cycle: int) -> None:
        super().__init__()
        self.input = nn.Sequential(nn.Conv1d(bands, channels, 1), nn.ReLU())
        self.residual_blocks = nn.ModuleList(Block(channels, condition, kernel, 2 ** (i % cycle))
                                             for i in range(layers))
        last = nn.Conv1d(channels, bands, 1)
        self.out_proj = nn.Sequential(nn.Conv1d(channels, channels, 1), nn.ReLU(), last)
        for part in self.modules():
            if isinstance(part, nn.Conv1d):
                nn.init.kaiming_normal_(part.weight)
        nn.init.zeros_(last.weight)


class Denoiser(nn.Module):
    """x (B, T, D), where it lies, and the condition to (B, T, D). What blocks make of the condition is made once:

        noise_of = denoiser.hearing(condition)       # does not depend on x or on the step
        for step in ...: noise_of(x, step)

    reach: frames to either side that a frame depends on.
    """

    def __init__(self, bands: int, condition: int, channels: int, layers: int, kernel: int = 3, cycle: int = 4,
                 step_dim: int = 128, step_hidden: int = 512) -> None:
        super().__init__()
        if min(bands, condition, channels, layers, cycle, step_hidden) < 1 or kernel % 2 == 0 or step_dim % 2:
            raise ValueError(f"channels {channels}, layers {layers}, cycle {cycle} must be at least 1, kernel {kernel} "
                             f"odd, step_dim {step_dim} even")
        self.reach = sum(kernel // 2 * 2 ** (i % cycle) for i in range(layers))
        self.diff_encoder = StepEncoder(step_dim, step_hidden, channels)
        self.neural_network = Stack(bands, condition, channels, layers, kernel, cycle)

    def hearing(self, condition: Tensor, mask: Tensor | None = None) -> Hears:
        """(x, step) -> what the network gives for them and this condition."""
        told = self.tell(condition)
        return lambda x, step: self(x, step, told, mask)

    def tell(self, condition: Tensor) -> list[Tensor]:
        """The condition (B, T, K) as each block hears it, (B, 2 C, T)."""
        condition = condition.transpose(1, 2)
        return [block.gau["context_proj"](condition)  # type: ignore[operator, index]
                for block in self.neural_network.residual_blocks]

    def forward(self, x: Tensor, step: Tensor | float, told: list[Tensor], mask: Tensor | None = None) -> Tensor:
        """mask: True (B, T) on frames that count; what is given for those does not depend on the others."""
        if not isinstance(step, Tensor):
            step = torch.full((len(x),), float(step), device=x.device)
        net, keep = self.neural_network, None if mask is None else mask[:, None].to(x.dtype)
        y = net.input(x.transpose(1, 2))
        step = self.diff_encoder(step)
        total = torch.zeros_like(y)
        for block, heard in zip(net.residual_blocks, told, strict=True):
            y, skip = block(y, step, heard, keep)
            total = total + skip if skip.requires_grad else total.add_(skip)
        made: Tensor = net.out_proj(total / math.sqrt(len(told))).transpose(1, 2)
        return made
