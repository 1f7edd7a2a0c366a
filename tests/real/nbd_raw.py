# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An NBD client that says what it is told to, byte for byte."""

import struct
from collections.abc import Callable
from types import TracebackType
from typing import Self

import trio

from forebay_nbd.protocol.events import Request
from forebay_nbd.protocol.requests import encode_request

HELLO = b"NBDMAGICIHAVEOPT\0\3"


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data) if length is None else length) + data


def go(name: bytes = b"disk", number: int = 7) -> bytes:
    return option(number, struct.pack(">I", len(name)) + name + b"\0\0")


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    flags: int = 0,
    cookie: int = 1,
    payload: bytes = b"",
) -> bytes:
    return b"".join(encode_request(Request(command, flags, cookie, offset, length, payload)))


class Raw:
    """A connection to the server at `path`. Waiting is bounded by `patience` seconds."""

    def __init__(self, path: str, patience: float = 20.0) -> None:
        self.path = path
        self.patience = patience

    async def __aenter__(self) -> Self:
        self.stream = await trio.open_unix_socket(self.path)
        return self

    async def __aexit__(
        self, _1: type[BaseException] | None, _2: BaseException | None, _3: TracebackType | None
    ) -> None:
        await self.stream.aclose()

    async def send(self, data: bytes) -> None:
        with trio.fail_after(self.patience):
            await self.stream.send_all(data)

    async def receive(self, count: int) -> bytes:
        """Exactly `count` bytes; EOFError if the server hangs up before."""
        data = b""
        with trio.fail_after(self.patience):
            while len(data) < count:
                some = await self.stream.receive_some(count - len(data))
                if not some:
                    raise EOFError(data)
                data += some
        return data

    async def hangs_up(self) -> bytes:
        """What the server still says before it hangs up."""
        data = b""
        with trio.fail_after(self.patience):
            try:
                while some := await self.stream.receive_some(65536):
                    data += some
            except trio.BrokenResourceError:
                pass
        return data

    async def hello(self, flags: int = 3) -> None:
        assert await self.receive(18) == HELLO
        await self.send(struct.pack(">I", flags))

    async def reply(self) -> tuple[int, int, bytes]:
        """(option, reply type, data)."""
        magic, number, kind, length = struct.unpack(">QIII", await self.receive(20))
        assert magic == 0x3E889045565A9
        return number, kind, await self.receive(length)

    async def enter(self, structured: bool = False) -> None:
        """Into transmission on the default export."""
        await self.hello()
        if structured:
            await self.send(option(8))
            assert await self.reply() == (8, 1, b"")
        await self.send(go(b""))
        while (await self.reply())[1] != 1:
            pass

    async def simple(self, size: int = 0) -> tuple[int, int, bytes]:
        """(error, cookie, data) of a simple reply; `size` bytes of data if there is no error."""
        magic, error, cookie = struct.unpack(">IIQ", await self.receive(16))
        assert magic == 0x67446698
        return error, cookie, b"" if error else await self.receive(size)


async def answers(client: Raw, sizes: dict[int, int]) -> dict[int, bytes]:
    """The data of the replies to the requests `sizes` (cookie: length), in whatever order they come."""
    got = {}
    for _ in sizes:
        error, cookie, _ = await client.simple()
        assert error == 0
        got[cookie] = await client.receive(sizes[cookie])
    return got


async def still_serves(path: str) -> None:
    """A well-behaved client gets what it asks for."""
    async with Raw(path) as good:
        await good.enter()
        await good.send(request(0, 0, 512, cookie=77))
        assert (await good.simple(512))[:2] == (0, 77)
        await good.send(request(2))
        assert await good.hangs_up() == b""


async def until(condition: Callable[[], object]) -> None:
    """Returns once `condition()` holds. For what the server does without telling anybody."""
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - nobody tells when
            await trio.sleep(0.001)
