"""What an acoustic model is to hear: features of a store by the keys of its batches, and the range of its log-mels.

A content feature goes by its name in the store; the others by what they are: log-mel, wave, f0, loudness or energy,
speaker (an embedding). A numbered voice, "singer", is no feature: the run's singers.json says whose row is whose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

import featstore as fs
from featstore.errors import BadRequest, CannotLoad, ContractMismatch, MissingFeature
from featstore.splits import members
from featstore_extractors import checkpoint

from . import run as runs
from .run import Read, Run

if TYPE_CHECKING:
    from torch import Tensor

STATISTICS = "statistics.safetensors"
OURS = ("log-mel", "wave", "f0", "energy", "loudness", "speaker")  # extractors that give no content
NONE = "none"


@dataclass(frozen=True)
class Asked:
    """What is asked for by name. `content`: features of the store, or None where nothing is said.

    speaker: "one-hot", "none", the name of an embedding, or None where nothing is said.
    roles: log-mel, wave, f0, loudness -> the feature of the store, where one is named; "none" for f0 and loudness.
    lenient: a model that is only tried hears what there is.
    """

    content: tuple[str, ...] | None = None
    speaker: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    lenient: bool = False

    @property
    def parts(self) -> dict[str, str]:
        """Part -> the feature that plays it."""
        named = self.speaker not in (None, "one-hot", NONE)
        return {"speaker": "speaker", **self.roles, **({"speaker": str(self.speaker)} if named else {})}


def fields_for(store: fs.Store, asked: Asked, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a Config that hears what is asked for of a store; `changed` are those that are settled otherwise.

    Raises:
        BadRequest: no content is named, or a feature is not of the kind that its part needs.
        MissingFeature: the store does not have it.
        ContractMismatch: a preset, or the run to begin with, hears one of other dimensions.
    """
    fields = dict(changed)
    fields["content"] = _content(store, asked, changed)
    if asked.roles.get("f0") == NONE:
        fields["melody"] = NONE
    if asked.roles.get("loudness") == NONE or (
            asked.lenient and "loudness" not in changed and "loudness" not in {*asked.roles, *store.features}):
        fields["loudness"] = NONE
    if asked.speaker in ("one-hot", NONE):
        fields["speaker"] = asked.speaker
    elif asked.speaker is not None:
        fields["speaker"] = "embedding"
    if fields.get("speaker") == "embedding":
        voice = _of_kind(store, asked.parts["speaker"], "global")
        if asked.speaker is None and fields.setdefault("speaker_dim", voice.dim) != voice.dim:
            raise ContractMismatch(f"{voice.name} of {store.path} has {voice.dim} dimensions, and what was asked for "
                                   f"hears {fields['speaker_dim']}: --speaker NAME takes another embedding")
        fields["speaker_dim"] = voice.dim
    return fields


