"""Log-mel, energy, loudness and waveform against other programs, the published definitions and themselves in pieces."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore_extractors import parse
from featstore_extractors.signal import (
    Energy,
    LogMel,
    Loudness,
    MelContract,
    MelEnergy,
    StftEnergy,
    Wave,
    a_weighting,
    mel_filters,
)


def brief(extractor: Any) -> str:
    return f"{extractor.name}-{extractor.frame_rate}"


PRESETS = list(MelContract.PRESETS)
ON_A_GRID = [LogMel.preset(name) for name in PRESETS] + [
    LogMel(padding="centre"), LogMel(hop_length=300, n_fft=1200, n_mels=40), MelEnergy(), StftEnergy(), Energy(),
    Energy(hop=256), Energy(sample_rate=44100, hop=441, width=2048), Loudness(), Loudness(weighting="A"),
    Loudness(weighting="A", hop=77, width=501)]


def run(extractor: Any, wave: np.ndarray) -> np.ndarray:
    [array] = extractor.load("cpu")([wave])
    return array


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def sine(hz: float, samples: int, sample_rate: int = 24000) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(samples) / sample_rate).astype(np.float32)


def in_pieces(extractor: Any, wave: np.ndarray, core: int) -> np.ndarray:
    """The frames of the cores of pieces of `core` samples, with the extractor's own context on either side."""
    context = extractor.window[1]
    per_core, skipped = core * extractor.frame_rate / extractor.sample_rate, (
        context * extractor.frame_rate / extractor.sample_rate)
    assert per_core.denominator == skipped.denominator == 1
    count = max(1, len(wave) // core)
    kept = []
    for k in range(count):
        start = max(0, k * core - context)
        stop = len(wave) if k == count - 1 else min(len(wave), (k + 1) * core + context)
        frames = run(extractor, wave[start:stop])[int(skipped) if k else 0 :]
        kept.append(frames if k == count - 1 else frames[: int(per_core)])
    return np.concatenate(kept)


def test_log_mel_equals_the_reference(parity: Path) -> None:
    with np.load(parity / "amphion" / "features.npz") as data:
        wave, reference = data["wav_a"], data["mel_a"].T
    ours = run(LogMel.preset("24k-100"), wave)
    assert ours.shape == reference.shape
    # 3.5e-5 is the reference's own float32 rounding: ours computes spectra in float64
    np.testing.assert_allclose(ours, reference, rtol=0, atol=5e-5)


def test_energies_equal_the_reference(parity: Path) -> None:
    with np.load(parity / "amphion" / "features.npz") as data:
        wave, of_mel, of_stft = (data[name] for name in ("wav_a", "energy_from_mel_a", "energy_from_waveform_a"))
    np.testing.assert_allclose(run(Energy.preset("mel"), wave), of_mel, rtol=1e-6)
    np.testing.assert_allclose(run(Energy.preset("stft"), wave), of_stft, rtol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("scale", "norm"), [("slaney", "slaney"), ("htk", "none")])
def test_filters_equal_librosa(preset: str, scale: Any, norm: Any) -> None:
    filters = pytest.importorskip("librosa").filters.mel
    contract = dataclasses.replace(MelContract.preset(preset), mel_scale=scale, norm=norm)
    theirs = filters(sr=contract.sample_rate, n_fft=contract.n_fft, n_mels=contract.n_mels, fmin=contract.fmin,
                     fmax=contract.fmax, htk=scale == "htk", norm="slaney" if norm == "slaney" else None,
                     dtype=np.float64)
    np.testing.assert_allclose(mel_filters(contract), theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("win_length", [1024, 800])
def test_centred_log_mel_equals_librosa(power: int, win_length: int) -> None:
    librosa = pytest.importorskip("librosa")
    contract = LogMel(padding="centre", power=power, win_length=win_length, eps=0, log_base="10")
    theirs = librosa.feature.melspectrogram(y=noise(24000), sr=24000, n_fft=1024, win_length=win_length, hop_length=256,
                                            power=power, n_mels=100, fmin=0, fmax=12000, pad_mode="reflect").T
    np.testing.assert_allclose(run(contract, noise(24000)), np.log10(np.maximum(theirs, 1e-5)), rtol=0, atol=1e-5)


def test_a_weighting_is_the_published_curve() -> None:
    hz = np.array([31.5, 63, 125, 250, 500, 1000, 2000, 4000, 8000, 16000])  # nominal; the exact ones lie within 1 %
    decibel = np.array([-39.4, -26.2, -16.1, -8.6, -3.2, 0.0, 1.2, 1.0, -1.1, -6.6])  # IEC 61672-1, table 3
    np.testing.assert_allclose(20 * np.log10(a_weighting(hz)), decibel, atol=0.15)


@pytest.mark.parametrize("extractor", ON_A_GRID, ids=brief)
def test_pieces_give_the_bits_of_the_whole(extractor: Any) -> None:
    generator = np.random.default_rng(1)
    hop = int(extractor.sample_rate / extractor.frame_rate)
    for _ in range(4):
        core = hop * int(generator.integers(20, 400))
        wave = noise(int(core * generator.uniform(1, 6)) + hop, seed=2)
        np.testing.assert_array_equal(in_pieces(extractor, wave, core), run(extractor, wave))


@pytest.mark.parametrize("extractor", ON_A_GRID, ids=brief)
def test_the_window_is_a_minute_of_whole_frames(extractor: Any) -> None:
    hop = int(extractor.sample_rate / extractor.frame_rate)
    core, context = extractor.window
    assert 60 <= core / extractor.sample_rate < 60.1
    assert core % hop == context % hop == 0


def test_a_long_recording_gives_the_same_bits_by_its_own_window() -> None:
    wave = noise(24000 * 130)
    for extractor in (LogMel(), Energy()):
        np.testing.assert_array_equal(in_pieces(extractor, wave, extractor.window[0]), run(extractor, wave))


@pytest.mark.parametrize("extractor", ON_A_GRID, ids=brief)
def test_duration_of_the_frames_is_that_of_the_audio_within_a_frame(extractor: Any) -> None:
    for samples in (24000, 24001, 25599, 25600, 25601):
        frames = run(extractor, noise(samples))
        off_s = len(frames) / extractor.frame_rate - Fraction(samples, extractor.sample_rate)
        assert abs(off_s) <= 1 / extractor.frame_rate
        assert frames.dtype == extractor.dtype and frames.shape[1:] == ((extractor.dim,) if extractor.dim else ())


@pytest.mark.parametrize("extractor", ON_A_GRID, ids=brief)
def test_frames_stand_where_they_are_claimed_to_be(extractor: Any) -> None:
    """A short burst is loudest in the frame whose claimed centre is nearest to it."""
    at = extractor.sample_rate // 2 + 333
    wave = np.zeros(extractor.sample_rate, np.float32)
    wave[at - 20 : at + 20] = noise(40)
    level = run(extractor, wave)
    level = level.sum(axis=1) if level.ndim == 2 else level
    loud = np.flatnonzero(level > np.median(level) + 0.5 * np.ptp(level))
    centre_s = float(extractor.centre_s) + loud.mean() / float(extractor.frame_rate)
    assert abs(centre_s - at / extractor.sample_rate) <= 0.75 / float(extractor.frame_rate)


def test_batch_mates_do_not_matter() -> None:
    waves = [noise(30000, 1), 5 * noise(700, 2), noise(24000, 3)]
    for extractor in (LogMel(), Energy(), Loudness(weighting="A")):
        for alone, together in zip(waves, extractor.load("cpu")(waves), strict=True):
            np.testing.assert_array_equal(run(extractor, alone), together)


def test_threads_of_the_linear_algebra_do_not_matter() -> None:
    code = ("import hashlib, numpy as np; from featstore_extractors import parse;"
            "wave = np.random.default_rng(0).standard_normal(99999).astype('f4');"
            "runs = [extractor.load('cpu') for extractor in parse('log-mel', 'loudness:A').values()];"
            "print([hashlib.sha256(run([wave])[0]).hexdigest() for run in runs])")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    digests = {subprocess.run([sys.executable, "-c", code], env=environment | {"OPENBLAS_NUM_THREADS": threads},
                              check=True, capture_output=True).stdout for threads in ("1", "2")}
    assert len(digests) == 1


@pytest.mark.parametrize("extractor", ON_A_GRID, ids=brief)
def test_silence_and_a_constant_are_finite(extractor: Any) -> None:
    for level in (0.0, 0.25):
        assert np.isfinite(run(extractor, np.full(24000, level, np.float32))).all()


@pytest.mark.parametrize("extractor", [LogMel(), LogMel.preset("44k-128"), LogMel(log_base="10"), Loudness(),
                                       Loudness(weighting="A")], ids=brief)
def test_silence_is_at_the_floor_and_so_is_padding(extractor: Any) -> None:
    np.testing.assert_allclose(run(extractor, np.zeros(24000, np.float32)), extractor.pad, rtol=2e-7)  # one float32 ulp


@pytest.mark.parametrize(("preset", "shortest"), [("24k-100", 385), ("44k-128", 769), ("22k-80", 385)])
def test_log_mel_needs_one_sample_more_than_it_reflects(preset: str, shortest: int) -> None:
    assert run(LogMel.preset(preset), noise(shortest)).shape[0] == 1
    with pytest.raises(ValueError, match=f"too short: {shortest - 1} samples at .* needs {shortest}"):
        run(LogMel.preset(preset), noise(shortest - 1))


def test_log_mel_needs_one_whole_hop() -> None:
    contract = LogMel(n_fft=1024, hop_length=1024)
    with pytest.raises(ValueError, match="too short"):
        run(contract, noise(1023))
    assert len(run(contract, noise(1024))) == 1


def test_energy_of_one_sample_is_that_sample() -> None:
    np.testing.assert_allclose(run(Energy(), np.array([-0.5], np.float32)), [0.5])
    with pytest.raises(ValueError, match="too short: no samples"):
        run(Energy(), np.zeros(0, np.float32))


def test_energy_is_the_rms_around_each_frame() -> None:
    wave = noise(5000)
    frames = [wave[max(0, 120 * i - 512) : 120 * i + 512].astype(np.float64) for i in range(5000 // 120 + 1)]
    np.testing.assert_allclose(run(Energy(), wave), [np.sqrt(np.mean(x**2)) for x in frames], rtol=1e-6)


def test_a_steady_sound_is_steady_to_its_ends() -> None:
    np.testing.assert_allclose(run(Energy(), np.full(4000, 0.3, np.float32)), 0.3, rtol=1e-6)
    np.testing.assert_allclose(run(Loudness(), sine(1000, 24000)), -3.01, atol=0.1)
    np.testing.assert_allclose(run(Loudness(weighting="A"), sine(1000, 24000)), -3.01, atol=0.2)


def test_a_weighted_loudness_follows_the_curve() -> None:
    for hz, decibel in ((125, -16.1), (4000, 1.0), (8000, -1.1)):
        inner = run(Loudness(weighting="A", width=4096), sine(hz, 24000))[50:-50]
        np.testing.assert_allclose(inner, decibel - 3.01, atol=0.15)


def test_real_recordings_at_other_rates_are_finite(shared: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    soxr = pytest.importorskip("soxr")
    for path in ("ljspeech/LJ001-0019.flac", "csd_soprano1/nino_dios.flac", "fsdd_lucas/0_lucas_1.flac"):
        wave, rate = soundfile.read(shared / "audio" / path, dtype="float32", frames=500_000)
        for extractor in [*ON_A_GRID[:4], Loudness(weighting="A"), Energy()]:
            array = run(extractor, soxr.resample(wave, rate, extractor.sample_rate))
            assert np.isfinite(array).all() and np.ptp(array) > 0


def stored(wave: np.ndarray) -> tuple[np.ndarray, float]:
    frames = run(Wave(), wave)
    scale = Wave().scale_of(float(np.abs(frames).max()))
    return Wave().quantise(frames, scale), scale


def test_sixteen_bit_samples_come_back_exactly() -> None:
    samples = np.arange(-32768, 32768).astype(np.int16)
    quantised, scale = stored(samples.astype(np.float32) / 32768)
    np.testing.assert_array_equal(quantised, samples)
    assert scale == 1 / 32768


def test_waveform_is_stored_to_half_a_step() -> None:
    wave = np.clip(3 * noise(50000), -0.999, 0.999)
    quantised, scale = stored(wave)
    assert quantised.dtype == np.int16
    assert np.abs(quantised * scale - wave.astype(np.float64)).max() <= scale / 2 * (1 + 1e-9)


def test_only_the_very_top_is_off_by_a_whole_step() -> None:
    quantised, scale = stored(np.array([1.0, -1.0, 0.5], np.float32))
    np.testing.assert_array_equal(quantised, [32767, -32768, 16384])
    assert scale == 1 / 32768


def test_over_range_is_scaled_and_not_clipped() -> None:
    wave = np.array([12.0, -3.0, 0.001], np.float32)
    quantised, scale = stored(wave)
    assert quantised[0] == 32767
    assert np.abs(quantised * scale - wave).max() <= scale / 2 * (1 + 1e-6)


def test_quantising_in_blocks_gives_the_same_bytes() -> None:
    wave = 4 * noise(10000)
    whole, scale = stored(wave)
    np.testing.assert_array_equal(np.concatenate([Wave().quantise(part, scale) for part in np.split(wave, 8)]), whole)


def test_contracts_say_in_what_they_differ() -> None:
    assert MelContract().differs(LogMel()) == {}
    assert MelContract.preset("24k-100").differs(MelContract.preset("22k-80")) == {
        "sample_rate": (24000, 22050), "n_mels": (100, 80), "fmax": (12000.0, 8000.0)}


def test_a_contract_is_read_back_from_the_settings_of_a_spec() -> None:
    contract = MelContract.preset("44k-128")
    settings = dataclasses.asdict(contract) | {"window": [1, 2], "audio": 1}
    assert MelContract.from_settings(settings) == contract
    with pytest.raises(ValueError, match="no mel contract: n_fft, "):
        MelContract.from_settings({"sample_rate": 24000})


def test_whole_and_decimal_settings_are_one_contract() -> None:
    assert repr(MelContract(fmax=12000)) == repr(MelContract(fmax=12000.0))
    assert repr(Loudness(floor=-100)) == repr(Loudness())


@pytest.mark.parametrize(("settings", "words"), [
    ({"fmax": 12001}, "fmax 12001 Hz: expected 0 <= fmin < fmax <= 12000"),
    ({"fmin": 9000, "fmax": 8000}, "fmin 9000"),
    ({"hop_length": 255}, "odd.*padding=centre"),
    ({"win_length": 2048}, "win_length 2048 must not exceed n_fft 1024"),
    ({"hop_length": 2048}, "hop_length 2048 must not exceed n_fft 1024"),
    ({"n_mels": 0}, "n_mels must be a whole number of at least 1"),
    ({"n_mels": 80.0}, "n_mels must be a whole number"),
    ({"mel_scale": "bark"}, "mel_scale must be one of slaney, htk, not 'bark'"),
    ({"power": 3}, "power must be 1 .* or 2"),
    ({"floor": 0}, "floor 0 > 0|floor 0"),
])
def test_an_impossible_contract_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MelContract(**settings)


def test_impossible_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="width 100 must be at least hop 120"):
        Energy(width=100)
    with pytest.raises(ValueError, match="weighting must be one of none, A"):
        Loudness(weighting="C")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="floor must be between"):
        Loudness(floor=3)
    with pytest.raises(ValueError, match="sample_rate must be a whole number"):
        Wave(sample_rate=0)


def test_energies_of_one_grid_differ_in_their_settings():
    rms, stft = parse("energy:rms,hop=256")["energy"], parse("energy:stft")["energy"]
    assert (rms.frame_rate, rms.centre_s) == (stft.frame_rate, stft.centre_s)
    assert dataclasses.asdict(rms) != dataclasses.asdict(stft)
