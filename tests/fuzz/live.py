# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Targets that go through sockets, and so through the compiled core where there is one: a client, and a server.

Behind the client's connection is a cache of its own, with a device and an index; behind the server's the FUSE door.
"""

import contextlib
import errno
import os
import random
import shutil
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import trio

import forebay_cache.cache
import forebay_fast
from forebay_cache.format.geometry import BLOCK, Buffer
from forebay_nbd import KnownExports, Limits
from forebay_nbd.protocol.session import Session
from forebay_nbd.protocol.wire import REQUEST, REQUEST_MAGIC, SIMPLE_REPLY, Cmd, ProtocolError
from forebay_nbd.server.budget import Budget, Share
from forebay_nbd.server.connection import Connection
from sim.fake_loop import Dice, FakeSyncer
from sim.side_disk import Disk
from sim.twins import Side

SIZE = 8 << 20
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
SECONDS = 20
"""A stream takes no longer: what takes longer hangs."""
MOST_ASKED = 150
"""Requests of a kernel in one input of the target `door`."""
KIB = 1 << 10


# --- clients ------------------------------------------------------------------------------------


class _Syncer(FakeSyncer):
    """One that the kernel carries out, also in memory."""

    dice = Dice("fuzz")


class _Disk(Disk):
    """A disk of zeros."""

    contexts: tuple[str, ...] = ("forebay:cached",)

    async def fetch(self, offset: int, length: int) -> Buffer:
        return bytes(length)

    async def zero(self, offset: int, length: int, fua: bool, no_hole: bool, fast: bool) -> None:
        raise OSError(errno.ENOSPC, "no zeroes")

    async def cache(self, offset: int, length: int) -> None:
        pass

    async def extents(
        self, context: str, offset: int, length: int, one: bool
    ) -> list[tuple[int, int]]:
        return [(length, 0)]


def connection(data: bytes) -> None:
    """All that a client sends, as the target `server` gets it: handshake, then requests."""
    _serve(data, None)


_STEP = struct.Struct("<BBBBHH")
_UNITS = (1, 512, 4 * KIB, 64 * KIB)
_COMMANDS = (Cmd.READ, Cmd.WRITE, Cmd.WRITE, Cmd.READ, Cmd.FLUSH, *Cmd)


def turns(data: bytes) -> None:
    """Requests, each made of eight bytes, so that most of them are such as a client may send."""
    stream = bytearray()
    for n, step in enumerate(_STEP.iter_unpack(data[: len(data) & -8])):
        command, shape, marks, fill, where, length = step
        chosen = _COMMANDS[command % len(_COMMANDS)]
        unit = _UNITS[shape & 3]
        offset = where % (SIZE // unit + 2) * unit - (shape >> 5 == 7)
        count = length % 33 * _UNITS[shape >> 2 & 3] + (shape >> 4 == 15)
        if chosen == Cmd.FLUSH:
            offset = count = 0
        flags = marks if marks < 32 and fill > 200 else 0
        magic = REQUEST_MAGIC ^ (command == 255)
        stream += REQUEST.pack(magic, flags, chosen, n, offset % (1 << 64), count)
        if chosen == Cmd.WRITE:
            stream += bytes([fill]) * min(count, 256 * KIB)
    _serve(bytes(stream[: 4 << 20]), Session("disk", structured=bool(zlib.crc32(data) & 1)))


def _serve(data: bytes, session: Session | None) -> None:
    home = Path(tempfile.mkdtemp(prefix="forebay-fuzz-", dir=_MEMORY))
    try:
        with mock.patch.object(forebay_cache.cache, "Syncer", _Syncer):
            side = Side(home, core=forebay_fast.serves(), size=32 << 20)
        try:
            trio.run(_conversation, side, data, session)
        finally:
            side.cache.release()
    finally:
        shutil.rmtree(home)


async def _conversation(side: Side, data: bytes, session: Session | None) -> None:
    """Send it to a connection, to its end. Afterwards both ways of reading say the same."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    disk = _Disk(side, SIZE)
    served = Connection(ours, Limits(), Share(Budget(64 << 20)))
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            await nursery.start(side.cache.run)
            nursery.start_soon(_talk, theirs, data)
            with contextlib.suppress(ProtocolError):
                if session is None:
                    await served.run(
                        KnownExports(
                            lambda name: disk if name in ("", "disk") else None, lambda: ["disk"]
                        )
                    )
                else:
                    await served.resume(session, disk)
            nursery.cancel_scope.cancel()
    theirs.close()
    assert not side.stale()
    for at in range(0, SIZE, BLOCK):
        one, other = side.read_now(at, BLOCK), side.view.read_now(at, BLOCK)
        assert one == other, f"block {at // BLOCK}"


