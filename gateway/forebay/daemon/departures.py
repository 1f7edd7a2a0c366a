# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How a disk goes: what is dirty is written back, or dropped on purpose, and the disk is forgotten."""

import contextlib
import logging

import trio

from forebay.daemon.attached import Absent, Attached
from forebay.daemon.disks import Disks
from forebay.daemon.parallel import Progress
from forebay.daemon.record import DiskRecords
from forebay.disk.detach import finish_checkpoint
from forebay.errors import ForebayError
from forebay.image.registry import Images
from forebay.origin.threads import bounded

log = logging.getLogger("forebay.daemon")

CLIENTS_SECONDS = 20.0
"""How long requests in flight have at detach and at stop. Then their clients are cut off; they repeat what was not
answered. Below systemd's usual 90 s for the whole stop."""

RELEASE_SECONDS = 10.0
"""How long a store may take to give an image back. The marker that stays behind then is ours to take again."""


class Departures:
    """Detaches disks, and removes them from `disks`."""

    def __init__(self, images: Images, disks: Disks, records: DiskRecords) -> None:
        self._images = images
        self._disks = disks
        self._records = records

    async def detach(self, name: str, *, discard: bool, force: bool, progress: Progress) -> None:
        """Write back what is dirty (or drop it, `discard`), stop serving, forget the disk.

        A disk that a fault has stopped is written back here all the same. Raises ForebayError and OSError; then the
        disk goes on as before.
        """
        disk = self._disks.find(name)
        if isinstance(disk, Absent):
            await self._forget_absent(disk, discard)
            return
        async with disk.busy:
            if self._disks.find(name) is not disk:
                raise ForebayError(f"'{name}' was detached by somebody else, and attached again")
            _check_unused(disk, force)
            await self._empty(disk, discard, force, progress)
            with trio.CancelScope(shield=True):
                await self._forget(disk, discard)
        log.info("%s: detached", name)

    async def give_way(self, disk: Attached) -> None:
        """Detach a disk whose readers are to keep no writer out, whether or not they are connected."""
        log.info("%s: gives way to a disk that writes its image", disk.name)
        with contextlib.suppress(ForebayError):  # it may go by itself at this moment
            await self.detach(
                disk.name, discard=False, force=True, progress=lambda _done, _total: None
            )

    async def _empty(
        self, attached: Attached, discard: bool, force: bool, progress: Progress
    ) -> None:
        """Write back, and hang up. If that fails the disk stays."""
        attached.begin_detach()
        try:
            if not discard:
                await attached.drain(progress)
                _check_unused(attached, force)
            await self._shut(attached, discard)
        except BaseException:
            attached.give_up_detach()
            raise

    async def _shut(self, attached: Attached, discard: bool) -> None:
        """Hang up, and write back what came until then. If that fails, clients are accepted again."""
        try:
            with trio.CancelScope(shield=True):
                await attached.listener.shut(CLIENTS_SECONDS)
            if not discard and attached.disk.status()["dirty_bytes"]:
                await attached.drain(lambda _done, _total: None)
        except BaseException:
            with trio.CancelScope(shield=True):
                await attached.accept_again()
            raise

    async def _forget(self, attached: Attached, discard: bool) -> None:
        """Drop what the cache has of the disk alone, take it off the record, and give the image back."""
        if discard:
            disk = attached.disk
            await finish_checkpoint(disk.image, attached.source, disk.writeback)
        await attached.rest()
        given_up = discard and attached.disk.image.conflict is not None
        try:
            await attached.disk.close(discard=discard)
        except Exception as fault:
            attached.stop(fault)  # it is shown as what it is, and can be detached once more
            raise
        self._disks.remove(attached)
        attached.leave()
        attached.listener.tenant.forget()
        self._records.put(attached.name, None)
        await self._records.commit()
        try:
            with bounded(RELEASE_SECONDS, "giving the image back"):
                await attached.source.release(drop_checkpoint=given_up)
        except (OSError, ForebayError) as fault:
            log.warning("%s: its owner marker stays: %s", attached.name, fault)

    async def _forget_absent(self, disk: Absent, discard: bool) -> None:
        if not discard:
            raise ForebayError(
                f"'{disk.name}' is not served ({disk.why}): put that right and restart, "
                "or detach it with --discard and lose what only the cache has"
            )
        self._disks.remove(disk)
        self._images.drop_disk(disk.name, disk.record.key)
        self._records.put(disk.name, None)
        await self._records.commit()


def _check_unused(attached: Attached, force: bool) -> None:
    clients = attached.listener.clients
    if clients and not force:
        plural = "client is" if clients == 1 else "clients are"
        raise ForebayError(
            f"{clients} {plural} connected to '{attached.name}': shut the VM down, or use --force"
        )
