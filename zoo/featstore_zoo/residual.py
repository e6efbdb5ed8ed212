"""The parallel residual blocks of HiFi-GAN (Kong et al., arXiv 2010.05646) and of what was made from it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

SLOPE = 0.1  # of leaky ReLU


class ResBlock1(nn.Module):
    """x + conv(conv(x)) for each dilation; (B, D, T) -> (B, D, T)."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(conv(channels, channels, kernel, dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(channels, channels, kernel) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.convs1, self.convs2, strict=True):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, SLOPE)), SLOPE))
        return x


class ResBlock2(nn.Module):
    """x + conv(x) for each dilation; (B, D, T) -> (B, D, T)."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(channels, channels, kernel, dilation) for dilation in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            x = x + layer(F.leaky_relu(x, SLOPE))
        return x


def conv(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Conv1d:
    """A convolution that keeps the length, with weight norm."""
    return weight_norm(nn.Conv1d(inputs, outputs, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2))


def check_blocks(kernels: tuple[int, ...], dilations: tuple[tuple[int, ...], ...]) -> None:
    """Raises ValueError unless parallel residual blocks have odd kernels and a tuple of dilations each."""
    if len(dilations) != len(kernels) or not kernels:
        raise ValueError(f"{len(dilations)} block_dilations for {len(kernels)} block_kernels: give one tuple of "
                         "dilations for each kernel")
    if any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
        raise ValueError(f"block_kernels {kernels} must be odd, or they cannot be centred")
    if any(not each or min(each) < 1 for each in dilations):
        raise ValueError(f"block_dilations {dilations} must be numbers of at least 1, and some for each kernel")


def reach(kernels: tuple[int, ...], dilations: tuple[tuple[int, ...], ...], layers: int = 2) -> int:
    """Samples to either side that the widest of parallel blocks looks. layers: 2 of `ResBlock1`, 1 of `ResBlock2`."""
    return max(sum(dilation + layers - 1 for dilation in each) * (kernel - 1) // 2
               for kernel, each in zip(kernels, dilations, strict=True))
