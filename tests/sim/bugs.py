# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Bugs of the cache that lose data at a power cut, planted in a simulation and in a real daemon alike."""

from collections.abc import Callable

import trio

import forebay.disk.origin_writes
import forebay_cache.blocks.private
from forebay.image.image import Image
from forebay_cache.durable.commit import Committer
from forebay_cache.slots.quarantine import Quarantine

Replace = Callable[[object, str, object], None]
"""Puts something in the place of an attribute: (of what, name, value)."""


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


def image_not_synced(replace: Replace) -> None:
    """What was written back counts as clean before it is durable."""

    async def flush(self: Image, *, times: bool = False) -> None:
        await trio.lowlevel.checkpoint()

    replace(Image, "flush", flush)


def no_region_log(replace: Replace) -> None:
    async def mark_hot(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    replace(forebay.disk.origin_writes, "mark_hot", mark_hot)
