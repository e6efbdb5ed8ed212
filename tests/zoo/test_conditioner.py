"""What a model is told: resolution of melody and loudness, mixes of content, dropout, voices."""

import dataclasses

import acoustics
import pytest
import torch

from featstore.errors import MissingFeature
from featstore_zoo.acoustic import AcousticConfig
from featstore_zoo.conditioner import Conditioner

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = AcousticConfig(**acoustics.CONTRACT | acoustics.HEARD)


def conditioner(**changes):
    torch.manual_seed(0)
    return Conditioner(dataclasses.replace(CONFIG, **changes)).eval()


def test_five_cents_are_heard_at_any_pitch():
    melody = conditioner().melody_encoder
    f0 = 55 * 2 ** (torch.arange(0, 4800, 5) / 1200)  # four octaves
    known = melody(f0[None])[0].detach()
    steps = (known[1:] - known[:-1]).norm(dim=1)
    apart = torch.cdist(known, known)
    apart.fill_diagonal_(torch.inf)
    assert apart.min() > 0.05 * known.norm(dim=1).mean()  # no two pitches 5 cents or more apart sound alike
    assert steps.max() < 2.5 * steps.min()  # and a step is the same everywhere


def test_unvoiced_frames_are_heard_as_such_and_without_a_pitch():
    melody = conditioner().melody_encoder
    out = melody(torch.tensor([[0.0, 220.0, 220.0]]))[0]
    assert torch.equal(out[0], melody.nn.bias)
    assert not torch.allclose(out[0], out[1])


def test_loudness_uses_its_range():
    made = conditioner().loudness_encoder(torch.arange(-90.0, 0, 1)[None])[0].detach()
    apart = torch.cdist(made, made)
    apart.fill_diagonal_(torch.inf)
    assert apart.min() > 0.05 * made.norm(dim=1).mean()  # every decibel from -90 to 0; Amphion's bins tell 2.4 apart


@pytest.mark.parametrize("merge", ["sum", "concat"])
def test_the_condition_is_the_sum_or_the_row_of_its_terms(merge):
    model = conditioner(merge=merge)
    batch = acoustics.batch_for(CONFIG, 6)
    terms = [model.melody_encoder(batch["f0"]), model.loudness_encoder(batch["loudness"]),
             model.whisper_encoder.nn(batch["whisper"]), model.spin_encoder.nn(batch["spin"]),
             model.singer_encoder.nn(batch["singer"])[:, None].expand(-1, 6, -1)]
    expected = torch.cat(terms, 2) if merge == "concat" else torch.stack(terms).sum(0)
    torch.testing.assert_close(model(batch), expected)
    assert expected.shape[2] == model.config.condition_dim


def test_an_embedding_is_heard_as_a_vector_or_as_a_view_repeats_it():
    model, batch = conditioner(speaker="embedding"), acoustics.batch_for(CONFIG, 6)
    repeated = batch | {"speaker": batch["speaker"][:, None].expand(-1, 6, -1)}
    torch.testing.assert_close(model(repeated), model(batch))
    assert "singer_encoder" not in dict(conditioner(speaker="none").named_children())


def test_dropout_leaves_out_whole_features_of_an_item_and_never_all():
    model = conditioner(content_dropout=0.3, melody="none", loudness="none", speaker="none", merge="concat").train()
    batch = acoustics.batch_for(CONFIG, 6, batch=64)
    made = model(batch, torch.Generator().manual_seed(0)).unflatten(2, (2, -1))
    heard = made.abs().amax(3) > 0  # (B, T, features)
    assert torch.equal(heard.all(1), heard.any(1))
    assert heard.any(2).all() and 0.3 < heard.all(2).float().mean() < 0.7
    with pytest.raises(ValueError, match="give a generator"):
        model(batch)
    torch.testing.assert_close(model.eval()(batch)[..., :24], model.whisper_encoder.nn(batch["whisper"]))


def test_a_model_trained_with_dropout_takes_any_mix():
    model, batch = conditioner(content_dropout=0.3), acoustics.batch_for(CONFIG, 6)
    without = {name: value for name, value in batch.items() if name != "spin"}
    assert model(without).shape == (2, 6, 24)
    with pytest.raises(MissingFeature, match="'spin'"):
        conditioner()(without)
    with pytest.raises(MissingFeature, match="none of whisper, spin"):
        model({name: value for name, value in without.items() if name != "whisper"})


def test_a_conformer_over_content_hears_no_padding():
    model, batch = conditioner(conformer=2), acoustics.batch_for(CONFIG, 9)
    padded = model(batch | {"lengths": torch.tensor([9, 5])})
    alone = model(acoustics.cut(batch, 1, 5, 16))
    torch.testing.assert_close(padded[1, :5], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"content": (("melody", 3),)}, "none that another role has"),
    ({"content": (("w", 3), ("w", 4))}, "each name once"),
    ({"content": (("w", 0),)}, r"expected \(name, dimensions\)"),
    ({"content": (), "melody": "none", "loudness": "none"}, "how long the output is"),
    ({"melody": "fine"}, "melody must be one of continuous, coarse, none"),
    ({"f0_min": 0}, "0 < f0_min"),
])
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
