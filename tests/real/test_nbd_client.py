# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Our client against nbdkit, qemu-nbd and our own server, and against servers that lie."""

import contextlib
import errno
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio

from forebay_nbd import Client, Limits
from forebay_nbd.protocol.events import DataChunk, ErrorChunk, HoleChunk, NoneChunk
from forebay_nbd.protocol.requests import encode_reply
from real.nbd_memory import MemoryExport, serving
from real.nbd_raw import until
from real.processes import NbdServer

MIB = 1 << 20
SIZE = 8 * MIB
Start = Callable[..., NbdServer]


@pytest.fixture
async def nursery() -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as opened:
        yield opened
        opened.cancel_scope.cancel()


@pytest.fixture(params=["nbdkit", "qemu-nbd", "forebay", "forebay-misses"])
async def address(
    request: pytest.FixtureRequest, short_path: Path, start_nbdkit: Start, start_qemu_nbd: Start
) -> AsyncIterator[str]:
    """A server of 8 MiB of zeros, the first 64 KiB of which are 0x55."""
    image = short_path / "image"
    with image.open("wb") as file:
        file.write(b"\x55" * 65536)
        file.truncate(SIZE)
    if request.param == "nbdkit":
        yield str(start_nbdkit("file", image).sock)
    elif request.param == "qemu-nbd":
        yield str(start_qemu_nbd(image, "--discard=unmap").sock)
    else:
        export = MemoryExport(slow=request.param == "forebay-misses")
        export.gate.set()
        export.memory[:65536] = b"\x55" * 65536
        async with serving(short_path, export) as running:
            yield running.path


async def test_everything_a_server_can(
    address: str, nursery: trio.Nursery, rng: random.Random
) -> None:
    client = await Client.connect(nursery, address)
    assert client.size == SIZE
    assert not client.read_only
    assert await client.pread(0, 65537) == b"\x55" * 65536 + b"\0"
    data = rng.randbytes(3 * MIB)
    await client.pwrite(1000, data)
    assert await client.pread(1000, len(data)) == data
    await client.pwrite(1000, b"durable", fua=True)
    assert await client.pread(1000, 7) == b"durable"
    await client.zero(4096, 65536)
    await client.zero(131072, 65536, no_hole=True)
    assert await client.pread(4096, 65536) == bytes(65536)
    await client.trim(262144, 65536)
    await client.flush()
    extents = await client.block_status(4 * MIB, MIB)
    assert sum(length for length, _ in extents) <= MIB
    assert extents[0][1] & 2, "the end of the image reads as zeros"
    (one,) = await client.block_status(0, 4096, one=True)
    assert one[0] <= 4096
    await client.aclose()


async def test_many_requests_at_once(
    address: str, nursery: trio.Nursery, rng: random.Random
) -> None:
    client = await Client.connect(nursery, address)
    blocks = {i: rng.randbytes(rng.choice([512, 4096, 65536])) for i in range(64)}

    async def there(i: int) -> None:
        await client.pwrite(i * 65536, blocks[i])

    async def back(i: int) -> None:
        assert await client.pread(i * 65536, len(blocks[i])) == blocks[i]

    for work in (there, back):
        async with trio.open_nursery() as several:
            for i in blocks:
                several.start_soon(work, i)
    await client.aclose()


async def test_long_requests_are_split(
    short_path: Path, start_nbdkit: Start, nursery: trio.Nursery, rng: random.Random
) -> None:
    """By the server's own maximum, as the blocksize-policy filter sets it."""
    kit = start_nbdkit(
        *("memory", "64M", "blocksize-minimum=512", "blocksize-preferred=4096"),
        *("blocksize-maximum=64K", "blocksize-error-policy=error"),
        filters=["blocksize-policy"],
    )
    client = await Client.connect(nursery, str(kit.sock))
    assert (client.negotiated.minimum_block, client.negotiated.maximum_payload) == (512, 65536)
    data = rng.randbytes(MIB)
    await client.pwrite(512, data)
    assert await client.pread(512, MIB) == data
    assert await client.pread(515, 1000) == data[3:1003], "reads are widened to whole blocks"
    memory = bytearray(MIB + 2)
    await client.pread_into(512, memoryview(memory)[1:-1])
    assert memory == b"\0" + data + b"\0"
    with pytest.raises(OSError, match="aligned"):
        await client.pread_into(512, memoryview(memory)[:1000])
    with pytest.raises(OSError, match="aligned"):
        await client.pwrite(515, b"x")
    await client.aclose()


