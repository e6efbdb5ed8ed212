"""Mel in torch, spectral and adversarial losses, discriminators: exact truths, and agreement with numpy."""

import dataclasses

import numpy as np
import pytest
import soundfile
import torch

from featstore_extractors.signal import LogMel, MelContract
from featstore_zoo import find, gan
from featstore_zoo.vocoder import fold, inverse_stft, window

pytestmark = pytest.mark.usefixtures("one_thread")
COUNTS = {"mpd": 41_105_770, "msd": 29_618_821, "mrd": 280_902, "ms_stft": 283_398, "ms_sb_cqt": 286_368}
CONTRACTS = {
    **{name: MelContract.preset(name) for name in MelContract.PRESETS},
    "centre": MelContract(padding="centre", mel_scale="htk", norm="none"),
    "power": MelContract(power=2, log_base="10", win_length=800, eps=0.0),
}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 5


def narrow(*names, **changes):
    return gan.Adversary(gan.GanConfig(discriminators=names, discriminator_width=1 / 16, mpd_periods=(2, 3), **changes))


@pytest.mark.parametrize("name", CONTRACTS)
def test_log_mel_equals_the_extractor_on_singing(shared, name):
    contract = CONTRACTS[name]
    wave, _ = soundfile.read(next((shared / "audio" / "berklee_female").glob("*.flac")), dtype="float32", frames=48000)
    [expected] = LogMel(**dataclasses.asdict(contract)).load("cpu")([wave])
    found = gan.log_mel(torch.from_numpy(wave)[None], contract)[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-4)


def test_log_mel_equals_the_extractor_beside_a_loud_tone():
    wave = np.sin(2 * np.pi * 440 / 24000 * np.arange(9000)).astype(np.float32)
    [expected] = LogMel().load("cpu")([wave])
    found = gan.log_mel(torch.from_numpy(wave)[None], MelContract())[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-4)


def test_log_mel_of_silence_is_the_floor_and_has_a_finite_gradient():
    for contract in CONTRACTS.values():
        wave = torch.zeros(1, 9000, requires_grad=True)
        mel = gan.log_mel(wave, contract)
        floor = np.log(1e-5) if contract.log_base == "e" else -5
        assert mel.min() >= floor - 1e-4
        mel.sum().backward()
        assert torch.isfinite(wave.grad).all()


def test_log_mel_is_the_derivative_of_nothing_but_the_waveform():
    wave = noise(1, 2000).double().requires_grad_()
    small = MelContract(n_fft=64, win_length=64, hop_length=16, n_mels=8)
    assert torch.autograd.gradcheck(lambda x: gan.log_mel(x, small)[:, 40:44], (wave[:, :1000],), fast_mode=True)


def test_log_mel_first_used_in_inference_mode_can_be_trained_on():
    contract = MelContract(n_mels=33)
    with torch.inference_mode():
        gan.log_mel(noise(1, 4000), contract)
    wave = noise(1, 4000).requires_grad_()
    gan.log_mel(wave, contract).sum().backward()
    assert wave.grad.any()


def test_too_short_a_waveform_says_how_long_it_must_be():
    with pytest.raises(ValueError, match="384 samples, the reflection at the ends needs 385"):
        gan.log_mel(torch.zeros(1, 384), MelContract())


SPECTRAL = {
    "mel": lambda real, fake: gan.mel_l1(real, fake, MelContract()),
    "multi-scale mel": lambda real, fake: gan.multi_scale_mel_l1(real, fake, 24000),
    "multi-resolution stft": gan.multi_resolution_stft,
}


@pytest.mark.parametrize("loss", SPECTRAL.values(), ids=SPECTRAL)
@pytest.mark.parametrize("wave", [noise(2, 8192), torch.zeros(2, 8192)], ids=["noise", "silence"])
def test_spectral_loss_of_equal_waveforms_is_zero_with_a_finite_gradient(loss, wave):
    fake = wave.clone().requires_grad_()
    value = loss(wave, fake)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-9)
    assert torch.isfinite(fake.grad).all()


@pytest.mark.parametrize("loss", SPECTRAL.values(), ids=SPECTRAL)
def test_spectral_loss_ranks_a_small_change_below_a_large_one(loss):
    wave = noise(2, 8192)
    values = [loss(wave, wave + share * noise(2, 8192, seed=1)).item() for share in (0.01, 0.1, 1)]
    assert 0 < values[0] < values[1] < values[2]


