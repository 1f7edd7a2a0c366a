# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Out of a conflict with the data kept: `forebay resolve NAME --keep-mine | --keep-image`.

A disk is in conflict when its image is not what it was, while the cache has data that belongs on the image as it was.
The disk, and all others on the image, are taken down; the image as it is now is opened, and claimed if the disk writes
it; one commit notes what was decided; the cache follows, and the disks are brought back. Clients are hung up on and
connect again, as QEMU's reconnect does: what they have in memory of the disk may be of the content before.

Killed before that commit, the next start finds the conflict as it was; killed after it, the next start goes on. Other
overlays on the image that have data of their own stay in conflict, until each is resolved.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import trio

from forebay.daemon.arrivals import Arrivals
from forebay.daemon.attached import Absent, Attached
from forebay.daemon.departures import CLIENTS_SECONDS
from forebay.daemon.disks import Disks
from forebay.daemon.parallel import Progress
from forebay.daemon.record import DiskRecord, DiskRecords
from forebay.errors import ForebayError
from forebay.events.telling import tell
from forebay.image.source import Source
from forebay.origin.file import FileOrigin
from forebay.units import format_size

Keeps = Literal["mine", "image"]
"""Whose data is kept where both have some: the cache's, or the image's."""


class Resolving:
    """Resolves conflicts, one at a time."""

    def __init__(self, arrivals: Arrivals, disks: Disks, records: DiskRecords) -> None:
        self._arrivals = arrivals
        self._disks = disks
        self._records = records
        self._alone = trio.Lock()

    async def keep(
        self, name: str, keeps: Keeps, *, sure: bool, progress: Progress
    ) -> dict[str, Any]:
        """Go on with the image as it is now, with the disk's own data or without it; the disk's status.

        `sure`: the operator has said that data may be given up for it. Raises ForebayError and OSError; then the disk
        is in conflict as before.
        """
        async with self._alone, self._disks.turn(name) as disk:
            _check(disk, keeps, sure=sure)
            others = self._others(disk)
            source, _settings = self._arrivals.source(name, disk.record, None)
            async with _turns(others), self._disks.alone(source):
                with trio.CancelScope(shield=True):
                    await self._resolve(disk, source, keeps, others)
        text = f"its conflict was resolved, and {_KEPT[keeps]} is kept"
        tell("resolve", text, name, level=logging.WARNING)
        found = self._disks.attached(name)
        if keeps == "mine":
            with found.used():
                await found.drain(progress)
        return found.status()

    def _others(self, disk: Attached | Absent) -> list[Attached]:
        """The other disks on the image; none where the disk itself is not on it any more."""
        if isinstance(disk, Absent):
            return []
        image = disk.disk.image
        return [
            one for one in self._disks.all_attached() if one is not disk and one.disk.image is image
        ]

    async def _resolve(
        self, disk: Attached | Absent, source: Source, keeps: Keeps, others: Sequence[Attached]
    ) -> None:
        """The same in any case, whoever goes on waiting for it. `source` is a new one of the disk."""
        was = disk.record
        await self._look(source)
        why = disk.why if isinstance(disk, Absent) else str(disk.disk.image.conflict)
        unsure = isinstance(disk, Attached) and disk.disk.image.identity.is_withdrawn()
        behind = {one.name for one in others if one.disk.dirty.private_bytes}
        parked = f"its image {was.key} was changed, and gone on with by disk '{disk.name}'"
        records = {one.name: one.record for one in others}
        for one in (disk, *others):
            if isinstance(
                one, Attached
            ):  # it keeps its name and its image until another takes its place
                await one.take_down(CLIENTS_SECONDS)
        now = was
        try:
            size = await self._claim(source, was, keeps)
            now = was.resolved(keeps, size)
            records |= {
                one: records[one].in_conflict(f"{parked}: {_ADVICE.format(one)}", behind=True)
                for one in behind
            }
            await self._decide({disk.name: now, **records}, {disk.name: was, **_records(others)})
            await self._arrivals.follow(disk.name, now)
            now = now.followed()
        except BaseException:
            now, records = was, _records(others)
            if unsure or isinstance(
                disk, Absent
            ):  # nothing on record would tell that it is another image
                now = was.in_conflict(why)
                self._records.put(disk.name, now)
            raise
        finally:
            for name, record in {disk.name: now, **records}.items():
                await self._arrivals.bring_back(name, record)

    async def _look(self, source: Source) -> None:
        """Before anything is taken down: raise ForebayError where that would not help."""
        try:
            await source.look_for_owner()
        except OSError as fault:
            raise ForebayError(
                f"{source.label}: {fault.strerror or fault}: put an image there, or save what the cache has "
                f"with 'forebay resolve {source.use.disk} --save STORE:NEW'"
            ) from fault

    async def _claim(self, source: Source, was: DiskRecord, keeps: Keeps) -> int:
        """See that the image as it is now can be gone on with, and is ours; its size. Raises ForebayError."""
        claim = source.claim
        try:
            if claim is not None:
                await claim.drop_checkpoint()  # what it has is in the cache, too
            await source.prepare_again()
            size = await self._fit(source, was) if keeps == "mine" else source.size
            if claim is not None and keeps == "mine":
                await claim.mark_dirty()
        except OSError as fault:
            raise ForebayError(
                f"{source.label}: {fault.strerror or fault}: nothing was changed; try again when that is put right"
            ) from fault
        finally:
            await source.close_prepared()
            with contextlib.suppress(OSError, ForebayError):
                await source.leave()
        return size

    async def _fit(self, source: Source, was: DiskRecord) -> int:
        """Have the image as long as the disk, whose data reaches so far; its size. Raises ForebayError and OSError."""
        size = source.size
        if size >= was.size or not source.use.writes:
            return size
        origin = source.prepared
        if not isinstance(origin, FileOrigin):
            raise ForebayError(
                f"{source.label} has {size} bytes now, and the disk {was.size}: give it back its size, or save what "
                f"the cache has with 'forebay resolve {source.use.disk} --save STORE:NEW'"
            )
        await origin.extend(was.size)
        return was.size

    async def _decide(self, records: dict[str, DiskRecord], before: dict[str, DiskRecord]) -> None:
        """Note what was decided, in one commit. Raises ForebayError; then nothing of it is on record."""
        for name, record in records.items():
            self._records.put(name, record)
        try:
            await self._records.commit()
        except BaseException:
            for name, record in before.items():
                self._records.put(name, record)
            raise


