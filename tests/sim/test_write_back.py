# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Write-back under pressure: a store that is slow, full, broken or stopped, a cache that is full, guests that wait."""

import errno
from collections.abc import Awaitable, Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
import trio.testing

import forebay_cache.layers.registry
from forebay.checkpoint.dirty import left_dirty
from forebay.config.model import DiskSettings
from forebay.disk.copy import preload_range
from forebay.disk.disk import Disk
from forebay.disk.fallback import PrivateOrOrigin
from forebay.disk.origin_writes import OriginWrites
from forebay.errors import ForebayError
from forebay.units import Mode
from forebay_cache import Cache
from forebay_cache.format.geometry import BLOCK, PAGE_SHIFT, SECTOR
from sim.fake_host import Host, check_cache, nothing, settings
from sim.fake_loop import Dice, simulated
from sim.fake_origin import Buffer, FakeOrigin

MIB = 1 << 20
OLD, NEW = b"o", b"n"
SECONDS = 20.0


class Store(FakeOrigin):
    """With a bandwidth, for writes, bytes a second, 0: none; and errors of more kinds."""

    def __init__(self, dice: Dice, content: bytes) -> None:
        super().__init__(dice, content, scale=0.1)
        self.bandwidth = 1e9
        self.error: OSError | None = None
        self.began: list[float] = []
        self._line = trio.Lock()

    async def write_ranges(
        self, ranges: Sequence[tuple[int, Buffer]], background: bool = False
    ) -> None:
        assert background, "write-back goes before what guests wait for"
        self.began.append(trio.current_time())
        async with self._line:
            if self.error is not None:
                raise self.error
            if not self.bandwidth:
                await trio.sleep_forever()
            await trio.sleep(sum(len(data) for _, data in ranges) / self.bandwidth)
        await super().write_ranges(ranges, background)


def play(
    directory: Path,
    story: Callable[[Host, Store], Awaitable[None]],
    *,
    size: int = 16 * MIB,
    cache: int = 64 * MIB,
) -> None:
    """Tell a story on a host with such a cache and an image of that size. All in it follows from one seed."""
    dice = Dice("write-back")

    async def live() -> None:
        async with trio.open_nursery() as nursery:
            store = Store(dice, OLD * size)
            host = Host(directory, store, nursery, cache)
            await host.start()
            await story(host, store)
            await host._end()
            host.cache.release()

    with simulated(dice), mock.patch.object(forebay_cache.layers.registry, "PAGES_KEPT", 32768):
        trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0))


def lazy(**others: Any) -> DiskSettings:
    """Write-back that begins no pass because of time."""
    return settings(Mode.WRITE_BACK, **{"max_lag": 100_000.0, **others})


async def write(disk: Disk, offset: int, data: bytes) -> None:
    """As the NBD server does."""
    view = memoryview(data)
    if disk.write_now([(offset, view)]):
        disk.publish()
    else:
        await disk.write(offset, view, False)


async def read(disk: Disk, offset: int, length: int) -> bytes:
    found = disk.read_now(offset, length)
    if found is not None:
        return bytes(found)
    return b"".join(bytes(part) for part in await disk.read(offset, length))


# -- a store that is slower than the guest ----------------------------------------------------------------------


@pytest.mark.parametrize("slots", ["many", "few"])
def test_a_guest_that_is_faster_than_the_store_slows_down_and_reads_do_not(
    tmp_path: Path, slots: str
) -> None:
    """Bytes count, or, where each 4 KiB takes a slot of a small cache, slots. No write waits long, none fails."""
    few = slots == "few"
    piece, rate = (SECTOR, 0.1 * MIB) if few else (BLOCK, 1.0 * MIB)

    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", lazy(max_dirty=4 * MIB))
        await read(disk, 0, BLOCK)
        await disk.writeback.checkpoint()
        store.bandwidth = rate
        longest = {"write": 0.0, "hit": 0.0, "miss": 0.0}
        written = dirtiest = 0
        after = trio.current_time() + SECONDS

        async def timed(what: str, do: Callable[..., Awaitable[Any]], *args: Any) -> None:
            before = trio.current_time()
            await do(*args)
            longest[what] = max(longest[what], trio.current_time() - before)

        async def writer() -> None:
            nonlocal written, dirtiest
            block = 0
            while trio.current_time() < after:
                block = block % 127 + 1
                await timed("write", write, disk, block * BLOCK, NEW * piece)
                written += piece
                dirtiest = max(dirtiest, disk.dirty_bytes)
                await trio.sleep(0.002)

        async def reader() -> None:
            block = 128
            while trio.current_time() < after:
                await timed("hit", read, disk, 0, SECTOR)
                await timed("miss", read, disk, block * BLOCK, SECTOR)
                block = 128 + (block + 1) % 128
                await trio.sleep(0.1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer)
            nursery.start_soon(reader)
        assert longest["write"] < 0.7
        assert longest["hit"] < 0.05
        assert longest["miss"] < 0.2
        assert dirtiest <= 4 * MIB
        if not few:  # there each pass overwrites what an earlier one has written
            assert 0.6 < written / SECONDS / rate < 1.6
        store.bandwidth = 1e9
        await disk.drain(nothing)
        assert store.visible[BLOCK : BLOCK + piece] == NEW * piece
        await check_cache(host.cache)

    play(tmp_path, story, cache=8 * MIB if few else 64 * MIB)


