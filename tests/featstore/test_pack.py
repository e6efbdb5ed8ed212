"""Packing: lossless codecs change no answer, int8 keeps within its range and says how far off it is."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import featstore as fs
from featstore import exchange, upkeep
from featstore.compact import compact
from featstore.errors import BadRequest, CorruptSegment, IdentityMismatch
from featstore.int8 import Outside, Quantiser
from featstore.pack import pack
from featstore.verify import verify

NET = fs.Spec(made_by="net", version=1, kind="continuous", frame_rate=50, dim=4, dtype="float16", pad=-3.0,
              settings={"layer": 20})
F0 = fs.Spec(made_by="f0", version=1, kind="f0", frame_rate=50, dim=0, dtype="float32")
KEYS = "abcd"


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Durability has tests of its own; here a sync is only slow."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def _array(key: str, frames: int = 50, seed: int = 0) -> np.ndarray:
    """Smooth channels, each of its own size about its own mean."""
    rng = np.random.default_rng([seed, ord(key)])
    steps = rng.standard_normal((frames, 4)).cumsum(axis=0) / 5
    return np.clip(steps, -3, 3).astype(np.float16) * np.float16([1, 10, 0.1, 1]) + np.float16([0, -50, 7, 0.5])


def _write(store: fs.Store, keys: str, spec: fs.Spec = NET, seed: int = 0, **declared) -> None:
    with store.writer() as w:
        w.declare("net", spec, **declared)
        for key in keys:
            w.utterance({"key": key}, source=key.encode().ljust(32, b"."), seconds=1.0)
            w.write(key, "net", _array(key, seed=seed))


@pytest.fixture
def store(tmp_path) -> fs.Store:
    store = fs.create(tmp_path / "songs.zarr")
    _write(store, KEYS)
    store.refresh()
    return store


def _contents(store: fs.Store, name: str = "net") -> dict:
    feature = fs.open(store.path).features[name]
    rows = {key: feature[key] for key in feature}
    return {key: (row.read(check=True).tobytes(), row.source, row.scale) for key, row in rows.items()}


def _records(feature: fs.Feature) -> dict:
    """What must stay of every row when it is written anew."""
    names = ["generation", "written", "length", "checksum", "scale", "stamp"]
    return {key: feature.index.find(key)[names].tolist() for key in feature}


@pytest.mark.parametrize("codec", ["zstd", "pcodec"])
def test_lossless_codec_keeps_identity_generation_and_every_bit(store, codec):
    before, identity, records = _contents(store), store.features["net"].identity, _records(store.features["net"])
    done = pack(store, "net", codec)
    assert (done.feature, done.codec, done.done, done.loss, done.before) == ("net", codec, 1, None, 4 * 50 * 4 * 2)
    assert _contents(store) == before
    now = fs.open(store.path).features["net"]
    assert (now.identity, now.codec, _records(now)) == (identity, codec, records)
    assert done.after == sum(s.stored for s in now.segments if s.codec == codec)
    assert verify(store).damages == []


def test_packing_again_does_nothing_and_raw_unpacks(store):
    before = _contents(store)
    pack(store, "net", "zstd")
    again = pack(store, "net", "zstd")
    assert (again.done, again.fresh) == (0, 1)
    raw = pack(store, "net", "raw")
    assert (raw.done, raw.after, store.features["net"].codec) == (1, 1600, "raw")
    assert _contents(store) == before


def test_reader_that_opened_before_goes_on_although_the_old_segments_are_gone(store):
    row, view = store["a", "net"], store.view(["net"], like="net")
    expected = row[10:20].copy()
    pack(fs.open(store.path), "net", "zstd")
    upkeep.purge(fs.open(store.path), grace_s=0)
    assert np.array_equal(row[10:20], expected)
    assert np.array_equal(view.crop("a", start=10, frames=10)["net"], expected)


def test_what_is_written_after_packing_has_the_same_codec(store):
    pack(store, "net", "zstd")
    _write(fs.open(store.path), "ef")
    assert fs.open(store.path).features["net"].codec == "zstd"


def test_codec_may_be_declared_and_folding_keeps_it(tmp_path):
    store = fs.create(tmp_path / "songs.zarr")
    with store.writer(commit_every_s=0) as w:
        w.declare("net", NET, codec="pcodec")
        for key in KEYS:
            w.write(key, "net", _array(key))
    feature = fs.open(store.path).features["net"]
    assert feature.codec == "pcodec" and len(feature.segments) == 5
    assert all(np.array_equal(feature[key].read(check=True), _array(key)) for key in KEYS)


def test_removed_and_replaced_rows_stay_so_when_they_are_packed(store):
    with store.writer() as w:
        w.delete("a", "net")
        w.declare("net", NET)
        w.write("b", "net", _array("b", seed=9))
    before = _contents(store)
    pack(store, "net", "zstd")
    assert _contents(store) == before and "a" not in before


def test_damaged_row_is_not_packed(store):
    (shard,) = store.features["net"].folder.glob("segments/*/frames/c/0/0")
    data = bytearray(shard.read_bytes())
    data[9] ^= 4
    shard.write_bytes(data)
    with pytest.raises(CorruptSegment, match="net does not match its checksum"):
        pack(store, "net", "zstd")


@pytest.mark.parametrize("codec", ["zstd", "pcodec"])
def test_flipped_bit_in_a_packed_feature_is_found_named_and_repaired(store, codec):
    pack(store, "net", codec)
    upkeep.purge(store, grace_s=0)
    (shard,) = store.features["net"].folder.glob("segments/*/frames/c/0/0")
    data = bytearray(shard.read_bytes())
    data[9] ^= 4
    shard.write_bytes(data)
    found = verify(fs.open(store.path))
    assert {(d.utterance, "CRC-32C" in d.reason) for d in found.damages} == {(key, True) for key in KEYS}
    upkeep.repair(store, found, grace_s=0)
    assert verify(store).damages == [] and len(fs.open(store.path).features["net"]) == 0


def test_copy_and_export_of_packed_features_equal_those_of_raw_ones(store, tmp_path):
    upkeep.copy(store, tmp_path / "raw.zarr")
    pack(store, "net", "zstd")
    pack(store, "net", "int8")
    upkeep.copy(store, tmp_path / "packed.zarr")
    copied = fs.open(tmp_path / "packed.zarr")
    assert (copied.features["net"].codec, verify(copied).damages) == ("zstd", [])
    assert _contents(copied) == _contents(store) == _contents(fs.open(tmp_path / "raw.zarr"))
    assert _contents(copied, "net-int8") == _contents(store, "net-int8")
    assert pack(copied, "net", "int8").done == 0
    exchange.export_tree(copied, tmp_path / "out", "npy", [])
    for key in KEYS:
        assert np.array_equal(np.load(tmp_path / "out" / "net" / f"{key}.npy"), _array(key))
        assert np.array_equal(np.load(tmp_path / "out" / "net-int8" / f"{key}.npy"), copied[key, "net-int8"].read())


def test_copy_that_was_killed_before_its_first_commit_goes_on_with_the_sources_codec(store, tmp_path):
    pack(store, "net", "zstd")
    with fs.create(tmp_path / "half.zarr").writer() as w:
        w.declare("net", NET, codec="zstd")  # all that a killed copy leaves
    upkeep.copy(store, tmp_path / "half.zarr")
    assert fs.open(tmp_path / "half.zarr").features["net"].codec == "zstd"


def test_int8_gives_values_of_the_sources_type_within_half_a_step(store):
    done = pack(store, "net", "int8")
    packed = store.features["net-int8"]
    assert (done.feature, done.done, done.before, done.after, done.ratio) == ("net-int8", 4, 1600, 800, 0.5)
    assert (packed.dtype, packed.stored_dtype) == (np.float16, np.int8)
    assert packed.spec.source == store.features["net"].identity
    assert packed.spec.settings["of"]["settings"] == {"layer": 20} and packed.spec.pad == -3.0
    for key in KEYS:
        row, truth = store[key, "net-int8"], _array(key).astype(np.float32)
        assert row.read(check=True).dtype == np.float16
        error = np.abs(row.read().astype(np.float32) - truth)
        assert (error <= packed.quantiser.scale / 2 + np.abs(truth) * 2.0**-11).all()
        assert np.array_equal(row[10:20], row.read()[10:20])
        assert np.array_equal(np.concatenate(list(row.blocks(7))), row.read())
        assert row.source == store[key, "net"].source


def test_reported_error_is_the_error(store):
    loss = pack(store, "net", "int8").loss
    truth = np.concatenate([_array(key) for key in KEYS]).astype(np.float64)
    error = np.concatenate([store[key, "net-int8"].read() for key in KEYS]).astype(np.float64) - truth
    signal, noise = ((truth - truth.mean(axis=0)) ** 2).sum(axis=0), (error**2).sum(axis=0)
    assert loss.snr_db == pytest.approx(10 * np.log10(signal.sum() / noise.sum()), abs=1e-3)
    channels = 10 * np.log10(signal / np.maximum(noise, 1e-30 * signal))
    assert (loss.worst_db, loss.worst_channel) == (pytest.approx(channels.min(), abs=1e-3), channels.argmin())


def test_view_aligns_the_values_of_int8(store):
    pack(store, "net", "int8")
    view = store.view(["net", "net-int8"], rate=75)
    batch = view.read_batch([("a", 5), ("b", 70)], frames=20)
    assert batch["net-int8"].dtype == np.float16
    np.testing.assert_allclose(batch["net-int8"].astype(float), batch["net"].astype(float), atol=0.5)
    assert (batch["net-int8"][1, 5:] == -3).all(), "what lies beyond the end is the source's pad value"
    same = store.view(["net-int8"], like="net-int8")
    assert np.array_equal(same["c"]["net-int8"], store["c", "net-int8"].read())


def test_view_of_int8_goes_on_when_its_segments_are_compacted_away(store):
    pack(store, "net", "int8")
    view = store.view(["net", "net-int8"], rate=75)
    expected = view.crop("a", start=3, frames=9)
    pack(fs.open(store.path), "net-int8", "zstd")
    upkeep.purge(fs.open(store.path), grace_s=0)
    for _ in range(2):
        found = view.crop("a", start=3, frames=9)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_zarr_python_and_tensorstore_read_int8_scale_and_offset(store):
    import tensorstore
    import zarr

    pack(store, "net", "int8")
    feature = store.features["net-int8"]
    scale, offset = (zarr.open_array(str(feature.folder / name), mode="r")[...] for name in ("scale", "offset"))
    (segment,) = feature.segments
    path = str(segment.folder / "frames")
    frames = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}).result().read().result()
    assert np.array_equal(zarr.open_array(path, mode="r")[...], frames) and frames.dtype == np.int8
    record = feature.index.find("b")
    first = int(record["offset"])
    values = (frames[first:first + 50].astype(np.float32) * scale + offset).astype(np.float16)
    assert np.array_equal(values, store["b", "net-int8"].read())
    assert np.array_equal(np.concatenate(list(store["b", "net-int8"].stored())), frames[first:first + 50])


def test_packing_int8_again_brings_only_what_is_missing_or_stale(store):
    pack(store, "net", "int8")
    scale, index = store.features["net-int8"].spec.settings["scale"], store.features["net-int8"].index
    kept = {key: int(index.find(key)["written"]) for key in "ac"}
    with store.writer() as w:
        w.declare("net", NET)
        w.write("b", "net", _array("b")[::-1])                        # other frames of the same audio
        w.utterance({"key": "d"}, source=b"new".ljust(32, b"."), seconds=1.0)
        w.write("d", "net", _array("d"))                              # the same frames of other audio
        w.write("e", "net", _array("a"))
    done = pack(store, "net", "int8")
    assert (done.done, done.fresh, done.refused) == (3, 2, [])
    feature = store.features["net-int8"]
    assert feature.spec.settings["scale"] == scale and set(feature) == set("abcde")
    assert {key: int(feature.index.find(key)["written"]) for key in "ac"} == kept
    assert all(row.source == store[key, "net"].source for key, row in feature.items())
    np.testing.assert_allclose(store["b", "net-int8"].read().astype(float), _array("b")[::-1].astype(float), atol=0.5)


def test_value_outside_the_frozen_range_is_refused_by_channel_and_replace_takes_it(store):
    pack(store, "net", "int8")
    old = store.features["net-int8"].identity
    with store.writer() as w:
        w.declare("net", NET)
        w.write("e", "net", _array("a"))
        w.write("f", "net", _array("b") + np.float16([0, 0, 99, 0]))
    done = pack(store, "net", "int8")
    (refused,) = done.refused
    assert (done.done, refused.utterance, refused.channel) == (1, "f", 2)
    assert refused.value > refused.high and "f" not in store.features["net-int8"]
    again = pack(store, "net", "int8", replace=True)
    assert (again.done, again.refused) == (6, []) and set(store.features["net-int8"]) == set("abcdef")
    assert store.features["net-int8"].identity != old


def test_int8_of_another_identity_is_refused_until_replace_is_given(store):
    pack(store, "net", "int8")
    other = dataclasses.replace(NET, settings={"layer": 24})
    _write(store, KEYS, other, seed=3, replace=True)
    with pytest.raises(IdentityMismatch, match=r"net-int8 of net@(.|\n)*--replace"):
        pack(store, "net", "int8")
    pack(store, "net", "int8", replace=True)
    assert store.features["net-int8"].spec.source == other.identity
    assert verify(store).damages == []


def test_killed_packing_goes_on_with_the_same_range(store):
    code = """
