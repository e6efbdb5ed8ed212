"""Checkpoints: every layout is read, nothing in them is run, and what is wrong with a file is said."""

from __future__ import annotations

import argparse
import enum
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import types
import typing
import zipfile
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from featstore_extractors.checkpoint import Inert, load_into, read  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ZIP = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])


def tensors(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}.weight": torch.randn(4, 3, generator=generator) for i in range(3)} | {
        "count": torch.tensor(7), "half": torch.ones(5, dtype=torch.float16), "empty": torch.zeros(0)}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) and one[name].dtype ==
                                              other[name].dtype for name in one)


def saved(path: Path, content: Any, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


class Runs:
    """What a pickle would run when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.fixture
def modules() -> Iterator[Callable[..., types.ModuleType]]:
    """Makes modules for classes to be pickled from, which are gone when the file is read."""
    made: list[str] = []

    def add(name: str, **content: Any) -> types.ModuleType:
        for part in [name.rsplit(".", i)[0] for i in range(name.count("."), -1, -1)]:
            if part not in sys.modules:
                sys.modules[part] = types.ModuleType(part)
                made.append(part)
        for key, value in content.items():
            value.__module__, value.__qualname__ = name, key
            setattr(sys.modules[name], key, value)
        return sys.modules[name]

    yield add
    for name in made:
        sys.modules.pop(name, None)


# What is read.


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_transformers_is_read_by_either_kind_of_file(tmp_path, name):
    if name.endswith("bin"):
        saved(tmp_path / name, tensors())
    else:
        safetensors_torch.save_file(tensors(), tmp_path / name)
    assert same(read(tmp_path), tensors()) and same(read(tmp_path / name), tensors())


def test_safetensors_go_before_a_pickle_beside_them(tmp_path):
    safetensors_torch.save_file(tensors(0), tmp_path / "model.safetensors")
    saved(tmp_path / "pytorch_model.bin", tensors(1))
    assert same(read(tmp_path), tensors(0))


@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_put_together_by_their_index(tmp_path, stem):
    whole, (name, suffix) = tensors(), stem.split(".")
    files = {key: f"{name}-0000{1 + i % 2}-of-00002.{suffix}" for i, key in enumerate(whole)}
    for file in set(files.values()):
        part = {key: whole[key] for key in whole if files[key] == file}
        if suffix == "bin":
            saved(tmp_path / file, part)
        else:
            safetensors_torch.save_file(part, tmp_path / file)
    (tmp_path / f"{stem}.index.json").write_text(json.dumps({"weight_map": files}))
    assert same(read(tmp_path), whole)
    (tmp_path / f"{name}-00002-of-00002.{suffix}").unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 of the 2 files that {stem}.index.json names: {name}-00002-of"):
        read(tmp_path)


@ZIP
def test_both_formats_of_torch_are_read(tmp_path, zipped):
    assert same(read(saved(tmp_path / "a.pt", tensors(), zipped)), tensors())
    assert same(read(saved(tmp_path / "b.pt", OrderedDict(tensors()), zipped)), tensors())


def test_checkpoints_of_other_programs_are_read(parity):
    folder = parity / "encoders"
    whisper = read(folder / "whisper_mel80" / "tiny.pt")
    assert whisper["dims"]["n_mels"] == 80 and "encoder.conv1.weight" in whisper["model_state_dict"]
    wenet = read(folder / "wenet_u2pp" / "final.pt")
    assert wenet["encoder.global_cmvn.mean"].shape == (80,) and same(wenet, read(folder / "wenet_u2pp"))
    fairseq = read(folder / "contentvec" / "contentvec_tiny_legacy.pt")
    assert fairseq["model"]["final_proj.weight"].shape == (16, 64)
    assert isinstance(fairseq["task_state"]["target_dictionary"] if "target_dictionary" in fairseq["task_state"]
                      else fairseq["task_state"]["dictionaries"][0], Inert)


@ZIP
def test_what_training_programs_leave_in_checkpoints_is_passed_over(tmp_path, modules, zipped):
    """The names that real files of fairseq, omegaconf and NumPy hold; none of the packages is needed."""
    class Dictionary:
        def __init__(self) -> None:
            self.symbols, self.indices = ["<s>"], {"<s>": 0}

    class DictConfig:
        def __init__(self, content: dict[str, Any]) -> None:
            self.content = content

        def __getstate__(self) -> Any:
            return {"_content": self.content, "_metadata": typing.Any, "_parent": None}

    class AnyNode(DictConfig):
        pass

    class Choice(enum.Enum):
        default = "default"

    modules("fairseq.data.dictionary", Dictionary=Dictionary)
    modules("fairseq.dataclass.constants", Choice=Choice)
    modules("omegaconf.dictconfig", DictConfig=DictConfig)
    modules("omegaconf.nodes", AnyNode=AnyNode)
    content = {"model": tensors(), "args": argparse.Namespace(arch="hubert", layers=12), "best": np.float64(1.5),
               "cfg": DictConfig({"model": AnyNode({"a": dict}), "mode": Choice.default}),
               "extra_state": {"order": np.arange(4), "kind": np.dtype("float32"), "path": Path("/data"),
                               "losses": defaultdict(list, {"train": [1.0]}), "last": deque([1, 2], maxlen=3)},
               "task_state": {"target_dictionary": Dictionary()}}
    file = saved(tmp_path / "hubert.pt", content, zipped)
    for name in [name for name in sys.modules if name.split(".")[0] in ("fairseq", "omegaconf")]:
        del sys.modules[name]
    found = read(file)
    assert same(found["model"], tensors()) and found["args"].layers == 12
    assert found["extra_state"]["losses"] == {"train": [1.0]} and found["extra_state"]["last"] == [1, 2]
    assert isinstance(found["cfg"], Inert) and isinstance(found["task_state"]["target_dictionary"], Inert)


def test_threads_read_checkpoints_at_once(parity):
    file = parity / "encoders" / "contentvec" / "contentvec_tiny_legacy.pt"
    with ThreadPoolExecutor(4) as pool:
        assert len([found["model"] for found in pool.map(read, [file] * 40)]) == 40


# What is refused, and not run.


@ZIP
@pytest.mark.parametrize(("function", "name"), [(os.system, "os.system"), (eval, "builtins.eval"),
                                                (getattr, "builtins.getattr"), (subprocess.check_output,
                                                                               "subprocess.check_output")])
def test_a_checkpoint_with_code_is_refused_by_name_and_not_run(tmp_path, zipped, function, name):
    mark = tmp_path / "ran"
    touch = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    arguments = {"os.system": [f"touch {mark}"], "builtins.eval": [touch],
                 "builtins.getattr": [mark, "touch"], "subprocess.check_output": [["touch", str(mark)]]}[name]
    file = saved(tmp_path / "model.pt", tensors() | {"more": Runs(function, *arguments)}, zipped)
    with pytest.raises(ValueError, match=rf"model\.pt refused: loading it would run {name}, .* It was not run"):
        read(file)
    assert not mark.exists()
    if name != "builtins.getattr":  # the payload is one: loaded as pickles are, it runs
        pickle.loads(pickle.dumps(Runs(function, *arguments)))
        assert mark.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_bare_pickle_is_refused_whatever_its_protocol(tmp_path, protocol):
    file = tmp_path / "model.bin"
    file.write_bytes(pickle.dumps({"a": Runs(os.system, f"touch {tmp_path / 'ran'}")}, protocol))
    with pytest.raises(ValueError, match=r"refused: loading it would run os\.system"):
        read(file)
    file.write_bytes(pickle.dumps({"a": [1.0]}, protocol))
    with pytest.raises(ValueError, match=r"model\.bin cannot be read as a checkpoint: it is a pickle that torch did n"):
        read(file)
    assert not (tmp_path / "ran").exists()


def test_a_second_pickle_hidden_in_the_archive_is_found_too(tmp_path):
    file = saved(tmp_path / "model.pt", tensors())
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("model/more.pkl", pickle.dumps(Runs(os.system, "true"), 4))
    with pytest.raises(ValueError, match=r"refused: loading it would run os\.system"):
        read(file)


def test_functions_of_torch_itself_are_no_way_in(tmp_path):
    for function, arguments in ((torch.load, ["x.pt"]), (torch.hub.load, ["a/b", "c"])):
        file = saved(tmp_path / "model.pt", {"a": Runs(function, *arguments)})
        with pytest.raises(ValueError, match=r"model\.pt (refused|cannot be read as a checkpoint).*load"):
            read(file)


def test_a_whole_module_is_refused_with_its_class(tmp_path):
    with pytest.raises(ValueError, match=r"refused: loading it would run torch\.nn\.modules\.linear\.Linear"):
        read(saved(tmp_path / "model.pt", torch.nn.Linear(2, 2)))


# Files that are no checkpoint.


def _gzip() -> bytes:
    return gzip.compress(b"x" * 2000)


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.bin"), io.BytesIO())
    return out.getvalue()


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return out.getvalue()


WRONG = {
    "nothing": (b"", r"empty \(0 bytes\)"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "git-LFS .* run git lfs pull"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
    "text": (b"these are not weights", r"text \('these are not weights'\)"),
    "json": (b'{"model_type": "whisper"}', "text"),
    "wav": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(100), r"audio \(WAV\)"),
    "flac": (b"fLaC" + bytes(100), r"audio \(FLAC\)"),
    "m4a": (b"\0\0\0\x20ftypM4A " + bytes(100), "audio or video"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5, as of TensorFlow"),
    "ggml": (b"lmgg" + bytes(100), r"GGML, of whisper\.cpp"),
    "noise": (bytes(range(120, 250)), "something unknown"),
    "gzip": (_gzip(), "gzip: unpack it"),
    "tar": (_tar(), "a tar archive"),
    "zip": (_zip(), r"zip archive with readme\.txt"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_called_what_it_is(tmp_path, kind, suffix):
    content, words = WRONG[kind]
    file = tmp_path / f"model{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\{suffix} cannot be read as a checkpoint: .*{words}"):
        read(file)


def test_real_audio_is_not_taken_for_weights(shared):
    for file in sorted((shared / "audio").rglob("*.*"))[:20]:
        if file.suffix in (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"):
            with pytest.raises(ValueError, match=r"cannot be read as a checkpoint: it is (audio|something)"):
                read(file)


@ZIP
@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.99])
def test_a_truncated_file_of_torch_is_refused(tmp_path, zipped, part):
    whole = saved(tmp_path / "whole.pt", {"weight": torch.randn(200, 50)}, zipped).read_bytes()
    file = tmp_path / "model.pt"
    file.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(ValueError, match=r"model\.pt cannot be read as a checkpoint: it is truncated or damaged"):
        read(file)


@pytest.mark.parametrize("length", [5, 40, 700, 1500])
def test_truncated_safetensors_are_refused(tmp_path, length):
    file = tmp_path / "model.safetensors"
    safetensors_torch.save_file({f"layer.{i}": torch.randn(10, 5) for i in range(9)}, file)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as a checkpoint: it is"):
        read(file)


@pytest.mark.parametrize("header", [b"not json", b"[]", b'{"a": {}}', b'{"a": {"dtype": "F32", "data_offsets": [0]}}',
                                    b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
                                    b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}',
                                    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}'])
def test_a_broken_header_of_safetensors_is_refused(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as a checkpoint"):
        read(file)


def test_a_header_of_any_length_is_known_for_what_it_is(tmp_path):
    """The first byte is the length's lowest: 0x80 is no pickle, 0x50 0x4b no zip."""
    seen = set()
    for length in range(1, 40):
        file = tmp_path / "model.bin"
        safetensors_torch.save_file({"a" * (8 * length): torch.ones(2)}, file)
        seen.add(file.read_bytes()[0])
        assert list(read(file)) == ["a" * (8 * length)]
    assert 0x80 in seen


def test_torchscript_and_what_is_no_mapping_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "final.zip", "w") as archive:
        archive.writestr("final/constants.pkl", pickle.dumps(()))
        archive.writestr("final/data.pkl", pickle.dumps(()))
    with pytest.raises(ValueError, match=r"a TorchScript program \(torch\.jit\.save\); expected the tensors by name"):
        read(tmp_path / "final.zip")
    with pytest.raises(ValueError, match="it holds a Tensor; expected tensors by their names"):
        read(saved(tmp_path / "model.pt", torch.ones(3)))
    with pytest.raises(ValueError, match="it holds a list"):
        read(saved(tmp_path / "model.pt", [torch.ones(3)]))


