"""Weights: found where the documentation says, downloaded once and only when named, digested and remembered."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub

from featstore_extractors import hub, weights

ROOT = Path(__file__).resolve().parents[2]
ROOTS = os.pathsep.join(str(ROOT / name) for name in (".", "extractors", "align"))
EXPECTED = "a folder with config.json"
SAFE = os.urandom(300_000)
MODEL = {"config.json": b"{}", "preprocessor_config.json": b"{ }", "model.safetensors": SAFE, "README.md": b"read",
         "pytorch_model.bin": b"bin", "tf_model.h5": b"tensorflow", "model.fp32-00001-of-00002.safetensors": b"large"}
LOCATE = """
import sys
from featstore_extractors import weights
for wanted in sys.argv[2:]:
    try:
        print(weights.locate(wanted, extractor="whisper", fetch=sys.argv[1] == "named", expected="a folder"))
    except (FileNotFoundError, ValueError) as error:
        print("refused:", error)
"""


@pytest.fixture(autouse=True)
def here(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub({"owner/model": dict(MODEL)}) as served:
        yield served


def find(wanted: str, named: bool = True, extractor: str = "whisper") -> Path:
    return weights.locate(wanted, extractor=extractor, fetch=named, expected=EXPECTED)


def elsewhere(url: str, *wanted: str, home: Path, named: bool = True, limit: int = 0, **variables: str) -> str:
    """What `locate` gives or says for each of `wanted`, in a process of its own that knows the hub at `url`."""
    environment = os.environ | {"PYTHONPATH": ROOTS, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
                                "XDG_CACHE_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"} | variables
    done = subprocess.run(
        [sys.executable, "-c", LOCATE, "named" if named else "not", *wanted], capture_output=True, text=True,
        env=environment, check=True, timeout=100,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None)
    return done.stdout + done.stderr


def checkpoint(folder: Path, content: bytes = b"tensors", age_s: float = 3600, name: str = "model.safetensors") -> Path:
    """A model's folder with a file that looks like tensors from outside, `age_s` old."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / name).write_bytes(content)
    os.utime(folder / name, (time.time() - age_s,) * 2)
    return folder


def cached(model: str, *names: str, commit: str = COMMIT, reference: bool = True) -> Path:
    """A snapshot in the hub's cache, laid out as its client does: links to blobs named by digest."""
    folder = hub.cache() / f"models--{model.replace('/', '--')}"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for name in names:
        content = f"{name} {commit}".encode()
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (folder / "snapshots" / commit / name).symlink_to(blob)
    if reference:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


# Where weights are looked for.


def test_a_path_is_taken_as_given_and_then_below_the_folder_of_weights(places, tmp_path):
    here, there = checkpoint(tmp_path / "mine"), checkpoint(places / "mine")
    assert find(str(here)) == here and find("mine") == Path("mine")
    assert find("mine", named=False) == there  # nobody named the folder that happens to be here
    (tmp_path / "mine").rename(tmp_path / "other")
    assert find("mine") == there
    assert find(str(there / "model.safetensors")) == there / "model.safetensors"


@pytest.mark.parametrize("name", ["whisper", "whisper.pt", "whisper.safetensors"])
def test_what_stands_in_the_folder_of_weights_needs_no_name(places, name):
    if "." in name:
        (places / name).write_bytes(b"tensors")
    else:
        checkpoint(places / name)
    assert find("openai/whisper-medium", named=False) == find("", named=False) == places / name
    with pytest.raises(FileNotFoundError, match="hubert: no weights were named"):
        find("facebook/hubert-base-ls960", named=False, extractor="hubert")


def test_a_folder_that_holds_one_checkpoint_stands_for_it(places):
    (places / "contentvec").mkdir()
    file = places / "contentvec" / "checkpoint_best_legacy_500.pt"
    file.write_bytes(b"tensors")
    assert find("lengyue233/content-vec-best", named=False, extractor="contentvec") == file
    (places / "contentvec" / "other.pt").write_bytes(b"more")
    assert find("contentvec") == places / "contentvec"
    with pytest.raises(FileNotFoundError, match=r"several checkpoints: .*weights=.*legacy_500.pt \(there are .*other"):
        weights.tensor_files(places / "contentvec")


