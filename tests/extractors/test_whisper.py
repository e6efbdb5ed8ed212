"""Whisper's encoder against openai-whisper and transformers; short context, long recordings, and wrong files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import whisper_folder, whisper_pt

import featstore as fs
from featstore import Spec
from featstore.work import Cutter
from featstore_extractors import parse
from featstore_extractors.imports import without_broken_torchaudio
from featstore_extractors.whisper import Whisper, filters, log_mel

torch = pytest.importorskip("torch", reason="encoders need torch: featstore[encoders]")
without_broken_torchaudio()
transformers = pytest.importorskip("transformers", reason="encoders need transformers: featstore[encoders]")
soundfile = pytest.importorskip("soundfile")

CLOSE = 2e-5  # of the largest number: what batch mates may change

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 channels, 3 layers."""
    return whisper_folder(tmp_path_factory.mktemp("whisper"), layers=3)


@pytest.fixture(scope="module")
def song(shared: Path) -> np.ndarray:
    """A minute and a half of a choir's alto, 16 kHz."""
    wave, rate = soundfile.read(shared / "audio" / "csd_alto1" / "nino_dios.flac", dtype="float32")
    assert rate == 16000
    return wave[: 90 * rate]


def encode(weights: Path, waves: list[np.ndarray], **settings: Any) -> list[np.ndarray]:
    return Whisper(weights=str(weights), **{"dtype": "float32", **settings}).load("cpu")(waves)


def mel(waves: list[np.ndarray], frames: int, mels: int = 80) -> np.ndarray:
    return log_mel([torch.from_numpy(wave) for wave in waves], filters(mels), frames).numpy()


def stock(weights: Path, wave: np.ndarray, attention: str = "sdpa") -> list[np.ndarray]:
    """Every layer of the first ceil(n / 320) frames, as transformers computes them."""
    model = transformers.WhisperModel.from_pretrained(weights, attn_implementation=attention).encoder.eval()
    heard = transformers.WhisperFeatureExtractor(feature_size=model.num_mel_bins)(
        wave, sampling_rate=16000, return_tensors="pt").input_features
    with torch.inference_mode():
        layers = model(heard, output_hidden_states=True).hidden_states
    return [layer[0, : math.ceil(len(wave) / 320)].numpy() for layer in layers]


def calls(network: Any) -> list[str]:
    """The modules of the layers as they will be called, in order."""
    seen: list[str] = []
    for name, module in network.encoder.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    return seen


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a part of the largest number."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# openai-whisper

@pytest.fixture(scope="module")
def openai(parity: Path) -> dict[str, Any]:
    """Numbers of openai-whisper for two utterances, the path of its weights, and the utterances."""
    place = parity / "encoders" / "whisper_mel80"
    if not place.exists():
        pytest.skip(f"no {place}")
    wave, _ = soundfile.read(place.parent / "speechlike16k.wav", dtype="float32")
    with np.load(place / "expected.npz") as numbers:
        found = {name: numbers[name] for name in numbers}
    return {**found, "weights": place / "tiny.pt", "waves": [wave[:length] for length in found["lens"]]}


@pytest.mark.parametrize("rows", [[0], [1], [0, 1]])
def test_log_mel_equals_openai_whisper(openai: dict[str, Any], rows: list[int]) -> None:
    found = mel([openai["waves"][row] for row in rows], 400)
    for row, frames in zip(rows, found, strict=True):
        expected = openai[f"mel30_utt{row}"]
        np.testing.assert_allclose(frames[:, : expected.shape[1]], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [[0], [1], [0, 1]])
@pytest.mark.parametrize(("context", "numbers"), [("30s", "enc30"), ("short", "encshort")])
def test_frames_equal_openai_whisper(openai: dict[str, Any], rows: list[int], context: str, numbers: str) -> None:
    found = encode(openai["weights"], [openai["waves"][row] for row in rows], context=context)
    for row, frames in zip(rows, found, strict=True):
        np.testing.assert_allclose(frames, openai[f"{numbers}_utt{row}"], rtol=0, atol=1e-4)


