"""Metrics: exact truths, order of arguments, silence, and what published packages say of the same recordings."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from conftest import ROOT
from metric_pairs import PAIRS, f0, pair

from featstore_zoo import amphion_metrics as amphion
from featstore_zoo import dtw, metrics

RATE = 16000
PUBLISHED = json.loads((ROOT / "tests" / "data" / "metric_references.json").read_text())


@pytest.fixture(scope="module")
def sentence():
    """A second and a half of a real voice, 16 kHz."""
    sf = pytest.importorskip("soundfile")
    wave, rate = sf.read(ROOT / "examples" / "corpus" / "vctk_p225" / "p225_003.flac", dtype="float32")
    assert rate == RATE
    return wave[RATE:RATE * 5 // 2]


@pytest.mark.parametrize("align", ["none", "dtw"])
def test_equal_waveforms_have_no_cepstral_distortion(sentence, align):
    assert metrics.mel_cepstral_distortion(sentence, sentence.copy(), RATE, align=align) == 0


def test_cepstral_distortion_hears_a_filter_and_not_the_level(sentence):
    duller = np.convolve(sentence, [0.25, 0.5, 0.25], "same").astype(np.float32)
    assert metrics.mel_cepstral_distortion(sentence, 0.3 * sentence, RATE, align="none") < 1e-3
    assert metrics.mel_cepstral_distortion(sentence, duller, RATE, align="none") > 1


def test_warping_forgives_a_pause_that_equal_times_do_not(sentence):
    paused = np.concatenate([sentence[:8000], np.zeros(3200, np.float32), sentence[8000:]])
    by_path = metrics.mel_cepstral_distortion(sentence, paused, RATE, align="dtw")
    by_time = metrics.mel_cepstral_distortion(sentence, paused, RATE, align="none")
    assert by_path < 0.5 * by_time
    assert by_path == pytest.approx(metrics.mel_cepstral_distortion(paused, sentence, RATE, align="dtw"), rel=0.02)


@pytest.mark.parametrize(("rate", "usual"), [(16000, 0.41), (22050, 0.455), (24000, 0.466), (44100, 0.544),
                                             (48000, 0.554)])
def test_warping_is_the_usual_constant_of_a_sample_rate(rate, usual):
    assert metrics.warping(rate) == pytest.approx(usual, abs=0.001)


def test_warped_cepstrum_is_the_spectrum_on_a_warped_axis():
    cepstrum, alpha = np.array([0.3, -0.8, 0.5, 0.1, 0, 0, 0, 0]), 0.42
    warped = cepstrum @ metrics._warp(len(cepstrum), 60, alpha)
    omega = np.linspace(0, np.pi, 50)
    axis = omega + 2 * np.arctan2(alpha * np.sin(omega), 1 - alpha * np.cos(omega))
    plain = np.cos(np.outer(omega, np.arange(len(cepstrum)))) @ cepstrum
    assert np.cos(np.outer(axis, np.arange(61))) @ warped == pytest.approx(plain, abs=1e-9)


def test_a_semitone_is_100_cents_before_the_median_goes():
    f0 = np.concatenate([np.zeros(5), np.linspace(100, 300, 50), np.zeros(3)])
    higher = f0 * 2 ** (1 / 12)
    assert metrics.f0_rmse(f0, higher) == pytest.approx(100)
    assert metrics.f0_rmse(f0, higher, remove_median=True) == pytest.approx(0, abs=1e-9)
    assert metrics.f0_rmse(f0, f0 + 7 * (f0 > 0), unit="Hz") == pytest.approx(7)
    assert metrics.f0_correlation(f0, higher) == pytest.approx(1)


def test_f0_is_compared_where_both_are_voiced():
    one, other = np.array([100.0, 0, 220, 330]), np.array([100.0, 150, 0, 330])
    assert metrics.f0_rmse(one, other) == 0
    assert metrics.voicing_error(one, other) == 0.5


def test_f0_of_two_grids_is_refused():
    with pytest.raises(ValueError, match="expected two on one grid"):
        metrics.f0_correlation(np.ones(5), np.ones(6))


def test_silence_is_never_a_perfect_score(sentence):
    pytest.importorskip("pesq")
    silence = np.zeros_like(sentence)
    of_waves = [metrics.mel_cepstral_distortion(silence, silence, RATE), metrics.pesq(silence, silence, RATE),
                metrics.multi_resolution_stft(silence, silence), metrics.si_sdr(silence, silence),
                metrics.stoi(silence, silence, RATE)]
    of_f0 = [metric(silence, silence) for metric in (metrics.f0_correlation, metrics.f0_rmse, metrics.voicing_error,
                                                     metrics.voicing_f1, metrics.gross_pitch_error)]
    others = [metrics.multi_resolution_stft(sentence, silence), metrics.speaker_similarity(silence, silence),
              metrics.correlation(*[metrics.level(silence, RATE)] * 2), metrics.rmse(silence[:0], silence[:0])]
    values = of_waves + of_f0 + others
    assert all(map(math.isnan, values))
    assert all(isinstance(value, metrics.Undefined) and value.reason for value in values)
    assert others[0].reason == "the converted recording is silent"


def test_spectral_distance_is_zero_for_equal_waveforms_and_grows_with_noise(sentence):
    noise = np.random.default_rng(0).standard_normal(len(sentence)).astype(np.float32)
    distances = [metrics.multi_resolution_stft(sentence, sentence + level * noise) for level in (0, 1e-3, 1e-2, 0.1)]
    assert distances[0] == 0
    assert distances == sorted(distances)


def test_pesq_of_equal_speech_is_its_best(sentence):
    pytest.importorskip("pesq")
    assert metrics.pesq(sentence, sentence, RATE) == pytest.approx(4.64, abs=0.01)


@pytest.mark.parametrize("name", PAIRS)
def test_metrics_are_those_of_published_packages(name):
    """torchmetrics, mir_eval, pystoi, pesq; auraloss mirrors the ends of a signal where we have silence."""
    pytest.importorskip("pystoi")
    pytest.importorskip("pesq")
    one, other = pair(name)
    pitches = [f0(wave) for wave in (one, other)]
    count = min(map(len, pitches))
    x, y = (pitch[:count] for pitch in pitches)
    found = {"voicing error": metrics.voicing_error(x, y), "voicing f1": metrics.voicing_f1(x, y),
             "f0 correlation": metrics.f0_correlation(x, y), "f0 rmse cents": metrics.f0_rmse(x, y),
             "f0 rmse Hz": metrics.f0_rmse(x, y, unit="Hz"), "si-sdr": metrics.si_sdr(one, other),
             "stoi": metrics.stoi(one, other, RATE), "pesq": metrics.pesq(one, other, RATE)}
    published = PUBLISHED[name]
    assert found == pytest.approx({key: published[key] for key in found}, rel=1e-4)
    assert metrics.multi_resolution_stft(one, other) == pytest.approx(published["multi-resolution stft"], rel=0.02)


@pytest.mark.parametrize("name", PAIRS)
def test_with_amphions_definitions_metrics_are_amphions(name):
    """pymcd with fastdtw; librosa's warping and torchmetrics on curves."""
    one, other = pair(name)
    x, y = f0(one), f0(other)
    found = {"amphion mcd": amphion.mel_cepstral_distortion(one, other, RATE), "amphion f0rmse": amphion.f0_rmse(x, y),
             "amphion fpc": amphion.f0_correlation(x, y), "amphion f0rmse Hz": amphion.f0_rmse(x, y, subtract=False),
             "amphion v_uv_f1": amphion.voicing_f1(x, y),
             "amphion energy_rmse": amphion.energy_rmse(one, other, RATE),
             "amphion energy_pc": amphion.energy_correlation(one, other, RATE)}
    assert found == pytest.approx({key: PUBLISHED[name][key] for key in found}, rel=1e-3)


