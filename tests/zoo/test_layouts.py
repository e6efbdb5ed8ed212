"""Published weights of every layout become run folders that give what their model gave."""

from __future__ import annotations

import json
import pickle

import numpy as np
import published as made
import pytest
import soundfile
import torch
import vocoders
from click.testing import CliRunner
from safetensors.torch import save_file

from featstore.errors import BadRequest, CannotLoad
from featstore_cli import cli
from featstore_extractors.signal import LogMel
from featstore_zoo import card, find, layouts, run

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # of Amphion's numbers: fp32 sums in another order
VOCOS = {"mel_scale": "htk", "norm": "none", "eps": 0.0, "floor": 1e-7, "padding": "centre"}
LMNT = {"sample_rate": 22050, "fmin": 20.0, "fmax": 11025.0, "mel_scale": "htk", "norm": "none", "eps": 0.0,
        "log_base": "10", "padding": "centre", "floor": 1e-4 * 24**0.5, "clamp": "xt", "mel_input": "decibels"}


def wave_of(model, frames=9):
    """What a vocoder makes of a seeded log-mel, f0 and noise."""
    log_mel, f0, generator = vocoders.inputs(model, frames, batch=1)
    with torch.inference_mode():
        return model(log_mel, f0, generator)


def imported(folder, out, **extra):
    converted = layouts.convert(folder, out, extra)
    return converted, run.load(out)


def check(model, folder, tmp_path, steps=0):
    """That the run made of a folder has the model's Config where inference needs it, its output and its steps."""
    converted, found = imported(folder, tmp_path / "run")
    torch.testing.assert_close(wave_of(found.model), wave_of(model), rtol=0, atol=1e-6)
    assert found.settings.contract == model.config.contract
    assert found.steps == steps
    assert list(found.settings.reads) == (["log-mel", "f0"] if model.needs_f0 else ["log-mel"])
    return converted, found


@pytest.mark.parametrize(("file", "steps", "how"), [
    ("g_02500000", 2_500_000, {}), ("generator_v1", 0, {"fmax": 8000.0}), ("g_00000050", 50, {"resblock": 2})])
def test_hifigan_of_its_authors(file, steps, how, tmp_path):
    model = vocoders.small("hifigan", **how)
    folder = made.folder_of("hifigan", model, tmp_path / "LJ_V1", file)
    (folder / "do_02500000").write_bytes(b"never looked at")
    converted, found = check(model, folder, tmp_path, steps)
    assert converted.layout == "jik876's HiFi-GAN"
    assert found.settings.config.resblock == model.config.resblock


@pytest.mark.parametrize("how", [{"activation": "snake"}, {}, {"log_scale": False},
                                 {"tanh": False, "final_bias": False, "sample_rate": 44100, "fmax": 22050.0}], ids=str)
def test_bigvgan_of_nvidia(how, tmp_path):
    model = vocoders.small("bigvgan", **how)
    folder = made.folder_of("bigvgan", model, tmp_path / "bigvgan", "bigvgan_generator.pt")
    (folder / "bigvgan_discriminator_optimizer.pt").write_bytes(b"never looked at")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# BigVGAN\n")
    converted, found = check(model, folder, tmp_path)
    assert (converted.layout, converted.model) == ("NVIDIA's BigVGAN", "bigvgan")
    assert {name: getattr(found.settings.config, name) for name in how} == how
    text = (found.path / "README.md").read_text()
    assert "license: mit" in text and "nvidia/bigvgan_*" in text
    assert "no licence" not in " ".join(converted.remarks)


def test_nsf_hifigan_of_openvpi(tmp_path):
    model = vocoders.small("nsf_hifigan")
    folder = made.folder_of("nsf_hifigan", model, tmp_path / "nsf_hifigan_44.1k_hop512_128bin_2024.02", "model.ckpt")
    converted, found = check(model, folder, tmp_path)
    assert converted.layout == "openvpi's NSF-HiFiGAN"
    assert not found.settings.config.amphion_defect
    assert "CC BY-NC-SA 4.0" in (found.path / "README.md").read_text()


