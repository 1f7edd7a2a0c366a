# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Replay: a start applies the claims of the journal to the layers that the index has. The rule is in ``claims``."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable

from forebay_cache.cache import Cache
from forebay_cache.format.checksum import SIZE, UNREADABLE, checksum
from forebay_cache.format.entry import (
    NO_SLOT,
    Entry,
    block_of_key,
    entry_at,
    layer_of_key,
    pack,
    pack_second,
    put_entry,
    side_of,
    slot_of,
    valid_of,
    zero_of,
)
from forebay_cache.format.geometry import PAGE_BLOCKS, SECTOR, SECTORS
from forebay_cache.layers.layer import Layer
from forebay_cache.offline.claims import Claimed, Claims, Judge

log = logging.getLogger(__name__)


Telling = Callable[[str, int, int], None]
"""Called with what is being gone through at the start, how many of it are done, and how many there are."""


def nobody_is_told(_what: str, _done: int, _total: int) -> None:
    """For whoever does not ask."""


def apply(
    cache: Cache, claims: Claims, *, survived: bool, telling: Telling = nobody_is_told
) -> None:
    """Have the layers of the cache, which are all there, say what the records say.

    ``survived``: the kernel that the records were given to is still running. Claims on a layer that is gone or dead are
    passed over. Raises IndexFault, and ValueError for a claim on private data of a clean layer.
    """
    for key, mask in claims.dropped.items():
        layer = cache.layers.get(layer_of_key(key))
        if layer is not None:
            drop_sectors(layer, block_of_key(key), mask)
    judge = _judge(cache, survived=survived)
    for done, (key, claimed) in enumerate(claims.blocks.items()):
        telling("blocks of the journal", done, len(claims.blocks))
        layer = cache.layers.get(layer_of_key(key))
        if layer is not None and not layer.is_dead:
            if not layer.private:
                raise ValueError(f"a record of private data in layer {layer.id}, which is clean")
            _apply_block(cache, layer, block_of_key(key), claimed, judge)
    if claims.records:
        lost = "" if survived else " after a power loss"
        log.info("recovered %d journal records%s", claims.records, lost)


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


def _apply_block(cache: Cache, layer: Layer, block: int, claimed: Claimed, judge: Judge) -> None:
    number, i = divmod(block, PAGE_BLOCKS)
    layer.pages.page(number)
    page = layer.pages.writable(number)
    before = entry_at(page, i)
    after = _merged(cache, before, claimed, judge)
    layer.slots += sum(s >= 0 for s in after.slots) - sum(s >= 0 for s in before.slots)
    layer.sectors += after.valid.bit_count() - before.valid.bit_count()
    put_entry(page, i, after)


def _merged(cache: Cache, before: Entry, claimed: Claimed, judge: Judge) -> Entry:
    """The entry with what the claims say of it; the checksums of the sectors that they name are taken as well."""
    entry = Entry(0) if claimed.is_replaced else before
    slots = [new if new >= 0 else old for new, old in zip(claimed.slots, entry.slots, strict=True)]
    valid, zero, side = entry.valid, entry.zero, side_of(entry.second)
    provisioned = entry.provisioned
    for sector in claimed.sectors:
        claim = judge.verdict(claimed, sector, before).claim
        bit = 1 << sector
        if claim is None:
            here = side >> sector & 1
            old = entry.slots[here]
            if entry.data & bit and old not in (NO_SLOT, slots[here]):
                _bring(cache, old, slots[here], sector, judge.stored(old, sector))
            continue
        valid |= bit
        if claim.is_zeros:
            zero |= bit
            provisioned = provisioned | bit if claim.is_provisioned else provisioned & ~bit
        else:
            zero &= ~bit
            side = side | bit if claim.side else side & ~bit
            _bring(cache, claim.slot, slots[claim.side], sector, claim.checksum)
    data = valid & ~zero
    used = (data & ~side, data & side)
    first, second = (slot if mask else NO_SLOT for slot, mask in zip(slots, used, strict=True))
    return Entry(pack(first, zero, valid), pack_second(second, side, provisioned))


def _bring(cache: Cache, old: int, slot: int, sector: int, value: int) -> None:
    """Have ``slot`` hold a sector, whose checksum is ``value``, that lies in ``old``. Raises OSError.

    These differ where a block was written as a whole into a new slot, and the machine went down before all of that was
    there. What of it is missing is what the old slot has, which nobody has written to since; and the place in the new
    one has nothing that counts. So this can be done again, should a start not get to its commit.
    """
    if old != slot:
        data = _sector_at(cache, old, sector)
        if data is not None and checksum(data) == value:  # else it is damaged there as well
            cache.device.write(cache.device.at(slot, sector * SECTOR), data)
    _take_sum(cache, slot, sector, value)


def _take_sum(cache: Cache, slot: int, sector: int, value: int) -> None:
    cache.sums.load_now(slot)
    cache.sums.change(slot)
    cache.sums.values[slot * SECTORS + sector] = value


def _judge(cache: Cache, *, survived: bool) -> Judge:
    """Of what the kernel has of the device now, and of the checksums in the index."""

    def lies(slot: int, sector: int, value: int) -> bool:
        return slot < cache.device.slots and _sum_at(cache, slot, sector) == value

    def stored(slot: int, sector: int) -> int:
        return array("I", cache.index.sums([slot]).get(slot, bytes(SIZE)))[sector]

    return Judge(survived, lies, stored)


def _sum_at(cache: Cache, slot: int, sector: int) -> int:
    """The checksum of what lies on the device; UNREADABLE if it cannot be read."""
    data = _sector_at(cache, slot, sector)
    return UNREADABLE if data is None else checksum(data)


def _sector_at(cache: Cache, slot: int, sector: int) -> bytearray | None:
    """What lies on the device; None if it cannot be read."""
    data = bytearray(SECTOR)
    try:
        cache.device.read_into(cache.device.at(slot, sector * SECTOR), [data])
    except OSError:
        return None
    return data