_KEPT = {"mine": "what the cache has", "image": "what the image has"}

_ADVICE = "'forebay resolve {}' keeps its own data over that, or drops it, or saves it elsewhere"


def _records(disks: Sequence[Attached]) -> dict[str, DiskRecord]:
    return {one.name: one.record for one in disks}


def _check(disk: Attached | Absent, keeps: Keeps, *, sure: bool) -> None:
    """Raise ForebayError where there is nothing to resolve, or the operator has not said that data may go."""
    name = disk.name
    if isinstance(disk, Attached):
        disk.check_serves()
        in_conflict, private = disk.disk.image.conflict, disk.disk.dirty.private_bytes
    else:
        in_conflict, private = disk.record.conflict, disk.private_bytes
    if not in_conflict:
        raise ForebayError(f"'{name}' is in no conflict: there is nothing to resolve")
    if keeps == "mine" and not private:
        raise ForebayError(
            f"the cache has nothing of '{name}' that the image lacks: use --keep-image"
        )
    if sure or not private:
        return
    much = format_size(private)
    if keeps == "image":
        raise ForebayError(
            f"{much} that only the cache has of '{name}' would be given up: say --yes, or --save them first"
        )
    what = (
        f"{much} of '{name}' would lie over an image that is another one than they were written for"
        if disk.record.overlay
        else f"{much} of '{name}' would be written over what the image has there now"
    )
    raise ForebayError(f"{what}: say --yes")


@contextlib.asynccontextmanager
async def _turns(disks: Sequence[Attached]) -> AsyncIterator[None]:
    """Around what is done to several disks: no other command changes any of them."""
    async with contextlib.AsyncExitStack() as stack:
        for one in disks:
            await stack.enter_async_context(one.busy)
        yield