def test_nobody_is_slowed_down_while_little_is_dirty(tmp_path: Path) -> None:
    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", lazy(max_dirty=8 * MIB))
        await write(disk, 0, NEW * BLOCK)  # has to be announced
        store.bandwidth = 1.0
        before = trio.current_time()
        for block in range(1, 2 * MIB // BLOCK):
            assert disk.write_now([(block * BLOCK, memoryview(NEW * BLOCK))])
            disk.publish()
        assert trio.current_time() == before

    play(tmp_path, story)


def test_full_copies_and_overlays_are_not_slowed_down(tmp_path: Path) -> None:
    """Neither is written back by itself."""

    async def story(host: Host, store: Store) -> None:
        store.bandwidth = 0.0
        disk = await host.attach("d", settings(Mode.FULL_COPY, max_dirty=MIB))
        before = trio.current_time()
        for block in range(4 * MIB // BLOCK):
            await write(disk, block * BLOCK, NEW * BLOCK)
        assert trio.current_time() < before + 2
        await host.detach("d", discard=True)
        disk = await host.attach("o", lazy(max_dirty=MIB), overlay=True)
        for block in range(4 * MIB // BLOCK):
            await write(disk, block * BLOCK, NEW * BLOCK)
        assert trio.current_time() < before + 4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forebay.disk.disk.log.warning", lambda *_: None)
        play(tmp_path, story)


# -- at the limit -----------------------------------------------------------------------------------------------


@pytest.mark.expect_log("write-back failed|dropped as asked")
def test_a_full_store_is_told_at_the_limit_and_not_before(tmp_path: Path) -> None:
    async def story(host: Host, store: Store) -> None:
        store.error = OSError(errno.ENOSPC, "no space there")
        disk = await host.attach("d", lazy(max_dirty=2 * MIB, origin_timeout=1000.0))
        before = trio.current_time()
        for block in range(2 * MIB // BLOCK):
            await write(disk, block * BLOCK, NEW * BLOCK)
        with pytest.raises(OSError, match="no space there") as told:
            await write(disk, 8 * MIB, NEW * BLOCK)
        assert told.value.errno == errno.ENOSPC
        assert trio.current_time() < before + 60
        assert await read(disk, 0, SECTOR) == NEW * SECTOR
        assert await read(disk, 9 * MIB, SECTOR) == OLD * SECTOR
        assert disk.dirty_bytes == 2 * MIB
        store.error = None
        await trio.sleep(60)
        await write(disk, 8 * MIB, NEW * BLOCK)
        await disk.drain(nothing)
        assert store.durable[: 2 * MIB] == NEW * 2 * MIB

    play(tmp_path, story)


@pytest.mark.expect_log("write-back failed")
@pytest.mark.parametrize("heals", [True, False])
def test_a_broken_store_is_waited_for(tmp_path: Path, heals: bool) -> None:
    """As long as origin_timeout says."""

    async def story(host: Host, store: Store) -> None:
        store.error = OSError(errno.EIO, "broken there")
        disk = await host.attach("d", lazy(max_dirty=2 * MIB, origin_timeout=60.0))
        for block in range(2 * MIB // BLOCK):
            await write(disk, block * BLOCK, NEW * BLOCK)
        before = trio.current_time()

        async def heal() -> None:
            await trio.sleep(20)
            store.error = None

        async with trio.open_nursery() as nursery:
            if heals:
                nursery.start_soon(heal)
                await write(disk, 8 * MIB, NEW * BLOCK)
                assert 20 < trio.current_time() - before < 55
                return
            with pytest.raises(OSError, match="max_dirty is reached") as told:
                await write(disk, 8 * MIB, NEW * BLOCK)
            assert told.value.errno == errno.ENOSPC
            assert 59 < trio.current_time() - before < 63
        assert await read(disk, 0, SECTOR) == NEW * SECTOR

    play(tmp_path, story)


def test_a_slow_store_is_waited_for_as_long_as_it_moves(tmp_path: Path) -> None:
    """A pass takes longer than origin_timeout; the write that does not fit before its end is late, and no error."""

    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", lazy(max_dirty=8 * MIB, origin_timeout=5.0))
        store.bandwidth = 0.4 * MIB
        before = trio.current_time()
        await disk.write(0, memoryview(NEW * 8 * MIB), False)
        await write(disk, 8 * MIB, NEW * BLOCK)
        assert trio.current_time() - before > 8

    play(tmp_path, story)


# -- space ------------------------------------------------------------------------------------------------------


@pytest.mark.expect_log("write-back failed")
def test_a_cache_full_of_dirty_data_drains(tmp_path: Path) -> None:
    """Not one slot is free or can be evicted: write-back needs none."""

    async def story(host: Host, store: Store) -> None:
        store.error = OSError(errno.ENOSPC, "no space there")
        disk = await host.attach("d", lazy())
        await read(disk, 15 * MIB, MIB)
        wrote = 0
        with pytest.raises(OSError, match="the cache is full"):  # noqa: PT012
            while True:
                await write(disk, wrote * BLOCK, NEW * SECTOR)
                wrote += 1
        cache = host.cache
        assert wrote > cache.device.slots - 5
        assert cache.slots.spare() == 0
        assert await read(disk, 12 * MIB, SECTOR) == OLD * SECTOR  # past the cache
        store.error = None
        await disk.drain(nothing)
        assert not disk.dirty_bytes
        for block in range(wrote):
            at = block * BLOCK
            assert store.durable[at : at + BLOCK] == NEW * SECTOR + OLD * (BLOCK - SECTOR)
        await write(disk, 10 * MIB, NEW * BLOCK)
        await check_cache(cache)

    play(tmp_path, story, cache=4 * MIB)


def test_what_goes_past_a_full_cache_never_goes_below_what_is_private(tmp_path: Path) -> None:
    """There is room again just then, and another write to the same sector takes it: both are there in the end."""

    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", lazy())
        greedy = await host.attach("o", lazy(), overlay=True)
        with pytest.raises(OSError, match="the cache is full"):  # noqa: PT012
            for block in range(16 * MIB // BLOCK):
                await write(greedy, block * BLOCK, NEW * SECTOR)
        await write(disk, 0, NEW * SECTOR)
        assert (bytes(store.visible[:SECTOR]), disk.dirty_bytes) == (NEW * SECTOR, 0)
        past = PrivateOrOrigin._past

        async def meanwhile(policy: PrivateOrOrigin) -> OriginWrites:
            found = await past(policy)
            if "o" in host.disks:
                await host.detach("o", discard=True)
                while not host.cache.slots.placement.free:  # noqa: ASYNC110
                    await trio.sleep(0.1)
                await disk.write(100, memoryview(b"private"), False)
                assert disk.dirty_bytes
            return found

        with mock.patch.object(PrivateOrOrigin, "_past", meanwhile):
            await disk.write(2000, memoryview(b"past it"), False)
        assert "o" not in host.disks
        wanted = bytearray(NEW * SECTOR)
        wanted[100:107], wanted[2000:2007] = b"private", b"past it"
        assert await read(disk, 0, SECTOR) == wanted
        await disk.drain(nothing)
        assert store.durable[:SECTOR] == wanted
        await check_cache(host.cache)

    play(tmp_path, story, cache=4 * MIB)


def test_a_pass_has_its_data_made_durable_as_it_goes(tmp_path: Path) -> None:
    """Else its last flush takes longer than a flush may, where a store's host has much memory."""

    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", lazy())
        for block in range(12 * MIB // BLOCK):
            await write(disk, block * BLOCK, NEW * BLOCK)
        write_ranges = store.write_ranges
        most = 0

        async def noted(*args: Any, **options: Any) -> None:
            nonlocal most
            await write_ranges(*args, **options)
            most = max(most, sum(len(piece.data) for piece in store.pending))

        with (
            mock.patch.object(store, "write_ranges", noted),
            mock.patch("forebay.checkpoint.batches.SYNC_EVERY", MIB),
        ):
            await disk.drain(nothing)
        assert MIB <= most <= 6 * MIB

    play(tmp_path, story)


@pytest.mark.expect_log("cache device .* failed|is damaged")
@pytest.mark.parametrize("how", ["the medium fails", "the copy is lost"])
def test_a_copy_that_came_out_wrong_is_not_believed(tmp_path: Path, how: str) -> None:
    """After the image has the data, while it is copied to where the clean block lies.

    Lost: the kernel threw the copy away and said so to a sync; the device works again before the copy is noted.
    """

    async def story(host: Host, store: Store) -> None:
        del store
        disk = await host.attach("d", lazy())
        await read(disk, 0, BLOCK)
        await write(disk, 2 * SECTOR, NEW * 3 * SECTOR)
        module = import_module(
            "forebay_cache.blocks.settle"
        )  # the package has the function by that name
        copy = module._copy_sectors

        def spoil(cache: Cache, slots: list[int]) -> None:
            for slot in slots:
                cache.device.write(cache.device.at(slot, 3 * SECTOR), b"x" * SECTOR)

        def badly(cache: Cache, jobs: list[Any]) -> Any:
            spoil(cache, [job.source for job in jobs])
            return copy(cache, jobs)

        def lost(cache: Cache, jobs: list[Any]) -> Any:
            found = copy(cache, jobs)
            spoil(cache, [job.to for job in jobs])
            cache.failure.fail(OSError(errno.EIO, "injected"))
            cache.failure.error = None
            cache.ready.forget()
            return found

        wrong = badly if how == "the medium fails" else lost
        with mock.patch.object(module, "_copy_sectors", wrong):
            await disk.drain(nothing)
        wanted = OLD * 2 * SECTOR + NEW * 3 * SECTOR + OLD * (BLOCK - 5 * SECTOR)
        # The wrong one first: whoever reads beside it sees it, too.
        assert await read(disk, 3 * SECTOR, SECTOR) == NEW * SECTOR
        assert await read(disk, 0, BLOCK) == wanted

    play(tmp_path, story)


def test_a_pass_begins_where_the_journal_of_the_cache_is_full(tmp_path: Path) -> None:
    """The record of the new layer gets room first: guests' flushes, which write it, must not fail for it."""

    async def story(host: Host, store: Store) -> None:
        del store
        disk = await host.attach("d", lazy())
        await write(disk, 0, NEW * BLOCK)
        journal = host.cache.intent.journal
        while journal.fits(0):
            journal.append(b"")
        await disk.writeback.checkpoint()
        assert not disk.dirty_bytes

    play(tmp_path, story)


# -- what guests wait for goes first ----------------------------------------------------------------------------


@pytest.mark.parametrize("work", ["pass", "preload"])
def test_misses_go_first(tmp_path: Path, work: str) -> None:
    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", lazy())
        await disk.write(0, memoryview(NEW * MIB), False)
        landed = 0.0
        began: list[float] = []
        plain = store.read

        async def slowly(offset: int, length: int, background: bool | trio.Event = False) -> Buffer:
            nonlocal landed
            if background is not False:
                began.append(trio.current_time())
            else:
                await trio.sleep(0.04)
                landed = trio.current_time()
            return await plain(offset, length, background)

        with mock.patch.object(store, "read", slowly):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, disk, 9 * MIB, SECTOR)
                while not disk.image.filler.waiting:  # noqa: ASYNC110
                    await trio.sleep(0.0001)
                if work == "pass":
                    await disk.writeback.checkpoint()
                    began = store.began
                else:
                    await preload_range(disk.image, disk.counters, 8 * MIB, nothing)
        assert landed > 0
        assert min(began) >= landed

    play(tmp_path, story)


@pytest.mark.parametrize(
    ("served", "hurried", "least", "longest"),
    [(True, False, 3.0, 6.0), (True, True, 0.0, 1.5), (False, False, 0.0, 1.5)],
)
def test_a_pass_takes_its_time_while_guests_are_served(
    tmp_path: Path, served: bool, hurried: bool, least: float, longest: float
) -> None:
    """As much as `max_lag` leaves it; not when somebody waits for it, or nobody would notice."""

    async def story(host: Host, store: Store) -> None:
        del store
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=10.0))
        await read(disk, 15 * MIB, BLOCK)
        await disk.write(0, memoryview(NEW * 8 * MIB), False)
        began = trio.current_time()

        async def guest() -> None:
            while True:
                if served:
                    await read(disk, 15 * MIB, SECTOR)
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest)
            if hurried:
                await disk.drain(nothing)
            else:
                await disk.writeback.checkpoint()
            nursery.cancel_scope.cancel()
        assert least <= trio.current_time() - began <= longest

    play(tmp_path, story)


def test_the_first_reads_and_writes_after_a_freeze_wait_for_nothing(tmp_path: Path) -> None:
    async def story(host: Host, store: Store) -> None:
        del store
        disk = await host.attach("d", lazy())
        for page in range(2):
            await disk.write(page << PAGE_SHIFT, memoryview(NEW * BLOCK), False)
        disk.dirty.freeze()
        for page in range(2):
            at = page << PAGE_SHIFT
            assert disk.write_now([(at, memoryview(OLD * SECTOR))]) == 1
            disk.publish()
            assert bytes(disk.read_now(at, SECTOR) or b"") == OLD * SECTOR
            assert bytes(disk.read_now(at + SECTOR, SECTOR) or b"") == NEW * SECTOR

    play(tmp_path, story)


# -- lag --------------------------------------------------------------------------------------------------------


@pytest.mark.expect_log("write-back failed")
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_lag_is_right_while_the_store_stands_still(tmp_path: Path, end: str) -> None:
    """In seconds and in bytes, through failing passes and through a restart."""

    async def story(host: Host, store: Store) -> None:
        options = settings(Mode.WRITE_BACK, max_lag=4.0)
        disk = await host.attach("d", options)
        assert disk.status()["lag_seconds"] == disk.status()["lag_bytes"] == 0
        store.error = OSError(errno.EIO, "stopped")
        began = trio.current_time()
        await write(disk, 0, NEW * BLOCK)

        def check(size: int) -> None:
            told = disk.status()
            assert told["lag_bytes"] == told["dirty_bytes"] == size
            assert told["lag_seconds"] == pytest.approx(trio.current_time() - began, abs=0.1)

        check(BLOCK)
        await trio.sleep(30)  # passes have failed
        check(BLOCK)
        await write(disk, MIB, NEW * BLOCK)  # into the next layer
        check(2 * BLOCK)
        await trio.sleep(30)
        if end == "stop":
            await host.stop()
        else:
            await host.cache.commit()
            await host.kill(host.snapshot())
        await trio.sleep(60)  # nobody is there
        await host.start()
        dirty, age = left_dirty(host.cache, "d")
        assert dirty == 2 * BLOCK
        assert age == pytest.approx(trio.current_time() - began, abs=0.1)
        disk = await host.attach("d", options)
        check(2 * BLOCK)
        store.error = None
        await trio.sleep(40)
        assert disk.status()["lag_seconds"] == disk.status()["lag_bytes"] == 0
        await write(disk, MIB, NEW * BLOCK)
        began = trio.current_time()
        await trio.sleep(1)
        check(BLOCK)
        await host.cache.commit()
        await disk.drain(nothing)
        await host.cache.commit()
        assert host.cache.records.get("dirty", "d") is None

    play(tmp_path, story)


# -- disks that share an image ----------------------------------------------------------------------------------


def test_a_disk_that_goes_takes_nothing_from_the_others(tmp_path: Path) -> None:
    """Neither what is kept for them, nor their share of the cache."""

    async def story(host: Host, store: Store) -> None:
        del store
        first = await host.attach("a", settings(Mode.FULL_COPY), overlay=True)
        await host.attach("b", settings(Mode.FULL_COPY), overlay=True)
        await host.attach("c", settings(Mode.WRITE_BACK, cache_size=4 * BLOCK), overlay=True)
        layer = first.image.layer
        await trio.sleep(20)
        assert layer.slots * BLOCK == 16 * MIB
        assert layer.cap == 0
        await host.detach("a", discard=True)
        assert (layer.pinned, host.cache.slots.placement.evictable()) == (True, 0)
        await host.detach("b", discard=True)
        assert (layer.pinned, host.cache.slots.placement.evictable()) == (False, layer.slots)
        assert layer.cap == 4
        await check_cache(host.cache)

    play(tmp_path, story)


def test_a_full_copy_that_is_not_allowed_so_much_is_refused(tmp_path: Path) -> None:
    async def story(host: Host, store: Store) -> None:
        del store
        with pytest.raises(ForebayError, match="leave cache_size out"):
            await host.attach("d", settings(Mode.FULL_COPY, cache_size=MIB), resumed=False)
        disk = await host.attach("d", settings(Mode.WRITE_BACK, cache_size=MIB))
        with pytest.raises(ForebayError, match="leave cache_size out"):
            await disk.set_mode(Mode.FULL_COPY, nothing)
        assert disk.mode is Mode.WRITE_BACK

    play(tmp_path, story)
