"""CoMoSVC (Lu et al., "CoMoSVC: consistency model-based singing voice conversion", arXiv 2401.01792).

Config, the decoder, the network, its losses. The diffusion is EDM's (Karras et al., arXiv 2206.00364), the distillation
that of consistency models (Song et al., arXiv 2303.01469). Names of weights are Amphion's, whose parts `0.` and `1.`
are `condition_encoder.` and `acoustic_mapper.` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from featstore_zoo.acoustic import (
    AMPHION,
    SMOKE,
    Acoustic,
    AcousticConfig,
    Batch,
    frame_mask,
    gaussian_nll,
    masked_mean,
    ssim_distance,
)
from featstore_zoo.conditioner import Conditioner
from featstore_zoo.diffusion import Denoiser, Hears, consistency, draws, edm_scales, edm_solve, karras_sigmas
from featstore_zoo.song import WINDOW, Features, Told, conditioned, in_windows, part, untold
from featstore_zoo.transformer import RelativeMapper

TRAINING = {"frames": 512, "batch": 64, "learning_rate": 4e-4, "beta1": 0.9, "beta2": 0.999, "clip": 1.0}


@dataclass(frozen=True)
class Config(AcousticConfig):
    """The teacher of Amphion's recipe. Presets: teacher, student, and amphion and amphion-student, which hear f0 and
    loudness as Amphion's weights do, from 512 singers.

    stage: "teacher" learns to take noise away; "student" to give what the teacher's path leads to, at once.
    hidden, heads, encoder_layers, kernel, dropout: of the transformer that gives the mean.
    channels, layers, dilation_cycle, step_dim, step_hidden: of the residual stack.
    sigma_data: the spread that scaled log-mels are taken to have. sigma_min, sigma_max, rho: levels of noise.
    sigma_mean, sigma_spread: of the logarithm of the levels that the teacher learns at.
    levels: on the student's path. target_decay: of the average of the student that it is held to.
    sampling_steps: calls of the network, 1 or a few for a student. heun: a teacher's steps of second order, two calls
        each.
    lambda_*: weights of the teacher's losses.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {}, "student": {"stage": "student", "sampling_steps": 1},
        "amphion": AMPHION, "amphion-student": AMPHION | {"stage": "student", "sampling_steps": 1},
        "smoke": SMOKE | {"encoder_layers": 2, "hidden": 64, "channels": 32, "layers": 4, "sampling_steps": 10}}

    stage: Literal["teacher", "student"] = "teacher"
    hidden: int = 512
    heads: int = 2
    encoder_layers: int = 6
    kernel: int = 3
    dropout: float = 0.1
    channels: int = 384
    layers: int = 20
    dilation_cycle: int = 4
    step_dim: int = 128
    step_hidden: int = 512
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_mean: float = -1.2
    sigma_spread: float = 1.2
    levels: int = 40
    target_decay: float = 0.95
    sampling_steps: int = 40
    heun: bool = False
    lambda_diffusion: float = 1.0
    lambda_prior: float = 1.0
    lambda_ssim: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in ("teacher", "student"):
            raise ValueError(f"stage must be teacher or student, not {self.stage!r}")
        if not 0 < self.sigma_min < self.sigma_max or min(self.sigma_data, self.rho, self.sigma_spread) <= 0:
            raise ValueError(f"expected 0 < sigma_min {self.sigma_min:g} < sigma_max {self.sigma_max:g}; sigma_data, "
                             "rho and sigma_spread above 0")
        if self.levels < 2 or self.sampling_steps < 1 or not 0 <= self.target_decay < 1:
            raise ValueError(f"levels {self.levels} must be at least 2, sampling_steps {self.sampling_steps} at least "
                             f"1, target_decay {self.target_decay:g} in [0, 1)")
        if self.kernel % 2 == 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"kernel {self.kernel} must be odd and dropout {self.dropout:g} in [0, 1)")
        weights = (self.lambda_diffusion, self.lambda_prior, self.lambda_ssim)
        if min(weights) < 0 or self.lambda_diffusion == 0:
            raise ValueError(f"weights of losses {weights}: expected at least 0, and the diffusion's above it")


