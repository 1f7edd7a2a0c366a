# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Warming: an image is brought into the cache without a disk, as a preload would, and as far as an overlay may read it.

It reads the image as an overlay does: opened by the same way and with the same rights, bounded to its store, refused
while another gateway writes it. A disk that comes to write the image ends it; where one writes it already, the warm
goes through that disk, and ends with it. What was read until then stays, whoever ends it.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import trio

from forebay.boot.boots import Boots
from forebay.checkpoint.counters import Counters
from forebay.checkpoint.steps import Progress
from forebay.disk.copy import preload_range
from forebay.disk.disk import Disk
from forebay.errors import ForebayError, advice
from forebay.image.image import Image
from forebay.image.registry import Images
from forebay.image.source import Source
from forebay.units import Mode, format_size
from forebay_cache.format.entry import LARGEST_DISK
from forebay_cache.format.geometry import SECTOR

WARMING = "(warm)"
"""Stands for the name of the disk in the source of a warm: no disk has such a name."""

MOST_WARMS = 64
"""So many at once: each has two reads under way."""


class Writer(Protocol):
    """A disk that is attached, and writes its image."""

    @property
    def disk(self) -> Disk:
        """The disk."""


class Readers(Protocol):
    """Who reads images without a disk: `forebay.daemon.disks.Disks`."""

    def reading(self, source: Source) -> AbstractAsyncContextManager[Writer | None]:
        """Around such work; gives the disk that writes the image, if there is one. Raises ForebayError at its end."""

    def check_alone(self, source: Source) -> None:
        """Raises ForebayError where a disk excludes the use of the image that the source is for."""


class Rate:
    """The rate of all warms together: the lowest that one of them was asked for with, while that one is under way."""

    def __init__(self) -> None:
        self._limits: list[int] = []
        self._free_at = 0.0
        """When what was spent until now is over at the limit."""

    @contextlib.contextmanager
    def at_most(self, limit: int | None) -> Iterator[None]:
        """Around a warm that was asked for with a limit, in bytes a second, or (None) with none."""
        if limit is None:
            yield
            return
        self._limits.append(limit)
        try:
            yield
        finally:
            self._limits.remove(limit)
            self._free_at = min(self._free_at, trio.current_time())

    async def spend(self, length: int) -> None:
        """Return when so many bytes may be read."""
        if not self._limits:
            return
        begins = max(trio.current_time(), self._free_at)
        self._free_at = begins + length / min(self._limits)
        await trio.sleep_until(begins)


class Warming:
    """All warms that are under way."""

    def __init__(
        self,
        images: Images,
        readers: Readers,
        source_of: Callable[[str], Awaitable[Source]],
        boots: Boots,
    ) -> None:
        """`source_of` makes a source of what an operator names. It raises ForebayError for what may not be attached.

        `boots` knows the traces.
        """
        self._images = images
        self._readers = readers
        self._source_of = source_of
        self._boots = boots
        self._rate = Rate()
        self._under_way = 0

    async def warm(
        self, image: str, amount: int | str, rate: int | None, progress: Progress
    ) -> dict[str, Any]:
        """Have the first `amount` bytes of an image, what boots read (`trace`), or `all`, in the cache.

        Returns what the cache has of it then.

        `rate` bounds all warms together, in bytes a second. Raises ForebayError and OSError. Cancelled, it leaves what
        was read.
        """
        if self._under_way >= MOST_WARMS:
            raise ForebayError(f"{MOST_WARMS} images are being warmed: wait until one of them is")
        source = await self._source_of(image)
        self._under_way += 1
        try:
            with self._rate.at_most(rate):
                async with self._readers.reading(source) as writer:
                    return await self._through(writer, source, amount, progress)
        finally:
            self._under_way -= 1

    async def _through(
        self, writer: Writer | None, source: Source, amount: int | str, progress: Progress
    ) -> dict[str, Any]:
        """Warm by the disk that writes the image, or by a source of our own."""
        if writer is None:
            return await self._by_itself(source, amount, progress)
        disk = writer.disk
        if disk.mode is Mode.NONE:
            raise ForebayError(
                f"{source.key} is written by disk '{disk.name}' in mode none, which caches nothing: change its mode"
            )
        return await self._read(disk.image, source, amount, progress)

    async def _by_itself(
        self, source: Source, amount: int | str, progress: Progress
    ) -> dict[str, Any]:
        try:
            await source.prepare()
            self._readers.check_alone(source)
            if source.size > LARGEST_DISK:
                raise ForebayError(
                    f"{source.key} has {format_size(source.size)}, and the cache takes images of at most "
                    f"{format_size(LARGEST_DISK)}: make it smaller"
                )
            image = await self._images.acquire(source)
            try:
                await source.close_prepared()
                return await self._read(image, source, amount, progress)
            finally:
                with trio.CancelScope(shield=True):
                    await image.leave(source)
        except OSError as error:
            raise ForebayError(
                f"{source.label}: {error.strerror or error}: "
                f"{advice(error, 'see that its storage answers, then try again')}"
            ) from error
        finally:
            with trio.CancelScope(shield=True), contextlib.suppress(OSError, ForebayError):
                await source.abandon()

    async def _read(
        self, image: Image, source: Source, amount: int | str, progress: Progress
    ) -> dict[str, Any]:
        """Bring it in. Raises OSError, and ForebayError where somebody else has changed the image meanwhile."""
        layer, counters = image.layer, Counters()
        if amount == "trace":
            await self._boots.replay(
                image, source.address, counters, progress, spend=self._rate.spend
            )
        else:
            length = image.size if amount == "all" else min(int(amount), image.size)
            await preload_range(image, counters, length, progress, self._rate.spend)
        await image.look()
        if image.conflict is not None:
            raise ForebayError(image.conflict)
        if image.layer is not layer:
            raise ForebayError(
                f"{image.key} was changed by somebody else while it was read, and nothing of before is kept: "
                "warm it again"
            )
        cached = min(image.layer.sectors * SECTOR, image.size)
        return {
            "image": image.key,
            "size": image.size,
            "cached_bytes": cached,
            "origin_read_bytes": counters.origin_read_bytes,
        }
