"""Vocoding: pieces join without a seam, files and stores, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import featstore as fs
from featstore import storage
from featstore.errors import BadAudio, BadRequest, CannotLoad, ContractMismatch, IdentityMismatch
from featstore_cli import cli
from featstore_extractors import parse
from featstore_extractors.signal import LogMel

torch = pytest.importorskip("torch")
sf = pytest.importorskip("soundfile")

import vocoders  # noqa: E402
from conftest import ROOT  # noqa: E402

from featstore_zoo import run, training, validation, vocode  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SENTENCE = ROOT / "examples" / "corpus" / "ljspeech" / "LJ001-0002.flac"


@pytest.fixture(scope="module")
def vocoder(voices, tmp_path_factory) -> Path:
    """A small NSF-HiFiGAN that was trained for a step."""
    return _trained(tmp_path_factory.mktemp("runs") / "nsf", voices, "nsf-hifigan")


def _trained(path: Path, voices: Path, model: str) -> Path:
    pytest.importorskip("lightning_fabric")
    training.prepare(path, fs.open(voices), model, smoke=True, fields={"validate_every": 1000, "steps": 1000})
    made = run.load(path)
    torch.manual_seed(0)
    run.save(path, made.settings, made.network().state_dict(), 0)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", vocoders.SMALL)
def test_pieces_are_the_whole(name):
    model = vocoders.small(name)
    log_mel, f0, _ = vocoders.inputs(model, 90, batch=1)
    whole = vocode.synthesise(model, log_mel[0].numpy(), f0[0].numpy(), seed=3, chunk=1000)
    pieces = vocode.synthesise(model, log_mel[0].numpy(), f0[0].numpy(), seed=3, chunk=7)
    assert len(whole) == 90 * model.hop_length
    np.testing.assert_allclose(pieces, whole, atol=1e-4 * max(1, np.abs(whole).max()))


def test_noise_of_a_stretch_is_that_of_the_whole():
    from featstore_zoo.vocoder import noise

    whole = noise(5, (2, 3), (0, 200), 4)
    assert torch.equal(noise(5, (2, 3), (37, 121), 4), whole[..., 37 * 4:121 * 4])
    assert not torch.equal(noise(6, (2, 3), (0, 200), 4), whole)


def test_a_recording_is_resynthesised_and_extracted_once(vocoder, cache, tmp_path):
    made = vocode.files([SENTENCE], vocoder, tmp_path / "out.wav")
    wave, rate = sf.read(tmp_path / "out.wav")
    assert rate == 24000 and len(made) == 1
    assert len(wave) / rate == pytest.approx(sf.info(SENTENCE).duration, abs=0.02)
    store = fs.open(vocode.sources())
    segments = {name: len(feature.segments) for name, feature in store.features.items()}
    vocode.files([SENTENCE], vocoder, tmp_path / "again.wav")
    again, _ = sf.read(tmp_path / "again.wav")
    assert np.array_equal(wave, again)
    now = fs.open(vocode.sources())
    assert {name: len(feature.segments) for name, feature in now.features.items()} == segments


def test_a_store_gives_a_file_for_each_utterance(vocoder, voices, tmp_path):
    made = vocode.files([voices], vocoder, tmp_path / "out", form="flac")
    assert {one.key for one in made} == set(fs.open(voices).utterances)
    assert sorted(path.suffix for path in (tmp_path / "out").rglob("*.*")) == [".flac"] * len(made)


def test_griffin_lim_keeps_the_mel(cache, tmp_path):
    vocode.files([SENTENCE], "griffin-lim", tmp_path / "out.flac")
    wave, rate = sf.read(tmp_path / "out.flac", dtype="float32")
    recorded, recorded_rate = sf.read(SENTENCE, dtype="float32")
    import soxr

    reference = soxr.resample(recorded, recorded_rate, rate)[:len(wave)]
    contract = LogMel()
    noise = np.random.default_rng(0).standard_normal(len(wave)).astype(np.float32) / 10
    kept = validation.log_mel_l1(reference, wave[:len(reference)], contract)
    assert kept < 0.6 < validation.log_mel_l1(reference, noise[:len(reference)], contract)


def test_another_contract_is_refused_by_its_field(vocoder, voices, tmp_path):
    shutil.copytree(voices, tmp_path / "other.zarr")
    store = fs.open(tmp_path / "other.zarr")
    fs.extract(fs.corpus(voices.parent / "corpus"), store, parse("log-mel:22k-80"), replace=True, workers=0)
    with pytest.raises(IdentityMismatch, match=r"n_mels=80 .the run: 100"):
        vocode.files([tmp_path / "other.zarr"], vocoder, tmp_path / "out")
    contract = LogMel.preset("22k-80")
    with pytest.raises(ContractMismatch, match=r"n_mels 100 .in the store: 80"):
        run.load(vocoder).check_contract(contract, "the store")


def test_weights_that_are_not_finite_are_refused(voices, tmp_path):
    path = _trained(tmp_path / "run", voices, "hifigan")
    made = run.load(path)
    state = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    next(iter(state.values())).fill_(float("nan"))
    run.save(path, made.settings, state, 0)
    with pytest.raises(CannotLoad, match="NaN or infinity"):
        run.load(path).model  # noqa: B018


def test_truncated_weights_are_refused(voices, tmp_path):
    path = _trained(tmp_path / "run", voices, "hifigan")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CannotLoad, match=r"model\.safetensors"):
        run.load(path).model  # noqa: B018


def test_a_pickle_is_refused_without_running_it(voices, tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path = _trained(tmp_path / "run", voices, "hifigan")
    (path / "model.safetensors").write_bytes(pickle.dumps({"weights": Bomb()}))
    with pytest.raises(CannotLoad):
        run.load(path).model  # noqa: B018
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["hifigan", "nsf_hifigan", "vocos", "diffwave"])
def test_three_frames_and_silence_make_finite_sound(name):
    model = vocoders.small(name)
    for frames in (3, 40):
        silence = np.full((frames, model.config.n_mels), -11.5, np.float32)
        wave = vocode.synthesise(model, silence, np.zeros(frames, np.float32))
        assert len(wave) == frames * model.hop_length and np.isfinite(wave).all()


def test_folding_and_half_precision_keep_the_sound():
    model = vocoders.small("hifigan")
    log_mel, _, _ = vocoders.inputs(model, 30, batch=1)
    plain = vocode.synthesise(model, log_mel[0].numpy())
    folded = vocode.synthesise(vocode.on(vocoders.small("hifigan"), "cpu"), log_mel[0].numpy())
    np.testing.assert_allclose(folded, plain, atol=1e-5)
    half = vocode.synthesise(model, log_mel[0].numpy(), precision="bf16")
    assert np.abs(half - plain).max() < 0.05


def test_what_cannot_be_done_is_told(vocoder, voices, cache, tmp_path):
    with pytest.raises(BadRequest, match="is one file and 4 utterances"):
        vocode.files([voices], vocoder, tmp_path / "out.wav")
    with pytest.raises(BadRequest, match="does not exist"):
        vocode.files([tmp_path / "nothing.wav"], vocoder, tmp_path / "out.wav")
    storage.place("memory://wavs/a.wav").put(b"")
    with pytest.raises(BadRequest, match="of URLs only stores are taken"):
        vocode.files(["memory://wavs/a.wav"], vocoder, tmp_path / "out.wav")
    with pytest.raises(run.NotARun, match="is not a run"):
        vocode.files([SENTENCE], tmp_path, tmp_path / "out.wav")
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(BadAudio, match="cannot be used"):
        vocode.files([tmp_path / "text.wav"], vocoder, tmp_path / "out.wav")
    assert not (tmp_path / "out.wav").exists()


def test_command_writes_the_others_where_recordings_cannot_be_used(vocoder, cache, tmp_path):
    (tmp_path / "songs").mkdir()
    shutil.copy(SENTENCE, tmp_path / "songs")
    (tmp_path / "songs" / "text.wav").write_text("no audio")
    done = CliRunner().invoke(cli, ["vocode", str(tmp_path / "songs"), "--vocoder", str(vocoder), "-o",
                                    str(tmp_path / "out"), "--json"])
    assert done.exit_code == 1 and "1 of 2 recordings cannot be used: text: not audio" in done.stderr
    assert [one["key"] for one in json.loads(done.stdout)] == [SENTENCE.stem] == [
        path.stem for path in (tmp_path / "out").iterdir()]


def test_a_newer_run_is_told_from_a_damaged_one(vocoder, tmp_path):
    shutil.copytree(vocoder, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"format": 99}))
    with pytest.raises(run.NotARun, match="run format 99"):
        run.load(tmp_path / "run")
    path.write_text("{")
    with pytest.raises(run.NotARun, match="no JSON document"):
        run.load(tmp_path / "run")


def test_whoever_reads_a_stream_is_not_in_inference_mode():
    model = vocoders.small("hifigan")
    log_mel, _, _ = vocoders.inputs(model, 20, batch=1)
    pieces = vocode.stream(model, log_mel[0].numpy(), chunk=8)
    next(pieces)
    assert not torch.is_inference_mode_enabled()
    pieces.close()


def test_griffin_lim_of_a_long_song_is_made_in_pieces_that_fade_into_each_other(monkeypatch):
    import soundfile

    contract = LogMel()
    wave, _ = soundfile.read(SENTENCE, dtype="float32")
    (log_mel,) = contract.load("cpu")([wave])
    whole = vocode.griffin_lim(log_mel, contract)
    monkeypatch.setattr(vocode, "GRIFFIN_LIM_FRAMES", 64)
    monkeypatch.setattr(vocode, "GRIFFIN_LIM_FADE", 8)
    pieces = vocode.griffin_lim(log_mel, contract)
    assert len(pieces) == len(whole) == len(log_mel) * contract.hop_length
    assert validation.log_mel_l1(whole, pieces, contract) < 0.5
    level = [np.sqrt(np.square(one).mean()) for one in (whole, pieces)]
    assert level[1] == pytest.approx(level[0], rel=0.1)


@pytest.mark.parametrize("frames", [1, 3, 20])
def test_metrics_of_the_shortest_utterances_and_of_silence_are_numbers_or_nan(frames):
    noise = np.random.default_rng(0).normal(0, 0.1, frames * 256).astype(np.float32)
    for one, other in ((noise, noise[::-1].copy()), (noise, 0 * noise), (0 * noise, 0 * noise)):
        found = validation.compare(one, other, LogMel())
        assert np.isfinite(found["log-mel L1"]) and set(found) >= {"MCD dB", "F0CORR", "PESQ"}
