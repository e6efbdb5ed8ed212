"""What every vocoder promises: log-mel in, waveform out, what it needs, how far it looks; folding of weights.

A vocoder works in two halves, so that a long song can be made piece by piece and is the same as if made at once:
`source` draws whatever is random and builds whatever runs through the whole song (noise, the phase of a sine), sample
by sample; `render` is a stack of convolutions, and what it gives for a frame depends on `receptive_field` frames.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featstore.errors import ContractMismatch, LengthMismatch
from featstore_extractors.signal import MelContract

__all__ = ["Span", "Vocoder", "VocoderConfig", "check_steps_up", "fold", "inverse_stft", "mixed", "noise", "seed_of",
           "upsampled", "widened", "window"]

BLOCK = 32  # frames whose noise is drawn at once: about a training crop

Module = TypeVar("Module", bound=nn.Module)
Span = tuple[int, int]  # first and last of the samples, or frames, that something depends on


@dataclass(frozen=True)
class VocoderConfig(MelContract):
    """The mel contract that a vocoder is made for; a vocoder's own `Config` adds its architecture and its losses.

    So a vocoder cannot be without its contract, `config.differs(other)` names what two of them disagree on, and
    `config.json` says all. Lists become tuples, since JSON has none.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def preset(cls, name: str) -> Self:
        """The configuration of that name; `dataclasses.replace` or the constructor changes fields of it.

        Raises:
            ValueError: if there is no such preset; the message lists those there are.
        """
        if name not in cls.PRESETS:
            there = ", ".join(cls.PRESETS) or "none"
            raise ValueError(f"no preset {name!r} of {cls.__module__.rpartition('.')[0]}; there are {there}")
        return cls(**cls.PRESETS[name])

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _tuples(getattr(self, field.name)))
        super().__post_init__()

    @property
    def contract(self) -> MelContract:
        """The mel contract alone."""
        return MelContract(**{field.name: getattr(self, field.name) for field in dataclasses.fields(MelContract)})


