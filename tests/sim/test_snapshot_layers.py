# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Many private layers of one disk: what is read through them merged, and what is left when they are made fewer.

A real cache on real files. A model of sectors says what each snapshot shows. Every read is made twice, by the merged
pages and layer by layer.
"""

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from forebay_cache import Cache, Layer, LayerName, View, join, open_cache
from forebay_cache.blocks import private
from forebay_cache.format.entry import block_key, layer_of_key, slots_in
from forebay_cache.format.geometry import BLOCK, PAGE_BLOCKS, PAGE_SHIFT, SECTOR, SECTORS, Buffer
from forebay_cache.format.records import PAGE_KEY
from forebay_cache.index.changes import Changes
from forebay_cache.index.index import Index
from forebay_cache.layers.reclaim import Reclaimer
from forebay_cache.offline import recovery
from forebay_cache.read.merged import LEVELS, Merged, seen_through
from forebay_cache.slots.placement import HELD
from sim.fake_host import check_cache

NOTHING = b"image" * 819 + b"!"
"""A sector that no layer has."""

BLOCKS = 6
SIZE = BLOCKS * BLOCK
FAR = 3 * PAGE_BLOCKS * BLOCK
"""Where the second half of the blocks lies, in a page of its own."""

Model = dict[int, bytes]
"""By sector."""


class Stack:
    """The layers of one disk, newest first, and what each of them and those below it show."""

    def __init__(self, cache: Cache, rng: random.Random) -> None:
        self.cache = cache
        self.rng = rng
        self.layers: list[Layer] = []
        self.shown: list[Model] = []
        self.merged: Merged | None = None
        self.generation = 0
        self.add()

    def add(self) -> None:
        """A snapshot: a new layer takes the writes."""
        if self.layers:
            self.layers[0].freeze()
        self.generation += 1
        layer = self.cache.layers.make(LayerName.of_disk("d", self.generation, "images:x"))
        self.layers.insert(0, layer)
        self.shown.insert(0, dict(self.shown[0]) if self.shown else {})
        self.merged = seen_through(self.cache.index, self.layers[1:], self.merged)

    async def write(self) -> None:
        first = self.rng.randrange(BLOCKS * SECTORS)
        count = min(self.rng.choice([1, 1, 1, 2, 5, SECTORS]), BLOCKS * SECTORS - first)
        data = self.rng.randbytes(count * SECTOR)
        zeros = self.rng.random() < 0.2
        if zeros:
            data = bytes(len(data))
        for n in range(count):
            self.shown[0][first + n] = data[n * SECTOR : (n + 1) * SECTOR]
        half = BLOCKS * SECTORS // 2
        for start, stop in ((first, min(first + count, half)), (max(first, half), first + count)):
            if start < stop:
                part = data[(start - first) * SECTOR : (stop - first) * SECTOR]
                await self._put(place(start), memoryview(part), zeros=zeros)

    async def _put(self, offset: int, data: memoryview, *, zeros: bool) -> None:
        layer = self.layers[0]
        while not (
            private.zero(self.cache, layer, offset, len(data))
            if zeros
            else private.write(self.cache, layer, offset, data)
        ):
            await private.prepare(self.cache, layer, offset, len(data), zeros=zeros)
        self.cache.intent.publish()

    async def check(self, at: int = 0) -> None:
        """What is read of the layers from the one at that place on down, merged and one by one."""
        layers = self.layers[at:]
        views = [View(self.cache, layers, None, nothing_there)]
        if at == 0 and self.merged is not None:
            views.append(View(self.cache, [layers[0], *self.merged.levels], None, nothing_there))
        if (merged := seen_through(self.cache.index, layers, None)) is not None:
            views.append(View(self.cache, list(merged.levels), None, nothing_there))
        for view in views:
            for sector in range(BLOCKS * SECTORS):
                want = self.shown[at].get(sector, NOTHING)
                now = view.read_now(place(sector), SECTOR)
                got = b"".join(bytes(x) for x in await view.read(place(sector), SECTOR))
                assert got == want, (at, sector, len(view.private))
                assert now is None or bytes(now) == want, (at, sector, len(view.private))

    async def unite(self, at: int) -> None:
        """The frozen layers at that place and below it become one."""
        await self.cache.make_durable()
        upper, lower = self.layers[at : at + 2]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_on)
            gone = await join(self.cache, lower, upper, turn, self._forget)
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            self.check_owners()
            nursery.cancel_scope.cancel()
        self.layers.remove(gone)
        del self.shown[at + 1]
        self.merged = seen_through(self.cache.index, self.layers[1:], self.merged)
        self.cache.layers.drop(gone)
        await self.cache.commit()

    def _forget(self, number: int) -> None:
        if self.merged is not None:
            self.merged.forget(number)

    async def _read_on(self) -> None:
        """A guest that reads all the time, of what is merged while the layers below it change."""
        if self.merged is None:
            return
        view = View(self.cache, [self.layers[0], *self.merged.levels], None, nothing_there)
        while True:
            sector = self.rng.randrange(BLOCKS * SECTORS)
            want = self.shown[0].get(sector, NOTHING)
            now = view.read_now(place(sector), SECTOR)
            assert now is None or bytes(now) == want, sector
            got = b"".join(bytes(x) for x in await view.read(place(sector), SECTOR))
            assert got == want, sector
            await trio.lowlevel.checkpoint()

    def check_owners(self) -> None:
        """Each slot is known to be that of the block that names it, and what is merged names no others."""
        owner = self.cache.slots.owner
        for table in self.merged.tables if self.merged is not None else []:
            for _, page in table.held():
                for _, slot in slots_in(page):
                    assert layer_of_key(owner[slot]) in {layer.id for layer in self.layers}
        for layer in self.layers:
            for number, page in layer.pages.held():
                for i, slot in slots_in(page):
                    assert owner[slot] == block_key(layer.id, number * PAGE_BLOCKS + i)


def place(sector: int) -> int:
    """Where a sector of the model lies on the disk."""
    half = BLOCKS * SECTORS // 2
    return sector * SECTOR if sector < half else FAR + (sector - half) * SECTOR


async def turn(_moved: int) -> None:
    await trio.lowlevel.checkpoint()


async def nothing_there(_offset: int, length: int) -> Buffer:
    assert length == SECTOR
    return NOTHING


@pytest.fixture
def rng() -> random.Random:
    return random.Random(7)


async def with_cache(home: Path, do: Callable[[Cache], object]) -> None:
    cache = open_cache(home / "cache.img", home / "index", size=64 << 20)
    async with trio.open_nursery() as nursery:
        await nursery.start(cache.run)
        await do(cache)  # type: ignore[misc]
        await check_cache(cache)
        nursery.cancel_scope.cancel()
    await cache.close()


@pytest.mark.parametrize("seed", range(6))
async def test_many_layers_read_as_one_and_are_made_fewer(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)

    async def life(cache: Cache) -> None:
        stack = Stack(cache, rng)
        for _ in range(25):
            for _ in range(rng.randrange(5)):
                await stack.write()
            stack.add()
            if rng.random() < 0.3:
                await stack.check()
        await stack.check()
        while len(stack.layers) > 2:
            await stack.unite(rng.randrange(1, len(stack.layers) - 1))
            stack.check_owners()
            await stack.write()
            await stack.check()
            await stack.check(rng.randrange(1, len(stack.layers)))

    await with_cache(tmp_path, life)


async def test_a_block_of_which_each_sector_is_of_another_layer_goes_through_all_levels(
    tmp_path: Path, rng: random.Random
) -> None:
    async def life(cache: Cache) -> None:
        stack = Stack(cache, rng)
        for sector in range(SECTORS):
            data = rng.randbytes(SECTOR)
            stack.shown[0][sector] = data
            await stack._put(sector * SECTOR, memoryview(data), zeros=False)
            stack.add()
        await stack.check()
        assert stack.merged is not None
        assert all(layer.sectors for layer in stack.merged.levels), "each level has two of them"
        assert len(stack.merged.levels) == LEVELS
        while len(stack.layers) > 2:
            await stack.unite(1)
        await stack.check()
        assert sum(layer.slots for layer in stack.layers) <= 2, "a block has two slots"

    await with_cache(tmp_path, life)


async def test_what_a_lower_layer_held_and_an_upper_one_too_comes_free(
    tmp_path: Path, rng: random.Random
) -> None:
    async def life(cache: Cache) -> None:
        stack = Stack(cache, rng)
        free = cache.slots.placement.free
        for _ in range(4):
            data = rng.randbytes(BLOCK)
            for n in range(SECTORS):
                stack.shown[0][n] = data[n * SECTOR : (n + 1) * SECTOR]
            await stack._put(0, memoryview(data), zeros=False)
            stack.add()
        assert cache.slots.placement.free == free - 4
        while len(stack.layers) > 2:
            await stack.unite(1)
        await cache.commit()
        assert cache.slots.placement.free == free - 1
        await stack.check()

    await with_cache(tmp_path, life)


async def test_a_join_that_is_cut_short_is_gone_on_with(tmp_path: Path, rng: random.Random) -> None:
    async def life(cache: Cache) -> None:
        stack = Stack(cache, rng)
        for _ in range(3):
            for _ in range(40):
                await stack.write()
            stack.add()
        await cache.make_durable()
        upper, lower = stack.layers[1:3]

        async def enough(_moved: int) -> None:
            raise OSError(5, "enough")

        with pytest.raises(OSError, match="enough"):
            await join(cache, lower, upper, enough, stack._forget)
        await stack.check()
        await check_cache(cache)
        await stack.unite(1)
        await stack.check()

    await with_cache(tmp_path, life)


@pytest.mark.parametrize("is_storing", [False, True])
async def test_what_a_join_moved_stays_when_what_it_emptied_is_reclaimed_before_a_commit(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch, is_storing: bool
) -> None:
    """The index still says then that the slots are the emptied layer's; or a commit is just about to say otherwise."""
    stored, commit = trio.Event(), Index.commit

    async def slow_commit(index: Index, changes: Changes) -> None:
        await stored.wait()
        await commit(index, changes)

    stacks: list[Stack] = []

    async def written(cache: Cache) -> None:
        stack = Stack(cache, rng)
        for _ in range(3):
            for _ in range(40):
                await stack.write()
            stack.add()
        stacks.append(stack)

    async def joined(cache: Cache) -> None:
        """By a daemon that was started since: it reads a page of the index that it has forgotten."""
        [stack] = stacks
        stack.cache = cache
        known = {layer.id: layer for layer in cache.layers}
        stack.layers = [known[layer.id] for layer in stack.layers]
        monkeypatch.setattr(Index, "commit", slow_commit)
        upper, lower = stack.layers[1:3]
        gone = await join(cache, lower, upper, turn, stack._forget)
        stack.layers.remove(gone)
        del stack.shown[2]
        stack.merged = seen_through(cache.index, stack.layers[1:], None)
        async with trio.open_nursery() as nursery:
            if is_storing:
                nursery.start_soon(cache.commit)
                await trio.testing.wait_all_tasks_blocked()
            cache.layers.drop(gone)
            parts = (cache.index, cache.layers, cache.removal, cache.commit, cache.failure)
            nursery.start_soon(Reclaimer(*parts)._reclaim, gone)
            await trio.sleep(0.2)
            stored.set()
        state = cache.slots.placement.state
        for layer in stack.layers:
            for _, page in layer.pages.held():
                for _, slot in slots_in(page):
                    assert state[slot] & HELD, "it is in use"
        await stack.check()

    await with_cache(tmp_path, written)
    await with_cache(tmp_path, joined)


