"""DiffWave's schedules and samplers."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import vocoders

from featstore_zoo import find
from featstore_zoo.diffwave.model import Config, Model, kept

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLERS = [{"schedule": schedule, "sampler": sampler, "clamp": clamp}
            for schedule in ("full", "fast") for sampler in ("ddpm", "ddim") for clamp in ("x0", "xt")]


class Oracle(Model):
    """A network that knows the waveform, and so the noise."""

    def noise(self, x, step, condition):
        left = torch.tensor(np.interp(step.numpy(), np.arange(50), np.sqrt(kept(self.config.betas)))[:, None])
        return ((x - left * self.truth) / (1 - left**2).sqrt()).float()


@pytest.mark.parametrize("how", SAMPLERS, ids=lambda how: "-".join(how.values()))
def test_a_network_that_knows_the_noise_gives_the_waveform(how):
    model = Oracle(Config(**vocoders.SMALL["diffwave"] | how))
    log_mel, _, generator = vocoders.inputs(model, 10)
    model.truth = torch.sin(torch.arange(160) / 5).expand(2, -1) * 0.8
    with torch.no_grad():
        wave = model(log_mel, generator=generator)
    torch.testing.assert_close(wave, model.truth, rtol=0, atol=1e-4)


def test_full_schedule_visits_every_step_and_the_fast_one_six_between():
    betas, where = Config().sampling
    assert len(betas) == 50
    np.testing.assert_allclose(where, np.arange(50), atol=1e-9)
    betas, where = Config.preset("fast").sampling
    assert betas.tolist() == [1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5]
    assert (np.diff(where) > 0).all()
    assert 0 <= where[0] < where[-1] <= 49
    levels = np.interp(where, np.arange(50), np.sqrt(kept(Config().betas)))
    np.testing.assert_allclose(levels, np.sqrt(kept(betas)), rtol=1e-9)  # the noise there is the noise of training


def test_clamping_the_noisy_waveform_is_the_published_update():
    model = vocoders.small("diffwave", clamp="xt")
    log_mel, _, generator = vocoders.inputs(model, 8)
    with torch.no_grad():
        source = model.source(log_mel, None, generator)
        found = model.render(log_mel, source)
        beta, where = model.config.sampling
        alpha, level = 1 - beta, np.cumprod(1 - beta)
        condition = model.condition(log_mel)
        x = source[:, 0]
        for count, n in enumerate(range(5, -1, -1)):
            noise = model.noise(x, torch.full((2,), float(where[n])), condition)
            x = (x - beta[n] / math.sqrt(1 - level[n]) * noise) / math.sqrt(alpha[n])
            if n:
                sigma = math.sqrt((1 - level[n - 1]) / (1 - level[n]) * beta[n])
                x = x + sigma * source[:, count + 1]
            x = x.clamp(-1, 1)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_clamping_the_aim_keeps_the_waveform_within_full_scale(sampler):
    model = vocoders.small("diffwave", sampler=sampler)
    with torch.no_grad():
        model.output_projection.weight.mul_(20)
        wave = model(*vocoders.inputs(model, 8))
    assert wave.abs().max() <= 1


def test_ddim_draws_noise_once_and_ddpm_for_every_step():
    for changes, draws in (({"sampler": "ddim"}, 1), ({}, 6), ({"schedule": "full"}, 50)):
        model = vocoders.small("diffwave", **changes)
        log_mel, f0, generator = vocoders.inputs(model, 4)
        assert model.source(log_mel, f0, generator).shape == (2, draws, 64)


def test_one_set_of_weights_serves_every_sampler():
    model = vocoders.small("diffwave")
    for how in SAMPLERS:
        other = find("diffwave").Model(dataclasses.replace(model.config, **how))
        other.load_state_dict(model.state_dict())


def test_loss_of_an_untrained_network_is_the_mean_of_noise():
    model = Model(Config(**vocoders.SMALL["diffwave"]))  # its last weights are 0, so it finds none
    torch.nn.init.zeros_(model.output_projection.bias)
    log_mel, _, generator = vocoders.inputs(model, 400)
    terms = find("diffwave").losses(model, {"log-mel": log_mel, "wave": torch.zeros(2, 6400)}, generator)
    assert terms["noise"].item() == pytest.approx(math.sqrt(2 / math.pi), rel=0.02)


@pytest.mark.parametrize(("changes", "message"), [
    ({"mel_rates": (16, 8)}, "product is hop_length 256"),
    ({"hop_length": 240, "mel_rates": (16, 15)}, r"mel_rates \(16, 15\) must be even"),
    ({"last_beta": 1e-5}, "must lie between 0 and 1"),
    ({"schedule": "slow"}, "schedule must be full or fast, not 'slow'"),
    ({"schedule": "fast", "fast_betas": (0.5, 0.9)}, "end in more noise than training adds"),
    ({"noise_steps": 1}, "steps 1 at least 2"),
])
def test_impossible_schedule_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)
