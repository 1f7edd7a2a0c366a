# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The FUSE door's connection to a disk, with the core and without: what it does about a daemon that is no good."""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

import forebay_fast
from forebay.doors.fuse.link import Link
from forebay_nbd.protocol.wire import (
    GREETING,
    INIT_MAGIC,
    OPTION_HEADER,
    OPTION_MAGIC,
    OPTION_REPLY_HEADER,
    OPTION_REPLY_MAGIC,
    REQUEST,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    Flag,
    Opt,
    Rep,
)

pytestmark = pytest.mark.expect_log("reconnecting|the daemon is back")

SIZE = 1 << 20
WAIT = 0.3
"""Seconds for which a request waits for a daemon that is away."""

Serve = Callable[[trio.SocketStream, int], Awaitable[None]]
Read = Callable[[], Awaitable[bytes]]


class Server:
    """A daemon whose transmission phase is `serve(stream, number of the connection)`."""

    def __init__(self, path: str, serve: Serve) -> None:
        self.path, self.serve, self.connections = path, serve, 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listening = trio.socket.socket(socket.AF_UNIX)
        await listening.bind(self.path)
        listening.listen()
        listeners = [trio.SocketListener(listening)]
        await trio.serve_listeners(self._connection, listeners, task_status=task_status)  # type: ignore[arg-type]

    async def _connection(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        number = self.connections
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._handshake(stream)
            await self.serve(stream, number)
        await stream.aclose()

    async def _handshake(self, stream: trio.SocketStream) -> None:
        await stream.send_all(GREETING.pack(INIT_MAGIC, OPTION_MAGIC, 3))
        await receive(stream, 4)
        while True:
            _, option, length = OPTION_HEADER.unpack(await receive(stream, OPTION_HEADER.size))
            await receive(stream, length)
            if option == Opt.GO:
                info = struct.pack(">HQH", 0, SIZE, Flag.HAS_FLAGS | Flag.SEND_FLUSH)
                await self._reply(stream, option, Rep.INFO, info)
                return await self._reply(stream, option, Rep.ACK)
            await self._reply(stream, option, Rep.ERR_UNSUP)

    async def _reply(
        self, stream: trio.SocketStream, option: int, kind: int, data: bytes = b""
    ) -> None:
        head = OPTION_REPLY_HEADER.pack(OPTION_REPLY_MAGIC, option, kind, len(data))
        await stream.send_all(head + data)


async def receive(stream: trio.SocketStream, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = await stream.receive_some(count - len(found))
        if not more:
            raise trio.BrokenResourceError
        found += more
    return found


async def answers(stream: trio.SocketStream, _number: int) -> None:
    """As a disk of ones does."""
    while True:
        _, _, _, cookie, _, length = REQUEST.unpack(await receive(stream, REQUEST.size))
        await stream.send_all(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie) + b"\1" * length)


@contextlib.asynccontextmanager
async def reading(path: str, kind: str, patience: float = 60.0) -> AsyncIterator[Read]:
    """A function that reads 512 bytes through a link of this kind, as the kernel would."""
    async with trio.open_nursery() as nursery:
        async with (_link if kind == "python" else _core_link)(nursery, path, patience) as read:
            yield read
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def _link(nursery: trio.Nursery, path: str, patience: float) -> AsyncIterator[Read]:
    link = Link(nursery, path, "d", wait=WAIT, patience=patience)
    await link.open()

    async def read() -> bytes:
        return bytes(await link.pread(0, 512))

    yield read
    await link.close()


@contextlib.asynccontextmanager
async def _core_link(nursery: trio.Nursery, path: str, patience: float) -> AsyncIterator[Read]:
    if forebay_fast.missing:
        pytest.skip("no core: make setup")
    from forebay.doors.fuse.core_link import CoreLink
    from forebay_fast import core
    from forebay_fast.loop import rest, wait_of_loop
    from sim.fuse_kernel import Kernel

    wait = wait_of_loop()
    assert wait is not None
    kernel = Kernel()
    serving = trio.CancelScope()

    async def serve() -> None:
        with serving:
            await rest(wait, kernel.device)

    requests = core.DiskConnection(kernel.device)
    link = CoreLink(
        nursery, path, "d", wait=WAIT, patience=patience, requests=requests, loop_wait=wait
    )
    await link.open()
    kernel.device.opened(1, core.FuseFile(requests, SIZE, True, lambda: None))
    nursery.start_soon(serve)

    async def read() -> bytes:
        unique = kernel.read(1, 0, 512)
        while unique not in kernel.answers:
            await trio.lowlevel.wait_readable(kernel.asking)
            kernel.collect()
        error, data = kernel.answers[unique]
        if error:
            raise OSError(error, os.strerror(error))
        return data

    yield read
    await link.close()
    serving.cancel()
    await trio.testing.wait_all_tasks_blocked()
    kernel.close()


@pytest.fixture(params=["python", "core"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_who_lets_us_in_and_hangs_up_counts_as_away(kind: str, tmp_path: Path) -> None:
    """And is not asked as fast as it can."""

    async def serve(stream: trio.SocketStream, _number: int) -> None:
        await receive(stream, REQUEST.size)

    server = Server(str(tmp_path / "sock"), serve)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        with trio.fail_after(20):
            async with reading(server.path, kind) as read:
                with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is compared
                    await read()
        assert caught.value.errno == errno.EIO
        assert server.connections < 15
        nursery.cancel_scope.cancel()


async def test_who_comes_back_is_asked_again(kind: str, tmp_path: Path) -> None:
    async def serve(stream: trio.SocketStream, number: int) -> None:
        if number in (1, 2):  # hangs up in the middle of the reply
            *_, cookie, _, _ = REQUEST.unpack(await receive(stream, REQUEST.size))
            await stream.send_all(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie) + b"\2" * 100)
        else:
            await answers(stream, number)

    server = Server(str(tmp_path / "sock"), serve)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        with trio.fail_after(20):
            async with reading(server.path, kind) as read:
                assert await read() == b"\1" * 512
        assert server.connections == 3
        nursery.cancel_scope.cancel()


async def test_who_does_not_answer_is_left(kind: str, tmp_path: Path) -> None:
    async def serve(stream: trio.SocketStream, number: int) -> None:
        if number == 1:
            await trio.sleep_forever()
        await answers(stream, number)

    server = Server(str(tmp_path / "sock"), serve)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        with trio.fail_after(20):
            async with reading(server.path, kind, patience=0.2) as read:
                assert await read() == b"\1" * 512
        assert server.connections == 2
        nursery.cancel_scope.cancel()


async def test_who_breaks_the_protocol_each_time_counts_as_away(kind: str, tmp_path: Path) -> None:
    async def serve(stream: trio.SocketStream, _number: int) -> None:
        await receive(stream, REQUEST.size)
        await stream.send_all(bytes(1 << 16))
        await trio.sleep_forever()

    server = Server(str(tmp_path / "sock"), serve)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        with trio.fail_after(20):
            async with reading(server.path, kind) as read:
                with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is compared
                    await read()
        assert caught.value.errno == errno.EIO
        nursery.cancel_scope.cancel()
