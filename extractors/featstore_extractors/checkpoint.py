"""Tensors out of checkpoints, safetensors or torch's own, without running what a pickle would run.

torch reads its files with `weights_only=True`, and before it does every name in the pickle is looked at: a name that
only tensors, plain containers and numbers need is fine, classes of the training programs that we know are replaced by
`Inert`, and any other refuses the file unread.
"""

from __future__ import annotations

import _compat_pickle
import argparse
import io
import json
import pickletools
import re
import struct
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .hub import some
from .imports import required
from .weights import tensor_files

TRAINERS = ("fairseq", "omegaconf", "hydra", "numpy", "wenet", "pathlib")  # packages whose classes are not needed
PLAIN = ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "str", "tuple")  # of Python's own
TYPING = ("typing.Any", "enum.Enum")  # that omegaconf names
NEEDED = re.compile(r"argparse\.Namespace|collections\.(OrderedDict|Counter)|_codecs\.encode|"
                    r"builtins\.(bytearray|set|complex)|torch\.[A-Za-z0-9_]+|torch\.nn\.parameter\.Parameter|"
                    r"torch\.storage\.\w+|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|"
                    r"torch\.serialization\._get_layout|torch\.sparse\.\w+|torch\.cuda\.\w+")
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch.save begin that are no zip archives
LONGEST_HEADER = 100_000_000  # of safetensors, in bytes: its own limit
KINDS = (  # first bytes of what is mistaken for weights
    (b"RIFF", "audio (WAV)"), (b"fLaC", "audio (FLAC)"), (b"OggS", "audio (Ogg)"), (b"ID3", "audio (MP3)"),
    (b"\xff\xfb", "audio (MP3)"), (b"FORM", "audio (AIFF)"), (b"caff", "audio (CAF)"),
    (b"\x89HDF", "HDF5, as of TensorFlow"), (b"\x93NUMPY", "a NumPy array"), (b"\x1f\x8b", "gzip: unpack it"),
    (b"7z\xbc\xaf", "7z: unpack it"), (b"GGUF", "GGUF, of other programs"), (b"lmgg", "GGML, of whisper.cpp"),
    (b"\x89PNG", "an image"), (b"%PDF", "a PDF"))


_loading = threading.Lock()  # what torch takes for safe is one set for all threads


class Inert:
    """Stands for a class that a checkpoint names and we do not need: takes any state, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _dict_of(*_: Any) -> dict[Any, Any]:
    """In place of a defaultdict, for what is put into it."""
    return {}


def _list_of(items: Any = (), *_: Any) -> list[Any]:
    """In place of a deque."""
    return list(items)


STANDINS = {"collections.defaultdict": _dict_of, "collections.deque": _list_of}


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds: {name: tensor} of a folder, a safetensors file or a state dict, else the outer mapping.

    Tensors are on the CPU and as far as the format allows not read before they are used: copy what is to outlive a
    change of the file.

    Raises:
        FileNotFoundError: if there are no files to read.
        ValueError: for a file that is no checkpoint, is truncated, or would run code on loading; names it.
    """
    found: dict[str, Any] = {}
    for file in tensor_files(path):
        found |= _safetensors(file) if _checked(file) == "safetensors" else _torch(file)
    return found


