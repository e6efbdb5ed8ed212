"""From requests to extractors: the grammar, own extractors, entry points and what is refused."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import featstore_extractors
from featstore_extractors import TABLE, RequestError, describe, parse
from featstore_extractors.imports import stub_torchaudio, with_pkg_resources
from featstore_extractors.signal import Energy, LogMel, Loudness, MelEnergy, Wave

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def centroid(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The example of docs/extractors.md, importable as it is for a user who names its folder in PYTHONPATH."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("own_extractor")


@dataclass(frozen=True)
class Settings:
    """An extractor with a setting of each type."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"tenth": {"layer": 10, "fast": True}}
    name: ClassVar[str] = "settings"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "continuous"
    sample_rate: ClassVar[int] = 16000
    frame_rate: ClassVar[Fraction] = Fraction(50)
    centre_s: ClassVar[Fraction] = Fraction(0)
    dim: ClassVar[int] = 0
    dtype: ClassVar[str] = "float32"

    layer: int
    fast: bool = False
    gain: float = 1.0
    shift: Fraction = Fraction(0)
    weights: str | None = None
    lists: tuple[int, ...] = ()

    def load(self, device: str) -> Any: ...


@dataclass(frozen=True)
class Nameless:
    """An extractor without a version."""

    name: ClassVar[str] = "nameless"
    kind: ClassVar[str] = "continuous"


@dataclass
class Thawed:
    """A dataclass that is not frozen."""


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This module's extractors under the import path `mine`."""
    module = types.ModuleType("mine")
    for cls in (Settings, Nameless, Thawed):
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "mine", module)
    yield


def test_names_presets_and_settings_are_read() -> None:
    assert parse("log-mel", "e2=energy:mel,n_mels=80", "soft=loudness:A,floor=-80", "wave:44k") == {
        "log-mel": LogMel(), "e2": MelEnergy(n_mels=80), "soft": Loudness(weighting="A", floor=-80),
        "wave": Wave(sample_rate=44100)}


def test_a_setting_overrides_its_preset() -> None:
    assert parse("log-mel:44k-128,hop_length=256")["log-mel"] == LogMel.preset("44k-128").__class__(
        **{**LogMel.PRESETS["44k-128"], "hop_length": 256})


def test_energy_can_be_on_the_grid_of_the_reference() -> None:
    assert parse("energy:rms,hop=256,sample_rate=24000")["energy"].frame_rate == Fraction(24000, 256)


def test_order_is_that_of_the_requests() -> None:
    assert list(parse("wave", "log-mel", "energy")) == ["wave", "log-mel", "energy"]


def test_an_equals_sign_after_a_comma_is_no_name(mine: None) -> None:
    assert parse("x=mine.Settings,layer=3,weights=hub:a/b=c")["x"].weights == "hub:a/b=c"
    assert list(parse("energy,hop=240")) == ["energy"]


@pytest.mark.parametrize(("text", "field", "value"), [
    ("layer=7", "layer", 7), ("fast=yes", "fast", True), ("fast=false", "fast", False), ("gain=2", "gain", 2.0),
    ("gain=1e-3", "gain", 0.001), ("shift=1/3", "shift", Fraction(1, 3)), ("weights=none", "weights", None),
    ("weights=a/b.pt", "weights", "a/b.pt"), (" gain = 2 ", "gain", 2.0)])
def test_values_take_the_type_of_their_field(mine: None, text: str, field: str, value: Any) -> None:
    extractor = parse(f"mine.Settings:tenth,{text}")["settings"]
    assert getattr(extractor, field) == value and type(getattr(extractor, field)) is type(value)


