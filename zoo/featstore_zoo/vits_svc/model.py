"""VITS (Kim, Kong and Son, arXiv 2106.06103) for singing voice conversion: Config, prior, posterior, flow, the losses.

As so-vits-svc and Amphion have it: what is sung is known frame by frame, so that there is no text, no alignment and no
duration. The generator is any of the zoo's, taken by name. Names of weights are Amphion's, but for `emb_g.nn.weight`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from featstore.errors import LengthMismatch
from featstore_zoo import find
from featstore_zoo.acoustic import AMPHION, SMOKE, Acoustic, AcousticConfig, Batch, frame_mask
from featstore_zoo.conditioner import Conditioner, Singer, needed
from featstore_zoo.diffusion import draws
from featstore_zoo.gan import Adversary, GanConfig, magnitudes, spectral_losses
from featstore_zoo.song import WINDOW, Features, Told, attended, conditioned, joined, local, untold
from featstore_zoo.transformer import RelativeTransformer
from featstore_zoo.vocode import stream
from featstore_zoo.vocoder import Vocoder, VocoderConfig, fold, seed_of

TRAINING = {"frames": 256, "batch": 16, "learning_rate": 2e-4}


@dataclass(frozen=True)
class Config(AcousticConfig, GanConfig):
    """Amphion's size with NSF-HiFiGAN. Presets: base; hifigan; amphion and amphion-hifigan, which hear f0 and loudness
    as Amphion's weights do, from 512 singers.

    latent: channels between posterior, flow, prior and generator.
    hidden, heads, prior_layers, kernel, dropout: of the prior's transformer, which has the width of the condition.
    posterior_layers, flow_layers, flows: gated convolutions of the posterior and of each flow, and how many flows.
    speaker_width: of the singer's embedding that posterior and flow hear.
    generator: a GAN vocoder of the zoo, or an import path. generator_preset and generator_fields, (name, value) of
        each: what its Config has; the contract is this one's, with the latent in place of mels.
    slice_frames: of an item that the generator makes in a step of training.
    noise_scale: of the prior's spread, in conversion; 0 gives the mean.
    lambda_kl: weight of the divergence of posterior and prior, a sum over channels as published.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {}, "hifigan": {"generator": "hifigan", "generator_preset": "v1"},
        "amphion": AMPHION | {"generator_fields": (("channels", 768), ("amphion_defect", True))},
        "amphion-hifigan": AMPHION | {"generator": "hifigan", "generator_preset": "v1"},
        "smoke": SMOKE | {"latent": 32, "hidden": 64, "prior_layers": 2, "posterior_layers": 2, "flow_layers": 2,
                          "speaker_width": 16, "generator_preset": "smoke", "discriminators": ("mpd",),
                          "discriminator_width": 0.1, "mpd_periods": (2, 3)}}

    latent: int = 384
    hidden: int = 256
    heads: int = 2
    prior_layers: int = 6
    kernel: int = 3
    dropout: float = 0.1
    posterior_layers: int = 16
    flow_layers: int = 4
    flows: int = 4
    speaker_width: int = 256
    generator: str = "nsf_hifigan"
    generator_preset: str = "base"
    generator_fields: tuple[tuple[str, Any], ...] = ()
    slice_frames: int = 32
    noise_scale: float = 0.667
    lambda_kl: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent < 2 or self.latent % 2:
            raise ValueError(f"latent {self.latent} must be even: the flow moves one half by the other")
        counts = (self.posterior_layers, self.flow_layers, self.flows, self.speaker_width, self.slice_frames)
        if min(counts) < 1 or self.kernel % 2 == 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"posterior_layers, flow_layers, flows, speaker_width and slice_frames {counts} must "
                             f"be at least 1, kernel {self.kernel} odd, dropout {self.dropout:g} in [0, 1)")
        if self.noise_scale < 0 or self.lambda_kl < 0:
            raise ValueError(f"noise_scale {self.noise_scale:g} and lambda_kl {self.lambda_kl:g} must not be negative")
        _ = self.generator_config
        if self.melody == "none" and find(self.generator).Model.needs_f0:
            raise ValueError(f"generator {self.generator} hears f0, and melody is none: take hifigan, or a melody")

    @property
    def generator_config(self) -> VocoderConfig:
        """The Config of the generator, for this mel contract, with the latent in place of mels."""
        package = find(self.generator)
        if package.KIND != "vocoder" or not issubclass(package.Config, GanConfig):
            raise ValueError(f"generator {self.generator!r} is no vocoder that is trained against discriminators; "
                             "there are nsf_hifigan, hifigan, bigvgan, melgan, apnet, vocos")
        plain = package.Config.PRESETS.get(self.generator_preset)
        if plain is None:
            raise ValueError(f"no preset {self.generator_preset!r} of {self.generator}; there are "
                             f"{', '.join(package.Config.PRESETS)}")
        contract = {f.name: getattr(self.contract, f.name) for f in dataclasses.fields(self.contract)}
        fields: dict[str, Any] = {**plain, **contract, "n_mels": self.latent, **dict(self.generator_fields)}
        made: VocoderConfig = package.Config(**fields)
        return made