# transformers

@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_equals_that_of_transformers(song: np.ndarray, mels: int) -> None:
    theirs = transformers.WhisperFeatureExtractor(feature_size=mels)
    for wave in (song[: 30 * 16000], song[16000:100_000], song[:1]):
        expected = theirs(wave, sampling_rate=16000, return_tensors="np").input_features[0]
        np.testing.assert_allclose(mel([wave], 3000, mels)[0], expected, rtol=0, atol=1e-5)


def test_every_layer_equals_hidden_states_of_transformers(folder: Path, song: np.ndarray) -> None:
    wave = song[:50_001]
    expected = stock(folder, wave)
    for number in range(4):
        assert apart(encode(folder, [wave], layer=str(number))[0], expected[number]) < 1e-5
    assert apart(encode(folder, [wave])[0], expected[-1]) < 1e-5


def test_a_true_tiny_whisper_of_128_mels_equals_transformers(song: np.ndarray, tmp_path: Path) -> None:
    weights = whisper_folder(tmp_path, dim=384, layers=4, heads=6, mels=128)
    for wave in (song[:80_000], song[-478_000:]):  # the second is heard to the very end of the 30 s
        assert apart(encode(weights, [wave])[0], stock(weights, wave)[-1]) < 1e-5


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 3e-3)])
def test_half_precision_is_close(folder: Path, song: np.ndarray, precision: str, tolerance: float) -> None:
    whole, half = encode(folder, [song[:80_000]])[0], encode(folder, [song[:80_000]], precision=precision)[0]
    assert 1e-4 < np.linalg.norm(half - whole) / np.linalg.norm(whole) < tolerance  # relative, of all frames together


