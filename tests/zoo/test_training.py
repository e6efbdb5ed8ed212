"""The training loop: exact resume, several processes, precision, what is refused, what is kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import featstore as fs
from featstore.errors import BadRequest, CannotLoad, ContractMismatch, MissingFeature
from featstore_extractors import checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from zoo.conftest import SMALL  # noqa: E402

from featstore_zoo import run, training  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:pkg_resources"),
              pytest.mark.filterwarnings("ignore:.*num_workers.*:UserWarning")]


def prepared(path: Path, voices: Path, model: str = "hifigan", **fields: object) -> run.Run:
    return training.prepare(path, fs.open(voices), model, fields=SMALL | fields)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(path / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("model", ["hifigan", "nsf-hifigan"])
def test_a_resumed_run_equals_an_uninterrupted_one(voices, tmp_path, model):
    for name in ("whole", "pieces"):
        prepared(tmp_path / name, voices, model, steps=5, save_every=1)
    training.train(tmp_path / "whole", voices, workers=0)
    training.train(tmp_path / "pieces", voices, workers=0, steps=2)
    training.train(tmp_path / "pieces", voices, workers=0, resume=True)
    assert run.load(tmp_path / "pieces").steps == 5
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "pieces"))


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


def test_a_truncated_checkpoint_is_told_and_the_weights_stay(voices, tmp_path):
    prepared(tmp_path / "run", voices, steps=1)
    training.train(tmp_path / "run", voices, workers=0)
    path = tmp_path / "run" / training.LAST
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CannotLoad, match="may be truncated"):
        training.train(tmp_path / "run", voices, workers=0, resume=True)
    assert run.load(tmp_path / "run").model


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
