"""That they learn: a small vocoder overfitted to eight clips says them again, and from the wrong log-mels it cannot.

Every vocoder that is trained against discriminators: `python benchmarks/vocoders.py learn`.
"""

from __future__ import annotations

import importlib.util
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


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The benchmark, whose clips, sizes and measures these are."""
    spec = importlib.util.spec_from_file_location("vocoders_benchmark", ROOT / "benchmarks" / "vocoders.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_vocos_learns_what_log_mels_belong_to(bench, tmp_path: Path):
    store = bench.clips(tmp_path)
    contract = MelContract.from_settings(store.feature("log-mel").spec.settings)
    chance = bench.judged({key: (wave, bench.random_phase(wave, contract))
                           for key, wave in bench.recordings(store).items()}, contract)
    made = bench.learnt(tmp_path / "run", "vocos", store)
    learnt = bench.judged(bench.copied(made, run.load(made.path).model, store), contract)
    assert learnt["log-mel L1"] <= 0.5 < chance["log-mel L1"]

    wrong = bench.judged(bench.copied(made, run.load(made.path).model, store, shift=1), contract)
    assert wrong["log-mel L1"] > 1
