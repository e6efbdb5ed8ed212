"""Who speaks or sings, as one vector of unit length per recording, from waveforms at 16 kHz.

`Speaker` is the d-vector of Wan et al., "Generalized end-to-end loss for speaker verification" (arXiv 1710.10467), with
the weights that ship in the Resemblyzer wheel; `XVector` is WavLM with an x-vector head, from a folder or the hub.

Silence has no voice: ValueError. Long recordings go in pieces whose vectors are averaged by duration, and a silent
piece (a stem that rests for a minute) only counts for nothing there: `run` gives the zero vector for silence as long as
a piece, `combine` passes it over and refuses what is silent throughout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from .imports import required, without_broken_torchaudio
from .signal import MelContract, mel_filters
from .weights import file_digest, packaged

Array = np.ndarray
Run = Callable[[list[Array]], list[Array]]

SAMPLE_RATE = 16000
SILENT = 1e-4  # RMS, -80 dBFS: below it there is dither and converter noise, and no voice


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
        """d-vector, or wavlm: the x-vector of WavLM."""
        if name not in cls.PRESETS:
            raise ValueError(f"no speaker embedding {name!r}; there are {', '.join(cls.PRESETS)}")
        return XVector() if name == "wavlm" else cls()

    def __post_init__(self) -> None:
        if not 0.625 <= self.rate <= 100:
            raise ValueError(f"rate must be between 0.625 (windows of 1.6 s just touch) and 100, not {self.rate:g}")
        for name in ("rate", "coverage"):  # 1 and 1.0 are one setting, not two
            object.__setattr__(self, name, float(getattr(self, name)))
        if not 0 < self.coverage <= 1:
            raise ValueError(f"coverage must be a part of a window, above 0 and up to 1, not {self.coverage:g}")

    @property
    def weights_digest(self) -> str:
        return file_digest(_d_vector_weights())

    def load(self, device: str) -> Run:
        torch = required("torch", "speaker")
        state = torch.load(_d_vector_weights(), map_location="cpu", weights_only=True)["model_state"]
        lstm, linear = torch.nn.LSTM(40, 256, num_layers=3, batch_first=True), torch.nn.Linear(256, 256)
        for part, prefix in ((lstm, "lstm."), (linear, "linear.")):
            part.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()
                                  if key.startswith(prefix)})
            part.to(device).eval()

        def embed(wave: Array) -> Array:
            if _silent(wave, self.window[0]):
                return np.zeros(256, np.float32)
            with torch.inference_mode():
                mels = torch.from_numpy(self._windows(wave)).to(device)  # (windows, 160, 40)
                _, (hidden, _) = lstm(mels)  # (layers, windows, 256)
                voices = torch.relu(linear(hidden[-1]))
                voices = voices / torch.linalg.vector_norm(voices, dim=1, keepdim=True).clamp_min(1e-12)
                return _unit(voices.cpu().numpy().mean(axis=0))

        return lambda waves: [embed(wave) for wave in waves]

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
        return int(json.loads((self._folder() / "config.json").read_text()).get("xvector_output_dim", 512))

    @property
    def weights_digest(self) -> str:
        """Of the weights and of the files that say how they are run."""
        parts = [file_digest(path) for path in _model_files(self._folder())]
        return "sha256:" + hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def load(self, device: str) -> Run:
        torch = required("torch", "encoders")
        without_broken_torchaudio()
        transformers = required("transformers", "encoders")
        folder = self._folder()
        model, found = transformers.WavLMForXVector.from_pretrained(folder, local_files_only=True,
                                                                    output_loading_info=True)
        if found["missing_keys"]:  # which transformers would fill with random numbers
            raise ValueError(f"{folder} is no WavLM x-vector model: {len(found['missing_keys'])} of its weights are "
                             f"missing, {min(found['missing_keys'])} for one")
        model.to(device).eval().requires_grad_(False)
        processing = folder / "preprocessor_config.json"
        standardise = processing.is_file() and json.loads(processing.read_text()).get("do_normalize", False)
        config = model.config
        reach = 1 + sum(d * (k - 1) for k, d in zip(config.tdnn_kernel, config.tdnn_dilation, strict=True))

        def embed(wave: Array) -> Array:
            frames = int(model._get_feat_extract_output_lengths(len(wave)))
            if frames <= reach:  # the deviation over one frame is not a number
                raise ValueError(f"too short: {len(wave)} samples at {SAMPLE_RATE} Hz make {max(frames, 0)} frames, "
                                 f"an x-vector needs {reach + 1}")
            if _silent(wave, self.window[0]):
                return np.zeros(config.xvector_output_dim, np.float32)
            if standardise:
                wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
            with torch.inference_mode():
                vectors = model(torch.from_numpy(wave[None].astype(np.float32)).to(device)).embeddings
                return _unit(vectors[0].float().cpu().numpy())

        return lambda waves: [embed(wave) for wave in waves]

    def combine(self, parts: Sequence[Array], lengths: Sequence[int]) -> Array:
        """(D,) of the whole from the vectors of its pieces and their lengths; ValueError if none had a voice."""
        return _combined(parts, lengths)

    def _folder(self) -> Path:
        return _model_folder(self.model or self.DEFAULT, fetch=self.model is not None)


def _d_vector_weights() -> Path:
    return packaged("Resemblyzer", "resemblyzer/pretrained.pt", extra="speaker")


@lru_cache(maxsize=1)
def _d_vector_filters() -> Array:
    return mel_filters(MelContract(sample_rate=SAMPLE_RATE, n_fft=400, win_length=400, hop_length=160, n_mels=40,
                                   fmax=8000)).T.copy()


@lru_cache(maxsize=8)
def _model_folder(model: str, fetch: bool) -> Path:
    """The folder that holds `model`: itself, or the hub's snapshot of that id.

    Raises:
        FileNotFoundError: if there is none on this machine and none could be fetched; says what to put where.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        hub = required("huggingface_hub", "encoders")
        wanted = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json",
                  "pytorch_model*.bin", "pytorch_model.bin.index.json"]
        try:
            folder = Path(hub.snapshot_download(model, allow_patterns=wanted, local_files_only=not fetch))
        except (OSError, ValueError) as error:  # of which all errors of the hub's client are kinds
            raise FileNotFoundError(
                f"no WavLM x-vector model {model!r}: neither a folder nor in the hub's cache on this machine"
                f"{f', and it could not be fetched ({type(error).__name__})' if fetch else ''}. Give a folder with "
                f"config.json and model.safetensors (model=FOLDER), or a hub id to fetch (model={XVector.DEFAULT})."
            ) from error
    _model_files(folder)
    return folder


def _model_files(folder: Path) -> list[Path]:
    """The files of a model folder that make its numbers: configuration, preprocessing, weights."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    config = folder / "config.json"
    if not weights or not config.is_file():
        raise FileNotFoundError(f"{folder} is no model folder: expected config.json and model.safetensors "
                                f"(or pytorch_model.bin), found {', '.join(sorted(p.name for p in folder.iterdir()))}")
    processing = folder / "preprocessor_config.json"
    return [config, *([processing] if processing.is_file() else []), *weights]


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
