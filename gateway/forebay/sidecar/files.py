# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The directory beside an image, `IMAGE.forebay/`, and what lies in it, opened without following any link.

- `TOKEN/`, the directory of the owner with that token (tenure.py), in which its marker and its redo journal lie.
- `owner` and `redo`, links to them, for people. Older versions stop at them.

The lock of a gateway that writes the image is on the image itself (locks.py): a file that is locked beside it could be
removed by a host that was cut off.

Everything here blocks, raises OSError, and belongs in a thread.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Self

from forebay.errors import ForebayError
from forebay.origin.addresses import SIDECAR, FileAddress
from forebay.origin.calls import SystemCalls
from forebay.origin.opening import OpenImage, open_folder
from forebay.origin.protocol import Identity
from forebay.origin.worker import syscalls
from forebay.sidecar import own_files, redo, tenure
from forebay.sidecar.locks import WRITES, InUse, NoLocks, take_locks
from forebay.sidecar.record import (
    LARGEST,
    NOBODY,
    Owner,
    UnreadableError,
    in_use_by_gateway,
    in_use_by_program,
    just_changing,
    taken_over,
)
from forebay.sidecar.tenure import Tenure

log = logging.getLogger("forebay.origin")

TRIES = 8
"""How often the next token may be taken, or the directory be gone, before we give up."""


