# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The files of an overlay that moves, in the directory beside its image, and the token that says who has it.

| file | who writes it | what it says |
| --- | --- | --- |
| `DISK.asks` | the new host | that it asks (:class:`forebay.carrying.notes.Asked`) |
| `DISK.offer` | the old host | how far it is (:class:`forebay.carrying.notes.Offer`) |
| `DISK.MOVE.data` | the old host | what the overlay has (:mod:`forebay.carrying.pieces`) |
| `DISK.MOVE.N.WHERE` | whoever has it | the token: `at-GATEWAY`, `free`, or `left`: free, its host is gone |

The token is one file for as long as the move lasts, and is only ever renamed: of two that want it one finds that it is
gone. Each rename leads to a number that no name had before, so that one that was given up, or came from a process that
was killed, and arrives late finds nothing to rename. It takes no lock, and no clock.

Everything here blocks, and raises OSError.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from forebay.carrying.notes import Asked, Offer, text_of
from forebay.origin.addresses import FileAddress
from forebay.origin.worker import syscalls
from forebay.sidecar import own_files
from forebay.sidecar.files import Sidecar
from forebay.sidecar.incoming import LONGEST

FREE, LEFT, AT = "free", "left", "at-"

MODE = 0o644

TRIES = 8
"""How often the directory may be gone again."""

T = TypeVar("T")


@dataclass(frozen=True)
class Token:
    """Who has the overlay of one move."""

    number: int
    where: str
    """`free`, `left`, or `at-` and a gateway."""

    def to(self, where: str) -> "Token":
        """The next one."""
        return Token(self.number + 1, where)

    @property
    def is_free(self) -> bool:
        """True if a host may take it."""
        return self.where in (FREE, LEFT)