async def test_reads_above_32_mib(short_path: Path, nursery: trio.Nursery) -> None:
    export = MemoryExport(size=80 * MIB)
    export.memory[40 * MIB : 40 * MIB + 5] = b"there"
    async with serving(short_path, export) as running:
        client = await Client.connect(nursery, running.path, "disk")
        data = await client.pread(1, 80 * MIB - 1)
        assert len(data) == 80 * MIB - 1
        assert data[40 * MIB - 1 : 40 * MIB + 4] == b"there"
        await client.pwrite(0, bytes(80 * MIB))
        assert not any(export.memory[40 * MIB : 40 * MIB + 5])
        await client.aclose()


@pytest.mark.parametrize(
    ("option", "structured"),
    [("--mask-handshake=0", False), ("--mask-handshake=1", True), ("--no-sr", False)],
    ids=["EXPORT_NAME only", "with padding", "simple replies"],
)
async def test_older_servers(
    short_path: Path, start_nbdkit: Start, nursery: trio.Nursery, option: str, structured: bool
) -> None:
    kit = start_nbdkit("memory", "1M", options=[option])
    client = await Client.connect(nursery, str(kit.sock))
    assert client.size == MIB
    assert client.negotiated.structured == structured
    assert bool(client.negotiated.contexts) == structured
    await client.pwrite(5, b"hello")
    assert await client.pread(0, 12) == b"\0" * 5 + b"hello" + b"\0\0"
    await client.aclose()


async def test_errors_come_back_as_they_are(
    short_path: Path, start_nbdkit: Start, nursery: trio.Nursery
) -> None:
    kit = start_nbdkit(
        "memory", "1M", "error-pread=ENOSPC", "error-pread-rate=1", filters=["error"]
    )
    client = await Client.connect(nursery, str(kit.sock))
    for _ in range(2):
        with pytest.raises(OSError, match=str(kit.sock)) as caught:
            await client.pread(0, 512)
        assert caught.value.errno == errno.ENOSPC
    await client.pwrite(0, b"goes on")
    await client.aclose()


async def test_a_read_only_export(
    short_path: Path, start_nbdkit: Start, nursery: trio.Nursery
) -> None:
    kit = start_nbdkit("memory", "1M", options=["--readonly"])
    client = await Client.connect(nursery, str(kit.sock))
    assert client.read_only
    for wrong in (client.pwrite(0, b"x"), client.zero(0, 1), client.trim(0, 1)):
        with pytest.raises(OSError, match=str(kit.sock)) as caught:
            await wrong
        assert caught.value.errno in (errno.EPERM, errno.ENOTSUP)
    await client.aclose()


async def test_what_was_not_agreed_on(
    short_path: Path, start_nbdkit: Start, nursery: trio.Nursery
) -> None:
    kit = start_nbdkit("memory", "1M", options=["--no-sr"])
    client = await Client.connect(nursery, str(kit.sock))
    with pytest.raises(OSError, match="no metadata context") as caught:
        await client.block_status(0, 512)
    assert caught.value.errno == errno.ENOTSUP
    await client.aclose()


