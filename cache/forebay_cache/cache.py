# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The block cache: what it consists of, and how the parts are put together.

All state is changed on the event loop, between two awaits; threads only move bytes. What is durable when, and in
which order, is written down in ``cache/README.md``: read it before adding an ``await`` to this package.
"""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any, Protocol

import trio

from forebay_cache.device.device import Device
from forebay_cache.device.failure import Failure
from forebay_cache.device.files import is_kept_in_memory
from forebay_cache.device.lanes import DeviceThreads
from forebay_cache.device.pace import Pace
from forebay_cache.device.syncer import Syncer
from forebay_cache.device.worker import TIMEOUT
from forebay_cache.durable.commit import Committer
from forebay_cache.durable.hot import HotRegions
from forebay_cache.durable.intent import Intent
from forebay_cache.durable.journal import Journal, JournalFull
from forebay_cache.durable.publish import Publisher
from forebay_cache.durable.records import Records
from forebay_cache.durable.sync import DeviceSync
from forebay_cache.durable.wakeup import Wakeup
from forebay_cache.format.geometry import BLOCK
from forebay_cache.format.superblock import Superblock
from forebay_cache.index.index import Index
from forebay_cache.index.sums import Sums
from forebay_cache.layers.eviction import Evictor
from forebay_cache.layers.in_flight import InFlight
from forebay_cache.layers.invalidation import Invalidations
from forebay_cache.layers.reclaim import Reclaimer
from forebay_cache.layers.registry import Layers
from forebay_cache.layers.removal import Removal
from forebay_cache.layers.shedding import shed_pages
from forebay_cache.slots.placement import Placement
from forebay_cache.slots.pool import SlotPool
from forebay_cache.slots.quarantine import Quarantine
from forebay_cache.slots.ready import ReadyMap

log = logging.getLogger(__name__)


class Follower(Protocol):
    """Holds on to the ready masks and the map of the device, which are other objects after the device has grown."""

    misses: int

    @property
    def hits(self) -> int:
        """Reads that needed nothing of the origin."""

    def follow(self) -> None:
        """Take them anew."""


class Cache:
    """An open cache: its parts, which callers use directly.

    Made by :func:`forebay_cache.offline.opening.open_cache`; :meth:`run` has to be running while it is used.
    """

    def __init__(
        self,
        device: Device,
        index: Index,
        journal: Journal,
        placement: Placement,
        timeout: float = TIMEOUT,
    ) -> None:
        """``timeout``: after how many seconds a call to the device, or to the index, counts as failed."""
        pace = Pace(always_slow=not is_kept_in_memory(device.fd))
        commit_wanted, eviction_wanted = Wakeup(), Wakeup()
        self.device = device
        self.index = index
        self.failure = Failure(device.path)
        self.threads = DeviceThreads(pace, self.failure, timeout)
        self.sums = Sums(device.slots, index.sums)
        self.ready = ReadyMap(device.slots, self.failure)
        pace.on_suspicion = self.ready.forget
        self.quarantine = Quarantine(placement)
        self.slots = SlotPool(
            placement,
            index.meta,
            self.sums,
            self.ready,
            self.quarantine,
            want_commit=commit_wanted.call,
            want_eviction=eviction_wanted.call,
        )
        dirty_pages: set[int] = set()
        self.intent = Intent(
            device,
            journal,
            self.failure,
            pace,
            self.sums,
            self.ready,
            dirty_pages,
            commit_wanted.call,
        )
        self.publish = Publisher(self.intent, self.failure, self.threads)
        self.hot = HotRegions(self.intent, self.failure)
        self.records = Records()
        self.layers = Layers(index, self.intent, self.hot, dirty_pages)
        syncer = Syncer(device.fd, device.sync, pace, timeout)
        self.sync = DeviceSync(syncer, self.intent, self.publish, self.failure)
        self.commit = Committer(
            index,
            self.sync,
            self.failure,
            commit_wanted,
            (self.intent, self.quarantine, self.layers, self.sums, self.records, self.hot),
        )
        self.commit.join_past_device(self.records)
        self.invalidations = Invalidations(self.layers, index, self.failure, self.commit)
        self.removal = Removal(self.slots, self.failure)
        self.evictor = Evictor(
            self.slots,
            self.quarantine,
            self.layers,
            self.removal,
            self.commit,
            self.failure,
            eviction_wanted,
        )
        self.in_flight = InFlight(self.failure)
        self.views: weakref.WeakSet[Follower] = weakref.WeakSet()
        """All that read from the map of the device."""

    # -- questions --------------------------------------------------------------------------------------------

    @property
    def uuid(self) -> str:
        """Of the device and its index."""
        return self.index.meta.uuid

    @property
    def failed(self) -> OSError | None:
        """Why the device is not used at present; None while it is."""
        return self.failure.error

    def served(self) -> int:
        """A number that is another one each time anybody has read or written."""
        reads = sum(view.hits + view.misses for view in self.views)
        return reads + self.intent.journal.head.sequence

    def info(self) -> dict[str, Any]:
        """Figures for ``forebay cache info``; bytes unless named otherwise."""
        layout = self.device.layout
        clean = sum(x.slots for x in self.layers if not x.private)
        private = sum(x.slots for x in self.layers if x.private)
        failed = self.failed
        return {
            "device": str(self.device.path),
            "uuid": self.uuid,
            "format": self.index.meta.format,
            "size": layout.size,
            "block_size": layout.block_size,
            "slots": layout.slots,
            "free_slots": self.slots.placement.free,
            "used_bytes": (clean + private) * BLOCK,
            "clean_bytes": clean * BLOCK,
            "private_bytes": private * BLOCK,
            "journal_bytes": self.intent.journal.used,
            "evicted_blocks": self.slots.evicted_blocks,
            "damaged_slots": self.slots.damaged_slots,
            "slow": self.threads.pace.is_slow,
            "slow_writes": self.threads.pace.slow_writes,
            "latency": self.threads.pace.latency.told(),
            "state": self._state(),
            "error": failed.strerror if failed else self.commit.error,
        }

    def _state(self) -> str:
        if self.failed is not None:
            return "failed"
        if self.commit.error is not None:
            return "unrecorded"
        return "recovering" if self.slots.scan else "ok"

    # -- durability -------------------------------------------------------------------------------------------

    async def make_durable(self) -> None:
        """Return when all that was written and noted before this call is durable. Raises OSError.

        That is a sync, and a commit only where the journal has no room for the records.
        """
        try:
            await self.sync()
        except JournalFull:
            await self.commit()

    async def journal_room(self, length: int) -> None:
        """Return when the journal has room for the records of a write of ``length`` bytes, and the next commit for what
        it changes: note them, and change it, without an await.

        At once where the device has failed, for nothing is noted then. Raises OSError: JournalFull for more than the
        journal ever holds, else because commits, which make room, fail.
        """
        while self.failure.error is None and not self.intent.has_room(length):
            if not (self.intent.has_changes() or self.intent.is_crowded()):
                raise JournalFull
            await self.commit()

    # -- life -------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Commit, evict and reclaim until cancelled."""
        reclaimer = Reclaimer(self.index, self.layers, self.removal, self.commit, self.failure)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.threads.pace.watch)
            nursery.start_soon(self.commit.run)
            nursery.start_soon(self.evictor.run)
            nursery.start_soon(self.quarantine.run)
            nursery.start_soon(self.ready.watch)
            nursery.start_soon(reclaimer.run)
            nursery.start_soon(shed_pages, self.layers, self.commit)
            nursery.start_soon(self.slots.find_free)
            task_status.started()

    def grow(self, layout: Superblock) -> None:
        """The device has grown, and says so durably: use the new slots. A critical section: must not be split.

        Raises OSError when there is no memory for that; then the cache goes on as large as it was.
        """
        try:
            self.sums.grow(layout.slots)
            self.slots.grow(layout.slots)
            self.ready.grow(layout.slots)
            self.device.adopt(layout)
        finally:
            self.follow()
        self.slots.use(layout.slots)

    def follow(self) -> None:
        """Have all views take the masks and the map anew: these are other objects now."""
        for view in self.views:
            view.follow()

    async def close(self) -> None:
        """Commit, mark the end as clean, let go of device and index."""
        self.index.meta.clean = True
        try:
            while self.failure.error is None and self.hot.has_changes():  # each commit takes some
                await self.commit()
            await self.commit.close()
        except OSError as error:
            log.error("the last commit failed, the next start will recover: %s", error)
        self.release()

    def release(self) -> None:
        """Let go of device and index without a commit, as a crash would."""
        hangs = self.threads.lost or self.sync.hangs
        self.sync.close()
        self.index.close()
        if not hangs:  # else its threads still use the descriptor, and closing it may wait for them
            self.device.close()


def boot_id() -> str:
    """The running kernel's boot id: what the page cache held is gone when it changes."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
