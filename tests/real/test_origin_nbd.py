# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""NBD origins, on nbdkit and qemu-nbd."""

# ruff: noqa: ASYNC240  (nothing else runs on the loop while a test looks at its file)

import contextlib
import errno
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from forebay.errors import ForebayError
from forebay.origin.addresses import parse_nbd
from forebay.origin.nbd import NbdOrigin
from forebay.origin.protocol import HOLE, ZERO
from real import processes
from real.processes import NbdServer

MIB = 1 << 20
SIZE = 8 * MIB
PATIENT, SHORT = 30.0, 0.3

Start = Callable[..., NbdServer]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vm.img"


@pytest.fixture
def content(path: Path, random_image: Callable[..., bytes]) -> bytearray:
    return bytearray(random_image(path, SIZE, holes=[(2 * MIB, MIB)]))


@asynccontextmanager
async def origin_on(
    server: NbdServer, *, read_only: bool = False, timeout: float = PATIENT
) -> AsyncIterator[NbdOrigin]:
    image = parse_nbd(server.uri)
    async with trio.open_nursery() as nursery:
        origin = await NbdOrigin.open(
            nursery, image, "nbd image", read_only=read_only, timeout=timeout
        )
        try:
            yield origin
        finally:
            await origin.close()
            nursery.cancel_scope.cancel()


def pause(server: NbdServer) -> None:
    """Return when all of its threads have stopped: kill(2) does not wait for that."""
    server.pause()
    os.waitid(os.P_PID, server.process.pid, os.WSTOPPED)


def patience(origin: NbdOrigin, seconds: float) -> None:
    origin.timeout = seconds


def kit(start_nbdkit: Start, path: Path) -> NbdServer:
    return start_nbdkit("file", path)


def kit_4096(start_nbdkit: Start, path: Path) -> NbdServer:
    """A server that takes whole 4 KiB blocks only."""
    arguments = ("blocksize-minimum=4096", "blocksize-error-policy=error")
    return start_nbdkit("file", path, *arguments, filters=["blocksize-policy"])


def kit_plain(start_nbdkit: Start, path: Path) -> NbdServer:
    """A server that can neither zero nor tell holes."""
    return start_nbdkit("file", path, "zeromode=none", filters=["nozero", "noextents"])


SERVERS = {"nbdkit": kit, "nbdkit 4096": kit_4096, "nbdkit plain": kit_plain, "qemu-nbd": None}


@pytest.mark.parametrize("kind", SERVERS)
async def test_the_same_as_a_bytearray(
    kind: str,
    path: Path,
    content: bytearray,
    rng: random.Random,
    start_nbdkit: Start,
    start_qemu_nbd: Start,
) -> None:
    make = SERVERS[kind]
    server = make(start_nbdkit, path) if make else start_qemu_nbd(path)
    async with origin_on(server) as origin:
        assert origin.size == SIZE
        for _ in range(40):
            offset = rng.randrange(SIZE)
            length = min(SIZE - offset, rng.choice([1, 511, 4096, 65536, MIB, 4 * MIB + 3]))
            what = rng.choice(["write", "zero", "trim"])
            if what == "write":
                data = rng.randbytes(length)
                cut = rng.randrange(length + 1)
                await origin.write(offset, [data[:cut], memoryview(bytearray(data[cut:]))])
                content[offset : offset + length] = data
            else:
                if what == "trim":
                    await origin.trim(offset, length)
                else:
                    await origin.zero(offset, length, may_trim=False)
                content[offset : offset + length] = bytes(length)
            low, high = max(0, offset - 5000), min(SIZE, offset + length + 5000)
            assert await origin.read(low, high - low) == content[low:high]
            found = await origin.extents(low, high - low)
            assert sum(size for size, _ in found) == high - low
            for size, flags in found:
                assert not flags & ZERO or content[low : low + size] == bytes(size)
                low += size
        assert await origin.read(SIZE - 10, 4096) == content[-10:] + bytes(4086)
        await origin.flush()
    assert path.read_bytes() == content


async def test_writes_of_parts_of_one_block_do_not_undo_each_other(
    path: Path, content: bytearray, start_nbdkit: Start
) -> None:
    server = kit_4096(start_nbdkit, path)
    async with origin_on(server) as origin, trio.open_nursery() as nursery:
        for index in range(64):
            nursery.start_soon(origin.write, 4096 + index * 64, [bytes([index]) * 64])
    assert path.read_bytes()[4096:8192] == b"".join(bytes([index]) * 64 for index in range(64))


async def test_holes_are_told(path: Path, content: bytearray, start_nbdkit: Start) -> None:
    async with origin_on(start_nbdkit("file", path)) as origin:
        found = await origin.extents(0, SIZE)
        assert found == [(2 * MIB, 0), (MIB, HOLE | ZERO), (5 * MIB, 0)]
        assert await origin.extents(2 * MIB + 7, 10) == [(10, HOLE | ZERO)]
        assert (await origin.identity()).size == SIZE


