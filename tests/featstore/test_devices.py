"""Devices: several share the work, memory that runs out costs speed only, what goes wrong surfaces."""

from __future__ import annotations

import os
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
from toys import (
    Heavy,
    Layer,
    LayerOnDevice,
    Mean,
    Meeting,
    OnDevice,
    OnTorch,
    Picky,
    Tight,
    Total,
    Uneven,
    Windowed,
)

import featstore as fs
from featstore import audio, devices


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds a batch, so that a short recording makes several."""
    monkeypatch.setattr(devices, "BUDGET_S", 2.0)


def of_unlike_lengths(folder: Path, count: int = 12) -> Path:
    """Recordings of 0.2 to 1.3 s, and two of 12 and 25 s that are cut into pieces."""
    for i, seconds in enumerate([12, 25, *(0.2 + 0.1 * i for i in range(count))]):
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).uniform(-0.5, 0.5, round(16000 * seconds))
        sf.write(folder / f"u{i:03d}.wav", noise, 16000, subtype="PCM_16")
    age(folder)
    return folder


@pytest.mark.parametrize(("device", "names"), [
    ("cpu", ["cpu"]), ("cuda", ["cuda:0"]), ("cuda:1", ["cuda:1"]), ("cuda:0,1,3", ["cuda:0", "cuda:1", "cuda:3"]),
    ("cuda:0, cuda:2", ["cuda:0", "cuda:2"]), ("mps", ["mps"]), ("toy:0,1", ["toy:0", "toy:1"]),
    ("cuda:0,xpu:0,1", ["cuda:0", "xpu:0", "xpu:1"])])
def test_device_names_are_split(device: str, names: list[str]) -> None:
    assert devices.names_of(device) == names


@pytest.mark.parametrize("device", ["", "0", "cuda:", "cuda:x", "cuda:0,", "cuda:0,0", "cuda,cuda:0", "cpu,cuda:0",
                                    "mps,1", "cu da"])
def test_what_is_no_device_is_refused_before_any_work(device: str, tmp_path: Path) -> None:
    store = fs.create(tmp_path / "s.zarr")
    with pytest.raises(fs.errors.BadRequest, match="expected cpu, cuda, cuda:0, several as in cuda:0,1, or mps"):
        fs.extract(fs.corpus(make_corpus(tmp_path / "wavs", 1)), store, {"mean": Mean()}, device=device)
    assert not store.features


def test_two_devices_share_the_work_and_store_what_one_stores(tmp_path: Path, small_batches: None) -> None:
    corpus, marks = fs.corpus(of_unlike_lengths(tmp_path / "wavs")), tmp_path / "marks"
    marks.mkdir()
    stores = [fs.create(tmp_path / f"{n}.zarr") for n in range(3)]
    for store, device in zip(stores, ("toy:0,1", "toy:0", "cpu"), strict=True):
        meeting = Meeting(marks=str(marks), devices=2 if device == "toy:0,1" else 1)
        report = fs.extract(corpus, store, {"meeting": meeting, "mean": Mean()}, workers=0, device=device)
        assert (report.done, report.failures) == (14, [])
        if device == "toy:0,1":
            assert sorted(path.name for path in marks.iterdir()) == ["toy:0", "toy:1"]
    assert contents(stores[0]) == contents(stores[1]) == contents(stores[2])


@pytest.mark.usefixtures("small_batches")
def test_devices_that_overtake_one_another_change_no_byte(tmp_path: Path) -> None:
    corpus = fs.corpus(of_unlike_lengths(tmp_path / "wavs"))
    stores = [fs.create(tmp_path / f"{n}.zarr") for n in range(3)]
    extractors = {"uneven": Uneven(), "total": Total(), "d": OnDevice()}
    for store, device, workers in zip(stores, ("toy:0,1,2", "toy:0,1", "cpu"), (1, 0, 0), strict=True):
        assert fs.extract(corpus, store, extractors, workers=workers, device=device).ok
    assert contents(stores[0]) == contents(stores[1]) == contents(stores[2])


def test_a_batch_has_waveforms_of_like_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def of(self: OnDevice, device: str) -> object:
        def run(waves: list[np.ndarray]) -> list[np.ndarray]:
            seen.append(sorted(map(len, waves)))
            return [self.of(wave) for wave in waves]
        return run

    monkeypatch.setattr(OnDevice, "load", of)
    corpus, store = fs.corpus(of_unlike_lengths(tmp_path / "wavs", 20)), fs.create(tmp_path / "s.zarr")
    fs.extract(corpus, store, {"d": OnDevice()}, workers=0, device="toy:0")
    assert sum(map(len, seen)) > 30 > len(seen)
    assert all(sum(lengths) >= (1 - devices.PADDED) * len(lengths) * lengths[-1] for lengths in seen)


@pytest.mark.usefixtures("small_batches")
def test_audio_under_way_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[float] = []
    gather = devices.Devices._gather

    def watch(self: devices.Devices, *args: object) -> None:
        gather(self, *args)  # type: ignore[arg-type]
        held.append(self._held_s)

    monkeypatch.setattr(devices.Devices, "_gather", watch)
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs", 2, seconds=60)), fs.create(tmp_path / "s.zarr")
    assert fs.extract(corpus, store, {"uneven": Uneven()}, workers=0, device="toy:0").ok
    assert len(held) == 58 and max(held) <= devices.HELD * 2.0


@pytest.mark.parametrize("how", ["toy", "python", "cuda"])
def test_memory_that_runs_out_halves_the_batch_and_is_remembered(tmp_path: Path, how: str,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "BUDGET_S", 20.0)
    corpus, marks = fs.corpus(make_corpus(tmp_path / "wavs", 60)), tmp_path / "marks"
    stores = [fs.create(tmp_path / f"{n}.zarr") for n in range(2)]
    report = fs.extract(corpus, stores[0], {"tight": Tight(fits=3.2, how=how, marks=str(marks))}, workers=0,
                        device="toy:0")
    assert report.ok and report.done == 60
    fs.extract(corpus, stores[1], {"tight": Tight(fits=3.2)}, workers=0)
    assert contents(stores[0]) == contents(stores[1])
    sizes = [float(line) for line in marks.read_text().splitlines()]
    too_large = [i for i, size in enumerate(sizes) if size > 3.2]
    assert too_large == list(range(len(too_large)))  # at first; what follows knows
    assert sum(size for size in sizes if size <= 3.2) == 30 and max(sizes[len(too_large):]) > 1


def test_a_waveform_that_does_not_fit_alone_is_its_own_failure(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "wavs", 4)
    sf.write(folder / "spk0" / "long.wav", np.full(16000, 0.1), 16000)
    age(folder)
    store = fs.create(tmp_path / "s.zarr")
    report = fs.extract(fs.corpus(folder), store, {"tight": Tight(fits=0.5), "mean": Mean()}, workers=0, device="toy:0")
    assert [(f.utterance, f.feature) for f in report.failures] == [("spk0/long", "tight")]
    assert "toy:0 has too little memory for a piece of 1.0 s alone" in report.failures[0].reason
    assert "--device cpu" in report.failures[0].reason
    assert len(store.features["tight"]) == 4 and len(store.features["mean"]) == 5
    again = fs.extract(fs.corpus(folder), store, {"tight": Tight(fits=0.5)}, workers=0)
    assert "cpu has too little memory" in again.failures[0].reason and "--workers" in again.failures[0].reason


def test_a_budget_grows_back_towards_what_failed_and_not_beyond() -> None:
    budget = devices.Budget(240.0)
    for _ in range(1000):
        budget.fitted(240.0)
    assert budget.seconds == 240
    budget.failed(200.0)
    assert budget.seconds == 100
    for _ in range(1000):
        budget.fitted(budget.seconds)
    assert 150 < budget.seconds <= 160


@pytest.mark.parametrize("tight", [{"room": 1}, {"alone": True}])
@pytest.mark.slow
def test_encoders_that_do_not_fit_on_a_device_together_take_turns(tmp_path: Path, tight: dict[str, int]) -> None:
    corpus, marks = fs.corpus(make_corpus(tmp_path / "wavs")), str(tmp_path / "loads")
    stores = [fs.create(tmp_path / f"{n}.zarr") for n in range(2)]
    for store, settings, device in zip(stores, ({"on_device": True, **tight}, {}), ("toy:0", "cpu"), strict=True):
        Heavy.LOADED.clear()
        heavies = {f"h{n}": Heavy(offset=n, marks=marks, **settings) for n in range(3)}
        assert fs.extract(corpus, store, heavies, workers=0, device=device).ok
    assert contents(stores[0]) == contents(stores[1])


def test_bad_waveforms_in_a_batch_cost_only_themselves_and_few_runs(tmp_path: Path) -> None:
    folder, marks = make_corpus(tmp_path / "wavs", 30), tmp_path / "marks"
    for i in (7, 20):
        sf.write(folder / f"spk{i % 2}" / f"u{i:03d}.wav", np.full(8000, 0.995), 16000, subtype="FLOAT")
    age(folder)
    store = fs.create(tmp_path / "s.zarr")
    report = fs.extract(fs.corpus(folder), store, {"d": OnDevice(marks=str(marks))}, workers=0, device="toy:0")
    assert sorted(f.utterance for f in report.failures) == ["spk0/u020", "spk1/u007"]
    assert len(store.features["d"]) == 28
    assert len(marks.read_text().splitlines()) < 24  # one by one it would be 31


def test_what_cannot_load_on_one_device_stops_the_run_before_any_work(tmp_path: Path) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(tmp_path / "s.zarr")
    before = sorted(store.path.rglob("*"))
    with pytest.raises(fs.errors.CannotLoad, match="picky does not load on toy:1"):
        fs.extract(corpus, store, {"picky": Picky(refused="toy:1"), "mean": Mean()}, workers=0, device="toy:0,1")
    assert sorted(store.path.rglob("*")) == before


def test_a_device_that_torch_does_not_see_is_named_with_what_it_sees(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    number = torch.cuda.device_count()
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs", 1)), fs.create(tmp_path / "s.zarr")
    with pytest.raises(fs.errors.CannotLoad, match=rf"there is no cuda:{number}; torch .* sees .*--device cpu"):
        fs.extract(corpus, store, {"on-torch": OnTorch()}, workers=0, device=f"cuda:{number}")
    with pytest.raises(fs.errors.CannotLoad, match=r"torch .* knows no device 'quda'.*expected cpu, cuda"):
        fs.extract(corpus, store, {"on-torch": OnTorch()}, workers=0, device="quda")
    assert not store.features


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_ends_a_batch_surfaces_where_the_run_was_started(tmp_path: Path) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(tmp_path / "s.zarr")
    with pytest.raises(SystemExit, match="the thread is gone"):
        fs.extract(corpus, store, {"picky": Picky(dies=True)}, workers=0, device="toy:0,1")
    wait_for_threads()


def test_a_run_leaves_no_thread_behind(tmp_path: Path) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(tmp_path / "s.zarr")
    fs.extract(corpus, store, {"d": OnDevice()}, workers=0, device="toy:0,1")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("featstore ")]


def wait_for_threads() -> None:
    """After an error the threads end by themselves, soon."""
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("featstore ") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_strict_stops_at_the_first_failure_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "BUDGET_S", 1.0)
    folder = make_corpus(tmp_path / "wavs", 60)
    sf.write(folder / "spk0" / "u001x.wav", np.full(8000, 0.995), 16000, subtype="FLOAT")
    age(folder)
    store = fs.create(tmp_path / "s.zarr")
    report = fs.extract(fs.corpus(folder), store, {"d": OnDevice()}, workers=0, device="toy:0", strict=True)
    assert not report.ok and 0 < len(store.features["d"]) < 60


def test_a_full_disk_stops_a_run_on_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featstore.writer import Writer

    def full(self: Writer, *args: object, **more: object) -> None:
        raise fs.errors.DiskFull("no space left for it")

    monkeypatch.setattr(Writer, "write", full)
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(tmp_path / "s.zarr")
    with pytest.raises(fs.errors.DiskFull, match="no space left"):
        fs.extract(corpus, store, {"d": OnDevice()}, workers=0, device="toy:0,1")
    wait_for_threads()
    assert not (store.path / "spool").exists()


def test_ctrl_c_keeps_what_devices_have_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "BUDGET_S", 1.0)
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs", 60)), fs.create(tmp_path / "s.zarr")
    sent: list[int] = []

    def interrupt(progress: fs.Progress) -> None:
        if not sent:
            sent.append(progress.done)
            os.kill(os.getpid(), signal.SIGINT)

    extractors = {"uneven": Uneven(), "mean": Mean()}
    report = fs.extract(corpus, store, extractors, workers=0, device="toy:0,1", progress=interrupt)
    assert report.interrupted and 0 < report.done < 60
    assert len(fs.open(store.path).features["uneven"]) == report.done
    assert fs.extract(corpus, store, extractors, workers=0, device="toy:0").done == 60 - report.done


TWICE = """
import os, signal, threading
import featstore as fs
from toys import Uneven
def press_twice():
    for seconds in (1.0, 1.5):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
