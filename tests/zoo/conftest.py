"""A small store of real recordings for models to learn from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import featstore as fs
from featstore_extractors import parse

SMALL = {"channels": 32, "discriminators": ["mpd"], "discriminator_width": 0.05, "mpd_periods": [2, 3],
         "block_kernels": [3], "block_dilations": [[1, 3]], "batch": 2, "frames": 16, "validate_every": 1000,
         "valid_utterances": 1, "valid_s": 0.5}


@pytest.fixture(scope="session")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of four sentences of two speakers: log-mel, f0, wave."""
    from conftest import ROOT

    home = tmp_path_factory.mktemp("voices")
    for name in ("vctk_p225", "vctk_p226"):
        (home / "corpus" / name).mkdir(parents=True)
        for path in sorted((ROOT / "examples" / "corpus" / name).glob("*.flac")):
            (home / "corpus" / name / path.name).symlink_to(path)
    store = fs.create(home / "voices.zarr")
    report = fs.extract(fs.corpus(home / "corpus"), store, parse("log-mel", "f0:dio", "wave"), workers=0)
    assert not report.failures
    return home / "voices.zarr"


@pytest.fixture(scope="session")
def songs(voices: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sentences with loudness, energy, and what stands in for an encoder ("spin", 50 Hz) and a voice ("voice")."""
    import numpy as np

    path = tmp_path_factory.mktemp("songs") / "songs.zarr"
    shutil.copytree(voices, path)
    store = fs.open(path)
    assert not fs.extract(fs.corpus(voices.parent / "corpus"), store, parse("loudness", "energy"), workers=0).failures
    store = fs.open(path)
    with store.writer() as writer:
        writer.declare("spin", fs.Spec(made_by="spin", version=1, frame_rate=50, kind="continuous"))
        writer.declare("voice", fs.Spec(made_by="d-vector", version=1, kind="global"))
        for number, key in enumerate(store.utterances):
            drawn = np.random.default_rng(number)
            frames = round(store.utterances[key].duration_s * 50)
            writer.write(key, "spin", drawn.standard_normal((frames, 12)).astype(np.float16))
            writer.write(key, "voice", drawn.standard_normal(8).astype(np.float32))
    return path


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window, driven through its driver."""
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--window-size=1400,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield running
    running.quit()
