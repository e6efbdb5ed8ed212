"""HuBERT and its kin: ContentVec, HuBERT, wav2vec2 and WavLM, waveform (N,) at 16 kHz -> (T, D) at 50 Hz.

One architecture in four trainings: seven convolutions take 400 samples to a frame and step by 320, a projection and a
positional convolution follow, then transformer layers (Baevski et al., "wav2vec 2.0", arXiv 2006.11477; Hsu et al.,
"HuBERT", arXiv 2106.07447; Qian et al., "ContentVec", arXiv 2204.09224; Chen et al., "WavLM", arXiv 2110.13900, which
adds a gated relative position bias to the attention). Two styles: base models normalise the first convolution over
time (GroupNorm) and each layer's result (post-norm); large ones normalise each convolution over its channels and each
layer's input (pre-norm), so that their stream is normalised only behind the last layer.

Frames: T = (N - 400) // 320 + 1, frame i centred on sample 320 i + 200; fewer than 400 samples make none.
Layer L is the stream after L layers: fairseq's `output_layer=L`, transformers' `hidden_states[L]`.

Batches are exact. The GroupNorm takes the statistics of each row's own samples (padding would change every frame of a
row), and frames beyond a row's end are zero for the positional convolution and unseen by attention.

Recordings beyond 30 s go in pieces of 24 s with 3 s more on either side, as attention grows with the square of the
length. A piece has its own GroupNorm statistics (and its own normalisation, where the waveform is normalised), and its
attention sees 30 s at most, so its frames are not those of the whole recording at once. Measured with random weights (a
base HuBERT as transformers initialises it, 60 s of different recordings one after the other): relative L2 distance 0.13
after layer 1 and 0.14 after layer 12, cosine of the worst frame 0.93 and 0.94, the steps where pieces meet as large as
those within the whole. With the statistics of the whole it would be 0.02 and 0.09. Trained weights were not at hand.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from . import checkpoint
from .encoder import OUTPUT, SAMPLE_RATE, Architecture, Encoder
from .imports import required, without_broken_torchaudio
from .weights import json_of

BASE: dict[str, Any] = {  # in config.json's terms, with what stands for a key that is not there
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-5, "do_stable_layer_norm": False,
    "feat_extract_norm": "group", "feat_extract_activation": "gelu", "conv_bias": False,
    "conv_dim": [512] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16,
}
STEPS = ("conv_dim", "conv_kernel", "conv_stride")  # one number per convolution
OF_FAMILY: dict[str, dict[str, Any]] = {
    "hubert": {"feat_proj_layer_norm": True, "conv_pos_batch_norm": False},
    "wav2vec2": {"adapter_attn_dim": None},
    "wavlm": {"num_buckets": 320, "max_bucket_distance": 800},
}
CLASSES = {"hubert": "HubertConfig", "wav2vec2": "Wav2Vec2Config", "wavlm": "WavLMConfig"}

FAIRSEQ = (  # names of tensors in fairseq's (and WavLM's own) checkpoints -> in transformers'; the first that fits
    (r"^mask_emb$", "masked_spec_embed"),
    (r"^feature_extractor\.conv_layers\.(\d+)\.0\.", r"feature_extractor.conv_layers.\1.conv."),
    (r"^feature_extractor\.conv_layers\.(\d+)\.2\.(?:1\.)?", r"feature_extractor.conv_layers.\1.layer_norm."),
    (r"^layer_norm\.", "feature_projection.layer_norm."),
    (r"^post_extract_proj\.", "feature_projection.projection."),
    (r"^encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
    (r"\.self_attn\.grep_linear\.", ".attention.gru_rel_pos_linear."),
    (r"\.self_attn\.grep_a$", ".attention.gru_rel_pos_const"),
    (r"\.self_attn\.relative_attention_bias\.", ".attention.rel_attn_embed."),
    (r"\.self_attn\.", ".attention."),
    (r"\.self_attn_layer_norm\.", ".layer_norm."),
    (r"\.fc1\.", ".feed_forward.intermediate_dense."),
    (r"\.fc2\.", ".feed_forward.output_dense."),
)
WEIGHT_NORM = (  # before torch 2.1 -> since
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)
HEADS = (  # what stands on the encoder, or served its training: quantisers, targets, classifiers, recognisers
    "masked_spec_embed", "label_embs_concat", r"final_proj\..*", r"quantizer\..*", r"project_(q|hid)\..*",
    r"lm_head\..*", r"projector\..*", r"classifier\..*", "layer_weights", r"tdnn\..*", r"objective\..*",
    r"feature_extractor\.(weight|bias)", r"adapter\..*",
)


@dataclass(frozen=True)
class Source:
    """A checkpoint, whichever program wrote it.

    layout: "transformers" or "fairseq" (WavLM's own files are of this kind).
    config: in the terms of transformers' config.json, no key missing.
    normalise: how a waveform is brought to mean 0 and variance 1 before all else: "none", or by the formula of
        "transformers", (x - mean) / sqrt(variance + 1e-7), or of "fairseq", a layer norm with 1e-5.
    """

    path: Path
    layout: str
    config: dict[str, Any]
    normalise: str


@dataclass(frozen=True)
class SelfSupervised(Encoder):
    """Base of the four. `weights` is a folder that transformers wrote, a hub id, or a checkpoint file of fairseq's.

    Whether the waveform is normalised is the checkpoint's to say: `do_normalize` of preprocessor_config.json beside the
    weights, `normalize` of a fairseq task. Where neither is there, large styles are and base styles are not.
    """

    version: ClassVar[int] = 1
    window: ClassVar[tuple[int, int, int]] = (24 * SAMPLE_RATE, 3 * SAMPLE_RATE, 30 * SAMPLE_RATE)
    EXPECTED: ClassVar[str] = ("a folder with config.json, preprocessor_config.json and model.safetensors (or "
                               "pytorch_model.bin), or a fairseq checkpoint (.pt)")
    FAMILY: ClassVar[str]
    NORMALISES: ClassVar[bool] = True    # whether the checkpoint is asked

    @property
    def source(self) -> Source:
        """The checkpoint that `weights` names; FileNotFoundError or ValueError where it is none of this kind."""
        told = _source(self.path, self.FAMILY, self.name, _times(self.path))
        return told if self.NORMALISES else Source(told.path, told.layout, told.config, "none")

    def architecture(self) -> Architecture:
        config = self.source.config
        facts = {"normalise": self.source.normalise, "heads": config["num_attention_heads"],
                 "extractor": config["feat_extract_norm"], "pre_norm": config["do_stable_layer_norm"],
                 "activation": [config["feat_extract_activation"], config["hidden_act"]],
                 "epsilon": config["layer_norm_eps"], "strides": config["conv_stride"]}
        if self.FAMILY == "wavlm":
            facts["max_distance"] = config["max_bucket_distance"]
        layers = config["num_hidden_layers"]
        pre_norm = config["do_stable_layer_norm"]
        return Architecture(layers, config["hidden_size"], OUTPUT if pre_norm else layers, not pre_norm, facts)

    def network(self, device: str) -> Network:
        return Network(self.source, self.FAMILY, device, self.precision, self.compile)

    @property
    def frame_rate(self) -> Fraction:
        step = 1
        for stride in self.source.config["conv_stride"]:
            step *= stride
        return Fraction(SAMPLE_RATE, step)

    @property
    def centre_s(self) -> Fraction:
        """The middle of the samples that frame 0 is made from."""
        reach, step = 1, 1
        for kernel, stride in zip(self.source.config["conv_kernel"], self.source.config["conv_stride"], strict=True):
            reach, step = reach + (kernel - 1) * step, step * stride
        return Fraction(reach, 2 * SAMPLE_RATE)

    def frames(self, samples: int) -> int:
        return _convolved_length(self.source.config, samples)


@dataclass(frozen=True)
class ContentVec(SelfSupervised):
    """ContentVec: (N,) -> (T, 768), or (T, 256) by its projection. The waveform is not normalised.

    projection: apply the checkpoint's `final_proj`. Presets are the three conventions in use: vec768l12 (layer 12; so-
    vits-svc 4.1, RVC v2), vec256l9 (layer 9 and the projection; so-vits-svc 4.0, RVC v1), amphion (layer 12 and the
    projection).
    """

    projection: bool = False

    name: ClassVar[str] = "contentvec"
    FAMILY: ClassVar[str] = "hubert"
    NORMALISES: ClassVar[bool] = False   # trained without, although preprocessor_config.json may claim it
    DEFAULT: ClassVar[str] = "lengyue233/content-vec-best"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "vec768l12": {"weights": DEFAULT, "layer": "12", "projection": False},
        "vec256l9": {"weights": DEFAULT, "layer": "9", "projection": True},
        "amphion": {"weights": DEFAULT, "layer": "12", "projection": True},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection and self.mix == "concat":
            raise ValueError("projection=true takes one layer: ask for a single one or for mix=mean")

    @property
    def projected(self) -> int:
        return self._channels if self.projection else 0

    def mixed(self, network: Any, layers: Sequence[Any]) -> Any:
        """(B, T, D), or (B, T, P) behind the projection."""
        mixed = super().mixed(network, layers)
        return network.project(mixed).float() if self.projection else mixed

    @property
    def _channels(self) -> int:
        """Of the checkpoint's projection; ValueError where it has none. config.json names a size whether or not."""
        channels = _projection(self.path, self.FAMILY, self.name, _times(self.path))
        if not channels:
            raise ValueError(f"{self.path} has no projection (final_proj.weight): leave out projection=true, or "
                             f"give weights that have it, such as {self.DEFAULT}")
        return channels

    @property
    def recorded(self) -> dict[str, Any]:
        return {**super().recorded, "projection": self.projection}


