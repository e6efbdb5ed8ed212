"""NSF-HiFiGAN hears f0: its source has the period asked for, and so has what is made of it."""

import numpy as np
import pytest
import torch
import vocoders

from featstore_zoo import find

pytestmark = pytest.mark.usefixtures("one_thread")
RATE = 24000


def tone(hz, frames=60, **changes):
    model = vocoders.small("nsf_hifigan", **changes)
    generator = torch.Generator().manual_seed(0)
    return model, torch.zeros(1, frames, 20) - 4, torch.full((1, frames), float(hz)), generator


def strength(wave, hz):
    """Share of the waveform's power within 3 bins of the multiples of `hz`."""
    wave = np.asarray(wave, float) - np.mean(wave)
    power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
    bins = np.fft.rfftfreq(len(wave), 1 / RATE)
    near = np.abs(bins / hz - np.round(bins / hz)) * hz < 3 * RATE / len(wave)
    return power[near & (bins > hz / 2)].sum() / power.sum()


def test_source_of_a_constant_f0_is_a_sine_of_it_whose_phase_runs_on():
    model, log_mel, f0, generator = tone(220, harmonics=0, noise_std=0.0)
    with torch.no_grad():
        model.m_source.l_linear.weight.fill_(0.5)
        model.m_source.l_linear.bias.zero_()
        source = model.source(log_mel, f0, generator)[0, 0].double()
    expected = torch.tanh(0.05 * torch.sin(2 * torch.pi * 220 / RATE * torch.arange(1, 961, dtype=torch.float64)))
    torch.testing.assert_close(source, expected, rtol=1e-4, atol=1e-6)


def test_phase_has_no_jump_where_f0_changes_or_after_minutes():
    frames = 20000
    model, log_mel, _, generator = tone(0, frames, harmonics=0, noise_std=0.0, hop_length=256, n_fft=1024,
                                        win_length=1024, upsample_rates=(16, 16), upsample_kernels=(32, 32))
    f0 = 300 + 100 * torch.sin(torch.arange(frames) / 7)[None]
    with torch.no_grad():
        source = model.source(log_mel, f0, generator)[0, 0]
        scale = 0.1 * model.m_source.l_linear.weight.abs().item()
    assert source.diff().abs().max() < 1.05 * scale * 2 * np.pi * 400 / RATE
    cycles = (source[:-1] < source.mean()) & (source[1:] >= source.mean())
    turns = (f0.double().sum() * 256 / RATE).item()
    assert abs(cycles.sum().item() - turns) <= 1


def test_unvoiced_frames_are_noise_of_a_third_of_the_sine():
    model, log_mel, f0, generator = tone(0, frames=2000, harmonics=0)
    with torch.no_grad():
        model.m_source.l_linear.weight.fill_(1)
        model.m_source.l_linear.bias.zero_()
        source = model.source(log_mel, f0, generator)
    assert source.std().item() == pytest.approx(0.1 / 3, rel=0.02)


def test_octave_in_f0_is_an_octave_in_the_waveform():
    """The log-mel is the same; with seeded weights, nobody has taught it anything."""
    waves = {}
    for hz in (200, 400):
        model, log_mel, f0, generator = tone(hz, frames=300)
        with torch.no_grad():
            for conv in model.noise_convs:
                conv.weight.mul_(30)  # over the network's own hum
            waves[hz] = model(log_mel, f0, generator)[0].numpy()[480:-480]
    assert strength(waves[200], 200) > 0.9
    assert strength(waves[400], 400) > 0.9
    assert strength(waves[200], 400) < 0.8 * strength(waves[400], 400)
    assert not np.allclose(waves[200], waves[400], atol=1e-3)


def test_f0_moves_every_stage():
    model, log_mel, f0, _ = tone(220)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    with torch.no_grad():
        for stage in range(len(model.noise_convs)):
            for i, conv in enumerate(model.noise_convs):
                conv.weight.requires_grad_(False).mul_(float(i == stage))
            first, second = (model(log_mel, hz, g) for hz, g in zip((f0, 2 * f0), generators, strict=True))
            assert (first - second).abs().max() > 1e-5, f"stage {stage}"
            model = tone(220)[0]


def test_the_defect_of_old_weights_is_there_only_if_asked_for():
    model, log_mel, f0, generator = tone(220, amphion_defect=True)
    with torch.no_grad():
        deaf = [model(log_mel, hz, generator) for hz in (f0, 2 * f0, 0 * f0)]
    assert torch.equal(deaf[0], deaf[1])
    assert torch.equal(deaf[0], deaf[2])
    assert not find("nsf_hifigan").Config().amphion_defect


def test_the_defect_doubles_the_signal_of_every_stage():
    """With that flag the network is HiFi-GAN whose steps up are twice as loud."""
    model, log_mel, f0, generator = tone(220, amphion_defect=True)
    plain = find("hifigan").Model(find("hifigan").Config(**vocoders.SMALL["hifigan"])).eval()
    weights = {name: value for name, value in model.state_dict().items()
               if not name.startswith(("m_source", "noise_convs"))}
    plain.load_state_dict(weights)
    with torch.no_grad():
        for up in plain.fold().ups:
            up.weight.mul_(2)
            up.bias.mul_(2)
        torch.testing.assert_close(plain(log_mel), model(log_mel, f0, generator), rtol=1e-4, atol=1e-5)


def test_an_odd_rate_keeps_every_sample():
    changes = {"hop_length": 15, "upsample_rates": (5, 3), "upsample_kernels": (11, 7), "n_fft": 63, "win_length": 63}
    model, log_mel, f0, generator = tone(220, frames=7, **changes)
    with torch.no_grad():
        assert model(log_mel, f0, generator).shape == (1, 7 * 15)


def test_source_is_the_same_whatever_lies_behind_it():
    model, log_mel, f0, _ = tone(220, frames=50)
    f0[:, 40:] = 500
    with torch.no_grad():
        long = model.source(log_mel, f0, torch.Generator().manual_seed(5))
        again = model.source(log_mel, f0, torch.Generator().manual_seed(5))
    assert torch.equal(long, again)
    assert long.shape == (1, 1, 50 * 16)


def test_overtones_above_half_the_sample_rate_are_left_out():
    model, log_mel, f0, generator = tone(5000, frames=200, harmonics=3, noise_std=0.0)
    with torch.no_grad():
        model.m_source.l_linear.weight.fill_(0.1)
        source = model.source(log_mel, f0, generator)[0, 0].double().numpy()
    power = np.abs(np.fft.rfft((source - source.mean()) * np.hanning(len(source)))) ** 2
    bins = np.fft.rfftfreq(len(source), 1 / RATE)
    alias = np.abs(bins - 9000) < 50  # of 15 kHz
    assert power[alias].sum() < 1e-4 * power.sum()
