"""That they learn: a small vocoder overfitted to eight clips says them again, and not if it learnt from log-mels of
others; an acoustic model finds the log-mels of what it is told, and with the content of another song it does not.

All of them: `python benchmarks/vocoders.py learn` and `python benchmarks/acoustic.py learn`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from conftest import ROOT  # noqa: E402

import featstore as fs  # noqa: E402
from featstore_extractors.signal import MelContract  # noqa: E402
from featstore_zoo import run  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:.*num_workers.*:UserWarning")]


def benchmark(name: str) -> ModuleType:
    """A benchmark, whose clips, sizes and measures these are."""
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # where its dataclasses look for their module
    spec.loader.exec_module(found)
    return found


def test_a_transformer_learns_the_log_mels_of_what_it_is_told(shared: Path, tmp_path: Path):
    bench = benchmark("acoustic")
    store = bench.songs(tmp_path, singers=2, count=2, seconds=1.5)
    made = bench.learnt(tmp_path / "run", "transformer-svc", store, steps=250, batch=4, frames=64, learning_rate=2e-3)
    clips = bench.heard(made, store)
    contract = made.settings.contract
    learnt = bench.error(bench.mels_of(made.model, clips, contract), clips)
    assert learnt <= 0.5 * bench.error(bench.mean_mel(clips), clips)
    assert bench.error(bench.mels_of(made.model, bench.of_others(clips), contract), clips) > 1.5 * learnt


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return benchmark("vocoders")


@pytest.fixture(scope="module")
def store(bench, tmp_path_factory) -> fs.Store:
    return bench.clips(tmp_path_factory.mktemp("clips"), bench.SMALL)


@pytest.fixture(scope="module")
def contract(store) -> MelContract:
    return MelContract.from_settings(store.feature("log-mel").spec.settings)


def test_vocos_says_again_what_it_learnt_and_from_mismatched_log_mels_learns_something_else(bench, store, contract,
                                                                                              tmp_path):
    """Twice the same training; the second time every clip's waveform stands beside the log-mel of another."""
    chance = bench.judged({key: (wave, bench.random_phase(wave, contract))
                           for key, wave in bench.recordings(store).items()}, contract)["log-mel L1"]
    other = bench.mismatched(tmp_path, store)
    right, wrong = (bench.learnt(tmp_path / name, "vocos", data) for name, data in (("right", store), ("wrong", other)))

    def l1(of, data: fs.Store) -> float:
        return bench.judged(bench.copied(of, run.load(of.path).model, data), contract)["log-mel L1"]

    assert l1(right, store) <= bench.ENOUGH < chance
    assert l1(wrong, other) < 1 < l1(wrong, store)  # it learnt what it was given: other clips


def test_nsf_hifigan_sings_the_f0_it_is_given(bench, store, contract, tmp_path):
    made = bench.learnt(tmp_path / "run", "nsf-hifigan", store, steps=100)
    assert bench.judged(bench.copied(made, run.load(made.path).model, store), contract)["F0CORR"] > 0.9
    f0 = bench.judged(bench.copied(made, made.network().eval(), store), contract)["F0CORR"]
    assert not f0 > 0.9  # NaN where nothing is voiced: it was learnt
