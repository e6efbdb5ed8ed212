"""Shared places: recordings, parity numbers and makers of synthetic and broken audio, where they are at hand."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def own_cache(pytestconfig: pytest.Config) -> None:
    """Digests of weights are remembered here, not in the cache of whoever runs the tests."""
    os.environ["XDG_CACHE_HOME"] = str(pytestconfig.rootpath / ".pytest_cache" / "xdg")


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would the processes that tests send it to."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As in a worker process: threads that wait for each other at every step of an LSTM cost 20 times its work."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for $FEATSTORE_WEIGHTS, beside an empty hub cache and an empty memory of digests."""
    from huggingface_hub import constants

    from featstore_extractors import weights

    (tmp_path / "weights").mkdir()
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    for memory in ("_digests", "_downloads", "_places"):
        monkeypatch.setattr(weights, memory, {})
    return tmp_path / "weights"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with `audio/`, `parity/` and the corpus makers; named by FEATSTORE_SHARED, else beside the project."""
    folder = Path(os.environ.get("FEATSTORE_SHARED", ROOT.parent / "shared"))
    if not (folder / "audio" / "manifest.csv").exists():
        pytest.skip(f"no shared data at {folder}: set FEATSTORE_SHARED to the folder that has audio/ and parity/")
    return folder


@pytest.fixture(scope="session")
def parity(shared: Path) -> Path:
    """Numbers computed by other programs; FEATSTORE_PARITY_DATA names another folder."""
    folder = Path(os.environ.get("FEATSTORE_PARITY_DATA", shared / "parity"))
    if not folder.exists():
        pytest.skip(f"no parity data at {folder}")
    return folder