def test_generator_within_a_training_of_openvpi(tmp_path):
    model = vocoders.small("nsf_hifigan")
    state = {f"generator.{name}": tensor for name, tensor in made.old_names(made.theirs("nsf_hifigan", model)).items()}
    state["discriminator.mpd.discriminators.0.conv_post.bias"] = torch.ones(1)
    folder = made.put(tmp_path / "exp", "model_ckpt_steps_100000.ckpt", {"state_dict": state}, "config.json",
                      json.dumps(made.flat_settings("nsf_hifigan", model.config)))
    check(model, folder, tmp_path, 100_000)


def test_vocos_of_the_hub(tmp_path):
    model = vocoders.small("vocos", **VOCOS)
    _, found = check(model, made.vocos_folder(model, tmp_path / "vocos"), tmp_path)
    assert found.settings.contract.floor == 1e-7


def test_vocos_with_other_mel_filters_is_refused(tmp_path):
    model = vocoders.small("vocos")  # Slaney's, which the settings do not say
    with pytest.raises(CannotLoad, match=r"mel_scale\.fb are not the filters of mel_scale=htk, norm=none"):
        layouts.convert(made.vocos_folder(model, tmp_path / "vocos"), tmp_path / "run")
    layouts.convert(tmp_path / "vocos", tmp_path / "run", {"mel_scale": "slaney", "norm": "slaney"})


def test_diffwave_of_lmnt(tmp_path):
    model = vocoders.small("diffwave", **LMNT, schedule="full", noise_steps=6, last_beta=0.3)
    converted, found = check(model, made.lmnt_folder(model, tmp_path / "diffwave"), tmp_path, 1_000_578)
    assert converted.layout == "LMNT's DiffWave"
    assert found.settings.config.mel_input == "decibels"


def test_decibels_of_lmnt_are_those_of_its_formula():
    """torchaudio's mel with normalized=True, then LMNT's decibels, literally and in float64."""
    from conftest import ROOT

    speech, _ = soundfile.read(sorted((ROOT / "examples" / "corpus" / "vctk_p225").glob("*.flac"))[0])
    swell = np.sin(2 * np.pi * 220 / 22050 * np.arange(22050)) * np.linspace(0, 1, 22050) ** 6  # to full scale
    wave = np.concatenate([speech[:44100], swell]).astype(np.float32)
    config = find("diffwave").Config(**LMNT | {"n_mels": 80, "floor": 1e-4 * 384**0.5})
    [log_mel] = LogMel(**vars(config.contract)).load("cpu")([wave])
    ours = find("diffwave").Model(config).scaled(torch.tensor(log_mel)[None])[0].numpy()

    padded = np.pad(wave.astype(np.float64), 512, mode="reflect")
    taper = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = np.stack([padded[start:start + 1024] for start in range(0, len(wave) + 1, 256)])
    spectrum = np.abs(np.fft.rfft(frames * taper)) / np.sqrt((taper**2).sum())
    ends = 2595 * np.log10(1 + np.array([20, 11025]) / 700)
    corners = 700 * (10 ** (np.linspace(*ends, 82) / 2595) - 1)
    hz = np.linspace(0, 11025, 513)[:, None]
    filters = np.maximum(0, np.minimum((hz - corners[:-2]) / np.diff(corners)[:-1],
                                       (corners[2:] - hz) / np.diff(corners)[1:]))
    decibels = 20 * np.log10(np.maximum(spectrum @ filters, 1e-5)) - 20
    expected = np.clip((decibels + 100) / 100, 0, 1)
    assert expected.min() == 0 and expected.max() == 1  # both ends are reached
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", list(made.AMPHION))
def test_vocoders_of_amphion(name, tmp_path):
    how = {"diffwave": {"clamp": "xt", "schedule": "full", "noise_steps": 6, "last_beta": 0.3},
           "nsf_hifigan": {"amphion_defect": True}}.get(name, {})
    model = vocoders.small(name, **how)
    folder = made.amphion_folder(name, model, tmp_path / "exp")
    converted, found = check(model, folder, tmp_path, 400_000)
    assert converted.layout.startswith("Amphion ")
    assert ("do not hear f0" in " ".join(converted.remarks)) == (name == "nsf_hifigan")
    assert "MIT" in (found.path / "README.md").read_text()


