"""What every acoustic model of the zoo keeps: shapes, lengths, padding, batches, gradients, wrong input."""

import dataclasses
import json
from pathlib import Path

import acoustics
import pytest
import torch
import vocoders

import featstore_zoo
from featstore.errors import BadRequest, ContractMismatch, LengthMismatch, MissingFeature
from featstore_zoo import find
from featstore_zoo.acoustic import ssim_distance
from featstore_zoo.transformer import RelativeAttention
from featstore_zoo.vits_svc.model import divergence

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
NAMES = list(acoustics.SMALL)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 sums in another order

# Amphion's table: whisper of 1024, contentvec of 256, 100 mels.
CONDITION = 886_527
COUNTS = {
    ("diffwavenet_svc", "amphion"): 31_174_627,
    ("diffwavenet_svc", "amphion-large"): 100_694_628 + CONDITION,
    ("transformer_svc", "amphion"): 10_699_876 + CONDITION,
    ("transformer_svc", "amphion-plain"): 13_934_179,  # 13.05 M and the condition in the table
    ("como_svc", "amphion"): 37_512_263,
    ("como_svc", "amphion-student"): 89_363_983,
    # 104.73 and 86.96 million in the table, with a table of f0 that nothing reads.
    ("vits_svc", "amphion"): 104_726_411 - 256 * 384,
    ("vits_svc", "amphion-hifigan"): 86_964_225 - 256 * 384,
}


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
    assert made.shape == ((2, frames * 16) if model.gives == "wave" else (2, frames, 20))
    assert made.dtype == torch.float32
    assert made.isfinite().all()
    torch.testing.assert_close(made, again, rtol=0, atol=0)


def test_a_padded_batch_gives_what_each_item_gives_alone(model):
    batch = acoustics.batch_for(model.config, 17) | {"lengths": torch.tensor([17, 9])}
    with torch.no_grad():
        together = model(batch, seeded())
        for item, frames in enumerate((17, 9)):
            one = acoustics.cut(batch, item, frames, model.config.hop_length)
            del one["lengths"]
            heard = frames * (16 if model.gives == "wave" else 1)
            torch.testing.assert_close(together[item, :heard], model(one, seeded())[0], **CLOSE)


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


