# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The clean blocks of an image: what the cache has of it that the image has too, shared by all disks on it."""

import logging

import trio

from forebay.image.boundary import Boundary
from forebay_cache import Cache, Filler, Layer, LayerName, Reader, View, invalidate
from forebay_cache.blocks.clean import REGION_SHIFT

log = logging.getLogger("forebay.image")


class CleanBlocks:
    """The layer that has the clean blocks of one image, what fetches missing ones, and how many the disks may keep."""

    def __init__(self, cache: Cache, key: str, reader: Reader, nursery: Boundary) -> None:
        """`key` names the image, `reader` reads it, `nursery` runs fetches and outlives every disk."""
        self.pinned_by: set[str] = set()
        """Who keeps all that the cache has of the image there: names of disks in full-copy, and OPERATOR."""
        self._key = key
        self._cache = cache
        self._reader = reader
        self._views: list[View] = []
        self._caps: dict[str, int] = {}
        """Slots that each disk may have of the cache, by name; 0: no limit."""
        self.layer = self._find_layer()
        """The layer now: `refresh` puts another one in its place."""
        self.filler = Filler(cache, self.layer, reader, nursery)

    def _find_layer(self) -> Layer:
        """The clean layer of the image, made if it is not there."""
        layers = self._cache.layers
        return layers.clean_of(self._key) or layers.make(LayerName.of_image(self._key))

    # ---------------------------------------------------------------------------------------------------------- disks

    def watch(self, view: View) -> None:
        """Have the view of a disk follow when `refresh` changes the layer."""
        self._views.append(view)

    def unwatch(self, view: View) -> None:
        """End `watch`. Nothing happens if it was not called for that view."""
        if view in self._views:
            self._views.remove(view)

    def stop_reading_ahead(self) -> None:
        """Have every read of the disks miss the fast path, so that it asks first whether the image may be read."""
        for view in self._views:
            view.lookahead = 0

    def set_cap(self, disk: str, slots: int | None) -> None:
        """Say how many slots of the cache the disk may have: 0 for no limit, None when it is detached.

        The clean blocks are shared, so the disk that may have most of them has its way.
        """
        if slots is None:
            del self._caps[disk]
        else:
            self._caps[disk] = slots
        caps = self._caps.values()
        self.layer.cap = 0 if 0 in caps else max(caps, default=0)

    # ------------------------------------------------------------------------------------------------ what is dropped

    def refresh(self) -> None:
        """Drop every clean block; all disks on the image go on without. Fetches in the air store nothing any more.

        A critical section: no view may read through the old layer once it is dropped.
        """
        old = self.layer
        pinned = old.pinned
        self._cache.layers.drop(old)
        self.layer = self._find_layer()
        self.layer.pinned = pinned
        self.layer.cap = old.cap
        self.filler.overtaken(0, self._reader.size)
        self.filler.layer = self.layer
        for view in self._views:
            if view.clean is old:
                view.clean = self.layer

    async def drop_hot(self) -> None:
        """Drop the clean blocks of all regions that were written and whose writes may not be durable in the image.

        The regions stay hot: after a power cut what was cached of them since is dropped, too.
        """
        try:
            for region in self._cache.hot.of(self.layer.id).numbers():
                await invalidate(self._cache, self.layer, region << REGION_SHIFT, 1 << REGION_SHIFT)
                await trio.lowlevel.checkpoint()
        except OSError as error:  # it cannot be recorded block by block
            log.warning("%s: all cached blocks are dropped: %s", self._key, error.strerror)
            self.refresh()

    def cool(self) -> None:
        """Note that all that was written to the image is durable there: no region is hot any more."""
        self._cache.hot.cool(self.layer.id)
