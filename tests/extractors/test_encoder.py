"""What every content encoder inherits: layers, mixes, stored types, one pass for several requests, and refusals."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from featstore_extractors.encoder import OUTPUT, Architecture, Encoder

torch = pytest.importorskip("torch", reason="encoders need torch: featstore[encoders]")

RATE = 16000
PASSES: list[tuple[int, frozenset[int]]] = []  # (rows, layers) of each forward pass


class Doubling:
    """Layer L of a wave is the mean of every 320 samples, times 2 ** L, in two channels of opposite sign."""

    def hidden(self, waves: list[Any], wanted: frozenset[int]) -> tuple[dict[int, Any], list[int]]:
        PASSES.append((len(waves), wanted))
        lengths = [len(wave) // 320 for wave in waves]
        rows = torch.full((len(waves), max(lengths), 2), torch.nan)  # beyond a row's end lies what must never be read
        for row, wave, length in zip(rows, waves, lengths, strict=True):
            means = wave[: length * 320].reshape(length, 320).mean(dim=1)
            row[:length] = torch.stack([means, -means], dim=1)
        return {layer: rows * (100.0 if layer == OUTPUT else 2.0**layer) for layer in wanted}, lengths

    def project(self, layer: Any) -> Any:
        return layer[..., :1] * 10


@dataclass(frozen=True)
class Toy(Encoder):
    projection: bool = False
    gain: float = 1.0
    name: ClassVar[str] = "toy"
    centre_s: ClassVar[Fraction] = Fraction(0)

    NORMED: ClassVar[bool] = True

    def architecture(self) -> Architecture:
        return Architecture(layers=12, dim=2, output=OUTPUT, normed=self.NORMED, facts={"gain": self.gain})

    def network(self, device: str) -> Doubling:
        return Doubling()

    @property
    def frame_rate(self) -> Fraction:
        return Fraction(50)

    @property
    def projected(self) -> int:
        return int(self.projection)

    def mixed(self, network: Any, layers: Any) -> Any:
        mixed = super().mixed(network, layers)
        return network.project(mixed) if self.projection else mixed

    def frames(self, samples: int) -> int:
        return samples // 320

    def sharing(self) -> tuple[Any, ...]:
        return (self.gain,)


@dataclass(frozen=True)
class Unnormalised(Toy):
    NORMED: ClassVar[bool] = False


@pytest.fixture
def weights(tmp_path: Path) -> str:
    PASSES.clear()
    path = tmp_path / "toy.safetensors"
    path.write_bytes(b"some tensors")
    return str(path)


def wave(seconds: float, level: float = 0.25) -> np.ndarray:
    return np.full(round(seconds * RATE), level, np.float32)


def test_no_layer_is_the_output(weights):
    frames = Toy(weights=weights).load("cpu")([wave(0.1)])[0]
    assert frames.shape == (5, 2) and frames.dtype == np.float16
    assert np.unique(frames).tolist() == [-25.0, 25.0]


def test_a_layer_is_asked_for_by_its_number(weights):
    assert Toy(weights=weights, layer="3").load("cpu")([wave(0.1)])[0][0].tolist() == [2.0, -2.0]


def test_layers_are_averaged_or_set_side_by_side(weights):
    mean, side = (Toy(weights=weights, layer="1..3", mix=mix) for mix in ("mean", "concat"))
    assert mean.load("cpu")([wave(0.1)])[0][0].tolist() == pytest.approx([0.25 * 14 / 3, -0.25 * 14 / 3], rel=1e-3)
    assert side.load("cpu")([wave(0.1)])[0][0].tolist() == [0.5, -0.5, 1, -1, 2, -2]
    assert (mean.dim, side.dim) == (2, 6)


def test_a_projection_comes_after_the_mix(weights):
    toy = Toy(weights=weights, layer="1..3", mix="mean", projection=True)
    frames = toy.load("cpu")([wave(0.1)])[0]
    assert toy.dim == 1 and frames.shape == (5, 1)
    assert frames[0, 0] == pytest.approx(10 * 0.25 * 14 / 3, rel=1e-3)


def test_requests_of_one_network_are_one_pass_over_the_layers_that_any_of_them_wants(weights):
    toys = [Toy(weights=weights, layer="9"), Toy(weights=weights, layer="11..12", mix="mean"), Toy(weights=weights)]
    assert len({toy.together for toy in toys}) == 1
    found = Toy.load_together(toys, "cpu")([wave(0.1), wave(0.3)])
    (only,) = PASSES
    assert only == (2, {9, 11, 12, OUTPUT})
    for toy, arrays in zip(toys, found, strict=True):
        for mine, alone in zip(arrays, toy.load("cpu")([wave(0.1), wave(0.3)]), strict=True):
            assert mine.tobytes() == alone.tobytes()


@pytest.mark.parametrize("other", [{"precision": "bf16"}, {"gain": 2.0}, {"compile": True}])
def test_what_changes_the_pass_is_not_shared(weights, other):
    assert Toy(weights=weights).together != Toy(weights=weights, **other).together


def test_two_ways_to_write_a_path_share_the_pass(weights, monkeypatch):
    path = Path(weights)
    monkeypatch.chdir(path.parent)
    assert Toy(weights=path.name).together == Toy(weights=weights).together


def test_rows_of_unlike_lengths_come_back_at_their_own(weights):
    arrays = Toy(weights=weights).load("cpu")([wave(0.3, 0.1), wave(0.02, 0.2), wave(0.1, 0.3)])
    assert [len(array) for array in arrays] == [15, 1, 5]
    assert [float(array[0, 0]) for array in arrays] == pytest.approx([10, 20, 30], rel=1e-3)


def test_the_identity_has_layers_by_number_and_no_path(weights, tmp_path):
    from featstore import Spec

    spec = Spec.of(Toy(weights=weights))
    assert spec.settings == {"layer": "output", "mix": "", "precision": "fp32", "gain": 1, "audio": 1}
    assert spec.weights == Toy(weights=weights).weights_digest
    moved = tmp_path / "elsewhere"
    Path(weights).rename(moved)
    assert Spec.of(Toy(weights=str(moved))).identity == spec.identity
    moved.write_bytes(b"other tensors")
    assert Spec.of(Toy(weights=str(moved))).differs(spec).keys() == {"weights"}


def test_two_ways_to_write_a_layer_are_one_identity(weights):
    from featstore import Spec

    assert Spec.of(Toy(weights=weights, layer="9")) == Spec.of(Toy(weights=weights, layer="9..9"))


@pytest.mark.parametrize(("kind", "layer", "dtype"), [(Toy, "", "float16"), (Toy, "9", "float16"),
                                                      (Unnormalised, "", "float16"), (Unnormalised, "9", "float32")])
def test_half_precision_is_the_default_where_a_norm_bounds_the_numbers(weights, kind, layer, dtype):
    from featstore import Spec

    toy = kind(weights=weights, layer=layer)
    assert Spec.of(toy).dtype == dtype == toy.load("cpu")([wave(0.1)])[0].dtype
    assert Spec.of(dataclasses.replace(toy, dtype="float32")).dtype == "float32"


@pytest.mark.parametrize(("settings", "message"), [
    ({"layer": "9..12"}, "are 4 layers: add mix=mean or mix=concat"),
    ({"layer": "9", "mix": "mean"}, "mix=mean needs several layers, as in layer=9..12,mix=mean"),
    ({"layer": "last"}, "layer=last: expected a number such as 12, or a range"),
    ({"layer": "12..9"}, "layer=12..9: expected a number"),
    ({"layer": "-1"}, "layer=-1: expected a number"),
])
def test_layers_that_make_no_sense_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message.replace("..", r"\.\.")):
        Toy(**settings)


def test_a_layer_beyond_the_last_is_refused_with_the_last(weights):
    with pytest.raises(ValueError, match=r"toy: .*toy.safetensors has layers 0 to 12, not 13"):
        Toy(weights=weights, layer="13").load("cpu")


def test_too_short_says_how_much_is_enough(weights):
    with pytest.raises(ValueError, match="too short: 319 samples at 16000 Hz make no frame of toy, 320 do"):
        Toy(weights=weights).load("cpu")([wave(1), np.zeros(319, np.float32)])


@pytest.mark.parametrize("bad", [np.zeros(3200, np.int16), np.zeros((2, 3200), np.float32)])
def test_waveforms_are_floats_of_one_channel(weights, bad):
    with pytest.raises(ValueError, match=r"found a waveform of .* expected floats"):
        Toy(weights=weights).load("cpu")([bad])


def test_samples_that_are_not_finite_are_refused(weights):
    bad = wave(0.1)
    bad[7] = np.nan
    with pytest.raises(ValueError, match="samples that are NaN or infinite"):
        Toy(weights=weights).load("cpu")([bad])


def test_numbers_beyond_half_precision_ask_for_more(weights):
    loud = wave(0.1, 1e4)
    with pytest.raises(ValueError, match=r"toy reaches 1e\+06, more than float16 holds: ask for dtype=float32"):
        Toy(weights=weights).load("cpu")([loud])
    assert Toy(weights=weights, dtype="float32").load("cpu")([loud])[0].max() == 1e6


def test_numbers_that_are_not_finite_name_the_weights(weights):
    with pytest.raises(ValueError, match=r"toy gives NaN or infinite values from .*toy.safetensors; the weights are"):
        Toy(weights=weights).load("cpu")([wave(0.1, 3e38)])