@dataclass(frozen=True)
class Hubert(SelfSupervised):
    """HuBERT: (N,) -> (T, D), D = 768 (base) or 1024 (large)."""

    name: ClassVar[str] = "hubert"
    FAMILY: ClassVar[str] = "hubert"
    DEFAULT: ClassVar[str] = "facebook/hubert-base-ls960"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {"weights": DEFAULT}, "large": {"weights": "facebook/hubert-large-ll60k"}}


@dataclass(frozen=True)
class Wav2Vec2(SelfSupervised):
    """wav2vec 2.0: (N,) -> (T, D), D = 768 (base) or 1024 (large; xlsr, in 53 languages)."""

    name: ClassVar[str] = "wav2vec2"
    FAMILY: ClassVar[str] = "wav2vec2"
    DEFAULT: ClassVar[str] = "facebook/wav2vec2-base"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {"weights": DEFAULT}, "large": {"weights": "facebook/wav2vec2-large-lv60"},
        "xlsr": {"weights": "facebook/wav2vec2-large-xlsr-53"}}


@dataclass(frozen=True)
class WavLM(SelfSupervised):
    """WavLM: (N,) -> (T, D), D = 768 (base, base-plus) or 1024 (large)."""

    name: ClassVar[str] = "wavlm"
    FAMILY: ClassVar[str] = "wavlm"
    DEFAULT: ClassVar[str] = "microsoft/wavlm-base"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {"weights": DEFAULT}, "base-plus": {"weights": "microsoft/wavlm-base-plus"},
        "large": {"weights": "microsoft/wavlm-large"}}


