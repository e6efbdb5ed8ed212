"""The training loop: exact resume, several processes, precision, what is refused, what is kept."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

import featstore as fs
from featstore.errors import BadRequest, CannotLoad, ContractMismatch, MissingFeature
from featstore_extractors import checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from torch.multiprocessing import ProcessRaisedException  # noqa: E402
from zoo.conftest import SMALL  # noqa: E402

from featstore_zoo import card, recipe, run, training  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:.*num_workers.*:UserWarning")]


def prepared(path: Path, voices: Path, model: str = "hifigan", **fields: object) -> run.Run:
    return training.prepare(path, fs.open(voices), model, fields=SMALL | fields)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(path / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("model", [pytest.param("hifigan", marks=pytest.mark.slow), "nsf-hifigan"])
def test_a_resumed_run_equals_an_uninterrupted_one(voices, tmp_path, model):
    for name in ("whole", "pieces"):
        prepared(tmp_path / name, voices, model, steps=5, save_every=1)
    training.train(tmp_path / "whole", voices, workers=0)
    training.train(tmp_path / "pieces", voices, workers=0, steps=2)
    training.train(tmp_path / "pieces", voices, workers=0, resume=True)
    assert run.load(tmp_path / "pieces").steps == 5
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "pieces"))


@pytest.mark.slow
def test_workers_that_read_ahead_change_nothing(voices, tmp_path):
    for name, workers in (("none", 0), ("two", 2)):
        prepared(tmp_path / name, voices, steps=2)
        training.train(tmp_path / name, voices, workers=workers)
    assert same(weights(tmp_path / "none"), weights(tmp_path / "two"))


@pytest.mark.slow
def test_two_processes_learn_what_one_does(voices, tmp_path):
    for name, device in (("one", "cpu"), ("two", "cpu:0,1")):
        prepared(tmp_path / name, voices, steps=2, batch=4, ema=0)
        training.train(tmp_path / name, voices, workers=0, device=device)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)


def test_losses_fall_and_the_run_has_all_that_it_promises(voices, tmp_path):
    told: list[training.Told] = []
    prepared(tmp_path / "run", voices, steps=30, learning_rate=2e-3, ema=0.5, lambda_adversarial=0, discriminators=[],
             validate_every=30)
    done = training.train(tmp_path / "run", voices, workers=0, progress=told.append)
    assert told[-1].terms["mel"] < 0.8 * told[0].terms["mel"]
    assert math.isfinite(done.best) and done.best == told[-1].validated["score"]
    home = tmp_path / "run"
    for path in ("model.safetensors", "config.json", "recipe.toml", "checkpoints/last/state.pt",
                 "checkpoints/best/model.safetensors"):
        assert (home / path).is_file()
    assert list((home / "log").glob("events*")) and list((home / "samples").rglob("*.png"))
    assert list((home / "samples" / "00000030").glob("*.flac"))


def test_the_weights_used_are_the_averaged_ones(voices, tmp_path):
    prepared(tmp_path / "run", voices, steps=4, ema=0.9)
    training.train(tmp_path / "run", voices, workers=0)
    state = torch.load(tmp_path / "run" / training.LAST, weights_only=True)
    used = weights(tmp_path / "run")
    assert any(not torch.equal(used[name], state["model"][name]) for name in used)


@pytest.mark.slow
def test_half_precision_computes_in_it_and_keeps_weights_in_full(voices, tmp_path):
    prepared(tmp_path / "run", voices, steps=2, precision="bf16", ema=0)
    training.train(tmp_path / "run", voices, workers=0)
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}


def test_gradients_that_are_not_finite_change_nothing_and_end_the_run_after_a_while(voices, tmp_path, monkeypatch):
    from featstore_zoo import hifigan

    def broken(model, batch, generator, adversary=None):
        return {"mel": model(batch["log-mel"]).sum() * float("nan")}

    prepared(tmp_path / "run", voices, steps=20, skips=3, ema=0, discriminators=[])
    monkeypatch.setattr(hifigan, "losses", broken)
    trainer = training.Trainer(training._fabric("cpu", "32"), run.load(tmp_path / "run"), fs.open(voices), 0, None)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(training.Diverged, match="3 steps in a row"):
        trainer.go(None)
    assert same(before, dict(trainer.model.state_dict()))


def test_batches_that_do_not_fit_into_memory_are_told(voices, tmp_path):
    prepared(tmp_path / "run", voices, steps=2, batch=4096, frames=2**20, valid_utterances=0)  # a petabyte
    with pytest.raises(CannotLoad, match=r"for batches of 4096 crops of 1048576 frames\. .*--set batch=2048 --set acc"):
        training.train(tmp_path / "run", voices, workers=0)


@pytest.mark.parametrize(("said", "error", "told"), [
    ("featstore.errors.CannotLoad: cuda: too small", CannotLoad, "^cuda: too small$"),
    ("KeyError: 3", ProcessRaisedException, "KeyError: 3")])
def test_what_one_of_several_processes_refuses_is_told_alone(voices, tmp_path, monkeypatch, said, error, told):
    def launch(self, work):
        raise ProcessRaisedException(f"\n-- Process 1 ended:\nTraceback (most recent call last):\n{said}\n", 1, 9)

    prepared(tmp_path / "run", voices, steps=2)
    monkeypatch.setattr(training.Fabric, "launch", launch)
    with pytest.raises(error, match=told):
        training.train(tmp_path / "run", voices, workers=0, device="cpu:0,1")


def test_training_ends_when_validation_no_longer_gets_better(voices, tmp_path):
    prepared(tmp_path / "run", voices, steps=50, learning_rate=1e-12, ema=0, validate_every=1, patience=2)
    done = training.train(tmp_path / "run", voices, workers=0)
    assert done.early and done.step < 10


def test_a_run_is_not_trained_over(voices, tmp_path):
    prepared(tmp_path / "run", voices, steps=1)
    training.train(tmp_path / "run", voices, workers=0)
    with pytest.raises(run.NotARun, match="--resume"):
        training.train(tmp_path / "run", voices, workers=0)
    with pytest.raises(run.NotARun, match="exists already"):
        prepared(tmp_path / "run", voices)


def test_a_truncated_or_foreign_checkpoint_is_told_and_the_weights_stay(voices, tmp_path):
    prepared(tmp_path / "run", voices, steps=1)
    training.train(tmp_path / "run", voices, workers=0)
    path = tmp_path / "run" / training.LAST
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CannotLoad, match="truncated"):
        training.train(tmp_path / "run", voices, workers=0, resume=True)
    torch.save({"position": Ran(str(tmp_path / "ran"))}, path)
    with pytest.raises(CannotLoad, match=r"loading it would run .*mkdir.*It was not run.*--init"):
        training.train(tmp_path / "run", voices, workers=0, resume=True)
    assert not (tmp_path / "ran").exists() and run.load(tmp_path / "run").model


class Ran:
    """A pickle that makes a folder where it is loaded."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_store_that_changed_is_not_gone_on_with(voices, tmp_path):
    import shutil

    shutil.copytree(voices, tmp_path / "copy.zarr")
    prepared(tmp_path / "run", tmp_path / "copy.zarr", steps=1)
    training.train(tmp_path / "run", tmp_path / "copy.zarr", workers=0)
    held = run.load(tmp_path / "run").settings.training["held_out"]
    store = fs.open(tmp_path / "copy.zarr")
    fs_remove = next(key for key in store.utterances if key not in held)
    with store.writer() as writer:
        writer.delete(fs_remove)
    with pytest.raises(fs.errors.PositionMismatch, match="utterances"):
        training.train(tmp_path / "run", tmp_path / "copy.zarr", workers=0, resume=True, steps=2)


