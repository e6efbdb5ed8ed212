"""Pretrained weights: where they are, and what their digest is.

A request names them (`weights=`) by a file, a folder or a hub id. What enters an identity is the digest of the bytes,
never the name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .imports import required

_digests: dict[tuple[str, int, int], str] = {}  # (path, size, mtime in ns) -> sha256, for this process
_HUB_FILES = ["*.json", "*.safetensors", "pytorch_model*.bin"]


def packaged(distribution: str, file: str, extra: str) -> Path:
    """The path of `file` as installed with `distribution`, found without importing it.

    Raises:
        ImportError: if the distribution is not installed; names the extra that brings it.
        FileNotFoundError: if it is installed without the file.
    """
    try:
        path = Path(str(metadata.distribution(distribution).locate_file(file)))
    except metadata.PackageNotFoundError:
        raise ImportError(f"{file} ships with the package {distribution}, which is not installed: "
                          f"pip install 'featstore[{extra}]'") from None
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the installed {distribution} "
                                f"{metadata.version(distribution)}: pip install --force-reinstall {distribution}")
    return path


def locate(wanted: str, *, extractor: str, fetch: bool, expected: str) -> Path:
    """The file or folder that `wanted` names: a path, a path below $FEATSTORE_WEIGHTS, or a hub id.

    fetch: whether a hub id may be downloaded where the hub's cache lacks it (HF_HUB_OFFLINE forbids it too).
    expected: what must be put there, for the message.

    Raises:
        FileNotFoundError: if it is nowhere and could not be fetched; says which file to put where.
    """
    roots = [Path(), *([Path(os.environ["FEATSTORE_WEIGHTS"])] if os.environ.get("FEATSTORE_WEIGHTS") else [])]
    for root in roots:
        path = root / Path(wanted).expanduser()
        if path.exists():
            return path
    hub = required("huggingface_hub", "encoders")
    try:
        return Path(hub.snapshot_download(wanted, allow_patterns=_HUB_FILES, local_files_only=not fetch))
    except (OSError, ValueError) as error:  # of which all errors of the hub's client are kinds
        raise FileNotFoundError(f"{extractor}: no weights {wanted!r} on this machine; expected {expected}") from error


def tensor_files(path: Path) -> list[Path]:
    """The files that hold the tensors of a checkpoint: `path` itself, or those of a folder that transformers wrote."""
    if path.is_file():
        return [path]
    for index, single in (("model.safetensors.index.json", "model.safetensors"),
                          ("pytorch_model.bin.index.json", "pytorch_model.bin")):
        if (path / index).is_file():
            return [path / name for name in sorted(set(json.loads((path / index).read_text())["weight_map"].values()))]
        if (path / single).is_file():
            return [path / single]
    raise FileNotFoundError(f"{path} holds no weights: expected model.safetensors or pytorch_model.bin, "
                            f"found {', '.join(sorted(p.name for p in path.iterdir())) or 'nothing'}")


def file_digest(path: Path) -> str:
    """`sha256:` and the hexadecimal SHA-256 of a file's bytes; remembered in this process by path, size and mtime."""
    state = path.stat()
    key = (str(path.resolve()), state.st_size, state.st_mtime_ns)
    if key not in _digests:
        with path.open("rb") as file:
            _digests[key] = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


def digest(files: Sequence[Path]) -> str:
    """The digest of a file, as `sha256sum` prints it; of several, that of their digests in order."""
    if len(files) == 1:
        return file_digest(files[0])
    return "sha256:" + hashlib.sha256(" ".join(map(file_digest, files)).encode()).hexdigest()


def json_of(path: Path) -> dict[str, Any]:
    """A JSON file beside weights (config.json, preprocessor_config.json); ValueError if it is none."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(record).__name__}")
    return record
