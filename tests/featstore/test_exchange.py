"""Exchange: what is exported comes back as it was; trees of others are read or refused, never run."""

from __future__ import annotations

import json
import os
import pickle
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import featstore as fs
from featstore.errors import BadRequest, CorruptSegment, IdentityMismatch, MissingFeature
from featstore.exchange import export_tree, import_tree, kaldi_id, safe_path

HOSTILE = ["../../escape", "/etc/passwd", "a/../../b", "..", ".", "a\\b", "nul\0", "line\nbreak", "a//b", "a/", "/",
           "~", "%2e%2e", "CON:", "x" * 500, "é" * 250, "ключ с пробелом", "a.npy/b", "a", "a.npy", "\u202eodd", "-rf",
           "tab\tbed", "keys.jsonl", "%", "...", "a" * 250 + "1", "a" * 250 + "2", "\u2028", "\u3000 "]
RNG = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Durability has tests of its own; here a sync is only slow."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def empty(tmp_path) -> fs.Store:
    return fs.create(tmp_path / "empty.zarr")


def _spec(kind: str, dtype: str, dim: int = 0, rate: object = 50, **facts) -> fs.Spec:
    frame_rate = None if kind == "global" else Fraction(rate)  # type: ignore[arg-type]
    return fs.Spec("x", 1, kind, frame_rate, dtype=dtype, dim=dim, **facts)  # type: ignore[arg-type]


SPECS = {"mel": _spec("continuous", "float32", 5, "375/4", centre_s=Fraction(2, 375), pad=-11.5, sample_rate=24000),
         "half": _spec("continuous", "float16", 2),
         "wide": _spec("continuous", "float64", 2), "f0": _spec("f0", "float32"),
         "units": _spec("discrete", "int32"), "small": _spec("discrete", "uint8"),
         "speaker": _spec("global", "float32", 4)}


def _filled(path: Path, keys=("a", "b/1")) -> fs.Store:
    """A store with features of all kinds and types but waveforms."""
    store = fs.create(path)
    with store.writer() as w:
        for name, spec in SPECS.items():
            w.declare(name, spec)
        for number, key in enumerate(keys):
            w.utterance({"key": key, "speaker": "one two", "text": f"line {number}\nnext"})
            for name, spec in SPECS.items():
                shape = ([] if spec.kind == "global" else [3 + number]) + ([spec.dim] if spec.dim else [])
                w.write(key, name, (RNG.uniform(0, 200, shape)).astype(spec.dtype))
    return store


def _arrays(store: fs.Store) -> dict:
    return {name: {key: (row.read().tobytes(), row.shape, row.dtype) for key, row in feature.items()}
            for name, feature in store.features.items()}


def _tree(folder: Path, **features: dict) -> Path:
    for feature, arrays in features.items():
        for key, array in arrays.items():
            path = folder / feature / f"{key}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
    return folder


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("layout", ["npy", "kaldi"])
def test_what_is_exported_comes_back_as_it_was(tmp_path, empty, layout):
    store = _filled(tmp_path / "a.zarr")
    assert export_tree(store, tmp_path / "out", layout) == 2 * len(SPECS)
    done = import_tree(tmp_path / "out", empty, layout)
    assert done.failures == [] and done.fresh == 0 and done.features == dict.fromkeys(SPECS, 2)
    assert _arrays(empty) == _arrays(store)
    for name, feature in empty.features.items():
        for fact in ("kind", "frame_rate", "centre_s", "sample_rate", "pad", "dim", "dtype"):
            assert getattr(feature.spec, fact) == getattr(SPECS[name], fact), "no rate need be given"
        assert feature.imported and feature.label.startswith("imported:")


@pytest.mark.parametrize("layout", ["npy", "kaldi"])
def test_hostile_keys_stay_inside_and_come_back(tmp_path, empty, layout):
    outside = _files(tmp_path)
    store = _filled(tmp_path / "a.zarr", HOSTILE)
    export_tree(store, tmp_path / "out", layout, ["half"])
    assert [n for n in _files(tmp_path) if not n.startswith(("out/", "a.zarr/"))] == outside
    assert len(_files(tmp_path / "out")) == (len(HOSTILE) + 2 if layout == "npy" else 6)
    assert all(len(part.encode()) <= 255 for name in _files(tmp_path / "out") for part in name.split("/"))
    import_tree(tmp_path / "out", empty, layout)
    assert _arrays(empty)["half"] == _arrays(store)["half"] and sorted(empty.utterances) == sorted(HOSTILE)


KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(keys=st.sets(KEYS | st.text("./%a n\\", min_size=1, max_size=8), min_size=2, max_size=20))
@settings(max_examples=100, deadline=None)
def test_each_key_has_a_path_and_an_id_of_its_own(keys):
    paths, ids = {safe_path(key) for key in keys}, {kaldi_id(key) for key in keys}
    assert len(paths) == len(ids) == len(keys)
    for path in paths:
        assert not path.startswith("/") and path.isprintable() and "\\" not in path
        assert not {"", ".", ".."} & set(path.split("/"))
    files = {f"{path}.npy" for path in paths}
    assert not any(str(parent) in files for path in paths for parent in Path(path).parents), "no file is a folder too"
    assert all(len(name.split()) == 1 for name in ids)


def test_waveforms_are_exported_as_float_with_their_scale(tmp_path, empty):
    store = fs.create(tmp_path / "a.zarr")
    with store.writer() as w:
        w.declare("wave", _spec("samples", "int16", rate=8000))
        w.write("a", "wave", np.array([0, 100, -32768], np.int16), scale=1.5 / 32768)
    export_tree(store, tmp_path / "out", "npy")
    wave = np.load(tmp_path / "out" / "wave" / "a.npy")
    assert wave.dtype == np.float32 and wave[2] == -1.5
    import_tree(tmp_path / "out", empty, "npy")
    assert (empty["a", "wave"].read() == store["a", "wave"].as_float()).all()
    assert empty.features["wave"].kind == "samples"


def test_kaldi_tables_are_sorted_words(tmp_path):
    store = _filled(tmp_path / "a.zarr", ["Z z", "a", "é"])
    export_tree(store, tmp_path / "out", "kaldi", ["f0"])
    assert (tmp_path / "out" / "utt2spk").read_text("utf-8").split("\n")[:3] == ["Z%20z one%20two", "a one%20two",
                                                                               "é one%20two"]
    assert (tmp_path / "out" / "text").read_text("utf-8").startswith("Z%20z line 0 next\n")
    assert [line.split()[0] for line in (tmp_path / "out" / "f0.scp").read_text("utf-8").splitlines()] == [
        "Z%20z", "a", "é"]


def test_nothing_is_written_over(tmp_path):
    store = _filled(tmp_path / "a.zarr")
    (tmp_path / "out").mkdir()
    assert export_tree(store, tmp_path / "out", "npy", ["f0"]) == 2, "an empty folder will do"
    with pytest.raises(BadRequest, match="not an empty folder"):
        export_tree(store, tmp_path / "out", "npy", ["mel"])
    with pytest.raises(MissingFeature, match=r"has: .*f0"):
        export_tree(store, tmp_path / "new", "npy", ["f00"])
    assert not (tmp_path / "new").exists()


def test_damage_is_not_exported(tmp_path):
    store = _filled(tmp_path / "a.zarr")
    (shard,) = (store.path / "features" / "f0").glob("*/segments/*/frames/c/0")
    data = bytearray(shard.read_bytes())
    data[1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptSegment, match="f0 does not match its checksum"):
        export_tree(store, tmp_path / "out", "npy", ["f0"])


def test_the_same_tree_again_does_nothing_and_a_changed_one_is_refused(tmp_path, empty):
    tree = _tree(tmp_path / "t", x={"a": np.ones((4, 2)), "s/b": np.ones((3, 2))})
    assert import_tree(tree, empty, "npy", rate=Fraction(50)).features == {"x": 2}
    assert sorted(empty.utterances) == ["a", "s/b"] and empty.features["x"].dtype == np.float64
    before = sorted((empty.path / "features" / "x").rglob("*"))
    again = import_tree(tree, empty, "npy", rate=Fraction(50))
    assert (again.features, again.fresh, again.failures) == ({"x": 0}, 2, [])
    assert sorted((empty.path / "features" / "x").rglob("*")) == before
    _tree(tree, x={"a": np.zeros((4, 2))})
    with pytest.raises(IdentityMismatch, match=r"imported:.*\n.*\n.*--replace"):
        import_tree(tree, empty, "npy", rate=Fraction(50))
    assert empty["a", "x"][0, 0] == 1
    assert import_tree(tree, empty, "npy", rate=Fraction(50), replace=True).features == {"x": 2}
    assert empty["a", "x"][0, 0] == 0


def test_another_rate_is_another_identity(tmp_path, empty):
    tree = _tree(tmp_path / "t", x={"a": np.ones(4)})
    import_tree(tree, empty, "npy", rate=Fraction(50))
    with pytest.raises(IdentityMismatch):
        import_tree(tree, empty, "npy", rate=Fraction(100))


