"""ContentVec, HuBERT, wav2vec2 and WavLM against fairseq's numbers and transformers' own models."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from checkpoints import fairseq_pt, hubert_folder, speech_model

from featstore import Spec
from featstore_extractors import checkpoint, parse
from featstore_extractors.hubert import ContentVec, Hubert, Network, SelfSupervised, Wav2Vec2, WavLM
from featstore_extractors.imports import without_broken_torchaudio

torch = pytest.importorskip("torch", reason="encoders need torch: featstore[encoders]")
without_broken_torchaudio()
pytest.importorskip("transformers", reason="encoders need transformers: featstore[encoders]")

KINDS: dict[str, type[SelfSupervised]] = {"hubert": Hubert, "wav2vec2": Wav2Vec2, "wavlm": WavLM}
ONE_FRAME = 400

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def speech(shared: Path) -> np.ndarray:
    """3.1 s of read speech at 16 kHz."""
    return soundfile.read(shared / "audio" / "arctic_slt" / "arctic_a0009.flac", dtype="float32")[0]


@pytest.fixture(scope="module")
def expected(parity: Path) -> dict[str, Any]:
    """What fairseq gives for two utterances, each alone, and their waveforms."""
    folder = parity / "encoders"
    wave = soundfile.read(folder / "speechlike16k.wav", dtype="float32")[0]
    with np.load(folder / "contentvec" / "contentvec_tiny_expected.npz") as arrays:
        found: dict[str, Any] = dict(arrays)
    return found | {"waves": [wave[:n] for n in found["lens"]],
                    "weights": str(folder / "contentvec" / "contentvec_tiny_legacy.pt")}


def features(kind: type[SelfSupervised], weights: Path | str, waves: list[np.ndarray], **settings: Any) -> list[Any]:
    return kind(weights=str(weights), **{"dtype": "float32"} | settings).load("cpu")(waves)


def of_transformers(model: Any, wave: np.ndarray, normalise: bool = False) -> list[np.ndarray]:
    """Every hidden state of transformers' own forward, and last of all its output."""
    if normalise:
        wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
    with torch.inference_mode():
        found = model(torch.from_numpy(wave[None]), output_hidden_states=True)
    return [state[0].numpy() for state in (*found.hidden_states, found.last_hidden_state)]


