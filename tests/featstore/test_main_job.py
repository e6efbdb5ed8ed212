"""The main job on all recordings at hand, by the command line, killed and resumed: minutes, so only where asked for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

import featstore as fs

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
ROOTS = os.pathsep.join(str(ROOT / name) for name in (".", "extractors", "align", "cli"))
FEATURES = ["log-mel", "f0", "energy", "loudness", "wave", "speaker"]


def command(corpus: Path, store: Path, *more: str) -> list[str]:
    requests = [word for name in FEATURES for word in ("-f", name)]
    return [sys.executable, "-m", "featstore", "extract", str(corpus), str(store), *requests, *more]


def finish(corpus: Path, store: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(corpus, store, *more), capture_output=True, text=True, timeout=600,
                          env=os.environ | {"PYTHONPATH": ROOTS})


def contents(path: Path) -> dict[tuple[str, str], bytes]:
    store = fs.open(path)
    return {(key, name): feature[key].read(check=True).tobytes()
            for name, feature in store.features.items() for key in feature}


def link_some(shared: Path, folder: Path, every: int) -> Path:
    """Every n-th recording, copied, so that a test may change it."""
    corpus = fs.corpus(shared / "audio")
    for utterance in list(corpus)[::every]:
        path = folder / utterance.audio
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(corpus.path(utterance), path)
    return folder


def test_all_recordings_once_and_other_programs_read_the_same_bytes(tmp_path: Path, shared: Path) -> None:
    import tensorstore
    import zarr

    done = finish(shared / "audio", tmp_path / "s.zarr")
    assert done.returncode == 0, done.stderr
    store = fs.open(tmp_path / "s.zarr")
    assert {name: len(feature) for name, feature in store.features.items()} == dict.fromkeys(sorted(FEATURES), 337)
    assert "Nothing to do: all 337 utterances are fresh." in finish(shared / "audio", tmp_path / "s.zarr").stdout
    for feature in store.features.values():
        for segment in feature.index.segments:
            frames = str(segment.folder / "frames")
            ours = np.empty(segment.layout.shape, feature.dtype)
            segment.read(0, ours)
            array = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": frames}}).result()
            np.testing.assert_array_equal(array.read().result(), ours)
            np.testing.assert_array_equal(np.asarray(zarr.open_array(frames, mode="r")[:]), ours)


def test_touch_redoes_nothing_a_change_redoes_one_and_a_setting_stops(tmp_path: Path, shared: Path) -> None:
    corpus, store = link_some(shared, tmp_path / "wavs", 12), tmp_path / "s.zarr"
    assert finish(corpus, store).returncode == 0
    before = contents(store)
    for path in corpus.rglob("*.flac"):
        path.touch()
    assert "Nothing to do" in finish(corpus, store).stdout
    changed = sorted(corpus.rglob("*.flac"))[3]
    wave, rate = sf.read(changed)
    sf.write(changed, wave * 0.5, rate)
    assert finish(corpus, store).stdout.startswith("1 utterances")
    after = contents(store)
    key = changed.relative_to(corpus).with_suffix("").as_posix()
    assert {k for k, _ in after if after[k, "log-mel"] != before[k, "log-mel"]} == {key}
    stopped = subprocess.run([sys.executable, "-m", "featstore", "extract", str(corpus), str(store), "-f",
                              "log-mel,n_mels=80"], capture_output=True, text=True,
                             env=os.environ | {"PYTHONPATH": ROOTS})
    assert stopped.returncode == 2
    assert "n_mels=100; you ask for n_mels=80" in stopped.stderr and "--replace" in stopped.stderr
    assert contents(store) == after


def test_ten_kills_and_a_rerun_give_the_store_of_an_undisturbed_run(tmp_path: Path, shared: Path) -> None:
    corpus = link_some(shared, tmp_path / "wavs", 9)
    assert finish(corpus, tmp_path / "whole.zarr").returncode == 0
    rng, kept = np.random.default_rng(11), {}
    store = tmp_path / "killed.zarr"
    for _ in range(10):
        process = subprocess.Popen(command(corpus, store, "--commit-every", "0.5"), start_new_session=True,
                                   env=os.environ | {"PYTHONPATH": ROOTS}, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 4))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (store / "zarr.json").exists():
            now = contents(store)
            assert now.items() >= kept.items()  # what was committed stays, bit for bit
            kept = now
    assert finish(corpus, store).returncode == 0
    assert contents(store) == contents(tmp_path / "whole.zarr")
    whole, killed = fs.open(tmp_path / "whole.zarr"), fs.open(store)
    assert dict(whole.utterances) == dict(killed.utterances)
    assert finish(corpus, store).stdout.startswith("Nothing to do")