def test_what_was_extracted_is_not_replaced_unasked(tmp_path):
    store = _filled(tmp_path / "a.zarr")
    before = _arrays(store)
    tree = _tree(tmp_path / "t", mel={"a": np.ones((4, 2))}, y={"a": np.ones(2)})
    with pytest.raises(IdentityMismatch, match=r"made by x"):
        import_tree(tree, store, "npy", rate=Fraction(50))
    assert _arrays(fs.open(store.path)) == before


def test_a_rate_is_needed_by_all_but_vectors(tmp_path, empty):
    tree = _tree(tmp_path / "t", spk={"a": np.ones(4)})
    with pytest.raises(BadRequest, match="--rate 50"):
        import_tree(tree, empty, "npy")
    import_tree(tree, empty, "npy", kind="global")
    assert empty["a", "spk"].shape == (4,) and empty.features["spk"].frame_rate is None


def test_only_named_features_are_taken(tmp_path, empty):
    tree = _tree(tmp_path / "t", x={"a": np.ones(4)}, y={"a": np.ones(4)}, **{"Not a name": {"a": np.ones(4)}})
    assert list(import_tree(tree, empty, "npy", ["y"], rate=Fraction(50)).features) == ["y"]
    with pytest.raises(MissingFeature, match="has: x"):
        import_tree(tree, empty, "npy", ["xx"], rate=Fraction(50))
    with pytest.raises(BadRequest, match="'Not a name' cannot be"):
        import_tree(tree, empty, "npy", rate=Fraction(50))
    for layout in ("npy", "kaldi", "amphion"):
        with pytest.raises(BadRequest, match="no arrays in this layout"):
            import_tree(tmp_path / "nowhere", empty, layout)
    with pytest.raises(BadRequest, match="none of npy, kaldi, amphion"):
        import_tree(tree, empty, "zip")  # type: ignore[arg-type]


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_each_bad_file_is_one_failure_and_none_is_run(tmp_path, empty):
    nan = np.ones((4, 2), np.float32)
    nan[1, 1] = np.nan
    tree = _tree(tmp_path / "t", x={"good": np.ones((4, 2), np.float32), "good2": np.ones((5, 2), np.float32),
                                    "dims": np.ones((4, 3), np.float32), "cube": np.ones((4, 2, 2)), "nan": nan,
                                    "none": np.ones((0, 2)), "complex": np.ones((4, 2), complex),
                                    "text": np.array(["a"])})
    home = tree / "x"
    np.save(home / "object.npy", np.array([_Bomb(tmp_path / "bang")], object), allow_pickle=True)
    (home / "pickle.npy").write_bytes(pickle.dumps(_Bomb(tmp_path / "bang")))
    (home / "empty.npy").write_bytes(b"")
    (home / "short.npy").write_bytes((home / "good.npy").read_bytes()[:-8])
    (home / "header.npy").write_bytes((home / "good.npy").read_bytes()[:40])
    (home / "junk.npy").write_bytes(b"RIFF....WAVE")
    np.savez(home / "archive.npz", a=nan)
    (home / "archive.npz").rename(home / "archive.npy")
    (home / "link.npy").symlink_to(home / "nothing")
    (home / "notes.txt").write_text("not an array")
    done = import_tree(tree, empty, "npy", rate=Fraction(50))
    assert not (tmp_path / "bang").exists()
    assert done.features == {"x": 2} and sorted(empty.features["x"]) == sorted(empty.utterances) == ["good", "good2"]
    reasons = {failure.utterance: failure.reason for failure in done.failures}
    assert sorted(reasons) == sorted(["dims", "cube", "nan", "none", "complex", "text", "object", "pickle", "empty",
                                      "short", "header", "junk", "archive", "link"]) and len(done.failures) == 14
    for key, words in {"dims": "(4, 3), expected (T, 2)", "nan": "1 values that are NaN", "cube": "(4, 2, 2)",
                       "complex": "complex128", "archive": "npz", "object": "not a .npy file of plain numbers",
                       "none": "empty"}.items():
        assert words in reasons[key], reasons[key]
    assert {failure.feature for failure in done.failures} == {"x"}
    assert all(Path(failure.path).parent == home for failure in done.failures)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_pipes_devices_and_folders_are_never_opened(tmp_path, empty):
    home = _tree(tmp_path / "t", x={"good": np.ones((4, 2), np.float32)}) / "x"
    os.mkfifo(home / "pipe.npy")
    (home / "endless.npy").symlink_to("/dev/zero")
    (home / "folder.npy").mkdir()
    done = import_tree(tmp_path / "t", empty, "npy", rate=Fraction(50))
    assert {failure.utterance: failure.reason for failure in done.failures} == {
        "pipe": "not a regular file (named pipe)", "endless": "not a regular file (device)"}
    (tmp_path / "y.scp").write_text(f"a {home / 'pipe.npy'}\nb /dev/zero\nc {home}\n")
    reasons = [failure.reason for failure in import_tree(tmp_path, empty, "kaldi", rate=Fraction(50)).failures]
    assert reasons == [f"not a regular file ({kind})" for kind in ("named pipe", "device", "folder")]


