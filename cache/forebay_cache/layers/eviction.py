# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Eviction: clean blocks leave the cache so that there are free slots before anybody has to wait for one."""

from __future__ import annotations

import logging
import math

import trio

from forebay_cache.device.failure import Failure
from forebay_cache.durable.commit import COMMIT_RETRY_SECONDS, Committer
from forebay_cache.durable.wakeup import Wakeup
from forebay_cache.errors import CacheFull
from forebay_cache.format.entry import block_of_key, layer_of_key
from forebay_cache.format.geometry import PAGE_BLOCKS
from forebay_cache.layers.layer import Layer
from forebay_cache.layers.registry import Layers
from forebay_cache.layers.removal import Removal
from forebay_cache.slots.pool import SlotPool
from forebay_cache.slots.quarantine import Quarantine

log = logging.getLogger(__name__)

ROOM_SECONDS = 0.5
"""Whoever waits for a slot looks again after so long, should nobody say that one has become free."""

_AT_ONCE = 128
"""So many blocks are evicted between two turns of others."""


class Evictor:
    """Keeps the number of free slots above the pool's low-water mark. ``wanted`` is called when it may be below it."""

    def __init__(
        self,
        slots: SlotPool,
        quarantine: Quarantine,
        layers: Layers,
        removal: Removal,
        commit: Committer,
        failure: Failure,
        wanted: Wakeup,
    ) -> None:
        self._slots = slots
        self._quarantine = quarantine
        self._layers = layers
        self._removal = removal
        self._commit = commit
        self._failure = failure
        self._wanted = wanted

    async def room(self, slots: int) -> None:
        """Wait until so many slots can be had. They may be gone again when the caller takes some.

        Raises CacheFull when neither eviction nor anything that is under way can bring them.
        """
        while self._slots.placement.free < slots:
            if self._slots.scan is None and not self._may_come():
                raise CacheFull
            self._wanted.call()
            released = self._quarantine.released
            with trio.move_on_after(ROOM_SECONDS):
                await released.wait()

    def _may_come(self) -> bool:
        return self._slots.may_come() or any(x.slots for x in self._layers if x.is_dead)

    async def run(self) -> None:
        """Evict whenever that is wanted, until cancelled."""
        told = False
        while True:
            await self._wanted.wait()
            try:
                await self._evict_some()
            except OSError as error:
                if self._failure.error is None and not told:
                    log.error("nothing can be evicted, trying again: %s", error.strerror or error)
                    told = True
                await trio.sleep(COMMIT_RETRY_SECONDS)
                self._wanted.call()
            else:
                told = False

    async def _evict_some(self) -> None:
        if self._failure.error is not None:
            return  # nothing is stored either
        missing, before = self._slots.missing(), math.inf
        while 0 < missing < before and self._slots.scan is None:
            await self.evict(self._slots.placement.victims(min(missing, _AT_ONCE)))
            await trio.lowlevel.checkpoint()  # a page that is loaded already awaits nothing
            missing, before = self._slots.missing(), missing
        if self._quarantine.has_changes():
            await self._commit()

    async def evict(self, victims: list[int]) -> None:
        """Evict the blocks in slots that the placement has chosen; it keeps those that cannot go. Raises IndexFault."""
        evicting = self._slots.evicting
        evicting.update(victims)
        try:
            for slot in victims:
                layer, number, i = self._block_in(slot)
                if layer is None or slot not in evicting:
                    continue
                await layer.pages.load([number])
                # Whoever freed the slot in the meantime has taken it out of the set.
                if slot in evicting and self._removal.evict(layer, number, i, slot):
                    evicting.discard(slot)
        finally:
            self._keep_rest()

    def _block_in(self, slot: int) -> tuple[Layer | None, int, int]:
        """The layer, the number of the page and the place in it of the block that was given a slot last."""
        key = self._slots.owner[slot]
        number, i = divmod(block_of_key(key), PAGE_BLOCKS)
        return self._layers.get(layer_of_key(key)), number, i

    def _keep_rest(self) -> None:
        """What was chosen and was not evicted stays."""
        placement = self._slots.placement
        for slot in self._slots.evicting:
            placement.keep(slot)
            layer, _, _ = self._block_in(slot)
            if layer is not None and layer.is_held:
                placement.hold(slot)
        self._slots.evicting.clear()
