"""The d-vector against Resemblyzer, the x-vector against transformers, and what neither can embed."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore_extractors import parse, speaker
from featstore_extractors.imports import with_pkg_resources, without_broken_torchaudio
from featstore_extractors.speaker import Speaker, XVector

torch = pytest.importorskip("torch", reason="speaker embeddings need torch: featstore[speaker]")
RECORDINGS = ("ljspeech/LJ001-0019.flac", "vctk_p225/p225_016.flac", "fsdd_lucas/0_lucas_1.flac",
              "librispeech_2033/2033-164914-0000.flac", "csd_alto1/*.flac")


def sound(seconds: float, hz: float = 180.0, level: float = 0.1) -> np.ndarray:
    """A buzz with breath, 16 kHz."""
    t = np.arange(int(seconds * 16000)) / 16000
    buzz = np.sign(np.sin(2 * np.pi * hz * t)) + 0.3 * np.random.default_rng(0).standard_normal(len(t))
    return (level * buzz).astype(np.float32)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run() -> Any:
    try:
        return Speaker().load("cpu")
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def resemblyzer() -> Any:
    """The published encoder: embed(wave) and its rule for cutting windows."""
    with_pkg_resources()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports from a scipy namespace that is going away
        encoder = pytest.importorskip("resemblyzer", exc_type=ImportError).VoiceEncoder("cpu", verbose=False)
    return encoder


def test_d_vector_equals_resemblyzer(run: Any, resemblyzer: Any) -> None:
    for seconds in (0.3, 1.5, 1.7, 2.9, 6.03):
        wave = sound(seconds)  # above -30 dBFS: left as it is
        np.testing.assert_allclose(run([wave])[0], resemblyzer.embed_utterance(wave), rtol=0, atol=1e-5)


def test_d_vector_of_recordings_equals_resemblyzer(run: Any, resemblyzer: Any, shared: Path) -> None:
    soundfile, soxr = pytest.importorskip("soundfile"), pytest.importorskip("soxr")
    for pattern in RECORDINGS:
        path = sorted((shared / "audio").glob(pattern))[0]
        wave, rate = soundfile.read(path, dtype="float32", frames=400_000)
        wave = soxr.resample(wave, rate, 16000)
        louder = max(1.0, 10 ** (-30 / 20) / np.sqrt(np.mean(wave.astype(np.float64) ** 2)))
        expected = resemblyzer.embed_utterance(wave * np.float32(louder))
        np.testing.assert_allclose(run([wave])[0], expected, rtol=0, atol=1e-5)


def test_windows_start_where_resemblyzer_cuts_them(resemblyzer: Any) -> None:
    for rate, coverage in ((1.3, 0.75), (0.7, 0.5), (4.0, 1.0)):
        speaker = Speaker(rate=rate, coverage=coverage)
        for samples in [1, 159, 160, 25599, 25600, *range(26000, 90000, 997)]:
            _, mel_slices = resemblyzer.compute_partial_slices(samples, rate, coverage)
            assert speaker._starts(samples) == [part.start for part in mel_slices]


def test_d_vector_is_a_unit_vector_and_not_negative(run: Any) -> None:
    [vector] = run([sound(2)])
    assert vector.shape == (256,) and vector.dtype == np.float32
    assert vector.min() >= 0
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_quiet_recordings_are_raised_and_loud_ones_left(run: Any) -> None:
    quiet, loud = run([sound(2, level=0.002), sound(2, level=0.2)])
    np.testing.assert_allclose(run([sound(2, level=0.004)])[0], quiet, atol=1e-4)
    plain = Speaker(normalise=False).load("cpu")
    np.testing.assert_allclose(plain([sound(2, level=0.2)])[0], loud, rtol=0, atol=1e-6)
    assert np.abs(plain([sound(2, level=0.002)])[0] - quiet).max() > 0.01


def test_batch_mates_do_not_matter(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speaker, "AT_ONCE", 7)  # windows: several passes
    waves = [sound(2), 3 * sound(5, hz=300), np.zeros(Speaker().window[0], np.float32), sound(0.2, hz=90),
             sound(3, level=2e-4), sound(1)[:2]]
    for alone, together in zip(waves, run(waves), strict=True):  # the products of a larger matrix round otherwise
        np.testing.assert_allclose(run([alone])[0], together, rtol=0, atol=1e-6)


def test_pieces_are_averaged_by_duration(run: Any) -> None:
    low, high = run([sound(3), sound(3, hz=400)])
    mean = 2 * low + high
    np.testing.assert_allclose(Speaker().combine([low, high], [2000, 1000]), mean / np.linalg.norm(mean), rtol=1e-6)


def test_a_recording_in_pieces_is_near_the_whole(run: Any) -> None:
    wave = np.concatenate([sound(20), sound(20, hz=250)])
    halves = run([wave[:320000], wave[320000:]])
    assert Speaker().combine(halves, [320000, 320000]) @ run([wave])[0] > 0.99


def test_silence_has_no_voice(run: Any) -> None:
    for quiet in (np.zeros(16000, np.float32), 5e-5 * np.random.default_rng(0).standard_normal(16000).astype("f4")):
        with pytest.raises(ValueError, match="silent: no voice to embed"):
            run([quiet])
    with pytest.raises(ValueError, match="too short: no samples"):
        run([np.zeros(0, np.float32)])


def test_a_silent_piece_counts_for_nothing(run: Any) -> None:
    core, _ = Speaker().window
    voice, rest = run([sound(2), np.zeros(core, np.float32)])
    np.testing.assert_array_equal(rest, 0)
    np.testing.assert_allclose(Speaker().combine([rest, voice], [core, core]), voice, rtol=1e-6)
    with pytest.raises(ValueError, match="silent: no voice to embed"):
        Speaker().combine([rest, rest], [core, core])


def test_weights_are_known_by_their_bytes() -> None:
    pytest.importorskip("resemblyzer", exc_type=ImportError)
    assert Speaker().weights_digest == "sha256:39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"
    assert Speaker().weights_bytes == pytest.approx(4 * 1.42e6, rel=0.02)


def test_the_d_vector_imports_neither_resemblyzer_nor_a_voice_detector(run: Any) -> None:
    code = ("import sys, numpy as np; from featstore_extractors.speaker import Speaker;"
            "Speaker().load('cpu')([np.sin(np.arange(9000)).astype('f4')]);"
            "print({name.split('.')[0] for name in sys.modules} & {'resemblyzer', 'webrtcvad', 'librosa', 'scipy'})")
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                           env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"})
    assert shown.stdout.strip() == "set()"


@pytest.mark.parametrize(("settings", "words"), [({"rate": 0.5}, "rate must be between 0.625"),
                                                 ({"coverage": 0}, "coverage must be")])
def test_impossible_settings_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Speaker(**settings)  # type: ignore[arg-type]


GROUP, LAYER = {}, {"feat_extract_norm": "layer", "do_stable_layer_norm": True}  # base and large
MIXED = {"use_weighted_layer_sum": True}


def x_vector_folder(path: Path, **settings: Any) -> Path:
    """A WavLM x-vector model of seeded random weights, 24 dimensions, as transformers saves it."""
    without_broken_torchaudio()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, tdnn_dim=(16, 16, 16, 16, 32),
        xvector_output_dim=24, **settings)
    model = transformers.WavLMForXVector(config)
    if model.config.use_weighted_layer_sum:
        torch.nn.init.normal_(model.layer_weights)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return x_vector_folder(tmp_path_factory.mktemp("wavlm"))


@pytest.mark.parametrize("settings", [GROUP, LAYER, GROUP | MIXED, LAYER | MIXED],
                         ids=["base", "large", "base, layers mixed", "large, layers mixed"])
def test_x_vector_equals_transformers_and_in_a_batch_itself(settings: dict[str, Any], tmp_path: Path) -> None:
    extractor = parse(f"speaker:wavlm,model={x_vector_folder(tmp_path, **settings)}")["speaker"]
    transformers = pytest.importorskip("transformers")
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false}')
    assert extractor.dim == 24
    run = extractor.load("cpu")
    theirs = transformers.WavLMForXVector.from_pretrained(tmp_path).eval()
    waves = [sound(1.5), sound(2.2, hz=320, level=1e-3), np.zeros(extractor.window[0], np.float32),
             sound(1)[:5200], sound(0.7, hz=90, level=0.9)]
    for wave, together in zip(waves, run(waves), strict=True):
        if not wave.any():
            np.testing.assert_array_equal(together, 0)
            continue
        np.testing.assert_allclose(together, run([wave])[0], rtol=0, atol=2e-6)  # of 1: sums of another order
        with torch.no_grad():
            vector = theirs(torch.from_numpy(wave[None])).embeddings[0]
        np.testing.assert_allclose(together, vector / vector.norm(), rtol=0, atol=1e-5)


def test_x_vector_counts_the_bytes_it_loads(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.WavLMForXVector.from_pretrained(folder)
    assert XVector(str(folder)).weights_bytes == pytest.approx(4 * model.num_parameters(), rel=0.15)  # with JSON


def test_x_vector_standardises_where_the_model_asks_for_it(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": true}')
    model = XVector(str(tmp_path))
    soft, loud = model.load("cpu")([sound(1, level=0.01), sound(1, level=0.3)])
    np.testing.assert_allclose(soft, loud, atol=1e-4)
    assert model.weights_digest != XVector(str(folder)).weights_digest


def test_x_vector_says_how_much_it_needs(folder: Path) -> None:
    run = XVector(str(folder)).load("cpu")
    assert np.isfinite(run([sound(1)[:5200]])[0]).all()
    for samples in (200, 5199):
        with pytest.raises(ValueError, match=f"too short: {samples} samples .* an x-vector needs 16"):
            run([sound(1)[:samples]])
    with pytest.raises(ValueError, match="silent"):
        run([np.zeros(16000, np.float32)])


def test_weights_that_are_not_an_x_vector_model_are_refused(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.WavLMForXVector.from_pretrained(folder).wavlm.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no WavLM x-vector model: \d+ of its weights are missing"):
        XVector(str(tmp_path)).load("cpu")


def test_missing_weights_say_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"(?s)nobody/no-such-model is not on this machine.*model=PATH"):
        _ = XVector("nobody/no-such-model").weights_digest
    with pytest.raises(FileNotFoundError, match=r"expected config\.json and model\.safetensors"):
        _ = XVector(str(tmp_path)).weights_digest
    with pytest.raises(FileNotFoundError, match="wavlm-base-plus-sv is not in the hub's cache"):
        _ = XVector().weights_digest
