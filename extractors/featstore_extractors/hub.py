"""The model hub: what the well-known checkpoints are, which of them are in its cache on this machine, downloads.

All that the hub's own client has is left to it: its cache and the variables that move it (HF_HOME, HF_HUB_CACHE), its
log-in, its mirror (HF_ENDPOINT), its progress bar and its offline switch (HF_HUB_OFFLINE).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .imports import required

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
SUFFIXES = {".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".json", ".yaml", ".zip", ".onnx", ".h5"}
SHARD = r"-\d{5}-of-\d{5}"
ROOM = 100_000_000  # bytes that a download leaves free on the disk
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCKED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)  # the last: a file where a folder should be


class Published(NamedTuple):
    """What a model's page on the hub says.

    licence: in its words; None where it states none.
    parameters: millions, of the whole model, by its card or paper.
    beside: files that are needed with the tensors, all of which the repository has.
    box: the file beside this one that holds it, where it ships with this package, and the digest of its bytes.
    """

    licence: str | None
    parameters: int
    beside: tuple[str, ...] = ("config.json", "preprocessor_config.json")
    box: tuple[str, str] | None = None


HUB: dict[str, Published] = {
    "featstore/mini": Published("mit", 3, (), (
        "mini.safetensors", "sha256:fccfd0d45d8d20a513c343caf6bfa279a826ad616999d27ceeb818ee62d4ffa5")),
    **{f"openai/whisper-{size}": Published("apache-2.0", parameters, ("config.json",)) for size, parameters in (
        ("tiny", 39), ("base", 74), ("small", 244), ("medium", 769), ("large", 1550), ("large-v2", 1550),
        ("large-v3", 1550), ("tiny.en", 39), ("base.en", 74), ("small.en", 244), ("medium.en", 769))},
    "openai/whisper-large-v3-turbo": Published("mit", 809, ("config.json",)),
    "lengyue233/content-vec-best": Published("mit", 95, ("config.json",)),
    "facebook/hubert-base-ls960": Published("apache-2.0", 95),
    "facebook/hubert-large-ll60k": Published("apache-2.0", 317),
    "facebook/wav2vec2-base": Published("apache-2.0", 95),
    "facebook/wav2vec2-large-lv60": Published("apache-2.0", 317),
    "facebook/wav2vec2-large-xlsr-53": Published("apache-2.0", 317),
    "microsoft/wavlm-base": Published(None, 95),
    "microsoft/wavlm-base-plus": Published(None, 95),
    "microsoft/wavlm-large": Published(None, 317),
    "microsoft/wavlm-base-plus-sv": Published(None, 101),
}


class Unavailable(Exception):
    """Why a model cannot be had from the hub, and what can be done about it."""


def is_id(wanted: str) -> bool:
    """Whether this can be the id of a model, and is not a path by its looks."""
    return bool(ID.fullmatch(wanted)) and Path(wanted).suffix.lower() not in SUFFIXES


def cache() -> Path:
    """The folder of the hub's cache."""
    return Path(required("huggingface_hub.constants", "encoders").HF_HUB_CACHE).expanduser()


def snapshot(hub_id: str) -> Path | None:
    """The folder in the cache that stands for a model: that of its main branch, or the only one there is."""
    model = cache() / f"models--{hub_id.replace('/', '--')}"
    reference = model / "refs" / "main"
    if reference.is_file():
        folder = model / "snapshots" / reference.read_text().strip()
        if folder.is_dir():
            return folder
    there = [path for path in model.glob("snapshots/*") if path.is_dir()]
    return there[0] if len(there) == 1 else None


def snapshots() -> Iterator[tuple[str, Path]]:
    """(hub id, folder) of everything in the cache, older revisions too."""
    for folder in sorted(cache().glob("models--*--*/snapshots/*")):
        yield folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1), folder


