"""NSF-HiFiGAN: HiFi-GAN with sines at f0 and its harmonics fed into every stage, so that it sings what f0 says."""

from featstore_zoo.gan import Adversary, losses

from .model import Config, Model

__all__ = ["KIND", "Adversary", "Config", "Model", "losses"]

KIND = "vocoder"
