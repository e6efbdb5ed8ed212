"""The content encoder in the box: what it gives, what it costs, and what is said when its file is not right."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile

import featstore as fs
from featstore_extractors import hub, parse, weights
from featstore_extractors.mini import Mini, header

torch = pytest.importorskip("torch", reason="encoders need torch: featstore[encoders]")

RATE = 16000
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "corpus"


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    """Two recordings at 16 kHz and a short noise."""
    found = []
    for path in sorted(EXAMPLES.rglob("*.flac"))[:2]:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
        soxr = pytest.importorskip("soxr")
        found.append(soxr.resample(wave.mean(1), rate, RATE).astype(np.float32))
    return [*found, np.random.default_rng(0).normal(0, 0.1, 5000).astype(np.float32)]


def test_content_is_50_frames_a_second_whoever_is_beside_it(waves: list[np.ndarray]) -> None:
    extractor = Mini(dtype="float32")
    run = extractor.load("cpu")
    alone, together = [run([wave])[0] for wave in waves], run(waves)
    for wave, one, other in zip(waves, alone, together, strict=True):
        assert one.shape == (len(wave) // 320, extractor.dim)
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert extractor.frame_rate == Fraction(50)
    assert 128 <= extractor.dim <= 256


def test_phones_are_probabilities_of_the_inventory(waves: list[np.ndarray]) -> None:
    extractor = Mini(phones=True, dtype="float32")
    found = extractor.load("cpu")(waves[:1])[0]
    assert found.shape[1] == extractor.dim == len(extractor.inventory)
    np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-5)
    assert extractor.inventory[0] == "sil"


def test_a_frame_depends_on_nothing_beyond_the_window(waves: list[np.ndarray]) -> None:
    extractor = Mini(dtype="float32")
    core, context = extractor.window
    run = extractor.load("cpu")
    rng = np.random.default_rng(1)
    wave = rng.normal(0, 0.1, 2 * context + 320 * 10).astype(np.float32)
    changed = wave.copy()
    changed[: 320 * 3] = 0.0
    first = context // 320 + 3  # the first frame that has `context` between itself and the change
    whole, other = run([wave])[0], run([changed])[0]
    np.testing.assert_allclose(whole[first:], other[first:], atol=1e-5)
    assert np.abs(whole[: first - 8] - other[: first - 8]).max() > 1e-3
    assert core % 320 == 0 and context % 320 == 0


def test_the_box_keeps_its_promises() -> None:
    path = Mini().path
    assert path.stat().st_size <= 8_000_000
    assert sum(tensor.size for tensor in _tensors(path)) <= 4_000_000
    assert weights.file_digest(path) == Mini().weights_digest == hub.HUB[Mini.DEFAULT].box[1]  # type: ignore[index]


def test_it_is_listed_with_its_licence() -> None:
    by = {preset.request: preset for preset in weights.presets("mini")}
    assert set(by) == {"mini", "mini:phones"}
    assert by["mini"].wanted == "featstore/mini"
    assert hub.HUB["featstore/mini"].licence == "mit"


def test_other_bytes_than_the_box_ships_with_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    boxed = hub.HUB["featstore/mini"]
    monkeypatch.setitem(hub.HUB, "featstore/mini", boxed._replace(box=("mini.safetensors", "sha256:" + "0" * 64)))
    with pytest.raises(ValueError, match="install featstore again"):
        _ = Mini().weights_digest


def test_own_weights_are_taken_and_files_of_another_kind_named(tmp_path: Path, waves: list[np.ndarray]) -> None:
    own = Path(shutil.copy(Mini().path, tmp_path / "own.safetensors"))
    np.testing.assert_array_equal(Mini(weights=str(own)).load("cpu")(waves[:1])[0], Mini().load("cpu")(waves[:1])[0])
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no content encoder of this kind"):
        header(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has layers 0 to 0"):
        _ = Mini(layer="3").layers


def test_pieces_of_a_long_recording_give_what_the_whole_gives(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    wave = (rng.normal(0, 0.05, 60 * RATE) * np.repeat(rng.uniform(0, 1, 60), RATE)).astype(np.float32)
    (tmp_path / "a").mkdir()
    soundfile.write(tmp_path / "a" / "long.wav", wave, RATE, "FLOAT")
    store = fs.create(tmp_path / "s.zarr")
    fs.extract(fs.corpus(tmp_path / "a"), store, parse("mini,dtype=float32", "mini16=mini"))
    store = fs.open(tmp_path / "s.zarr")
    (key,) = store.utterances
    whole = Mini(dtype="float32").load("cpu")([wave])[0]
    np.testing.assert_allclose(store[key, "mini"][:], whole, atol=2e-5)
    assert store[key, "mini16"][:].dtype == np.float16


def _tensors(path: Path) -> list[np.ndarray]:
    from safetensors.numpy import load_file

    return list(load_file(path).values())