class Beside:
    """The files of one overlay. `gateway` is this host's."""

    def __init__(self, address: FileAddress, disk: str, gateway: str) -> None:
        self.gateway = gateway
        self.mine = AT + gateway
        self.address = address
        self._disk = disk

    @contextlib.contextmanager
    def _opened(self, *, make: bool = False) -> Iterator[tuple[int, os.stat_result | None]]:
        """The directory, opened anew, and what the image looks like. Raises FileNotFoundError unless `make`."""
        with Sidecar(self.address) as sidecar:
            if make:
                sidecar.make()
            fd = sidecar.open_anew()
            if fd is None:
                raise FileNotFoundError(errno.ENOENT, "there is no directory beside the image")
            try:
                yield fd, sidecar.look_beside()
            finally:
                syscalls.close(fd)

    # ---------------------------------------------------------------------------------------------------------- notes

    def asked(self) -> Asked | None:
        """Who asks; None if nobody does, or it is nonsense."""
        found = self._note("asks", Asked.parse)
        return found if isinstance(found, Asked) else None

    def offer(self) -> Offer | None:
        """What the old host says."""
        found = self._note("offer", Offer.parse)
        return found if isinstance(found, Offer) else None

    def _note(self, kind: str, parse: Callable[[bytes], "Asked | Offer"]) -> "Asked | Offer | None":
        def look() -> "Asked | Offer | None":
            with contextlib.suppress(FileNotFoundError, ValueError), self._opened() as (fd, image):
                return parse(own_files.read(fd, f"{self._disk}.{kind}", image, LONGEST))
            return None

        return own_files.looked(look)

    def write(self, note: Asked | Offer) -> None:
        """Say that. Durable when this returns."""
        name = f"{self._disk}.{'asks' if isinstance(note, Asked) else 'offer'}"

        def write() -> None:
            with self._opened(make=True) as (fd, _):
                own_files.keep(fd, name, f"{name}.new", text_of(note))
                if isinstance(note, Offer):
                    syscalls.fsync(fd)

        self._made(write)

    @staticmethod
    def _made(do: Callable[[], T]) -> T:
        """What it returns. It makes the directory, which the other host may remove at that moment, as it is empty."""
        for _ in range(TRIES):
            with contextlib.suppress(FileNotFoundError):
                return do()
        return do()

    def withdraw(self) -> None:
        """Ask no more, if it is this host that asks."""
        with contextlib.suppress(FileNotFoundError):
            found = self.asked()
            with self._opened() as (fd, _):
                own_files.remove(fd, f"{self._disk}.asks.new")
                if found is not None and found.gateway == self.gateway:
                    own_files.remove(fd, f"{self._disk}.asks")
            self._remove_if_empty()

    def _remove_if_empty(self) -> None:
        with Sidecar(self.address) as sidecar:
            sidecar.remove_if_empty()

    # ------------------------------------------------------------------------------------------------------ the token

    def tokens(self) -> dict[str, Token]:
        """The token of each move of this overlay."""

        def look() -> dict[str, Token]:
            with contextlib.suppress(FileNotFoundError), self._opened() as (fd, _):
                return self._tokens(fd)
            return {}

        return own_files.looked(look)

    def _tokens(self, fd: int) -> dict[str, Token]:
        form = (
            re.escape(self._disk)
            + rf"\.([0-9a-f]{{16}})\.(\d{{1,9}})\.({FREE}|{LEFT}|{AT}[^/]{{1,64}})"
        )
        found: dict[str, Token] = {}
        for name in syscalls.listdir(fd):
            if match := re.fullmatch(form, name, re.ASCII):
                if match[1] in found:
                    raise OSError(
                        errno.EIO, f"move {match[1]} has two tokens beside the image: remove one"
                    )
                found[match[1]] = Token(int(match[2]), match[3])
        return found

    def token(self, move: str) -> Token | None:
        """That of one move; None where there is none. A list that is made while it is renamed may lack both names, and
        whoever misses it takes the overlay for another host's: so it is looked for more than once.
        """
        for _ in range(own_files.LOOKS):
            if (found := self.tokens().get(move)) is not None:
                return found
        return None

    def begin(self, move: str) -> Token:
        """Make the token of a new move, which is this host's, durably; what is left of earlier ones of ours goes.

        Raises OSError(EBUSY) where another move of an overlay of that name is under way, or its data lies there still.
        """
        return self._made(lambda: self._begin(move))

    def _begin(self, move: str) -> Token:
        token = Token(1, self.mine)
        with self._opened(make=True) as (fd, _):
            offer = self.offer()
            for other, found in self._tokens(fd).items():
                is_own = offer is None or offer.move != other or offer.gateway == self.gateway
                has_data = self._has(fd, f"{self._disk}.{other}.data")
                if has_data and not (is_own and found.where == self.mine):
                    raise OSError(
                        errno.EBUSY,
                        f"an overlay '{self._disk}' that moved before still lies beside the image: attach that with "
                        f"--incoming --with-data, or remove {self._disk}.{other}.* there to give it up",
                    )
                self._remove_all(fd, other, found)
            syscalls.close(syscalls.open(*self._new(self._name(move, token)), MODE, dir_fd=fd))
            syscalls.close(syscalls.open(*self._new(f"{self._disk}.{move}.data"), MODE, dir_fd=fd))
            syscalls.fsync(fd)
        return token

    @staticmethod
    def _new(name: str) -> tuple[str, int]:
        return name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

    def _name(self, move: str, token: Token) -> str:
        return f"{self._disk}.{move}.{token.number}.{token.where}"

    def hand_on(self, move: str, token: Token, where: str) -> Token | None:
        """Have the token be there, durably; None where somebody else was first. Once the call has failed nobody knows
        until `token` was asked.
        """
        then = token.to(where)
        with self._opened() as (fd, _):
            try:
                own_files.rename(fd, self._name(move, token), self._name(move, then))
            except FileNotFoundError:  # or the answer to our own was lost
                found = self._tokens(fd).get(move)
                if found != then:
                    return None
            syscalls.fsync(fd)
        return then

    def end(self, move: str, token: Token | None) -> None:
        """Remove all of a move; its token last. `token` None: that stays, for the other host to see."""
        with contextlib.suppress(FileNotFoundError):
            offer = self.offer()
            with self._opened() as (fd, _):
                if offer is not None and offer.move == move:
                    own_files.remove(fd, f"{self._disk}.offer")
                own_files.remove(fd, f"{self._disk}.offer.new")
                self._remove_all(fd, move, token)
            self._remove_if_empty()

    def forget(self, move: str, token: Token) -> None:
        """Remove a token that has said what it had to say."""
        with contextlib.suppress(FileNotFoundError):
            with self._opened() as (fd, _):
                own_files.remove(fd, self._name(move, token))
            self._remove_if_empty()

    def _remove_all(self, fd: int, move: str, token: Token | None) -> None:
        own_files.remove(fd, f"{self._disk}.{move}.data")
        if token is not None:
            own_files.remove(fd, self._name(move, token))

    @staticmethod
    def _has(fd: int, name: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            syscalls.stat(name, dir_fd=fd, follow_symlinks=False)
            return True
        return False

    # ------------------------------------------------------------------------------------------------------- the data

    def put(
        self, move: str, offset: int, parts: Sequence[bytes | memoryview], *, durably: bool
    ) -> None:
        """Write that into the file of the move."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._opened() as (folder, _):
            fd = syscalls.open(f"{self._disk}.{move}.data", flags, dir_fd=folder)
            try:
                if parts:
                    syscalls.pwrite_all(fd, b"".join(parts), offset)
                if durably:
                    syscalls.fsync(fd)
            finally:
                syscalls.close(fd)

    def get(self, move: str, offset: int, length: int) -> bytes:
        """Exactly so many bytes of that file. OSError(EIO) where it has less; FileNotFoundError where it is gone."""
        data = own_files.looked(lambda: self._get(move, offset, length))
        if len(data) != length:
            raise OSError(errno.EIO, f"what the overlay has ends at {offset + len(data)}")
        return data

    def _get(self, move: str, offset: int, length: int) -> bytes:
        with self._opened() as (folder, image):
            try:
                fd = own_files.open_existing(folder, f"{self._disk}.{move}.data", image)
            except own_files.DoesNotCountError as why:
                raise OSError(errno.EIO, f"what the overlay has is {why}") from None
            try:
                return syscalls.pread(fd, length, offset)
            finally:
                syscalls.close(fd)
