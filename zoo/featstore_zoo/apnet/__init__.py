"""APNet: one network for log-amplitudes, one for phases, and an inverse STFT."""

from featstore_zoo.gan import Adversary

from .losses import losses
from .model import Config, Model

__all__ = ["KIND", "Adversary", "Config", "Model", "losses"]

KIND = "vocoder"
