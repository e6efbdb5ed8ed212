"""TransformerSVC: a transformer from the condition straight to the log-mel, in one pass and without noise."""

from .model import TRAINING, Config, Model, losses

__all__ = ["KIND", "TRAINING", "Config", "Model", "losses"]

KIND = "acoustic"
