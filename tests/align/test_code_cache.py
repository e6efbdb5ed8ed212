"""Several processes that compile with numba at once keep each variant's own code."""

import threading
import time

import pytest

from featstore_align.code_cache import guard

caching = pytest.importorskip("numba.core.caching")


@pytest.fixture
def slow_cache(tmp_path, monkeypatch):
    """A cache whose index takes a while to write, so that two writers always meet."""
    guard()

    class Slow(caching.IndexDataCacheFile):
        def _save_index(self, overloads):
            time.sleep(0.2)
            super()._save_index(overloads)

    return lambda: Slow(str(tmp_path), "mix", "stamp")


def test_variants_that_two_writers_add_at_once_have_files_of_their_own(slow_cache):
    variants = {"float32": b"code of float32", "float64": b"code of float64", "int16": b"code of int16"}
    writers = [threading.Thread(target=slow_cache().save, args=item) for item in variants.items()]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {key: slow_cache().load(key) for key in variants} == variants


def test_a_guard_is_set_once():
    guard()
    before = caching.IndexDataCacheFile.save
    guard()
    assert caching.IndexDataCacheFile.save is before


def test_a_cache_that_does_not_exist_yet_has_nothing(tmp_path):
    guard()
    assert caching.IndexDataCacheFile(str(tmp_path / "nowhere"), "mix", "stamp").load("float32") is None
