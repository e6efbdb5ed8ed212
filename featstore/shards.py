"""The shard files of one array while they are written: rows in order, the last ones cut off again where they fail.

    <frames>/c/<n>/0    inner chunks one after the other, then the shard index: (offset, size) of each, and a CRC-32C
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

import google_crc32c
import numpy as np

from . import storage
from .codecs import RAW, Encoding
from .errors import CorruptSegment

_ABSENT = (1 << 64) - 1  # a shard's mark for an inner chunk that was never written


class Shards:
    """Raw rows: they go to the disk as they come. `rows`: how many there are."""

    encoding = RAW

    def __init__(self, folder: Path, dtype: np.dtype, dim: int, inner_rows: int, shard_rows: int) -> None:
        self.folder, self.dtype, self.dim = folder, dtype, dim
        self.inner_rows, self.shard_rows = inner_rows, shard_rows
        self.row_bytes = dtype.itemsize * max(dim, 1)
        self.inner_bytes = inner_rows * self.row_bytes
        self.rows = 0
        self.stored = 0                         # bytes of all shards, once they are finished
        self._files: list[Path] = []
        self._sizes: dict[Path, int] = {}       # once they are finished
        self._file: BinaryIO | None = None      # the last one, while it is written

    @staticmethod
    def of(encoding: Encoding, folder: Path, dtype: np.dtype, dim: int, inner_rows: int, shard_rows: int) -> Shards:
        """Shards whose inner chunks are encoded in that way."""
        if encoding.raw:
            return Shards(folder, dtype, dim, inner_rows, shard_rows)
        return PackedShards(encoding, folder, dtype, dim, inner_rows, shard_rows)

    def write(self, data: np.ndarray) -> None:
        """Add rows, as flat bytes."""
        while len(data):
            room = (self.shard_rows - self.rows % self.shard_rows) * self.row_bytes
            part = data[:room]
            self._put(part.data, self.rows // self.shard_rows)
            self.rows += len(part) // self.row_bytes
            data = data[room:]

    def cut(self, rows: int) -> None:
        """Go back to `rows` rows: what a failed write or commit left behind them is cut off."""
        self.rows = rows
        self._truncate(-(-rows // self.shard_rows), rows % self.shard_rows * self.row_bytes)

    def finish(self) -> int:
        """Pad the last inner chunk and write each shard's index. Returns the rows of a shard."""
        self.close()
        shard_rows = self._final_shard_rows()
        for number, path in enumerate(self._files):
            rows = min(self.rows - number * self.shard_rows, shard_rows)
            count = -(-rows // self.inner_rows)
            padding = bytes(count * self.inner_bytes - rows * self.row_bytes)
            sizes = [self.inner_bytes] * count
            self._end(path, rows * self.row_bytes, padding + shard_index(sizes, shard_rows // self.inner_rows))
        self.stored = sum(self._sizes.values())
        return shard_rows

    def check(self) -> None:
        """Nobody may have removed a file since it was finished."""
        for path, expected in self._sizes.items():
            found = path.stat().st_size if path.exists() else 0
            if found != expected:
                raise CorruptSegment(f"{path} has {found} bytes before its commit, expected {expected}: something else "
                                     "changed it. Nothing of this segment was committed; run the same command again.")

    def close(self) -> None:
        """Let go of the file that is written; the next row opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _put(self, data: memoryview | bytes, number: int) -> None:
        """Add bytes to the end of a shard, the last one or the next."""
        with storage.disk_room(self.folder):
            if self._file is None or number >= len(self._files):
                self.close()
                self._file = self._open(number)
            _write_all(self._file, data)

    def _open(self, number: int) -> BinaryIO:
        if number < len(self._files):
            file = cast(BinaryIO, self._files[number].open("r+b", buffering=0))
            file.seek(0, os.SEEK_END)
            return file
        path = self.folder / "c" / (f"{number}/0" if self.dim else f"{number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = cast(BinaryIO, path.open("wb", buffering=0))
        self._files.append(path)
        return file

    def _truncate(self, count: int, size: int) -> None:
        """Keep the first `count` shards; of the last, unless it is full (0), the first `size` bytes."""
        self.close()
        self._sizes = {}
        while len(self._files) > count:
            self._files.pop().unlink()
        if self._files and size:
            os.truncate(self._files[-1], size)

    def _final_shard_rows(self) -> int:
        """A small array is one shard with a small index."""
        if self.rows > self.shard_rows:
            return self.shard_rows
        return self.inner_rows * max(1, -(-self.rows // self.inner_rows))

    def _end(self, path: Path, start: int, data: bytes) -> None:
        """Write a shard's last bytes from byte `start`."""
        with path.open("r+b", buffering=0) as file:
            file.seek(start)
            _write_all(cast(BinaryIO, file), data)
        self._sizes[path] = start + len(data)


class PackedShards(Shards):
    """Encoded rows: whole inner chunks go to the disk, the rows of an unfinished one are kept in memory."""

    def __init__(self, encoding: Encoding, folder: Path, dtype: np.dtype, dim: int, inner_rows: int,
                 shard_rows: int) -> None:
        super().__init__(folder, dtype, dim, inner_rows, shard_rows)
        self.encoding = encoding
        self._chunks: list[int] = []    # encoded sizes of those that are whole
        self._rest = bytearray()        # rows behind them

    def write(self, data: np.ndarray) -> None:
        if self._rest:
            missing = self.inner_bytes - len(self._rest)
            self._rest += data[:missing].data
            data = data[missing:]
            self._flush()
        while len(data) >= self.inner_bytes:
            self._add(data[:self.inner_bytes])
            data = data[self.inner_bytes:]
        self._rest += data.data
        self.rows = len(self._chunks) * self.inner_rows + len(self._rest) // self.row_bytes

    def cut(self, rows: int) -> None:
        whole = rows // self.inner_rows
        if whole < len(self._chunks):
            self._rest = bytearray(self._decoded(whole))
            del self._chunks[whole:]
        del self._rest[(rows - whole * self.inner_rows) * self.row_bytes:]
        self.rows = rows
        count = -(-whole // self._per_shard)
        self._truncate(count, sum(self._of_shard(count - 1)) if count else 0)

    def finish(self) -> int:
        self.close()
        shard_rows = self._final_shard_rows()
        per_shard, last = shard_rows // self.inner_rows, b""
        if self._rest:
            last = self._encoded(np.frombuffer(bytes(self._rest).ljust(self.inner_bytes, b"\0"), np.uint8))
            if len(self._chunks) % self._per_shard == 0:
                self._put(b"", len(self._chunks) // self._per_shard)
                self.close()
        for number, path in enumerate(self._files):
            sizes = self._of_shard(number)
            tail = last if number == len(self._chunks) // self._per_shard else b""
            index = shard_index([*sizes, len(tail)] if tail else sizes, per_shard)
            self._end(path, sum(sizes), tail + index)
        self.stored = sum(self._sizes.values())
        return shard_rows

    @property
    def _per_shard(self) -> int:
        return self.shard_rows // self.inner_rows

    def _of_shard(self, number: int) -> Sequence[int]:
        return self._chunks[number * self._per_shard:(number + 1) * self._per_shard]

    def _flush(self) -> None:
        if len(self._rest) == self.inner_bytes:
            self._add(np.frombuffer(bytes(self._rest), np.uint8))
            self._rest.clear()

    def _add(self, chunk: np.ndarray) -> None:
        data = self._encoded(chunk)
        self._put(data, len(self._chunks) // self._per_shard)
        self._chunks.append(len(data))

    def _encoded(self, chunk: np.ndarray) -> bytes:
        return self.encoding.encode(chunk.view(self.dtype))

    def _decoded(self, number: int) -> bytes:
        """The rows of a whole inner chunk again."""
        self.close()
        shard, within = divmod(number, self._per_shard)
        start = sum(self._of_shard(shard)[:within])
        with self._files[shard].open("rb") as file:
            file.seek(start)
            data = file.read(self._chunks[number])
        return self.encoding.decode(data, self.dtype, self.inner_bytes // self.dtype.itemsize).tobytes()


def shard_index(sizes: Sequence[int], chunks: int) -> bytes:
    """(offset, size) of each inner chunk, all-ones where there is none, then CRC-32C (Zarr v3 sharding codec)."""
    table = np.full((chunks, 2), _ABSENT, "<u8")
    table[:len(sizes), 1] = sizes
    table[:len(sizes), 0] = np.cumsum([0, *sizes[:-1]]) if len(sizes) else 0
    data = table.tobytes()
    return data + google_crc32c.value(data).to_bytes(4, "little")


def chunk_table(index: bytes, written: int, end: int) -> np.ndarray | None:
    """Offset and size of a shard's first `written` inner chunks, (written, 2); None if `index` cannot be theirs.

    end: the byte at which the index begins, beyond which no chunk reaches.
    """
    data, crc = index[:-4], index[-4:]
    if google_crc32c.value(data).to_bytes(4, "little") != crc:
        return None
    table = np.frombuffer(data, "<u8").reshape(-1, 2)[:written]
    inside = (table[:, 0] <= end) & (table[:, 1] <= end) & (table[:, 0] + table[:, 1] <= end)
    return table.astype(np.int64) if len(table) == written and inside.all() else None


def _write_all(file: BinaryIO, data: memoryview | bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view):]
