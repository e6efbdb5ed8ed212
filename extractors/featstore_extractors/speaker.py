"""Who speaks or sings, as one vector of unit length per recording, from waveforms at 16 kHz.

`Speaker` is the d-vector of Wan et al., "Generalized end-to-end loss for speaker verification" (arXiv 1710.10467), with
the weights that ship in the Resemblyzer wheel; `XVector` is WavLM with an x-vector head, from a folder or the hub.

Silence has no voice: ValueError. Long recordings go in pieces whose vectors are averaged by duration, and a silent
piece (a stem that rests for a minute) only counts for nothing there: `run` gives the zero vector for silence as long as
a piece, `combine` passes it over and refuses what is silent throughout.

Both take a batch in one pass, and a recording's vector does not depend on its batch mates beyond the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from . import checkpoint, weights
from .encoder import computing, to_device
from .hubert import WavLM
from .imports import required
from .signal import MelContract, mel_filters

Array = np.ndarray
Run = Callable[[list[Array]], list[Array]]

SAMPLE_RATE = 16000
SILENT = 1e-4  # RMS, -80 dBFS: below it there is dither and converter noise, and no voice
AT_ONCE = 512  # windows of the d-vector in one pass: 0.4 GB on the device


@dataclass(frozen=True)
class Speaker:
    """d-vector: waveform (N,) -> (256,), not negative, of unit length.

    Windows of 1.6 s, `rate` per second (the last one zero-padded if at least `coverage` of it exists), go through three
    LSTM layers over 40 mels and a linear layer with ReLU; the mean of their unit vectors, scaled to unit length, is the
    result. `normalise` raises quiet recordings to -30 dBFS first. Resemblyzer also cuts long silences out of the
    recording; that needs a voice activity detector of its own and is left out.
    Presets: d-vector (this), wavlm (`XVector`).
    """

    PRESETS: ClassVar[tuple[str, ...]] = ("d-vector", "wavlm")
    name: ClassVar[str] = "speaker"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "global"
    sample_rate: ClassVar[int] = SAMPLE_RATE
    frame_rate: ClassVar[Fraction | None] = None
    centre_s: ClassVar[Fraction] = Fraction(0)
    dim: ClassVar[int] = 256
    dtype: ClassVar[str] = "float32"
    window: ClassVar[tuple[int, int]] = (60 * SAMPLE_RATE, 0)
    accelerated: ClassVar[bool] = True

    normalise: bool = True
    rate: float = 1.3
    coverage: float = 0.75

    @classmethod
    def preset(cls, name: str) -> Speaker | XVector:
        """d-vector, or wavlm: the x-vector of WavLM, which may be fetched, since it is asked for by name."""
        if name not in cls.PRESETS:
            raise ValueError(f"no speaker embedding {name!r}; there are {', '.join(cls.PRESETS)}")
        return XVector(XVector.DEFAULT) if name == "wavlm" else cls()

    def __post_init__(self) -> None:
        if not 0.625 <= self.rate <= 100:
            raise ValueError(f"rate must be between 0.625 (windows of 1.6 s just touch) and 100, not {self.rate:g}")
        for name in ("rate", "coverage"):  # 1 and 1.0 are one setting, not two
            object.__setattr__(self, name, float(getattr(self, name)))
        if not 0 < self.coverage <= 1:
            raise ValueError(f"coverage must be a part of a window, above 0 and up to 1, not {self.coverage:g}")

    @property
    def weights_digest(self) -> str:
        return weights.file_digest(_d_vector_weights())

    @property
    def weights_bytes(self) -> int:
        """About what a loaded copy takes: a third of the file, in which the optimiser's two moments lie beside it."""
        return _d_vector_weights().stat().st_size // 3

    def load(self, device: str) -> Run:
        torch = required("torch", "speaker")
        state = torch.load(_d_vector_weights(), map_location="cpu", weights_only=True)["model_state"]
        lstm, linear = torch.nn.LSTM(40, 256, num_layers=3, batch_first=True), torch.nn.Linear(256, 256)
        for part, prefix in ((lstm, "lstm."), (linear, "linear.")):
            part.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()
                                  if key.startswith(prefix)})
            part.to(device).eval()

        def voices(mels: Any) -> Any:
            """(windows, 160, 40) -> (windows, 256), of unit length."""
            _, (hidden, _) = lstm(mels)  # (layers, windows, 256)
            return torch.nn.functional.normalize(torch.relu(linear(hidden[-1])))

        def run(waves: list[Array]) -> list[Array]:
            heard = {i: self._windows(wave) for i, wave in enumerate(waves) if not _silent(wave, self.window[0])}
            found = [np.zeros(256, np.float32) for _ in waves]
            if heard:
                mels = np.concatenate(list(heard.values()))
                with computing(device, "fp32"):
                    parts = torch.cat([voices(part) for part in to_device(device, mels).split(AT_ONCE)]).cpu().numpy()
                ends = np.cumsum([len(windows) for windows in heard.values()])
                for i, part in zip(heard, np.split(parts, ends[:-1]), strict=True):
                    found[i] = _unit(part.mean(axis=0))
            return found

        return run

    def combine(self, parts: Sequence[Array], lengths: Sequence[int]) -> Array:
        """(256,) of the whole from the vectors of its pieces and their lengths; ValueError if none had a voice."""
        return _combined(parts, lengths)

    def _windows(self, wave: Array) -> Array:
        """Mel power of the windows of a waveform: (N,) -> (windows, 160, 40)."""
        if self.normalise:
            wave = wave * np.float32(max(1.0, 10 ** (-30 / 20) / _rms(wave)))
        starts = self._starts(len(wave))
        wave = np.pad(wave, (0, max(0, (starts[-1] + 160) * 160 - len(wave))))
        padded = np.pad(wave, 200)  # frame i is centred on sample 160 i
        frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::160]
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
        spectra = np.fft.rfft(frames * hann)
        mel = ((spectra.real**2 + spectra.imag**2) @ _d_vector_filters()).astype(np.float32)
        return np.stack([mel[start : start + 160] for start in starts])

    def _starts(self, samples: int) -> list[int]:
        """First frames of the windows over `samples` samples; at least one, and the last may reach beyond the end."""
        step = round(SAMPLE_RATE / self.rate / 160)
        frames = samples // 160 + 1
        starts = list(range(0, max(1, frames - 160 + step + 1), step))
        if len(starts) > 1 and samples - starts[-1] * 160 < self.coverage * 160 * 160:
            starts.pop()
        return starts