class Network:
    """The modules of transformers under a forward of our own: exact rows, and no layer beyond the last wanted."""

    def __init__(self, source: Source, family: str, device: str, precision: str, compiled: bool) -> None:
        torch = required("torch", "encoders")
        tensors = _tensors(source, family)
        model = _built(source, family)
        checkpoint.load_into(model, tensors, source.path, ignore=HEADS)
        self.model, self.config, self.normalise = model, source.config, source.normalise
        positions = model.encoder.pos_conv_embed.conv
        if torch.nn.utils.parametrize.is_parametrized(positions):  # weight norm, once for all
            torch.nn.utils.parametrize.remove_parametrizations(positions, "weight")
        self.projection = None
        if "final_proj.weight" in tensors:
            channels, width = tensors["final_proj.weight"].shape
            self.projection = torch.nn.Linear(width, channels)
            checkpoint.load_into(self.projection, {name.removeprefix("final_proj."): tensor for name, tensor
                                                   in tensors.items() if name.startswith("final_proj.")}, source.path)
        for module in (self.model, self.projection):
            if module is not None:
                _halved(module.to(device).eval().requires_grad_(False), precision)
        step = _gated_step if family == "wavlm" else _plain_step
        self.step: Callable[..., Any] = torch.compile(step, dynamic=True) if compiled else step
        self.biased = family == "wavlm"

    def hidden(self, waves: list[Any], wanted: frozenset[int]) -> tuple[dict[int, Any], list[int]]:
        """Layers `{layer: (B, T, D)}` and the frames of each row."""
        torch = required("torch", "encoders")
        encoder, pre_norm = self.model.encoder, self.config["do_stable_layer_norm"]
        lengths = [_convolved_length(self.config, len(wave)) for wave in waves]
        x = self._projected(self.convolved(waves))                                        # (B, T, D)
        keep = None
        if len(set(lengths)) > 1:
            keep = torch.arange(x.shape[1], device=x.device) < torch.tensor(lengths, device=x.device)[:, None]  # (B, T)
            x = x.masked_fill(~keep[..., None], 0)
        x = x + self._positions(x, keep)
        x = x.float() if pre_norm else encoder.layer_norm(x)  # the stream is single precision: only products are halved
        mask = self._mask(x, keep)
        found = {0: x}
        last = self.config["num_hidden_layers"] if OUTPUT in wanted else max(wanted)
        for number, layer in enumerate(encoder.layers[:last], 1):
            x = self.step(layer, x, mask, keep, pre_norm)
            found[number] = x
            if number - 1 not in wanted:
                del found[number - 1]
        if OUTPUT in wanted:
            found[OUTPUT] = encoder.layer_norm(x)
        return found, lengths

    def project(self, layer: Any) -> Any:
        """(B, T, D) -> (B, T, P) by the checkpoint's `final_proj`."""
        if self.projection is None:
            raise ValueError("the checkpoint has no projection (final_proj)")
        return self.projection(layer)

    def convolved(self, waves: Sequence[Any]) -> Any:
        """(B, T, C) of the convolutions, before the projection and its norm."""
        torch = required("torch", "encoders")
        x = torch.nn.utils.rnn.pad_sequence([self._normalised(wave) for wave in waves], batch_first=True)[:, None]
        ragged = len({len(wave) for wave in waves}) > 1
        for number, layer in enumerate(self.model.feature_extractor.conv_layers):
            if number == 0 and ragged and self.config["feat_extract_norm"] == "group":
                counts = [_convolved_length(self.config, len(wave), convolutions=1) for wave in waves]
                x = layer.activation(_group_norm_by_row(layer.layer_norm, layer.conv(x), counts))
            else:
                x = layer(x)                                                              # (B, C, T)
        return x.transpose(1, 2)

    def _projected(self, x: Any) -> Any:
        projected = self.model.feature_projection(x)
        return projected[0] if isinstance(projected, tuple) else projected  # wav2vec2 and WavLM give its input as well

    def _positions(self, x: Any, keep: Any) -> Any:
        """The positional convolution of (B, T, D), which must find zeros beyond the end of a row."""
        embed = self.model.encoder.pos_conv_embed
        x = x.transpose(1, 2)
        if getattr(embed, "batch_norm", None) is not None:  # in place of weight norm; it moves zeros
            x = embed.batch_norm(x)
            x = x if keep is None else x.masked_fill(~keep[:, None, :], 0)
        return embed.activation(embed.padding(embed.conv(x))).transpose(1, 2)

    def _normalised(self, wave: Any) -> Any:
        """Mean 0 and variance 1 over the utterance alone, before any padding."""
        torch = required("torch", "encoders")
        if self.normalise == "none":
            return wave
        if self.normalise == "fairseq":
            return torch.nn.functional.layer_norm(wave, wave.shape)
        return (wave - wave.mean()) / torch.sqrt(wave.var(correction=0) + 1e-7)

    def _mask(self, x: Any, keep: Any) -> Any:
        """What attention is given besides the stream: for WavLM position biases (1, H, T, T), else the keys that count,
        (B, 1, T, T), or None for all."""
        frames = x.shape[1]
        if self.biased:
            return self.model.encoder.layers[0].attention.compute_bias(frames, frames)[None]
        return None if keep is None else keep[:, None, None, :].expand(-1, 1, frames, -1)


