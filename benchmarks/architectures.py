"""Encoders of true size with random weights, in folders as transformers and WeNet leave them: enough to time them.

Needs torch, transformers and safetensors alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "extractors"), str(ROOT / "align")]  # for a machine on which featstore is not installed

import torch  # noqa: E402

from featstore_extractors.imports import without_broken_torchaudio  # noqa: E402

without_broken_torchaudio()

import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers.models.whisper.modeling_whisper import WhisperEncoder  # noqa: E402

WHISPER = {"tiny": (384, 4, 6, 80), "base": (512, 6, 8, 80), "small": (768, 12, 12, 80), "medium": (1024, 24, 16, 80),
           "large-v3": (1280, 32, 20, 128)}  # width, layers, heads, mels


def whisper(folder: Path, size: str) -> Path:
    """The encoder half of a Whisper model."""
    width, layers, heads, mels = WHISPER[size]
    config = transformers.WhisperConfig(d_model=width, encoder_layers=layers, encoder_attention_heads=heads,
                                        encoder_ffn_dim=4 * width, num_mel_bins=mels, decoder_layers=1,
                                        architectures=["WhisperForConditionalGeneration"])
    torch.manual_seed(0)
    return _saved(folder, config, {f"model.encoder.{name}": tensor
                                   for name, tensor in WhisperEncoder(config).state_dict().items()})


def hubert(folder: Path, **settings: Any) -> Path:
    """HuBERT base, which ContentVec is too, with its projection to 256 channels."""
    config = transformers.HubertConfig(architectures=["HubertModel"], classifier_proj_size=256, **settings)
    torch.manual_seed(0)
    model, projection = transformers.HubertModel(config), torch.nn.Linear(config.hidden_size, 256)
    tensors = model.state_dict() | {f"final_proj.{name}": t for name, t in projection.state_dict().items()}
    return _saved(folder, config, tensors)


def wenet(folder: Path) -> Path:
    """U2++ conformer of 12 blocks of 512, as the WenetSpeech recipe has it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.save(_conformer_tensors(width=512, hidden=2048, heads=8, blocks=12, kernel=15), folder / "final.pt")
    (folder / "train.yaml").write_text(_TRAIN_YAML)
    return folder


def _saved(folder: Path, config: Any, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def _conformer_tensors(width: int, hidden: int, heads: int, blocks: int, kernel: int) -> dict[str, torch.Tensor]:
    def linear(name: str, out: int, *inner: int, bias: bool = True) -> dict[str, torch.Tensor]:
        made = {f"{name}.weight": torch.randn(out, *inner) / torch.tensor(inner).prod().sqrt()}
        return made | ({f"{name}.bias": torch.zeros(out)} if bias else {})

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}

    tensors = {"encoder.global_cmvn.mean": torch.full((80,), 10.0), "encoder.global_cmvn.istd": torch.full((80,), 0.3)}
    tensors |= linear("encoder.embed.conv.0", width, 1, 3, 3) | linear("encoder.embed.conv.2", width, width, 3, 3)
    tensors |= linear("encoder.embed.out.0", width, 19 * width)
    for number in range(blocks):
        at = f"encoder.encoders.{number}"
        for name in ("q", "k", "v", "out"):
            tensors |= linear(f"{at}.self_attn.linear_{name}", width, width)
        tensors |= linear(f"{at}.self_attn.linear_pos", width, width, bias=False)
        tensors |= {f"{at}.self_attn.pos_bias_{which}": torch.zeros(heads, width // heads) for which in "uv"}
        for name in ("feed_forward", "feed_forward_macaron"):
            tensors |= linear(f"{at}.{name}.w_1", hidden, width) | linear(f"{at}.{name}.w_2", width, hidden)
        tensors |= linear(f"{at}.conv_module.pointwise_conv1", 2 * width, width, 1)
        tensors |= linear(f"{at}.conv_module.depthwise_conv", width, 1, kernel)
        tensors |= linear(f"{at}.conv_module.pointwise_conv2", width, width, 1) | norm(f"{at}.conv_module.norm")
        for name in ("norm_ff", "norm_mha", "norm_ff_macaron", "norm_conv", "norm_final"):
            tensors |= norm(f"{at}.{name}")
    return tensors | norm("encoder.after_norm")


_TRAIN_YAML = """\
encoder: conformer
encoder_conf:
  activation_type: swish
  attention_heads: 8
  causal: true
  cnn_module_kernel: 15
  cnn_module_norm: layer_norm
  input_layer: conv2d
  linear_units: 2048
  normalize_before: true
  num_blocks: 12
  output_size: 512
  pos_enc_layer_type: rel_pos
  selfattention_layer_type: rel_selfattn
  use_cnn_module: true
  use_dynamic_chunk: true
input_dim: 80
is_json_cmvn: true
dataset_conf:
  fbank_conf: {num_mel_bins: 80, frame_length: 25, frame_shift: 10, dither: 1.0}
"""
