"""The encoder of Whisper (Radford et al., "Robust speech recognition via large-scale weak supervision", arXiv
2212.04356), from a folder or hub id of transformers or from OpenAI's own `.pt` file.

50 frames per second, frame i centred on sample 320 i, ceil(N / 320) of them. Layer L is the stream after L layers, as
it is; the last one, which is the output, behind the final norm. Whisper hears 30 s: longer recordings go in pieces.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from .checkpoint import load_into, read
from .encoder import SAMPLE_RATE, Architecture, Encoder
from .imports import required, without_broken_torchaudio
from .signal import MelContract, mel_filters
from .weights import json_of

HOP = 160           # samples per mel frame
STRIDE = 2 * HOP    # samples per frame of the encoder: its second convolution halves the rate
POSITIONS = 1500    # frames of the encoder in the 30 s that it was trained on
FLOOR = 1e-10       # of mel power: what openai-whisper clamps to before the logarithm
RANGE = 8.0         # decades below the loudest bin of the utterance that are kept

# Names in OpenAI's files, below `encoder.`, and in those of transformers.
OPENAI = ((r"blocks\.(\d+)\.attn\.(query|key|value)\.", lambda m: f"layers.{m[1]}.self_attn.{m[2][0]}_proj."),
          (r"blocks\.(\d+)\.attn\.out\.", r"layers.\1.self_attn.out_proj."),
          (r"blocks\.(\d+)\.attn_ln\.", r"layers.\1.self_attn_layer_norm."),
          (r"blocks\.(\d+)\.mlp\.0\.", r"layers.\1.fc1."),
          (r"blocks\.(\d+)\.mlp\.2\.", r"layers.\1.fc2."),
          (r"blocks\.(\d+)\.mlp_ln\.", r"layers.\1.final_layer_norm."),
          (r"ln_post\.", r"layer_norm."),
          (r"positional_embedding", r"embed_positions.weight"))


@dataclass(frozen=True)
class Whisper(Encoder):
    """Whisper's encoder: waveform (N,) at 16 kHz -> (ceil(N / 320), D).

    context: what the encoder hears. "30s" is how it was trained and how openai-whisper runs it: zeros up to 30 s, of
        which the first frames are kept. "short" attends to the frames of the utterance alone: about six times faster
        for 5 s, and other features (the silence that follows is part of what Whisper knows, and OpenAI's weights have
        never been without it).
    Longer than 30 s: pieces of 26 s with 2 s more on either side, each with its own loudest bin, as openai-whisper
    would take them.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        size: {"weights": f"openai/whisper-{size}"}
        for size in ("tiny", "base", "small", "medium", "large", "large-v2", "large-v3",
                     "tiny.en", "base.en", "small.en", "medium.en")}
    DEFAULT: ClassVar[str] = "openai/whisper-medium"
    EXPECTED: ClassVar[str] = ("a folder with config.json and model.safetensors (or pytorch_model.bin) as transformers "
                               "saves Whisper, or OpenAI's own .pt file")
    name: ClassVar[str] = "whisper"
    version: ClassVar[int] = 1
    frame_rate: ClassVar[Fraction] = Fraction(SAMPLE_RATE, STRIDE)
    centre_s: ClassVar[Fraction] = Fraction(0)
    window: ClassVar[tuple[int, int, int]] = (26 * SAMPLE_RATE, 2 * SAMPLE_RATE, POSITIONS * STRIDE)

    context: Literal["30s", "short"] = "30s"

    def frames(self, samples: int) -> int:
        return -(-samples // STRIDE)

    def sharing(self) -> tuple[Any, ...]:
        return (self.context,)

    def architecture(self) -> Architecture:
        """From config.json, or the dims in a `.pt` file."""
        shape = _shape(self.path)
        facts = {"context": self.context, "mels": shape.num_mel_bins, "heads": shape.encoder_attention_heads,
                 "activation": shape.activation_function}
        return Architecture(shape.encoder_layers, shape.d_model, shape.encoder_layers, normed=False, facts=facts)

    @property
    def weights_bytes(self) -> int:
        """Of the encoder alone, which is what is loaded."""
        return _shape(self.path).numbers * (4 if self.precision == "fp32" else 2)

    def network(self, device: str) -> Network:
        torch = required("torch", "encoders")
        without_broken_torchaudio()
        transformers = required("transformers", "encoders")
        path = self.path
        shape = _shape(path)
        config = transformers.WhisperConfig(**dataclasses.asdict(shape), decoder_layers=0)
        whisper = required("transformers.models.whisper.modeling_whisper", "encoders")
        try:
            with torch.device("meta"):  # no time for random numbers that the checkpoint replaces
                encoder = whisper.WhisperEncoder(config)
        except KeyError as error:
            raise ValueError(f"{path}: transformers knows no activation_function {error}") from error
        encoder = encoder.to_empty(device="cpu")
        load_into(encoder, _tensors(path), path)
        if self.precision != "fp32":  # as autocast would at every call
            half = torch.bfloat16 if self.precision == "bf16" else torch.float16
            for module in encoder.modules():
                if isinstance(module, torch.nn.Linear | torch.nn.Conv1d):
                    module.to(half)
        encoder = encoder.to(device).eval().requires_grad_(False)
        return Network(encoder, self.context, torch.compile(_layer, dynamic=True) if self.compile else _layer)


class Network:
    """The modules of transformers' WhisperEncoder on their device, with a forward pass of ours.

    Theirs takes 3000 mel frames and nothing else, masks nothing and runs every layer.
    """

    def __init__(self, encoder: Any, context: str, layer: Callable[..., Any]) -> None:
        self.encoder, self.context, self.layer = encoder, context, layer
        self.filters = filters(encoder.conv1.in_channels).to(encoder.conv1.weight.device)

    def hidden(self, waves: list[Any], wanted: frozenset[int]) -> tuple[dict[int, Any], list[int]]:
        """Layers `{layer: (B, T, D)}`, T that of the longest; ValueError beyond 30 s."""
        lengths = [-(-len(wave) // STRIDE) for wave in waves]
        longest = max(lengths)
        if longest > POSITIONS:
            raise ValueError(f"too long: Whisper hears {POSITIONS * STRIDE} samples (30 s) at a time, "
                             f"not {max(map(len, waves))}; featstore extract cuts recordings into pieces")
        x, last = self._stream(waves, longest), max(wanted)
        mask = self._mask(lengths) if self.context == "short" else None
        found = {0: x[:, :longest]} if 0 in wanted else {}
        for number, layer in enumerate(self.encoder.layers[:last], start=1):
            # nobody asks the last layer what it makes of the silence: that it is heard is enough
            x = self.layer(layer, x, longest if number == last else x.shape[1], mask)
            if number in wanted:
                found[number] = x[:, :longest]
        output = len(self.encoder.layers)
        if output in found:
            found[output] = self.encoder.layer_norm(found[output])
        return found, lengths

    def _stream(self, waves: list[Any], longest: int) -> Any:
        """What enters the first layer: (B, T, D), T = `longest` or POSITIONS.

        Mel frames beyond 2 `longest` + 1 hear zeros and are all alike, so those that make the encoder's frames up to
        `longest` + 1, one frame of silence and the one at the end of the 30 s are enough to know all.
        """
        gelu, cat = required("torch", "encoders").nn.functional.gelu, required("torch", "encoders").cat
        mel = log_mel(waves, self.filters, min(2 * longest + 8, 2 * POSITIONS))
        x = gelu(self.encoder.conv2(gelu(self.encoder.conv1(mel)))).transpose(1, 2)  # (B, longest + 4, D)
        frames = longest if self.context == "short" else POSITIONS
        if x.shape[1] < frames:
            silence = x[:, -2:-1].expand(-1, frames - x.shape[1], -1)
            x = cat([x[:, :-1], silence, x[:, -1:]], dim=1)
        return x[:, :frames].contiguous() + self.encoder.embed_positions.weight[:frames]

    def _mask(self, lengths: list[int]) -> Any:
        """Which keys count for each row, (B, 1, 1, T) of bool; None where all do."""
        torch = required("torch", "encoders")
        if min(lengths) == max(lengths):
            return None
        device = self.filters.device
        keys = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
        return keys[:, None, None, :]


def _layer(layer: Any, x: Any, rows: int, mask: Any) -> Any:
    """The first `rows` frames behind a layer: x (B, T, D) -> (B, rows, D); every frame is heard (as key and value)."""
    from torch.nn.functional import scaled_dot_product_attention as attend  # what torch.compile can look through

    attention = layer.self_attn
    normed = layer.self_attn_layer_norm(x)

    def heads(y: Any) -> Any:
        return y.view(*y.shape[:2], attention.num_heads, -1).transpose(1, 2)  # (B, heads, T, D / heads)

    query = heads(attention.q_proj(normed[:, :rows]) * attention.scaling)  # scaled first, as in the reference
    heard = attend(query, heads(attention.k_proj(normed)), heads(attention.v_proj(normed)), attn_mask=mask, scale=1.0)
    x = x[:, :rows] + attention.out_proj(heard.transpose(1, 2).flatten(2))
    return x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))


@lru_cache(maxsize=2)
def filters(mels: int) -> Any:
    """Whisper's mel filters as a tensor, (mels, 201): slaney's scale and norm, 0 to 8 kHz."""
    torch = required("torch", "encoders")
    contract = MelContract(sample_rate=SAMPLE_RATE, n_fft=400, win_length=400, hop_length=HOP, n_mels=mels, fmax=8000)
    return torch.from_numpy(mel_filters(contract)).float()


def log_mel(waves: list[Any], filters: Any, frames: int) -> Any:
    """Log-mel of waveforms (N,) with zeros behind them: (B, mels, frames), frame k centred on sample 160 k.

    lg of mel power, at most 8 below the highest of the row (never of the batch), plus 4, over 4; always in float32.
    The last frame hears zeros only if `frames` x 160 is at least N + 200, or else, as in openai-whisper, a reflection.
    """
    torch = required("torch", "encoders")
    with torch.autocast(filters.device.type, enabled=False):
        padded = filters.new_zeros(len(waves), frames * HOP)
        for row, wave in zip(padded, waves, strict=True):
            row[: len(wave)] = wave
        spectrum = torch.stft(padded, 400, HOP, window=torch.hann_window(400, device=padded.device),
                              return_complex=True)[..., :-1]
        mel = torch.log10((filters @ spectrum.abs().square()).clamp_min(FLOOR))
        mel = torch.maximum(mel, mel.amax(dim=(1, 2), keepdim=True) - RANGE)
        return (mel + 4) / 4


@dataclass(frozen=True)
class Shape:
    """What determines the encoder's tensors; names as in transformers' WhisperConfig."""

    num_mel_bins: int
    max_source_positions: int
    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    activation_function: str

    @property
    def numbers(self) -> int:
        """How many there are in the encoder's tensors."""
        d, inner = self.d_model, self.encoder_ffn_dim
        layer = 4 * d * d + 2 * d * inner + inner + 8 * d  # biases: q, v, out, fc1, fc2; two norms
        stem = 3 * d * (self.num_mel_bins + d) + 2 * d + self.max_source_positions * d
        return stem + self.encoder_layers * layer + 2 * d


def _shape(path: Path) -> Shape:
    """Of the Whisper at `path`. ValueError or FileNotFoundError for anything else, which it names."""
    if _of_transformers(path):
        shape = _shape_of_config((path if path.is_dir() else path.parent) / "config.json")
    else:
        state = path.stat()
        shape = _shape_of_pt(path, state.st_size, state.st_mtime_ns)
    if shape.max_source_positions != POSITIONS or shape.d_model % shape.encoder_attention_heads:
        raise ValueError(f"{path}: expected an encoder of {POSITIONS} positions whose channels are a multiple of its "
                         f"heads, found {shape.max_source_positions} positions, {shape.d_model} channels and "
                         f"{shape.encoder_attention_heads} heads")
    return shape


def _of_transformers(path: Path) -> bool:
    """Whether `path` is a folder that transformers wrote, or a file of tensors in one."""
    return path.is_dir() or path.suffix in (".safetensors", ".bin")


def _shape_of_config(path: Path) -> Shape:
    if not path.is_file():
        raise FileNotFoundError(f"whisper: {path.parent} has no config.json; expected {Whisper.EXPECTED}")
    config = json_of(path)
    if config.get("model_type") != "whisper":
        raise ValueError(f"{path} is of a {config.get('model_type', 'model of no stated type')}, not of Whisper")
    return _shape_from(config, {f.name: f.name for f in dataclasses.fields(Shape)}, path)


@lru_cache(maxsize=8)
def _shape_of_pt(path: Path, size: int, mtime_ns: int) -> Shape:
    dims = _openai(path)["dims"]
    found = {**dims, "inner": 4 * dims.get("n_audio_state", 0), "activation": "gelu"}
    return _shape_from(found, {
        "num_mel_bins": "n_mels", "max_source_positions": "n_audio_ctx", "d_model": "n_audio_state",
        "encoder_layers": "n_audio_layer", "encoder_attention_heads": "n_audio_head", "encoder_ffn_dim": "inner",
        "activation_function": "activation"}, path)


def _shape_from(found: Mapping[str, Any], names: Mapping[str, str], path: Path) -> Shape:
    """A shape whose field F is `found[names[F]]`; ValueError names what is lacking or makes no sense."""
    for field, name in names.items():
        value = found.get(name)
        if isinstance(value, str) if field == "activation_function" else type(value) is int and value > 0:
            continue
        raise ValueError(f"{path}: {name} is {value!r}; a Whisper states it as "
                         f"{'a word' if field == 'activation_function' else 'a whole number above 0'}")
    return Shape(**{field: found[name] for field, name in names.items()})


def _openai(path: Path) -> dict[str, Any]:
    """{dims, model_state_dict} of a file that OpenAI's whisper saved; ValueError for any other checkpoint."""
    found = read(path)
    if not (isinstance(found.get("dims"), dict) and isinstance(found.get("model_state_dict"), dict)):
        raise ValueError(f"{path} is no Whisper of OpenAI's: expected dims and model_state_dict in it, found "
                         f"{', '.join(sorted(map(str, found))[:6]) or 'nothing'}")
    return found


def _tensors(path: Path) -> dict[str, Any]:
    """The encoder's tensors, named as transformers' WhisperEncoder names them; the decoder's are left out."""
    found = read(path) if _of_transformers(path) else _openai(path)["model_state_dict"]
    prefix = re.compile(r"(model\.)?encoder\.")
    encoder = {prefix.sub("", name, count=1): tensor for name, tensor in found.items() if prefix.match(name)}
    if _of_transformers(path):
        return encoder or found  # an encoder that was saved by itself has no prefix
    for pattern, name in OPENAI:
        encoder = {re.sub(f"^{pattern}", name, old): tensor for old, tensor in encoder.items()}
    return encoder