async def test_what_a_join_moves_behind_the_scan_after_a_start_is_not_taken_for_free(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: list[Stack] = []

    async def written(cache: Cache) -> None:
        stack = Stack(cache, rng)
        for _ in range(3):
            for _ in range(40):
                await stack.write()
            stack.add()
        stacks.append(stack)

    has_come, may_go_on, all_pages = threading.Event(), threading.Event(), Index.all_pages

    def in_rounds(index: Index, key: bytes, _most: int) -> list[tuple[bytes, bytes]]:
        found = all_pages(index, key, 1)
        if found and found[0][0] >= PAGE_KEY.pack(stacks[0].layers[1].id, 0):
            has_come.set()
            may_go_on.wait()
            found = all_pages(index, key, 1)
        return found

    async def joined(cache: Cache) -> None:
        """The scan has seen the older of the two, which then gets what the newer one has."""
        [stack] = stacks
        stack.cache = cache
        known = {layer.id: layer for layer in cache.layers}
        stack.layers = [known[layer.id] for layer in stack.layers]
        upper, lower = stack.layers[1:3]
        await trio.to_thread.run_sync(has_come.wait)
        gone = await join(cache, lower, upper, turn, stack._forget)
        assert gone is upper
        await cache.commit()
        may_go_on.set()
        while cache.slots.scan is not None:  # noqa: ASYNC110
            await trio.sleep(0.001)
        state = cache.slots.placement.state
        for _, page in lower.pages.held():
            for _, slot in slots_in(page):
                assert state[slot] & HELD, "it is in use"

    await with_cache(tmp_path, written)
    monkeypatch.setattr(recovery, "SCAN_AT_ONCE", 0)
    monkeypatch.setattr(Index, "all_pages", in_rounds)
    await with_cache(tmp_path, joined)


async def test_a_snapshot_that_is_taken_while_a_page_is_merged_is_not_left_out(
    tmp_path: Path, rng: random.Random
) -> None:
    async def life(cache: Cache) -> None:
        stack = Stack(cache, rng)
        for _ in range(5):
            for _ in range(10):
                await stack.write()
            stack.add()
        merged = Merged(cache.index, stack.layers[2:])
        view = View(cache, merged.levels, None, nothing_there)
        async with trio.open_nursery() as nursery:
            for number in (0, FAR >> PAGE_SHIFT):
                nursery.start_soon(merged.make, number)
            for _ in range(3):
                await trio.lowlevel.checkpoint()
            assert not len(merged.tables[0]), "it takes several turns"
            merged.replace(stack.layers[1:])
        for sector in range(BLOCKS * SECTORS):
            got = b"".join(bytes(x) for x in await view.read(place(sector), SECTOR))
            assert got == stack.shown[1].get(sector, NOTHING)

    await with_cache(tmp_path, life)
