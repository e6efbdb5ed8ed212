"""What every acoustic model promises: features on the frames of the mel in, log-mel out; its scale; losses over frames.

A model is given a batch as a view of the store reads it, a dict of tensors on one frame grid. A log-mel is brought to
[-1, 1] by the least and the greatest value of each band (`mel_low`, `mel_high`), which stand among the weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featstore.errors import BadRequest, ContractMismatch, LengthMismatch

from .vocoder import VocoderConfig

__all__ = ["Acoustic", "AcousticConfig", "Batch", "frame_mask", "gaussian_nll", "masked_mean", "ssim_distance"]

Batch = Mapping[str, Tensor]
Merge = Literal["sum", "concat"]
Melody = Literal["continuous", "coarse", "none"]
Loudness = Literal["decibels", "coarse", "none"]
Speaker = Literal["one-hot", "embedding", "none"]
ROLES = ("log-mel", "wave", "f0", "energy", "speaker", "lengths")
TAKEN = ("melody", "loudness", "singer")  # terms beside the content, by whose names weights are called


@dataclass(frozen=True)
class AcousticConfig(VocoderConfig):
    """What an acoustic model hears, and the mel contract of what it gives; a model's `Config` adds its architecture.

    content: (name, dimensions) of each content feature, in the order of their terms.
    width: of each term of the condition. merge: "sum" of the terms, or "concat".
    conformer: layers of a small conformer over each content feature; 0 for none.
    content_dropout: probability with which training leaves out a content feature of an item, never all of them. A
        model trained so also takes a batch that lacks some.
    melody: "continuous" log-f0 and voicing, or "coarse", Amphion's 254 bins between f0_min and f0_max on the mel scale
        (75 cents wide at 60 Hz), for weights trained with it; "none" hears no f0.
    f0_early_s: seconds by which the f0 that the weights learnt from comes before the log-mel, as Amphion's does;
        conversion gives it to them so. 0 where they learn here.
    loudness: "decibels", or "coarse", Amphion's 256 bins of "energy", most of which nothing reaches; or "none".
    speaker: "one-hot" is a row of the run's `singers`; "embedding" a vector of `speaker_dim` that any voice has.
    """

    content: tuple[tuple[str, int], ...] = (("whisper", 1024), ("contentvec", 768))
    width: int = 384
    merge: Merge = "sum"
    conformer: int = 0
    content_dropout: float = 0.0
    melody: Melody = "continuous"
    f0_early_s: float = 0.0
    f0_min: float = 50.0
    f0_max: float = 1100.0
    loudness: Loudness = "decibels"
    speaker: Speaker = "one-hot"
    singers: int = 1
    speaker_dim: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("merge", Merge), ("melody", Melody), ("loudness", Loudness), ("speaker", Speaker)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {getattr(self, name)!r}")
        names = [item[0] for item in self.content]
        if any(len(item) != 2 or not isinstance(item[1], int) or item[1] < 1 for item in self.content):
            raise ValueError(f"content {self.content}: expected (name, dimensions) of each feature")
        if len(set(names)) != len(names) or set(names) & {*TAKEN, *ROLES}:
            raise ValueError(f"content {', '.join(names)}: each name once, and none that another role has")
        if any("." in name or not name for name in names):
            raise ValueError(f"content {', '.join(names)}: a name has no dot, as in the store")
        if not names and self.melody == "none" and self.loudness == "none":
            raise ValueError("nothing says how long the output is: give content, melody or loudness")
        if min(self.width, self.singers, self.speaker_dim) < 1 or self.width % 2 or self.conformer < 0:
            raise ValueError(f"width {self.width} must be even and above 0, singers {self.singers} and speaker_dim "
                             f"{self.speaker_dim} at least 1, conformer {self.conformer} not negative")
        if not abs(self.f0_early_s) <= 0.1:
            raise ValueError(f"f0_early_s {self.f0_early_s:g}: expected seconds of at most 0.1")
        if not 0 < self.f0_min < self.f0_max or not 0 <= self.content_dropout < 1:
            raise ValueError(f"expected 0 < f0_min {self.f0_min:g} < f0_max {self.f0_max:g} and content_dropout "
                             f"{self.content_dropout:g} in [0, 1)")

    @property
    def terms(self) -> int:
        """Terms that the condition is made of."""
        return len(self.content) + sum(x != "none" for x in (self.melody, self.loudness, self.speaker))

    @property
    def condition_dim(self) -> int:
        """Channels of the condition."""
        return self.width * (self.terms if self.merge == "concat" else 1)

    @property
    def reads(self) -> tuple[str, ...]:
        """Keys of a batch that a model of this configuration needs; "log-mel" comes to them in training."""
        named = [name for name, _ in self.content]
        named += ["f0"] if self.melody != "none" else []
        named += {"decibels": ["loudness"], "coarse": ["energy"], "none": []}[self.loudness]
        return (*named, *{"one-hot": ["singer"], "embedding": ["speaker"], "none": []}[self.speaker])


# What Amphion's recipes hear: their numbers of parameters and their weights are for this.
AMPHION: dict[str, Any] = {"content": (("whisper", 1024), ("contentvec", 256)), "melody": "coarse",
                           "loudness": "coarse", "singers": 512}
# What needs no pretrained encoder.
SMOKE: dict[str, Any] = {"content": (), "width": 32}


class Acoustic(nn.Module):
    """Features (B, T, ...) to log-mel (B, T, n_mels); base of the zoo's acoustic models.

    A subclass defines `forward(batch, generator, start)`; whatever is random is drawn from the generator. One that
    `gives` "wave" makes the waveform (B, T hop_length) itself and needs no vocoder.
    """

    needs_generator: ClassVar[bool] = False
    gives: ClassVar[Literal["log-mel", "wave"]] = "log-mel"
    SAMPLING: ClassVar[tuple[str, ...]] = ()  # fields of Config that are no part of the weights
    mel_low: Tensor
    mel_high: Tensor
    config: Any

    def __init__(self, config: AcousticConfig) -> None:
        super().__init__()
        self.config = config
        unit = 1.0 if config.log_base == "e" else math.log(10)
        self.register_buffer("mel_low", torch.full((config.n_mels,), math.log(config.floor) / unit))
        self.register_buffer("mel_high", torch.full((config.n_mels,), 2.5 / unit))  # above what full scale reaches

    def song(self, features: Callable[[int, int], Batch], frames: int, generator: torch.Generator, size: int,
             told: Callable[[float], None] = lambda share: None) -> Tensor:
        """Log-mel (1, frames, n_mels) of a whole song, on the CPU, in windows of `size` frames that fade into another.

        features: (begin, end) -> those frames of the song, as a batch of one on the model's device.
        told: hears the share of the work that is done, from 0 to 1, after each window.

        A model that is local, samples in steps or gives "wave" has one of its own; of "wave" it gives pieces (n,).
        """
        from .song import faded, joined

        state = generator.get_state()

        def made(begin: int, end: int) -> Tensor:
            generator.set_state(state)  # every window has its stretch of the same noise
            window: Tensor = self(features(begin, end), generator, begin)
            return window

        return joined(faded(made, frames, size), frames, told)

    def set_sampling(self, **changes: Any) -> None:
        """Changes how the model samples, by fields of its Config; the weights serve any.

        Raises:
            BadRequest: for a field that is not in `SAMPLING`.
            ValueError: for a value that the Config refuses.
        """
        wrong = changes.keys() - set(self.SAMPLING)
        if wrong:
            there = ", ".join(self.SAMPLING) or "nothing: this model does not sample"
            raise BadRequest(f"{', '.join(sorted(wrong))} cannot be changed after training; one can change {there}")
        before, after = self.config, dataclasses.replace(self.config, **changes)
        for part in self.modules():
            if getattr(part, "config", None) is before:
                part.config = after

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """The least and greatest log-mel (n_mels,) of each band in the training data, which become -1 and 1."""
        if not bool((high > low).all()):
            raise ValueError("the greatest log-mel of each band must be above the least: are the recordings silent?")
        with torch.no_grad():
            self.mel_low.copy_(low)
            self.mel_high.copy_(high)

    def scaled(self, log_mel: Tensor) -> Tensor:
        """Log-mel (B, T, n_mels) brought to [-1, 1]."""
        if log_mel.ndim != 3 or log_mel.shape[2] != self.config.n_mels:
            raise ContractMismatch(f"log-mel has shape {tuple(log_mel.shape)}: expected (B, T, n_mels) with n_mels="
                                   f"{self.config.n_mels}; extract log-mel with the contract of the model")
        return 2 * (log_mel - self.mel_low) / (self.mel_high - self.mel_low) - 1

    def unscaled(self, x: Tensor) -> Tensor:
        """Log-mel (B, T, n_mels) that `scaled` brought to `x`."""
        return (x.float() + 1) / 2 * (self.mel_high - self.mel_low) + self.mel_low

    def told(self, batch: Batch, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scaled log-mel (B, T, n_mels) to learn, of as many frames as the condition, and the mask of `batch`."""
        mel = self.scaled(batch["log-mel"])
        if mel.shape[:2] != condition.shape[:2]:
            raise LengthMismatch(f"log-mel has {tuple(mel.shape[:2])} items and frames, the features have "
                                 f"{tuple(condition.shape[:2])}: read them through a view with like='log-mel'")
        return mel, frame_mask(batch, mel.shape[1])


