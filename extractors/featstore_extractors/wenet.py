"""Content features from the encoder of a WeNet speech recogniser: waveform (N,) at 16 kHz -> (T, D).

WeNet (Yao et al., arXiv 2102.01547) is on no package index, so its conformer is written out in `conformer.py`; here is
what a checkpoint of it says: `final.pt` (tensors), `train.yaml` (the architecture) and `global_cmvn` (the statistics
that normalise the filter bank, which most `final.pt` hold too).

Frame convention: no padding anywhere. With `input_layer: conv2d` frame i sees 7 frames of the filter bank from 4 i on,
and is centred on sample 640 i + 680; 1000 + 960 i with conv2d6, 1320 + 1280 i with conv2d8.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from . import checkpoint, weights
from .encoder import SAMPLE_RATE, Architecture, Encoder, Network
from .imports import required

WIN_LENGTH, HOP_LENGTH = 400, 160  # of the filter bank: 25 and 10 ms

# (kernel, stride) of the convolutions, the same over time and over mels.
SUBSAMPLING = {"conv2d": ((3, 2), (3, 2)), "conv2d6": ((3, 2), (5, 3)), "conv2d8": ((3, 2), (3, 2), (3, 2))}

# What `encoder_conf` may say where the arithmetic depends on it; the first is what WeNet takes where it is silent.
CHOICES: dict[str, tuple[Any, ...]] = {
    "input_layer": tuple(SUBSAMPLING),
    "pos_enc_layer_type": ("rel_pos", "abs_pos", "no_pos"),
    "selfattention_layer_type": ("rel_selfattn", "selfattn"),
    "activation_type": ("swish", "relu", "gelu"),
    "cnn_module_norm": ("batch_norm", "layer_norm"),
    "macaron_style": (True, False), "causal": (False, True), "use_dynamic_chunk": (False, True),
    "normalize_before": (True,), "use_cnn_module": (True,), "concat_after": (False,), "final_norm": (True,),
    "query_bias": (True,), "key_bias": (True,), "value_bias": (True,), "conv_bias": (True,), "mlp_bias": (True,),
    "layer_norm_type": ("layer_norm",), "mlp_type": ("position_wise_feed_forward",), "conv_inner_factor": (2,),
    "norm_eps": (1e-5,), "conv_norm_eps": (1e-5,), "n_kv_head": (None,), "head_dim": (None,),
}
NUMBERS = {"output_size": 256, "attention_heads": 4, "linear_units": 2048, "num_blocks": 6, "cnn_module_kernel": 15,
           "static_chunk_size": 0}
TRAINING = {"dropout_rate", "positional_dropout_rate", "attention_dropout_rate", "use_dynamic_left_chunk",
            "gradient_checkpointing", "use_sdpa", "positionwise_conv_kernel_size", "n_expert", "n_expert_activated"}
FBANK: dict[str, tuple[Any, ...]] = {"frame_length": (25,), "frame_shift": (10,)}
MELS = 23  # where nothing is said of them

# Of a whole recogniser, what is no part of the encoder; concat_linear was saved and never used, pe is a table.
OTHERS = (r"decoder\..*", r"ctc\..*", r"encoder\.encoders\.\d+\.concat_linear\..*", r"encoder\.embed\.pos_enc\.pe")


@dataclass(frozen=True)
class Config:
    """What a `train.yaml` says of the encoder, as far as it changes a number.

    cmvn: the name of the statistics' file; "" where the model has none, None where nothing is said of it.
    chunk: frames of the chunks that WeNet never leaves for full context (`static_chunk_size`), or 0.
    dynamic: whether it was trained with chunks of any size.
    """

    mels: int
    dim: int
    heads: int
    linear_units: int
    layers: int
    kernel: int
    input_layer: str
    position: str
    activation: str
    norm: str
    macaron: bool
    causal: bool
    chunk: int
    dynamic: bool
    cmvn: str | None

    @property
    def kernels(self) -> tuple[tuple[int, int], ...]:
        return SUBSAMPLING[self.input_layer]

    @property
    def hop(self) -> int:
        """Samples from frame to frame."""
        return HOP_LENGTH * math.prod(stride for _, stride in self.kernels)

    @property
    def centre(self) -> int:
        """The sample that frame 0 is centred on."""
        reach, step = 0, 1
        for kernel, stride in self.kernels:
            reach, step = reach + (kernel - 1) * step, step * stride
        return reach // 2 * HOP_LENGTH + WIN_LENGTH // 2

    def frames(self, samples: int) -> int:
        """Frames of `samples` samples, those of the tail included; 0 where they are too few."""
        return self.subsampled((samples - WIN_LENGTH) // HOP_LENGTH + 1)

    def subsampled(self, count: int) -> int:
        """What the convolutions make of `count` frames, or of as many mels; 0 where they are too few."""
        for kernel, stride in self.kernels:
            count = (count - kernel) // stride + 1
        return max(count, 0)


@dataclass(frozen=True)
class WeNet(Encoder):
    """Encoder of a WeNet recogniser (U2++ conformer): waveform (N,) -> (T, D), 25, 16.7 or 12.5 frames a second.

    Layer N, the last, is the output behind the final norm; layer 0 is what enters the first block. Dither is off
    whatever the checkpoint was trained with.

    chunk: 0 attends to the whole recording (or piece, see `window`), n only to chunks of n frames and all before, as
        WeNet does with `decoding_chunk_size=n`. For models trained with chunks.
    tail: zero samples appended to the waveform. Amphion appends 160 (its preset); mostly that changes nothing, for
        one waveform in four it makes one frame more.
    """

    chunk: int = 0
    tail: int = 0

    name: ClassVar[str] = "wenet"
    EXPECTED: ClassVar[str] = ("a folder with final.pt, train.yaml and global_cmvn, as WeNet writes them, or the path "
                               "of such a final.pt with the others beside it")
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"amphion": {"tail": 160}}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chunk", "tail"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number of "
                                 f"{'frames' if name == 'chunk' else 'samples'}, 0 or more")

    def architecture(self) -> Architecture:
        config = self._config
        facts = {"input_layer": config.input_layer, "attention_heads": config.heads, "positions": config.position,
                 "activation": config.activation, "norm": config.norm, "macaron": config.macaron,
                 "causal": config.causal, "fbank": {"mels": config.mels, "win_length": WIN_LENGTH,
                                                    "hop_length": HOP_LENGTH, "dither": 0},
                 "chunk": self._chunk, "tail": self.tail}
        return Architecture(layers=config.layers, dim=config.dim, output=config.layers, facts=facts)

    def network(self, device: str) -> Network:
        torch = required("torch", "encoders")
        from .conformer import Conformer

        config, file = self._config, self._file
        tensors = checkpoint.read(file)
        if not all(torch.is_tensor(tensor) for tensor in tensors.values()):
            raise ValueError(f"{file} is no final.pt of WeNet, which holds tensors by their names: it holds "
                             f"{', '.join(map(str, tensors))[:200]}")
        statistics = None if _holds_statistics(file) else self._statistics
        if statistics is not None:
            for name, values in zip(("mean", "istd"), read_cmvn(statistics, config.mels), strict=True):
                tensors[f"encoder.global_cmvn.{name}"] = torch.from_numpy(values)
        normalised = "encoder.global_cmvn.mean" in tensors
        relative = config.position == "rel_pos" or any(name.endswith("self_attn.linear_pos.weight") for name in tensors)
        encoder = Conformer(config, relative, normalised, self._chunk, self.tail)
        checkpoint.load_into(torch.nn.ModuleDict({"encoder": encoder}), tensors, file, ignore=OTHERS)
        encoder.requires_grad_(False).to(device)
        if self.compile:
            for block in encoder.encoders:
                block.compile(dynamic=True)
        return encoder

    @property
    def frame_rate(self) -> Fraction:
        return Fraction(SAMPLE_RATE, self._config.hop)

    @property
    def centre_s(self) -> Fraction:
        return Fraction(self._config.centre, SAMPLE_RATE)

    @property
    def window(self) -> tuple[int, int, int]:
        """24 s with 2.88 s on either side, at most 30 s: whole frames of each subsampling, and whole chunks."""
        unit = self._config.hop * max(self._chunk, 1)
        core = max(24 * SAMPLE_RATE // unit, 1) * unit
        context = math.ceil(2.88 * SAMPLE_RATE / unit) * unit
        return core, context, max(30 * SAMPLE_RATE, core + 2 * context)

    @property
    def weights_digest(self) -> str:
        """Of final.pt; with that of the statistics where they are taken from their own file."""
        return weights.digest(self._files)

    @property
    def weights_bytes(self) -> int:
        return sum(file.stat().st_size for file in self._files)

    def frames(self, samples: int) -> int:
        return self._config.frames(samples + self.tail)

    def sharing(self) -> tuple[Any, ...]:
        return self._chunk, self.tail

    @property
    def _file(self) -> Path:
        """The file of the tensors."""
        path = self.path
        if path.is_dir() and not (path / "final.pt").is_file():
            there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{path} has no final.pt; expected {self.EXPECTED}, found {there}")
        return path / "final.pt" if path.is_dir() else path

    @property
    def _files(self) -> list[Path]:
        """All files that numbers come from, but for the yaml."""
        file = self._file
        statistics = None if _holds_statistics(file) else self._statistics
        return [file] if statistics is None else [file, statistics]

    @property
    def _config(self) -> Config:
        yaml = self._file.parent / "train.yaml"
        if not yaml.is_file():
            raise FileNotFoundError(f"{self._file} has no train.yaml beside it; expected {self.EXPECTED}")
        state = yaml.stat()
        return _read_config(yaml, state.st_size, state.st_mtime_ns)

    @property
    def _statistics(self) -> Path | None:
        """The file that normalises the filter bank; None where the model goes without."""
        name = self._config.cmvn
        if name == "":
            return None
        beside = self._file.parent / (name or "global_cmvn")
        if not beside.is_file():
            raise FileNotFoundError(
                f"{self._file} holds no encoder.global_cmvn.mean, and {beside} does not exist: put the statistics "
                "there that the model was trained with (cmvn_file: null in train.yaml says that it has none)")
        return beside

    @property
    def _chunk(self) -> int:
        """Frames of a chunk, 0 for none. ValueError where the model does not know chunks of that size."""
        config = self._config
        if config.dynamic or self.chunk in (0, config.chunk):
            return self.chunk if config.dynamic else config.chunk
        raise ValueError(f"chunk={self.chunk}: {self.path} was trained with use_dynamic_chunk: false and "
                         f"static_chunk_size: {config.chunk}, and WeNet itself would not heed another; expected "
                         f"chunk={config.chunk}")


@lru_cache(maxsize=32)
def _read_config(path: Path, size: int, mtime_ns: int) -> Config:
    """The `train.yaml` at `path`, of either style; remembered for as long as size and mtime stay."""
    yaml = required("yaml", "encoders")
    try:
        record = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(record, dict) or not record.get("encoder_conf"):
        raise ValueError(f"{path} is no train.yaml of WeNet: it has no encoder_conf")
    conf, data = _part(path, record, "encoder_conf"), _part(path, record, "dataset_conf")
    fbank, resample = _part(path, data, "fbank_conf"), _part(path, data, "resample_conf")
    _choose(path, record, "", {"encoder": ("conformer",), "cmvn": (None, "global_cmvn")})
    _choose(path, data, "dataset_conf.", {"feats_type": ("fbank",)})
    _choose(path, resample, "dataset_conf.resample_conf.", {"resample_rate": (SAMPLE_RATE,)})
    _know(path, fbank, "dataset_conf.fbank_conf.", {*FBANK, "num_mel_bins", "dither"})
    _choose(path, fbank, "dataset_conf.fbank_conf.", FBANK)
    _know(path, conf, "encoder_conf.", {*CHOICES, *NUMBERS, *TRAINING})
    chosen = _choose(path, conf, "encoder_conf.", CHOICES)
    numbers = {name: _whole(path, f"encoder_conf.{name}", conf.get(name, default)) for name, default in NUMBERS.items()}
    mels = _whole(path, "dataset_conf.fbank_conf.num_mel_bins", fbank.get("num_mel_bins", MELS))
    _choose(path, record, "", {"input_dim": (mels,)})
    heads, kernel = numbers["attention_heads"], numbers["cnn_module_kernel"]
    if not heads or numbers["output_size"] % heads:
        raise ValueError(f"{path}: output_size: {numbers['output_size']} is no multiple of attention_heads: {heads}")
    if not chosen["causal"] and kernel % 2 == 0:
        raise ValueError(f"{path}: cnn_module_kernel: {kernel} must be odd where causal is false")
    if (chosen["pos_enc_layer_type"], chosen["selfattention_layer_type"]) == ("rel_pos", "selfattn"):
        raise ValueError(f"{path}: pos_enc_layer_type: rel_pos needs selfattention_layer_type: rel_selfattn")
    config = Config(
        mels=mels, dim=numbers["output_size"], heads=heads, linear_units=numbers["linear_units"],
        layers=numbers["num_blocks"], kernel=kernel, input_layer=chosen["input_layer"],
        position=chosen["pos_enc_layer_type"],
        activation=chosen["activation_type"], norm=chosen["cnn_module_norm"], macaron=chosen["macaron_style"],
        causal=chosen["causal"], chunk=numbers["static_chunk_size"], dynamic=chosen["use_dynamic_chunk"],
        cmvn=_cmvn_name(record))
    if not config.subsampled(mels):
        raise ValueError(f"{path}: num_mel_bins: {mels} are too few for input_layer: {config.input_layer}")
    return config


def _part(path: Path, record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields under `name`, none where it is absent."""
    part = record.get(name) or {}
    if not isinstance(part, dict):
        raise ValueError(f"{path}: {name}: expected fields, found {part!r}")
    return part


