"""VitsSVC: features straight to the waveform, through a latent that a flow ties to what is heard; any GAN generator."""

from featstore_zoo.gan import Adversary

from .model import TRAINING, Config, Model, losses

__all__ = ["KIND", "TRAINING", "Adversary", "Config", "Model", "losses"]

KIND = "acoustic"
