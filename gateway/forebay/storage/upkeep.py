# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Looking after the cache device: extend, scrub and repair beside guests, check and repair while no daemon runs.

What the cache calls layers is told here as operators know it: disks and images.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import trio

import forebay_cache
from forebay.config.model import Config
from forebay.errors import ForebayError
from forebay.storage.record import locate
from forebay.storage.state import in_one_line, index_path, offline, untouched
from forebay.units import format_size
from forebay_cache import Cache, CacheError, Filler, Found, Layer, Report, Revived, extend
from forebay_cache.device.extend import Progress

log = logging.getLogger("forebay.daemon")


def _name_disk_and_image(told: dict[str, Any]) -> None:
    """Put `disk` and `image` in the place of a `layer`; they are empty where it is of neither, or there is none."""
    layer = told.pop("layer") or {}
    told.update(disk=layer.get("disk", ""), image=layer.get("image", ""))


class CachedImage(Protocol):
    """What is needed of an image in use, to fetch damaged blocks of it again."""

    @property
    def layer(self) -> Layer:
        """Its clean blocks."""

    @property
    def filler(self) -> Filler:
        """What fetches from it; `waiting` counts the misses that guests wait for."""


class Upkeep:
    """Of a cache in use. One scrub or repair runs at a time, and one extension."""

    def __init__(self, cache: Cache, images: Callable[[], Iterable[CachedImage]]) -> None:
        """`images` gives the images that are in use at that moment."""
        self._cache = cache
        self._images = images
        self._running = trio.Lock()
        self._extending = trio.Lock()
        self.origin_read_bytes = 0
        """Fetched again from images."""

    def note_origin_read(self, seconds: float) -> None:
        """Implements Tally: no disk has asked for it."""

    async def extend(self, size: int | None, progress: Progress) -> dict[str, Any]:
        """Use all of the device, after making it `size` bytes where it is a file. What the cache is then.

        Raises ForebayError and OSError.
        """
        async with self._extending:
            try:
                await extend(self._cache, size, progress)
            except CacheError as fault:
                raise ForebayError(str(fault)) from None
        log.info("the cache has %s now", format_size(self._cache.device.layout.size))
        return self._cache.info()

    async def scrub(self, progress: Progress) -> dict[str, Any]:
        """Check all of the device; what was found. Raises ForebayError while another scrub runs."""
        with self._alone():
            found = await forebay_cache.scrub(
                self._cache, progress, busy=self._guests_wait, refetch=self._refetch
            )
        return self._told(found)

    async def repair(self, progress: Progress) -> dict[str, Any]:
        """Use a device again that has failed, then scrub. Raises ForebayError when it still fails."""
        with self._alone():
            failed = self._cache.failed
            revived = await self._revived()
            found = await forebay_cache.scrub(
                self._cache, progress, busy=self._guests_wait, refetch=self._refetch
            )
        found.damaged_clean += revived.dropped_clean
        told = self._told(found)
        told["had_failed"] = failed.strerror if failed else None
        told["rewritten_bytes"] = revived.rewritten_bytes
        return told

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Around each scrub and repair. Raises ForebayError while another one runs."""
        try:
            self._running.acquire_nowait()
        except trio.WouldBlock:
            raise ForebayError("a scrub or repair runs already: wait until it has ended") from None
        try:
            yield
        finally:
            self._running.release()

    async def _revived(self) -> Revived:
        """Use the device again. Raises ForebayError."""
        try:
            return await forebay_cache.revive(self._cache)
        except CacheError as fault:
            raise ForebayError(str(fault)) from None
        except OSError as fault:
            raise ForebayError(
                f"{self._cache.device.path} still fails ({fault.strerror}): put the device right and run this again"
            ) from fault

    def _guests_wait(self) -> bool:
        return any(image.filler.waiting for image in self._images())

    async def _refetch(self, layer: Layer, offset: int, length: int) -> bool:
        """Fetch a range of clean blocks again, in bytes of the image. True if the cache has all of it then."""
        for image in self._images():
            if image.layer is layer:
                try:
                    await image.filler.prefetch(offset, length, self, background=True)
                    return not await image.filler.missing(offset, length)
                except OSError:
                    return False
        return False  # nobody uses the image now: whoever does next fetches it

    def _told(self, found: Found) -> dict[str, Any]:
        """What was found, in JSON's terms, with disks and images in the place of layers."""
        told = found.json()
        for one in told["damage"]:
            _name_disk_and_image(one)
            one["device_offset"] = self._cache.device.at(one["slot"]) if one["slot"] >= 0 else None
        return told


# ---------------------------------------------------------------------------------------- without a daemon


def check(config: Config, progress: Progress) -> dict[str, Any]:
    """Read and compare all of a cache that no daemon uses, and change nothing. Raises ForebayError."""
    with untouched(config), in_one_line():
        return _report(forebay_cache.check(locate(config), index_path(config), progress))


def repair(config: Config, progress: Progress, *, drop_dirty: bool) -> dict[str, Any]:
    """Drop what is damaged in a cache that no daemon uses; dirty data only with `drop_dirty`. Raises ForebayError."""
    with offline(config):
        done = forebay_cache.repair(
            locate(config), index_path(config), progress, drop_dirty=drop_dirty
        )
    return {
        "dropped_clean": done.dropped_clean,
        "dropped_private": done.dropped_private,
        "before": _report(done.before),
        "after": _report(done.after),
    }


def _report(report: Report) -> dict[str, Any]:
    """The same of a check without a daemon."""
    told = report.json()
    told["damaged"] = report.damaged
    for one in told["faults"]:
        _name_disk_and_image(one)
    return told
