# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Purging: the clean blocks of images that nobody uses leave the cache, by command or when they have become old.

The rules, which docs/images.md has for operators. Only clean blocks go, so that nothing is lost but time. An image
stays while a disk is on it, served or only on record, while it is being warmed, while the cache has data of any disk
for it, and while it is pinned. Of the others those go first that were used longest ago, those of one instant in the
order of their names. Each is judged and dropped in one step, so that a disk may come at any time.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from forebay.catalogue.entries import Entries, Entry
from forebay.config.model import Config
from forebay.errors import ForebayError
from forebay.image.registry import Images
from forebay.units import format_duration, format_size
from forebay_cache import Cache
from forebay_cache.format.geometry import BLOCK

log = logging.getLogger("forebay.image")

LOOK_SECONDS = 300.0
"""How often it is looked for images that have become old ..."""

START_SECONDS = 60.0
"""... and how long after the start for the first time."""

STAMP_SECONDS = 3600
"""After so long in use an image is noted to be so anew, for the case that the daemon is killed."""

_AT_ONCE = 256
"""So many images are looked at between two turns of others."""


@dataclass(frozen=True)
class Selection:
    """Which images are to be purged: those for which all of it is true."""

    images: frozenset[str] | None = None
    """Their keys; None: any."""
    tag: str | None = None
    older_than: float | None = None
    """Seconds that have passed at least since they were used last."""
    store: str | None = None
    """The name of their store."""

    def fits(self, key: str, entry: Entry, now: float) -> bool:
        """True for an image with that key and entry."""
        return (
            (self.images is None or key in self.images)
            and (self.tag is None or self.tag in entry.tags)
            and (self.older_than is None or now - entry.used >= self.older_than)
            and (self.store is None or is_in_store(key, self.store))
        )


def is_in_store(key: str, store: str) -> bool:
    """True for the key of an image in that store. No store is called as the scheme of a URI is."""
    return key.startswith(f"{store}:")


class Purge:
    """Drops the clean blocks of images that nobody uses."""

    def __init__(
        self,
        config: Config,
        cache: Cache,
        images: Images,
        entries: Entries,
        disks_on: Callable[[str], list[str]],
    ) -> None:
        """`disks_on` returns the names of the disks on the image with a key, served or only on record."""
        self._config = config
        self._cache = cache
        self._images = images
        self._entries = entries
        self._disks_on = disks_on

    async def known(self) -> set[str]:
        """The keys of all images of which the cache has blocks, or of which there is an entry."""
        return await self.cached() | self._entries.keys()

    async def cached(self) -> set[str]:
        """The keys of all images of which the cache has a clean layer; what comes and goes meanwhile may be among them.

        There may be tens of thousands.
        """
        found = set()
        for n, layer in enumerate(list(self._cache.layers)):
            if n % _AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            if not layer.private and not layer.is_dead:
                found.add(layer.name.image)
        return found

    async def purge(self, selection: Selection, *, dry_run: bool = False) -> dict[str, Any]:
        """Drop what the cache has of the images that fit; what was dropped, and what was kept, and why.

        Raises ForebayError where that cannot be made durable.
        """
        now = time.time()
        used: dict[str, int] = {}
        for n, key in enumerate(await self.known()):
            if n % _AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            entry = self._entries.get(key) or Entry(used=int(now))
            if selection.fits(key, entry, now):
                used[key] = entry.used
        purged: list[dict[str, Any]] = []
        kept: list[dict[str, str]] = []
        await trio.lowlevel.checkpoint()
        for key in sorted(sorted(used), key=used.__getitem__):
            await trio.lowlevel.checkpoint()
            found = self._drop(key, dry_run=dry_run)
            if isinstance(found, str):
                kept.append({"image": key, "why": found})
            else:
                purged.append({"image": key, "freed_bytes": found})
        if purged and not dry_run:
            await self._entries.commit()
        return {
            "purged": purged,
            "kept": kept,
            "freed_bytes": sum(one["freed_bytes"] for one in purged),
            "dry_run": dry_run,
        }

    def why_kept(self, key: str) -> str | None:
        """Why what the cache has of an image is not to be purged; None where it may be."""
        if disks := self._disks_on(key):
            return f"in use by {', '.join(disks[:3])}" + (" and others" if len(disks) > 3 else "")
        if self._images.is_open(key):
            return "read by the socket of its store, being warmed, or let go just now"
        if self._cache.layers.has_private_on(key):
            return "the cache has data of a disk for it"
        return "pinned" if self._entries.is_pinned(key) else None

    def _drop(self, key: str, *, dry_run: bool) -> int | str:
        """Drop the clean blocks of an image; how many bytes of the cache come free, or why it is kept.

        A critical section: a disk may be attached to the image at any time.
        """
        why = self.why_kept(key)
        if why is not None:
            return why
        layer = self._cache.layers.clean_of(key)
        freed = layer.slots * BLOCK if layer is not None else 0
        if dry_run:
            return freed
        if layer is not None:
            self._cache.layers.drop(layer)
        self._cache.records.put("image", key, None)
        self._entries.forget_unmarked(key)
        return freed

    # -- by itself

    async def run(self) -> None:
        """Purge what has become older than its store says, until cancelled."""
        await trio.sleep(START_SECONDS)
        while True:
            await self._stamp()
            for store, settings in self._config.stores.items():
                if settings.purge_after is not None:
                    await self._purge_old(store, settings.purge_after)
            await trio.sleep(LOOK_SECONDS)

    async def _stamp(self) -> None:
        """Note what is in use, and begin to count the age of what an earlier version has left."""
        now = time.time()
        for n, key in enumerate(await self.known()):
            if n % _AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            entry = self._entries.get(key)
            is_stale = entry is None or not 0 <= now - entry.used < STAMP_SECONDS
            if entry is None or (is_stale and self._images.is_open(key)):
                self._entries.note_used(key)
            elif not self._images.is_open(key) and self._cache.layers.clean_of(key) is None:
                self._entries.forget_unmarked(key)

    async def _purge_old(self, store: str, seconds: float) -> None:
        try:
            found = await self.purge(Selection(store=store, older_than=seconds))
        except ForebayError as fault:
            log.warning("purging old images of store '%s': %s", store, fault)
            return
        for one in found["purged"]:
            log.info(
                "%s was not used for %s: what the cache has of it (%s) is dropped",
                one["image"],
                format_duration(seconds),
                format_size(one["freed_bytes"]),
            )
