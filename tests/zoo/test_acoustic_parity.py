"""Acoustic models give Amphion's numbers on Amphion's weights (seeded random ones, fp32 on a CPU)."""

import acoustics
import numpy as np
import pytest
import torch
import vocoders

from featstore_extractors.signal import MelContract
from featstore_zoo import como_svc, diffusion, gan, transformer_svc, vits_svc
from featstore_zoo.acoustic import AcousticConfig, gaussian_nll, masked_mean
from featstore_zoo.conditioner import Conditioner
from featstore_zoo.diffusion import Denoiser
from featstore_zoo.vits_svc.model import divergence, kept

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


def test_transformer_equals_the_reference_with_and_without_its_defect(models):
    weights, given, expected = vocoders.reference(models / "transformersvc_transformer.safetensors",
                                                  lambda name: None if name == "pos_encoder.pe" else name)
    config = {"width": 24, "hidden": 2048, "layers": 3, "n_mels": 20}
    for variant in ("plain-unmasked", "plain"):
        mapper = transformer_svc.Model(transformer_svc.Config(**config, variant=variant)).acoustic_mapper.eval()
        mapper.load_state_dict(weights)
        with torch.no_grad():
            made = mapper(given["x"], given["mask"][..., 0] > 0)
        whole = given["mask"].all(1).flatten()  # items without padding, for which both are right
        rows = slice(None) if variant == "plain-unmasked" else whole
        assert whole.any() and not whole.all()
        torch.testing.assert_close(made[rows], expected["y"][rows], **TOLERANCE)


def test_como_equals_the_reference(models):
    weights, given, expected = vocoders.reference(models / "comosvc.safetensors")
    mask, noise, mel = given["mask"][..., 0] > 0, given["latents"].transpose(1, 2), given["mel"]
    sizes = acoustics.CONTRACT | {"width": 24, "hidden": 32, "encoder_layers": 2, "channels": 32, "layers": 4,
                                  "step_dim": 16, "step_hidden": 48}
    student = como_svc.Model(como_svc.Config(**sizes, stage="student", sampling_steps=1)).acoustic_mapper.eval()
    student.load_state_dict(weights)
    found = {}
    with torch.no_grad():
        mean = student.encoder(given["cond"], mask)
        found["mu_x"] = mean
        hears = student.decoder.denoise_fn.hearing(mean)
        found["D_x"] = student.decoder.denoise(hears, noise, given["sigma"].flatten())
        found["ct_sample_1"] = student.decoder.solve(mean, student.decoder.used.hearing(mean), noise)
        for steps in (5, 40):  # which the reference counts from 0
            config = como_svc.Config(**sizes, sampling_steps=steps + 1)
            teacher = como_svc.Model(config).acoustic_mapper.eval()
            teacher.load_state_dict({k: v for k, v in weights.items() if "_ema" not in k and "_pretrained" not in k})
            found[f"edm_sample_{steps}"] = teacher.decoder.solve(mean, teacher.decoder.used.hearing(mean), noise)
        # The reference hides padding from the losses, not from the network, and divides the prior by the bands twice.
        error = teacher.decoder.teacher_error(mel, mean, None, given["rnd_normal"].flatten(), noise)
        losses = {"edm_loss": masked_mean(error, mask), "prior_loss": gaussian_nll(mel, mean, mask) / 20}
    for name, value in (found | losses).items():
        ours = value.transpose(1, 2) if value.ndim else value
        torch.testing.assert_close(ours, expected[name], **TOLERANCE, msg=lambda told, name=name: f"{name}: {told}")


def test_vits_equals_the_reference(models):
    def rename(name):
        return None if name == "enc_p.f0_emb.weight" else name.replace("emb_g.weight", "emb_g.nn.weight")

    weights, given, expected = vocoders.reference(models / "vitssvc_hifigan.safetensors", rename)
    steps_up = acoustics.STEPS_UP | {"channels": 32, "block_kernels": (3, 5), "block_dilations": ((1, 3, 5),) * 2}
    model = vits_svc.Model(vits_svc.Config(
        **acoustics.CONTRACT, **COARSE, content=(("whisper", 12), ("contentvec", 10)), latent=24, hidden=32,
        prior_layers=2, flow_layers=2, speaker_width=16, noise_scale=0.0, generator="hifigan", generator_preset="v1",
        generator_fields=tuple(steps_up.items()))).eval()
    ranges = {name: value for name, value in model.state_dict().items() if name.startswith("mel_")}
    model.load_state_dict(weights | ranges)
    batch, mask = heard(given), given["mask"][..., 0] > 0
    found = {}
    with torch.no_grad():
        found["g"] = voice = model.voice(batch)
        found["cond"] = condition = model.condition_encoder(batch).transpose(1, 2)
        keep = kept(mask, condition)
        found["m_q"], found["logs_q"] = model.enc_q(given["linear"].transpose(1, 2), keep, voice)
        found["flow_fwd"] = model.flow(found["m_q"], keep, voice)
        found["flow_rev_of_fwd"] = model.flow(found["flow_fwd"], keep, voice, back=True)
        found["m_p"], found["logs_p"] = model.enc_p(condition, mask, keep)
        found["kl_loss"] = divergence(found["flow_fwd"], found["logs_q"], found["m_p"], found["logs_p"], mask)
        found["infer_noise0"] = model(batch, torch.Generator().manual_seed(0))[:, None]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **TOLERANCE, msg=lambda told, name=name: f"{name}: {told}")


def test_linear_spectrum_equals_the_reference(parity):
    features = np.load(parity / "amphion" / "features.npz")
    wave = torch.from_numpy(features["wav_a"])[None].float()
    ours = gan.magnitudes(wave, MelContract())[0].T.numpy()
    np.testing.assert_allclose(ours, features["linear_a"], rtol=0, atol=1e-4)


def test_levels_of_noise_are_the_reference_s(models):
    _, _, expected = vocoders.reference(models / "comosvc.safetensors")
    rising = [0.0, *diffusion.karras_sigmas(40, 0.002, 80.0, 7.0)[::-1]]
    torch.testing.assert_close(torch.tensor(rising), expected["t_steps"], **TOLERANCE)
    falling = diffusion.karras_sigmas(5, 0.002, 80.0, 7.0)
    torch.testing.assert_close(torch.tensor(falling), expected["ct_t_steps_4"], **TOLERANCE)


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