class Decoder(nn.Module):
    """Takes noise off a log-mel that is told its mean. A student has its own target and its teacher with it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.denoise_fn = self._network()
        if config.stage == "student":
            self.denoise_fn_ema, self.denoise_fn_pretrained = self._network(), self._network()
            for fixed in (self.denoise_fn_ema, self.denoise_fn_pretrained):
                fixed.load_state_dict(self.denoise_fn.state_dict())
                fixed.requires_grad_(False)

    def _network(self) -> Denoiser:
        c = self.config
        return Denoiser(c.n_mels, c.n_mels, c.channels, c.layers, c.kernel, c.dilation_cycle, c.step_dim, c.step_hidden)

    def denoise(self, hears: Hears, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The clean log-mel (B, T, n_mels) behind x at level sigma, one number or (B,) (EDM, equation 7).

        hears: a network that has been told its condition.
        """
        if not isinstance(sigma, Tensor):
            sigma = torch.full((len(x),), sigma, device=x.device)
        skip, out, scale, where = edm_scales(sigma, self.config.sigma_data, self.config.sigma_min)
        found = hears(scale[:, None, None] * x, where)
        return skip[:, None, None] * x + out[:, None, None] * found

    def sample(self, mean: Tensor, mask: Tensor | None, generator: torch.Generator, start: int = 0) -> Tensor:
        """A log-mel (B, T, n_mels) with that mean, in `sampling_steps`."""
        draw = draws(generator, mean, start)
        return self.solve(mean, self.used.hearing(mean, mask), draw(0), draw)

    @property
    def used(self) -> Denoiser:
        """The network that samples."""
        return self.denoise_fn_ema if self.config.stage == "student" else self.denoise_fn

    @property
    def calls(self) -> int:
        """How often sampling asks the network."""
        steps = self.config.sampling_steps
        return 2 * steps - 1 if self.config.heun and self.config.stage == "teacher" else steps

    def solve(self, mean: Tensor, hears: Hears, noise: Tensor, draw: Any = None) -> Tensor:
        """As `sample`, from given noise: it begins around the mean, as the levels of training lie."""
        c = self.config

        def clean(x: Tensor, sigma: float) -> Tensor:
            return self.denoise(hears, x, sigma)

        x = (noise + mean) * c.sigma_max
        if c.stage == "teacher":
            return edm_solve(clean, x, karras_sigmas(c.sampling_steps, c.sigma_min, c.sigma_max, c.rho), c.heun)
        # Never down to sigma_min, where a consistency model gives back what it is given.
        sigmas = karras_sigmas(c.sampling_steps + 1, c.sigma_min, c.sigma_max, c.rho)[:-1]
        return consistency(clean, x, sigmas, c.sigma_min, draw, mean)

    def teacher_error(self, mel: Tensor, mean: Tensor, mask: Tensor | None, normal: Tensor, noise: Tensor) -> Tensor:
        """Weighted squared differences (B, T, n_mels) of the log-mel and what is found at the level
        exp(sigma_mean + sigma_spread n) (EDM, table 1).

        normal: n (B,); noise: (B, T, n_mels), which is shifted by the mean.
        """
        c = self.config
        sigma = (c.sigma_mean + c.sigma_spread * normal).exp()
        found = self.denoise(self.denoise_fn.hearing(mean, mask), mel + (noise + mean) * sigma[:, None, None], sigma)
        weight = (sigma.square() + c.sigma_data**2) / (sigma * c.sigma_data).square()
        return weight[:, None, None] * (found - mel).square()

    def student_error(self, mel: Tensor, mean: Tensor, mask: Tensor | None, level: Tensor, noise: Tensor) -> Tensor:
        """Squared differences (B, T, n_mels) of student and target at the two ends of a step of the teacher's path
        (Song et al., equation 7).

        level: (B,), 0 to levels - 2, counted from the least noise; the step is Heun's.
        """
        c = self.config
        ladder = torch.tensor(karras_sigmas(c.levels, c.sigma_min, c.sigma_max, c.rho)[::-1], dtype=mel.dtype,
                              device=mel.device)
        low, high = ladder[level], ladder[level + 1]
        x = mel + (noise + mean) * high[:, None, None]
        with torch.no_grad():
            teacher, step = self.denoise_fn_pretrained.hearing(mean, mask), (low - high)[:, None, None]
            slope = (x - self.denoise(teacher, x, high)) / high[:, None, None]
            ahead = x + step * slope
            again = (ahead - self.denoise(teacher, ahead, low)) / low[:, None, None]
            ahead = x + step * (slope + again) / 2
            aim = self.denoise(self.denoise_fn_ema.hearing(mean, mask), ahead, low)
        found = self.denoise(self.denoise_fn.hearing(mean, mask), x, high)
        return (found - aim).square()

    @torch.no_grad()
    def follow(self) -> None:
        """Brings the target a little nearer to the student."""
        for average, weight in zip(self.denoise_fn_ema.parameters(), self.denoise_fn.parameters(), strict=True):
            average.lerp_(weight, 1 - self.config.target_decay)