def _plain_step(layer: Any, x: Any, mask: Any, keep: Any, pre_norm: bool) -> Any:
    """One layer of HuBERT or wav2vec2 on the stream (B, T, D)."""
    stream = layer(x, attention_mask=mask)
    return stream[0] if isinstance(stream, tuple) else stream  # transformers 4 gives the attention as well


def _gated_step(layer: Any, x: Any, bias: Any, keep: Any, pre_norm: bool) -> Any:
    """One layer of WavLM on the stream (B, T, D)."""
    if pre_norm:
        x = x + _gated_attention(layer.attention, layer.layer_norm(x), bias, keep)
        return x + layer.feed_forward(layer.final_layer_norm(x))
    x = layer.layer_norm(x + _gated_attention(layer.attention, x, bias, keep))
    return layer.final_layer_norm(x + layer.feed_forward(x))


def _gated_attention(attention: Any, x: Any, bias: Any, keep: Any) -> Any:
    """Attention with the gated relative position bias of WavLM (section III.A.1 of its paper): (B, T, D) -> (B, T, D).

    Each head's query position scales the bias (1, H, T, T) by a gate in 1 to 2 + c of its own input. transformers goes
    through the full attention weights; one fused product does here.
    """
    from torch.nn.functional import scaled_dot_product_attention  # not by `required`, which breaks a compiled graph

    heads = x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)                    # (B, H, T, D / H)
    gates = attention.gru_rel_pos_linear(heads).float().unflatten(-1, (2, 4)).sum(-1).sigmoid()
    update, reset = gates.chunk(2, dim=-1)                                                # (B, H, T, 1) each
    mask = (update * (reset * attention.gru_rel_pos_const - 1) + 2) * bias                # (B, H, T, T)
    if keep is not None:
        mask = mask.masked_fill(~keep[:, None, None, :], float("-inf"))
    query, key, value = (product(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
                         for product in (attention.q_proj, attention.k_proj, attention.v_proj))
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype))
    return attention.out_proj(mixed.transpose(1, 2).flatten(2))