@pytest.mark.gpu
@pytest.mark.parametrize("context", ["30s", "short"])
def test_a_gpu_gives_what_the_cpu_gives(folder: Path, song: np.ndarray, context: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    whisper = Whisper(weights=str(folder), context=context, dtype="float32")
    waves = [song[:1], song[20_000:68_000], song[5000:155_000]]
    for found, expected in zip(whisper.load("cuda")(waves), whisper.load("cpu")(waves), strict=True):
        assert apart(found, expected) < 1e-4  # the logarithm of what is nearly nothing differs by as much


# files

def test_a_request_names_a_size_or_weights_of_ones_own(folder: Path) -> None:
    asked = parse("whisper:large-v3,layer=20", f"near=whisper,weights={folder},layer=2,context=short")
    assert asked["whisper"] == Whisper(weights="openai/whisper-large-v3", layer="20")
    assert asked["near"] == Whisper(weights=str(folder), layer="2", context="short")
    assert asked["near"].dim == 32 and asked["near"].frame_rate == 50 and asked["near"].centre_s == 0


def test_openai_file_and_transformers_folder_of_the_same_weights_give_the_same_bytes(song: np.ndarray,
                                                                                     tmp_path: Path) -> None:
    ours, theirs = whisper_folder(tmp_path / "folder"), whisper_pt(tmp_path / "openai")
    for settings in ({}, {"layer": "1"}, {"context": "short"}):
        first, second = (encode(path, [song[:48_000]], **settings)[0] for path in (ours, theirs))
        assert first.tobytes() == second.tobytes()
    specs = [Spec.of(Whisper(weights=str(path))) for path in (ours, theirs)]
    assert specs[0].differs(specs[1]).keys() == {"weights"}


def test_shards_hold_the_same_weights(folder: Path, song: np.ndarray, tmp_path: Path) -> None:
    shards = whisper_folder(tmp_path, layers=3, shard="40KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert encode(shards, [song[:8000]])[0].tobytes() == encode(folder, [song[:8000]])[0].tobytes()


def test_half_precision_weights_are_computed_with_in_full(folder: Path, song: np.ndarray, tmp_path: Path) -> None:
    half = whisper_folder(tmp_path, layers=3, half=True)
    network = Whisper(weights=str(half)).network("cpu")
    assert {tensor.dtype for tensor in network.encoder.state_dict().values()} == {torch.float32}
    assert 0 < apart(encode(half, [song[:48_000]])[0], encode(folder, [song[:48_000]])[0]) < 1e-2


def test_memory_is_that_of_the_encoder(folder: Path) -> None:
    whisper = Whisper(weights=str(folder))
    tensors = whisper.network("cpu").encoder.state_dict().values()
    assert whisper.weights_bytes == sum(tensor.nbytes for tensor in tensors)


# layers

def test_layers_beyond_the_last_wanted_are_not_run(folder: Path, song: np.ndarray) -> None:
    network = Whisper(weights=str(folder)).network("cpu")
    seen = calls(network)
    wave = [torch.from_numpy(song[:16000])]
    for wanted, run in (({0}, []), ({1}, [0]), ({0, 2}, [0, 1]), ({3}, [0, 1, 2])):
        seen.clear()
        hidden, lengths = network.hidden(wave, frozenset(wanted))
        assert [name for name in seen if name.endswith("fc2")] == [f"layers.{number}.fc2" for number in run]
        assert (seen[-1] == "layer_norm") == (3 in wanted)
        assert hidden.keys() == wanted and lengths == [50]


def test_layers_of_one_pass_are_those_of_their_own(folder: Path, song: np.ndarray) -> None:
    whisper = Whisper(weights=str(folder), dtype="float32")
    asked = [replace(whisper, layer="1"), replace(whisper, layer="1..3", mix="mean"), whisper]
    assert len({whisper.together for whisper in asked}) == 1
    for whisper, [found] in zip(asked, Whisper.load_together(asked, "cpu")([song[:16000]]), strict=True):
        assert apart(found, whisper.load("cpu")([song[:16000]])[0]) < CLOSE


def test_the_last_layer_by_its_number_is_the_output(folder: Path, song: np.ndarray) -> None:
    by_number, output = Whisper(weights=str(folder), layer="3"), Whisper(weights=str(folder))
    assert Spec.of(by_number) == Spec.of(output) and Spec.of(output).dtype == "float16"
    assert Spec.of(Whisper(weights=str(folder), layer="2")).dtype == "float32"  # a stream that nothing bounds
    with pytest.raises(ValueError, match="has layers 0 to 3, not 4"):
        Whisper(weights=str(folder), layer="4").load("cpu")


# context

def test_what_enters_the_layers_is_the_same_in_both_contexts(folder: Path, song: np.ndarray) -> None:
    for samples in (1, 16_000, 50_001, 479_000, 480_000):
        long, short = (encode(folder, [song[:samples]], layer="0", context=context)[0] for context in ("30s", "short"))
        assert long.tobytes() == short.tobytes()


def test_contexts_are_two_features(folder: Path, song: np.ndarray) -> None:
    long, short = (Whisper(weights=str(folder), context=context) for context in ("30s", "short"))
    assert Spec.of(long).differs(Spec.of(short)).keys() == {"context"}
    assert long.together != short.together
    found = [whisper.load("cpu")([song[:48_000]])[0].astype(np.float32) for whisper in (long, short)]
    assert apart(found[1], found[0]) > 0.01


def test_contexts_agree_on_30_seconds(folder: Path, song: np.ndarray) -> None:
    long, short = (encode(folder, [song[:480_000]], context=context)[0] for context in ("30s", "short"))
    assert apart(short, long) < 1e-5


@pytest.mark.parametrize("context", ["30s", "short"])
def test_batch_mates_do_not_matter(folder: Path, song: np.ndarray, context: str) -> None:
    waves = [song[:1], song[:399], song[20_000:68_000], song[:480_000], song[5000:155_000]]
    for layer in ("", "1"):
        together = encode(folder, waves, context=context, layer=layer)
        for wave, found in zip(waves, together, strict=True):
            assert apart(found, encode(folder, [wave], context=context, layer=layer)[0]) < CLOSE


@pytest.mark.parametrize("context", ["30s", "short"])
def test_a_quiet_row_hears_nothing_of_a_loud_one(folder: Path, song: np.ndarray, context: str) -> None:
    quiet, loud = song[:48_000] * np.float32(1e-3), song[48_000:96_000] * np.float32(3)
    alone = encode(folder, [quiet], context=context)[0]
    assert apart(encode(folder, [loud, quiet], context=context)[1], alone) < CLOSE


# lengths

@pytest.mark.parametrize("context", ["30s", "short"])
@pytest.mark.parametrize("samples", [1, 319, 320, 321, 399, 400, 16_001, 478_000, 479_999, 480_000])
def test_frames_are_a_fiftieth_of_a_second_rounded_up(folder: Path, song: np.ndarray, context: str,
                                                      samples: int) -> None:
    for wave in (song[:samples], np.zeros(samples, np.float32)):
        found = encode(folder, [wave], context=context)[0]
        assert found.shape == (math.ceil(samples / 320), 32)
        assert np.isfinite(found).all()


def test_no_sample_makes_no_frame(folder: Path) -> None:
    with pytest.raises(ValueError, match="too short: 0 samples at 16000 Hz make no frame of whisper, 1 do"):
        encode(folder, [np.zeros(0, np.float32)])


def test_more_than_30_seconds_at_once_is_refused(folder: Path, song: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"hears 480000 samples \(30 s\) at a time, not 480001"):
        encode(folder, [song[:1000], song[:480_001]])


@pytest.mark.parametrize("samples", [480_000, 480_001, 895_999, 896_000, 896_001, 70 * 16_000 + 1])
def test_pieces_of_a_long_recording_lose_no_frame(song: np.ndarray, samples: int) -> None:
    whisper = Whisper()
    pieces = list(Cutter(whisper).push(song[:samples], last=True))
    assert max(len(piece.wave) for piece in pieces) <= 480_000
    found = sum(whisper.frames(len(piece.wave)) - piece.skip if piece.count is None else piece.count
                for piece in pieces)
    assert found == math.ceil(samples / 320)


def test_70_seconds_are_stored_as_three_windows_of_30(folder: Path, song: np.ndarray, tmp_path: Path) -> None:
    samples = 70 * 16000 + 100
    (tmp_path / "songs").mkdir()
    soundfile.write(tmp_path / "songs" / "alto.wav", song[:samples], 16000, subtype="FLOAT")
    store = fs.create(tmp_path / "s.zarr")
    report = fs.extract(fs.corpus(tmp_path / "songs"), store, {
        "whisper": Whisper(weights=str(folder)), "w1": Whisper(weights=str(folder), layer="1")}, workers=0)
    assert report.ok
    store = fs.open(tmp_path / "s.zarr")
    found, first = store["alto", "whisper"][:], store["alto", "w1"][:]
    assert found.shape == first.shape == (math.ceil(samples / 320), 32)
    assert (found.dtype, first.dtype) == (np.float16, np.float32)
    core, context = 416_000, 32_000
    for start, stop in ((0, core), (core, 2 * core), (2 * core, samples)):
        begin = max(start - context, 0)
        window = encode(folder, [song[begin : min(stop + context, samples)]])[0]
        kept = window[(start - begin) // 320 : (start - begin) // 320 + math.ceil((stop - start) / 320)]
        assert apart(found[start // 320 : math.ceil(stop / 320)].astype(np.float32), kept) < 1e-3  # float16


# wrong files

def altered(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a folder whose config says something else."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "wav2vec2"}, "config.json is of a wav2vec2, not of Whisper"),
    ({"d_model": None}, "config.json: d_model is None; a Whisper states it as a whole number above 0"),
    ({"encoder_layers": 0}, "config.json: encoder_layers is 0"),
    ({"max_source_positions": 750}, "expected an encoder of 1500 positions .* found 750 positions"),
    ({"encoder_attention_heads": 5}, "32 channels and 5 heads"),
])
def test_a_folder_of_something_else_is_refused(folder: Path, tmp_path: Path, changes: dict[str, Any],
                                               message: str) -> None:
    wrong = altered(folder, tmp_path / "wrong", **changes)
    with pytest.raises(ValueError, match=message):
        _ = Whisper(weights=str(wrong)).dim


@pytest.mark.parametrize(("changes", "message"), [
    ({"encoder_layers": 4}, r"15 missing \(layers.3.fc1.bias"),
    ({"encoder_layers": 2}, r"15 unexpected \(layers.2.fc1.bias"),
    ({"activation_function": "smooth"}, "transformers knows no activation_function 'smooth'"),
    ({"num_mel_bins": 128}, r"1 of another shape \(conv1.weight \(32, 80, 3\) instead of \(32, 128, 3\)\)"),
])
def test_weights_that_do_not_fit_are_named(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    wrong = altered(folder, tmp_path / "wrong", **changes)
    with pytest.raises(ValueError, match=message):
        encode(wrong, [np.zeros(1000, np.float32)])


def test_a_folder_that_lacks_a_file_says_which(folder: Path, tmp_path: Path) -> None:
    lacking = altered(folder, tmp_path / "lacking")
    (lacking / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or pytorch_model\.bin"):
        encode(lacking, [np.zeros(1000, np.float32)])
    (lacking / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; expected a folder with config\.json and model"):
        _ = Whisper(weights=str(lacking)).dim


def test_a_file_of_tensors_is_the_folder_it_lies_in(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    assert Spec.of(Whisper(weights=str(file))) == Spec.of(Whisper(weights=str(folder)))
    alone = tmp_path / file.name
    alone.write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        _ = Whisper(weights=str(alone)).dim


def test_a_truncated_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    short = altered(folder, tmp_path / "short")
    for path, weights in ((short / "model.safetensors", short), ((pt := whisper_pt(tmp_path)), pt)):
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(ValueError, match=f"{path.name} .*(truncated|checkpoint)"):
            encode(weights, [np.zeros(1000, np.float32)])


def test_a_checkpoint_of_another_program_is_refused_by_what_is_in_it(tmp_path: Path, parity: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(2)}, "args": None}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is no Whisper of OpenAI's: expected dims .* found args, model"):
        _ = Whisper(weights=str(tmp_path / "other.pt")).dim
    hubert = parity / "encoders" / "contentvec" / "contentvec_tiny_legacy.pt"
    with pytest.raises(ValueError, match=r"contentvec_tiny_legacy\.pt is no Whisper of OpenAI's"):
        _ = Whisper(weights=str(hubert)).dim


def test_an_openai_file_without_a_tensor_or_a_dimension_says_which(tmp_path: Path) -> None:
    found = torch.load(whisper_pt(tmp_path), weights_only=True)
    del found["model_state_dict"]["encoder.blocks.1.attn.key.weight"]
    torch.save(found, tmp_path / "lacking.pt")
    with pytest.raises(ValueError, match=r"1 missing \(layers\.1\.self_attn\.k_proj\.weight\)"):
        encode(tmp_path / "lacking.pt", [np.zeros(1000, np.float32)])
    del found["dims"]["n_mels"]
    torch.save(found, tmp_path / "undimensioned.pt")
    with pytest.raises(ValueError, match="n_mels is None"):
        _ = Whisper(weights=str(tmp_path / "undimensioned.pt")).dim


def test_an_encoder_saved_by_itself_is_enough(folder: Path, song: np.ndarray, tmp_path: Path) -> None:
    transformers.WhisperModel.from_pretrained(folder).encoder.save_pretrained(tmp_path)
    assert encode(tmp_path, [song[:8000]])[0].tobytes() == encode(folder, [song[:8000]])[0].tobytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, where it compiles
def test_compiled_layers_give_the_same_features(folder: Path, song: np.ndarray) -> None:
    waves = [song[:30_000], song[:90_000]]
    plain, built = (encode(folder, waves, context="short", compile=compiled) for compiled in (False, True))
    assert max(map(apart, built, plain)) < CLOSE
