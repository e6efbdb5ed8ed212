"""Amphion's models for singing voice conversion, in the folders that it writes.

    args.json                                  what tensors do not say: the mel, how f0 was tracked, schedules
    singers.json                               "<data set>_<singer>" -> row
    checkpoint/epoch-.../pytorch_model.bin     `0.` the condition encoder, `1.` what maps it; of VITS without numbers
    **/mel_min.npy, mel_max.npy                the range of each band, by which log-mels were scaled
    **/<data set>/pitches/statistics.json      where each singer sings, if it is there

Models were trained on f0 that comes too early: Praat's first frame lies half a window into the recording and was put on
the first frame of the mel. `f0_early_s` of the Config says by how much, so that they are given what they have learnt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

import featstore as fs
from featstore.errors import BadRequest, CannotLoad
from featstore_extractors import RequestError, parse
from featstore_extractors.signal import LogMel

from . import find, published
from .published import Facts, Fields, Layout, Tensors, contract
from .run import ANY, Read
from .singers import Singer

__all__ = ["ASKS", "LAYOUTS", "Beside", "beside", "refusal"]

ASKS = ("f0", "data")  # what may be said of an import, and is no field of a Config
CONTENT = ("whisper", "contentvec", "mert", "wenet")  # in the order of Amphion's terms
# Of what makes its content features: frames per second, centre of the first, settings.
ENCODERS: dict[str, tuple[Fraction, Fraction, dict[str, Any]]] = {
    "whisper": (Fraction(50), Fraction(0), {"context": "30s"}),
    "contentvec": (Fraction(50), Fraction(200, 16000), {"layer": 12, "projection": True}),
    "wenet": (Fraction(25), Fraction(680, 16000), {}),
}
TRACKERS = {"parselmouth": "f0:praat,threshold=0.6", "dio": "f0:dio", "pyin": "f0:pyin"}
PRAAT_MIDDLE_S = 0.0327  # of the first frame: half the window of 60 ms, and up to half a hop for what is left over
STACK = r"(diff_encoder\.out\.\d|neural_network\.(input\.0|out_proj\.[02]|residual_blocks\.\d+\.(gau\.(conv|" \
        r"context_proj)|out_proj)))\.(weight|bias)"
RELATIVE = r"(attn_layers\.\d+\.(emb_rel_[kv]|conv_[qkvo]\.(weight|bias))|norm_layers_[12]\.\d+\.(gamma|beta)|" \
           r"ffn_layers\.\d+\.conv_[12]\.(weight|bias))"
MAPPER = rf"(conformer_encoder\.{RELATIVE}|projection\.(weight|bias))"
HEARD = r"((whisper|contentvec|wenet|mert)_encoder\.nn\.(weight|bias)|melody_encoder\.(nn|uv_embedding)\.weight|" \
        r"loudness_encoder\.(energy_bins|nn\.weight)|singer_encoder\.nn\.weight)"


@dataclass(frozen=True)
class Beside:
    """What stands beside the weights. `low`, `high`: log-mel (n_mels,) that became -1 and 1, or None."""

    low: np.ndarray | None
    high: np.ndarray | None
    singers: Mapping[str, Singer]
    reads: Mapping[str, tuple[Read, ...]]
    remarks: tuple[str, ...]


def refusal(tensors: Tensors, settings: Mapping[str, Any]) -> str:
    """Why weights of Amphion's that we know are not taken; "" for all others."""
    facts = Facts(tensors, settings)
    home = "condition_encoder" if facts.has("condition_encoder") else "0"
    if not any(facts.has(f"{home}.{term}_encoder") for term in (*CONTENT, "melody", "loudness", "singer")):
        return ""
    if any(name.startswith(f"{home}.") and "conformer" in name for name in tensors):
        return "use_conformer_for_content_features: torchaudio's conformer is not built here"
    if facts.has(f"{home}.mert_encoder"):
        return "it hears MERT, for which there is no extractor here"
    if facts.has(f"{home}.melody_encoder") and not facts.has(f"{home}.melody_encoder.uv_embedding"):
        return "use_uv is false: a melody without its voicing is not built here"
    kind = _part(facts, "diffusion").get("model_type", "bidilconv")
    if kind != "bidilconv":
        return f"model_type of its diffusion is {kind}; bidilconv alone is built here"
    return ""


# --- what tensors and args.json say


