# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a change of settings does to a disk that is in use: each limit holds from then on, for those who wait, too."""

import errno
from pathlib import Path

import pytest
import trio

from forebay.disk.disk import Disk
from forebay.units import Mode
from forebay_cache.format.geometry import BLOCK, SECTOR
from sim.fake_host import Host, nothing, settings
from sim.test_write_back import MIB, NEW, Store, lazy, play, read, write


def adopt(disk: Disk, **changes: object) -> None:
    disk.adopt(disk.settings.model_copy(update=changes))


def test_a_shorter_lag_holds_for_what_is_dirty_already(tmp_path: Path) -> None:
    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", lazy())
        await write(disk, 0, NEW * BLOCK)
        await trio.sleep(100)
        assert disk.dirty_bytes == BLOCK
        adopt(disk, max_lag=10.0)
        await trio.sleep(5)
        assert disk.dirty_bytes == 0
        assert store.durable[:BLOCK] == NEW * BLOCK
        assert disk.status()["max_lag_seconds"] == 10

    play(tmp_path, story)


def test_a_pass_that_takes_its_time_hurries_when_the_lag_is_to_be_shorter(tmp_path: Path) -> None:
    async def story(host: Host, _: Store) -> None:
        disk = await host.attach("d", lazy(max_lag=2000.0))
        await read(disk, 15 * MIB, SECTOR)
        for block in range(8 * MIB // BLOCK):
            await write(disk, block * BLOCK, NEW * BLOCK)

        async def guest() -> None:
            while True:
                await read(disk, 15 * MIB, SECTOR)
                await trio.sleep(0.04)

        async with trio.open_nursery() as nursery:
            await trio.sleep(999)
            nursery.start_soon(guest)
            await trio.sleep(30)
            assert disk.dirty_bytes > 0, "it is spread over hundreds of seconds"
            adopt(disk, max_lag=2.0)
            await trio.sleep(5)
            assert disk.dirty_bytes == 0
            nursery.cancel_scope.cancel()

    play(tmp_path, story)


@pytest.mark.expect_log("write-back failed|dropped as asked")
def test_a_write_that_waits_for_room_is_let_in_when_more_may_be_dirty(tmp_path: Path) -> None:
    async def story(host: Host, store: Store) -> None:
        store.error = OSError(errno.EIO, "broken there")
        disk = await host.attach("d", lazy(max_dirty=2 * MIB, origin_timeout=600.0))
        for block in range(2 * MIB // BLOCK):
            await write(disk, block * BLOCK, NEW * BLOCK)
        before = trio.current_time()

        async def more() -> None:
            await trio.sleep(20)
            adopt(disk, max_dirty=4 * MIB)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(more)
            await write(disk, 8 * MIB, NEW * BLOCK)
        assert 20 <= trio.current_time() - before < 23
        adopt(disk, max_dirty=1 * MIB)
        with trio.move_on_after(50) as waits:
            await write(disk, 9 * MIB, NEW * BLOCK)
        assert waits.cancelled_caught, "no more than that from now on"
        assert await read(disk, 8 * MIB, SECTOR) == NEW * SECTOR
        store.error = None
        await disk.drain(nothing)
        assert store.durable[: 2 * MIB] == NEW * 2 * MIB

    play(tmp_path, story)


def test_disks_on_one_image_wait_for_it_as_long_as_the_most_patient(tmp_path: Path) -> None:
    async def story(host: Host, store: Store) -> None:
        through = settings(Mode.WRITE_THROUGH)
        one = await host.attach("a", through, overlay=True)
        two = await host.attach("b", through, overlay=True)
        adopt(one, origin_timeout=7.0)
        assert store.timeout == 7
        adopt(two, origin_timeout=9.0)
        adopt(one, origin_timeout=1.0)
        assert store.timeout == 9
        await host.detach("b", discard=True)
        assert store.timeout == 1

    play(tmp_path, story)


def test_the_cap_of_a_disk_holds_at_once(tmp_path: Path) -> None:
    async def story(host: Host, _: Store) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        assert disk.image.layer.cap == 0
        adopt(disk, cache_size=4 * BLOCK + 1)
        assert disk.image.layer.cap == 5
        for block in range(16):
            await read(disk, block * BLOCK, BLOCK)
        assert disk.image.layer.slots <= 5
        adopt(disk, cache_size=0)
        assert disk.image.layer.cap == 0

    play(tmp_path, story)


@pytest.mark.expect_log("write-back failed|dropped as asked")
def test_a_smaller_limit_holds_for_a_disk_with_little_that_is_dirty(tmp_path: Path) -> None:
    """Where little is dirty nobody looks at the limit: what little is has to follow."""

    async def story(host: Host, store: Store) -> None:
        store.error = OSError(errno.EIO, "broken there")
        disk = await host.attach("d", lazy(max_dirty=16 * MIB, origin_timeout=600.0))
        adopt(disk, max_dirty=2 * BLOCK)
        await write(disk, 0, NEW * BLOCK)
        await write(disk, BLOCK, NEW * BLOCK)
        with trio.move_on_after(50) as waits:
            await write(disk, 2 * BLOCK, NEW * BLOCK)
        assert waits.cancelled_caught
        store.error = None
        await disk.drain(nothing)

    play(tmp_path, story)
