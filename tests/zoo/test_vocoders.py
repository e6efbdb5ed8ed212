"""What every vocoder of the zoo keeps: shapes, lengths, batches, gradients, folded weights, how far it looks."""

import copy
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vocoders

import featstore_zoo
from featstore.errors import ContractMismatch, LengthMismatch
from featstore_extractors.signal import MelContract
from featstore_zoo import find

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for name in featstore_zoo.TABLE if find(name).KIND == "vocoder"]

# Amphion's table, at 24 kHz and 100 mels; Vocos' and BigVGAN v2's as their authors publish them.
COUNTS = {
    ("hifigan", "v3"): 1_500_162,
    ("hifigan", "tfr-enhanced"): 23_650_946,
    ("nsf_hifigan", "amphion"): 30_751_308,
    ("bigvgan", "base"): 14_025_154,
    ("bigvgan", "large"): 112_446_290,
    ("melgan", "paper"): 4_337_730,
    ("apnet", "base"): 72_334_854,
    ("diffwave", "base"): 2_696_771,
    ("vocos", "base"): 13_531_650,
}


@pytest.fixture(params=NAMES)
def model(request):
    return vocoders.small(request.param)


@pytest.mark.parametrize(("name", "preset"), COUNTS)
def test_parameters_are_as_many_as_published(name, preset):
    package = find(name)
    with torch.device("meta"):
        model = package.Model(package.Config.preset(preset))
    assert sum(weight.numel() for weight in model.parameters()) == COUNTS[name, preset]


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_a_configuration_that_survives_json(name):
    config = find(name).Config
    for preset in config.PRESETS:
        made = config.preset(preset)
        assert config(**json.loads(json.dumps(dataclasses.asdict(made)))) == made


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 17])
def test_any_number_of_frames_gives_hop_samples_each(model, frames):
    log_mel, f0, generator = vocoders.inputs(model, frames)
    with torch.no_grad():
        wave = model(log_mel, f0, generator)
    assert wave.shape == (2, frames * model.hop_length)
    assert wave.dtype == torch.float32
    assert torch.isfinite(wave).all()


