"""Small random checkpoints in the layouts of the programs that write them; no network, a second each."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def speech_model(family: str = "hubert", *, large: bool = False, seed: int = 0, **config: Any) -> Any:
    """A small model of transformers in eval mode: family hubert, wav2vec2 or wavlm, in the base or the large style.

    Weights of such sizes that every layer, norm and bias changes the result.
    """
    import torch

    from featstore_extractors.imports import without_broken_torchaudio

    without_broken_torchaudio()
    import transformers

    names = {"hubert": "Hubert", "wav2vec2": "Wav2Vec2", "wavlm": "WavLM"}
    style = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True} if large else {}
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
             "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    model = getattr(transformers, f"{names[family]}Model")(
        getattr(transformers, f"{names[family]}Config")(**small | style | config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("original0"):  # lengths of the positional convolution's taps
                value.copy_(0.5 + 0.1 * noise.abs())
            elif value.dim() > 1 and "rel_" not in name:
                value.copy_(noise * (1.5 / value[0].numel() ** 0.5))
            else:
                value.copy_(("norm.weight" in name or "const" in name) + 0.2 * noise)
    return model


def hubert_folder(folder: Path, *, family: str = "hubert", large: bool = False, seed: int = 0, projection: int = 0,
                  normalise: bool | None = None, prefix: str = "", old_names: bool = False, file: str = "safetensors",
                  drop: str = "", extra: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """A folder as `save_pretrained` writes it, with the weights of `speech_model`.

    projection: channels of a `final_proj`, 0 for none. normalise: `do_normalize` of preprocessor_config.json, None for
    no such file. prefix: "hubert." and the like, of models with a head. old_names: of weight norm before torch 2.1.
    file: safetensors, bin, or sharded (safetensors in two). drop: leave out tensors with this in their names.
    """
    import torch
    from safetensors.torch import save_file

    model = speech_model(family, large=large, seed=seed, **config)
    tensors = {prefix + name: value.detach().clone() for name, value in model.state_dict().items()}
    if projection:
        tensors |= {prefix + name: value for name, value in _projection(model, projection, seed).items()}
    tensors |= extra or {}
    if old_names:
        ends = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        tensors = {next((name.removesuffix(new) + old for new, old in ends.items() if name.endswith(new)), name): value
                   for name, value in tensors.items()}
    tensors = {name: value for name, value in tensors.items() if not drop or drop not in name}
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    if normalise is not None:
        processing = {"do_normalize": normalise, "sampling_rate": 16000}
        (folder / "preprocessor_config.json").write_text(json.dumps(processing))
    if file == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif file == "sharded":
        shards = {f"model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
        for shard, names in shards.items():
            save_file({name: tensors[name] for name in names}, folder / shard)
        index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def fairseq_pt(folder: Path, *, family: str = "hubert", large: bool = False, seed: int = 0, projection: int = 0,
               normalise: bool = False, settings: str = "cfg", **config: Any) -> Path:
    """A checkpoint file with the weights of `speech_model` as fairseq writes it; for wavlm as its authors do.

    settings: where the file tells how it was made: cfg, args (before 2021), or "" for nowhere: sizes are all there is.
    """
    import torch

    model = speech_model(family, large=large, seed=seed, **config)
    tensors = {_fairseq_name(name, large): value.detach().clone() for name, value in model.state_dict().items()}
    tensors |= _projection(model, projection, seed) if projection else {}
    told = model.config
    layers = [f"[({width},{kernel},{stride})]" for width, kernel, stride
              in zip(told.conv_dim, told.conv_kernel, told.conv_stride, strict=True)]
    cfg = {"_name": family, "encoder_attention_heads": told.num_attention_heads, "activation_fn": "gelu",
           "layer_norm_first": large, "conv_feature_layers": " + ".join(layers)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.pt"
    if family == "wavlm":
        cfg |= {"normalize": normalise, "max_distance": told.max_bucket_distance}
        torch.save({"cfg": cfg, "model": tensors}, path)
    else:
        whole = {"_name": None, "model": cfg, "task": {"_name": f"{family}_pretraining", "normalize": normalise}}
        args = argparse.Namespace(**cfg, normalize=normalise, arch=f"{family}_base")
        torch.save({"args": args if settings == "args" else None, "cfg": whole if settings == "cfg" else None,
                    "model": tensors, "task_state": {}}, path)
    return path


def _projection(model: Any, channels: int, seed: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    width = model.config.hidden_size
    return {"final_proj.weight": torch.randn(channels, width, generator=generator) / width**0.5,
            "final_proj.bias": torch.randn(channels, generator=generator)}


def _fairseq_name(name: str, large: bool) -> str:
    """What fairseq calls a tensor of transformers' model."""
    if name == "masked_spec_embed":
        return "mask_emb"
    part, _, rest = name.partition(".")
    if part == "feature_projection":
        return rest.replace("projection.", "post_extract_proj.")
    if part == "feature_extractor":
        _, number, kind, end = rest.split(".")
        within = "0" if kind == "conv" else "2.1" if large else "2"
        return f"feature_extractor.conv_layers.{number}.{within}.{end}"
    for new, old in ((".pos_conv_embed.conv.parametrizations.weight.original0", ".pos_conv.0.weight_g"),
                     (".pos_conv_embed.conv.parametrizations.weight.original1", ".pos_conv.0.weight_v"),
                     (".pos_conv_embed.conv.bias", ".pos_conv.0.bias"), ("gru_rel_pos_linear", "grep_linear"),
                     ("gru_rel_pos_const", "grep_a"), ("rel_attn_embed", "relative_attention_bias"),
                     ("feed_forward.intermediate_dense", "fc1"), ("feed_forward.output_dense", "fc2"),
                     (".attention.", ".self_attn.")):
        name = name.replace(new, old)
    words = name.split(".")
    return ".".join(words[:3] + ["self_attn_layer_norm" if w == "layer_norm" else w for w in words[3:]])


