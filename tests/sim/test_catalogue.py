# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Pins and purges on the simulated host: killed, or cut off from power, before, in and after their commit."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from forebay.boot.boots import Boots
from forebay.boot.files import TraceFiles
from forebay.catalogue.catalogue import Catalogue
from forebay.config.model import Config
from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay.units import Mode
from forebay_cache import Layer
from forebay_cache.format.geometry import BLOCK
from sim.fake_host import Host, check_cache, settings
from sim.fake_loop import Dice, simulated
from sim.fake_origin import FakeOrigin

BLOCKS = 12
SIZE = BLOCKS * BLOCK
KEY = "images:fake.raw"
WHEN = ("before the commit", "after the commit", "at the end")


def play(directory: Path, story: Callable[[Host], Awaitable[None]]) -> None:
    """Tell a story on a host whose image is all data. Everything in it follows from one seed."""
    dice = Dice("story")

    async def live() -> None:
        async with trio.open_nursery() as nursery:
            host = Host(directory, FakeOrigin(dice, b"o" * SIZE), nursery)
            await host.start()
            await story(host)
            await host._end()
            host.cache.release()

    with simulated(dice):
        trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0))


def catalogue_of(host: Host, disks: dict[str, str] | None = None) -> Catalogue:
    """A catalogue over the present life of the host; `disks` are on record, by the keys of their images."""
    config = Config.model_validate({"stores": {"images": {"path": "/images"}}})
    nobody = cast("Any", None)
    boots = Boots(TraceFiles(host.directory, host.cache.uuid), nobody, nobody)
    return Catalogue(
        config, host.cache, host.images, host.directory, nobody, nobody, lambda: disks or {}, boots
    )


async def warm(host: Host) -> Catalogue:
    """The image read as a whole by a disk that is gone again, durably; the catalogue that noted it."""
    catalogue = catalogue_of(host)
    disk = await host.attach("d", settings(Mode.WRITE_THROUGH), overlay=True)
    await read(disk)
    while host.cache.in_flight.is_filling:  # noqa: ASYNC110
        await trio.sleep(0.01)
    await host.detach("d", discard=True)
    return catalogue


async def read(disk: Disk) -> bytes:
    return b"".join(bytes(part) for part in await disk.read(0, SIZE))


async def killed_in(
    host: Host, work: Callable[[], Awaitable[object]], when: str, boot: str
) -> Catalogue:
    """Do it, kill the host (or, in another boot, cut its power) when `when` says, and start anew."""
    commit = host.cache.commit
    records, left = commit.records, []

    async def observed() -> None:
        left.append(host.snapshot())
        await records()
        left.append(host.snapshot())

    commit.records = observed  # type: ignore[method-assign]
    await work()
    left.append(host.snapshot())
    await host.kill(left[WHEN.index(when)])
    await host.start(boot=boot)
    catalogue = catalogue_of(host)
    await catalogue._settle_pins()
    return catalogue


def layer_of(host: Host) -> Layer | None:
    return host.cache.layers.clean_of(KEY)


async def evict_all(host: Host) -> int:
    """Have the cache evict whatever it may; how many blocks that were."""
    while host.cache.slots.scan is not None:  # noqa: ASYNC110
        await trio.sleep(0.01)
    await host.cache.evictor.evict(host.cache.slots.placement.victims(host.cache.device.slots))
    return host.cache.slots.evicted_blocks


@pytest.mark.parametrize("boot", ["first", "second"])
@pytest.mark.parametrize("when", WHEN)
def test_a_pin_is_there_as_a_whole_or_not_at_all(tmp_path: Path, when: str, boot: str) -> None:
    async def story(host: Host) -> None:
        catalogue = await warm(host)
        catalogue = await killed_in(host, lambda: catalogue.pin(KEY), when, boot)
        layer = layer_of(host)
        assert layer is not None
        assert layer.pinned is catalogue.entries.is_pinned(KEY) is (when != WHEN[0])
        assert layer.slots == BLOCKS
        assert await evict_all(host) == (0 if layer.pinned else BLOCKS)
        await check_cache(host.cache)

    play(tmp_path, story)


