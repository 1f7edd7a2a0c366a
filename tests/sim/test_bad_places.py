# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An origin of which some places cannot be read: requests that touch one fail, all others do not notice."""

import errno
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from forebay.disk.copy import LONG, RETRY_SECONDS, STEP, preload_range
from forebay.disk.disk import Disk
from forebay.units import Mode
from forebay_cache.format.geometry import BLOCK, SECTOR
from forebay_cache.read.fill import CHUNK
from forebay_cache.read.salvage import MOST_READS
from sim.fake_host import Host, nothing, settings
from sim.fake_loop import Dice, simulated
from sim.fake_origin import Buffer, FakeOrigin

MIB = 1 << 20
Bad = list[tuple[int, int]]
"""(offset, length) of what cannot be read, in bytes."""


class Store(FakeOrigin):
    """Reads fail that touch a bad place."""

    def __init__(self, dice: Dice, content: bytes, bad: Bad) -> None:
        super().__init__(dice, content, scale=0.01)
        self.allocated[:] = b"\1" * len(self.allocated)
        self.bad = bad
        self.error = errno.EIO
        self.reads: list[tuple[int, int]] = []
        self.slow = 0.0

    async def read(self, offset: int, length: int, background: bool | trio.Event = False) -> Buffer:
        self.reads.append((offset, length))
        await trio.sleep(self.slow)
        if touches(self.bad, offset, length):
            raise OSError(self.error, "a bad place")
        return await super().read(offset, length)


def touches(bad: Bad, offset: int, length: int) -> bool:
    return any(start < offset + length and offset < start + part for start, part in bad)


def play(
    directory: Path,
    bad: Bad,
    story: Callable[[Host, Store], Awaitable[None]],
    *,
    size: int = 4 * MIB,
    cache: int = 16 * MIB,
) -> None:
    """Tell a story on a host with such an image."""
    dice = Dice("bad places")

    async def live() -> None:
        async with trio.open_nursery() as nursery:
            store = Store(
                dice, dice.random.randbytes(1 << 16) * (size >> 16) + b"e" * (size % BLOCK), bad
            )
            host = Host(directory, store, nursery, cache)
            await host.start()
            await story(host, store)
            await host._end()
            host.cache.release()

    with simulated(dice):
        trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0))


async def read(disk: Disk, offset: int, length: int) -> bytes:
    found = disk.read_now(offset, length)
    if found is not None:
        return bytes(found)
    return b"".join(bytes(part) for part in await disk.read(offset, length))


async def failing(disk: Disk, store: Store, step: int) -> list[int]:
    """The offsets at which reads of `step` bytes, in order over the whole image, fail; the others are right."""
    failed = []
    for offset in range(0, store.size, step):
        length = min(step, store.size - offset)
        try:
            assert await read(disk, offset, length) == store.visible[offset : offset + length]
        except OSError:
            failed.append(offset)
    return failed


SIZE = MIB
ODD = MIB + 3 * SECTOR + 1536
"""Bytes of an image that ends inside a sector."""
PLACES: dict[str, tuple[Bad, int]] = {
    "one odd sector of 512 bytes": ([(0xF8200, 512)], SIZE),
    "the first and the last sector": ([(0, 512), (SIZE - 512, 512)], SIZE),
    "several of one block, and across two": (
        [(0x40200, 512), (0x43000, 1024), (0x4FE00, 1024)],
        SIZE,
    ),
    "the end of an image of odd size": ([(ODD - 512, 512)], ODD),
    "just before the end of such an image": ([(ODD - 1536 - 512, 512)], ODD),
    "far apart": ([(n << 17 | 0x4600, 512) for n in range(8)], ODD),
}
DISKS = [
    (Mode.NONE, False),
    (Mode.WRITE_THROUGH, False),
    (Mode.WRITE_BACK, False),
    (Mode.WRITE_THROUGH, True),
]
"""(mode, whether it is an overlay)."""


@pytest.mark.parametrize(("mode", "overlay"), DISKS)
@pytest.mark.parametrize("place", PLACES)
def test_only_requests_that_touch_a_bad_place_fail(
    tmp_path: Path, place: str, mode: Mode, overlay: bool
) -> None:
    bad, size = PLACES[place]

    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", settings(mode), overlay=overlay)
        for step in (1536, SECTOR, BLOCK, 3 * BLOCK):
            wanted = [at for at in range(0, size, step) if touches(bad, at, step)]
            assert await failing(disk, store, step) == wanted, step
            await trio.sleep(100)  # a block that has failed is tried as a whole again

    play(tmp_path, bad, story, size=size)


