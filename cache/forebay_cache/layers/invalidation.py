# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Clean layers whose origin is written while the cache device has failed.

The device cannot be told then that what it holds is going to be out of date. So the index is told, by a commit that
names nothing on the device, that the whole layer is dead; only then may its origin be written. In memory the layer
lives on: should the device work again, a commit says of it what memory says.

That commit is one piece, so what it has to take in is bounded: of the pages from which blocks were dropped, the index
has to have stored most before, while their layer is dead there and nobody believes them.
"""

from __future__ import annotations

from dataclasses import replace

import trio

from forebay_cache.device.failure import Failure
from forebay_cache.durable.commit import Committer
from forebay_cache.durable.intent import MOST_PAGES
from forebay_cache.format.entry import block_of_key, layer_of_key
from forebay_cache.index.changes import Changes, Share, nothing
from forebay_cache.index.index import Index
from forebay_cache.layers.layer import Layer, LayerState
from forebay_cache.layers.registry import Layers

_MORE_PAGES = MOST_PAGES // 8
"""With so many more dirty pages than could not be stored the last time, it is tried again."""
_PAGES_AT_ONCE = 32
"""Pages that are compared with the index between two turns of others."""


class Invalidations:
    """The layers that are invalidated, or about to be. A participant of commits without the device."""

    def __init__(self, layers: Layers, index: Index, failure: Failure, commit: Committer) -> None:
        self._layers = layers
        self._index = index
        self._failure = failure
        self._commit = commit
        self._asked: set[int] = set()  # numbers of layers to be dead in the index
        self._most = MOST_PAGES  # with so many dirty pages some of them are stored
        failure.listen(self.revoke)
        commit.join_past_device(self)

    async def invalidate(self, layer: Layer) -> None:
        """If the device has failed, have the index say that it has nothing of this clean layer, durably.

        To be called before the origin of the layer is written. Raises OSError: then it must not be.
        """
        while (error := self._failure.error) is not None and not self._is_invalidated(layer):
            self._asked.add(layer.id)
            await self._commit.past_device()
            layer.changed = True
            if self._failure.error is error and layer.id in self._asked:
                if not layer.is_dead:
                    layer.become(LayerState.INVALIDATED)
                return

    async def make_room(self, layer: Layer) -> None:
        """If the device has failed: before blocks of a clean layer are dropped, which makes pages of it dirty.

        Raises OSError: then the origin must not be written.
        """
        await self.invalidate(layer)
        if self._failure.error is None or len(self._layers.dirty) < self._most:
            return
        async with (
            self._commit.suspended()
        ):  # a page that is being stored must not be shed, nor be in a revival
            if self._failure.error is not None:
                await self._store_pages()
                self._most = max(MOST_PAGES, len(self._layers.dirty) + _MORE_PAGES)

    async def _store_pages(self) -> None:
        """Have the index store the dirty pages of invalidated layers, but for those that name another slot than there.

        A slot that is new to the page may be that of a private block in the index: dead layers give their slots back.
        """
        dirty, changes, taken = self._layers.dirty, Changes(None), set[int]()
        keys = sorted(dirty)
        try:
            for start in range(0, len(keys), _PAGES_AT_ONCE):
                some = [key for key in keys[start : start + _PAGES_AT_ONCE] if self._is_dead(key)]
                for key, raw in zip(
                    some, await trio.to_thread.run_sync(self._read, some), strict=True
                ):
                    layer = self._layers.get(layer_of_key(key))
                    if layer is not None and layer.pages.names_no_more(key, raw):
                        changes.pages += layer.pages.stored([key])
                        taken.add(key)
                        dirty.discard(key)
            if taken:
                await self._index.commit(changes)
        except BaseException:
            dirty.update(taken)
            raise

    def _is_dead(self, key: int) -> bool:
        """True if the page with that key is one of a layer that is dead in the index, and lives in memory."""
        layer = self._layers.get(layer_of_key(key))
        return layer is not None and self._is_invalidated(layer)

    def _read(self, keys: list[int]) -> list[bytes | None]:
        """What the index has of pages; runs in a thread."""
        return [self._index.page(layer_of_key(key), block_of_key(key)) for key in keys]

    def _is_invalidated(self, layer: Layer) -> bool:
        return layer.state is LayerState.INVALIDATED

    def revoke(self) -> None:
        """From the next commit of everything on, the index says of the layers what memory says.

        Called when the device fails, because a commit that is under way may be about to say so; and before a revival's
        commit. A plain function: nobody may be invalidated between this and the snapshot of that commit.
        """
        self._asked.clear()
        self._most = MOST_PAGES
        for layer in self._layers:
            if self._is_invalidated(layer):
                layer.become(LayerState.CLEAN)

    def has_changes(self) -> bool:
        """False: who needs this to be durable asks for a commit."""
        return False

    def contribute(self, changes: Changes) -> Share:
        """Have a commit without the device say that dead and invalidated layers are dead."""
        for layer in self._layers:
            if layer.is_dead or layer.id in self._asked:
                changes.layers[layer.id] = replace(layer.record(), dead=True)
        return Share(nothing, nothing)
