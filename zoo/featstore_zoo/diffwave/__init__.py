"""DiffWave: a waveform out of noise, in 50 steps or 6; small, and slower than any GAN."""

from .model import Config, Model, losses

__all__ = ["KIND", "Config", "Model", "losses"]

KIND = "vocoder"
