"""The whole command with content encoders: small random checkpoints of every layout, real recordings, one store."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from checkpoints import fairseq_pt, hubert_folder, wenet_folder, whisper_folder, whisper_pt
from click.testing import CliRunner

import featstore as fs
from featstore_cli import cli
from featstore_extractors.imports import without_broken_torchaudio

without_broken_torchaudio()
pytest.importorskip("transformers", reason="content encoders need featstore[encoders]")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ROOTS = os.pathsep.join(str(ROOT / name) for name in (".", "extractors", "align", "cli"))
CORPUS = ROOT / "examples" / "corpus"
MINUTES = 12  # two dozen windows of every encoder


def run(*words: object, hub: str = "") -> subprocess.CompletedProcess[str]:
    """`featstore WORDS` on a machine without weights of its own; it may ask no hub, or only the one at `hub`."""
    nowhere = {"HF_HOME": "/nonexistent", "FEATSTORE_WEIGHTS": ""}
    nowhere |= {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"} if hub else {"HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-m", "featstore", *map(str, words)], capture_output=True, text=True,
                          timeout=550, env=os.environ | {"PYTHONPATH": ROOTS} | nowhere)


def done(*words: object) -> str:
    """What `featstore WORDS` prints; with no workers in this process, which has torch and transformers loaded."""
    finished = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert finished.exit_code == 0, finished.output
    return finished.output


def contents(store: Path, name: str) -> dict[str, bytes]:
    feature = fs.open(store).features[name]
    return {key: feature[key].read(check=True).tobytes() for key in feature}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each program that writes them."""
    home = tmp_path_factory.mktemp("models")
    return {"whisper": whisper_pt(home / "whisper"), "contentvec": fairseq_pt(home / "contentvec", projection=16),
            "wenet": wenet_folder(home / "wenet"), "hubert": hubert_folder(home / "hubert", large=True),
            "wav2vec2": hubert_folder(home / "wav2vec2", family="wav2vec2"),
            "wavlm": hubert_folder(home / "wavlm", family="wavlm")}


