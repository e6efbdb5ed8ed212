"""The encoder of WeNet in torch: waveforms -> filter banks -> subsampling -> conformer blocks.

The conformer is that of Gulati et al. (arXiv 2005.08100), as U2++ (Wu et al., arXiv 2106.05642) trains it; tensors have
the names they have in a WeNet checkpoint. Two things are done otherwise than there, neither changing a number of an
utterance alone. What WeNet calls relative positions (`rel_pos`) lacks the shift of Transformer-XL (arXiv 1901.02860),
so that a key has one position for all queries: (q + u) k + (q + v) p = q (k + p) + (u k + v p), which is one attention
over k + p with one number added per key. And frames that are padding are zeroed behind the gate of the convolution,
where its bias would otherwise bring them back to life and leak into their neighbours.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .wenet import Config

SAMPLE_RATE = 16000
WIN_LENGTH, HOP_LENGTH, N_FFT = 400, 160, 512
LOWEST = 20.0  # Hz, where Kaldi's filters begin; they end at half the sample rate
PRE_EMPHASIS = 0.97
EPSILON = 2.0**-23  # Kaldi's floor of the energies: that of float32

ACTIVATIONS = {"swish": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU}


class Fbank(nn.Module):
    """Kaldi's log mel filter bank without dither: waves (B, N) in [-1, 1] -> (B, T, mels), T = 1 + (N - 400) // 160.

    Each frame stands alone: mean removed, pre-emphasis, Povey's window, power spectrum, triangles on the scale
    1127 ln(1 + f / 700), natural log. Scaled to 16-bit samples first, as the models were trained.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, mels: int) -> None:
        super().__init__()
        # Both in float32, rounding included, as in training: exact ones move near-silent bins by 3e-4.
        self.register_buffer("window", torch.hann_window(WIN_LENGTH, periodic=False) ** 0.85, persistent=False)
        self.register_buffer("filters", _triangles(mels), persistent=False)

    def forward(self, waves: Tensor) -> Tensor:
        frames = (waves * 32768.0).unfold(1, WIN_LENGTH, HOP_LENGTH)  # (B, T, 400)
        frames = frames - frames.mean(dim=2, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)
        spectrum = torch.fft.rfft((frames - PRE_EMPHASIS * before) * self.window, N_FFT)
        power = spectrum.real.square() + spectrum.imag.square()  # (B, T, 257)
        return torch.log((power @ self.filters).clamp(min=EPSILON))


