"""Extractors: waveform to features. `parse` turns what a user asks for into extractors; importing this loads none."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
import types
from collections.abc import Mapping
from fractions import Fraction
from importlib import metadata
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

__all__ = ["TABLE", "RequestError", "describe", "parse"]

GROUP = "featstore.extractors"  # entry points of third parties: name = "module:Class"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")  # of a feature, as the store has it
REQUIRED = ("name", "version", "kind", "sample_rate", "frame_rate", "centre_s", "dim", "dtype", "load")


class RequestError(ValueError):
    """A request that cannot be met as written: says what is wrong with it and what there is."""


class Entry(NamedTuple):
    """Where a standard extractor is defined, and which extra brings what it needs."""

    module: str
    class_name: str
    extra: str | None = None


TABLE: dict[str, Entry] = {
    "log-mel": Entry("featstore_extractors.signal", "LogMel"),
    "f0": Entry("featstore_extractors.f0", "F0", "signal"),
    "energy": Entry("featstore_extractors.signal", "Energy"),
    "loudness": Entry("featstore_extractors.signal", "Loudness"),
    "wave": Entry("featstore_extractors.signal", "Wave"),
    "speaker": Entry("featstore_extractors.speaker", "Speaker", "speaker"),
    "whisper": Entry("featstore_extractors.whisper", "Whisper", "encoders"),
    "contentvec": Entry("featstore_extractors.hubert", "ContentVec", "encoders"),
    "hubert": Entry("featstore_extractors.hubert", "Hubert", "encoders"),
    "wav2vec2": Entry("featstore_extractors.hubert", "Wav2Vec2", "encoders"),
    "wavlm": Entry("featstore_extractors.hubert", "WavLM", "encoders"),
    "wenet": Entry("featstore_extractors.wenet", "WeNet", "encoders"),
    "mini": Entry("featstore_extractors.mini", "Mini", "encoders"),
}


def parse(*requests: str) -> dict[str, Any]:
    """Extractors by the name of their feature, in the order of `requests`: `[NAME=]EXTRACTOR[:PRESET][,KEY=VALUE...]`.

    EXTRACTOR is a standard feature, the name of an installed entry point, or, with a dot in it, an import path
    `module.Class`. NAME defaults to the extractor's own name.

    Raises:
        RequestError: for an unknown extractor, preset, key or value, an unusable class, or two features of one name.
        ImportError: if the package that an extractor needs is not installed; names the extra.
    """
    extractors: dict[str, Any] = {}
    asked: dict[str, str] = {}
    for request in requests:
        name, extractor = _parse(request)
        if name in extractors:
            raise RequestError(f"{asked[name]!r} and {request!r} would both be stored as {name!r}: "
                               f"name one of them, as in {name}-2={request.removeprefix(name + '=')}")
        extractors[name], asked[name] = extractor, request
    return extractors


def describe(name: str) -> str:
    """What can be asked of an extractor, one line: `wave:16k|22k|24k|44k|48k  sample_rate=24000`."""
    cls = _find(name)
    presets = "|".join(getattr(cls, "PRESETS", ()))
    return f"{name}{':' if presets else ''}{presets}  {_settings(cls)}".rstrip()


def _parse(request: str) -> tuple[str, Any]:
    name = None
    mark = re.search("[=:,]", request)
    if mark and mark[0] == "=":
        name, request = request[: mark.start()], request[mark.end() :]
    head, *pairs = request.split(",")
    wanted, colon, preset = head.partition(":")
    cls = _find(wanted.strip())
    extractor = _build(cls, request, preset.strip() if colon else None, pairs)
    name = extractor.name if name is None else name.strip()
    if not NAME.fullmatch(str(name)):
        raise RequestError(f"{request}: {name!r} cannot name a feature: expected 1 to 64 of a to z, 0 to 9 and -, "
                           f"not starting with -; choose one, as in my-name={request}")
    return name, extractor


def _find(wanted: str) -> type:
    if "." in wanted:
        return _checked(_imported(wanted), wanted)
    if wanted in TABLE:
        entry = TABLE[wanted]
        try:
            cls: type = getattr(importlib.import_module(entry.module), entry.class_name)
        except ModuleNotFoundError as error:
            if entry.extra is None or (error.name or "").startswith("featstore_extractors"):
                raise
            raise ImportError(f"{wanted} needs {error.name}: pip install 'featstore[{entry.extra}]'") from error
        return cls
    others = {point.name: point for point in metadata.entry_points(group=GROUP)}
    if wanted in others:
        return _checked(others[wanted].load(), others[wanted].value)
    known = [*TABLE, *others]
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    rest = [name for name in known if name not in near]
    raise RequestError(f"no extractor {wanted!r}; there are {', '.join(near + rest)}. "
                       "Your own is asked for by its import path: my_module.MyExtractor")


def _imported(path: str) -> Any:
    module, _, attribute = path.rpartition(".")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise RequestError(f"{path}: no module {error.name!r} can be imported from here; "
                               "install it or name its folder in PYTHONPATH") from None
        raise
    if not hasattr(loaded, attribute):
        classes = [name for name, value in vars(loaded).items() if dataclasses.is_dataclass(value)]
        raise RequestError(f"{path}: {module} has no {attribute!r}; its dataclasses are {', '.join(classes) or 'none'}")
    return getattr(loaded, attribute)


def _checked(cls: Any, path: str) -> type:
    """`cls`, if it can be an extractor as far as a class can show it."""
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        raise RequestError(f"{path} is no dataclass: an extractor is a frozen dataclass whose fields are its settings")
    if not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise RequestError(f"{path} is a dataclass but not a frozen one: write @dataclass(frozen=True)")
    return cls


def _build(cls: Any, request: str, preset: str | None, pairs: list[str]) -> Any:
    presets = getattr(cls, "PRESETS", ())
    if preset is not None and preset not in presets:
        there = f"there are {', '.join(presets)}" if presets else "it has none"
        raise RequestError(f"{request}: no preset {preset!r} of {cls.__name__}; {there}")
    try:
        if preset is not None and isinstance(presets, Mapping):
            extractor = cls(**{**presets[preset], **_values(cls, request, pairs)})
        elif preset is not None:  # which may be of another class
            extractor = cls.preset(preset)
            extractor = dataclasses.replace(extractor, **_values(type(extractor), request, pairs))
        else:
            values = _values(cls, request, pairs)
            lacking = [f.name for f in _fields(cls) if f.name not in values and _default(f) is dataclasses.MISSING]
            if lacking:
                raise RequestError(f"{request}: {lacking[0]}=... must be given; settings: {_settings(cls)}")
            extractor = cls(**values)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"{request}: {error}") from error
    missing = dataclasses.MISSING
    for attribute in REQUIRED:
        if inspect.getattr_static(extractor, attribute, missing) is missing:  # hasattr would look weights up for `dim`
            raise RequestError(f"{request}: {type(extractor).__name__} has no {attribute!r}; an extractor states "
                               f"{', '.join(REQUIRED[:-1])} and has load(device)")
    return extractor


def _values(cls: type, request: str, pairs: list[str]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    names = [f.name for f in _fields(cls)]
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals:
            raise RequestError(f"{request}: {pair!r} is not KEY=VALUE; settings: {_settings(cls)}")
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise RequestError(f"{request}: {cls.__name__} has no setting {key!r}{hint}; settings: {_settings(cls)}")
        if key in values:
            raise RequestError(f"{request}: {key} is given twice")
        values[key] = _coerced(text, hints[key], f"{request}: {key}")
    return values


def _coerced(text: str, kind: Any, what: str) -> Any:
    """`text` as a value of an annotation: int, float, bool, str, Fraction, Literal, or one of these or None."""
    if get_origin(kind) in (Union, types.UnionType):
        if type(None) in get_args(kind) and text.lower() == "none":
            return None
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if text == str(choice):
                return choice
        raise RequestError(f"{what} must be one of {', '.join(map(str, get_args(kind)))}, not {text!r}")
    if kind is bool:
        words: Mapping[str, bool] = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise RequestError(f"{what} must be true or false, not {text!r}")
        return words[text.lower()]
    if kind in (int, float, Fraction):
        try:
            return kind(text)
        except (ValueError, ZeroDivisionError):
            expected = {int: "a whole number", float: "a number", Fraction: "a number or fraction"}[kind]
            raise RequestError(f"{what} must be {expected}, not {text!r}") from None
    if kind is str:
        return text
    raise RequestError(f"{what} cannot be set in a request (its type is {kind}); set it in Python")


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(cls) if f.init]


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _settings(cls: type) -> str:
    defaults = {f.name: _default(f) for f in _fields(cls)}
    return ", ".join(f"{name}={'...' if value is dataclasses.MISSING else value}" for name, value in defaults.items())
