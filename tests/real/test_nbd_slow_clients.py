"""Clients that take their replies slowly, and replies that cannot be sent: neither holds up anybody else for long."""

import mmap
import os
from pathlib import Path

import pytest
import trio

from forebay_nbd import Limits
from real.nbd_memory import MemoryExport, serving
from real.nbd_raw import Raw, request, still_serves, until

MIB = 1 << 20


class Unreadable(MemoryExport):
    """A disk whose second half cannot be read any more: the kernel says EFAULT when it sends a slice of it.

    A process that touches such a slice itself is ended by SIGBUS.
    """

    told = 0

    def lose_half(self, directory: Path) -> None:
        with (directory / "medium").open("w+b") as file:
            file.truncate(self.size)
            self.memory = memoryview(mmap.mmap(file.fileno(), self.size, prot=mmap.PROT_READ))
            os.ftruncate(file.fileno(), self.size // 2)

    def unreadable(self) -> None:
        self.told += 1


# --- slow readers -------------------------------------------------------------------------------------
async def test_a_client_that_reads_slowly_pins_no_longer_than_one_that_does_not(
    short_path: Path,
) -> None:
    """It always takes something before it counts as stalled, and never all: the pin has an age all the same."""
    export = MemoryExport()
    export.memory[: 4 * MIB] = b"A" * (4 * MIB)
    limits = Limits(stall_seconds=0.3, send_buffer=64 << 10)
    async with serving(short_path, export, limits) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(request(0, 0, 4 * MIB, cookie=1))
        await until(lambda: export.pins == 1)
        begun, got = trio.current_time(), b""
        while export.pins:
            assert trio.current_time() - begun < 1.5, "pinned for longer than stall_seconds"
            got += await client.receive(40_000)
            await trio.sleep(0.02)
        assert len(got) > 200_000, "it did take something meanwhile"
        export.memory[: 4 * MIB] = b"B" * (4 * MIB)
        got += await client.receive(16 + 4 * MIB - len(got))
        assert got[16:] == b"A" * (4 * MIB)
        await client.send(request(0, 0, 8, cookie=2))
        assert await client.simple(8) == (0, 2, b"B" * 8)
        assert running.server._budget.used == 0


async def test_answers_that_join_a_slow_queue_are_not_pinned_anew(short_path: Path) -> None:
    export = MemoryExport(slow=True)
    limits = Limits(stall_seconds=0.2, send_buffer=64 << 10)
    async with serving(short_path, export, limits) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(request(0, 0, MIB, cookie=1) + request(0, MIB, MIB, cookie=1))
        await until(lambda: export.waiting == 2)
        export.slow = False
        await client.send(request(0, 0, MIB, cookie=2))
        await until(lambda: export.pins == 1)
        await until(lambda: export.pins == 0)
        export.gate.set()
        left = 3 * (16 + MIB)
        while left:
            left -= len(await client.receive(min(left, 100_000)))
            assert export.pins == 0
            await trio.sleep(0.005)


# --- replies that cannot be read ------------------------------------------------------------------------
@pytest.mark.parametrize("slow", [False, True], ids=["a hit", "a request that waited"])
@pytest.mark.parametrize("start", [0, MIB], ids=["from its first byte", "after some that was sent"])
async def test_a_reply_that_cannot_be_read_ends_the_connection(
    short_path: Path, slow: bool, start: int
) -> None:
    """The client is not left waiting, even if another request of it hangs."""
    export = Unreadable(slow=slow)
    export.lose_half(short_path)
    async with serving(short_path, export) as running, Raw(running.path, 5) as client:
        await client.enter()
        await client.send(request(0, export.size // 2 - start, 2 * MIB))
        if slow:
            await until(lambda: export.waiting == 1)
            gate, export.gate = export.gate, trio.Event()
            await client.send(request(3, cookie=2))
            await until(lambda: export.waiting == 2)
            gate.set()
        await client.hangs_up()
        await until(lambda: export.told == 1)
        export.slow = False
        await still_serves(running.path)


async def test_a_reply_that_cannot_be_copied_ends_the_connection(short_path: Path) -> None:
    """It became unreadable while the client did not read."""
    export = Unreadable()
    limits = Limits(stall_seconds=0.2, send_buffer=64 << 10)
    export.lose_half(short_path)
    async with serving(short_path, export, limits) as running, Raw(running.path, 5) as client:
        await client.enter()
        await client.send(request(0, export.size // 2 - MIB, 2 * MIB))
        await until(lambda: export.told == 1)
        await client.hangs_up()
        await until(lambda: not running.server.connections)
        await still_serves(running.path)


async def test_many_answers_behind_one_that_cannot_be_read(short_path: Path) -> None:
    """Requests that wait in the socket behind it are not answered any more, and nothing hangs."""
    export = Unreadable()
    export.lose_half(short_path)
    async with serving(short_path, export) as running, Raw(running.path, 5) as client:
        await client.enter()
        half = export.size // 2
        await client.send(request(0, half, 4096) + request(0, 0, 4096) * 100 + request(3))
        said = await client.hangs_up()
        assert len(said) < 100 * 4112 + 2 * 16
        await until(lambda: not running.server.connections)
