"""What made a number: `Spec`, its identity, and the protocol by which extractors state it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np

from .errors import BadRequest, CannotLoad, FeatstoreError, MissingWeights

Kind = Literal["continuous", "f0", "discrete", "samples", "global"]
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
AUDIO_VERSION = 1  # raised when decoding, mixing or resampling changes a number (audio.py)

Run = Callable[[list[np.ndarray]], list[np.ndarray]]


@runtime_checkable
class Extractor(Protocol):
    """Waveforms to features. A frozen dataclass whose fields are its settings, with what follows from them.

    `load(device)` returns `run(waves)`: a list of mono float32 waveforms `(N,)` at `sample_rate` to a list of arrays
    `(T, D)` (`(T,)` where `dim` is 0, `(D,)` where `kind` is "global"). Each result depends on its own waveform alone.
    A waveform that cannot be used raises ValueError with the reason.

    Optional attributes, read with these defaults:
        pad (0.0): what stands beyond the end of a clip that is shorter than a training crop.
        recorded (the fields): what stands in the identity for the settings, where defaults depend on the weights.
        stored_dtype (dtype): the type as stored, where `dtype` is a setting that may leave it to the weights.
        weights_digest (None): digest of pretrained weights; they enter the identity by it, never by their path.
        weights_bytes (0): about what a loaded copy of the weights takes: how many worker processes fit is told by it.
        window (None): `(core, context)` or `(core, context, longest)` in samples: audio of more than `longest` is run
            in pieces of `core` samples with `context` on either side, of which the core's frames are kept; the last
            piece takes all that is left once that fits in `longest`. `core` and `context` must be whole numbers of
            frames, `longest` at least core + 2 context; where it is not given, see `longest_piece`.
        combine(parts, lengths): for kind "global" with `window`: one array from those of the pieces.
        scale_of(peak), quantise(frames, scale): frames are stored as `quantise` gives them, `scale` beside them, chosen
            from the highest |frame| of the utterance; stored x scale = frames.
        together (None): extractors of one class with equal `together` share a forward pass:
            `load_together(extractors, device)`, a class method, returns run(waves) -> a list of arrays per extractor.
        accelerated (False): gains from `device`: loaded once on each that the user names, and run there in batches,
            each device in its thread; on the CPU in worker processes.

    A field with metadata `{"identity": False}` (a path, say) stays out of the identity.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def sample_rate(self) -> int: ...
    @property
    def frame_rate(self) -> Fraction | None: ...
    @property
    def centre_s(self) -> Fraction: ...
    @property
    def dim(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    def load(self, device: str) -> Run: ...


@dataclass(frozen=True)
class Spec:
    """Everything that changes a number of a feature. Equal specs have equal `identity`.

    made_by, version: the extractor and the version of its algorithm.
    kind: how it may be aligned: continuous, f0, discrete, samples or global.
    frame_rate: frames per second, exact; None for kind "global".
    sample_rate: of the waveform it was computed from, Hz; None where it was computed from something else.
    centre_s: the time on which frame 0 is centred, seconds, exact.
    dim: channels per frame; 0 for one number per frame, arrays `(T,)`; None until the first array tells.
    dtype: as stored; None until the first array tells.
    settings: parameters, plain JSON values.
    weights: digest of pretrained weights, or None.
    pad: the value beyond the end (a log-mel's floor, 0 elsewhere).
    source: identity of the feature it was derived from (packed forms), or None.
    """

    made_by: str
    version: int
    kind: Kind
    frame_rate: Fraction | None = None
    sample_rate: int | None = None
    centre_s: Fraction = Fraction(0)
    dim: int | None = None
    dtype: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    pad: float = 0.0
    source: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise BadRequest(f"{self.made_by}: kind {self.kind!r} is none of {', '.join(get_args(Kind))}")
        if isinstance(self.version, bool) or not isinstance(self.version, int):
            raise BadRequest(f"{self.made_by}: version must be an integer that is raised when a number changes, "
                             f"not {self.version!r}")
        if (self.frame_rate is None) != (self.kind == "global"):
            raise BadRequest(f"{self.made_by}: kind {self.kind!r} with frame_rate {self.frame_rate}: "
                             "a frame rate is needed by all kinds but global")
        if self.frame_rate is not None:
            object.__setattr__(self, "frame_rate", Fraction(self.frame_rate))
            if self.frame_rate <= 0:
                raise BadRequest(f"{self.made_by}: frame_rate must be positive, not {self.frame_rate}")
        object.__setattr__(self, "centre_s", Fraction(self.centre_s))
        object.__setattr__(self, "pad", float(self.pad))
        object.__setattr__(self, "settings", plain(self.settings))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", np.dtype(self.dtype).name)

    @classmethod
    def of(cls, extractor: Extractor) -> Spec:
        """The full record of what `extractor` computes: its fields as settings, its weights by digest.

        Raises:
            MissingWeights: if its weights are not on this machine.
            CannotLoad: if they are no weights of its kind, or do not fit its settings.
        """
        if getattr(extractor, "version", None) is None:
            raise BadRequest(f"{type(extractor).__name__} has no version: give it `version: ClassVar[int] = 1` and "
                             "raise it whenever its numbers change; fresh and stale are told apart by it")
        if not dataclasses.is_dataclass(extractor):
            raise BadRequest(f"{type(extractor).__name__} is not a dataclass: its fields are what is recorded of it")
        try:
            return cls._record_of(extractor)
        except FeatstoreError:
            raise
        except FileNotFoundError as error:
            raise MissingWeights(str(error)) from error
        except ValueError as error:  # what its weights, or the files beside them, do not allow
            raise CannotLoad(str(error)) from error

    @classmethod
    def _record_of(cls, extractor: Any) -> Spec:
        settings = {f.name: getattr(extractor, f.name) for f in dataclasses.fields(extractor)
                    if f.metadata.get("identity", True)}
        settings = dict(getattr(extractor, "recorded", settings))
        window = getattr(extractor, "window", None)
        if window is not None:
            settings["window"] = _checked_window(extractor, window)
        settings["audio"] = AUDIO_VERSION
        return cls(made_by=extractor.name, version=extractor.version, kind=extractor.kind,
                   frame_rate=extractor.frame_rate, sample_rate=extractor.sample_rate, centre_s=extractor.centre_s,
                   dim=extractor.dim, dtype=getattr(extractor, "stored_dtype", extractor.dtype), settings=settings,
                   weights=getattr(extractor, "weights_digest", None), pad=getattr(extractor, "pad", 0.0))

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the canonical JSON, 64 hexadecimal digits."""
        if self.dim is None or self.dtype is None:
            raise BadRequest(f"{self.made_by}: the spec has no dim or dtype yet; the first array written sets them")
        return hashlib.sha256(canonical(self.to_json())).hexdigest()

    def completed(self, array: np.ndarray) -> Spec:
        """This spec with dim and dtype taken from a first array, where they are not given."""
        frame_axes = 0 if self.kind == "global" else 1
        dim = self.dim if self.dim is not None else (array.shape[-1] if array.ndim > frame_axes else 0)
        return dataclasses.replace(self, dim=dim, dtype=self.dtype or array.dtype.name)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; fractions as "n/d"."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Spec:
        """The spec that `to_json` gave."""
        values = dict(record)
        for name in ("frame_rate", "centre_s"):
            values[name] = Fraction(values[name]) if values[name] is not None else None
        return cls(**values)

    def differs(self, other: Spec) -> dict[str, tuple[Any, Any]]:
        """The fields in which two specs differ, `{field: (mine, other's)}`; settings by their dotted names."""
        mine, theirs = _flat(self.to_json()), _flat(other.to_json())
        return {name: (mine.get(name), theirs.get(name)) for name in sorted(mine.keys() | theirs.keys())
                if mine.get(name) != theirs.get(name)}


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: fractions as "n/d", dataclasses and mappings as dicts, tuples as lists."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator}"
    if isinstance(value, float | np.floating):
        if not np.isfinite(value):
            raise BadRequest(f"{value} cannot be part of a spec: settings must be finite")
        number = float(value)
        return int(number) if number.is_integer() and abs(number) < 2**53 else number  # fmin=0 is fmin=0.0
    if isinstance(value, np.integer):
        return int(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    raise BadRequest(f"{value!r} ({type(value).__name__}) cannot be part of a spec; use numbers, text, lists or dicts")


def canonical(value: Any) -> bytes:
    """The one JSON text of `value`: sorted keys, no spaces, UTF-8."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def longest_piece(window: Sequence[int]) -> int:
    """Samples of the longest piece that a `window` gives: with two parts, two cores and what precedes them."""
    core, context, *longest = window
    return longest[0] if longest else max(2 * core + context, core + 2 * context)


def _checked_window(extractor: Extractor, window: Sequence[int]) -> list[int]:
    """The window as it is recorded: as it was given."""
    rate = Fraction(extractor.frame_rate or extractor.sample_rate) / extractor.sample_rate  # frames per sample
    said = f"{extractor.name}: window {window!r}"
    if len(window) not in (2, 3) or not all(isinstance(part, int | np.integer) for part in window):
        raise BadRequest(f"{said}: expected (core, context) or (core, context, longest), whole numbers of samples")
    core, context = window[:2]
    if core < 1 or context < 0 or any((int(part) * rate).denominator != 1 for part in (core, context)):
        raise BadRequest(f"{said}: core and context must be whole numbers of frames ({1 / rate} samples each), core "
                         "at least one, context not negative")
    if longest_piece(window) < core + 2 * context:
        raise BadRequest(f"{said}: a piece of {core} samples with its context has {core + 2 * context}, so longest "
                         f"must be at least that, not {window[2]}")
    return [int(part) for part in window]


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        name = key if prefix in ("", "settings.") else prefix + key
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat
