"""Processes that share a corpus: shards that all of them can tell alone, and notes of who is at what."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from corpora import ROOTS, age, contents, make_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Counted, Mean

import featstore as fs
from featstore import storage
from featstore.corpus import Corpus, Utterance
from featstore.shares import EXPIRY_S, Share, shard_named
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
    found = [line for line in log.read_bytes().splitlines()[1:] if line]  # several may end the line that was cut
    assert sorted(found) == [line.rstrip() for line in lines]


def planned(folder: Path, path: Path, count: int = 40) -> tuple[fs.Plan, fs.Store]:
    store = fs.create(path)
    return fs.plan(fs.corpus(make_corpus(folder, count=count, seconds=0.05)), store, {"mean": Mean()}), store


def drawn(share: Share) -> list[str]:
    """Everything that a share gives out before it has to wait for others."""
    bundles = share.bundles(["mean"], patient=True)
    return [task.key for bundle in iter(lambda: next(bundles, None), None) for task in bundle or ()]


def test_shares_of_one_plan_give_everything_out_once(tmp_path: Path) -> None:
    plan, store = planned(tmp_path / "wavs", tmp_path / "s.zarr", count=100)
    for seed in range(5):
        shares = [Share(plan, store, f"{seed}-{number}") for number in range(4)]
        bundles = [share.bundles(["mean"], patient=True) for share in shares]
        found: list[str] = []
        rng, waiting = random.Random(seed), set(range(4))
        while waiting:
            number = rng.choice(sorted(waiting))
            bundle = next(bundles[number])
            found += [task.key for task in bundle or ()]
            waiting -= {number} if bundle is None else set()
        assert sorted(found) == [utterance.key for utterance in plan.corpus]
        for share in shares:
            share.close()
    assert not (store.path / "spool").exists()


def test_a_share_alone_goes_through_the_plan_from_its_start(tmp_path: Path) -> None:
    plan, store = planned(tmp_path / "wavs", tmp_path / "s.zarr")
    share = Share(plan, store, "alone")
    assert drawn(share) == [plan.corpus.utterances[i].key for i in plan.order()]
    share.close()


@pytest.mark.parametrize("how", ["its process is gone", "it is old and from another machine", "it is half written",
                                 "it is no note", "it is about other features", "it is of another shard"])
def test_a_note_does_not_count_if(tmp_path: Path, how: str) -> None:
    plan, store = planned(tmp_path / "wavs", tmp_path / "s.zarr")
    first = Share(plan, store, "first", (1, 2) if "shard" in how else None)
    held = [task.key for task in next(first.bundles(["mean"], patient=True)) or ()]
    note = next((store.path / "spool").iterdir())
    text = json.loads(note.read_text())
    if "gone" in how:
        done = subprocess.Popen([sys.executable, "-c", ""])
        done.wait()
        note.write_text(json.dumps(text | {"pid": done.pid}))
    elif "machine" in how:
        note.write_text(json.dumps(text | {"host": "another"}))
    elif "half" in how:
        note.write_text(json.dumps(text)[:-9])
    elif "no note" in how:
        note.write_text("[1, 2]")
    elif "features" in how:
        note.write_text(json.dumps(text | {"features": ["0123456789abcdef"]}))
    second = Share(plan, store, "second", (2, 2) if "shard" in how else None)
    if "machine" in how:
        assert not set(held) & set(drawn(second))  # it counts while it is young
        old = time.time() - EXPIRY_S - 10
        os.utime(note, (old, old))
        assert set(held) <= set(drawn(second))
    else:
        assert len(drawn(second)) == 40


def test_what_another_process_commits_is_not_given_out(tmp_path: Path) -> None:
    plan, store = planned(tmp_path / "wavs", tmp_path / "s.zarr")
    fs.extract(fs.shard(plan.corpus, 1, 2), store, {"mean": Mean()}, workers=0)
    share = Share(plan, store, "late")
    assert len(drawn(share)) == 20 and share.elsewhere == 20
    assert share.elsewhere_s == pytest.approx(20 * 0.05)


def test_rows_of_the_audio_before_are_no_reason_to_leave_a_recording_out(tmp_path: Path) -> None:
    folder, store = make_corpus(tmp_path / "wavs", count=4), fs.create(tmp_path / "s.zarr")
    fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0)
    old = store["spk0/u000", "mean"].read()
    sf.write(folder / "spk0" / "u000.wav", np.random.default_rng(9).uniform(-0.5, 0.5, 8000), 16000)
    plan = fs.plan(fs.corpus(folder), store, {"mean": Mean()})
    with store.writer() as writer:
        writer.write("spk0/u000", "mean", old)
    share = Share(plan, store, "after")
    assert drawn(share) == ["spk0/u000"]


def test_runs_that_share_a_store_of_objects_do_nothing_twice(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    folder, url, reports = make_corpus(tmp_path / "wavs", count=40, seconds=0.1), "memory://shares/s.zarr", []
    fs.create(url)
    threads = [threading.Thread(target=lambda: reports.append(
        fs.extract(fs.corpus(folder), fs.open(url), {"mean": Mean()}, workers=0))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.done + report.elsewhere + report.fresh for report in reports] == [40] * 3
    assert sum(report.done for report in reports) <= 42 and len(fs.open(url).features["mean"]) == 40
    assert not list((fs.open(url).path / "spool").iterdir())


HANG = """
import sys, time
import featstore as fs
from toys import Mean
fs.extract(fs.corpus(sys.argv[1]), fs.open(sys.argv[2]), {"mean": Mean()}, workers=0,
           progress=lambda progress: time.sleep(300))