@dataclass(frozen=True)
class XVector:
    """x-vector of a WavLM speaker-verification model of transformers: waveform (N,) -> (D,), of unit length.

    Five layers of dilated convolutions over WavLM's frames, the mean and the deviation of the last over time, and a
    linear layer (Snyder et al., "X-vectors", ICASSP 2018; on WavLM: arXiv 2110.13900).
    `model` is a folder that `save_pretrained` wrote, or a hub id, fetched if need be and if HF_HUB_OFFLINE allows.
    Where it is not given, microsoft/wavlm-base-plus-sv is taken from the hub's cache on this machine, never fetched.
    """

    DEFAULT: ClassVar[str] = "microsoft/wavlm-base-plus-sv"
    name: ClassVar[str] = "speaker"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "global"
    sample_rate: ClassVar[int] = SAMPLE_RATE
    frame_rate: ClassVar[Fraction | None] = None
    centre_s: ClassVar[Fraction] = Fraction(0)
    dtype: ClassVar[str] = "float32"
    window: ClassVar[tuple[int, int]] = (20 * SAMPLE_RATE, 0)  # attention grows with the square of the length
    accelerated: ClassVar[bool] = True

    model: str | None = field(default=None, metadata={"identity": False})  # its weights' digest is in the identity

    @property
    def dim(self) -> int:
        return int(weights.json_of(self._folder() / "config.json").get("xvector_output_dim", 512))

    @property
    def weights_digest(self) -> str:
        """Of the weights and of the files that say how they are run."""
        return weights.digest(_model_files(self._folder()))

    @property
    def weights_bytes(self) -> int:
        """About what a loaded copy takes."""
        return sum(file.stat().st_size for file in _model_files(self._folder()))

    def load(self, device: str) -> Run:
        folder = self._folder()
        head = _Head(folder, device)
        backbone = WavLM(weights=str(folder))
        layers = range(backbone.architecture().layers + 1) if head.mixes else backbone.layers
        network = backbone.network(device)

        def run(waves: list[Array]) -> list[Array]:
            found = [np.zeros(head.dim, np.float32) for _ in waves]
            heard = [i for i, wave in enumerate(waves)
                     if self._long_enough(wave, backbone.frames(len(wave)), head.reach)
                     and not _silent(wave, self.window[0])]
            if heard:
                with computing(device, "fp32"):
                    hidden, lengths = network.hidden([to_device(device, waves[i]) for i in heard], frozenset(layers))
                    vectors = head([hidden[layer] for layer in layers], lengths).cpu().numpy()
                for i, vector in zip(heard, vectors, strict=True):
                    found[i] = _unit(vector)
            return found

        return run

    def combine(self, parts: Sequence[Array], lengths: Sequence[int]) -> Array:
        """(D,) of the whole from the vectors of its pieces and their lengths; ValueError if none had a voice."""
        return _combined(parts, lengths)

    def _long_enough(self, wave: Array, frames: int, reach: int) -> bool:
        if frames <= reach:  # the deviation over one frame is not a number
            raise ValueError(f"too short: {len(wave)} samples at {SAMPLE_RATE} Hz make {frames} frames, "
                             f"an x-vector needs {reach + 1}")
        return True

    def _folder(self) -> Path:
        """The folder that holds `model`: itself, or the hub's snapshot of that id.

        Raises:
            FileNotFoundError: if there is none on this machine and none could be fetched; says what to put where.
        """
        try:
            path = weights.locate(self.model or self.DEFAULT, extractor=self.name, fetch=self.model is not None,
                                  expected="a folder with config.json and model.safetensors")
        except FileNotFoundError as error:
            raise FileNotFoundError(str(error).replace("weights=", "model=")) from error  # as the setting is called
        return path if path.is_dir() else path.parent