def test_old_file_and_safetensors_of_amphion(tmp_path):
    model = vocoders.small("hifigan")
    tensors = made.old_names(made.theirs("hifigan", model))
    made.put(tmp_path / "old", "400000.pt", {"generator_state_dict": {f"module.{k}": v for k, v in tensors.items()},
                                             "discriminator_state_dict": made.discriminators()},
             "args.json", made.args_json("hifigan", model.config))
    check(model, tmp_path / "old", tmp_path / "1", 400_000)
    epoch = tmp_path / "new" / "checkpoint" / "epoch-0003_step-0000300_loss-1.0"
    epoch.mkdir(parents=True)
    (tmp_path / "new" / "args.json").write_text(made.args_json("hifigan", model.config))
    save_file(tensors, epoch / "model.safetensors")
    check(model, epoch, tmp_path / "2", 300)


@pytest.mark.parametrize("name", ["hifigan_resblock1", "bigvgan_snakebeta", "diffwave"])
def test_amphions_own_numbers_through_an_import(name, parity, tmp_path):
    file = parity / "amphion" / "models" / f"{name}.safetensors"
    weights, given, expected = vocoders.reference(file, lambda name: name)
    args = json.loads((file.parent / "index.json").read_text())[name]["config"]
    args["preprocess"] |= {"fmin": 0, "fmax": 12000}
    made.put(tmp_path / "exp", "checkpoint/epoch-0001_step-0000007_loss-1.0/pytorch_model.bin",
             made.old_names(weights), "args.json", json.dumps(args))
    _, found = imported(tmp_path / "exp", tmp_path / "run")
    mel = given["mel"].transpose(1, 2)
    with torch.inference_mode():
        if name == "diffwave":
            wave = found.model.noise(given["audio"], given["t_int"].float(), found.model.condition(mel))
        else:
            wave = found.model(mel)
    torch.testing.assert_close(wave, expected["y"][:, 0], **TOLERANCE)


def test_weights_without_weight_norm_get_it_back(tmp_path):
    model = vocoders.small("hifigan")
    expected = wave_of(model)
    folder = made.put(tmp_path / "folded", "g_00000001", {"generator": made.theirs("hifigan", model.fold())},
                      "config.json", json.dumps(made.flat_settings("hifigan", model.config)))
    _, found = imported(folder, tmp_path / "run")
    torch.testing.assert_close(wave_of(found.model), expected, rtol=0, atol=1e-6)


def test_card_says_what_is_not_known(tmp_path):
    model = vocoders.small("melgan")
    folder = made.put(tmp_path / "somebody", "weights.pt", made.theirs("melgan", model))
    needed = {name: str(getattr(model.config, name)) for name in ("sample_rate", "n_fft", "win_length", "hop_length")}
    layouts.convert(folder, tmp_path / "run", needed | {"fmin": "0", "fmax": "12000"})
    found = run.load(tmp_path / "run")
    torch.testing.assert_close(wave_of(found.model), wave_of(model), rtol=0, atol=1e-6)
    lacks = card.problems((found.path / "README.md").read_text())
    assert "untrained" not in (found.path / "README.md").read_text()
    assert any("Licence" in line for line in lacks) and "front matter has no license" in lacks


# --- bad input


@pytest.fixture
def hifigan(tmp_path):
    return made.folder_of("hifigan", vocoders.small("hifigan"), tmp_path / "hifigan", "g_00000001")


def refused(folder, tmp_path, error, match, **extra):
    with pytest.raises(error, match=match):
        layouts.convert(folder, tmp_path / "run", extra)
    assert not (tmp_path / "run").exists()


