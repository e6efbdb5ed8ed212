"""The engine: what is extracted, what is left alone, what a bad recording costs, what a killed run keeps."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from corpora import ROOTS, age, contents, make_corpus
from toys import Broken, Layer, Loud, Mean, NoPackage, OnDevice, Replaced, Slow, Total, Whole, Windowed

import featstore as fs
from featstore import audio, work


def test_everything_is_stored_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(tmp_path / "s.zarr")
    first = fs.extract(corpus, store, {"mean": Mean(), "total": Total()}, workers=2)
    assert (first.done, first.fresh, first.failures, first.ok) == (6, 0, [], True)
    assert sorted(store.features) == ["mean", "total"] and len(store.features["mean"]) == 6
    wave, _ = sf.read(tmp_path / "wavs" / "spk1" / "u003.wav", dtype="float32")
    np.testing.assert_array_equal(store["spk1/u003", "mean"], Mean().of(wave))
    assert store.utterances["spk1/u003"].speaker == "spk1"
    assert store.utterances["spk1/u003"].duration_s == 0.5
    before = sorted(p for p in store.path.rglob("*"))
    second = fs.extract(corpus, store, {"mean": Mean(), "total": Total()}, workers=2)
    assert (second.done, second.fresh) == (0, 6)
    assert sorted(p for p in store.path.rglob("*")) == before


def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    corpus = fs.corpus(make_corpus(tmp_path / "wavs", rate=22050))
    stores = [fs.create(tmp_path / f"{n}.zarr") for n in range(3)]
    for workers, store in enumerate(stores):
        fs.extract(corpus, store, {"mean": Mean(), "loud": Loud()}, workers=workers)
    assert contents(stores[0]) == contents(stores[1]) == contents(stores[2])


def test_audio_is_decoded_once_and_resampled_once_per_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    rates: list[tuple[int, int]] = []

    class Reader(audio.Reader):
        def __init__(self, path: str, *args: float, **more: float) -> None:
            decoded.append(path)
            super().__init__(path, *args, **more)

    class Resampler(audio.Resampler):
        def __init__(self, source: int, target: int) -> None:
            rates.append((source, target))
            super().__init__(source, target)

    monkeypatch.setattr(audio, "Reader", Reader)
    monkeypatch.setattr(audio, "Resampler", Resampler)
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs", rate=44100)), fs.create(tmp_path / "s.zarr")
    fs.extract(corpus, store, {"mean": Mean(), "windowed": Windowed(), "total": Total()}, workers=0)
    assert len(decoded) == len(set(decoded)) == 6
    assert rates == [(44100, 16000)] * 6


def test_a_changed_recording_is_redone_and_no_other(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "wavs")
    store = fs.create(tmp_path / "s.zarr")
    fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0)
    wave, _ = sf.read(folder / "spk0" / "u002.wav")
    sf.write(folder / "spk0" / "u002.wav", wave[::-1], 16000, subtype="PCM_16")
    report = fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0)
    assert (report.done, report.fresh) == (1, 5)
    np.testing.assert_allclose(store["spk0/u002", "mean"], Mean().of(wave[::-1].astype(np.float32)), atol=1e-4)
    assert store.why("spk0/u002", "mean").state == "fresh"


def test_touch_redoes_nothing_and_is_hashed_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_corpus(tmp_path / "wavs")
    store = fs.create(tmp_path / "s.zarr")
    fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0)
    hour_and_half_ago = time.time() - 5400
    for path in folder.rglob("*.wav"):
        os.utime(path, (hour_and_half_ago, hour_and_half_ago))
    hashed: list[str] = []
    original = audio.file_digest
    monkeypatch.setattr(audio, "file_digest", lambda path: hashed.append(str(path)) or original(path))
    for expected in (6, 6):
        report = fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0)
        assert (report.done, report.fresh, len(hashed)) == (0, 6, expected)


def test_a_young_file_is_hashed_again(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "wavs", count=1)
    path = folder / "spk0" / "u000.wav"
    os.utime(path)
    store = fs.create(tmp_path / "s.zarr")
    fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0)
    times = path.stat()
    wave, _ = sf.read(path)
    sf.write(path, -wave[::-1], 16000, subtype="PCM_16")  # same size, and the same time on a coarse clock
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0).done == 1


def test_rehash_finds_what_size_and_time_hide(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "wavs", count=2)
    path = folder / "spk0" / "u000.wav"
    store = fs.create(tmp_path / "s.zarr")
    fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0)
    times = path.stat()
    wave, _ = sf.read(path)
    sf.write(path, wave[::-1], 16000, subtype="PCM_16")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0).done == 0
    assert fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0, rehash=True).done == 1


def test_a_recording_that_changes_while_it_is_planned_is_redone_the_next_time(tmp_path: Path,
                                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_corpus(tmp_path / "wavs", count=1)
    path = folder / "spk0" / "u000.wav"
    store = fs.create(tmp_path / "s.zarr")
    fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0)
    os.utime(path, (time.time() - 1800,) * 2)
    original = audio.file_digest

    def digest_and_change(name: str) -> bytes:
        found = original(name)
        sf.write(path, sf.read(path)[0][::-1], 16000, subtype="PCM_16")
        age(folder)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(audio, "file_digest", digest_and_change)
        assert fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0).done == 0
    assert fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0).done == 1
    np.testing.assert_array_equal(np.asarray(store["spk0/u000", "mean"]),
                                  Mean().of(sf.read(path, dtype="float32")[0]))


def test_rehash_writes_nothing_where_nothing_changed(tmp_path: Path) -> None:
    folder, store = make_corpus(tmp_path / "wavs"), fs.create(tmp_path / "s.zarr")
    fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0)
    before = sorted(store.path.rglob("*"))
    fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0, rehash=True)
    assert sorted(store.path.rglob("*")) == before


def test_a_new_text_renews_the_record_and_extracts_nothing(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "wavs", count=2)
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,key,text\nwavs/spk0/u000.wav,a,hello\nwavs/spk1/u001.wav,b,there\n")
    store = fs.create(tmp_path / "s.zarr")
    fs.extract(fs.corpus(manifest), store, {"mean": Mean()}, workers=0)
    manifest.write_text("path,key,text\nwavs/spk0/u000.wav,a,hello\nwavs/spk1/u001.wav,b,world\n")
    report = fs.extract(fs.corpus(manifest), store, {"mean": Mean()}, workers=0)
    assert report.done == 0 and folder.exists()
    assert [store.utterances[key].text for key in "ab"] == ["hello", "world"]
    assert store.utterances["b"].duration_s == 0.5


def test_another_setting_under_the_same_name_stops_before_any_work(tmp_path: Path) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(tmp_path / "s.zarr")
    fs.extract(corpus, store, {"mean": Mean()}, workers=0)
    before = contents(store)
    with pytest.raises(fs.errors.IdentityMismatch, match=r"gain=1; you ask for gain=2(.|\n)*keep both(.|\n)*--replace"):
        fs.extract(corpus, store, {"mean": Mean(gain=2.0)}, workers=0)
    assert contents(fs.open(store.path)) == before


def test_replace_moves_the_name_only_when_all_is_done(tmp_path: Path) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(tmp_path / "s.zarr")
    fs.extract(corpus, store, {"slow": Slow(wait_s=0.0)}, workers=0)
    reader = fs.open(store.path)
    first = contents(reader)

    sent: list[int] = []

    def stop(progress: fs.Progress) -> None:
        if not sent:
            sent.append(progress.done)
            os.kill(os.getpid(), signal.SIGINT)

    report = fs.extract(corpus, store, {"slow": Slow(2.0, wait_s=0.3)}, workers=0, replace=True, progress=stop)
    assert report.interrupted and 0 < report.done < 6
    assert contents(fs.open(store.path)) == first
    report = fs.extract(corpus, store, {"slow": Slow(2.0, wait_s=0.3)}, workers=0, replace=True)
    assert (report.done + report.fresh, report.interrupted) == (6, False)
    key = "spk0/u000"
    np.testing.assert_array_equal(fs.open(store.path)[key, "slow"], 2 * np.asarray(reader[key, "slow"]))
    assert contents(reader) == first  # its snapshot stays what it was


@pytest.mark.parametrize("seconds", [0.2, 1.0, 2.005, 2.01, 2.02, 2.995, 3.0, 3.01, 4.7, 45.3])
def test_pieces_of_long_audio_give_the_whole(seconds: float, tmp_path: Path) -> None:
    corpus = fs.corpus(make_corpus(tmp_path / "wavs", count=1, seconds=seconds))
    bench = work.Workbench({"windowed": Windowed(), "whole": Whole(), "total": Total()}, "cpu", tmp_path / "spool")
    made = bench.make(work.Task("x", str(next((tmp_path / "wavs").rglob("*.wav"))), 0.0, None,
                                ("windowed", "whole", "total")))
    assert made.failures == {} and len(corpus) == 1
    windowed, whole = (np.concatenate(list(made.frames[name].blocks())) for name in ("windowed", "whole"))
    np.testing.assert_array_equal(windowed, whole)
    assert next(made.frames["total"].blocks())[0][0] == pytest.approx(seconds)


def test_long_recordings_go_by_the_disk_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = fs.corpus(make_corpus(tmp_path / "wavs", count=2, seconds=30))
    stores = [fs.create(tmp_path / f"{n}.zarr") for n in range(2)]
    extractors = {"windowed": Windowed(), "loud": Loud(), "device": OnDevice()}
    fs.extract(corpus, stores[0], extractors, workers=0)
    monkeypatch.setattr(work, "SPOOL_BYTES", 1000)
    fs.extract(corpus, stores[1], extractors, workers=0, device="toy:0")
    assert contents(stores[0]) == contents(stores[1])
    assert not (stores[1].path / "spool").exists()


def test_a_window_of_broken_frames_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(tmp_path / "s.zarr")
    monkeypatch.setattr(Windowed, "window", (16000, 100))
    with pytest.raises(fs.errors.BadRequest, match="whole numbers of frames"):
        fs.extract(corpus, store, {"windowed": Windowed()}, workers=0)


def test_a_disk_that_fills_with_a_long_recording_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(type(Path())):  # type: ignore[misc]
        def open(self, mode: str = "r", *more: object) -> object:
            return Path("/dev/full").open(mode) if mode == "ab" else super().open(mode, *more)

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this machine")
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs", count=2)), fs.create(tmp_path / "s.zarr")
    monkeypatch.setattr(work, "SPOOL_BYTES", 10)
    monkeypatch.setattr(work, "Path", Full)
    with pytest.raises(fs.errors.DiskFull, match="no space left"):
        fs.extract(corpus, store, {"mean": Mean()}, workers=0)


def test_requests_that_share_a_pass_run_it_once(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(tmp_path / "s.zarr")
    fs.extract(corpus, store, {f"l{n}": Layer(layer=n, marks=str(marks)) for n in (3, 7)}, workers=0)
    assert len(list(marks.iterdir())) == 6
    np.testing.assert_array_equal(np.asarray(store["spk0/u000", "l7"]), np.asarray(store["spk0/u000", "l3"]) + 4)


def test_a_device_gets_batches_and_a_bad_one_costs_only_itself(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "wavs", count=9, seconds=0.7)
    sf.write(folder / "spk0" / "loud.wav", np.full(8000, 0.995), 16000, subtype="FLOAT")
    age(folder)
    marks = tmp_path / "batches.txt"
    stores = [fs.create(tmp_path / f"{n}.zarr") for n in range(2)]
    on_device = fs.extract(fs.corpus(folder), stores[0], {"d": OnDevice(marks=str(marks)), "mean": Mean()},
                           workers=1, device="toy:0")
    assert max(int(line.split()[1]) for line in marks.read_text().splitlines()) > 1
    assert {line.split()[0] for line in marks.read_text().splitlines()} == {"toy:0"}
    fs.extract(fs.corpus(folder), stores[1], {"d": OnDevice(), "mean": Mean()}, workers=0)
    assert contents(stores[0]) == contents(stores[1])
    assert [(f.utterance, f.feature, f.reason) for f in on_device.failures] == \
        [("spk0/loud", "d", "too loud for this device")]
    assert "spk0/loud" in stores[0].features["mean"]


@pytest.mark.parametrize(("how", "words"), [("raise", "IndexError: list index out of range"), ("nan", "NaN"),
                                            ("short", "at most 0.1 s")])
def test_an_extractor_that_goes_wrong_costs_one_feature_of_one_utterance(tmp_path: Path, how: str, words: str) -> None:
    folder = make_corpus(tmp_path / "wavs")
    sf.write(folder / "spk0" / "loud.wav", np.sin(np.arange(16000) / 9), 16000)
    store = fs.create(tmp_path / "s.zarr")
    report = fs.extract(fs.corpus(folder), store, {"broken": Broken(how=how), "mean": Mean()}, workers=0)
    assert [(f.utterance, f.feature) for f in report.failures] == [("spk0/loud", "broken")]
    assert words in report.failures[0].reason and not report.ok
    assert len(store.features["broken"]) == 6 and len(store.features["mean"]) == 7


def test_a_dead_worker_costs_the_utterance_that_killed_it(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "wavs", count=9)
    sf.write(folder / "spk0" / "killer.wav", np.sin(np.arange(16000) / 9), 16000)
    store = fs.create(tmp_path / "s.zarr")
    report = fs.extract(fs.corpus(folder), store, {"broken": Broken(how="kill")}, workers=2)
    assert [(f.utterance, f.feature) for f in report.failures] == [("spk0/killer", None)]
    assert "worker process died" in report.failures[0].reason
    assert len(store.features["broken"]) == 9


def test_an_extractor_that_cannot_load_stops_the_run_with_the_reason(tmp_path: Path) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(tmp_path / "s.zarr")
    for workers in (0, 1):
        with pytest.raises(fs.errors.CannotLoad, match="pip install nonesuch"):
            fs.extract(corpus, store, {"no-package": NoPackage()}, workers=workers)
        with pytest.raises(fs.errors.CannotLoad, match="no-package cannot be loaded: KeyError: 'smooth'"):
            fs.extract(corpus, store, {"no-package": NoPackage(error="KeyError")}, workers=workers)


@pytest.mark.parametrize("how", [{"workers": 0}, {"workers": 1}, {"workers": 0, "device": "toy:0"}])
def test_weights_that_are_replaced_while_a_run_begins_are_not_stored_as_the_old_ones(
        tmp_path: Path, how: dict[str, Any]) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(tmp_path / "s.zarr")
    weights = tmp_path / "weights"
    weights.write_text("old")
    with pytest.raises(fs.errors.CannotLoad, match=r"its weights were replaced after the run began .*run the same"):
        fs.extract(corpus, store, {"replaced": Replaced(weights=str(weights))}, **how)
    assert not store.utterances
    fs.extract(corpus, store, {"replaced": Replaced(weights=str(weights))}, **how)
    assert {feature.spec.weights for feature in store.features.values()} == {"new"}


def test_failures_are_remembered_until_they_are_mended(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "wavs", count=2)
    (folder / "spk0" / "bad.wav").write_text("this is no sound")
    store = fs.create(tmp_path / "s.zarr")
    for _ in range(2):
        report = fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0)
        assert [f.utterance for f in report.failures] == ["spk0/bad"] and not report.ok
    log = tmp_path / "s.zarr.failures.jsonl"
    assert len(log.read_text().splitlines()) == 1
    plan = fs.plan(fs.corpus(folder), store, {"mean": Mean()}, failures=fs.failures(store))
    item = plan.features["mean"]
    assert (item.fresh, item.stale, item.missing, item.failed) == (2, 0, 0, 1)
    sf.write(folder / "spk0" / "bad.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 8000), 16000)
    assert fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0).ok
    assert fs.failures(store) == []


def test_failures_within_the_allowance_are_ok(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "wavs", count=9)
    (folder / "bad.wav").write_text("this is no sound")
    store = fs.create(tmp_path / "s.zarr")
    outcomes = {allowed: fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0, allow_failures=allowed).ok
                for allowed in (0, 1, "5%", "10%")}
    assert outcomes == {0: False, 1: True, "5%": False, "10%": True}
    with pytest.raises(fs.errors.BadRequest, match="such as 5%"):
        fs.extract(fs.corpus(folder), store, {"mean": Mean()}, allow_failures="some")


def test_strict_stops_at_the_first_failure_and_keeps_what_is_done(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "wavs", count=9)
    (folder / "spk0" / "u003x.wav").write_text("this is no sound")
    store = fs.create(tmp_path / "s.zarr")
    report = fs.extract(fs.corpus(folder), store, {"mean": Mean()}, workers=0, strict=True)
    assert not report.ok and 0 < len(store.features["mean"]) < 9


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "wavs", count=2)
    corpus, store = fs.corpus(folder), fs.create(tmp_path / "s.zarr")
    (folder / "spk0" / "u000.wav").unlink()
    report = fs.extract(corpus, store, {"mean": Mean()}, workers=0)
    assert [(f.utterance, f.feature) for f in report.failures] == [("spk0/u000", None)]
    assert "exist" in report.failures[0].reason


def test_a_disk_too_small_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(tmp_path / "s.zarr")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(free=1000))
    with pytest.raises(fs.errors.DiskFull, match="Nothing was written"):
        fs.extract(corpus, store, {"mean": Mean()}, workers=0)
    assert len(fs.open(store.path).utterances) == 0


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_script_without_a_main_guard_extracts_once(tmp_path: Path) -> None:
    make_corpus(tmp_path / "wavs")
    script = tmp_path / "script.py"
    script.write_text("import featstore as fs\nfrom toys import Mean\nprint('started')\n"
                      "store = fs.create('s.zarr')\n"
                      "print(fs.extract(fs.corpus('wavs'), store, {'mean': Mean()}, workers=2).done)\n")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(ROOTS)})
    assert done.stdout.split() == ["started", "6"], done.stderr


EXTRACT = """
import sys
import featstore as fs
from toys import Slow, Mean
path = sys.argv[1]
from pathlib import Path
store = fs.open(path) if Path(path, "zarr.json").exists() else fs.create(path)
fs.extract(fs.corpus(sys.argv[2]), store, {"slow": Slow(wait_s=0.01), "mean": Mean()}, workers=2, commit_every_s=0.1)
"""


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "wavs", count=60, seconds=0.1)
    undisturbed = fs.create(tmp_path / "whole.zarr")
    fs.extract(fs.corpus(folder), undisturbed, {"slow": Slow(wait_s=0.01), "mean": Mean()}, workers=0)
    rng, path = np.random.default_rng(7), tmp_path / "killed.zarr"
    command = [sys.executable, "-c", EXTRACT, str(path), str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(ROOTS)}
    kept = 0
    for _ in range(4):
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        time.sleep(rng.uniform(0.6, 1.6))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (path / "zarr.json").exists():
            now = fs.open(path)
            assert contents(now).items() <= contents(undisturbed).items()
            stored = len(contents(now))
            assert stored >= kept  # nothing committed is lost
            kept = stored
    subprocess.run(command, env=environment, check=True, timeout=60)
    final = fs.open(path)
    assert contents(final) == contents(undisturbed)
    assert dict(final.utterances) == dict(undisturbed.utterances)


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs", count=40)), fs.create(tmp_path / "s.zarr")
    sent: list[int] = []

    def interrupt(progress: fs.Progress) -> None:
        if progress.done >= 3 and not sent:
            sent.append(progress.done)
            os.kill(os.getpid(), signal.SIGINT)

    report = fs.extract(corpus, store, {"slow": Slow(wait_s=0.1)}, workers=2, progress=interrupt)
    assert report.interrupted and 3 <= report.done < 40
    assert len(fs.open(store.path).features["slow"]) == report.done
    assert fs.extract(corpus, store, {"slow": Slow(wait_s=0.1)}, workers=2).done == 40 - report.done


TWICE = """
import os, signal, threading
import featstore as fs
from toys import Slow
def press_twice(progress):
    if not pressed:
        pressed.append(True)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