class Mapper(nn.Module):
    """The mean of the log-mel, and around it what the decoder makes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = RelativeMapper(config.condition_dim, config.n_mels, config.hidden, config.heads,
                                      config.encoder_layers, config.kernel, config.dropout)
        self.decoder = Decoder(config)


class Model(Acoustic):
    """Features to log-mel (B, T, n_mels), by sampling. A student begins as a copy of its teacher: `learn_from`."""

    needs_generator = True
    SAMPLING = ("sampling_steps", "heun")
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.condition_encoder = Conditioner(config)
        self.acoustic_mapper = Mapper(config)
        if config.stage == "student":  # the teacher knows this mean and no other
            self.condition_encoder.requires_grad_(False)
            self.acoustic_mapper.encoder.requires_grad_(False)

    def learn_from(self, teacher: Model) -> Self:
        """This student with the weights of a teacher of the same architecture."""
        if (self.config.stage, teacher.config.stage) != ("student", "teacher"):
            raise ValueError(f"a {self.config.stage} cannot learn from a {teacher.config.stage}: expected a student "
                             "and a teacher")
        weights = teacher.state_dict()
        own = "acoustic_mapper.decoder.denoise_fn"
        for name, weight in list(weights.items()):
            if name.startswith(f"{own}."):
                weights |= {name.replace(own, f"{own}_{other}"): weight for other in ("ema", "pretrained")}
        self.load_state_dict(weights)
        return self

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.config.stage == "student":  # what is fixed has no dropout
            self.condition_encoder.eval()
            self.acoustic_mapper.encoder.eval()
        return self

    def forward(self, batch: Batch, generator: torch.Generator, start: int = 0) -> Tensor:
        """Log-mel (B, T, n_mels) for the features of `Conditioner.forward`, and "lengths" (B,) where padded.

        start: the frame of a song at which the batch begins, for a piece to have the noise of the whole.
        """
        condition = self.condition_encoder(batch)
        mask = frame_mask(batch, condition.shape[1])
        mean = self.acoustic_mapper.encoder(condition, mask)
        return self.unscaled(self.acoustic_mapper.decoder.sample(mean, mask, generator, start))

    def song(self, features: Features, frames: int, generator: torch.Generator, size: int = WINDOW,
             told: Told = untold) -> Tensor:
        """Log-mel (1, frames, n_mels) of a song; what `forward` gives at once (see `Acoustic.song`)."""
        decoder = self.acoustic_mapper.decoder
        parts = 1 + decoder.calls  # the encoder takes about as long as one call
        mean = self.acoustic_mapper.encoder.song(conditioned(self.condition_encoder, features, frames, size), size,
                                                 part(told, 0, parts))
        draw = draws(generator, mean)
        hears = in_windows(decoder.used, mean, size, decoder.calls,
                           lambda share: told((1 + share * decoder.calls) / parts))
        made = decoder.solve(mean, hears, draw(0), draw)
        return self.unscaled(made.to(self.mel_low.device)).cpu()


def losses(model: Model, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    """A teacher's weighted "diffusion", "prior" (of the mean) and "ssim" (of the mean); a student's "consistency".

    batch: "log-mel" (B, T, n_mels), the features, and "lengths" (B,) where padded. A student in training moves its
    target with every call, before the loss.
    """
    config, decoder = model.config, model.acoustic_mapper.decoder
    condition = model.condition_encoder(batch, generator)
    mel, mask = model.told(batch, condition)
    mean = model.acoustic_mapper.encoder(condition, mask)
    noise = torch.randn(mel.shape, generator=generator, device=generator.device).to(mel)
    if config.stage == "student":
        if model.training:
            decoder.follow()
        level = torch.randint(config.levels - 1, (len(mel),), generator=generator, device=generator.device)
        error = decoder.student_error(mel, mean, mask, level.to(mel.device), noise)
        return {"consistency": masked_mean(error, mask)}
    normal = torch.randn(len(mel), generator=generator, device=generator.device).to(mel)
    error = decoder.teacher_error(mel, mean, mask, normal, noise)
    terms = {"diffusion": config.lambda_diffusion * masked_mean(error, mask)}
    if config.lambda_prior:
        terms["prior"] = config.lambda_prior * gaussian_nll(mel, mean, mask)
    if config.lambda_ssim:
        terms["ssim"] = config.lambda_ssim * ssim_distance(mean, mel, mask)
    return terms