def changed(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def retold(folder, change):
    """The folder with other tensors: what `change` makes of {name: tensor}."""
    file = next(folder.glob("g_*"))
    torch.save({"generator": change(torch.load(file, weights_only=True)["generator"])}, file)


def test_unknown_layout_tells_what_the_nearest_lacks_and_has(hifigan, tmp_path):
    retold(hifigan, lambda tensors: {name.replace("conv_post", "head"): tensor for name, tensor in tensors.items()})
    refused(hifigan, tmp_path, CannotLoad, r"no layout that is known \(HiFi-GAN, NSF-HiFiGAN, BigVGAN.*Nearest is "
            r"HiFi-GAN: missing conv_post; unexpected head\.bias, head\.param")


@pytest.mark.parametrize(("settings", "match"), [
    ({"upsample_initial_channel": 64}, "upsample_initial_channel is 64, the tensors say 32"),
    ({"num_mels": 80}, "num_mels is 80, the tensors say 20"),
    ({"upsample_kernel_sizes": [16, 4, 4]}, r"upsample_kernel_sizes is \[16, 4, 4\], the tensors say \[8, 4, 4\]"),
    ({"upsample_rates": [8, 8, 2, 2]}, "upsample_rates has 4 entries .* the tensors 3"),
    ({"resblock": "2"}, "resblock is 2, the tensors say 1"),
    ({"resblock_dilation_sizes": [[1, 3], [1, 3, 5]]}, "a row of resblock_dilation_sizes has 2 entries"),
    ({"fmin": [1, 2]}, r"fmin is .*1, 2.* expected something like 0\.0"),
    ({"upsample_rates": [4, 2, 4]}, "make 32 samples of a frame, hop_length is 16")], ids=lambda given: str(given)[:30])
def test_settings_that_contradict_are_named(settings, match, hifigan, tmp_path):
    changed(hifigan, **settings)
    refused(hifigan, tmp_path, BadRequest, match)


def test_missing_settings_are_named(hifigan, tmp_path):
    (hifigan / "config.json").unlink()
    refused(hifigan, tmp_path, BadRequest, r"has no config\.json, and the tensors do not say sample_rate, n_fft.*"
            r"upsample_rates.*--set sample_rate=")


def test_one_missing_setting_can_be_given(hifigan, tmp_path):
    changed(hifigan, sampling_rate=None)
    refused(hifigan, tmp_path, BadRequest, r"config\.json does not say sample_rate, ?fmax")
    layouts.convert(hifigan, tmp_path / "run", {"sample_rate": "24000", "fmax": "12000"})
    assert run.load(tmp_path / "run").settings.contract.sample_rate == 24000


def test_broken_settings_are_named(hifigan, tmp_path):
    (hifigan / "config.json").write_text('{"num_mels": 20')
    refused(hifigan, tmp_path, CannotLoad, r"config\.json cannot be read")


def test_misshapen_and_damaged_tensors_are_named(hifigan, tmp_path):
    good = torch.load(hifigan / "g_00000001", weights_only=True)["generator"]
    retold(hifigan, lambda tensors: tensors | {"conv_post.bias": torch.zeros(3)})
    refused(hifigan, tmp_path, CannotLoad, r"conv_post\.bias \(3,\) instead of \(1,\).*taken for jik876's HiFi-GAN")
    retold(hifigan, lambda tensors: good | {"conv_post.bias": torch.full((1,), float("nan"))})
    refused(hifigan, tmp_path, CannotLoad, "NaN or infinity in 1 of")
    retold(hifigan, lambda tensors: {name: tensor for name, tensor in good.items() if name != "conv_post.bias"})
    refused(hifigan, tmp_path, CannotLoad, r"1 missing \(conv_post\.bias\)")


def test_truncated_file_and_lfs_pointer_are_told(hifigan, tmp_path):
    file = hifigan / "g_00000001"
    file.write_bytes(file.read_bytes()[:5000])
    refused(hifigan, tmp_path, CannotLoad, "truncated")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 55\n")
    refused(hifigan, tmp_path, CannotLoad, "pointer of git-LFS")


class Payload:
    def __reduce__(self):
        return open, ("ran", "w")


def test_pickle_with_code_is_refused_without_running_it(hifigan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"generator": Payload()}, hifigan / "g_00000001")
    refused(hifigan, tmp_path, CannotLoad, "loading it would run")
    (hifigan / "g_00000001").write_bytes(pickle.dumps(Payload()))
    refused(hifigan, tmp_path, CannotLoad, "loading it would run")
    assert not (tmp_path / "ran").exists()


