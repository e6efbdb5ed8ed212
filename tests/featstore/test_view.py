"""Views: several features of real recordings on one frame grid, whole, in crops and in batches."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featstore as fs
from featstore import storage
from featstore.segment import SegmentWriter
from featstore_align import align_f0, nearest, retrans
from featstore_extractors import parse

ROOT = Path(__file__).resolve().parents[2]
ALL = ["content", "labels", "f0", "log-mel", "wave", "who"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> fs.Store:
    """Signal features of real recordings, and of each other kind one of random numbers at 50 Hz."""
    path = tmp_path_factory.mktemp("view") / "s.zarr"
    made = fs.create(path)
    fs.extract(fs.corpus(ROOT / "examples" / "corpus"), made, parse("log-mel", "f0", "wave", "w16=wave:16k"), workers=0)
    noise = np.random.default_rng(0)
    with made.writer() as w:
        w.declare("content", fs.Spec(made_by="noise", version=1, frame_rate=Fraction(50), kind="continuous",
                                     centre_s=Fraction(1, 80), settings={"of": "content"}))
        w.declare("labels", fs.Spec(made_by="noise", version=1, frame_rate=Fraction(50), kind="discrete",
                                    settings={"of": "labels"}))
        w.declare("who", fs.Spec(made_by="noise", version=1, kind="global", settings={"of": "who"}))
        for key, utterance in made.utterances.items():
            frames = int(utterance.duration_s * 50)
            w.write(key, "content", noise.normal(size=(frames, 5)).astype(np.float16))
            w.write(key, "labels", noise.integers(0, 100, frames, dtype=np.int32))
            w.write(key, "who", noise.normal(size=7).astype(np.float32))
    return fs.open(path)


@pytest.fixture(scope="module")
def view(store: fs.Store) -> fs.View:
    return store.view(ALL, like="log-mel")


def test_lengths_agree_in_every_utterance(store: fs.Store, view: fs.View) -> None:
    assert len(view) == 11 and list(view) == list(store.utterances)
    for key, x in view.items():
        frames = len(store[key, "log-mel"])
        assert view.length(key) == frames
        assert {name: len(x[name]) for name in ("content", "labels", "f0", "log-mel")} == dict.fromkeys(
            ("content", "labels", "f0", "log-mel"), frames)
        assert x["wave"].shape == (frames * 256,) and x["who"].shape == (7,)


def test_each_kind_comes_as_align_has_it(store: fs.Store, view: fs.View) -> None:
    key = next(iter(view))
    x, frames, rate = view[key], view.length(key), Fraction(24000, 256)
    assert np.array_equal(x["log-mel"], store[key, "log-mel"][:])
    assert np.array_equal(x["content"], retrans(store[key, "content"][:], 50, rate, length=frames))
    assert np.array_equal(x["labels"], nearest(store[key, "labels"][:], 50, rate, length=frames,
                                               target_centre_s=Fraction(128, 24000)))
    assert np.array_equal(x["f0"], align_f0(store[key, "f0"][:], 200, rate, length=frames,
                                            target_centre_s=Fraction(128, 24000)))
    assert np.array_equal(x["who"], store[key, "who"][:])
    assert np.array_equal(x["wave"], store[key, "wave"].as_float()[:frames * 256])
    assert x["content"].dtype == np.float16 and x["wave"].dtype == np.float32 and x["labels"].dtype == np.int32


@pytest.mark.parametrize("timing", ["edges", "centres"])
def test_a_crop_is_the_slice_of_the_whole_bit_for_bit(store: fs.Store, timing: str) -> None:
    view = store.view(ALL, like="log-mel", timing=timing)
    random = np.random.default_rng(1)
    for key, whole in view.items():
        for _ in range(5):
            frames = int(random.integers(1, min(200, view.length(key))))
            start = int(random.integers(0, view.length(key) - frames + 1))
            crop = view.crop(key, start=start, frames=frames)
            for name in ("content", "labels", "f0", "log-mel"):
                assert crop[name].tobytes() == whole[name][start:start + frames].tobytes(), name
            assert crop["wave"].tobytes() == whole["wave"][start * 256:(start + frames) * 256].tobytes()


def test_a_batch_has_the_crops_and_their_lengths(view: fs.View) -> None:
    keys = list(view)
    items = [(keys[0], 3), (keys[1], view.length(keys[1]) - 10), (keys[2], 0)]
    batch = view.read_batch(items, frames=64)
    assert batch["lengths"].tolist() == [64, 10, 64]
    assert batch["content"].shape == (3, 64, 5) and batch["f0"].shape == (3, 64)
    assert batch["wave"].shape == (3, 64 * 256) and batch["who"].shape == (3, 7)
    for number, (key, start) in enumerate(items):
        for name, array in view.crop(key, start=start, frames=64).items():
            assert array.tobytes() == batch[name][number].tobytes()


def test_beyond_the_end_stands_the_pad_value_of_the_feature(store: fs.Store, view: fs.View) -> None:
    key = next(iter(view))
    end = view.crop(key, start=view.length(key) - 1, frames=4)
    floor = store.features["log-mel"].spec.pad
    assert floor < -5
    assert (end["log-mel"][1:] == floor).all() and not (end["log-mel"][0] == floor).all()
    assert not end["f0"][1:].any() and not end["wave"][256:].any() and not end["content"][1:].any()


def test_a_batch_is_written_over_an_earlier_one(view: fs.View) -> None:
    keys = list(view)
    room = view.read_batch([(keys[0], 0), (keys[1], 5)], frames=32)
    again = view.read_batch([(keys[2], 7), (keys[3], 0)], frames=32, out=room)
    fresh = view.read_batch([(keys[2], 7), (keys[3], 0)], frames=32)
    assert again is room
    assert all(again[name].tobytes() == fresh[name].tobytes() for name in fresh)
    with pytest.raises(ValueError, match=r"out\['content'\] is float16 \(2, 32, 5\); expected float16 \(1, 32, 5\)"):
        view.read_batch([(keys[0], 0)], frames=32, out=room)
    with pytest.raises(ValueError, match=r"out\['f0'\] is float32 \(2, 32\) with gaps; expected"):
        view.read_batch([(keys[2], 7), (keys[3], 0)], frames=32,
                        out=room | {"f0": np.zeros((2, 64), np.float32)[:, ::2]})


def test_a_batch_is_read_by_one_call(view: fs.View, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [(key, 2) for key in view]
    whole = view.read_batch(items, frames=40)
    calls, read_many = [], storage.read_many
    monkeypatch.setattr(storage, "read_many", lambda ranges: calls.append(len(ranges)) or read_many(ranges))
    again = view.read_batch(items, frames=40)
    assert calls == [len(items) * len(ALL)]
    assert all(again[name].tobytes() == whole[name].tobytes() for name in whole)


def _noted(name: str, call: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    return lambda *args: calls.append(name) or call(*args)


def test_a_batch_is_announced_before_its_first_byte_is_read(view: fs.View, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [(key, 2) for key in view]
    whole = view.read_batch(items, frames=40)
    calls: list[str] = []
    for name in ("posix_fadvise", "preadv"):
        monkeypatch.setattr(os, name, _noted(name, getattr(os, name), calls))
    again = view.read_batch(items, frames=40)
    count = len(items) * len(ALL)
    assert calls == ["posix_fadvise"] * count + ["preadv"] * count
    assert all(again[name].tobytes() == whole[name].tobytes() for name in whole)


def test_a_batch_of_more_ranges_than_files_are_kept_open_is_the_same(view: fs.View, monkeypatch) -> None:
    items = [(key, 2) for key in view]
    whole = view.read_batch(items, frames=40)
    monkeypatch.setattr(storage, "OPEN_FILES", 3)
    again = view.read_batch(items, frames=40)
    assert all(again[name].tobytes() == whole[name].tobytes() for name in whole)


def test_where_the_system_has_neither_preadv_nor_fadvise_the_bytes_are_the_same(view: fs.View, monkeypatch) -> None:
    items = [(key, 2) for key in view]
    whole = view.read_batch(items, frames=40)
    monkeypatch.setattr(storage, "_READS", False)
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.delattr(os, "preadv")
    again = view.read_batch(items, frames=40)
    assert all(again[name].tobytes() == whole[name].tobytes() for name in whole)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A store of two features of three utterances."""
    store = fs.create(tmp_path / "s.zarr")
    with store.writer() as w:
        w.declare("x", fs.Spec(made_by="noise", version=1, frame_rate=100, kind="continuous", dim=3))
        w.declare("f0", fs.Spec(made_by="noise", version=1, frame_rate=200, kind="f0", dim=0))
        for key in "abc":
            w.utterance({"key": key}, source=bytes(32))
            w.write(key, "x", np.random.default_rng(ord(key)).normal(size=(60, 3)).astype(np.float32))
            w.write(key, "f0", np.random.default_rng(ord(key)).uniform(100, 200, 120).astype(np.float32))
    return store.path