class _Head:
    """What turns WavLM's frames into an x-vector: a mix of layers where the model has one, TDNN, pooling, projection.

    dim: of the vector. mixes: whether it takes all layers or the output alone. reach: frames that one of the TDNN sees.
    """

    def __init__(self, folder: Path, device: str) -> None:
        torch = required("torch", "encoders")
        config = {"xvector_output_dim": 512, "use_weighted_layer_sum": False, "hidden_size": 768,
                  "num_hidden_layers": 12, "tdnn_dim": [512, 512, 512, 512, 1500], "tdnn_kernel": [5, 3, 3, 1, 1],
                  "tdnn_dilation": [1, 2, 3, 1, 1], **weights.json_of(folder / "config.json")}
        self.dim, self.mixes = int(config["xvector_output_dim"]), bool(config["use_weighted_layer_sum"])
        self.steps = list(zip(config["tdnn_kernel"], config["tdnn_dilation"], strict=True))
        self.reach = 1 + sum(dilation * (kernel - 1) for kernel, dilation in self.steps)
        widths = [config["tdnn_dim"][0], *config["tdnn_dim"]]
        layers = {"projector": torch.nn.Linear(config["hidden_size"], widths[0]),
                  "feature_extractor": torch.nn.Linear(2 * widths[-1], self.dim)}
        layers |= {f"tdnn.{i}.kernel": torch.nn.Linear(widths[i] * kernel, widths[i + 1])
                   for i, (kernel, _) in enumerate(self.steps)}
        names = [f"{name}.{kind}" for name in layers for kind in ("weight", "bias")]
        tensors = checkpoint.read(folder)
        missing = sorted({*names, *(["layer_weights"] if self.mixes else [])} - tensors.keys())
        if missing:
            raise ValueError(f"{folder} is no WavLM x-vector model: {len(missing)} of its weights are missing, "
                             f"{missing[0]} for one")
        for name, layer in layers.items():
            checkpoint.load_into(layer, {kind: tensors[f"{name}.{kind}"] for kind in ("weight", "bias")}, folder)
            layer.to(device).requires_grad_(False)
        self.layers: Mapping[str, Any] = layers
        self.shares = tensors["layer_weights"].softmax(dim=0).to(device) if self.mixes else torch.ones(1, device=device)

    def __call__(self, hidden: Sequence[Any], lengths: Sequence[int]) -> Any:
        """Layers (B, T, D), of whose rows the first `lengths` frames count, to vectors (B, dim)."""
        torch = required("torch", "encoders")
        mixed = sum(share * layer for share, layer in zip(self.shares, hidden, strict=True))
        x = self.layers["projector"](mixed).transpose(1, 2)  # (B, D, T)
        for i, (kernel, dilation) in enumerate(self.steps):
            layer = self.layers[f"tdnn.{i}.kernel"]  # (D', kernel x D): transformers keeps a convolution as a product
            taps = layer.weight.unflatten(1, (kernel, -1)).transpose(1, 2)
            x = torch.nn.functional.conv1d(x, taps, layer.bias, dilation=dilation).relu()
        # Frames that saw what is beyond a row's end are left out. transformers forgets the dilation and keeps six.
        rows = [row[:, :length - self.reach + 1] for row, length in zip(x, lengths, strict=True)]
        pooled = torch.stack([torch.cat([row.mean(dim=1), row.std(dim=1)]) for row in rows])
        return self.layers["feature_extractor"](pooled)


