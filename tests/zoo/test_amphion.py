"""Amphion's folders of singing voice conversion become runs that give what their models gave, and that convert."""

from __future__ import annotations

import json

import acoustics
import amphion as made
import conversions
import numpy as np
import published
import pytest
import soundfile as sf
import torch
import vocoders
from conftest import ROOT

import featstore as fs
from featstore.errors import BadRequest, CannotLoad, IdentityMismatch
from featstore_extractors import parse
from featstore_zoo import convert, layouts, run

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 sums in another order
SENTENCE = ROOT / "examples" / "corpus" / "vctk_p225" / "p225_003.flac"


def imported(folder, out, **extra):
    converted = layouts.convert(folder, out, extra)
    return converted, run.load(out)


@pytest.mark.parametrize("title", made.MODELS)
def test_a_folder_of_each_layout_gives_what_its_model_gave(title, tmp_path):
    model = made.model(title)
    model.set_range(torch.arange(20.0) - 30, torch.arange(20.0) - 10)
    converted, found = imported(made.folder(title, model, tmp_path / "exp"), tmp_path / "run")
    assert converted.layout == f"Amphion {title.partition(',')[0]}" and found.steps == 1234
    given = acoustics.batch_for(model.config, 9) | {"singer": torch.tensor([3, 5])}
    if title == "DiffComoSVC":  # Amphion's 40 steps are 41 levels
        assert found.settings.config.sampling_steps == 41
        found.model.set_sampling(sampling_steps=3)
    if title == "DiffWaveNetSVC":
        found.model.set_sampling(sampling_steps=3)
    with torch.no_grad():
        expected, ours = (m(given, torch.Generator().manual_seed(0)) for m in (model, found.model))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert found.settings.config.f0_early_s == pytest.approx(0.0327 - 8 / 24000, abs=1e-5)
    assert {name: (one.row, one.median_hz) for name, one in found.singers.items()} == {
        "little_singers_Ann": (3, 246.9), "little_singers_Bo_B": (5, None)}
    assert set(found.settings.reads) == {"log-mel", "whisper", "contentvec", "f0", "energy"}
    assert found.settings.reads["f0"][0].spec.settings["tracker"] == "praat"
    assert "MIT" in (found.path / "README.md").read_text()


def test_amphions_own_numbers_of_the_condition_and_the_network_through_an_import(parity, tmp_path):
    models = parity / "amphion" / "models"
    heard, given, expected = vocoders.reference(models / "condition_encoder_add.safetensors")
    net, x, y = vocoders.reference(models / "diffwavenet_wrapper.safetensors")
    tensors = {f"0.{name}": tensor for name, tensor in heard.items()} | {f"1.{name}": tensor
                                                                       for name, tensor in net.items()}
    like = made.model("DiffWaveNetSVC")
    folder = made.folder("DiffWaveNetSVC", like, tmp_path / "exp")
    torch.save(tensors, next(folder.rglob("pytorch_model.bin")))
    model = imported(folder, tmp_path / "run")[1].model
    batch = {"f0": given["frame_pitch"].float(), "energy": given["frame_energy"], "singer": given["spk_id"],
             **{name: given[f"{name}_feat"] for name in ("whisper", "contentvec", "wenet")}}
    with torch.no_grad():
        torch.testing.assert_close(model.condition_encoder(batch), expected["y"], **TOLERANCE)
        torch.testing.assert_close(model.acoustic_mapper.hearing(x["c"])(x["x"], x["t"]), y["y"], **TOLERANCE)


@pytest.mark.parametrize(("title", "file", "key", "result"), [
    ("TransformerSVC (torch's encoder)", "transformersvc_transformer", "x", "y"),
    ("DiffComoSVC", "comosvc", "cond", "")])
def test_amphions_own_numbers_of_transformers_through_an_import(title, file, key, result, parity, tmp_path):
    weights, given, expected = vocoders.reference(parity / "amphion" / "models" / f"{file}.safetensors")
    like = made.model(title)
    folder = made.folder(title, like, tmp_path / "exp")
    path = next(folder.rglob("pytorch_model.bin"))
    heard = {name: tensor for name, tensor in torch.load(path).items() if name.startswith("0.")}
    torch.save(heard | {f"1.{name}": tensor for name, tensor in weights.items()}, path)
    mapper = imported(folder, tmp_path / "run")[1].model.acoustic_mapper
    with torch.no_grad():
        if result:
            torch.testing.assert_close(mapper(given[key]), expected[result], **TOLERANCE)
            return
        mean = mapper.encoder(given[key], given["mask"][..., 0] > 0)
        noise = given["latents"].transpose(1, 2)
        made_of = mapper.decoder.solve(mean, mapper.decoder.used.hearing(mean), noise)
    torch.testing.assert_close(made_of.transpose(1, 2), expected["ct_sample_1"], **TOLERANCE)  # it has a student