def test_discriminators_are_told_apart(hifigan, tmp_path):
    made.put(hifigan, "do_00000001", {"mpd": made.discriminators(), "msd": made.discriminators(), "steps": 5})
    refused(hifigan / "do_00000001", tmp_path, CannotLoad, r"holds discriminators.*g_\* for do_\*")
    folder = made.amphion_folder("hifigan", vocoders.small("hifigan"), tmp_path / "exp")
    [file] = folder.glob("checkpoint/*/pytorch_model_1.bin")
    refused(file, tmp_path, CannotLoad, "holds discriminators")


VARIANTS = {
    "mini_nsf": ("nsf_hifigan", {"mini_nsf": True}, {}, "PC-NSF-HiFiGAN"),
    "noise_sigma": ("nsf_hifigan", {"noise_sigma": 0.1}, {}, "noise_sigma is 0.1"),
    "source_conv": ("hifigan", {}, {"source_conv.weight": (8, 1, 1)}, "PC-NSF-HiFiGAN"),
    "istft": ("hifigan", {}, {"conv_post.weight_v": (18, 4, 7)}, "18 outputs instead of 1, as in iSTFTNet"),
    "resblock2": ("bigvgan", {}, {"resblocks.0.convs.0.bias": (16,)}, "resblock is 2"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_that_are_not_built_are_refused_by_name(variant, tmp_path):
    name, settings, tensors, match = VARIANTS[variant]
    folder = made.folder_of(name, vocoders.small(name), tmp_path / name, "g_00000001")
    changed(folder, **settings)
    retold(folder, lambda found: found | {key: torch.ones(shape) for key, shape in tensors.items()})
    refused(folder, tmp_path, CannotLoad, match)


def test_vocos_of_encodec_and_diffwave_without_mel_are_refused(tmp_path):
    vocos = made.theirs("vocos", vocoders.small("vocos"))
    vocos["feature_extractor.codebook_weights"] = torch.ones(4, 4)
    made.put(tmp_path / "encodec", "pytorch_model.bin", vocos)
    refused(tmp_path / "encodec", tmp_path, CannotLoad, "EnCodec")
    diffwave = made.theirs("diffwave", vocoders.small("diffwave"))
    without = {name: tensor for name, tensor in diffwave.items() if "upsampler" not in name}
    made.put(tmp_path / "diffwave", "weights.pt", {"model": without})
    refused(tmp_path / "diffwave", tmp_path, CannotLoad, "unconditional")


def test_bigvgan_with_filters_of_its_own_is_refused(tmp_path):
    folder = made.folder_of("bigvgan", vocoders.small("bigvgan"), tmp_path / "bigvgan", "g_00000001")
    retold(folder, lambda found: found | {"activation_post.upsample.filter": torch.full((1, 1, 12), 1 / 12)})
    refused(folder, tmp_path, CannotLoad, r"activation_post\.upsample\.filter .* other low-pass filters")


def test_noise_schedule_that_is_no_line_is_refused(tmp_path):
    model = vocoders.small("diffwave", **LMNT)
    folder = made.lmnt_folder(model, tmp_path / "diffwave")
    found = torch.load(folder / "weights.pt", weights_only=True)
    found["params"]["noise_schedule"][3] = 0.2
    torch.save(found, folder / "weights.pt")
    refused(folder, tmp_path, BadRequest, "noise_schedule is no straight line")


def test_folder_without_or_with_several_weights_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    refused(tmp_path / "empty", tmp_path, CannotLoad, r"no file of weights that is known.*it has notes\.txt")
    for name in ("a.pt", "b.pt"):
        made.put(tmp_path / "two", name, made.discriminators())
    refused(tmp_path / "two", tmp_path, CannotLoad, r"several files of weights \(a\.pt, b\.pt\)")


def test_a_run_that_is_there_is_left_alone(hifigan, tmp_path):
    layouts.convert(hifigan, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(run.NotARun, match="exists already"):
        layouts.convert(hifigan, tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    with pytest.raises(CannotLoad, match="is a run folder of featstore already"):
        layouts.convert(tmp_path / "run", tmp_path / "again")


def test_command_imports_and_tells_what_to_extract(hifigan, tmp_path):
    result = CliRunner().invoke(cli, ["zoo", "import", str(hifigan), "-o", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "hifigan from jik876's HiFi-GAN" in result.output and "featstore extract" in result.output
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in (tmp_path / "run").iterdir()}