def _d_vector_weights() -> Path:
    return weights.packaged("Resemblyzer", "resemblyzer/pretrained.pt", extra="speaker")


@lru_cache(maxsize=1)
def _d_vector_filters() -> Array:
    return mel_filters(MelContract(sample_rate=SAMPLE_RATE, n_fft=400, win_length=400, hop_length=160, n_mels=40,
                                   fmax=8000)).T.copy()


def _model_files(folder: Path) -> list[Path]:
    """The files of a model folder that make its numbers: configuration, preprocessing, weights."""
    config, processing = folder / "config.json", folder / "preprocessor_config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} is no model folder: expected config.json and model.safetensors "
                                f"(or pytorch_model.bin), found {', '.join(sorted(p.name for p in folder.iterdir()))}")
    return [config, *([processing] if processing.is_file() else []), *weights.tensor_files(folder)]


def _combined(parts: Sequence[Array], lengths: Sequence[int]) -> Array:
    """The mean of unit vectors weighted by duration, of unit length; zero vectors stand for pieces without a voice."""
    total = np.sum(np.stack(parts) * np.array(lengths, np.float64)[:, None], axis=0)
    if not total.any():
        raise ValueError("silent: no voice to embed")
    return _unit(total)


def _unit(vector: Array) -> Array:
    length = np.linalg.norm(vector)
    return (vector / length if length > 0 else vector).astype(np.float32)


def _silent(wave: Array, piece: int) -> bool:
    """Whether there is no voice in what may be a piece of a recording; ValueError where it must be the whole."""
    silent = _rms(wave) < SILENT
    if silent and len(wave) < piece:
        raise ValueError("silent: no voice to embed")
    return silent


def _rms(wave: Array) -> float:
    if not len(wave):
        raise ValueError("too short: no samples")
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))
