"""What every acoustic model of the zoo keeps: shapes, lengths, padding, batches, gradients, wrong input."""

import dataclasses
import json
from pathlib import Path

import acoustics
import pytest
import torch

import featstore_zoo
from featstore.errors import ContractMismatch, LengthMismatch, MissingFeature
from featstore_zoo import find

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
NAMES = list(acoustics.SMALL)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 sums in another order

# Amphion's table: whisper of 1024, contentvec of 256, 100 mels.
COUNTS = {("diffwavenet_svc", "amphion"): 31_174_627, ("diffwavenet_svc", "amphion-large"): 100_694_628 + 886_527}


@pytest.fixture(params=NAMES)
def model(request):
    return acoustics.small(request.param)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("name", "preset"), COUNTS)
def test_parameters_are_as_many_as_in_the_reference(name, preset):
    package = find(name)
    with torch.device("meta"):
        model = package.Model(package.Config.preset(preset))
    assert sum(weight.numel() for weight in model.parameters()) == COUNTS[name, preset]


def test_all_acoustic_models_are_tested():
    assert [name for name in featstore_zoo.TABLE if find(name).KIND == "acoustic"] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_survives_json_and_has_a_card(name):
    config = find(name).Config
    assert "smoke" in config.PRESETS
    for preset in config.PRESETS:
        made = config.preset(preset)
        assert config(**json.loads(json.dumps(dataclasses.asdict(made)))) == made
    assert "untrained" in (ROOT / "zoo" / "featstore_zoo" / name / "CARD.md").read_text()


@pytest.mark.parametrize("frames", [1, 2, 13])
def test_any_number_of_frames_is_given(model, frames):
    batch = acoustics.batch_for(model.config, frames)
    with torch.no_grad():
        made, again = (model(batch, seeded()) for _ in range(2))
    assert made.shape == (2, frames, 20) and made.dtype == torch.float32
    assert made.isfinite().all()
    torch.testing.assert_close(made, again, rtol=0, atol=0)


def test_a_padded_batch_gives_what_each_item_gives_alone(model):
    batch = acoustics.batch_for(model.config, 17) | {"lengths": torch.tensor([17, 9])}
    with torch.no_grad():
        together = model(batch, seeded())
        for item, frames in enumerate((17, 9)):
            one = acoustics.cut(batch, item, frames, model.config.hop_length)
            del one["lengths"]
            torch.testing.assert_close(together[item, :frames], model(one, seeded())[0], **CLOSE)


def test_padding_does_not_count_in_the_losses(model):
    batch = acoustics.batch_for(model.config, 17) | {"lengths": torch.tensor([17, 9])}
    package = find(type(model).__module__.split(".")[1])
    harmed = {name: value.clone() for name, value in batch.items()}
    for name in ("whisper", "spin", "loudness", "log-mel", "f0"):
        harmed[name][1, 9:] += 3
    harmed["wave"][1, 9 * model.config.hop_length + 64:] += 1
    given, found = (package.losses(model, b, seeded()) for b in (batch, harmed))
    for name in given:
        torch.testing.assert_close(found[name], given[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_gradient_reaches_every_weight(model):
    package = find(type(model).__module__.split(".")[1])
    batch = acoustics.batch_for(model.config, 16, batch=8)
    model.train()
    terms = package.losses(model, batch, seeded())
    assert all(term.ndim == 0 and term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    dead = [name for name, weight in model.named_parameters()
            if weight.requires_grad and (weight.grad is None or not weight.grad.any())]
    assert not dead


def test_each_feature_is_heard(model):
    batch = acoustics.batch_for(model.config, 12)
    with torch.no_grad():
        before = model(batch, seeded())
        for name in model.config.reads:
            other = batch | {name: (batch[name] + 1) % 8 if name == "singer" else batch[name] * 1.5 + 1}
            assert not torch.allclose(model(other, seeded()), before, atol=1e-4), name


def test_wrong_input_is_refused_by_name(model):
    package = find(type(model).__module__.split(".")[1])
    batch = acoustics.batch_for(model.config, 8)
    with pytest.raises(MissingFeature, match="'f0'"):
        model({name: value for name, value in batch.items() if name != "f0"}, seeded())
    with pytest.raises(ValueError, match=r"spin has shape \(2, 8, 9\): this model was made for \(B, T, 10\)"):
        model(batch | {"spin": torch.zeros(2, 8, 9)}, seeded())
    with pytest.raises(LengthMismatch, match="7, 8 frames"):
        model(batch | {"loudness": torch.zeros(2, 7)}, seeded())
    with pytest.raises(ContractMismatch, match="n_mels=20"):
        package.losses(model, batch | {"log-mel": torch.zeros(2, 8, 80)}, seeded())