def test_the_hub_cache_is_used_without_network(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    folder = cached("openai/whisper-medium", "config.json", "model.safetensors")
    assert find("openai/whisper-medium", named=False) == find("openai/whisper-medium") == folder
    lone = cached("owner/copied", "config.json", "pytorch_model.bin", reference=False)  # by somebody, with cp
    assert find("owner/copied") == lone
    cached("owner/copied", "config.json", "pytorch_model.bin", commit="ab" * 20)
    assert find("owner/copied").name == "ab" * 20  # which refs/main names


def test_a_cache_that_another_program_filled_in_part_is_not_enough():
    """transformers fetches no preprocessor_config.json with a model, and that says whether waves are normalised."""
    cached("facebook/hubert-base-ls960", "config.json", "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"not complete in the hub's cache \(preprocessor_config.json\)"):
        find("facebook/hubert-base-ls960", named=False, extractor="hubert")


def test_nothing_named_and_nothing_here_says_what_to_put_where_and_what_to_ask_for(places):
    with pytest.raises(FileNotFoundError) as refused:
        find("lengyue233/content-vec-best", named=False, extractor="contentvec")
    told = str(refused.value).splitlines()
    assert told[0].startswith("contentvec: no weights were named, and lengyue233/content-vec-best is not in the hub's")
    assert told[1:] == [
        f"  give it:      weights=PATH, where PATH is {EXPECTED}",
        f"  or put it at: {places}/contentvec, where it is found without being named",
        "  or download:  -f contentvec:vec768l12 (lengyue233/content-vec-best, 95 million parameters, licence: mit)"]
    with pytest.raises(FileNotFoundError, match="no weights were named, and there are none that everybody uses"):
        find("", named=False, extractor="wenet")


def test_what_looks_like_a_path_is_never_sent_to_the_hub(server, tmp_path):
    wanted = ["./owner/model", "/owner/model", "~/model", "../owner/model", "owner/model.pt", "owner/a/model",
              "owner\\model", "~nobody-here/model", "medium", "model.safetensors", "owner/mod el", "owner/model/",
              "https://127.0.0.1/owner", "a" * 3000, "owner/", "sha256:0123456789"]
    told = elsewhere(server.url, *wanted, home=tmp_path)
    assert told.count("refused: whisper: no ") == len(wanted)
    assert "no hub id, which has the form OWNER/NAME" in told and "one of whisper:tiny" in told
    assert server.log == []


def test_a_link_to_nothing_and_what_is_no_file_are_told(tmp_path):
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="gone is a link to something that does not exist"):
        find("gone")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is neither a file nor a folder"):
        find("pipe")


# By digest.


def test_a_digest_names_weights_wherever_they_are(places):
    folder = checkpoint(places / "deep" / "a", b"one")
    (places / "lone.pt").write_bytes(b"two")
    snapshot = cached("owner/model", "config.json", "model.safetensors")
    (places / "loop").symlink_to(places)
    for place, content in ((folder, b"one"), (places / "lone.pt", b"two"),
                           (snapshot, (snapshot / "model.safetensors").read_bytes())):
        full = "sha256:" + hashlib.sha256(content).hexdigest()
        assert find(full) == find(full[:15]) == place
        assert weights.digest(weights.tensor_files(find(full))) == full
    (places / "lone.pt").rename(places / "moved.pt")
    assert find("sha256:" + hashlib.sha256(b"two").hexdigest()) == places / "moved.pt"


def test_a_digest_that_is_not_here_or_none_or_of_several_is_refused(places):
    with pytest.raises(FileNotFoundError, match="no weights with digest sha256:00000000 in "):
        find("sha256:00000000")
    with pytest.raises(ValueError, match="at least 8 hexadecimal digits"):
        find("sha256:abc")
    shards = checkpoint(places / "shards", name="model-00001-of-00002.safetensors")
    (shards / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}))
    (shards / "model-00002-of-00002.safetensors").write_bytes(b"more")
    assert find(weights.digest(weights.tensor_files(shards))) == shards


# Files of a checkpoint.