store = fs.create('s.zarr')
threading.Timer(1.0, press_twice).start()
fs.extract(fs.corpus('wavs'), store, {'uneven': Uneven(least_s=300)}, workers=0, device='toy:0')
"""


def test_a_second_ctrl_c_waits_for_no_device(tmp_path: Path) -> None:
    make_corpus(tmp_path / "wavs")
    done = subprocess.run([sys.executable, "-c", TWICE], cwd=tmp_path, capture_output=True, text=True, timeout=100,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(ROOTS)})
    assert "KeyboardInterrupt" in done.stderr
    assert len(fs.open(tmp_path / "s.zarr").utterances) == 0


EXTRACT = """
import sys
from pathlib import Path
import featstore as fs
from featstore import devices
from toys import Mean, Slow, Uneven
devices.BUDGET_S = 1.0
path = sys.argv[1]
store = fs.open(path) if Path(path, "zarr.json").exists() else fs.create(path)
extractors = {"uneven": Uneven(), "slow": Slow(wait_s=0.01), "mean": Mean()}
fs.extract(fs.corpus(sys.argv[2]), store, extractors, workers=1, device="toy:0,1", commit_every_s=0.1)
"""


@pytest.mark.slow
def test_a_killed_run_on_devices_goes_on_and_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    folder, path = make_corpus(tmp_path / "wavs", count=60, seconds=0.1), tmp_path / "killed.zarr"
    undisturbed = fs.create(tmp_path / "whole.zarr")
    from toys import Slow

    fs.extract(fs.corpus(folder), undisturbed, {"uneven": Uneven(), "slow": Slow(wait_s=0.01), "mean": Mean()},
               workers=0)
    command = [sys.executable, "-c", EXTRACT, str(path), str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(ROOTS)}
    for wait_s in (1.0, 1.4):
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        time.sleep(wait_s)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (path / "zarr.json").exists():
            assert contents(fs.open(path)).items() <= contents(undisturbed).items()
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert contents(fs.open(path)) == contents(undisturbed)


@pytest.mark.parametrize(("workers", "device"), [(0, "cpu"), (2, "cpu"), (0, "toy:0"), (1, "toy:0,1")])
def test_requests_that_share_a_pass_run_it_once_wherever_it_runs(tmp_path: Path, workers: int, device: str) -> None:
    cls, marks = Layer if device == "cpu" else LayerOnDevice, tmp_path / "marks"
    marks.mkdir()
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(tmp_path / "s.zarr")
    layers = {f"l{n}": cls(layer=n, marks=str(marks)) for n in (3, 7)}
    fs.extract(corpus, store, layers, workers=workers, device=device)
    assert len(list(marks.iterdir())) == (6 if device == "cpu" else 1)
    for key in store.utterances:
        np.testing.assert_array_equal(np.asarray(store[key, "l7"]), np.asarray(store[key, "l3"]) + 4)


def test_a_shared_pass_of_which_a_part_is_there_is_loaded_in_one_form(tmp_path: Path) -> None:
    folder, marks = make_corpus(tmp_path / "wavs"), tmp_path / "marks"
    marks.mkdir()
    store = fs.create(tmp_path / "s.zarr")
    layers = {f"l{n}": LayerOnDevice(layer=n, marks=str(marks)) for n in (3, 7)}
    fs.extract(fs.corpus(folder), store, {"l3": layers["l3"]}, workers=0)
    make_corpus(folder, 9)
    loads: list[int] = []
    load = LayerOnDevice.load_together

    def counted(extractors: list[Layer], device: str) -> object:
        loads.append(len(extractors))
        return load(extractors, device)

    LayerOnDevice.load_together = counted  # type: ignore[assignment,method-assign]
    try:
        report = fs.extract(fs.corpus(folder), store, layers, workers=0, device="toy:0")
    finally:
        del LayerOnDevice.load_together
    assert (report.done, report.failures, loads) == (9, [], [2])
    for key in store.utterances:
        np.testing.assert_array_equal(np.asarray(store[key, "l7"]), np.asarray(store[key, "l3"]) + 4)


@pytest.mark.slow
def test_networks_in_two_threads_give_what_they_give_in_one(tmp_path: Path) -> None:
    from featstore_extractors import parse
    from featstore_extractors.imports import without_broken_torchaudio

    without_broken_torchaudio()
    pytest.importorskip("transformers")
    from checkpoints import hubert_folder, whisper_folder

    requests = [f"contentvec,weights={hubert_folder(tmp_path / 'contentvec')},dtype=float32",
                f"first=contentvec,layer=1,weights={tmp_path / 'contentvec'},dtype=float32",
                f"whisper,weights={whisper_folder(tmp_path / 'whisper')},dtype=float32"]
    corpus = fs.corpus(Path(__file__).resolve().parents[2] / "examples" / "corpus")
    stores = [fs.create(tmp_path / f"{n}.zarr") for n in range(2)]
    for store, device in zip(stores, ("cpu", "cpu:0,1"), strict=True):  # torch takes cpu:1 for the one there is
        assert fs.extract(corpus, store, parse(*requests), workers=0, device=device).ok
    for key, name in contents(stores[0]):
        one, other = (np.asarray(store[key, name]) for store in stores)
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(one).max(), rtol=0)


def test_encoders_on_devices_and_workers_share_one_decode_and_one_resampling_per_rate(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    extractors = {"d": OnDevice(), "uneven": Uneven(), "mean": Mean(), "windowed": Windowed()}
    fs.extract(corpus, store, extractors, workers=0, device="toy:0,1")
    assert len(decoded) == len(set(decoded)) == 6
    assert rates == [(44100, 16000)] * 6
