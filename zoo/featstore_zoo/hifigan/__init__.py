"""HiFi-GAN: a stack of transposed convolutions and parallel residual blocks, trained against MPD and MSD."""

from featstore_zoo.gan import Adversary, losses

from .model import Config, Model

__all__ = ["KIND", "Adversary", "Config", "Model", "losses"]

KIND = "vocoder"