def test_equal_signals_are_perfect(sentence):
    pytest.importorskip("pystoi")
    pitch = f0(sentence)
    curves = metrics.periodicity(sentence, RATE), metrics.level(sentence, RATE)
    assert len(curves[0]) == len(curves[1]) == len(pitch)
    assert metrics.f0_correlation(pitch, pitch) == 1
    assert [metrics.rmse(curve, curve) for curve in curves] == [0, 0]
    assert metrics.correlation(curves[1], curves[1]) == 1
    assert metrics.voicing_error(pitch, pitch) == 0 and metrics.voicing_f1(pitch, pitch) == 1
    assert metrics.gross_pitch_error(pitch, pitch) == 0
    assert metrics.si_sdr(sentence, 0.5 * sentence) == metrics.MOST_DB
    assert metrics.stoi(sentence, sentence, RATE) == pytest.approx(1)
    assert metrics.speaker_similarity(pitch, 2 * pitch) == pytest.approx(1)


def test_gross_errors_are_farther_off_than_a_fifth():
    one = np.array([100.0, 100, 100, 100, 0, 100])
    assert metrics.gross_pitch_error(one, np.array([100.0, 119, 121, 50, 100, 0])) == 0.5


def test_a_tone_is_periodic_noise_is_not_and_silence_is_nothing():
    time = np.arange(RATE) / RATE
    tone = sum(np.sin(2 * np.pi * k * 220 * time) / k for k in range(1, 6))
    assert metrics.periodicity(0.1 * tone, RATE)[10:-10].min() > 0.98
    assert metrics.periodicity(np.random.default_rng(0).standard_normal(RATE), RATE)[10:-10].mean() < 0.5
    assert metrics.periodicity(np.zeros(RATE), RATE).max() == 0


