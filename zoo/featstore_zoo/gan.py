"""What vocoders trained against discriminators share: these, adversarial and spectral losses, mel in torch.

All take waveforms (B, N). The losses are the terms as published, without weights; weights are in `GanConfig`, and
`Adversary` and `losses` apply them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from featstore_extractors.signal import MelContract, mel_filters

from .vocoder import Vocoder, VocoderConfig, window

Maps = list[Tensor]

STFT_RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))  # n_fft, hop, window of Parallel WaveGAN
MEL_SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))  # window, mels
SILENCE = 1e-5  # -100 dBFS, below 16-bit noise: the logarithm of silence is flat


@dataclass(frozen=True)
class GanConfig(VocoderConfig):
    """How a vocoder is trained against discriminators; its `Config` adds the architecture. Defaults: HiFi-GAN's.

    discriminators: of mpd, msd, mrd, ms_stft and ms_sb_cqt; none trains on the spectral losses alone.
    discriminator_width: their channels, as a factor; 1 is as published.
    mpd_last_stride: of the fifth convolution of each period: 1 as published, 3 in Amphion's weights.
    cqt_octaves: of ms_sb_cqt, from 32.7 Hz (C1) up; 9 octaves need a sample rate of at least 18.7 kHz.
    adversarial: "lsgan" (squares; Mao et al., arXiv 1611.04076) or "hinge" (Lim and Ye, arXiv 1705.02894).
    mel_loss: "single" at the contract's resolution, or "multi" at seven.
    lambda_*: weights of the terms; 0 leaves one out.
    """

    discriminators: tuple[str, ...] = ("mpd", "msd")
    discriminator_width: float = 1.0
    mpd_periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    mpd_last_stride: int = 1
    cqt_octaves: int = 9
    adversarial: Literal["lsgan", "hinge"] = "lsgan"
    mel_loss: Literal["single", "multi"] = "single"
    lambda_adversarial: float = 1.0
    lambda_feature: float = 2.0
    lambda_mel: float = 45.0
    lambda_stft: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.discriminators if name not in DISCRIMINATORS]
        if unknown or len(set(self.discriminators)) != len(self.discriminators):
            raise ValueError(f"discriminators {', '.join(self.discriminators)}: expected each of "
                             f"{', '.join(DISCRIMINATORS)} at most once")
        if self.adversarial not in ("lsgan", "hinge") or self.mel_loss not in ("single", "multi"):
            raise ValueError(f"adversarial={self.adversarial!r} must be lsgan or hinge, and mel_loss={self.mel_loss!r} "
                             "single or multi")
        weights = {field.name: getattr(self, field.name) for field in fields(self) if field.name.startswith("lambda_")}
        wrong = [f"{name}={value}" for name, value in weights.items() if not 0 <= value < math.inf]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: the weight of a loss is a number of at least 0")
        if self.discriminator_width <= 0 or self.mpd_last_stride not in (1, 3):
            raise ValueError(f"discriminator_width {self.discriminator_width:g} must be above 0 and mpd_last_stride "
                             f"{self.mpd_last_stride} 1 or 3")
        if "ms_sb_cqt" in self.discriminators:
            check_octaves(self.cqt_octaves, self.sample_rate)


# --- mel and spectra


def log_mel(wave: Tensor, contract: MelContract) -> Tensor:
    """Log-mel (B, T, n_mels) of waveforms (B, N), to be differentiated; the numbers of `featstore_extractors.LogMel`.

    float32 (or float64, if `wave` is). The spectrum itself is taken in float64, as the extractor takes it: in float32
    the rounding of the FFT moves bins near the floor by up to 4e-4 (24k-100, sung A3). MPS has no float64.
    """
    wave = wave if wave.dtype == torch.float64 else wave.float()
    contract = MelContract(**{field.name: getattr(contract, field.name) for field in fields(MelContract)})
    spectrum = _spectrum(wave, contract, contract.power)
    with torch.autocast(wave.device.type, enabled=False):
        mel = (spectrum.to(wave.dtype) @ _filters(contract, wave.device, wave.dtype)).clamp_min(contract.floor)
    return mel.log() if contract.log_base == "e" else mel.log10()


def magnitudes(wave: Tensor, contract: MelContract) -> Tensor:
    """sqrt(re^2 + im^2 + eps) of the frames of a contract, (B, T, n_fft // 2 + 1) in float32, of waveforms (B, N)."""
    return _spectrum(wave, contract, 1).float()


def _spectrum(wave: Tensor, contract: MelContract, power: int) -> Tensor:
    precise = wave if wave.device.type == "mps" else wave.double()
    pad = (contract.n_fft - contract.hop_length) // 2 if contract.padding == "frames" else contract.n_fft // 2
    if wave.shape[-1] <= pad:
        raise ValueError(f"too short: {wave.shape[-1]} samples, the reflection at the ends needs {pad + 1}")
    taper = window(contract, precise.device, precise.dtype)
    with torch.autocast(wave.device.type, enabled=False):
        padded = F.pad(precise[:, None], (pad, pad), mode="reflect")[:, 0]
        parts = torch.view_as_real(_stft(padded, contract.n_fft, contract.hop_length, taper))
        squares = parts.square().sum(-1) + contract.eps  # (B, T, bins)
        return squares if power == 2 else squares.clamp_min(1e-30).sqrt()  # 0 has no slope


def mel_l1(real: Tensor, fake: Tensor, contract: MelContract) -> Tensor:
    """Mean |difference| of the log-mels of two waveforms (B, N) (Kong et al., arXiv 2010.05646, equation 5)."""
    return F.l1_loss(log_mel(fake, contract), log_mel(real, contract))


def multi_scale_mel_l1(real: Tensor, fake: Tensor, sample_rate: int) -> Tensor:
    """Sum over seven windows of 32 to 2048 samples of mean |difference| of log10-mels (Kumar et al., 2306.06546)."""
    total = real.new_zeros(())
    for size, mels in MEL_SCALES:
        contract = MelContract(sample_rate=sample_rate, n_fft=size, win_length=size, hop_length=size // 4, n_mels=mels,
                               fmax=sample_rate / 2, log_base="10", padding="centre")
        total = total + mel_l1(real, fake, contract)
    return total


def multi_resolution_stft(real: Tensor, fake: Tensor,
                          resolutions: Sequence[tuple[int, int, int]] = STFT_RESOLUTIONS) -> Tensor:
    """Mean over resolutions of spectral convergence plus log-magnitude L1 (Yamamoto et al., arXiv 1910.11480, eq. 6).

    |S| is held above 1e-5, so that silence is at no distance from itself and every gradient is finite.
    """
    total = real.new_zeros(())
    for n_fft, hop, width in resolutions:
        left = (n_fft - width) // 2
        taper = F.pad(torch.hann_window(width, device=real.device), (left, n_fft - width - left))
        with torch.autocast(real.device.type, enabled=False):
            magnitudes = []
            for wave in (real.float(), fake.float()):
                padded = F.pad(wave[:, None], (n_fft // 2, n_fft // 2), mode="reflect")[:, 0]
                power = torch.view_as_real(_stft(padded, n_fft, hop, taper)).square().sum(-1)
                magnitudes.append(power.clamp_min(SILENCE**2).sqrt())
            right, wrong = magnitudes
            difference = (right - wrong).square().sum().clamp_min(1e-20).sqrt() - 1e-10  # 0 has no slope
            total = total + difference / right.norm() + F.l1_loss(wrong.log(), right.log())
    return total / len(resolutions)


def _stft(wave: Tensor, n_fft: int, hop: int, taper: Tensor) -> Tensor:
    """Complex spectra (B, T, bins) of the frames [k hop, k hop + n_fft) of waveforms (B, N)."""
    return torch.stft(wave, n_fft, hop, n_fft, taper, center=False, return_complex=True).transpose(1, 2)


@lru_cache(maxsize=32)
def _filters(contract: MelContract, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(mel_filters(contract).T.copy()).to(device, dtype)


# --- adversarial losses, on lists with the scores of each discriminator


def lsgan_discriminator(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Sum over discriminators of E (1 - D(x))^2 + E D(G)^2."""
    return _sum((1 - r).square().mean() + f.square().mean() for r, f in zip(real, fake, strict=True))


def lsgan_generator(fake: Sequence[Tensor]) -> Tensor:
    """Sum over discriminators of E (1 - D(G))^2."""
    return _sum((1 - f).square().mean() for f in fake)


def hinge_discriminator(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Sum over discriminators of E max(0, 1 - D(x)) + E max(0, 1 + D(G))."""
    return _sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True))


def hinge_generator(fake: Sequence[Tensor]) -> Tensor:
    """Sum over discriminators of -E D(G)."""
    return _sum(-f.mean() for f in fake)


def feature_matching(real: Sequence[Maps], fake: Sequence[Maps]) -> Tensor:
    """Sum over discriminators and layers of the mean |difference| of feature maps; no gradient to the real ones."""
    return _sum(F.l1_loss(f, r.detach()) for reals, fakes in zip(real, fake, strict=True)
                for r, f in zip(reals, fakes, strict=True))


def _sum(terms: Any) -> Tensor:
    return torch.stack(list(terms)).sum()


class Adversary(nn.Module):
    """The discriminators of a configuration; called with real and made waveforms it gives the losses of both sides.

    Both sides see the same weights of both, so one backward of the sum of all terms serves both optimisers: no
    gradient of "discriminator" reaches the vocoder, and none of the others reaches the discriminators. (The published
    recipes update the discriminators first and pass everything through them again; that is a third more work.)
    """

    def __init__(self, config: GanConfig) -> None:
        super().__init__()
        self.config = config
        self.members = nn.ModuleDict({name: DISCRIMINATORS[name](config) for name in config.discriminators})

    def forward(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Weighted "discriminator", "adversarial" and "feature" of waveforms (B, N); all scalars."""
        hinge = self.config.adversarial == "hinge"
        real_scores, real_maps = self._judge(self.members, real)
        scores, _ = self._judge(self.members, fake.detach())
        loss = (hinge_discriminator if hinge else lsgan_discriminator)(real_scores, scores)
        scores, maps = self._judge(self._as_they_are, fake)
        return {
            "discriminator": loss,
            "adversarial": self.config.lambda_adversarial * (hinge_generator if hinge else lsgan_generator)(scores),
            "feature": self.config.lambda_feature * feature_matching(real_maps, maps),
        }

    @property
    def _as_they_are(self) -> dict[str, Callable[[Tensor], tuple[list[Tensor], list[Maps]]]]:
        """The discriminators as functions of the waveform alone."""
        def fixed(member: nn.Module) -> Callable[[Tensor], tuple[list[Tensor], list[Maps]]]:
            weights = {name: weight.detach() for name, weight in member.named_parameters()}
            return lambda wave: functional_call(member, weights, (wave,))

        return {name: fixed(member) for name, member in self.members.items()}

    @staticmethod
    def _judge(members: Mapping[str, Any] | nn.ModuleDict, wave: Tensor) -> tuple[list[Tensor], list[Maps]]:
        scores: list[Tensor] = []
        maps: list[Maps] = []
        for member in members.values():
            more_scores, more_maps = member(wave)
            scores += more_scores
            maps += more_maps
        return scores, maps


def losses(model: Vocoder, batch: Mapping[str, Tensor], generator: torch.Generator,
           adversary: Adversary | None = None) -> dict[str, Tensor]:
    """Weighted terms for a batch with "log-mel" (B, T, n_mels), "wave" (B, T hop_length) and, if heard, "f0" (B, T).

    Without an adversary only "mel" and "stft", as far as their weights are not 0; with one also "discriminator",
    "adversarial" and "feature". Their sum is what training minimises (see `Adversary`).
    """
    fake = model(batch["log-mel"], batch.get("f0"), generator)
    terms = spectral_losses(model.config, batch["wave"], fake) | (adversary(batch["wave"], fake) if adversary else {})
    if not terms:
        raise ValueError("no loss is left: lambda_mel and lambda_stft are 0 and there is no adversary; raise one of "
                         "them or give Adversary(config)")
    return terms


def spectral_losses(config: VocoderConfig, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """Weighted "mel" and "stft" of two waveforms (B, N), those whose weight is not 0."""
    if not isinstance(config, GanConfig):
        raise TypeError(f"{type(config).__name__} is no GanConfig: it has no weights of losses")
    terms = {}
    if config.lambda_mel:
        mel = mel_l1(real, fake, config) if config.mel_loss == "single" else multi_scale_mel_l1(real, fake,
                                                                                                config.sample_rate)
        terms["mel"] = config.lambda_mel * mel
    if config.lambda_stft:
        terms["stft"] = config.lambda_stft * multi_resolution_stft(real, fake)
    return terms


# --- discriminators: waveform (B, N) -> scores, and the feature maps behind each, both as lists over their parts


class Discriminator(nn.Module):
    """Several networks that each judge the waveform in their own way; `discriminators` holds them."""

    discriminators: nn.ModuleList

    def forward(self, wave: Tensor) -> tuple[list[Tensor], list[Maps]]:
        judged = [part(wave) for part in self.discriminators]
        return [score for score, _ in judged], [maps for _, maps in judged]


def layered(convs: nn.ModuleList, last: nn.Module, x: Tensor, slope: float) -> tuple[Tensor, Maps]:
    """What the last layer gives, and the feature map behind each of the others."""
    maps = []
    for conv in convs:
        x = F.leaky_relu(conv(x), slope)
        maps.append(x)
    return last(x), maps


class PeriodDiscriminator(nn.Module):
    """One period of MPD: the waveform as rows of `period` samples, convolved down the columns."""

    def __init__(self, period: int, width: float, last_stride: int) -> None:
        super().__init__()
        self.period = period
        sizes = [1, *(max(1, int(channels * width)) for channels in (32, 128, 512, 1024, 1024))]
        strides = (3, 3, 3, 3, last_stride)
        self.convs = nn.ModuleList(weight_norm(nn.Conv2d(sizes[i], sizes[i + 1], (5, 1), (stride, 1), padding=(2, 0)))
                                   for i, stride in enumerate(strides))
        self.conv_post = weight_norm(nn.Conv2d(sizes[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wave: Tensor) -> tuple[Tensor, Maps]:
        wave = F.pad(wave[:, None], (0, -wave.shape[-1] % self.period), mode="reflect")
        x = wave.unflatten(-1, (-1, self.period))  # (B, 1, N / period, period)
        x, maps = layered(self.convs, self.conv_post, x, 0.1)
        return x.flatten(1), [*maps, x]


class MultiPeriod(Discriminator):
    """MPD of HiFi-GAN (Kong et al., arXiv 2010.05646, 2.3)."""

    def __init__(self, config: GanConfig) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(
            PeriodDiscriminator(period, config.discriminator_width, config.mpd_last_stride)
            for period in config.mpd_periods)


class ScaleDiscriminator(nn.Module):
    """One scale of MSD: grouped convolutions over the waveform, averaged to 1 / 2^scale of its rate."""

    LAYERS = ((128, 15, 1, 1), (128, 41, 2, 4), (256, 41, 2, 16), (512, 41, 4, 16), (1024, 41, 4, 16),
              (1024, 41, 1, 16), (1024, 5, 1, 1))  # channels, kernel, stride, groups

    def __init__(self, scale: int, width: float) -> None:
        super().__init__()
        self.scale = scale
        norm = weight_norm if scale else spectral_norm
        self.convs = nn.ModuleList()
        size = 1
        for channels, kernel, stride, groups in self.LAYERS:
            wide = max(16, int(channels * width) // 16 * 16)  # the groups divide it
            self.convs.append(norm(nn.Conv1d(size, wide, kernel, stride, kernel // 2, groups=groups)))
            size = wide
        self.conv_post = norm(nn.Conv1d(size, 1, 3, padding=1))

    def forward(self, wave: Tensor) -> tuple[Tensor, Maps]:
        x = wave[:, None]
        for _ in range(self.scale):
            x = F.avg_pool1d(x, 4, 2, padding=2)
        x, maps = layered(self.convs, self.conv_post, x, 0.1)
        return x.flatten(1), [*maps, x]


class MultiScale(Discriminator):
    """MSD of MelGAN (Kumar et al., arXiv 1910.06711) in the sizes of HiFi-GAN; the first scale has spectral norm."""

    def __init__(self, config: GanConfig) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(ScaleDiscriminator(scale, config.discriminator_width) for scale in range(3))


class ResolutionDiscriminator(nn.Module):
    """One resolution of MRD: the magnitudes of an STFT with a rectangular window as a picture (B, 1, bins, T)."""

    window: Tensor

    def __init__(self, n_fft: int, hop: int, win_length: int, width: float) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        left = (n_fft - win_length) // 2
        box = F.pad(torch.ones(win_length), (left, n_fft - win_length - left))
        self.register_buffer("window", box, persistent=False)
        size = max(1, int(32 * width))
        self.convs = nn.ModuleList([weight_norm(nn.Conv2d(1, size, (3, 9), padding=(1, 4)))])
        self.convs.extend(weight_norm(nn.Conv2d(size, size, (3, 9), (1, 2), padding=(1, 4))) for _ in range(3))
        self.convs.append(weight_norm(nn.Conv2d(size, size, 3, padding=1)))
        self.conv_post = weight_norm(nn.Conv2d(size, 1, 3, padding=1))

    def forward(self, wave: Tensor) -> tuple[Tensor, Maps]:
        pad = (self.n_fft - self.hop) // 2
        padded = F.pad(wave[:, None].float(), (pad, pad), mode="reflect")[:, 0]
        parts = torch.view_as_real(_stft(padded, self.n_fft, self.hop, self.window))
        x = parts.square().sum(-1).clamp_min(1e-12).sqrt().transpose(1, 2)[:, None]  # silence has no slope
        x, maps = layered(self.convs, self.conv_post, x, 0.1)
        return x.flatten(1), [*maps, x]


class MultiResolution(Discriminator):
    """MRD of UnivNet (Jang et al., arXiv 2106.07889, 2.3)."""

    def __init__(self, config: GanConfig) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(ResolutionDiscriminator(*sizes, config.discriminator_width)
                                            for sizes in STFT_RESOLUTIONS)


class Trunk(nn.Module):
    """What MS-STFT and MS-SB-CQT do to a complex spectrogram (B, 2, T, bins): dilated over time, strided over bins."""

    def __init__(self, size: int, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.convs = nn.ModuleList([nn.Conv2d(2, size, (3, 9), padding=(1, 4))])
        for dilation in (1, 2, 4):
            conv = nn.Conv2d(size, size, (3, 9), (1, 2), padding=(dilation, 4), dilation=(dilation, 1))
            self.convs.append(weight_norm(conv))
        self.convs.append(weight_norm(nn.Conv2d(size, size, 3, padding=1)))
        self.conv_post = weight_norm(nn.Conv2d(size, 1, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Maps]:
        return layered(self.convs, self.conv_post, x, self.slope)


class StftDiscriminator(Trunk):
    """One window of MS-STFT: real and imaginary parts of the spectrum, scaled by the energy of the Hann window."""

    window: Tensor

    def __init__(self, n_fft: int, hop: int, width: float) -> None:
        super().__init__(max(1, int(32 * width)), slope=0.2)
        self.n_fft, self.hop = n_fft, hop
        hann = torch.hann_window(n_fft)
        self.register_buffer("window", hann / hann.square().sum().sqrt(), persistent=False)

    def forward(self, wave: Tensor) -> tuple[Tensor, Maps]:
        if wave.shape[-1] < self.n_fft:
            raise ValueError(f"too short: {wave.shape[-1]} samples, ms_stft needs {self.n_fft}; train on longer crops")
        spectrum = torch.view_as_real(_stft(wave.float(), self.n_fft, self.hop, self.window))
        return super().forward(spectrum.permute(0, 3, 1, 2))  # (B, 2, T, bins)


class MultiScaleStft(Discriminator):
    """MS-STFT of EnCodec (Défossez et al., arXiv 2210.13438, 3.4)."""

    def __init__(self, config: GanConfig) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(StftDiscriminator(n_fft, hop, config.discriminator_width)
                                            for n_fft, hop in ((1024, 256), (2048, 512), (512, 256)))


LOWEST = 32.703195662574829  # C1, Hz


def check_octaves(octaves: int, sample_rate: int) -> None:
    """Raises ValueError unless `octaves` above C1 lie well below the sample rate, half the rate that CQT works at."""
    top = LOWEST * 2**octaves
    if octaves < 1 or top > 0.9 * sample_rate:
        fits = max(1, int(math.log2(0.9 * sample_rate / LOWEST)))
        raise ValueError(f"cqt_octaves={octaves} reach {top:.0f} Hz, too high for a sample rate of {sample_rate} Hz: "
                         f"use cqt_octaves={fits} at most, or leave ms_sb_cqt out of the discriminators")


class ConstantQ(nn.Module):
    """Constant-Q transform (B, 2, T, octaves x bins) of waveforms (B, N) at `sample_rate`; T = (N - 1) // hop + 1.

    Bins go from C1 up: X_k(t) = sum_m w(m / N_k) x(t + m) exp(-2 pi i f_k m / rate) / sum w, N_k = Q rate / f_k,
    Q = 1 / (2^(1/B) - 1), w a Hann window (Brown, J. Acoust. Soc. Am. 89, 1991, equations 5 and 6; here centred on the
    frame, so that the phases of octaves agree). An octave is computed with the kernels of the one above on the halved
    rate (Schörkhuber and Klapuri, SMC 2010). A sine of amplitude A on a bin gives A / 2. Amphion scales bins otherwise:
    weights of this discriminator do not carry over from there.
    """

    kernels: Tensor
    low_pass: Tensor

    def __init__(self, sample_rate: int, hop: int, octaves: int, bins: int) -> None:
        super().__init__()
        if hop % 2 ** (octaves - 1):
            raise ValueError(f"hop {hop} must be a multiple of {2 ** (octaves - 1)} for {octaves} octaves")
        self.hop, self.octaves = hop, octaves
        hz = LOWEST * 2.0 ** (octaves - 1 + np.arange(bins) / bins)
        lengths = sample_rate / hz / (2 ** (1 / bins) - 1)
        m = np.arange(-(int(lengths[0]) // 2), int(lengths[0]) // 2 + 1)
        taper = np.where(np.abs(m) < lengths[:, None] / 2, 0.5 + 0.5 * np.cos(2 * np.pi * m / lengths[:, None]), 0)
        kernels = taper * np.exp(-2j * np.pi * hz[:, None] * m / sample_rate) / taper.sum(1, keepdims=True)
        parts = np.concatenate([kernels.real, kernels.imag])[:, None]  # (2 bins, 1, length)
        self.register_buffer("kernels", torch.tensor(parts, dtype=torch.float32), persistent=False)
        self.register_buffer("low_pass", torch.tensor(half_band(63), dtype=torch.float32)[None, None], persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        x = wave[:, None].float()
        octaves = []
        with torch.autocast(wave.device.type, enabled=False):
            for octave in range(self.octaves):
                both = F.conv1d(x, self.kernels, stride=self.hop >> octave, padding=self.kernels.shape[-1] // 2)
                octaves.append(both.unflatten(1, (2, -1)))  # (B, 2, bins, T)
                x = F.conv1d(x, self.low_pass, stride=2, padding=self.low_pass.shape[-1] // 2)
        return torch.cat(octaves[::-1], 2).transpose(2, 3)


class CqtDiscriminator(Trunk):
    """One resolution of MS-SB-CQT: a convolution per octave, whose outputs are one picture to the trunk."""

    UP = 2  # the waveform is resampled to twice its rate first: the highest octave would not fit below half of it
    doubling: Tensor

    def __init__(self, hop: int, bins: int, config: GanConfig) -> None:
        super().__init__(max(1, int(32 * config.discriminator_width)), slope=0.1)
        self.bins = bins
        self.cqt = ConstantQ(self.UP * config.sample_rate, hop, config.cqt_octaves, bins)
        doubling = torch.tensor(2 * half_band(127), dtype=torch.float32)[None, None]
        self.register_buffer("doubling", doubling, persistent=False)
        self.conv_pres = nn.ModuleList(nn.Conv2d(2, 2, (3, 9), padding=(1, 4)) for _ in range(config.cqt_octaves))

    def forward(self, wave: Tensor) -> tuple[Tensor, Maps]:
        with torch.autocast(wave.device.type, enabled=False):
            doubled = F.conv_transpose1d(wave[:, None].float(), self.doubling, stride=self.UP, padding=63,
                                         output_padding=1)
        octaves = self.cqt(doubled[:, 0]).split(self.bins, -1)
        judged = [conv(octave) for conv, octave in zip(self.conv_pres, octaves, strict=True)]
        return super().forward(torch.cat(judged, -1))  # (B, 2, T, octaves x bins)


class MultiScaleSubbandCqt(Discriminator):
    """MS-SB-CQT (Gu et al., arXiv 2311.14957)."""

    def __init__(self, config: GanConfig) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(CqtDiscriminator(hop, bins, config)
                                            for hop, bins in ((512, 24), (256, 36), (256, 48)))


def half_band(taps: int) -> np.ndarray:
    """A symmetric low pass (taps,) at half the Nyquist rate, 80 dB down, whose sum is 1: a Kaiser-windowed sinc."""
    filter_ = np.sinc((np.arange(taps) - taps // 2) / 2) * np.kaiser(taps, 8.0)
    return filter_ / filter_.sum()


DISCRIMINATORS: dict[str, Callable[[GanConfig], Discriminator]] = {
    "mpd": MultiPeriod, "msd": MultiScale, "mrd": MultiResolution, "ms_stft": MultiScaleStft,
    "ms_sb_cqt": MultiScaleSubbandCqt,
}
