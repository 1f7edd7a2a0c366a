# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The source of one disk: its image, opened when it can be, claimed while the disk writes it, given back at the end."""

import errno
from collections.abc import Callable

import trio

from forebay.errors import ForebayError
from forebay.formats.magic import RAW
from forebay.image.formats import Formats
from forebay.image.opener import Opener
from forebay.image.use import Use
from forebay.origin.addresses import Address, DeviceAddress, FileAddress
from forebay.origin.file import FreshFile
from forebay.origin.protocol import Origin, close_quietly
from forebay.origin.threads import StoreThreads, bounded
from forebay.origin.virtual.servers import Servers
from forebay.sidecar.claim import Claim
from forebay.sidecar.incoming import Asking, who_asks
from forebay.sidecar.record import ChangedError, TakenOver, UnreadableError
from forebay.units import Mode

START_SECONDS = 2.0
"""What a store may take at the daemon's start before its disks come up without it. Local ones need milliseconds, and
QEMU's reconnect-delay is tens of seconds."""


class ResizedError(TakenOver):
    """The image has another size than the disk."""


def _nothing(_disk: str) -> int:
    return 0


def _claim_for(
    address: Address,
    label: str,
    use: Use,
    threads: StoreThreads,
    timeout: float,
    is_ours: bool,
) -> Claim | None:
    """What claims the image, if the disk writes it. `is_ours`: it was ours before a restart."""
    if not (use.writes and isinstance(address, FileAddress)):
        return None
    return Claim(
        address,
        label,
        gateway=use.gateway,
        disk=use.disk,
        threads=threads,
        timeout=timeout,
        need_locks=use.need_locks,
        is_ours=is_ours,
        is_coming=use.is_coming,
    )


