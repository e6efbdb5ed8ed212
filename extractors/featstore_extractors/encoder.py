"""What all content encoders share: which layers of which weights, in which precision, on which device.

A subclass says what its architecture is (from configuration files alone, without torch where it can) and builds the
network; requests that differ only in layers, mix, projection or dtype share one forward pass.
"""

from __future__ import annotations

import contextlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from . import weights
from .imports import required

Array = np.ndarray
Run = Callable[[list[Array]], list[Array]]

SAMPLE_RATE = 16000
OUTPUT = -1  # in place of a layer's number: what the encoder gives behind its final norm
LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Architecture:
    """What an encoder is, as its checkpoint says.

    layers: transformer layers. Layer L is the stream after L of them (0: what enters the first), as transformers'
        `hidden_states[L]` and fairseq's `output_layer=L`.
    dim: channels of a layer.
    output: which layer stands for the encoder's output: `layers`, or OUTPUT where the two differ (a stream that is
        normalised only at the very end).
    normed: whether every layer ends in a norm, so that half precision holds it; the output always does.
    facts: everything else that changes a number and is not in the weights: plain JSON values, part of the identity.
    """

    layers: int
    dim: int
    output: int
    normed: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)


class Network(Protocol):
    """A loaded encoder on its device."""

    def hidden(self, waves: list[Any], wanted: frozenset[int]) -> tuple[dict[int, Any], list[int]]:
        """Layers `{layer: (B, T, D)}` of waveforms `(N,)` of unlike lengths, and how many frames of each row count.

        No layer beyond the last wanted is computed. A row's frames do not depend on the other rows.
        """


@dataclass(frozen=True)
class Encoder(ABC):
    """Base of the content encoders: waveform (N,) at 16 kHz -> (T, D).

    weights: a file, a folder or a hub id; by default that of the preset.
    layer: a number, a range "9..12" or "" for the encoder's output.
    mix: what becomes of several layers: their mean, or all of them side by side ("concat").
    precision: fp32, or bf16 or fp16 for the matrix products (about three digits; faster where the device has them).
    dtype: as stored; "" takes float16, and float32 for the inner layers of a stream that is normalised at its end only.
    compile: let torch.compile build the layers: minutes at the start, some percent faster after.
    """

    weights: str = field(default="", metadata={"identity": False})
    layer: str = ""
    mix: Literal["", "mean", "concat"] = ""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    dtype: Literal["", "float16", "float32"] = ""
    compile: bool = field(default=False, metadata={"identity": False})

    name: ClassVar[str]
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "continuous"
    sample_rate: ClassVar[int] = SAMPLE_RATE
    accelerated: ClassVar[bool] = True
    DEFAULT: ClassVar[str] = ""          # the hub id that stands for no `weights`; looked up, never fetched
    EXPECTED: ClassVar[str] = "a folder with config.json and model.safetensors"  # for messages
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self) -> None:
        asked = _layers(self.layer)
        if self.mix and len(asked) < 2:
            raise ValueError(f"mix={self.mix} needs several layers, as in layer=9..12,mix={self.mix}")
        if len(asked) > 1 and not self.mix:
            raise ValueError(f"layer={self.layer} are {len(asked)} layers: add mix=mean or mix=concat")

    # What a subclass provides.

    @abstractmethod
    def architecture(self) -> Architecture:
        """From the configuration beside the weights; FileNotFoundError or ValueError where there is none to use."""

    @abstractmethod
    def network(self, device: str) -> Network:
        """Loaded, in eval mode, on `device`."""

    @property
    @abstractmethod
    def frame_rate(self) -> Fraction:
        """Frames per second, exact."""

    @property
    def projected(self) -> int:
        """Channels of the projection that is asked for; 0 for none."""
        return 0

    @abstractmethod
    def frames(self, samples: int) -> int:
        """How many frames `samples` samples make; 0 where they are too few."""

    def sharing(self) -> tuple[Any, ...]:
        """Settings of the subclass that change the forward pass itself."""
        return ()

    # What follows from it.

    @property
    def path(self) -> Path:
        """The file or folder of the weights. FileNotFoundError says what to put where.

        What a preset or a user names may be downloaded; what stands for nothing named may not.
        """
        return weights.locate(self.weights or self.DEFAULT, extractor=self.name, fetch=bool(self.weights),
                              expected=self.EXPECTED)

    @property
    def weights_digest(self) -> str:
        """Of the bytes that hold the tensors, as `sha256sum` prints it for one file."""
        return weights.digest(weights.tensor_files(self.path))

    @property
    def weights_bytes(self) -> int:
        """About what a loaded copy takes."""
        return sum(file.stat().st_size for file in weights.tensor_files(self.path))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers asked for. ValueError for one that the encoder does not have."""
        found = self.architecture()
        asked = _layers(self.layer) or (found.output,)
        if max(asked) > found.layers:
            raise ValueError(f"{self.name}: {self.path} has layers 0 to {found.layers}, not {max(asked)}")
        return asked

    @property
    def dim(self) -> int:
        if self.projected:
            return self.projected
        return self.architecture().dim * (len(self.layers) if self.mix == "concat" else 1)

    @property
    def stored_dtype(self) -> str:
        """As stored: what is asked for, or what the layers allow."""
        found = self.architecture()
        bounded = found.normed or all(layer in (OUTPUT, found.output) for layer in self.layers)
        return self.dtype or ("float16" if bounded else "float32")

    @property
    def recorded(self) -> dict[str, Any]:
        """What stands in the identity for the settings: layers by number, and what the weights' configuration says."""
        layers = ["output" if layer == OUTPUT else layer for layer in self.layers]
        return {"layer": layers[0] if len(layers) == 1 else layers, "mix": self.mix, "precision": self.precision,
                **self.architecture().facts}

    @property
    def together(self) -> tuple[Any, ...]:
        """What two requests must have in common to share a forward pass."""
        return (os.path.realpath(self.path), self.precision, self.compile, *self.sharing())

    def load(self, device: str) -> Run:
        run = self.load_together([self], device)
        return lambda waves: run(waves)[0]

    @classmethod
    def load_together(cls, extractors: Sequence[Encoder], device: str) -> Callable[[list[Array]], list[list[Array]]]:
        """run(waves) -> one list of arrays per extractor, from one forward pass."""
        first = extractors[0]
        network = first.network(device)
        layers = [extractor.layers for extractor in extractors]  # once: this may look a hub id up
        dtypes = [extractor.stored_dtype for extractor in extractors]
        wanted = frozenset(number for numbers in layers for number in numbers)

        def run(waves: list[Array]) -> list[list[Array]]:
            first._check(waves)
            with computing(device, first.precision):
                hidden, lengths = network.hidden([to_device(device, wave) for wave in waves], wanted)
                mixed = [extractor.mixed(network, [hidden[number] for number in numbers])
                         for extractor, numbers in zip(extractors, layers, strict=True)]
                return [extractor._rows(batch, lengths, dtype)
                        for extractor, batch, dtype in zip(extractors, mixed, dtypes, strict=True)]

        return run

    def _check(self, waves: Sequence[Array]) -> None:
        for wave in waves:
            if wave.dtype.kind != "f" or wave.ndim != 1:
                raise ValueError(f"found a waveform of {wave.dtype} {wave.shape}; expected floats (N,) from -1 to 1")
            if self.frames(len(wave)) < 1:
                least = next(n for n in range(len(wave), 1 << 20) if self.frames(n))
                raise ValueError(f"too short: {len(wave)} samples at {SAMPLE_RATE} Hz make no frame of {self.name}, "
                                 f"{least} do")
            if not np.isfinite(wave).all():
                raise ValueError("has samples that are NaN or infinite")

    def mixed(self, network: Any, layers: Sequence[Any]) -> Any:
        """(B, T, D) of the layers asked for, (B, T, D) each; a subclass whose `network` projects does so here."""
        torch = required("torch", "encoders")
        found = [layer.float() for layer in layers]
        if len(found) == 1:
            return found[0]
        return torch.stack(found).mean(dim=0) if self.mix == "mean" else torch.cat(found, dim=-1)

    def _rows(self, batch: Any, lengths: Sequence[int], dtype: str) -> list[Array]:
        """(B, T, D) on the device -> a (T, D) array of the stored type per row."""
        torch = required("torch", "encoders")
        frames = torch.cat([row[:length] for row, length in zip(batch, lengths, strict=True)])
        peak = float(frames.abs().amax())
        if not np.isfinite(peak):
            cure = (f"precision={self.precision} may be too little for them: try precision=fp32; or "
                    if self.precision != "fp32" else "") + "the weights are damaged: featstore weights check"
            raise ValueError(f"{self.name} gives NaN or infinite values from the weights of {self.path}; {cure}")
        if dtype == "float16" and peak > LARGEST_HALF:
            raise ValueError(f"{self.name} reaches {peak:.3g}, more than float16 holds: ask for dtype=float32")
        stored = frames.to(torch.float16 if dtype == "float16" else torch.float32).cpu().numpy()
        return np.split(stored, np.cumsum(lengths)[:-1])