def _compact(path: Path, name: str) -> None:
    """Merge all segments of a feature into one, and remove them as a purge does."""
    feature = fs.open(path).features[name]
    merged = SegmentWriter(feature.folder / "segments" / storage.new_id(), feature.dtype.name, feature.dim)
    for record in feature.index.records:
        source = feature.index.segments[int(record["segment"])]
        merged.copy(source.key(record), record, source.blocks(record))
    merged.commit({"feature": name, "replaces": [segment.id for segment in feature.segments]})
    for segment in feature.segments:
        storage.handles.forget(str(segment.folder))
        shutil.rmtree(segment.folder)


@pytest.mark.parametrize("warm", [False, True])
def test_a_view_goes_on_after_its_segments_were_compacted_away(two: Path, warm: bool) -> None:
    items = [("a", 3), ("b", 0), ("c", 9)]
    expected = fs.open(two).view(["x", "f0"], like="x").read_batch(items, frames=20)
    view = fs.open(two).view(["x", "f0"], like="x")
    if warm:
        view.read_batch(items, frames=20)
    for name in ("x", "f0", "x"):
        _compact(two, name)
        found = view.read_batch(items, frames=20)
        assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def test_a_view_whose_rows_were_written_anew_and_purged_is_stale(two: Path) -> None:
    view = fs.open(two).view(["x", "f0"], like="x")
    whole = view["a"]
    with fs.open(two).writer() as w:
        w.write("b", "x", np.zeros((60, 3), np.float32))
    assert view["b"]["x"].any()  # the view keeps to what it saw
    _compact(two, "x")
    with pytest.raises(fs.errors.StaleFeature, match="b: x was written anew since the store was opened"):
        view.read_batch([("a", 0), ("b", 0)], frames=20)
    assert all(view["a"][name].tobytes() == whole[name].tobytes() for name in whole)


