# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An image while it is staged, and the socket by which its pieces are written and read: for our own mount only."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import trio

from forebay.config.model import Config, DiskSettings
from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay.formats.magic import RAW
from forebay.image.source import Source
from forebay.origin.addresses import FileAddress, resolve
from forebay.origin.threads import StoreThreads, bounded
from forebay.staging import files
from forebay.staging.aside import Room
from forebay.staging.pieces import Pieces
from forebay.staging.torrent import BadTorrentError, Torrent
from forebay.stores.listener import StoreListener
from forebay.stores.served import Attaching, ServedImage
from forebay_nbd import Budgets, Export, Refused
from forebay_nbd.protocol.wire import Rep

log = logging.getLogger("forebay.staging")

FOLDER, SOCKET = "stage", "pieces"
"""Below RUN, the socket's folder and name."""

STORE_SECONDS = 60.0
"""How long a store may take for what lies beside an image."""

OURS = 0o600
"""Mode of the socket: whoever may connect reads every image of every store."""

T = TypeVar("T")


def address_of(config: Config, image: str) -> FileAddress:
    """The file of an image that is to be staged. Raises ForebayError for what cannot be."""
    address = resolve(config, image)
    if not isinstance(address, FileAddress) or address.store is None:
        raise ForebayError(f"{image}: images in stores can be staged: name it as STORE:path")
    if address.format != RAW:
        raise ForebayError(f"{image}: a file is staged as it is: leave the format out")
    return address


def _bare(
    base: Callable[[str, int | None], tuple[Source, DiskSettings]], image: str, size: int | None
) -> tuple[Source, DiskSettings]:
    """The source of an image, with settings that bring nothing in from the store unasked."""
    source, settings = base(image, size)
    return source, settings.model_copy(update={"preload": 0})


def _none(_disk: Disk) -> None:
    """No boot is recorded, or replayed."""


class StagedImage(ServedImage):
    """The image, and its pieces where there is a torrent that fits."""

    def __init__(
        self,
        config: Config,
        threads_of: Callable[[str], StoreThreads],
        attaching: Attaching,
        room: Room,
        key: str,
        size: int | None,
    ) -> None:
        """`threads_of` has the threads of a store, `room` is for all images; the rest as ServedImage has it."""
        super().__init__(
            key, replace(attaching, base=partial(_bare, attaching.base), boot_of=_none), size
        )
        self.address = address_of(config, key)
        self.pieces: Pieces | None = None
        self.making = trio.Lock()
        """Held by whoever makes a torrent: another one who wants it has that one then."""
        self._why = f"there is no torrent beside {key} yet: 'forebay stage' makes one"
        """Why there are none."""
        self._threads = threads_of(self.address.store or key)
        self._room = room

    @property
    def export(self) -> Export | None:
        """The pieces. Raises Refused."""
        if self.disk is None:
            return None
        return self.require_pieces()

    def require_pieces(self) -> Pieces:
        """The pieces. Raises Refused, which says why there are none."""
        if self.pieces is None:
            raise Refused(self._why)
        if (why := self.pieces.why_stale()) is not None:
            raise Refused(why)
        return self.pieces

    async def look_again(self) -> None:
        """Look for image and torrent once more where what was found before does not fit. Raises OSError."""
        if self.disk is not None and (self.pieces is None or self.pieces.why_stale() is not None):
            await self.disk.image.look()
            await self.opened(self.disk)

    async def opened(self, disk: Disk) -> None:
        """Look for the torrent. Raises OSError."""
        self.pieces = None
        try:
            torrent = await self.in_thread(partial(files.find, self.address))
        except BadTorrentError as fault:
            self._why = f"{files.place(self.address)} is not used, {fault}: stage the image anew"
            log.warning("%s", self._why)
            return
        if torrent is not None:
            await self._use(disk, torrent)

    async def _use(self, disk: Disk, torrent: Torrent) -> None:
        pieces = Pieces(disk, torrent, self._room)
        if torrent.size == disk.size and pieces.fits():
            await pieces.note_zeros()
            self.pieces = pieces
        else:
            self._why = f"the torrent of {self.key} is of the image as it was before: stage it anew"

    async def in_thread(self, do: Callable[[], T]) -> T:
        """What `do`, which blocks on the store, returns. Raises OSError."""
        with bounded(STORE_SECONDS, self.key):
            return await self._threads.run(do, background=True)
        raise AssertionError("bounded() raises")


class StagingListener(StoreListener):
    """The socket. An export's name is that of the image, STORE:path."""

    def __init__(
        self,
        config: Config,
        threads_of: Callable[[str], StoreThreads],
        attaching: Attaching,
        nursery: trio.Nursery,
        memory: Budgets,
    ) -> None:
        """`nursery` outlives the images; `memory` is what the clients of all sockets together may hold."""
        ours = {"socket_mode": OURS, "socket_owner": None, "socket_group": None}
        gateway = config.gateway.model_copy(update=ours)
        config = config.model_copy(update={"gateway": gateway})
        make = partial(StagedImage, config, threads_of, attaching, Room())
        super().__init__(config, SOCKET, _Nothing(), make, nursery, memory, FOLDER)

    def _key(self, name: str) -> str:
        try:
            return address_of(self._config, name).key
        except ForebayError as fault:
            raise Refused(str(fault), Rep.ERR_UNKNOWN) from None


class _Nothing:
    """Nothing is listed: the one client knows what it wants."""

    async def names(self) -> list[str]:
        return []
