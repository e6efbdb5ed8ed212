"""Acoustic models give Amphion's numbers on Amphion's weights (seeded random ones, fp32 on a CPU)."""

import pytest
import torch
import vocoders

from featstore_zoo.acoustic import AcousticConfig
from featstore_zoo.conditioner import Conditioner
from featstore_zoo.diffusion import Denoiser

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 sums in another order
COARSE = {"melody": "coarse", "loudness": "coarse", "width": 24, "singers": 8}


@pytest.fixture
def models(parity):
    return parity / "amphion" / "models"


def heard(given):
    """The batch of a parity file."""
    return {"f0": given["frame_pitch"].float(), "energy": given["frame_energy"], "singer": given["spk_id"],
            **{name: given[f"{name}_feat"] for name in ("whisper", "contentvec", "wenet") if f"{name}_feat" in given}}


def test_diffwavenet_equals_the_reference(models):
    weights, given, expected = vocoders.reference(models / "diffwavenet_wrapper.safetensors")
    model = Denoiser(20, 24, 32, 6, step_dim=16, step_hidden=48)
    model.load_state_dict(weights)
    with torch.no_grad():
        told = model.tell(given["c"])
        torch.testing.assert_close(model.diff_encoder(given["t"]), expected["step_embedding"], **TOLERANCE)
        torch.testing.assert_close(model(given["x"], given["t"], told), expected["y"], **TOLERANCE)
        torch.testing.assert_close(model(given["x"], given["t_frac"], told), expected["y_frac"], **TOLERANCE)


def test_condition_equals_the_reference(models):
    weights, given, expected = vocoders.reference(models / "condition_encoder_add.safetensors")
    model = Conditioner(AcousticConfig(content=(("whisper", 12), ("contentvec", 10), ("wenet", 8)), **COARSE))
    model.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(model(heard(given)), expected["y"], **TOLERANCE)
        assert torch.equal(model.melody_encoder.bins(given["frame_pitch"]), expected["f0_coarse"])
        edges = model.loudness_encoder.energy_bins
        assert torch.equal(torch.bucketize(given["frame_energy"], edges), expected["energy_bucket"])


def test_edges_of_coarse_loudness_are_the_reference_s(models):
    weights, _, _ = vocoders.reference(models / "condition_encoder_add.safetensors")
    ours = Conditioner(AcousticConfig(content=(("whisper", 12),), **COARSE)).loudness_encoder.energy_bins
    torch.testing.assert_close(ours.detach(), weights["loudness_encoder.energy_bins"], rtol=1e-5, atol=0)
