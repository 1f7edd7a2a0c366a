# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the cache has of a range, and block status made of that and of what the image says."""

import random
from array import array
from bisect import bisect_left
from types import SimpleNamespace
from typing import cast

import pytest
import trio

import forebay_cache.read.survey as survey_module
from forebay.disk import block_status
from forebay.disk.block_status import DATA, HOLE_AND_ZERO, allocation, cached
from forebay.image.image import Image
from forebay_cache import Holding, Layer, View, survey
from forebay_cache.format.entry import NO_SLOT, entry_at, pack
from forebay_cache.format.geometry import (
    BLOCK,
    FULL,
    PAGE_BLOCKS,
    PAGE_SHIFT,
    SECTOR,
    SECTORS,
)
from forebay_cache.format.records import Kind, LayerName, LayerRecord
from forebay_cache.index.pages import PageTable
from forebay_cache.index.place import Place

PAGE = 1 << PAGE_SHIFT


class FakeIndex:
    """The pages of one layer, and how often it was asked."""

    place = cast("Place", SimpleNamespace(is_lost=False))

    def __init__(self) -> None:
        self.stored: dict[int, bytes] = {}
        self.asked = 0
        self.read: list[int] = []

    def page(self, layer: int, number: int) -> bytes | None:
        self.read.append(number)
        return self.stored.get(number)

    def pages(self, layer: int, after: int, limit: int) -> list[tuple[int, bytes]]:
        raise AssertionError("not asked by a survey")

    def page_numbers(self, layer: int, first: int, end: int, limit: int) -> list[int]:
        self.asked += 1
        numbers = sorted(self.stored)
        return [n for n in numbers[bisect_left(numbers, first) :] if n < end][:limit]


def words(masks: list[tuple[int, int]], *, private: bool) -> "array[int]":
    """A page from (zero, data) of its 64 blocks."""
    first = [pack(7 if data else NO_SLOT, zero, zero | data) for zero, data in masks]
    return array("Q", first + [0] * PAGE_BLOCKS * private)


def layer_of(
    pages: dict[int, list[tuple[int, int]]], *, private: bool, loaded: bool = False
) -> tuple[Layer, FakeIndex]:
    """A layer that has these pages, in the index or, `loaded`, in memory alone."""
    index = FakeIndex()
    table = PageTable(index, 1, set(), private=private, complete=loaded)
    for number, masks in pages.items():
        raw = words(masks, private=private).tobytes()
        if loaded:
            table.adopt(number, raw)
        else:
            index.stored[number] = raw
    name = LayerName(Kind.PRIVATE if private else Kind.CLEAN, "images:a.raw")
    record = LayerRecord(name, slots=0, sectors=1 if pages else 0)
    return Layer(1, record, table), index


def view_of(private: list[Layer], clean: Layer | None) -> View:
    return cast("View", SimpleNamespace(private=private, clean=clean))


def random_page(dice: random.Random) -> list[tuple[int, int]]:
    """(zero, data) of 64 blocks: uniform, or anything."""
    masks = [0, FULL, 0x00FF, 0xF00F, 1, 0x8000, 0x5555]
    if dice.random() < 0.3:
        zero = dice.choice(masks)
        return [(zero, dice.choice(masks) & ~zero)] * PAGE_BLOCKS
    found = []
    for _ in range(PAGE_BLOCKS):
        zero = dice.choice(masks)
        found.append((zero, dice.choice(masks) & ~zero))
    return found