@pytest.mark.parametrize("speaker", ["embedding", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_a_voice_may_be_an_embedding_or_nobody_s(name, speaker):
    model = acoustics.small(name, speaker=speaker, merge="concat")
    batch = acoustics.batch_for(model.config, 9)
    batch = {key: batch[key] for key in (*model.config.reads, "log-mel", "wave")}
    assert "singer" not in batch and ("speaker" in batch) == (speaker == "embedding")
    with torch.no_grad():
        before = model(batch, seeded())
        assert before.isfinite().all()
        if speaker == "embedding":
            assert not torch.allclose(model(batch | {"speaker": -batch["speaker"]}, seeded()), before, atol=1e-4)
    assert sum(find(name).losses(model, batch, seeded()).values()).isfinite()


def test_losses_under_autocast_are_those_without(model):
    package = find(type(model).__module__.split(".")[1])
    batch = acoustics.batch_for(model.config, 12)
    plain = package.losses(model, batch, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        rough = package.losses(model, batch, seeded())
        sum(rough.values()).backward()
    for name, loss in plain.items():
        torch.testing.assert_close(rough[name].float(), loss, rtol=0.1, atol=0.05, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_on_what_is_shown_again_and_again(name):
    wide = {"channels": 64} if name == "diffwavenet_svc" else {}  # than the bands, whose noise has to pass
    package, model = find(name), acoustics.small(name, content_dropout=0.2, **wide)
    batch = acoustics.batch_for(model.config, 16)

    def told():
        with torch.no_grad():
            return sum(float(sum(package.losses(model.eval(), batch, seeded(i)).values())) for i in range(4))

    before, optimiser = told(), torch.optim.Adam(model.parameters(), 1e-3 if wide else 3e-3)
    for i in range(150):
        optimiser.zero_grad()
        sum(package.losses(model.train(), batch, seeded(100 + i)).values()).backward()
        optimiser.step()
    assert told() < 0.7 * before


@pytest.mark.parametrize("name", ["diffwavenet_svc", "como_svc"])
def test_what_the_blocks_make_of_the_condition_is_made_once(name):
    model, calls = acoustics.small(name), []
    for path, part in model.named_modules():
        if path.endswith("context_proj"):
            part.register_forward_hook(lambda *_, path=path: calls.append(path))
    with torch.no_grad():
        model(acoustics.batch_for(model.config, 6), seeded())
    assert model.config.sampling_steps == 3 and len(calls) == len(set(calls)) == model.config.layers


@pytest.mark.parametrize(("name", "changes"), [
    ("diffwavenet_svc", {"sampler": "ddim", "sampling_steps": 7}), ("diffwavenet_svc", {"clamp": False}),
    ("como_svc", {"sampling_steps": 5}), ("como_svc", {"heun": True}), ("vits_svc", {"noise_scale": 0.0})])
def test_how_a_model_samples_can_be_changed_and_is_as_if_made_so(name, changes):
    model, made_so = acoustics.small(name), acoustics.small(name, **changes)
    batch = acoustics.batch_for(model.config, 8)
    with torch.no_grad():
        before = model(batch, seeded())
        model.set_sampling(**changes)
        after = model(batch, seeded())
        assert torch.equal(after, made_so(batch, seeded())) and not torch.equal(after, before)
    with pytest.raises(BadRequest, match="width cannot be changed after training"):
        model.set_sampling(width=12)


def test_a_model_that_does_not_sample_says_so():
    with pytest.raises(BadRequest, match="this model does not sample"):
        acoustics.small("transformer_svc").set_sampling(sampling_steps=3)


def test_wrong_input_is_refused_by_name(model):
    package = find(type(model).__module__.split(".")[1])
    batch = acoustics.batch_for(model.config, 8)
    with pytest.raises(MissingFeature, match="'f0'"):
        model({name: value for name, value in batch.items() if name != "f0"}, seeded())
    with pytest.raises(ValueError, match=r"spin has shape \(2, 8, 9\): this model was made for \(B, T, 10\)"):
        model(batch | {"spin": torch.zeros(2, 8, 9)}, seeded())
    with pytest.raises(LengthMismatch, match="7, 8 frames"):
        model(batch | {"loudness": torch.zeros(2, 7)}, seeded())
    if model.gives == "wave":
        with pytest.raises(LengthMismatch, match="wave has 100 samples, the features have 8 frames of 16"):
            package.losses(model, batch | {"wave": torch.zeros(2, 100)}, seeded())
        return
    with pytest.raises(ContractMismatch, match="n_mels=20"):
        package.losses(model, batch | {"log-mel": torch.zeros(2, 8, 80)}, seeded())


# --- what single families keep


def test_a_student_begins_as_its_teacher_and_its_target_follows():
    package = find("como_svc")
    teacher, student = acoustics.small("como_svc"), acoustics.small("como_svc", stage="student", sampling_steps=1)
    student.learn_from(teacher)
    decoder, batch = student.acoustic_mapper.decoder, acoustics.batch_for(student.config, 12)
    for other in (decoder.denoise_fn, decoder.denoise_fn_ema, decoder.denoise_fn_pretrained):
        for name, weight in teacher.acoustic_mapper.decoder.denoise_fn.state_dict().items():
            assert torch.equal(other.state_dict()[name], weight)
    student.train()
    optimiser = torch.optim.SGD([w for w in student.parameters() if w.requires_grad], 0.1)
    package.losses(student, batch, seeded())["consistency"].backward()
    still = [name for name, w in student.named_parameters() if w.requires_grad and not w.grad.any()]
    optimiser.step()
    package.losses(student, batch, seeded())
    nets = [n.state_dict()["neural_network.input.0.weight"]
            for n in (decoder.denoise_fn_pretrained, decoder.denoise_fn_ema, decoder.denoise_fn)]
    assert not still
    torch.testing.assert_close(nets[1], 0.95 * nets[0] + 0.05 * nets[2])
    assert not torch.equal(nets[0], nets[2])
    with pytest.raises(ValueError, match="a teacher cannot learn from a teacher"):
        teacher.learn_from(teacher)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_student_takes_any_number_of_steps(steps):
    student = acoustics.small("como_svc", stage="student", sampling_steps=steps)
    with torch.no_grad():
        made = student(acoustics.batch_for(student.config, 9), seeded())
    assert made.shape == (2, 9, 20) and made.isfinite().all()


def test_plain_transformers_differ_in_padding_alone():
    right = acoustics.small("transformer_svc", variant="plain")
    wrong = acoustics.small("transformer_svc", variant="plain-unmasked")
    batch = acoustics.batch_for(right.config, 14) | {"lengths": torch.tensor([14, 6])}
    alone = acoustics.cut(batch, 1, 6, 16)
    del alone["lengths"]
    with torch.no_grad():
        torch.testing.assert_close(right(batch)[0], wrong(batch)[0])
        torch.testing.assert_close(right(batch)[1, :6], right(alone)[0], **CLOSE)
        assert not torch.allclose(wrong(batch)[1, :6], wrong(alone)[0], atol=1e-3)


def test_relative_attention_knows_distance_and_not_place():
    torch.manual_seed(0)
    attention = RelativeAttention(8, 2, 4, 0.0)
    x = torch.zeros(1, 8, 40)
    x[..., 20] = 1
    moved = torch.roll(x, 5, 2)
    a, b = (attention(y, None).detach() for y in (x, moved))
    torch.testing.assert_close(a[..., 10:30], b[..., 15:35])
    assert not torch.allclose(a[..., 21], a[..., 19])  # before and behind are not the same


def test_ssim_is_nothing_for_equal_mels_and_does_not_see_padding():
    mel = torch.rand(2, 20, 20, generator=seeded()) * 2 - 1
    mask = torch.arange(20) < torch.tensor([[20], [12]])
    assert ssim_distance(mel, mel, mask).abs() < 1e-5
    other = mel.flip(1)
    harmed = other.clone()
    harmed[1, 12:] = 9
    torch.testing.assert_close(ssim_distance(harmed, mel, mask), ssim_distance(other, mel, mask))
    assert ssim_distance(other, mel, mask) > 0.1


def test_the_range_of_log_mels_becomes_one():
    model = acoustics.small("transformer_svc")
    low, high = torch.full((20,), -9.0), torch.arange(20.0)
    model.set_range(low, high)
    mel = torch.stack([low, high])[None]
    torch.testing.assert_close(model.scaled(mel)[0], torch.tensor([[-1.0] * 20, [1.0] * 20]))
    torch.testing.assert_close(model.unscaled(model.scaled(mel)), mel)
    with pytest.raises(ValueError, match="are the recordings silent"):
        model.set_range(high, high)


@pytest.mark.parametrize("generator", ["hifigan", "bigvgan", "melgan", "apnet", "vocos"])
def test_vits_takes_any_generator(generator):
    fields = {name: value for name, value in vocoders.SMALL[generator].items() if name not in vocoders.CONTRACT}
    preset = next(iter(find(generator).Config.PRESETS))
    model = acoustics.small("vits_svc", generator=generator, generator_preset=preset,
                            generator_fields=tuple(fields.items()))
    batch = acoustics.batch_for(model.config, 7)
    with torch.no_grad():
        assert model(batch, seeded()).shape == (2, 112)
    terms = find("vits_svc").losses(model, batch, seeded(), find("vits_svc").Adversary(model.config))
    assert terms.keys() == {"kl", "mel", "discriminator", "adversarial", "feature"}
    assert all(term.isfinite() for term in terms.values())


def test_a_flow_goes_back_where_it_came_from():
    model = acoustics.small("vits_svc")
    voice = model.voice(acoustics.batch_for(model.config, 3))
    x = torch.randn(2, 24, 10, generator=seeded())
    with torch.no_grad():
        there = model.flow(x, 1.0, voice)
        torch.testing.assert_close(model.flow(there, 1.0, voice, back=True), x, **CLOSE)
        assert not torch.allclose(there, model.flow(x, 1.0, voice.flip(0)), atol=1e-3)  # by the voice


def test_divergence_is_that_of_two_gaussians():
    torch.manual_seed(0)
    mean_q, spread_q, mean_p, spread_p = (torch.randn(1, 3, 1, dtype=torch.float64) * 0.5 for _ in range(4))
    q, p = (torch.distributions.Normal(m, s.exp()) for m, s in ((mean_q, spread_q), (mean_p, spread_p)))
    z = q.sample((20_000,))[:, 0, :, 0].T[None]  # (1, 3, 20000), frames that are drawn alike
    found = divergence(z, spread_q, mean_p, spread_p, None)
    torch.testing.assert_close(found, torch.distributions.kl_divergence(q, p).sum(), rtol=0.05, atol=0)


@pytest.mark.parametrize(("changes", "message"), [
    ({"generator": "diffwave"}, "no vocoder that is trained against discriminators"),
    ({"generator": "transformer_svc"}, "no vocoder that is trained against discriminators"),
    ({"generator_preset": "v9"}, "no preset 'v9' of nsf_hifigan"),
    ({"latent": 23}, "latent 23 must be even"),
])
def test_impossible_vits_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        find("vits_svc").Config(**(acoustics.SMALL["vits_svc"] | changes))
