"""MelGAN: the first small and fast GAN vocoder, 4.3 million parameters."""

from featstore_zoo.gan import Adversary, losses

from .model import Config, Model

__all__ = ["KIND", "Adversary", "Config", "Model", "losses"]

KIND = "vocoder"
