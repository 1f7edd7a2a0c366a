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
from forebay_cache import Cache


class Images:
    """The images in use, by key."""

    def __init__(self, cache: Cache, nursery: trio.Nursery) -> None:
        """`nursery` runs the fetches of all images, and outlives them."""
        self._cache = cache
        self._nursery = nursery
        self._open: dict[str, Image] = {}
        self.kept = KeptInAll()
        """What was written to images and is not known to be durable there, in memory."""
        self.on_unused: Callable[[str], None] = lambda _key: None
        """Told of each image that no disk is on any more, by its key, when it is closed."""

    def is_open(self, key: str) -> bool:
        """True if a disk is on the image with that key."""
        return key in self._open

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
        image.sources.add(source)
        source.bind(on_lost=image.stop, dirty_bytes=partial(image.sources.lacks, source))
        # At a start no disk waits for what another one of the image is waiting for already.
        if not (source.resumed and image.reach.is_being_attempted):
            await image.reach.attempt()
        return image

    def drop_disk(self, disk: str, key: str) -> None:
        """Drop what only the cache has of a disk that is not served, from the next commit on.

        `key` is that of the disk's image.
        """
        layers = self._cache.layers.private_of(disk)
        for layer in layers:
            self._cache.layers.drop(layer)
        self._cache.records.put("dirty", disk, None)
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
        if has_moved:
            clean = self._cache.layers.clean_of(key)
            if clean is not None:
                self._cache.layers.drop(clean)
            self._cache.records.put("image", key, None)

    async def _close(self, image: Image) -> None:
        """Close an image that no disk uses any more. Raises OSError."""
        if self._open.get(image.key) is image:
            del self._open[image.key]
        await image.close()
        self.on_unused(image.key)