async def test_tcp(short_path: Path, nursery: trio.Nursery) -> None:
    """Through a relay, so that no port has to be guessed."""
    async with serving(short_path) as running:
        (listening,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def relay(tcp: trio.SocketStream) -> None:
            unix = await trio.open_unix_socket(running.path)

            async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
                async for data in source:
                    await sink.send_all(data)
                await sink.send_eof()

            async with tcp, unix, trio.open_nursery() as both:
                both.start_soon(pump, tcp, unix)
                both.start_soon(pump, unix, tcp)

        async with trio.open_nursery() as relays:
            relays.start_soon(trio.serve_listeners, relay, [listening])
            port = listening.socket.getsockname()[1]
            client = await Client.connect(nursery, ("127.0.0.1", port), "disk")
            await client.pwrite(7, b"over tcp")
            assert await client.pread(7, 8) == b"over tcp"
            await client.aclose()
            relays.cancel_scope.cancel()


# --- servers that are not there, or not what they should be ---------------------------------------------
async def test_nobody_there(short_path: Path, nursery: trio.Nursery) -> None:
    with pytest.raises(FileNotFoundError, match="nobody.sock"):
        await Client.connect(nursery, str(short_path / "nobody.sock"))
    deaf = socket.socket(socket.AF_UNIX)
    deaf.bind(str(short_path / "deaf.sock"))
    with pytest.raises(ConnectionRefusedError, match="deaf.sock"):
        await Client.connect(nursery, str(short_path / "deaf.sock"))
    deaf.listen()
    with pytest.raises(TimeoutError, match="no answer"):
        await Client.connect(nursery, str(short_path / "deaf.sock"), timeout=0.05)
    deaf.close()


async def test_an_unknown_export(short_path: Path, nursery: trio.Nursery) -> None:
    async with serving(short_path) as running:
        with pytest.raises(FileNotFoundError, match="no export 'nothing'"):
            await Client.connect(nursery, running.path, "nothing")


async def test_a_server_that_wants_tls(
    short_path: Path, start_nbdkit: Start, nursery: trio.Nursery
) -> None:
    keys = short_path / "keys.psk"
    keys.write_text("client:" + "ab" * 32 + "\n")
    kit = start_nbdkit("memory", "1M", options=["--tls=require", f"--tls-psk={keys}"])
    with pytest.raises(ConnectionError, match="TLS"):
        await Client.connect(nursery, str(kit.sock))


Script = Callable[[trio.SocketStream], Awaitable[None]]


async def lying(path: Path, nursery: trio.Nursery, script: Script) -> str:
    """A server that does what `script` says; returns its address."""
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(str(path / "liar.sock"))
    sock.listen()

    async def serve() -> None:
        with sock:
            stream, _ = await sock.accept()
            async with trio.SocketStream(stream) as client:
                with contextlib.suppress(trio.BrokenResourceError):
                    await script(client)
                    await trio.sleep_forever()

    nursery.start_soon(serve)
    return str(path / "liar.sock")


def says(data: bytes) -> Script:
    async def script(stream: trio.SocketStream) -> None:
        await stream.send_all(data)

    return script


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not an NBD server"),
        (b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53", "oldstyle"),
        (b"NBDMAGIC" + bytes(8), "not an NBD server"),
        (b"NBDMAGICIHAVEOPT\0\3" + bytes(20), "magic"),
        (b"NBDMAGICIHAVEOPT\0\2" + struct.pack(">QH", 1 << 63, 1), "export of"),
        (b"NBDMAGICIHAVEOPT\0\2" + struct.pack(">QH", 512, 0), "flags"),
    ],
)
async def test_servers_that_are_none(
    short_path: Path, nursery: trio.Nursery, data: bytes, message: str
) -> None:
    where = await lying(short_path, nursery, says(data))
    with pytest.raises(ConnectionError, match=message):
        await Client.connect(nursery, where)


HELLO = b"NBDMAGICIHAVEOPT\0\3"


def option_reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, number, kind, len(data)) + data


async def enter(stream: trio.SocketStream) -> None:
    """A client's way into transmission on 1 MiB, structured replies agreed on."""
    await stream.send_all(HELLO + option_reply(8, 1) + option_reply(10, 0x80000001))
    await stream.send_all(
        option_reply(7, 3, struct.pack(">HQH", 0, MIB, 0x0D)) + option_reply(7, 1)
    )


async def requests(stream: trio.SocketStream, count: int) -> list[bytes]:
    """The cookies of the next `count` READs."""
    data = b""
    while True:
        at = data.find(struct.pack(">IHH", 0x25609513, 0, 0))
        if at >= 0 and len(data) - at >= 28 * count:
            return [data[at + 28 * i + 8 : at + 28 * i + 16] for i in range(count)]
        data += await stream.receive_some(4096)