def test_a_field_that_is_not_known_is_refused_with_the_nearest(voices, tmp_path):
    with pytest.raises(BadRequest, match=r"no field 'chanels'.*channels"):
        prepared(tmp_path / "run", voices, chanels="16")
    with pytest.raises(BadRequest, match="batch=many: expected something like 16"):
        prepared(tmp_path / "run", voices, batch="many")


def test_a_contract_that_contradicts_the_store_is_refused_by_its_field(voices, tmp_path):
    with pytest.raises(ContractMismatch, match=r"n_mels=80 was asked for.*n_mels 100"):
        prepared(tmp_path / "run", voices, n_mels="80")


def test_a_waveform_of_another_rate_is_refused(voices, tmp_path):
    import shutil

    from featstore_extractors import parse

    shutil.copytree(voices, tmp_path / "copy.zarr")
    store = fs.open(tmp_path / "copy.zarr")
    fs.extract(fs.corpus(voices.parent / "corpus"), store, parse("w16=wave:16k"), workers=0)
    with pytest.raises(ContractMismatch, match="sample rate 16000 and log-mel 24000"):
        training.prepare(tmp_path / "run", fs.open(tmp_path / "copy.zarr"), "hifigan", fields=SMALL,
                         names={"wave": "w16"})


def test_a_feature_that_the_model_needs_and_the_store_lacks_is_named(voices, tmp_path):
    with pytest.raises(MissingFeature, match="no feature 'pitch'"):
        training.prepare(tmp_path / "run", fs.open(voices), "nsf-hifigan", fields=SMALL, names={"f0": "pitch"})


