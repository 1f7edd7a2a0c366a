# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The start of a cache: the journal is replayed, and what that gives is made durable before anything else is written.

Where the machine went down since the cache was open last, the clean blocks of hot regions are dropped as well, because
nobody knows which of the writes to their origin arrived. Then it is found out which slots are free.
"""

from __future__ import annotations

from functools import partial

from forebay_cache.cache import Cache
from forebay_cache.device.device import Device
from forebay_cache.device.worker import TIMEOUT
from forebay_cache.durable.journal import Journal, Position
from forebay_cache.format.geometry import FULL, PAGE_BLOCKS
from forebay_cache.index.index import Index
from forebay_cache.offline.claims import Claims
from forebay_cache.offline.replay import Telling, apply, drop_sectors, nobody_is_told
from forebay_cache.offline.scan import scan_now, scan_slowly
from forebay_cache.slots.placement import Placement

SCAN_AT_ONCE = 1 << 18
"""If no more slots were ever used, the scan for free ones comes before the cache is open: 0.25 s for a million.

Else it comes while the cache is used already."""
SEQUENCE_GAP = 1 << 20
"""After a replay sequence numbers go on so much higher: frames behind a torn one are never taken for new ones."""


def recover(
    device: Device,
    index: Index,
    boot: str,
    timeout: float = TIMEOUT,
    telling: Telling = nobody_is_told,
) -> Cache:
    """The cache as the index and the journal have it, durable as it is now.

    ``boot`` is the running kernel's boot id; for ``timeout`` see :class:`Cache`. ``telling`` is told how far it is.
    Raises OSError, and ValueError and its like where index or journal make no sense.
    """
    meta = index.meta
    journal = Journal(device, Position(meta.journal_offset, meta.journal_sequence))
    claims = Claims.read(journal.replay())
    if claims.fault is not None:
        raise claims.fault
    device.read_nothing_ahead()
    survived = meta.boot_id == boot
    meta.frontier = max(meta.frontier, claims.frontier)
    placement = Placement(device.slots, frontier=meta.frontier)
    cache = Cache(device, index, journal, placement, timeout)
    cache.records.recover(index.records())
    _recover_layers(cache, claims)
    apply(cache, claims, survived=survived, telling=telling)
    _recover_hot(cache, claims, survived=survived, telling=telling)
    _commit_start(cache, boot)
    if meta.frontier <= SCAN_AT_ONCE:
        scan_now(cache)
    else:
        cache.slots.scan = partial(scan_slowly, cache)
    return cache


def _recover_layers(cache: Cache, claims: Claims) -> None:
    """Have all layers in the cache: those of the index, and those that only the journal says were made."""
    known, meta = cache.index.layers(), cache.index.meta
    made = {ident: record for ident, record in claims.made.items() if ident not in known}
    meta.next_layer = max(meta.next_layer, *(ident + 1 for ident in known | made), 1)
    for ident, record in (known | made).items():
        cache.layers.recover(ident, record, journaled=ident in made)


def _recover_hot(cache: Cache, claims: Claims, *, survived: bool, telling: Telling) -> None:
    """Hot regions stay so while the kernel lives on; else their clean blocks are dropped, and they are not hot."""
    known = set(cache.index.hot()) | claims.hot
    alive = {x.id for x in cache.layers if not x.is_dead}
    hot = {region for region in known if region[0] in alive}
    if not survived:
        _drop_hot(cache, hot, telling)
    cache.hot.recover(known - hot, keep=False)
    cache.hot.recover(hot, keep=survived)


def _drop_hot(cache: Cache, regions: set[tuple[int, int]], telling: Telling) -> None:
    """Drop the clean blocks of regions whose origin was being written when the machine went down."""
    for done, (ident, region) in enumerate(regions):
        telling("regions whose images were being written", done, len(regions))
        layer = cache.layers.get(ident)
        if layer is None or layer.private:
            continue
        if not any(layer.pages.page(region)):
            continue
        for block in range(region * PAGE_BLOCKS, (region + 1) * PAGE_BLOCKS):
            drop_sectors(layer, block, FULL)


def _commit_start(cache: Cache, boot: str) -> None:
    """Make what was recovered durable before anything new: the device's data first, as always."""
    journal, meta = cache.intent.journal, cache.index.meta
    journal.head = Position(journal.head.offset, journal.head.sequence + SEQUENCE_GAP)
    meta.boot_id = boot
    meta.clean = meta.fresh = False
    snapshot = cache.commit.snapshot()
    cache.device.sync()
    cache.index.commit_now(snapshot.changes)
    snapshot.succeeded()
