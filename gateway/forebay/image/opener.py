# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Opening the image of one disk: an origin of the kind that its address names, locked, and claimed if it is written."""

import logging
from collections.abc import Callable
from dataclasses import replace

import trio

from forebay.errors import ForebayError
from forebay.formats.magic import RAW
from forebay.image.formats import Formats, is_marked, mark
from forebay.image.use import Use
from forebay.origin.addresses import (
    Address,
    DeviceAddress,
    FileAddress,
    ScratchAddress,
    WebAddress,
)
from forebay.origin.block import BlockOrigin
from forebay.origin.calls import SystemCalls
from forebay.origin.file import FileOrigin
from forebay.origin.mounts import why_unsafe
from forebay.origin.nbd import NbdOrigin
from forebay.origin.opening import Backing, OpenImage, look, open_device, open_image
from forebay.origin.protocol import Nothing, Origin, close_quietly
from forebay.origin.threads import Descriptor, StoreThreads, bounded
from forebay.origin.virtual.naming import named_format
from forebay.origin.virtual.opening import open_virtual, start_server
from forebay.origin.virtual.origin import VirtualOrigin
from forebay.origin.virtual.servers import Servers
from forebay.origin.virtual.web import WebOrigin, open_web
from forebay.origin.worker import syscalls
from forebay.sidecar.claim import Claim
from forebay.sidecar.files import read_owner
from forebay.sidecar.locks import LOOKS, READS, WRITES, Access, InUse, NoLocks, take_locks
from forebay.sidecar.record import NOBODY, Owner, in_use_by_program, left_behind

log = logging.getLogger("forebay.origin")


