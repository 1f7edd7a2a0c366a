# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Clean layers whose origin is written while the cache device has failed.

The device cannot be told then that what it holds is going to be out of date. So the index is told, by a commit that
names nothing on the device, that the whole layer is dead; only then may its origin be written. In memory the layer
lives on: should the device work again, a commit says of it what memory says.
"""

from __future__ import annotations

from dataclasses import replace

from forebay_cache.device.failure import Failure
from forebay_cache.durable.commit import Committer
from forebay_cache.index.changes import Changes, Share, nothing
from forebay_cache.layers.layer import Layer, LayerState
from forebay_cache.layers.registry import Layers


class Invalidations:
    """The layers that are invalidated, or about to be. A participant of commits without the device."""

    def __init__(self, layers: Layers, failure: Failure, commit: Committer) -> None:
        self._layers = layers
        self._failure = failure
        self._commit = commit
        self._asked: set[int] = set()  # numbers of layers to be dead in the index
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

    def _is_invalidated(self, layer: Layer) -> bool:
        return layer.state is LayerState.INVALIDATED

    def revoke(self) -> None:
        """From the next commit of everything on, the index says of the layers what memory says.

        Called when the device fails, because a commit that is under way may be about to say so; and before a revival's
        commit. A plain function: nobody may be invalidated between this and the snapshot of that commit.
        """
        self._asked.clear()
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
