# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A gateway asks for an image that another one writes, for a VM that is about to move: `IMAGE.forebay/incoming`.

It is the only thing in the directory beside an image that somebody who is not its owner writes while there is one. It
gives nobody a right: the owner looks at it, and says in the owner marker to whom it will give the image (`prepared`),
and that it has (`released`); the lock on the image and the marker decide, as always. So whatever a host that was cut
off sends late, it asks at most.

Whoever asks has to go on asking: `beat` grows, and the owner sees that by its own clock.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Self, TypeVar

import trio

from forebay.errors import ForebayError, InUseError
from forebay.origin.addresses import FileAddress
from forebay.origin.opening import open_image
from forebay.origin.threads import StoreThreads, bounded
from forebay.origin.worker import syscalls
from forebay.sidecar import own_files
from forebay.sidecar.files import Sidecar, read_owner
from forebay.sidecar.record import (
    LARGEST,
    NOBODY,
    RELEASED,
    Owner,
    check_number,
    check_text,
    parse_object,
)

T = TypeVar("T")

NAME, NEW = "incoming", "incoming.new"

FORMAT = 1

LONGEST = 4096
"""Bytes that are read of it."""

STALE_SECONDS = 60.0
"""After so long without a beat nobody asks any more."""

LOOK_SECONDS = 0.2
"""How often whoever asks looks whether the owner has answered."""

_LONGEST = {"gateway": 64, "host": 255, "disk": 64}


@dataclass(frozen=True)
class Incoming:
    """What it says: a JSON object of these fields."""

    gateway: str
    """The uuid of the cache of the gateway that asks."""
    host: str
    disk: str
    """The name of the disk that the image is to be there."""
    beat: int = 0
    wants: bool = False
    """True once the VM has written there: the owner is to let go at once, if its own VM rests."""
    format: int = FORMAT

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """What the text says, which anybody may have written who may write beside the image. Raises ValueError."""
        found = parse_object(text)
        if found.get("format") != FORMAT:
            raise ValueError("of a format that is not known")
        for name, longest in _LONGEST.items():
            check_text(name, found.get(name), longest)
        check_number("beat", found.get("beat"), LARGEST)
        if not found["gateway"] or type(found.get("wants")) is not bool:
            raise ValueError("'wants' is neither true nor false, or no gateway asks")
        return cls(**{name: found[name] for name in cls.__dataclass_fields__})


def read(directory: int, image: os.stat_result | None) -> Incoming | None:
    """Who asks, in the open directory beside the image, which is `image`; None if nobody does. Raises OSError.

    What does not count, or says nothing that can be, counts as nobody.
    """
    with contextlib.suppress(FileNotFoundError, ValueError):
        return Incoming.parse(own_files.read(directory, NAME, image, LONGEST))
    return None


def remove(directory: int, mine: Incoming, image: os.stat_result | None) -> None:
    """Remove what that gateway has asked, if it is the one who asks. Raises OSError."""
    found = read(directory, image)
    if found is not None and found.gateway == mine.gateway:
        own_files.remove(directory, NEW)  # of a beat that a kill has cut short
        own_files.remove(directory, NAME)


def _write(directory: int, mine: Incoming, image: os.stat_result | None) -> None:
    """Ask, or ask again. Raises InUseError where another gateway asks; OSError."""
    fd = own_files.make(directory, NEW, 0o644)
    try:
        syscalls.pwrite_all(fd, (json.dumps(asdict(mine)) + "\n").encode(), 0)
        syscalls.fsync(fd)
        written = syscalls.fstat(fd).st_mtime
    finally:
        syscalls.close(fd)
    other = read(directory, image)
    if other is not None and other.gateway != mine.gateway:
        # both times are the server's: no host's clock counts
        since = syscalls.stat(NAME, dir_fd=directory, follow_symlinks=False).st_mtime
        if written - since < STALE_SECONDS:
            own_files.remove(directory, NEW)
            raise InUseError(
                f"host {other.host} asks for it already (disk '{other.disk}'): detach that there first",
                {"host": other.host, "disk": other.disk},
            )
    own_files.rename(directory, NEW, NAME)


