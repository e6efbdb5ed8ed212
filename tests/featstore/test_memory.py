"""What memory allows: how many workers of how many threads, which encoders together, in how many rounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpora import contents, make_corpus
from hypothesis import given
from hypothesis import strategies as st
from toys import Heavy, Mean

import featstore as fs
from featstore import memory
from featstore.memory import OVERHEAD, SHARE, WORKER, Round, rounds

GIB = 1 << 30
LIGHT = {("f0",): 0, ("mel",): 0}


def enough_for(workers: int, gib: float) -> int:
    """Free memory that just holds `workers` with so much weights each."""
    return int(workers * (WORKER + OVERHEAD * gib * GIB) / SHARE) + 1000


def test_without_weights_there_is_a_worker_per_core_whatever_the_memory() -> None:
    assert rounds(LIGHT, 8, 0, None, 1000) == [Round(("f0", "mel"), 8, 1)]


@pytest.mark.parametrize(("fit", "workers", "threads"), [(1, 1, 8), (2, 2, 4), (3, 3, 2), (5, 5, 1), (8, 8, 1),
                                                         (20, 8, 1)])
def test_as_many_workers_as_fit_share_the_cores(fit: int, workers: int, threads: int) -> None:
    weights = {**LIGHT, ("whisper",): 2 * GIB, ("l9", "l12"): GIB}
    names = ("f0", "mel", "whisper", "l9", "l12")
    assert rounds(weights, 8, enough_for(fit, 3), None, 1000) == [Round(names, workers, threads)]


def test_encoders_that_do_not_fit_together_take_turns_and_light_features_go_with_the_first() -> None:
    weights = {("whisper",): 3 * GIB, **LIGHT, ("contentvec",): GIB, ("wenet",): GIB}
    assert rounds(weights, 8, enough_for(1, 3), None, 1000) == [
        Round(("f0", "mel", "whisper"), 1, 8), Round(("contentvec", "wenet"), 1, 8)]
    assert rounds(weights, 8, enough_for(2, 1), None, 1000) == [
        Round(("f0", "mel", "whisper"), 1, 8), Round(("contentvec", "wenet"), 1, 8)]
    assert [one.names for one in rounds(weights, 8, 0, None, 1000)] == [
        ("f0", "mel", "whisper"), ("contentvec",), ("wenet",)]


def test_the_number_of_workers_that_is_asked_for_is_kept() -> None:
    weights = {("whisper",): 3 * GIB, ("contentvec",): GIB}
    assert rounds(weights, 8, 0, 4, 1000) == [Round(("whisper",), 4, 2), Round(("contentvec",), 4, 2)]
    assert rounds(weights, 8, enough_for(4, 4), 4, 1000) == [Round(("whisper", "contentvec"), 4, 2)]
    assert rounds(weights, 8, enough_for(1, 4), 0, 1000) == [Round(("whisper", "contentvec"), 0, 8)]
    assert rounds(LIGHT, 2, 0, 5, 1000) == [Round(("f0", "mel"), 5, 1)]


def test_one_long_recording_gets_all_cores() -> None:
    assert rounds({("whisper",): GIB}, 8, enough_for(100, 1), None, 1) == [Round(("whisper",), 1, 8)]
    assert rounds({("whisper",): GIB}, 8, enough_for(100, 1), None, 3) == [Round(("whisper",), 3, 2)]


@given(sizes=st.lists(st.integers(0, 8), max_size=6), cores=st.integers(1, 64), gib=st.integers(0, 200),
       asked=st.none() | st.integers(0, 16), tasks=st.integers(0, 100))
def test_every_feature_is_in_one_round_and_no_core_is_given_twice(sizes: list[int], cores: int, gib: int,
                                                                  asked: int | None, tasks: int) -> None:
    weights = {(f"x{i}", f"y{i}"): size * GIB for i, size in enumerate(sizes)}
    found = rounds(weights, cores, gib * GIB, asked, tasks)
    names = [name for one in found for name in one.names]
    assert sorted(names) == sorted(name for group in weights for name in group)
    for one in found:
        assert one.threads >= 1 and one.workers == asked if asked is not None else one.workers >= 1
        if asked is None:
            assert one.workers * one.threads <= cores


def test_free_memory_is_the_least_of_the_machine_and_its_containers(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/pod/box\n")
    box = tmp_path / "root" / "pod" / "box"
    box.mkdir(parents=True)
    for folder, limit, used, inactive in ((box, "max", 5, 1), (box.parent, 4 * GIB, 3 * GIB, GIB // 2)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\ninactive_file {inactive}\n")
    assert list(memory._containers(tmp_path / "cgroup", tmp_path / "root")) == [GIB + GIB // 2]
    assert memory.free() > 0


def test_limits_of_old_control_groups_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("5:cpu:/\n4:memory:/job\n0::/\n")
    job = tmp_path / "root" / "memory" / "job"
    job.mkdir(parents=True)
    for name, value in (("limit_in_bytes", GIB), ("usage_in_bytes", GIB + 5), ("stat", "total_inactive_file 0")):
        (job / f"memory.{name}").write_text(f"{value}\n")
    assert list(memory._containers(tmp_path / "cgroup", tmp_path / "root")) == [0]
    assert list(memory._containers(tmp_path / "nothing", tmp_path / "root")) == []


@pytest.mark.parametrize("workers", [0, None])
def test_rounds_store_what_one_run_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int | None) -> None:
    folder, marks = make_corpus(tmp_path / "wavs"), tmp_path / "loads"
    (folder / "spk0" / "bad.wav").write_text("this is no sound")
    wholes, parts = fs.create(tmp_path / "whole.zarr"), fs.create(tmp_path / "parts.zarr")
    extractors = {"a": Heavy(marks=str(marks)), "mean": Mean(), "b": Heavy(offset=1, marks=str(marks))}
    fs.extract(fs.corpus(folder), wholes, extractors, workers=0)
    marks.unlink()
    monkeypatch.setattr(memory, "free", lambda: enough_for(1, 1))
    monkeypatch.setattr(memory, "cores", lambda: 2)
    seen: list[fs.Progress] = []
    report = fs.extract(fs.corpus(folder), parts, extractors, workers=workers, progress=seen.append)
    assert contents(parts) == contents(wholes)
    assert dict(parts.utterances) == dict(wholes.utterances)
    assert (report.done, report.fresh, [f.utterance for f in report.failures]) == (7, 0, ["spk0/bad"])
    assert report.audio_s == pytest.approx(3.0)
    assert (seen[-1].done, seen[-1].total) == (7, 7) and [one.done for one in seen] == sorted(one.done for one in seen)
    loads = [line.split() for line in marks.read_text().splitlines()]
    assert [load[0] for load in loads] == ["0", "1"]
    if workers is None:
        assert loads[0][2] != loads[1][2] and {load[3] for load in loads} == {"2"}  # all cores of one worker


def test_a_round_that_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, marks = fs.corpus(make_corpus(tmp_path / "wavs")), tmp_path / "loads"
    store = fs.create(tmp_path / "s.zarr")
    extractors = {"a": Heavy(marks=str(marks)), "b": Heavy(offset=1, marks=str(marks))}
    fs.extract(corpus, store, {"a": extractors["a"]}, workers=0)
    monkeypatch.setattr(memory, "free", lambda: 0)
    report = fs.extract(corpus, store, extractors, workers=0)
    assert (report.done, len(marks.read_text().splitlines())) == (6, 2)
    np.testing.assert_array_equal(np.asarray(store["spk0/u000", "b"]), np.asarray(store["spk0/u000", "a"]) + 1)
