"""Samplers against the exact solution: data that are Gaussian, whose noise at every step is known."""

import itertools
import math

import numpy as np
import pytest
import torch

from featstore_zoo import diffusion
from featstore_zoo.diffusion import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")
MEAN, SPREAD = 0.3, 0.2


def start(size=4000):
    return torch.randn(1, size, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def noise_of(schedule):
    """The noise that is to be expected in x, for data N(MEAN, SPREAD^2)."""
    def found(x, step):
        kept = schedule.kept[step]
        clean = MEAN + math.sqrt(kept) * SPREAD**2 / (kept * SPREAD**2 + 1 - kept) * (x - math.sqrt(kept) * MEAN)
        return (x - math.sqrt(kept) * clean) / math.sqrt(1 - kept)

    return found


def exact(x, schedule):
    """Where the probability flow leads: as many deviations from the mean as it began with."""
    kept = schedule.kept[-1]
    return MEAN + SPREAD * (x - math.sqrt(kept) * MEAN) / math.sqrt(kept * SPREAD**2 + 1 - kept)


def off(count, sampler, schedule):
    x = start()
    made = diffusion.sample(noise_of(schedule), x, schedule, count, sampler, limit=None)
    return float((made - exact(x, schedule)).square().mean().sqrt())


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_ten_steps_of_the_fast_sampler_are_as_good_as_a_hundred_of_ddim(shape):
    schedule = Schedule(shape=shape)
    assert off(10, "dpm-solver++", schedule) < off(100, "ddim", schedule)
    assert off(10, "dpm-solver++", schedule) < 0.03 * SPREAD


def test_samplers_come_nearer_with_more_steps():
    for sampler in ("ddim", "dpm-solver++"):
        errors = [off(count, sampler, Schedule()) for count in (5, 20, 80)]
        assert errors[0] > 2 * errors[1] > 4 * errors[2], sampler


def test_ddpm_gives_the_distribution_of_the_data():
    schedule, x, generator = Schedule(), start(), torch.Generator().manual_seed(1)
    made = diffusion.sample(noise_of(schedule), x, schedule, 1000, "ddpm",
                            lambda _: torch.randn(x.shape, generator=generator, dtype=x.dtype), limit=None)
    assert abs(float(made.mean()) - MEAN) < 0.02
    assert abs(float(made.std()) / SPREAD - 1) < 0.05  # fewer steps give too little spread: 0.86 of it in 100


def test_what_a_step_aims_at_is_kept_in_range():
    schedule = Schedule()
    seen = []

    def wild(x, step):
        seen.append(x)
        return -3 * torch.ones_like(x)

    made = diffusion.sample(wild, start(10), schedule, 10, "ddim")
    assert made.abs().max() <= 1
    assert max(float(x.abs().max()) for x in seen) > 1  # the noisy x is not cut


@pytest.mark.parametrize("count", [1, 2, 10, 1000])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++"])
def test_sampling_begins_in_noise_and_visits_falling_steps(count, sampler):
    path = Schedule().path(count, sampler)
    assert path[0] == 999 and (np.diff(path) < 0).all() and len(path) <= count
    assert count == 1 or path[-1] == 0


def test_noise_is_added_by_the_shares_of_the_schedule():
    schedule = Schedule()
    assert schedule.kept[0] == pytest.approx(1 - 1e-4) and 4.0e-5 < schedule.kept[-1] < 4.1e-5
    made = schedule.noisy(torch.ones(2, 1, 1), torch.zeros(2, 1, 1), torch.tensor([0, 999]))
    assert made.flatten().tolist() == pytest.approx(np.sqrt(schedule.kept[[0, 999]]).tolist())


def test_a_piece_has_the_noise_of_the_whole_and_every_item_the_same():
    whole = diffusion.draws(torch.Generator().manual_seed(3), torch.zeros(1, 100, 5))(2)
    piece = diffusion.draws(torch.Generator().manual_seed(3), torch.zeros(3, 30, 5), start=50)(2)
    for item in piece:
        assert torch.equal(item, whole[0, 50:80])


# --- levels of noise


def clean_of(x, sigma):
    """The data N(MEAN, SPREAD^2) that are to be expected behind x at a level of noise."""
    return MEAN + SPREAD**2 / (SPREAD**2 + sigma**2) * (x - MEAN)


def flow(x, sigma):
    """Where the probability flow from x at a level ends."""
    return MEAN + SPREAD / math.sqrt(SPREAD**2 + sigma**2) * (x - MEAN)


def test_euler_and_heun_solve_the_flow_to_their_order():
    x = 80 * start(200)
    errors = {}
    for heun, count in itertools.product((False, True), (40, 80)):
        sigmas = diffusion.karras_sigmas(count, 0.002, 80.0, 7.0)
        errors[heun, count] = float((diffusion.edm_solve(clean_of, x, sigmas, heun) - flow(x, 80.0)).abs().max())
    assert 1.8 < errors[False, 40] / errors[False, 80] < 2.3
    assert 3.2 < errors[True, 40] / errors[True, 80] < 5
    assert errors[True, 40] < 0.2 * errors[False, 40]


def test_a_consistency_function_gives_the_data_in_any_number_of_calls():
    x = 80 * start()
    draw = diffusion.draws(torch.Generator().manual_seed(1), x)
    for count in (1, 4):
        sigmas = diffusion.karras_sigmas(count, 0.002, 80.0, 7.0) if count == 1 else [80.0, 10.0, 1.0, 0.2]
        made = diffusion.consistency(flow, x, sigmas, 0.002, draw)
        assert abs(float(made.mean()) - MEAN) < 0.02 and abs(float(made.std()) / SPREAD - 1) < 0.05


def test_scales_keep_variance_and_end_in_the_identity():
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    skip, out, scale, _ = diffusion.edm_scales(sigma, 0.5, 0.002)
    torch.testing.assert_close(scale * (sigma**2 + 0.25).sqrt(), torch.ones_like(sigma))
    assert out[0] == 0 and abs(float(skip[0]) - 1) < 2e-5
