# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The catalogue: what `forebay images`, `warm`, `tag`, `pin` and `purge` ask the daemon for."""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from forebay.boot.boots import Boots
from forebay.catalogue.entries import Entries, Entry, tagged, untagged
from forebay.catalogue.purge import Purge, Selection, is_in_store
from forebay.catalogue.traces import Traces
from forebay.catalogue.warm import Readers, Warming
from forebay.checkpoint.steps import Progress
from forebay.config.model import Config
from forebay.errors import ForebayError
from forebay.image.formats import KIND as RAW
from forebay.image.registry import Images
from forebay.image.source import Source
from forebay.origin.addresses import is_scratch, keys_of_name, resolve
from forebay.units import format_size
from forebay_cache import Cache, Layer, pin_layer
from forebay_cache.format.geometry import BLOCK, SECTOR

log = logging.getLogger("forebay.image")

PINNED_SHARE = 2
"""One part of so many of the cache may be pinned by operators: the rest is for what guests read and write."""


class Catalogue:
    """All images that this host knows."""

    def __init__(
        self,
        config: Config,
        cache: Cache,
        images: Images,
        index: Path,
        readers: Readers,
        source_of: Callable[[str], Awaitable[Source]],
        keys_of_disks: Callable[[], dict[str, str]],
        boots: Boots,
    ) -> None:
        """`keys_of_disks` returns the key of the image of each disk, by the name of the disk, served or only on record.
        The rest is as `Warming` and `Entries` have it.
        """
        self._config = config
        self._cache = cache
        self._images = images
        self._keys_of_disks = keys_of_disks
        self.entries = Entries(cache, index)
        self.traces = Traces(config, self.entries, boots, self._is_known)
        self._warming = Warming(images, readers, source_of, boots)
        self._purge = Purge(config, cache, images, self.entries, self._disks_on)
        images.on_used = self._note_used
        images.is_pinned = self._is_pinned

    def _note_used(self, source: Source) -> None:
        if not is_scratch(source.key):
            self.entries.note_used(source.key, source.size, source.allocated, source.format)

    def note_unused(self, key: str) -> None:
        """The last disk has left that image."""
        if self.entries.get(key) is not None:
            self.entries.note_used(key)

    def _disks_on(self, key: str) -> list[str]:
        return sorted(name for name, other in self._keys_of_disks().items() if other == key)

    async def run(self) -> None:
        """Have the cache hold what is pinned, then purge what becomes old, until cancelled."""
        await self._settle_pins()
        await self._purge.run()

    # -- asking

    async def images(self, store: str | None) -> AsyncIterator[dict[str, Any]]:
        """What is told of each image, of one store or of all, in the order of their names. Raises ForebayError."""
        if store is not None:
            self._config.store(store)
        disks: dict[str, list[str]] = {}
        for name, key in sorted(self._keys_of_disks().items()):
            disks.setdefault(key, []).append(name)
        shown = await self._purge.cached() | self.entries.marked() | disks.keys()
        for n, key in enumerate(sorted(shown)):
            if n % 64 == 0:
                await trio.lowlevel.checkpoint()
            if not is_scratch(key) and (store is None or is_in_store(key, store)):
                yield self._told(key, disks.get(key, []))

    def _told(self, key: str, disks: list[str]) -> dict[str, Any]:
        entry = self.entries.get(key) or Entry()
        layer = self._cache.layers.clean_of(key)
        size = self._size(key, entry) or 0
        sectors, slots = (layer.sectors, layer.slots) if layer is not None else (0, 0)
        cached = min(sectors * SECTOR, size) if size else sectors * SECTOR
        return {
            "image": key,
            "format": entry.format or "raw",
            "size": size,
            "allocated": entry.allocated,
            "cached_bytes": cached,
            "cached_percent": round(100 * cached / size, 1) if size else None,
            "device_bytes": slots * BLOCK,
            "pinned": entry.pinned,
            "tags": entry.tags,
            "disks": disks,
            "last_used": entry.used or None,
            "traces": [] if entry.trace is None else [entry.trace],
        }

    def _size(self, key: str, entry: Entry) -> int | None:
        """Bytes of the image, when it was used last; None where nobody has written that down."""
        if entry.size is not None:
            return entry.size
        known = self._cache.records.get(RAW, key)
        return None if known is None else known.get("size")

    def cached_size(self, key: str) -> int | None:
        """Bytes of an image of which the cache has something; None where it has nothing, or nobody knows its size."""
        layer = self._cache.layers.clean_of(key)
        if layer is None or not layer.sectors:
            return None
        return self._size(key, self.entries.get(key) or Entry())

    def _known(self, image: str) -> tuple[str, Entry]:
        """Key and entry of an image that this host knows. Raises ForebayError for any other.

        By its key one is found whose store is not in the configuration any more.
        """
        key = image if self._is_known(image) else resolve(self._config, image).key
        if not self._is_known(key):
            key = next((x for x in keys_of_name(key) if self._is_known(x)), key)
        if not self._is_known(key):
            raise ForebayError(
                f"nothing is known of {key}: bring it in with 'forebay warm', or attach it"
            )
        return key, self.entries.get(key) or Entry(used=int(time.time()))

    def _is_known(self, key: str) -> bool:
        return self.entries.get(key) is not None or self._cache.layers.clean_of(key) is not None

    # -- changing what is on record

    async def tag(self, image: str, tags: Iterable[str]) -> dict[str, Any]:
        """Give the image these tags more; what is told of it then. Raises ForebayError."""
        key, entry = self._known(image)
        await self.entries.change(key, entry, tagged(entry, tags))
        return self._told(key, self._disks_on(key))

    async def untag(self, image: str, tags: Iterable[str]) -> dict[str, Any]:
        """Take these tags away from the image; what is told of it then. Raises ForebayError."""
        key, entry = self._known(image)
        await self.entries.change(key, entry, untagged(entry, tags))
        return self._told(key, self._disks_on(key))

    async def pin(self, image: str) -> dict[str, Any]:
        """Keep what the cache has of the image, and will have, from eviction and purge. Raises ForebayError."""
        key, entry = self._known(image)
        if not entry.pinned:
            self._check_room(key, entry)
        return await self._set_pin(key, entry, pinned=True)

    async def unpin(self, image: str) -> dict[str, Any]:
        """Let it be evicted and purged again. Raises ForebayError."""
        return await self._set_pin(*self._known(image), pinned=False)

    async def _set_pin(self, key: str, entry: Entry, *, pinned: bool) -> dict[str, Any]:
        """The layer says so in the same commit as the record; its slots follow, which a start makes good."""
        layer = self._images.keep(key, wanted=pinned)
        try:
            await self.entries.change(key, entry, replace(entry, pinned=pinned))
        except BaseException:
            self._images.keep(key, wanted=entry.pinned)
            raise
        if layer is not None and not layer.is_dead:
            await pin_layer(self._cache, layer, pinned=layer.pinned)
        return self._told(key, self._disks_on(key))

    def _is_pinned(self, key: str, size: int) -> bool:
        """True if an image that is being opened, of so many bytes, is pinned. One that has grown out of the bound is
        not any more.
        """
        entry = self.entries.get(key)
        if entry is None or not entry.pinned:
            return False
        if size > (entry.size or 0):
            self.entries.put(key, entry := replace(entry, size=size))
            try:
                self._check_room(key, entry)
            except ForebayError as fault:
                log.warning("%s has grown, and is not pinned any more: %s", key, fault)
                self.entries.put(key, replace(entry, pinned=False))
                self._images.keep(key, wanted=False)
                return False
        return True

    def _check_room(self, key: str, entry: Entry) -> None:
        """Raise ForebayError where more than a part of the cache would be pinned with that image."""
        size = self._size(key, entry)
        if size is None:
            raise ForebayError(f"the size of {key} is not known yet: warm it first")
        room = self._cache.device.slots * BLOCK // PINNED_SHARE
        held = sum(self._may_take(other) for other in self.entries.pinned() if other != key)
        wanted = self._may_take(key)
        if held + wanted > room:
            raise ForebayError(
                f"{key} may come to take {format_size(wanted)} of the cache, and of the {format_size(room)} that "
                f"may be pinned {format_size(held)} are: unpin others, or make the cache larger "
                "(holes take nothing once the image was warmed)"
            )

    def _may_take(self, key: str) -> int:
        """Bytes of the cache that an image has or may come to have: all of it that is not known to be zeros."""
        layer = self._cache.layers.clean_of(key)
        size = self._size(key, self.entries.get(key) or Entry()) or 0
        if layer is None:
            return size
        return layer.slots * BLOCK + max(0, size - layer.sectors * SECTOR)

    async def _settle_pins(self) -> None:
        """After a start: the slots of what is pinned are held, and those of nothing else."""
        found = [x for x in self._cache.layers if not x.private and not x.is_dead]
        for layer in found:
            await trio.lowlevel.checkpoint()
            if not layer.is_dead and layer.pinned is not self._wants_pin(layer):
                await pin_layer(self._cache, layer, pinned=not layer.pinned)

    def _wants_pin(self, layer: Layer) -> bool:
        """True if the layer is to be pinned: by the operator, or, as far as it is, by a disk that keeps a full copy."""
        key = layer.name.image
        if self.entries.is_pinned(key):
            return True
        return layer.pinned and (self._images.is_open(key) or bool(self._disks_on(key)))

    # -- work

    async def warm(
        self, image: str, amount: int | str, rate: int | None, progress: Progress
    ) -> dict[str, Any]:
        """Bring the image in without a disk; see `Warming.warm`. Raises ForebayError and OSError."""
        return await self._warming.warm(image, amount, rate, progress)

    async def purge(
        self,
        images: list[str] | None,
        *,
        tag: str | None,
        older_than: float | None,
        dry_run: bool,
        traces: bool = False,
    ) -> dict[str, Any]:
        """Drop the clean blocks of the images for which all of it is true; see `Purge.purge`. Raises ForebayError.

        `traces`: the boot traces of these images go with them; `trace` says of each what became of it.
        """
        if not images and tag is None and older_than is None:
            raise ForebayError("say which images are to go: name them, or a tag, or an age")
        named = frozenset(self._known(image)[0] for image in images) if images else None
        found = await self._purge.purge(Selection(named, tag, older_than), dry_run=dry_run)
        if traces and not dry_run:
            for one in found["purged"]:
                one["trace"] = await self.traces.drop_if_possible(one["image"])
        return found