def test_a_tree_without_one_good_file_changes_nothing(tmp_path, empty):
    (tmp_path / "t" / "x").mkdir(parents=True)
    (tmp_path / "t" / "x" / "a.npy").write_bytes(b"")
    done = import_tree(tmp_path / "t", empty, "npy")
    assert len(done.failures) == 1 and done.features == {} and not empty.features


def test_types_widen_to_what_holds_all_files(tmp_path, empty):
    tree = _tree(tmp_path / "t", x={"a": np.ones(4, np.float16), "b": np.ones(4, ">f4"), "c": np.ones(4, np.int16)},
                 v={"a": np.array([True, False])})
    import_tree(tree, empty, "npy", rate=Fraction(50))
    assert empty.features["x"].dtype == np.float32 and empty.features["v"].dtype == np.uint8


def test_arrays_that_do_not_fit_their_audio_are_refused(tmp_path, empty):
    with empty.writer() as w:
        w.utterance({"key": "a", "text": "kept"}, source=b"a" * 32, seconds=1.0)
    tree = _tree(tmp_path / "t", x={"a": np.ones((200, 2)), "b": np.ones((9, 2))}, y={"a": np.ones((50, 2))})
    done = import_tree(tree, empty, "npy", rate=Fraction(50))
    assert [failure.utterance for failure in done.failures] == ["a"] and "lasts 4.000 s" in done.failures[0].reason
    assert empty.utterances["a"].text == "kept" and empty.utterances["b"].text is None
    assert empty["a", "y"].source == (b"a" * 32).hex() and empty.why("a", "y").state == "imported"


def test_a_broken_note_of_ours_is_said(tmp_path, empty):
    tree = _tree(tmp_path / "t", x={"a": np.ones(4)})
    for text in ("{", '{"x": {"frame_rate": "fast"}}', '{"x": 3}'):
        (tree / "features.json").write_text(text)
        with pytest.raises(BadRequest, match=r"features.json"):
            import_tree(tree, empty, "npy")


@pytest.mark.parametrize("above", ["", "m4singer"])
def test_amphion_layout(tmp_path, empty, above):
    mel, f0 = RNG.normal(size=(100, 30)).astype(np.float32), RNG.uniform(0, 400, 30)
    tree = _tree(tmp_path / "t" / above, mels={"u_1": mel}, pitches={"u_1": f0}, energys={"u_1": f0.astype(np.float32)},
                 uvs={"u_1": f0 > 0}, whisper={"u_1": np.ones((16, 8), np.float32)},
                 contentvec={"u_1": np.ones((16, 4), np.float32)}, wenet={"u_1": np.ones((8, 6), np.float32)},
                 audios={"u_1": np.ones(7680, np.float32)})
    (tree / "pitches" / "statistics.json").write_text("{}")
    done = import_tree(tmp_path / "t", empty, "amphion")
    assert done.failures == [] and sorted(done.features) == [
        "contentvec", "energy", "f0", "log-mel", "wave", "wenet", "whisper"], "uvs say what f0 = 0 says"
    assert (empty["u_1", "log-mel"].read() == mel.T).all() and empty["u_1", "log-mel"].shape == (30, 100)
    assert (empty["u_1", "f0"].read() == f0.astype(np.float32)).all()
    kinds = {name: (feature.kind, feature.frame_rate, feature.dtype) for name, feature in empty.features.items()}
    frames = Fraction(24000, 256)
    assert kinds == {"log-mel": ("continuous", frames, np.float32), "f0": ("f0", frames, np.float32),
                     "energy": ("continuous", frames, np.float32), "whisper": ("continuous", 50, np.float32),
                     "contentvec": ("continuous", 50, np.float32), "wenet": ("continuous", 25, np.float32),
                     "wave": ("samples", 24000, np.float32)}
    assert import_tree(tmp_path / "t", empty, "amphion", ["mels", "f0"]).fresh == 2