def liar(answer: Callable[[int], bytes]) -> Script:
    """Answers the first READ with answer(cookie)."""

    async def script(stream: trio.SocketStream) -> None:
        await enter(stream)
        (cookie,) = await requests(stream, 1)
        await stream.send_all(answer(int.from_bytes(cookie)))

    return script


def chunks(*replies: object) -> bytes:
    return b"".join(b"".join(encode_reply(reply)) for reply in replies)  # type: ignore[arg-type]


async def test_chunks_out_of_order_and_holes(short_path: Path, nursery: trio.Nursery) -> None:
    where = await lying(
        short_path,
        nursery,
        liar(
            lambda cookie: chunks(
                DataChunk(cookie, 6, b"67", False),
                HoleChunk(cookie, 2, 4, False),
                DataChunk(cookie, 0, b"01", False),
                NoneChunk(cookie),
            )
        ),
    )
    client = await Client.connect(nursery, where)
    assert await client.pread(0, 8) == b"01\0\0\0\x0067"


async def test_an_error_between_chunks(short_path: Path, nursery: trio.Nursery) -> None:
    where = await lying(
        short_path,
        nursery,
        liar(
            lambda cookie: chunks(
                DataChunk(cookie, 0, b"01", False),
                ErrorChunk(cookie, errno.EIO, "medium error", 2, False),
                NoneChunk(cookie),
            )
        ),
    )
    client = await Client.connect(nursery, where)
    with pytest.raises(OSError, match="medium error") as caught:
        await client.pread(0, 8)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(
    "answer",
    [
        lambda cookie: chunks(DataChunk(cookie, 0, b"12345678" * 2)),
        lambda cookie: chunks(DataChunk(cookie + 1, 0, b"12345678")),
        lambda cookie: chunks(DataChunk(cookie, 0, b"1234")),
        lambda cookie: b"\0" * 28,
    ],
    ids=["too long", "other request", "too short", "garbage"],
)
async def test_a_server_that_cannot_be_believed(
    short_path: Path, nursery: trio.Nursery, answer: Callable[[int], bytes]
) -> None:
    client = await Client.connect(nursery, await lying(short_path, nursery, liar(answer)))
    with pytest.raises(ConnectionError, match="broke the protocol"):
        await client.pread(0, 8)
    with pytest.raises(ConnectionError, match="broke the protocol"):
        await client.pwrite(0, b"x")


HUGE = option_reply(7, 3, struct.pack(">HQH", 0, 2**64 - 1, 1))


@pytest.mark.parametrize(
    "said",
    [
        option_reply(8, 2, b"\0\0\0\4disk") * 10_000,
        option_reply(8, 3, b"\0\2text") * 10_000,
        option_reply(8, 1) + option_reply(10, 4, b"\0\0\0\1base:allocation") * 10_000,
        struct.pack(">QIII", 0x3E889045565A9, 8, 2, 0xFFFFFFFF),
        option_reply(8, 2, b"\xff\xff\xff\xff"),
        option_reply(8, 1) + option_reply(8, 1),
        option_reply(8, 1) + option_reply(10, 1) + HUGE + option_reply(7, 1),
        option_reply(8, 1) + option_reply(10, 1) + option_reply(7, 1),
        option_reply(8, 1) + option_reply(10, 1) + option_reply(7, 3, b"\0"),
    ],
    ids=[
        "exports without end (CVE-2017-2630)", "information without end", "contexts without end", "4 GiB",
        "name of 4 GiB", "an answer too much (CVE-2021-20286)", "a size of 2^64-1 (CVE-2023-5215)", "no size",
        "half of it",
    ],
)  # fmt: skip
async def test_a_server_that_means_no_good_in_the_handshake(
    short_path: Path, nursery: trio.Nursery, said: bytes
) -> None:
    """It is given up at once, and others had their turns meanwhile."""
    where = await lying(short_path, nursery, says(HELLO + said))
    with trio.fail_after(20), pytest.raises(ConnectionError):
        await Client.connect(nursery, where, timeout=60)


