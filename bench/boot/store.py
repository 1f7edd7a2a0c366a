# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The store that boots are measured on: an image behind a link of 1 Gbit/s, half a millisecond away."""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from real.processes import NbdServer, nbdkit

PLUGIN = Path(__file__).with_name("held.py")
RATE = 1e9
"""Bits in a second."""
LATENCY = 0.0005


class Taken(NamedTuple):
    """What was taken from the store."""

    requests: int
    bytes: int

    def since(self, before: "Taken") -> "Taken":
        return Taken(self.requests - before.requests, self.bytes - before.bytes)


class Store:
    """A running one."""

    def __init__(self, server: NbdServer, counts: Path) -> None:
        self.server = server
        self.uri = server.uri
        self._counts = counts

    def taken(self) -> Taken:
        """Since it was started."""
        return Taken(*struct.unpack("<QQ", self._counts.read_bytes()))


@contextlib.contextmanager
def held(directory: Path, image: Path) -> Iterator[Store]:
    """The store with one image, in `directory`."""
    counts, sock = directory / "counts", directory / "store.sock"
    words = (f"file={image}", f"rate={RATE}", f"latency={LATENCY}", f"counts={counts}")
    server = nbdkit(sock, "python", str(PLUGIN), *words)
    try:
        yield Store(server, counts)
    finally:
        server.stop()