@pytest.mark.parametrize("length", [BLOCK, 3 * MIB])
def test_a_bad_place_under_what_the_guest_has_written_is_not_touched(
    tmp_path: Path, length: int
) -> None:
    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK))
        await disk.write(0x28000, memoryview(b"n" * SECTOR), False)
        wanted = bytearray(store.visible)
        wanted[0x28000:0x29000] = b"n" * SECTOR
        assert await read(disk, 0x20000, length) == wanted[0x20000 : 0x20000 + length]

    play(tmp_path, [(0x28200, 512)], story)


def test_what_can_be_read_of_a_bad_block_is_cached(tmp_path: Path) -> None:
    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        await failing(disk, store, SECTOR)
        await trio.sleep(1)
        store.reads.clear()
        assert await failing(disk, store, SECTOR) == [0x2F8000]
        assert store.reads == [(0x2F8000, SECTOR)]

    play(tmp_path, [(0x2F8200, 512)], story)


def test_a_block_that_has_failed_is_tried_as_a_whole_when_it_was_written(tmp_path: Path) -> None:
    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_AROUND))
        with pytest.raises(OSError, match="bad place"):
            await read(disk, 0x2F8000, SECTOR)
        store.bad.clear()
        await disk.write(0x2F8000, memoryview(b"n" * SECTOR), False)
        store.reads.clear()
        await read(disk, 0x2F0000, SECTOR)
        assert store.reads == [(0x2F0000, BLOCK)]

    play(tmp_path, [(0x2F8200, 512)], story)


def test_read_ahead_fails_in_silence_and_who_joined_it_reads_for_himself(tmp_path: Path) -> None:
    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        store.slow = 0.1
        got: list[int] = []

        async def guest(offset: int) -> None:
            assert await read(disk, offset, SECTOR) == store.visible[offset : offset + SECTOR]
            got.append(offset)

        disk.image.filler.ahead(MIB, MIB, disk.counters)
        await trio.sleep(0.05)
        async with trio.open_nursery() as nursery:
            for n in range(16):
                nursery.start_soon(guest, MIB + n * BLOCK + SECTOR)
        assert len(got) == 16
        assert len(store.reads) < 1 + 2 * 16, store.reads

    play(tmp_path, [(MIB + 5 * BLOCK, 512)], story)


@pytest.mark.parametrize("guests", [1, 20])
def test_a_store_that_hangs_is_not_asked_piece_by_piece(tmp_path: Path, guests: int) -> None:
    """Of what guests wait for, each block is asked for once; once more where a read-ahead had the first try."""

    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        store.slow, store.error = 5.0, errno.ETIMEDOUT
        errors: list[int | None] = []

        async def guest(offset: int) -> None:
            try:
                await read(disk, offset, 512)
            except OSError as error:
                errors.append(error.errno)

        for first in (0, MIB):
            store.reads.clear()
            if first:
                disk.image.filler.ahead(first, MIB, disk.counters)
                await trio.sleep(1)
            async with trio.open_nursery() as nursery:
                for n in range(guests):
                    nursery.start_soon(guest, first + n * 512)
            assert len(store.reads) == (2 if first else 1)
        assert errors == [errno.ETIMEDOUT] * 2 * guests

    play(tmp_path, [(0, 4 * MIB)], story)


# -- copies and preload ---------------------------------------------------------------------------------------------