class Sidecar:
    """The directory beside one image: descriptors of the folder of both, of the directory, and of our own one in it.

    At first only the folder is open. `open` or `make` opens the directory, `begin` makes and opens our own; `close`, or
    the end of a `with` block, closes all of them.
    """

    def __init__(self, address: FileAddress) -> None:
        """Open the folder of the image. Raises OSError."""
        self.address = address
        self.fd = -1
        """The directory, once it is open."""
        self.own: Tenure | None = None
        """The directory of our own token, once `begin` was called."""
        self.is_marker_unsure = False
        """True if writing the owner marker failed so late that nobody knows whether the old or the new is durable."""
        self._is_unswept = False
        self._name = os.path.basename(address.path) + SIDECAR
        self._descriptors = contextlib.ExitStack()
        self._folder = self._keep(open_folder(address))

    def __enter__(self) -> Self:
        """For `with`: the end of the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _keep(self, fd: int) -> int:
        """Close the descriptor with all the others."""
        self._descriptors.callback(syscalls.close, fd)
        return fd

    def close(self) -> None:
        """Close all descriptors. The second call does nothing."""
        self._descriptors.close()

    # ----------------------------------------------------------------------------------------------------- opening

    def open(self) -> None:
        """Open the directory. Raises FileNotFoundError, UnreadableError if it is something else, and OSError."""
        self.fd = self._keep(self._open_directory())

    def _open_directory(self) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return syscalls.open(self._name, flags, dir_fd=self._folder)
        except NotADirectoryError:
            raise UnreadableError(
                self.address, tenure.MARKER, f"{self._name} is not a directory"
            ) from None
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._name) from None

    def make(self) -> None:
        """Make the directory, durably, if it is not there, and open it. Raises ForebayError if we cannot; OSError."""
        own_files.check_can_make(self._folder, self._name, self.address)
        try:
            with contextlib.suppress(FileExistsError):
                syscalls.mkdir(self._name, 0o755, dir_fd=self._folder)
                syscalls.fsync(self._folder)
            self.open()
        except PermissionError as error:
            raise ForebayError(
                f"{self.address.key}: {self._name} cannot be made beside it ({error.strerror}): let the daemon's user "
                "write there, or attach with --read-only or --overlay"
            ) from error

    def check_beside(self, file: OpenImage) -> None:
        """Raise ForebayError unless the image's name leads to the open `file`: it can be moved before we look."""
        calls = SystemCalls()
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = syscalls.open(os.path.basename(self.address.path), flags, dir_fd=self._folder)
        try:
            named, ours = calls.status(fd), calls.status(file.fd)
        finally:
            syscalls.close(fd)
        if (named.device, named.inode) != (ours.device, ours.inode):
            raise ForebayError(f"{self.address.key} was just replaced by another file: try again")

    def look_beside(self) -> os.stat_result | None:
        """What the name of the image leads to; None if there is nothing. Raises OSError."""
        name = os.path.basename(self.address.path)
        with contextlib.suppress(FileNotFoundError):
            return syscalls.stat(name, dir_fd=self._folder, follow_symlinks=False)
        return None

    # --------------------------------------------------------------------------------------------- the owner marker

    def find(self) -> Tenure | None:
        """What the owner with the highest token left, read, which the caller closes; None if nothing is there.

        The directory need not be open: it is opened anew, for only then does an NFS client ask whether it has changed.
        Raises UnreadableError and OSError.
        """

        def look() -> Tenure | None:
            fd = self.open_anew()
            if fd is None:
                return None
            try:
                return tenure.find(fd, self.address, self.look_beside())
            finally:
                syscalls.close(fd)

        return own_files.looked(look)

    def open_anew(self) -> int | None:
        """Another descriptor of the directory, which the caller closes; None where there is none. Raises as `find`."""
        try:
            fd = self._open_directory()
        except FileNotFoundError:
            return None
        try:
            SystemCalls().status(fd)  # asks the server, whatever the client has in its memory
        except BaseException:
            syscalls.close(fd)
            raise
        return fd

    def read_owner(self) -> Owner | None:
        """What the owner marker says; None if there is none. Raises UnreadableError and OSError."""
        with self.find() or contextlib.nullcontext() as found:
            return found.owner if found is not None else None

    def check_left_by(self, me: Owner) -> None:
        """Raise TakenOver unless the marker that lies there is of my gateway, as it left it.

        Raises UnreadableError and OSError as well. Whoever takes an image over has a higher token.
        """
        found = self.read_owner()
        if found is None or found.gateway != me.gateway:
            raise taken_over(self.address, found)

    def check_ours(self, me: Owner) -> None:
        """Raise TakenOver unless the marker that counts is mine; the link to it is made anew where it is gone.

        Raises UnreadableError and OSError as well.
        """
        found = self.read_owner()
        if found is None or (found.gateway, found.token) != (me.gateway, me.token):
            raise taken_over(self.address, found)
        tenure.point(self.fd, me.token)

    def begin(self, me: Owner, before: Tenure | None, *, sweeps: bool = True) -> Owner:
        """Become the owner that comes after `before`, durably, with the next token. What the marker says then.

        Without `sweeps` what those before us left, which counts for nothing any more, stays until the next `sweep`.
        Raises ForebayError, with nothing changed, where somebody else came first; and OSError.
        """
        self.own = Tenure(*self._take_token(before), self.address, self.look_beside())
        self._descriptors.callback(self.own.close)
        mine = replace(me, token=self.own.token)
        try:
            self.own.write(mine)
            self._check_next(before)
            self.own.show(mine)
            self._check_next(before)
        except BaseException as fault:
            with contextlib.suppress(OSError):
                self._remove_own()
            if isinstance(fault, FileNotFoundError):  # whoever came later removed it
                raise just_changing(self.address) from fault
            raise
        tenure.point(self.fd, mine.token)
        self._is_unswept = True
        if sweeps:
            self.sweep()
        return mine

    def sweep(self) -> None:
        """Remove what those before us left, if that was not done."""
        if self._is_unswept and self.own is not None:
            tenure.sweep(self.fd, self.address, self.own.token, self.look_beside())
            self._is_unswept = False

    def go_on(self, before: Tenure) -> Owner:
        """Go on as the owner that our gateway was `before`, where a full store has no room for the next one.

        What its marker says. Its journal is removed: the image has that, or it was given up. Raises ForebayError where
        somebody came after that one, and OSError.
        """
        assert before.owner is not None, "only an owner can be gone on as"
        fd = own_files.open_directory(self.fd, str(before.token), self.look_beside())
        if fd is None:
            raise just_changing(self.address)
        self.own = Tenure(before.token, fd, self.address, self.look_beside())
        self._descriptors.callback(self.own.close)
        self.own.owner = before.owner
        if self._later(before):
            raise just_changing(self.address)
        redo.remove(self.own.fd)
        return before.owner

    def _take_token(self, before: Tenure | None) -> tuple[int, int]:
        """The next token, which nobody else can have, and a descriptor of the directory of that name."""
        image = self.look_beside()
        known = max([before.highest if before is not None else 0, *self._later(before)])
        token = tenure.next_token(known)
        for planted in range(TRIES):
            if token + planted > LARGEST:
                break
            name = str(token + planted)
            try:
                syscalls.mkdir(name, 0o755, dir_fd=self.fd)
            except FileExistsError:
                fd = own_files.open_directory(self.fd, name, image)
                if fd is not None:
                    syscalls.close(fd)
                    raise just_changing(self.address) from None
                continue
            except FileNotFoundError:  # the last owner has just left, and removed the directory
                self.make()
                continue
            syscalls.fsync(self.fd)
            fd = own_files.open_directory(self.fd, name, image)
            if fd is None:
                raise just_changing(self.address)
            return token + planted, fd
        raise ForebayError(
            f"{self.address.key}: there is no token after {token - 1}, and no gateway ever had that: remove "
            f"what says so from {self.address.path}{SIDECAR}"
        )

    def _later(self, before: Tenure | None) -> list[int]:
        """The tokens after `before` with which somebody began. Raises ForebayError where one came to be the owner."""
        found, image = [], self.look_beside()
        for number in tenure.numbers(self.fd, self.address):
            if before is not None and number <= before.highest:
                break
            fd = own_files.open_directory(self.fd, str(number), image)
            if fd is not None:
                with Tenure(number, fd, self.address, image) as later:
                    is_mine = self.own is not None and number == self.own.token
                    if not is_mine and (later.has(tenure.MARKER) or later.has(redo.NAME)):
                        raise just_changing(self.address)
                found.append(number)
        return found

    def _check_next(self, before: Tenure | None) -> None:
        """Raise ForebayError unless ours is the highest token, and `before` what it comes after.

        A call that hung may come back when others have had the image long since.
        """
        assert self.own is not None
        if max(self._later(before)) != self.own.token:
            raise just_changing(self.address)
        if before is not None and before.token:
            try:
                found = syscalls.stat(str(before.token), dir_fd=self.fd, follow_symlinks=False)
            except FileNotFoundError:
                raise just_changing(self.address) from None
            if not os.path.samestat(found, syscalls.fstat(before.fd)):
                raise just_changing(self.address)

    def write_owner(self, owner: Owner) -> None:
        """Have our marker say that, durably. Raises OSError."""
        assert self.own is not None, "begin comes first"
        self.own.write(owner)
        self.is_marker_unsure = True
        self.own.show(owner)
        self.is_marker_unsure = False

    # ------------------------------------------------------------------------------------------------------- the end

    def remove(self) -> None:
        """Remove what is ours, the marker first and durably, and the directory if nothing else lies in it.

        What those before us left goes before that: without us it would count again.
        """
        if self.own is not None:
            self._is_unswept = True
            self.sweep()
            tenure.unpoint(self.fd, self.own.token)
            self._remove_own()
        self.remove_if_empty()

    def _remove_own(self) -> None:
        assert self.own is not None
        self.own.empty()
        syscalls.rmdir(str(self.own.token), dir_fd=self.fd)
        syscalls.fsync(self.fd)

    def remove_if_empty(self) -> None:
        """Remove the directory, if nothing lies in it."""
        with contextlib.suppress(OSError):  # a boot trace may stay in it, or somebody else's marker
            syscalls.rmdir(self._name, dir_fd=self._folder)