def test_level_is_that_of_full_scale_and_has_a_floor():
    time = np.arange(RATE) / RATE
    assert metrics.level(np.sin(2 * np.pi * 1000 * time), RATE)[10:-10] == pytest.approx(-3.01, abs=0.01)
    assert metrics.level(np.zeros(RATE), RATE) == pytest.approx(-80)


def test_frechet_distance_of_shifted_and_of_other_embeddings():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((200, 4)), rng.standard_normal((300, 4)) @ rng.standard_normal((4, 4))
    assert metrics.frechet_distance(one, one + 3) == pytest.approx(4 * 9)
    c, d = np.cov(one.T), np.cov(other.T)
    expected = (np.square(one.mean(0) - other.mean(0)).sum() + np.trace(c + d - 2 * linalg.sqrtm(c @ d).real))
    assert metrics.frechet_distance(one, other) == pytest.approx(expected)
    assert math.isnan(metrics.frechet_distance(one[:1], other))


def test_warping_finds_the_cheapest_path():
    librosa = pytest.importorskip("librosa")
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((60, 3)).cumsum(0), rng.standard_normal((75, 3)).cumsum(0)
    costs, _ = librosa.sequence.dtw(one.T, other.T, metric="euclidean")
    pairs = dtw.path(one, other)
    assert np.linalg.norm(np.subtract(*metrics.along(pairs, one, other)), axis=1).sum() == pytest.approx(costs[-1, -1])
    assert pairs[0].tolist() == [0, 0] and pairs[-1].tolist() == [59, 74]
    assert np.diff(pairs, axis=0).max() == 1 and np.diff(pairs, axis=0).min() == 0


@pytest.mark.parametrize("rows", [60, 61, 7, 1])
def test_warping_near_a_coarser_path_is_warping_where_that_path_is_right(rows):
    rng = np.random.default_rng(1)
    one = np.repeat(rng.standard_normal((rows, 2)).cumsum(0), 2, axis=0)[:rows]
    other = np.repeat(one, 2, axis=0)
    pairs = dtw.path(one, other, radius=3)
    assert np.linalg.norm(np.subtract(*metrics.along(pairs, one, other)), axis=1).max() < 1e-12


def test_long_sequences_are_warped_in_bounded_memory(monkeypatch):
    rng = np.random.default_rng(2)
    one = rng.standard_normal((900, 4)).cumsum(0)
    other = np.concatenate([one[:300], np.repeat(one[300:310], 4, axis=0), one[310:]])
    exact = dtw.path(one, other)
    monkeypatch.setattr(dtw, "EXACT", 200_000)
    assert np.array_equal(dtw.path(one, other), exact)


def test_the_order_of_a_pair_does_not_matter(sentence):
    other = pair("noise")[1][:len(sentence)]
    both = [metrics.mel_cepstral_distortion(*waves, RATE) for waves in ((sentence, other), (other, sentence))]
    assert both[0] == pytest.approx(both[1], rel=1e-12)


def test_frames_of_other_channels_are_refused():
    with pytest.raises(ValueError, match="expected some of each, with equal channels"):
        dtw.path(np.zeros((3, 2)), np.zeros((3, 4)))