def _part(facts: Facts, *names: str) -> dict[str, Any]:
    """A part of the settings of the model."""
    found: Any = facts.given.get("model")
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def _condition(facts: Facts, home: str) -> Fields:
    """What the condition encoder hears, and how early."""
    told = _part(facts, "condition_encoder")
    terms = [name for name in (*CONTENT, "melody", "loudness", "singer") if facts.has(f"{home}.{name}_encoder.nn")]
    content = [name for name in terms if name in CONTENT]
    shapes = {name: facts.shape(f"{home}.{name}_encoder.nn") for name in terms}
    widths = {shapes[name][0 if name in content else 1] for name in terms}
    if len(widths) != 1:
        facts.wrong.append(f"the terms of the condition have widths {sorted(widths)}, here they have one")
    for name in ("melody", "loudness"):
        if name in terms and shapes[name][0] != 256:
            facts.wrong.append(f"n_bins_{name} is {shapes[name][0]}, 256 is built here")
    merge = {"add": "sum", "concat": "concat"}.get(told.get("merge_mode", "add"))
    if merge is None:
        facts.wrong.append(f"merge_mode is {told['merge_mode']}, add and concat are built here")
    rate, hop = facts.said("sample_rate"), facts.said("hop_size")
    half = hop / rate / 2 if rate and hop else 0.0  # where the mel's first frame is centred
    first = PRAAT_MIDDLE_S if _tracker(facts.settings) == "parselmouth" else 0.0
    return {"content": tuple((name, shapes[name][1]) for name in content), "width": widths.pop(), "merge": merge,
            "melody": "coarse" if "melody" in terms else "none",
            "loudness": "coarse" if "loudness" in terms else "none",
            "speaker": "one-hot" if "singer" in terms else "none",
            "singers": shapes["singer"][0] if "singer" in terms else 1,
            "f0_early_s": round(first - half, 5) if "melody" in terms else 0.0,
            "f0_min": float(facts.said("f0_min") or told.get("f0_min") or 50),
            "f0_max": float(facts.said("f0_max") or told.get("f0_max") or 1100)}


def _tracker(preprocess: Mapping[str, Any]) -> str:
    return str(preprocess.get("pitch_extractor") or "parselmouth")


def _stack(facts: Facts, home: str) -> Fields:
    """The network that finds noise."""
    told, net = _part(facts, "diffusion", "bidilconv"), f"{home}.neural_network"
    channels, _, kernel = facts.shape(f"{net}.residual_blocks.0.gau.conv")
    hidden, dim = facts.shape(f"{home}.diff_encoder.out.0")
    return {"channels": channels // 2, "kernel": kernel, "dilation_cycle": told.get("dilation_cycle_length"),
            "layers": facts.count(_below(f"{net}.residual_blocks")), "step_dim": dim, "step_hidden": hidden}


def _below(module: str) -> str:
    """The pattern of what is numbered below a module."""
    return module.replace(".", r"\.") + r"\.(\d+)\."


def _relative(facts: Facts, home: str) -> Fields:
    """The transformer with relative positions."""
    hidden, width, kernel = facts.shape(f"{home}.ffn_layers.0.conv_1")
    near, size = facts.tensors[f"{home}.attn_layers.0.emb_rel_k"].shape[1:]
    if near != 9:
        facts.wrong.append(f"attention knows {near} distances, 9 are built here")
    return {"hidden": hidden, "kernel": kernel, "heads": width // size,
            "layers": facts.count(_below(f"{home}.attn_layers"))}


def _diffwavenet(facts: Facts) -> Fields:
    told = _part(facts, "diffusion", "scheduler_settings")
    shape = told.get("beta_schedule", "linear")
    if shape != "linear":
        facts.wrong.append(f"beta_schedule is {shape}, linear is built here of Amphion's")
    bands = facts.shape("1.neural_network.input.0")[1]
    return contract(facts, bands) | _condition(facts, "0") | _stack(facts, "1") | {
        "noise_steps": told.get("num_train_timesteps"), "first_beta": told.get("beta_start"),
        "last_beta": told.get("beta_end")}


