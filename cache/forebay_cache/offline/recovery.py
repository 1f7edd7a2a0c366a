"""Opening a cache: device and index are matched, the journal is replayed, and what that gives is made durable.

Where the machine went down since the cache was open last, the clean blocks of hot regions are dropped as well, because
nobody knows which of the writes to their origin arrived. Then it is found out which slots are free.
"""

from __future__ import annotations

import fcntl
import os
import struct
import uuid
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from forebay_cache.cache import Cache, boot_id
from forebay_cache.device.device import Device
from forebay_cache.device.files import open_device, size_of
from forebay_cache.device.superblock import format_was_cut, is_blank, read_superblock, write_format
from forebay_cache.durable.journal import Journal, Position
from forebay_cache.errors import CacheError
from forebay_cache.format import ops
from forebay_cache.format.geometry import BLOCK, FULL, PAGE_BLOCKS
from forebay_cache.format.superblock import Superblock
from forebay_cache.index.index import Index
from forebay_cache.offline.formatting import DEFAULT_SIZE
from forebay_cache.offline.replay import Replay, drop_sectors
from forebay_cache.offline.scan import scan_now, scan_slowly
from forebay_cache.slots.placement import Placement

SCAN_AT_ONCE = 1 << 18
"""If no more slots were ever used, the scan for free ones comes before the cache is open: 0.25 s for a million.

Else it comes while the cache is used already."""
SEQUENCE_GAP = 1 << 20
"""After a replay sequence numbers go on so much higher: frames behind a torn one are never taken for new ones."""


def open_cache(
    device: Path,
    index: Path,
    *,
    size: int | None = None,
    block_size: int = BLOCK,
    boot: str | None = None,
) -> Cache:
    """Open, create or recover a cache.

    ``size`` (bytes) is for a device that is a file and does not exist yet. ``boot`` stands for the kernel's boot id.
    Raises :class:`CacheError` when that is not possible without losing something: the text says what to do.
    """
    if block_size != BLOCK:
        raise CacheError(f"block_size {block_size} is not supported: 64 KiB is the only one yet")
    index.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undo:
        fd = open_device(device, create_size=size or DEFAULT_SIZE)
        undo.callback(os.close, fd)
        undo.callback(fcntl.flock, fd, fcntl.LOCK_UN)  # a map has a duplicate of the descriptor
        layout = _layout(fd, device, index)
        try:
            opened = Index(index, layout.slots if layout else size_of(fd) // BLOCK)
            undo.callback(opened.close)
            found = Device(fd, device, _match(fd, device, layout, opened))
            cache = _start(found, opened, boot or boot_id())
        except (ValueError, TypeError, LookupError, struct.error) as fault:
            raise CacheError(
                f"{device}: what it or its index says makes no sense ({fault}): see 'forebay cache check'"
            ) from fault
        undo.pop_all()
        return cache


def _layout(fd: int, device: Path, index: Path) -> Superblock | None:
    """What the superblock says, if there is one. Raises CacheError where that cannot be gone on with."""
    try:
        layout = read_superblock(fd, device)
    except CacheError:
        if not index.exists():
            raise
        return None  # the index knows whether the format was cut short
    if layout is not None and size_of(fd) < layout.size:
        raise CacheError(
            f"{device}: {size_of(fd)} bytes, but the cache on it has {layout.size}: it was made smaller; "
            f"give it its size back, or drop the cache with 'forebay cache format --force'"
        )
    if layout is not None and not index.exists():
        raise CacheError(
            f"{device}: holds a cache whose index is not at {index}; point 'state' to it, or drop what the "
            "cache holds with 'forebay cache format --force'"
        )
    return layout


def _match(fd: int, path: Path, layout: Superblock | None, index: Index) -> Superblock:
    """Device and index belong together, or the device is blank and the index has never been used.

    As good as blank is one whose format a power cut interrupted.
    """
    ident = uuid.UUID(index.meta.uuid)
    if layout is None:
        cut_short = index.meta.fresh and format_was_cut(fd, ident)
        if not cut_short and not is_blank(fd):
            read_superblock(fd, path)  # it has its own words for one that is damaged
            raise CacheError(
                f"{path}: holds something that is not a Forebay cache; choose another device, or overwrite it "
                "with 'forebay cache format --force'"
            )
        if not index.meta.fresh:
            raise CacheError(
                f"{path}: is blank, but the index at {index.path} describes a cache; bring back the device "
                f"{index.meta.uuid}, or start over with 'forebay cache format --force'"
            )
        return write_format(fd, path, ident)
    if layout.uuid != ident:
        raise CacheError(
            f"{path}: is cache {layout.uuid}, but the index at {index.path} belongs to {ident}; correct "
            "'device' or 'state', or drop what it holds with 'forebay cache format --force'"
        )
    return layout


def _start(device: Device, index: Index, boot: str) -> Cache:
    """The cache as the index and the journal have it, durable as it is now."""
    meta = index.meta
    journal = Journal(device, Position(meta.journal_offset, meta.journal_sequence))
    replay = Replay(index.layers())
    for payload in journal.replay():
        replay.take(ops.unpack(payload))
    device.read_nothing_ahead()
    survived = meta.boot_id == boot
    frontier = max(meta.frontier, replay.frontier)
    placement = Placement(device.slots, frontier=frontier)
    cache = Cache(device, index, journal, placement)
    meta.frontier = frontier
    meta.next_layer = max(meta.next_layer, *(x + 1 for x in replay.known), 1)
    cache.records.recover(index.records())
    for ident, record in replay.known.items():
        cache.layers.recover(ident, record, journaled=ident in replay.made)
    replay.apply(cache, survived=survived)
    known_hot = set(index.hot()) | replay.hot
    alive = {x.id for x in cache.layers if not x.is_dead}
    hot = {region for region in known_hot if region[0] in alive}
    if survived:
        cache.hot.regions = hot
    else:
        _drop_hot(cache, hot)
    cache.hot.recover(known_hot - hot, keep=False)
    cache.hot.recover(hot, keep=survived)
    _commit_start(cache, boot)
    if frontier <= SCAN_AT_ONCE:
        scan_now(cache)
    else:
        cache.slots.scan = partial(scan_slowly, cache)
    return cache


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


def _drop_hot(cache: Cache, regions: set[tuple[int, int]]) -> None:
    """Drop the clean blocks of regions whose origin was being written when the machine went down."""
    for ident, region in regions:
        layer = cache.layers.get(ident)
        if layer is None or layer.private:
            continue
        for block in range(region * PAGE_BLOCKS, (region + 1) * PAGE_BLOCKS):
            drop_sectors(layer, block, FULL)
