"""What a model is told: content features, melody, loudness and singer, each brought to one width, summed or set side
by side.

Everything on one frame grid: a view of the store has done the time. The order of terms and the names of weights are
Amphion's: melody, loudness, each content feature, singer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from featstore.errors import LengthMismatch, MissingFeature

from .acoustic import AcousticConfig, Batch, frame_mask
from .transformer import Conformer

__all__ = ["Conditioner"]

COARSE = 256  # bins of Amphion's melody and loudness
LOUDEST, QUIETEST = 1.5, 1e-30  # outermost of Amphion's edges
OCTAVES = 2.0 ** torch.arange(-2, 5)  # cycles an octave: periods of four octaves to 75 cents
LEVELS = 2.0 ** torch.arange(0, 5)  # cycles in 100 dB: periods of 100 to 6 dB
MIDDLE_HZ = 220.0


class Content(nn.Module):
    """A content feature (B, T, D) to (B, T, width)."""

    def __init__(self, dim: int, width: int, conformer: int) -> None:
        super().__init__()
        # Heads must divide the dimensions; features of odd ones get a single head.
        self.before = Conformer(dim, conformer, heads=1 + (dim % 2 == 0)) if conformer else None
        self.nn = nn.Linear(dim, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.nn(x if self.before is None else self.before(x, mask))


class Melody(nn.Module):
    """f0 (B, T) in Hz, 0 where unvoiced, to (B, T, width), through the octave it lies in, and whether it is voiced.

    log2 of f0 itself, which any change of pitch moves, and sines of it: 5 cents turn the fastest by 24 degrees.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.nn = nn.Linear(2 + 2 * len(OCTAVES), width)

    def forward(self, f0: Tensor) -> Tensor:
        voiced = f0 > 0
        octave = torch.where(voiced, f0, MIDDLE_HZ).float().div(MIDDLE_HZ).log2()[..., None]
        known = torch.cat([octave, waves(octave, OCTAVES), torch.ones_like(octave)], -1)
        return self.nn(known * voiced[..., None])


class CoarseMelody(nn.Module):
    """f0 (B, T) to (B, T, width) as Amphion codes it: bins 1 to 255 of equal width on the mel scale; unvoiced is 1."""

    def __init__(self, width: int, f0_min: float, f0_max: float) -> None:
        super().__init__()
        self.low, self.high = (1127 * math.log1p(f0 / 700) for f0 in (f0_min, f0_max))
        self.nn = nn.Embedding(COARSE, width)
        self.uv_embedding = nn.Embedding(2, width)

    def forward(self, f0: Tensor) -> Tensor:
        return self.nn(self.bins(f0)) + self.uv_embedding((f0 <= 0).long())

    def bins(self, f0: Tensor) -> Tensor:
        """The bin of each frame, an integer from 1 to 255."""
        mel = 1127 * (f0 / 700).log1p()
        bins = (mel - self.low) * (COARSE - 2) / (self.high - self.low) + 1
        return (torch.where(mel > 0, bins, 1.0).clamp(1, COARSE - 1) + 0.5).floor().long()


class Loudness(nn.Module):
    """Loudness (B, T) in dBFS to (B, T, width): its level, and sines of it down to a period of 6 dB."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.nn = nn.Linear(1 + 2 * len(LEVELS), width)

    def forward(self, decibels: Tensor) -> Tensor:
        level = (decibels.float().clamp(-120, 20) / 100 + 0.5)[..., None]  # -0.5 at the extractor's floor, 0.5 at 0 dB
        return self.nn(torch.cat([2 * level, waves(level, LEVELS)], -1))


class CoarseLoudness(nn.Module):
    """Energy (B, T) to (B, T, width) by Amphion's 255 edges, 2.4 dB apart from -600 dB up; what sings is in the last
    dozen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        edges = torch.linspace(math.log(QUIETEST), math.log(LOUDEST), COARSE - 1).exp()
        self.energy_bins = nn.Parameter(edges, requires_grad=False)  # a weight in Amphion's files, and counted there
        self.nn = nn.Embedding(COARSE, width)

    def forward(self, energy: Tensor) -> Tensor:
        return self.nn(torch.bucketize(energy, self.energy_bins))