def identity(address: FileAddress) -> Identity:
    """What the image looks like now. Raises OSError."""
    with Sidecar(address) as sidecar:
        found = sidecar.look_beside()
    if found is None:
        raise FileNotFoundError(errno.ENOENT, f"{address.key} is gone")
    return Identity(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def read_owner(address: FileAddress) -> Owner | None:
    """What the owner marker of the image says; None if nobody holds the image for writing.

    Raises OSError, UnreadableError for a marker that cannot be read, and ForebayError for an image that nobody holds
    and that holds part of a checkpoint.
    """
    with Sidecar(address) as sidecar, sidecar.find() or contextlib.nullcontext() as found:
        if found is None:
            return None
        if found.owner is not None and found.owner.gateway != NOBODY:
            return found.owner
        if found.has(redo.NAME):
            raise ForebayError(
                f"{address.key} holds part of a checkpoint: run 'forebay recover {address.key}' first"
            )
        return None


def lock_image(
    address: FileAddress, file: OpenImage, owner: Callable[[], Owner | None], *, need_locks: bool
) -> None:
    """Take the locks of a gateway that writes the open image, for as long as its descriptor is open.

    Raises InUseError where a gateway has it, which `owner` tells, or somebody without one; ForebayError, if
    `need_locks`, for a file system without locks; and OSError.
    """
    try:
        take_locks(file.fd, WRITES, gateway=True)
    except InUse as fault:
        if fault.is_gateway:
            raise in_use_by_gateway(address, owner()) from None
        raise in_use_by_program(address.key, fault) from None
    except NoLocks as error:
        _do_without(address, error, need_locks)


def _do_without(address: FileAddress, error: NoLocks, need_locks: bool) -> None:
    """Go on without locks, with a warning, or raise ForebayError if `need_locks`."""
    if need_locks:
        raise ForebayError(
            f"{address.key}: its store has no file locks ({error.strerror}), so another host could write it at the "
            "same time: mount it with locks (NFS 4, or NFS 3 without nolock); only where no other host and no other "
            "program writes there, set require_locks = false for the store"
        ) from None
    log.warning(
        "%s: its store has no file locks: only the marker beside it keeps other gateways out, and nothing keeps "
        "out QEMU",
        address.key,
    )
