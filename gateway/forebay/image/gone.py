# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Images that are gone: what the cache has of an image that was deleted is reclaimed, and nothing else.

An image that no disk is on is looked for now and then: soon after the last disk has left it, ever more seldom later. It
is gone if its name leads nowhere, twice in a row, in a store that is there: the directory of the store is the one in
which an image was seen before. The mount point of a store that is not mounted is another directory, and a store that
does not answer says nothing. Images behind NBD and on block devices are never taken for gone.
"""

import errno
import heapq
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import trio

from forebay.config.model import Config
from forebay.errors import ForebayError
from forebay.origin.addresses import FileAddress, is_scratch, resolve
from forebay.origin.calls import SystemCalls
from forebay.origin.opening import look_in_store
from forebay.origin.threads import StoreThreads, bounded
from forebay_cache import Cache, Layer

log = logging.getLogger("forebay.image")

FIRST_SECONDS = 0.5
"""How long after the second look, which follows the first as soon, the next one comes: twice as long each time ..."""

MOST_SECONDS = 3600.0
"""... up to this."""

START_SECONDS = 60.0
"""How long after the daemon's start the images that no disk is on are looked for, and in how long all of them once."""

AWAY_SECONDS = 60.0
"""How long a store that has not answered is left alone."""

TIMEOUT_SECONDS = 5.0
"""What a look may take."""

KIND = "store"
"""Under which kind of record the index keeps the inode of each store's directory."""


@dataclass(order=True)
class _Watched:
    """An image that no disk was on when it was looked for last."""

    due: float
    key: str = field(compare=False)
    pause: float = field(compare=False, default=FIRST_SECONDS)
    is_missing: bool = field(compare=False, default=False)
    """True if the last look did not find it."""


class GoneImages:
    """Looks for images that no disk is on, and drops the clean blocks of those that are gone."""

    def __init__(
        self,
        config: Config,
        cache: Cache,
        is_in_use: Callable[[str], bool],
        threads_of: Callable[[str], StoreThreads],
    ) -> None:
        """`is_in_use` says of an image, by its key, whether any disk is on it, served or only on record. `threads_of`
        returns the threads of a store, of which looks are kept apart: they take no place from a guest's calls.
        """
        self._config = config
        self._cache = cache
        self._is_in_use = is_in_use
        self._threads_of = threads_of
        self._watched: list[_Watched] = []
        self._latest: dict[str, _Watched] = {}
        """Those that are to be looked for, by key; what else `_watched` has is not any more."""
        self._threads: dict[str, StoreThreads] = {}
        self._away_until: dict[str, float] = {}
        self._wakeup = trio.Event()
        self.on_gone: Callable[[str], Awaitable[None]] = _nothing
        """Awaited with the key of an image that is gone."""
        self.reclaimed = 0
        """How many images turned out to be gone since the start."""

    def note_unused(self, key: str) -> None:
        """The last disk has left that image."""
        self._watch(_Watched(trio.current_time(), key))

    def _watch(self, image: _Watched) -> None:
        """Look for an image when it is due, and no later time."""
        self._latest[image.key] = image
        heapq.heappush(self._watched, image)
        self._wakeup.set()

    async def run(self) -> None:
        """Look, until cancelled. One look at a time: there is no hurry."""
        self._watch_all()
        while True:
            self._wakeup = trio.Event()
            due = self._watched[0].due if self._watched else math.inf
            if due > trio.current_time():
                with trio.move_on_at(due):
                    await self._wakeup.wait()
                continue
            image = heapq.heappop(self._watched)
            if self._latest.get(image.key) is not image:
                continue
            del self._latest[image.key]
            if not self._is_in_use(image.key):
                await self._look(image)

    def _watch_all(self) -> None:
        """Those of an earlier life, one after the other."""
        found = [x.name.image for x in self._cache.layers if not x.private and not x.is_dead]
        for n, key in enumerate(found):
            due = trio.current_time() + START_SECONDS * (1 + n / len(found))
            self._watch(_Watched(due, key, pause=START_SECONDS))

    async def _look(self, image: _Watched) -> None:
        """Look for one image once, and drop what the cache has of it if it is gone."""
        if self._cache.layers.clean_of(image.key) is None:
            return
        if self._judge(image, is_gone=await self._is_gone(image.key)):
            await self.on_gone(image.key)

    def _judge(self, image: _Watched, *, is_gone: bool) -> bool:
        """Drop what the cache has of an image that is gone, or look again later. True if it is gone for good.

        A critical section: a disk may be attached to the image at any time.
        """
        layer = self._cache.layers.clean_of(image.key)
        if layer is None or self._is_in_use(image.key) or image.key in self._latest:
            return False
        if (is_gone and image.is_missing) or not layer.sectors:
            self._drop(layer, is_gone=is_gone)
            return is_gone and image.is_missing
        if not is_gone and image.is_missing:
            image.pause = FIRST_SECONDS
        image.due = trio.current_time() + (FIRST_SECONDS if is_gone else image.pause)
        image.pause = min(2 * image.pause, MOST_SECONDS)
        image.is_missing = is_gone
        self._watch(image)
        return False

    def _drop(self, layer: Layer, *, is_gone: bool) -> None:
        """Have the slots of the clean layer of an image reclaimed that no disk is on."""
        key = layer.name.image
        if is_gone:
            self._cache.records.put("image", key, None)
            self.reclaimed += 1
            log.info("%s is gone: what the cache has of it is dropped", key)
        self._cache.layers.drop(layer)

    async def _is_gone(self, key: str) -> bool:
        """True if the name of an image leads nowhere in a store that is there."""
        if is_scratch(key):
            return True
        try:
            address = resolve(self._config, key)
        except ForebayError:
            return False  # of a store that is not in the configuration now
        if not isinstance(address, FileAddress):
            return False
        if self._away_until.get(address.store, 0.0) > trio.current_time():
            return False
        if address.store not in self._threads:
            self._threads[address.store] = self._threads_of(address.store).apart(1, 1)
        threads = self._threads[address.store]
        try:
            with bounded(TIMEOUT_SECONDS, f"looking for {key}"):
                look = partial(look_in_store, address, SystemCalls())
                found, folder = await threads.run(look, background=True)
        except OSError as error:
            if error.errno == errno.ETIMEDOUT:
                self._away_until[address.store] = trio.current_time() + AWAY_SECONDS
            return False
        return self._is_missing(address.store, folder.inode, is_there=found is not None)

    def _is_missing(self, store: str, inode: int, *, is_there: bool) -> bool:
        """True for an image that is not in its store, whose directory has that inode, if that is the store's own."""
        known = self._cache.records.get(KIND, store)
        if is_there:
            if known is None or known["inode"] != inode:
                self._cache.records.put(KIND, store, {"inode": inode})
            return False
        return known is not None and known["inode"] == inode


async def _nothing(_key: str) -> None:
    """What is done about an image that is gone where nobody wants to know."""
