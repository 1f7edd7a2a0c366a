# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What happens around requests: waiting, stalling, failing, shutting down, moving to another process."""

import errno
import logging
import socket
import struct
from pathlib import Path

import pytest
import trio

from forebay_nbd import Connection, KnownExports, Limits, Phase
from forebay_nbd.server.budget import Budget, Share
from real.nbd_memory import MemoryExport, serving
from real.nbd_raw import Raw, answers, option, request, still_serves, until

MIB = 1 << 20


async def test_hits_overtake_misses(short_path: Path) -> None:
    export = MemoryExport(slow=True)
    async with serving(short_path, export) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(
            request(0, 0, 4096, cookie=1) + request(1, 8192, 2, cookie=2, payload=b"ab")
        )
        await until(lambda: export.waiting == 2)
        export.slow = False
        await client.send(request(0, 4096, 8, cookie=3))
        assert await client.simple(8) == (0, 3, bytes(8))
        export.gate.set()
        assert await answers(client, {1: 4096, 2: 0}) == {1: bytes(4096), 2: b""}


async def test_a_slow_write_has_its_own_copy(short_path: Path) -> None:
    """The receive buffer is reused while the write waits."""
    export = MemoryExport(slow=True)
    async with serving(short_path, export) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(request(1, 0, 1000, cookie=1, payload=b"a" * 1000))
        await until(lambda: export.waiting == 1)
        await client.send(request(1, 5000, 1000, cookie=2, payload=b"b" * 1000))
        await until(lambda: export.waiting == 2)
        export.gate.set()
        assert {(await client.simple())[1] for _ in range(2)} == {1, 2}
        assert export.memory[:1000] == b"a" * 1000
        assert export.memory[5000:6000] == b"b" * 1000


async def test_waiting_requests_are_bounded_and_the_rest_is_not_read(short_path: Path) -> None:
    export = MemoryExport(slow=True)
    async with serving(short_path, export) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(request(0, 0, 512) * 200)
        await until(lambda: export.waiting == 64)
        await trio.sleep(0.05)
        assert export.most_waiting == 64
        export.gate.set()
        for _ in range(200):
            assert (await client.simple(512))[0] == 0


async def test_waiting_bytes_are_bounded(short_path: Path) -> None:
    export = MemoryExport(slow=True)
    limits = Limits(inflight_bytes=3 * MIB)
    async with serving(short_path, export, limits) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(request(0, 0, MIB) * 10)
        await until(lambda: export.waiting == 3)
        await trio.sleep(0.05)
        assert export.most_waiting == 3
        export.gate.set()
        for _ in range(10):
            assert (await client.simple(MIB))[0] == 0


async def test_a_deep_queue_of_hits_is_one_batch_and_never_waits(short_path: Path) -> None:
    async with serving(short_path) as running, Raw(running.path) as client:
        await client.enter()
        count = 5000
        await client.send(b"".join(request(0, 512 * i, 512, cookie=i) for i in range(count)))
        for i in range(count):
            assert (await client.simple(512))[:2] == (0, i)
        assert running.export.now == count
        assert running.export.log == []


async def test_writes_are_published_before_they_are_acknowledged(short_path: Path) -> None:
    export = MemoryExport()
    async with serving(short_path, export) as running, Raw(running.path) as client:
        await client.enter()
        write = request(1, 0, 512, payload=bytes(512))
        await client.send(write * 50 + request(0, 0, 512, cookie=2) + write * 50)
        for _ in range(101):
            error, cookie, _ = await client.simple(0)
            assert error == 0
            if cookie == 2:
                await client.receive(512)
            assert export.unpublished == 0
        assert 0 < export.publications < 20


async def test_a_failed_publish_fails_all_writes_of_the_batch(short_path: Path) -> None:
    export = MemoryExport(publish_error=OSError(errno.EDQUOT, "journal full"))
    for structured in (False, True):
        directory = short_path / str(structured)
        directory.mkdir()
        async with serving(directory, export) as running, Raw(running.path) as client:
            await client.enter(structured)
            await client.send(request(1, 0, 4, payload=b"data") * 3)
            for _ in range(3):
                if structured:
                    head = struct.unpack(">IHHQI", await client.receive(20))
                    body = await client.receive(head[4])
                    assert head[2] == 0x8001
                    assert struct.unpack(">I", body[:4])[0] == errno.ENOSPC
                    assert body[6:] == b"journal full"
                else:
                    assert await client.simple() == (errno.ENOSPC, 1, b"")