def _transformer(facts: Facts) -> Fields:
    heard = _condition(facts, "0")
    if facts.has("1.conformer_encoder"):
        return contract(facts, facts.shape("1.projection")[0]) | heard | _relative(facts, "1.conformer_encoder")
    layers = "1.transformer_encoder.layers"
    return contract(facts, facts.shape("1.output_mlp")[0]) | heard | {
        "variant": "plain-unmasked", "hidden": facts.shape(f"{layers}.0.linear1")[0],
        "heads": _part(facts, "transformer").get("n_heads"), "layers": facts.count(_below(layers))}


def _como(facts: Facts) -> Fields:
    told, student = _part(facts, "comosvc"), facts.has("1.decoder.denoise_fn_ema")
    encoder, net = _relative(facts, "1.encoder.conformer_encoder"), _stack(facts, "1.decoder.denoise_fn")
    if encoder["kernel"] != net["kernel"]:
        facts.wrong.append(f"kernels are {encoder['kernel']} and {net['kernel']}, here they are one")
    levels = told.get("n_timesteps")
    return contract(facts, facts.shape("1.encoder.projection")[0]) | _condition(facts, "0") | encoder | net | {
        "encoder_layers": encoder["layers"], "stage": "student" if student else "teacher",
        "sigma_data": told.get("sigma_data"), "sigma_min": told.get("sigma_min"),
        "sigma_max": _number(told.get("sigma_max")), "rho": _number(told.get("rho")), "sigma_mean": told.get("P_mean"),
        "sigma_spread": told.get("P_std"), "levels": levels,
        "sampling_steps": 1 if student else levels and levels + 1}  # where Amphion counts from 0


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value


def _vits(facts: Facts) -> Fields:
    latent = facts.shape("enc_p.proj")[0] // 2
    prior = _relative(facts, "enc_p.enc_")
    spoken = {name.removeprefix("dec."): tensor for name, tensor in facts.tensors.items() if name.startswith("dec.")}
    fitting = [layout for layout in published.LAYOUTS if layout.amphion and not any(layout.misfit(spoken))]
    if not fitting:
        raise CannotLoad("its generator (dec.) is none of HiFi-GAN, NSF-HiFiGAN, BigVGAN, MelGAN, APNet")
    layout, known = fitting[0], _part(facts, "generator_config", fitting[0].amphion)
    inner = Facts(spoken, {"preprocess": dict(facts.given.get("preprocess", {})) | {"n_mel": latent},
                           "model": {layout.amphion: known}}, layout.amphion)
    inner.wrong = facts.wrong
    fields = layout.build(inner)
    if layout.check:
        layout.check(inner, None)
    mel = contract(facts, facts.said("n_mel") or 100)
    voice = facts.shape("emb_g")[1] if facts.has("emb_g") else 1
    return mel | _condition(facts, "condition_encoder") | {
        "latent": latent, "hidden": prior["hidden"], "heads": prior["heads"], "prior_layers": prior["layers"],
        "kernel": prior["kernel"], "posterior_layers": facts.count(r"enc_q\.enc\.in_layers\.(\d+)\."),
        "flow_layers": facts.count(r"flow\.flows\.0\.enc\.in_layers\.(\d+)\."),
        "flows": facts.count(r"flow\.flows\.(\d+)\.") // 2 + 1, "speaker_width": voice, "generator": layout.model,
        "generator_preset": next(iter(find(layout.model).Config.PRESETS)),
        "generator_fields": tuple((name, value) for name, value in fields.items() if name not in mel)}


def _numbered(name: str) -> str | None:
    """`0.` and `1.` by their names here; tables of positions are constants."""
    if name.endswith("pos_encoder.pe"):
        return None
    part, _, rest = name.partition(".")
    return {"0": "condition_encoder", "1": "acoustic_mapper"}[part] + f".{rest}"


def _vits_name(name: str) -> str | None:
    if name.startswith("enc_p.f0_emb."):  # which nothing reads
        return None
    if name.startswith("dec."):
        inner = published.generator_name(name.removeprefix("dec."))
        return None if inner is None else f"dec.{inner}"
    return name.replace("emb_g.weight", "emb_g.nn.weight")


LICENCE = ("Amphion publishes the weights of vocalist_l1_contentvec+whisper on the hub "
           "(amphion/singing_voice_conversion) under the MIT licence, which covers the weights and not the voices of "
           "those they are named after; of others, ask who trained them.")
COUPLING = r"(in_layers\.\d+|res_skip_layers\.\d+|cond_layer)" + published.PART

