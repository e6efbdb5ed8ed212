"""Commands about models, from `train --smoke` to what is published, and what each refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("lightning_fabric")
sf = pytest.importorskip("soundfile")

from conftest import ROOT  # noqa: E402

import featstore as fs  # noqa: E402
from featstore_cli import cli  # noqa: E402
from featstore_zoo import TABLE, find  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SENTENCE = ROOT / "examples" / "corpus" / "ljspeech" / "LJ001-0002.flac"
TINY = ["--set", "frames=16", "--set", "valid_s=0.5", "--workers", "0"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def refused(*arguments: object, status: int = 2) -> str:
    """The message of a command that has to fail with this exit status."""
    done = run(*arguments)
    assert done.exit_code == status, done.output
    assert "Traceback" not in done.output
    return done.output


@pytest.fixture(scope="module")
def smoke(voices: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `train hifigan --smoke`, cut to two steps."""
    home = tmp_path_factory.mktemp("runs") / "smoke"
    done = run("train", "hifigan", voices, "-o", home, "--smoke", "--steps", 2, *TINY)
    assert done.exit_code == 0, done.output
    assert f"{home}: 2 steps, mel " in done.output
    return home


def test_a_smoke_run_goes_on_vocodes_and_has_a_card(voices, smoke, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = run("train", "hifigan", voices, "-o", smoke, "--resume", "--steps", 3, "--workers", 0)
    assert done.exit_code == 0 and f"{smoke}: 3 steps, mel " in done.output
    done = run("train", "hifigan", voices, "-o", smoke, "--resume", "--workers", 0)
    assert done.exit_code == 0 and "all of its 3 steps are done; --steps N goes on" in done.output
    done = run("vocode", SENTENCE, "--vocoder", smoke, "-o", tmp_path / "out.wav", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)[0]["seconds"] == pytest.approx(sf.info(SENTENCE).duration, abs=0.02)
    assert sf.info(tmp_path / "out.wav").samplerate == 24000
    done = run("zoo", "card", smoke)
    assert done.exit_code == 1 and "section Licence has something that is not stated" in done.output
    assert "section Evaluation" not in done.output
    text = (smoke / "README.md").read_text()
    assert "this model | Griffin-Lim" in text and "samples/00000003" in text


def test_an_acoustic_model_is_trained_goes_on_and_has_a_card(songs, tmp_path):
    out = tmp_path / "run"
    done = run("train", "transformer-svc", songs, "-o", out, "--content", "spin", "--speaker", "voice", "--loudness",
               "none", "--smoke", "--steps", 1, *TINY)
    assert done.exit_code == 0 and f"{out}: 1 steps, l1 " in done.output, done.output
    assert "leave out --content, --speaker" in refused("train", "transformer-svc", songs, "-o", out, "--resume",
                                                       "--content", "spin", "--speaker", "none")
    done = run("train", "transformer-svc", songs, "-o", out, "--resume", "--steps", 2, "--workers", 0)
    assert done.exit_code == 0 and "2 steps" in done.output, done.output
    assert "this model | mean log-mel" in (out / "README.md").read_text()
    told = refused("train", "transformer-svc", songs, "-o", tmp_path / "other")
    assert "say which content features" in told and "--content spin" in told


def test_a_card_with_what_only_a_person_knows_is_complete(smoke, tmp_path):
    import shutil

    shutil.copytree(smoke, tmp_path / "run")
    known = json.loads((tmp_path / "run" / "facts.json").read_text())
    known |= {"licence": "CC BY 4.0", "licence_id": "cc-by-4.0"}
    known["data"] |= {"licences": {"CC BY 4.0": 3}}
    (tmp_path / "run" / "facts.json").write_text(json.dumps(known))
    done = run("zoo", "card", tmp_path / "run")
    assert done.exit_code == 0 and "complete" in done.output, done.output


@pytest.mark.slow
def test_the_zoo_lists_every_model_with_its_size():
    rows = json.loads(run("zoo", "ls", "--json").output)
    assert {row["name"].replace("-", "_") for row in rows} >= set(TABLE)
    assert all(row["parameters"] > 1000 and row["says"] for row in rows)
    assert "hifigan" in run("zoo", "ls").output


@pytest.mark.slow
def test_a_run_is_exported(smoke, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    done = run("zoo", "export", smoke, "-o", tmp_path / "voc.onnx")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "voc.onnx").stat().st_size > 100_000


def test_a_training_that_cannot_begin_is_told_and_leaves_nothing(voices, smoke, tmp_path):
    out = tmp_path / "run"
    told = refused("train", "hifigen", voices, "-o", out)
    assert "no model 'hifigen'" in told and "hifigan" in told
    assert "no field 'stepps'" in refused("train", "hifigan", voices, "-o", out, "--set", "stepps=3")
    assert "expected FIELD=VALUE" in refused("train", "hifigan", voices, "-o", out, "--set", "steps")
    assert "no feature 'pitch'" in refused("train", "nsf-hifigan", voices, "-o", out, "--f0", "pitch")
    assert "n_mels=80 was asked for" in refused("train", "hifigan", voices, "-o", out, "--set", "n_mels=80", status=1)
    assert "does not exist" in refused("train", "hifigan", voices, "-o", out, "-r", tmp_path / "no.toml")
    assert "is not a run" in refused("train", "hifigan", voices, "-o", out, "--init", tmp_path, status=1)
    assert not out.exists()
    assert "exists already" in refused("train", "hifigan", voices, "-o", smoke, status=1)


def test_a_run_goes_on_as_it_was_begun(voices, smoke, tmp_path):
    told = refused("train", "vocos", voices, "-o", smoke, "--resume")
    assert "is a run of hifigan, and vocos was asked for" in told
    told = refused("train", "hifigan", voices, "-o", smoke, "--resume", "--set", "batch=4", "--f0", "pitch")
    assert "leave out --f0, --set" in told
    assert "does not exist" in refused("train", "hifigan", voices, "-o", tmp_path / "no", "--resume", status=1)


def test_a_vocoder_that_does_not_fit_is_told(voices, smoke, tmp_path):
    assert "is not a run" in refused("vocode", voices, "--vocoder", tmp_path, "-o", tmp_path / "out", status=1)
    bare = fs.create(tmp_path / "bare.zarr")
    with bare.writer() as writer:
        writer.declare("wave", fs.open(voices).feature("wave").spec)
    assert "reads log-mel" in refused("vocode", tmp_path / "bare.zarr", "--vocoder", smoke, "-o", tmp_path / "out")
    other = fs.create(tmp_path / "other.zarr")
    from featstore_extractors import parse

    fs.extract(fs.corpus(voices.parent / "corpus"), other, parse("log-mel:22k-80"), workers=0)
    told = refused("vocode", tmp_path / "other.zarr", "--vocoder", smoke, "-o", tmp_path / "out")
    assert "n_mels=80 (the run: 100)" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", [name for name in sorted(TABLE) if find(name).KIND == "vocoder"])
def test_each_smoke_recipe_trains_goes_on_vocodes_and_is_judged(voices, tmp_path, model):
    out = tmp_path / "run"
    done = run("train", model, voices, "-o", out, "--smoke", "--steps", 2, *TINY)
    assert done.exit_code == 0, done.output
    done = run("train", model, voices, "-o", out, "--resume", "--steps", 3, "--workers", 0)
    assert done.exit_code == 0 and "3 steps" in done.output, done.output
    judged = json.loads((out / "facts.json").read_text())["evaluation"]["systems"]["this model"]
    assert judged["log-mel L1"] is not None and judged["multi-resolution STFT"] is not None
    done = run("vocode", voices, "--vocoder", out, "-o", tmp_path / "made", "--json")
    assert done.exit_code == 0 and len(json.loads(done.output)) == 4, done.output
