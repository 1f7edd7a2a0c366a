# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A cache device that is slow, or hangs, and an index that hangs, step by step on the simulated host.

Each story about what must not be half of something is also told with a bug, and then it has to fail.
"""

import contextlib
import errno
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
import trio.testing

import forebay_cache.layers.registry
from forebay.units import Mode
from forebay_cache import Cache
from forebay_cache.blocks import slow_writes
from forebay_cache.device.pace import QUIET_LEAST, SLOW_SECONDS
from forebay_cache.device.worker import TIMEOUT
from forebay_cache.format.geometry import BLOCK, SECTOR
from sim import bugs
from sim.fake_host import Host, check_cache, nothing, settings
from sim.fake_loop import Dice, FakeSyncer, simulated
from sim.fake_origin import FakeOrigin
from sim.test_data_safety import NEW, OLD, SIZE, read

ExpectLog = Callable[[str], None]
Story = Callable[[Host, Dice], Awaitable[None]]
Plant = Callable[[bugs.Replace], None]

COUNT = SIZE // BLOCK
NEWER = b"N" * BLOCK
STILL = {"max_lag": 1000.0}


def play(directory: Path, story: Story, *, slow: bool = True) -> type[FakeSyncer]:
    """Tell a story on a host whose image holds nothing but ``OLD``, with a device that is slow from the start."""
    dice = Dice("story")

    async def live() -> None:
        async with trio.open_nursery() as nursery:
            host = Host(directory, FakeOrigin(dice, OLD * COUNT), nursery)
            await host.start()
            await story(host, dice)
            await host._end()
            host.cache.release()

    pages = mock.patch.object(forebay_cache.layers.registry, "PAGES_KEPT", 32768)
    with simulated(dice, slow=slow) as syncer, pages:
        trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0))
    return syncer


@contextlib.contextmanager
def planted(bug: Plant | None) -> Iterator[None]:
    """With a bug in the code, what is within has to fail."""
    if bug is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        bug(lambda *args: stack.enter_context(mock.patch.object(*args)))
        with pytest.raises((AssertionError, BaseExceptionGroup, ValueError)):
            yield


class Held:
    """Jobs whose function has that name wait before they begin, until `go` is set or `within` is left."""

    def __init__(self, cache: Cache, name: str) -> None:
        self.reached, self.go = trio.Event(), trio.Event()
        self._lane, self._name = cache.threads.writes, name

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        run = self._lane.run

        async def held(job: Any, *args: Any) -> Any:
            if job.__qualname__ == self._name:
                self.reached.set()
                await self.go.wait()
            return await run(job, *args)

        with mock.patch.object(self._lane, "run", held):
            try:
                yield
            finally:
                self.go.set()


DATA, FRAME = "_write", "Publisher._write"


# -- one write ----------------------------------------------------------------------------------------------------


def test_what_a_thread_has_not_written_is_not_read(tmp_path: Path) -> None:
    """Readers find what was there before, until all of the new data is on the device, and then that."""

    async def story(host: Host, dice: Dice) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, **STILL))
        await disk.write(0, memoryview(NEW), False)
        held = Held(host.cache, DATA)
        async with trio.open_nursery() as guests:
            with held.within():
                guests.start_soon(disk.write, 0, memoryview(NEWER), False)
                await held.reached.wait()
                assert await read(disk) == NEW
                assert disk.write_now([(BLOCK, memoryview(NEW))]) == 0, "by the event loop"
                held.go.set()
        assert await read(disk) == NEWER
        await disk.drain(nothing)
        assert host.origin.durable[:BLOCK] == NEWER
        await check_cache(host.cache)

    play(tmp_path, story)


def test_writes_of_one_block_get_one_slot(tmp_path: Path) -> None:
    """Sixteen at a time, each of one sector, and again, in another order."""

    async def story(host: Host, dice: Dice) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, **STILL))
        for version in (b"1", b"2"):
            async with trio.open_nursery() as guests:
                for n in range(16):
                    data = memoryview(version * SECTOR)
                    guests.start_soon(disk.write, n * SECTOR, data, False)
        assert await read(disk) == b"2" * BLOCK
        assert disk.view.private[0].slots == 2
        await disk.flush()
        await host.kill(host.snapshot())
        await host.start()
        disk = await host.attach("d", settings(Mode.WRITE_BACK, **STILL))
        assert await read(disk) == b"2" * BLOCK
        await check_cache(host.cache)

    play(tmp_path, story)


def test_a_kill_leaves_what_was_acknowledged(tmp_path: Path) -> None:
    """Data alone, or a frame that is under way, is nothing; a write that was answered is there."""

    async def story(host: Host, dice: Dice) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, **STILL))
        await disk.write(0, memoryview(NEW), False)
        held = Held(host.cache, FRAME)
        async with trio.open_nursery() as guests:
            with held.within():
                guests.start_soon(disk.write, 0, memoryview(NEWER), False)
                await held.reached.wait()
                left = host.snapshot()
                held.go.set()
        answered = host.snapshot()
        for state, want in ((left, NEW), (answered, NEWER)):
            await host.kill(state)
            await host.start()
            disk = await host.attach("d", settings(Mode.WRITE_BACK, **STILL))
            assert await read(disk) == want

    play(tmp_path, story)


@pytest.mark.parametrize("bug", [None, bugs.opened_is_overwritten])
def test_what_was_not_synced_is_synced_before_it_changes_sides(
    tmp_path: Path, bug: Plant | None
) -> None:
    """Its other side is what durable state names."""

    async def story(host: Host, dice: Dice) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, **STILL))
        await disk.write(0, memoryview(NEW), False)
        await disk.flush()
        await disk.write(0, memoryview(NEWER), False)
        before = sum(syncs)
        await disk.write(0, memoryview(NEW), False)
        assert sum(syncs) > before
        assert await read(disk) == NEW

    syncs: list[int] = []
    with (
        planted(bug),
        mock.patch.object(FakeSyncer, "begin", staticmethod(partial(syncs.append, 1))),
    ):
        play(tmp_path, story)


@pytest.mark.parametrize("bug", [None, bugs.sync_before_records])
def test_a_sync_covers_no_sector_whose_record_is_under_way(
    tmp_path: Path, bug: Plant | None
) -> None:
    """It would count as durable, and the next write of it go to where durable state says that it lies."""

    async def story(host: Host, dice: Dice) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, **STILL))
        held = Held(host.cache, FRAME)
        async with trio.open_nursery() as guests:
            with held.within():
                guests.start_soon(disk.write, 0, memoryview(NEW), False)
                await held.reached.wait()
                guests.start_soon(disk.flush)
                await trio.sleep(1)
                assert not syncs, "begun beside a frame that is not written"
                held.go.set()
        assert syncs

    syncs: list[int] = []
    with (
        planted(bug),
        mock.patch.object(FakeSyncer, "begin", staticmethod(partial(syncs.append, 1))),
    ):
        play(tmp_path, story)


def test_who_waits_while_a_frame_fails_is_told(tmp_path: Path, expect_log: ExpectLog) -> None:
    """A sync that came first drops the records that nobody can write any more: without them nothing is answered."""
    expect_log("cache device .* failed")
    outcomes: list[str] = []

    async def story(host: Host, dice: Dice) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, **STILL), overlay=True)

        async def outcome(what: str, do: Callable[[], Awaitable[None]]) -> None:
            try:
                await do()
            except OSError:
                outcomes.append(f"{what}: an error")
            else:
                outcomes.append(f"{what}: done")

        held, write = Held(host.cache, FRAME), partial(disk.write, data=memoryview(NEW), fua=False)
        async with trio.open_nursery() as guests:
            with held.within():
                guests.start_soon(outcome, "write", partial(write, 0))
                await held.reached.wait()
                guests.start_soon(outcome, "flush", disk.flush)
                await trio.sleep(1)
                guests.start_soon(outcome, "write", partial(write, BLOCK))
                await trio.sleep(1)
                fails = mock.Mock(side_effect=OSError(errno.EIO, "planted"))
                with mock.patch.object(host.cache.intent.journal, "write", fails):
                    held.go.set()
                    await trio.sleep(1)

    play(tmp_path, story)
    assert sorted(outcomes) == ["flush: an error", "write: an error", "write: an error"]


@pytest.mark.parametrize("bug", [None, bugs.frozen_is_written])
def test_a_layer_that_is_frozen_meanwhile_does_not_get_it(
    tmp_path: Path, bug: Plant | None
) -> None:
    """The pass has begun: it would be lost with the layer. It goes to the next one."""

    async def story(host: Host, dice: Dice) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, **STILL))
        await disk.write(0, memoryview(NEW), False)
        held = Held(host.cache, DATA)
        async with trio.open_nursery() as nursery:
            with held.within():
                nursery.start_soon(disk.write, BLOCK, memoryview(NEWER), False)
                await held.reached.wait()
                layer = disk.view.private[0]
                nursery.start_soon(disk.drain, nothing)
                await trio.sleep(10)
                assert layer.sectors, "settled although a thread may write to its slots"
                held.go.set()
            await trio.sleep(10)
            assert not layer.sectors
            assert len(disk.view.private) == 1
        assert await read(disk, BLOCK) == NEWER
        await disk.drain(nothing)
        assert host.origin.durable[: 2 * BLOCK] == NEW + NEWER
        await check_cache(host.cache)

    with planted(bug):
        play(tmp_path, story)


# -- quick, slow, quick -------------------------------------------------------------------------------------------


def test_one_slow_write_makes_the_loop_leave_the_next_to_threads(tmp_path: Path) -> None:
    """The rest of its run as well; and the loop writes again when the device has been quick for a while."""

    async def story(host: Host, dice: Dice) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, **STILL))
        await disk.write(0, memoryview(NEW), False)
        cache, clock = host.cache, trio.lowlevel.current_clock()
        write = cache.device.write

        def slow(*args: Any) -> None:
            assert isinstance(clock, trio.testing.MockClock)
            clock.jump(2 * SLOW_SECONDS)
            write(*args)

        run = [(n * SECTOR, memoryview(NEWER)[:SECTOR]) for n in range(8)]
        await disk.flush()
        with mock.patch.object(cache.device, "write", slow):
            taken = disk.write_now(run)
            assert taken == 1
            disk.publish()
        assert cache.info()["slow"]
        assert disk.write_now(run[1:]) == 0
        assert not disk.flush_now()
        for offset, data in run[1:]:
            await disk.write(offset, data, False)
        await trio.sleep(2 * QUIET_LEAST)
        await disk.flush()
        assert disk.write_now(run) == len(run)
        disk.publish()
        assert not cache.info()["slow"]
        assert await read(disk, 0, 8 * SECTOR) == NEWER[: 8 * SECTOR]
        await check_cache(cache)

    play(tmp_path, story, slow=False)


def test_a_sync_that_hangs_makes_the_device_slow_before_it_fails(tmp_path: Path) -> None:
    """What would stop the loop shows first in what it does not wait for."""

    async def story(host: Host, dice: Dice) -> None:
        pace = host.cache.threads.pace
        forgotten = host.cache.ready.forgotten
        number = pace.begin()
        await trio.sleep(0.9)
        before = pace.is_slow
        assert not before
        await trio.sleep(1)
        assert pace.is_slow
        assert host.cache.ready.forgotten == forgotten
        await trio.sleep(4)
        assert host.cache.ready.forgotten == forgotten + 1, "memory is believed in"
        await trio.sleep(10)
        assert host.cache.ready.forgotten == forgotten + 1, "again and again"
        pace.end(number)
        await trio.sleep(10)
        await host.cache.publish()
        assert not pace.is_slow

    play(tmp_path, story, slow=False)


# -- hanging ------------------------------------------------------------------------------------------------------


@pytest.mark.expect_log("cache device .* failed: no answer|works again|write-back failed")
@pytest.mark.parametrize("bug", [None, bugs.hung_threads_forgotten])
def test_what_a_hung_thread_writes_late_lands_on_nothing(tmp_path: Path, bug: Plant | None) -> None:
    """The device stays failed until it has ended; its slot is nobody's until then."""

    async def story(host: Host, dice: Dice) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, **STILL))
        other = await host.attach("e", settings(Mode.WRITE_THROUGH))
        await disk.write(0, memoryview(NEW), False)
        cache = host.cache
        lately = dice.hang = trio.Event()
        began = trio.current_time()
        async with trio.open_nursery() as guests:
            guests.start_soon(disk.write, BLOCK, memoryview(NEWER), False)
            await trio.sleep(1)
            dice.hang = None  # the others do not
            await trio.sleep(TIMEOUT / 2)
            before = cache.failed
            assert before is None
        assert trio.current_time() - began < 3 * TIMEOUT, "of a clock that jumps"
        assert cache.failed is not None
        assert host.origin.visible[: 2 * BLOCK] == NEW + NEWER, "what only it had, and past it"
        await trio.sleep(300)
        for n in range(COUNT):
            await disk.write(n * BLOCK, memoryview(bytes([n + 1]) * BLOCK), False)
        await disk.drain(nothing)
        for n in range(COUNT):
            assert await read(disk, n * BLOCK) == bytes([n + 1]) * BLOCK
            await read(other, n * BLOCK)
        is_failed = cache.failed is not None
        lately.set()
        await trio.sleep(300)
        for n in range(COUNT):
            assert await read(disk, n * BLOCK) == bytes([n + 1]) * BLOCK
        await check_cache(cache)
        assert is_failed
        assert cache.failed is None

    with planted(bug):
        play(tmp_path, story)


