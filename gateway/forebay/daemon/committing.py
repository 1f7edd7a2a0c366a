# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay commit`: the changes of an overlay, written to its image.

It is done as write-back does it. One commit of the index notes that it has begun; from then on the disk's private
layers are what its image lacks, with the marker and the redo journal beside the image that go with that. When the image
has all of them, durably, another commit notes that, and the disk comes back as an overlay without changes. Nobody is
served meanwhile.

What fails before a checkpoint is committed beside the image leaves the overlay as it was. Killed at any time after the
first commit, or with a checkpoint there that could not be finished, it is gone on with: at the next start, and by the
command.
"""

import contextlib
import logging
from dataclasses import replace

import trio

from forebay.config.model import DiskSettings
from forebay.daemon.arrivals import Arrivals
from forebay.daemon.attached import Absent, Attached
from forebay.daemon.departures import CLIENTS_SECONDS
from forebay.daemon.disks import Disks
from forebay.daemon.parallel import Progress
from forebay.daemon.record import DiskRecord, DiskRecords
from forebay.disk.disk import Disk
from forebay.doors.returns import Returns
from forebay.errors import ForebayError
from forebay.image.boundary import breaks_the_cache
from forebay.image.registry import Images
from forebay.image.source import Source
from forebay.keeping.kept import KeptOverlays
from forebay.keeping.overlays import check_overlay, check_stays
from forebay.origin.addresses import is_scratch
from forebay.units import Mode

log = logging.getLogger("forebay.daemon")

AGAIN_SECONDS = 30.0
"""How soon what a start could not go on with is tried again."""


class Committing:
    """Commits overlays, one at a time."""

    def __init__(
        self,
        arrivals: Arrivals,
        disks: Disks,
        records: DiskRecords,
        images: Images,
        returns: Returns,
        kept: KeptOverlays,
    ) -> None:
        self._arrivals = arrivals
        self._disks = disks
        self._records = records
        self._images = images
        self._returns = returns
        self._kept = kept
        self._alone = trio.Lock()

    async def commit(self, name: str, progress: Progress) -> None:
        """Write the changes of an overlay to its image. Raises ForebayError and OSError.

        Not cancelled half-way: whoever asked for it need not go on waiting.
        """
        async with self._alone, self._disks.turn(name) as disk:
            if isinstance(disk, Attached):
                self._check(disk)
                if not disk.disk.dirty.private_bytes:
                    return
            elif not disk.record.committing:
                self._disks.attached(name)  # says why it is not served
            record = disk.record.as_committing(begins=True)
            size = record.size if disk.record.committing else None
            source, settings = self._arrivals.source(name, _writing(record), size)
            with trio.CancelScope(shield=True):
                await self._commit(disk, record, source, settings, progress)

    async def run(self) -> None:
        """Go on, until cancelled, with what was killed, or failed half-way."""
        while True:
            for name in [one.name for one in self._disks if _is_half_done(one)]:
                try:
                    await self.commit(name, _silent)
                except ForebayError as fault:
                    log.warning("%s: its changes are not in its image yet: %s", name, fault)
                except Exception as fault:
                    if breaks_the_cache(fault):
                        raise
                    log.exception("%s: its changes are not in its image yet", name)
            await trio.sleep(AGAIN_SECONDS)

    def _check(self, disk: Attached) -> None:
        """Raise ForebayError where the changes of that disk cannot be committed now."""
        disk.check_serves()
        check_overlay(disk.disk)
        check_stays(disk.disk)
        image = disk.disk.image
        if is_scratch(image.key):
            raise ForebayError(f"'{disk.name}' has no image: 'forebay save' makes one of it")
        if image.conflict is not None:
            raise ForebayError(image.conflict)
        if disk.clients:
            raise ForebayError(f"'{disk.name}' is in use: shut the VM down, then commit it")
        if disk.disk.dirty.snapshots.all():
            raise ForebayError(
                f"'{disk.name}' has snapshots, which would not fit the image any more: drop them first"
            )
        others = [
            one.name
            for one in self._disks.all_attached()
            if one is not disk and one.source.is_same_image(disk.source)
        ]
        others += self._disks.coming_to(disk.source)
        others += [name for name in self._kept.on(image.key) if name != disk.name]
        if others:
            raise ForebayError(
                f"{image.key} is also the image of {', '.join(others[:3])}"
                f"{' and others' if len(others) > 3 else ''}: detach these first, or 'forebay save {disk.name}' "
                "makes another image"
            )

    async def _commit(
        self,
        disk: Attached | Absent,
        record: DiskRecord,
        source: Source,
        settings: DiskSettings,
        progress: Progress,
    ) -> None:
        """The same whoever goes on waiting for it. `record` says that it is being done."""
        was, overlay = disk.record, record.as_committing(begins=False)
        now = was
        try:
            async with self._disks.alone(source):
                if isinstance(disk, Attached):
                    await disk.take_down(CLIENTS_SECONDS)
                if was.committing and not self._kept.bytes_of(disk.name):
                    # killed with everything in the image, which may be in other hands by now
                    self._returns.owe(source, record.write())
                    await self._returns.give_back(source)
                else:
                    await self._begin(source, was)
                    self._returns.take_over(source)
                    await self._records.change(disk.name, was, record)
                    now = record
                    await self._write(source, record, settings, progress)
                now = overlay
            log.info("%s: its changes are in %s", disk.name, source.key)
        except _HalfDone as fault:
            raise ForebayError(
                f"{source.label}: {fault}: a part of the changes of '{disk.name}' is in the image, all of them are "
                "beside it; it is tried again by itself"
            ) from fault
        except (OSError, ForebayError) as fault:
            why = (fault.strerror or str(fault)) if isinstance(fault, OSError) else str(fault)
            if was.committing:  # of a life before, which may have left a checkpoint
                now = record.in_conflict(why) if isinstance(fault, _Conflict) else record
                await _leave(source)
            else:
                now = overlay
                await self._give_back(source, record)
            raise ForebayError(
                f"{why}: the changes of '{disk.name}' stay in the cache; commit it again when that is put right"
            ) from fault
        finally:
            if now != record:
                self._records.put(disk.name, now)
                await self._note()
            await self._arrivals.bring_back(disk.name, now)

    async def _note(self) -> None:
        """Make what is on record durable; a later commit has it where the index cannot be written."""
        try:
            await self._records.commit()
        except ForebayError as fault:
            log.warning("how a commit ended is not on record yet: %s", fault)

    async def _begin(self, source: Source, was: DiskRecord) -> None:
        """Open the image to write it, and claim it. Raises ForebayError and OSError."""
        if was.committing:
            await source.prepare_again()
            return
        await self._returns.call_off(source)
        await source.prepare()
        if source.size != was.size:
            raise ForebayError(f"{source.key} has {source.size} bytes, and had {was.size}")
        source.check_safe(Mode.WRITE_BACK)

    async def _write(
        self, source: Source, record: DiskRecord, settings: DiskSettings, progress: Progress
    ) -> None:
        """Take the disk's private layers to the image, and drop them. Raises ForebayError and OSError, and _HalfDone
        where the image may have a part of them.
        """
        if source.claim is not None:
            await source.claim.mark_dirty()
        disk = await Disk.open(self._images, source, settings)
        try:
            if disk.image.conflict is not None:
                raise _Conflict(disk.image.conflict)
            await disk.drain(progress)
        except BaseException as fault:
            is_half_done = disk.image.identity.has_checkpoint
            with contextlib.suppress(OSError):
                await disk.image.leave(source, disk.view)
            if is_half_done:
                await _leave(source)
                raise _HalfDone(str(fault)) from fault
            raise
        await disk.close(discard=False)
        await self._give_back(source, record)

    async def _give_back(self, source: Source, record: DiskRecord) -> None:
        """Let nothing of ours stay beside the image, as soon as its store lets us; it may never have been ours."""
        if source.claim is None or not source.claim.is_of_before:
            with contextlib.suppress(OSError, ForebayError):
                await source.abandon()
            return
        self._returns.owe(source, record.write())
        await self._returns.give_back(source)


class _HalfDone(Exception):
    """A checkpoint is committed beside the image, which may have a part of it."""


class _Conflict(ForebayError):
    """Somebody else has changed the image."""


async def _leave(source: Source) -> None:
    """Let the image go, and leave the marker that says whose it is."""
    with contextlib.suppress(OSError, ForebayError):
        await source.close_prepared()
        await source.leave()


def _writing(record: DiskRecord) -> DiskRecord:
    """The same of a disk that writes its changes back."""
    return replace(record, mode=Mode.WRITE_BACK.value)


def _is_half_done(disk: Attached | Absent) -> bool:
    return isinstance(disk, Absent) and disk.record.committing and not disk.record.conflict


def _silent(_done: int, _total: int) -> None:
    """Progress that nobody looks at."""