def _content(store: fs.Store, asked: Asked, changed: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(name, dimensions) of each content feature."""
    if asked.content is not None:
        return [(name, _of_kind(store, name, "continuous").dim) for name in asked.content]
    if "content" not in changed:
        there = [name for name in store.features if content_like(store.features[name])]
        told = " ".join(f"--content {name}" for name in there) or "it has none: featstore extract CORPUS " \
            f"{store.path} -f whisper -f contentvec"
        raise BadRequest(f"say which content features of {store.path} the model is to hear, one or several: {told}")
    told_fields = changed["content"]
    for name, dim in told_fields if isinstance(told_fields, list | tuple) else ():
        if _of_kind(store, name, "continuous").dim != dim:
            raise ContractMismatch(f"{name} of {store.path} has {store.feature(name).dim} dimensions, and what was "
                                   f"asked for hears {dim}: --content {name} takes it as it is")
    return told_fields


def content_like(feature: fs.Feature) -> bool:
    """Whether a feature may be content: vectors at a frame rate, by none of our other extractors."""
    return feature.kind == "continuous" and bool(feature.dim) and feature.spec.made_by not in OURS


def _of_kind(store: fs.Store, name: str, kind: str) -> fs.Feature:
    """A feature of a store that has frames of vectors (continuous), or is one vector (global)."""
    if "@" in name:
        raise BadRequest(f"{name}: name the feature alone; featstore use {store.path} {name} makes that one current")
    found = store.feature(name)
    if found.kind != kind or not found.dim:
        what = {"continuous": "content is vectors at a frame rate", "global": "a voice is one vector an "
                                                                              "utterance"}[kind]
        raise BadRequest(f"{name} is of kind {found.kind} with {found.dim or 'no'} dimensions: {what}")
    return found


def reads_of(package: ModuleType, config: Any, store: fs.Store, roles: Mapping[str, str]
             ) -> dict[str, tuple[Read, ...]]:
    """Key of a batch -> the feature of the store behind it, for a model of this configuration and its training."""
    needed = [key for key in config.reads if key != "singer"]
    needed += ["log-mel", *(["wave"] if package.Model.gives == "wave" else [])]
    content = {name for name, _ in config.content}
    found: dict[str, tuple[Read, ...]] = {}
    for key in needed:
        default = roles.get("loudness", key) if key == "energy" else key  # --loudness names either
        name = key if key in content else roles.get(key, default)
        if name not in store.features and key in ("loudness", "energy"):
            raise MissingFeature(f"the model hears {key}, and {store.path} has no feature {name!r}. Extract it: "
                                 f"featstore extract CORPUS {store.path} -f {name}; name another (--loudness NAME), "
                                 "or leave it out (--loudness none)")
        feature = store.feature(name)
        _check_part(key, feature)
        found[key] = (Read(name, feature.spec),)
    return found


def _check_part(key: str, feature: fs.Feature) -> None:
    """BadRequest where a feature cannot be what it is to be."""
    wanted = {"f0": ("f0", "f0 in Hz, 0 where unvoiced"), "loudness": ("continuous", "decibels, a number a frame"),
              "energy": ("continuous", "linear energy, a number a frame"),
              "speaker": ("global", "one vector an utterance")}
    if key not in wanted:
        return
    kind, what = wanted[key]
    swapped = {"loudness": "energy", "energy": "loudness"}.get(key)
    if feature.kind != kind or (kind == "continuous" and feature.dim) or feature.spec.made_by == swapped:
        raise BadRequest(f"{feature.name} ({feature.spec.made_by}, kind {feature.kind}) cannot be the model's {key}: "
                         f"expected {what}")


def check_same(first: Run, reads: Mapping[str, tuple[Read, ...]], store: fs.Store) -> None:
    """IdentityMismatch where content, loudness or voices are not what the weights to begin with have learnt from."""
    for key, items in first.settings.reads.items():
        if key in reads and key not in ("log-mel", "wave", "f0"):
            for old, new in zip(items, reads[key], strict=True):
                if old.spec.identity != new.spec.identity:
                    runs.check_read(Read(new.name, old.spec), store, str(first.path))


# --- what the store says once, and the run keeps


def part_of(store: fs.Store, training: Mapping[str, Any], part: str) -> list[str]:
    """The utterances of a run's "train" or "valid" part, by its split, or by what it holds out."""
    if training.get("split"):
        return members(store, f"{training['split']}/{part}", store.utterances)
    held_out = list(training.get("held_out", ()))
    return held_out if part == "valid" else [key for key in store.utterances if key not in set(held_out)]


def mel_statistics(store: fs.Store, keys: Sequence[str], mel: str) -> dict[str, Tensor]:
    """"mel_low", "mel_high" and "mel_mean" (n_mels,): the least, greatest and mean log-mel of each band.

    A band in which nothing happens, as above half the rate of a recording, is given a range of 1 all the same.

    Raises:
        BadRequest: nothing happens in any.
    """
    import torch

    low = high = total = np.zeros(0)
    frames = 0
    for key in keys:
        log_mel = store[key, mel].as_float()
        if not len(log_mel):
            continue
        least, most, sums = log_mel.min(0), log_mel.max(0), log_mel.sum(0, dtype=np.float64)
        low, high, total = ((np.minimum(low, least), np.maximum(high, most), total + sums) if frames
                            else (least, most, sums))
        frames += len(log_mel)
    if not frames or not (high > low).any():
        raise BadRequest(f"{mel} of {len(keys):,} utterances of {store.path} never changes: are the recordings silent?")
    high = np.maximum(high, low + 1)
    return {name: torch.from_numpy(np.asarray(values, np.float32))
            for name, values in (("mel_low", low), ("mel_high", high), ("mel_mean", total / frames))}


def statistics_of(root: Path) -> dict[str, Tensor]:
    """The statistics in a run's folder. CannotLoad where they are not there."""
    path = root / STATISTICS
    if not path.exists():
        raise CannotLoad(f"{path} does not exist: the run is of another version of featstore, or its folder was not "
                         "copied whole")
    return checkpoint.read(path)
