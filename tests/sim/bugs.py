# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Bugs of the cache that lose data at a power cut, planted in a simulation and in a real daemon alike."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import trio

import forebay.disk.origin_writes
import forebay_cache.blocks.private
import forebay_fast
from forebay.image.image import Image
from forebay_cache import Cache, Layer
from forebay_cache.blocks import slow_writes
from forebay_cache.device.lanes import DeviceThreads, Lane
from forebay_cache.durable.commit import Committer
from forebay_cache.durable.intent import Intent
from forebay_cache.durable.publish import Publisher
from forebay_cache.durable.sync import Begun
from forebay_cache.format.checksum import checksums
from forebay_cache.layers.layer import LayerState
from forebay_cache.slots.quarantine import Quarantine

Replace = Callable[[object, str, object], None]
"""Puts something in the place of an attribute: (of what, name, value)."""


def in_core(replace: Replace, bug: str) -> None:
    """The same in the compiled core, if there is one; it has to be compiled with its plants, as by make setup."""
    if not forebay_fast.missing:
        assert forebay_fast.core.has_plants, "make setup"
        replace(forebay_fast.core, "bugs", frozenset({bug}))


def index_before_data(replace: Replace) -> None:
    async def commit(self: Committer) -> None:
        if self.has_changes():
            snapshot = self.snapshot()
            try:
                await self._index.commit(snapshot.changes)
                await self._sync()
            except BaseException:
                snapshot.failed()
                raise
            snapshot.succeeded()

    replace(Committer, "_run", commit)


def slots_reused_early(replace: Replace) -> None:
    add = Quarantine.add

    def add_and_release(self: Quarantine, slot: int) -> None:
        add(self, slot)
        self._freed.remove(slot)
        self.leaving -= 1
        self._placement.release(slot)

    replace(Quarantine, "add", add_and_release)


def overwritten_in_place(replace: Replace) -> None:
    def target(word: int, second: int, mask: int, opened: int) -> int:
        return second & mask & word

    replace(forebay_cache.blocks.private, "_target", target)
    replace(slow_writes, "_target", target)
    in_core(replace, "wrong side")


def open_sectors_kept(replace: Replace) -> None:
    """A sync makes sectors durable, and they count as open all the same: their places are written over."""

    def begin_sync(self: Intent) -> None:
        self.syncing = dict(self.open_sectors)

    replace(Intent, "begin_sync", begin_sync)


def flush_told_early(replace: Replace) -> None:
    """A flush that was begun counts as one that has ended."""

    async def wait(self: Begun) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    replace(Begun, "wait", wait)
    in_core(replace, "reply before sync")


def image_not_synced(replace: Replace) -> None:
    """What was written back counts as clean before it is durable."""

    async def flush(self: Image, *, times: bool = False) -> None:
        await trio.lowlevel.checkpoint()

    replace(Image, "flush", flush)


def no_region_log(replace: Replace) -> None:
    async def mark_hot(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    replace(forebay.disk.origin_writes, "mark_hot", mark_hot)


# -- while the device is slow, and threads write ---------------------------------------------------------------


def words_before_data(replace: Replace) -> None:
    """The page names a place before anything is there."""

    async def write(
        cache: Cache, layer: Layer, offset: int, data: memoryview, may_store: Callable[[], bool]
    ) -> slow_writes.Grown | None:
        parts = slow_writes._plan(cache, layer, offset, data)
        if parts is None:
            return None
        sums = [checksums(part.data) for part in parts]
        grown = slow_writes._store(cache, layer, parts, sums, cache.ready.forgotten)
        await cache.threads.writes.run(slow_writes._write, cache, parts)
        return grown

    replace(slow_writes, "write", write)


def sync_before_records(replace: Replace) -> None:
    """A sync makes sectors durable whose records are still to be written."""

    async def begin_sync(self: Publisher) -> None:
        self._intent.begin_sync()
        await trio.lowlevel.checkpoint()

    replace(Publisher, "begin_sync", begin_sync)


def opened_is_overwritten(replace: Replace) -> None:
    """What was written since the last sync goes to the other side, which durable state names."""
    part = slow_writes._part

    def any_part(cache: Cache, *others: Any) -> Any:
        opened, cache.intent.open_sectors = cache.intent.open_sectors, {}
        try:
            return part(cache, *others)
        finally:
            cache.intent.open_sectors = opened

    replace(slow_writes, "_part", any_part)
    replace(slow_writes, "_is_as_planned", lambda cache, layer, part: True)


def frozen_is_written(replace: Replace) -> None:
    """A write that has begun gets into its layer although that was frozen meanwhile."""
    store = slow_writes._store

    def store_anyhow(cache: Cache, layer: Layer, *others: Any) -> slow_writes.Grown | None:
        with mock.patch.object(Layer, "state", LayerState.OPEN):
            return store(cache, layer, *others)

    replace(slow_writes, "_store", store_anyhow)


def hung_threads_forgotten(replace: Replace) -> None:
    """Whatever a thread may still write to is given to others as if it had ended."""
    replace(Lane, "when_ended", lambda self, do: do())
    replace(DeviceThreads, "lost", 0)

    async def place(self: Lane) -> None:
        await trio.lowlevel.checkpoint()
        self._free -= 1

    replace(Lane, "_place", place)