def furthest(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, of the largest value."""
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


# Parity

@pytest.mark.parametrize(("layer", "projection"), [("1", False), ("2", False), ("1", True), ("2", True)])
def test_contentvec_of_a_legacy_file_is_fairseqs_alone_and_in_a_batch(expected, layer, projection):
    contentvec = ContentVec(weights=expected["weights"], layer=layer, projection=projection, dtype="float32")
    run = contentvec.load("cpu")
    truth = [expected[f"utt{i}_layer{layer}{'_proj' if projection else ''}"] for i in range(2)]
    assert contentvec.dim == truth[0].shape[1]
    for found in ([run([wave])[0] for wave in expected["waves"]], run(expected["waves"])):
        for mine, theirs in zip(found, truth, strict=True):
            assert np.abs(mine - theirs).max() <= 2e-5


def test_convolutions_are_fairseqs_alone_and_in_a_batch(expected):
    contentvec = ContentVec(weights=expected["weights"])
    waves = [torch.from_numpy(wave) for wave in expected["waves"]]
    with torch.inference_mode():
        network = contentvec.network("cpu")
        batch, alone = network.convolved(waves), [network.convolved([wave])[0] for wave in waves]
    for i in range(2):
        truth = expected[f"utt{i}_conv"]
        assert np.abs(alone[i].numpy() - truth).max() <= 2e-5
        assert np.abs(batch[i, : len(truth)].numpy() - truth).max() <= 2e-5


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
@pytest.mark.parametrize("family", KINDS)
def test_every_layer_is_that_of_transformers(tmp_path, speech, family, large):
    folder = hubert_folder(tmp_path, family=family, large=large, normalise=large)
    states = of_transformers(speech_model(family, large=large), speech, normalise=large)
    assert len(states) == 5
    for layer in range(4):
        mine = features(KINDS[family], folder, [speech], layer=str(layer))[0]
        assert furthest(mine, states[layer]) <= 1e-5, layer
    assert furthest(features(KINDS[family], folder, [speech])[0], states[4]) <= 1e-5
    assert (np.abs(states[3] - states[4]).max() > 0.1) == large  # only there does a norm stand behind the last layer


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_models_of_full_size_are_those_of_transformers(tmp_path, speech, family):
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
             "conv_dim": [512] * 7, "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16}
    folder = hubert_folder(tmp_path, family=family, **sizes)
    states = of_transformers(speech_model(family, **sizes), speech)
    for layer in (9, 12):
        assert furthest(features(KINDS[family], folder, [speech], layer=str(layer))[0], states[layer]) <= 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # fairseq uses what torch has deprecated
@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
def test_fairseq_itself_agrees(tmp_path, speech, large):
    """The published implementation on the same file; `pip install 'featstore[fairseq]'` (a C++ compiler needed)."""
    pytest.importorskip("fairseq", reason="fairseq-fixed is not installed", exc_type=ImportError)
    from fairseq.models.hubert.hubert import HubertConfig, HubertModel
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig

    file = fairseq_pt(tmp_path, large=large, projection=16)
    found, told = checkpoint.read(file), speech_model(large=large).config
    model = HubertModel(HubertConfig(
        label_rate=50, extractor_mode="layer_norm" if large else "default", encoder_layers=told.num_hidden_layers,
        encoder_embed_dim=told.hidden_size, encoder_ffn_embed_dim=told.intermediate_size, final_dim=16,
        encoder_attention_heads=told.num_attention_heads, layer_norm_first=large, conv_bias=large,
        conv_feature_layers=found["cfg"]["model"]["conv_feature_layers"], conv_pos=told.num_conv_pos_embeddings,
        conv_pos_groups=told.num_conv_pos_embedding_groups), HubertPretrainingConfig(), [range(12)])
    lacking = model.load_state_dict(found["model"], strict=False)
    assert lacking.missing_keys == ["label_embs_concat"] and not lacking.unexpected_keys
    model.eval()
    for layer in (1, 2, 3):
        with torch.inference_mode():
            theirs = model.extract_features(torch.from_numpy(speech[None]), padding_mask=None, mask=False,
                                            output_layer=layer)[0][0].numpy()
        assert np.abs(features(Hubert, file, [speech], layer=str(layer))[0] - theirs).max() <= 2e-5
        assert np.abs(features(Hubert, file, [speech[:9000], speech], layer=str(layer))[1] - theirs).max() <= 2e-5


# Layouts of the same weights

@pytest.mark.parametrize("options", [{"file": "bin"}, {"file": "sharded"}, {"old_names": True}, {"prefix": "hubert."}])
def test_every_layout_of_a_folder_gives_the_same_bytes(tmp_path, speech, options):
    plain = hubert_folder(tmp_path / "plain", projection=5)
    other = hubert_folder(tmp_path / "other", projection=5, **options)
    for settings in ({}, {"projection": True}):
        assert (features(ContentVec, plain, [speech], **settings)[0].tobytes()
                == features(ContentVec, other, [speech], **settings)[0].tobytes())


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
@pytest.mark.parametrize("family", KINDS)
def test_a_file_of_fairseqs_and_a_folder_of_transformers_give_the_same_bytes(tmp_path, speech, family, large):
    folder = hubert_folder(tmp_path / "folder", family=family, large=large, normalise=False)
    file = fairseq_pt(tmp_path / "file", family=family, large=large, normalise=False)
    assert (features(KINDS[family], folder, [speech])[0].tobytes()
            == features(KINDS[family], file, [speech])[0].tobytes())


def test_a_fairseq_file_without_readable_settings_is_read_by_its_shapes(tmp_path, speech):
    wide = {"hidden_size": 128, "num_attention_heads": 2}  # heads of 64
    told, untold = (fairseq_pt(tmp_path / f"told-{where}", settings=where, **wide) for where in ("cfg", ""))
    assert features(Hubert, told, [speech])[0].tobytes() == features(Hubert, untold, [speech])[0].tobytes()
    large = fairseq_pt(tmp_path / "large", large=True, settings="", **wide)
    assert Hubert(weights=str(large)).recorded["pre_norm"] is True
    assert Hubert(weights=str(large)).recorded["normalise"] == "fairseq"


def test_a_fairseq_file_from_before_cfg_tells_it_in_args(tmp_path, speech):
    told, args = (fairseq_pt(tmp_path / where, family="wav2vec2", normalise=True, settings=where)
                  for where in ("cfg", "args"))
    assert Wav2Vec2(weights=str(args)).recorded == Wav2Vec2(weights=str(told)).recorded
    assert features(Wav2Vec2, args, [speech])[0].tobytes() == features(Wav2Vec2, told, [speech])[0].tobytes()


def test_settings_of_omegaconf_are_read_without_it(tmp_path):
    """As fairseq wrote them from 2021 on."""
    omegaconf = pytest.importorskip("omegaconf", reason="comes with fairseq-fixed")
    file = fairseq_pt(tmp_path, family="wav2vec2", normalise=True)  # neither its heads nor this show in the tensors
    plain = Wav2Vec2(weights=str(file)).recorded
    found, other = checkpoint.read(file), tmp_path / "other.pt"
    torch.save({**found, "cfg": omegaconf.OmegaConf.create(found["cfg"])}, other)
    assert isinstance(checkpoint.read(other)["cfg"], checkpoint.Inert)
    assert Wav2Vec2(weights=str(other)).recorded == plain


@pytest.mark.parametrize(("kind", "head"), [
    (Wav2Vec2, {"lm_head.weight": 4, "lm_head.bias": 4}),
    (Wav2Vec2, {"quantizer.codevectors": 4, "quantizer.weight_proj.weight": 4, "project_q.bias": 4}),
    (WavLM, {"projector.weight": 4, "tdnn.0.kernel.weight": 4, "feature_extractor.weight": 4, "objective.weight": 4,
             "classifier.weight": 4, "layer_weights": 4}),
])
def test_heads_on_the_encoder_are_passed_over(tmp_path, speech, kind, head):
    plain = hubert_folder(tmp_path / "plain", family=kind.FAMILY)
    headed = hubert_folder(tmp_path / "headed", family=kind.FAMILY, prefix=f"{kind.FAMILY}.",
                           extra={name: torch.ones(size) for name, size in head.items()})
    assert features(kind, plain, [speech])[0].tobytes() == features(kind, headed, [speech])[0].tobytes()


# Batches

@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
@pytest.mark.parametrize("family", KINDS)
def test_rows_do_not_depend_on_their_batch_mates(tmp_path, speech, family, large):
    run = KINDS[family](weights=str(hubert_folder(tmp_path, family=family, large=large, normalise=large)),
                        dtype="float32").load("cpu")
    waves = [speech, speech[: int(0.62 * len(speech))], 3 * speech[4000 : 4000 + ONE_FRAME], speech[::-1].copy(),
             np.zeros(8000, np.float32)]
    for mine, wave in zip(run(waves), waves, strict=True):
        alone = run([wave])[0]
        assert len(mine) == (len(wave) - 400) // 320 + 1
        assert furthest(mine, alone) <= 2e-5


def test_a_batch_norm_before_the_positions_moves_no_padding(tmp_path, speech):
    """Where HuBERT has one instead of weight norm (conv_pos_batch_norm)."""
    options = {"conv_pos_batch_norm": True}
    run = Hubert(weights=str(hubert_folder(tmp_path, **options)), dtype="float32").load("cpu")
    found = run([speech, speech[:20000]])
    assert furthest(found[0], of_transformers(speech_model(**options), speech)[-1]) <= 1e-5
    assert furthest(found[1], run([speech[:20000]])[0]) <= 2e-5


@pytest.mark.parametrize("more", [0, 60], ids=["of samples", "of frames"])
def test_rows_of_one_length_do_not_depend_on_each_other(tmp_path, speech, more):
    run = Hubert(weights=str(hubert_folder(tmp_path)), dtype="float32").load("cpu")
    pair = [speech[:16000], speech[16000 : 32000 + more]]
    for mine, wave in zip(run(pair), pair, strict=True):
        assert furthest(mine, run([wave])[0]) <= 2e-5


@pytest.mark.parametrize(("precision", "within"), [("bf16", 0.1), ("fp16", 0.02)])
@pytest.mark.parametrize("family", KINDS)
def test_half_precision_is_near(tmp_path, speech, family, precision, within):
    folder = hubert_folder(tmp_path, family=family, large=True)
    waves = [speech, speech[:20000]]
    for mine, full in zip(features(KINDS[family], folder, waves, precision=precision),
                          features(KINDS[family], folder, waves), strict=True):
        assert 0 < furthest(mine, full) <= within


def test_weights_are_halved_once_and_not_for_every_batch(tmp_path, speech):
    """Which changes nothing: it is what autocast does to the weights of a product."""
    folder = hubert_folder(tmp_path)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        theirs = speech_model()(torch.from_numpy(speech[None])).last_hidden_state[0].float().numpy()
    assert furthest(features(Hubert, folder, [speech], precision="bf16")[0], theirs) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
@pytest.mark.filterwarnings("ignore")  # torch warns of its own parts while it compiles
def test_compiled_layers_give_the_same(tmp_path, speech, family):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    folder = hubert_folder(tmp_path, family=family, large=True)
    waves = [speech[:24000], speech[:16000]]
    for mine, plain in zip(features(KINDS[family], folder, waves, compile=True), features(KINDS[family], folder, waves),
                           strict=True):
        assert furthest(mine, plain) <= 1e-5


# Layers

@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, frozenset[int]]]:
    """(rows, layers wanted) of each forward pass."""
    seen = []
    forward = Network.hidden

    def counting(network: Network, waves: list[Any], wanted: frozenset[int]) -> Any:
        seen.append((len(waves), wanted))
        return forward(network, waves, wanted)

    monkeypatch.setattr(Network, "hidden", counting)
    return seen


def test_several_layers_and_projections_are_one_pass(tmp_path, speech, passes):
    folder = hubert_folder(tmp_path, projection=5)
    asked = [f"{name}=contentvec,weights={folder},dtype=float32{more}" for name, more in {
        "a": ",layer=1", "b": ",layer=3", "c": ",layer=2,projection=true", "d": "",
        "e": ",layer=1..3,mix=mean", "f": ",layer=1..3,mix=concat", "g": ",layer=1..3,mix=mean,projection=yes"}.items()]
    extractors = list(parse(*asked).values())
    assert len({extractor.together for extractor in extractors}) == 1
    found = ContentVec.load_together(extractors, "cpu")([speech, speech[:9000]])
    assert passes == [(2, {1, 2, 3})]
    alone = [extractor.load("cpu")([speech, speech[:9000]]) for extractor in extractors]
    for mine, theirs in zip(found, alone, strict=True):
        assert [array.tobytes() for array in mine] == [array.tobytes() for array in theirs]


def test_mixes_are_those_of_the_single_layers(tmp_path, speech):
    folder = hubert_folder(tmp_path)
    single = [features(Hubert, folder, [speech], layer=str(layer))[0] for layer in (1, 2, 3)]
    mean, side = (features(Hubert, folder, [speech], layer="1..3", mix=mix)[0] for mix in ("mean", "concat"))
    np.testing.assert_allclose(mean, np.mean(single, axis=0), atol=1e-6)
    assert side.tobytes() == np.concatenate(single, axis=1).tobytes()


@pytest.mark.parametrize("family", KINDS)
def test_layers_beyond_the_last_wanted_are_not_computed(tmp_path, speech, family):
    """The last layer overflows, and the one before it gives numbers."""
    folder = hubert_folder(tmp_path, family=family, extra={
        "encoder.layers.2.feed_forward.output_dense.bias": torch.full((32,), 3e38)})
    kind = KINDS[family]
    assert np.isfinite(features(kind, folder, [speech], layer="2")[0]).all()
    with pytest.raises(ValueError, match=f"{kind.name} gives NaN or infinite values from .*; the weights are damaged"):
        features(kind, folder, [speech], layer="3")


def test_presets_are_the_three_conventions_of_contentvec():
    told = {name: (extractor.weights, extractor.layer, extractor.projection) for name in ContentVec.PRESETS
            for extractor in parse(f"contentvec:{name}").values()}
    hub = "lengyue233/content-vec-best"
    assert told == {"vec768l12": (hub, "12", False), "vec256l9": (hub, "9", True), "amphion": (hub, "12", True)}


@pytest.mark.parametrize(("request_", "hub"), [
    ("hubert:large", "facebook/hubert-large-ll60k"), ("hubert:base", "facebook/hubert-base-ls960"),
    ("wav2vec2:base", "facebook/wav2vec2-base"), ("wav2vec2:large", "facebook/wav2vec2-large-lv60"),
    ("wav2vec2:xlsr", "facebook/wav2vec2-large-xlsr-53"), ("wavlm:base", "microsoft/wavlm-base"),
    ("wavlm:base-plus", "microsoft/wavlm-base-plus"), ("wavlm:large", "microsoft/wavlm-large")])
def test_presets_name_their_hub_id(request_, hub):
    (extractor,) = parse(request_).values()
    assert (extractor.weights, extractor.layer) == (hub, "")


# Frames and waveforms

def test_frames_follow_the_convolutions(tmp_path):
    hubert = Hubert(weights=str(hubert_folder(tmp_path)))
    assert (hubert.frame_rate, hubert.centre_s, hubert.dim) == (50, Fraction(200, 16000), 32)
    assert [hubert.frames(n) for n in (0, 1, 399, 400, 719, 720, 16000)] == [0, 0, 0, 1, 1, 2, 49]
    assert [part * hubert.frame_rate / 16000 for part in hubert.window] == [1200, 150, 1500]


def test_a_frame_is_centred_where_it_says(tmp_path):
    """A click moves most of all the frame whose centre is nearest to it."""
    hubert = Hubert(weights=str(hubert_folder(tmp_path, large=True, normalise=False)))  # its norms see no other frame
    network = hubert.network("cpu")
    quiet = torch.zeros(16000)
    for frame in (10, 25):
        click = quiet.clone()
        click[int((hubert.centre_s + frame / hubert.frame_rate) * 16000)] = 1
        with torch.inference_mode():
            moved = (network.convolved([click]) - network.convolved([quiet]))[0].abs().sum(dim=1)
        assert int(moved.argmax()) == frame
        assert moved.nonzero().flatten().tolist() == [frame]  # 80 samples of each frame are its own, those mid-way


@pytest.mark.parametrize("samples", [1, 399])
def test_too_short_says_how_much_is_enough(tmp_path, samples):
    run = Hubert(weights=str(hubert_folder(tmp_path))).load("cpu")
    with pytest.raises(ValueError, match=f"too short: {samples} samples at 16000 Hz make no frame of hubert, 400 do"):
        run([np.zeros(16000, np.float32), np.zeros(samples, np.float32)])
    assert run([np.ones(400, np.float32)])[0].shape == (1, 32)


@pytest.mark.parametrize("normalise", [False, True])
def test_silence_has_features(tmp_path, normalise):
    for large in (False, True):
        folder = hubert_folder(tmp_path / str(large), large=large, normalise=normalise)
        assert np.isfinite(features(Hubert, folder, [np.zeros(16000, np.float32)])[0]).all()


@pytest.mark.parametrize(("large", "told", "normalise"), [
    (False, None, "none"), (True, None, "transformers"), (False, True, "transformers"), (True, False, "none")])
def test_a_waveform_is_normalised_where_the_checkpoint_says_so(tmp_path, speech, large, told, normalise):
    folder = hubert_folder(tmp_path, large=large, normalise=told)
    assert Hubert(weights=str(folder)).recorded["normalise"] == normalise
    truth = of_transformers(speech_model(large=large), speech, normalise == "transformers")[-1]
    assert furthest(features(Hubert, folder, [speech])[0], truth) <= 1e-5


def test_a_fairseq_task_says_whether_a_waveform_is_normalised(tmp_path, speech):
    file = fairseq_pt(tmp_path, large=True, normalise=True)
    assert Hubert(weights=str(file)).recorded["normalise"] == "fairseq"
    wave = torch.nn.functional.layer_norm(torch.from_numpy(speech), speech.shape).numpy()
    assert furthest(features(Hubert, file, [speech])[0], of_transformers(speech_model(large=True), wave)[-1]) <= 1e-5


def test_a_normalised_waveform_has_no_loudness_and_no_offset(tmp_path, speech):
    folder = hubert_folder(tmp_path, large=True, normalise=True)
    as_it_is, changed = (features(Hubert, folder, [wave])[0] for wave in (speech, 0.5 * speech + np.float32(0.1)))
    assert furthest(changed, as_it_is) <= 1e-3  # of the added 1e-7 and of rounding the offset


def test_contentvec_is_never_normalised(tmp_path, speech):
    folder = hubert_folder(tmp_path, normalise=True)
    assert ContentVec(weights=str(folder)).recorded["normalise"] == "none"
    assert furthest(features(ContentVec, folder, [speech])[0], of_transformers(speech_model(), speech)[-1]) <= 1e-5


# Identity

def test_the_identity_follows_weights_layer_and_projection_but_not_the_folder(tmp_path):
    folder = hubert_folder(tmp_path / "here", projection=5)
    first = Spec.of(ContentVec(weights=str(folder), layer="3"))
    assert first.dtype == "float16" and first.dim == 32 and first.weights.startswith("sha256:")
    assert Spec.of(ContentVec(weights=str(folder))).identity == first.identity  # layer 3 is the output
    for settings, differing in (({"layer": "2"}, {"layer"}), ({"projection": True}, {"projection", "dim"}),
                                ({"precision": "bf16"}, {"precision"})):
        assert Spec.of(ContentVec(weights=str(folder), **settings)).differs(first).keys() == differing
    moved = tmp_path / "there"
    shutil.move(folder, moved)
    assert Spec.of(ContentVec(weights=str(moved))).identity == first.identity
    assert Spec.of(ContentVec(weights=str(moved / "model.safetensors"))).identity == first.identity
    hubert_folder(moved, projection=5, seed=1)
    assert Spec.of(ContentVec(weights=str(moved))).differs(first).keys() == {"weights"}


def test_the_output_of_a_large_model_is_no_numbered_layer(tmp_path):
    folder = str(hubert_folder(tmp_path, large=True))
    output, last = (Spec.of(Wav2Vec2(weights=folder, layer=layer)) if layer is None else Spec.of(
        Hubert(weights=folder, layer=layer)) for layer in ("", "3"))
    assert (output.settings["layer"], output.dtype) == ("output", "float16")
    assert (last.settings["layer"], last.dtype) == (3, "float32")  # a stream that nothing bounds


@pytest.mark.parametrize("kind", [Hubert, Wav2Vec2, WavLM])
def test_a_numbered_layer_of_a_base_model_is_normalised_and_the_last_is_the_output(kind, tmp_path):
    folder = str(hubert_folder(tmp_path, family=kind.FAMILY))
    output, last, inner = (Spec.of(kind(weights=folder, layer=layer)) for layer in ("", "3", "2"))
    assert output == last
    assert (output.dtype, inner.dtype) == ("float16", "float16")


def test_a_checkpoint_that_is_replaced_is_looked_at_again(tmp_path):
    hubert = Hubert(weights=str(hubert_folder(tmp_path)))
    before = hubert.recorded
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(record | {"layer_norm_eps": 1e-3}))
    assert (before["epsilon"], hubert.recorded["epsilon"]) == (1e-5, 1e-3)


# Bad checkpoints

def test_a_missing_tensor_is_named(tmp_path):
    folder = hubert_folder(tmp_path, drop="layers.1.attention.k_proj.weight")
    with pytest.raises(ValueError, match=r"1 missing \(encoder\.layers\.1\.attention\.k_proj\.weight\)"):
        Hubert(weights=str(folder)).load("cpu")


def test_an_unexpected_tensor_is_named(tmp_path):
    folder = hubert_folder(tmp_path, extra={"encoder.layers.0.surprise.weight": torch.ones(3)})
    with pytest.raises(ValueError, match=r"1 unexpected \(encoder\.layers\.0\.surprise\.weight\)"):
        Hubert(weights=str(folder)).load("cpu")


def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path):
    name = "encoder.layers.1.feed_forward.output_dense.bias"
    folder = hubert_folder(tmp_path, extra={name: torch.full((32,), torch.nan)})
    with pytest.raises(ValueError, match=rf"damaged: NaN or infinity in 1 of \d+ tensors \({name}\)"):
        Hubert(weights=str(folder)).load("cpu")


def test_a_configuration_of_another_size_is_told(tmp_path):
    folder = hubert_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"intermediate_dense\.weight \(48, 32\) instead of \(64, 32\)"):
        Hubert(weights=str(folder)).load("cpu")


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_size": "32"}, "config.json: hidden_size is '32': expected a value such as 768"),
    ({"layer_norm_eps": None}, "config.json: layer_norm_eps is None: expected a value such as 1e-05"),
    ({"conv_stride": 5}, "config.json: conv_stride is 5: expected a value such as"),
    ({"conv_kernel": ["a"] * 7}, "config.json: conv_kernel is .*: expected a value such as"),
    ({"hidden_act": "smooth"}, "transformers makes no hubert model of what is said of it .*'smooth'"),
    ({"num_attention_heads": 5}, "transformers makes no hubert model of what is said of it .*divisible"),
])
def test_a_configuration_that_makes_no_sense_is_refused_with_the_file(tmp_path, change, message):
    folder = hubert_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        Hubert(weights=str(folder)).load("cpu")


def test_a_model_of_another_kind_is_refused_by_its_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "whisper", "d_model": 64}))
    with pytest.raises(ValueError, match=r"contentvec: .*\.json is of a model of type 'whisper'; expected 'hubert'"):
        ContentVec(weights=str(tmp_path)).load("cpu")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of a model of type 'wav2vec2'; expected 'hubert'"):
        Hubert(weights=str(fairseq_pt(tmp_path, family="wav2vec2"))).load("cpu")


@pytest.mark.parametrize(("content", "message"), [
    ({"dims": {}, "model_state_dict": {}}, "no fairseq checkpoint: expected model and cfg in it, found dims, m"),
    ({"model": {"encoder.conv1.weight": 3}}, "has no tensor 'feature_extractor.conv_layers.0.conv.weight': expected a"),
])
def test_a_file_of_something_else_is_refused_with_what_is_in_it(tmp_path, content, message):
    path = tmp_path / "other.pt"
    if "model" in content:
        content = {"model": {name: torch.ones(size) for name, size in content["model"].items()}}
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        ContentVec(weights=str(path)).load("cpu")


def test_a_folder_without_a_configuration_says_what_to_give(tmp_path):
    (hubert_folder(tmp_path) / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json, but model\.safetensors; .*or name a fairseq"):
        Hubert(weights=str(tmp_path)).load("cpu")


def test_a_projection_that_is_not_there_is_refused_before_any_work(tmp_path):
    folder = hubert_folder(tmp_path)
    with pytest.raises(ValueError, match=r"has no projection \(final_proj\.weight\): leave out projection=true"):
        _ = ContentVec(weights=str(folder), projection=True).dim


def test_a_projection_takes_one_layer():
    with pytest.raises(ValueError, match="projection=true takes one layer: ask for a single one or for mix=mean"):
        ContentVec(layer="9..12", mix="concat", projection=True)


def test_strides_that_do_not_fit_are_refused(tmp_path):
    folder = hubert_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"conv_stride": [5, 2, 2]}))
    with pytest.raises(ValueError, match=r"7 of conv_dim, 7 of conv_kernel, 3 of conv_stride: expected one per layer"):
        Hubert(weights=str(folder)).load("cpu")
