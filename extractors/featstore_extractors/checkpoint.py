"""Tensors out of checkpoints, safetensors or torch's own, without running what a pickle would run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .imports import required
from .weights import tensor_files


class Inert:
    """Stands for a class that a checkpoint names and we do not need: takes any state, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


STUBS = ("fairseq.data.dictionary.Dictionary",)


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds: {name: tensor} of a folder, a safetensors file or a state dict, else the outer mapping.

    Raises:
        ValueError: for a file that is no checkpoint, is truncated, or would run code on loading; names it.
    """
    torch = required("torch", "encoders")
    found: dict[str, Any] = {}
    for file in tensor_files(path):
        try:
            if file.suffix == ".safetensors":
                found |= required("safetensors.torch", "encoders").load_file(file)
                continue
            with torch.serialization.safe_globals([(Inert, name) for name in STUBS] + [argparse.Namespace]):
                found |= torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{file} cannot be read as a checkpoint: {error}") from error
    return found


def load_into(module: Any, tensors: Mapping[str, Any], source: Path, ignore: Sequence[str] = ()) -> None:
    """Load `tensors` into a torch module, all and nothing but its own; `ignore`: patterns of names to pass over.

    Raises:
        ValueError: for missing, unexpected and misshapen tensors, named.
    """
    wanted = module.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if not any(re.fullmatch(p, name) for p in ignore)}
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    wrong = [f"{name} {tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}"
             for name in wanted.keys() & given.keys() if given[name].shape != wanted[name].shape]
    if missing or extra or wrong:
        told = [f"{len(names)} {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
                for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", sorted(wrong)))
                if names]
        raise ValueError(f"{source} does not fit: tensors {'; '.join(told)}")
    module.load_state_dict(given)