# Into a module.


def module() -> Any:
    return torch.nn.Sequential(OrderedDict(a=torch.nn.Linear(3, 2), norm=torch.nn.BatchNorm1d(2)))


def test_tensors_that_fit_are_loaded_and_the_others_told_by_name(tmp_path):
    source, right = tmp_path / "model.pt", module().state_dict()
    target = module()
    load_into(target, right | {"head.weight": torch.ones(1)}, source, ignore=[r"head\..*"])
    assert same(dict(target.state_dict()), dict(right))
    wrong = {key: value for key, value in right.items() if key != "a.bias"} | {
        "b.bias": torch.ones(1), "a.weight": torch.ones(2, 4)}
    with pytest.raises(ValueError) as refused:
        load_into(module(), wrong, source)
    assert str(refused.value) == (f"{source} does not fit: tensors 1 missing (a.bias); 1 unexpected (b.bias); "
                                  "1 of another shape (a.weight (2, 4) instead of (2, 3))")
    with pytest.raises(ValueError, match=r"a\.weight \(str, no tensor\) instead of \(2, 3\)"):
        load_into(module(), right | {"a.weight": "text"}, source)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_tensors_that_hold_no_numbers_are_refused_by_name(value, kind):
    right = {name: tensor.clone() for name, tensor in module().state_dict().items()}
    right["a.weight"][1, 2] = value
    right["a.weight"] = right["a.weight"].to(getattr(torch, kind))
    with pytest.raises(ValueError, match=r"x is damaged: NaN or infinity in 1 of 7 tensors \(a\.weight\); get it"):
        load_into(module(), right, Path("x"))


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
@pytest.mark.slow
def test_a_large_checkpoint_takes_no_memory_before_its_tensors_are_used(tmp_path, name):
    content = {f"layer.{i}": torch.zeros(10_000_000) for i in range(4)} | {"small": torch.ones(3)}  # 160 MB
    if name.endswith("pt"):
        saved(tmp_path / name, content)
    else:
        safetensors_torch.save_file(content, tmp_path / name)
    code = ("import resource, sys, torch, safetensors.torch\nfrom pathlib import Path\n"
            "from featstore_extractors.checkpoint import read\n"
            "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = used()\nassert read(Path(sys.argv[1]))['small'].sum() == 3\nprint(used() - before)")
    roots = os.pathsep.join(str(ROOT / part) for part in ("extractors", "align"))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True,
                          check=True, env=os.environ | {"PYTHONPATH": roots})
    assert int(done.stdout) < 60_000  # kB, on Linux