def chosen(names: Sequence[str]) -> list[str]:
    """The files of a repository that are wanted of it: one set of tensors, safetensors if it has them, and settings.

    [] where it holds no tensors that can be read.
    """
    there = set(names)
    settings = sorted(there & {"config.json", "preprocessor_config.json"})
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if f"{stem}.{suffix}" in there:
            return [*settings, f"{stem}.{suffix}"]
        index = f"{stem}.{suffix}.index.json"
        shards = sorted(name for name in there if re.fullmatch(rf"{stem}{SHARD}\.{suffix}", name))
        if index in there and shards:
            return [*settings, index, *shards]
    if "final.pt" in there:  # of WeNet
        return ["final.pt", *sorted(there & {"train.yaml", "global_cmvn"})]
    return []


def download(hub_id: str) -> Path:
    """The folder in the cache that now holds the model.

    Raises:
        Unavailable: says why and what to do.
    """
    client = required("huggingface_hub", "encoders")
    if required("huggingface_hub.constants", "encoders").HF_HUB_OFFLINE:
        raise Unavailable("HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids to download it: unset it, or copy the "
                          "files from a machine that has them")
    listed = False
    try:
        found = client.HfApi().model_info(hub_id, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in found.siblings or []}
        files = chosen(list(sizes))
        if not files:
            raise Unavailable(f"the repository holds no model.safetensors or pytorch_model.bin, but "
                              f"{some(sizes)}: download the file you mean and give weights=FILE")
        _check_room(sum(sizes[name] for name in files))
        listed = True
        return Path(client.snapshot_download(hub_id, allow_patterns=files))
    except Unavailable:
        raise
    except Exception as error:  # the client's own, its HTTP library's, the system's: they have no common root
        raise Unavailable(_reason(error, hub_id, listed)) from error


def some(names: Sequence[str] | dict[str, Any] | set[str], limit: int = 8) -> str:
    """The first names of many, for a message."""
    ordered = sorted(names)
    return (", ".join(ordered[:limit]) or "nothing") + (f" and {len(ordered) - limit} more" * (len(ordered) > limit))


def _check_room(needed: int) -> None:
    folder = cache()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed + min(ROOM, needed):
        raise Unavailable(f"it takes {needed / 1e6:,.1f} MB and the hub's cache {cache()} has {free / 1e6:,.1f} MB "
                          "left: make room, or set HF_HOME to a folder on another disk")


def _reason(error: Exception, hub_id: str, listed: bool) -> str:
    """What went wrong, as something that can be acted on. listed: whether the hub had answered before."""
    errors = required("huggingface_hub.errors", "encoders")
    chain = list(_chain(error))
    codes = {link.errno for link in chain if isinstance(link, OSError)}
    status = next((code for link in chain if (code := _status(link))), 0)
    where = required("huggingface_hub.constants", "encoders").ENDPOINT
    if codes & set(FULL) or any("No space left" in str(link) for link in chain):  # as the Rust part of it says
        return (f"no space left for it in the hub's cache {cache()}: make room, or set HF_HOME to a folder on another "
                "disk")
    if codes & set(LOCKED):
        return f"the hub's cache {cache()} cannot be written to: set HF_HOME to a folder that can"
    if any(isinstance(link, errors.GatedRepoError) for link in chain) or status == 403:
        return (f"the hub gives it only to those who have accepted its terms: do so at {where}/{hub_id} and log in "
                "with hf auth login (or set HF_TOKEN)")
    if any(isinstance(link, errors.RepositoryNotFoundError) for link in chain) or status in (401, 404):
        return (f"{where} has no such repository (or it is private: hf auth login); there is no file or folder of that "
                "name either")
    if status:
        return f"{where} answers with status {status}: try again later"
    if listed:
        return (f"the download broke off ({_named(error)}): run the same command again, files that are complete are "
                "kept")
    return f"{where} cannot be reached ({_named(error)}): no network here? Copy the files from a machine that has it"


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _named(error: Exception) -> str:
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0][:120]}" if words else type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def below(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders below `root`, itself first, and the names of the files in each; links to folders are followed, once."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield Path(folder), sorted(files)
