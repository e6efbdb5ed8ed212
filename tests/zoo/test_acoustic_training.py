"""Acoustic models in the shared loop: what they hear, who sings, exact resume, fine-tuning, what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featstore as fs
from featstore.errors import BadRequest, CannotLoad, ContractMismatch, IdentityMismatch, MissingFeature

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from featstore_extractors import checkpoint, parse  # noqa: E402
from featstore_extractors.signal import MelContract  # noqa: E402
from featstore_zoo import TABLE, card, find, metrics, recipe, run, training  # noqa: E402
from featstore_zoo.examples import Examples  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:.*num_workers.*:UserWarning")]
FIELDS: dict[str, Any] = {"width": 8, "batch": 2, "frames": 16, "steps": 3, "save_every": 1, "validate_every": 1000,
                          "valid_utterances": 0, "learning_rate": 1e-3}
STACK = {"channels": 8, "layers": 2, "step_dim": 8, "step_hidden": 8, "sampling_steps": 2}
TINY: dict[str, dict[str, Any]] = {
    "diffwavenet-svc": STACK,
    "transformer-svc": {"layers": 1, "hidden": 8},
    "como-svc": STACK | {"encoder_layers": 1, "hidden": 8},
    "vits-svc": {"latent": 8, "hidden": 8, "prior_layers": 1, "posterior_layers": 1, "flow_layers": 1, "flows": 1,
                 "speaker_width": 8, "slice_frames": 8, "generator_preset": "smoke", "discriminators": ["mpd"],
                 "discriminator_width": 0.05, "mpd_periods": [2]},
}
ROWS = "condition_encoder.singer_encoder.nn.weight"


def prepared(path: Path, songs: Path, model: str = "transformer-svc", *, content: Any = ("spin",), speaker: Any = None,
             names: Any = None, split: Any = None, init: Any = None, **fields: object) -> run.Run:
    return training.prepare(path, fs.open(songs), model, content=content, speaker=speaker, names=names, split=split,
                            init=init, fields=FIELDS | (TINY[model.partition(":")[0]] if init is None else {}) | fields)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(path / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def part_of(songs: Path, path: Path, speaker: str) -> Path:
    """A copy of the store with one speaker alone, who is called Nino there if it is the second."""
    shutil.copytree(songs, path)
    store = fs.open(path)
    with store.writer() as writer:
        for key in list(store.utterances):
            if store.utterances[key].speaker != speaker:
                writer.delete(key)
    return path


def test_a_smoke_run_is_trained_judged_and_knows_its_singers(songs, tmp_path):
    training.prepare(tmp_path / "run", fs.open(songs), "diffwavenet-svc", smoke=True,
                     fields={"steps": 1, "frames": 16, "valid_s": 0.2, "sampling_steps": 2})
    done = training.train(tmp_path / "run", songs, workers=0)
    made, store = run.load(tmp_path / "run"), fs.open(songs)
    held = made.settings.training["held_out"]
    assert list(made.singers) == ["vctk_p225", "vctk_p226"] and [s.row for s in made.singers.values()] == [0, 1]
    for name, singer in made.singers.items():
        keys = [key for key in store.utterances if store.utterances[key].speaker == name and key not in held]
        f0 = np.concatenate([store[key, "f0"][:] for key in keys])
        low, median, high = np.percentile(f0[f0 > 0], [5, 50, 95])
        assert singer.utterances == len(keys)
        assert (singer.low_hz, singer.median_hz, singer.high_hz) == pytest.approx((low, median, high), abs=0.01)
    mels = np.concatenate([store[key, "log-mel"][:] for key in store.utterances if key not in held])
    torch.testing.assert_close(made.model.mel_low, torch.from_numpy(mels.min(0)))
    torch.testing.assert_close(made.model.mel_high, torch.from_numpy(mels.max(0)))
    assert np.isfinite(done.best)
    text = card.render(made)
    assert "| metric | this model | mean log-mel |" in text and "| log-mel L1 | " in text and "mel MCD dB" in text
    assert {path.suffix for path in (tmp_path / "run" / "samples" / "00000001").iterdir()} == {".flac", ".png"}


@pytest.mark.parametrize("model", ["diffwavenet-svc", *(pytest.param(name, marks=pytest.mark.slow)
                                                        for name in TINY if name != "diffwavenet-svc")])
def test_a_resumed_run_equals_an_uninterrupted_one(songs, tmp_path, model):
    for name in ("whole", "pieces"):
        prepared(tmp_path / name, songs, model)
    training.train(tmp_path / "whole", songs, workers=0)
    training.train(tmp_path / "pieces", songs, workers=0, steps=1)
    training.train(tmp_path / "pieces", songs, workers=0, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "pieces"))


def test_a_batch_has_what_the_model_reads_and_the_rows_of_its_singers(songs, tmp_path):
    made = prepared(tmp_path / "run", songs, speaker="voice", batch=8, content=["spin"], names={"loudness": "none"})
    assert made.settings.config.reads == ("spin", "f0", "speaker") and made.settings.config.speaker_dim == 8
    examples = Examples(made, fs.open(songs), training.training_of(made))
    batch = examples.by_role({name: torch.from_numpy(value) for name, value in examples.crops[0].items()})
    assert batch["speaker"].shape == (8, 8) and batch["spin"].shape == (8, 16, 12) and "singer" not in batch
    assert all(len(singer.embedding) == 8 for singer in made.singers.values())

    made = prepared(tmp_path / "numbered", songs, batch=8, balance="speaker")
    examples = Examples(made, fs.open(songs), training.training_of(made))
    heard = []
    for number in range(20):
        batch = examples.by_role({name: torch.from_numpy(value) for name, value in examples.crops[number].items()})
        heard += batch["singer"].tolist()
        who = [examples.crops.speakers[place] for place in batch["speaker_index"].tolist()]
        assert batch["singer"].tolist() == [made.singers[name].row for name in who]
    assert 0.35 < np.mean(heard) < 0.65  # one of the two has twice as much to hear


def test_a_run_is_tuned_to_a_new_singer_behind_the_old_ones_who_stay_as_they_are(songs, tmp_path):
    alone, other = (part_of(songs, tmp_path / name, name) for name in ("vctk_p226", "vctk_p225"))
    prepared(tmp_path / "first", alone)
    training.train(tmp_path / "first", alone, workers=0)
    tuned = prepared(tmp_path / "tuned", other, content=None, init=tmp_path / "first", width=8)
    assert {name: singer.row for name, singer in tuned.singers.items()} == {"vctk_p226": 0, "vctk_p225": 1}
    assert tuned.singers["vctk_p226"] == run.load(tmp_path / "first").singers["vctk_p226"]
    training.train(tmp_path / "tuned", other, workers=0)
    before, after = weights(tmp_path / "first"), weights(tmp_path / "tuned")
    assert after[ROWS].shape == (2, 8) and torch.equal(after[ROWS][0], before[ROWS][0])
    assert not torch.equal(after[ROWS][1], after[ROWS][0])
    assert torch.equal(after["mel_low"], before["mel_low"])  # the scale that the weights have learnt
    again = prepared(tmp_path / "again", alone, content=None, init=tmp_path / "tuned")
    assert again.settings.config.singers == 2 and again.singers == tuned.singers


def test_a_student_begins_as_its_teacher(songs, tmp_path):
    prepared(tmp_path / "teacher", songs, "como-svc")
    training.train(tmp_path / "teacher", songs, workers=0)
    made = prepared(tmp_path / "student", songs, "como-svc:student", content=None, init=tmp_path / "teacher", steps=1,
                    learning_rate=1e-9)
    assert made.settings.config.stage == "student" and made.settings.config.channels == 8
    training.train(tmp_path / "student", songs, workers=0)
    teacher, student = weights(tmp_path / "teacher"), weights(tmp_path / "student")
    assert all(torch.allclose(student[name], teacher[name], atol=1e-6) for name in teacher)
    name = "acoustic_mapper.decoder.denoise_fn.neural_network.input.0.weight"
    assert torch.equal(student[name.replace("_fn", "_fn_pretrained")], teacher[name])
    with pytest.raises(CannotLoad, match="a student begins with its teacher"):
        prepared(tmp_path / "back", songs, "como-svc:teacher", content=None, init=tmp_path / "student", stage="teacher")


def test_a_recipe_trains_the_same_again_and_refuses_other_content(songs, tmp_path):
    first = prepared(tmp_path / "first", songs, speaker="voice", names={"f0": "none"})
    again = training.prepare(tmp_path / "again", fs.open(songs), "transformer-svc",
                             recipe=recipe.read(tmp_path / "first"))
    assert again.settings == first.settings
    shutil.copytree(songs, tmp_path / "copy.zarr")
    store = fs.open(tmp_path / "copy.zarr")
    with store.writer() as writer:
        writer.declare("spin", fs.Spec(made_by="spin", version=2, frame_rate=50, kind="continuous"), replace=True)
        for key in store.utterances:
            writer.write(key, "spin", np.zeros((round(store.utterances[key].duration_s * 50), 12), np.float16))
    with pytest.raises(IdentityMismatch, match=r"asks for spin@\w{9}"):
        training.prepare(tmp_path / "other", fs.open(tmp_path / "copy.zarr"), "transformer-svc",
                         recipe=recipe.read(tmp_path / "first"))
    training.train(tmp_path / "first", songs, workers=0)
    with pytest.raises(IdentityMismatch, match=r"version=2 \(the run: 1\)"):
        prepared(tmp_path / "tuned", tmp_path / "copy.zarr", content=None, init=tmp_path / "first")


@pytest.mark.parametrize(("asked", "error", "told"), [
    ({"content": None}, BadRequest, "say which content features.*--content spin"),
    ({"content": ["whisper"]}, MissingFeature, "no feature 'whisper'.*spin"),
    ({"content": ["f0"]}, BadRequest, "f0 is of kind f0 with no dimensions: content is vectors"),
    ({"content": None, "fields": {"content": [["spin", 9]]}}, ContractMismatch, "spin .* has 12 dimensions.* hears 9"),
    ({"speaker": "spin"}, BadRequest, "spin is of kind continuous.*one vector"),
    ({"speaker": "alice"}, MissingFeature, "no feature 'alice'.*voice"),
    ({"names": {"loudness": "loud"}}, MissingFeature, "no feature 'loud'.*--loudness none"),
    ({"names": {"loudness": "energy"}}, BadRequest, "cannot be the model's loudness: expected decibels"),
    ({"fields": {"n_mels": "80"}}, ContractMismatch, "n_mels=80 was asked for"),
    ({"split": "main"}, BadRequest, "no split 'main'"),
    ({"model": "transformer-svc:amphion", "content": None}, MissingFeature, "no feature 'whisper'"),
    ({"model": "vits-svc", "names": {"wave": "f0"}}, ContractMismatch, "f0 has sample rate"),
    ({"model": "hifigan"}, BadRequest, "hifigan is a vocoder"),
])
def test_what_cannot_be_heard_is_told_before_anything_is_written(songs, tmp_path, asked, error, told):
    given = {"content": ["spin"], "model": "transformer-svc"} | asked
    model = given.pop("model")
    with pytest.raises(error, match=told):
        training.prepare(tmp_path / "run", fs.open(songs), model, **given)
    assert not (tmp_path / "run").exists()


def test_voices_are_not_numbered_where_nobody_says_whose_they_are(songs, tmp_path):
    store, bare = fs.open(songs), fs.create(tmp_path / "bare.zarr")
    with bare.writer() as writer:
        for name in ("log-mel", "spin"):
            writer.declare(name, store.feature(name).spec)
            for key in store.utterances:
                writer.write(key.replace("/", "-"), name, store[key, name][:])
    plain = {"f0": "none", "loudness": "none"}
    with pytest.raises(BadRequest, match=r"utterances of .* have no speaker, such as vctk.*--speaker none"):
        prepared(tmp_path / "run", tmp_path / "bare.zarr", names=plain)
    made = prepared(tmp_path / "run", tmp_path / "bare.zarr", names=plain, speaker="none")
    assert made.settings.config.reads == ("spin",) and made.singers == {}


def test_singers_that_training_lacks_cannot_be_validated_on_by_number(songs, tmp_path):
    shutil.copytree(songs, tmp_path / "copy.zarr")
    fs.split(fs.open(tmp_path / "copy.zarr"), "main", by="speaker", valid="40%", test=0)
    with pytest.raises(BadRequest, match=r"main/valid has only singers that main/train lacks.*--by song"):
        prepared(tmp_path / "run", tmp_path / "copy.zarr", split="main")
    made = prepared(tmp_path / "run", tmp_path / "copy.zarr", split="main", speaker="voice")
    assert len(made.singers) == 1


def test_a_folder_of_another_version_is_told(songs, tmp_path):
    made = prepared(tmp_path / "run", songs)
    made.path.joinpath("singers.json").write_text('{"alice": {"row": 0, "range": 3}}')
    with pytest.raises(CannotLoad, match=r"singers.json cannot be read.*another version"):
        _ = run.load(made.path).singers
    made.path.joinpath("statistics.safetensors").unlink()
    made.path.joinpath("singers.json").unlink()
    with pytest.raises((CannotLoad, BadRequest)):
        training.train(made.path, songs, workers=0)


def test_distortion_of_log_mels_is_that_of_their_shape_and_not_of_their_level():
    contract = MelContract.preset("24k-100")
    bands = (np.arange(100) + 0.5) / 100
    mel = np.zeros((3, 100))
    assert metrics.mel_distortion(mel, mel + 1, contract) == pytest.approx(0, abs=1e-9)
    ripple = 0.3 * np.cos(4 * np.pi * bands)  # 0.3 nepers is 2.6 dB; a wave of it has an rms of 2.6 / sqrt 2
    expected = 20 / np.log(10) * 0.3 / np.sqrt(2)
    assert metrics.mel_distortion(mel, mel + ripple, contract) == pytest.approx(expected)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(songs, tmp_path):
    for name, device in (("one", "cpu"), ("two", "cpu:0,1")):
        prepared(tmp_path / name, songs, steps=2, batch=4, ema=0, dropout=0)
        training.train(tmp_path / name, songs, workers=0, device=device)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=5e-5) for name in one)


def test_every_acoustic_model_is_tested():
    assert {name.replace("_", "-") for name in TABLE if find(name).KIND == "acoustic"} == set(TINY)


@pytest.mark.parametrize("name", TABLE)
def test_no_field_of_a_model_is_called_like_one_of_training(name):
    """`--set` and recipes give both by name: the model's would never be reached."""
    one, other = ({field.name for field in dataclasses.fields(kind)} for kind in (training.Training, find(name).Config))
    assert not one & other


def test_the_extractor_requests_of_a_run_make_its_features(songs, tmp_path):
    made = prepared(tmp_path / "run", songs)
    requests = [read.request for key, items in made.settings.reads.items() for read in items if key != "spin"]
    for name, extractor in parse(*requests).items():
        assert fs.Spec.of(extractor).identity == fs.open(songs).feature(name).identity
