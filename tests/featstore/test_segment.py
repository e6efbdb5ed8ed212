"""One segment: what is written is read back bit for bit, by our reader and by others; damage is found and named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from featstore import segment as segments
from featstore import storage
from featstore.errors import CorruptSegment
from featstore.segment import NO_SOURCE, Segment, SegmentWriter

DTYPES = ["float16", "float32", "float64", "int16", "uint8", "int32"]
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def rows(draw) -> list[np.ndarray]:
    """Arrays of one dtype and dim, any bits, NaN included."""
    dtype, dim = np.dtype(draw(st.sampled_from(DTYPES))), draw(st.sampled_from([0, 0, 1, 2, 3, 7, 64, 300]))
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    arrays = []
    for length in lengths:
        shape = (length, dim) if dim else (length,)
        raw = rng.integers(0, 256, (int(np.prod(shape)), dtype.itemsize), np.uint8) * draw(st.booleans())
        arrays.append(np.ascontiguousarray(raw).view(dtype).reshape(shape))
    return arrays


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Durability has tests of its own; here a sync is only slow."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def small(monkeypatch):
    """Inner chunks and shards of a few rows, so that rows of utterances span several of both."""
    def set_sizes(inner: int, shard: int) -> None:
        monkeypatch.setattr(segments, "INNER_BYTES", inner)
        monkeypatch.setattr(segments, "SHARD_BYTES", shard)

    set_sizes(64, 200)
    return set_sizes


def _fresh(folder: Path) -> Path:
    """A new name: no two segments ever have the same path, and the open files of one are kept by it."""
    return folder / storage.new_id()


def _write(folder: Path, arrays: list[np.ndarray], pieces: int = 1) -> Segment:
    dim = arrays[0].shape[1] if arrays[0].ndim == 2 else 0
    writer = SegmentWriter(folder, arrays[0].dtype.name, dim)
    for number, array in enumerate(arrays):
        writer.append(f"k{number}", np.array_split(array, pieces), generation=1)
    writer.commit({})
    return Segment(folder)


def _row(segment: Segment, number: int) -> np.ndarray:
    record = segment.records[number]
    out = segment.layout.empty(int(record["length"]))
    segment.read(int(record["offset"]), out)
    return out


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@given(arrays=rows(), inner=st.integers(1, 900), shard=st.integers(1, 3000), pieces=st.integers(1, 5))
@QUICK
def test_rows_are_read_back_bit_for_bit_across_chunks_and_shards(tmp_path, small, arrays, inner, shard, pieces):
    small(inner, shard)
    segment = _write(_fresh(tmp_path), arrays, pieces)
    assert segment.layout.direct
    for number in reversed(range(len(arrays))):
        assert _same_bits(_row(segment, number), arrays[number])
        assert segment.key(segment.records[number]) == f"k{number}"
        assert segment.checksum(segment.records[number]) == segment.records[number]["checksum"]
        assert segment.checksum(segment.records[number]) == google_crc32c.value(arrays[number].tobytes())


@given(arrays=rows(), data=st.data())
@QUICK
def test_any_range_is_numpys_range(tmp_path, small, arrays, data):
    segment, whole = _write(_fresh(tmp_path), arrays), np.concatenate(arrays)
    start = data.draw(st.integers(0, len(whole)))
    out = segment.layout.empty(data.draw(st.integers(0, len(whole) - start)))
    segment.read(start, out)
    assert _same_bits(out, whole[start:start + len(out)])


@given(arrays=rows())
@settings(QUICK, max_examples=30)
def test_zarr_python_and_tensorstore_read_the_same_bytes(tmp_path, small, arrays):
    import tensorstore
    import zarr

    segment, whole = _write(_fresh(tmp_path), arrays), np.concatenate(arrays)
    path = str(segment.folder / "frames")
    assert _same_bits(np.asarray(zarr.open_array(path, mode="r")[...]), whole)
    opened = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}).result()
    assert _same_bits(np.asarray(opened.read().result()), whole)


def test_index_and_keys_are_arrays_that_zarr_reads(tmp_path):
    import zarr

    segment = _write(tmp_path / "s", [np.ones((3, 2), np.float32), np.ones((1, 2), np.float32)])
    group = zarr.open_group(str(segment.folder), mode="r")
    assert sorted(group.array_keys()) == ["frames", "index", "keys"]
    assert group["index"][...].tobytes() == segment.records.tobytes()
    assert bytes(group["keys"][...]).decode() == "k0k1"


def test_all_zero_frames_are_written_not_left_out(tmp_path, small):
    segment = _write(tmp_path / "s", [np.zeros((100, 3), np.float16), np.ones((5, 3), np.float16)])
    assert _same_bits(_row(segment, 0), np.zeros((100, 3), np.float16))
    assert _same_bits(_row(segment, 1), np.ones((5, 3), np.float16))
    assert len(list((segment.folder / "frames" / "c").iterdir())) == 4


@pytest.mark.parametrize("codec", ["zstd", "gzip"])
def test_compressed_segment_is_read_through_zarr_with_the_same_bytes(tmp_path, small, codec):
    import zarr

    arrays = [np.arange(300, dtype=np.float32).reshape(100, 3), np.zeros((40, 3), np.float32)]
    segment = _write(tmp_path / "s", arrays)
    shutil.rmtree(segment.folder / "frames")
    compressor = zarr.codecs.ZstdCodec() if codec == "zstd" else zarr.codecs.GzipCodec()
    packed = zarr.create_array(str(segment.folder / "frames"), shape=(140, 3), dtype="float32", chunks=(10, 3),
                               shards=(50, 3), compressors=compressor, config={"write_empty_chunks": True})
    packed[...] = np.concatenate(arrays)
    again = Segment(segment.folder)
    assert not again.layout.direct
    assert [_same_bits(_row(again, number), array) for number, array in enumerate(arrays)] == [True, True]
    assert again.checksum(again.records[0]) == again.records[0]["checksum"]


def test_big_endian_segment_is_read_through_zarr(tmp_path):
    import zarr

    segment = _write(tmp_path / "s", [np.arange(12, dtype=np.float32).reshape(4, 3)])
    shutil.rmtree(segment.folder / "frames")
    zarr.create_array(str(segment.folder / "frames"), shape=(4, 3), dtype="float32", chunks=(2, 3), shards=(4, 3),
                      compressors=None, serializer=zarr.codecs.BytesCodec(endian="big"))[...] = (
        np.arange(12, dtype=np.float32).reshape(4, 3))
    again = Segment(segment.folder)
    assert not again.layout.direct
    assert np.array_equal(_row(again, 0), np.arange(12).reshape(4, 3))


def test_segment_of_tombstones_alone_has_no_frames(tmp_path):
    import zarr

    writer = SegmentWriter(tmp_path / "s", "float32", 4)
    writer.remove("a", generation=3)
    writer.commit({})
    segment = Segment(tmp_path / "s")
    assert (len(segment.records), int(segment.records["flags"][0]), int(segment.records["generation"][0])) == (1, 1, 3)
    assert zarr.open_array(str(tmp_path / "s" / "frames"), mode="r").shape == (0, 4)


def test_facts_of_a_row_come_back(tmp_path):
    writer = SegmentWriter(tmp_path / "s", "int16", 0)
    source = bytes(range(32))
    writer.append("ключ", [np.arange(5, dtype=np.int16)], generation=7, source=source, stamp=2**64 - 1, scale=0.25,
                  seconds=1.5)
    writer.append("b", [np.arange(2, dtype=np.int16)], generation=1)
    writer.commit({"feature": "wave"})
    segment = Segment(tmp_path / "s")
    record = segment.records[0]
    assert segment.key(record) == "ключ" and record["source"].tobytes() == source
    assert [record[n].item() for n in ("generation", "offset", "length", "stamp", "scale", "seconds")] == [
        7, 0, 5, 2**64 - 1, 0.25, 1.5]
    assert segment.records[1]["source"].tobytes() == NO_SOURCE and segment.records[1]["scale"] == 1.0
    assert segment.facts["feature"] == "wave" and segment.facts["frames"] == 7 and segment.facts["bytes"] == 14


@given(arrays=rows(), broken=st.integers(0, 5), after=st.integers(1, 40))
@QUICK
def test_block_that_fails_leaves_the_segment_as_it_was(tmp_path, small, arrays, broken, after):
    def fails(array):
        yield array[:after]
        raise ValueError("no more")

    folder = _fresh(tmp_path)
    dim = arrays[0].shape[1] if arrays[0].ndim == 2 else 0
    writer = SegmentWriter(folder, arrays[0].dtype.name, dim)
    for number, array in enumerate(arrays):
        if number == broken % len(arrays):
            with pytest.raises(ValueError, match="no more"):
                writer.append("broken", fails(array), generation=1)
        writer.append(f"k{number}", [array], generation=1)
    writer.commit({})
    segment = Segment(folder)
    assert [segment.key(record) for record in segment.records] == [f"k{n}" for n in range(len(arrays))]
    assert all(_same_bits(_row(segment, number), array) for number, array in enumerate(arrays))
    assert segment.layout.shape[0] == sum(map(len, arrays))


def test_rows_are_copied_as_they_are_generation_included(tmp_path, small):
    source = _write(tmp_path / "s", [np.arange(60, dtype=np.float32).reshape(20, 3), np.ones((1, 3), np.float32)])
    writer = SegmentWriter(tmp_path / "t", "float32", 3)
    for record in source.records[::-1]:
        writer.copy(source.key(record), record, source.blocks(record, 7))
    writer.commit({"replaces": ["s"]})
    copied = Segment(tmp_path / "t")
    same = [name for name in segments.RECORD.names if name not in ("offset", "key_offset")]
    assert (copied.records[::-1][same] == source.records[same]).all()
    assert _same_bits(_row(copied, 1), _row(source, 0))


def test_segment_is_invisible_data_before_its_document(tmp_path):
    writer = SegmentWriter(tmp_path / "s", "float32", 0)
    writer.append("a", [np.ones(4, np.float32)], generation=1)
    assert not (tmp_path / "s" / "zarr.json").exists()
    with pytest.raises(FileNotFoundError):
        _ = Segment(tmp_path / "s").facts
    writer.commit({})
    assert Segment(tmp_path / "s").facts["rows"] == 1


def test_segment_whose_file_was_removed_while_it_was_written_is_not_committed(tmp_path, monkeypatch):
    writer = SegmentWriter(tmp_path / "s", "float32", 0)
    writer.append("a", [np.ones(4, np.float32)], generation=1)
    synced = storage.sync_folder

    def remove_then_sync(folder):
        (tmp_path / "s" / "frames" / "c" / "0").unlink(missing_ok=True)
        synced(folder)

    monkeypatch.setattr(storage, "sync_folder", remove_then_sync)
    with pytest.raises(CorruptSegment, match="has 0 bytes before its commit, expected"):
        writer.commit({})
    assert not (tmp_path / "s" / "zarr.json").exists()


@pytest.fixture
def damaged(tmp_path) -> Segment:
    """A sound segment of two rows; tests break it and open it anew."""
    return _write(tmp_path / "s", [np.arange(60, dtype=np.float32).reshape(20, 3), np.ones((5, 3), np.float32)])


def _flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


def test_truncated_shard_is_named_with_both_sizes(damaged):
    shard = damaged.folder / "frames" / "c" / "0" / "0"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(CorruptSegment, match=rf"c/0/0 has {size - 7} bytes, expected {size}.*featstore verify"):
        _row(Segment(damaged.folder), 0)


def test_missing_shard_is_named(damaged):
    (damaged.folder / "frames" / "c" / "0" / "0").unlink()
    with pytest.raises(CorruptSegment, match=r"c/0/0 is missing.*featstore verify"):
        _row(Segment(damaged.folder), 0)


def test_shard_that_ends_early_after_it_was_opened_is_named(damaged):
    reader = Segment(damaged.folder)
    _row(reader, 0)
    shard = damaged.folder / "frames" / "c" / "0" / "0"
    with shard.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CorruptSegment, match="ends at byte 100"):
        _row(reader, 0)


def test_flipped_bit_in_frames_changes_the_checksum(damaged):
    _flip(damaged.folder / "frames" / "c" / "0" / "0", 5)
    again = Segment(damaged.folder)
    assert again.checksum(again.records[0]) != again.records[0]["checksum"]
    assert again.checksum(again.records[1]) == again.records[1]["checksum"]


def test_flipped_bit_in_the_shard_index_is_found(damaged):
    _flip(damaged.folder / "frames" / "c" / "0" / "0", -10)
    with pytest.raises(CorruptSegment, match="shard index does not match"):
        _row(Segment(damaged.folder), 0)


@pytest.mark.parametrize(("name", "leaf"), [("index", "index/c/0/0"), ("keys", "keys/c/0")])
def test_flipped_bit_in_index_or_keys_is_found(damaged, name, leaf):
    _flip(damaged.folder / leaf, 1)
    with pytest.raises(CorruptSegment, match=rf"{name}.*does not match its checksum"):
        again = Segment(damaged.folder)
        again.key(again.records[0])


@pytest.mark.parametrize("leaf", ["index/c/0/0", "keys/c/0", "frames/zarr.json"])
def test_missing_file_of_a_committed_segment_is_named(damaged, leaf):
    (damaged.folder / leaf).unlink()
    with pytest.raises(CorruptSegment, match=f"{leaf} is missing"):
        again = Segment(damaged.folder)
        again.key(again.records[0])
        _row(again, 0)


def test_index_of_the_wrong_length_is_found(damaged):
    leaf = damaged.folder / "index" / "c" / "0" / "0"
    leaf.write_bytes(leaf.read_bytes()[:-128])
    with pytest.raises(CorruptSegment, match="has 144 bytes, expected 272"):
        _ = Segment(damaged.folder).records


def test_document_of_something_else_is_no_segment(damaged):
    (damaged.folder / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}))
    with pytest.raises(CorruptSegment, match="is not a featstore segment"):
        _ = Segment(damaged.folder).facts


def test_rows_beyond_the_end_are_refused(damaged):
    with pytest.raises(CorruptSegment, match="has 25 rows; 24 to 26 were asked for"):
        damaged.read(24, np.empty((2, 3), np.float32))


@pytest.mark.parametrize("out", [np.empty((2, 3), np.float64), np.empty((2, 4), np.float32), np.empty(2, np.float32)])
def test_rows_are_not_read_into_another_dtype_or_shape(damaged, out):
    with pytest.raises(ValueError, match="cannot be read into"):
        damaged.read(0, out)


def test_segment_pickles_as_its_path(damaged):
    _row(damaged, 0)
    again = pickle.loads(pickle.dumps(damaged))
    assert len(pickle.dumps(damaged)) < 500 and _same_bits(_row(again, 0), _row(damaged, 0))


@given(hnp.arrays(np.float16, st.tuples(st.integers(1, 30), st.integers(1, 5))))
@QUICK
def test_views_and_foreign_byte_orders_are_stored_by_value(tmp_path, array):
    dim = array.shape[1]
    folder = _fresh(tmp_path)
    writer = SegmentWriter(folder, "float16", dim)
    writer.append("a", [array[::-1]], generation=1)
    writer.append("b", [np.asfortranarray(array)], generation=1)
    writer.append("c", [array.astype(">f2")], generation=1)
    writer.commit({})
    segment = Segment(folder)
    for number, expected in enumerate([array[::-1], array, array]):
        np.testing.assert_array_equal(_row(segment, number), expected)


def test_a_segment_whose_files_were_removed_is_not_committed_and_says_so(tmp_path):
    writer = SegmentWriter(tmp_path / "segment", "float32", 0)
    writer.append("a", [np.ones(5, np.float32)], generation=1)
    shutil.rmtree(tmp_path / "segment")
    with pytest.raises(CorruptSegment, match="gone before the commit"):
        writer.commit({})
