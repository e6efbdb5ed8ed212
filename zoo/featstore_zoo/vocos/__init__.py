"""Vocos: ConvNeXt blocks at the rate of the frames and one inverse STFT; the fast one."""

from featstore_zoo.gan import Adversary, losses

from .model import Config, Model

__all__ = ["KIND", "Adversary", "Config", "Model", "losses"]

KIND = "vocoder"
