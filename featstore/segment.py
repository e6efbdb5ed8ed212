"""One segment on disk: rows of many utterances in one sharded Zarr array, written once, committed by its own document.

    <segment>/zarr.json    group document, written LAST: that is the commit; attributes repeat the spec
    <segment>/frames       (sum of T, D) or (sum of T,), little-endian, uncompressed inner chunks of about 128 KiB
    <segment>/index        (rows, 136) uint8: one RECORD a row
    <segment>/keys         uint8: the utterances' keys, UTF-8, one after the other
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, cast

import google_crc32c
import numpy as np

from . import storage
from .errors import CorruptSegment

RECORD = np.dtype([
    ("hash", "<u8"), ("tag", "<u8"),          # 128 bits of blake2b of the key: equal means the same key
    ("generation", "<u8"),                    # 1 + the highest its writer had seen for the key
    ("written", "<u8"),                       # when its first segment was begun: tells equal generations apart, and
                                              # stays when segments are merged, so that merging changes no answer
    ("offset", "<u8"), ("length", "<u8"),     # rows of `frames`
    ("key_offset", "<u8"), ("key_length", "<u4"),
    ("flags", "<u4"),                         # REMOVED
    ("stamp", "<u8"),                         # utterances: of path, size, time, cut and metadata; 0 = hash again
    ("scale", "<f8"),                         # stored x scale = value
    ("seconds", "<f8"),                       # utterances: duration of the audio
    ("source", "<u8", (4,)),                  # SHA-256 that names the audio
    ("checksum", "<u4"),                      # CRC-32C of the stored bytes
    ("segment", "<u4"), ("newest", "<u8"),    # filled when segments are merged: where from; highest generation seen
])
REMOVED = 1
INNER_BYTES = 128 * 1024
SHARD_BYTES = 128 * 1024 * 1024
NO_SOURCE = bytes(32)
_BLOCK_BYTES = 8 << 20
_RECORD = struct.Struct("<7Q2IQ2d32s2IQ")  # the same 136 bytes: packed 20 times faster than a numpy record is filled
_ABSENT = (1 << 64) - 1  # a shard's mark for an inner chunk that was never written


def key_hashes(key: str) -> tuple[int, int]:
    """The two halves of a key's 128-bit hash: the first is searched for, the second tells collisions apart."""
    digest = blake2b(key.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class SegmentWriter:
    """Appends rows to a new segment; nothing of it is visible before `commit`."""

    def __init__(self, folder: Path, dtype: str, dim: int) -> None:
        self.folder, self.dtype, self.dim = folder, np.dtype(dtype).newbyteorder("<"), dim
        self.row_bytes = self.dtype.itemsize * max(dim, 1)
        self.inner_rows = max(1, INNER_BYTES // self.row_bytes)
        self.shard_rows = self.inner_rows * max(1, SHARD_BYTES // (self.inner_rows * self.row_bytes))
        self.rows = 0
        self._begun = time.time_ns()
        self._records = bytearray()
        self._keys = bytearray()
        self._shards: list[tuple[Path, int]] = []
        self._file: BinaryIO | None = None
        self._lost = False
        with storage.disk_room(folder):
            (folder / "frames").mkdir(parents=True)

    @property
    def size(self) -> int:
        """Bytes of frames written so far."""
        return self.rows * self.row_bytes

    def append(self, key: str, blocks: Iterable[np.ndarray], *, generation: int, source: bytes = NO_SOURCE,
               stamp: int = 0, scale: float = 1.0, seconds: float = 0.0) -> int:
        """Add one row from its blocks of frames, checked and of the right dtype. Returns its number of frames.

        A block that cannot be written or made leaves the segment as it was before the call.
        """
        start, checksum = self.rows, 0
        try:
            for block in blocks:
                view = _bytes_of(block, self.dtype)
                checksum = google_crc32c.extend(checksum, view)
                self._write(view)
        except BaseException:
            self._cut(start)
            raise
        self._note(key, generation=generation, offset=start, length=self.rows - start, source=source, stamp=stamp,
                   scale=scale, seconds=seconds, checksum=checksum)
        return self.rows - start

    def remove(self, key: str, *, generation: int) -> None:
        """Add a tombstone: the key has no row from this generation on."""
        self._note(key, generation=generation, flags=REMOVED)

    def copy(self, key: str, record: np.void, blocks: Iterable[np.ndarray]) -> None:
        """Add a row of another segment as it is, generation included."""
        kept = {name: record[name]
                for name in ("generation", "written", "flags", "stamp", "scale", "seconds", "checksum")}
        offset = self.rows
        try:
            for block in blocks:
                self._write(_bytes_of(block, self.dtype))
        except BaseException:
            self._cut(offset)
            raise
        self._note(key, **kept, source=record["source"].tobytes(), offset=offset, length=self.rows - offset)

    def commit(self, attributes: dict[str, Any]) -> None:
        """Make the segment visible: data, folders, then its document, each synced before the next.

        After DiskFull nothing is visible and nothing is lost: once there is room, call it again.
        """
        if self._lost:
            raise CorruptSegment(f"{self.folder}: the disk failed to keep {self.size} bytes (fsync). They were not "
                                 "committed; run the same command again.")
        try:
            with storage.disk_room(self.folder):
                self._commit(attributes)
        except FileNotFoundError as error:
            raise CorruptSegment(f"{error.filename} is gone before the commit of its segment: something else removed "
                                 "it. Nothing of this segment was committed; run the same command again.") from error
        except OSError:
            self._cut(self.rows)
            raise

    def _commit(self, attributes: dict[str, Any]) -> None:
        self._close_shard()
        shape = [self.rows, self.dim] if self.dim else [self.rows]
        shard_rows = self.shard_rows
        if len(self._shards) <= 1:  # a small shard needs a small index
            shard_rows = self.inner_rows * max(1, -(-self.rows // self.inner_rows))
        self._finish_shards(shard_rows)
        names = ["frame", "channel"][:len(shape)]
        inner = [self.inner_rows, *shape[1:]]
        _put_array(self.folder / "frames", self.dtype, shape, [shard_rows, *shape[1:]], inner, names)
        index = np.frombuffer(bytes(self._records), np.uint8).reshape(len(self), RECORD.itemsize)
        keys = np.frombuffer(bytes(self._keys), np.uint8)
        put_plain(self.folder / "index", index, ["row", "byte"])
        put_plain(self.folder / "keys", keys, ["byte"])
        facts = {"rows": len(self), "frames": self.rows, "bytes": self.size,
                 "index_crc32c": google_crc32c.value(bytes(self._records)),
                 "keys_crc32c": google_crc32c.value(bytes(self._keys))}
        self._lost = True  # after a failed fsync nobody knows what is on the disk: a second one proves nothing
        storage.sync_tree(self.folder)
        storage.sync_folder(self.folder.parent)
        self._lost = False
        self._check(shard_rows)
        storage.put_document(self.folder / "zarr.json", group(attributes | facts))

    def discard(self) -> None:
        """Remove what was written; for segments that have no row."""
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._records) // RECORD.itemsize

    def _note(self, key: str, *, generation: int, written: int | None = None, offset: int = 0, length: int = 0,
              flags: int = 0, stamp: int = 0, scale: float = 1.0, seconds: float = 0.0, source: bytes = NO_SOURCE,
              checksum: int = 0) -> None:
        first, second = key_hashes(key)
        text = key.encode()
        self._records += _RECORD.pack(first, second, generation, self._begun if written is None else written, offset,
                                      length, len(self._keys), len(text), flags, stamp, scale, seconds, source,
                                      checksum, 0, 0)
        self._keys += text

    def _shard_path(self, number: int) -> Path:
        return self.folder / "frames" / "c" / (f"{number}/0" if self.dim else f"{number}")

    def _write(self, data: np.ndarray) -> None:
        while len(data):
            room = (self.shard_rows - self.rows % self.shard_rows) * self.row_bytes
            part = data[:room]
            with storage.disk_room(self.folder):
                if self._file is None:
                    self._file = self._open_shard()
                _write_all(self._file, part.data)
            self.rows += len(part) // self.row_bytes
            data = data[room:]
            if self.rows % self.shard_rows == 0:
                self._close_shard()

    def _open_shard(self) -> BinaryIO:
        """The shard that the next row goes to: a new one, or the last one again after `_cut`."""
        if self.rows % self.shard_rows:
            file = cast(BinaryIO, self._shards[-1][0].open("r+b", buffering=0))
            file.seek(0, os.SEEK_END)
            return file
        path = self._shard_path(self.rows // self.shard_rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = cast(BinaryIO, path.open("wb", buffering=0))
        self._shards.append((path, self.rows))
        return file

    def _close_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _cut(self, rows: int) -> None:
        """Go back to `rows` rows: what a failed append or commit left behind them is cut off."""
        self._close_shard()
        while self._shards and self._shards[-1][1] >= rows:
            self._shards.pop()[0].unlink()
        self.rows = rows
        if self._shards and rows % self.shard_rows:
            path, first = self._shards[-1]
            os.truncate(path, (rows - first) * self.row_bytes)

    def _finish_shards(self, shard_rows: int) -> None:
        """Pad each shard's last inner chunk and write its index."""
        inner_bytes = self.inner_rows * self.row_bytes
        for path, first in self._shards:
            rows = min(self.rows - first, shard_rows)
            inner = -(-rows // self.inner_rows)
            with path.open("r+b", buffering=0) as file:
                file.seek(rows * self.row_bytes)
                padding = bytes(inner * inner_bytes - rows * self.row_bytes)
                index = _shard_index(inner, shard_rows // self.inner_rows, inner_bytes)
                _write_all(cast(BinaryIO, file), memoryview(padding + index))

    def _check(self, shard_rows: int) -> None:
        """Nobody may have removed a file of this segment while it was being written."""
        for path, first in self._shards:
            rows = min(self.rows - first, shard_rows)
            expected = _shard_size(rows, self.inner_rows, shard_rows, self.row_bytes)
            found = path.stat().st_size if path.exists() else 0
            if found != expected:
                raise CorruptSegment(f"{path} has {found} bytes before its commit, expected {expected}: something else "
                                     "changed it. Nothing of this segment was committed; run the same command again.")


class Segment:
    """A committed segment: its records, keys and rows. Opens lazily; safe across forks, threads and pickling."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[int, str] = {}  # those checked, by number

    def __reduce__(self) -> tuple[type[Segment], tuple[Path]]:
        return Segment, (self.folder,)

    @property
    def id(self) -> str:
        return self.folder.name

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the segment's document says: spec, rows, frames, bytes, checksums, `replaces`."""
        try:
            return storage.read_document(self.folder / "zarr.json")["attributes"]["featstore"]
        except KeyError:
            raise CorruptSegment(f"{self.folder}/zarr.json is not a featstore segment") from None

    @cached_property
    def records(self) -> np.ndarray:
        """One RECORD a row, in the order they were written."""
        data = self._plain("index", "index_crc32c", self.facts["rows"] * RECORD.itemsize)
        return np.frombuffer(data, RECORD)

    @cached_property
    def key_blob(self) -> bytes:
        return self._plain("keys", "keys_crc32c", None)

    def key(self, record: np.void) -> str:
        """The utterance of a record."""
        start = int(record["key_offset"])
        return self.key_blob[start:start + int(record["key_length"])].decode()

    @cached_property
    def layout(self) -> Layout:
        try:
            return Layout(self.folder / "frames")
        except FileNotFoundError:
            raise self._missing(self.folder / "frames" / "zarr.json") from None

    def read(self, offset: int, out: np.ndarray) -> None:
        """Fill `out` `(n, D)` or `(n,)`, contiguous, with rows `[offset, offset + n)` of the frames array."""
        read_rows([(self, offset, out)])

    def ranges(self, offset: int, out: np.ndarray) -> list[storage.Range]:
        """What `storage.read_many` has to read so that `out` holds rows `[offset, offset + len(out))`.

        Nothing, once they are there: rows that need decoding are read here.
        """
        layout, count = self.layout, len(out)
        if out.dtype != layout.dtype or out.shape[1:] != layout.shape[1:]:
            raise ValueError(f"rows of {self.folder} are {layout.dtype} {layout.shape[1:]}; "
                             f"they cannot be read into {out.dtype} {out.shape[1:]}")
        if offset + count > layout.shape[0]:
            raise CorruptSegment(f"{self.folder} has {layout.shape[0]} rows; {offset} to {offset + count} were asked "
                                 f"for. {_CURE}")
        if not layout.direct:
            out[...] = layout.through_zarr(offset, offset + count)
            return []
        if not out.size:
            return []
        row_bytes, flat = layout.row_bytes, out.data.cast("B")
        found, done = [], 0
        while done < count:
            number, within = divmod(offset + done, layout.shard_rows)
            rows = min(count - done, layout.shard_rows - within)
            path = self._shards.get(number) or self._shard(number)
            found.append((path, within * row_bytes, flat[done * row_bytes:(done + rows) * row_bytes]))
            done += rows
        return found

    def blocks(self, record: np.void, rows: int | None = None) -> Iterator[np.ndarray]:
        """The frames of a record in pieces of at most `rows` (None: of about 8 MiB)."""
        offset, length = int(record["offset"]), int(record["length"])
        rows = rows or max(1, _BLOCK_BYTES // self.layout.row_bytes)
        for start in range(0, length, rows):
            out = self.layout.empty(min(rows, length - start))
            self.read(offset + start, out)
            yield out

    def checksum(self, record: np.void) -> int:
        """CRC-32C of a record's frames as they are on disk now."""
        value = 0
        for block in self.blocks(record):
            value = google_crc32c.extend(value, _bytes_of(block, block.dtype))
        return value

    def _plain(self, name: str, checksum: str, size: int | None) -> bytes:
        path = self.folder / name / "c" / ("0/0" if name == "index" else "0")
        try:
            data = path.read_bytes() if self.facts["rows"] else b""
        except FileNotFoundError:
            raise self._missing(path) from None
        if size is not None and len(data) != size:
            raise CorruptSegment(f"{path} has {len(data)} bytes, expected {size}. {_CURE}")
        if google_crc32c.value(data) != self.facts[checksum]:
            raise CorruptSegment(f"{path} does not match its checksum: bytes changed since they were written. {_CURE}")
        return data

    def _shard(self, number: int) -> str:
        try:
            self._shards[number] = self.layout.check(number)
        except FileNotFoundError as error:
            raise self._missing(Path(error.filename)) from None
        return self._shards[number]

    def _missing(self, path: Path) -> Exception:
        """For a file that is not there: damage, or (FileNotFoundError) the segment was removed since it was listed."""
        if (self.folder / "zarr.json").exists():
            return CorruptSegment(f"{path} is missing. {_CURE}")
        return FileNotFoundError(f"{self.folder} was removed since the store was opened; open it again")


def read_rows(wanted: Iterable[tuple[Segment, int, np.ndarray]]) -> None:
    """Fill arrays with rows of any segments, all read by one call: (segment, first row, contiguous array) each.

    Raises:
        FileNotFoundError: a segment was removed since it was listed; some arrays may have been filled.
        CorruptSegment: files are missing, or shorter than they were written.
    """
    ranges = [part for segment, offset, out in wanted for part in segment.ranges(offset, out)]
    try:
        storage.read_many(ranges)
    except EOFError as error:
        raise CorruptSegment(f"{error}. {_CURE}") from None


class Layout:
    """How the `frames` array of a segment lies on disk; tells whether its bytes can be read without Zarr."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        document = storage.read_document(folder / "zarr.json")
        self.shape = tuple(document["shape"])
        self.dtype = np.dtype(document["data_type"]).newbyteorder("<")
        self.row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        self.shard_rows = document["chunk_grid"]["configuration"]["chunk_shape"][0]
        self.direct = False
        codec = document["codecs"][0]
        if len(document["codecs"]) == 1 and codec["name"] == "sharding_indexed":
            inner = codec["configuration"]
            codecs = [c["name"] for c in inner["codecs"]], [c["name"] for c in inner["index_codecs"]]
            endian = {c.get("configuration", {}).get("endian", "little")
                      for c in inner["codecs"] + inner["index_codecs"]}
            self.inner_rows = inner["chunk_shape"][0]
            self.direct = (codecs == (["bytes"], ["bytes", "crc32c"]) and endian == {"little"}
                           and inner.get("index_location", "end") == "end")

    def empty(self, rows: int) -> np.ndarray:
        return np.empty((rows, *self.shape[1:]), self.dtype)

    def shard_path(self, number: int) -> str:
        return str(self.folder / "c" / (f"{number}/0" if len(self.shape) == 2 else f"{number}"))

    def check(self, number: int) -> str:
        """The path of a shard whose size is right and whose index places the inner chunks one after the other.

        Raises FileNotFoundError where it is missing, CorruptSegment where it is anything else.
        """
        path = self.shard_path(number)
        rows = min(self.shape[0] - number * self.shard_rows, self.shard_rows)
        expected = _shard_size(rows, self.inner_rows, self.shard_rows, self.row_bytes)
        found = Path(path).stat().st_size
        if found != expected:
            raise CorruptSegment(f"{path} has {found} bytes, expected {expected}. {_CURE}")
        wanted = _shard_index(-(-rows // self.inner_rows), self.shard_rows // self.inner_rows,
                              self.inner_rows * self.row_bytes)
        tail = bytearray(len(wanted))
        storage.read_many([(path, found - len(wanted), memoryview(tail))])
        if tail != wanted:
            raise CorruptSegment(f"{path}: its shard index does not match its rows. {_CURE}")
        return path

    def through_zarr(self, start: int, stop: int) -> np.ndarray:
        """Rows by way of zarr-python: for codecs that need decoding."""
        import zarr

        array = zarr.open_array(str(self.folder), mode="r")
        return np.asarray(array[start:stop])


_CURE = ("`featstore verify STORE` names the utterances it holds; `featstore verify STORE --repair` gives them up, and "
         "extract makes them again")


def group(facts: dict[str, Any]) -> dict[str, Any]:
    """A Zarr v3 group document that carries our facts."""
    return {"zarr_format": 3, "node_type": "group", "attributes": {"featstore": facts}}


def _bytes_of(block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The bytes of a block, flat; google_crc32c takes arrays but no memoryviews."""
    return np.ascontiguousarray(block, dtype).reshape(-1).view(np.uint8)


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data):]


def _shard_size(rows: int, inner_rows: int, shard_rows: int, row_bytes: int) -> int:
    return -(-rows // inner_rows) * inner_rows * row_bytes + shard_rows // inner_rows * 16 + 4


def _shard_index(written: int, chunks: int, inner_bytes: int) -> bytes:
    """(offset, size) of each inner chunk, all-ones where there is none, then CRC-32C (Zarr v3 sharding codec)."""
    table = np.full((chunks, 2), _ABSENT, "<u8")
    table[:written, 0] = np.arange(written, dtype="<u8") * inner_bytes
    table[:written, 1] = inner_bytes
    data = table.tobytes()
    return data + google_crc32c.value(data).to_bytes(4, "little")


def _bytes_codec(dtype: np.dtype) -> dict[str, Any]:
    return {"name": "bytes"} if dtype.itemsize == 1 else {"name": "bytes", "configuration": {"endian": "little"}}


def _array_document(dtype: np.dtype, shape: list[int], chunk: list[int], codecs: list[dict[str, Any]],
                    names: list[str]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "array", "shape": shape, "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0, "codecs": codecs, "attributes": {}, "dimension_names": names}


def _put_array(folder: Path, dtype: np.dtype, shape: list[int], shard: list[int], inner: list[int],
               names: list[str]) -> None:
    sharding = {"name": "sharding_indexed", "configuration": {
        "chunk_shape": inner, "codecs": [_bytes_codec(dtype)], "index_location": "end",
        "index_codecs": [_bytes_codec(np.dtype("<u8")), {"name": "crc32c"}]}}
    _put_json(folder, _array_document(dtype, shape, shard, [sharding], names))


def put_plain(folder: Path, data: np.ndarray, names: list[str]) -> None:
    """A small uncompressed array in one chunk; not synced."""
    leaf = folder / "c" / "/".join(["0"] * data.ndim)
    leaf.parent.mkdir(parents=True, exist_ok=True)
    if data.size:
        storage.write(leaf, _bytes_of(data, data.dtype).data)
    chunk = [max(1, n) for n in data.shape]
    _put_json(folder, _array_document(data.dtype, list(data.shape), chunk, [_bytes_codec(data.dtype)], names))


def _put_json(folder: Path, document: dict[str, Any]) -> None:
    storage.write(folder / "zarr.json", json.dumps(document, indent=1).encode())