def whisper_folder(folder: Path, *, dim: int = 32, layers: int = 2, heads: int = 4, mels: int = 80, seed: int = 0,
                   half: bool = False, shard: str = "1GB") -> Path:
    """A Whisper of random weights as transformers saves it, decoder and all; `half`: float16, as large-v3 comes."""
    model = _whisper(dim, layers, heads, mels, seed)
    (model.half() if half else model).save_pretrained(folder, max_shard_size=shard)
    return folder


def whisper_pt(folder: Path, *, dim: int = 32, layers: int = 2, heads: int = 4, mels: int = 80, seed: int = 0) -> Path:
    """The Whisper of `whisper_folder` as OpenAI's program saves it: {dims, model_state_dict}."""
    import torch

    names = {"self_attn_layer_norm": "attn_ln", "final_layer_norm": "mlp_ln", "fc1": "mlp.0", "fc2": "mlp.2",
             "self_attn.q_proj": "attn.query", "self_attn.k_proj": "attn.key", "self_attn.v_proj": "attn.value",
             "self_attn.out_proj": "attn.out", "embed_positions.weight": "positional_embedding", "layers": "blocks",
             "encoder.layer_norm": "encoder.ln_post"}
    tensors = {}
    for name, tensor in _whisper(dim, layers, heads, mels, seed).model.state_dict().items():
        if name.startswith("encoder."):
            for theirs, openai in names.items():
                name = name.replace(theirs, openai)
            tensors[name] = tensor
    tensors["decoder.token_embedding.weight"] = torch.zeros(60, dim)
    dims = {"n_mels": mels, "n_audio_ctx": 1500, "n_audio_state": dim, "n_audio_head": heads, "n_audio_layer": layers,
            "n_vocab": 60, "n_text_ctx": 8, "n_text_state": dim, "n_text_head": heads, "n_text_layer": 1}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"dims": dims, "model_state_dict": tensors}, folder / "whisper.pt")
    return folder / "whisper.pt"


def _whisper(dim: int, layers: int, heads: int, mels: int, seed: int) -> Any:
    """Whisper whose encoder has random numbers everywhere, in norms and biases too, of a size that leaves a trace."""
    import torch

    from featstore_extractors.imports import without_broken_torchaudio

    without_broken_torchaudio()
    import transformers

    config = transformers.WhisperConfig(
        d_model=dim, encoder_layers=layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * dim, num_mel_bins=mels,
        decoder_layers=1, decoder_attention_heads=heads, decoder_ffn_dim=dim, max_target_positions=8, vocab_size=60,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.WhisperForConditionalGeneration(config).eval()
    random = torch.Generator().manual_seed(seed)
    for name, numbers in model.model.encoder.named_parameters():
        if name != "embed_positions.weight":
            centre = 1.0 if "norm.weight" in name else 0.0
            spread = numbers[0].numel() ** -0.5 if numbers.dim() > 1 else 0.1
            numbers.data.normal_(centre, spread, generator=random)
    return model


def wenet_folder(folder: Path, *, style: str = "old", statistics: str = "weights", layers: int = 2, dim: int = 32,
                 mels: int = 80, kernel: int = 7, relative: bool = True, seed: int = 0, **conf: Any) -> Path:
    """`folder` with final.pt, train.yaml and global_cmvn of a small conformer with 4 heads, as WeNet writes them.

    style: of the yaml, "old" (until 2023) or "new"; statistics: in the "weights" (and beside them), or only beside them
    as "json" or "kaldi" text; relative: whether attention has weights for positions; conf: fields of encoder_conf.
    """
    import torch
    import yaml

    conf = {"output_size": dim, "attention_heads": 4, "linear_units": 48, "num_blocks": layers, "dropout_rate": 0.1,
            "input_layer": "conv2d", "normalize_before": True, "cnn_module_kernel": kernel, "causal": True,
            "activation_type": "swish", "pos_enc_layer_type": "rel_pos", "selfattention_layer_type": "rel_selfattn",
            "cnn_module_norm": "layer_norm", "use_dynamic_chunk": True} | conf
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in _wenet_shapes(conf, mels, relative).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1 and "pos_bias" not in name:
            tensors[name] = noise * (1.5 / noise[0].numel() ** 0.5)
        else:
            tensors[name] = 0.2 * noise + ("norm" in name and name.endswith("weight"))
        if name.endswith("running_var"):
            tensors[name] = 0.5 + noise.abs()
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(7)
    mean, spread = 9 + torch.randn(mels, generator=generator), 3 + torch.rand(mels, generator=generator)
    if statistics == "weights":
        tensors |= {"encoder.global_cmvn.mean": mean, "encoder.global_cmvn.istd": 1 / spread}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "final.pt")
    count = 1000
    sums, squares = (count * mean).tolist(), (count * (mean**2 + spread**2)).tolist()
    record = {"mean_stat": sums, "var_stat": squares, "frame_num": count}
    (folder / "global_cmvn").write_text(json.dumps(record) if statistics != "kaldi" else
                                        f" [\n  {' '.join(map(str, sums))} {count} \n  "
                                        f"{' '.join(map(str, squares))} 0 ]\n")
    said = {"cmvn_file": "/export/exp/u2pp/global_cmvn", "is_json_cmvn": statistics != "kaldi"}
    fbank = {"num_mel_bins": mels, "frame_length": 25, "frame_shift": 10, "dither": 1.0}
    (folder / "train.yaml").write_text(yaml.safe_dump({
        "encoder": "conformer", "encoder_conf": conf, "input_dim": mels, "output_dim": 20,
        "dataset_conf": {"fbank_conf": fbank, "resample_conf": {"resample_rate": 16000}, "speed_perturb": True},
        **(said if style == "old" else {"cmvn": "global_cmvn", "cmvn_conf": said, "model": "asr_model"})}))
    return folder


