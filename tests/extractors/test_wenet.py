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
    encoder = WeNet(weights=str(reference["folder"])).network("cpu")
    for number, wave in enumerate(reference["waves"]):
        ours = filter_bank(encoder, np.pad(wave, (0, 160)))
        np.testing.assert_allclose(ours, reference[f"fbank_utt{number}"], rtol=0, atol=2e-5)  # README: 3e-4
    np.testing.assert_allclose(filter_bank(encoder, reference["waves"][0]), reference["fbank_utt0_nopad160"],
                               rtol=0, atol=2e-5)


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
