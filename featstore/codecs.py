"""How the inner chunks of a segment's frames are encoded: raw, or losslessly by zstd or pcodec.

Encoded chunks end with their CRC-32C, so that damage is found whenever one is read, by any reader of Zarr.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import google_crc32c
import numpy as np

from .errors import BadRequest, MissingPackage

ZSTD_LEVEL = 3    # higher ones take neural features to the same size, more slowly
PCODEC_LEVEL = 8  # 4 is twice as fast to write and leaves 3 % more; both are read equally fast
_CRC_BYTES = 4
_NUMBERS = {f"{kind}{8 * size}" for kind in ("int", "uint", "float") for size in (2, 4, 8)}
_CRC32C = {"name": "crc32c"}


@dataclass(frozen=True)
class Encoding:
    """One way to encode inner chunks. `summed`: each ends with its CRC-32C."""

    name: str
    summed: bool = True

    @property
    def raw(self) -> bool:
        return self.name == "raw"

    def metadata(self, dtype: np.dtype) -> list[dict[str, Any]]:
        """The codecs of an inner chunk as a Zarr document lists them."""
        if self.name == "pcodec":
            return [{"name": "numcodecs.pcodec", "configuration": {
                "level": PCODEC_LEVEL, "mode_spec": "auto", "delta_spec": "auto", "paging_spec": "equal_pages_up_to",
                "delta_encoding_order": None, "equal_pages_up_to": 1 << 18}}, _CRC32C]
        zstd = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
        return [bytes_codec(dtype)] + ([] if self.raw else [zstd, _CRC32C])

    def encode(self, chunk: np.ndarray) -> bytes:
        """The bytes to store of a whole inner chunk, flat and of its own dtype."""
        if self.name == "pcodec":
            pcodec = _package("pcodec")
            data = pcodec.standalone.simple_compress(chunk, pcodec.ChunkConfig(compression_level=PCODEC_LEVEL))
        else:
            data = _package("numcodecs.zstd").compress(chunk, ZSTD_LEVEL)
        return data + google_crc32c.value(data).to_bytes(_CRC_BYTES, "little")

    def decode(self, data: bytes | bytearray, dtype: np.dtype, size: int) -> np.ndarray:
        """The `size` numbers of an inner chunk, flat. ValueError says why it cannot be what was stored."""
        chunk = np.frombuffer(data, np.uint8)  # the CRC takes no memoryview
        if self.summed:
            chunk, crc = chunk[:-_CRC_BYTES], chunk[-_CRC_BYTES:]
            if google_crc32c.value(chunk) != int.from_bytes(crc.tobytes(), "little"):
                raise ValueError("its bytes do not match their CRC-32C")
        try:
            if self.name == "pcodec":
                found = _package("pcodec").standalone.simple_decompress(chunk.tobytes())
            else:
                found = np.frombuffer(_package("numcodecs.zstd").decompress(chunk), dtype)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self.name} cannot decode it ({error})") from None
        if found is None or found.dtype != dtype or found.size != size:
            told = "nothing" if found is None else f"{found.size} {found.dtype}"
            raise ValueError(f"it holds {told}, expected {size} {dtype}")
        return found


RAW = Encoding("raw", summed=False)
ENCODINGS = {encoding.name: encoding for encoding in (RAW, Encoding("zstd"), Encoding("pcodec"))}


def named(name: str, dtype: np.dtype) -> Encoding:
    """The encoding of that name, for numbers of a type.

    Raises:
        BadRequest: there is none of that name, or it does not take that type.
        MissingPackage: pcodec is asked for and not installed.
    """
    if name not in ENCODINGS:
        raise BadRequest(f"codec {name!r} is none of {', '.join(ENCODINGS)}, int8")
    if name == "pcodec":
        if dtype.name not in _NUMBERS:
            raise BadRequest(f"pcodec takes numbers of 16, 32 or 64 bits, not {dtype}; zstd takes every type")
        _package("pcodec")
    return ENCODINGS[name]


def recognised(codecs: Sequence[Mapping[str, Any]], dtype: np.dtype) -> Encoding | None:
    """The encoding that a Zarr document describes by the codecs of an inner chunk; None: it is for zarr to read."""
    names = [str(codec["name"]) for codec in codecs]
    endian = {codec.get("configuration", {}).get("endian", "little") for codec in codecs}
    summed = len(names) > 1 and names[-1] == "crc32c"
    names = names[:-1] if summed else names
    if endian != {"little"}:
        return None
    if names == ["bytes"] and not summed:
        return RAW
    if names == ["bytes", "zstd"]:
        return Encoding("zstd", summed)
    return Encoding("pcodec", summed) if names in (["numcodecs.pcodec"], ["pcodec"]) else None


def bytes_codec(dtype: np.dtype) -> dict[str, Any]:
    """Zarr's codec of plain little-endian numbers."""
    return {"name": "bytes"} if dtype.itemsize == 1 else {"name": "bytes", "configuration": {"endian": "little"}}


def _package(name: str) -> ModuleType:
    """A codec's package, imported when the first chunk needs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage(f"{name} is needed for what is packed with it and cannot be imported ({error}). "
                             f"Install it: pip install {name.partition('.')[0]}") from error