@pytest.mark.expect_log("cache device .* failed: no answer")
def test_a_read_that_hangs_is_a_failure_and_comes_from_the_image(tmp_path: Path) -> None:
    async def story(host: Host, dice: Dice) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        await read(disk)
        await trio.sleep(1)
        host.cache.ready.forget()
        dice.hang = trio.Event()
        began = trio.current_time()
        assert await read(disk) == OLD
        assert trio.current_time() - began < TIMEOUT + 2
        assert host.cache.failed is not None
        assert await read(disk, BLOCK) == OLD
        dice.hang.set()

    play(tmp_path, story)


@pytest.mark.expect_log("index commit failed|the index can be written again")
def test_an_index_that_hangs_is_given_up_and_has_everything_later(tmp_path: Path) -> None:
    """Writes, flushes and reads do not notice; who needs a commit hears of it; a late one does no harm."""

    async def story(host: Host, dice: Dice) -> None:
        cache = host.cache
        disk = await host.attach("d", settings(Mode.WRITE_BACK, **STILL))
        await disk.write(0, memoryview(NEW), False)
        dice.index_hang = trio.Event()
        with pytest.raises(OSError, match="the index: no answer"):
            await cache.commit()
        assert cache.info()["state"] == "unrecorded"
        began = trio.current_time()
        with pytest.raises(OSError, match="no answer"):
            await cache.commit()
        await disk.write(0, memoryview(NEWER), False)
        await disk.flush()
        assert await read(disk) == NEWER
        assert trio.current_time() - began < 1
        dice.index_hang.set()
        dice.index_hang = None
        await trio.sleep(10)
        assert cache.info()["state"] == "ok"
        assert not cache.intent.journal.used
        await host.kill(host.snapshot())
        await host.start("another boot")
        disk = await host.attach("d", settings(Mode.WRITE_BACK, **STILL))
        assert await read(disk) == NEWER
        await check_cache(host.cache)

    play(tmp_path, story)


def test_the_write_path_of_threads_is_used(tmp_path: Path) -> None:
    """Else the stories above say nothing."""

    async def story(host: Host, dice: Dice) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, **STILL))
        with mock.patch.object(slow_writes, "write", wraps=slow_writes.write) as write:
            await disk.write(0, memoryview(NEW), False)
        assert write.await_count == 1 or write.call_count == 1

    play(tmp_path, story)
