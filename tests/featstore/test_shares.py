"""Processes that share a corpus: shards that all of them can tell alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from corpora import ROOTS, age, contents, make_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Mean

import featstore as fs
from featstore import storage
from featstore.corpus import Corpus, Utterance
from featstore.shares import shard_named
from featstore.store import open_or_create

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(ROOTS)}


def of_lengths(lengths: list[float]) -> Corpus:
    return Corpus(Path(), "c", tuple(Utterance(f"u{i:05d}", f"u{i}.wav", duration_s=length)
                                        for i, length in enumerate(lengths)))


def seconds(corpus: Corpus) -> float:
    return sum(utterance.duration_s or 0.0 for utterance in corpus)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 400), max_size=60), st.integers(1, 9))
def test_shards_are_disjoint_together_the_whole_and_differ_by_one_utterance_at_most(lengths: list[float],
                                                                                    count: int) -> None:
    corpus = of_lengths(lengths)
    shards = [fs.shard(corpus, number, count) for number in range(1, count + 1)]
    assert sorted(utterance.key for part in shards for utterance in part) == [u.key for u in corpus]
    durations = [seconds(part) for part in shards]
    assert max(durations) - min(durations) <= max(lengths, default=0.0) + 0.001 * len(lengths)


def test_a_shard_does_not_depend_on_what_is_stored(tmp_path: Path) -> None:
    folder, store = make_corpus(tmp_path / "wavs", count=12), fs.create(tmp_path / "s.zarr")
    for i in range(12):
        wave, rate = np.random.default_rng(i).uniform(-0.5, 0.5, 800 * (i + 1)), 16000
        sf.write(folder / f"spk{i % 2}" / f"u{i:03d}.wav", wave, rate)
    age(folder)
    before = [utterance.key for utterance in fs.shard(fs.corpus(folder), 2, 3)]
    for number in (1, 2, 3):
        fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0, shard=(number, 3))
        assert [utterance.key for utterance in fs.shard(fs.corpus(folder), 2, 3)] == before
    assert len(store.features["mean"]) == 12


def test_of_many_files_sizes_tell_the_lengths_of_those_whose_headers_are_not_read(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, kind in enumerate(["wav", "flac"] * 20):
        (tmp_path / "wavs").mkdir(exist_ok=True)
        wave = np.random.default_rng(i).uniform(-0.5, 0.5, 1600 * (1 + i % 7))
        sf.write(tmp_path / "wavs" / f"u{i:02d}.{kind}", wave, 16000, subtype="PCM_16")
    corpus = fs.corpus(tmp_path / "wavs")
    exact = [fs.plan(corpus, None, {"mean": Mean()}).seconds]
    monkeypatch.setattr(sys.modules["featstore.plan"], "PROBED", 10)
    told = fs.plan(corpus, None, {"mean": Mean()}).seconds
    np.testing.assert_allclose(told, exact[0], rtol=0.1)


def test_cuts_of_one_recording_stay_together() -> None:
    corpus = Corpus(Path(), "c", tuple(Utterance(f"r{i // 5:03d}/{i % 5}", f"r{i // 5}.wav", start_s=i % 5 * 2.0,
                                                    end_s=i % 5 * 2.0 + 2) for i in range(500)))
    shards = [fs.shard(corpus, number, 4) for number in (1, 2, 3, 4)]
    assert sum(len({utterance.audio for utterance in part}) for part in shards) == 100
    assert {len(part) for part in shards} == {125}


def test_more_shards_than_utterances_leave_some_with_nothing_to_do(tmp_path: Path) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs", count=2)), fs.create(tmp_path / "s.zarr")
    done = [fs.extract(corpus, store, {"mean": Mean()}, workers=0, shard=(number, 4)).done for number in (1, 2, 3, 4)]
    assert sorted(done) == [0, 0, 1, 1]


@pytest.mark.parametrize(("text", "words"), [
    ("0/4", "shards are numbered from 1 to 4; give a job array the numbers 1-4"), ("5/4", "numbered from 1 to 4"),
    ("1/0", "at least one shard"), ("2", "such as 2/16"), ("a/b", "such as 2/16"), ("-1/4", "such as 2/16")])
def test_a_shard_that_makes_no_sense_is_refused(text: str, words: str) -> None:
    with pytest.raises(fs.errors.BadRequest, match=words):
        shard_named(text)


def test_a_shard_leaves_the_name_where_it_is_and_says_how_to_move_it(tmp_path: Path) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(tmp_path / "s.zarr")
    fs.extract(corpus, store, {"mean": Mean()}, workers=0)
    old = contents(store)
    for number in (1, 2):
        report = fs.extract(corpus, store, {"mean": Mean(gain=2.0)}, workers=0, replace=True, shard=(number, 2))
        assert contents(fs.open(store.path)) == old
    name, = report.to_use
    assert len(fs.open(store.path).feature(name)) == 6
    done = subprocess.run([sys.executable, "-m", "featstore", "use", str(store.path), name], env=ENVIRONMENT)
    assert done.returncode == 0
    np.testing.assert_array_equal(fs.open(store.path)["spk0/u000", "mean"],
                                  2 * np.frombuffer(old["spk0/u000", "mean"], np.float32))


def test_shards_that_start_at_once_make_one_store_and_all_failures_are_kept(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "wavs", count=12)
    for name in ("bad", "worse"):
        (folder / f"{name}.wav").write_text("this is no sound")
    command = [sys.executable, "-m", "featstore", "extract", str(folder), str(tmp_path / "s.zarr"), "-f", "energy",
               "--workers", "0", "--json", "--shard"]
    runs = [subprocess.Popen([*command, f"{number}/3"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
            for number in (1, 2, 3)]
    reports = [json.loads(run.communicate(timeout=60)[0]) for run in runs]
    store = fs.open(tmp_path / "s.zarr")
    assert sum(report["done"] - len(report["failures"]) for report in reports) == len(store.features["energy"]) == 12
    assert sum(report["utterances"] for report in reports) == 14
    assert {failure.utterance for failure in fs.failures(store)} == {"bad", "worse"}
    planned = subprocess.run([*command, "2/3", "--plan"], env=ENVIRONMENT, capture_output=True, text=True)
    assert json.loads(planned.stdout)["utterances"] == reports[1]["utterances"]


def test_a_store_that_several_ask_for_at_once_is_made_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.zarr" for n in range(20)]
    found: list[fs.Store] = []
    threads = [threading.Thread(target=lambda p=path: found.append(open_or_create(p)))
               for path in paths for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(store.path for store in found) == sorted(paths * 4)


def test_lines_of_several_processes_do_not_run_into_each_other(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"a line that was cut sho")
    lines = [f"{n}".encode() * 5000 + b"\n" for n in range(10)]
    threads = [threading.Thread(target=storage.append, args=(log, line)) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(log.read_bytes().splitlines()[1:]) == [line.rstrip() for line in lines]