@pytest.fixture(scope="module")
def stored(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All encoders beside signal features, in one run over the example corpus."""
    store = tmp_path_factory.mktemp("joint") / "s.zarr"
    requests = [f"{name},weights={path}" for name, path in models.items()]
    words = [w for r in [*requests, "f0", "energy", "log-mel:24k-100", "speaker"] for w in ("-f", r)]
    finished = run("extract", CORPUS, store, *words)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return store


def test_all_encoders_and_signal_features_come_from_one_run(stored: Path, models: dict[str, Path]) -> None:
    store = fs.open(stored)
    assert set(store.features) == {*models, "f0", "energy", "log-mel", "speaker"}
    assert {len(feature) for feature in store.features.values()} == {11}
    for key, utterance in store.utterances.items():
        samples = utterance.duration_s * 16000
        assert abs(len(store[key, "whisper"]) - samples / 320) <= 1
        for name in ("contentvec", "hubert", "wav2vec2", "wavlm"):
            assert abs(len(store[key, name]) - (samples - 80) / 320) <= 1
        assert abs(len(store[key, "wenet"]) - (samples - 1040) / 640) <= 1
    assert store.features["whisper"].frame_rate == 50 and store.features["wenet"].frame_rate == 25
    assert store.features["whisper"].dtype == np.float16


def test_the_same_command_again_has_nothing_to_do(stored: Path, models: dict[str, Path]) -> None:
    words = [w for name, path in models.items() for w in ("-f", f"{name},weights={path}")]
    assert "Nothing to do: all 11 utterances are fresh." in done("extract", CORPUS, stored, *words)


def test_what_a_worker_stores_is_what_the_encoder_gives(stored: Path, models: dict[str, Path]) -> None:
    from featstore import audio
    from featstore_extractors import parse

    key = next(iter(fs.open(stored).utterances))
    with audio.Reader(fs.corpus(CORPUS).path(fs.corpus(CORPUS)[key])) as reader:
        wave = audio.Resampler(reader.sample_rate, 16000).push(np.concatenate(list(reader)), last=True)
    for name, path in models.items():
        (extractor,) = parse(f"{name},weights={path}").values()
        alone = extractor.load("cpu")([wave])[0]
        np.testing.assert_allclose(fs.open(stored)[key, name][:], alone, rtol=2e-3, atol=1e-3)


def test_replaced_weights_make_exactly_that_feature_stale(models: dict[str, Path], tmp_path: Path) -> None:
    mine = {name: tmp_path / name for name in ("hubert", "wavlm")}
    for name, folder in mine.items():
        shutil.copytree(models[name], folder)
    words = [w for name, folder in mine.items() for w in ("-f", f"{name},weights={folder}")]
    store = tmp_path / "s.zarr"
    done("extract", CORPUS / "ljspeech", store, *words, "--workers", 0)
    key = next(iter(fs.open(store).utterances))
    before = fs.open(store).features["wavlm"].spec.weights
    hubert_folder(mine["wavlm"], family="wavlm", seed=1)

    told = run("why", store, key, "wavlm", "-f", f"wavlm,weights={mine['wavlm']}")
    assert told.returncode == 1
    assert before is not None and before[:14] in told.stdout  # sha256: and the first digits of the old digest
    assert "model.safetensors" in told.stdout
    assert f"weights: {before[:14]}" in done("why", store, key, "wavlm")  # without -f the stored ones
    assert run("why", store, key, "hubert", "-f", f"hubert,weights={mine['hubert']}").returncode == 0
    refused = run("extract", CORPUS / "ljspeech", store, *words, "--workers", 0)
    assert refused.returncode == 2 and "wavlm" in refused.stderr and "--replace" in refused.stderr

    hubert_before = contents(store, "hubert")
    done("extract", CORPUS / "ljspeech", store, *words, "--replace", "--workers", 0)
    assert fs.open(store).features["wavlm"].spec.weights != before
    assert contents(store, "hubert") == hubert_before


def test_moved_weights_are_the_same_feature(models: dict[str, Path], tmp_path: Path) -> None:
    done("extract", CORPUS / "ljspeech", tmp_path / "s.zarr", "-f", f"wenet,weights={models['wenet']}", "--workers", 0)
    shutil.copytree(models["wenet"], tmp_path / "elsewhere")
    assert "Nothing to do" in done("extract", CORPUS / "ljspeech", tmp_path / "s.zarr", "-f",
                                   f"wenet,weights={tmp_path / 'elsewhere'}")


def test_layers_of_one_network_are_as_if_each_had_been_extracted_alone(models: dict[str, Path], tmp_path: Path) -> None:
    weights = f"weights={models['contentvec']}"
    requests = {"l1": f"contentvec,layer=1,{weights}", "l3": f"contentvec,layer=3,projection=true,{weights}",
                "mean": f"contentvec,layer=1..3,mix=mean,{weights}"}
    together = [word for name, request in requests.items() for word in ("-f", f"{name}={request}")]
    done("extract", CORPUS / "ljspeech", tmp_path / "all.zarr", *together, "--workers", 0)
    for name, request in requests.items():
        done("extract", CORPUS / "ljspeech", tmp_path / f"{name}.zarr", "-f", f"{name}={request}", "--workers", 0)
        assert contents(tmp_path / "all.zarr", name) == contents(tmp_path / f"{name}.zarr", name)


@pytest.mark.parametrize(("request_", "message"), [
    ("whisper", "openai/whisper-medium"),
    ("whisper:tiny", "openai/whisper-tiny"),
    ("contentvec", "lengyue233/content-vec-best"),
    ("wenet", "final.pt"),
    ("wenet,weights=nothing/here", "nothing/here"),
    ("contentvec,weights={whisper}", "whisper.pt"),
    ("whisper,weights={hubert}", "hubert"),
    ("hubert,weights={wavlm}", "wavlm"),
    ("whisper,weights={whisper},layer=9", "layers 0 to 2"),
])
def test_what_cannot_be_used_is_said_before_any_work(request_: str, message: str, models: dict[str, Path],
                                                     tmp_path: Path) -> None:
    refused = run("extract", CORPUS, tmp_path / "s.zarr", "-f", request_.format(**models))
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert message in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "s.zarr").exists()


def test_weights_that_do_not_fit_leave_no_trace_in_a_store(models: dict[str, Path], tmp_path: Path) -> None:
    folder = hubert_folder(tmp_path / "hubert", drop="encoder.layers.1.layer_norm")
    done("extract", CORPUS / "ljspeech", tmp_path / "s.zarr", "-f", "energy", "--workers", 0)
    words = ("-f", f"hubert,weights={folder}", "--workers", 0)
    refused = CliRunner().invoke(cli, [str(w) for w in ("extract", CORPUS / "ljspeech", tmp_path / "s.zarr", *words)])
    assert refused.exit_code == 2
    assert "layers.1.layer_norm" in refused.output
    assert fs.open(tmp_path / "s.zarr").identities("hubert") == []


def test_digests_in_messages_are_cut_to_what_tells_them_apart(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["wavlm"], tmp_path / "wavlm")
    words = ("-f", f"wavlm,weights={folder}", "--workers", 0)
    done("extract", CORPUS / "ljspeech", tmp_path / "s.zarr", *words)
    hubert_folder(folder, family="wavlm", seed=1)
    for command in ("status", "extract"):
        told = CliRunner().invoke(cli, [str(w) for w in (command, CORPUS / "ljspeech", tmp_path / "s.zarr",
                                                         *(words if command == "extract" else words[:2]))])
        assert told.exit_code in (1, 2)
        assert re.search("sha256:[0-9a-f]{12}[.][.][.]", told.output)
        assert not re.search("[0-9a-f]{20}", told.output)
    assert "-f wavlm-2=wavlm,weights=" in told.output


def test_short_silent_and_broken_recordings_cost_one_line_each(models: dict[str, Path], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 48000)
    wavs = {"good": noise, "short": noise[:399], "silent": np.zeros(48000)}
    (tmp_path / "wavs").mkdir()
    for name, wave in wavs.items():
        sf.write(tmp_path / "wavs" / f"{name}.wav", wave, 16000)
    (tmp_path / "wavs" / "broken.wav").write_bytes(b"RIFF and nothing else")
    words = [w for name in ("contentvec", "whisper") for w in ("-f", f"{name},weights={models[name]}")]
    finished = run("extract", tmp_path / "wavs", tmp_path / "s.zarr", *words, "--workers", 0)
    assert finished.returncode == 1
    store = fs.open(tmp_path / "s.zarr")
    assert set(store.features["contentvec"]) == {"good", "silent"}
    assert np.isfinite(store["silent", "contentvec"][:].astype(np.float32)).all()
    assert "too short: 399 samples" in finished.stdout + finished.stderr


@pytest.mark.slow
def test_recordings_of_every_corpus_with_three_encoders(models: dict[str, Path], shared: Path, tmp_path: Path) -> None:
    corpus = fs.corpus(shared / "audio")
    for utterance in list(corpus)[::5]:
        (tmp_path / "wavs" / utterance.audio).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(corpus.path(utterance), tmp_path / "wavs" / utterance.audio)
    words = [w for name in ("whisper", "contentvec", "wenet") for w in ("-f", f"{name},weights={models[name]}")]
    done("extract", tmp_path / "wavs", tmp_path / "s.zarr", *words, "--allow-failures", "0")
    store = fs.open(tmp_path / "s.zarr")
    assert {name: len(feature) for name, feature in store.features.items()} == {
        "whisper": 68, "contentvec": 68, "wenet": 68}
    assert " 0 damaged" in done("verify", tmp_path / "s.zarr")


@pytest.mark.slow
def test_many_windows_lose_no_frame_in_any_encoder(models: dict[str, Path], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "wavs").mkdir()
    with sf.SoundFile(tmp_path / "wavs" / "long.wav", "w", 16000, 1, "PCM_16") as file:
        for _ in range(MINUTES):
            file.write(generator.normal(0, 0.1, 60 * 16000))
    words = [w for name in ("whisper", "contentvec", "wenet") for w in ("-f", f"{name},weights={models[name]}")]
    done("extract", tmp_path / "wavs", tmp_path / "s.zarr", *words)
    store = fs.open(tmp_path / "s.zarr")
    samples = MINUTES * 60 * 16000
    assert {name: len(store["long", name]) for name in store.features} == {
        "whisper": samples // 320, "contentvec": (samples - 400) // 320 + 1,
        "wenet": ((((samples - 400) // 160 + 1) - 1) // 2 - 1) // 2}


def test_a_folder_of_transformers_and_openais_file_are_one_feature_in_numbers(tmp_path: Path) -> None:
    pt, folder = whisper_pt(tmp_path / "pt", seed=3), whisper_folder(tmp_path / "folder", seed=3)
    for name, weights in (("a", pt), ("b", folder)):
        done("extract", CORPUS / "ljspeech", tmp_path / f"{name}.zarr", "-f", f"whisper,weights={weights}",
             "--workers", 0)
    assert contents(tmp_path / "a.zarr", "whisper") == contents(tmp_path / "b.zarr", "whisper")


def test_commands_that_only_look_download_nothing(stored: Path, tmp_path: Path) -> None:
    for words in (("extract", CORPUS, tmp_path / "s.zarr", "-f", "whisper:tiny", "--plan"),
                  ("status", CORPUS, stored, "-f", "whisper:tiny"),
                  ("why", stored, next(iter(fs.open(stored).utterances)), "whisper", "-f", "whisper:tiny")):
        refused = run(*words, hub="http://127.0.0.1:9")
        assert refused.returncode == 2
        assert "or download:  featstore extract does" in refused.stderr
        assert "127.0.0.1" not in refused.stderr  # nobody has asked there
    asked = run("extract", CORPUS, tmp_path / "s.zarr", "-f", "whisper:tiny", hub="http://127.0.0.1:9")
    assert asked.returncode == 2 and "127.0.0.1:9 cannot be reached" in asked.stderr
    assert not (tmp_path / "s.zarr").exists()
