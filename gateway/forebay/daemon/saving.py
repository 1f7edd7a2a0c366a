# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a disk shows, saved as a new image: `forebay resolve NAME --save STORE:NEW`.

It is taken from the cache, and from the image as long as that is the one that the disk was served from. Writes of the
disk wait meanwhile, so that the copy is of one instant. What neither the cache nor the image has is told, and refuses
the save, unless the operator wants what there is.
"""

import contextlib
import errno
import functools
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio

from forebay.config.model import Config
from forebay.daemon.attached import Absent, Attached
from forebay.daemon.disks import Disks
from forebay.daemon.parallel import Progress
from forebay.errors import ForebayError
from forebay.image.reach import ImageState
from forebay.origin.addresses import FileAddress, resolve
from forebay.origin.new_image import NewImage, remove_left
from forebay.origin.threads import StoreThreads, bounded
from forebay.units import format_size
from forebay_cache import Cache, View
from forebay_cache.format.geometry import BLOCK, SECTOR, Buffer
from forebay_cache.read.survey import Holding, survey

T = TypeVar("T")

log = logging.getLogger("forebay.daemon")

STEP = 16 * BLOCK
"""Bytes that are read and written in one go."""

RANGES_TOLD = 64
"""Ranges that neither has which are told one by one; their sum covers all."""

KIND = "save"
"""Kind of the record, by the new image's key, while it is being written: a start removes what a kill left."""

CLEAN_SECONDS = 10.0
"""How long a store may take to remove that."""


@dataclass
class Missing:
    """What neither the cache nor the image has."""

    bytes: int = 0
    ranges: list[tuple[int, int]] = field(default_factory=list)
    """(offset, length) of the first RANGES_TOLD."""

    def add(self, offset: int, length: int) -> None:
        """Count a range that comes after all those before."""
        self.bytes += length
        last = self.ranges[-1] if self.ranges else None
        if last is not None and last[0] + last[1] == offset:
            self.ranges[-1] = (last[0], last[1] + length)
        elif len(self.ranges) < RANGES_TOLD:
            self.ranges.append((offset, length))

    def __str__(self) -> str:
        places = ", ".join(f"{length} bytes at {offset}" for offset, length in self.ranges[:3])
        return f"{format_size(self.bytes)} are neither in the cache nor in the image any more ({places}, ...)"


