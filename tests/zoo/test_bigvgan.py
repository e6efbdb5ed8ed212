"""BigVGAN's activation and its filters."""

import numpy as np
import pytest
import torch

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