pressed = []
fs.extract(fs.corpus('wavs'), fs.create('s.zarr'), {'slow': Slow(wait_s=300)}, workers=2, progress=press_twice)
"""


def test_a_second_ctrl_c_waits_for_no_worker(tmp_path: Path) -> None:
    make_corpus(tmp_path / "wavs")
    done = subprocess.run([sys.executable, "-c", TWICE], cwd=tmp_path, capture_output=True, text=True, timeout=100,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(ROOTS)})
    assert "KeyboardInterrupt" in done.stderr  # and not after the five minutes that the workers would take
    assert len(fs.open(tmp_path / "s.zarr").utterances) == 0


def test_a_bundle_that_a_dying_pool_refuses_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs", count=30)), fs.create(tmp_path / "s.zarr")
    submit, calls = ProcessPoolExecutor.submit, []

    def refuse_the_third(self: ProcessPoolExecutor, *args: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise BrokenProcessPool("a process was terminated abruptly")
        return submit(self, *args)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", refuse_the_third)
    report = fs.extract(corpus, store, {"mean": Mean()}, workers=2)
    assert (report.done, report.failures, len(store.features["mean"])) == (30, [], 30)


def test_progress_counts_up_to_the_end(tmp_path: Path) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(tmp_path / "s.zarr")
    seen: list[fs.Progress] = []
    fs.extract(corpus, store, {"mean": Mean()}, workers=0, progress=seen.append)
    assert (seen[-1].done, seen[-1].total, seen[-1].failures) == (6, 6, 0)
    assert seen[-1].audio_s == pytest.approx(seen[-1].audio_total_s) == pytest.approx(3.0)


def test_cuts_of_one_recording_are_utterances_of_their_own(tmp_path: Path) -> None:
    make_corpus(tmp_path / "wavs", count=1, seconds=3)
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,key,start,end\n" + "".join(
        f"wavs/spk0/u000.wav,cut{i},{i * 0.5},{i * 0.5 + 0.5}\n" for i in range(6)))
    store = fs.create(tmp_path / "s.zarr")
    fs.extract(fs.corpus(manifest), store, {"mean": Mean()}, workers=0)
    wave, _ = sf.read(tmp_path / "wavs" / "spk0" / "u000.wav", dtype="float32")
    joined = np.concatenate([np.asarray(store[f"cut{i}", "mean"]) for i in range(6)])
    np.testing.assert_array_equal(joined, Mean().of(wave))


def test_broken_inputs_cost_a_line_each_and_good_ones_are_stored(tmp_path: Path, shared: Path) -> None:
    subprocess.run([sys.executable, shared / "make_audio_bad.py", tmp_path / "bad"], check=True, capture_output=True)
    subprocess.run([sys.executable, shared / "make_symlink_loop.py", tmp_path / "bad"], check=True)
    store = fs.create(tmp_path / "s.zarr")
    report = fs.extract(fs.corpus(tmp_path / "bad"), store, {"mean": Mean(), "loud": Loud()}, workers=2)
    failed = {failure.utterance for failure in report.failures}
    for name in ("empty_file", "no_samples", "text_named", "header_zero_rate", "nan_inf_float", "one_sample"):
        assert name in failed
    assert any("dangling" in name for name in failed) and not report.ok
    stored = set(store.features["mean"].keys())
    for key in ("header_streaming", "header_too_long", "odd_byte_count", "wrong_extension", "UPPER", "rate_192k",
                "antiphase_stereo", "same_stem/a/take1", "same_stem/b/take1", "loop/real", "line\nbreak",
                "Übung ñandú 歌声 🎤"):
        assert key in stored, key
    assert not stored & failed
    for key in stored:
        assert np.isfinite(store[key, "mean"]).all()
    assert store.utterances["truncated"].duration_s < 2 if "truncated" in stored else "truncated" in failed
    loud = store["float_over_range", "loud"]
    assert np.abs(loud.as_float()).max() > 10 and loud.scale > 1 / 32767
    assert "silent" in store.utterances["silence"].flags and "clipped" in report.flags
