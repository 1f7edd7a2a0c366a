# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Misses: who may share an origin read with whom."""

import errno
from pathlib import Path

import pytest
import trio
import trio.testing

from forebay_cache import Filler, open_cache
from forebay_cache.format.geometry import BLOCK, Buffer
from forebay_cache.format.records import LayerName
from forebay_cache.index.pages import PageTable
from forebay_cache.layers.layer import Layer
from forebay_cache.read.plan import Piece
from forebay_cache.read.view import View


class Origin:
    """Reads what it held when the read began, and answers when it is let."""

    def __init__(self) -> None:
        self.size = 16 * BLOCK
        self.content = b"o"
        self.reads: list[tuple[int, int]] = []
        self.lanes: list[bool | trio.Event] = []
        self.gates: list[trio.Event] = []
        self.fails = False

    async def read(self, offset: int, length: int, background: bool | trio.Event = False) -> bytes:
        self.lanes.append(background)
        self.reads.append((offset // BLOCK, length // BLOCK))
        data = self.content * length
        self.gates.append(trio.Event())
        await self.gates[-1].wait()
        if self.fails:
            raise OSError(errno.EIO, "the origin fails")
        return data


class Tally:
    origin_read_bytes = 0

    def note_origin_read(self, seconds: float) -> None:
        assert seconds >= 0


async def test_a_read_that_joins_a_flight_takes_nothing_from_it_that_was_written_meanwhile(
    tmp_path: Path,
) -> None:
    cache = open_cache(tmp_path / "cache", tmp_path / "index", size=16 << 20, block_size=65536)
    origin = Origin()
    got: list[bytes] = []
    async with trio.open_nursery() as nursery:
        filler = Filler(cache, cache.layers.make(LayerName.of_image("i")), origin, nursery)

        async def fetch(block: int, count: int) -> None:
            got.append(bytes(await filler.fetch(block * BLOCK, count * BLOCK, Tally())))

        nursery.start_soon(fetch, 0, 3)
        await trio.testing.wait_all_tasks_blocked()
        filler.overtaken(1 * BLOCK, BLOCK)
        origin.content = b"n"
        filler.overtaken(1 * BLOCK, BLOCK)
        nursery.start_soon(fetch, 0, 2)
        await trio.testing.wait_all_tasks_blocked()
        for gate in origin.gates:
            gate.set()
    old, new = sorted(got, key=len, reverse=True)
    assert set(old) == set(b"o"), "it was under way when the write came: either is right"
    assert set(new[BLOCK:]) == set(b"n"), "it began after the write had ended"
    cache.release()


async def test_a_block_is_fetched_once_however_many_ask(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "cache", tmp_path / "index", size=16 << 20, block_size=65536)
    origin = Origin()
    async with trio.open_nursery() as nursery:
        filler = Filler(cache, cache.layers.make(LayerName.of_image("i")), origin, nursery)
        for start, length in ((0, 4), (1, 2), (3, 3), (0, 1)):
            nursery.start_soon(filler.fetch, start * BLOCK, length * BLOCK, Tally())
            await trio.testing.wait_all_tasks_blocked()
        assert origin.reads == [(0, 4), (4, 2)]
        for gate in origin.gates:
            gate.set()
    cache.release()


async def test_what_nobody_waits_for_lets_guests_go_first_until_one_joins(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "cache", tmp_path / "index", size=16 << 20, block_size=65536)
    origin = Origin()
    async with trio.open_nursery() as nursery:
        filler = Filler(cache, cache.layers.make(LayerName.of_image("i")), origin, nursery)
        nursery.start_soon(filler.fetch, 12 * BLOCK, BLOCK, Tally())
        filler.ahead(0, 8 * BLOCK, Tally())
        while len(origin.lanes) < 2:  # noqa: ASYNC110  (a thread loads the page)
            await trio.sleep(0.001)
        guest, ahead = origin.lanes
        assert guest is False
        assert isinstance(ahead, trio.Event)
        assert not ahead.is_set()
        nursery.start_soon(filler.fetch, 3 * BLOCK, BLOCK, Tally())
        await trio.testing.wait_all_tasks_blocked()
        assert ahead.is_set()
        assert len(origin.reads) == 2, "what is on its way is not asked for again"
        for gate in origin.gates:
            gate.set()
    cache.release()


@pytest.mark.parametrize("waits", [False, True])
async def test_what_others_have_fetched_meanwhile_is_not_fetched_ahead(
    tmp_path: Path, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the page of the second half is loaded, or the first half is fetched, a guest gets the rest itself."""
    cache = open_cache(tmp_path / "cache", tmp_path / "index", size=32 << 20, block_size=65536)
    origin = Origin()
    origin.size = 128 * BLOCK
    layer = cache.layers.make(LayerName.of_image("i"))
    loading, loaded, load = trio.Event(), trio.Event(), PageTable.load

    async def slow_load(table: PageTable, numbers: list[int]) -> None:
        if numbers == [1]:
            loading.set()
            await loaded.wait()
        await load(table, numbers)

    async with trio.open_nursery() as nursery:
        filler = Filler(cache, layer, origin, nursery)
        if waits:
            nursery.start_soon(filler.prefetch, 0, 40 * BLOCK, Tally())
            await reads(origin, 1)
            guests = range(20, 24)
        else:
            monkeypatch.setattr(PageTable, "load", slow_load)
            filler.ahead(60 * BLOCK, 8 * BLOCK, Tally())
            await loading.wait()
            guests = range(61, 63)
        async with trio.open_nursery() as guest:
            guest.start_soon(filler.fetch, guests.start * BLOCK, len(guests) * BLOCK, Tally())
            await reads(origin, 2 if waits else 1)
            origin.gates[-1].set()
        while layer.pages.page(0)[guests.start % 64] & 0xFFFF != 0xFFFF:  # noqa: ASYNC110
            await trio.sleep(0.001)
        loaded.set()
        while filler.waiting or not is_whole(layer, 0 if waits else 60, 40 if waits else 68):
            for gate in origin.gates:
                gate.set()
            await trio.sleep(0.001)
    blocks = [n for start, count in origin.reads for n in range(start, start + count)]
    assert len(blocks) == len(set(blocks)), origin.reads
    cache.release()


async def test_a_read_asks_for_nothing_that_others_got_before_its_turn_came(tmp_path: Path) -> None:
    """Between looking and asking a turn of the loop may go by, in which a hundred others have theirs stored."""
    cache = open_cache(tmp_path / "cache", tmp_path / "index", size=16 << 20, block_size=65536)
    origin, layer = Origin(), cache.layers.make(LayerName.of_image("i"))
    async with trio.open_nursery() as nursery:
        filler = Filler(cache, layer, origin, nursery)

        async def fetch(offset: int, length: int) -> Buffer:
            return await filler.fetch(offset, length, Tally())

        view = View(cache, [], layer, fetch)
        pieces = await view._find(BLOCK, 2 * BLOCK)
        nursery.start_soon(filler.fetch, 0, 4 * BLOCK, Tally())
        await reads(origin, 1)
        origin.gates[0].set()
        while not is_whole(layer, 0, 4):  # noqa: ASYNC110
            await trio.sleep(0.001)
        again: list[Piece] = []
        await view._collect(pieces, again, [], looks_again=True)
        assert again == pieces
        assert b"".join(await view.read(BLOCK, 2 * BLOCK)) == b"o" * 2 * BLOCK
        assert origin.reads == [(0, 4)]
    cache.release()


async def reads(origin: Origin, count: int) -> None:
    while len(origin.reads) < count:  # noqa: ASYNC110  (a thread loads the page)
        await trio.sleep(0.001)


def is_whole(layer: Layer, first: int, end: int) -> bool:
    """True if the layer has all of these blocks."""
    for n in range(first, end):
        page = layer.pages.look(n // 64)
        if page is None or page[n % 64] & 0xFFFF != 0xFFFF:
            return False
    return True


async def test_who_joins_is_told_when_it_is_stored_and_only_where_somebody_waits(
    tmp_path: Path,
) -> None:
    cache = open_cache(tmp_path / "cache", tmp_path / "index", size=16 << 20, block_size=65536)
    origin, woken = Origin(), []
    async with trio.open_nursery() as nursery:
        filler = Filler(cache, cache.layers.make(LayerName.of_image("i")), origin, nursery)

        def join(block: int, count: int) -> bool:
            return filler.join(block * BLOCK, count * BLOCK, lambda: woken.append(block))

        assert not join(0, 2), "nobody fetches it"
        filler.launch(0, 2 * BLOCK, Tally(), background=True)
        await trio.testing.wait_all_tasks_blocked()
        assert not join(0, 2), "nobody waits for it"
        nursery.start_soon(filler.fetch, 0, BLOCK, Tally())
        nursery.start_soon(filler.fetch, 2 * BLOCK, BLOCK, Tally())
        await trio.testing.wait_all_tasks_blocked()
        assert join(0, 2)
        assert join(1, 1)
        assert not join(1, 2), "two fetches bring it"
        assert not join(2, 2), "nobody fetches all of it"
        assert woken == []
        for gate in origin.gates:
            gate.set()
    assert woken == [0, 1]
    assert len(origin.reads) == 2
    cache.release()


async def test_who_joins_a_fetch_that_fails_is_told(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "cache", tmp_path / "index", size=16 << 20, block_size=65536)
    origin, woken = Origin(), []
    async with trio.open_nursery() as nursery:
        filler = Filler(cache, cache.layers.make(LayerName.of_image("i")), origin, nursery)
        (flight,) = filler.launch(0, BLOCK, Tally())
        await trio.testing.wait_all_tasks_blocked()
        assert filler.join(0, BLOCK, lambda: woken.append(filler.join(0, BLOCK, print)))
        origin.fails = True
        origin.gates[0].set()
        await flight.landed.wait()
    assert woken == [False], "and does not find the one that has failed"
    cache.release()
