"""Replay: what the records of the journal say that the index does not have yet.

A record of the journal is a claim. For each sector the newest claim whose data matches its checksum is taken, down to
what the index says. Same boot id as the last run: the kernel still has every page that was written, so the newest claim
holds, or the one before where the daemon was killed between a record and its data; anything else is damage, and is
kept as such. Another boot id: the machine went down. Everything that was flushed is there, whole; of what was not,
data may be missing or torn.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from forebay_cache.cache import Cache
from forebay_cache.format import ops
from forebay_cache.format.checksum import SIZE, UNREADABLE, checksum
from forebay_cache.format.entry import (
    NO_SLOT,
    Entry,
    entry_at,
    pack,
    pack_second,
    put_entry,
    side_of,
    slot_of,
    valid_of,
    zero_of,
)
from forebay_cache.format.geometry import FULL, PAGE_BLOCKS, SECTOR, SECTORS
from forebay_cache.format.records import LayerRecord
from forebay_cache.layers.layer import Layer

log = logging.getLogger(__name__)

Claim = tuple[int, int, int] | None
"""What a record says of one sector: (side, slot, checksum) of its data, or None: zeros."""

OLDER: Final = (-1, -1, -1)
"""In place of a claim: none of the journal holds."""


@dataclass
class _Block:
    """What the journal claims of one private block."""

    slots: list[int] = field(default_factory=lambda: [NO_SLOT, NO_SLOT])
    """The slot of each side that was named last."""
    claims: dict[int, list[Claim]] = field(default_factory=dict)
    """By sector, oldest first."""
    replaced: bool = False
    """True if it was zeroed as a whole at some time: what the index says of it does not count any more."""
    last: int = 0
    """Sectors that the last frame names: killed behind it, their data may not have been written, nor answered for."""


class Replay:
    """Collects the records of the journal, then applies them to the layers. ``known``: the layers of the index."""

    def __init__(self, known: dict[int, LayerRecord]) -> None:
        self.known = known
        """All layers, by number: those of the index and those that the journal says were made."""
        self.made: set[int] = set()
        """Numbers of those that are in the journal only."""
        self.hot: set[tuple[int, int]] = set()
        """(layer, region) of the regions that the journal says are hot."""
        self.frontier = 0
        """No record names a slot from here on."""
        self.records = 0
        """How many there are."""
        self._blocks: dict[tuple[int, int], _Block] = {}
        self._last: list[_Block] = []
        self._drops: dict[tuple[int, int], int] = {}

    def take(self, records: Iterable[ops.Op]) -> None:
        """Collect the records of the next frame."""
        for block in self._last:
            block.last = 0
        self._last.clear()
        for op in records:
            self.records += 1
            if op.kind == ops.LAYER:
                if op.layer not in self.known:
                    self.known[op.layer] = LayerRecord(op.name, bool(op.side))
                    self.made.add(op.layer)
            elif op.kind == ops.HOT:
                self.hot.add((op.layer, op.a))
            elif op.kind == ops.DROP:
                key = (op.layer, op.a)
                self._drops[key] = self._drops.get(key, 0) | op.mask
            else:
                self._private(op)

    def _private(self, op: ops.Op) -> None:
        block = self._blocks.setdefault((op.layer, op.a), _Block())
        if op.kind == ops.ZERO:
            if op.mask == FULL:
                block.slots = [NO_SLOT, NO_SLOT]
                block.replaced = True
            for sector in _bits(op.mask):
                block.claims.setdefault(sector, []).append(None)
            return
        block.slots[op.side] = op.b
        block.last |= op.mask
        self._last.append(block)
        self.frontier = max(self.frontier, op.b + 1)
        for sector, crc in zip(_bits(op.mask), op.crcs, strict=True):
            block.claims.setdefault(sector, []).append((op.side, op.b, crc))

    def apply(self, cache: Cache, *, survived: bool) -> None:
        """Have the layers of the cache, which are all there, say what the records say.

        ``survived``: the kernel that the records were given to is still running. Raises IndexFault.
        """
        for (ident, block), mask in self._drops.items():
            layer = cache.layers.get(ident)
            if layer is not None:
                drop_sectors(layer, block, mask)
        for (ident, block), claimed in self._blocks.items():
            layer = cache.layers.get(ident)
            if layer is not None and not layer.is_dead:
                _apply_block(cache, layer, block, claimed, survived=survived)
        if self.records:
            log.info(
                "recovered %d journal records%s",
                self.records,
                "" if survived else " after a power loss",
            )


def _bits(mask: int) -> list[int]:
    return [s for s in range(SECTORS) if mask >> s & 1]


def drop_sectors(layer: Layer, block: int, mask: int) -> None:
    """At the start, before slots are in use: take the sectors ``mask`` out of a clean block. Raises IndexFault."""
    number, i = divmod(block, PAGE_BLOCKS)
    word = layer.pages.page(number)[i]
    hit = word & mask
    if not hit:
        return
    page = layer.pages.writable(number)
    layer.sectors -= hit.bit_count()
    slot, valid, zero = slot_of(word), valid_of(word) & ~mask, zero_of(word) & ~mask
    if slot != NO_SLOT and not valid & ~zero:
        layer.slots -= 1
        slot = NO_SLOT
    page[i] = pack(slot, zero, valid)


def _apply_block(
    cache: Cache, layer: Layer, block: int, claimed: _Block, *, survived: bool
) -> None:
    number, i = divmod(block, PAGE_BLOCKS)
    layer.pages.page(number)
    page = layer.pages.writable(number)
    before = entry_at(page, i)
    entry = Entry(0) if claimed.replaced else before
    slots = [new if new >= 0 else old for new, old in zip(claimed.slots, entry.slots, strict=True)]
    valid, zero, side = entry.valid, entry.zero, side_of(entry.second)
    for sector, claims in claimed.claims.items():
        bit = 1 << sector
        chosen = _choose(cache, sector, claims)
        answered = not claimed.last & bit
        if chosen == OLDER and survived and not _fits(cache, sector, before, answered):
            chosen = claims[-1]  # damaged: whoever reads it shall hear of it
        if chosen == OLDER:
            continue
        valid |= bit
        if chosen is None:
            zero |= bit
        else:
            zero &= ~bit
            side = side | bit if chosen[0] else side & ~bit
            _set_sum(cache, chosen[1], sector, chosen[2])
    data = valid & ~zero
    used = [bool(data & ~side), bool(data & side)]
    final = [slot if use else NO_SLOT for slot, use in zip(slots, used, strict=True)]
    layer.slots += sum(s >= 0 for s in final) - sum(s >= 0 for s in before.slots)
    layer.sectors += valid.bit_count() - before.valid.bit_count()
    put_entry(page, i, Entry(pack(final[0], zero, valid), pack_second(final[1], side)))


def _choose(cache: Cache, sector: int, claims: list[Claim]) -> Claim:
    """The newest claim that holds; OLDER when none does and the index has the last word."""
    for claim in reversed(claims):
        if claim is None or _crc_at(cache, claim[1], sector) == claim[2]:
            return claim
    return OLDER


def _crc_at(cache: Cache, slot: int, sector: int) -> int:
    """The checksum of what lies on the device; UNREADABLE if it cannot be read."""
    data = bytearray(SECTOR)
    try:
        cache.device.read_into(cache.device.at(slot, sector * SECTOR), [data])
    except OSError:
        return UNREADABLE
    return checksum(data)


def _fits(cache: Cache, sector: int, entry: Entry, answered: bool) -> bool:
    """True if what the index says of a sector of a private block holds.

    That there is nothing, or zeros, was true only before the first claim: not if that was ``answered``.
    """
    if not entry.data >> sector & 1:
        return not answered
    slot = entry.slots[entry.side >> sector & 1]
    stored = cache.index.sums([slot]).get(slot, bytes(SIZE))
    return _crc_at(cache, slot, sector) == array("I", stored)[sector]


def _set_sum(cache: Cache, slot: int, sector: int, crc: int) -> None:
    cache.sums.load_now(slot)
    cache.sums.change(slot)
    cache.sums.values[slot * SECTORS + sector] = crc