LAYOUTS: tuple[Layout, ...] = (
    Layout("DiffWaveNetSVC", "Amphion's", "diffwavenet_svc", "args.json",
           ("1.diff_encoder.out.0", "1.neural_network.residual_blocks.0"), rf"0\.{HEARD}|1\.{STACK}", _diffwavenet,
           LICENCE, _numbered, acoustic=True),
    Layout("TransformerSVC", "Amphion's", "transformer_svc", "args.json",
           ("1.conformer_encoder.attn_layers.0", "1.projection"), rf"0\.{HEARD}|1\.{MAPPER}", _transformer, LICENCE,
           _numbered, acoustic=True),
    Layout("TransformerSVC (torch's encoder)", "Amphion's", "transformer_svc", "args.json",
           ("1.transformer_encoder.layers.0", "1.output_mlp"),
           rf"0\.{HEARD}|1\.(pos_encoder\.pe|output_mlp\.(weight|bias)|transformer_encoder\.layers\.\d+\.(self_attn\."
           r"(in_proj_weight|in_proj_bias|out_proj\.(weight|bias))|(linear|norm)[12]\.(weight|bias)))", _transformer,
           LICENCE, _numbered, acoustic=True),
    Layout("DiffComoSVC", "Amphion's", "como_svc", "args.json",
           ("1.encoder.conformer_encoder.attn_layers.0", "1.decoder.denoise_fn.neural_network"),
           rf"0\.{HEARD}|1\.(encoder\.{MAPPER}|decoder\.denoise_fn(_ema|_pretrained)?\.{STACK})", _como, LICENCE,
           _numbered, acoustic=True),
    Layout("VitsSVC", "Amphion's", "vits_svc", "args.json",
           ("condition_encoder", "enc_p.enc_", "enc_q.enc", "flow.flows.0", "dec"),
           rf"condition_encoder\.{HEARD}|emb_g\.weight|enc_p\.(f0_emb\.weight|proj\.(weight|bias)|enc_\.{RELATIVE})|"
           rf"enc_q\.((pre|proj)\.(weight|bias)|enc\.{COUPLING})|flow\.flows\.\d+\.((pre|post)\.(weight|bias)|enc\."
           rf"{COUPLING})|dec\..*", _vits, LICENCE, _vits_name, acoustic=True),
)


# --- what stands beside


def beside(root: Path, settings: Mapping[str, Any], config: Any, gives: str, said: Mapping[str, str]) -> Beside:
    """What the folder `root` of an experiment has beside its weights, for a model that `gives` a log-mel or a wave.

    said: "f0", a request for another tracker; "data", the data set whose range of mels is taken.

    Raises:
        BadRequest: the range of mels is not there, or there are several.
    """
    preprocess = settings.get("preprocess", {})
    low, high, remarks = _range(root, preprocess, config, gives, said.get("data", ""))
    known = _singers(root, config)
    if config.melody != "none":
        tracked = "" if "f0" in said else f", which {_tracker(preprocess)} tracked"
        remarks.append(f"f0 is given {1000 * config.f0_early_s:+.1f} ms early, as these weights have learnt "
                       f"it{tracked}; --set f0=f0:swift takes another tracker")
    if config.speaker == "one-hot" and not known:
        remarks.append("no singers.json: nobody can be named; write one into the run (name, row)")
    if known and not any(singer.median_hz for singer in known.values()):
        remarks.append("no statistics.json: where its singers sing is not known, and --key auto keeps a song's key")
    several = settings.get("dataset") or ()
    if isinstance(several, list) and len(several) > 1 and config.speaker == "one-hot":
        remarks.append(f"trained on {len(several)} data sets, in each of which Amphion counts singers from 0: several "
                       "may share a row")
    model = preprocess.get("whisper_model", "medium")
    if "whisper" in dict(config.content) and model != "medium":
        remarks.append(f"its whisper is {model}: convert with --weights whisper=openai/whisper-{model}")
    return Beside(low, high, known, _reads(config, preprocess, said.get("f0", "")), tuple(remarks))