import os, sys, featstore as fs
from featstore.pack import pack
store = fs.open(sys.argv[1])
from featstore import writer
writer.COMMIT_BYTES = 1
seen = []
derive = writer.Writer.derive
def killed(self, row, *args, **kwargs):
    derive(self, row, *args, **kwargs)
    seen.append(row)
    if len(seen) == 2:
        os._exit(9)
writer.Writer.derive = killed
pack(store, "net", "int8")
"""
    assert subprocess.run([sys.executable, "-c", code, str(store.path)], check=False).returncode == 9
    store.refresh()
    assert len(store.features["net-int8"]) == 2
    scale = store.features["net-int8"].spec.settings["scale"]
    done = pack(store, "net", "int8")
    assert (done.done, done.fresh) == (2, 2) and store.features["net-int8"].spec.settings["scale"] == scale
    assert verify(store).damages == []


@pytest.mark.parametrize("name", ["scale", "offset"])
def test_lost_scale_or_offset_is_told_by_reader_and_verify(store, name):
    pack(store, "net", "int8")
    leaf = store.features["net-int8"].folder / name / "c" / "0"
    leaf.write_bytes(leaf.read_bytes()[:-4] + b"\0\0\0\0")
    again = fs.open(store.path)
    with pytest.raises(CorruptSegment, match="arrays scale and offset are missing or changed"):
        again["a", "net-int8"].read()
    assert [damage.part for damage in verify(again).damages] == ["scale"]
    assert pack(again, "net", "int8", replace=True).done == 0, "the rows are there, and the range is the same"
    assert verify(again).damages == [] and again["a", "net-int8"].shape == (50, 4)


@pytest.mark.parametrize(("codec", "said"), [
    ("lz4", r"codec 'lz4' is none of raw, zstd, pcodec, int8"),
    ("int8", r"f0 is of kind f0, which int8 would spoil: voicing is told by exact zeros.*pcodec lose nothing")])
def test_codec_that_does_not_fit_is_refused_with_the_reason(store, codec, said):
    with store.writer() as w:
        w.declare("f0", F0)
        w.write("a", "f0", np.ones(50, np.float32))
    with pytest.raises(BadRequest, match=said):
        pack(store, "f0", codec)


@pytest.mark.parametrize(("spec", "array"), [
    (fs.Spec(made_by="w", version=1, kind="samples", frame_rate=200, dim=0, dtype="int16"), np.ones(200, np.int16)),
    (fs.Spec(made_by="l", version=1, kind="discrete", frame_rate=50, dim=0, dtype="int32"), np.ones(50, np.int32)),
    (fs.Spec(made_by="s", version=1, kind="global", dim=4, dtype="float32"), np.ones(4, np.float32)),
    (fs.Spec(made_by="c", version=1, kind="continuous", frame_rate=50, dim=0, dtype="int16"), np.ones(50, np.int16))])
def test_int8_takes_continuous_floats_only(store, spec, array):
    with store.writer() as w:
        w.declare("x", spec)
        w.write("a", "x", array)
    with pytest.raises(BadRequest, match=r"which int8 would spoil|int8 takes floats"):
        pack(store, "x", "int8")


def test_names_without_room_int8_of_int8_and_empty_features_are_refused(store):
    with store.writer() as w:
        w.declare("n" * 60, NET)
        w.write("a", "n" * 60, _array("a"))
        w.declare("empty", NET)
    pack(store, "net", "int8")
    for name, said in (("n" * 60, "has 65 characters"), ("net-int8", "is int8 already; .* made of: net"),
                       ("empty", "has no utterances")):
        with pytest.raises(BadRequest, match=said):
            pack(store, name, "int8")
    with pytest.raises(BadRequest, match="replace chooses another range for int8"):
        pack(store, "net", "zstd", replace=True)


def test_single_numbers_a_frame_and_constant_channels_are_quantised(tmp_path):
    store = fs.create(tmp_path / "songs.zarr")
    loudness = fs.Spec(made_by="loudness", version=1, kind="continuous", frame_rate=50, dim=0, dtype="float32")
    constant = np.tile(np.float32([3.25, 0]), (50, 1))
    with store.writer() as w:
        w.declare("loudness", loudness)
        w.declare("flat", dataclasses.replace(NET, dim=2, dtype="float32"))
        w.write("a", "loudness", np.linspace(-60, 0, 50, dtype=np.float32))
        w.write("a", "flat", constant)
    assert 40 < pack(store, "loudness", "int8").loss.snr_db < 60
    np.testing.assert_allclose(store["a", "loudness-int8"].read(), np.linspace(-60, 0, 50), atol=0.2)
    assert pack(store, "flat", "int8").loss is None
    np.testing.assert_allclose(store["a", "flat-int8"].read(), constant, rtol=1e-5, atol=1e-9)


def test_largest_numbers_of_a_type_do_not_overflow():
    big = np.float32(np.finfo(np.float16).max)
    quantiser = Quantiser.covering(np.array([-big]), np.array([big]), np.dtype("float16"))
    values, out = np.array([[-big], [big], [0]], np.float16), np.empty((3, 1), np.float16)
    quantiser.decode(quantiser.encode(values), out)
    assert np.isfinite(out).all()
    with pytest.raises(Outside, match="channel 0 reaches"):
        quantiser.encode(np.full((1, 1), 2 * big, np.float32))


def test_path_of_a_packed_store_needs_nothing_but_itself(store, tmp_path):
    pack(store, "net", "int8")
    upkeep.remove(store, feature="net")
    upkeep.purge(store, grace_s=0)
    moved = store.path.rename(Path(tmp_path / "moved.zarr"))
    assert fs.open(moved)["a", "net-int8"].shape == (50, 4)


def test_status_counts_what_int8_lacks(store):
    from featstore.corpus import Corpus, Utterance

    pack(store, "net", "int8")
    _write(store, "e")
    store.refresh()
    corpus = Corpus(Path(), "songs", tuple(Utterance(key, f"{key}.wav") for key in "abcde"))
    counts = fs.plan(corpus, store, {name: store.features[name].spec for name in ("net", "net-int8")}).features
    assert (counts["net"].missing, counts["net-int8"].missing) == (0, 1)


@pytest.mark.parametrize("codec", ["zstd", "pcodec"])
def test_nothing_of_a_removed_utterance_is_left_in_packed_features(store, codec):
    pack(store, "net", codec)
    pack(store, "net", "int8")
    upkeep.remove(store, utterances=["b"])
    compact(store, purge=True, grace_s=0)
    kept = fs.open(store.path)
    for name in ("net", "net-int8"):
        assert sorted(kept.features[name]) == ["a", "c", "d"]
        frames = [segment.facts["frames"] for segment in kept.features[name].segments]
        assert sum(frames) == 150, "the frames of the others, and no more, are in the segments that are left"
    assert kept.features["net"].codec == codec and verify(kept).damages == []


def test_compacting_keeps_the_codec_and_every_bit(store):
    pack(store, "net", "zstd")
    for key in "ef":
        _write(fs.open(store.path), key)
    before = _contents(store)
    compact(fs.open(store.path))
    now = fs.open(store.path)
    assert now.features["net"].codec == "zstd" and _contents(now) == before