class Opener:
    """Opens the image of one disk, as often as it is asked to."""

    def __init__(
        self,
        address: Address,
        label: str,
        use: Use,
        claim: Claim | None,
        *,
        threads: StoreThreads,
        timeout: float,
        nursery: trio.Nursery,
        left_by: Callable[[str], int],
        formats: Formats | None = None,
        servers: Servers | None = None,
    ) -> None:
        """`claim` is that of a disk that writes to a file. `left_by` returns how many bytes the cache has of a disk of
        that name which is not served. `nursery` is for the connections to an NBD server; `timeout` is in seconds.
        `formats` remembers which images are raw disks; `servers` is for those that are in another format.
        """
        self.file_id: tuple[int, int] | None = None
        """Device and inode of the image, once it was opened, if it is a file."""
        self.allocated: int | None = None
        """Bytes that it took in its store when it was opened last, if it is a file."""
        self.format: str | None = None
        """The format that its first bytes are of, once they were looked at: `raw`, or that of a file of tables."""
        self.why_unsafe: str | None = None
        """Why nothing is to be written back to where the image lies; known once it was opened."""
        self._address = address
        self._key = address.key
        self._label = label
        self._use = use
        self._claim = claim
        self._threads = threads
        self.timeout = timeout
        self._nursery = nursery
        self._left_by = left_by
        self._formats = formats
        self._servers = servers

    async def find_format(self) -> str:
        """The format in which an image is to be attached that nobody has told the format of: see `virtual/naming.py`.

        Raises ForebayError where that has to be told, OSError.
        """
        address = self._address
        if not isinstance(address, FileAddress) or address.format != RAW:
            return RAW

        def look_at() -> OpenImage:
            file = open_image(address, read_only=True, as_bytes=True, was_raw=self._was_raw)
            try:
                return replace(file, format=named_format(address, file))
            finally:
                syscalls.close(file.fd)

        with bounded(self.timeout, f"opening {self._label}"):
            return (await self._threads.run(look_at)).format or RAW

    async def open(self, *, first: bool) -> Origin:
        """An origin, which the caller closes. `first`: the disk is just being attached, so its format is looked at.

        Raises ForebayError for what the operator has to change; TakenOver when the image was ours and another gateway
        took it since; OSError for failing storage.
        """
        if isinstance(self._address, FileAddress):
            return await self._open_file(self._address, first)
        if isinstance(self._address, DeviceAddress):
            return await self._open_device(self._address)
        if isinstance(self._address, ScratchAddress):
            return Nothing(self._address.size, self._label)
        if isinstance(self._address, WebAddress):
            return await self._open_web(self._address, first)
        return await NbdOrigin.open(
            self._nursery,
            self._address,
            self._label,
            read_only=not self._use.writes,
            timeout=self.timeout,
        )

    async def _open_file(self, address: FileAddress, first: bool) -> FileOrigin:
        file = await self._in_thread(lambda: self._open_image(address, first))
        if address.format != RAW:
            return await self._claimed(address, file, VirtualOrigin)
        if first and self._formats is not None and self._use.shows_raw:
            self._formats.remember(self._key, file.size)
        return await self._claimed(address, file, FileOrigin)

    async def _claimed(
        self, address: FileAddress, file: OpenImage, kind: type[FileOrigin]
    ) -> FileOrigin:
        """An origin of the open image, with what keeps others out, and with a server that is ready where it has one."""
        origin = kind(file, self._label, threads=self._threads, timeout=self.timeout)
        try:
            await self._look_at_mount(file)
            for below in file.backing:
                await self._check_unwritten(below.address)
                await self._keep_unwritten(below)
            if self._claim is not None:
                await self._take(self._claim, address, file, origin.descriptor)
            else:
                await self._share(address, origin.descriptor)
            if kind is VirtualOrigin and not self._servers_of_files.is_open(self._key):
                await self._start_server(origin.descriptor)
        except BaseException:
            await close_quietly(origin)
            raise
        return origin

    async def _start_server(self, descriptor: Descriptor) -> None:
        """Start the server of a virtual disk; where other disks use another one already, the first call does it."""

        def start() -> None:
            with descriptor as fd:
                start_server(fd)

        with bounded(self.timeout, f"opening {self._label}"):
            await self._threads.run(start)

    async def _check_unwritten(self, address: FileAddress) -> None:
        """Raise ForebayError where a gateway writes a file that the image lies on. Raises OSError."""
        owner = await self._owner(address)
        if owner is not None and owner.gateway != NOBODY:
            raise ForebayError(
                f"{self._key} lies on {address.key}, which is written by {owner}: detach it there first"
            )

    async def _keep_unwritten(self, below: Backing) -> None:
        """Lock a file that the image lies on: nobody is to write it. Raises InUseError and OSError."""
        await self._locked(below.address.key, lambda: take_locks(below.fd, READS))

    @property
    def _servers_of_files(self) -> Servers:
        assert self._servers is not None, "needed for an image in a format"
        return self._servers

    def _open_image(self, address: FileAddress, first: bool) -> OpenImage:
        """In a thread: the open file. One that is attached as a disk that writes bears the mark of a raw disk."""
        read_only = not self._use.writes
        if address.format != RAW:
            servers = self._servers_of_files
            return open_virtual(
                address,
                read_only=read_only,
                run=servers.run,
                locate=servers.locate,
                admitted=not first,
                need_locks=self._use.need_locks,
            )
        file = open_image(
            address,
            read_only=read_only,
            admitted=not first,
            as_bytes=self._use.as_bytes,
            was_raw=self._was_raw if first else None,
        )
        if first and not read_only:
            mark(file.fd, file.size)
        return file

    def _was_raw(self, fd: int, size: int) -> bool:
        known = self._formats is not None and self._formats.is_raw(self._key, size)
        return known or is_marked(fd, size)

    async def _open_device(self, address: DeviceAddress) -> BlockOrigin:
        read_only = not self._use.writes
        file = await self._in_thread(lambda: open_device(address, read_only=read_only))
        origin = BlockOrigin(file, self._label, threads=self._threads, timeout=self.timeout)
        try:
            await self._lock(origin.descriptor, READS if read_only else WRITES)
        except BaseException:
            await close_quietly(origin)
            raise
        return origin

    async def _open_web(self, address: WebAddress, first: bool) -> WebOrigin:
        if self._use.writes:
            raise ForebayError(
                f"{self._key} is on a web server: attach it with --overlay or --read-only"
            )
        servers = self._servers_of_files
        file = await self._in_thread(lambda: open_web(address, servers, first=first))
        return WebOrigin(file, self._label, threads=self._threads, timeout=self.timeout)

    async def _in_thread(self, do: Callable[[], OpenImage]) -> OpenImage:
        """Open something in a thread; the descriptor of one that comes too late is closed. Raises what `do` raises."""
        with bounded(self.timeout, f"opening {self._label}"):
            return await self._threads.run(do, drop=lambda late: syscalls.close(late.fd))

    async def _look_at_mount(self, file: OpenImage) -> None:
        """Note which file it is, and whether its store may lose what it took."""
        if file.status is None:
            return
        device = file.status.device
        self.why_unsafe = await self._threads.run(
            lambda: why_unsafe(device, locks=self._use.need_locks)
        )
        self.file_id = (device, file.status.inode)
        self.allocated = file.status.allocated
        self.format = file.format or self.format

    # ------------------------------------------------------------------------------------------------------- the owner

    async def _take(
        self, claim: Claim, address: FileAddress, file: OpenImage, descriptor: Descriptor
    ) -> None:
        """Claim the open image for writing. Raises ForebayError, TakenOver and OSError."""
        if not claim.is_held:
            self._check_left(await self._owner(address))
        await claim.take(file, descriptor)

    async def _share(self, address: FileAddress, descriptor: Descriptor) -> None:
        """Lock the open image for reading: nobody is to write it meanwhile, unless a gateway does that already.

        Raises ForebayError for an overlay on an image that another gateway writes, InUseError for locks of others, and
        OSError.
        """
        owner = await self._owner(address)
        if owner is None or owner.gateway == self._use.gateway:
            if self._use.needs_still:
                self._check_left(owner)
            await self._lock(descriptor, READS)
            return
        if self._use.needs_still:
            raise ForebayError(
                f"{self._key} is written by {owner}, and an overlay needs an image that stays as it is: "
                "detach it there first"
            )
        log.warning("%s is written by %s: '%s' may read old data", self._key, owner, self._use.disk)
        # its writes, and its restart, are not to fail because of us
        await self._lock(descriptor, LOOKS)

    async def _owner(self, address: FileAddress) -> Owner | None:
        """What the owner marker beside the image says. Raises ForebayError and OSError."""
        with bounded(self.timeout, f"looking for the owner of {self._label}"):
            return await self._threads.run(lambda: read_owner(address))

    async def look_for_owner(self) -> None:
        """Raise ForebayError where the image to be written is another gateway's, OSError where it is gone."""
        address = self._address
        if not isinstance(address, FileAddress):
            return
        with bounded(self.timeout, f"looking at {self._label}"):
            await self._threads.run(lambda: look(address, SystemCalls()))
        owner = await self._owner(address) if self._claim is not None else None
        if owner is not None and owner.gateway not in (self._use.gateway, NOBODY):
            raise left_behind(address, owner)

    def _check_left(self, owner: Owner | None) -> None:
        """Raise ForebayError where a disk of this gateway that is not served now has data that the image lacks."""
        if owner is None or owner.state == "clean" or owner.gateway != self._use.gateway:
            return
        left = 0 if owner.disk == self._use.disk else self._left_by(owner.disk)
        if left:
            raise ForebayError(
                f"{self._key} lacks {left} bytes that disk '{owner.disk}' of this gateway has: bring that disk back "
                f"('forebay status' says why it is not served), or give them up: forebay detach {owner.disk} --discard"
            )

    async def _lock(self, descriptor: Descriptor, access: Access) -> None:
        """Take QEMU's locks, where no claim comes with them. Raises InUseError and OSError; no locks are no error."""

        def lock() -> None:
            with descriptor as fd:
                take_locks(fd, access)

        await self._locked(self._key, lock)

    async def _locked(self, key: str, lock: Callable[[], None]) -> None:
        """Take locks in a thread, of the image with that key. Raises InUseError and OSError; no locks are no error."""
        try:
            with bounded(self.timeout, f"locking {key}"):
                await self._threads.run(lock)
        except InUse as fault:
            raise in_use_by_program(key, fault) from None
        except NoLocks as error:
            log.info("%s: no file locks: %s", key, error.strerror)
