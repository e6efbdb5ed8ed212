"""BigVGAN's activation and its filters."""

import numpy as np
import pytest
import torch
import vocoders

from featstore_zoo.bigvgan.model import Activation, Config, low_pass

pytestmark = pytest.mark.usefixtures("one_thread")


def test_filter_passes_what_lies_below_a_quarter_and_keeps_level():
    taps = low_pass(0.25, 0.3, 12)
    response = np.abs(np.fft.rfft(taps, 480))  # bin 120 is a quarter of the rate
    assert response[0] == pytest.approx(1)
    assert response[60] > 0.9
    assert response[120] == pytest.approx(0.5, abs=0.05)
    assert response[230] < 0.02
    assert np.array_equal(taps, taps[::-1])


def test_activation_keeps_a_constant_and_its_formula():
    for config in (Config(), Config(activation="snake"), Config(activation="snake", log_scale=False)):
        activation = Activation(3, config)
        with torch.no_grad():
            activation.alpha += torch.tensor([0.0, 0.5, 1.0])
            x = torch.full((2, 3, 40), 0.7)
            alpha = activation.alpha.exp() if config.log_scale else activation.alpha
            beta = alpha if config.activation == "snake" else activation.beta.exp()
            expected = 0.7 + torch.sin(0.7 * alpha) ** 2 / beta
            torch.testing.assert_close(activation(x), expected[None, :, None].expand(2, 3, 40))


def test_activation_aliases_less_than_snake_at_the_plain_rate():
    """The second harmonic of a tone at 0.4 of the rate folds back to 0.2 unless it is filtered out."""
    config = Config()
    tone = torch.sin(2 * torch.pi * 0.4 * torch.arange(2000))[None, None]
    with torch.no_grad():
        filtered = Activation(1, config)(tone)[0, 0, 500:1500]
        plain = (tone + torch.sin(tone) ** 2)[0, 0, 500:1500]
    fold = [np.abs(np.fft.rfft(x.numpy() * np.hanning(1000)))[200] for x in (filtered, plain)]
    assert fold[0] < 0.5 * fold[1]


def test_v2_has_no_bias_and_no_tanh_at_the_end():
    config = Config.preset("v2-44k-128")
    assert (config.tanh, config.final_bias, config.hop_length, config.sample_rate) == (False, False, 512, 44100)
    assert config.discriminators == ("mpd", "ms_sb_cqt")


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation must be snake or snakebeta, not 'relu'"):
        Config(activation="relu")


@pytest.fixture(scope="module")
def fused():
    pytest.importorskip("numba")
    from featstore_zoo.bigvgan import fused

    return fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [1, 2, 5, 511, 512, 513, 1027])
def test_the_compiled_activation_is_that_of_torch(fused, frames, dtype):
    torch.manual_seed(frames)
    activation = Activation(3, Config())
    with torch.no_grad():
        activation.alpha.normal_(0, 1)
        activation.beta.normal_(0, 1)
        x = (3 * torch.randn(2, 3, frames)).to(dtype)
        expected = activation(x.float())
        made = fused.activated(x, activation.alpha.exp(), activation.beta.exp() + 1e-9, activation.filter)
    assert made.dtype == dtype
    torch.testing.assert_close(made, expected.to(dtype), rtol=1e-5 if dtype is torch.float32 else 2**-7, atol=1e-5)


def test_the_compiled_activation_does_not_depend_on_threads_and_lets_nan_through(fused):
    x = torch.randn(1, 5, 600)
    x[0, 4, 300] = torch.nan
    scales = torch.ones(5), torch.ones(5), torch.tensor(low_pass(0.25, 0.3, 12), dtype=torch.float32)
    one = fused.activated(x, *scales)
    torch.set_num_threads(3)
    assert torch.equal(fused.activated(x, *scales)[0, :4], one[0, :4])
    assert torch.isfinite(one[0, :4]).all()
    assert torch.isnan(one[0, 4, 295:306]).all()


def test_a_folded_network_uses_it_and_says_the_same(fused, monkeypatch):
    model = vocoders.small("bigvgan").eval()
    log_mel, *_ = vocoders.inputs(model, 12)
    with torch.no_grad():
        plain = model.render(log_mel)
        calls = []
        monkeypatch.setattr("featstore_zoo.bigvgan.model.activated",
                            lambda *given: calls.append(1) or fused.activated(*given))
        assert not calls
        folded = model.fold().render(log_mel)
        assert len(calls) == sum(isinstance(part, Activation) for part in model.modules())
        torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-5)
        monkeypatch.setattr("featstore_zoo.bigvgan.model.activated", lambda *given: None)  # as without numba
        torch.testing.assert_close(model.render(log_mel), folded, rtol=1e-4, atol=1e-5)
    model.render(log_mel)  # gradients are wanted: torch's way
    assert len(calls) == sum(isinstance(part, Activation) for part in model.modules())
