# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How a disk goes: what is dirty is written back, or dropped on purpose, and the disk is forgotten.

The moment at which it is decided is one commit of the index, which notes that the disk is leaving. Whatever fails
before it refuses the detach, and the disk goes on as before; whatever fails after it is said in the log, and done
later.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import trio

from forebay.carrying.handover import OverlayHandover
from forebay.daemon.attached import Absent, Attached
from forebay.daemon.disks import Disks
from forebay.daemon.parallel import Progress
from forebay.daemon.record import DiskRecord, DiskRecords
from forebay.disk.detach import finish_checkpoint
from forebay.doors.returns import Returns
from forebay.errors import ForebayError, advice
from forebay.events.telling import described, tell
from forebay.handover.evacuation import ITS_OWN
from forebay.image.registry import Images
from forebay.image.source import Source
from forebay.keeping.kept import Kept, KeptOverlays, identity_of

log = logging.getLogger("forebay.daemon")

CLIENTS_SECONDS = 20.0
"""How long requests in flight have at detach and at stop. Then their clients are cut off; they repeat what was not
answered. Below systemd's usual 90 s for the whole stop."""

RELEASE_SECONDS = 10.0
"""How long a store may take to give an image back. The marker that stays behind then is ours to take again."""


class Departures:
    """Detaches disks, and removes them from `disks`."""

    def __init__(
        self,
        images: Images,
        disks: Disks,
        records: DiskRecords,
        returns: Returns,
        source_of: Callable[[str, DiskRecord], Source],
        kept: KeptOverlays,
    ) -> None:
        """`source_of` makes the source of a disk on record. It raises ForebayError."""
        self._kept = kept
        self._images = images
        self._disks = disks
        self._records = records
        self._returns = returns
        self._source_of = source_of

    async def detach(
        self, name: str, *, discard: bool, force: bool, spare: bool = False, progress: Progress
    ) -> None:
        """Write back what is dirty (or drop it, `discard`), stop serving, forget the disk.

        With `spare` an overlay that has anything of its own stays. A disk that a fault has stopped is written back here
        all the same. Raises ForebayError and OSError; then the disk goes on as before.
        """
        async with self._disks.turn(name) as disk:
            told: dict[str, Any] = described(name)
            if isinstance(disk, Absent):
                await self._forget_absent(disk, discard)
                tell("detach", "detached", **told)
                return
            _check_unused(disk, force)
            await self._empty(disk, discard, force, spare, progress)
            with trio.CancelScope(shield=True):
                await self._forget(disk, discard)
        tell("detach", "detached", **told)

    async def give_way(self, disk: Attached) -> None:
        """Detach a disk whose readers are to keep no writer out, whether or not they are connected."""
        log.info("%s: goes by itself", disk.name)
        with contextlib.suppress(ForebayError):  # it may go by itself at this moment
            await self.detach(
                disk.name, discard=False, force=True, progress=lambda _done, _total: None
            )

    async def _empty(
        self, attached: Attached, discard: bool, force: bool, spare: bool, progress: Progress
    ) -> None:
        """Write back, hang up, and note that the disk is leaving. If that fails the disk stays."""
        attached.begin_detach()
        try:
            if not discard:
                await attached.drain(progress)
                _check_unused(attached, force)
            await self._shut(attached, discard, spare)
        except BaseException:
            attached.give_up_detach()
            raise

    async def _shut(self, attached: Attached, discard: bool, spare: bool) -> None:
        """Hang up, write back what came until then, and decide. If that fails, clients are accepted again."""
        try:
            with trio.CancelScope(shield=True):
                await attached.listener.shut(CLIENTS_SECONDS)
            is_gone = await _leave(attached, discard)
            if (
                spare
                and not is_gone
                and attached.disk.overlay
                and attached.disk.status()["private_bytes"]
            ):
                raise ForebayError(ITS_OWN)
            if not discard and attached.disk.status()["dirty_bytes"]:
                await attached.drain(lambda _done, _total: None)
            with trio.CancelScope(shield=True):
                await self._decide(attached, discard, is_gone=is_gone)
        except BaseException:
            attached.disk.writeback.is_given_up = False
            with trio.CancelScope(shield=True):
                await attached.accept_again()
            raise

    async def _decide(self, attached: Attached, discard: bool, *, is_gone: bool) -> None:
        """Note, durably, that the disk is leaving: a start goes on with that. Raises ForebayError."""
        disk, record = attached.disk, attached.record
        if record.keep and not (discard or is_gone) and disk.dirty.has_changes():
            await self._keep(attached)
            return
        if discard:
            await finish_checkpoint(disk.image, attached.source, disk.writeback)
        await self._records.change(attached.name, record, record.as_leaving())

    async def _keep(self, attached: Attached) -> None:
        """Note, durably, that the disk is not attached any more, and that its changes are kept. Raises ForebayError."""
        image, record = attached.disk.image, attached.record
        if identity_of(image.cache, image.key) is None:
            await image.look()
        try:
            await image.cache.make_durable()
        except OSError as fault:
            raise ForebayError(
                f"what '{attached.name}' has cannot be made durable ({fault.strerror or fault}): "
                "see forebay cache info, or give it up with --discard"
            ) from fault
        self._kept.put(attached.name, Kept.now(record.write(), image.cache))
        try:
            await self._records.remove(attached.name, record)
        except BaseException:
            self._kept.put(attached.name, None)
            raise

    async def _forget(self, attached: Attached, discard: bool) -> None:
        """Drop what the cache has of the disk alone, take it off the record, and give the image back."""
        await attached.rest()
        given_up = discard and attached.disk.image.conflict is not None
        is_kept = self._kept.get(attached.name) is not None
        try:
            await attached.disk.close(discard=discard, keep=is_kept)
        except Exception as fault:
            attached.stop(fault)  # it is shown as what it is, and can be detached once more
            raise
        self._disks.remove(attached)
        attached.leave()
        attached.listener.tenant.forget()
        if attached.record.writes:
            record = attached.record.write()
            self._returns.owe(attached.source, record, drop_checkpoint=given_up)
        if not is_kept:
            await self._take_off_record(attached.name)
        await self._returns.give_back(attached.source, drop_checkpoint=given_up)

    async def _take_off_record(self, name: str) -> None:
        """Have no record of the disk any more. Where the index cannot be written, a later commit has that."""
        self._records.put(name, None)
        try:
            await self._records.commit()
        except ForebayError as fault:
            log.warning("%s: it is detached, which is not on record yet: %s", name, fault)

    async def _forget_absent(self, disk: Absent, discard: bool) -> None:
        if not discard:
            raise ForebayError(
                f"'{disk.name}' is not served ({disk.why}): put that right and restart, "
                "or detach it with --discard and lose what only the cache has"
            )
        record = disk.record
        await self._records.change(disk.name, record, record.as_leaving())
        self._disks.remove(disk)
        self._images.drop_disk(disk.name, record.key)
        drop_checkpoint = bool(record.conflict)
        source = None
        if record.writes:
            with contextlib.suppress(ForebayError):  # its store is not configured any more
                source = self._source_of(disk.name, record)
                self._returns.owe(source, record.write(), drop_checkpoint=drop_checkpoint)
        await self._take_off_record(disk.name)
        if source is not None:
            self._returns.give_back_later(source, drop_checkpoint=drop_checkpoint)


async def _leave(attached: Attached, discard: bool) -> bool:
    """See that what a moving overlay has is where it is to be: True if that is another host. Raises ForebayError."""
    if not isinstance(attached.handover, OverlayHandover):
        return False
    try:
        return await attached.handover.leave(discard=discard)
    except OSError as fault:
        raise ForebayError(
            f"'{attached.name}' is about to move, and cannot be detached: {fault.strerror or fault}: "
            f"{advice(fault, 'see that its store answers, then try again')}"
        ) from fault


def _check_unused(attached: Attached, force: bool) -> None:
    clients = attached.listener.clients
    if clients and not force:
        plural = "client is" if clients == 1 else "clients are"
        raise ForebayError(
            f"{clients} {plural} connected to '{attached.name}': shut the VM down, or use --force"
        )
