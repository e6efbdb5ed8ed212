"""CoMoSVC: a diffusion teacher, and a consistency student that takes one step or a few."""

from .model import TRAINING, Config, Model, losses

__all__ = ["KIND", "TRAINING", "Config", "Model", "losses"]

KIND = "acoustic"
