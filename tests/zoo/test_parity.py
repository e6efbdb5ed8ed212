"""The zoo's networks give Amphion's numbers on Amphion's weights (seeded random ones, fp32 on a CPU)."""

import re

import pytest
import torch
import vocoders

from featstore_zoo import find, gan

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 sums in another order


@pytest.fixture
def models(parity):
    return parity / "amphion" / "models"


def loaded(name, weights, **changes):
    package = find(name)
    model = package.Model(package.Config(**(vocoders.SMALL[name] | changes)))
    model.load_state_dict(weights)
    return model.eval()


def test_hifigan_equals_the_reference(models):
    weights, given, expected = vocoders.reference(models / "hifigan_resblock1.safetensors")
    model = loaded("hifigan", weights)
    with torch.no_grad():
        wave = model(given["mel"].transpose(1, 2))
        folded = model.fold()(given["mel"].transpose(1, 2))
    torch.testing.assert_close(wave, expected["y"][:, 0], **TOLERANCE)
    torch.testing.assert_close(folded, expected["y"][:, 0], **TOLERANCE)


def test_bigvgan_equals_the_reference(models):
    def rename(name):
        return None if name.endswith("filter") else re.sub(r"^(ups\.\d+)\.0\.", r"\1.", name).replace(".act.", ".")

    weights, given, expected = vocoders.reference(models / "bigvgan_snakebeta.safetensors", rename)
    model = loaded("bigvgan", weights)
    with torch.no_grad():
        wave = model(given["mel"].transpose(1, 2))
    torch.testing.assert_close(wave, expected["y"][:, 0], **TOLERANCE)


def test_diffwave_equals_the_reference(models):
    weights, given, expected = vocoders.reference(models / "diffwave.safetensors")
    model = loaded("diffwave", weights)
    with torch.no_grad():
        condition = model.condition(given["mel"].transpose(1, 2))
        noise = model.noise(given["audio"], given["t_int"].float(), condition)
        between = model.noise(given["audio"], given["t_frac"].expand(2), condition)
    torch.testing.assert_close(condition, expected["upsampled_mel"], **TOLERANCE)
    torch.testing.assert_close(model.diffusion_embedding.table, expected["step_emb_table"], **TOLERANCE)
    torch.testing.assert_close(noise, expected["y"][:, 0], **TOLERANCE)
    torch.testing.assert_close(between, expected["y_frac"][:, 0], **TOLERANCE)


def check_discriminator(member, weights, given, expected):
    """That scores, feature matching and both LSGAN losses are the reference's."""
    member.load_state_dict(weights)
    real_scores, real_maps = member(given["real"][:, 0])
    fake_scores, fake_maps = member(given["fake"][:, 0])
    for kind, scores in (("real", real_scores), ("fake", fake_scores)):
        for i, score in enumerate(scores):
            torch.testing.assert_close(score, expected[f"score_{kind}_{i}"], **TOLERANCE)
    assert [len(maps) for maps in real_maps] == expected["n_fmaps"].tolist()
    torch.testing.assert_close(2 * gan.feature_matching(real_maps, fake_maps), expected["feature_loss"], **TOLERANCE)
    torch.testing.assert_close(gan.lsgan_generator(fake_scores), expected["gen_loss_ls"], **TOLERANCE)
    torch.testing.assert_close(gan.lsgan_discriminator(real_scores, fake_scores), expected["disc_loss_ls"], **TOLERANCE)


def test_period_discriminator_equals_the_reference(models):
    weights, given, expected = vocoders.reference(models / "disc_mpd.safetensors")
    config = gan.GanConfig(mpd_periods=(2, 3, 5), mpd_last_stride=3, discriminator_width=1 / 32)
    check_discriminator(gan.MultiPeriod(config), weights, given, expected)


def test_stft_discriminator_equals_the_reference(models):
    def rename(name):
        return None if "spec_transform" in name else name.replace(".conv.", ".")

    weights, given, expected = vocoders.reference(models / "disc_msstftd.safetensors", rename)
    check_discriminator(gan.MultiScaleStft(gan.GanConfig(discriminator_width=1 / 8)), weights, given, expected)
