"""Packages that are imported when first needed, and some that need a hand.

Two released packages break imports on an otherwise sound machine: the PyPI build of torchaudio links CUDA libraries and
raises OSError beside a CPU build of torch, which takes every speech model of transformers down with it; and setuptools
82 removed pkg_resources, which pyworld and webrtcvad import for nothing but their own version number. And librosa
compiles code as it is imported, which processes must do in turn.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from featstore_align import code_cache

COMPILING = ("librosa", "resemblyzer", "torchcrepe", "torchfcpe")  # librosa, and what imports it


def required(module: str, extra: str) -> Any:
    """The imported module; ImportError that names the extra which brings it, where it is not installed."""
    if module.partition(".")[0] in COMPILING:
        _compiled_in_turn()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is needed and not installed: pip install 'featstore[{extra}]'") from None


def _compiled_in_turn() -> None:
    """Imports what of librosa is compiled by that, in one process after another: the first one compiles for all."""
    found = importlib.util.find_spec("librosa")
    if "librosa.util.utils" in sys.modules or found is None or not found.submodule_search_locations:
        return
    code_cache.guard()
    with code_cache.locked(found.submodule_search_locations[0]):
        importlib.import_module("librosa.util.utils")


def without_broken_torchaudio() -> None:
    """Makes an installed torchaudio that cannot be imported look absent. Call before a speech model is imported.

    transformers imports torchaudio whenever it is installed and lets its OSError through; with None in `sys.modules` it
    counts as not installed, and nothing of ours needs it. A torchaudio that works is left alone.
    """
    if "torchaudio" in sys.modules or importlib.util.find_spec("torchaudio") is None:
        return
    try:
        importlib.import_module("torchaudio")
    except (OSError, ImportError):
        _forget("torchaudio")
        sys.modules["torchaudio"] = None  # type: ignore[assignment]
        known: Any = getattr(sys.modules.get("transformers.utils.import_utils"), "is_torchaudio_available", None)
        if hasattr(known, "cache_clear"):  # transformers was imported before, and remembers that it is installed
            known.cache_clear()


@contextmanager
def stub_torchaudio() -> Iterator[None]:
    """While this lasts `import torchaudio` gives an empty module, unless a working one is loaded already.

    For packages that import torchaudio only for their file loader (torchcrepe). Afterwards `sys.modules` is as it was.
    """
    before = sys.modules.get("torchaudio", missing := object())
    if isinstance(before, types.ModuleType):
        yield
        return
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    try:
        yield
    finally:
        _forget("torchaudio")
        if before is not missing:
            sys.modules["torchaudio"] = before  # type: ignore[assignment]


def with_pkg_resources() -> None:
    """Makes `import pkg_resources` work and quiet. Call before the first import of pyworld or webrtcvad.

    Where setuptools no longer has it, a stub with the one function they use, `get_distribution(name).version`, takes
    its place; where it has, it is imported here without its deprecation warning.
    """
    if "pkg_resources" in sys.modules:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("pkg_resources")
    except ImportError:
        stub = types.ModuleType("pkg_resources")
        stub.get_distribution = metadata.distribution  # type: ignore[attr-defined]
        sys.modules["pkg_resources"] = stub


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
