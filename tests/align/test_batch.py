"""Batches of crops: the frames of one crop after the other by one call, compiled or not, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore_align import align, align_batch, conversion

ROOT = Path(__file__).resolve().parents[2]
MEL = Fraction(24000, 256)
MODULE = sys.modules["featstore_align.retrans"]
COMPILED = "featstore_align.compiled"

RATES = [(50, MEL), (50, Fraction(44100, 512)), (200, MEL), (200, 10), (50, 50), (100, 50), (Fraction(44100, 441), MEL),
         (2**33 + 1, 2**33)]
OFFSETS = st.fractions(min_value=-1, max_value=1, max_denominator=40).map(lambda tenths: tenths / 10)


@pytest.fixture(params=["compiled", "numpy"])
def way(request, monkeypatch):
    """With numba's code, and as if numba were not there."""
    if request.param == "numpy":
        monkeypatch.setattr(MODULE, "compiled", lambda: None)
    elif MODULE.compiled() is None:
        pytest.skip("numba is not installed")


def values(kind: str, rng: np.random.Generator, n: int, dtype: str) -> np.ndarray:
    """Frames of random numbers, signed zeros and numbers too small for their type among them."""
    if kind == "f0":
        return (rng.uniform(80, 400, n) * rng.choice([0, 1, 1], n)).astype(dtype)
    if kind == "discrete":
        return rng.integers(0, 1000, (n, 2))
    tiny = np.finfo(dtype).smallest_subnormal
    return np.concatenate([rng.standard_normal((n, 19)), rng.choice([tiny, 0, -0.0, -tiny], (n, 2))], 1).astype(dtype)


@given(pair=st.sampled_from(RATES), kind=st.sampled_from(["continuous", "continuous", "f0", "discrete"]),
       dtype=st.sampled_from(["float16", "float32", "float64"]), centres=st.tuples(OFFSETS, OFFSETS),
       timing=st.sampled_from(["edges", "centres"]), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_every_crop_of_a_batch_is_the_slice_of_its_whole(pair, kind, dtype, centres, timing, seed):
    rng = np.random.default_rng(seed)
    grids = conversion(*pair, "centres" if kind == "f0" else timing, *centres)
    lengths = rng.integers(1, 90, 5)
    sources = [values(kind, rng, n, dtype) for n in lengths]
    stop = rng.integers(1, 130, 5)
    start = np.array([rng.integers(0, n + 1) for n in stop])     # some crops are empty
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, COMPILED, raising=False)
        whole = [align(kind, x, grids, length=200) for x in sources]
    first, last = grids.source_ranges(start, stop, lengths, kind)
    spans = zip(start.tolist(), stop.tolist(), lengths.tolist(), strict=True)
    assert list(zip(first, last, strict=True)) == [grids.source_range(*span, kind) for span in spans]
    x = np.concatenate([source[a:b] for source, a, b in zip(sources, first, last, strict=True)])
    for compiled in (MODULE.compiled, lambda: None):
        out = np.full((5, 130, *x.shape[1:]), 7, x.dtype)
        known = (first, last) if compiled() is None else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MODULE, "compiled", compiled)
            if compiled() is None:
                patch.delitem(sys.modules, COMPILED, raising=False)
            align_batch(kind, x, grids, start=start, stop=stop, source_length=lengths, out=out, ranges=known)
        for row, a, b, source in zip(out, start, stop, whole, strict=True):
            assert row[:b - a].tobytes() == source[a:b].tobytes()
            assert (row[b - a:] == 7).all()


def test_one_call_is_compiled_too_once_the_code_is_there(way):
    x = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float16)
    grids = conversion(50, MEL)
    out = np.empty((2, 562, 40), np.float16)
    align_batch("continuous", np.concatenate([x, x]), grids, start=[0, 0], stop=[562, 562], source_length=[300, 300],
                out=out)
    assert out[0].tobytes() == align("continuous", x, grids).tobytes()
    turned = x.astype(">f2")
    assert np.array_equal(align("continuous", turned, grids), out[0])
    x.flags.writeable = False
    assert np.array_equal(align("continuous", x, grids), out[0])


@pytest.mark.parametrize(("change", "words"), [
    ({"kind": "samples"}, "kind: found 'samples'"),
    ({"start": [0]}, "found 1 crops"),
    ({"stop": [40, 30]}, "expected start, stop and source_length for each of its rows"),
    ({"source_length": [20, 0]}, "sources of at least one frame"),
    ({"x": np.ones((19, 3), np.float32)}, r"x: found float32 \(19, 3\); expected float32 \(20, 3\), contiguous as out"),
    ({"x": np.ones((20, 3))}, r"x: found float64"),
    ({"x": np.ones((20, 6), np.float32)[:, ::2]}, "contiguous as out"),
])
def test_arrays_that_do_not_fit_are_refused(change, words):
    given_ = {"kind": "continuous", "x": np.ones((20, 3), np.float32), "start": [0, 0], "stop": [10, 10],
              "source_length": [20, 20], "out": np.empty((2, 30, 3), np.float32)} | change
    kind, x = given_.pop("kind"), given_.pop("x")
    with pytest.raises(ValueError, match=words):
        align_batch(kind, x, conversion(100, 100), **given_)


def test_labels_are_not_averaged_by_the_batch_either(way):
    with pytest.raises(TypeError, match="labels are aligned by nearest"):
        align_batch("continuous", np.ones((11, 3), np.int32), conversion(50, 100), start=[0], stop=[22],
                    source_length=[11], out=np.empty((1, 22, 3), np.int32))


def test_without_numba_nothing_is_missed():
    code = ("import sys; sys.modules['numba'] = None; import numpy as np; from featstore_align import *;"
            "out = np.empty((2, 9, 2), np.float16);"
            "align_batch('continuous', np.ones((10, 2), np.float16), conversion(50, '24000/256'), start=[0, 0],"
            " stop=[9, 9], source_length=[5, 5], out=out); print(out.sum())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": str(ROOT / "align")})
    assert done.stdout == "36.0\n"


def test_the_compiled_code_runs_in_a_fork_of_a_process_that_used_it():
    code = """
import multiprocessing, numpy as np
from featstore_align import align_batch, conversion
def work(done=None):
    out = np.empty((2, 9, 2), np.float16)
    align_batch("continuous", np.ones((10, 2), np.float16), conversion(50, "24000/256"), start=[0, 0], stop=[9, 9],
                source_length=[5, 5], out=out)
    return done.put(out.sum()) if done else out.sum()
work()
context = multiprocessing.get_context("fork")
done = context.Queue()
context.Process(target=work, args=(done,), daemon=True).start()
print(done.get(timeout=60))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           env={"PYTHONPATH": str(ROOT / "align")})
    assert found.stdout == "36.0\n", found.stderr
