"""That they learn: a small vocoder overfitted to eight clips says them again, and from the wrong log-mels it cannot; an
acoustic model finds the log-mels of what it is told, and with the content of another song it does not.

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


def test_vocos_learns_what_log_mels_belong_to(tmp_path: Path):
    bench = benchmark("vocoders")
    store = bench.clips(tmp_path)
    contract = MelContract.from_settings(store.feature("log-mel").spec.settings)
    chance = bench.judged({key: (wave, bench.random_phase(wave, contract))
                           for key, wave in bench.recordings(store).items()}, contract)
    made = bench.learnt(tmp_path / "run", "vocos", store)
    learnt = bench.judged(bench.copied(made, run.load(made.path).model, store), contract)
    assert learnt["log-mel L1"] <= 0.5 < chance["log-mel L1"]

    wrong = bench.judged(bench.copied(made, run.load(made.path).model, store, shift=1), contract)
    assert wrong["log-mel L1"] > 1