def test_a_batch_gives_what_its_parts_give_alone(model):
    log_mel, f0, generator = vocoders.inputs(model, 12)
    with torch.no_grad():
        source = model.source(log_mel, f0, generator)
        wave = model.render(log_mel, source)
        alone = [model.render(log_mel[i : i + 1], None if source is None else source[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(wave, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_waveform(model):
    with torch.no_grad():
        first, second = (model(*vocoders.inputs(model, 6)) for _ in range(2))
    assert torch.equal(first, second)


def test_gradient_reaches_every_weight(model):
    model.train()
    log_mel, f0, generator = vocoders.inputs(model, 16)
    wave = torch.randn(2, 16 * model.hop_length, generator=generator) / 10
    package = sys.modules[type(model).__module__.rpartition(".")[0]]
    terms = package.losses(model, {"log-mel": log_mel, "f0": f0, "wave": wave}, generator)
    assert all(term.ndim == 0 and torch.isfinite(term) for term in terms.values())
    sum(terms.values()).backward()
    without = [name for name, weight in model.named_parameters()
               if weight.grad is None or not torch.isfinite(weight.grad).all() or not weight.grad.any()]
    assert without == []


def test_loss_falls_when_the_weights_follow_it(model):
    log_mel, f0, _ = vocoders.inputs(model, 16)
    wave = torch.randn(2, 16 * model.hop_length, generator=torch.Generator().manual_seed(2)) / 10
    package = sys.modules[type(model).__module__.rpartition(".")[0]]
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    course = []
    for _ in range(12):
        terms = package.losses(model, {"log-mel": log_mel, "f0": f0, "wave": wave}, torch.Generator().manual_seed(3))
        loss = sum(terms.values())
        course.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert course[-1] < course[0]


def test_folded_weights_give_the_same_waveform(model):
    folded = copy.deepcopy(model).fold()
    assert not [name for name in folded.state_dict() if "parametrizations" in name]
    with torch.no_grad():
        expected, found = (m(*vocoders.inputs(m, 9)) for m in (model, folded))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_samples_of_a_frame_depend_on_the_receptive_field_alone(model):
    left, right = model.receptive_field
    frames = left + right + 5
    middle = left + 2
    log_mel, f0, generator = vocoders.inputs(model, frames, batch=1)
    source = model.source(log_mel, f0, generator)
    log_mel = log_mel.double().requires_grad_()  # the gradient of the outermost frames is below what float32 can say
    wave = model.double().render(log_mel, None if source is None else source.detach().double())
    hop = model.hop_length
    weights = torch.randn(hop, generator=generator).double()
    (wave[0, middle * hop : (middle + 1) * hop] * weights).sum().backward()
    touched = log_mel.grad[0].abs().sum(1).nonzero().flatten().tolist()
    assert min(touched) >= middle - left
    assert max(touched) <= middle + right
    if not model.needs_generator or model.needs_f0:  # a sampler clamps, and what is clamped passes no gradient
        assert (min(touched), max(touched)) == (middle - left, middle + right)


def test_a_piece_with_its_context_gives_the_samples_of_the_whole(model):
    left, right = model.receptive_field
    frames = left + right + 20
    log_mel, f0, generator = vocoders.inputs(model, frames, batch=1)
    hop = model.hop_length
    with torch.no_grad():
        source = model.source(log_mel, f0, generator)
        whole = model.render(log_mel, source)
        first, last = left + 4, left + 12
        piece = slice(first - left, last + right)
        part = model.render(log_mel[:, piece], None if source is None
                            else source[..., (first - left) * hop : (last + right) * hop])
    torch.testing.assert_close(part[:, left * hop : (left + last - first) * hop], whole[:, first * hop : last * hop],
                               rtol=1e-4, atol=1e-5)


def test_silence_is_bounded_and_finite(model):
    log_mel, f0, generator = vocoders.inputs(model, 20)
    with torch.no_grad():
        wave = model(torch.full_like(log_mel, -11.5129), torch.zeros_like(f0), generator)
    assert torch.isfinite(wave).all()


def test_half_the_bits_give_nearly_the_same_waveform(model):
    """bfloat16 by autocast, given the same source: at most 3 % of the power (15 dB); 38 to 52 dB were measured."""
    log_mel, f0, generator = vocoders.inputs(model, 12)
    with torch.no_grad():
        source = model.source(log_mel, f0, generator)
        wave = model.render(log_mel, source)
        with torch.autocast("cpu", torch.bfloat16):
            coarse = model.render(log_mel, source).float()
            assert model(log_mel, f0, generator).dtype == torch.float32
    assert (coarse - wave).square().mean() < 0.03 * wave.square().mean()


def test_weights_of_half_the_bits_run(model):
    half = model.fold().to(torch.bfloat16)
    log_mel, f0, generator = vocoders.inputs(model, 6)
    with torch.no_grad():
        wave = half(log_mel.bfloat16(), f0, generator)
    assert wave.dtype == torch.float32
    assert torch.isfinite(wave).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hifigan", "nsf_hifigan", "melgan", "apnet", "vocos"])
def test_render_is_one_graph_to_the_compiler(name):
    model = vocoders.small(name).fold()
    log_mel, f0, generator = vocoders.inputs(model, 6)
    with torch.no_grad():
        source = model.source(log_mel, f0, generator)
        compiled = torch.compile(model.render, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(log_mel, source), model.render(log_mel, source))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hifigan", "nsf_hifigan", "vocos"])
def test_render_can_be_exported_for_any_number_of_frames(name):
    class Render(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, log_mel, source=None):
            return self.model.render(log_mel, source)

    model = vocoders.small(name).fold()
    log_mel, f0, generator = vocoders.inputs(model, 40)
    frames = torch.export.Dim("frames", min=3, max=100_000)
    with torch.no_grad():
        source = model.source(log_mel, f0, generator)
        shapes = ({1: frames}, {2: 16 * frames})[: 1 if source is None else 2]
        given = (log_mel,) if source is None else (log_mel, source)
        exported = torch.export.export(Render(model), given, dynamic_shapes=shapes).module()
        piece = (log_mel[:, :17],) if source is None else (log_mel[:, :17], source[..., : 17 * 16])
        torch.testing.assert_close(exported(*piece), model.render(*piece), rtol=1e-5, atol=1e-6)


def test_weights_alone_with_the_configuration_make_the_model_again(model):
    package = sys.modules[type(model).__module__.rpartition(".")[0]]
    again = package.Model(model.config).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected, found = (m(*vocoders.inputs(m, 5)) for m in (model, again))
    assert torch.equal(expected, found)


def test_wrong_input_is_named(model):
    log_mel, f0, generator = vocoders.inputs(model, 5)
    with pytest.raises(ContractMismatch, match=r"log_mel has 7 mels.*n_mels=20"):
        model(log_mel[..., :7], f0, generator)
    with pytest.raises(ValueError, match=r"expected \(B, T, n_mels\)"):
        model(log_mel[0], f0, generator)
    if model.needs_f0:
        with pytest.raises(ValueError, match="hears f0"):
            model(log_mel, None, generator)
        with pytest.raises(LengthMismatch, match="f0 has 4 frames and log_mel 5"):
            model(log_mel, f0[:, :4], generator)
    if model.needs_generator:
        with pytest.raises(ValueError, match="give generator="):
            model(log_mel, f0)


@pytest.mark.parametrize("name", NAMES)
def test_default_configuration_carries_the_standard_mel_contract(name):
    config = find(name).Config()
    assert config.contract == MelContract()
    assert config.differs(MelContract.preset("22k-80")).keys() == {"sample_rate", "n_mels", "fmax"}


@pytest.mark.parametrize("name", NAMES)
def test_package_is_a_folder_that_can_be_copied(name):
    folder = ROOT / "zoo" / "featstore_zoo" / name
    assert {"__init__.py", "model.py", "CARD.md"} <= {path.name for path in folder.iterdir()}
    assert find(name).KIND == "vocoder"
    assert find(name.replace("_", "-")) is find(name)


def test_a_copied_folder_is_a_vocoder_of_ones_own(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "zoo" / "featstore_zoo" / "hifigan", tmp_path / "my_models" / "my_vocoder")
    monkeypatch.syspath_prepend(tmp_path)
    package = find("my_models.my_vocoder")
    assert Path(package.__file__).is_relative_to(tmp_path)
    model = package.Model(package.Config(**vocoders.SMALL["hifigan"]))
    assert model(torch.zeros(1, 5, 20)).shape == (1, 80)
    assert package.Model is not find("hifigan").Model


def test_readme_of_the_zoo_runs():
    [block] = re.findall(r"^```python\n(.*?)^```", (ROOT / "zoo" / "README.md").read_text(), re.S | re.M)
    path = {"PYTHONPATH": ":".join(str(ROOT / root) for root in (".", "align", "extractors", "zoo"))}
    code = f"{block}\nprint(tuple(wave.shape))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert done.stdout == "(1, 12800)\n"


def test_importing_the_zoo_loads_no_torch():
    code = "import sys, featstore_zoo; print('torch' in sys.modules)"
    path = {"PYTHONPATH": ":".join(str(ROOT / root) for root in (".", "align", "extractors", "zoo"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert done.stdout == "False\n"


def test_unknown_model_lists_those_there_are():
    with pytest.raises(ValueError, match=r"no model 'hifgan'; there are hifigan"):
        find("hifgan")
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        find("nowhere.model")
    with pytest.raises(ValueError, match=r"json\.decoder has no KIND, Config, Model, losses"):
        find("json.decoder")


def test_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match=r"no preset 'v9' of featstore_zoo\.hifigan; there are v1, v2, v3"):
        find("hifigan").Config.preset("v9")


@pytest.mark.parametrize(("changes", "message"), [
    ({"hop_length": 128}, "make 256 samples of a frame, hop_length is 128"),
    ({"upsample_kernels": (16, 16, 4)}, "3 upsample_kernels for 4 upsample_rates"),
    ({"upsample_kernels": (15, 16, 4, 4)}, "upsample kernel 15 for rate 8"),
    ({"block_dilations": ((1, 3, 5),)}, "1 block_dilations for 3 block_kernels"),
    ({"block_kernels": (3, 6, 11)}, "must be odd"),
    ({"channels": 100}, "channels 100 must be a multiple of 16"),
    ({"resblock": 3}, "resblock must be 1 or 2"),
    ({"discriminators": ("mpd", "mdp")}, "discriminators mpd, mdp: expected each of mpd, msd"),
    ({"lambda_mel": -1.0}, "lambda_mel=-1.0: the weight of a loss"),
    ({"n_fft": 512}, "win_length 1024 must not exceed n_fft 512"),
    ({"discriminators": ("ms_sb_cqt",), "sample_rate": 16000, "fmax": 8000}, "use cqt_octaves=8 at most"),
])
def test_impossible_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        find("hifigan").Config(**changes)


@pytest.mark.parametrize(("name", "hop"), [("nsf_hifigan", 512), ("hifigan", 441), ("bigvgan", 300), ("hifigan", 480),
                                           ("melgan", 512)])
def test_rates_that_do_not_make_the_hop_are_told_with_some_that_do(name, hop):
    contract = {"hop_length": hop, "win_length": 4 * hop, "n_fft": 4 * hop, "padding": "centre"}
    with pytest.raises(ValueError, match=f"make 256 samples of a frame, hop_length is {hop}") as told:
        find(name).Config(**contract)
    fields = dict(word.split("=") for word in str(told.value).split() if "=" in word)
    find(name).Config(**contract, **{field: tuple(json.loads(value)) for field, value in fields.items()})