def _group_norm_by_row(norm: Any, x: Any, counts: Sequence[int]) -> Any:
    """GroupNorm of (B, C, T) by the statistics of each row's first `counts` frames; zero beyond them."""
    torch = required("torch", "encoders")
    rows = [norm(row[None, :, :count])[0] for row, count in zip(x, counts, strict=True)]
    return torch.stack([torch.nn.functional.pad(row, (0, x.shape[2] - row.shape[1])) for row in rows])


def _halved(module: Any, precision: str) -> None:
    """Weights of products in the precision of the products, as autocast would cast them anew for every batch."""
    torch = required("torch", "encoders")
    if precision != "fp32":
        for part in module.modules():
            if isinstance(part, torch.nn.Linear | torch.nn.Conv1d):
                part.to(torch.bfloat16 if precision == "bf16" else torch.float16)


def _convolved_length(config: Mapping[str, Any], samples: int, convolutions: int | None = None) -> int:
    """Frames behind the first `convolutions` (all, if None) of `samples` samples; 0 where they are too few."""
    for kernel, stride in list(zip(config["conv_kernel"], config["conv_stride"], strict=True))[:convolutions]:
        samples = (samples - kernel) // stride + 1
    return max(0, samples)


def _built(source: Source, family: str) -> Any:
    """A model of transformers without its weights: memory for them, not yet written."""
    torch = required("torch", "encoders")
    without_broken_torchaudio()
    transformers = required("transformers", "encoders")
    config = getattr(transformers, CLASSES[family])(  # no masks of training: they would ask for masked_spec_embed
        **source.config, mask_time_prob=0.0, mask_feature_prob=0.0, apply_spec_augment=False)
    attention = "eager" if family == "wavlm" else "sdpa"  # transformers has no sdpa of WavLM's
    try:
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config, attn_implementation=attention)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source.path}: transformers makes no {family} model of what is said of it "
                         f"({type(error).__name__}: {error})") from error
    return model.to_empty(device="cpu")


