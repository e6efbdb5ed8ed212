"""`featstore weights` as people run it: what is here, whether it is sound, and never a download."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from featstore_extractors.imports import without_broken_torchaudio

without_broken_torchaudio()
pytest.importorskip("torch")
pytest.importorskip("transformers")

from checkpoints import hubert_folder, wenet_folder, whisper_folder, whisper_pt  # noqa: E402
from hub_server import Hub  # noqa: E402

from featstore_cli import cli  # noqa: E402
from featstore_extractors import weights  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ROOTS = os.pathsep.join(str(ROOT / name) for name in (".", "extractors", "align", "cli"))


pytestmark = pytest.mark.usefixtures("places")


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, ["weights", *map(str, words)], catch_exceptions=False)


def told(*words: object) -> Any:
    return json.loads(run(*words, "--json").stdout)


def aged(path: Path) -> Path:
    """`path`, its files an hour old, so that their digests are remembered."""
    for file in [path, *path.rglob("*")]:
        os.utime(file, (time.time() - 3600,) * 2)
    return path


def test_ls_lists_every_preset_with_licence_and_hub_id() -> None:
    shown = run("ls")
    assert shown.exit_code == 0
    rows = {line.split()[0]: line.split()[1:] for line in shown.output.splitlines()[1:-1]}
    assert rows["whisper:large-v3"] == ["openai/whisper-large-v3", "apache-2.0", "1550", "M", "not", "here"]
    assert rows["contentvec:vec256l9"] == ["lengyue233/content-vec-best", "mit", "95", "M", "not", "here"]
    assert rows["wavlm:large"] == ["microsoft/wavlm-large", "not", "stated", "317", "M", "not", "here"]
    assert rows["wenet"] == ["(your", "own)", "not", "here"]
    assert rows["mini"][:3] == ["featstore/mini", "mit", "3"] and "not" not in rows["mini"]
    assert shown.output.splitlines()[-1].startswith(f"2 of {len(rows)} are here.")  # mini and mini:phones, in the box


def test_ls_shows_where_weights_are_how_large_and_the_digest_once_it_is_known(places: Path) -> None:
    aged(wenet_folder(places / "wenet"))
    before = {row["request"]: row for row in told("ls")}
    assert before["wenet"]["path"] == str(places / "wenet") and before["wenet"]["digest"] is None
    assert before["wenet"]["bytes"] == (places / "wenet" / "final.pt").stat().st_size
    assert before["whisper"]["path"] is None and before["whisper:tiny"]["licence"] == "apache-2.0"
    [checked] = told("check", "wenet")
    after = {row["request"]: row for row in told("ls")}
    assert checked["problem"] is None and after["wenet"]["digest"] == checked["digest"]
    assert checked["digest"][7:19] in run("ls").output


def test_check_without_words_checks_all_that_is_here_each_once(places: Path) -> None:
    alone = run("check")  # what is in the box is always here
    assert alone.exit_code == 0 and [line.split()[:2] for line in alone.output.splitlines()] == [["ok", "mini"]]
    whisper_folder(places / "whisper")
    hubert_folder(places / "contentvec", projection=8)
    wenet_folder(places / "wenet")
    done = run("check")
    assert done.exit_code == 0, done.output
    assert sorted(line.split()[:2] for line in done.output.splitlines()) == [
        ["ok", "contentvec"], ["ok", "mini"], ["ok", "wenet"], ["ok", "whisper"]]


def test_check_takes_any_request(tmp_path: Path) -> None:
    file = whisper_pt(tmp_path)
    done = run("check", f"w20=whisper,weights={file},layer=1")
    assert done.exit_code == 0 and done.output.startswith("ok ") and weights.file_digest(file) in done.output
    wanting = run("check", f"contentvec:vec256l9,layer=2,weights={hubert_folder(tmp_path / 'plain')}")
    assert wanting.exit_code == 1 and "has no projection (final_proj.weight)" in wanting.output
    refused = run("check", "f0")
    assert refused.exit_code == 2 and "f0 has no weights of its own to check" in refused.output


@pytest.mark.parametrize(("damage", "words"), [
    ("truncate", "truncated"), ("nan", "NaN or infinity in 1 of"), ("missing", "1 missing (layers.0.fc1.bias)"),
    ("html", "it is a web page"), ("pickle", "refused: loading it would run os.system"),
    ("config", "config.json is not JSON")])
def test_check_tells_what_is_wrong_with_weights(places: Path, damage: str, words: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = whisper_folder(places / "whisper")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("encoder.layers.0.fc1.bias"))
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "nan":
        save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, file)
    elif damage == "missing":
        save_file({key: value for key, value in tensors.items() if key != name}, file)
    elif damage == "html":
        file.write_text("<!doctype html><title>401</title>")
    elif damage == "pickle":
        file.unlink()
        torch.save({name: Runs(places / "ran")}, folder / "pytorch_model.bin")
    else:
        (folder / "config.json").write_text("{")
    done = run("check", "whisper")
    assert done.exit_code == 1 and done.output.startswith("wrong  whisper: ") and words in done.output
    assert not (places / "ran").exists()


class Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_check_finds_a_bit_that_fell_over(places: Path) -> None:
    file = aged(whisper_folder(places / "whisper")) / "model.safetensors"
    assert run("check", "whisper").exit_code == 0
    state, content = file.stat(), bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    done = run("check", "whisper")
    assert done.exit_code == 1 and "does not have the bytes it had (sha256:" in done.output


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    folder = hubert_folder(tmp_path / "hubert")
    results = told("check", f"hubert,weights={folder}", f"whisper,weights={folder}", f"wavlm,weights={folder}",
                   f"wenet,weights={folder}")
    assert [result["problem"] is None for result in results] == [True, False, False, False]
    assert all(str(folder) in result["problem"] for result in results[1:])


def test_neither_command_downloads(tmp_path: Path) -> None:
    with Hub({"openai/whisper-tiny": {"config.json": b"{}", "model.safetensors": b"x"}}) as hub:
        for words, status in ((["ls"], 0), (["check"], 0), (["check", "whisper:tiny", "contentvec"], 1)):
            environment = os.environ | {"PYTHONPATH": ROOTS, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0",
                                        "HF_HOME": str(tmp_path / "hf")}
            done = subprocess.run([sys.executable, "-m", "featstore", "weights", *words], env=environment,
                                  capture_output=True, text=True)
            assert done.returncode == status, done.stderr
        assert hub.log == []
    assert "openai/whisper-tiny is not on this machine, nor in the hub's cache" in done.stdout
    assert "or download:  -f contentvec:vec768l12" in done.stdout


@pytest.mark.parametrize("command", ["ls", "check"])
def test_help_of_each_command_has_an_example_that_works(command: str) -> None:
    shown = run(command, "--help").output
    assert f"Example: featstore weights {command}" in shown and len(shown.splitlines()) < 24
