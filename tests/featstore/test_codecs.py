"""Encoded frames: the same bytes by our reader and by others, damage found whenever a chunk is read."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featstore import codecs, storage
from featstore import segment as segments
from featstore.codecs import ENCODINGS
from featstore.errors import BadRequest, CorruptSegment, MissingPackage
from featstore.segment import Segment, SegmentWriter

PACKED = ["zstd", "pcodec"]
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Durability has tests of its own; here a sync is only slow."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def small(monkeypatch):
    """Inner chunks and shards of a few rows."""
    def set_sizes(inner: int, shard: int) -> None:
        monkeypatch.setattr(segments, "INNER_BYTES", inner)
        monkeypatch.setattr(segments, "SHARD_BYTES", shard)

    set_sizes(64, 200)
    return set_sizes


def _write(folder: Path, arrays: list[np.ndarray], codec: str, pieces: int = 1) -> Segment:
    dim = arrays[0].shape[1] if arrays[0].ndim == 2 else 0
    writer = SegmentWriter(folder / storage.new_id(), arrays[0].dtype.name, dim, ENCODINGS[codec])
    for number, array in enumerate(arrays):
        writer.append(f"k{number}", np.array_split(array, pieces), generation=1)
    writer.commit({})
    return Segment(writer.folder)


def _row(segment: Segment, number: int) -> np.ndarray:
    record = segment.records[number]
    out = segment.layout.empty(int(record["length"]))
    segment.read(int(record["offset"]), out)
    return out


def _any_bits(seed: int, lengths: list[int], dim: int, dtype: str) -> list[np.ndarray]:
    """Arrays of any bits, NaN included, some of them zeros."""
    rng = np.random.default_rng(seed)
    shapes = [(length, dim) if dim else (length,) for length in lengths]
    size = np.dtype(dtype).itemsize
    return [(rng.integers(0, 256, (int(np.prod(shape)), size), np.uint8) * rng.integers(0, 2, dtype=np.uint8)
             ).view(dtype).reshape(shape) for shape in shapes]


@given(seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
       dim=st.sampled_from([0, 1, 3, 64]), dtype=st.sampled_from(["float16", "float32", "float64", "int16"]),
       codec=st.sampled_from(PACKED), inner=st.integers(1, 900), shard=st.integers(1, 3000), pieces=st.integers(1, 5))
@QUICK
def test_encoded_rows_are_read_back_bit_for_bit(tmp_path, small, seed, lengths, dim, dtype, codec, inner, shard,
                                                pieces):
    small(inner, shard)
    arrays = _any_bits(seed, lengths, dim, dtype)
    segment = _write(tmp_path, arrays, codec, pieces)
    assert (segment.codec, segment.layout.direct) == (codec, False)
    for number in reversed(range(len(arrays))):
        assert _row(segment, number).tobytes() == arrays[number].tobytes()
        assert segment.checksum(segment.records[number]) == segment.records[number]["checksum"]


@given(seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.integers(1, 60), min_size=2, max_size=6),
       after=st.integers(0, 40), codec=st.sampled_from(PACKED))
@QUICK
def test_block_that_fails_leaves_an_encoded_segment_as_it_was(tmp_path, small, seed, lengths, after, codec):
    def fails():
        yield np.full((after, 3), 7, np.float16)
        raise ValueError("no more")

    arrays = _any_bits(seed, lengths, 3, "float16")
    writer = SegmentWriter(tmp_path / storage.new_id(), "float16", 3, ENCODINGS[codec])
    for number, array in enumerate(arrays):
        with pytest.raises(ValueError, match="no more"):
            writer.append("broken", fails(), generation=1)
        writer.append(f"k{number}", [array], generation=1)
    writer.commit({})
    segment = Segment(writer.folder)
    assert [_row(segment, number).tobytes() for number in range(len(arrays))] == [a.tobytes() for a in arrays]


@pytest.mark.parametrize("codec", ["raw", *PACKED])
def test_zarr_python_reads_every_byte(tmp_path, small, codec):
    import zarr

    arrays = [*_any_bits(1, [30, 50, 7], 3, "float16"), np.zeros((40, 3), np.float16)]
    segment = _write(tmp_path, arrays, codec)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3")
        found = np.asarray(zarr.open_array(str(segment.folder / "frames"), mode="r")[...])
    assert found.tobytes() == np.concatenate(arrays).tobytes()


def test_tensorstore_reads_every_byte_of_zstd(tmp_path, small):
    import tensorstore

    arrays = _any_bits(2, [30, 50, 7], 3, "float16")
    path = str(_write(tmp_path, arrays, "zstd").folder / "frames")
    opened = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}).result()
    assert np.asarray(opened.read().result()).tobytes() == np.concatenate(arrays).tobytes()


def test_zarrs_reads_every_byte(tmp_path, small):
    """In a process of its own: it hangs in one that is forked later."""
    arrays = _any_bits(3, [30, 50, 7], 3, "float32")
    np.save(tmp_path / "truth.npy", np.concatenate(arrays).view(np.uint8))
    paths = [str(_write(tmp_path, arrays, codec).folder / "frames") for codec in ("raw", *PACKED)]
    code = """
