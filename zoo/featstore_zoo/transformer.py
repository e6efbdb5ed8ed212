"""Transformers over frames: relative positions (VITS, TransformerSVC, CoMoSVC), torch's own, and a small conformer.

All take (B, C, T) or (B, T, C) as said, and a mask (B, T) that is True on frames that count; what they give for those
does not depend on the others. Names of weights in `RelativeTransformer` are those of Glow-TTS' and VITS' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REACH = 512  # frames to either side that a frame attends to: as far as it can in what models learn from at a time

__all__ = ["Conformer", "PlainTransformer", "RelativeMapper", "RelativeTransformer", "positions"]


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (B, C, T)."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.transpose(1, 2), (x.shape[1],), self.gamma, self.beta, self.eps).transpose(1, 2)


class RelativeAttention(nn.Module):
    """Self-attention that knows how far apart frames are, up to `window` of them (Shaw et al., arXiv 1803.02155).

    Nothing beyond `reach` frames is attended to: in a song of minutes a frame hears no more than it has learnt from.
    """

    def __init__(self, channels: int, heads: int, window: int, dropout: float, reach: int = REACH) -> None:
        super().__init__()
        self.heads, self.window, self.dropout, self.reach = heads, window, dropout, reach
        size = channels // heads
        self.conv_q, self.conv_k, self.conv_v, self.conv_o = (nn.Conv1d(channels, channels, 1) for _ in range(4))
        self.emb_rel_k = nn.Parameter(torch.randn(1, 2 * window + 1, size) * size**-0.5)  # shared by all heads
        self.emb_rel_v = nn.Parameter(torch.randn(1, 2 * window + 1, size) * size**-0.5)
        for layer in (self.conv_q, self.conv_k, self.conv_v):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (layer(x).unflatten(1, (self.heads, -1)).transpose(2, 3)  # (B, H, T, C / H)
                   for layer in (self.conv_q, self.conv_k, self.conv_v))
        q = q / math.sqrt(q.shape[-1])
        frames, near_by = x.shape[2], self.window
        here = torch.arange(frames, device=x.device)
        apart = here - here[:, None]  # (T, T), of the key from the query
        near = (apart + near_by).clamp(0, 2 * near_by).expand(*q.shape[:2], frames, frames)
        scores = q @ k.transpose(2, 3)
        by_distance = (q @ self.emb_rel_k.transpose(1, 2)).gather(3, near)
        scores = scores + by_distance.masked_fill(apart.abs() > near_by, 0)
        if frames > self.reach:
            scores = scores.masked_fill(apart.abs() > self.reach, -math.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -math.inf)
        weights = F.dropout(scores.softmax(3), self.dropout, self.training)
        places = here[:, None] + torch.arange(-near_by, near_by + 1, device=x.device)  # (T, 2 window + 1)
        inside = (places >= 0) & (places < frames)
        band = weights.gather(3, places.clamp(0, frames - 1).expand(*q.shape[:2], -1, -1)) * inside
        return self.conv_o((weights @ v + band @ self.emb_rel_v).transpose(2, 3).flatten(1, 2))


class FeedForward(nn.Module):
    """Two convolutions over frames with a ReLU between."""

    def __init__(self, channels: int, hidden: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.conv_1 = nn.Conv1d(channels, hidden, kernel, padding="same")
        self.conv_2 = nn.Conv1d(hidden, channels, kernel, padding="same")

    def forward(self, x: Tensor, keep: Tensor | float) -> Tensor:
        x = F.dropout(self.conv_1(x * keep).relu(), self.dropout, self.training)
        return self.conv_2(x * keep) * keep


class RelativeTransformer(nn.Module):
    """The text encoder of Glow-TTS (Kim et al., arXiv 2005.11129) over frames: (B, C, T) and mask (B, T) to (B, C, T).

    Norms come after the residual sums; `eps` of them is 1e-4 in TransformerSVC and 1e-5 in VITS.

    reach: frames to either side that a layer's frame depends on.
    """

    def __init__(self, channels: int, hidden: int, heads: int, layers: int, kernel: int = 3, dropout: float = 0.1,
                 window: int = 4, eps: float = 1e-5) -> None:
        super().__init__()
        check(channels, heads, layers)
        self.dropout = dropout
        self.attn_layers = nn.ModuleList(RelativeAttention(channels, heads, window, dropout) for _ in range(layers))
        self.norm_layers_1 = nn.ModuleList(ChannelNorm(channels, eps) for _ in range(layers))
        self.ffn_layers = nn.ModuleList(FeedForward(channels, hidden, kernel, dropout) for _ in range(layers))
        self.norm_layers_2 = nn.ModuleList(ChannelNorm(channels, eps) for _ in range(layers))
        self.reach = REACH + 2 * (kernel // 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        keep = 1.0 if mask is None else mask[:, None].to(x.dtype)
        x = x * keep
        for number in range(len(self.attn_layers)):
            x = self.layer(number, x, mask, keep)
        return x * keep

    def layer(self, number: int, x: Tensor, mask: Tensor | None = None, keep: Tensor | float = 1.0) -> Tensor:
        """One layer of it, (B, C, T) to (B, C, T)."""
        attended = self.attn_layers[number](x, mask)
        x = self.norm_layers_1[number](x + F.dropout(attended, self.dropout, self.training))
        fed = self.ffn_layers[number](x, keep)
        made: Tensor = self.norm_layers_2[number](x + F.dropout(fed, self.dropout, self.training))
        return made


class RelativeMapper(nn.Module):
    """A condition (B, T, C) to (B, T, bands) through a relative transformer; Amphion calls it a conformer."""

    def __init__(self, channels: int, bands: int, hidden: int, heads: int, layers: int, kernel: int = 3,
                 dropout: float = 0.1) -> None:
        super().__init__()
        self.conformer_encoder = RelativeTransformer(channels, hidden, heads, layers, kernel, dropout, eps=1e-4)
        self.projection = nn.Conv1d(channels, bands, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        made: Tensor = self.projection(self.conformer_encoder(x.transpose(1, 2), mask)).transpose(1, 2)
        return made

    def song(self, x: Tensor, size: int, told: Callable[[float], None]) -> Tensor:
        """As `forward` for a song (1, T, C), on the CPU as is (1, T, bands), in windows."""
        from .song import attended, joined, local

        made, device = attended(self.conformer_encoder, x, size, told), self.projection.weight.device

        def bands(begin: int, end: int) -> Tensor:
            part: Tensor = self.projection(made[:, begin:end].to(device).transpose(1, 2)).transpose(1, 2)
            return part

        return joined(local(bands, x.shape[1], size, 0), x.shape[1])


class PlainTransformer(nn.Module):
    """torch's encoder with sinusoids for positions: (B, T, C) and mask (B, T) to (B, T, C); norms after the sums."""

    def __init__(self, channels: int, hidden: int, heads: int, layers: int, dropout: float = 0.1) -> None:
        super().__init__()
        check(channels, heads, layers)
        self.dropout = dropout
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(channels, heads, hidden, dropout, batch_first=True)
                                    for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = F.dropout(x + positions(x), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=None if mask is None else ~mask)
        return x