def test_mel_loss_of_a_tenth_of_the_amplitude_is_log_ten():
    wave = noise(2, 8192)
    contract = MelContract(eps=0.0)
    assert gan.mel_l1(wave, wave / 10, contract).item() == pytest.approx(np.log(10), rel=1e-4)


def test_stft_loss_of_half_the_amplitude_is_a_half_and_log_two():
    wave = noise(2, 8192)
    assert gan.multi_resolution_stft(wave, wave / 2).item() == pytest.approx(0.5 + np.log(2), rel=1e-4)


def test_least_squares_are_zero_for_perfect_scores_and_known_for_others():
    ones, zeros, halves = [torch.ones(2, 9)] * 2, [torch.zeros(2, 9)] * 2, [torch.full((2, 9), 0.5)] * 2
    assert gan.lsgan_discriminator(ones, zeros) == 0
    assert gan.lsgan_discriminator(zeros, ones) == 4  # two discriminators, two squares each
    assert gan.lsgan_discriminator(halves, halves) == 1
    assert gan.lsgan_generator(ones) == 0
    assert gan.lsgan_generator(zeros) == 2


def test_hinge_is_zero_beyond_the_margin_and_known_within():
    two, minus_two, zeros = [torch.full((2, 9), 2.0)], [torch.full((2, 9), -2.0)], [torch.zeros(2, 9)]
    assert gan.hinge_discriminator(two, minus_two) == 0
    assert gan.hinge_discriminator(zeros, zeros) == 2
    assert gan.hinge_generator(two) == -2


def test_feature_matching_sums_mean_differences_and_leaves_the_real_ones_alone():
    real = [[torch.zeros(3, requires_grad=True), torch.zeros(2, 2)], [torch.zeros(4)]]
    fake = [[torch.full((3,), 2.0, requires_grad=True), torch.ones(2, 2)], [torch.full((4,), -3.0)]]
    loss = gan.feature_matching(real, fake)
    assert loss == 2 + 1 + 3
    assert gan.feature_matching(real, real) == 0
    loss.backward()
    assert real[0][0].grad is None
    assert fake[0][0].grad.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("name", COUNTS)
def test_discriminator_has_as_many_parameters_as_the_reference(name):
    with torch.device("meta"):
        member = gan.DISCRIMINATORS[name](gan.GanConfig())
    assert sum(weight.numel() for weight in member.parameters()) == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_terms_reach_their_own_side_alone(name):
    adversary = narrow(name)
    real, fake = noise(1, 4096), noise(1, 4096, seed=1).requires_grad_()
    terms = adversary(real, fake)
    assert set(terms) == {"discriminator", "adversarial", "feature"}
    assert all(term.ndim == 0 for term in terms.values())
    (terms["adversarial"] + terms["feature"]).backward(retain_graph=True)
    assert fake.grad.any()
    assert all(weight.grad is None for weight in adversary.parameters())
    fake.grad = None
    terms["discriminator"].backward()
    assert fake.grad is None
    without = [name for name, weight in adversary.named_parameters()
               if weight.grad is None or not torch.isfinite(weight.grad).all() or not weight.grad.any()]
    assert without == []


@pytest.mark.parametrize("name", COUNTS)
def test_discriminator_has_finite_gradients_for_silence_and_an_odd_length(name):
    adversary = narrow(name)
    fake = torch.zeros(1, 4097, requires_grad=True)
    terms = adversary(torch.zeros(1, 4097), fake)
    sum(terms.values()).backward()
    assert torch.isfinite(fake.grad).all()


def test_discriminators_learn_to_tell_a_tone_from_noise():
    torch.manual_seed(0)
    adversary = narrow("mpd", "mrd")
    tone = torch.sin(torch.arange(2048) / 4).expand(2, -1)
    optimiser = torch.optim.AdamW(adversary.parameters(), 2e-3)
    course = []
    for step in range(8):
        loss = adversary(tone, noise(2, 2048, seed=step))["discriminator"]
        course.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert course[-1] < 0.8 * course[0]


def test_losses_of_a_vocoder_are_those_with_a_weight():
    package = find("hifigan")
    config = package.Config(channels=16, discriminators=("mpd",), discriminator_width=1 / 32, mpd_periods=(2,),
                            adversarial="hinge", lambda_stft=1.0)
    torch.manual_seed(0)
    model, adversary = package.Model(config), package.Adversary(config)
    batch = {"log-mel": noise(1, 12, 100), "wave": noise(1, 12 * 256)}
    terms = package.losses(model, batch, torch.Generator(), adversary)
    assert set(terms) == {"mel", "stft", "discriminator", "adversarial", "feature"}
    assert set(package.losses(model, batch, torch.Generator())) == {"mel", "stft"}
    sum(terms.values()).backward()
    assert all(weight.grad is not None for part in (model, adversary) for weight in part.parameters())