def load_into(module: Any, tensors: Mapping[str, Any], source: Path, ignore: Sequence[str] = ()) -> None:
    """Load `tensors` into a torch module, all and nothing but its own; `ignore`: patterns of names to pass over.

    Raises:
        ValueError: for missing, unexpected and misshapen tensors, and for those that hold NaN or infinity, named.
    """
    torch = required("torch", "encoders")
    wanted = module.state_dict()
    given = {name: tensor for name, tensor in tensors.items()
             if not any(re.fullmatch(pattern, str(name)) for pattern in ignore)}
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(map(str, given.keys() - wanted.keys()))
    both = sorted(wanted.keys() & given.keys())
    wrong = [f"{name} {_shape(given[name])} instead of {tuple(wanted[name].shape)}" for name in both
             if _shape(given[name]) != tuple(wanted[name].shape)]
    if missing or extra or wrong:
        told = [f"{len(names)} {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
                for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", wrong)) if names]
        raise ValueError(f"{source} does not fit: tensors {'; '.join(told)}")
    broken = [name for name in both if not _finite(torch, given[name])]
    if broken:
        raise ValueError(f"{source} is damaged: NaN or infinity in {len(broken)} of {len(both)} tensors "
                         f"({some(broken, 4)}); get it again")
    module.load_state_dict(given)


def _shape(tensor: Any) -> Any:
    return tuple(tensor.shape) if hasattr(tensor, "shape") else f"({type(tensor).__name__}, no tensor)"


def _finite(torch: Any, tensor: Any) -> bool:
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    low, high = torch.aminmax(tensor.detach())  # NaN anywhere makes both NaN; no copy is made
    return bool(torch.isfinite(low) & torch.isfinite(high))


# What kind of file it is.


def _checked(file: Path) -> str:
    """"safetensors", "zip" or "legacy" (of torch); ValueError for anything else, which it names."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(512)
    if not size:
        raise _unreadable(file, "it is empty (0 bytes); get it again")
    if start.startswith(b"version https://git-lfs"):
        raise _unreadable(file, f"it is a pointer of git-LFS ({size} bytes), not the weights themselves: run git lfs "
                          "pull in its folder")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < LONGEST_HEADER:  # whatever it is called
        return _checked_safetensors(file, size, start)
    if start.startswith(b"PK"):
        return _checked_zip(file, size)
    if start.startswith(LEGACY):
        return "legacy"
    if file.suffix == ".safetensors":
        return _checked_safetensors(file, size, start)
    if start.startswith(b"\x80"):
        refusal = _refusal(file, _names_of(file))
        raise ValueError(refusal) if refusal else _unreadable(file, "it is a pickle that torch did not write")
    raise _unreadable(file, f"it is {_kind(start)}; expected safetensors or a file of torch.save (.pt, .bin)")


def _unreadable(file: Path, reason: str) -> ValueError:
    return ValueError(f"{file} cannot be read as a checkpoint: {reason}")


def _kind(start: bytes) -> str:
    for magic, kind in KINDS:
        if start.startswith(magic):
            return kind
    if start[4:8] == b"ftyp":
        return "audio or video (MP4)"
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it (a checkpoint this old must be saved again with a newer torch)"
    text = start.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page (the download gave an error page or asked to log in)"
    try:
        words = start.decode("utf-8", "strict" if len(start) < 512 else "ignore")
    except UnicodeDecodeError:
        words = "\0"
    if all(c.isprintable() or c.isspace() for c in words):
        return f"text ({words.strip()[:40]!r})"
    return f"something unknown (it begins with {start[:8].hex(' ')})"


def _checked_zip(file: Path, size: int) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        raise _unreadable(file, "it is truncated or damaged. It begins as a file of torch.save, and after "
                          f"{size:,} bytes there is no list of what is in it; get it again") from None
    if any(name.endswith("/constants.pkl") for name in names):
        raise _unreadable(file, "it is a TorchScript program (torch.jit.save); expected the tensors by name, as in the "
                          "final.pt or model.safetensors that it was exported from")
    if not any(name.endswith("/data.pkl") for name in names):
        raise _unreadable(file, f"it is a zip archive with {some(names, 4)}, which torch.save did not write: unpack it")
    return "zip"


def _checked_safetensors(file: Path, size: int, start: bytes) -> str:
    length = int.from_bytes(start[:8], "little")
    if size < 8 or not 2 <= length <= size - 8:
        what = f"it is {_kind(start)}" if length > LONGEST_HEADER else "it is truncated"
        raise _unreadable(file, f"{what}; expected safetensors (its first 8 bytes announce a header of {length:,} "
                          f"bytes, and it has {size:,} in all)")
    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(8 + length)[8:])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _unreadable(file, f"its header is not that of safetensors, or damaged ({type(error).__name__}: {error}); "
                          "get it again") from None
    if size != expected:
        raise _unreadable(file, f"it is {'truncated' if size < expected else 'damaged'}. It has {size:,} bytes, its "
                          f"header says {expected:,}; get it again")
    return "safetensors"


# Reading.


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself beside its tensors; ValueError for another file."""
    (file,) = tensor_files(path)
    if _checked(file) != "safetensors":
        raise ValueError(f"{file} is no safetensors file")
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        return dict(opened.metadata() or {})


def _safetensors(file: Path) -> dict[str, Any]:
    load = required("safetensors.torch", "encoders").load_file
    try:
        found: dict[str, Any] = load(file)
    except Exception as error:  # its own type, which is not of the builtins
        raise _unreadable(file, str(error)) from error
    return found


def _torch(file: Path) -> dict[str, Any]:
    torch = required("torch", "encoders")
    names = _names_of(file)
    refusal = _refusal(file, names)
    if refusal:
        raise ValueError(refusal)
    stubs: list[Any] = [(STANDINS.get(name, Inert), name) for name in sorted(names) if _inert(name)]
    stubs.append(argparse.Namespace)
    try:
        with _loading, torch.serialization.safe_globals(stubs):
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except Exception as error:  # of torch, of its unpickler, of the system: they have no common root
        words = (str(error).strip().splitlines() or [""])[0][:200]
        raise _unreadable(file, "it is truncated or damaged, or holds more than tensors, containers and numbers "
                          f"({type(error).__name__}: {words})") from error
    if not isinstance(found, Mapping):
        raise _unreadable(file, f"it holds a {type(found).__name__}; expected tensors by their names")
    return dict(found)


def _refusal(file: Path, names: set[str]) -> str:
    """Why a file with these names in its pickle is not loaded; "" if it is."""
    strange = {name for name in names if not NEEDED.fullmatch(name) and not _inert(name)}
    if not strange:
        return ""
    return (f"{file} refused: loading it would run {some(strange, 4)}, and weights need no code. It was not run. "
            "Convert the file to safetensors where you trust it, or get it from elsewhere")


def _inert(name: str) -> bool:
    """Whether a stub may stand for what a pickle names."""
    package, _, rest = name.partition(".")
    return package in TRAINERS or name in TYPING or name in STANDINS or (package == "builtins" and rest in PLAIN)


def _names_of(file: Path) -> set[str]:
    """What the pickles of a file name, as module.name; nothing of them is loaded."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            found = set()
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    found |= _named(io.BytesIO(archive.read(name)))
            return found
    with file.open("rb") as opened:
        return _named(opened)


def _named(stream: BinaryIO) -> set[str]:
    """The names in the pickles that follow each other at the start of a stream; what comes after them is not looked at.

    Old files of torch are five pickles and raw numbers, so that the first thing that is no pickle is the end.
    """
    found: set[str] = set()
    for _ in range(5):
        try:
            for name in _named_in_one(stream):
                found.add(name)
        except (ValueError, IndexError, UnicodeDecodeError, struct.error):
            break
    return found


def _named_in_one(stream: BinaryIO) -> Iterator[str]:
    words: list[str] = []  # all strings so far: a name that is put together on the stack is made of two of them
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            yield _today(module, name)
        elif operation.name == "STACK_GLOBAL":
            yield _today(*["?", "?", *words][-2:])
        elif isinstance(argument, str):
            words.append(argument)


def _today(module: str, name: str) -> str:
    """A name as Python 3 has it: pickles of torch use those of Python 2. os.system calls itself posix.system."""
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module),
                                                                    name))
    return f"{'os' if module in ('posix', 'nt') else module}.{name}"