HOSTILE_CHUNKS: dict[str, Callable[[int], bytes]] = {
    "twice the same (unnumbered, 2019-10)": lambda c: chunks(DataChunk(c, 0, b"1234", False)) * 2,
    "before the request": lambda c: chunks(HoleChunk(c, 2**64 - 8, 8)),
    "a hole of 4 GiB": lambda c: chunks(HoleChunk(c, 0, 0xFFFFFFFF)),
    "an empty hole": lambda c: chunks(HoleChunk(c, 0, 0)),
    "data of 4 GiB": lambda c: struct.pack(">IHHQI", 0x668E33EF, 1, 1, c, 0xFFFFFFFF),
    "an error of 4 GiB": lambda c: struct.pack(">IHHQI", 0x668E33EF, 1, 0x8001, c, 0xFFFFFFFF),
    "an error longer than it is": lambda c: struct.pack(">IHHQIIH", 0x668E33EF, 1, 0x8001, c, 6, 5, 9),
    "64-bit status (CVE-2023-5871)": lambda c: struct.pack(">IHHQI", 0x668E33EF, 1, 6, c, 24) + bytes(24),
    "status for a read": lambda c: struct.pack(">IHHQI", 0x668E33EF, 1, 5, c, 12) + bytes(12),
    "a simple reply": lambda c: struct.pack(">IIQ", 0x67446698, 0, c) + bytes(8),
}  # fmt: skip


@pytest.mark.parametrize("answer", HOSTILE_CHUNKS.values(), ids=HOSTILE_CHUNKS.keys())
async def test_a_server_that_means_no_good_in_a_reply(
    short_path: Path, nursery: trio.Nursery, answer: Callable[[int], bytes]
) -> None:
    client = await Client.connect(nursery, await lying(short_path, nursery, liar(answer)))
    with trio.fail_after(20), pytest.raises(ConnectionError, match="broke the protocol"):
        await client.pread(0, 8)


async def test_all_in_flight_fail_when_the_server_dies(
    short_path: Path, start_nbdkit: Start, nursery: trio.Nursery
) -> None:
    kit = start_nbdkit("memory", "1M", "rdelay=100", filters=["delay"])
    client = await Client.connect(nursery, str(kit.sock))
    failed = 0

    async def read() -> None:
        nonlocal failed
        with pytest.raises(ConnectionError):
            await client.pread(0, 512)
        failed += 1

    async with trio.open_nursery() as several:
        for _ in range(10):
            several.start_soon(read)
        await trio.testing.wait_all_tasks_blocked(0.05)
        kit.kill()
    assert failed == 10


async def test_a_cancelled_request_leaves_the_connection_whole(
    short_path: Path, nursery: trio.Nursery
) -> None:
    export = MemoryExport(slow=True)
    async with serving(short_path, export) as running:
        client = await Client.connect(nursery, running.path)
        with trio.move_on_after(0.02):
            await client.pread(0, 4096)
        export.gate.set()
        assert await client.pread(5, 9) == bytes(9)
        await client.aclose()


async def test_cancelled_in_the_middle_of_sending_it_is_dead(
    short_path: Path, nursery: trio.Nursery
) -> None:
    export = MemoryExport(slow=True, size=80 * MIB)
    async with serving(short_path, export, Limits(inflight_bytes=MIB)) as running:
        client = await Client.connect(nursery, running.path)
        with trio.move_on_after(0.05):
            await client.pwrite(0, bytes(80 * MIB))
        with pytest.raises(ConnectionError, match="given up"):
            await client.pread(0, 1)


async def test_closing_fails_what_is_in_flight(short_path: Path, nursery: trio.Nursery) -> None:
    export = MemoryExport(slow=True)
    async with serving(short_path, export) as running:
        client = await Client.connect(nursery, running.path)

        async def read() -> None:
            with pytest.raises(ConnectionError, match="closed"):
                await client.pread(0, 4096)

        async with trio.open_nursery() as several:
            several.start_soon(read)
            await until(lambda: export.waiting == 1)
            await client.aclose()
        with pytest.raises(ConnectionError, match="closed"):
            await client.flush()
        await client.aclose()
