"""ReTrans: the paper's arithmetic to float32's last digits, crops bit for bit, and every rule about ends and lags."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore_align import align, conversion, nearest, retrans, source_range, taps

ROOT = Path(__file__).resolve().parents[2]
MEL = Fraction(24000, 256)
MODULE = sys.modules["featstore_align.retrans"]

KNOWN = [(50, MEL), (25, MEL), (50, Fraction(44100, 512)), (25, Fraction(44100, 512)), (200, MEL), (200, 100), (50, 50),
         (50, 200), (Fraction(44100, 441), Fraction(48000, 512)), (16000, 200), (75, "93.75")]
fractions = st.fractions(min_value=Fraction(1, 8), max_value=8, max_denominator=50)
rates = st.one_of(st.sampled_from(KNOWN), st.tuples(fractions, fractions).map(lambda ab: (50 * ab[0], 50 * ab[1])))
offsets = st.fractions(min_value=-1, max_value=1, max_denominator=400).map(lambda tenths: tenths / 10)
timings = st.one_of(st.just({}), st.fixed_dictionaries({
    "timing": st.just("centres"), "source_centre_s": offsets, "target_centre_s": offsets}))


def noise(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def by_repetition(x: np.ndarray, r1: Fraction, r2: Fraction, length: int) -> np.ndarray:
    """The paper's algorithm with the reference's rules for the tail, in float64, repetition and all."""
    s, t = (Fraction(r2) / Fraction(r1)).numerator, (Fraction(r2) / Fraction(r1)).denominator
    repeated = np.repeat(x.astype(np.float64), s, axis=0)
    whole = len(repeated) // t
    y = repeated[: whole * t].reshape(whole, t, -1).mean(1) if whole else repeated.mean(0, keepdims=True)
    return np.concatenate([y, np.repeat(y[-1:], max(0, length - len(y)), axis=0)])[:length]


def by_overlap(n: int, r1: Fraction, r2: Fraction, c1: Fraction, c2: Fraction, j: int) -> dict[int, Fraction]:
    """Weights of target frame j by centres: how much of its window each source frame covers, in seconds."""
    def covered(j):
        left, right = c2 + (j - Fraction(1, 2)) / r2, c2 + (j + Fraction(1, 2)) / r2
        edges = [c1 + (i - Fraction(1, 2)) / r1 for i in range(n + 1)]
        return {i: share for i in range(n) if (share := min(right, edges[i + 1]) - max(left, edges[i])) > 0}
    step = 1 if c2 + j / r2 < c1 else -1
    while not (shares := covered(j)):  # before and after the source the outermost average is repeated
        j += step
    return {i: share / sum(shares.values()) for i, share in shares.items()}


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- the paper's arithmetic ------------------------------------------------------------------------------------------

def test_retrans_agrees_with_the_reference_offline_and_online(parity):
    with np.load(parity / "amphion" / "retrans.npz") as arrays:
        meta = json.loads(str(arrays["meta_json"]))
        cases = meta["offline"] + meta["online"]
        assert len(cases) >= 16
        for case in cases:
            source_rate = Fraction(case["sample_rate"], case["source_hop_reduced"])
            target_rate = Fraction(case["sample_rate"], case["target_hop_reduced"])
            expected = arrays[case["key"] + "_out"]
            found = retrans(arrays[case["key"] + "_src"], source_rate, target_rate, length=case["target_len"])
            assert found.shape == expected.shape and found.dtype == expected.dtype
            assert np.abs(found - expected).max() < 2e-5, case["key"]


def test_rates_reduce_as_the_reference_reduces_hops(parity):
    milliseconds = {"whisper": 20, "contentvec": 20, "wenet": 40}
    with np.load(parity / "amphion" / "retrans.npz") as arrays:
        for kind, sample_rate, hop, s, t in json.loads(str(arrays["meta_json"]))["hop_table"]:
            grids = conversion(Fraction(1000, milliseconds[kind]), Fraction(sample_rate, hop))
            assert (grids.s, grids.t) == (s, t)


@given(rates, st.integers(1, 60), st.integers(1, 150), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_edges_are_the_papers_repetition_and_average(pair, n, length, seed):
    x = noise(n, 3, seed=seed)
    expected = by_repetition(x, *map(Fraction, pair), length)
    found = retrans(x, *pair, length=length)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(x).max()


@given(st.tuples(fractions, fractions), st.integers(1, 12), st.integers(1, 20), offsets, offsets)
@settings(max_examples=60, deadline=None)
def test_centres_integrate_the_source_around_its_own_centres(pair, n, length, c1, c2):
    x = noise(n, 2)
    found = retrans(x, *pair, length=length, timing="centres", source_centre_s=c1, target_centre_s=c2)
    for j in range(length):
        weights = by_overlap(n, *pair, c1, c2, j)
        expected = sum(float(weight) * x[i].astype(np.float64) for i, weight in weights.items())
        assert np.abs(found[j] - expected).max() <= 1e-6 * np.abs(x).max()
        assert taps(j, *pair, source_length=n, timing="centres", source_centre_s=c1,
                    target_centre_s=c2) == sorted(weights.items())


@given(rates, st.integers(1, 40), st.integers(0, 80), timings)
@settings(max_examples=100, deadline=None)
def test_taps_sum_to_one_and_give_the_frame(pair, n, j, timing):
    x = noise(n, 3)
    found = taps(j, *pair, source_length=n, **timing)
    assert sum(weight for _, weight in found) == 1
    expected = sum(float(weight) * x[i].astype(np.float64) for i, weight in found)
    y = retrans(x, *pair, length=j + 1, start=j, **timing)[0]
    assert np.abs(y - expected).max() <= 1e-6 * np.abs(x).max()


def test_a_frame_has_at_most_one_tap_more_than_the_ratio_rounded_up():
    for r1, r2 in KNOWN:
        most = math.ceil(Fraction(r1) / Fraction(r2)) + 1
        assert max(len(taps(j, r1, r2, source_length=100_000)) for j in range(500)) <= most


def test_two_hundred_hertz_to_the_mel_rate_is_thirty_two_to_fifteen():
    assert taps(0, 200, MEL, source_length=200) == [(0, Fraction(15, 32)), (1, Fraction(15, 32)), (2, Fraction(2, 32))]
    x = noise(200, 4)
    assert np.abs(retrans(x, 200, MEL, length=94) - by_repetition(x, 200, MEL, 94)).max() < 1e-6


# --- properties ------------------------------------------------------------------------------------------------------

@given(st.sampled_from(["float16", "float32", "float64"]), fractions, st.integers(1, 30), st.integers(0, 5))
@settings(deadline=None)
def test_equal_rates_give_every_bit_back(dtype, rate, n, seed):
    x = noise(n, 3, seed=seed, dtype=dtype)
    x[0, 0] = -0.0
    assert same_bytes(retrans(x, rate, rate), x)
    assert not np.shares_memory(retrans(x, rate, rate), x)


@given(rates, st.integers(1, 40), timings)
@settings(deadline=None)
def test_retrans_is_linear(pair, n, timing):
    x, y = noise(n, 2, dtype="float64"), noise(n, 2, seed=1, dtype="float64")
    whole = retrans(3 * x - 2 * y, *pair, length=50, **timing)
    parts = 3 * retrans(x, *pair, length=50, **timing) - 2 * retrans(y, *pair, length=50, **timing)
    assert np.allclose(whole, parts, rtol=0, atol=1e-12)


@given(rates, st.integers(1, 40), timings, st.floats(-(2.0**100), 2.0**100, width=32))
@settings(deadline=None)
def test_constant_stays_constant_to_the_last_bit(pair, n, timing, value):
    assert (retrans(np.full((n, 2), value, np.float32), *pair, length=60, **timing) == np.float32(value)).all()


@given(rates, st.integers(1, 30), timings, st.sampled_from(["float16", "float32", "float64"]), st.integers(0, 999))
@settings(deadline=None)
def test_no_frame_leaves_the_range_of_its_taps(pair, n, timing, dtype, seed):
    random = np.random.default_rng(seed)   # half of the columns are neighbouring floats, half far apart: rounding shows
    x = random.standard_normal((n, 400)) * 10.0 ** random.integers(-6, 4, (n, 400))
    x[:, ::2] = 1 + random.integers(-3, 4, (n, 200)) * np.finfo(dtype).eps
    x = x.astype(dtype)
    y = retrans(x, *pair, length=40, **timing)
    for j in range(40):
        used = x[[i for i, _ in taps(j, *pair, source_length=n, **timing)]]
        assert ((used.min(0) <= y[j]) & (y[j] <= used.max(0))).all()


@pytest.mark.parametrize("pair", [(10**9 - 1, 10**9), (10**9, 10**9 - 1)])
def test_no_frame_leaves_its_taps_where_a_weight_is_all_but_one(pair):
    x = noise(50, 400) * 10.0 ** np.arange(-4, 4).repeat(50).astype(np.float32)
    y = retrans(x, *pair)
    for j in range(49):
        used = x[[i for i, _ in taps(j, *pair, source_length=50)]]
        assert ((used.min(0) <= y[j]) & (y[j] <= used.max(0))).all()


@given(st.integers(1, 12), st.integers(1, 6), fractions)
@settings(deadline=None)
def test_rates_that_divide_give_means_of_blocks(k, blocks, rate):
    x = noise(k * blocks, 3)
    means = x.reshape(blocks, k, 3).astype(np.float64).mean(1)
    assert np.allclose(retrans(x, k * rate, rate), means, rtol=0, atol=1e-6)


@given(rates, st.integers(1, 80), st.integers(1, 120), timings, st.sampled_from(["float16", "float32", "float64"]),
       st.booleans(), st.data())
@settings(max_examples=300, deadline=None)
def test_crop_from_the_part_it_needs_is_the_slice_of_the_whole(pair, n, length, timing, dtype, as_torch, data):
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.stack([noise(n, dtype=dtype), np.random.default_rng(n).choice([tiny, 0, -0.0, -tiny], n).astype(dtype)], 1)
    first, last = source_range(start, stop, *pair, length=length, source_length=n, **timing)
    first, last = data.draw(st.integers(0, first)), data.draw(st.integers(last, n))   # any part that covers it
    whole = retrans(x, *pair, length=length, **timing)[start:stop]
    part = retrans(torch.from_numpy(x[first:last]) if as_torch else x[first:last], *pair, length=length, start=start,
                   stop=stop, source_start=first, source_length=n, **timing)
    assert same_bytes(whole, np.asarray(part))


@given(rates, st.integers(1, 60), st.integers(0, 60), st.integers(1, 30), timings)
@settings(deadline=None)
def test_source_range_is_what_the_taps_touch(pair, n, start, count, timing):
    for kind in ("continuous", "discrete", "f0"):
        touched = [i for j in range(start, start + count)
                   for i, _ in taps(j, *pair, source_length=n, kind=kind, **timing)]
        found = source_range(start, start + count, *pair, source_length=n, kind=kind, **timing)
        assert found == (min(touched), max(touched) + 1)


def test_source_range_of_an_endless_source_has_no_tail():
    assert source_range(1000, 1188, 50, MEL) == (533, 634)
    assert source_range(1000, 1188, 50, MEL, source_length=600) == (533, 600)
    assert source_range(7, 7, 50, MEL) == (3, 3)
    assert source_range(0, 2, 50, MEL, timing="centres", source_centre_s=1) == (0, 1)


@pytest.mark.parametrize("pair", [(50, MEL), (50, Fraction(44100, 512)), (200, MEL), (200, 10)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_wide_crops_over_several_blocks_are_slices_too(pair, dtype):
    x = noise(600, 300, dtype=dtype)
    whole = retrans(x, *pair)
    for start, stop in ((0, len(whole)), (1, 2), (len(whole) // 3, len(whole) - 3), (len(whole) - 1, len(whole))):
        first, last = source_range(start, stop, *pair, source_length=600)
        assert same_bytes(whole[start:stop], retrans(x[first:last], *pair, start=start, stop=stop, source_start=first,
                                                     source_length=600))


def test_a_billion_frames_in_the_weights_are_those_of_the_first_period():
    x, far = noise(9, 4), 10**9 * 8
    near = retrans(x, 50, Fraction(44100, 512), stop=14, source_length=10**12)
    period = 441 * 10**6, 256 * 10**6
    assert same_bytes(near, retrans(x, 50, Fraction(44100, 512), start=period[0], stop=period[0] + 14,
                                    source_start=period[1], source_length=10**12))
    assert taps(15 * 10**9, 50, MEL, source_length=far + 1) == [(far, 1)]


def test_grids_too_fine_for_64_bits_are_exact_as_well():
    rate, centre = Fraction(10**10 + 19, 10**8), Fraction(1, 10**9 + 7)
    timing = {"timing": "centres", "target_centre_s": centre}
    x = noise(30, 2)
    found = retrans(x, 50, rate, **timing)
    for j in range(60):
        weights = by_overlap(30, Fraction(50), rate, Fraction(0), centre, j)
        assert taps(j, 50, rate, source_length=30, **timing) == sorted(weights.items())
        expected = sum(float(weight) * x[i].astype(np.float64) for i, weight in weights.items())
        assert np.abs(found[j] - expected).max() <= 1e-6 * np.abs(x).max()
    assert nearest(np.arange(30), 50, rate, **timing)[:4].tolist() == [0, 1, 1, 2]
    part = retrans(x[3:6], 50, rate, start=7, stop=9, source_start=3, source_length=30, **timing)
    assert same_bytes(found[7:9], part)


# --- ends and lengths ------------------------------------------------------------------------------------------------

def test_length_is_what_the_source_fills_unless_it_is_given():
    assert retrans(noise(500, 2), 50, MEL).shape == (937, 2)
    assert retrans(noise(500, 2), 50, MEL, length=938).shape == (938, 2)
    assert retrans(noise(1, 2), 200, 10).shape == (1, 2)


def test_tail_repeats_the_last_whole_average_not_the_last_source_frame():
    x = np.arange(5, dtype=np.float64)[:, None]
    assert retrans(x, 2, 1, length=4)[:, 0].tolist() == [0.5, 2.5, 2.5, 2.5]


def test_source_shorter_than_one_target_frame_gives_the_mean_of_what_is_there():
    assert retrans(np.array([[1.0], [3.0]]), 200, 10, length=3)[:, 0].tolist() == [2.0, 2.0, 2.0]


def test_centres_average_what_is_there_at_either_end():
    x = np.array([1.0, 2.0, 4.0])
    found = retrans(x, 1, Fraction(1, 2), length=3, timing="centres", source_centre_s=0, target_centre_s=0)
    assert found.tolist() == [pytest.approx((1 + 2 * 0.5) / 1.5), pytest.approx((0.5 * 2 + 4) / 1.5)] * 1 + [found[1]]


# --- lags ------------------------------------------------------------------------------------------------------------

@given(rates, st.integers(1, 40), st.integers(1, 60))
@settings(deadline=None)
def test_edges_are_centres_half_a_frame_after_the_start(pair, n, length):
    r1, r2 = map(Fraction, pair)
    inside = min(length, max(1, math.floor(n * r2 / r1)))   # the two rules differ in the tail alone
    x = noise(n, 2)
    assert same_bytes(retrans(x, r1, r2, length=length)[:inside],
                      retrans(x, r1, r2, length=length, timing="centres", source_centre_s=1 / (2 * r1),
                              target_centre_s=1 / (2 * r2))[:inside])


@pytest.mark.parametrize(("rate", "centre"), [(25, Fraction(17, 400)), (50, Fraction(1, 80)), (50, 0), (200, 0)])
def test_a_ramp_stays_the_same_ramp_whatever_the_encoders_lag(rate, centre):
    times = float(centre) + np.arange(int(4 * rate)) / rate             # a feature that is the time itself
    found = retrans(times, rate, MEL, length=370, timing="centres", source_centre_s=centre,
                    target_centre_s=1 / (2 * MEL))
    mel = (np.arange(370) + 0.5) / float(MEL)
    inner = slice(10, 360)
    late = found[inner] - mel[inner]
    assert abs(late.mean()) < 2e-4                                      # no lag ...
    assert np.abs(late).max() <= 0.5 / rate                             # ... but the steps of the source itself


def test_two_encoders_of_one_ramp_disagree_by_their_lag_under_edges_and_not_under_centres():
    wenet = Fraction(17, 400) + np.arange(100) * Fraction(1, 25)
    whisper = np.arange(200) * Fraction(1, 50) + Fraction(1, 100)
    a, b = wenet.astype(np.float64), whisper.astype(np.float64)
    edges = (retrans(a, 25, MEL, length=370) - retrans(b, 50, MEL, length=370))[10:360].mean()
    mel = {"length": 370, "timing": "centres", "target_centre_s": "128/24000"}
    a, b = retrans(a, 25, MEL, source_centre_s="17/400", **mel), retrans(b, 50, MEL, source_centre_s="1/100", **mel)
    assert edges == pytest.approx(0.0225, abs=5e-4)
    assert (a - b)[10:360].mean() == pytest.approx(0, abs=5e-4)


# --- arrays ----------------------------------------------------------------------------------------------------------

@given(rates, st.integers(1, 60), timings,
       st.sampled_from([torch.float16, torch.float32, torch.float64, torch.bfloat16]))
@settings(deadline=None)
def test_torch_gives_the_numbers_of_numpy(pair, n, timing, dtype):
    x = torch.from_numpy(noise(2, n, 3)).to(dtype)
    wanted = x.float().numpy() if dtype == torch.bfloat16 else x.numpy()
    expected = torch.from_numpy(retrans(wanted, *pair, length=70, **timing)).to(dtype)
    found = retrans(x, *pair, length=70, **timing)
    assert found.dtype == dtype and torch.equal(found, expected)
    through_gradients = retrans(x.requires_grad_(), *pair, length=70, **timing)
    assert through_gradients.requires_grad and torch.equal(through_gradients.detach(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_numbers_of_numpy():
    x = noise(2, 200, 64)
    for pair in KNOWN:
        found = retrans(torch.from_numpy(x).cuda(), *pair)
        assert found.is_cuda and np.array_equal(found.cpu().numpy(), retrans(x, *pair))


@pytest.mark.parametrize("pair", [(50, MEL), (200, MEL)])
def test_gradients_are_those_of_the_weights(pair):
    x = torch.from_numpy(noise(12, 2, dtype="float64")).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: retrans(x, *pair, length=20), (x,))
    with torch.no_grad():
        assert not retrans(x, *pair).requires_grad


@pytest.mark.parametrize("torch_is_loaded", [True, False])
def test_float16_is_summed_in_float32_and_rounded_once(monkeypatch, torch_is_loaded):
    if not torch_is_loaded:
        monkeypatch.delitem(sys.modules, "torch")
    x = noise(300, 5, dtype="float16")
    for pair in KNOWN:
        assert same_bytes(retrans(x, *pair), retrans(x.astype(np.float32), *pair).astype(np.float16))


def test_leading_axes_are_items_of_their_own():
    x = noise(2, 3, 20, 4)
    found = retrans(x, 50, MEL)
    assert found.shape == (2, 3, 37, 4)
    assert same_bytes(found[1, 2], retrans(x[1, 2], 50, MEL))


def test_one_axis_is_time():
    x = noise(20)
    assert same_bytes(retrans(x, 50, MEL), retrans(x[:, None], 50, MEL)[:, 0])
    with_gradients = retrans(torch.from_numpy(x).requires_grad_(), 50, MEL)
    assert same_bytes(with_gradients.detach().numpy(), retrans(x, 50, MEL))


def test_memory_order_and_byte_order_change_nothing(tmp_path):
    x = noise(40, 6)
    expected = retrans(x, 50, MEL)
    read_only = x.copy()
    read_only.flags.writeable = False
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=x.shape)
    mapped[:] = x
    for other in (np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2], read_only, mapped):
        assert same_bytes(retrans(other, 50, MEL, out=np.empty_like(expected)), expected)
        assert same_bytes(retrans(other, 50, MEL), expected)
    swapped = retrans(x.astype(">f4"), 50, MEL)
    assert swapped.dtype == ">f4" and np.array_equal(swapped, expected)


@pytest.mark.parametrize("pair", [(50, MEL), (50, 50), (200, MEL), (50, Fraction(44100, 512))])
def test_out_receives_the_frames_wherever_it_lies(pair):
    x = noise(2, 40, 6)
    expected = retrans(x, *pair, length=90)
    wide = np.zeros((2, 90, 20), np.float32)
    assert retrans(x, *pair, length=90, out=wide[:, :, 3:9]).base is wide
    assert np.array_equal(wide[:, :, 3:9], expected) and not wide[:, :, 9:].any() and not wide[:, :, :3].any()
    tensor = torch.zeros(2, 90, 20)
    retrans(torch.from_numpy(x), *pair, length=90, out=tensor[:, :, 3:9])
    assert np.array_equal(tensor.numpy(), wide)


def test_memory_is_that_of_the_output():
    x = noise(500, 1024)
    for rate in (MEL, Fraction(44100, 512)):
        retrans(x, 50, rate)
        tracemalloc.start()
        out = retrans(x, 50, rate)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < out.nbytes + 400_000


def test_many_taps_keep_their_digits_and_their_bounds():
    x = noise(70_000, 1) + 100
    found = retrans(x, 16000, Fraction(1, 2))
    assert found.shape == (2, 1)
    assert np.abs(found[:, 0] - x[:64_000, 0].reshape(2, -1).astype(np.float64).mean(1)).max() < 1e-6 * np.abs(x).max()
    tracemalloc.start()
    many = retrans(x, 16000, 16000 * Fraction(2, 997))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6 and len(many) == 140


def test_tables_of_weights_are_shared_and_bounded():
    assert conversion(50, "24000/256") is conversion(50, "24000/256")
    grids = conversion(50, Fraction(44100, 512))
    grids.rows(1000, 1000 + grids.stretch, 120_000)
    assert grids._table is not None and len(grids._table.base) <= grids.s + grids.stretch
    assert conversion.cache_info().maxsize <= 64


# --- labels ----------------------------------------------------------------------------------------------------------

def test_nearest_keeps_integers_and_takes_the_nearest_centre():
    units = np.array([7, 3, 9, 1], np.int32)
    assert nearest(units, 50, 100).tolist() == [7, 7, 3, 3, 9, 9, 1, 1]
    assert nearest(units, 50, 25).tolist() == [3, 1]                     # of two equally near, the later
    assert nearest(units, 50, 100).dtype == np.int32
    assert nearest(units, 50, 50, length=6).tolist() == [7, 3, 9, 1, 1, 1]
    assert nearest(torch.from_numpy(units), 50, 100).tolist() == [7, 7, 3, 3, 9, 9, 1, 1]
    assert nearest(units, 1, 1, timing="centres", source_centre_s=2).tolist() == [7, 7, 7, 3]


@given(rates, st.integers(1, 60), st.integers(1, 100), timings, st.data())
@settings(deadline=None)
def test_nearest_takes_no_label_that_another_centre_beats(pair, n, length, timing, data):
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    labels = np.arange(n)[:, None]
    whole = nearest(labels, *pair, length=length, **timing)
    first, last = source_range(start, stop, *pair, source_length=n, kind="discrete", **timing)
    part = nearest(labels[first:last], *pair, length=length, start=start, stop=stop, source_start=first,
                   source_length=n, **timing)
    assert same_bytes(whole[start:stop], part)
    r1, r2 = map(Fraction, pair)
    c1, c2 = ((timing["source_centre_s"], timing["target_centre_s"]) if timing else (1 / (2 * r1), 1 / (2 * r2)))
    for j, label in enumerate(whole[:, 0]):
        distance = abs(c1 + int(label) / r1 - c2 - j / r2)
        assert distance == min(abs(c1 + i / r1 - c2 - j / r2) for i in range(n))


# --- what is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("change", "error", "words"), [
    ({"target_rate": 93.75}, TypeError, r"target_rate: found 93\.75.*expected an exact.*'375/4' or Fraction\(375, 4\)"),
    ({"target_rate": np.float32(86.13)}, TypeError, "expected an exact"),
    ({"source_rate": float("nan")}, TypeError, "expected an exact"),
    ({"source_rate": 0}, ValueError, "source_rate: found 0; expected a positive"),
    ({"target_rate": Fraction(-1, 2)}, ValueError, "target_rate: found -1/2; expected a positive"),
    ({"target_rate": "fast"}, ValueError, "'fast'; expected a whole number or a fraction such as '24000/256'"),
    ({"target_rate": "1/0"}, ValueError, "'1/0'; expected"),
    ({"target_rate": None}, TypeError, "NoneType"),
    ({"target_rate": True}, TypeError, "bool"),
    ({"timing": "centers"}, ValueError, "found 'centers'; expected 'edges' or 'centres'"),
    ({"x": noise(0, 3)}, ValueError, r"found \(0, 3\), no frames"),
    ({"x": np.ones(())}, ValueError, "single number"),
    ({"x": [[1.0]]}, TypeError, "found list; expected a numpy array or a torch tensor"),
    ({"x": np.ones((4, 2), int)}, TypeError, r"found int64; expected float16.*nearest\(\)"),
    ({"x": torch.ones(4, 2, dtype=torch.int32)}, TypeError, r"int32; expected a floating point.*nearest\(\)"),
    ({"stop": 938}, ValueError, r"crop \[0, 938\); expected 0 <= start <= stop <= 937"),
    ({"start": -1}, ValueError, r"crop \[-1, 937\)"),
    ({"start": 9, "stop": 8}, ValueError, r"crop \[9, 8\)"),
    ({"source_start": 3}, ValueError, "source_start=3 without source_length"),
    ({"source_start": 3, "source_length": 502}, ValueError, "500 frames from source_start=3; expected them within"),
    ({"source_length": 499}, ValueError, "expected them within the source_length=499"),
    ({"source_start": 100, "source_length": 1000, "start": 100, "stop": 200}, ValueError,
     r"source frames \[100, 600\); expected at least \[53, 107\) for target frames \[100, 200\)"),
    ({"source_length": 1000}, ValueError, r"source frames \[0, 500\); expected at least \[0, 1000\)"),
    ({"out": np.empty((937, 3), np.float64)}, ValueError, r"out: found.*float64; expected ndarray \(937, 3\) of"),
    ({"out": torch.empty(937, 3)}, ValueError, "out: found Tensor"),
])
def test_a_wrong_argument_is_named_with_what_is_expected(change, error, words):
    arguments = {"x": noise(500, 3), "source_rate": 50, "target_rate": MEL} | change
    with pytest.raises(error, match=words):
        retrans(arguments.pop("x"), arguments.pop("source_rate"), arguments.pop("target_rate"), **arguments)


def test_a_rounded_rate_is_refused_even_where_it_equals_one_just_used():
    retrans(noise(5, 1), 50, Fraction(375, 4))
    with pytest.raises(TypeError, match="exact"):
        retrans(noise(5, 1), 50, 93.75)
    assert same_bytes(retrans(noise(5, 1), 50.0, "375/4"), retrans(noise(5, 1), np.int64(50), " 93.75 "))


@pytest.mark.parametrize(("call", "words"), [
    (lambda: source_range(-1, 5, 50, 100), r"crop \[-1, 5\)"),
    (lambda: source_range(0, 12, 50, 100, length=10), "stop <= 10"),
    (lambda: source_range(0, 1, 50, 100, source_length=0), "at least one frame"),
    (lambda: taps(-1, 50, 100, source_length=5), r"crop \[-1, 0\)"),
    (lambda: taps(9, 50, 100, source_length=5, length=9), "stop <= 9"),
    (lambda: taps(0, 50, 100, source_length=0), "at least one frame"),
    (lambda: taps(0, 50, 100, source_length=5, kind="samples"), "'samples'; expected 'continuous', 'f0', 'discrete'"),
    (lambda: source_range(0, 1, 50, 100, kind="global"), "found 'global'.*has no frames"),
    (lambda: align("samples", noise(5), conversion(50, 100)), "samples are cut, never converted"),
])
def test_ranges_and_taps_outside_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- the package -----------------------------------------------------------------------------------------------------

def test_import_loads_numpy_and_nothing_else():
    code = ("import sys; import numpy; before = set(sys.modules); import featstore_align, numpy as np;"
            "featstore_align.retrans(np.ones((5, 2), np.float16), 50, '24000/256');"
            "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": str(ROOT / "align")})
    assert done.stdout == "['featstore_align']\n"


def test_float16_is_aligned_in_a_fork_of_a_process_whose_torch_has_threads():
    # Workers of a loader are such forks; a call of torch that wanted threads there would wait for ever.
    code = """
import multiprocessing, numpy, torch
from featstore_align import retrans
torch.set_num_threads(2)
torch.ones(10_000_000).add_(1)
tensor = torch.ones(20, 1024)
def work(done):
    for x in (numpy.ones((500, 1024), numpy.float16), numpy.ones((9, 40_000), numpy.float16), tensor):
        done.put(len(retrans(x, 50, "24000/256")))
context = multiprocessing.get_context("fork")
done = context.Queue()
process = context.Process(target=work, args=(done,), daemon=True)
process.start()
print([done.get(timeout=60) for _ in range(3)])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           env={"PYTHONPATH": str(ROOT / "align")})
    assert found.stdout == "[937, 16, 37]\n", found.stderr


def test_examples_of_the_readme_are_true():
    code = ("import doctest, sys; result = doctest.testfile(sys.argv[1], module_relative=False);"
            "print(result.failed, result.attempted > 10)")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "align" / "README.md")], capture_output=True,
                          text=True, env={"PYTHONPATH": str(ROOT / "align")})
    assert done.stdout == "0 True\n", done.stdout + done.stderr
