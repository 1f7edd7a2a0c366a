# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Reclaiming: what dead layers hold comes free in the background, also after a crash in between."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from forebay_cache.device.failure import Failure
from forebay_cache.durable.commit import COMMIT_RETRY_SECONDS, Committer
from forebay_cache.format.geometry import PAGE_BLOCKS
from forebay_cache.index.index import Index
from forebay_cache.layers.layer import Layer
from forebay_cache.layers.registry import Layers
from forebay_cache.layers.removal import Removal

log = logging.getLogger(__name__)

RECLAIM_SECONDS = COMMIT_RETRY_SECONDS / 4
"""How often it looks whether there is a dead layer."""
_PAGES_AT_ONCE = 256
"""Pages of a layer that are emptied in one commit."""
_PAGES_IN_A_SLICE = 4
"""Pages that are emptied between two turns of others: at most 512 slots come free by that."""


class Reclaimer:
    """Frees the slots of dead layers."""

    def __init__(
        self, index: Index, layers: Layers, removal: Removal, commit: Committer, failure: Failure
    ) -> None:
        self._index = index
        self._layers = layers
        self._removal = removal
        self._commit = commit
        self._failure = failure

    async def run(self) -> None:
        """Reclaim every layer that is dead, until cancelled. Not while the device has failed."""
        told = False
        while True:
            for layer in [x for x in self._layers if x.is_dead and self._failure.error is None]:
                try:
                    await self._reclaim(layer)
                    told = False
                except OSError as error:
                    if self._failure.error is None and not told:
                        log.error("freeing %s failed, trying again: %s", layer.name, error.strerror)
                        told = True
            await trio.sleep(RECLAIM_SECONDS)

    async def _reclaim(self, layer: Layer) -> None:
        """Free what a dead layer holds, a piece at a time, then forget the layer. Raises OSError."""
        # A page that was emptied before the layer died is forgotten as one that has nothing, so the index has to say
        # so too: it would be read again, and what it named, which may be another layer's by now, would be freed.
        await self._commit()
        # Pages in memory are newer than the index: empty those first.
        await self._empty_loaded(layer)
        number = 0
        while True:
            found = await trio.to_thread.run_sync(
                self._index.pages, layer.id, number, _PAGES_AT_ONCE
            )
            if not found:
                break
            await self._empty(layer, [n for n, _ in found])
            number = found[-1][0] + 1
        await self._empty_loaded(layer)
        self._layers.forget(layer)
        await self._commit()

    async def _empty_loaded(self, layer: Layer) -> None:
        for numbers in layer.pages.loaded():
            await self._empty(layer, numbers)

    async def _empty(self, layer: Layer, numbers: Sequence[int]) -> None:
        """Empty pages, commit that, and let go of them, a piece at a time. Raises OSError."""
        for start in range(0, len(numbers), _PAGES_AT_ONCE):
            some = numbers[start : start + _PAGES_AT_ONCE]
            is_changed = False
            for n in range(0, len(some), _PAGES_IN_A_SLICE):
                for number in some[n : n + _PAGES_IN_A_SLICE]:
                    is_changed |= self._empty_page(layer, number)
                await trio.lowlevel.checkpoint()
            if is_changed:
                await self._commit()
            layer.pages.forget(some)  # all at once, a million of them would hold up everybody

    def _empty_page(self, layer: Layer, number: int) -> bool:
        """Empty one page. False if it was empty."""
        page = layer.pages.page(number)  # it may have been shed while others had their turn
        if not any(page):
            return False
        page = layer.pages.writable(number)
        for i in range(PAGE_BLOCKS):
            self._removal.clear(layer, page, i)
        return True