def test_amphions_own_numbers_of_vits_through_an_import(parity, tmp_path):
    file = parity / "amphion" / "models" / "vitssvc_hifigan.safetensors"
    weights, given, expected = vocoders.reference(file, lambda name: name)
    settings = json.loads((file.parent / "index.json").read_text())["vitssvc_hifigan"]["config"]
    settings["preprocess"] |= {"fmin": 0, "fmax": None, "pitch_extractor": "dio",
                               "energy_extract_mode": "from_waveform"}
    published.put(tmp_path / "exp", "checkpoint/epoch-0001_step-0000007_loss-1.0/pytorch_model.bin",
                  published.old_names(weights), "args.json", json.dumps(settings))
    converted, found = imported(tmp_path / "exp", tmp_path / "run")
    assert found.settings.config.generator == "hifigan"
    found.model.set_sampling(noise_scale=0.0)
    batch = {"f0": given["frame_pitch"].float(), "energy": given["frame_energy"], "singer": given["spk_id"],
             **{name: given[f"{name}_feat"] for name in ("whisper", "contentvec")}}
    with torch.no_grad():
        wave = found.model(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(wave[:, None], expected["infer_noise0"], **TOLERANCE)
    assert "no singers.json" in " ".join(converted.remarks)
    assert found.settings.config.f0_early_s == pytest.approx(-8 / 24000, abs=1e-5)  # dio's first frame is at 0
    assert found.settings.reads["energy"][0].spec.settings["method"] == "stft"


@pytest.fixture
def real(tmp_path):
    """An experiment on real mels that hears a content feature called contentvec, of 12 dimensions."""
    model = made.model("DiffWaveNetSVC", n_mels=100, n_fft=1024, win_length=1024, hop_length=256,
                       content=(("contentvec", 12),))
    return made.folder("DiffWaveNetSVC", model, tmp_path / "exp", pitch_extractor="dio")


def stored(folder, path, f0="f0:dio"):
    """A store with what the run reads of a sentence; contentvec are random numbers."""
    (folder / "wavs").mkdir()
    (folder / "wavs" / "a.flac").symlink_to(SENTENCE)
    store = fs.create(path)
    mel = "energy:mel," + ",".join(f"{name}={value}" for name, value in vars(parse("log-mel")["log-mel"]).items())
    fs.extract(fs.corpus(folder / "wavs"), store, parse("log-mel", f0, mel, "loudness"), workers=0)
    store = fs.open(path)
    with store.writer() as writer:
        writer.declare("contentvec", fs.Spec("contentvec", 1, "continuous", 50, 16000, weights="sha256:77",
                                             settings={"layer": 12, "projection": True, "mix": ""}))
        (key,) = store.utterances
        frames = int(store.utterances[key].duration_s * 50)
        writer.write(key, "contentvec", np.random.default_rng(0).standard_normal((frames, 12)).astype(np.float16))
    return path


def test_an_imported_run_converts_what_was_made_by_any_weights_of_its_encoder(real, tmp_path):
    _, found = imported(real, tmp_path / "run")
    store = stored(tmp_path, tmp_path / "a.zarr")
    (one,) = convert.files([store], to="little_singers_Ann", run=found.path, out=tmp_path / "out", steps=2,
                           vocoder=conversions.vocoder(tmp_path / "voc"))
    wave, rate = sf.read(one.path)
    assert rate == 24000 and np.isfinite(wave).all() and wave.std() > 1e-4
    assert "247 Hz for little_singers_Ann" in one.remarks[0]
    with fs.open(store).writer() as writer:
        writer.delete(next(iter(fs.open(store).utterances)), "contentvec")
    document = json.loads((found.path / "config.json").read_text())
    document["reads"]["contentvec"][0]["spec"]["settings"]["layer"] = 9
    (found.path / "config.json").write_text(json.dumps(document))
    with pytest.raises(IdentityMismatch, match=r"contentvec.* with layer=12 .the run: 9"):
        convert.files([store], to="little_singers_Ann", run=found.path, out=tmp_path / "out")


def test_another_tracker_can_be_taken(real, tmp_path):
    converted, found = imported(real, tmp_path / "run", f0="f0:swift")
    assert found.settings.reads["f0"][0].spec.settings["tracker"] == "swift"
    assert "f0 is given -5.3 ms early" in " ".join(converted.remarks)
    with pytest.raises(BadRequest, match="no preset 'nobody'"):
        imported(real, tmp_path / "other", f0="f0:nobody")


def test_ranges_and_singers_that_are_not_there_are_told(tmp_path):
    model = made.model("TransformerSVC")
    folder = made.folder("TransformerSVC", model, tmp_path / "exp")
    data = folder / "data"
    (data / "little_singers").rename(data / "one")
    (data / "two" / "mel_min_max_stats").mkdir(parents=True)
    for name in ("mel_min.npy", "mel_max.npy"):
        array = np.load(data / "one" / "mel_min_max_stats" / name)
        np.save(data / "two" / "mel_min_max_stats" / name, array + 1)
    with pytest.raises(BadRequest, match=r"expected one folder .*found data/one/.*data/two/.*--set data=NAME"):
        imported(folder, tmp_path / "run")
    _, found = imported(folder, tmp_path / "run", data="two")
    torch.testing.assert_close(found.model.mel_low, model.mel_low + 1)
    np.save(data / "two" / "mel_min_max_stats" / "mel_min.npy", np.zeros(7))
    with pytest.raises(CannotLoad, match=r"has shape \(7,\): expected \(20,\)"):
        imported(folder, tmp_path / "other", data="two")
    for path in folder.rglob("mel_*.npy"):
        path.unlink()
    with pytest.raises(BadRequest, match=r"found none. Put mel_min_max_stats"):
        imported(folder, tmp_path / "other")
    settings = json.loads((folder / "args.json").read_text())
    settings["preprocess"]["use_min_max_norm_mel"] = False
    (folder / "args.json").write_text(json.dumps(settings))
    _, found = imported(folder, tmp_path / "plain")
    mel = torch.randn(1, 3, 20)
    torch.testing.assert_close(found.model.unscaled(mel), mel)


@pytest.mark.parametrize(("change", "told"), [
    (lambda tensors: tensors | {"0.mert_encoder.nn.weight": torch.zeros(24, 8)}, "hears MERT"),
    (lambda tensors: tensors | {"0.whisper_encoder.conformer.x": torch.zeros(2)}, "torchaudio's conformer"),
    (lambda tensors: {k: v for k, v in tensors.items() if "uv_embedding" not in k}, "use_uv is false"),
    (lambda tensors: {k: v for k, v in tensors.items() if "out_proj.2" not in k}, r"2 missing .*out_proj"),
    (lambda tensors: tensors | {"1.extra.weight": torch.zeros(2)}, "unexpected 1.extra.weight")])
def test_what_is_not_built_here_is_refused(change, told, tmp_path):
    folder = made.folder("DiffWaveNetSVC", made.model("DiffWaveNetSVC"), tmp_path / "exp")
    path = next(folder.rglob("pytorch_model.bin"))
    torch.save(change(torch.load(path)), path)
    with pytest.raises(CannotLoad, match=told):
        imported(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_that_contradict_or_are_missing_are_named(tmp_path):
    folder = made.folder("DiffWaveNetSVC", made.model("DiffWaveNetSVC"), tmp_path / "exp")
    settings = json.loads((folder / "args.json").read_text())
    del settings["model"]["diffusion"]["bidilconv"]
    (folder / "args.json").write_text(json.dumps(settings))
    with pytest.raises(BadRequest, match="does not say dilation_cycle"):
        imported(folder, tmp_path / "run")
    settings["preprocess"]["n_mel"] = 80
    (folder / "args.json").write_text(json.dumps(settings))
    with pytest.raises(BadRequest, match="n_mel is 80, the tensors say 20"):
        imported(folder, tmp_path / "run", dilation_cycle="4")


def test_a_run_without_its_encoder_says_which(real, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, found = imported(real, tmp_path / "run")
    assert "energy:mel,sample_rate=24000" in (found.path / "recipe.toml").read_text()
    with pytest.raises(fs.errors.MissingWeights, match=r"needs contentvec weights, not found on this machine .*"
                       r"Give --weights contentvec=FILE"):
        convert.file(SENTENCE, to="little_singers_Ann", run=found.path, out=tmp_path / "out.wav")