def test_an_index_must_not_lead_out_of_its_folder_nor_name_what_is_not_there(tmp_path):
    folder = checkpoint(tmp_path / "model", name="other.safetensors")
    index = folder / "model.safetensors.index.json"
    for bad in ("../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b"):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        with pytest.raises(ValueError, match="which leads out of its folder: refused"):
            weights.tensor_files(folder)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "other.safetensors"}}))
    with pytest.raises(ValueError, match=r"lacks 1 of the 2 files that model.safetensors.index.json names: model-1"):
        weights.tensor_files(folder)
    for bad in ("{", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {}}'):
        index.write_text(bad)
        with pytest.raises(ValueError, match=r"index\.json"):
            weights.tensor_files(folder)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors or pytorch_model.bin, found nothing"):
        weights.tensor_files(find("empty"))
    (tmp_path / "empty" / "song.wav").touch()
    with pytest.raises(FileNotFoundError, match=r"found song.wav"):
        weights.tensor_files(find("empty"))
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        weights.tensor_files(tmp_path / "absent")


# Digests.


def test_a_digest_is_that_of_sha256sum_and_remembered_by_the_next_process(tmp_path, monkeypatch):
    file = checkpoint(tmp_path / "m", b"some bytes") / "model.safetensors"
    expected = "sha256:" + hashlib.sha256(b"some bytes").hexdigest()
    assert weights.remembered(file) is None
    assert weights.file_digest(file) == expected
    monkeypatch.setattr(weights, "_digests", {})
    assert weights.remembered(file) == expected
    file.write_bytes(b"same size!")
    assert weights.remembered(file) is None and weights.file_digest(file) != expected


def test_weights_put_in_place_with_the_size_and_time_of_the_old_ones_are_hashed_again(tmp_path):
    old = checkpoint(tmp_path / "old", b"old bytes") / "model.safetensors"
    new = checkpoint(tmp_path / "new", b"new bytes") / "model.safetensors"
    before, state = weights.file_digest(old), old.stat()
    os.utime(new, ns=(state.st_atime_ns, state.st_mtime_ns))
    new.replace(old)
    assert weights.file_digest(old) == "sha256:" + hashlib.sha256(b"new bytes").hexdigest() != before


def test_a_file_younger_than_two_seconds_is_not_remembered(tmp_path):
    file = checkpoint(tmp_path / "m", age_s=0.5) / "model.safetensors"
    weights.file_digest(file)
    assert weights.remembered(file) is None and not (tmp_path / "xdg" / "featstore").exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"digests": 3, "downloads": {"a": 1}}',
                                     '{"digests": {"FILE": [1, 2]}}', '{"digests": {"FILE": ["7", 0, 0, "sha256:0"]}}'])
def test_a_damaged_memory_is_as_good_as_none(tmp_path, content):
    file = checkpoint(tmp_path / "m") / "model.safetensors"
    memory = tmp_path / "xdg" / "featstore" / "weights.json"
    memory.parent.mkdir(parents=True)
    memory.write_text(content.replace("FILE", str(file)))
    assert weights.file_digest(file) == "sha256:" + hashlib.sha256(b"tensors").hexdigest()
    assert list(json.loads(memory.read_text())["digests"]) == [str(file)]
    assert weights.recorded("a") == {}


def test_a_memory_that_cannot_be_written_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))  # a file where a folder would be
    file = checkpoint(tmp_path / "m") / "model.safetensors"
    assert weights.file_digest(file) == "sha256:" + hashlib.sha256(b"tensors").hexdigest()