def _wenet_shapes(conf: Mapping[str, Any], mels: int, relative: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of a recogniser by WeNet's names: the encoder's, and some that an encoder has no use for."""
    dim, units, kernel, heads = (conf[name] for name in ("output_size", "linear_units", "cnn_module_kernel",
                                                         "attention_heads"))
    strides = {"conv2d": [(3, 2)] * 2, "conv2d6": [(3, 2), (5, 3)], "conv2d8": [(3, 2)] * 3}[conf["input_layer"]]
    shapes: dict[str, tuple[int, ...]] = {"decoder.embed.0.weight": (20, dim), "ctc.ctc_lo.bias": (20,),
                                          "encoder.embed.pos_enc.pe": (1, 50, dim)}
    height, channels = mels, 1
    for n, (width, stride) in enumerate(strides):
        shapes |= {f"encoder.embed.conv.{2 * n}.weight": (dim, channels, width, width),
                   f"encoder.embed.conv.{2 * n}.bias": (dim,)}
        height, channels = (height - width) // stride + 1, dim
    linear = "encoder.embed.out.0" if conf["input_layer"] == "conv2d" else "encoder.embed.linear"
    shapes |= {f"{linear}.weight": (dim, dim * height), f"{linear}.bias": (dim,)}
    block: dict[str, tuple[int, ...]] = {"concat_linear.weight": (dim, 2 * dim), "concat_linear.bias": (dim,)}
    for name in ("linear_q", "linear_k", "linear_v", "linear_out"):
        block |= {f"self_attn.{name}.weight": (dim, dim), f"self_attn.{name}.bias": (dim,)}
    if relative:
        block |= {"self_attn.linear_pos.weight": (dim, dim), "self_attn.pos_bias_u": (heads, dim // heads),
                  "self_attn.pos_bias_v": (heads, dim // heads)}
    macaron = conf.get("macaron_style", True)
    for name in ("feed_forward", "feed_forward_macaron")[: 1 + macaron]:
        block |= {f"{name}.w_1.weight": (units, dim), f"{name}.w_1.bias": (units,),
                  f"{name}.w_2.weight": (dim, units), f"{name}.w_2.bias": (dim,)}
    for name, shape in (("pointwise_conv1", (2 * dim, dim, 1)), ("depthwise_conv", (dim, 1, kernel)),
                        ("pointwise_conv2", (dim, dim, 1))):
        block |= {f"conv_module.{name}.weight": shape, f"conv_module.{name}.bias": shape[:1]}
    norms = ["conv_module.norm", "norm_ff", "norm_mha", "norm_conv", "norm_final", *["norm_ff_macaron"][:macaron]]
    block |= {f"{name}.{part}": (dim,) for name in norms for part in ("weight", "bias")}
    if conf["cnn_module_norm"] == "batch_norm":
        block |= {"conv_module.norm.running_mean": (dim,), "conv_module.norm.running_var": (dim,),
                  "conv_module.norm.num_batches_tracked": ()}
    for n in range(conf["num_blocks"]):
        shapes |= {f"encoder.encoders.{n}.{name}": shape for name, shape in block.items()}
    return shapes | {"encoder.after_norm.weight": (dim,), "encoder.after_norm.bias": (dim,)}
