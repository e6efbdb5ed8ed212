"""WeNet's encoder against WeNet itself, against the same arithmetic as literal loops, and in its refusals."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from checkpoints import wenet_folder

from featstore import Spec
from featstore_extractors import parse
from featstore_extractors.imports import without_broken_torchaudio
from featstore_extractors.wenet import WeNet, read_cmvn

torch = pytest.importorskip("torch", reason="encoders need torch: featstore[encoders]")
yaml = pytest.importorskip("yaml", reason="WeNet's train.yaml needs pyyaml: featstore[encoders]")

RATE = 16000
KINDS: list[dict[str, Any]] = [
    {},
    {"input_layer": "conv2d6", "causal": False, "cnn_module_norm": "batch_norm"},
    {"input_layer": "conv2d8", "causal": False, "activation_type": "gelu", "mels": 40},
    {"cnn_module_norm": "batch_norm", "activation_type": "relu", "macaron_style": False},
    {"pos_enc_layer_type": "abs_pos", "selfattention_layer_type": "selfattn", "relative": False, "causal": False},
    {"pos_enc_layer_type": "abs_pos", "macaron_style": False},
    {"pos_enc_layer_type": "no_pos", "kernel": 8},
]


@pytest.fixture(scope="module")
def speech(shared: Path) -> np.ndarray:
    """About five seconds of a recording at 16 kHz."""
    return soundfile.read(shared / "audio/aishell_S0724/BAC009S0724W0121.flac", dtype="float32")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wenet_folder(tmp_path_factory.mktemp("wenet"))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def of(folder: Path, *waves: np.ndarray, **settings: Any) -> list[np.ndarray]:
    return WeNet(weights=str(folder), dtype="float32", **settings).load("cpu")(list(waves))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the train.yaml of `folder`."""
    record = yaml.safe_load((folder / "train.yaml").read_text())
    change(record)
    (folder / "train.yaml").write_text(yaml.safe_dump(record))


def set_conf(folder: Path, **fields: Any) -> None:
    edit(folder, lambda record: record["encoder_conf"].update(fields))