class ConformerLayer(nn.Module):
    """Half a feed-forward, attention, a depthwise convolution, half a feed-forward (Gulati et al., 2005.08100)."""

    def __init__(self, channels: int, hidden: int, heads: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.before, self.behind = (nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.SiLU(), nn.Dropout(dropout),
            nn.Linear(hidden, channels), nn.Dropout(dropout)) for _ in range(2))
        self.attention_norm = nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, heads, dropout, batch_first=True)
        self.conv_norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 2 * channels)
        self.depthwise = nn.Conv1d(channels, channels, kernel, padding="same", groups=channels)
        self.inner_norm = nn.LayerNorm(channels)  # where the paper has batch norm, which other items of a batch move
        self.narrow = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.before(x) / 2
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, None if mask is None else ~mask, need_weights=False)[0]
        y = F.glu(self.widen(self.conv_norm(x)))
        y = y if mask is None else y * mask[..., None]
        y = self.depthwise(y.transpose(1, 2)).transpose(1, 2)
        x = x + self.narrow(F.silu(self.inner_norm(y)))
        return self.norm(x + self.behind(x) / 2)


class Conformer(nn.Module):
    """A small conformer with sinusoids for positions: (B, T, C) and mask (B, T) to (B, T, C).

    In the sizes of Amphion's option; its weights, which are torchaudio's with batch norm, are not read.
    """

    def __init__(self, channels: int, layers: int, hidden: int = 256, heads: int = 2, kernel: int = 3,
                 dropout: float = 0.1) -> None:
        super().__init__()
        check(channels, heads, layers)
        self.layers = nn.ModuleList(ConformerLayer(channels, hidden, heads, kernel, dropout) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + positions(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def positions(x: Tensor) -> Tensor:
    """Sinusoids (T, C) for x (B, T, C), sine and cosine in turns (Vaswani et al., arXiv 1706.03762, 3.5)."""
    frames, channels = x.shape[1:]
    rates = torch.exp(torch.arange(0, channels, 2, device=x.device) * (-math.log(10000.0) / channels))
    phase = torch.arange(frames, device=x.device)[:, None] * rates
    return torch.stack([phase.sin(), phase.cos()], 2).flatten(1)[:, :channels].to(x.dtype)


def check(channels: int, heads: int, layers: int) -> None:
    """Raises ValueError unless heads divide the channels and there are layers."""
    if layers < 1 or heads < 1 or channels % heads:
        raise ValueError(f"{channels} channels, {heads} heads, {layers} layers: expected at least one layer, and heads "
                         "that divide the channels")