class Source:
    """The image of one disk. Disks may have sources of the same image: `Image` (image.py) is what they share."""

    def __init__(
        self,
        address: Address,
        label: str,
        use: Use,
        *,
        threads: StoreThreads,
        timeout: float,
        nursery: trio.Nursery,
        size: int | None = None,
        left_by: Callable[[str], int] = _nothing,
        formats: Formats | None = None,
        servers: Servers | None = None,
    ) -> None:
        """`size`: bytes as recorded when the disk was attached, None when it is just being attached. The rest is as
        `Opener` and `Claim` have it.
        """
        self.address = address
        self.key = address.key
        """The name of the image for ever."""
        self.label = label
        """The image as the operator wrote it."""
        self.use = use
        self.resumed = size is not None and not use.is_coming
        """True if the disk comes back after a restart, with an image that was its own: its clients are still there."""
        self.withheld = ""
        """Why the image is not to be opened now, although it could be: another host has it, or may have it."""
        self.kept_back = ""
        """Why what the disk has of its own, an overlay's, is not to be shown: another host has it, or may have it."""
        self.comes = use.is_coming and not use.writes
        """True of an overlay that comes with what it has, until that is here."""
        if self.comes:
            self.kept_back = "it is about to come from another host"
        self.stop_disk: Callable[[Exception], None] = lambda _fault: None
        """Stops the disk, by a fault of Forebay itself in what it shares with others on the image."""
        self.claim = _claim_for(address, label, use, threads, timeout, self.resumed)
        """The claim of a disk that writes to a file; it says beside the image whether that lacks data. Else None."""
        self.asking: Asking | None = None
        """What asks for an image that another gateway hands over, until the disk has it. Else None."""
        self.fresh: FreshFile | None = None
        """How such an image is read until then."""
        if use.is_coming and use.writes and isinstance(address, FileAddress):
            self.asking = Asking(
                address, gateway=use.gateway, disk=use.disk, threads=threads, timeout=timeout
            )
            self.fresh = FreshFile(address, threads, timeout)
            self.withheld = "it is about to come from another host"
        self._size = size
        self.threads = threads
        self._opener = Opener(
            address,
            label,
            use,
            self.claim,
            threads=threads,
            timeout=timeout,
            nursery=nursery,
            left_by=left_by,
            formats=formats,
            servers=servers,
        )
        self._origin: Origin | None = None
        """The last one that was handed out."""
        self._prepared: Origin | None = None
        """An open one that the next `open` hands out."""
        self._is_first_open = True

    @property
    def timeout(self) -> float:
        """How long a call may take, seconds. `Image.follow_timeouts` has the open origin follow."""
        return self._opener.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        for one in (self._opener, self.claim, self.asking, self.fresh):
            if one is not None:
                one.timeout = seconds

    def bind(self, *, on_lost: Callable[[str], None], dirty_bytes: Callable[[], int]) -> None:
        """Say whom to tell that somebody else has the image now, and whom to ask how much the image lacks, in bytes."""
        if self.claim is not None:
            self.claim.on_lost = on_lost
            self.claim.dirty_bytes = dirty_bytes

    @property
    def size(self) -> int:
        """Bytes, as recorded, or as the first `open` found it.

        It never changes under a disk: an image that has another size is refused.
        """
        assert self._size is not None, "neither recorded nor opened"
        return self._size

    @property
    def file_id(self) -> tuple[int, int] | None:
        """Device and inode of the image, once it was opened, if it is a file."""
        return self._opener.file_id

    @property
    def allocated(self) -> int | None:
        """Bytes that the image took in its store when it was opened last, if it is a file."""
        return self._opener.allocated

    @property
    def format(self) -> str | None:
        """The format that the image's first bytes are of, if it is a file and they were looked at."""
        return self._opener.format

    @property
    def shown_format(self) -> str:
        """As what a guest sees the image: raw for its bytes, or the format of which the disk in it is meant."""
        return self.address.format if isinstance(self.address, FileAddress) else RAW

    def is_same_image(self, other: "Source") -> bool:
        """True if both lead to one image, be it by two stores or two mounts."""
        if self.file_id is not None and self.file_id == other.file_id:
            return True
        return self.key == other.key or _path(self.address) == _path(other.address) != ""

    def check_safe(self, mode: Mode) -> None:
        """Raise ForebayError where a disk in that mode acknowledges what its store may lose later without a word."""
        why = self._opener.why_unsafe
        if why is not None and self.use.writes and mode in (Mode.WRITE_BACK, Mode.FULL_COPY):
            raise ForebayError(
                f"{self.key}: {mode.value} needs a store that keeps what it took, and {why}, "
                "or use --mode write-through"
            )

    async def check(self) -> None:
        """See that the image is still ours to write, if it was. Raises OSError when it is not, or its store fails."""
        if self.claim is not None:
            await self.claim.check()

    # ------------------------------------------------------------------------------------------------------- opening

    async def find_format(self) -> str:
        """The format in which the image is to be attached, where nobody has told that: see `Opener.find_format`."""
        return await self._opener.find_format()

    async def prepare(self, patience: float = 0.0) -> None:
        """Open the image now, for the next `open` to hand out. For attach: a fault shows before anything is changed.

        Where another gateway is to hand it over, wait until that has prepared to, for at most `patience` seconds.
        Raises ForebayError, and OSError from failing storage.
        """
        if self.asking is not None:
            self._size = await self.asking.ask(patience)
            if self._size is not None:
                return
            self.note_come()  # nobody else has it
        self._prepared = await self._open(first=True)

    async def look_for_owner(self) -> None:
        """Raise ForebayError where the image to be written is another gateway's, OSError where it is gone."""
        await self._opener.look_for_owner()

    def note_come(self) -> None:
        """Note that the image is the disk's own: it has come, or come back."""
        self.asking, self.fresh, self.withheld = None, None, ""
        self.comes, self.kept_back = False, ""

    async def prepare_again(self) -> None:
        """The same for an image that a disk of ours has used: what keeps others from being attached does not count."""
        self._prepared = await self._open(first=False)

    async def open(self) -> Origin:
        """An origin, claimed if the disk writes, which the caller closes.

        Raises OSError, also for what an operator has to put right; and TakenOver, after which `begin_anew` has to be
        called before this is tried again, unless that is never to succeed. The first attempt after a restart is short:
        a disk that is warm must not wait for a store that hangs.
        """
        if self._prepared is not None:
            self._origin, self._prepared = self._prepared, None
            return self._origin
        hurried, self._is_first_open = self.resumed and self._is_first_open, False
        patience = START_SECONDS if hurried else float("inf")
        try:
            with bounded(patience, f"opening {self.label}"):
                self._origin = await self._open(first=False)
        except ChangedError as fault:
            raise TakenOver(fault.what) from fault
        except TakenOver:
            raise
        except UnreadableError as fault:
            if self.claim is not None and self.claim.is_of_before:  # a newer version may have it
                raise TakenOver(
                    f"{fault.what}, so another gateway may have the image by now"
                ) from fault
            raise OSError(errno.EIO, str(fault)) from fault
        except ForebayError as fault:
            raise OSError(errno.EIO, str(fault)) from fault
        return self._origin

    async def begin_anew(self) -> None:
        """Let the image be claimed as if for the first time: nothing is left of what the cache had of it.

        Raises OSError.
        """
        if self.claim is not None:
            await self.claim.leave()  # if an earlier attempt had taken it
            self.claim.begin_anew()

    async def _open(self, first: bool) -> Origin:
        """An origin whose size is that of the disk. Raises ForebayError, TakenOver and OSError."""
        origin = await self._opener.open(first=first)
        if self._size is None:
            self._size = origin.size
        if origin.size != self._size:
            await close_quietly(origin)
            raise ResizedError(f"{self.key} has {origin.size} bytes and had {self._size}")
        return origin

    # ------------------------------------------------------------------------------------------------------- the end

    @property
    def prepared(self) -> Origin | None:
        """What `prepare` opened, until `open` has handed it out."""
        return self._prepared

    async def close_prepared(self) -> None:
        """Close an origin that `prepare` opened and nobody took: another disk's one serves the image already."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            await close_quietly(prepared)

    async def release(self, *, drop_checkpoint: bool = False) -> None:
        """Give the image back, and take the marker away. The origins that were handed out are closed already.

        With `drop_checkpoint` a committed journal goes with it: the image was changed since, and the operator gave it
        up.
        Raises OSError and ForebayError; the marker then stays: a write that hangs could still arrive.
        """
        if self._origin is not None:
            await self._origin.quiesce()
        claim = self.claim
        if claim is not None and drop_checkpoint:
            try:
                await claim.drop_checkpoint()
            except TakenOver:
                await claim.leave()
                return
        came_late = False
        if self.asking is not None:
            await self.asking.withdraw()
            if claim is not None and not claim.is_held:
                await claim.settle()
                came_late = await self.asking.has_come()
            if claim is not None and not (claim.is_held or came_late):
                return  # it has not come
        elif self.withheld and await self._is_asked_for():
            return  # the marker says who may take it
        if claim is not None and not (claim.is_held or claim.is_of_before or came_late):
            return  # somebody else took it
        if claim is not None and not claim.is_held and self._prepared is None:
            try:
                self._prepared = await self._open(first=False)  # ours from before a restart
            except TakenOver:
                return
        if claim is not None:
            await claim.mark_clean_to_release()
        await self.abandon()

    async def _is_asked_for(self) -> bool:
        """True if a gateway asks for the image. Raises OSError."""
        address = self.address
        if not isinstance(address, FileAddress):
            return False
        return await self.threads.run(lambda: who_asks(address)) is not None

    async def abandon(self) -> None:
        """Give back what was taken, after an attach that failed. Raises OSError."""
        await self.close_prepared()
        if self.asking is not None:
            await self.asking.withdraw()
        if self.claim is not None:
            await self.claim.release()

    async def leave(self) -> None:
        """Let the image go and leave the marker, which says whose it is: what a restart does. Raises OSError."""
        if self.claim is not None:
            await self.claim.leave()


def _path(address: Address) -> str:
    """The path of a file or a device; empty for an NBD export."""
    if isinstance(address, FileAddress):
        return str(address.root / address.path)
    return address.path if isinstance(address, DeviceAddress) else ""
