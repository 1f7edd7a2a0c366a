# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Floods over several images and disks: what waits in the cache for storage is bounded, for all of them together."""

import contextlib
from pathlib import Path

import pytest
import trio
import trio.testing

import forebay_cache.read.fill
from forebay.units import Mode
from forebay_cache import UNSTORED, Filler, open_cache
from forebay_cache.format.geometry import BLOCK, Buffer
from forebay_cache.format.records import LayerName
from forebay_cache.read.fill import CHUNK
from sim.fake_host import Host, settings
from sim.test_data_safety import NEW, play
from sim.test_journal_room import failing

IMAGES = 4


class Origin:
    size = UNSTORED

    async def read(self, offset: int, length: int, background: bool | trio.Event = False) -> Buffer:
        del offset, background
        await trio.lowlevel.checkpoint()
        return bytes(length)


class Tally:
    origin_read_bytes = 0

    def note_origin_read(self, seconds: float) -> None:
        assert seconds >= 0


async def test_what_was_fetched_and_not_stored_yet_has_one_budget_for_all_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device takes nothing. Everybody is served all the same, and no more is kept than there is room for."""
    cache = open_cache(tmp_path / "cache", tmp_path / "index", size=64 << 20, block_size=65536)
    taken = trio.Event()

    async def hangs(*_: object) -> None:
        await taken.wait()

    monkeypatch.setattr(forebay_cache.read.fill, "store", hangs)
    served = 0

    async def guest(filler: Filler, offset: int) -> None:
        nonlocal served
        data = await filler.fetch(offset, CHUNK, Tally())
        served += len(data)
        assert cache.in_flight.unstored <= UNSTORED + CHUNK

    async with trio.open_nursery() as nursery:
        for n in range(IMAGES):
            layer = cache.layers.make(LayerName.of_image(f"i{n}"))
            filler = Filler(cache, layer, Origin(), nursery)
            for offset in range(0, UNSTORED, CHUNK):
                nursery.start_soon(guest, filler, offset)
        await trio.testing.wait_all_tasks_blocked()
        assert served == IMAGES * UNSTORED
        assert UNSTORED <= cache.in_flight.unstored <= UNSTORED + CHUNK
        taken.set()
    assert cache.in_flight.unstored == 0
    cache.release()


async def test_a_small_part_of_what_was_fetched_does_not_keep_all_of_it(tmp_path: Path) -> None:
    """A reply that a client does not take counts as what it is, not as the megabyte that it came with."""
    cache = open_cache(tmp_path / "cache", tmp_path / "index", size=16 << 20, block_size=65536)
    async with trio.open_nursery() as nursery:
        layer = cache.layers.make(LayerName.of_image("i"))
        filler = Filler(cache, layer, Origin(), nursery)
        small = memoryview(await filler.fetch(0, 4096, Tally()))
        whole = memoryview(await filler.fetch(CHUNK, CHUNK, Tally()))
    assert len(memoryview(small.obj)) == 4096
    assert len(memoryview(whole.obj)) == CHUNK
    cache.release()


@pytest.mark.expect_log("index commit failed|write-back failed|injected")
def test_records_that_wait_for_the_index_have_one_budget_for_all_disks(tmp_path: Path) -> None:
    """The index takes nothing: writes go on until the journal is full, and then wait, or hear of it."""

    async def story(host: Host) -> None:
        disks = [
            await host.attach(name, settings(Mode.WRITE_BACK, max_lag=1000.0), overlay=True)
            for name in ("d", "e", "f")
        ]
        env = failing(host)
        intent = host.cache.intent
        refused = 0
        for n in range(100_000):
            disk = disks[n % len(disks)]
            at = n % (disk.size // BLOCK) * BLOCK
            refused += not disk.write_now([(at, memoryview(NEW))])
            assert intent.noted_bytes <= intent.journal.size
            if n % 200 == 0:
                with contextlib.suppress(OSError):
                    disk.publish()
            if refused == len(disks):
                break
        assert refused == len(disks), "it never ends"
        assert intent.noted_bytes
        env.fails = set()

    play(tmp_path, story)
