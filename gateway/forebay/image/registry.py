# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The images that are in use on this host, each once however many disks lie on it."""

from collections.abc import Callable
from functools import partial

import trio

from forebay.errors import ForebayError
from forebay.image.image import Image
from forebay.image.kept import KeptInAll
from forebay.image.source import Source
from forebay_cache import Cache, Layer

OPERATOR = "(operator)"
"""Who keeps a pinned image in the cache, beside disks: no disk has such a name."""


class Images:
    """The images in use, by key."""

    def __init__(self, cache: Cache, nursery: trio.Nursery) -> None:
        """`nursery` runs the fetches of all images, and outlives them."""
        self._cache = cache
        self._nursery = nursery
        self._open: dict[str, Image] = {}
        self._closing: list[str] = []
        """The keys of images that the last disk has left, and that are not closed yet."""
        self.kept = KeptInAll()
        """What was written to images and is not known to be durable there, in memory."""
        self.on_unused: Callable[[str], None] = lambda _key: None
        """Told of each image that no disk is on any more, by its key, when it is closed."""
        self.on_used: Callable[[Source], None] = lambda _source: None
        """Told of each use of an image that begins, by its source."""
        self.is_pinned: Callable[[str, int], bool] = lambda _key, _size: False
        """True of an image that is being opened, by its key and size, if the operator wants it to stay in the cache."""

    def is_open(self, key: str) -> bool:
        """True if the image with that key is in use, or is being closed."""
        return key in self._open or key in self._closing

    def open_keys(self) -> list[str]:
        """The keys of the images in use."""
        return list(self._open)

    async def acquire(self, source: Source) -> Image:
        """The image of a source, with one disk more on it; reached now if it can be. `Image.leave` ends that.

        Raises ForebayError where the image has stopped for the disks on it, and this one would be new.
        """
        # no await until image.reach.attempt: an image that no disk is on is closed
        image = self._open.get(source.key)
        if image is not None and image.conflict is not None and not source.resumed:
            raise ForebayError(f"{image.conflict}, on every disk of it")
        if image is None:
            image = Image(self._cache, self._nursery, source, self._close, self.kept)
            self._open[source.key] = image
            if self.is_pinned(source.key, source.size):
                self.keep(source.key, wanted=True)
        image.sources.add(source)
        image.follow_timeouts()
        source.bind(on_lost=image.stop, dirty_bytes=partial(image.sources.lacks, source))
        # At a start no disk waits for what another one of the image is waiting for already.
        if not (source.resumed and image.reach.is_being_attempted):
            await image.reach.attempt()
        self.on_used(source)
        return image

    def keep(self, key: str, *, wanted: bool) -> Layer | None:
        """Note that the operator wants all that the cache has of an image to stay there, or not any more.

        Returns its clean layer, if there is one; `pin_layer` with its `pinned` has the slots follow.
        """
        image = self._open.get(key)
        layer = self._cache.layers.clean_of(key) if image is None else image.layer
        if image is not None:
            (image.clean.pinned_by.add if wanted else image.clean.pinned_by.discard)(OPERATOR)
            wanted = bool(image.clean.pinned_by)
        if layer is not None and layer.pinned is not wanted:
            layer.pinned = wanted
            layer.changed = True
        return layer

    def drop_disk(self, disk: str, key: str) -> None:
        """Drop what only the cache has of a disk that is not served, from the next commit on.

        `key` is that of the disk's image.
        """
        layers = self._cache.layers.private_of(disk)
        for layer in layers:
            self._cache.layers.drop(layer)
        for kind in ("dirty", "snapshots"):
            self._cache.records.put(kind, disk, None)
        image, clean = self._open.get(key), self._cache.layers.clean_of(key)
        if len(layers) > 1 and image is not None:
            image.clean.refresh()  # a pass may have written to the image under its clean blocks
        if image is not None or clean is None:
            return
        known = self._cache.records.get("image", key)
        # ... or we were writing it when we ended, and whatever it looks like from now on would be taken for ours.
        if len(layers) > 1 or known is None or known["identity"] is None:
            self._cache.layers.drop(clean)
            self._cache.records.put("image", key, None)

    def follow(self, disk: str, key: str, *, drops_own: bool, has_moved: bool) -> None:
        """Forget what does not belong on the image as it is now, from the next commit on. No disk is on it.

        `drops_own`: what the cache has of the disk alone is given up. `has_moved`: its clean blocks are of before.
        """
        if drops_own:
            self.drop_disk(disk, key)
        if has_moved and key not in self._open:  # else they have gone on with it as it is now
            clean = self._cache.layers.clean_of(key)
            if clean is not None:
                self._cache.layers.drop(clean)
            self._cache.records.put("image", key, None)

    async def _close(self, image: Image) -> None:
        """Close an image that no disk uses any more. Raises OSError."""
        if self._open.get(image.key) is image:
            del self._open[image.key]
        self._closing.append(image.key)
        try:
            await image.close()
        finally:
            self._closing.remove(image.key)
        self.on_unused(image.key)
