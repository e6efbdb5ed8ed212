"""DiffWaveNetSVC: diffusion of the log-mel by a stack of gated dilated convolutions that hears every feature."""

from .model import TRAINING, Config, Model, losses

__all__ = ["KIND", "TRAINING", "Config", "Model", "losses"]

KIND = "acoustic"
