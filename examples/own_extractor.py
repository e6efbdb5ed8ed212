"""An extractor of one's own: the spectral centroid. `featstore extract CORPUS STORE -f own_extractor.Centroid`."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Centroid:
    """Brightness: waveform (N,) -> (T,) in Hz, 0 in silence; frame k covers samples [k hop, (k + 1) hop)."""

    name: ClassVar[str] = "centroid"
    version: ClassVar[int] = 1  # raise it whenever a number changes: fresh and stale are told apart by it
    kind: ClassVar[str] = "continuous"
    dim: ClassVar[int] = 0  # one number per frame
    dtype: ClassVar[str] = "float32"
    sample_rate: int = 24000  # what is not a ClassVar is a setting: -f own_extractor.Centroid,hop=480
    hop: int = 256

    @property
    def frame_rate(self) -> Fraction:
        return Fraction(self.sample_rate, self.hop)

    @property
    def centre_s(self) -> Fraction:
        return Fraction(self.hop, 2 * self.sample_rate)

    def load(self, device: str):
        return lambda waves: [self._centroid(wave) for wave in waves]

    def _centroid(self, wave: np.ndarray) -> np.ndarray:
        frames = wave[: len(wave) // self.hop * self.hop].reshape(-1, self.hop)
        magnitude = np.abs(np.fft.rfft(frames * np.hanning(self.hop)))
        total = magnitude.sum(axis=1)
        moment = magnitude @ np.fft.rfftfreq(self.hop, 1 / self.sample_rate)
        return (moment / np.where(total > 0, total, 1)).astype(np.float32)
