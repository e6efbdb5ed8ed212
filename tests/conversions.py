"""Runs of acoustic models and vocoders that were never trained, small enough for a test, on real mels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import featstore as fs
from featstore_extractors import parse
from featstore_zoo import find, run

HEARD: dict[str, dict[str, Any]] = {  # as small as the smoke presets, with a content feature of another frame rate
    "diffwavenet_svc": {"channels": 16, "layers": 5, "step_dim": 16, "step_hidden": 24, "sampling_steps": 3},
    "transformer_svc": {"layers": 2, "hidden": 16},
    "como_svc": {"encoder_layers": 2, "hidden": 16, "channels": 16, "layers": 4, "step_dim": 16, "step_hidden": 24,
                 "sampling_steps": 3},
    "vits_svc": find("vits_svc").Config.PRESETS["smoke"],
}
SINGERS = {"alice": {"row": 0, "median_hz": 262.0, "low_hz": 180.0, "high_hz": 420.0, "utterances": 12},
           "bob": {"row": 1, "median_hz": 110.0, "low_hz": 80.0, "high_hz": 200.0, "utterances": 3},
           "carla": {"row": 2, "median_hz": None, "low_hz": None, "high_hz": None, "utterances": 1}}
REQUESTS = {"mel22": "mel22=log-mel:22k-80", "f0": "f0:dio", "loudness": "loudness", "speaker": "speaker",
            "log-mel": "log-mel"}


def read(role: str) -> run.Read:
    ((name, extractor),) = parse(REQUESTS[role]).items()
    return run.Read(name, fs.Spec.of(extractor))


def acoustic(path: Path, name: str = "diffwavenet_svc", **changes: Any) -> Path:
    """A run of an acoustic model with seeded weights."""
    package = find(name)
    fields = {"content": (("mel22", 80),), "width": 16, "singers": 4, "speaker_dim": 256} | HEARD[name] | changes
    config = package.Config(**fields)
    roles = ["log-mel", *(key for key in config.reads if key != "singer")]
    settings = run.Settings(name, config, config.contract, {role: (read(role),) for role in roles})
    run.create(path, settings)
    torch.manual_seed(0)
    model = package.Model(config)
    with torch.no_grad():  # a denoiser that has learnt nothing finds no noise, whatever it hears
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(0, 0.1)
    run.save(path, settings, model.state_dict(), 0)
    told = SINGERS
    if config.speaker == "embedding":
        told = {who: one | {"embedding": [0.1 * one["row"]] * config.speaker_dim} for who, one in SINGERS.items()}
    (path / "singers.json").write_text(json.dumps(told))
    return path


def vocoder(path: Path, **changes: Any) -> Path:
    """A run of a small NSF-HiFiGAN with seeded weights."""
    package = find("nsf_hifigan")
    config = package.Config(**(package.Config.PRESETS["smoke"] | changes))
    mel = fs.Spec.of(parse("log-mel")["log-mel"]) if not changes else None
    reads = {"f0": (read("f0"),)} | ({"log-mel": (run.Read("log-mel", mel),)} if mel else {})
    settings = run.Settings("nsf_hifigan", config, config.contract, reads)
    run.create(path, settings)
    torch.manual_seed(0)
    model = package.Model(config)
    with torch.no_grad():  # an offset is all that is heard of a network before it has learnt anything
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
        last = model.conv_post.parametrizations.weight.original1
        last -= last.mean(2, keepdim=True)
    run.save(path, settings, model.state_dict(), 0)
    return path