def retensor(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the final.pt of `folder`."""
    tensors = torch.load(folder / "final.pt", weights_only=True)
    change(tensors)
    torch.save(tensors, folder / "final.pt")


# Against WeNet


@pytest.fixture(scope="module")
def reference(parity: Path) -> dict[str, Any]:
    """What WeNet computes of two waveforms alone, with its checkpoint as `folder`."""
    place = parity / "encoders"
    if not place.exists():
        pytest.skip(f"no encoder parity data at {place}")
    with np.load(place / "wenet_u2pp/expected.npz") as expected:
        found: dict[str, Any] = dict(expected)
    wave = soundfile.read(place / "speechlike16k.wav", dtype="float32")[0]
    return found | {"waves": [wave[:length] for length in found["lens"]], "folder": place / "wenet_u2pp"}


def filter_bank(encoder: Any, wave: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return encoder.fbank(torch.from_numpy(wave)[None])[0].numpy()


def test_the_filter_bank_is_that_of_torchaudio(reference):
    # 3e-4, as the data's README says: the FFT of torch rounds otherwise on other processors
    encoder = WeNet(weights=str(reference["folder"])).network("cpu")
    for number, wave in enumerate(reference["waves"]):
        ours = filter_bank(encoder, np.pad(wave, (0, 160)))
        np.testing.assert_allclose(ours, reference[f"fbank_utt{number}"], rtol=0, atol=3e-4)
    np.testing.assert_allclose(filter_bank(encoder, reference["waves"][0]), reference["fbank_utt0_nopad160"],
                               rtol=0, atol=3e-4)


def test_the_encoder_is_that_of_wenet_given_its_filter_bank(reference):
    encoder = WeNet(weights=str(reference["folder"])).network("cpu")
    for number in (0, 1):
        expected = reference[f"enc_utt{number}"]
        features = torch.from_numpy(reference[f"fbank_utt{number}"])[None]
        with torch.inference_mode():
            ours = encoder.encode(features, [len(expected)], frozenset({2}))[2][0].numpy()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("settings", "key"), [
    ({"tail": 160}, "enc_utt0"),
    ({"tail": 160, "layer": "0"}, "embed_utt0"),
    ({"tail": 160, "chunk": 16}, "enc_utt0_chunk16"),
    ({}, "enc_utt0_nopad160"),
])
def test_from_the_wave_on_it_is_wenets(reference, settings, key):
    [ours] = of(reference["folder"], reference["waves"][0], **settings)
    np.testing.assert_allclose(ours, reference[key], rtol=0, atol=1e-5)  # README: 1e-4


def test_in_a_batch_it_is_wenets_too(reference):
    both = of(reference["folder"], *reference["waves"], tail=160)
    for number, ours in enumerate(both):
        np.testing.assert_allclose(ours, reference[f"enc_utt{number}"], rtol=0, atol=1e-5)
    assert [len(ours) for ours in both] == reference["batch_mask"].sum(axis=(1, 2)).tolist()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "relative" not in kind], ids=str)
def test_it_equals_an_installed_wenet(kind, tmp_path, speech):
    without_broken_torchaudio()
    theirs = pytest.importorskip("wenet.transformer.encoder", exc_type=ImportError, reason="wenet is not installed")
    from wenet.transformer.cmvn import GlobalCMVN

    extractor = WeNet(weights=str(wenet_folder(tmp_path, **kind)))
    record = yaml.safe_load((tmp_path / "train.yaml").read_text())
    mean, istd = map(torch.from_numpy, read_cmvn(tmp_path / "global_cmvn", record["input_dim"]))
    encoder = theirs.ConformerEncoder(record["input_dim"], global_cmvn=GlobalCMVN(mean, istd), **record["encoder_conf"])
    tensors = torch.load(tmp_path / "final.pt", weights_only=True)
    encoder.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in tensors.items()
                             if name.startswith("encoder.")}, strict=False)
    features = filter_bank(extractor.network("cpu"), speech)
    with torch.inference_mode():
        expected, _ = encoder.eval()(torch.from_numpy(features)[None], torch.tensor([len(features)]), -1, -1)
    np.testing.assert_allclose(of(tmp_path, speech)[0], expected[0], rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_filter_bank_is_that_of_kaldi(folder, speech):
    kaldi = pytest.importorskip("kaldi_native_fbank", reason="kaldi-native-fbank is not installed")
    options = kaldi.FbankOptions()
    options.frame_opts.dither, options.mel_opts.num_bins = 0, 80
    theirs = kaldi.OnlineFbank(options)
    theirs.accept_waveform(RATE, (speech * 32768).tolist())
    theirs.input_finished()
    expected = np.stack([theirs.get_frame(i) for i in range(theirs.num_frames_ready)])
    ours = filter_bank(WeNet(weights=str(folder)).network("cpu"), speech)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-4)  # two float32 logarithms of near-silence


# Against the arithmetic written out


class Loops:
    """One utterance of a small conformer in float64, frame by frame and head by head, as the papers put it."""

    def __init__(self, folder: Path, chunk: int = 0) -> None:
        self.w = {name.removeprefix("encoder."): tensor.double().numpy()
                  for name, tensor in torch.load(folder / "final.pt", weights_only=True).items()}
        self.conf = yaml.safe_load((folder / "train.yaml").read_text())["encoder_conf"]
        self.chunk = chunk

    def layers(self, features: np.ndarray) -> list[np.ndarray]:
        """(T, mels) -> what enters the first block, and what each block gives, the last behind the final norm."""
        x = (features - self.w["global_cmvn.mean"]) * self.w["global_cmvn.istd"]
        x = self.subsampled(x)
        found = [x]
        for n in range(self.conf["num_blocks"]):
            x = self.block(x, f"encoders.{n}.")
            found.append(x)
        found[-1] = self.layer_norm(x, "after_norm")
        return found

    def subsampled(self, x: np.ndarray) -> np.ndarray:
        x, n = x[None], 0  # (channels, T, mels)
        while f"embed.conv.{n}.weight" in self.w:
            weight, bias = self.w[f"embed.conv.{n}.weight"], self.w[f"embed.conv.{n}.bias"]
            width, stride = weight.shape[2], 3 if weight.shape[2] == 5 else 2
            steps = [range(0, size - width + 1, stride) for size in x.shape[1:]]
            x = np.array([[np.tensordot(weight, x[:, t:t + width, f:f + width], 3) + bias for f in steps[1]]
                          for t in steps[0]]).transpose(2, 0, 1)
            x, n = np.maximum(x, 0), n + 2
        flat = np.stack([x[:, t].ravel() for t in range(x.shape[1])])
        x = self.linear(flat, "embed.out.0" if "embed.out.0.weight" in self.w else "embed.linear")
        self.table = np.array([[(math.sin if i % 2 == 0 else math.cos)(t / 10000 ** (i // 2 * 2 / x.shape[1]))
                                for i in range(x.shape[1])] for t in range(len(x))])
        position = self.conf["pos_enc_layer_type"]
        if position == "no_pos":
            self.table = 0 * self.table
            return x
        return x * math.sqrt(x.shape[1]) + (self.table if position == "abs_pos" else 0)

    def block(self, x: np.ndarray, at: str) -> np.ndarray:
        share = 1.0
        if self.conf.get("macaron_style", True):
            share = 0.5
            x = x + share * self.forward(self.layer_norm(x, at + "norm_ff_macaron"), at + "feed_forward_macaron.")
        x = x + self.attention(self.layer_norm(x, at + "norm_mha"), at + "self_attn.")
        x = x + self.convolution(self.layer_norm(x, at + "norm_conv"), at + "conv_module.")
        x = x + share * self.forward(self.layer_norm(x, at + "norm_ff"), at + "feed_forward.")
        return self.layer_norm(x, at + "norm_final")

    def attention(self, x: np.ndarray, at: str) -> np.ndarray:
        q, k, v = (self.linear(x, f"{at}linear_{name}") for name in "qkv")
        size, out = x.shape[1] // self.conf["attention_heads"], np.zeros_like(x)
        for head in range(self.conf["attention_heads"]):
            part = slice(head * size, (head + 1) * size)
            for t in range(len(x)):
                stop = len(x) if not self.chunk else min(len(x), (t // self.chunk + 1) * self.chunk)
                if f"{at}linear_pos.weight" in self.w:
                    p = (self.table @ self.w[at + "linear_pos.weight"].T)[:stop, part]
                    u, w = self.w[at + "pos_bias_u"][head], self.w[at + "pos_bias_v"][head]
                    scores = (k[:stop, part] @ (q[t, part] + u) + p @ (q[t, part] + w)) / math.sqrt(size)
                else:
                    scores = k[:stop, part] @ q[t, part] / math.sqrt(size)
                shares = np.exp(scores - scores.max())
                out[t, part] = shares / shares.sum() @ v[:stop, part]
        return self.linear(out, at + "linear_out")

    def convolution(self, x: np.ndarray, at: str) -> np.ndarray:
        def gated(rows: np.ndarray) -> np.ndarray:
            two = rows @ self.w[at + "pointwise_conv1.weight"][:, :, 0].T + self.w[at + "pointwise_conv1.bias"]
            return two[:, :x.shape[1]] / (1 + np.exp(-two[:, x.shape[1]:]))

        kernel = self.w[at + "depthwise_conv.weight"][:, 0].T  # (K, D)
        reach = len(kernel) - 1
        if self.conf["causal"]:
            x = gated(np.pad(x, ((reach, 0), (0, 0))))
        else:
            x = np.pad(gated(x), ((reach // 2, reach // 2), (0, 0)))
        x = np.stack([(x[t:t + len(kernel)] * kernel).sum(0) for t in range(len(x) - reach)])
        x = x + self.w[at + "depthwise_conv.bias"]
        if self.conf["cnn_module_norm"] == "batch_norm":
            x = (x - self.w[at + "norm.running_mean"]) / np.sqrt(self.w[at + "norm.running_var"] + 1e-5)
            x = x * self.w[at + "norm.weight"] + self.w[at + "norm.bias"]
        else:
            x = self.layer_norm(x, at + "norm")
        return self.active(x) @ self.w[at + "pointwise_conv2.weight"][:, :, 0].T + self.w[at + "pointwise_conv2.bias"]

    def forward(self, x: np.ndarray, at: str) -> np.ndarray:
        return self.linear(self.active(self.linear(x, at + "w_1")), at + "w_2")

    def active(self, x: np.ndarray) -> np.ndarray:
        if self.conf["activation_type"] == "relu":
            return np.maximum(x, 0)
        if self.conf["activation_type"] == "gelu":
            return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return x / (1 + np.exp(-x))

    def linear(self, x: np.ndarray, at: str) -> np.ndarray:
        return x @ self.w[at + ".weight"].T + self.w[at + ".bias"]

    def layer_norm(self, x: np.ndarray, at: str) -> np.ndarray:
        x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
        return x * self.w[at + ".weight"] + self.w[at + ".bias"]


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.slow
def test_every_layer_equals_literal_loops_alone_and_in_a_batch(kind, chunk, tmp_path, speech):
    settings = {"weights": str(wenet_folder(tmp_path, **kind)), "dtype": "float32", "chunk": chunk}
    waves = [speech[20000:36000], speech[16000:41000], speech[30000:33000]]
    fbank = WeNet(**settings).network("cpu")
    extractors = [WeNet(**settings, layer=str(layer)) for layer in range(3)]
    together = WeNet.load_together(extractors, "cpu")(waves)
    for row, wave in enumerate(waves):
        expected = Loops(tmp_path, chunk).layers(filter_bank(fbank, wave).astype(float))
        alone = WeNet.load_together(extractors, "cpu")([wave])
        for layer, right in enumerate(expected):
            for ours in (together[layer][row], alone[layer][0]):
                np.testing.assert_allclose(ours, right, rtol=0, atol=1e-5 * np.abs(right).max())


# Frames: how many, where, and what they depend on


@pytest.mark.parametrize("tail", [0, 160])
@pytest.mark.parametrize("input_layer", ["conv2d", "conv2d6", "conv2d8"])
def test_frames_are_counted_exactly(input_layer, tail, tmp_path, speech):
    extractor = WeNet(weights=str(wenet_folder(tmp_path, input_layer=input_layer, layers=1)), tail=tail)
    lengths = list(range(5000, 5000 + 1400, 79))
    arrays = extractor.load("cpu")([speech[:length] for length in lengths])
    assert [len(array) for array in arrays] == [extractor.frames(length) for length in lengths]


@pytest.mark.parametrize(("input_layer", "hop", "centre"), [("conv2d", 640, 680), ("conv2d6", 960, 1000),
                                                            ("conv2d8", 1280, 1320)])
def test_a_frame_is_centred_on_the_samples_it_sees(input_layer, hop, centre, tmp_path, speech):
    extractor = WeNet(weights=str(wenet_folder(tmp_path, input_layer=input_layer)))
    assert extractor.frame_rate == Fraction(RATE, hop) and extractor.centre_s == Fraction(centre, RATE)
    wave = torch.from_numpy(speech[20000:40000].copy()).requires_grad_()
    hidden, [length] = extractor.network("cpu").hidden([wave], frozenset({0}))
    for frame in (0, 3, length - 1):
        seen = torch.autograd.grad(hidden[0][0, frame].abs().sum(), wave, retain_graph=True)[0].nonzero()
        first, last = int(seen.min()), int(seen.max())
        assert (first + last + 1) / 2 == frame * hop + centre


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [0, 5])
def test_a_row_does_not_depend_on_its_batch_mates(causal, chunk, tmp_path, speech):
    wenet_folder(tmp_path, causal=causal, cnn_module_norm="batch_norm", seed=3)
    waves = [speech[:1360], speech, speech[9000:40000], speech[:8000], 0 * speech[:20000]]
    for wave, together in zip(waves, of(tmp_path, *waves, chunk=chunk), strict=True):
        [alone] = of(tmp_path, wave, chunk=chunk)
        np.testing.assert_allclose(together, alone, rtol=0, atol=2e-5 * np.abs(alone).max())


def test_chunks_hide_what_comes_after_them(folder, speech):
    [whole], [part] = of(folder, speech, chunk=8), of(folder, speech[:31000], chunk=8)
    sure = len(part) // 8 * 8
    assert sure > 30
    np.testing.assert_allclose(part[:sure], whole[:sure], rtol=0, atol=2e-5 * np.abs(whole).max())
    [full], [large] = of(folder, speech), of(folder, speech, chunk=1000)
    np.testing.assert_array_equal(full, large)
    assert np.abs(full - whole).max() > 0.01


@pytest.mark.parametrize(("settings", "window"), [
    ({}, (384000, 46080, 480000)),
    ({"chunk": 16}, (37 * 10240, 5 * 10240, 47 * 10240)),
    ({"chunk": 500}, (320000, 320000, 960000)),
])
@pytest.mark.parametrize("input_layer", ["conv2d", "conv2d6", "conv2d8"])
def test_windows_are_whole_frames_and_whole_chunks(input_layer, settings, window, tmp_path):
    extractor = WeNet(weights=str(wenet_folder(tmp_path, input_layer=input_layer, layers=1)), **settings)
    core, context, longest = extractor.window
    unit = RATE / extractor.frame_rate * max(extractor.chunk, 1)
    assert core % unit == 0 == context % unit and longest >= core + 2 * context and context >= 2.88 * RATE
    if input_layer == "conv2d":
        assert (core, context, longest) == window
    assert Spec.of(extractor).settings["window"] == [core, context, longest]


def windowed(extractor: WeNet, wave: np.ndarray) -> np.ndarray:
    """Piece by piece, as the engine does with what is longer than the longest piece."""
    core, context, longest = extractor.window
    hop, run, found = int(RATE / extractor.frame_rate), extractor.load("cpu"), []
    for start in range(0, len(wave), core):
        begin = max(start - context, 0)
        last = len(wave) - begin <= longest
        [frames] = run([wave[begin:None if last else start + core + context]])
        found.append(frames[(start - begin) // hop:None if last else (start + core - begin) // hop])
        if last:
            break
    return np.concatenate(found)


@pytest.mark.parametrize("settings", [{}, {"chunk": 16}], ids=str)
@pytest.mark.slow
def test_a_recording_beyond_wenets_200_s_is_computed_whole_and_in_windows(settings, folder, speech):
    song = np.tile(speech, 50)[: 210 * RATE]
    for layer, bound in (("0", 1e-5), ("", math.inf)):  # attention counts positions from where a window begins
        extractor = WeNet(weights=str(folder), dtype="float32", layer=layer, **settings)
        [whole], pieces = extractor.load("cpu")([song]), windowed(extractor, song)
        if settings:  # nothing before the end of the first core sees that a window ends
            core = extractor.window[0] // 640
            np.testing.assert_allclose(pieces[:core], whole[:core], rtol=0, atol=2e-5 * np.abs(whole).max())
        assert len(whole) == len(pieces) == extractor.frames(len(song)) == 5248
        assert np.isfinite(whole).all()
        assert np.abs(whole - pieces).max() <= bound * np.abs(whole).max()


def test_what_is_too_short_says_how_much_is_enough(folder, speech):
    run = WeNet(weights=str(folder)).load("cpu")
    for samples in (1, 399, 1359):
        with pytest.raises(ValueError, match=f"too short: {samples} samples at 16000 Hz .* of wenet, 1360 do"):
            run([speech[:samples]])
    assert run([speech[:1360]])[0].shape == (1, 32)
    assert WeNet(weights=str(folder), tail=160).load("cpu")([speech[:1200]])[0].shape == (1, 32)


def test_silence_has_finite_features(folder):
    [frames] = WeNet(weights=str(folder)).load("cpu")([np.zeros(RATE, np.float32)])
    assert frames.shape == (23, 32) and np.isfinite(frames).all()


# Settings and identity


def test_a_request_names_folder_layers_and_preset(folder):
    extractor = parse(f"wenet:amphion,weights={folder},layer=0..2,mix=mean,chunk=4")["wenet"]
    assert (extractor.tail, extractor.chunk, extractor.layers, extractor.dim) == (160, 4, (0, 1, 2), 32)


@pytest.mark.parametrize("setting", ["chunk", "tail"])
def test_settings_below_zero_are_refused(setting):
    with pytest.raises(ValueError, match=f"{setting}=-1: expected a number of (frames|samples), 0 or more"):
        WeNet(**{setting: -1})


def test_layers_beyond_the_one_wanted_are_not_computed(copied, speech):
    retensor(copied, lambda tensors: tensors["encoder.encoders.1.norm_ff.weight"].fill_(3e38))
    assert np.isfinite(of(copied, speech, layer="1")[0]).all()
    with pytest.raises(ValueError, match="wenet gives NaN or infinite values"):
        of(copied, speech)


def test_bf16_is_close(folder, speech):
    [exact], [rough] = of(folder, speech), of(folder, speech, precision="bf16")
    assert 0 < np.linalg.norm(exact - rough) / np.linalg.norm(exact) < 0.02


def test_the_identity_is_in_weights_and_settings_and_not_in_the_place(folder, copied):
    def spec(place: Path, **settings: Any) -> Spec:
        return Spec.of(WeNet(weights=str(place), **settings))

    here = spec(folder)
    assert spec(copied).identity == here.identity == spec(copied / "final.pt").identity
    assert spec(folder, chunk=4).differs(here) == {"chunk": (4, 0)}  # of which 24 and 2.88 s are whole numbers
    assert spec(folder, tail=160).differs(here) == {"tail": (160, 0)}
    (copied / "global_cmvn").unlink()  # the weights have what it says
    assert spec(copied).identity == here.identity
    retensor(copied, lambda tensors: tensors["encoder.after_norm.bias"].add_(1))
    assert spec(copied).differs(here).keys() == {"weights"}


def test_what_the_yaml_says_of_the_architecture_is_in_the_identity(copied):
    before = Spec.of(WeNet(weights=str(copied)))
    set_conf(copied, causal=False, attention_heads=2, dropout_rate=0.3)
    assert Spec.of(WeNet(weights=str(copied))).differs(before).keys() == {"causal", "attention_heads"}


def test_both_styles_of_the_yaml_say_the_same(folder, tmp_path):
    new = wenet_folder(tmp_path, style="new")
    assert Spec.of(WeNet(weights=str(new))).identity == Spec.of(WeNet(weights=str(folder))).identity


def test_statistics_come_from_the_weights_from_json_or_from_kaldis_text(folder, tmp_path, speech):
    [expected] = of(folder, speech)
    digests = {WeNet(weights=str(folder)).weights_digest}
    for kind in ("json", "kaldi"):
        for style in ("old", "new"):
            other = wenet_folder(tmp_path / kind / style, statistics=kind, style=style)
            np.testing.assert_allclose(of(other, speech)[0], expected, rtol=0, atol=2e-5 * np.abs(expected).max())
            digests.add(WeNet(weights=str(other)).weights_digest)
    assert len(digests) == 3  # taken from a file of their own, the statistics are part of what made the numbers


def test_a_model_trained_without_statistics_goes_without(tmp_path, speech):
    wenet_folder(tmp_path, statistics="json")
    edit(tmp_path, lambda record: record.update(cmvn_file=None))
    (tmp_path / "global_cmvn").unlink()
    assert np.isfinite(of(tmp_path, speech)[0]).all()


def test_a_static_chunk_is_heeded_and_another_refused(copied, speech):
    set_conf(copied, use_dynamic_chunk=True)
    [expected] = of(copied, speech, chunk=6)
    set_conf(copied, use_dynamic_chunk=False, static_chunk_size=6)
    np.testing.assert_array_equal(of(copied, speech)[0], expected)
    with pytest.raises(ValueError, match=r"chunk=8: .*use_dynamic_chunk: false and static_chunk_size: 6.*chunk=6"):
        of(copied, speech, chunk=8)


# Refusals


def test_a_folder_that_lacks_a_file_says_which(copied, speech):
    (copied / "final.pt").rename(copied / "avg_10.pt")
    assert of(copied / "avg_10.pt", speech)[0].shape[1] == 32
    with pytest.raises(FileNotFoundError, match=r"has no final\.pt; expected a folder with final\.pt, train\.yaml"):
        of(copied, speech)
    (copied / "train.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"avg_10\.pt has no train\.yaml beside it; expected a folder with"):
        of(copied / "avg_10.pt", speech)


def test_statistics_that_are_nowhere_are_missed(tmp_path, speech):
    (wenet_folder(tmp_path, statistics="json") / "global_cmvn").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no encoder\.global_cmvn\.mean, and .*/global_cmvn does not"):
        of(tmp_path, speech)


@pytest.mark.parametrize("text", ["", "[ 1 2 3 0 ]", '{"mean_stat": [1], "var_stat": [1]}', "{", "\x00BFM"])
def test_statistics_of_another_form_are_refused(text, tmp_path, speech):
    (wenet_folder(tmp_path, statistics="json") / "global_cmvn").write_text(text)
    with pytest.raises(ValueError, match=r"global_cmvn: (expected statistics as JSON with mean_stat|has . sums)"):
        of(tmp_path, speech)


@pytest.mark.parametrize(("field", "value", "supported"), [
    ("input_layer", "conv1d2", '"conv2d", "conv2d6", "conv2d8"'), ("pos_enc_layer_type", "rope_pos", '"rel_pos"'),
    ("selfattention_layer_type", "shaw_rel_selfattn", '"rel_selfattn"'), ("activation_type", "hardtanh", '"swish"'),
    ("cnn_module_norm", "rms_norm", '"batch_norm", "layer_norm"'), ("normalize_before", False, "true"),
    ("use_cnn_module", False, "true"), ("norm_eps", "1e-6", "1e-05"), ("key_bias", False, "true"),
    ("mlp_type", "moe", '"position_wise_feed_forward"'),
])
def test_what_is_not_supported_is_named_with_what_is(field, value, supported, copied):
    set_conf(copied, **{field: value})
    with pytest.raises(ValueError, match=rf"yaml: encoder_conf\.{field}: .* is not supported; supported: {supported}"):
        WeNet(weights=str(copied)).architecture()


@pytest.mark.parametrize(("change", "message"), [
    (lambda r: r.update(encoder="squeezeformer"), r'encoder: squeezeformer is not supported; supported: "conformer"'),
    (lambda r: r["encoder_conf"].update(stride_kernel=3), r"encoder_conf\.stride_kernel: 3 is not known here; known"),
    (lambda r: r["encoder_conf"].update(num_blocks="12"), r"encoder_conf\.num_blocks: 12: expected a whole number"),
    (lambda r: r["encoder_conf"].update(attention_heads=5), "output_size: 32 is no multiple of attention_heads: 5"),
    (lambda r: r["encoder_conf"].update(causal=False, cnn_module_kernel=8), "cnn_module_kernel: 8 must be odd"),
    (lambda r: r["encoder_conf"].update(selfattention_layer_type="selfattn"), "rel_pos needs selfattention_layer_type"),
    (lambda r: r["dataset_conf"].update(feats_type="log_mel_spectrogram"), r"dataset_conf\.feats_type: log_mel"),
    (lambda r: r["dataset_conf"]["resample_conf"].update(resample_rate=8000), r"resample_rate: 8000 is not supported"),
    (lambda r: r["dataset_conf"]["fbank_conf"].update(frame_shift=12), r"fbank_conf\.frame_shift: 12 is not supp"),
    (lambda r: r.update(input_dim=83), "input_dim: 83 is not supported; supported: 80"),
    (lambda r: r["dataset_conf"]["fbank_conf"].update(num_mel_bins=6), "num_mel_bins: 6 are too few for input_"),
    (lambda r: r.pop("encoder_conf"), r"is no train\.yaml of WeNet: it has no encoder_conf"),
    (lambda r: r.update(encoder_conf=[1]), r"encoder_conf: expected fields, found \[1\]"),
])
def test_a_yaml_that_does_not_fit_is_refused(change, message, copied):
    edit(copied, lambda record: record.pop("input_dim"))
    edit(copied, change)
    with pytest.raises(ValueError, match=r"train\.yaml.*" + message):
        WeNet(weights=str(copied)).architecture()


@pytest.mark.parametrize("text", ["a: [", "just words", "!!python/object/apply:os.system ['false']"])
def test_what_is_no_yaml_or_would_run_code_is_refused(text, copied):
    (copied / "train.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"train\.yaml is (not YAML|no train\.yaml of WeNet)"):
        WeNet(weights=str(copied)).architecture()


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("encoder.encoders.1.norm_mha.bias"), r"1 missing \(encoder\.encoders\.1\.norm_mha\.bias\)"),
    (lambda t: t.pop("encoder.encoders.1.self_attn.linear_pos.weight"), r"1 missing \(encoder\.encoders\.1\.self_attn"),
    (lambda t: t.update({"encoder.extra": torch.zeros(2)}), r"1 unexpected \(encoder\.extra\)"),
    (lambda t: t.update({"predictor.bias": torch.zeros(2)}), r"1 unexpected \(predictor\.bias\)"),
    (lambda t: t.update({"encoder.after_norm.bias": torch.zeros(3)}), r"after_norm\.bias \(3,\) instead of \(32,\)"),
    (lambda t: t.update({"epoch": 7}), r"is no final\.pt of WeNet, which holds tensors by their names"),
])
def test_tensors_that_do_not_fit_are_named(change, message, copied, speech):
    retensor(copied, change)
    with pytest.raises(ValueError, match=message):
        of(copied, speech)


def test_a_truncated_or_wrong_final_pt_is_refused(copied, speech):
    whole = (copied / "final.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"a letter to the editor"):
        (copied / "final.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"final\.pt cannot be read as a checkpoint"):
            of(copied, speech)


def test_no_weights_named_says_which_files_to_put_where(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEATSTORE_WEIGHTS", raising=False)
    with pytest.raises(FileNotFoundError, match=r"(?s)wenet: no weights .*final\.pt, train\.yaml and global_cmvn"):
        _ = parse("wenet:amphion")["wenet"].path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on importing its compiler
def test_compiled_it_gives_the_same(folder, speech):
    [plain], [compiled] = of(folder, speech), of(folder, speech, compile=True)
    np.testing.assert_allclose(compiled, plain, rtol=0, atol=2e-5 * np.abs(plain).max())
