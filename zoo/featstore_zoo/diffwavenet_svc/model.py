"""DiffWaveNetSVC (Zhang et al., "Leveraging diverse semantic-based audio pretrained models for singing voice
conversion", arXiv 2310.11160), after DiffSVC (Liu et al., arXiv 2105.13871): Config, the network, its loss.

Names of weights are Amphion's, whose parts `0.` and `1.` are `condition_encoder.` and `acoustic_mapper.` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from featstore_zoo.acoustic import AMPHION, SMOKE, Acoustic, AcousticConfig, Batch, frame_mask, masked_mean
from featstore_zoo.conditioner import Conditioner
from featstore_zoo.diffusion import Denoiser, Hears, Sampler, Schedule, check_sampling, draws, sample
from featstore_zoo.song import WINDOW, Features, Told, conditioned, in_windows, untold

TRAINING = {"frames": 512, "batch": 32, "learning_rate": 2e-4, "beta1": 0.9, "beta2": 0.999, "clip": 1.0}


@dataclass(frozen=True)
class Config(AcousticConfig):
    """The released size, 20 layers of 384. Presets: base; large, 40 of 512; amphion and amphion-large hear f0 and
    loudness as Amphion's weights do, from 512 singers.

    How it samples is no part of the weights.

    channels, layers, kernel, dilation_cycle: of the residual stack; dilations are 1, 2, 4 ... and start again.
    step_dim, step_hidden: of the encoder of steps.
    noise_steps, first_beta, last_beta, schedule: of the noise that training adds.
    sampler, sampling_steps: see `diffusion.sample`.
    clamp: keeps the log-mel that each step aims at in the range of the training data.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {}, "large": {"channels": 512, "layers": 40}, "amphion": AMPHION,
        "amphion-large": AMPHION | {"channels": 512, "layers": 40},
        "smoke": SMOKE | {"channels": 32, "layers": 6}}

    channels: int = 384
    layers: int = 20
    kernel: int = 3
    dilation_cycle: int = 4
    step_dim: int = 128
    step_hidden: int = 512
    noise_steps: int = 1000
    first_beta: float = 1e-4
    last_beta: float = 0.02
    schedule: Literal["linear", "cosine"] = "linear"
    sampler: Sampler = "dpm-solver++"
    sampling_steps: int = 20
    clamp: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampling(self.sampler, self.sampling_steps, self.noise_steps)
        _ = self.noising

    @property
    def noising(self) -> Schedule:
        """The schedule of noise."""
        return Schedule(self.noise_steps, self.first_beta, self.last_beta, self.schedule)


class Model(Acoustic):
    """Features to log-mel (B, T, n_mels), by sampling."""

    needs_generator = True
    SAMPLING = ("sampler", "sampling_steps", "clamp")
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.schedule = config.noising
        self.condition_encoder = Conditioner(config)
        self.acoustic_mapper = Denoiser(config.n_mels, config.condition_dim, config.channels, config.layers,
                                        config.kernel, config.dilation_cycle, config.step_dim, config.step_hidden)

    def forward(self, batch: Batch, generator: torch.Generator, start: int = 0) -> Tensor:
        """Log-mel (B, T, n_mels) for the features of `Conditioner.forward`, and "lengths" (B,) where padded.

        start: the frame of a song at which the batch begins, for a piece to have the noise of the whole.
        """
        condition = self.condition_encoder(batch)
        mask = frame_mask(batch, condition.shape[1])
        return self.unscaled(self.sampled(self.acoustic_mapper.hearing(condition, mask), condition, generator, start))

    def song(self, features: Features, frames: int, generator: torch.Generator, size: int = WINDOW,
             told: Told = untold) -> Tensor:
        """Log-mel (1, frames, n_mels) of a song; what `forward` gives at once (see `Acoustic.song`)."""
        condition = conditioned(self.condition_encoder, features, frames, size)
        calls = len(self.schedule.path(self.config.sampling_steps, self.config.sampler))
        made = self.sampled(in_windows(self.acoustic_mapper, condition, size, calls, told), condition, generator)
        return self.unscaled(made.to(self.mel_low.device)).cpu()

    def sampled(self, noise_of: Hears, like: Tensor, generator: torch.Generator, start: int = 0) -> Tensor:
        """A scaled log-mel (B, T, n_mels) of as many items and frames as `like`."""
        draw = draws(generator, like.new_empty(*like.shape[:2], self.config.n_mels), start)
        return sample(noise_of, draw(0), self.schedule, self.config.sampling_steps, self.config.sampler, draw,
                      1.0 if self.config.clamp else None)


def losses(model: Model, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    """"noise": mean squared difference of noise and what the network finds at a random step (Ho et al., equation 14).

    batch: "log-mel" (B, T, n_mels), the features, and "lengths" (B,) where padded: other frames do not count.
    """
    condition = model.condition_encoder(batch, generator)
    mel, mask = model.told(batch, condition)
    steps = model.config.noise_steps
    step = torch.randint(steps, (len(mel),), generator=generator, device=generator.device).to(mel.device)
    fresh = torch.randn(mel.shape, generator=generator, device=generator.device).to(mel)
    found = model.acoustic_mapper.hearing(condition, mask)(model.schedule.noisy(mel, fresh, step), step)
    return {"noise": masked_mean((found - fresh).square(), mask)}