async def _talk(end: socket.socket, data: bytes) -> None:
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(end))

    async def listen() -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while await stream.receive_some(1 << 20):
                pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        with contextlib.suppress(trio.BrokenResourceError):
            for piece in _pieces(data):
                await stream.send_all(piece)
            await stream.send_eof()


def _pieces(data: bytes) -> Iterator[bytes]:
    """Some tens of pieces, cut where the data says, or all in one."""
    cut = zlib.crc32(data)
    step = len(data) // (1 + cut % 40 if cut % 4 else 1) + 1
    for at in range(0, len(data), step):
        yield data[at : at + step]


# --- the FUSE door ------------------------------------------------------------------------------


def door(data: bytes) -> None:
    """What a server answers to the FUSE door, between requests of a kernel: a byte says what comes, the next ones what
    is in it. Each request of the kernel has one answer in the end.
    """
    if forebay_fast.missing:
        return
    from sim.fuse_kernel import Disk as Server
    from sim.fuse_kernel import Kernel

    kernel, server = Kernel(), Server(bytearray(SIZE))
    link = forebay_fast.core.DiskConnection(kernel.device)
    kernel.device.opened(3, forebay_fast.core.FuseFile(link, SIZE, True, lambda: None))
    try:
        asked = _Door(kernel, server, link).play(data)
        link.refuse(errno.EIO)
        kernel.run()
        kernel.collect()
        assert not kernel.complaints
        assert kernel.answers.keys() == asked
    finally:
        server.close()
        kernel.close()


class _Door:
    def __init__(self, kernel: Any, server: Any, link: Any) -> None:
        self._kernel, self._server, self._link = kernel, server, link
        self._asked: set[int] = set()
        self._rng = random.Random(1)

    def play(self, data: bytes) -> set[int]:
        """The numbers of all requests of the kernel."""
        self._server.connect(self._link)
        at = 0
        while at < len(data):
            what, more = data[at], data[at + 1 : at + 9].ljust(8, b"\0")
            at += 9
            if what < 96:
                self._ask(what, *struct.unpack("<IHBx", more))
                if what & 72 == 8 and len(self._asked) % 40:
                    continue  # the next ones come with it
            elif what < 224:
                taken = 0 if what & 1 else more[7]
                self._answer(what, more, data[at : at + taken])
                at += taken
            else:
                self._server.connect(self._link)
            self._step()
        return self._asked

    def _ask(self, what: int, where: int, length: int, fill: int) -> None:
        kernel = self._kernel
        length = min(length * (16 if what & 64 else 1), 1 << 20)
        if len(self._asked) == MOST_ASKED:
            return
        if what % 4 == 0:
            self._asked.add(kernel.fsync(3))
        elif what % 4 == 1:
            self._asked.add(kernel.write(3, where % (SIZE + 9), bytes([fill]) * length))
        else:
            self._asked.add(kernel.read(3, where % (SIZE + 9), length))

    def _answer(self, what: int, more: bytes, tail: bytes) -> None:
        """All that is right, or a reply that is made up, or nothing but bytes."""
        server = self._server
        with contextlib.suppress(OSError):
            server.take()
            if what % 4 == 0:
                server.send(server.serve(self._rng))
            elif what % 4 == 1 and server.asked:
                one = server.asked[more[0] % len(server.asked)]
                head = SIMPLE_REPLY.pack(0x67446698, more[1] % 8 and more[2], one.cookie)
                server.send(head + bytes(min(int.from_bytes(more[3:6], "little"), 2 << 20)))
            else:
                server.send(more + tail)

    def _step(self) -> None:
        self._kernel.run()
        while self._link.run(0) == forebay_fast.core.YIELD:
            self._kernel.collect()
        self._kernel.collect()