class Singer(nn.Module):
    """A row (B,) of the run's singers, or an embedding (B, D), to (B, width)."""

    def __init__(self, config: AcousticConfig, width: int) -> None:
        super().__init__()
        self.role = "singer" if config.speaker == "one-hot" else "speaker"
        self.nn: nn.Embedding | nn.Linear = (
            nn.Embedding(config.singers, width) if self.role == "singer" else nn.Linear(config.speaker_dim, width))

    def forward(self, batch: Batch) -> Tensor:
        who = needed(batch, self.role)
        if self.role == "singer":
            who = who.reshape(len(who)).long()
        elif who.ndim == 3:  # a view repeats what has no time
            who = who[:, 0]
        return self.nn(who)


class Conditioner(nn.Module):
    """A batch to the condition (B, T, `config.condition_dim`)."""

    def __init__(self, config: AcousticConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        for name, dim in config.content:
            self.add_module(f"{name}_encoder", Content(dim, width, config.conformer))
        if config.melody != "none":
            self.melody_encoder = (Melody(width) if config.melody == "continuous"
                                   else CoarseMelody(width, config.f0_min, config.f0_max))
        if config.loudness != "none":
            self.loudness_encoder = Loudness(width) if config.loudness == "decibels" else CoarseLoudness(width)
        if config.speaker != "none":
            self.singer_encoder = Singer(config, width)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """The condition of a batch with the features that `config.reads` names.

        batch: content (B, T, D) by its names, "f0" (B, T) in Hz and 0 where unvoiced, "loudness" (B, T) in dBFS,
            "singer" (B,) rows or "speaker" (B, D); where coarse, "energy" (B, T); "lengths" (B,) where padded.
        generator: for content_dropout, in training.

        Raises:
            MissingFeature: if one is not there.
            LengthMismatch: if they differ in frames.
            ValueError: if a content feature has other dimensions, or dropout has no generator.
        """
        terms = []
        if self.config.melody != "none":
            terms.append(self.melody_encoder(needed(batch, "f0")))
        if self.config.loudness != "none":
            terms.append(self.loudness_encoder(
                needed(batch, "loudness" if self.config.loudness == "decibels" else "energy")))
        terms += self._content(batch, generator)
        frames = {term.shape[1] for term in terms}
        if len(frames) > 1:
            told = ", ".join(map(str, sorted(frames)))
            raise LengthMismatch(f"the features of a batch have {told} frames: read them through a view with "
                                 "like='log-mel'")
        if self.config.speaker != "none":
            terms.append(self.singer_encoder(batch)[:, None].expand(-1, frames.pop(), -1))
        return torch.cat(terms, -1) if self.config.merge == "concat" else torch.stack(terms).sum(0)

    def _content(self, batch: Batch, generator: torch.Generator | None) -> list[Tensor]:
        there = [name for name, _ in self.config.content if name in batch or not self.config.content_dropout]
        if self.config.content and not there:
            raise MissingFeature(f"the batch has none of {', '.join(name for name, _ in self.config.content)}")
        made = {name: self._projected(batch, name) for name in there}
        terms = [made[name] if name in made else torch.zeros_like(made[there[0]]) for name, _ in self.config.content]
        if not self.training or not self.config.content_dropout or len(terms) < 2:
            return terms
        if generator is None:
            raise ValueError("content_dropout draws which features are left out: give a generator")
        chance = torch.rand(len(terms), len(terms[0]), generator=generator, device=generator.device).to(terms[0].device)
        kept = (chance >= self.config.content_dropout) | (chance == chance.amax(0))  # one is always left
        return [term * keep[:, None, None] for term, keep in zip(terms, kept, strict=True)]

    def _projected(self, batch: Batch, name: str) -> Tensor:
        feature, dim = needed(batch, name), dict(self.config.content)[name]
        if feature.ndim != 3 or feature.shape[2] != dim:
            raise ValueError(f"{name} has shape {tuple(feature.shape)}: this model was made for (B, T, {dim})")
        encoder: nn.Module = getattr(self, f"{name}_encoder")
        term: Tensor = encoder(feature.float(), frame_mask(batch, feature.shape[1]))
        return term


def needed(batch: Batch, role: str) -> Tensor:
    """What plays a role in a batch. MissingFeature says which is not there."""
    if role not in batch:
        raise MissingFeature(f"the model needs {role!r}; the batch has {', '.join(sorted(batch))}")
    return batch[role]


def waves(x: Tensor, rates: Tensor) -> Tensor:
    """Sine and cosine of x (..., 1), `rates` cycles a unit: (..., 2 R)."""
    phase = 2 * math.pi * x * rates.to(x.device)
    return torch.cat([phase.sin(), phase.cos()], -1)