def test_processes_that_remember_at_once_lose_nothing(tmp_path):
    files = [str(checkpoint(tmp_path / f"m{i}") / "model.safetensors") for i in range(24)]
    code = ("import sys; from pathlib import Path; from featstore_extractors import weights\n"
            "for name in sys.argv[1:]: weights.file_digest(Path(name))")
    running = [subprocess.Popen([sys.executable, "-c", code, *files[i::4]], env=os.environ | {"PYTHONPATH": ROOTS})
               for i in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    assert sorted(weights._read_memory()["digests"]) == sorted(files)
    assert {path.name for path in (tmp_path / "xdg" / "featstore").iterdir()} == {"weights.json", "weights.lock"}


def test_bytes_that_change_behind_size_and_time_are_told(tmp_path):
    folder = checkpoint(tmp_path / "m", b"good")
    file, state = folder / "model.safetensors", (folder / "model.safetensors").stat()
    assert weights.changed(folder) == (weights.file_digest(file), "")
    file.write_bytes(b"flip")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    now, wrong = weights.changed(folder)
    assert now == "sha256:" + hashlib.sha256(b"flip").hexdigest() and "does not have the bytes it had" in wrong
    blob = cached("owner/model", "config.json", "model.safetensors") / "model.safetensors"
    blob.resolve().write_bytes(b"flip")  # whose name is its digest
    assert "does not have the bytes it had" in weights.changed(blob.parent)[1]


# The hub.


def test_a_command_that_only_tells_can_forbid_downloads():
    with weights.without_downloads(), pytest.raises(FileNotFoundError) as refused:
        find("openai/whisper-tiny")
    assert str(refused.value).startswith(
        f"whisper: openai/whisper-tiny is not on this machine, nor in the hub's cache {hub.cache()}.\n")
    assert "or download:  featstore extract does, for whisper,weights=openai/whisper-tiny (" in str(refused.value)


def test_what_is_incomplete_in_the_cache_is_completed_where_it_is_named(server, tmp_path):
    server.models["facebook/hubert-base-ls960"] = MODEL
    incomplete = elsewhere(server.url, "facebook/hubert-base-ls960", home=tmp_path)
    folder = Path(incomplete.splitlines()[0])
    (folder / "preprocessor_config.json").unlink()
    (tmp_path / "featstore" / "weights.json").unlink()  # as if another program had fetched it
    server.log.clear()
    told = elsewhere(server.url, "facebook/hubert-base-ls960", home=tmp_path, HF_HUB_OFFLINE="1")
    assert "not complete in the hub's cache (preprocessor_config.json), and HF_HUB_OFFLINE" in told
    assert elsewhere(server.url, "facebook/hubert-base-ls960", home=tmp_path).splitlines()[0] == str(folder)
    assert (folder / "preprocessor_config.json").is_file() and "model.safetensors" not in server.files()


def test_a_named_model_is_downloaded_once_and_only_what_is_needed_of_it(server, tmp_path):
    folder = tmp_path / "hub" / "models--owner--model" / "snapshots" / COMMIT
    told = elsewhere(server.url, "owner/model", home=tmp_path)
    assert told.splitlines()[0] == str(folder) and "Fetching 3 files" in told  # with the client's progress bar
    assert sorted(server.files()) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    memory = json.loads((tmp_path / "featstore" / "weights.json").read_text())
    digest = "sha256:" + hashlib.sha256(SAFE).hexdigest()
    assert memory["downloads"] == {"owner/model": {COMMIT: digest}}
    assert [entry[-1] for entry in memory["digests"].values()] == [digest]
    server.log.clear()
    assert elsewhere(server.url, "owner/model", home=tmp_path) == f"{folder}\n"
    assert elsewhere("http://127.0.0.1:1", "owner/model", home=tmp_path, HF_HUB_OFFLINE="1") == f"{folder}\n"
    assert server.log == []


@pytest.mark.parametrize(("there", "fetched"), [
    (["config.json", "pytorch_model.bin", "flax_model.msgpack"], ["config.json", "pytorch_model.bin"]),
    (["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
      "model.fp32-00001-of-00002.safetensors", "model.fp32.safetensors.index.json", "pytorch_model.bin"],
     ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
    (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "tf_model.h5"],
     ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"]),
    (["final.pt", "train.yaml", "global_cmvn", "final.zip"], ["final.pt", "global_cmvn", "train.yaml"]),
    (["a.pt", "song.wav"], [])])
def test_one_set_of_tensors_is_chosen_safetensors_first(there, fetched):
    assert hub.chosen(there) == fetched


def test_what_is_named_by_nobody_is_not_asked_of_the_hub(server, tmp_path):
    assert "no weights were named" in elsewhere(server.url, "owner/model", home=tmp_path, named=False)
    assert server.log == []


def test_each_reason_for_no_download_is_told_with_what_to_do(server, tmp_path):
    server.models |= {"owner/gated": MODEL, "owner/data": {"data.csv": b"1,2"}, "owner/huge": MODEL}
    server.gated.add("owner/gated")
    told = elsewhere(server.url, "owner/unknown", "owner/gated", "owner/data", home=tmp_path).split("refused: ")[1:]
    assert f"{server.url} has no such repository (or it is private: hf auth login)" in told[0]
    assert f"have accepted its terms: do so at {server.url}/owner/gated and log in with hf auth login" in told[1]
    assert "holds no model.safetensors or pytorch_model.bin, but data.csv: download the file you mean" in told[2]
    assert all("weights=PATH, where PATH is a folder" in text for text in told)
    assert f"or put it at: {tmp_path / 'weights'}/owner/gated, where it is found by that name" in told[1]
    server.claims["model.safetensors"] = 10**15
    assert (f"the hub's cache {tmp_path / 'hub'} has " in (full := elsewhere(server.url, "owner/huge", home=tmp_path))
            and "it takes 1,000,000,000.6 MB" not in full and "set HF_HOME to a folder on another disk" in full)
    server.status = 503
    assert "answers with status 503: try again later" in elsewhere(server.url, "owner/other", home=tmp_path)
    assert "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids" in elsewhere(
        server.url, "owner/other", home=tmp_path, HF_HUB_OFFLINE="1")
    assert "http://127.0.0.1:1 cannot be reached (ConnectError" in elsewhere(
        "http://127.0.0.1:1", "owner/other", home=tmp_path)


def test_a_connection_that_drops_in_the_middle_is_taken_up_again(server, tmp_path):
    server.break_after["model.safetensors"] = 100_000
    told = elsewhere(server.url, "owner/model", home=tmp_path)
    folder = Path(told.splitlines()[0])
    assert (folder / "model.safetensors").read_bytes() == SAFE
    assert server.files().count("model.safetensors") == 2


@pytest.mark.slow
def test_a_download_that_breaks_off_for_good_says_so_and_the_next_one_completes_it(server, tmp_path):
    server.break_after["model.safetensors"] = 100_000
    server.dead.add("model.safetensors")
    told = elsewhere(server.url, "owner/model", home=tmp_path)
    assert "the download broke off (RemoteProtocolError" in told and "run the same command again" in told
    server.dead.clear()
    server.log.clear()
    assert (Path(elsewhere(server.url, "owner/model", home=tmp_path).splitlines()[0]) / "config.json").is_file()
    assert server.files() == ["model.safetensors"]


def test_a_cache_that_cannot_be_written_to_is_told_with_the_way_to_move_it(server, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "hub").touch()  # a file where the folder would be
    told = elsewhere(server.url, "owner/model", home=home)
    assert f"the hub's cache {home / 'hub'} cannot be written to: set HF_HOME to a folder that can" in told


def test_a_disk_that_fills_up_is_told_with_the_cache_and_the_way_to_move_it(server, tmp_path):
    server.sizes = False  # so that nothing is known beforehand
    told = elsewhere(server.url, "owner/model", home=tmp_path, limit=100_000)
    assert f"no space left for it in the hub's cache {tmp_path / 'hub'}: make room, or set HF_HOME" in told
    if os.geteuid() != 0:
        return
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True).returncode:
        return
    try:
        assert "no space left for it in the hub's cache" in elsewhere(server.url, "owner/model", home=small)
        server.sizes = True
        assert "it takes 0.3 MB and the hub's cache" in elsewhere(server.url, "owner/model", home=small)
    finally:
        subprocess.run(["umount", small], check=True)


def test_every_preset_names_a_model_that_is_in_the_table():
    presets = weights.presets()
    assert {preset.wanted for preset in presets} - weights.HUB.keys() == {""}  # WeNet's, of which there is none
    assert {"whisper:large-v3", "contentvec:amphion", "hubert:large", "wavlm", "speaker:wavlm"} <= {
        preset.request for preset in presets}
    assert all(preset.named == (":" in preset.request) for preset in presets
               if preset.extractor not in ("wenet", "speaker", "mini"))
