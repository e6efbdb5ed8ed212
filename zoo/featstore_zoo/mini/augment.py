"""What rooms, microphones, noise and other vocal tracts do to log mel bands, drawn anew for every row.

All of it happens on the bands themselves, in power: a row costs milliseconds, and the recordings are read once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from featstore_extractors.convnext import EPSILON, LOWEST, MELS, SAMPLE_RATE, band_centres

WARP = (0.82, 1.22)      # of the frequency axis
GAIN_DB = (-26.0, 6.0)
SNR_DB = (2.0, 40.0)
DECAY_S = (0.1, 0.8)     # of 60 dB
HOP_S = 0.01
REACH = 50               # frames that a room rings


class Augment:
    """Bands (B, 2T, MELS) -> bands, each row by its own draws from one generator.

    part: of the rows, to which anything is done at all.
    """

    def __init__(self, generator: torch.Generator, part: float = 0.85) -> None:
        self.generator, self.part = generator, part
        self.centres = band_centres()

    def __call__(self, bands: Tensor, warped: Tensor) -> Tensor:
        """warped: (B,) which rows get another vocal tract; the others keep their voice."""
        touched = self._often(self.part, len(bands)).view(-1, 1, 1)
        bands = self._warp(bands, warped)
        power = (bands.exp() - EPSILON).clamp(min=0.0)
        power = self._ring(power)
        power = self._colour(power)
        power = self._noise(power)
        power = power * self._limits(len(power))
        power = power * self._db(GAIN_DB, len(power)).view(-1, 1, 1)
        return torch.where(touched, self._mask((power + EPSILON).log()), bands)

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) * (high - low) + low

    def _db(self, limits: tuple[float, float], rows: int) -> Tensor:
        return torch.as_tensor(10.0 ** (self._uniform(*limits, rows) / 10.0))

    def _often(self, part: float, rows: int) -> Tensor:
        return torch.rand(rows, generator=self.generator) < part

    def _warp(self, bands: Tensor, warped: Tensor) -> Tensor:
        factors = torch.where(warped, self._uniform(*WARP, len(bands)), torch.ones(()))
        asked = self.centres / factors[:, None]                                  # (B, MELS) Hz
        mels = 1127.0 * (1.0 + asked / 700.0).log()
        low = 1127.0 * math.log(1.0 + LOWEST / 700.0)
        step = (1127.0 * math.log(1.0 + SAMPLE_RATE / 1400.0) - low) / (MELS + 1)
        place = ((mels - low) / step - 1.0).clamp(0.0, MELS - 1.001)
        left = place.floor().long()
        part = (place - left)[:, None, :].to(bands.dtype)
        index = left[:, None, :].expand(-1, bands.shape[1], -1)
        return bands.gather(2, index) * (1 - part) + bands.gather(2, index + 1) * part

    def _ring(self, power: Tensor) -> Tensor:
        """A room: each frame's power dies away over those after it."""
        rows = len(power)
        decay = self._uniform(*DECAY_S, rows)
        times = torch.arange(REACH) * HOP_S
        tail = torch.exp(-times * (6 * math.log(10.0)) / decay[:, None])         # (B, REACH) of power
        wet = self._db((-25.0, -5.0), rows) * self._often(0.35, rows)
        tail = tail * wet[:, None]
        tail[:, 0] = 1.0
        past = F.pad(power.transpose(1, 2).reshape(1, rows * MELS, -1), (REACH - 1, 0))
        kernel = tail.flip(1).repeat_interleave(MELS, 0)[:, None]
        rung = F.conv1d(past, kernel, groups=rows * MELS)
        return rung.reshape(rows, MELS, -1).transpose(1, 2)

    def _colour(self, power: Tensor) -> Tensor:
        """A microphone and a mixing desk: a smooth curve over the bands."""
        rows = len(power)
        places = torch.linspace(0.0, math.pi, MELS)
        waves = torch.stack([torch.cos(places * k) for k in range(1, 5)])         # (4, MELS)
        sizes = torch.randn(rows, 4, generator=self.generator) * torch.tensor([0.9, 0.6, 0.4, 0.3])
        return power * (sizes @ waves).exp()[:, None, :]

    def _noise(self, power: Tensor) -> Tensor:
        rows, frames, _ = power.shape
        mean = power.mean((1, 2))
        level = mean * self._db((-SNR_DB[1], -SNR_DB[0]), rows) * self._often(0.6, rows)
        tilt = self._uniform(-4.0, 1.0, rows, 1) * torch.linspace(0.0, 1.0, MELS)
        shape = (tilt + 0.5 * torch.randn(rows, MELS, generator=self.generator)).exp()
        shape = shape / shape.mean(1, keepdim=True)
        grain = -torch.log(torch.rand(rows, frames, MELS, generator=self.generator).clamp(min=1e-6))
        slow = 0.5 * torch.randn(rows, frames // 50 + 2, generator=self.generator)
        swell = F.interpolate(slow[:, None], size=frames, mode="linear")[:, 0].exp()
        return power + grain * (level[:, None] * swell)[..., None] * shape[:, None, :]

    def _limits(self, rows: int) -> Tensor:
        """(B, 1, MELS): telephones, codecs and rumble filters."""
        high = torch.where(self._often(0.2, rows), self._uniform(3000.0, 7000.0, rows), torch.tensor(9000.0))
        low = torch.where(self._often(0.15, rows), self._uniform(80.0, 350.0, rows), torch.tensor(0.0))
        outside = (self.centres > high[:, None]) | (self.centres < low[:, None])
        return torch.where(outside, 1e-6, 1.0)[:, None, :]

    def _mask(self, bands: Tensor) -> Tensor:
        """A few bands and a moment of each row hidden (SpecAugment, arXiv 1904.08779)."""
        rows, frames, _ = bands.shape
        mean = bands.mean((1, 2), keepdim=True)
        for size, most, axis in ((MELS, 8, 2), (frames, 16, 1)):
            width = torch.randint(0, most + 1, (rows, 1), generator=self.generator) * self._often(0.5, rows)[:, None]
            start = torch.randint(0, size, (rows, 1), generator=self.generator)
            places = torch.arange(size)
            hidden = (places >= start) & (places < start + width)
            bands = torch.where(hidden[:, None, :] if axis == 2 else hidden[:, :, None], mean, bands)
        return bands
