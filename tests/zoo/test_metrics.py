"""Metrics: exact truths, order of arguments, silence."""

from __future__ import annotations

import math

import numpy as np
import pytest

from featstore_zoo import metrics

RATE = 16000


@pytest.fixture(scope="module")
def sentence():
    """A second and a half of a real voice, 16 kHz."""
    sf = pytest.importorskip("soundfile")
    from conftest import ROOT

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
    values = [metrics.mel_cepstral_distortion(silence, silence, RATE), metrics.multi_resolution_stft(silence, silence),
              metrics.pesq(silence, silence, RATE), metrics.f0_correlation(silence, silence),
              metrics.f0_rmse(silence, silence), metrics.multi_resolution_stft(sentence, silence)]
    assert all(map(math.isnan, values))


def test_spectral_distance_is_zero_for_equal_waveforms_and_grows_with_noise(sentence):
    noise = np.random.default_rng(0).standard_normal(len(sentence)).astype(np.float32)
    distances = [metrics.multi_resolution_stft(sentence, sentence + level * noise) for level in (0, 1e-3, 1e-2, 0.1)]
    assert distances[0] == 0
    assert distances == sorted(distances)


def test_pesq_of_equal_speech_is_its_best(sentence):
    pytest.importorskip("pesq")
    assert metrics.pesq(sentence, sentence, RATE) == pytest.approx(4.64, abs=0.01)
