"""Extraction on Ray, here with two workers on this machine: what a dead one costs, and that nothing else differs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from click.testing import CliRunner
from corpora import ROOTS, age, contents, make_corpus
from toys import Broken, Counted, Mean, NoPackage, OnDevice

import featstore as fs
from featstore_cli import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(ROOTS)  # what workers import
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    yield
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def test_a_worker_that_is_killed_costs_no_utterance(cluster: None, tmp_path: Path) -> None:
    folder, marks = make_corpus(tmp_path / "wavs", count=60, seconds=0.1), tmp_path / "marks"
    (folder / "bad.wav").write_text("this is no sound")
    corpus, extractors = fs.corpus(folder), {"counted": Counted(wait_s=0.05, marks=str(marks)), "mean": Mean()}
    store, local = fs.create(tmp_path / "s.zarr"), fs.create(tmp_path / "local.zarr")
    killed: list[int] = []

    def kill(progress: fs.Progress) -> None:
        if progress.done >= 15 and not killed:
            killed.append(int(marks.read_text().split()[1]))
            os.kill(killed[0], signal.SIGKILL)

    report = fs.extract(corpus, store, extractors, engine="ray", progress=kill)
    lines = [line.split() for line in marks.read_text().splitlines()]
    assert killed and len({pid for _, pid, _ in lines} - {str(killed[0])}) > 1
    expected = fs.extract(corpus, local, extractors, workers=0)
    assert (report.done, report.utterances, report.elsewhere) == (expected.done, 61, 0)
    assert report.failures == expected.failures and [f.utterance for f in report.failures] == ["bad"]
    assert contents(store) == contents(local) and dict(store.utterances) == dict(local.utterances)
    again = fs.extract(corpus, store, extractors, engine="ray")
    assert (again.done, again.fresh, again.audio_s) == (1, 60, 0.0)


def test_a_recording_that_kills_twice_is_listed_and_the_name_moves_when_the_rest_is_done(cluster: None,
                                                                                         tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "wavs", count=9)
    sf.write(folder / "spk0" / "killer.wav", np.sin(np.arange(16000) / 9), 16000)
    age(folder)
    store = fs.create(tmp_path / "s.zarr")
    fs.extract(fs.shard(fs.corpus(folder), 1, 1), store, {"broken": Broken(how="short")}, workers=0)
    report = fs.extract(fs.corpus(folder), store, {"broken": Broken(how="kill")}, engine="ray", replace=True)
    assert [(f.utterance, f.feature) for f in report.failures] == [("spk0/killer", None)]
    assert "worker process died" in report.failures[0].reason and report.done == 10
    assert fs.open(store.path).features["broken"].spec.settings["how"] == "kill"
    assert len(fs.open(store.path).features["broken"]) == 9


def test_actors_with_a_device_give_the_same_bytes(cluster: None, tmp_path: Path) -> None:
    corpus, marks = fs.corpus(make_corpus(tmp_path / "wavs", count=12)), tmp_path / "marks"
    stores = [fs.create(tmp_path / f"{n}.zarr") for n in range(2)]
    extractors = {"d": OnDevice(marks=str(marks)), "mean": Mean()}
    report = fs.extract(corpus, stores[0], extractors, device="toy:0", engine="ray", workers=1)
    assert (report.done, report.failures) == (12, [])
    assert {line.split()[0] for line in marks.read_text().splitlines()} == {"toy:0"}
    fs.extract(corpus, stores[1], extractors, workers=0)
    assert contents(stores[0]) == contents(stores[1])


def test_what_cannot_be_loaded_or_placed_is_said(cluster: None, tmp_path: Path) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs", count=2)), fs.create(tmp_path / "s.zarr")
    with pytest.raises(fs.errors.CannotLoad, match="pip install nonesuch"):
        fs.extract(corpus, store, {"no-package": NoPackage()}, engine="ray")
    with pytest.raises(fs.errors.CannotLoad, match=r"no machine of the Ray cluster has room .* 1 gpus"):
        fs.extract(corpus, store, {"d": OnDevice()}, engine="ray", device="cuda")
    with pytest.raises(fs.errors.BadRequest, match="each worker has one GPU"):
        fs.extract(corpus, store, {"d": OnDevice()}, engine="ray", device="cuda:0,1")


def test_ctrl_c_keeps_what_is_done(cluster: None, tmp_path: Path) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs", count=40)), fs.create(tmp_path / "s.zarr")
    sent: list[int] = []

    def interrupt(progress: fs.Progress) -> None:
        if progress.done >= 3 and not sent:
            sent.append(progress.done)
            os.kill(os.getpid(), signal.SIGINT)

    extractors = {"counted": Counted(wait_s=0.1, marks=str(tmp_path / "marks"))}
    report = fs.extract(corpus, store, extractors, engine="ray", progress=interrupt)
    assert report.interrupted and 3 <= report.done < 40
    assert len(fs.open(store.path).features["counted"]) == report.done


def test_without_a_cluster_the_way_to_one_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def none_runs(address: str, **_: object) -> None:
        raise ConnectionError(f"Could not find any running Ray instance at {address}")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", none_runs)  # what it finds depends on what else this machine runs
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    make_corpus(tmp_path / "wavs", count=1)
    command = ["extract", str(tmp_path / "wavs"), str(tmp_path / "s.zarr"), "-f", "energy", "--engine", "ray"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 2
    assert "RAY_ADDRESS names none" in done.stderr and "ray start --head" in done.stderr and "ray:local" in done.stderr