def _know(path: Path, record: Mapping[str, Any], prefix: str, known: set[str]) -> None:
    """ValueError for a field that is not known: it could change a number."""
    for name in record:
        if name not in known:
            raise ValueError(f"{path}: {prefix}{name}: {record[name]} is not known here; known are "
                             f"{', '.join(sorted(known))}")


def _choose(path: Path, record: Mapping[str, Any], prefix: str,
            choices: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """What `record` says of each of `choices`, the first of them where it is silent; ValueError for any other."""
    chosen = {}
    for name, values in choices.items():
        value = record.get(name, values[0])
        if isinstance(value, str) and isinstance(values[0], float):
            value = _number(value)  # YAML 1.1 takes 1e-5 for text
        if value not in values:
            raise ValueError(f"{path}: {prefix}{name}: {value} is not supported; supported: "
                             f"{', '.join(json.dumps(choice) for choice in values)}")
        chosen[name] = value
    return chosen


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _whole(path: Path, name: str, value: Any) -> int:
    least = 0 if name.endswith("static_chunk_size") else 1
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{path}: {name}: {value}: expected a whole number, {least} or more")
    return value


def _cmvn_name(record: Mapping[str, Any]) -> str | None:
    """The file of the statistics without its folder, which is one of the machine that trained (see `Config.cmvn`)."""
    if "cmvn" in record and record["cmvn"] is None:
        return ""
    said = record if "cmvn_file" in record else record.get("cmvn_conf") or {}
    if "cmvn_file" not in said:
        return None
    return re.split(r"[/\\]", str(said["cmvn_file"]))[-1] if said["cmvn_file"] else ""


def read_cmvn(path: Path, mels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and inverse standard deviation (mels,), float32, from sums over frames: WeNet's JSON or Kaldi's text.

    JSON has `mean_stat`, `var_stat` (sums of squares) and `frame_num`; Kaldi's matrix the sums and the number of
    frames, then the sums of squares and a zero. ValueError for anything else, and for another number of mels.
    """
    try:
        text = path.read_text("utf-8")
        if text.lstrip().startswith("{"):
            record = json.loads(text)
            sums, squares, count = record["mean_stat"], record["var_stat"], float(record["frame_num"])
        else:
            values = [float(word) for word in text.strip().removeprefix("[").removesuffix("]").split()]
            half = len(values) // 2
            sums, count, squares = values[: half - 1], values[half - 1], values[half:-1]
        first, second = np.asarray(sums, np.float64), np.asarray(squares, np.float64)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: expected statistics as JSON with mean_stat, var_stat and frame_num, or as the text "
                         f"of a Kaldi matrix ({type(error).__name__}: {error})") from None
    if first.shape != (mels,) or second.shape != (mels,) or not count > 0:
        raise ValueError(f"{path}: has {first.size} sums and {second.size} sums of squares over {count:g} frames; "
                         f"expected {mels} of each, as train.yaml has mels")
    mean = first / count
    variance = np.maximum(second / count - mean**2, 1e-20)
    return mean.astype(np.float32), (1 / np.sqrt(variance)).astype(np.float32)


def _holds_statistics(file: Path) -> bool:
    """Whether a checkpoint names the tensors of the statistics; told from its bytes, without reading a tensor."""
    state = file.stat()
    return _contains(file, b"encoder.global_cmvn.mean", state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=32)
def _contains(file: Path, name: bytes, size: int, mtime_ns: int) -> bool:
    with file.open("rb") as opened:
        if not size:
            return False
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(name) >= 0