def who_asks(address: FileAddress) -> Incoming | None:
    """Which gateway asks for the image; None if none does. Blocks; raises OSError."""

    def look() -> Incoming | None:
        with Sidecar(address) as sidecar, contextlib.suppress(FileNotFoundError):
            sidecar.open()
            return read(sidecar.fd, sidecar.look_beside())
        return None

    return own_files.looked(look)


class Asking:
    """One disk of this gateway asks for its image, which another gateway writes. Off the event loop.

    Every method raises OSError where the store fails.
    """

    def __init__(
        self,
        address: FileAddress,
        *,
        gateway: str,
        disk: str,
        threads: StoreThreads,
        timeout: float,
    ) -> None:
        """`gateway` and `disk` are who asks; `timeout` is in seconds, for each call."""
        self.owner: Owner | None = None
        """Who has the image, as far as that was looked at."""
        self._address = address
        self._mine = Incoming(gateway, socket.gethostname()[:255], disk)
        self._threads = threads
        self.timeout = timeout

    async def ask(self, patience: float) -> int | None:
        """Ask, and return the image's size in bytes when its owner has prepared to give it to us.

        None, with nothing asked, where no other gateway has the image. Raises ForebayError where its owner has not
        prepared that after `patience` seconds, or another gateway asks already: then we ask no more.
        """
        await self.look()
        if self._is_given() and not (self.owner and self.owner.phase):
            return None
        size = await self._run(self._size)
        try:
            with trio.move_on_after(patience):
                while not self._is_given():
                    await self.beat()
                    await trio.sleep(LOOK_SECONDS)
                    await self.look()
                return size
        except BaseException:
            with trio.CancelScope(shield=True), contextlib.suppress(OSError, ForebayError):
                await self.withdraw()
            raise
        await self.withdraw()
        assert self.owner is not None, "else it would be given"
        raise InUseError(
            f"{self._address.key} is written by {self.owner}, which has not prepared to hand it over for "
            f"{patience:g} s: see 'forebay status {self.owner.disk}' there",
            asdict(self.owner),
        )

    def _is_given(self) -> bool:
        """True if the owner has prepared to give the image to us, or has given it back, or it is ours."""
        owner = self.owner
        return (
            owner is None
            or owner.gateway in (NOBODY, self._mine.gateway)
            or owner.is_for(self._mine.gateway)
        )

    def is_let_go(self) -> bool:
        """True if nobody holds the image any more, as far as `look` has found."""
        owner = self.owner
        return self._is_given() and (
            owner is None
            or owner.phase == RELEASED
            or owner.gateway in (NOBODY, self._mine.gateway)
        )

    def _size(self) -> int:
        file = open_image(self._address, read_only=True, admitted=True)
        syscalls.close(file.fd)
        return file.size

    async def look(self) -> None:
        """Look who has the image. Raises ForebayError, too, where its marker cannot be read."""
        self.owner = await self._run(lambda: read_owner(self._address))

    async def has_come(self) -> bool:
        """True if the image is this disk's: a try to take it that was given up, or failed late, has left our marker."""
        with contextlib.suppress(ForebayError):  # else nobody knows whose it is, and it stays so
            await self.look()
            me, owner = self._mine, self.owner
            return owner is not None and (owner.gateway, owner.disk) == (me.gateway, me.disk)
        return False

    async def beat(self, *, wants: bool = False) -> None:
        """Go on asking; `wants`: the image is needed now. Raises InUseError where another gateway asks."""
        mine = self._mine = replace(self._mine, beat=self._mine.beat + 1, wants=wants)

        def write() -> None:
            with Sidecar(self._address) as sidecar, contextlib.suppress(FileNotFoundError):
                sidecar.open()  # it is gone where nobody has the image any more: then nobody need be asked
                _write(sidecar.fd, mine, sidecar.look_beside())

        await self._run(write)

    async def withdraw(self) -> None:
        """Ask no more."""

        def withdraw() -> None:
            with Sidecar(self._address) as sidecar, contextlib.suppress(FileNotFoundError):
                sidecar.open()
                remove(sidecar.fd, self._mine, sidecar.look_beside())
                sidecar.remove_if_empty()

        await self._run(withdraw)

    async def _run(self, do: Callable[[], T]) -> T:
        with bounded(self.timeout, f"asking for {self._address.key}"):
            return await self._threads.run(do)
        raise AssertionError("bounded() raises")
