"""The content encoder in the box, in torch: waveforms -> log mel bands -> ConvNeXt blocks -> content and phones.

The blocks are those of Liu et al., "A ConvNet for the 2020s" (arXiv 2201.03545), along time: a depthwise convolution, a
norm, and a perceptron that widens and narrows. Nothing else looks beyond its frame, so that what a frame depends on
is finite (`CONTEXT`) and pieces of a recording with that much around them give what the whole recording gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SAMPLE_RATE = 16000
HOP_LENGTH = 320          # samples from content frame to content frame: 50 a second
STEP, WIN_LENGTH, N_FFT = 160, 400, 512  # of the mel frames, two for each content frame
MELS = 64
LOWEST = 40.0             # Hz, where the bands begin; they end at half the sample rate
EPSILON = 1e-7            # of a band's power, beside a full-scale sine's of about 1
MEAN, SCALE = -6.0, 4.0   # of log mel bands of speech, roughly: what enters the network is near unit variance
KERNEL = 15


@dataclass(frozen=True)
class Sizes:
    """Of the network: its width, blocks, content channels and phones."""

    width: int = 256
    blocks: int = 8
    expansion: int = 3
    dim: int = 256
    phones: int = 0

    @property
    def context(self) -> int:
        """Samples on either side of a frame's centre that it depends on, at most."""
        return self.blocks * (KERNEL // 2) * HOP_LENGTH + HOP_LENGTH // 2 + WIN_LENGTH // 2


class Bands(nn.Module):
    """Log power in mel bands: waves (B, N) in [-1, 1] -> (B, 2T, MELS), T = N // 320, frame k centred on sample
    (k + 1/2) 160. Natural log, triangles on the scale 1127 ln(1 + f / 700)."""

    window: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(WIN_LENGTH) / (WIN_LENGTH / 4), persistent=False)
        self.register_buffer("filters", _triangles(MELS), persistent=False)

    def forward(self, waves: Tensor) -> Tensor:
        count = waves.shape[1] // HOP_LENGTH * 2
        before = (WIN_LENGTH - STEP) // 2
        padded = F.pad(waves, (before, before))
        frames = padded.unfold(1, WIN_LENGTH, STEP)[:, :count]
        spectrum = torch.fft.rfft(frames * self.window, N_FFT)
        power = spectrum.real.square() + spectrum.imag.square()
        return torch.log(power @ self.filters + EPSILON)


def band_centres() -> Tensor:
    """(MELS,) in Hz."""
    lowest, highest = _mel(LOWEST), _mel(SAMPLE_RATE / 2)
    steps = torch.arange(1, MELS + 1) * (highest - lowest) / (MELS + 1) + lowest
    return 700.0 * ((steps / 1127.0).exp() - 1.0)


class Block(nn.Module):
    """x + perceptron(norm(convolution(x))): (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.along = nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, width * expansion)
        self.narrow = nn.Linear(width * expansion, width)

    def forward(self, x: Tensor) -> Tensor:
        # In two dimensions (the other has one place) channels lie innermost, as they do for the layers around: twice as
        # fast as in one dimension on a CPU.
        y = F.conv2d(x.transpose(1, 2).unsqueeze(3), self.along.weight.unsqueeze(3), self.along.bias,
                     padding=(KERNEL // 2, 0), groups=x.shape[2]).squeeze(3).transpose(1, 2)
        return x + self.narrow(F.gelu(self.wide(self.norm(y))))


class ContentNet(nn.Module):
    """Waveforms or their bands -> content (B, T, dim), and from content the phones."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.bands = Bands()
        self.enter = nn.Linear(2 * MELS, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.expansion) for _ in range(sizes.blocks))
        self.norm = nn.LayerNorm(sizes.width)
        self.content = nn.Linear(sizes.width, sizes.dim)
        self.phones = nn.Linear(sizes.dim, sizes.phones)

    def forward(self, bands: Tensor, inside: Tensor | None = None) -> Tensor:
        """Content (B, T, dim) of log mel bands (B, 2T, MELS).

        inside: (B, T, 1), 1 for frames of the recording and 0 for padding, which stays 0 for its neighbours.
        """
        x = self.enter(((bands - MEAN) / SCALE).reshape(len(bands), -1, 2 * MELS))
        for block in self.blocks:
            x = block(x if inside is None else x * inside)
        return torch.as_tensor(self.content(self.norm(x)))

    def hidden(self, waves: list[Tensor], wanted: frozenset[int]) -> tuple[dict[int, Tensor], list[int]]:
        lengths = [frames(len(wave)) for wave in waves]
        # Cut to whole frames: what is beyond the last would be heard by it in a batch and not alone.
        cut = [wave[: length * HOP_LENGTH] for wave, length in zip(waves, lengths, strict=True)]
        batch = nn.utils.rnn.pad_sequence(list(cut), batch_first=True)
        places = torch.arange(max(lengths), device=batch.device)
        inside = (places < torch.tensor(lengths, device=batch.device)[:, None]).unsqueeze(2).to(batch.dtype)
        return dict.fromkeys(wanted, self(self.bands(batch), inside)), lengths


def frames(samples: int) -> int:
    """Content frames of `samples` samples: whole steps of 320."""
    return samples // HOP_LENGTH


def greedy(posteriors: Tensor, names: Sequence[str], silence: int = 0) -> list[str]:
    """The phones of frame posteriors (T, P), each run of frames once, silences left out."""
    path = torch.unique_consecutive(posteriors.argmax(-1)).tolist()
    return [names[number] for number in path if number != silence]


def _mel(hz: float) -> float:
    return 1127.0 * math.log(1.0 + hz / 700.0)


def _triangles(mels: int) -> Tensor:
    """(257, mels), each filter's weights summing to one, so that a white spectrum is flat."""
    lowest, highest = _mel(LOWEST), _mel(SAMPLE_RATE / 2)
    step = (highest - lowest) / (mels + 1)
    left, centre, right = (lowest + (torch.arange(mels) + side) * step for side in (0.0, 1.0, 2.0))
    bins = 1127.0 * (1.0 + torch.arange(N_FFT // 2 + 1)[:, None] * (SAMPLE_RATE / N_FFT) / 700.0).log()
    shape = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)
    return shape / shape.sum(0).clamp(min=1e-6)