def test_a_rate_alone_makes_a_grid(store: fs.Store) -> None:
    view = store.view(["content", "f0", "w16"], rate=100)
    for key, x in view.items():
        frames = int(store.utterances[key].duration_s * 100)
        assert len(x["content"]) == len(x["f0"]) == frames and len(x["w16"]) == frames * 160


def test_samples_are_never_resampled(store: fs.Store) -> None:
    with pytest.raises(fs.errors.BadRequest, match="w16 has 16000 samples per second and the view 375/4 frames: "
                                                   "a frame would be 512/3 samples"):
        store.view(["w16"], like="log-mel")


def test_missing_features_are_named_before_anything_is_read(store: fs.Store, tmp_path: Path) -> None:
    with pytest.raises(fs.errors.MissingFeature, match="nonesuch"):
        store.view(["f0", "nonesuch"], like="log-mel")
    fs.extract(fs.corpus(ROOT / "examples" / "corpus"), fs.create(tmp_path / "s.zarr"), parse("log-mel"), workers=0)
    part = fs.open(tmp_path / "s.zarr")
    key = next(iter(part.utterances))
    with part.writer() as w:
        w.declare("mine", fs.Spec(made_by="mine", version=1, frame_rate=50, kind="continuous"))
        w.write(key, "mine", np.zeros((int(part.utterances[key].duration_s * 50), 2), np.float32))
    part = fs.open(tmp_path / "s.zarr")
    with pytest.raises(fs.errors.MissingFeature, match=r"lacks mine for 10 of 11 utterances, such as .* -f mine"):
        part.view(["mine"], like="log-mel")
    assert list(part.view(["mine"], like="log-mel", utterances=[key])) == [key]


