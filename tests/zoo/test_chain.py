"""The whole way, as a user types it: extract, train each model for a few steps, convert, compare."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import conversions
import numpy as np
import pytest
import soundfile as sf
from click.testing import CliRunner
from conftest import ROOT

from featstore_cli import cli
from featstore_extractors.signal import LogMel
from featstore_zoo import run, validation

pytest.importorskip("lightning_fabric")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:.*num_workers.*:UserWarning")]
SONG = ROOT / "examples" / "corpus" / "berklee_female" / "aa_A4.flac"
MODELS = ("diffwavenet-svc", "transformer-svc", "como-svc", "vits-svc")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus of three short recordings, their features, and a vocoder after a few steps."""
    home = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        for name in ("berklee_male/aa_A3", "berklee_female/aa_Db5", "vctk_p226/p226_003"):
            target = home / "corpus" / f"{name}.flac"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(ROOT / "examples" / "corpus" / f"{name}.flac")
        typed(home, "extract", "corpus", "songs.zarr", "-f", "log-mel", "-f", "mel22=log-mel:22k-80", "-f", "f0:dio",
              "-f", "loudness", "-f", "wave", "--workers", "0")
        typed(home, "train", "nsf-hifigan", "songs.zarr", "-o", "voc", "--smoke", "--steps", "4", "--workers", "0",
              "--set", "valid_utterances=0")
        yield home


def typed(home: Path, *words: str) -> str:
    """What `featstore WORDS` says, run in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        done = CliRunner().invoke(cli, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_trained_converts_and_is_compared(model, place):
    typed(place, "train", model, "songs.zarr", "-o", model, "--content", "mel22", "--smoke", "--steps", "4",
          "--workers", "0")
    trained = run.load(place / model)
    assert set(trained.singers) == {"berklee_male", "berklee_female", "vctk_p226"}
    vocoder = [] if model == "vits-svc" else ["--vocoder", "voc"]
    out = f"{model}.flac"
    told = json.loads(typed(place, "convert", str(SONG), "--to", "berklee_male", "--run", model, *vocoder, "-o", out,
                            "--json"))
    exact = 12 * np.log2(trained.singers["berklee_male"].median_hz / 440)
    assert told[0]["semitones"] == pytest.approx(exact, abs=0.6)  # a whole number of them; the song is an A of 440 Hz
    wave, rate = sf.read(place / out, dtype="float32")
    song, _ = sf.read(SONG, dtype="float32")
    assert abs(len(wave) / rate - sf.info(SONG).duration) < 1e-3 and np.abs(wave).max() < 1
    found = validation.compare(song[:len(wave)], wave[:len(song)], LogMel())
    assert np.isfinite(found["log-mel L1"])


def test_the_example_converts(place, tmp_path):
    conversions.acoustic(tmp_path / "run", "transformer_svc")
    done = subprocess.run([sys.executable, ROOT / "examples" / "convert_song.py", SONG, "alice", "run", place / "voc"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "run knows alice, who sings about 262 Hz" in done.stdout and "+0 semitones" in done.stdout
    assert {path.name for path in tmp_path.glob("*.wav")} == {"aa_A4-alice.wav", "aa_A4-alice-as-it-is.wav"}
    assert len((ROOT / "examples" / "convert_song.py").read_text().splitlines()) < 30