@pytest.mark.parametrize("slow", [False, True])
async def test_errors_of_the_export(short_path: Path, slow: bool) -> None:
    export = MemoryExport(slow=slow)
    export.gate.set()
    async with serving(short_path, export) as running, Raw(running.path) as client:
        await client.enter()
        for ours, theirs in (
            (errno.EIO, 5),
            (errno.ETIMEDOUT, 5),
            (errno.ENOSPC, 28),
            (errno.EACCES, 1),
        ):
            export.error = OSError(ours, "as told")
            await client.send(request(0, 0, 8, cookie=1))
            assert await client.simple() == (theirs, 1, b"")
            await client.send(request(1, 0, 4, cookie=2, payload=b"data"))
            assert await client.simple() == (theirs, 2, b"")
        export.error = None
        await client.send(request(0, 0, 8))
        assert await client.simple(8) == (0, 1, bytes(8))


@pytest.mark.expect_log("request 3 at 0")
async def test_a_bug_in_the_export_is_eio_and_nothing_else(short_path: Path) -> None:
    class Buggy(MemoryExport):
        async def flush(self) -> None:
            raise ValueError("a bug")

    async with serving(short_path, Buggy()) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(request(3) + request(0, 0, 8, cookie=2))
        # The read is a hit and answered in the batch; the flush is a task.
        assert await client.simple(8) == (0, 2, bytes(8))
        assert await client.simple() == (errno.EIO, 1, b"")
        await still_serves(running.path)


@pytest.mark.expect_log("connection failed")
async def test_a_bug_on_the_fast_path_costs_one_connection(short_path: Path) -> None:
    class Buggy(MemoryExport):
        def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
            raise ValueError("a bug")

    async with serving(short_path, Buggy()) as running:
        async with Raw(running.path) as client:
            await client.enter()
            await client.send(request(1, 0, 4, payload=b"data"))
            await client.hangs_up()
        await still_serves(running.path)


# --- stalls ---------------------------------------------------------------------------------------
async def test_unsent_buffers_are_pinned_then_copied(short_path: Path) -> None:
    """The client gets what was there when it asked, although the cache reused the memory meanwhile."""
    export = MemoryExport()
    export.memory[: 4 * MIB] = b"A" * (4 * MIB)
    limits = Limits(stall_seconds=0.2, send_buffer=64 << 10)
    async with serving(short_path, export, limits) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(request(0, 0, 4 * MIB, cookie=1))
        await until(lambda: export.pins == 1)
        await until(lambda: export.pins == 0)
        export.memory[: 4 * MIB] = b"B" * (4 * MIB)
        assert await client.simple(4 * MIB) == (0, 1, b"A" * (4 * MIB))
        await client.send(request(0, 0, 8, cookie=2))
        assert await client.simple(8) == (0, 2, b"B" * 8)
        assert running.server._budget.used == 0


async def test_a_slow_answer_joins_a_stalled_queue(short_path: Path) -> None:
    export = MemoryExport()
    limits = Limits(stall_seconds=0.05, send_buffer=64 << 10)
    async with serving(short_path, export, limits) as running, Raw(running.path) as client:
        await client.enter()
        export.slow = True
        await client.send(request(0, MIB, MIB, cookie=1) + request(3, cookie=3))
        await until(lambda: export.waiting == 2)
        export.slow = False
        await client.send(request(0, 0, 4 * MIB, cookie=2))
        await until(lambda: export.pins == 1)
        await until(lambda: export.pins == 0)
        export.gate.set()
        await until(lambda: export.waiting == 0)
        await trio.testing.wait_all_tasks_blocked()
        export.memory[MIB : 2 * MIB] = b"B" * MIB
        assert await client.simple(4 * MIB) == (0, 2, bytes(4 * MIB))
        assert await answers(client, {1: MIB, 3: 0}) == {1: bytes(MIB), 3: b""}


# --- shutting down ----------------------------------------------------------------------------------
async def test_requests_in_flight_complete_at_shutdown(short_path: Path) -> None:
    export = MemoryExport(slow=True)
    async with serving(short_path, export) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(request(1, 0, 4, cookie=1, payload=b"data") + request(0, 0, 4, cookie=2))
        await until(lambda: export.waiting == 2)
        running.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert not running.ended.is_set()
        export.gate.set()
        assert (await answers(client, {1: 0, 2: 4})).keys() == {1, 2}
        assert await client.hangs_up() == b""
        await running.ended.wait()
        assert bytes(export.memory[:4]) == b"data"