def _layers(text: str) -> tuple[int, ...]:
    """"" -> (), "9" -> (9,), "9..12" -> (9, 10, 11, 12)."""
    if not text:
        return ()
    first, dots, last = text.partition("..")
    try:
        low, high = int(first), int(last if dots else first)
    except ValueError:
        low, high = 0, -1
    if not 0 <= low <= high:
        raise ValueError(f"layer={text}: expected a number such as 12, or a range such as 9..12")
    return tuple(range(low, high + 1))


def to_device(device: str, wave: Array) -> Any:
    """A waveform as a tensor on the device; on its way while the next is made ready."""
    tensor = required("torch", "encoders").from_numpy(np.ascontiguousarray(wave, np.float32))
    return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor.to(device)


@contextlib.contextmanager
def computing(device: str, precision: str) -> Iterator[None]:
    """Inference in the precision asked for; fp32 means it: TF32 is off, in convolutions too."""
    torch = required("torch", "encoders")
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if device.startswith("cuda"):
            stack.enter_context(_without_tf32())
        if precision != "fp32":
            kind = torch.bfloat16 if precision == "bf16" else torch.float16
            stack.enter_context(torch.autocast(torch.device(device).type, kind))
        yield


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """TF32 is off while any thread is in here: torch's switches are the whole process', and a device has a thread."""
    torch = required("torch", "encoders")
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    with _switching:
        if not _inside:
            _before[:] = [switch.allow_tf32 for switch in switches]
        _inside.append(threading.get_ident())
        for switch in switches:
            switch.allow_tf32 = False
    try:
        yield
    finally:
        with _switching:
            _inside.remove(threading.get_ident())
            if not _inside:
                for switch, allowed in zip(switches, _before, strict=True):
                    switch.allow_tf32 = allowed


_switching = threading.Lock()
_inside: list[int] = []  # the threads that need TF32 off
_before: list[bool] = []  # what it was before the first of them came