HOLES_THAT_ARE_NO_ZEROS = """
import nbdkit

API_VERSION = 2
disk = bytearray(b"x" * (4 << 20))


def open(readonly):
    return 1


def get_size(h):
    return len(disk)


def pread(h, buf, offset, flags):
    buf[:] = disk[offset : offset + len(buf)]


def pwrite(h, buf, offset, flags):
    disk[offset : offset + len(buf)] = buf


def can_extents(h):
    return True


def extents(h, count, offset, flags):
    return [(offset, count, nbdkit.EXTENT_HOLE)]
"""


async def test_a_hole_that_is_not_said_to_read_as_zeros_is_zeroed(
    tmp_path: Path, start_nbdkit: Start
) -> None:
    """The protocol leaves open what such a hole holds."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(HOLES_THAT_ARE_NO_ZEROS)
    async with origin_on(start_nbdkit("python", plugin)) as origin:
        assert await origin.extents(0, MIB) == [(MIB, HOLE)]
        await origin.zero(512, MIB, may_trim=True)
        model = b"x" * 512 + bytes(MIB) + b"x" * 512
        assert await origin.read(0, MIB + 1024) == model


async def test_an_export_by_its_name(path: Path, content: bytearray, start_qemu_nbd: Start) -> None:
    server = start_qemu_nbd(path, export="a disk/1")
    server.uri = server.uri.replace("a disk/1", "a%20disk/1")
    async with origin_on(server) as origin:
        assert await origin.read(0, 100) == content[:100]


# --------------------------------------------------------------------------------------- what is refused


async def test_a_server_that_is_not_there_is_told_at_once(short_path: Path) -> None:
    image = parse_nbd(f"nbd+unix:///?socket={short_path}/none.sock")
    async with trio.open_nursery() as nursery:
        with trio.fail_after(5), pytest.raises(OSError, match="none.sock"):
            await NbdOrigin.open(nursery, image, "x", read_only=False, timeout=PATIENT)


async def test_a_read_only_server_is_not_written(
    path: Path, content: bytearray, start_qemu_nbd: Start
) -> None:
    server = start_qemu_nbd(path, "--read-only")
    with pytest.raises(BaseExceptionGroup) as refused:
        async with origin_on(server):
            pass
    assert refused.group_contains(ForebayError, match="allows reading only")
    async with origin_on(server, read_only=True) as origin:
        assert await origin.read(0, 10) == content[:10]
        with pytest.raises(OSError, match="for reading only"):
            await origin.write(0, [b"x"])


async def test_an_error_of_the_server_is_passed_on(
    path: Path, content: bytearray, start_nbdkit: Start
) -> None:
    server = start_nbdkit("file", path, "error=ENOSPC", "error-pwrite-rate=1", filters=["error"])
    async with origin_on(server) as origin:
        with pytest.raises(OSError, match="nbd|No space") as failed:
            await origin.write(0, [b"x"])
        assert failed.value.errno == errno.ENOSPC
        assert await origin.read(0, 10) == content[:10]
        assert origin.sync_failures == 0


# ------------------------------------------------------------------------------------ latency and hanging


async def test_many_requests_wait_together(
    path: Path, content: bytearray, start_nbdkit: Start
) -> None:
    server = start_nbdkit("file", path, "rdelay=300ms", filters=["delay"])
    async with origin_on(server) as origin:
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for index in range(8):
                nursery.start_soon(origin.read, index * MIB, 65536)
        assert trio.current_time() - start < 0.6, "eight misses take the time of one"


async def test_a_hung_server_is_an_error_in_time_and_stops_nothing_else(
    path: Path, content: bytearray, start_nbdkit: Start
) -> None:
    hung, well = start_nbdkit("file", path), start_nbdkit("file", path)
    async with origin_on(hung, timeout=SHORT) as dead, origin_on(well) as alive:
        pause(hung)
        async with trio.open_nursery() as nursery:

            async def miss() -> None:
                with pytest.raises(TimeoutError, match="reading nbd image"):
                    await dead.read(0, 4096)

            for _ in range(100):  # more than may be in flight
                nursery.start_soon(miss)
            assert await alive.read(0, 4096) == content[:4096]
        hung.resume()
        patience(dead, PATIENT)
        assert await dead.read(0, 4096) == content[:4096]


async def test_a_late_write_never_lands_on_a_newer_one(
    path: Path, content: bytearray, start_nbdkit: Start
) -> None:
    server = start_nbdkit("file", path)
    slot = bytearray(b"old" * 1000)
    async with origin_on(server, timeout=SHORT) as origin:
        pause(server)
        with pytest.raises(TimeoutError):
            await origin.write(0, [memoryview(slot)])
        slot[:] = b"xxx" * 1000
        for call in (lambda: origin.read(2999, 1), origin.quiesce):
            with pytest.raises(TimeoutError):
                await call()
        patience(origin, PATIENT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(origin.write, 1500, [b"new" * 500])
            await trio.testing.wait_all_tasks_blocked()
            server.resume()
        await origin.quiesce()
    assert path.read_bytes()[:3000] == b"old" * 500 + b"new" * 500


# ----------------------------------------------------------------------------------- broken connections


@pytest.fixture
def server(short_path: Path) -> Any:
    """`server(*arguments)` starts nbdkit on one socket, again and again; the last one is ended."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: Any, **options: Any) -> NbdServer:
            made = processes.nbdkit(short_path / "one.sock", *arguments, **options)
            stack.callback(made.stop)
            return made

        yield start