class Vocoder(nn.Module):
    """Log-mel (B, T, n_mels) to waveform (B, T hop_length); base of the zoo's vocoders.

    A subclass defines `render` and `receptive_field`, and `source` if there is anything random or endless in it.
    """

    needs_f0: ClassVar[bool] = False
    needs_generator: ClassVar[bool] = False
    config: VocoderConfig

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def hop_length(self) -> int:
        """Samples of waveform per frame."""
        return self.config.hop_length

    @property
    def receptive_field(self) -> tuple[int, int]:
        """Frames to the left and to the right of a frame that its samples depend on, given the source."""
        raise NotImplementedError

    def forward(self, log_mel: Tensor, f0: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Waveform (B, T hop_length) in float32, full scale 1, from log-mel (B, T, n_mels).

        f0: (B, T) in Hz, 0 where unvoiced; only where `needs_f0`, and passed over elsewhere.
        generator: where randomness comes from, if `needs_generator`. One on the CPU gives the same draws on any device.

        Raises:
            ContractMismatch: if log_mel has another number of mels.
            LengthMismatch: if f0 and log_mel differ in length.
            ValueError: if a tensor has another shape, or f0 or the generator is missing.
        """
        self.check(log_mel, f0, generator)
        return self.render(log_mel, self.source(log_mel, f0, generator)).float()

    def source(self, log_mel: Tensor, f0: Tensor | None, generator: torch.Generator | None,
               span: tuple[int, int] | None = None) -> Tensor | None:
        """What `render` needs beside the log-mel, (B, K, T hop_length), or None; only the length of log_mel counts.

        span: frames [start, stop) of it alone, (B, K, (stop - start) hop_length): the very stretch of the whole that
            the same state of the generator gives.
        """
        return None

    def render(self, log_mel: Tensor, source: Tensor | None = None) -> Tensor:
        """Waveform (B, T hop_length) from log-mel (B, T, n_mels) and the same stretch of source; nothing random."""
        raise NotImplementedError

    def fold(self) -> Self:
        """Puts weight norm into the weights, in place: the same output with less work. Training is over then."""
        return fold(self)

    def check(self, log_mel: Tensor, f0: Tensor | None, generator: torch.Generator | None) -> None:
        """What `forward` raises for tensors that it cannot use."""
        if log_mel.ndim != 3 or not log_mel.shape[1]:
            raise ValueError(f"log_mel has shape {tuple(log_mel.shape)}: expected (B, T, n_mels) with T >= 1")
        if log_mel.shape[2] != self.config.n_mels:
            raise ContractMismatch(f"log_mel has {log_mel.shape[2]} mels, this vocoder was made for n_mels="
                                   f"{self.config.n_mels}: extract log-mel with the contract of the vocoder")
        if self.needs_generator and generator is None:
            raise ValueError(f"{type(self).__module__} draws random numbers: give generator=torch.Generator()"
                             ".manual_seed(...)")
        if not self.needs_f0:
            return
        if f0 is None:
            raise ValueError(f"{type(self).__module__} hears f0: give f0 (B, T) in Hz, 0 where unvoiced "
                             "(featstore extract -f f0)")
        if f0.ndim != 2 or f0.shape[0] != log_mel.shape[0]:
            raise ValueError(f"f0 has shape {tuple(f0.shape)}: expected (B, T) = {tuple(log_mel.shape[:2])}")
        if f0.shape[1] != log_mel.shape[1]:
            raise LengthMismatch(f"f0 has {f0.shape[1]} frames and log_mel {log_mel.shape[1]}: bring f0 onto the "
                                 "frames of log-mel, as a view does with like='log-mel'")


def seed_of(generator: torch.Generator) -> int:
    """A number drawn from the generator, for `noise`."""
    return int(torch.randint(1 << 62, (), generator=generator, device=generator.device))


def noise(seed: int, rows: tuple[int, int], span: tuple[int, int], hop: int) -> Tensor:
    """Normal numbers (B, K, (stop - start) hop) for frames [start, stop), float32, on the CPU.

    They are drawn in blocks of `BLOCK` frames, each from a seed of its own: a stretch of a song has those of the whole,
    and the whole need never be there.
    """
    first, last = span[0] // BLOCK, -(-span[1] // BLOCK)
    blocks = [torch.randn(*rows, BLOCK * hop, generator=torch.Generator().manual_seed(mixed(seed, number)))
              for number in range(first, last)]
    return torch.cat(blocks, 2)[..., (span[0] - first * BLOCK) * hop:(span[1] - first * BLOCK) * hop]


def mixed(*numbers: int) -> int:
    """A seed of 32 bits, which is what torch's generator takes, from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


def fold(module: Module) -> Module:
    """`module` with every weight norm and spectral norm put into the plain weight, in place; gives the same output.

    torch's `remove_parametrizations` takes the weight from the class, which copies of a module share: folding the copy
    that is to be saved would break the one in training.
    """
    for part in list(module.modules()):
        if parametrize.is_parametrized(part):
            names = [str(name) for name in part.parametrizations]  # type: ignore[union-attr]
            weights = {name: getattr(part, name).detach().clone() for name in names}
            part.__class__ = parametrize.type_before_parametrizations(part)
            del part.parametrizations
            for name, weight in weights.items():
                part.register_parameter(name, nn.Parameter(weight))
    return module


def widened(span: Span, reach: int) -> Span:
    """What `span` depends on through layers that look `reach` positions to either side."""
    return span[0] - reach, span[1] + reach


def upsampled(span: Span, kernel: int, stride: int, padding: int | None = None) -> Span:
    """What `span` depends on through a transposed convolution, padded by (kernel - stride) / 2 if not told."""
    padding = (kernel - stride) // 2 if padding is None else padding
    return -((kernel - 1 - padding - span[0]) // stride), (span[1] + padding) // stride


def fitting(hop_length: int, steps: int) -> list[int]:
    """Rates, as alike as the hop's factors let them be, whose product is the hop; the largest first."""
    rates, rest, factor = [1] * steps, hop_length, 2
    factors = []
    while rest > 1:
        if rest % factor:
            factor += 1
        else:
            factors.append(factor)
            rest //= factor
    for found in reversed(factors):
        rates[rates.index(min(rates))] *= found
    return sorted((rate for rate in rates if rate > 1), reverse=True)


def check_rates(rates: tuple[int, ...], hop_length: int, *, with_kernels: bool) -> None:
    """Raises ValueError, with rates (and kernels) that would do, unless the rates make a hop of a frame."""
    if math.prod(rates) == hop_length:
        return
    would = fitting(hop_length, len(rates))
    way = f"--set upsample_rates={json.dumps(would, separators=(',', ':'))}"
    if with_kernels:
        kernels = [2 * rate + rate % 2 for rate in would]  # twice the rate, as published; as even or odd as it
        way += f" --set upsample_kernels={json.dumps(kernels, separators=(',', ':'))}"
    raise ValueError(f"upsample_rates {rates} make {math.prod(rates)} samples of a frame, hop_length is {hop_length}: "
                     f"they must be equal, for example {way}")


def check_steps_up(rates: tuple[int, ...], kernels: tuple[int, ...], channels: int, hop_length: int) -> None:
    """Raises ValueError unless steps up by `rates` make a hop of a frame, halving `channels` each time."""
    check_rates(rates, hop_length, with_kernels=True)
    if len(kernels) != len(rates):
        raise ValueError(f"{len(kernels)} upsample_kernels for {len(rates)} upsample_rates: give one for each")
    for rate, kernel in zip(rates, kernels, strict=True):
        if kernel < rate or (kernel - rate) % 2:
            raise ValueError(f"upsample kernel {kernel} for rate {rate}: expected at least the rate, and as even or "
                             "odd as it")
    if channels < 1 or channels % 2 ** len(rates):
        raise ValueError(f"channels {channels} must be a multiple of {2 ** len(rates)}: they are halved {len(rates)} "
                         "times")


def inverse_stft(real: Tensor, imaginary: Tensor, config: MelContract) -> Tensor:
    """Waveform (B, T hop) from the spectra (B, T, n_fft // 2 + 1) of its frames, framed as the mel contract frames.

    Each frame is windowed again and overlapped, and the sum divided by that of the squared windows (Griffin and Lim,
    1984, equation 6). torch.istft only knows frames centred on their hop and refuses windows that fade at the ends.
    """
    n_fft, hop, frames = config.n_fft, config.hop_length, real.shape[1]
    taper = window(config, real.device, torch.float32)
    pieces = torch.fft.irfft(torch.complex(real.float(), imaginary.float()), n_fft) * taper  # (B, T, n_fft)
    ends = ((n_fft - hop) // 2 if config.padding == "frames" else n_fft // 2, frames * hop)
    total = _overlapped(pieces, hop, ends)
    weight = _overlapped(taper.square().expand(1, frames, n_fft), hop, ends)
    return total / weight.clamp_min(1e-8)


def window(contract: MelContract, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The contract's periodic Hann window of `win_length` in the middle of (n_fft,)."""
    hann = torch.hann_window(contract.win_length, dtype=dtype, device=device)
    left = (contract.n_fft - contract.win_length) // 2
    return F.pad(hann, (left, contract.n_fft - contract.win_length - left))


def _overlapped(pieces: Tensor, hop: int, ends: tuple[int, int]) -> Tensor:
    """Pieces (B, T, n_fft) added up at every `hop`: (B, length), from sample `start` of them on."""
    start, length = ends
    total = (pieces.shape[1] - 1) * hop + pieces.shape[2]
    added = F.fold(pieces.transpose(1, 2), (1, total), (1, pieces.shape[2]), stride=(1, hop))
    return F.pad(added[:, 0, 0], (0, max(0, start + length - total)))[:, start : start + length]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