class Reader:
    """Reads what a disk shows: `view` are its layers, and with `has_image` what these lack is in the image."""

    def __init__(self, view: View, size: int, *, has_image: bool) -> None:
        self._view = view
        self._size = size
        self._has_image = has_image
        self.missing = Missing()

    async def read(self, offset: int, length: int) -> list[tuple[int, bytes]]:
        """(offset, data) of what is there of the range, without zeros. What is missing is noted."""
        found: list[tuple[int, bytes]] = []
        end = offset + length
        while offset < end:
            extents = await survey(self._view, offset, end - offset, 4096)
            for part, holding in extents:
                if holding is not Holding.NOTHING:
                    found += await self._cached(offset, part, zeros=holding in _ZEROS)
                elif self._has_image:
                    found += await self._tried(offset, part)
                else:
                    self._miss(offset, part)
                offset += part
        return found

    async def _cached(self, offset: int, length: int, *, zeros: bool) -> list[tuple[int, bytes]]:
        return [] if zeros else await self._tried(offset, length)

    async def _tried(self, offset: int, length: int) -> list[tuple[int, bytes]]:
        """The range, or those sectors of it that can be read."""
        length = min(length, self._size - offset)
        if length <= 0:
            return []
        try:
            return [(offset, b"".join(bytes(x) for x in await self._view.read(offset, length)))]
        except OSError as error:
            if length <= SECTOR:
                self._miss(offset, length)
                return []
            if error.errno == errno.ETIMEDOUT:
                self._has_image = False  # each further try would take as long
        found = []
        half = max(SECTOR, length // 2 // SECTOR * SECTOR)
        for start in range(offset, offset + length, half):
            part = min(half, offset + length - start)
            if self._has_image:
                found += await self._tried(start, part)
            else:
                found += await self.read(start, part)
        return found

    def _miss(self, offset: int, length: int) -> None:
        length = min(length, self._size - offset)
        if length > 0:
            self.missing.add(offset, length)


_ZEROS = (Holding.CLEAN_ZEROS, Holding.PRIVATE_ZEROS)


class Saving:
    """Makes images of what disks show."""

    def __init__(
        self,
        config: Config,
        cache: Cache,
        disks: Disks,
        threads_of: Callable[[str], StoreThreads],
    ) -> None:
        """`threads_of` returns the threads of the store with that name."""
        self._threads_of = threads_of
        self._config = config
        self._cache = cache
        self._disks = disks
        self._targets: set[str] = set()
        """Keys of the images that are being written."""

    async def save(
        self, name: str, to: str, *, partial: bool, progress: Progress
    ) -> dict[str, Any]:
        """Make the image `to` of what the disk shows; what was saved. Raises ForebayError and OSError.

        Unless `partial`, nothing is made where something is missing.
        """
        target = resolve(self._config, to)
        if not isinstance(target, FileAddress):
            raise ForebayError(
                f"'{to}' is not in a store: write STORE:relative/path of a new image"
            )
        async with self._disks.turn(name) as disk, self._alone(target), _still(disk):
            reader, size = self._reader(disk)
            store = _Target(self._threads_of(target.store), target.key, self._patience(target))
            new = await store.run(
                lambda: NewImage(target, size, self._cache.uuid), drop=lambda late: late.drop()
            )
            try:
                saved = await self._fill(new, store, reader, size, progress)
                if reader.missing.bytes and not partial:
                    raise ForebayError(
                        f"{reader.missing}: nothing was saved; --partial saves the rest, with zeros there"
                    )
                await store.run(new.publish)
            except BaseException:
                await store.drop(new)
                raise
        if reader.missing.bytes:
            log.warning("%s: saved as %s, but for this: %s", name, target.key, reader.missing)
        return {
            "name": name,
            "image": target.key,
            "size": size,
            "saved_bytes": saved,
            "missing_bytes": reader.missing.bytes,
            "missing": [list(one) for one in reader.missing.ranges],
        }

    def _patience(self, target: FileAddress) -> float:
        return self._config.disk_settings(target.store or None).origin_timeout

    @contextlib.asynccontextmanager
    async def _alone(self, target: FileAddress) -> AsyncIterator[None]:
        """Around the writing of an image: one at a time, and on record. Raises ForebayError."""
        if target.key in self._targets:
            raise ForebayError(f"{target.key} is being written by another command: wait for it")
        self._targets.add(target.key)
        self._cache.records.put(KIND, target.key, {"path": target.path, "store": target.store})
        try:
            with contextlib.suppress(OSError):  # else a kill leaves a file, and nothing else
                await self._cache.commit.records()
            yield
        finally:
            self._targets.discard(target.key)
            self._cache.records.put(KIND, target.key, None)

    def _reader(self, disk: Attached | Absent) -> tuple[Reader, int]:
        """What reads the disk, and how large it is."""
        if isinstance(disk, Attached):
            image = disk.disk.image
            reached = image.conflict is None and image.reach.state is ImageState.REACHED
            return Reader(disk.disk.view, disk.disk.size, has_image=reached), disk.disk.size
        layers = self._cache.layers
        view = View(
            self._cache,
            layers.private_of(disk.name)[::-1],
            layers.clean_of(disk.record.key) if disk.clean_counts else None,
            _refuse,
        )
        return Reader(view, disk.record.size, has_image=False), disk.record.size

    async def _fill(
        self, new: NewImage, store: "_Target", reader: Reader, size: int, progress: Progress
    ) -> int:
        """Write all that there is; how many bytes."""
        saved = 0
        progress(0, size)
        for start in range(0, size, STEP):
            parts = _without_zeros(await reader.read(start, min(STEP, size - start)))
            if parts:
                await store.run(functools.partial(new.write, parts))
                saved += sum(len(data) for _, data in parts)
            progress(min(start + STEP, size), size)
        return saved

    async def remove_left(self) -> None:
        """At a start: remove what a kill left, where the store answers. What it does not is tried at the next one."""
        for key, known in self._cache.records.all(KIND).items():
            try:
                target = resolve(self._config, key)
                assert isinstance(target, FileAddress), known
                with bounded(CLEAN_SECONDS, f"removing what is left of {key}"):
                    do = functools.partial(remove_left, target, self._cache.uuid)
                    await self._threads_of(target.store).run(do)
            except (OSError, ForebayError) as fault:
                log.info("%s: what is left of it stays for now: %s", key, fault)
            else:
                self._cache.records.put(KIND, key, None)


class _Target:
    """The store that gets the new image. The disk's writes wait for its calls, so none takes longer than `timeout`."""

    def __init__(self, threads: StoreThreads, key: str, timeout: float) -> None:
        self._threads = threads
        self._key = key
        self._timeout = timeout

    async def run(self, do: Callable[[], T], drop: Callable[[T], object] | None = None) -> T:
        """As `StoreThreads.run`; raises OSError(ETIMEDOUT) for a call that takes too long."""
        with bounded(self._timeout, f"writing {self._key}"):
            return await self._threads.run(do, drop=drop)

    async def drop(self, new: NewImage) -> None:
        """Remove what was written, in so much time; a start removes it otherwise. Raises nothing."""
        with trio.CancelScope(shield=True), contextlib.suppress(OSError):
            await self.run(new.drop)


@contextlib.asynccontextmanager
async def _still(disk: Attached | Absent) -> AsyncIterator[None]:
    """While the body runs, writes of the disk wait."""
    if isinstance(disk, Absent):
        yield
        return
    async with disk.disk.modes.gate.closed():
        yield


async def _refuse(offset: int, length: int) -> Buffer:
    raise OSError(errno.EIO, f"{length} bytes at {offset} are in no layer")


def _without_zeros(parts: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """The data of the parts, but for blocks that are zeros: the new image has those already."""
    found = []
    for offset, data in parts:
        for at in range(0, len(data), BLOCK):
            block = data[at : at + BLOCK]
            if block.count(0) != len(block):
                found.append((offset + at, block))
    return found
