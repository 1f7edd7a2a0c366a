# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Room in the intent journal: whatever is noted has room or waits, and every commit makes some."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from forebay.units import Mode
from forebay_cache import invalidate, mark_hot
from forebay_cache.durable.journal import JournalFull
from forebay_cache.format.geometry import BLOCK
from forebay_cache.format.records import LayerName
from sim.fake_host import Host, check_cache, settings
from sim.test_data_safety import NEW, OLD, FailingEnvironment, play, read

pytestmark = pytest.mark.expect_log("index commit failed|write-back failed|injected")


def failing(host: Host) -> FailingEnvironment:
    """The index of the host takes nothing from now on, until ``fails`` of what is returned is emptied."""
    env = host.cache.index._env = cast("Any", FailingEnvironment(host.cache.index._env))
    env.fails = {True}
    return cast("FailingEnvironment", env)


def overfill(host: Host) -> None:
    """Note more than the journal has room for, as very many new layers do."""
    journal = host.cache.intent.journal
    for n in range(journal.size // 100 + 1):
        host.cache.layers.make(LayerName.of_image(f"{'x' * 100}{n}"))
    assert not journal.fits(host.cache.intent._ops_bytes)


def test_a_journal_that_is_too_full_gets_room_from_the_next_commit(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.write(0, memoryview(NEW), True)
        env = failing(host)
        overfill(host)
        with pytest.raises(JournalFull):
            host.cache.intent.publish()
        assert not disk.flush_now()
        with pytest.raises(OSError, match="injected"):
            await disk.flush()
        with pytest.raises(OSError, match="injected"):
            await host.cache.commit()
        env.fails = set()
        await disk.flush()  # at once: it need not wait for anybody's commit
        assert host.cache.intent.journal.used == 0
        assert not host.cache.intent.has_changes()
        await disk.write(BLOCK, memoryview(NEW), True)
        await host.kill(host.snapshot())
        await host.start()
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        assert await read(disk, 0, 3 * BLOCK) == NEW + NEW + OLD
        await check_cache(host.cache)

    play(tmp_path, story)


def test_records_that_had_no_room_come_before_later_ones(tmp_path: Path) -> None:
    """A write must not be answered whose layer is not on record."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        env = failing(host)
        overfill(host)
        with pytest.raises(OSError, match="injected"):
            await host.cache.commit()
        assert disk.write_now([(0, memoryview(NEW))]) == 0
        with pytest.raises(OSError, match="injected"):
            await disk.write(0, memoryview(NEW), False)
        env.fails = set()
        await disk.write(0, memoryview(NEW), False)
        await host.kill(host.snapshot())
        await host.start()
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        assert await read(disk) == NEW

    play(tmp_path, story)


async def _hot(host: Host, length: int) -> None:
    image = host.disks["d"].image
    await mark_hot(host.cache, image.layer, 0, length)


async def _invalidated(host: Host, length: int) -> None:
    image = host.disks["d"].image
    await invalidate(host.cache, image.layer, 0, length)


@pytest.mark.parametrize(("do", "length"), [(_hot, 1 << 40), (_invalidated, 1 << 31)])
def test_what_is_announced_waits_for_room(
    tmp_path: Path, do: Callable[[Host, int], Awaitable[None]], length: int
) -> None:
    """However much it is: while the index takes nothing it fails, and leaves room for what others note."""

    async def story(host: Host) -> None:
        await host.attach("d", settings(Mode.WRITE_THROUGH))
        await host.cache.commit()
        env = failing(host)
        with pytest.raises(OSError, match="injected"):
            await do(host, length)
        intent = host.cache.intent
        intent.publish()
        assert intent.journal.fits(intent.journal.size // 128)
        env.fails = set()
        await do(host, length)
        await host.cache.sync()
        await trio.sleep(5)
        assert intent.journal.used == 0

    play(tmp_path, story)
