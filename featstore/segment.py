"""One segment on disk: rows of many utterances in one sharded Zarr array, written once, committed by its own document.

    <segment>/zarr.json    group document, written LAST: that is the commit; attributes repeat the spec
    <segment>/frames       (sum of T, D) or (sum of T,), little-endian, inner chunks of about 128 KiB: raw or encoded
    <segment>/index        (rows, 136) uint8: one RECORD a row
    <segment>/keys         uint8: the utterances' keys, UTF-8, one after the other
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from hashlib import blake2b
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, ClassVar

import google_crc32c
import numpy as np

from . import cache, storage
from .codecs import RAW, Encoding, bytes_codec, named, recognised
from .errors import CorruptSegment, NotAStore
from .shards import Shards, chunk_table, shard_index
from .storage import Place

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
BLOCK_BYTES = 8 << 20
_RECORD = struct.Struct("<7Q2IQ2d32s2IQ")  # the same 136 bytes: packed 20 times faster than a numpy record is filled


def key_hashes(key: str) -> tuple[int, int]:
    """The two halves of a key's 128-bit hash: the first is searched for, the second tells collisions apart."""
    digest = blake2b(key.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class SegmentWriter:
    """Appends rows to a new segment; nothing of it is visible before `commit`."""

    def __init__(self, folder: Place, dtype: str, dim: int, encoding: Encoding = RAW) -> None:
        self.folder, self.dtype, self.dim = folder, np.dtype(dtype).newbyteorder("<"), dim
        self.row_bytes = self.dtype.itemsize * max(dim, 1)
        inner_rows = max(1, INNER_BYTES // self.row_bytes)
        shard_rows = inner_rows * max(1, SHARD_BYTES // (inner_rows * self.row_bytes))
        with storage.disk_room(folder):
            self._home = storage.staging(folder)
            (self._home / "frames").mkdir(parents=True)
        self._shards = Shards.of(encoding, self._home / "frames", self.dtype, dim, inner_rows, shard_rows)
        if self._home != folder:  # local files that nobody would look for, should the writer be given up
            weakref.finalize(self, _abandon, self._shards, self._home, folder, os.getpid())
        self._begun = time.time_ns()
        self._records = bytearray()
        self._keys = bytearray()
        self._lost = False

    @property
    def rows(self) -> int:
        """Frames written so far."""
        return self._shards.rows

    @property
    def size(self) -> int:
        """Bytes of frames written so far, before they are encoded."""
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
                self._shards.write(view)
        except BaseException:
            self._shards.cut(start)
            raise
        self._note(key, generation=generation, offset=start, length=self.rows - start, source=source, stamp=stamp,
                   scale=scale, seconds=seconds, checksum=checksum)
        return self.rows - start

    def remove(self, key: str, *, generation: int) -> None:
        """Add a tombstone: the key has no row from this generation on."""
        self._note(key, generation=generation, flags=REMOVED)

    def copy(self, key: str, record: np.void, blocks: Iterable[np.ndarray]) -> None:
        """Add a row of another segment as it is, generation included.

        The hashes of its key are the record's: a tombstone may have lost the key itself (""; see compact.py).
        """
        kept = {name: record[name]
                for name in ("generation", "written", "flags", "stamp", "scale", "seconds", "checksum")}
        offset = self.rows
        try:
            for block in blocks:
                self._shards.write(_bytes_of(block, self.dtype))
        except BaseException:
            self._shards.cut(offset)
            raise
        self._note(key, hashes=(int(record["hash"]), int(record["tag"])), **kept, source=record["source"].tobytes(),
                   offset=offset, length=self.rows - offset)

    def extend(self, segment: Segment, records: np.ndarray) -> None:
        """Add rows of another segment as they are, generations included, in the order in which they lie there.

        Neighbours are copied together. What fails on the way leaves rows without a record: discard the segment then.
        """
        if not len(records):
            return
        records = records[np.argsort(records["offset"], kind="stable")]
        offset, length = records["offset"].astype(np.int64), records["length"].astype(np.int64)
        breaks = np.flatnonzero(offset[1:] != offset[:-1] + length[:-1]) + 1
        placed = np.cumsum(length) - length + self.rows
        for first, stop in pairwise([0, *breaks.tolist(), len(records)]):
            for block in segment.span(int(offset[first]), int(length[first:stop].sum())):
                self._shards.write(_bytes_of(block, self.dtype))
        self._records += _renumbered(records, placed, len(self._keys))
        self._keys += segment.keys(records)

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
            self._shards.cut(self.rows)
            raise

    def _commit(self, attributes: dict[str, Any]) -> None:
        _put_frames(self._home / "frames", self._shards, self._shards.finish())
        found = _put_index(self._home, bytes(self._records), bytes(self._keys))
        facts: dict[str, Any] = {"rows": found.pop("rows"), "frames": self.rows, "bytes": self.size} | found
        if not self._shards.encoding.raw:
            facts |= {"codec": self._shards.encoding.name, "stored": self._shards.stored}
        if self._home == self.folder:
            self._lost = True  # after a failed fsync nobody knows what is on the disk: a second one proves nothing
            storage.sync_tree(self._home)
            storage.sync_folder(self._home.parent)
            self._lost = False
        self._shards.check()
        storage.upload(self._home, self.folder)
        storage.commit_document(self.folder / "zarr.json", group(attributes | facts))
        storage.unstage(self._home, self.folder)

    def discard(self) -> None:
        """Remove what was written; for segments that have no row."""
        self._shards.close()
        storage.unstage(self._home, self.folder)
        with contextlib.suppress(OSError):
            storage.remove_tree(self.folder)

    def __len__(self) -> int:
        return len(self._records) // RECORD.itemsize

    def _note(self, key: str, *, generation: int, written: int | None = None, offset: int = 0, length: int = 0,
              flags: int = 0, stamp: int = 0, scale: float = 1.0, seconds: float = 0.0, source: bytes = NO_SOURCE,
              checksum: int = 0, hashes: tuple[int, int] | None = None) -> None:
        first, second = hashes or key_hashes(key)
        text = key.encode()
        self._records += _RECORD.pack(first, second, generation, self._begun if written is None else written, offset,
                                      length, len(self._keys), len(text), flags, stamp, scale, seconds, source,
                                      checksum, 0, 0)
        self._keys += text


def _abandon(shards: Shards, home: Path, folder: Place, process: int) -> None:
    if os.getpid() == process:  # and not in a fork that ends
        shards.close()
        storage.unstage(home, folder)


class Segment:
    """A committed segment: its records, keys and rows. Opens lazily; safe across forks, threads and pickling.

    mapped: raw rows are copied out of maps of the shards, not read by calls of the system. A shard that is truncated
    while it is mapped ends the process (SIGBUS): no writer of ours ever does.
    """

    _decoded: ClassVar[tuple[Segment, int, int, np.ndarray] | None] = None  # shard, inner chunk and its rows

    def __init__(self, folder: Place, *, mapped: bool = False) -> None:
        self.folder, self.mapped = folder, mapped
        self._shards: dict[int, str] = {}  # those checked, by number

    def __reduce__(self) -> tuple[Callable[..., Segment], tuple[Place]]:
        return (partial(Segment, mapped=True) if self.mapped else Segment), (self.folder,)

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def committed(self) -> bool:
        """Whether its document is there; of objects it is read at once, which is one request instead of two."""
        if isinstance(self.folder, Path):
            return (self.folder / "zarr.json").exists()
        try:
            return bool(self.facts)
        except FileNotFoundError:
            return False
        except (CorruptSegment, NotAStore):
            return True  # damaged: whoever needs what it says is told

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the segment's document says: spec, rows, frames, bytes, checksums, `replaces`."""
        try:
            return storage.read_document(self.folder / "zarr.json")["attributes"]["featstore"]
        except KeyError:
            raise CorruptSegment(f"{self.folder}/zarr.json is not a featstore segment") from None

    @property
    def codec(self) -> str:
        """How its frames are encoded: raw, zstd or pcodec."""
        return str(self.facts.get("codec", RAW.name))

    @property
    def stored(self) -> int:
        """Bytes of its frames on disk."""
        return int(self.facts.get("stored", self.facts["bytes"]))

    @cached_property
    def records(self) -> np.ndarray:
        """One RECORD a row, in the order they were written."""
        data = self._plain("index", "index_crc32c", self.facts["rows"] * RECORD.itemsize)
        return np.frombuffer(data, RECORD)

    @cached_property
    def key_blob(self) -> bytes:
        return self._plain("keys", "keys_crc32c", None)

    def taken(self) -> np.ndarray:
        """Its records, to be changed and kept; they are not kept here as well."""
        return self.__dict__.pop("records", None) if "records" in self.__dict__ else self.records

    def key(self, record: np.void) -> str:
        """The utterance of a record."""
        start = int(record["key_offset"])
        return self.key_blob[start:start + int(record["key_length"])].decode()

    def keys(self, records: np.ndarray) -> bytes:
        """The keys of some records, one after the other."""
        places = zip(records["key_offset"].tolist(), records["key_length"].tolist(), strict=True)
        return b"".join([self.key_blob[start:start + length] for start, length in places])

    @cached_property
    def layout(self) -> Layout:
        try:
            return Layout(self.folder / "frames")
        except FileNotFoundError:
            raise self.missing(self.folder / "frames" / "zarr.json") from None

    def read(self, offset: int, out: np.ndarray) -> None:
        """Fill `out` `(n, D)` or `(n,)`, contiguous, with rows `[offset, offset + n)` of the frames array."""
        later: list[Callable[[], None]] = []
        _read(self.ranges(offset, out, later), later, [self])

    def ranges(self, offset: int, out: np.ndarray, later: list[Callable[[], None]]) -> list[storage.Range]:
        """What `storage.read_many` has to read so that `out` holds rows `[offset, offset + len(out))`.

        later: gets what is to be called then, where rows are encoded.
        """
        layout, count = self.layout, len(out)
        if out.dtype != layout.dtype or out.shape[1:] != layout.shape[1:]:
            raise ValueError(f"rows of {self.folder} are {layout.dtype} {layout.shape[1:]}; "
                             f"they cannot be read into {out.dtype} {out.shape[1:]}")
        if offset + count > layout.shape[0]:
            raise CorruptSegment(f"{self.folder} has {layout.shape[0]} rows; {offset} to {offset + count} were asked "
                                 f"for. {_CURE}")
        if not layout.direct:
            return self._encoded_ranges(offset, out, later)
        if not count:
            return []
        row_bytes, flat = layout.row_bytes, out.data.cast("B")
        number, within = divmod(offset, layout.shard_rows)
        if within + count <= layout.shard_rows:  # nearly always, and what a single crop waits for
            found: list[storage.Range] = []
            path = self._shards.get(number) or self._shard(number, found, later)
            return [*found, (path, within * row_bytes, flat)]
        found, done = [], 0
        while done < count:
            number, within = divmod(offset + done, layout.shard_rows)
            rows = min(count - done, layout.shard_rows - within)
            path = self._shards.get(number) or self._shard(number, found, later)
            found.append((path, within * row_bytes, flat[done * row_bytes:(done + rows) * row_bytes]))
            done += rows
        return found

    def _encoded_ranges(self, offset: int, out: np.ndarray, later: list[Callable[[], None]]) -> list[storage.Range]:
        """Of rows that are encoded only the inner chunks that have some of them are read, and decoded when they are."""
        layout, done = self.layout, 0
        if layout.encoding is None:
            out[...] = layout.through_zarr(offset, offset + len(out))
            return []
        found = []
        while done < len(out):
            number, within = divmod(offset + done, layout.shard_rows)
            chunk, first = divmod(within, layout.inner_rows)
            part = out[done:done + layout.inner_rows - first]
            kept = self._kept(number, chunk)
            if kept is not None:
                part[...] = kept[first:first + len(part)]
            else:
                path = self._shards.get(number) or self._checked(number)
                start, size = layout.tables[number][chunk].tolist()
                data = bytearray(size)
                found.append((path, start, memoryview(data)))
                later.append(partial(self._decode, layout.encoding, number, chunk, data, first, part))
            done += len(part)
        return found

    def _decode(self, encoding: Encoding, number: int, chunk: int, data: bytearray, first: int,
                out: np.ndarray) -> None:
        """Fill `out` with the rows of an inner chunk from `first`."""
        layout, rows = self.layout, self._kept(number, chunk)
        if rows is None:
            try:
                flat = encoding.decode(data, layout.dtype, layout.inner_rows * layout.row_size)
            except ValueError as error:
                raise CorruptSegment(f"{layout.shard_path(number)}, inner chunk {chunk}: {error}. {_CURE}") from None
            rows = flat.reshape(-1, *layout.shape[1:])
            Segment._decoded = self, number, chunk, rows
        out[...] = rows[first:first + len(out)]

    def _kept(self, number: int, chunk: int) -> np.ndarray | None:
        """An inner chunk if it is the last that this process decoded: short rows, read one after another, share it."""
        kept = Segment._decoded
        return kept[3] if kept is not None and kept[0] is self and kept[1:3] == (number, chunk) else None

    def blocks(self, record: np.void, rows: int | None = None) -> Iterator[np.ndarray]:
        """The frames of a record in pieces of at most `rows` (None: of about 8 MiB)."""
        return self.span(int(record["offset"]), int(record["length"]), rows)

    def span(self, offset: int, count: int, rows: int | None = None) -> Iterator[np.ndarray]:
        """Rows `[offset, offset + count)` of the frames array, in pieces."""
        rows = rows or max(1, BLOCK_BYTES // self.layout.row_bytes)
        for start in range(0, count, rows):
            out = self.layout.empty(min(rows, count - start))
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
            if self.facts[checksum] != google_crc32c.value(b""):
                raise self.missing(path) from None
            data = b""  # the keys of a segment that has none: nothing but tombstones that went through compact
        if size is not None and len(data) != size:
            raise CorruptSegment(f"{path} has {len(data)} bytes, expected {size}. {_CURE}")
        if google_crc32c.value(data) != self.facts[checksum]:
            raise CorruptSegment(f"{path} does not match its checksum: bytes changed since they were written. {_CURE}")
        return data

    def _shard(self, number: int, ranges: list[storage.Range], later: list[Callable[[], None]]) -> str:
        """The path of a raw shard that was not read from before. What says whether it is whole is looked at first, or,
        where that is a request, read together with the frames and looked at before anybody has them."""
        if isinstance(self.folder, Path) or not cache.remembers():
            return self._checked(number)
        path, start, wanted = self.layout.end(number)
        found = bytearray(len(wanted))
        ranges.append((path, start, memoryview(found)))
        later.append(partial(self._accept, number, path, found, wanted))
        return path

    def _accept(self, number: int, path: str, found: bytearray, wanted: bytes) -> None:
        if found != wanted:
            raise CorruptSegment(f"{path}: its shard index does not match its rows. {_CURE}")
        self._shards[number] = path

    def _checked(self, number: int) -> str:
        try:
            path = self.layout.check(number)
            self._shards[number] = storage.Mapped(path) if self.mapped and isinstance(self.folder, Path) else path
        except FileNotFoundError as error:
            raise self.missing(storage.place(error.filename)) from None
        return self._shards[number]

    def missing(self, path: Place) -> Exception:
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
    later: list[Callable[[], None]] = []
    wanted = list(wanted)
    ranges = [part for segment, offset, out in wanted for part in segment.ranges(offset, out, later)]
    _read(ranges, later, [segment for segment, _, _ in wanted])


def _read(ranges: Sequence[storage.Range], later: Sequence[Callable[[], None]], owners: Sequence[Segment]) -> None:
    try:
        storage.read_many(ranges)
    except EOFError as error:
        raise CorruptSegment(f"{error}. {_CURE}") from None
    except FileNotFoundError as error:
        path = str(error.filename)
        owner = next((segment for segment in owners if path.startswith(f"{segment.folder}/")), None)
        raise error if owner is None else owner.missing(storage.place(path)) from None
    for decode in later:
        decode()


def encoding_of(segments: Sequence[Segment], dtype: np.dtype) -> Encoding:
    """How rows that join these segments, or take their place, are to be encoded: as in the newest of them."""
    return named(segments[-1].codec, dtype) if segments else RAW


def link(folder: Place, parts: Sequence[Segment], records: np.ndarray, attributes: dict[str, Any]) -> int:
    """Commit a segment that holds rows of others without copying them: their shards, by hard links. Returns its bytes.

    Where the last shard of a part is short, the array goes on with the next shard: the rows between are absent, as in
    any sparse Zarr array, and no record names them. records: of the rows, `segment` being the number of their part.

    Raises:
        OSError: there are no hard links (objects, some file systems), or the parts' arrays are of different shapes;
            nothing is committed.
    """
    documents = [storage.read_document(part.folder / "frames" / "zarr.json") for part in parts]
    shapes = [document.pop("shape") for document in documents]
    filled = [part.layout.rows_in_shards() for part in parts]
    alike = [document | {"attributes": {}} for document in documents]
    if not isinstance(folder, Path) or parts[0].layout.encoding is None or any(one != alike[0] for one in alike):
        raise OSError(errno.EOPNOTSUPP, f"the shards of {parts[0].folder} and others cannot be linked in {folder}")
    first = np.cumsum([0, *map(len, filled)])
    rows = int(first[-1] - 1) * parts[0].layout.shard_rows + filled[-1][-1]
    placed = {"shape": [rows, *shapes[0][1:]], "attributes": {"rows_in_shards": list(chain.from_iterable(filled))}}
    with storage.disk_room(folder):
        (folder / "frames").mkdir(parents=True)
        _put_json(folder / "frames", documents[0] | placed)
        made = Layout(folder / "frames")
        for part, start, counts in zip(parts, first.tolist(), filled, strict=False):
            for number in range(len(counts)):
                path = Path(made.shard_path(start + number))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.hardlink_to(part.layout.shard_path(number))
        index, keys = bytearray(), bytearray()
        for number, part in enumerate(parts):
            mine = records[records["segment"] == number]
            index += _renumbered(mine, mine["offset"] + np.uint64(first[number] * made.shard_rows), len(keys))
            keys += part.keys(mine)
        facts: dict[str, Any] = _put_index(folder, bytes(index), bytes(keys))
        storage.sync_tree(folder)
        storage.sync_folder(folder.parent)
        for number in range(int(first[-1])):
            made.check(number)
        frames = sum(map(sum, filled))
        facts |= {"frames": frames, "bytes": frames * made.row_bytes, "links": [part.id for part in parts]}
        if not parts[0].layout.direct:
            facts |= {"codec": parts[0].codec, "stored": sum(part.stored for part in parts)}
        storage.commit_document(folder / "zarr.json", group(attributes | facts))
    return frames * made.row_bytes


def _renumbered(records: np.ndarray, offsets: np.ndarray, key_offset: int) -> bytes:
    """Records for the index of another segment, where their rows lie at `offsets` and their keys from `key_offset`."""
    records = records.copy()
    lengths = records["key_length"].astype(np.uint64)
    records["offset"], records["key_offset"] = offsets, np.cumsum(lengths) - lengths + np.uint64(key_offset)
    records["segment"] = records["newest"] = 0
    return records.tobytes()


def _put_index(folder: Path, records: bytes, keys: bytes) -> dict[str, int]:
    """Write the index and the keys of a segment; what its document says of them."""
    rows = len(records) // RECORD.itemsize
    put_plain(folder / "index", np.frombuffer(records, np.uint8).reshape(rows, RECORD.itemsize), ["row", "byte"])
    put_plain(folder / "keys", np.frombuffer(keys, np.uint8), ["byte"])
    return {"rows": rows, "index_crc32c": google_crc32c.value(records), "keys_crc32c": google_crc32c.value(keys)}


class Layout:
    """How the `frames` array of a segment lies on disk; tells whether its bytes can be read without Zarr."""

    def __init__(self, folder: Place) -> None:
        self.folder = folder
        document = storage.read_document(folder / "zarr.json")
        self.shape = tuple(document["shape"])
        self.dtype = np.dtype(document["data_type"]).newbyteorder("<")
        self.row_size = int(np.prod(self.shape[1:], dtype=np.int64))
        self.row_bytes = self.dtype.itemsize * self.row_size
        self.shard_rows = document["chunk_grid"]["configuration"]["chunk_shape"][0]
        self.encoding: Encoding | None = None  # of inner chunks; None: zarr reads them
        self.tables: dict[int, np.ndarray] = {}  # of encoded shards that were checked: offset and size of each chunk
        self._linked: list[int] | None = document["attributes"].get("rows_in_shards")
        codec = document["codecs"][0]
        if len(document["codecs"]) == 1 and codec["name"] == "sharding_indexed":
            inner = codec["configuration"]
            self.inner_rows = inner["chunk_shape"][0]
            index = [c["name"] for c in inner["index_codecs"]], inner.get("index_location", "end")
            if index == (["bytes", "crc32c"], "end") and recognised(inner["index_codecs"][:1], np.dtype("<u8")):
                self.encoding = recognised(inner["codecs"], self.dtype)
        self.direct = self.encoding is not None and self.encoding.raw

    def empty(self, rows: int) -> np.ndarray:
        return np.empty((rows, *self.shape[1:]), self.dtype)

    def shard_path(self, number: int) -> str:
        return str(self.folder / "c" / (f"{number}/0" if len(self.shape) == 2 else f"{number}"))

    def rows_in_shards(self) -> list[int]:
        """How many rows each shard holds: as many as fit, but for the last one (of each part that `link` joined)."""
        if self._linked is not None:
            return self._linked
        whole, rest = divmod(self.shape[0], self.shard_rows)
        return [self.shard_rows] * whole + [rest] * (rest > 0)

    def check(self, number: int) -> str:
        """The path of a shard whose size is right and whose index places the inner chunks one after the other.

        Raises FileNotFoundError where it is missing, CorruptSegment where it is anything else.
        """
        path = self.shard_path(number)
        chunks, raw = self._raw_index(number)
        size = storage.place(path).stat().st_size
        end, wanted = size - len(raw), chunks * self.inner_rows * self.row_bytes
        if end != wanted if self.direct else end < 0:
            raise CorruptSegment(f"{path} has {size} bytes, expected {wanted + len(raw)}. {_CURE}")
        index = bytearray(len(raw))
        storage.read_many([(path, end, memoryview(index))])
        table = chunk_table(bytes(index), chunks, end)
        if table is None or (self.direct and index != raw):
            raise CorruptSegment(f"{path}: its shard index does not match its rows. {_CURE}")
        if not self.direct:
            self.tables[number] = table
        return path

    def end(self, number: int) -> tuple[str, int, bytes]:
        """The path of a raw shard, the byte from which its index must lie there, and that index."""
        chunks, raw = self._raw_index(number)
        return self.shard_path(number), chunks * self.inner_rows * self.row_bytes, raw

    def _raw_index(self, number: int) -> tuple[int, bytes]:
        """How many inner chunks a shard has, and what its index is if they are raw."""
        chunks = -(-self.rows_in_shards()[number] // self.inner_rows)
        return chunks, shard_index([self.inner_rows * self.row_bytes] * chunks, self.shard_rows // self.inner_rows)

    def through_zarr(self, start: int, stop: int) -> np.ndarray:
        """Rows by way of zarr-python: for codecs that only it knows. Of objects whole shards are fetched for it."""
        import zarr

        place: Any = str(self.folder)
        if not isinstance(self.folder, Path):
            numbers = range(start // self.shard_rows, -(-stop // self.shard_rows))
            names = ["zarr.json", *(self.shard_path(number)[len(place) + 1:] for number in numbers)]
            whole = zarr.core.buffer.default_buffer_prototype().buffer.from_bytes
            place = zarr.storage.MemoryStore({name: whole((self.folder / name).read_bytes()) for name in names})
        array = zarr.open_array(place, mode="r")
        return np.asarray(array[start:stop])


_CURE = ("`featstore verify STORE` names the utterances it holds; `featstore verify STORE --repair` gives them up, and "
         "extract makes them again")


def group(facts: dict[str, Any]) -> dict[str, Any]:
    """A Zarr v3 group document that carries our facts."""
    return {"zarr_format": 3, "node_type": "group", "attributes": {"featstore": facts}}


def _bytes_of(block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The bytes of a block, flat; google_crc32c takes arrays but no memoryviews."""
    return np.ascontiguousarray(block, dtype).reshape(-1).view(np.uint8)


def _array_document(dtype: np.dtype, shape: list[int], chunk: list[int], codecs: list[dict[str, Any]],
                    names: list[str]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "array", "shape": shape, "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0, "codecs": codecs, "attributes": {}, "dimension_names": names}


def _put_frames(folder: Path, shards: Shards, shard_rows: int) -> None:
    channels = [shards.dim] if shards.dim else []
    sharding = {"name": "sharding_indexed", "configuration": {
        "chunk_shape": [shards.inner_rows, *channels], "codecs": shards.encoding.metadata(shards.dtype),
        "index_location": "end", "index_codecs": [bytes_codec(np.dtype("<u8")), {"name": "crc32c"}]}}
    _put_json(folder, _array_document(shards.dtype, [shards.rows, *channels], [shard_rows, *channels], [sharding],
                                      ["frame", "channel"][:1 + len(channels)]))


def put_plain(folder: Path, data: np.ndarray, names: list[str]) -> None:
    """A small uncompressed array in one chunk of a folder or staging folder; not synced."""
    leaf = folder / "c" / "/".join(["0"] * data.ndim)
    leaf.parent.mkdir(parents=True, exist_ok=True)
    if data.size:
        storage.write(leaf, _bytes_of(data, data.dtype).data)
    chunk = [max(1, n) for n in data.shape]
    _put_json(folder, _array_document(data.dtype, list(data.shape), chunk, [bytes_codec(data.dtype)], names))


def _put_json(folder: Path, document: dict[str, Any]) -> None:
    storage.write(folder / "zarr.json", json.dumps(document, indent=1).encode())
