"""f0 on another grid: log-Hz inside voiced stretches, nobody's pitch nowhere, and the reference's lag gone."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore_align import align, align_f0, conversion, source_range, taps

MEL = Fraction(24000, 256)
fractions = st.fractions(min_value=Fraction(1, 8), max_value=8, max_denominator=40)
rates = st.one_of(st.sampled_from([(200, MEL), (MEL, 200), (100, 200), (200, 100), (200, Fraction(44100, 512))]),
                  st.tuples(fractions, fractions))
centres = st.fixed_dictionaries({name: st.fractions(min_value=-1, max_value=1, max_denominator=200)
                                 for name in ("source_centre_s", "target_centre_s")})
dtypes = st.sampled_from([np.float32, np.float64])


@st.composite
def melodies(draw) -> np.ndarray:
    voiced = draw(st.lists(st.booleans(), min_size=1, max_size=40))
    hz = draw(st.lists(st.floats(50, 1100), min_size=len(voiced), max_size=len(voiced)))
    return np.where(voiced, hz, 0.0)


def cents(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return 1200 * np.log2(a / b)


@given(melodies(), fractions, dtypes)
@settings(deadline=None)
def test_equal_grids_come_back_bit_for_bit(f0, rate, dtype):
    f0 = f0.astype(dtype)
    found = align_f0(f0, rate, rate)
    assert found.dtype == dtype and found.tobytes() == f0.tobytes()


def test_a_grid_twice_as_fine_keeps_every_frame_it_shares():
    f0 = np.array([110, 123.4, 0, 98.7, 101.3], np.float32)
    assert align_f0(f0, 100, 200)[::2].tolist() == f0.tolist()


def test_a_glide_that_is_straight_in_log_hertz_stays_straight():
    octaves = np.arange(400) / 100
    found = align_f0(55 * 2**octaves, 200, MEL, length=187, target_centre_s=Fraction(128, 24000))
    seconds = (np.arange(187) + 0.5) * 256 / 24000
    assert np.abs(cents(found, 55 * 2 ** (2 * seconds))).max() < 1e-6


@given(melodies(), rates, st.integers(1, 60), centres)
@settings(max_examples=150, deadline=None)
def test_every_frame_follows_the_rules(f0, pair, length, centre):
    found = align_f0(f0, *pair, length=length, **centre)
    r1, r2 = map(Fraction, pair)
    for j in range(length):
        place = (centre["target_centre_s"] - centre["source_centre_s"] + j / r2) * r1     # in source frames
        place = min(max(place, Fraction(0)), Fraction(len(f0) - 1))                       # held at both ends
        i, w = int(place), place - int(place)
        nearest = i + (w >= Fraction(1, 2))
        if w and f0[i] and f0[i + 1]:
            between = np.exp((1 - float(w)) * np.log(f0[i]) + float(w) * np.log(f0[i + 1]))
            assert found[j] == pytest.approx(between, rel=1e-12)
            assert min(f0[i], f0[i + 1]) <= found[j] <= max(f0[i], f0[i + 1])
        else:
            assert found[j] == f0[nearest]


@given(melodies(), rates, st.integers(1, 60), centres)
@settings(deadline=None)
def test_no_pitch_lies_between_a_voiced_frame_and_an_unvoiced_one(f0, pair, length, centre):
    found = align_f0(f0, *pair, length=length, **centre)
    sung = f0[f0 > 0]
    assert ((found == 0) | ((found >= sung.min(initial=np.inf)) & (found <= sung.max(initial=0)))).all()


def test_single_voiced_frame_is_held_not_smeared():
    found = align_f0(np.array([0.0, 0, 220, 0, 0]), 50, 200)
    assert set(found.tolist()) == {0.0, 220.0}
    assert np.flatnonzero(found).tolist() == [6, 7, 8, 9]    # the frames nearest to it


def test_value_is_held_before_the_first_centre_and_after_the_last():
    found = align_f0(np.array([100.0, 200]), 100, 100, length=6, source_centre_s=Fraction(2, 100))
    assert found.tolist() == [100, 100, 100, 200, 200, 200]


@given(melodies(), rates, st.integers(1, 60), centres, dtypes, st.data())
@settings(max_examples=150, deadline=None)
def test_crop_from_the_part_it_needs_is_the_slice_of_the_whole(f0, pair, length, centre, dtype, data):
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    f0 = f0.astype(dtype)
    first, last = source_range(start, stop, *pair, source_length=len(f0), kind="f0", **centre)
    whole = align_f0(f0, *pair, length=length, **centre)[start:stop]
    asked = {"length": length, "start": start, "stop": stop, "source_start": first, "source_length": len(f0), **centre}
    assert align_f0(f0[first:last], *pair, **asked).tobytes() == whole.tobytes()
    assert align_f0(torch.from_numpy(f0[first:last]), *pair, **asked).numpy().tobytes() == whole.tobytes()


def test_taps_are_the_two_frames_around_the_centre():
    assert taps(1, 200, MEL, source_length=400, kind="f0") == [(2, Fraction(13, 15)), (3, Fraction(2, 15))]
    assert taps(3, 200, 100, source_length=400, kind="f0") == [(6, Fraction(1))]


def test_leading_axes_and_out():
    f0 = np.array([[100.0, 200, 0], [0, 50, 50]], np.float32)
    out = np.empty((2, 6), np.float32)
    assert align_f0(f0, 100, 200, out=out) is out
    assert out.tolist() == [align_f0(row, 100, 200).tolist() for row in f0]
    tensor = torch.from_numpy(f0)
    assert align_f0(tensor, 100, 200).tolist() == out.tolist()
    assert align_f0(tensor, 100, 200, start=2, stop=2).shape == (2, 0)


def test_the_references_lag_of_two_frames_is_gone(parity):
    # Praat's first frame lies at 32 ms. The reference pads at the end instead, which moves the whole melody.
    with np.load(parity / "amphion" / "features.npz") as arrays:
        praat, true, voiced = arrays["f0_parselmouth_a"], arrays["true_f0_a"], arrays["true_voiced_a"].astype(bool)
    found = align_f0(praat, MEL, MEL, length=len(true), source_centre_s=Fraction(32, 1000))
    padded = np.pad(praat, (0, max(0, len(true) - len(praat))))[: len(true)]
    sung = voiced & (found > 0) & (padded > 0)
    lagging, ours = (np.sqrt(np.mean(cents(f0[sung], true[sung]) ** 2)) for f0 in (padded, found))
    assert ours < 10 and lagging > 3 * ours


@pytest.mark.parametrize(("f0", "error", "words"), [
    (np.array([100.0, -1]), ValueError, r"found values from -1\.0 to 100\.0; expected finite Hz, and 0 where unvoiced"),
    (np.array([100.0, np.nan]), ValueError, r"np\.nan_to_num"),
    (np.array([100.0, np.inf]), ValueError, "to inf; expected finite"),
    (np.array([100, 200]), TypeError, "found int64; expected float16, float32 or float64, in Hz"),
    (np.array([], np.float32), ValueError, "no frames"),
    (torch.ones(4, dtype=torch.bfloat16), TypeError, "found bfloat16.*expected float32"),
    (torch.ones(4, requires_grad=True), ValueError, r"asks for gradients.*detach\(\)"),
])
def test_what_is_no_f0_is_refused(f0, error, words):
    with pytest.raises(error, match=words):
        align_f0(f0, 200, MEL)


def test_f0_by_edges_is_refused():
    with pytest.raises(ValueError, match="found a conversion with timing 'edges'; expected 'centres'"):
        align("f0", np.ones(4), conversion(200, 100))