def test_a_run_that_ended_before_its_first_checkpoint_begins_again_by_resume(voices, tmp_path):
    for name, resume in (("new", False), ("resumed", True)):
        prepared(tmp_path / name, voices, steps=1)
        training.train(tmp_path / name, voices, workers=0, resume=resume)
    assert same(weights(tmp_path / "new"), weights(tmp_path / "resumed"))


def test_weights_without_a_checkpoint_are_not_trained_over(voices, tmp_path):
    made = prepared(tmp_path / "run", voices, steps=1)
    run.save(made.path, made.settings, made.network().state_dict(), 0)
    for resume in (False, True):
        with pytest.raises(CannotLoad, match=r"no checkpoint to go on from.*--init"):
            training.train(tmp_path / "run", voices, workers=0, resume=resume)


@pytest.mark.slow
def test_a_run_lengthened_by_steps_remembers_and_needs_not_what_it_began_with(voices, tmp_path):
    import shutil

    prepared(tmp_path / "first", voices, steps=1)
    training.train(tmp_path / "first", voices, workers=0)
    training.prepare(tmp_path / "run", fs.open(voices), "hifigan", fields=SMALL | {"steps": 1, "learning_rate": 1e-9},
                     init=tmp_path / "first")
    training.train(tmp_path / "run", voices, workers=0)
    first, begun = weights(tmp_path / "first"), weights(tmp_path / "run")
    assert all(torch.allclose(first[name], begun[name], atol=1e-6) for name in first)
    shutil.rmtree(tmp_path / "first")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    done = training.train(tmp_path / "moved", voices, workers=0, resume=True, steps=2)
    assert done.step == 2 and run.load(tmp_path / "moved").settings.training["steps"] == 2
    assert training.train(tmp_path / "moved", voices, workers=0, resume=True).terms == {}


def test_a_run_begins_only_with_weights_that_fit(voices, tmp_path):
    made = prepared(tmp_path / "first", voices, channels=16)
    run.save(made.path, made.settings, made.network().state_dict(), 0)
    with pytest.raises(CannotLoad, match="shape"):
        training.prepare(tmp_path / "run", fs.open(voices), "hifigan", fields=SMALL, init=tmp_path / "first")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("finite", [True, False])
