# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a disk shows, saved as a new image: `forebay save NAME STORE:NEW`, and `forebay resolve NAME --save STORE:NEW`.

It is taken from the cache, and from the image as long as that is the one that the disk was served from. It is of one
instant: what an overlay has is frozen, and its VM goes on writing above that; the writes of any other disk wait. What
neither the cache nor the image has is told, and refuses the save, unless the operator wants what there is.
"""

import contextlib
import errno
import functools
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import trio

from forebay.config.model import Config
from forebay.daemon.attached import Absent, Attached
from forebay.daemon.disks import Disks
from forebay.daemon.parallel import Progress
from forebay.disk.block_status import allocation
from forebay.errors import ForebayError, advice
from forebay.image.image import Image
from forebay.image.reach import ImageState
from forebay.keeping.forms import FORMS, Form
from forebay.keeping.frozen import frozen_view
from forebay.keeping.overlays import check_overlay, check_stays
from forebay.keeping.reading import Reader, refuse
from forebay.origin.addresses import FileAddress, resolve
from forebay.origin.new_image import NewImage, address_of_new, remove_left
from forebay.origin.pieces import data_in
from forebay.origin.threads import StoreThreads, bounded
from forebay_cache import Cache, View
from forebay_cache.format.geometry import BLOCK

T = TypeVar("T")

log = logging.getLogger("forebay.daemon")

STEP = 16 * BLOCK
"""Bytes that are read and written in one go."""

KIND = "save"
"""Kind of the record, by the new image's key, while it is being written: a start removes what a kill left."""

_REFUSED = (errno.EACCES, errno.EPERM)
_WRITABLE = "let the daemon's user write there, and try again"
_ANSWERS = "see that the storage answers, and try again"

CLEAN_SECONDS = 10.0
"""How long a store may take to remove that."""


@dataclass(frozen=True)
class Wanted:
    """The image that an operator wants."""

    to: str
    """Where it is to be: STORE:relative/path."""
    form: str = "raw"
    """Its format, `raw` or `qcow2`."""
    snapshot: str | None = None
    """Of which instant; None: of now."""
    partial: bool = False
    """Whether it is wanted although something is missing."""


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

    async def save(self, name: str, wanted: Wanted, progress: Progress) -> dict[str, Any]:
        """Make an image of what the disk shows; what was saved. Raises ForebayError and OSError."""
        target = address_of_new(self._config, wanted.to)
        async with (
            self._disks.turn(name) as disk,
            self._alone(target),
            self._at_one_instant(disk, wanted.snapshot) as (reader, size),
        ):
            store = _Target(self._threads_of(target.store), target.key, self._patience(target))
            form = FORMS[wanted.form](size)
            new = await store.run(
                lambda: NewImage(target, form.begins_with, self._cache.uuid),
                drop=lambda late: late.drop(),
            )
            try:
                saved = await self._fill(new, form, store, reader, size, progress)
                if reader.missing.bytes and not wanted.partial:
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
            "format": wanted.form,
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

    @contextlib.asynccontextmanager
    async def _at_one_instant(
        self, disk: Attached | Absent, snapshot: str | None
    ) -> AsyncIterator[tuple[Reader, int]]:
        """What reads the disk as it is at one instant, or was at a snapshot, and how large it is.

        Raises ForebayError and OSError.
        """
        if isinstance(disk, Absent):
            if snapshot is not None:
                self._disks.attached(disk.name)  # says why it is not served
            yield self._absent(disk), disk.record.size
            return
        one, image = disk.disk, disk.disk.image
        reached = image.conflict is None and image.reach.state is ImageState.REACHED
        make = functools.partial(_reader, image, one.size, has_image=reached)
        check_stays(one)
        if snapshot is not None:
            check_overlay(one)
        if one.overlay:
            async with frozen_view(one, snapshot) as view:
                yield make(view), one.size
            return
        async with one.modes.gate.closed():
            yield make(one.view), one.size

    def _absent(self, disk: Absent) -> Reader:
        """What reads a disk that is not served."""
        layers = self._cache.layers
        view = View(
            self._cache,
            layers.private_of(disk.name)[::-1],
            layers.clean_of(disk.record.key) if disk.clean_counts else None,
            refuse,
        )
        return Reader(view, disk.record.size, has_image=False)

    async def _fill(
        self,
        new: NewImage,
        form: Form,
        store: "_Target",
        reader: Reader,
        size: int,
        progress: Progress,
    ) -> int:
        """Write all that there is; how many bytes."""
        saved = 0
        progress(0, size)
        start = 0
        while (at := await reader.data_from(start)) < size:
            start = at // STEP * STEP
            found = await reader.read(start, min(STEP, size - start))
            parts = [part for offset, data in found for part in data_in(offset, data)]
            if parts:
                await store.run(functools.partial(new.write, form.placed(parts)))
                saved += sum(len(data) for _, data in parts)
            start += STEP
            progress(min(start, size), size)
        progress(size, size)
        for more in form.end():
            await store.run(functools.partial(new.write, more))
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


def _reader(image: Image, size: int, view: View, *, has_image: bool) -> Reader:
    """What reads a disk on that image through that view."""

    async def holes(offset: int, length: int) -> list[tuple[int, int]]:
        return await allocation(view, image, offset, length, one=False)

    return Reader(view, size, has_image=has_image, holes=holes if has_image else None)


class _Target:
    """The store that gets the new image. The disk's writes wait for its calls, so none takes longer than `timeout`."""

    def __init__(self, threads: StoreThreads, key: str, timeout: float) -> None:
        self._threads = threads
        self._key = key
        self._timeout = timeout

    async def run(self, do: Callable[[], T], drop: Callable[[T], object] | None = None) -> T:
        """As `StoreThreads.run`; raises ForebayError for what the store refuses, or takes too long for."""
        try:
            with bounded(self._timeout, "writing it"):
                return await self._threads.run(do, drop=drop)
        except OSError as fault:
            what = advice(fault, _WRITABLE if fault.errno in _REFUSED else _ANSWERS)
            raise ForebayError(f"{self._key}: {fault.strerror or fault}: {what}") from fault
        raise AssertionError("bounded() raises")

    async def drop(self, new: NewImage) -> None:
        """Remove what was written, in so much time; a start removes it otherwise. Raises nothing."""
        with trio.CancelScope(shield=True), contextlib.suppress(ForebayError):
            await self.run(new.drop)