async def test_replies_of_a_stalled_client_are_sent_at_shutdown(short_path: Path) -> None:
    limits = Limits(send_buffer=64 << 10)
    async with serving(short_path, limits=limits) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(request(0, 0, 4 * MIB, cookie=1))
        await until(lambda: running.export.pins == 1)
        running.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert await client.simple(4 * MIB) == (0, 1, bytes(4 * MIB))
        assert await client.hangs_up() == b""


async def test_shutdown_does_not_wait_for_ever(short_path: Path) -> None:
    export = MemoryExport(slow=True)
    limits = Limits(shutdown_seconds=0.1)
    async with serving(short_path, export, limits) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(request(3))
        await until(lambda: export.waiting == 1)
        with trio.fail_after(5):
            await running.stop()


async def test_disc_waits_for_what_is_in_flight(short_path: Path) -> None:
    export = MemoryExport(slow=True)
    async with serving(short_path, export) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(request(1, 0, 4, cookie=1, payload=b"data") + request(2))
        await until(lambda: export.waiting == 1)
        assert export.clients == 1
        export.gate.set()
        assert await client.simple() == (0, 1, b"")
        assert await client.hangs_up() == b""
        await until(lambda: export.clients == 0)


# --- moving to another process ------------------------------------------------------------------------
async def test_a_suspended_connection_goes_on_elsewhere(short_path: Path) -> None:
    """In the middle of a request, with one waiting; contexts and structured replies stay agreed on."""
    export = MemoryExport(slow=True)
    export.memory[:4] = b"data"
    body = struct.pack(">III", 0, 1, 15) + b"base:allocation"
    async with serving(short_path, export) as running, Raw(running.path) as client:
        await client.hello()
        await client.send(option(8) + option(10, body))
        await client.send(option(7, bytes(6)))
        for _ in range(6):
            await client.reply() if _ < 5 else None
        await client.send(request(0, 0, 4, cookie=1) + request(1, 0, 300_000)[:28] + b"x" * 200_000)
        await until(lambda: export.waiting == 1)
        await trio.testing.wait_all_tasks_blocked()
        (connection,) = running.server.connections
        connection.suspend()
        await trio.testing.wait_all_tasks_blocked()
        assert not connection.sock._closed  # type: ignore[attr-defined]
        export.gate.set()
        await until(lambda: not running.server.connections)
        session = connection.session
        assert session is not None
        assert session.structured
        assert session.contexts == {1: "base:allocation"}
        assert session.unparsed == request(1, 0, 300_000)[:28] + b"x" * 200_000
        assert export.clients == 0

        export.slow = False
        moved = socket.socket(fileno=connection.sock.detach())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.server.resume, moved, session)
            head = await client.receive(28)
            assert struct.unpack(">IHHQIQ", head)[:4] == (0x668E33EF, 1, 1, 1)
            assert await client.receive(4) == b"data"
            await client.send(b"y" * 100_000)
            assert (await client.simple())[0] == 0
            await client.send(request(7, 0, 512, flags=8))
            assert struct.unpack(">IHHQIIII", await client.receive(32))[6:] == (512, 0)
            await client.send(request(2))
        assert export.memory[:300_000] == b"x" * 200_000 + b"y" * 100_000


@pytest.mark.parametrize("size", [4, 300_000], ids=["in place", "own buffer"])
async def test_a_request_that_found_no_room_moves_too(short_path: Path, size: int) -> None:
    """Parsed, but not begun: neither lost nor done twice."""
    export = MemoryExport(slow=True)
    limits = Limits(inflight_requests=1)
    async with serving(short_path, export, limits) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(request(3, cookie=1) + request(1, 0, size, cookie=2, payload=b"x" * size))
        await client.send(request(0, 0, 4, cookie=3))
        await until(lambda: export.waiting == 1)
        await trio.testing.wait_all_tasks_blocked()
        (connection,) = running.server.connections
        connection.suspend()
        export.gate.set()
        await until(lambda: not running.server.connections)
        assert await client.simple() == (0, 1, b"")
        session = connection.session
        assert session is not None
        assert session.unparsed.startswith(request(1, 0, size, cookie=2, payload=b"x" * size))
        assert export.log == ["flush"]

        export.slow = False
        moved = socket.socket(fileno=connection.sock.detach())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.server.resume, moved, session)
            replies = await answers(client, {2: 0, 3: 4})
            assert replies.keys() == {2, 3}
            await client.send(request(2))
        assert export.memory[:size] == b"x" * size