"""


def test_what_a_killed_process_was_at_falls_to_one_that_waits_for_it(tmp_path: Path) -> None:
    folder, store = make_corpus(tmp_path / "wavs", count=20), fs.create(tmp_path / "s.zarr")
    process = subprocess.Popen([sys.executable, "-c", HANG, str(folder), str(store.path)], env=ENVIRONMENT)
    while not list(store.path.glob("spool/*")):
        time.sleep(0.02)
    seen: list[int] = []

    def kill(progress: fs.Progress) -> None:
        seen.append(progress.done)
        if progress.done == 4 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()

    report = fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0, progress=kill)
    assert 4 in seen and (report.done, report.elsewhere) == (20, 0)
    assert len(store.features["mean"]) == 20 and not (store.path / "spool").exists()


COUNTED = """
import sys
import featstore as fs
from toys import Counted
from featstore.store import open_or_create
report = fs.extract(fs.corpus(sys.argv[1]), open_or_create(sys.argv[2]), {"counted": Counted(wait_s=0.01,
                    marks=sys.argv[3])}, workers=int(sys.argv[4]), commit_every_s=float(sys.argv[5]))
print(report.done, report.elsewhere, report.fresh, len(report.failures))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_four_processes_do_little_twice_and_the_store_is_that_of_one(tmp_path: Path, workers: int) -> None:
    folder, marks = make_corpus(tmp_path / "wavs", count=600, seconds=0.1), tmp_path / "marks"
    command = [sys.executable, "-c", COUNTED, str(folder), str(tmp_path / "s.zarr"), str(marks), str(workers), "60"]
    runs = [subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    reports = [[int(word) for word in run.communicate(timeout=120)[0].split()] for run in runs]
    lines = [line.split()[0] for line in marks.read_text().splitlines()]
    assert len(set(lines)) == 600 and len(lines) - 600 <= 0.05 * 600
    assert [sum(report) for report in reports] == [600] * 4
    assert sum(report[0] > 0 for report in reports) > 1
    alone = fs.create(tmp_path / "alone.zarr")
    fs.extract(fs.corpus(folder), alone, {"counted": Counted(wait_s=0.01, marks=str(tmp_path / "more"))}, workers=0)
    store = fs.open(tmp_path / "s.zarr")
    assert contents(store) == contents(alone) and dict(store.utterances) == dict(alone.utterances)
    assert not (store.path / "spool").exists()


@pytest.mark.slow
def test_what_a_killed_run_loses_was_made_after_its_last_commit(tmp_path: Path) -> None:
    folder, marks = make_corpus(tmp_path / "wavs", count=400, seconds=0.1), tmp_path / "marks"
    command = [sys.executable, "-c", COUNTED, str(folder), str(tmp_path / "s.zarr"), str(marks), "0", "0.5"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while not marks.exists() or len(marks.read_text().splitlines()) < 200:
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = [line.split() for line in marks.read_text().splitlines()]
    homes = list((tmp_path / "s.zarr" / "features").glob("counted/*/segments/*/zarr.json"))
    last = max(home.stat().st_mtime_ns for home in homes)
    kept = len(fs.open(tmp_path / "s.zarr").features["counted"])
    assert kept >= sum(int(at) < last for _, _, at in before[:-1]) and kept > 0
    assert len(homes) > 1
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(400 - kept), "0", str(kept), "0"]
    assert len(marks.read_text().splitlines()) == len(before) + 400 - kept


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up in /proc")
def test_workers_end_with_the_process_that_is_killed(tmp_path: Path) -> None:
    folder, marks = make_corpus(tmp_path / "wavs", count=100, seconds=0.1), tmp_path / "marks"
    command = [sys.executable, "-c", COUNTED.replace("0.01", "0.2"), str(folder), str(tmp_path / "s.zarr"), str(marks),
               "2", "60"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not marks.exists():
        time.sleep(0.05)
    process.kill()
    process.wait()
    workers = {int(line.split()[1]) for line in marks.read_text().splitlines()}
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
