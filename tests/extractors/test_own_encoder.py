"""examples/own_encoder.py: a third party's encoder in one file, through an entry point, as good a citizen as ours."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featstore
from featstore_extractors import parse

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_encoder.py"
CORPUS = ROOT / "examples" / "corpus"

pytest.importorskip("torch", reason="the example needs torch: featstore[encoders]")
pytest.importorskip("safetensors", reason="the example needs safetensors: featstore[encoders]")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    return importlib.import_module("own_encoder")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that packages are imported from, in which one is installed that holds nothing but the example."""
    folder = tmp_path / "site"
    info = folder / "own_encoder-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-encoder\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[featstore.extractors]\nown-encoder = own_encoder:OwnEncoder\n")
    shutil.copy(EXAMPLE, folder)
    monkeypatch.syspath_prepend(folder)
    return folder


def run(*words: Any, cwd: Path) -> str:
    """What a program prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True,
                          text=True, timeout=200)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


def weights_file(example: types.ModuleType, path: Path, seed: int = 0) -> str:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    save_file(example.Layers().state_dict(), path)
    return str(path)


def sound(seconds: float, level: float = 0.1) -> np.ndarray:
    return (level * np.random.default_rng(0).standard_normal(round(16000 * seconds))).astype(np.float32)


def test_the_example_has_less_than_80_lines() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 80


@pytest.mark.slow
def test_an_installed_encoder_is_extracted_by_name_and_stale_when_its_weights_are_replaced(
        site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # weights are named as they lie there
    requests = ["own-encoder:early,weights=own.safetensors", "energy", "other=own-encoder,weights=other.safetensors",
                "both=own-encoder,weights=own.safetensors,layer=1..2,mix=concat"]

    def stale() -> set[str]:
        store, extractors = featstore.open("s.zarr"), parse(*requests)
        states = {name: store.why("berklee_male/aa_A3", name, featstore.Spec.of(extractor)).state
                  for name, extractor in extractors.items()}
        assert set(states.values()) <= {"fresh", "stale"}
        return {name for name, state in states.items() if state == "stale"}

    run(site / "own_encoder.py", "own.safetensors", cwd=tmp_path)
    weights_file(importlib.import_module("own_encoder"), tmp_path / "other.safetensors", seed=1)
    run("-m", "featstore", "extract", CORPUS, "s.zarr", *[word for asked in requests for word in ("-f", asked)],
        cwd=tmp_path)
    assert "own-encoder: fresh" in run("-m", "featstore", "why", "s.zarr", "berklee_male/aa_A3", "own-encoder", "-f",
                                       requests[0], cwd=tmp_path)
    assert stale() == set()
    both = featstore.open("s.zarr")["berklee_male/aa_A3", "both"]
    assert both.shape[1] == 128 and np.isfinite(both).all()
    shutil.copy("other.safetensors", "own.safetensors")
    assert stale() == {"own-encoder", "both"}


def test_the_encoder_shares_a_pass_and_its_rows_do_not_depend_on_each_other(
        example: types.ModuleType, tmp_path: Path) -> None:
    path = weights_file(example, tmp_path / "own.safetensors")
    both = [example.OwnEncoder(weights=path, layer=layer, dtype="float32") for layer in ("1", "")]
    assert both[0].together == both[1].together
    waves = [sound(2), sound(0.5, level=1e-3), sound(1)[:640], sound(3.01, level=0.9)]
    for encoder, found in zip(both, example.OwnEncoder.load_together(both, "cpu")(waves), strict=True):
        alone = encoder.load("cpu")
        for wave, frames in zip(waves, found, strict=True):
            assert frames.shape == ((len(wave) - 640) // 320 + 1, 64)
            np.testing.assert_allclose(frames, alone([wave])[0], rtol=0, atol=2e-5 * np.abs(frames).max())
    with pytest.raises(ValueError, match="too short: 639 samples at 16000 Hz make no frame of own-encoder, 640 do"):
        both[0].load("cpu")([sound(1)[:639]])


def test_the_frames_of_a_window_are_those_of_the_whole(example: types.ModuleType, tmp_path: Path) -> None:
    encoder = example.OwnEncoder(weights=weights_file(example, tmp_path / "own.safetensors"), dtype="float32")
    run, wave, context = encoder.load("cpu"), sound(3), encoder.window[1]
    start, stop = 16000, 32000
    [whole], [piece] = run([wave]), run([wave[start - context : stop + context]])
    first = context // 320
    np.testing.assert_allclose(piece[first : first + 50], whole[50:100], rtol=0, atol=2e-5 * np.abs(whole).max())


def test_weights_that_are_not_its_own_are_refused(example: types.ModuleType, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "half.safetensors"
    save_file({"enter.weight": torch.zeros(64, 40, 1), "head.bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"half\.safetensors.*missing.*enter\.bias.*unexpected.*head\.bias"):
        example.OwnEncoder(weights=str(path)).load("cpu")
    with pytest.raises(FileNotFoundError, match=r"(?s)none\.safetensors.*a file that own_encoder\.py wrote"):
        example.OwnEncoder(weights=str(tmp_path / "none.safetensors")).load("cpu")
