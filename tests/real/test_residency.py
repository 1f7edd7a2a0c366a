# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What was checked once is believed only while it is in memory: read from the device again, it is checked again."""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest
import trio

from forebay_cache import Cache, View, open_cache
from forebay_cache.blocks import private
from forebay_cache.format.entry import slot_of
from forebay_cache.format.geometry import BLOCK, SECTOR
from forebay_cache.format.records import LayerName
from forebay_cache.layers.layer import Layer
from forebay_cache.slots.ready import RESIDENCY_SECONDS
from forebay_cache.upkeep.revive import revive


async def _nowhere(offset: int, length: int) -> bytes:
    raise AssertionError(f"{length} bytes at {offset} are not in the cache")


def _made(path: Path) -> tuple[Cache, Layer, View]:
    """A cache with eight blocks of private data, which are ready."""
    cache = open_cache(path, path.with_name("index"), size=8 << 20)
    layer = cache.layers.make(LayerName.of_disk("d", 1, "i"))
    layer.pages.adopt(0, None)
    assert private.write(cache, layer, 0, memoryview(b"d" * 8 * BLOCK))
    cache.intent.publish()
    return cache, layer, View(cache, [layer], None, _nowhere)


def _forgotten_by_the_kernel(cache: Cache, *damaged: int) -> None:
    """Nothing of the device is in memory any more, and some bytes of it are others."""
    for at in damaged:
        os.pwrite(cache.device.fd, b"x", at)
    os.fsync(cache.device.fd)
    os.posix_fadvise(cache.device.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
    os.pread(cache.device.fd, 1, cache.device.at(cache.device.slots - 1))
    os.pread(cache.device.fd, 1, 0)
    if resource.getrusage(resource.RUSAGE_THREAD).ru_inblock == before:
        pytest.skip("its file system is one in memory")


def _slot(layer: Layer, block: int) -> int:
    return slot_of(layer.pages.page(0)[block])


@pytest.mark.expect_log("is damaged")
async def test_what_had_to_be_read_from_the_device_is_checked(tmp_path: Path) -> None:
    cache, layer, view = _made(tmp_path / "device")
    assert await view.read(0, 2 * BLOCK) == [b"d" * BLOCK] * 2
    _forgotten_by_the_kernel(cache, cache.device.at(_slot(layer, 1), 5 * SECTOR))
    assert await view.read(0, BLOCK) == [b"d" * BLOCK]
    with pytest.raises(OSError, match="damaged"):
        await view.read(0, 2 * BLOCK)
    cache.release()


@pytest.mark.expect_log("is damaged|cache device .* failed")
@pytest.mark.parametrize("came_back", [False, True])
async def test_the_kernel_reads_nothing_ahead(tmp_path: Path, came_back: bool) -> None:
    """It would be in memory then, and nobody would know that it had gone from there."""
    path = tmp_path / "device"
    cache, layer, view = _made(path)
    if came_back:  # as another file, so with another descriptor
        shutil.copy(path, tmp_path / "copy")
        (tmp_path / "copy").rename(path)
        cache.failure.fail(OSError(errno.EIO, "injected"))
        await revive(cache)
        assert await view.read(0, 8 * BLOCK)
    damaged = range(2, 8)
    _forgotten_by_the_kernel(cache, *(cache.device.at(_slot(layer, n), SECTOR) for n in damaged))
    for block in (0, 1):
        assert await view.read(block * BLOCK, BLOCK) == [b"d" * BLOCK]
    for block in damaged:
        with pytest.raises(OSError, match="damaged"):
            await view.read(block * BLOCK, BLOCK)
    cache.release()


async def test_after_a_fault_of_the_map_everything_is_checked(tmp_path: Path) -> None:
    cache, layer, view = _made(tmp_path / "device")
    async with trio.open_nursery() as nursery:
        await nursery.start(cache.run)
        await trio.sleep(2 * RESIDENCY_SECONDS)
        _forgotten_by_the_kernel(cache, cache.device.at(_slot(layer, 1), 5 * SECTOR))
        assert all(cache.ready.masks[_slot(layer, block)] for block in (0, 1))
        found = view.read_now(0, SECTOR)
        assert found is not None
        assert bytes(found) == b"d" * SECTOR
        with trio.fail_after(30):
            while any(cache.ready.masks[_slot(layer, block)] for block in (0, 1)):  # noqa: ASYNC110  (nobody tells)
                await trio.sleep(RESIDENCY_SECONDS)
        nursery.cancel_scope.cancel()
    cache.release()