@pytest.mark.parametrize(("request_", "words"), [
    ("log-mle", "no extractor 'log-mle'; there are log-mel, .*my_module.MyExtractor"),
    ("", "no extractor ''"),
    ("log-mel:24k", "no preset '24k' of LogMel; there are 24k-100, 44k-128, 22k-80"),
    ("mine.Nameless:fast", "no preset 'fast' of Nameless; it has none"),
    ("log-mel,hoplength=2", r"no setting 'hoplength' \(did you mean hop_length\?\); settings: sample_rate=24000, "),
    ("log-mel,hop_length", "'hop_length' is not KEY=VALUE"),
    ("log-mel,hop_length=256,hop_length=512", "hop_length is given twice"),
    ("log-mel,hop_length=2.5", "hop_length must be a whole number, not '2.5'"),
    ("log-mel,fmax=high", "fmax must be a number, not 'high'"),
    ("log-mel,fmax=nan", "fmax nan"),
    ("log-mel,mel_scale=bark", "mel_scale must be one of slaney, htk, not 'bark'"),
    ("log-mel,hop_length=255", "^log-mel,hop_length=255: n_fft 1024 - hop_length 255 is odd"),
    ("Upper=energy", "'Upper' cannot name a feature"),
    (f"{'a' * 65}=energy", "cannot name a feature"),
    ("=energy", "'' cannot name a feature"),
    ("mine.Settings", "layer=... must be given; settings: layer=..., fast=False"),
    ("mine.Settings,layer=1,fast=maybe", "fast must be true or false, not 'maybe'"),
    ("mine.Settings,layer=1,shift=1/0", "shift must be a number or fraction, not '1/0'"),
    ("mine.Settings,layer=1,lists=3", "lists cannot be set in a request"),
    ("mine.Nameless", "Nameless has no 'version'; an extractor states name, version, kind, "),
    ("mine.Thawed", "not a frozen one: write @dataclass.frozen=True"),
    ("mine.Absent", "mine has no 'Absent'; its dataclasses are Settings, Nameless, Thawed"),
    ("numpy.array", "numpy.array is no dataclass: an extractor is a frozen dataclass"),
    ("nowhere.to_be.Found", "no module 'nowhere' can be imported from here; .*PYTHONPATH"),
])
def test_what_cannot_be_met_is_refused_with_the_way_out(mine: None, request_: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        parse(request_)


def test_two_features_of_one_name_are_refused() -> None:
    with pytest.raises(RequestError, match="'energy' and 'energy:mel' would both be stored as 'energy': name one of "
                                           "them, as in energy-2=energy:mel"):
        parse("energy", "energy:mel")


def test_an_import_error_inside_a_users_module_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        parse("needs_more.Extractor")


def test_the_example_runs(centroid: types.ModuleType) -> None:
    extractors = parse("centroid=own_extractor.Centroid", "dull=own_extractor.Centroid,hop=480")
    tone = np.sin(2 * np.pi * 3000 * np.arange(24000) / 24000).astype(np.float32)
    [bright], [silent] = (extractors["centroid"].load("cpu")([wave]) for wave in (tone, 0 * tone))
    assert bright.shape == (24000 // 256,) and bright.dtype == np.float32
    np.testing.assert_allclose(bright, 3000, atol=60)
    np.testing.assert_array_equal(silent, 0)
    assert extractors["dull"].frame_rate == 50


def test_the_page_shows_the_example_as_it_is() -> None:
    example = (ROOT / "examples" / "own_extractor.py").read_text()
    page = (ROOT / "docs" / "extractors.md").read_text()
    assert "```python\n" + example[example.index("@dataclass") :].rstrip() + "\n```" in page


def test_the_page_names_every_standard_feature_preset_and_setting() -> None:
    page = "".join((ROOT / "docs" / name).read_text() for name in ("extractors.md", "encoders.md"))
    for name in sorted(TABLE.keys() - {"f0"}):  # f0 has a page of its own
        head, settings = describe(name).split("  ")
        for word in [name, *head.partition(":")[2].split("|"), *(pair.split("=")[0] for pair in settings.split(", "))]:
            assert not word or f"`{word}" in page or f"{name}:{word}`" in page, f"{name}: {word} is on neither page"


def test_an_installed_package_adds_an_extractor(centroid: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("bright", "own_extractor:Centroid", featstore_extractors.GROUP)
    monkeypatch.setattr(featstore_extractors.metadata, "entry_points", lambda group: [point] * (group == point.group))
    assert parse("b=bright,hop=128")["b"] == centroid.Centroid(hop=128)
    with pytest.raises(RequestError, match="there are bright, log-mel"):
        parse("brihgt")


@pytest.mark.parametrize("name", TABLE)
def test_every_standard_feature_is_an_extractor(name: str) -> None:
    extractor = parse(name)[name]
    assert all(hasattr(type(extractor), attribute) or attribute in vars(extractor)  # unread: weights may not be here
               for attribute in featstore_extractors.REQUIRED)
    assert describe(name).startswith(name)
    assert hash(extractor) == hash(parse(name)[name])


def test_frame_grid_features_agree_on_rate_centre_and_count() -> None:
    extractors = parse("f0", "energy", "loudness").values()
    assert {(e.frame_rate, e.centre_s) for e in extractors} == {(Fraction(200), Fraction(0))}
    for extractor in (Energy(), Loudness()):
        assert len(extractor.load("cpu")([np.zeros(extractor.sample_rate, np.float32)])[0]) == 201


def test_importing_the_package_and_log_mel_loads_numpy_alone() -> None:
    code = ("import sys; from featstore_extractors import parse; parse('log-mel', 'energy', 'wave');"
            "print(sorted({'torch', 'librosa', 'scipy', 'soundfile', 'zarr', 'featstore'} & set(sys.modules)))")
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                           env={"PYTHONPATH": ":".join(sys.path)})
    assert shown.stdout.strip() == "[]"


def test_a_stub_stands_in_for_torchaudio_only_while_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with stub_torchaudio():
        assert importlib.import_module("torchaudio") is sys.modules["torchaudio"] is not None
    assert sys.modules["torchaudio"] is None


def test_pkg_resources_is_stubbed_where_setuptools_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pkg_resources", types.ModuleType("pkg_resources"))
    del sys.modules["pkg_resources"]
    real = importlib.import_module

    def without(name: str) -> types.ModuleType:
        if name == "pkg_resources":
            raise ModuleNotFoundError(name=name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with_pkg_resources()
    assert sys.modules["pkg_resources"].get_distribution("numpy").version == np.__version__


@pytest.mark.parametrize("before", ["", "from transformers.utils.import_utils import is_torchaudio_available as known;"
                                        "known();"])
@pytest.mark.slow
def test_transformers_imports_beside_any_torchaudio(before: str) -> None:
    pytest.importorskip("torch")
    code = (f"{before}from featstore_extractors.imports import without_broken_torchaudio as fix; fix();"
            "from transformers import WavLMForXVector, WhisperModel, HubertModel")
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)}, timeout=120)
