"""TransformerSVC, of Amphion's recipes (Zhang et al., "Amphion", arXiv 2312.09911): Config, the network, its losses.

There is no paper of its own: the transformer is that of Glow-TTS (Kim et al., arXiv 2005.11129), or torch's (Vaswani et
al., arXiv 1706.03762). Names of weights are Amphion's, whose parts `0.` and `1.` are `condition_encoder.` and
`acoustic_mapper.` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from featstore_zoo.acoustic import (
    AMPHION,
    SMOKE,
    Acoustic,
    AcousticConfig,
    Batch,
    frame_mask,
    masked_mean,
    ssim_distance,
)
from featstore_zoo.conditioner import Conditioner
from featstore_zoo.song import CONTEXT, WINDOW, Features, Told, conditioned, untold
from featstore_zoo.transformer import PlainTransformer, RelativeMapper

Variant = Literal["relative", "plain", "plain-unmasked"]
LEARNT = 512  # frames of a crop
TRAINING = {"frames": LEARNT, "batch": 64, "learning_rate": 4e-4, "beta1": 0.9, "beta2": 0.999, "clip": 1.0}


@dataclass(frozen=True)
class Config(AcousticConfig):
    """Six layers of relative positions. Presets: relative; plain, torch's encoder; amphion and amphion-plain hear f0
    and loudness as Amphion's weights do, from 512 singers.

    variant: "relative" (Amphion's "conformer", which has no convolution module), "plain" (its "transformer", made to
        leave padding out), or "plain-unmasked" (as Amphion has it, where padding is attended to).
    hidden, heads, layers, kernel, dropout: of the transformer; kernel, of the feed-forward, only where relative.
    lambda_l1, lambda_ssim: weights of the losses.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "relative": {}, "plain": {"variant": "plain", "hidden": 2048}, "amphion": AMPHION,
        "amphion-plain": AMPHION | {"variant": "plain-unmasked", "hidden": 2048},
        "smoke": SMOKE | {"layers": 2, "hidden": 64}}

    variant: Variant = "relative"
    hidden: int = 512
    heads: int = 2
    layers: int = 6
    kernel: int = 3
    dropout: float = 0.1
    lambda_l1: float = 1.0
    lambda_ssim: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("relative", "plain", "plain-unmasked"):
            raise ValueError(f"variant must be relative, plain or plain-unmasked, not {self.variant!r}")
        if self.kernel % 2 == 0 or not 0 <= self.dropout < 1 or self.hidden < 1:
            raise ValueError(f"kernel {self.kernel} must be odd, dropout {self.dropout:g} in [0, 1), hidden "
                             f"{self.hidden} at least 1")
        if min(self.lambda_l1, self.lambda_ssim) < 0 or self.lambda_l1 + self.lambda_ssim == 0:
            raise ValueError("lambda_l1 and lambda_ssim: expected numbers of at least 0, not both 0")


class PlainMapper(nn.Module):
    """The condition (B, T, C) to (B, T, bands) through torch's encoder."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.masked = config.variant == "plain"
        self.transformer_encoder = PlainTransformer(config.condition_dim, config.hidden, config.heads, config.layers,
                                                    config.dropout)
        self.output_mlp = nn.Linear(config.condition_dim, config.n_mels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        made: Tensor = self.output_mlp(self.transformer_encoder(x, mask if self.masked else None))
        return made


class Model(Acoustic):
    """Features to log-mel (B, T, n_mels)."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.condition_encoder = Conditioner(config)
        self.acoustic_mapper = PlainMapper(config) if config.variant != "relative" else RelativeMapper(
            config.condition_dim, config.n_mels, config.hidden, config.heads, config.layers, config.kernel,
            config.dropout)

    def forward(self, batch: Batch, generator: torch.Generator | None = None, start: int = 0) -> Tensor:
        """Log-mel (B, T, n_mels) for the features of `Conditioner.forward`, and "lengths" (B,) where padded."""
        condition = self.condition_encoder(batch)
        return self.unscaled(self.acoustic_mapper(condition, frame_mask(batch, condition.shape[1])))

    def song(self, features: Features, frames: int, generator: torch.Generator, size: int = WINDOW,
             told: Told = untold) -> Tensor:
        """Log-mel (1, frames, n_mels) of a song, with relative positions what `forward` gives at once (see
        `Acoustic.song`). torch's encoder counts frames from where a window begins: it is given no more than it has
        learnt from, whatever `size`."""
        if self.config.variant != "relative":
            size = LEARNT if frames <= LEARNT else LEARNT - 2 * CONTEXT
            return super().song(features, frames, generator, size, told)
        mapper: Any = self.acoustic_mapper
        made = mapper.song(conditioned(self.condition_encoder, features, frames, size), size, told)
        return self.unscaled(made.to(self.mel_low.device)).cpu()


def losses(model: Model, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    """Weighted "l1", the mean |difference| of scaled log-mels, and "ssim", 1 - SSIM of them, over frames that count.

    batch: "log-mel" (B, T, n_mels), the features, and "lengths" (B,) where padded. (Amphion's code divides the first by
    frames, not by frames and bands, and counts padding in the second.)
    """
    condition = model.condition_encoder(batch, generator)
    mel, mask = model.told(batch, condition)
    made = model.acoustic_mapper(condition, mask)
    terms = {}
    if model.config.lambda_l1:
        terms["l1"] = model.config.lambda_l1 * masked_mean((made - mel).abs(), mask)
    if model.config.lambda_ssim:
        terms["ssim"] = model.config.lambda_ssim * ssim_distance(made, mel, mask)
    return terms