@pytest.mark.expect_log("the connection broke")
async def test_a_restarted_server_is_found_again(
    path: Path, content: bytearray, server: Start
) -> None:
    first = server("file", path)
    found: list[bytes] = []
    async with origin_on(first) as origin:

        async def read(offset: int) -> None:
            found.append(bytes(await origin.read(offset, 4096)))

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                pause(first)
                for index in range(4):
                    nursery.start_soon(read, index * 4096)
                await trio.testing.wait_all_tasks_blocked()
                first.kill()
                await trio.sleep(0.2)  # a few attempts go wrong
                server("file", path)
                nursery.start_soon(origin.write, MIB, [b"again"])
    assert sorted(found) == sorted(bytes(content[i * 4096 :][:4096]) for i in range(4))
    assert path.read_bytes()[MIB : MIB + 5] == b"again"


@pytest.mark.expect_log("the connection broke")
async def test_the_first_flush_after_a_break_says_what_is_unknown(
    path: Path, content: bytearray, server: Start
) -> None:
    first = server("file", path)
    async with origin_on(first) as origin:
        await origin.write(0, [b"flushed"])
        await origin.flush()
        first.kill()
        server("file", path)
        await origin.read(0, 1)
        await origin.flush()
        assert origin.sync_failures == 0, "everything had been flushed"


@pytest.mark.expect_log("the connection broke")
async def test_unflushed_writes_are_unknown_after_a_break(
    path: Path, content: bytearray, server: Start
) -> None:
    first = server("file", path)
    async with origin_on(first) as origin:
        await origin.write(0, [b"unflushed"])
        first.kill()
        server("file", path)
        with pytest.raises(OSError, match="broke before a flush") as unknown:
            await origin.flush()  # on the new connection, where it succeeds
        assert unknown.value.errno == errno.EIO
        assert origin.sync_failures == 1
        await origin.write(0, [b"unflushed"])
        await origin.flush()
        assert origin.sync_failures == 1


@pytest.mark.expect_log("the connection broke")
async def test_a_server_that_stays_away_is_an_error_in_time(
    path: Path, content: bytearray, server: Start
) -> None:
    first = server("file", path)
    async with origin_on(first, timeout=SHORT) as origin:
        first.kill()
        with pytest.raises(TimeoutError):
            await origin.read(0, 1)
        server("file", path)
        patience(origin, PATIENT)
        assert await origin.read(0, 1) == content[:1]


@pytest.mark.expect_log("the connection broke")
async def test_another_image_behind_the_same_name_is_refused(
    path: Path, content: bytearray, server: Start, tmp_path: Path
) -> None:
    first = server("file", path)
    async with origin_on(first) as origin:
        first.kill()
        (tmp_path / "other").write_bytes(bytes(MIB))
        server("file", tmp_path / "other")
        with pytest.raises(OSError, match="1048576 bytes .* had 8388608") as stale:
            await origin.read(0, 1)
        assert stale.value.errno == errno.ESTALE


async def test_a_caller_who_gives_up_does_not_break_the_connection(
    path: Path, content: bytearray, start_nbdkit: Start
) -> None:
    server = start_nbdkit("file", path)
    async with origin_on(server) as origin:
        pause(server)
        for _ in range(3):  # 12 MiB fill the socket, so that the next is cut off half-sent
            with trio.move_on_after(0.05):
                await origin.write(0, [bytes(4 * MIB)])
        server.process.send_signal(signal.SIGCONT)
        assert await origin.read(5 * MIB, 10) == content[5 * MIB : 5 * MIB + 10]
        await origin.quiesce()


async def test_a_server_that_allows_it_gets_more_connections(
    path: Path, content: bytearray, start_nbdkit: Start
) -> None:
    server = start_nbdkit("file", path, "rdelay=100ms", filters=["delay"])
    async with origin_on(server) as origin:
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                for index in range(64):
                    nursery.start_soon(origin.read, index * 65536, 65536)
        assert 2 <= len(origin._requests._links) <= 4


async def test_a_server_for_one_client_gets_one_connection(
    path: Path, content: bytearray, start_qemu_nbd: Start
) -> None:
    server = start_qemu_nbd(path, "--shared=1")
    async with origin_on(server) as origin:
        async with trio.open_nursery() as nursery:
            for index in range(64):
                nursery.start_soon(origin.read, index * 65536, 65536)
        assert len(origin._requests._links) == 1