def frame_mask(batch: Batch, frames: int) -> Tensor | None:
    """True (B, T) on the frames below "lengths" (B,), or None where a batch has no lengths: all frames count."""
    lengths = batch.get("lengths")
    if lengths is None:
        return None
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (B, T, D) over the frames (B, T) that count, and all D."""
    if mask is None:
        return x.mean()
    return (x * mask[..., None]).sum() / (mask.sum().clamp_min(1) * x.shape[2])


def gaussian_nll(x: Tensor, mean: Tensor, mask: Tensor | None) -> Tensor:
    """-log N(x; mean, 1), the mean over frames that count and bands: 1/2 (x - mean)^2 + 1/2 log 2 pi."""
    return masked_mean(0.5 * ((x - mean).square() + math.log(2 * math.pi)), mask)


def ssim_distance(x: Tensor, y: Tensor, mask: Tensor | None, shift: float = 6.0) -> Tensor:
    """1 - SSIM of two mels (B, T, n_mels) as pictures (Wang et al., IEEE TIP 13(4), 2004): a Gaussian window of 11.

    shift is added to both, as in Amphion's code, so that means are positive. Frames that do not count are no part of
    the mean; at the border of an item the picture is 0 beyond it.
    """
    line = torch.exp(-(torch.arange(11, device=x.device, dtype=torch.float32) - 5).square() / (2 * 1.5**2))
    line = line / line.sum()

    def blurred(picture: Tensor) -> Tensor:
        down = F.conv2d(picture, line.view(1, 1, 11, 1), padding=(5, 0))
        return F.conv2d(down, line.view(1, 1, 1, 11), padding=(0, 5))

    with torch.autocast(x.device.type, enabled=False):  # differences of squares
        keep = 1 if mask is None else mask[:, None, :, None].float()
        a, b = ((picture.float()[:, None] + shift) * keep for picture in (x, y))
        mean_a, mean_b = blurred(a), blurred(b)
        var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
        both = blurred(a * b) - mean_a * mean_b
        ssim = ((2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
                / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    return masked_mean(1 - ssim[:, 0], mask)