class GatedConvolutions(nn.Module):
    """WaveNet's gated convolutions without dilation, told a voice: (B, C, T) and g (B, G, 1) to (B, C, T)."""

    def __init__(self, channels: int, kernel: int, layers: int, voice: int) -> None:
        super().__init__()
        self.channels = channels
        self.cond_layer = weight_norm(nn.Conv1d(voice, 2 * channels * layers, 1)) if voice else None
        self.in_layers = nn.ModuleList(weight_norm(nn.Conv1d(channels, 2 * channels, kernel, padding=kernel // 2))
                                       for _ in range(layers))
        sizes = [2 * channels] * (layers - 1) + [channels]  # the last gives nothing on
        self.res_skip_layers = nn.ModuleList(weight_norm(nn.Conv1d(channels, size, 1)) for size in sizes)

    def forward(self, x: Tensor, keep: Tensor | float, voice: Tensor | None) -> Tensor:
        size, total = self.channels, torch.zeros_like(x)
        told = [0.0] * len(self.in_layers) if self.cond_layer is None else self.cond_layer(voice).split(2 * size, 1)
        for listen, speak, heard in zip(self.in_layers, self.res_skip_layers, told, strict=True):
            value, gate = (listen(x) + heard).chunk(2, 1)
            made = speak(value.tanh() * gate.sigmoid())
            if made.shape[1] > size:
                x = (x + made[:, :size]) * keep
            total = total + made[:, -size:]
        return total * keep


class Posterior(nn.Module):
    """A magnitude spectrum (B, bins, T) to mean and log spread of the latent, both (B, L, T)."""

    def __init__(self, config: Config, voice: int) -> None:
        super().__init__()
        self.pre = nn.Conv1d(config.n_fft // 2 + 1, config.latent, 1)
        self.enc = GatedConvolutions(config.latent, 5, config.posterior_layers, voice)
        self.proj = nn.Conv1d(config.latent, 2 * config.latent, 1)

    def forward(self, spectrum: Tensor, keep: Tensor | float, voice: Tensor | None) -> tuple[Tensor, Tensor]:
        mean, spread = (self.proj(self.enc(self.pre(spectrum) * keep, keep, voice)) * keep).chunk(2, 1)
        return mean, spread


class Prior(nn.Module):
    """The condition (B, C, T) to mean and log spread of what the flow makes of the latent, both (B, L, T)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.enc_ = RelativeTransformer(config.condition_dim, config.hidden, config.heads, config.prior_layers,
                                        config.kernel, config.dropout)
        self.proj = nn.Conv1d(config.condition_dim, 2 * config.latent, 1)

    def forward(self, condition: Tensor, mask: Tensor | None, keep: Tensor | float) -> tuple[Tensor, Tensor]:
        return self.parted(self.enc_(condition, mask), keep)

    def parted(self, heard: Tensor, keep: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """Mean and log spread of what the transformer gives."""
        mean, spread = (self.proj(heard) * keep).chunk(2, 1)
        return mean, spread


class Coupling(nn.Module):
    """Moves one half of the latent by what the other half and the voice say (Dinh et al., arXiv 1605.08803)."""

    def __init__(self, config: Config, voice: int) -> None:
        super().__init__()
        half = config.latent // 2
        self.pre = nn.Conv1d(half, config.latent, 1)
        self.enc = GatedConvolutions(config.latent, 5, config.flow_layers, voice)
        self.post = nn.Conv1d(config.latent, half, 1)
        nn.init.zeros_(self.post.weight)
        nn.init.zeros_(cast(Tensor, self.post.bias))

    def forward(self, x: Tensor, keep: Tensor | float, voice: Tensor | None, back: bool) -> Tensor:
        still, moved = x.chunk(2, 1)
        shift = self.post(self.enc(self.pre(still) * keep, keep, voice)) * keep
        return torch.cat([still, (moved - shift if back else moved + shift) * keep], 1)


class Flip(nn.Module):
    """Turns the order of channels around, so that the next coupling moves the other half."""

    def forward(self, x: Tensor, keep: Tensor | float, voice: Tensor | None, back: bool) -> Tensor:
        return x.flip(1)


class Flow(nn.Module):
    """The latent (B, L, T), of which a voice is a part, to one without it; or back.

    reach: frames to either side that a frame depends on.
    """

    def __init__(self, config: Config, voice: int) -> None:
        super().__init__()
        self.reach = config.flows * config.flow_layers * 2  # by kernels of 5
        self.flows = nn.ModuleList(part for _ in range(config.flows) for part in (Coupling(config, voice), Flip()))

    def forward(self, x: Tensor, keep: Tensor | float, voice: Tensor | None, back: bool = False) -> Tensor:
        for part in list(self.flows)[::-1] if back else self.flows:
            x = part(x, keep, voice, back)
        return x


class Model(Acoustic):
    """Features to waveform (B, T hop_length)."""

    needs_generator = True
    SAMPLING = ("noise_scale",)
    gives: ClassVar[Literal["log-mel", "wave"]] = "wave"
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        voice = 0 if config.speaker == "none" else config.speaker_width
        self.condition_encoder = Conditioner(config)
        self.emb_g = Singer(config, voice) if voice else None
        self.enc_p = Prior(config)
        self.enc_q = Posterior(config, voice)
        self.flow = Flow(config, voice)
        self.dec: Vocoder = find(config.generator).Model(config.generator_config)

    def forward(self, batch: Batch, generator: torch.Generator, start: int = 0) -> Tensor:
        """Waveform (B, T hop_length) for the features of `Conditioner.forward`, and "lengths" (B,) where padded.

        start: the frame of a song at which the batch begins, for a piece to have the noise of the whole.
        """
        return self.spoken(self.latent(batch, generator, start), batch, generator)

    def latent(self, batch: Batch, generator: torch.Generator, start: int = 0) -> Tensor:
        """What the generator hears, (B, L, T)."""
        condition = self.condition_encoder(batch)
        mask = frame_mask(batch, condition.shape[1])
        keep = kept(mask, condition)
        mean, spread = self.enc_p(condition.transpose(1, 2), mask, keep)
        return self.drawn(mean, spread, keep, self.voice(batch), generator, start)

    def drawn(self, mean: Tensor, spread: Tensor, keep: Tensor | float, voice: Tensor | None,
              generator: torch.Generator, start: int) -> Tensor:
        """A draw from the prior brought through the flow, (B, L, T)."""
        noise = draws(generator, mean.transpose(1, 2), start)(0).transpose(1, 2)
        return self.flow((mean + noise * spread.exp() * self.config.noise_scale) * keep, keep, voice, back=True)

    def song(self, features: Features, frames: int, generator: torch.Generator,  # type: ignore[override]
             size: int = WINDOW, told: Told = untold) -> Iterator[np.ndarray]:
        """Waveform (frames * hop_length,) of a song, in pieces; what `forward` gives at once (see `Acoustic.song`)."""
        voice = self.voice(features(0, 1))
        heard = attended(self.enc_p.enc_, conditioned(self.condition_encoder, features, frames, size), size, told)
        state = generator.get_state()

        def made(begin: int, end: int) -> Tensor:
            generator.set_state(state)  # every window has its stretch of the same noise
            prior = self.enc_p.parted(heard[:, begin:end].to(self.mel_low.device).transpose(1, 2))
            return self.drawn(*prior, 1.0, voice, generator, begin).transpose(1, 2)

        def f0_of(begin: int, end: int) -> Tensor:
            return needed(features(begin, end), "f0")

        latent = joined(local(made, frames, size, self.flow.reach), frames)[0].numpy()
        f0 = joined(local(f0_of, frames, size, 0), frames)[0].numpy() if self.dec.needs_f0 else None
        return stream(self.dec, latent, f0, seed=seed_of(generator) % 2**63, chunk=size)

    def spoken(self, latent: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """The generator's waveform (B, T hop_length) for a latent (B, L, T): item by item, each without its padding.

        All items have the same noise; a generator looks beyond the end of what it is given, and pads that itself.
        """
        lengths = batch["lengths"].tolist() if "lengths" in batch else [latent.shape[2]] * len(latent)
        seed, made = seed_of(generator), latent.new_zeros(len(latent), latent.shape[2] * self.config.hop_length)
        for i, frames in enumerate(lengths):
            f0 = needed(batch, "f0")[i:i + 1, :frames] if self.dec.needs_f0 else None
            again = torch.Generator().manual_seed(seed % 2**63)
            wave = self.dec(latent[i:i + 1, :, :frames].transpose(1, 2), f0, again)
            made[i, :wave.shape[1]] = wave[0]
        return made

    def voice(self, batch: Batch) -> Tensor | None:
        """What posterior and flow are told of the singer, (B, G, 1)."""
        return None if self.emb_g is None else self.emb_g(batch)[..., None]

    def fold(self) -> Model:
        """Puts weight norm into the weights, in place: the same output with less work. Training is over then."""
        self.dec.fold()
        return fold(self)


def kept(mask: Tensor | None, like: Tensor) -> Tensor | float:
    """1 where frames count and 0 elsewhere, (B, 1, T), or 1 if all do."""
    return 1.0 if mask is None else mask[:, None].to(like.dtype)


def divergence(z: Tensor, spread_q: Tensor, mean_p: Tensor, spread_p: Tensor, mask: Tensor | None) -> Tensor:
    """log q - log p at z, which the flow made of a draw from the posterior; a sum over channels, a mean over frames.

    log s_p - log s_q - 1/2 + (z - m_p)^2 / (2 s_p^2) (VITS, equation 4, with log q by its expectation); all (B, L, T).
    """
    each = spread_p - spread_q - 0.5 + 0.5 * (z - mean_p).square() * (-2 * spread_p).exp()
    if mask is None:
        return each.sum(1).mean()
    return (each * mask[:, None]).sum() / mask.sum().clamp_min(1)


def losses(model: Model, batch: Batch, generator: torch.Generator, adversary: Adversary | None = None
           ) -> dict[str, Tensor]:
    """Weighted "kl", and of a slice of each item the terms of `gan.losses`: "mel", and with an adversary its three.

    batch: "wave" (B, T hop_length), the features, and "lengths" (B,) where padded.
    """
    config, hop = model.config, model.config.hop_length
    condition = model.condition_encoder(batch, generator)
    frames = condition.shape[1]
    if batch["wave"].shape[1] != frames * hop:
        raise LengthMismatch(f"wave has {batch['wave'].shape[1]} samples, the features have {frames} frames of {hop}: "
                             "read them through a view with like='log-mel'")
    mask = frame_mask(batch, frames)
    keep, voice = kept(mask, condition), model.voice(batch)
    spectrum = magnitudes(batch["wave"], config.contract)[:, :frames].transpose(1, 2)
    mean_q, spread_q = model.enc_q(spectrum, keep, voice)
    fresh = torch.randn(mean_q.shape, generator=generator, device=generator.device).to(mean_q)
    latent = (mean_q + fresh * spread_q.exp()) * keep
    mean_p, spread_p = model.enc_p(condition.transpose(1, 2), mask, keep)
    kl = divergence(model.flow(latent, keep, voice), spread_q, mean_p, spread_p, mask)
    lengths = batch.get("lengths", torch.full((len(condition),), frames, device=condition.device))
    size = min(config.slice_frames, int(lengths.min()))
    where = torch.rand(len(condition), generator=generator, device=generator.device).to(lengths.device)
    first = (where * (lengths - size + 1)).long()
    f0 = sliced(needed(batch, "f0"), first, size) if model.dec.needs_f0 else None
    fake = model.dec(sliced(latent.transpose(1, 2), first, size), f0, generator)
    real = sliced(batch["wave"].unflatten(1, (frames, hop)), first, size).flatten(1)
    terms = {"kl": config.lambda_kl * kl} | spectral_losses(config, real, fake)
    return terms | (adversary(real, fake) if adversary else {})


def sliced(x: Tensor, first: Tensor, size: int) -> Tensor:
    """Frames [first, first + size) of each item of x (B, T, ...)."""
    where = first[:, None] + torch.arange(size, device=x.device)
    return x[torch.arange(len(x), device=x.device)[:, None], where]
