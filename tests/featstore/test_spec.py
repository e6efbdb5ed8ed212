"""What a number was made by: identity, canonical JSON, what two specs differ in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import BadRequest
from featstore.spec import Spec, canonical, plain

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner,
                                                                                     max_size=3), max_leaves=6)
SETTINGS = st.dictionaries(st.text(min_size=1, max_size=6), PLAIN, max_size=4)
RATES = st.fractions(min_value=Fraction(1, 10), max_value=48000, max_denominator=512)


def _spec(**changes) -> Spec:
    return Spec(**{"made_by": "mel", "version": 1, "kind": "continuous", "frame_rate": 50, "dim": 4,
                   "dtype": "float16"} | changes)


@dataclass(frozen=True)
class Mel:
    """An extractor with a setting, a path that is none, and pretrained weights."""

    bands: int = 80
    rates: tuple[Fraction, ...] = (Fraction(1, 3),)
    path: str = field(default="/here", metadata={"identity": False})
    name: ClassVar[str] = "mel"
    version: ClassVar[int] = 2
    kind: ClassVar[str] = "continuous"
    sample_rate: ClassVar[int] = 16000
    frame_rate: ClassVar[Fraction] = Fraction(50)
    centre_s: ClassVar[Fraction] = Fraction(1, 100)
    dtype: ClassVar[str] = "float32"
    weights_digest: ClassVar[str] = "abc"

    @property
    def dim(self) -> int:
        return self.bands

    def load(self, device):
        return lambda waves: [np.zeros((1, self.bands), np.float32) for _ in waves]


@given(settings=SETTINGS, rate=RATES, centre=RATES)
def test_spec_comes_back_from_json_with_its_identity(settings, rate, centre):
    spec = _spec(settings=settings, frame_rate=rate, centre_s=centre)
    again = Spec.from_json(spec.to_json())
    assert again == spec and again.identity == spec.identity and again.differs(spec) == {}


@given(settings=SETTINGS)
def test_order_of_settings_does_not_change_the_identity(settings):
    assert _spec(settings=settings).identity == _spec(settings=dict(reversed(settings.items()))).identity


@pytest.mark.parametrize("change", [
    {"made_by": "mel2"}, {"version": 2}, {"kind": "discrete"}, {"frame_rate": Fraction(24000, 256)},
    {"sample_rate": 16000}, {"centre_s": Fraction(1, 100)}, {"dim": 5}, {"dtype": "float32"},
    {"settings": {"layer": 3}}, {"weights": "ab"}, {"pad": -11.5}, {"source": "ab"}])
def test_every_field_is_part_of_the_identity(change):
    changed = _spec(**change)
    assert changed.identity != _spec().identity
    assert set(changed.differs(_spec())) == (set(change) if "settings" not in change else {"layer"})


def test_identity_of_a_known_spec_never_moves():
    assert _spec(settings={"layer": 3, "window": [1, 2.5]}, frame_rate=Fraction(24000, 256)).identity == (
        "14339aaf7e5fb2a83b174edd849113df4be773a7b6d2c8bd7043215e7501b47a")


def test_equal_numbers_give_equal_identities():
    assert _spec(settings={"fmin": 0}).identity == _spec(settings={"fmin": 0.0}).identity
    assert _spec(settings={"fmin": -0.0}).identity == _spec(settings={"fmin": np.float32(0)}).identity


def test_differences_name_nested_settings_by_dots():
    one, other = _spec(settings={"contract": {"hop": 256, "log": "e"}}), _spec(settings={"contract": {"hop": 300}})
    assert one.differs(other) == {"contract.hop": (256, 300), "contract.log": ("e", None)}


def test_spec_of_an_extractor_records_its_fields_and_weights_but_not_its_paths():
    spec = Spec.of(Mel(bands=100, path="/there"))
    assert spec == Spec.of(Mel(bands=100, path="/elsewhere"))
    assert spec.settings == {"bands": 100, "rates": ["1/3"], "audio": 1} and spec.weights == "abc" and spec.dim == 100


def test_recorded_stands_in_for_the_fields_and_takes_no_weights_bytes():
    @dataclass(frozen=True)
    class Encoder(Mel):
        layer: str = ""  # the last one, whichever that is
        weights_bytes: ClassVar[int] = 1 << 30
        window: ClassVar[tuple[int, int, int]] = (320, 320, 960)

        @property
        def recorded(self):
            return {"layer": int(self.layer or 12)}

    assert Spec.of(Encoder()).settings == {"layer": 12, "window": [320, 320, 960], "audio": 1}
    assert Spec.of(Encoder()).identity == Spec.of(Encoder(layer="12")).identity
    assert Spec.of(Encoder(bands=100)).differs(Spec.of(Encoder())) == {"dim": (100, 80)}
    assert Spec.of(Encoder(layer="9")).differs(Spec.of(Encoder())) == {"layer": (9, 12)}


def test_extractor_without_a_version_is_refused():
    @dataclass(frozen=True)
    class Nameless:
        name: str = "x"

    with pytest.raises(BadRequest, match="has no version: give it"):
        Spec.of(Nameless())


def test_extractor_that_is_no_dataclass_is_refused():
    class Loose:
        version = 1

    with pytest.raises(BadRequest, match="is not a dataclass"):
        Spec.of(Loose())


@pytest.mark.parametrize(("change", "words"), [
    ({"kind": "cubic"}, "none of continuous"), ({"version": "1"}, "must be an integer"),
    ({"version": True}, "must be an integer"), ({"frame_rate": None}, "frame rate is needed"),
    ({"kind": "global"}, "frame rate is needed"), ({"frame_rate": 0}, "must be positive"),
    ({"settings": {"x": float("nan")}}, "must be finite"), ({"settings": {"x": object()}}, "cannot be part of a spec")])
def test_impossible_spec_is_refused(change, words):
    with pytest.raises(BadRequest, match=words):
        _spec(**change)


def test_spec_without_dim_has_no_identity_before_the_first_array():
    spec = _spec(dim=None, dtype=None)
    with pytest.raises(BadRequest, match="first array"):
        _ = spec.identity
    done = spec.completed(np.zeros((3, 7), np.float16))
    assert (done.dim, done.dtype) == (7, "float16") and done.identity


def test_dim_of_a_vector_per_utterance_is_its_length():
    spec = dataclasses.replace(_spec(kind="global", frame_rate=None, dim=None, dtype=None))
    assert spec.completed(np.zeros(256, np.float32)).dim == 256


@given(PLAIN)
def test_canonical_json_is_one_text_per_value(value):
    assert canonical(value) == canonical(plain(value)) and b"\n" not in canonical(value)