def test_amphion_folders_of_several_data_sets_are_told_apart(tmp_path, empty):
    for name in ("one", "two"):
        _tree(tmp_path / "t" / name, mels={"a": np.ones((100, 4), np.float32)})
    with pytest.raises(BadRequest, match="one, two"):
        import_tree(tmp_path / "t", empty, "amphion")
    assert import_tree(tmp_path / "t" / "two", empty, "amphion").features == {"log-mel": 1}


def _ark(path: Path, entries: dict[str, bytes]) -> None:
    data, lines = b"", []
    for key, body in entries.items():
        data += key.encode() + b" "
        lines.append(f"{key} {path.name}:{len(data)}")
        data += body
    path.write_bytes(data)
    path.with_suffix(".scp").write_text("\n".join(lines) + "\n")


def _matrix(token: bytes, array: np.ndarray) -> bytes:
    return b"\0B" + token + b" " + b"".join(struct.pack("<bi", 4, n) for n in array.shape) + array.tobytes()


def test_kaldi_binary_and_text_objects(tmp_path, empty):
    one, two = np.arange(6, dtype="<f4").reshape(3, 2), np.arange(8, dtype="<f8").reshape(4, 2)
    _ark(tmp_path / "m.ark", {"a": _matrix(b"FM", one), "b": _matrix(b"DM", two), "c": b" [\n  1 2.5 \n  -3e2 4 ]\n",
                              "d": b" [\n 7 8 ]\n"})
    _ark(tmp_path / "v.ark", {"a": _matrix(b"FV", one[:, 0]), "b": _matrix(b"DV", two[:, 0]), "c": b" [ 1 2 3 ]\n"})
    (tmp_path / "wav.scp").write_text("a a.wav\n")
    done = import_tree(tmp_path, empty, "kaldi", rate=Fraction(100))
    assert done.failures == [] and done.features == {"m": 4, "v": 3}
    assert (empty["a", "m"].read() == one).all() and (empty["b", "m"].read() == two).all()
    assert empty["c", "m"].read().tolist() == [[1, 2.5], [-300, 4]] and empty["d", "m"].shape == (1, 2)
    assert empty["c", "v"].read().tolist() == [1, 2, 3] and empty.features["v"].dim == 0


def test_kaldi_objects_that_cannot_be_read_are_named(tmp_path, empty):
    good = _matrix(b"FM", np.ones((3, 2), "<f4"))
    _ark(tmp_path / "m.ark", {
        "good": good, "packed": b"\0BCM " + bytes(40), "packed2": b"\0BCM2 " + bytes(40), "token": b"\0BXY " + bytes(9),
        "ragged": b" [\n 1 2\n 3 ]\n", "words": b" [ one ]\n", "latin": b" \xff\xfe ]", "prose": b" what [ 1 ]\n",
        "negative": b"\0BFM \x04" + struct.pack("<i", -3) + b"\x04" + struct.pack("<i", 2),
        "huge": b"\0BFM \x04" + struct.pack("<i", 2**31 - 1) + b"\x04" + struct.pack("<i", 2**31 - 1), "cut": good[:9]})
    with (tmp_path / "m.scp").open("a") as scp:
        scp.write(f"pipe touch {tmp_path}/was-run; cat m.ark |\nrange m.ark:5[0:1]\nlost no.ark:3\ngood m.ark:5\n"
                  "beyond m.ark:99999\n")
    done = import_tree(tmp_path, empty, "kaldi", rate=Fraction(100))
    assert done.features == {"m": 1} and not (tmp_path / "was-run").exists()
    reasons = {failure.utterance: failure.reason for failure in done.failures}
    assert len(reasons) == 15
    for key, words in {"packed": "compressed", "packed2": "compressed", "token": "FM, DM", "pipe": "are not run",
                       "range": "ranges are not supported", "lost": "No such file", "huge": "cut off",
                       "good": "twice", "ragged": "1 to 2 numbers", "beyond": "no closing"}.items():
        assert words in reasons[key], reasons[key]


def test_features_json_is_plain(tmp_path):
    store = _filled(tmp_path / "a.zarr")
    export_tree(store, tmp_path / "out", "npy", ["mel"])
    facts = json.loads((tmp_path / "out" / "features.json").read_text())["mel"]
    assert facts["frame_rate"] == "375/4" and facts["kind"] == "continuous"
    assert facts["identity"] == store.features["mel"].identity