def slow_way(view: View, offset: int, length: int) -> list[Holding]:
    """What is there, sector by sector."""
    found = []
    for sector in range(offset // SECTOR, -(-(offset + length) // SECTOR)):
        block, bit = sector // SECTORS, 1 << sector % SECTORS
        kind = Holding.NOTHING
        for layer in (*view.private, *([view.clean] if view.clean else [])):
            entry = entry_at(layer.pages.page(block // PAGE_BLOCKS), block % PAGE_BLOCKS)
            if entry.valid & bit:
                zeros, data = (
                    (Holding.PRIVATE_ZEROS, Holding.PRIVATE)
                    if layer.private
                    else (Holding.CLEAN_ZEROS, Holding.CLEAN)
                )
                kind = zeros if entry.zero & bit else data
                break
        found.append(kind)
    return found


async def walk(view: View, offset: int, length: int, most: int) -> list[tuple[int, Holding]]:
    """All of a range, as a client asks on from where a reply ends."""
    found: list[tuple[int, Holding]] = []
    end = offset + length
    while offset < end:
        part = await survey(view, offset, end - offset, most)
        assert part
        found += part
        offset += sum(size for size, _ in part)
    assert offset == end
    return found


# --- the survey -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("most", [2, 30, 4096])
async def test_it_says_what_each_layer_says(seed: int, most: int) -> None:
    dice = random.Random(seed)
    for _ in range(4):
        pages = [
            {n: random_page(dice) for n in dice.sample(range(6), dice.randrange(6))}
            for _ in range(3)
        ]
        top, _ = layer_of(pages[0], private=True, loaded=True)
        frozen, _ = layer_of(pages[1], private=True)
        clean, _ = layer_of(pages[2], private=False)
        view = view_of([top, frozen], clean)
        offset = dice.randrange(0, 3 * PAGE, SECTOR)
        length = dice.randrange(SECTOR, 6 * PAGE - offset, SECTOR)
        told = await walk(view, offset, length, most)
        by_sector = [kind for size, kind in told for _ in range(size // SECTOR)]
        assert by_sector == slow_way(view, offset, length)


async def test_bytes_in_the_middle_of_a_sector() -> None:
    layer, _ = layer_of({0: [(0, 1)] * PAGE_BLOCKS}, private=False)
    view = view_of([], layer)
    assert await survey(view, 100, 200, 10) == [(200, Holding.CLEAN)]
    assert await survey(view, 4000, 200, 10) == [(96, Holding.CLEAN), (104, Holding.NOTHING)]
    last = PAGE - BLOCK
    assert await survey(view, last + 1, PAGE, 10) == [
        (4095, Holding.CLEAN),
        (PAGE - 4095, Holding.NOTHING),
    ]


@pytest.mark.parametrize("loaded", [False, True])
async def test_what_does_not_exist_is_passed_over(loaded: bool) -> None:
    """4 TiB with three pages in them cost a few questions, and no page is loaded that is not there."""
    places = [5, 40_000, 1_000_000]
    pages = {n: [(0, FULL)] * PAGE_BLOCKS for n in places}
    layer, index = layer_of(pages, private=True, loaded=loaded)
    told = await walk(view_of([layer], None), 0, 1 << 42, 4096)
    assert told == [
        (5 * PAGE, Holding.NOTHING),
        (PAGE, Holding.PRIVATE),
        ((40_000 - 6) * PAGE, Holding.NOTHING),
        (PAGE, Holding.PRIVATE),
        ((1_000_000 - 40_001) * PAGE, Holding.NOTHING),
        (PAGE, Holding.PRIVATE),
        ((1 << 42) - 1_000_001 * PAGE, Holding.NOTHING),
    ]
    assert index.asked < 300
    assert sorted(index.read) == ([] if loaded else places)
    assert len(layer.pages) == 3


async def test_an_empty_layer_costs_nothing() -> None:
    layer, index = layer_of({}, private=False)
    assert await survey(view_of([], layer), 0, 1 << 40, 4096) == [(1 << 40, Holding.NOTHING)]
    assert (index.asked, len(layer.pages)) == (0, 0)


async def test_one_extent_of_a_fragmented_disk_looks_at_few_pages() -> None:
    pages = {n: [(0, 0x5555)] * PAGE_BLOCKS for n in range(500)}
    layer, index = layer_of(pages, private=False)
    told = await survey(view_of([], layer), 100 * PAGE, 400 * PAGE, 2)
    assert told[0] == (SECTOR, Holding.CLEAN)
    assert len(index.read) <= 2


async def test_long_work_lets_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each page it is asked whether the slice is over; here it always is."""
    monkeypatch.setattr(survey_module, "SLICE_SECONDS", -1.0)
    add_page, since_turn, longest = survey_module._add_page, 0, 0

    def counted(extents: survey_module._Extents, view: View, number: int) -> None:
        nonlocal since_turn, longest
        since_turn += 1
        longest = max(longest, since_turn)
        add_page(extents, view, number)

    monkeypatch.setattr(survey_module, "_add_page", counted)
    layer, _ = layer_of({n: [(0xF0, 0x0A)] * PAGE_BLOCKS for n in range(200)}, private=False)

    async def other() -> None:
        nonlocal since_turn
        while True:
            since_turn = 0
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        assert len(await survey(view_of([layer], None), 0, 200 * PAGE, 1 << 30)) > 10_000
        nursery.cancel_scope.cancel()
    assert 0 < longest <= 2


async def test_pages_are_loaded_together_and_once() -> None:
    layer, index = layer_of({n: [(0, FULL)] * PAGE_BLOCKS for n in range(40)}, private=False)
    table = layer.pages

    async def write() -> None:
        await table.load([7])
        table.writable(7)[0] = 0

    async with trio.open_nursery() as nursery:
        nursery.start_soon(table.load_all, range(40))
        nursery.start_soon(write)
        nursery.start_soon(table.load_all, range(20, 50))
    assert sorted(index.read) == list(range(50))
    assert table.page(7)[0] == 0, "what was written is not taken back"


# --- with what the image says -----------------------------------------------------------------------------
class FakeOrigin:
    """An image whose every other 64 KiB is a hole, and how often it was asked for what."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.asked: list[tuple[int, int]] = []
        self.most = most

    def flags(self, offset: int) -> int:
        return HOLE_AND_ZERO if offset // BLOCK % 2 else DATA

    async def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        await trio.lowlevel.checkpoint()
        self.asked.append((offset, length))
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        while at < end and len(found) < self.most:
            stop = min(end, (at // BLOCK + 1) * BLOCK)
            found.append((stop - at, self.flags(at)))
            at = stop
        return [*found, (end - at, 0)] if at < end else found


def image_of(origin: object) -> Image:
    return cast("Image", SimpleNamespace(origin=origin))


def at_sectors(told: list[tuple[int, int]]) -> list[int]:
    return [flags for size, flags in told for _ in range(size // SECTOR)]


async def test_the_image_is_asked_once_whatever_lies_in_the_cache(seed: int) -> None:
    dice = random.Random(seed)
    view = view_of(
        [layer_of({n: random_page(dice) for n in range(3)}, private=True)[0]],
        layer_of({n: random_page(dice) for n in range(1, 5)}, private=False)[0],
    )
    origin = FakeOrigin()
    offset, length = 4 * SECTOR, 5 * PAGE
    told = await allocation(view, image_of(origin), offset, length, one=False)
    assert len(origin.asked) == 1
    kinds = slow_way(view, offset, length)
    wanted = [
        origin.flags(offset + n * SECTOR)
        if kind is Holding.NOTHING
        else HOLE_AND_ZERO * (kind in (Holding.CLEAN_ZEROS, Holding.PRIVATE_ZEROS))
        for n, kind in enumerate(kinds)
    ]
    found = at_sectors(told)
    assert found == wanted[: len(found)]
    assert len(found) == len(wanted) or len(told) > 4000


async def test_a_fragmented_image_ends_the_reply_and_is_not_all_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the image did not look at is not called data: the client asks on."""
    monkeypatch.setattr(block_status, "MOST_EXTENTS", 100)
    view, origin = view_of([], None), FakeOrigin(most=100)
    told = await allocation(view, image_of(origin), 0, 1 << 40, one=False)
    assert told == [(BLOCK, n % 2 * HOLE_AND_ZERO) for n in range(100)]


async def test_one_extent_asks_the_image_for_little() -> None:
    origin = FakeOrigin()
    told = await allocation(view_of([], None), image_of(origin), 0, 1 << 40, one=True)
    assert told == [(BLOCK, DATA)]
    assert sum(length for _, length in origin.asked) <= 4 * PAGE
    told = await allocation(view_of([], None), image_of(Whole()), 0, 1 << 40, one=True)
    assert told == [(1 << 40, HOLE_AND_ZERO)]


class Whole:
    """An image that is one hole."""

    async def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        await trio.lowlevel.checkpoint()
        return [(length, HOLE_AND_ZERO)]


async def test_an_image_that_cannot_be_reached_counts_as_data() -> None:
    page = [(FULL, 0)] * 32 + [(0, 0)] * 32
    layer, _ = layer_of({0: page}, private=False)
    for one in (False, True):
        told = await allocation(view_of([], layer), image_of(None), 0, 2 * PAGE, one)
        wanted = [(PAGE // 2, HOLE_AND_ZERO), (3 * PAGE // 2, DATA)]
        assert told == (wanted[:1] if one else wanted)


async def test_what_leaves_the_cache_meanwhile_is_found_in_the_image() -> None:
    """The cache is asked first. The other way round, data written back in between would be called a hole."""
    layer, _ = layer_of({0: [(0, FULL)] * PAGE_BLOCKS}, private=True, loaded=True)
    view = view_of([layer], None)

    class Takes(FakeOrigin):
        async def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
            view.private = []  # written back, and evicted
            await super().extents(offset, length)
            return [(length, DATA)]

    told = await allocation(view, image_of(Takes()), 0, 2 * PAGE, one=False)
    assert {flags for _, flags in told} == {DATA}


async def test_cached_says_whose_it_is() -> None:
    page = [(0x00FF, 0xFF00), (0, 0)] + [(0, 0)] * 62
    top, _ = layer_of({0: page}, private=True)
    clean, _ = layer_of({0: [(0, FULL), (FULL, 0)] + [(0, 0)] * 62}, private=False)
    view = view_of([top], clean)
    assert await cached(view, 0, PAGE, one=False) == [(BLOCK, 2), (BLOCK, 1), (PAGE - 2 * BLOCK, 0)]
    assert (await cached(view, 0, PAGE, one=True))[0] == (BLOCK, 2)
