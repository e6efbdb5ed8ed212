"""Extractors for tests: small, exact, and one for each way to go wrong."""

from __future__ import annotations

import os
import secrets
import signal
import time
import weakref
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

Run = Callable[[list[np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True)
class Mean:
    """Mean |x| of each 10 ms at 16 kHz, times `gain`."""

    gain: float = 1.0
    name: ClassVar[str] = "mean"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "continuous"
    sample_rate: ClassVar[int] = 16000
    frame_rate: ClassVar[Fraction | None] = Fraction(100)
    centre_s: ClassVar[Fraction] = Fraction(1, 200)
    dim: ClassVar[int] = 0
    dtype: ClassVar[str] = "float32"

    def load(self, device: str) -> Run:
        return lambda waves: [self.of(wave) for wave in waves]

    def of(self, wave: np.ndarray) -> np.ndarray:
        return np.abs(wave[:len(wave) // 160 * 160].reshape(-1, 160)).mean(axis=1) * np.float32(self.gain)


@dataclass(frozen=True)
class Windowed(Mean):
    """Mean over 30 ms about each frame, in pieces of one second with 10 ms of context."""

    name: ClassVar[str] = "windowed"
    window: ClassVar[tuple[int, int]] = (16000, 160)

    def of(self, wave: np.ndarray) -> np.ndarray:
        padded = np.pad(np.abs(wave), 160)
        return np.stack([padded[i * 160:i * 160 + 480].sum() for i in range(len(wave) // 160)]).astype(np.float32)


@dataclass(frozen=True)
class Whole(Windowed):
    """As `Windowed`, in one piece."""

    window: ClassVar[Any] = None


@dataclass(frozen=True)
class Total:
    """One vector per utterance: (seconds, sum of |x|), put together from pieces of one second."""

    name: ClassVar[str] = "total"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "global"
    sample_rate: ClassVar[int] = 16000
    frame_rate: ClassVar[Fraction | None] = None
    centre_s: ClassVar[Fraction] = Fraction(0)
    dim: ClassVar[int] = 2
    dtype: ClassVar[str] = "float64"
    window: ClassVar[tuple[int, int]] = (16000, 0)

    def load(self, device: str) -> Run:
        return lambda waves: [np.array([len(w) / 16000, np.abs(w.astype(np.float64)).sum()]) for w in waves]

    def combine(self, parts: list[np.ndarray], lengths: list[int]) -> np.ndarray:
        if [round(part[0] * 16000) for part in parts] != lengths:
            raise ValueError(f"pieces of {lengths} samples gave {parts}")
        return np.sum(parts, axis=0)


@dataclass(frozen=True)
class Layer(Mean):
    """One of several outputs of a shared pass; every pass leaves a mark in `marks`."""

    layer: int = 0
    marks: str = field(default="", metadata={"identity": False})
    name: ClassVar[str] = "layer"
    together: ClassVar[str] = "one network"

    @classmethod
    def load_together(cls, extractors: list[Layer], device: str) -> Callable[..., list[list[np.ndarray]]]:
        def run(waves: list[np.ndarray]) -> list[list[np.ndarray]]:
            Path(extractors[0].marks, f"{device} {secrets.token_hex(8)}").touch()
            means = [extractors[0].of(wave) for wave in waves]
            return [[mean + extractor.layer for mean in means] for extractor in extractors]

        return run


@dataclass(frozen=True)
class OnDevice(Mean):
    """Gains from a device; a batch whose waves are of unlike length would show in its numbers. Notes its batches."""

    marks: str = field(default="", metadata={"identity": False})
    name: ClassVar[str] = "on-device"
    accelerated: ClassVar[bool] = True
    window: ClassVar[tuple[int, int]] = (32000, 160)

    def load(self, device: str) -> Run:
        def run(waves: list[np.ndarray]) -> list[np.ndarray]:
            if self.marks:
                with Path(self.marks).open("a") as file:
                    file.write(f"{device} {len(waves)}\n")
            if any(wave.max(initial=0) > 0.99 for wave in waves):
                raise ValueError("too loud for this device")
            return [self.of(wave) for wave in waves]

        return run


@dataclass(frozen=True)
class LayerOnDevice(Layer):
    """One of several outputs of a shared pass on a device."""

    name: ClassVar[str] = "layer-on-device"
    together: ClassVar[str] = "another network"
    accelerated: ClassVar[bool] = True


@dataclass(frozen=True)
class Meeting(OnDevice):
    """The first batch of each device waits until `devices` have one."""

    devices: int = field(default=2, metadata={"identity": False})
    name: ClassVar[str] = "meeting"

    def load(self, device: str) -> Run:
        def run(waves: list[np.ndarray]) -> list[np.ndarray]:
            Path(self.marks, device).touch()
            deadline = time.monotonic() + 20
            while len(list(Path(self.marks).iterdir())) < self.devices and time.monotonic() < deadline:
                time.sleep(0.005)
            return [self.of(wave) for wave in waves]

        return run


@dataclass(frozen=True)
class Uneven(OnDevice):
    """Takes a while that differs from batch to batch, so that devices overtake one another."""

    least_s: float = field(default=0.0, metadata={"identity": False})
    name: ClassVar[str] = "uneven"

    def load(self, device: str) -> Run:
        def run(waves: list[np.ndarray]) -> list[np.ndarray]:
            time.sleep(self.least_s + zlib.crc32(waves[0].tobytes()) % 7 / 500)
            return [self.of(wave) for wave in waves]

        return run


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@dataclass(frozen=True)
class Tight(OnDevice):
    """Holds `fits` padded seconds at once; of more it complains in one of the ways that there are."""

    fits: float = 1.0
    how: str = field(default="toy", metadata={"identity": False})
    name: ClassVar[str] = "tight"

    def load(self, device: str) -> Run:
        errors = {"toy": OutOfMemoryError("Tried to allocate 2.00 GiB"), "python": MemoryError(),
                  "cuda": RuntimeError("CUDA error: out of memory")}

        def run(waves: list[np.ndarray]) -> list[np.ndarray]:
            padded = len(waves) * max(map(len, waves)) / self.sample_rate
            if self.marks:
                with Path(self.marks).open("a") as file:
                    file.write(f"{padded:.3f}\n")
            if padded > self.fits:
                raise errors[self.how]
            return [self.of(wave) for wave in waves]

        return run


@dataclass(frozen=True)
class Heavy(Mean):
    """Has weights, and notes where it was loaded, with how many threads; `room` of its kind fit in a process, and with
    `alone` only the weights do, not what running them takes.
    """

    offset: float = 0.0
    marks: str = field(default="", metadata={"identity": False})
    room: int = field(default=9, metadata={"identity": False})
    on_device: bool = field(default=False, metadata={"identity": False})
    alone: bool = field(default=False, metadata={"identity": False})
    name: ClassVar[str] = "heavy"
    weights_bytes: ClassVar[int] = 1 << 30
    LOADED: ClassVar[weakref.WeakSet[Callable[..., Any]]] = weakref.WeakSet()

    @property
    def accelerated(self) -> bool:
        return self.on_device

    def load(self, device: str) -> Run:
        if len(self.LOADED) >= self.room:
            raise RuntimeError("toy out of memory")
        with Path(self.marks).open("a") as file:
            file.write(f"{self.offset:g} {device} {os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\n")

        def run(waves: list[np.ndarray]) -> list[np.ndarray]:
            if self.alone and len(self.LOADED) > 1:
                raise MemoryError
            return [self.of(wave) + np.float32(self.offset) for wave in waves]

        self.LOADED.add(run)
        return run


@dataclass(frozen=True)
class Picky(OnDevice):
    """Loads on any device but the `refused` one; with `dies` a batch ends its thread as nothing else does."""

    refused: str = ""
    dies: bool = False
    name: ClassVar[str] = "picky"

    def load(self, device: str) -> Run:
        if device == self.refused:
            raise ImportError(f"picky does not load on {device}")
        return super().load(device)

    def of(self, wave: np.ndarray) -> np.ndarray:
        if self.dies:
            raise SystemExit("the thread is gone")
        return super().of(wave)


@dataclass(frozen=True)
class OnTorch(OnDevice):
    """Puts a tensor on the device, as a network would."""

    name: ClassVar[str] = "on-torch"

    def load(self, device: str) -> Run:
        import torch

        torch.zeros(1).to(device)
        return super().load(device)


@dataclass(frozen=True)
class Broken(Mean):
    """Goes wrong on loud waveforms in the way asked for: raise, nan, short, kill."""

    how: str = "raise"
    name: ClassVar[str] = "broken"

    def of(self, wave: np.ndarray) -> np.ndarray:
        frames = super().of(wave)
        if wave.max(initial=0) < 0.9:
            return frames
        if self.how == "raise":
            raise IndexError("list index out of range")
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return frames[:len(frames) // 2] if self.how == "short" else frames * np.float32(np.nan)


@dataclass(frozen=True)
class NoPackage(Mean):
    """Needs what is not installed; or is what else `error` names."""

    error: str = field(default="", metadata={"identity": False})
    name: ClassVar[str] = "no-package"

    def load(self, device: str) -> Run:
        if self.error:
            raise {"KeyError": KeyError}[self.error]("smooth")
        raise ImportError("no-package needs nonesuch: pip install nonesuch")


@dataclass(frozen=True)
class Replaced(Mean):
    """Its weights are replaced by somebody just before they are loaded."""

    weights: str = field(default="", metadata={"identity": False})
    name: ClassVar[str] = "replaced"
    accelerated: ClassVar[bool] = True

    @property
    def weights_digest(self) -> str:
        return Path(self.weights).read_text()

    def load(self, device: str) -> Run:
        Path(self.weights).write_text("new")
        return super().load(device)


@dataclass(frozen=True)
class Loud(Mean):
    """Stored as int16 with a scale of its own, as waveforms are."""

    name: ClassVar[str] = "loud"
    kind: ClassVar[str] = "samples"
    frame_rate: ClassVar[Fraction | None] = Fraction(16000)
    dtype: ClassVar[str] = "int16"
    window: ClassVar[tuple[int, int]] = (16000, 0)

    def of(self, wave: np.ndarray) -> np.ndarray:
        return wave

    @staticmethod
    def scale_of(peak: float) -> float:
        return max(1.0, peak) / 32767

    @staticmethod
    def quantise(block: np.ndarray, scale: float) -> np.ndarray:
        return np.rint(block / np.float32(scale)).astype(np.int16)


@dataclass(frozen=True)
class Slow(Mean):
    """Takes its time, so that a run can be stopped in the middle."""

    wait_s: float = 0.05
    name: ClassVar[str] = "slow"

    def of(self, wave: np.ndarray) -> np.ndarray:
        time.sleep(self.wait_s)
        return super().of(wave)


@dataclass(frozen=True)
class Counted(Slow):
    """Notes each waveform it is given, in a line of the file `marks`: checksum, process, nanoseconds."""

    marks: str = field(default="", metadata={"identity": False})
    name: ClassVar[str] = "counted"

    def of(self, wave: np.ndarray) -> np.ndarray:
        with Path(self.marks).open("a") as file:
            file.write(f"{zlib.crc32(wave.tobytes())} {os.getpid()} {time.time_ns()}\n")
        return super().of(wave)