async def test_what_hangs_moves_unanswered(short_path: Path) -> None:
    """A store that does not answer must not hold up a restart: what it was asked for is asked for again."""
    export = MemoryExport(slow=True)
    async with serving(short_path, export) as running, Raw(running.path) as client:
        await client.enter()
        write = request(1, 4096, 5, cookie=1, payload=b"hello")
        await client.send(write + request(0, 4096, 5, cookie=2))
        await until(lambda: export.waiting == 2)
        (connection,) = running.server.connections
        assert connection.unanswered_since is not None
        connection.suspend()
        await trio.testing.wait_all_tasks_blocked()
        assert running.server.connections, "it waits for what is in flight"
        connection.cancel_requests()
        await until(lambda: not running.server.connections)
        assert connection.phase is Phase.SUSPENDED
        assert connection.session is not None
        assert connection.session.unparsed == write + request(0, 4096, 5, cookie=2)

        export.slow = False
        moved = socket.socket(fileno=connection.sock.detach())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.server.resume, moved, connection.session)
            replies = await answers(client, {1: 0, 2: 5})
            assert replies.keys() == {1, 2}
            await client.send(request(2))
        assert bytes(export.memory[4096:4101]) == b"hello"


async def test_replies_that_were_not_taken_move_in_their_place(short_path: Path) -> None:
    """A client that reads nothing for a while: not a byte of its replies is lost, doubled or out of order."""
    export = MemoryExport()
    async with serving(short_path, export) as running, Raw(running.path) as client:
        await client.enter()
        size, count = 256 << 10, 64
        for number in range(count):
            await client.send(request(0, 0, size, cookie=number))
        await until(lambda: any(c.stalled_since for c in running.server.connections))
        sessions = 0
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                (connection,) = running.server.connections
                connection.suspend()
                connection.cancel_requests()
                await until(lambda: not running.server.connections)
                assert connection.phase is Phase.SUSPENDED
                assert connection.session is not None
                assert connection.session.unsent
                sessions += 1
                moved = socket.socket(fileno=connection.sock.detach())
                nursery.start_soon(running.server.resume, moved, connection.session)
                await until(lambda: running.server.connections)
                await trio.testing.wait_all_tasks_blocked()
            for number in range(count):
                assert await client.simple(size) == (0, number, bytes(export.memory[:size]))
            await client.send(request(2))
        assert sessions == 3


async def test_a_handshake_is_not_suspended_but_ended(short_path: Path) -> None:
    async with serving(short_path) as running, Raw(running.path) as client:
        await client.hello()
        await until(lambda: running.server.connections)
        (connection,) = running.server.connections
        connection.suspend()
        assert await client.hangs_up() == b""
        assert connection.session is None


# --- sharing the loop ---------------------------------------------------------------------------------
async def test_a_busy_connection_lets_the_loop_run(short_path: Path) -> None:
    async with serving(short_path) as running, trio.open_nursery() as nursery:

        async def busy() -> None:
            async with Raw(running.path) as client:
                await client.enter()
                batch = request(0, 0, 65536) * 16
                while True:
                    await client.send(batch)
                    await client.receive(16 * (65536 + 16))

        for _ in range(2):
            nursery.start_soon(busy)
        with trio.fail_after(20):
            for _ in range(20):
                await still_serves(running.path)
        nursery.cancel_scope.cancel()


async def test_out_of_descriptors_is_survived(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(short_path) as running:
        await still_serves(running.path)
        original = trio.SocketListener.accept
        failures = [OSError(errno.EMFILE, "Too many open files")] * 2

        async def accept(self: trio.SocketListener) -> trio.SocketStream:
            stream = await original(self)
            if failures:
                await stream.aclose()
                raise failures.pop()
            return stream

        monkeypatch.setattr(trio.SocketListener, "accept", accept)
        with caplog.at_level(logging.CRITICAL, "forebay_nbd.server"):
            await still_serves(running.path)  # by the accept() that was waiting already
            while failures:
                async with Raw(running.path) as client:
                    await client.hangs_up()
            await still_serves(running.path)


def test_a_budget_counts() -> None:
    budget = Budget(100)
    assert budget.reserve(1000), "one request is let through whatever its size"
    assert not budget.reserve(1)
    budget.release(1000)
    assert budget.reserve(60)
    assert not budget.reserve(41)
    assert budget.reserve(40)
    with pytest.raises(AssertionError):
        budget.release(101)


def test_a_connection_needs_no_server() -> None:
    """The seam for tests of other parts: a socket pair, an export, nothing else."""

    async def main() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        export = MemoryExport()
        async with trio.open_nursery() as nursery:
            connection = Connection(ours, Limits(), Share(Budget(1 << 20)))
            nursery.start_soon(connection.run, KnownExports(lambda _: export, list))
            await trio.to_thread.run_sync(theirs.recv, 18)
            theirs.close()

    trio.run(main)
