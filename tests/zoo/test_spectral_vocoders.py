"""Vocoders that end in an inverse STFT: Vocos and APNet; and MelGAN's ends."""

import importlib
import re

import pytest
import torch
import vocoders

from featstore_zoo import find

pytestmark = pytest.mark.usefixtures("one_thread")
apnet = importlib.import_module("featstore_zoo.apnet.losses")  # its package has a function of that name
WAVE = torch.randn(2, 1600, generator=torch.Generator().manual_seed(0)) / 5


def test_apnet_losses_of_a_spectrum_against_itself_are_zero():
    config = vocoders.small("apnet").config
    spectrum = apnet.analysed(WAVE, config)
    assert spectrum.real.shape == (2, 100, 33)
    for loss in (apnet.amplitude, apnet.phase, apnet.parts, apnet.consistency):
        assert loss(spectrum, spectrum) == 0


def test_apnet_spectrum_of_a_waveform_is_consistent_with_the_waveform_made_from_it():
    model = vocoders.small("apnet")
    spectrum = apnet.analysed(WAVE, model.config)
    again = model.waveform(spectrum)
    torch.testing.assert_close(again[:, 64:-64], WAVE[:, 64:-64], rtol=1e-4, atol=1e-5)
    assert apnet.consistency(spectrum, apnet.analysed(again, model.config)) < 1e-3 * spectrum.real.square().mean()


def test_apnet_phase_is_taken_around_the_circle():
    spectrum = apnet.analysed(WAVE, vocoders.small("apnet").config)
    around = spectrum._replace(phase=spectrum.phase + 2 * torch.pi)
    opposite = spectrum._replace(phase=spectrum.phase + torch.pi)
    assert apnet.phase(spectrum, around).item() == pytest.approx(0, abs=1e-5)
    assert apnet.phase(spectrum, opposite).item() == pytest.approx(2, abs=1e-5)  # its differences are right


def test_apnet_amplitude_of_e_times_the_waveform_is_one():
    config = vocoders.small("apnet").config
    spectrum = apnet.analysed(WAVE, config)
    louder = apnet.analysed(torch.e * WAVE, config)
    assert apnet.amplitude(spectrum, louder).item() == pytest.approx(1, rel=1e-2)


def test_apnet_has_finite_gradients_for_silence():
    model = vocoders.small("apnet")
    log_mel, _, generator = vocoders.inputs(model, 12)
    terms = find("apnet").losses(model, {"log-mel": log_mel, "wave": torch.zeros(2, 192)}, generator)
    assert set(terms) == {"amplitude", "phase", "consistency", "parts", "mel"}
    sum(terms.values()).backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())


def test_vocos_has_the_published_names_without_prefixes():
    names = {re.sub(r"\d+", "0", name) for name in vocoders.small("vocos").state_dict()}
    block = {f"convnext.0.{part}.{kind}" for part in ("dwconv", "norm", "pwconv0", "pwconv0")
             for kind in ("weight", "bias")} | {"convnext.0.gamma"}
    outside = {f"{part}.{kind}" for part in ("embed", "norm", "final_layer_norm", "out") for kind in ("weight", "bias")}
    assert names == block | outside


def test_vocos_centres_its_frames_where_the_contract_does():
    """A click in the middle of frame 24 comes in the middle of its hop, or on its hop's first sample."""
    click = torch.zeros(1, 50, 33)
    click[:, 24] = (-1.0) ** torch.arange(33)
    for padding, sample in (("frames", 24 * 16 + 8), ("centre", 24 * 16)):
        model = vocoders.small("vocos", padding=padding)
        model.spectrum = lambda log_mel: (click, torch.zeros(1, 50, 33))
        with torch.no_grad():
            wave = model.render(torch.zeros(1, 50, 20))[0]
        assert wave.shape == (800,)
        assert wave.abs().argmax() == sample


@pytest.mark.parametrize("name", ["vocos", "apnet"])
def test_frames_that_hardly_overlap_are_refused(name):
    with pytest.raises(ValueError, match="hop_length 256 must be at most half of win_length 400"):
        find(name).Config(win_length=400)


def test_melgan_of_an_odd_rate_keeps_every_sample():
    model = vocoders.small("melgan", hop_length=15, upsample_rates=(5, 3), n_fft=63, win_length=63)
    with torch.no_grad():
        assert model(torch.zeros(1, 7, 20)).shape == (1, 105)
        assert model(torch.zeros(1, 1, 20)).shape == (1, 15)


def test_melgan_as_published_needs_an_adversary():
    package = find("melgan")
    model = vocoders.small("melgan", lambda_mel=0.0)
    with pytest.raises(ValueError, match="no loss is left"):
        package.losses(model, {"log-mel": torch.zeros(1, 12, 20), "wave": torch.zeros(1, 192)}, torch.Generator())


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("melgan", {"upsample_rates": (8, 8)}, "make 64 samples of a frame"),
    ("melgan", {"residual_layers": 0}, "residual_layers 0 must be at least 1"),
    ("vocos", {"kernel": 4}, "kernel 4 odd"),
    ("apnet", {"kernel": 4}, "kernel 4 odd"),
    ("nsf_hifigan", {"harmonics": -1}, "harmonics -1"),
])
def test_impossible_configuration_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        find(name).Config(**changes)