def test_features_of_different_audio_are_refused(tmp_path: Path) -> None:
    import soundfile as sf

    (tmp_path / "wavs").mkdir()
    for seed, request in ((0, "log-mel"), (1, "f0")):
        sf.write(tmp_path / "wavs" / "a.wav", np.random.default_rng(seed).normal(0, 0.1, 48000), 24000)
        store = fs.open(tmp_path / "s.zarr") if seed else fs.create(tmp_path / "s.zarr")
        fs.extract(fs.corpus(tmp_path / "wavs"), store, parse(request), workers=0)
    with pytest.raises(fs.errors.StaleFeature, match=r"a: f0 was made from audio .* and log-mel from .* brings both"):
        fs.open(tmp_path / "s.zarr").view(["f0", "log-mel"], like="log-mel")


@pytest.mark.parametrize(("names", "grid", "message"), [
    (["f0"], {}, "a view needs one grid"),
    (["f0"], {"like": "log-mel", "rate": 50}, "a view needs one grid"),
    ("f0", {"like": "log-mel"}, "expected a list of features"),
    (["f0"], {"like": "wave"}, "like='wave' is of kind samples"),
    (["f0"], {"like": "who"}, "like='who' is of kind global"),
    (["f0"], {"rate": 0}, "expected frames per second, above 0"),
])
def test_grids_that_make_no_sense_are_refused(store: fs.Store, names: list[str], grid: dict, message: str) -> None:
    with pytest.raises(fs.errors.BadRequest, match=message):
        store.view(names, **grid)


def test_crops_outside_are_refused_with_the_length(view: fs.View) -> None:
    key = next(iter(view))
    for start, frames in ((-1, 5), (view.length(key), 5), (0, 0)):
        with pytest.raises(ValueError, match=f"of {view.length(key)}: expected at least one frame"):
            view.crop(key, start=start, frames=frames)
    with pytest.raises(fs.errors.MissingUtterance, match="the view has no utterance 'nobody'"):
        view["nobody"]


def test_a_view_says_what_it_is(view: fs.View) -> None:
    assert repr(view).startswith("<View of s.zarr: content labels f0 log-mel wave who at 375/4 Hz by edges; 11 utter")


@pytest.mark.parametrize("mapped", [False, True])
def test_a_view_goes_to_another_process(store: fs.Store, view: fs.View, mapped: bool) -> None:
    key = next(iter(view))
    again = pickle.loads(pickle.dumps(fs.open(store.path, mapped=mapped).view(ALL, like="log-mel")))
    assert again.store.mapped is mapped and all(s.mapped is mapped for s in again.store.features["f0"].segments)
    assert all(again[key][name].tobytes() == array.tobytes() for name, array in view[key].items())


def test_taps_of_one_frame_are_what_it_is_made_of(store: fs.Store, view: fs.View) -> None:
    key = next(iter(view))
    taps = view.taps(key, "content", 11)
    assert taps == [(5, Fraction(1, 4)), (6, Fraction(3, 4))]  # 50 to 93.75 Hz: 5.87 to 6.40 of the source's frames
    stored = store[key, "content"][:].astype(np.float64)
    made = sum(float(weight) * stored[frame] for frame, weight in taps)
    np.testing.assert_allclose(view[key]["content"][11], made, atol=2e-3)
    assert view.taps(key, "log-mel", 10) == [(10, Fraction(1))] and view.taps(key, "who", 10) == []
    assert len(view.taps(key, "wave", 10)) == 256