def sectors_of(bad: Bad, size: int) -> int:
    """Bytes of the sectors that touch a bad place."""
    found = {n for n in range(-(-size // SECTOR)) if touches(bad, n * SECTOR, SECTOR)}
    return sum(min(SECTOR, size - n * SECTOR) for n in found)


@pytest.mark.parametrize("place", PLACES)
def test_a_full_copy_goes_past_what_cannot_be_read(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    expect_log: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    expect_log("copying paused")
    most = 4 * RETRY_SECONDS
    monkeypatch.setattr("forebay.disk.copy.RETRY_MOST", most)
    bad, size = list(PLACES[place][0]), PLACES[place][1]
    lost = sectors_of(bad, size)

    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", settings(Mode.FULL_COPY))
        await trio.sleep(4)
        told = disk.status()
        assert told["state"] == "incomplete"
        assert told["unreadable_bytes"] == lost
        assert f"{lost} bytes of {disk.image.key} could not be read" in told["reason"]
        assert f"the first at {min(bad)[0] // SECTOR * SECTOR}:" in told["reason"]
        assert 0.9 < told["copied"] < 1
        assert len(store.reads) < 4 * MOST_READS
        store.reads.clear()
        assert await failing(disk, store, SECTOR) == [
            at for at in range(0, size, SECTOR) if touches(bad, at, SECTOR)
        ]
        assert all(touches(bad, *part) for part in store.reads), "all else is there"
        await trio.sleep(2 * most)
        store.reads.clear()
        await trio.sleep(2 * most)
        assert 0 < len(store.reads) < 2 * 3 * MOST_READS, "it is tried again, and not too often"
        store.bad.clear()
        await trio.sleep(most + 1)
        told = disk.status()
        assert (told["state"], told["copied"]) == ("ready", 1.0)
        assert (told["unreadable_bytes"], told["reason"]) == (0, None)
        assert await failing(disk, store, 3 * BLOCK) == []

    with caplog.at_level(logging.WARNING):
        play(tmp_path, bad, story, size=size)
    assert len([r for r in caplog.records if "could not be read" in r.message]) == 1


def test_a_full_copy_is_complete_when_guests_have_written_what_could_not_be_read(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("copying paused")

    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", settings(Mode.FULL_COPY))
        await trio.sleep(2)
        assert disk.status()["state"] == "incomplete"
        await disk.write(0x2F8000, memoryview(b"n" * SECTOR), False)
        store.bad.clear()  # a disk puts another sector in its place
        await disk.drain(nothing)
        await trio.sleep(2 * RETRY_SECONDS)
        assert disk.status()["state"] == "ready"

    play(tmp_path, [(0x2F8200, 512)], story)


def test_a_copy_comes_past_a_long_part_that_cannot_be_read(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    """Without trying each place of it."""
    expect_log("copying paused")
    size, begin, end = 96 * MIB, 8 * MIB, 72 * MIB

    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", settings(Mode.FULL_COPY))
        await trio.sleep(4)
        assert len(store.reads) < STEP // CHUNK * MOST_READS + 4 * LONG // CHUNK + size // CHUNK
        await trio.sleep(4 * RETRY_SECONDS)
        assert disk.status()["state"] == "incomplete"
        assert disk.status()["unreadable_bytes"] == end - begin
        for offset in range(0, size, MIB):
            if not begin <= offset < end:
                store.reads.clear()
                await read(disk, offset, MIB)
                assert not store.reads, offset

    play(tmp_path, [(begin, end - begin)], story, size=size, cache=160 * MIB)


def test_a_preload_skips_and_tells(tmp_path: Path) -> None:
    bad = [(0x2F8200, 512), (MIB, 512)]

    async def story(host: Host, store: Store) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        done: list[tuple[int, int]] = []
        with pytest.raises(OSError, match=f"{2 * SECTOR} bytes of .* the first at {MIB}: a bad"):
            await preload_range(
                disk.image, disk.counters, store.size, lambda *step: done.append(step)
            )
        assert done[-1] == (store.size, store.size)
        store.reads.clear()
        assert await failing(disk, store, SECTOR) == [MIB, 0x2F8000]
        assert all(touches(bad, *part) for part in store.reads)

    play(tmp_path, bad, story)


@pytest.mark.parametrize("error", [errno.ETIMEDOUT, errno.ESTALE])
def test_a_copy_waits_for_a_store_that_fails_as_a_whole(
    tmp_path: Path, expect_log: Callable[[str], None], error: int
) -> None:
    expect_log("copying paused")

    async def story(host: Host, store: Store) -> None:
        store.error = error
        disk = await host.attach("d", settings(Mode.FULL_COPY))
        await trio.sleep(2)
        told = disk.status()
        assert (told["state"], told["unreadable_bytes"]) == ("copying", 0)
        assert "a bad place" in told["reason"]
        assert len(store.reads) <= 2, "one for each stream"
        store.bad.clear()
        await trio.sleep(2 * RETRY_SECONDS)
        assert disk.status()["state"] == "ready"

    play(tmp_path, [(0, 4 * MIB)], story)