def test_the_scaler_of_half_precision_serves_both_optimisers_alike(voices, tmp_path, monkeypatch, finite):
    """Infinite gradients of one side leave the weights of both; finite ones reach both in their true size."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision

    from featstore_zoo import hifigan

    factor = 1.0 if finite else float("inf")

    def plain(model, batch, generator, adversary=None):
        judges = sum(weight.sum() for weight in adversary.parameters())
        return {"mel": model.conv_post.bias.sum() * factor, "discriminator": judges}

    prepared(tmp_path / "run", voices, steps=1, precision="16", ema=0)
    monkeypatch.setattr(hifigan, "losses", plain)
    half = Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu"))
    trainer = training.Trainer(half, run.load(tmp_path / "run"), fs.open(voices), 0, None)
    before = [{n: w.clone() for n, w in side.named_parameters()} for side in (trainer.model, trainer.adversary)]
    trainer.go(None)
    for side, old in zip((trainer.model, trainer.adversary), before, strict=True):
        moved = [name for name, weight in side.named_parameters() if not torch.equal(weight, old[name])]
        assert bool(moved) is finite
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in trainer.adversary.parameters())
    assert trainer._scaler.get_scale() == (65536 if finite else 32768)


def test_a_device_that_cannot_is_told(voices, tmp_path):
    prepared(tmp_path / "run", voices, precision="16")
    for device, error, told in (("cpu", BadRequest, "bf16"), ("cuda:x", BadRequest, "expected cpu, cuda"),
                                ("tpu", BadRequest, "expected cpu, cuda"), ("mps", CannotLoad, "no MPS")):
        with pytest.raises(error, match=told):
            training.train(tmp_path / "run", voices, device=device)


def test_a_recipe_trains_the_same_again(voices, tmp_path):
    store = fs.open(voices)
    first = prepared(tmp_path / "first", voices, steps=3)
    again = training.prepare(tmp_path / "again", store, "hifigan", recipe=recipe.read(tmp_path / "first"))
    assert again.settings == first.settings
    other = training.prepare(tmp_path / "other", store, "hifigan", fields={"steps": "7"},
                             recipe=recipe.read(tmp_path / "first" / "recipe.toml"))
    assert other.settings.training == dict(first.settings.training) | {"steps": 7}


@pytest.mark.parametrize(("text", "error", "told"), [
    ("[model]\nname = 'vocos'", BadRequest, "is for the model vocos, and hifigan was asked for"),
    ("[training]\nsteps = 'many'", BadRequest, "steps=many: expected something like"),
    ("[training]\nstep = 1", BadRequest, "no field 'step'.*steps"),
    ("[features]\nf0 = 'f0:harvest'", fs.errors.IdentityMismatch, "tracker='dio'"),
    ("[features]\nmel44 = 'log-mel:44k-128'", MissingFeature, "mel44"),
    ("[features]\nf0 = 3", BadRequest, "lines such as"),
    ("model = 3", BadRequest, r"expected a table \[model\]"),
    ("[", BadRequest, "is not TOML"),
])
def test_a_recipe_that_does_not_fit_is_told(voices, tmp_path, text, error, told):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(error, match=told):
        training.prepare(tmp_path / "run", fs.open(voices), "hifigan", recipe=recipe.read(tmp_path / "r.toml"))
    assert not (tmp_path / "run").exists()


def test_a_preset_for_another_contract_is_refused_by_its_field(voices, tmp_path):
    with pytest.raises(ContractMismatch, match=r"sample_rate=44100 was asked for.*sample_rate 24000"):
        training.prepare(tmp_path / "run", fs.open(voices), "bigvgan:v2-44k-128")
    with pytest.raises(BadRequest, match="no preset 'v9' of hifigan; there are v1"):
        training.prepare(tmp_path / "run", fs.open(voices), "hifigan:v9")


def test_a_split_that_is_not_there_is_told_before_anything_is_written(voices, tmp_path):
    with pytest.raises(BadRequest, match="main"):
        training.prepare(tmp_path / "run", fs.open(voices), "hifigan", split="main")
    assert not (tmp_path / "run").exists()


def test_the_average_of_a_young_training_is_that_of_its_own_weights():
    model = torch.nn.Linear(1, 1, bias=False)
    average = training.averaged(model, 0.999)
    with torch.no_grad():
        for step in range(100):
            model.weight.fill_(float(step > 10))
            average.update_parameters(model)
    assert average.module.weight.item() > 0.99


@pytest.mark.slow
def test_a_card_tells_the_last_validation_beside_griffin_lim(voices, tmp_path):
    prepared(tmp_path / "run", voices, steps=1)
    training.train(tmp_path / "run", voices, workers=0)
    text = card.render(run.load(tmp_path / "run"))
    assert "1 held-out utterances, the first 0.5 s of each, after 1 steps" in text
    assert "| metric | this model | Griffin-Lim |" in text and "| log-mel L1 | " in text


def test_a_smoke_run_is_small_whatever_the_preset(voices, tmp_path):
    for preset in ("hifigan:v1", "hifigan:v3"):
        made = training.prepare(tmp_path / preset[-2:], fs.open(voices), preset, smoke=True)
        assert sum(weight.numel() for weight in made.network().parameters()) < 200_000
        assert training.training_of(made).steps == 20
    assert run.load(tmp_path / "v3").settings.config.resblock == 2
