"""BigVGAN: HiFi-GAN's shape with periodic activations that do not alias, at up to 112 million parameters."""

from featstore_zoo.gan import Adversary, losses

from .model import Config, Model

__all__ = ["KIND", "Adversary", "Config", "Model", "losses"]

KIND = "vocoder"