def _range(root: Path, preprocess: Mapping[str, Any], config: Any, gives: str, data: str
           ) -> tuple[np.ndarray | None, np.ndarray | None, list[str]]:
    """What became -1 and 1 of each band, and what there is to say of it."""
    if gives == "wave":
        return None, None, []
    if not preprocess.get("use_min_max_norm_mel", True):
        one = np.ones(config.n_mels, np.float32)
        return -one, one, []
    found = sorted(root.rglob("mel_min.npy"))
    named = [path for path in found if data in path.parts] if data else found
    if len(named) != 1:
        there = ", ".join(str(path.parent.relative_to(root)) for path in found) or "none"
        way = "Say whose: --set data=NAME" if found else "Put mel_min_max_stats/ of the target's data set there"
        raise BadRequest(f"{root}: expected one folder with mel_min.npy and mel_max.npy, by which log-mels were "
                         f"scaled; found {there}. {way}")
    low, high = (_array(named[0].with_name(f"mel_{end}.npy"), config.n_mels) for end in ("min", "max"))
    if not bool((high > low).all()):
        raise BadRequest(f"{named[0].parent}: mel_max is not above mel_min in every band")
    more = [f"log-mels are scaled as those of {named[0].parent.parent.name}"] if data else []
    return low, high, more


def _array(path: Path, bands: int) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CannotLoad(f"{path} cannot be read ({error}): get it again") from error
    if found.shape != (bands,) or not np.isfinite(found).all():
        raise CannotLoad(f"{path} has shape {found.shape}: expected ({bands},), a finite number a band")
    return np.asarray(found, np.float32)


def _singers(root: Path, config: Any) -> dict[str, Singer]:
    """Singers by their names, with the median of f0 where a statistics.json has it."""
    if config.speaker != "one-hot":
        return {}
    medians = {}
    for path in sorted(root.rglob("statistics.json")):
        for name, told in _json(path).items():
            voiced = told.get("voiced_positions") if isinstance(told, dict) else None
            median = voiced.get("median") if isinstance(voiced, dict) else None
            if isinstance(median, int | float) and math.isfinite(median) and median > 0:
                medians[name] = float(median)
    file = root / "singers.json"
    rows = {name: row for name, row in (_json(file).items() if file.exists() else ())
            if isinstance(row, int) and 0 <= row < config.singers}
    return {name: Singer(row, medians.get(name), None, None, 0)
            for name, row in sorted(rows.items(), key=lambda item: item[1])}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CannotLoad(f"{path} cannot be read ({error}): get it again") from error
    if not isinstance(found, dict):
        raise CannotLoad(f"{path} holds a {type(found).__name__}, expected names")
    return found


def _reads(config: Any, preprocess: Mapping[str, Any], f0: str) -> dict[str, tuple[Read, ...]]:
    """What the model was trained on, as far as anybody knows: not which bytes its encoders' weights were."""
    made = {name: Read(name, _encoder(name, dim, preprocess)) for name, dim in config.content}
    made["log-mel"] = Read("log-mel", fs.Spec.of(LogMel(**vars(config.contract))))
    if config.melody != "none":
        low, high = config.f0_min, config.f0_max
        plain = f"{TRACKERS.get(_tracker(preprocess), 'f0:praat')},floor_hz={low:g},ceiling_hz={high:g}"
        made["f0"] = Read("f0", _spec(f0 or plain))
    if config.loudness != "none":
        grid = f"sample_rate={config.sample_rate}"
        mel = ",".join(f"{name}={value}" for name, value in vars(config.contract).items())
        stft = f"energy:stft,{grid},hop={config.hop_length},width={config.win_length}"
        from_wave = preprocess.get("energy_extract_mode", "from_mel") != "from_mel"
        made["energy"] = Read("energy", _spec(stft if from_wave else f"energy:mel,{mel}"))
    return {role: (read,) for role, read in made.items()}


def _spec(request: str) -> fs.Spec:
    try:
        return fs.Spec.of(next(iter(parse(request).values())))
    except (RequestError, ImportError) as error:
        raise BadRequest(str(error)) from error


def _encoder(name: str, dim: int, preprocess: Mapping[str, Any]) -> fs.Spec:
    rate, centre_s, settings = ENCODERS[name]
    if name == "wenet":
        step = int(preprocess.get("wenet_downsample_rate") or 4)
        rate = Fraction(100, step)
        centre_s = {4: centre_s, 6: Fraction(1000, 16000)}.get(step, centre_s)
    return fs.Spec(made_by=name, version=1, kind="continuous", frame_rate=rate, sample_rate=16000, centre_s=centre_s,
                   dim=dim, dtype="float16", settings={"weights": ANY, **settings})
