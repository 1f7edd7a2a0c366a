# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Open files of the mount. All who have a disk or an image open share one NBD connection to it."""

import errno
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import trio

from forebay.doors.fuse.daemon import Daemon, Refused, Served, disk_for
from forebay.doors.fuse.link import Check, Connected, Lasting
from forebay.doors.fuse.places import DISKS, STAGE, Found, Path, Place, StagePlace, found_disk

log = logging.getLogger("forebay.fuse")

LINGER_SECONDS = 2.0
"""How long an image stays attached after its last close: tools open an image several times in a row. Not longer,
because nobody can attach it for writing meanwhile."""

ATTEMPTS = 3
"""How often an image is attached when another mount lets go of it at the same moment."""

SHUT_SECONDS = 5.0
"""How long the end of the mount waits for the daemon to let go of the images."""

AnyLink = Lasting[Any]
MakeLink = Callable[[str, str], AnyLink]


@dataclass(eq=False)
class OpenFile:
    """A file that is open.

    `link` is None for an empty one; `live`: it may change under its readers; `attached`: the disk that this mount
    attached for it.
    """

    path: Path
    found: Found
    link: AnyLink | None
    live: bool = False
    attached: str | None = None
    users: int = 0


class OpenFiles:
    """The open files of the mount."""

    def __init__(
        self,
        daemon: Daemon,
        images: Place,
        key_of: Callable[[str], str | None],
        nursery: trio.Nursery,
        *,
        make_link: MakeLink,
        pieces: str = "",
    ) -> None:
        """`key_of` returns the key of the image that a disk was attached from, None if it has none here.

        `nursery` is for tasks that let images go; `make_link` makes connections: (path of the socket, export);
        `pieces` is the path of the socket for what is staged.
        """
        self._daemon = daemon
        self._images = images
        self._stage = StagePlace(images)
        self._key_of = key_of
        self._nursery = nursery
        self._make_link = make_link
        self._pieces = pieces
        self._files: dict[Path, OpenFile] = {}
        self._locks: defaultdict[Path, trio.Lock] = defaultdict(trio.Lock)
        self._kept: dict[Path, str] = {}
        """Disks that are still attached for images which nobody has open."""
        self._written: dict[Path, int] = {}
        """When what was written through this mount reached the daemon last, ns since the epoch."""

    def touched(self, file: OpenFile) -> None:
        """Note that what was written has reached the daemon: the time stamps say so from now on.

        Not those of what is staged: that is the same image before and after, and the kernel keeps its pages for that.
        """
        if file.path[0] == STAGE:
            return
        self._written[file.path] = time.time_ns()
        file.found = self.dated(file.path, file.found)

    def dated(self, path: Path, found: Found) -> Found:
        """The same with the time of the last write through this mount, if that is later."""
        return replace(found, mtime_ns=max(found.mtime_ns, self._written.get(path, 0)))

    def get(self, path: Path) -> OpenFile | None:
        """The file, if somebody has it open."""
        return self._files.get(path)

    async def open(self, path: Path) -> OpenFile:
        """Open a file, or count one user more of one that is open. Raises OSError."""
        async with self._locks[path]:
            file = self._files.get(path)
            if file is None:
                open_there = {DISKS: self._disk, STAGE: self._staged}.get(path[0], self._image)
                opened = await open_there(path)
                file = self._files[path] = opened
            file.users += 1
            return file

    async def close(self, file: OpenFile) -> None:
        """One has closed it. After the last one the disk has a client less, and an image is soon detached."""
        async with self._locks[file.path]:
            file.users -= 1
            if file.users:
                return
            del self._files[file.path]
            if file.link is not None:
                await file.link.close()
        if file.attached is not None:
            self._kept[file.path] = file.attached
            self._nursery.start_soon(self._let_go, file.path, file.attached)

    async def shut(self) -> None:
        """Close everything, and detach what this mount attached, within SHUT_SECONDS."""
        with trio.move_on_after(SHUT_SECONDS):
            for file in list(self._files.values()):
                if file.link is not None:
                    await file.link.close()
                if file.attached is not None:
                    self._kept[file.path] = file.attached
            self._files.clear()
            for name in list(self._kept.values()):
                await self._detach(name)

    async def tidy(self) -> None:
        """Detach what a mount that was killed has left attached and nobody reads."""
        try:
            disks = await self._daemon.disks(fresh=True)
        except OSError:
            return
        for disk in disks.values():
            if disk.name == disk_for(disk.image) and not disk.clients:
                await self._detach(disk.name)

    # ----------------------------------------------------------------------------------------------------- opening

    async def _disk(self, path: Path) -> OpenFile:
        """A disk, opened. Raises OSError."""
        disk = (await self._daemon.disks(fresh=True)).get(path[1])
        if disk is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return OpenFile(path, self.dated(path, found_disk(disk)), await self._linked(disk))

    async def _image(self, path: Path) -> OpenFile:
        """An image, opened through the disk that writes it, if there is one; else through a read-only one of ours."""
        found = await self._images.look(path[1:])
        if not found.size:
            return OpenFile(path, found, None)
        key = f"{path[1]}:{'/'.join(path[2:])}"
        for left in reversed(range(ATTEMPTS)):
            writer = await self._writer(key)
            try:
                if writer is not None:
                    return OpenFile(path, found, await self._linked(writer), live=True)
                await self._daemon.attach(key)
                own = (await self._daemon.disks(fresh=True))[disk_for(key)]
                link = await self._linked(own)
                return OpenFile(path, found, link, attached=own.name)
            except (OSError, KeyError) as fault:
                if not left:
                    log.warning("%s: %s", key, fault)
                    raise OSError(errno.EIO, str(fault)) from None
        raise AssertionError("the last attempt returns or raises")

    async def _staged(self, path: Path) -> OpenFile:
        """An image whose pieces come from other hosts. Raises OSError."""
        found = await self._stage.look(path[1:])
        link = self._make_link(self._pieces, f"{path[1]}:{'/'.join(path[2:])}")
        await link.open()
        # the kernel may keep what goes by: whoever writes it gives the same away again, and has checked it
        return OpenFile(path, found, link)

    async def _writer(self, key: str) -> Served | None:
        """The disk that writes to the image, if there is one. Raises OSError."""
        disks = (await self._daemon.disks(fresh=True)).values()
        return next(
            (
                disk
                for disk in disks
                if not (disk.read_only or disk.overlay) and self._key_of(disk.image) == key
            ),
            None,
        )

    async def _linked(self, disk: Served) -> AnyLink:
        """A connection to a disk. Raises OSError."""
        link = self._make_link(disk.socket, disk.name)
        await link.open(self._same(disk))
        return link

    def _same(self, opened: Served) -> Check:
        """Checks after a reconnection that the name still stands for the disk that was opened."""

        async def check(_client: Connected) -> str | None:
            now = (await self._daemon.disks(fresh=True)).get(opened.name)
            if now is None or (now.image, now.overlay) == (opened.image, opened.overlay):
                return None
            return f"{opened.name}: is {now.image} now and was {opened.image}: open it again"

        return check

    # --------------------------------------------------------------------------------------------------- letting go

    async def _let_go(self, path: Path, name: str) -> None:
        """After LINGER_SECONDS, detach a disk whose image nobody has opened again."""
        await trio.sleep(LINGER_SECONDS)
        async with self._locks[path]:
            if path not in self._files and self._kept.pop(path, None) is not None:
                await self._detach(name)

    async def _detach(self, name: str) -> None:
        try:
            await self._daemon.detach(name)
        except Refused as fault:
            log.info("%s stays attached: %s", name, fault.strerror)
        except OSError as fault:
            log.warning("%s stays attached: %s", name, fault.strerror)