def _triangles(mels: int) -> Tensor:
    """(257, mels): the filters; the last bin, half the sample rate itself, is in none."""
    lowest, highest = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (LOWEST, SAMPLE_RATE / 2))
    step = (highest - lowest) / (mels + 1)
    left, centre, right = (lowest + (torch.arange(mels) + side) * step for side in (0.0, 1.0, 2.0))
    bins = 1127.0 * (1.0 + torch.arange(N_FFT // 2)[:, None] * (SAMPLE_RATE / N_FFT) / 700.0).log()  # (256, 1)
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return F.pad(torch.minimum(rising, falling).clamp(min=0), (0, 0, 0, 1))


class Normalise(nn.Module):
    """(x - mean) * istd per filter, statistics of the training data."""

    mean: Tensor
    istd: Tensor

    def __init__(self, mels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(mels))
        self.register_buffer("istd", torch.ones(mels))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.istd


class Subsampling(nn.Module):
    """(B, T, mels) -> (B, T', D): strided convolutions over time and frequency, without padding, and a linear layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for kernel, stride in config.kernels:
            steps += [nn.Conv2d(config.dim if steps else 1, config.dim, kernel, stride), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*steps)
        linear = nn.Linear(config.dim * config.subsampled(config.mels), config.dim)
        if config.input_layer == "conv2d":
            self.out = nn.Sequential(linear)
        else:
            self.linear = linear
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.unsqueeze(1)).transpose(1, 2).flatten(2)  # (B, T', D * height), the channel outermost
        return self.out(x) if self.config.input_layer == "conv2d" else self.linear(x)


class Attention(nn.Module):
    """Heads over (B, T, D), each query seeing the keys that `mask` lets it see."""

    def __init__(self, config: Config, relative: bool) -> None:
        super().__init__()
        dim, self.heads = config.dim, config.heads
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (nn.Linear(dim, dim) for _ in range(4))
        self.relative = relative
        if relative:
            self.linear_pos = nn.Linear(dim, dim, bias=False)
            self.pos_bias_u = nn.Parameter(torch.zeros(self.heads, dim // self.heads))
            self.pos_bias_v = nn.Parameter(torch.zeros(self.heads, dim // self.heads))

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None) -> Tensor:
        """table (T, D): a position's vector; mask: 0 or -inf, broadcast to (B, heads, T queries, T keys)."""
        q, k, v = (self._split(linear(x)) for linear in (self.linear_q, self.linear_k, self.linear_v))
        if self.relative:
            p = self._split(self.linear_pos(table))  # (heads, T, d)
            bias = (k * self.pos_bias_u[:, None]).sum(-1) + (p * self.pos_bias_v[:, None]).sum(-1)
            bias = (bias / math.sqrt(q.shape[-1])).unsqueeze(2)  # (B, heads, 1, T)
            k, mask = k + p, bias if mask is None else mask + bias
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype))
        return self.linear_out(found.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(..., T, D) -> (..., heads, T, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)


class FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.w_1 = nn.Linear(config.dim, config.linear_units)
        self.w_2 = nn.Linear(config.linear_units, config.dim)
        self.activation = ACTIVATIONS[config.activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.activation(self.w_1(x)))


class Convolution(nn.Module):
    """Gated, depthwise over time: symmetric, or causal, where each frame sees those before it only."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, kernel = config.dim, config.kernel
        self.pointwise_conv1 = nn.Conv1d(dim, 2 * dim, 1)
        self.depthwise_conv = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.norm = nn.LayerNorm(dim) if config.norm == "layer_norm" else nn.BatchNorm1d(dim)
        self.pointwise_conv2 = nn.Conv1d(dim, dim, 1)
        self.activation = ACTIVATIONS[config.activation]()
        self.causal, self.reach = config.causal, kernel - 1

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """padding (B, T, 1): True where a frame is none of its row's."""
        x = F.glu(_pointwise(self.pointwise_conv1, x), dim=-1)
        if padding is not None:
            x = x.masked_fill(padding, 0.0)
        if self.causal:  # WeNet puts zeros before the gate, which makes of them what its bias is
            nothing = F.glu(_pointwise(self.pointwise_conv1, x.new_zeros(1, 1, x.shape[2])), dim=-1)
            x = torch.cat([nothing.expand(len(x), self.reach, -1).to(x.dtype), x], dim=1)
        else:
            x = F.pad(x, (0, 0, self.reach // 2, self.reach // 2))
        x = self.depthwise_conv(x.transpose(1, 2)).transpose(1, 2)  # (B, T, D)
        if isinstance(self.norm, nn.BatchNorm1d):
            x = self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        else:
            x = self.norm(x)
        return _pointwise(self.pointwise_conv2, self.activation(x))


def _pointwise(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A convolution of width 1 over (B, T, D), which is a linear layer."""
    return F.linear(x, conv.weight.squeeze(2), conv.bias)


class Block(nn.Module):
    def __init__(self, config: Config, relative: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, relative)
        self.feed_forward = FeedForward(config)
        self.conv_module = Convolution(config)
        self.macaron = config.macaron
        if config.macaron:
            self.feed_forward_macaron = FeedForward(config)
            self.norm_ff_macaron = nn.LayerNorm(config.dim)
        self.norm_mha, self.norm_conv, self.norm_ff, self.norm_final = (nn.LayerNorm(config.dim) for _ in range(4))

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        share = 0.5 if self.macaron else 1.0
        if self.macaron:
            x = x + share * self.feed_forward_macaron(self.norm_ff_macaron(x))
        x = x + self.self_attn(self.norm_mha(x), table, mask)
        x = x + self.conv_module(self.norm_conv(x), padding)
        x = x + share * self.feed_forward(self.norm_ff(x))
        return self.norm_final(x)


class Conformer(nn.Module):
    """The whole encoder, in eval mode.

    relative: whether attention has weights for positions.
    normalised: whether there are statistics to normalise the filter bank with.
    chunk: a frame attends to those of its own chunk of so many frames and to all before; 0: to all.
    tail: zero samples appended to each waveform.
    """

    def __init__(self, config: Config, relative: bool, normalised: bool, chunk: int = 0, tail: int = 0) -> None:
        super().__init__()
        self.config, self.chunk, self.tail = config, chunk, tail
        self.fbank = Fbank(config.mels)
        self.global_cmvn = Normalise(config.mels) if normalised else None
        self.embed = Subsampling(config)
        self.encoders = nn.ModuleList(Block(config, relative) for _ in range(config.layers))
        self.after_norm = nn.LayerNorm(config.dim)
        self._table = torch.zeros(0, config.dim)
        self.eval()

    def hidden(self, waves: list[Tensor], wanted: frozenset[int]) -> tuple[dict[int, Tensor], list[int]]:
        """Layers `{layer: (B, T, D)}` of waveforms (N,), and how many frames of each row count (see `Network`)."""
        batch = F.pad(nn.utils.rnn.pad_sequence(waves, batch_first=True), (0, self.tail))
        lengths = [self.config.frames(len(wave) + self.tail) for wave in waves]
        with torch.autocast(batch.device.type, enabled=False):  # energies span more than half precision holds
            features = self.fbank(batch)
        return self.encode(features, lengths, wanted), lengths

    def encode(self, features: Tensor, lengths: list[int], wanted: frozenset[int]) -> dict[int, Tensor]:
        """Layers `{layer: (B, T', D)}` of filter banks (B, T, mels); the first `lengths` of T' count."""
        if self.global_cmvn is not None:
            features = self.global_cmvn(features)
        # The stream is of full precision whatever the products are: at bf16 that halves what layers add up to.
        x, table = self._placed(self.embed(features).float())
        padding, mask = self._masks(x.shape[1], lengths, x.device)
        found = {0: x} if 0 in wanted else {}
        last = len(self.encoders)
        for layer, block in enumerate(self.encoders[: max(wanted)], start=1):
            x = block(x, table, mask, padding)
            if layer in wanted:
                found[layer] = x if layer < last else self.after_norm(x)
        return found

    def _placed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the first block, and the vectors (T, D) of its positions."""
        if self.config.position == "no_pos":
            return x, torch.zeros_like(x[0])
        table = self._positions(x.shape[1], x.device)
        x = x * math.sqrt(self.config.dim)
        return (x + table if self.config.position == "abs_pos" else x), table

    def _positions(self, length: int, device: torch.device) -> Tensor:
        """Sinusoids (T, D) of Vaswani et al. (arXiv 1706.03762): sine in even, cosine in odd columns; any length."""
        if len(self._table) < length or self._table.device != device:
            dim = self.config.dim
            turns = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * -(math.log(10000.0) / dim))
            angles = torch.arange(length, dtype=torch.float32)[:, None] * turns
            self._table = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1).to(device)
        return self._table[:length]

    def _masks(self, frames: int, lengths: list[int], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Which frames are padding (B, T, 1), and what attention adds to its scores; None where there is nothing."""
        padding = mask = None
        position = torch.arange(frames, device=device)
        if min(lengths) < frames:
            padding = position[None, :, None] >= torch.tensor(lengths, device=device)[:, None, None]
            mask = _closed(padding.transpose(1, 2).unsqueeze(1))  # (B, 1, 1, T)
        if 0 < self.chunk < frames:
            chunk = position // self.chunk
            ahead = _closed(chunk[None, :] > chunk[:, None])  # (T, T)
            mask = ahead if mask is None else mask + ahead
        return padding, mask


def _closed(closed: Tensor) -> Tensor:
    """-inf where True, else 0."""
    return torch.zeros(closed.shape, device=closed.device).masked_fill(closed, -torch.inf)
