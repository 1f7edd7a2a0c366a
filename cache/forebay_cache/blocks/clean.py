"""Clean layers: what the origin has too. Filled on a miss, dropped when the origin is written, evicted at need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import trio

from forebay_cache.cache import Cache
from forebay_cache.device.device import Buffer
from forebay_cache.errors import CacheFull, IndexFault
from forebay_cache.format import ops
from forebay_cache.format.entry import (
    NO_SLOT,
    block_key,
    pack,
    slot_of,
    slots_in,
    valid_of,
    with_zeros,
    zero_of,
)
from forebay_cache.format.geometry import (
    BLOCK,
    FULL,
    PAGE_BLOCKS,
    PAGE_SHIFT,
    SECTOR,
    SECTORS,
    ZERO_BLOCK,
    block_runs,
    covered,
    sector_runs,
)
from forebay_cache.index.sums import checksums
from forebay_cache.layers.layer import ABSENT, Layer

#: Origin writes are announced by region of this many bytes: one sync for a region, not one for a write.
REGION_SHIFT = 22


class _Filler(Protocol):
    """See fill.Filler."""

    layer: Layer

    def overtaken(self, offset: int, length: int) -> None: ...


@contextmanager
def past_failure(cache: Cache) -> Iterator[None]:
    """What cannot be done because the device has failed is left undone: whoever uses this has another way behind it."""
    try:
        yield
    except OSError:
        if cache.failed is None:
            raise


class _Part(NamedTuple):
    """One block of a fill: its slot, and what is to be written where."""

    block: int
    slot: int
    fresh: bool
    mask: int
    zero: int
    data: memoryview  # the whole block's worth, from sector `first` on
    first: int


@contextmanager
def filling(cache: Cache, layer: Layer, blocks: Sequence[int]) -> Iterator[dict[int, list[int]]]:
    """Note what origin writes overtake while a fill of these blocks is on its way: ``{block: [mask]}``."""
    cells: dict[int, list[int]] = {block: [0] for block in blocks}
    for ident, first, last in cache.overwriting:
        if ident == layer.id:
            for block, start, part in block_runs(first, last - first):
                if block in cells:
                    cells[block][0] |= covered(start, part)
    for block, cell in cells.items():
        cache.filling.setdefault(block_key(layer.id, block), []).append(cell)
    try:
        yield cells
    finally:
        for block, cell in cells.items():
            key = block_key(layer.id, block)
            cache.filling[key] = [c for c in cache.filling[key] if c is not cell]
            if not cache.filling[key]:
                del cache.filling[key]


@contextmanager
def overwriting(cache: Cache, layer: Layer, offset: int, length: int) -> Iterator[None]:
    """Around a write to the origin: what anybody reads from there meanwhile may be old, and is not stored."""
    mine = (layer.id, offset, offset + length)
    cache.overwriting.append(mine)
    try:
        yield
    finally:
        cache.overwriting.remove(mine)


def overtake(cache: Cache, layer: Layer, offset: int, length: int) -> None:
    """Fills under way for this range must not publish what they read."""
    if cache.filling:
        for block, start, part in block_runs(offset, length):
            for cell in cache.filling.get(block_key(layer.id, block), ()):
                cell[0] |= covered(start, part)


async def invalidate(cache: Cache, layer: Layer, offset: int, length: int) -> None:
    """The origin is about to be written here: forget these sectors, so that even a killed daemon has forgotten them.

    Raises OSError when that cannot be recorded; the origin must not be written then.
    """
    overtake(cache, layer, offset, length)
    for at in range(offset, offset + length, 64 * BLOCK):
        runs = block_runs(at, min(64 * BLOCK, offset + length - at))
        with past_failure(cache):
            if cache.failed is None and not cache.journal_room(SECTOR * len(runs)):
                await cache.commit()
        await cache.load(layer, {block // PAGE_BLOCKS for block, _, _ in runs})
        for block, start, part in runs:
            drop(cache, layer, block, covered(start, part))
    with past_failure(cache):
        cache.publish()
    await cache.give_up(layer)


async def uncover(cache: Cache, frozen: Layer, filler: _Filler) -> None:
    """The device has failed and the origin has all of a frozen private layer: forget the clean blocks under it.

    Its layer can then be dropped. Raises OSError.
    """
    layer = filler.layer
    for number in [n for n, page in frozen.pages.items() if page is not ABSENT]:
        await cache.load(layer, [number])
        filler.overtaken(number << PAGE_SHIFT, PAGE_BLOCKS * BLOCK)
        for i in range(PAGE_BLOCKS):
            drop(cache, layer, number * PAGE_BLOCKS + i, frozen.pages[number][i] & FULL)
    with past_failure(cache):
        cache.publish()
    await cache.give_up(layer)


def drop(cache: Cache, layer: Layer, block: int, mask: int) -> None:
    """Take sectors out of a clean block whose page is loaded; the record still has to be published.

    It is noted where memory has nothing valid, too: a crash undoes an eviction that was not committed.
    """
    number, i = divmod(block, PAGE_BLOCKS)
    word = cache.page(layer, number)[i]
    cache.note(ops.drop(mask, layer.id, block))
    if not word & mask:
        return
    layer.sectors -= (word & mask).bit_count()
    slot, valid, zero = slot_of(word), valid_of(word) & ~mask, zero_of(word) & ~mask
    page = layer.writable(number)
    if slot >= 0 and not valid & ~zero:
        cache.free_slot(layer, slot)
        slot = NO_SLOT
    elif slot >= 0:
        cache.ready[slot] &= ~mask
    page[i] = pack(slot, zero, valid)


async def mark_hot(cache: Cache, layer: Layer, offset: int, length: int) -> None:
    """Have it on record, durably, that the origin of this range may change: after a power cut its blocks are dropped.

    Raises OSError when that cannot be made durable.
    """
    first, last = offset >> REGION_SHIFT, (offset + length - 1) >> REGION_SHIFT
    new = [(layer.id, r) for r in range(first, last + 1) if (layer.id, r) not in cache.hot]
    if not new:
        return
    cache.heat(new)
    told = False
    with past_failure(cache):
        cache.check()
        await cache.sync()
        told = True
        if not layer.dead:
            cache.hot.update(new)
    if not told:
        await cache.give_up(layer)
    if not told and cache.failed is None:  # it works again, and knows nothing of this
        await mark_hot(cache, layer, offset, length)


async def store(
    cache: Cache, layer: Layer, offset: int, data: Buffer, cells: dict[int, list[int]]
) -> None:
    """Keep ``data``, read from (or written to) the origin at ``offset``; both are whole sectors.

    Sectors that are valid already, or were overtaken (``cells`` of :func:`filling`), are left alone. Never raises for
    want of room, or a failing device or index: then less is kept.
    """
    view = memoryview(data)
    runs = block_runs(offset, len(view))
    if cache.failed:
        return
    try:
        await cache.load(layer, {block // PAGE_BLOCKS for block, _, _ in runs})
    except IndexFault:
        return
    at = 0
    for group in _groups(runs):
        size = sum(part for _, _, part in group)
        await _store_group(cache, layer, group, view[at : at + size], cells)
        at += size


def _groups(runs: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    return [runs[n : n + 16] for n in range(0, len(runs), 16)]


async def _store_group(
    cache: Cache,
    layer: Layer,
    runs: list[tuple[int, int, int]],
    data: memoryview,
    cells: dict[int, list[int]],
) -> None:
    if cache.placement.free < len(runs):
        try:
            with trio.move_on_after(5):
                await cache.room(min(len(runs), max(1, cache.device.slots // 4)))
        except CacheFull:
            pass
    if layer.cap and layer.slots + len(runs) > layer.cap:
        _make_room_in(cache, layer, layer.slots + len(runs) - layer.cap)
    # Nobody else gets the slots that are written to here, even if they are given up meanwhile.
    token = cache.pin()
    parts = _prepare(cache, layer, runs, data, cells)
    storing = {part.slot for part in parts if part.slot >= 0}
    cache.storing |= storing
    sums: list[dict[int, int]] = [{} for _ in parts]
    written, since = False, cache.forgotten
    try:
        await trio.to_thread.run_sync(_write, cache, parts, sums)
        written = True
    except OSError as error:
        cache.fail(error)
    finally:  # also when cancelled
        cache.storing -= storing
        for part, crcs in zip(parts, sums, strict=True):
            if written:
                _publish(cache, layer, part, crcs, cells, since)
            elif part.fresh:
                cache.abandon(part.slot)
        cache.unpin(token)


def _prepare(
    cache: Cache,
    layer: Layer,
    runs: list[tuple[int, int, int]],
    data: memoryview,
    cells: dict[int, list[int]],
) -> list[_Part]:
    parts = []
    at = 0
    for block, start, length in runs:
        piece = data[at : at + length]
        at += length
        number, i = divmod(block, PAGE_BLOCKS)
        word = layer.pages[number][i] if number in layer.pages else None
        if word is None:
            continue
        mask = covered(start, length) & ~word & ~cells[block][0]
        if not mask:
            continue
        zero = _zeros(piece, mask)
        slot = slot_of(word)
        if slot in cache.storing:
            continue
        fresh = False
        if mask & ~zero and slot < 0:
            if layer.cap and layer.slots >= layer.cap:
                continue
            slot = cache.take_slot(layer, block)
            if slot < 0:
                continue
            fresh = True
        parts.append(_Part(block, slot, fresh, mask, zero, piece, start // SECTOR))
    return parts


def _zeros(piece: memoryview, mask: int) -> int:
    """``mask`` when the whole piece is zeros, else 0: blocks of nothing but zeros need no slot."""
    if piece[0] or piece[len(piece) // 2] or piece[-1]:
        return 0
    return mask if bytes(piece) == ZERO_BLOCK[: len(piece)] else 0


def _write(cache: Cache, parts: list[_Part], sums: list[dict[int, int]]) -> None:
    for part, crcs in zip(parts, sums, strict=True):
        for start, count in sector_runs(part.mask & ~part.zero):
            piece = part.data[(start - part.first) * SECTOR : (start + count - part.first) * SECTOR]
            cache.device.write(cache.device.at(part.slot, start * SECTOR), piece)
            crcs.update(enumerate(checksums(piece), start))


def _publish(
    cache: Cache,
    layer: Layer,
    part: _Part,
    crcs: dict[int, int],
    cells: dict[int, list[int]],
    since: int,
) -> None:
    number, i = divmod(part.block, PAGE_BLOCKS)
    page = layer.pages.get(number)
    word = page[i] if page is not None else None
    slot = NO_SLOT if word is None else slot_of(word)
    usable = word is not None and not layer.dead
    full = layer.cap and layer.slots >= layer.cap  # others were stored meanwhile
    if part.fresh and (not usable or slot >= 0 or full):
        cache.abandon(part.slot)
        return
    if not usable or (not part.fresh and part.slot != slot):
        return
    assert word is not None
    mask = part.mask & ~word & ~cells[part.block][0]
    zero = part.zero & mask
    stored = mask & ~zero
    if part.slot >= 0 and stored:
        try:
            cache.load_sums_now(part.slot)
        except IndexFault:  # a slot that is not fresh: those of a fresh one are in memory
            return
        cache.sums.change(part.slot)
        for sector, crc in crcs.items():
            if stored >> sector & 1:
                cache.sums.values[part.slot * SECTORS + sector] = crc
        cache.note_ready(part.slot, stored, since)
        layer.slots += part.fresh
        # The layer may have been pinned, or unpinned, since the slot was taken. Of what is chosen to be evicted,
        # the evictor itself keeps, and holds, what it must not take.
        if part.fresh and not cache.evicting(part.slot):
            (cache.placement.hold if layer.held else cache.placement.unhold)(part.slot)
    elif part.fresh:
        cache.abandon(part.slot)
        if not zero:
            return
    layer.sectors += mask.bit_count()
    keep = part.slot if stored or not part.fresh else NO_SLOT
    zero |= zero_of(word) & ~stored
    layer.writable(number)[i] = pack(keep, zero, valid_of(word) | mask)


def _make_room_in(cache: Cache, layer: Layer, count: int) -> None:
    """The layer is at its cap: evict its own blocks, those first that nobody asked for since they were passed."""
    for slot, number, i in list(_candidates(cache, layer, count)):
        cache.placement.quarantine(slot)
        cache.evict_slot(layer, number, i, slot)


def _candidates(cache: Cache, layer: Layer, count: int) -> Iterator[tuple[int, int, int]]:
    untouched: list[tuple[int, int, int]] = []
    touched: list[tuple[int, int, int]] = []
    numbers = list(layer.pages)
    for n in range(len(numbers)):
        number = numbers[(layer.hand + n) % len(numbers)]
        page = layer.pages[number]
        for i, slot in slots_in(page):
            if not cache.evicting(slot) and not layer.pinned:
                (touched if cache.was_touched(slot) else untouched).append((slot, number, i))
        if len(untouched) >= count:
            layer.hand += n
            break
    yield from (untouched + touched)[:count]


def mark_zero(layer: Layer, offset: int, length: int, cells: dict[int, list[int]]) -> None:
    """The origin has a hole here: remember whole sectors as zeros without storing any. The pages are loaded."""
    for block, start, part in block_runs(offset, length):
        number, i = divmod(block, PAGE_BLOCKS)
        if number not in layer.pages:
            continue
        word = layer.pages[number][i]
        mask = covered(start, part) & ~word & ~cells[block][0]
        if mask:
            layer.writable(number)[i] = with_zeros(word, mask)
            layer.sectors += mask.bit_count()