@pytest.mark.parametrize("boot", ["first", "second"])
@pytest.mark.parametrize("when", WHEN)
def test_an_unpin_is_there_as_a_whole_or_not_at_all(tmp_path: Path, when: str, boot: str) -> None:
    async def story(host: Host) -> None:
        catalogue = await warm(host)
        await catalogue.pin(KEY)
        catalogue = await killed_in(host, lambda: catalogue.unpin(KEY), when, boot)
        layer = layer_of(host)
        assert layer is not None
        assert layer.pinned is catalogue.entries.is_pinned(KEY) is (when == WHEN[0])
        assert await evict_all(host) == (0 if layer.pinned else BLOCKS)
        await check_cache(host.cache)

    play(tmp_path, story)


@pytest.mark.parametrize("boot", ["first", "second"])
@pytest.mark.parametrize("when", WHEN)
def test_a_purge_leaves_all_or_nothing_and_the_next_disk_reads_what_is_there(
    tmp_path: Path, when: str, boot: str
) -> None:
    async def story(host: Host) -> None:
        catalogue = await warm(host)

        async def purge() -> None:
            await catalogue.purge([KEY], tag=None, older_than=None, dry_run=False)

        await killed_in(host, purge, when, boot)
        layer = layer_of(host)
        assert (layer.slots if layer is not None else 0) == (BLOCKS if when == WHEN[0] else 0)
        disk = await host.attach("e", settings(Mode.WRITE_THROUGH), overlay=True, resumed=False)
        assert await read(disk) == bytes(host.origin.visible)
        assert disk.counters.origin_read_bytes == (0 if when == WHEN[0] else SIZE)
        await check_cache(host.cache)

    play(tmp_path, story)


@pytest.mark.expect_log("replaced by another file")
def test_a_pin_holds_for_the_image_that_comes_under_that_name(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        catalogue = await warm(host)
        await catalogue.pin(KEY)
        host.origin.inode += 1
        host.origin.visible[:] = b"n" * SIZE
        disk = await host.attach("e", settings(Mode.WRITE_THROUGH), overlay=True, resumed=False)
        assert await read(disk) == b"n" * SIZE
        while host.cache.in_flight.is_filling or any(x.is_dead for x in host.cache.layers):  # noqa: ASYNC110
            await trio.sleep(0.01)
        layer = layer_of(host)
        assert layer is not None
        assert (layer.pinned, layer.slots) == (True, BLOCKS)
        assert await evict_all(host) == 0

    play(tmp_path, story)


def test_the_end_of_a_full_copy_leaves_a_pin_and_the_end_of_a_pin_a_full_copy(
    tmp_path: Path,
) -> None:
    async def story(host: Host) -> None:
        catalogue = await warm(host)
        disk = await host.attach("e", settings(Mode.FULL_COPY))
        while disk.status()["copied"] != 1.0:  # noqa: ASYNC110
            await trio.sleep(0.1)
        await catalogue.pin(KEY)
        await catalogue.unpin(KEY)
        assert await evict_all(host) == 0
        await catalogue.pin(KEY)
        await host.detach("e", discard=True)
        assert await evict_all(host) == 0
        await catalogue.unpin(KEY)
        assert await evict_all(host) == BLOCKS

    play(tmp_path, story)


def test_what_a_disk_is_on_is_not_purged_while_it_is_read(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        await warm(host)
        catalogue = catalogue_of(host, {"e": KEY})
        disk = await host.attach("e", settings(Mode.WRITE_THROUGH), overlay=True)
        found = await catalogue.purge([KEY], tag=None, older_than=None, dry_run=False)
        assert found["kept"] == [{"image": KEY, "why": "in use by e"}]
        assert await read(disk) == bytes(host.origin.visible)
        assert disk.counters.origin_read_bytes == 0
        with pytest.raises(ForebayError, match="say which images are to go"):
            await catalogue.purge(None, tag=None, older_than=None, dry_run=False)

    play(tmp_path, story)