def test_folded_discriminators_judge_as_before():
    adversary = narrow("mpd", "msd").eval()
    wave = noise(1, 4096)
    before = adversary._judge(adversary.members, wave)[0]
    after = adversary._judge(fold(adversary).members, wave)[0]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bin_", "hop"), [(0, 512), (100, 512), (215, 512)])
def test_constant_q_gives_half_the_amplitude_of_a_sine_on_its_bin(bin_, hop):
    cqt = gan.ConstantQ(48000, hop, 9, 24)
    hz = gan.LOWEST * 2 ** (bin_ / 24)
    wave = 0.8 * torch.sin(2 * np.pi * hz / 48000 * torch.arange(120_000, dtype=torch.float64))
    magnitude = torch.linalg.vector_norm(cqt(wave[None].float())[0], dim=0)
    middle = magnitude[len(magnitude) // 2]
    assert magnitude.shape == ((120_000 - 1) // hop + 1, 216)
    assert middle.argmax() == bin_
    assert middle[bin_].item() == pytest.approx(0.4, rel=2e-3)


def test_constant_q_equals_its_definition_on_singing(shared):
    wave, _ = soundfile.read(next((shared / "audio" / "berklee_female").glob("*.flac")), dtype="float32", frames=96000)
    hop, bins, frame = 512, 24, 94
    found = gan.ConstantQ(44100, hop, 9, bins)(torch.from_numpy(wave)[None])[0, :, frame]
    scale = np.abs(wave).max()
    for k in range(40, 9 * bins, 7):
        hz = gan.LOWEST * 2 ** (k / bins)
        length = 44100 / hz / (2 ** (1 / bins) - 1)
        m = np.arange(-int(length // 2), int(length // 2) + 1)
        taper = 0.5 + 0.5 * np.cos(2 * np.pi * m / length)
        direct = np.sum(wave[frame * hop + m] * taper * np.exp(-2j * np.pi * hz * m / 44100)) / taper.sum()
        assert abs(complex(*found[:, k].tolist()) - direct) < 2e-3 * scale, f"bin {k}, {hz:.0f} Hz"


def test_autocast_leaves_the_transforms_alone():
    wave = noise(1, 8192)
    cqt, contract = gan.ConstantQ(48000, 256, 9, 24), MelContract()
    expected = cqt(wave), gan.log_mel(wave, contract), gan.multi_resolution_stft(wave, wave.flip(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = cqt(wave), gan.log_mel(wave, contract), gan.multi_resolution_stft(wave, wave.flip(1))
        terms = narrow(*COUNTS)(wave, wave.flip(1))
    assert all(map(torch.equal, expected, found))
    assert all(torch.isfinite(term) for term in terms.values())


def test_resampling_to_twice_the_rate_keeps_a_sine():
    discriminator = gan.CqtDiscriminator(512, 24, gan.GanConfig(discriminator_width=1 / 32))
    tone = torch.sin(2 * np.pi * 5000 / 24000 * torch.arange(4000, dtype=torch.float64)).float()
    doubled = torch.nn.functional.conv_transpose1d(tone[None, None], discriminator.doubling, stride=2, padding=63,
                                                   output_padding=1)[0, 0]
    expected = torch.sin(2 * np.pi * 5000 / 48000 * torch.arange(8000, dtype=torch.float64)).float()
    assert len(doubled) == 8000
    torch.testing.assert_close(doubled[200:-200], expected[200:-200], rtol=0, atol=1e-3)


def test_inverse_stft_undoes_the_frames_of_the_contract():
    for contract in (MelContract(), MelContract(win_length=800), MelContract(padding="centre")):
        wave = noise(2, 30 * 256)
        pad = 384 if contract.padding == "frames" else 512
        frames = torch.nn.functional.pad(wave, (pad, pad)).unfold(-1, 1024, 256)
        spectrum = torch.fft.rfft(frames * window(contract, wave.device, torch.float32))
        found = inverse_stft(spectrum.real, spectrum.imag, contract)[:, : wave.shape[1]]
        assert found.shape == wave.shape
        torch.testing.assert_close(found, wave, rtol=1e-4, atol=1e-5)
