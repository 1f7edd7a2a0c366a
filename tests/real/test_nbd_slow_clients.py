# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Clients that are slow, greedy or many, and replies that cannot be sent: none of them holds up others for long."""

import mmap
import os
import socket
import struct
import subprocess
from pathlib import Path
from typing import cast

import pytest
import trio

from forebay_nbd import Budget, Budgets, Buffer, Connection, Limits
from forebay_nbd.server import outbox
from forebay_nbd.server.budget import Share
from forebay_nbd.server.outbox import kernel_copy
from forebay_nbd.server.places import Places, Process
from real.nbd_memory import MemoryExport, serving
from real.nbd_raw import Raw, go, option, request, still_serves, until

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
        await until(lambda: running.server._budget.used == 0)


async def test_what_a_slow_client_has_not_taken_is_copied_in_slices(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that come meanwhile are copied, too, and all arrives in order."""
    sizes: list[int] = []

    def copied(buffers: list[Buffer]) -> bytes:
        sizes.append(sum(map(len, buffers)))
        return kernel_copy(buffers)

    monkeypatch.setattr(outbox, "kernel_copy", copied)
    export = MemoryExport(slow=True)
    export.memory[:] = os.urandom(1 << 20) * (export.size >> 20)
    limits = Limits(stall_seconds=0.1, send_buffer=64 << 10)
    async with serving(short_path, export, limits) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(b"".join(request(0, k * MIB, 3 * MIB, cookie=1) for k in range(3)))
        await until(lambda: export.waiting == 3)
        export.gate.set()
        await until(lambda: len(sizes) > 0 and not export.pins)
        assert max(sizes) <= MIB
        for k in range(3):
            assert await client.simple(3 * MIB) == (
                0,
                1,
                bytes(export.memory[k * MIB :][: 3 * MIB]),
            )
        await until(lambda: not running.server._budget.used)


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


# --- one budget for all servers -----------------------------------------------------------------------
def test_a_share_has_something_of_its_own_and_a_most() -> None:
    budget = Budget(100)
    one, other = Share(budget, own=10, most=60), Share(budget, own=10, most=60)
    assert one.reserve(70), "one request is let through whatever its size"
    assert (budget.used, budget.own) == (60, 10)
    assert not one.reserve(1)
    assert other.reserve(50)
    assert not other.reserve(1), "nothing is left, though it is not at its most"
    third = Share(budget, own=10)
    assert third.reserve(10), "its own is there whatever others hold"
    assert not third.reserve(1)
    assert (budget.used, budget.own) == (100, 30)
    for share, count in ((other, 45), (other, 5), (one, 70), (third, 10)):
        share.release(count)
    assert (budget.used, budget.own) == (0, 0)
    with pytest.raises(AssertionError):
        one.release(1)


class Watched(Budget):
    """Knows the most that was held at one time, however short that time was."""

    most = 0

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name in ("used", "own"):
            self.most = max(self.most, self.used + getattr(self, "own", 0))


async def test_silent_clients_of_many_disks_share_one_budget(short_path: Path) -> None:
    """Each disk could have 64 MiB for itself; together they have 24, and a live client is served."""
    limits = Limits(stall_seconds=0.1, server_bytes=12 * MIB, send_buffer=64 << 10)
    budget = Watched(24 * MIB)
    directories = [short_path / str(n) for n in range(4)]
    for directory in directories:
        directory.mkdir()
    async with trio.open_nursery() as nursery:

        async def silent(path: str) -> None:
            async with Raw(path) as client:
                await client.enter()
                await client.send(request(0, 0, MIB) * 8)
                await trio.sleep_forever()

        async def disk(directory: Path, task_status: trio.TaskStatus[str]) -> None:
            async with serving(directory, None, limits, Budgets(budget)) as running:
                task_status.started(running.path)
                await trio.sleep_forever()

        paths = [await nursery.start(disk, directory) for directory in directories]
        for path in paths:
            for _ in range(4):
                nursery.start_soon(silent, path)
        await until(lambda: budget.most > 8 * MIB)
        await trio.sleep(0.8)  # whatever they can take they have taken by then
        assert budget.most <= 24 * MIB + 4 * limits.own_bytes
        for path in paths:
            await still_serves(path)
        nursery.cancel_scope.cancel()
    assert budget.used == 0
    assert budget.own == 0


async def test_a_client_that_moves_a_byte_at_a_time_makes_way(short_path: Path) -> None:
    """It holds all there is, and never stops for long: who needs the memory gets it all the same."""
    limits = Limits(stall_seconds=0.3, server_bytes=2 * MIB, own_bytes=0)
    async with (
        serving(short_path, None, limits) as running,
        Raw(running.path) as dribbling,
        Raw(running.path, 5) as live,
        trio.open_nursery() as nursery,
    ):

        async def dribble() -> None:
            for _ in range(1000):
                try:
                    await dribbling.send(b"x")
                except trio.BrokenResourceError:
                    break
                await trio.sleep(0.01)

        await dribbling.enter()
        await dribbling.send(request(1, 0, 2 * MIB)[:28] + b"x" * 1000)
        nursery.start_soon(dribble)
        await until(lambda: running.server._budget.used)
        await live.enter()
        await live.send(request(1, 0, MIB, cookie=7, payload=bytes(MIB)))
        assert await live.simple() == (0, 7, b"")
        nursery.cancel_scope.cancel()


async def test_a_client_that_takes_its_time_keeps_its_memory_while_nobody_needs_it(
    short_path: Path,
) -> None:
    limits = Limits(stall_seconds=0.1)
    async with serving(short_path, None, limits) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(request(1, 0, MIB)[:28] + b"x" * 1000)
        await trio.sleep(0.5)
        await client.send(b"x" * (MIB - 1000))
        assert await client.simple() == (0, 1, b"")


# --- block status -----------------------------------------------------------------------------------------
async def with_contexts(client: Raw) -> None:
    await client.hello()
    await client.send(option(8) + option(10, struct.pack(">III", 0, 1, 15) + b"base:allocation"))
    await client.send(go(b""))
    while (await client.reply())[:2] != (7, 1):
        pass


async def status(client: Raw) -> list[int]:
    """The lengths of the extents in the next reply."""
    length = struct.unpack(">IHHQI", await client.receive(20))[4]
    words = struct.unpack(f">{length // 4}I", await client.receive(length))
    return list(words[1::2])


async def test_block_status_is_in_the_budget_and_takes_turns(short_path: Path) -> None:
    """64 at once: two are carried out, the others cost nothing, and hits and misses pass all of them."""
    export = MemoryExport(slow=True)
    async with serving(short_path, export) as running, Raw(running.path) as client:
        await with_contexts(client)
        await client.send(request(7, 0, export.size) * 60)
        await until(lambda: export.waiting == 2)
        await trio.sleep(0.05)
        assert export.waiting == 2
        assert 0 < running.server._status.used <= 2 << 20
        export.slow = False
        await client.send(request(0, 0, 8, cookie=2))
        assert await client.receive(20 + 8 + 8)
        export.gate.set()
        for _ in range(60):
            assert sum(await status(client)) == export.size
        await until(lambda: running.server._budget.used == 0)


class Fragmented(MemoryExport):
    """Each sector is an extent of its own."""

    async def extents(
        self, context: str, offset: int, length: int, one: bool
    ) -> list[tuple[int, int]]:
        return [(512, n % 2) for n in range(offset // 512, (offset + length) // 512)]


async def test_block_status_waits_for_memory_and_not_for_ever(short_path: Path) -> None:
    """Another client that takes no replies holds all there is, and is dropped."""
    limits = Limits(stall_seconds=0.2, own_bytes=0, send_buffer=64 << 10)
    budgets = Budgets(status=Budget(MIB))
    async with (
        serving(short_path, Fragmented(), limits, budgets) as running,
        Raw(running.path) as silent,
        Raw(running.path, 5) as client,
    ):
        await with_contexts(silent)
        await with_contexts(client)
        await silent.send(request(7, 0, running.export.size) * 60)
        await until(lambda: running.server._status.used >= MIB)
        await client.send(request(7, 0, running.export.size))
        assert len(await status(client)) == limits.status_extents
    assert budgets.status.used == 0


async def test_a_reply_has_so_many_extents_and_the_client_asks_on(short_path: Path) -> None:
    limits = Limits(status_extents=100)
    async with serving(short_path, Fragmented(), limits) as running, Raw(running.path) as client:
        await with_contexts(client)
        await client.send(request(7, 0, MIB) + request(7, 512 * 100, 512 * 7, cookie=2))
        assert {len(await status(client)) for _ in range(2)} == {100, 7}


# --- places -----------------------------------------------------------------------------------------------
class Connected:
    """A connection as far as its place is concerned."""

    def __init__(self, *, session: bool = True) -> None:
        self.session = object() if session else None
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


def process_of(pid: int) -> Process:
    found = Process.of(pid)
    assert found is not None
    assert found.is_alive
    return found


def test_the_process_at_a_socket_is_the_one_of_its_number() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Process.at(ours) == process_of(os.getpid())


def test_places_are_kept_for_the_process_that_was_first() -> None:
    first = process_of(os.getpid())
    with subprocess.Popen(["sleep", "60"]) as other:
        second = process_of(other.pid)
        places = Places(20)
        mine = cast("Connection", Connected())
        places.add(mine, first)
        places.remove(mine)  # as a VM that is about to connect anew
        for _ in range(16):
            assert places.has_room_for(second)
            places.add(cast("Connection", Connected()), second)
        assert not places.has_room_for(second)
        assert not places.has_room_for(None)
        for _ in range(4):
            assert places.has_room_for(first)
            places.add(cast("Connection", Connected()), first)
        assert not places.has_room_for(first), "it has no more than all of them"
        other.kill()
    assert not second.is_alive


def test_the_next_process_takes_the_place_of_the_first_when_that_has_ended() -> None:
    places = Places(4)
    with subprocess.Popen(["sleep", "60"]) as other:
        first, second = process_of(other.pid), process_of(os.getpid())
        mine = cast("Connection", Connected())
        places.add(mine, first)
        for _ in range(2):
            places.add(cast("Connection", Connected()), second)
        assert not places.has_room_for(second)
        other.kill()
    places.remove(mine)
    assert places.has_room_for(second)
    places.add(cast("Connection", Connected()), second)
    assert places.has_room_for(second), "the place that was kept is its own now"


async def test_idle_connections_keep_nobody_out(short_path: Path) -> None:
    """Those that were idle for longest make way, before their time is over."""
    async with serving(short_path) as running:
        held = [await trio.open_unix_socket(running.path) for _ in range(200)]
        await still_serves(running.path)
        assert len(running.server.connections) < 100
        for one in held:
            await one.aclose()


async def test_a_client_in_transmission_does_not_make_way(short_path: Path) -> None:
    async with serving(short_path) as running, Raw(running.path) as client:
        await client.enter()
        held = [await trio.open_unix_socket(running.path) for _ in range(100)]
        await client.send(request(0, 0, 8))
        assert await client.simple(8) == (0, 1, bytes(8))
        for one in held:
            await one.aclose()