def _tensors(source: Source, family: str) -> dict[str, Any]:
    """The tensors of a checkpoint by their names in transformers, without a model's prefix."""
    found = checkpoint.read(source.path)
    if source.layout == "fairseq":
        return _renamed(found["model"], FAIRSEQ, WEIGHT_NORM)
    prefix = f"{family}."  # of models with a head
    return _renamed({name.removeprefix(prefix): tensor for name, tensor in found.items()}, WEIGHT_NORM)


def _renamed(tensors: Mapping[str, Any], *tables: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Tensors by new names: of each table, one after the other, the first rule that fits a name is applied to it."""
    renamed = {}
    for name, tensor in tensors.items():
        for table in tables:
            old, new = next(((old, new) for old, new in table if re.search(old, name)), ("^", ""))
            name = re.sub(old, new, name, count=1)
        renamed[name] = tensor
    return renamed


@lru_cache(maxsize=32)
def _source(path: Path, family: str, extractor: str, times: tuple[int, ...]) -> Source:
    """What a checkpoint is, remembered for as long as the files that say it stay as they are."""
    of = _of_transformers if path.is_dir() or path.suffix in (".safetensors", ".bin") else _of_fairseq
    return of(path, family, extractor)


@lru_cache(maxsize=32)
def _projection(path: Path, family: str, extractor: str, times: tuple[int, ...]) -> int:
    """Channels of a checkpoint's `final_proj`, 0 where it has none."""
    weight = _tensors(_source(path, family, extractor, times), family).get("final_proj.weight")
    return 0 if weight is None else int(weight.shape[0])


def _times(path: Path) -> tuple[int, ...]:
    """When the files that say what a checkpoint is were last changed; 0 for one that is not there."""
    folder = path if path.is_dir() else path.parent
    files = [path, folder / "config.json", folder / "preprocessor_config.json"]
    return tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)


def _of_transformers(path: Path, family: str, extractor: str) -> Source:
    """The checkpoint in a folder that `save_pretrained` wrote, named by the folder or by a file in it."""
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"{extractor}: {folder} has no config.json, but {there}; expected a folder with "
                                "config.json and model.safetensors, or name a fairseq checkpoint (.pt) itself")
    record = json_of(folder / "config.json")
    if record.get("model_type") != family:
        raise ValueError(f"{extractor}: {folder / 'config.json'} is of a model of type {record.get('model_type')!r}; "
                         f"expected {family!r}")
    config = {key: record.get(key, value) for key, value in (BASE | OF_FAMILY[family]).items()}
    _check(config, folder / "config.json")
    processing = folder / "preprocessor_config.json"
    by_style = config["feat_extract_norm"] == "layer"
    normalised = json_of(processing).get("do_normalize", by_style) if processing.is_file() else by_style
    return Source(path, "transformers", config, "transformers" if normalised else "none")


def _of_fairseq(path: Path, family: str, extractor: str) -> Source:
    """The checkpoint in a file of fairseq's, or of WavLM's authors'.

    Sizes are those of the tensors. What tensors do not show is taken from the settings in the file: where there are
    none, heads of 64 channels, pre-norm and a normalised waveform where the extractor is normalised by layer, as in all
    published models, and the standard strides.
    """
    found = checkpoint.read(path)
    tensors = found.get("model")
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{extractor}: {path} is no fairseq checkpoint: expected model and cfg in it, found "
                         f"{', '.join(sorted(map(str, found))[:4]) or 'nothing'}")
    settings = _settings(found)
    if settings.get("_name") in CLASSES and settings["_name"] != family:
        raise ValueError(f"{extractor}: {path} is of a model of type {settings['_name']!r}; expected {family!r}")
    shapes = {name: tuple(tensor.shape) for name, tensor in _renamed(tensors, FAIRSEQ, WEIGHT_NORM).items()}
    try:
        config = _config(shapes, settings, family)
    except KeyError as error:
        raise ValueError(f"{extractor}: {path} has no tensor {error}: expected a {family} model of fairseq's, found "
                         f"{', '.join(sorted(tensors)[:4]) or 'no tensors'}") from None
    _check(config, path)
    normalised = settings.get("normalize", config["feat_extract_norm"] == "layer")
    return Source(path, "fairseq", config, "fairseq" if normalised else "none")