import sys, numpy as np, zarr, zarrs, warnings
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3")
warnings.filterwarnings("error", "Array is unsupported by ZarrsCodecPipeline")
truth = np.load(sys.argv[1])
print([bool((np.asarray(zarr.open_array(p, mode="r")[...]).view(np.uint8) == truth).all()) for p in sys.argv[2:]])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "truth.npy"), *paths], capture_output=True,
                          text=True, check=False)
    assert (done.stdout, done.stderr) == ("[True, True, True]\n", "")


@pytest.mark.parametrize("codec", PACKED)
def test_all_zero_chunks_are_written_not_left_out(tmp_path, small, codec):
    segment = _write(tmp_path, [np.zeros((100, 3), np.float16)], codec)
    assert not _row(segment, 0).any()
    marks = np.concatenate([np.frombuffer((segment.folder / f"frames/c/{n}/0").read_bytes()[-52:-4], "<u8")
                            for n in range(4)])  # of three chunks of ten rows each
    assert (marks == 2**64 - 1).sum() == 4, "two chunks of twelve are beyond the end"


@pytest.mark.parametrize("codec", PACKED)
def test_flipped_bit_is_found_on_every_read_of_its_chunk_and_of_no_other(tmp_path, small, codec):
    segment = _write(tmp_path, _any_bits(5, [10, 10], 3, "float16"), codec)
    shard = segment.folder / "frames" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[9] ^= 4
    shard.write_bytes(data)
    again = Segment(segment.folder)
    with pytest.raises(CorruptSegment, match=r"inner chunk 0: its bytes do not match their CRC-32C.*featstore verify"):
        _row(again, 0)
    assert _row(again, 1).tobytes() == _row(segment, 1).tobytes()


@pytest.mark.parametrize("change", [lambda data: data[:-7], lambda data: data[:20], lambda data: data[:-9] + b"x" * 9])
def test_cut_or_changed_shard_is_found(tmp_path, small, change):
    segment = _write(tmp_path, _any_bits(6, [10], 3, "float16"), "zstd")
    shard = segment.folder / "frames" / "c" / "0" / "0"
    shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(CorruptSegment, match=r"shard index does not match its rows|has 20 bytes"):
        _row(Segment(segment.folder), 0)


def test_encoded_segment_says_its_codec_and_size_and_a_raw_one_has_neither(tmp_path):
    arrays = [np.tile(np.arange(8, dtype=np.float32), (500, 1))]
    raw, packed = _write(tmp_path, arrays, "raw"), _write(tmp_path, arrays, "zstd")
    on_disk = sum(path.stat().st_size for path in (packed.folder / "frames" / "c").rglob("0") if path.is_file())
    assert (packed.codec, packed.stored, packed.facts["bytes"]) == ("zstd", on_disk, 16_000)
    assert (raw.codec, raw.stored) == ("raw", 16_000)
    assert raw.facts.keys() & {"codec", "stored"} == set()


def test_unknown_codec_and_numbers_that_pcodec_does_not_take_are_refused():
    with pytest.raises(BadRequest, match="codec 'lz4' is none of raw, zstd, pcodec, int8"):
        codecs.named("lz4", np.dtype("float32"))
    with pytest.raises(BadRequest, match="pcodec takes numbers of 16, 32 or 64 bits, not int8; zstd takes every type"):
        codecs.named("pcodec", np.dtype("int8"))


def test_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pcodec", None)
    with pytest.raises(MissingPackage, match="pip install pcodec"):
        codecs.named("pcodec", np.dtype("float32"))


def test_documents_of_both_codecs_name_them_as_zarr_does(tmp_path):
    names = {}
    for codec in PACKED:
        folder = _write(tmp_path, [np.ones((3, 2), np.float16)], codec).folder
        inner = json.loads((folder / "frames" / "zarr.json").read_text())["codecs"][0]["configuration"]["codecs"]
        names[codec] = [entry["name"] for entry in inner]
    assert names == {"zstd": ["bytes", "zstd", "crc32c"], "pcodec": ["numcodecs.pcodec", "crc32c"]}


@pytest.mark.parametrize("codec", PACKED)
def test_forked_process_reads_on_where_its_parent_has_read(tmp_path, small, codec):
    arrays = _any_bits(7, [30, 30], 3, "float16")
    segment = _write(tmp_path, arrays, codec)
    _row(segment, 0)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_bytes, (segment,)) == arrays[1].tobytes()


def _bytes(segment: Segment) -> bytes:
    return _row(segment, 1).tobytes()
