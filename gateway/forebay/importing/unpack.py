# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""gzip, xz and zstd, as streams of a bounded size in memory.

However much a few bytes of input say that they are, at most a few megabytes come out at a time. Several packed streams
behind each other are one, as their own tools have it. zstd comes from `backports.zstd`, which is the standard
library's own module (3.14) for older ones: half a megabyte, where running the program `zstd` would be one more thing
that has to be installed, and could not read single clusters of a qcow2 image.
"""

import importlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from forebay.importing.sparse import STEP

MAGIC = {"gz": b"\x1f\x8b\x08", "xz": b"\xfd7zXZ\0", "zst": b"\x28\xb5\x2f\xfd"}
"""By the last part of a file's name: how such a file begins."""

_SKIPPABLE = tuple(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16))
"""Frames of zstd that hold nothing; a file may begin with one (pzstd's do)."""

MEMORY = 256 << 20
"""Bytes that unpacking may take: a hostile header asks for gigabytes. `xz -9` takes 65 MiB, `zstd --long` 128."""

_WINDOW_LOG = 27
_FEED = 16 << 10
"""Bytes of input that are given at a time: what is not used of them is copied."""


class Unpacker(Protocol):
    """One packed stream, as the standard library's classes have it."""

    @property
    def eof(self) -> bool:
        """True behind its end."""

    @property
    def unused_data(self) -> bytes:
        """What came behind its end."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """At most so many bytes of what comes out of all data so far."""


class _Gzip:
    """zlib's class, with the others' manners."""

    def __init__(self, window: int = 16 + zlib.MAX_WBITS) -> None:
        self._inner = zlib.decompressobj(window)
        self.eof = False
        self.unused_data = b""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        found = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.eof, self.unused_data = self._inner.eof, self._inner.unused_data
        return found


def _zstd() -> Any:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ValueError(
        "is packed by zstd, for which the Python package backports.zstd is missing here"
    )


def _new_zstd() -> Unpacker:
    zstd = _zstd()
    options = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
    made: Unpacker = zstd.ZstdDecompressor(options=options)
    return made


def _new_xz() -> Unpacker:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=MEMORY)


_NEW: dict[str, Callable[[], Unpacker]] = {"gz": _Gzip, "xz": _new_xz, "zst": _new_zstd}


def packed_how(head: bytes) -> str:
    """`gz`, `xz` or `zst` by how a file begins; empty for what is none of these."""
    if head.startswith(_SKIPPABLE):
        return "zst"
    return next((kind for kind, magic in MAGIC.items() if head.startswith(magic)), "")


def faults() -> tuple[type[Exception], ...]:
    """What unpacking raises for data that is damaged."""
    try:
        return zlib.error, lzma.LZMAError, _zstd().ZstdError
    except ValueError:
        return zlib.error, lzma.LZMAError


def prepare() -> None:
    """Import what will be needed: later, this process may be a user who cannot read modules. Raises nothing."""
    faults()


def unpack(kind: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """What is packed in a file whose bytes are `chunks`. Raises ValueError for one that is damaged or cut off.

    The text of that says what is wrong as the rest of a sentence that begins with the file's name.
    """
    known = faults()
    stream: Unpacker | None = None
    rest = b""
    for chunk in chunks:
        for at in range(0, len(chunk), _FEED):
            rest += chunk[at : at + _FEED]
            while rest:
                if stream is None:
                    rest = _without_padding(kind, rest)
                    if not rest:
                        break
                    stream = _NEW[kind]()
                try:
                    yield from _out_of(stream, rest)
                except known as fault:
                    raise ValueError(f"is damaged, or no {kind} file ({fault})") from None
                rest = b""
                if stream.eof:
                    rest, stream = stream.unused_data, None
    if stream is not None:
        raise ValueError("is cut off: its end is missing")


def _out_of(stream: Unpacker, data: bytes) -> Iterator[bytes]:
    """What comes out when so much is put in."""
    while True:
        found = stream.decompress(data, STEP)
        if found:
            yield found
        if stream.eof or len(found) < STEP:
            return
        data = b""


def _without_padding(kind: str, data: bytes) -> bytes:
    """Data without zeros at its start, which the tools of gzip and xz pass over between streams."""
    return data if kind == "zst" else data.lstrip(b"\0")


def unpack_once(compression: str, data: bytes, size: int) -> bytes:
    """A cluster of a qcow2 image, which has `size` bytes. Raises ValueError."""
    stream = _new_zstd() if compression == "zstd" else _Gzip(-zlib.MAX_WBITS)
    try:
        found = stream.decompress(data, size)
    except faults() as fault:
        raise ValueError(f"is damaged: a compressed cluster is none ({fault})") from None
    if len(found) != size:
        raise ValueError("is damaged: a compressed cluster is too short")
    return found