def _settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a fairseq checkpoint, flat: the model's, and of the task whether it normalises."""
    told: dict[str, Any] = {}
    for key in ("args", "cfg"):
        part = _mapping(found.get(key))
        told |= {**part, **_mapping(part.get("task")), **_mapping(part.get("model"))}
    return told


def _mapping(part: Any) -> dict[str, Any]:
    """As a dict; empty for anything that is no mapping. omegaconf's kind is read out of its state: {name: node}."""
    if isinstance(part, checkpoint.Inert) and isinstance(part.state, Mapping):
        nodes = _mapping(part.state.get("_content"))
        states = {name: getattr(node, "state", None) for name, node in nodes.items()}
        return {str(name): state["_val"] if isinstance(state, Mapping) and "_val" in state else nodes[name]
                for name, state in states.items()}
    return vars(part) if isinstance(part, argparse.Namespace) else dict(part) if isinstance(part, Mapping) else {}


def _config(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], family: str) -> dict[str, Any]:
    """What transformers would call a model with tensors of these shapes; KeyError names one that is not there."""
    count = sum(bool(re.fullmatch(r"feature_extractor\.conv_layers\.\d+\.conv\.weight", name)) for name in shapes)
    convolutions = [shapes[f"feature_extractor.conv_layers.{i}.conv.weight"] for i in range(max(1, count))]
    kernels = [shape[2] for shape in convolutions]
    hidden = shapes["feature_projection.projection.weight"][0]
    by_layer = "feature_extractor.conv_layers.1.layer_norm.weight" in shapes
    positional = shapes["encoder.pos_conv_embed.conv.parametrizations.weight.original1"]
    config = BASE | OF_FAMILY[family] | {
        "hidden_size": hidden,
        "num_hidden_layers": len({name.split(".")[2] for name in shapes if name.startswith("encoder.layers.")}),
        "num_attention_heads": settings.get("encoder_attention_heads", hidden // 64),
        "intermediate_size": shapes["encoder.layers.0.feed_forward.intermediate_dense.weight"][0],
        "hidden_act": settings.get("activation_fn", "gelu"),
        "do_stable_layer_norm": settings.get("layer_norm_first", by_layer),
        "feat_extract_norm": "layer" if by_layer else "group",
        "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in shapes,
        "conv_dim": [shape[0] for shape in convolutions], "conv_kernel": kernels,
        "conv_stride": _strides(settings.get("conv_feature_layers"), kernels),
        "num_conv_pos_embeddings": positional[2], "num_conv_pos_embedding_groups": hidden // positional[1],
    }
    if family == "wavlm":
        config["num_buckets"] = shapes["encoder.layers.0.attention.rel_attn_embed.weight"][0]
        config["max_bucket_distance"] = settings.get("max_distance", 800)
    return config


def _strides(told: Any, kernels: Sequence[int]) -> list[int]:
    """Strides out of fairseq's `conv_feature_layers`, "[(512,10,5)] + [(512,3,2)] * 4"; the standard if not told."""
    if not isinstance(told, str):
        return BASE["conv_stride"]
    layers = re.findall(r"\(\s*\d+\s*,\s*(\d+)\s*,\s*(\d+)\s*\)\s*\]?(?:\s*\*\s*(\d+))?", told)
    spread = [(int(kernel), int(stride)) for kernel, stride, times in layers for _ in range(int(times or 1))]
    return [stride for _, stride in spread] if [kernel for kernel, _ in spread] == list(kernels) else []


def _check(config: Mapping[str, Any], file: Path) -> None:
    """ValueError for what no model of these kinds has."""
    for key, standard in BASE.items():
        value = config[key]
        if type(value) is int and type(standard) is float:
            continue
        if type(value) is not type(standard) or (key in STEPS and any(type(part) is not int for part in value)):
            raise ValueError(f"{file}: {key} is {value!r}: expected a value such as {standard!r}")
    sizes = {key: len(config[key]) for key in STEPS}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{file}: {', '.join(f'{n} of {key}' for key, n in sizes.items())}: expected one per layer")
    if config["feat_extract_norm"] not in ("group", "layer"):
        raise ValueError(f"{file}: feat_extract_norm is {config['feat_extract_norm']!r}: expected 'group' or 'layer'")
