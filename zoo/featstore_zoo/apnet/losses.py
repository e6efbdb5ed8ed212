"""APNet's losses on amplitudes, phases and their consistency (arXiv 2305.07952, section III); the rest is shared."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from featstore_zoo.gan import Adversary, spectral_losses
from featstore_zoo.vocoder import window

from .model import Config, Model, Spectrum


def losses(model: Model, batch: Mapping[str, Tensor], generator: torch.Generator,
           adversary: Adversary | None = None) -> dict[str, Tensor]:
    """Weighted terms for a batch with "log-mel" (B, T, n_mels) and "wave" (B, T hop_length); their sum is minimised.

    "amplitude", "phase", "consistency", "parts", and those of `gan.losses`.
    """
    config, wave = model.config, batch["wave"]
    made = model.spectrum(batch["log-mel"])
    fake = model.waveform(made)
    real = analysed(wave, config)
    terms = {
        "amplitude": config.lambda_amplitude * amplitude(real, made),
        "phase": config.lambda_phase * phase(real, made),
        "consistency": config.lambda_consistency * consistency(made, analysed(fake, config)),
        "parts": config.lambda_parts * parts(real, made),
    }
    return terms | spectral_losses(config, wave, fake) | (adversary(wave, fake) if adversary else {})


def analysed(wave: Tensor, config: Config) -> Spectrum:
    """The spectrum of a waveform (B, T hop), in the frames of the mel contract; log-amplitudes are ln(|X| + 1e-5)."""
    n_fft, hop = config.n_fft, config.hop_length
    pad = (n_fft - hop) // 2 if config.padding == "frames" else n_fft // 2
    padded = F.pad(wave.float()[:, None], (pad, pad), mode="reflect")[:, 0]
    taper = window(config, wave.device, torch.float32)
    spectrum = torch.stft(padded, n_fft, hop, n_fft, taper, center=False, return_complex=True).transpose(1, 2)
    spectrum = spectrum[:, : wave.shape[1] // hop]  # frames centred on their hop: the model makes one less
    real, imaginary = spectrum.real, spectrum.imag
    magnitude = (real.square() + imaginary.square()).clamp_min(1e-20).sqrt()  # 0 has no slope
    return Spectrum(torch.log(magnitude + 1e-5), torch.atan2(imaginary, real), real, imaginary)


def amplitude(real: Spectrum, made: Spectrum) -> Tensor:
    """Mean squared difference of log-amplitudes (equation 8)."""
    return F.mse_loss(made.log_amplitude, real.log_amplitude)


def phase(real: Spectrum, made: Spectrum) -> Tensor:
    """1 - cos of the differences in phase, in group delay and in phase over time, the means summed (equations 9 to 11).

    The paper has -cos, which differs by a constant: here right phases cost nothing.
    """
    error = made.phase - real.phase
    total = (1 - error.cos()).mean() + (1 - error.diff(dim=2).cos()).mean()
    return total + (1 - error.diff(dim=1).cos()).mean() if error.shape[1] > 1 else total


def consistency(made: Spectrum, again: Spectrum) -> Tensor:
    """Mean squared distance between a spectrum and that of the waveform made from it (equation 12)."""
    return F.mse_loss(made.real, again.real) + F.mse_loss(made.imaginary, again.imaginary)


def parts(real: Spectrum, made: Spectrum) -> Tensor:
    """Mean |difference| of real parts plus that of imaginary parts (equation 13)."""
    return F.l1_loss(made.real, real.real) + F.l1_loss(made.imaginary, real.imaginary)
