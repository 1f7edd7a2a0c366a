# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The directory beside an image, `IMAGE.forebay/`, and the files in it, opened without following any link.

- `lock`, held with an OFD write lock (fcntl(2)) for as long as a disk that writes the image is attached. It ends with
  the process that holds it, however that ends; on NFSv4 and GPFS it is seen by every host.
- `owner`, the owner marker (record.py), replaced by a rename of `owner.new`.
- `redo` and `redo.new`, the redo journal (redo.py).

Everything here blocks, raises OSError, and belongs in a thread.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
from dataclasses import asdict, replace
from typing import Self

from forebay.errors import ForebayError
from forebay.origin.addresses import SIDECAR, FileAddress
from forebay.origin.calls import SystemCalls
from forebay.origin.opening import OpenImage, open_folder
from forebay.origin.worker import syscalls
from forebay.sidecar import own_files, redo
from forebay.sidecar.locks import WRITES, InUse, NoLocks, set_lock, take_locks
from forebay.sidecar.own_files import DoesNotCountError
from forebay.sidecar.record import NOBODY, Owner, UnreadableError, in_use_by_program, taken_over

log = logging.getLogger("forebay.origin")

LONGEST_NAME = 255
"""Bytes of a file's name (NAME_MAX of limits.h)."""

LONGEST_OWNER = 64 << 10
"""Bytes of an owner marker that are read: what is longer was not written by a gateway."""


class Sidecar:
    """The directory beside one image: descriptors of the folder that both lie in, of the directory, and of its lock.

    At first only the folder is open. `open` or `make` opens the directory, `try_lock` the lock in it; `close`, or the
    end of a `with` block, closes all of them, which lets the lock go.
    """

    def __init__(self, address: FileAddress) -> None:
        """Open the folder of the image. Raises OSError."""
        self.address = address
        self.fd = -1
        """The directory, once it is open."""
        self.lock = -1
        """The lock file, once `try_lock` was called."""
        self.is_marker_unsure = False
        """True if writing the owner marker failed so late that nobody knows whether the old or the new is durable."""
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
        """Close all descriptors, and with that let the lock go. The second call does nothing."""
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
            raise UnreadableError(self.address, f"{self._name} is not a directory") from None
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._name) from None

    def make(self) -> None:
        """Make the directory, durably, if it is not there, and open it. Raises ForebayError if we cannot; OSError."""
        self._check_can_make()
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

    def _check_can_make(self) -> None:
        """Raise ForebayError where the directory cannot have its name, or could not be made durable."""
        if len(os.fsencode(self._name)) > LONGEST_NAME:
            raise ForebayError(
                f"{self.address.key}: its name is too long: the directory beside it has that name and {SIDECAR} behind "
                f"it: use at most {LONGEST_NAME - len(SIDECAR)} bytes, or attach it with --read-only or --overlay"
            )
        try:
            syscalls.fsync(self._folder)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            raise ForebayError(
                f"{self.address.key}: the directory that it lies in cannot be read: let the daemon's user read it, or "
                "attach it with --read-only or --overlay"
            ) from None

    def names(self) -> list[str]:
        """The names of the files in the directory. Raises OSError."""
        return syscalls.listdir(self.fd)

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

    # ---------------------------------------------------------------------------------------------------- the lock

    def try_lock(self, *, need_locks: bool) -> bool:
        """Open the lock file and lock it. False if somebody else has it; True if we do, or it has no locks to give.

        Raises ForebayError for a lock file that does not count and, if `need_locks`, for a file system without locks;
        and OSError.
        """
        try:
            self.lock = self._keep(own_files.open_lock(self.fd, "lock", self.look_beside()))
        except DoesNotCountError as why:
            raise ForebayError(
                f"{self.address.key}: the lock beside it, {self.address.path}{SIDECAR}/lock, is {why}: remove it"
            ) from None
        try:
            set_lock(self.lock, fcntl.F_WRLCK)
        except BlockingIOError:
            return False
        except NoLocks as error:
            _do_without(self.address, error, need_locks)
        return True

    def is_lock_named(self) -> bool:
        """True if the open lock file is still the one in the directory.

        A lock on a file that its last holder has just removed keeps nobody out.
        """
        try:
            named = syscalls.stat("lock", dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return named.st_ino == syscalls.fstat(self.lock).st_ino

    # --------------------------------------------------------------------------------------------- the owner marker

    def read_owner(self) -> Owner | None:
        """What the owner marker says; None if there is none. Raises UnreadableError and OSError."""
        return self._read_owner(self.fd)

    def check_left_by(self, me: Owner) -> None:
        """Raise TakenOver unless the marker that lies there is of my gateway, as it left it.

        Raises UnreadableError and OSError as well. Whoever takes an image over replaces or removes the marker. The
        directory need not be open.
        """
        try:
            fd = self._open_directory()
        except FileNotFoundError:
            raise taken_over(self.address, None) from None
        try:
            found = self._read_owner(fd)
        finally:
            syscalls.close(fd)
        if found is None or found.gateway != me.gateway:
            raise taken_over(self.address, found)

    def _read_owner(self, folder: int) -> Owner | None:
        """What the owner marker in the open directory says; None if there is none."""
        try:
            fd = own_files.open_existing(folder, "owner", self.look_beside())
        except FileNotFoundError:
            return None
        except DoesNotCountError as why:
            raise UnreadableError(self.address, str(why)) from None
        try:
            return Owner.parse(syscalls.read(fd, LONGEST_OWNER))
        except ValueError as why:
            raise UnreadableError(self.address, str(why)) from why
        finally:
            syscalls.close(fd)

    def write_owner(self, owner: Owner) -> None:
        """Replace the owner marker, durably: temporary name, fsync, rename, fsync of the directory. Raises OSError."""
        text = json.dumps(asdict(owner), indent=1) + "\n"
        fd = own_files.make(self.fd, "owner.new", 0o644)
        try:
            syscalls.pwrite_all(fd, text.encode(), 0)
            syscalls.fsync(fd)
        finally:
            syscalls.close(fd)
        self.is_marker_unsure = True
        syscalls.rename("owner.new", "owner", src_dir_fd=self.fd, dst_dir_fd=self.fd)
        syscalls.fsync(self.fd)
        self.is_marker_unsure = False

    # ---------------------------------------------------------------------------------------------- the redo journal

    def finish_checkpoint(
        self, owner: Owner | None, file: OpenImage, *, sure: bool = False
    ) -> redo.Checkpoint | None:
        """Apply a committed redo journal to the open image and remove it; drop one that was not committed.

        `owner` is what the marker says. It is made to name the instant of the checkpoint before the journal goes, for
        nothing else says then which instant the image shows. The checkpoint; None if no journal was committed. Raises
        ForebayError for a journal that cannot be applied, with the image unchanged; ChangedError, unless the operator
        is `sure`, where the image is not what it was at the commit; and OSError.
        """

        def name_instant(finished: redo.Checkpoint) -> None:
            if owner is not None:
                self.write_owner(replace(owner, as_of=finished.as_of))

        return redo.recover(
            self.fd, file.fd, self.address.key, SystemCalls(), name_instant, sure=sure
        )

    # ------------------------------------------------------------------------------------------------------- the end

    def remove(self) -> None:
        """Remove our files, the marker first and durably, and the directory if nothing else lies in it."""
        with contextlib.suppress(FileNotFoundError):
            syscalls.unlink("owner", dir_fd=self.fd)
        syscalls.fsync(self.fd)
        for name in ("lock", "owner.new", redo.UNFINISHED):
            with contextlib.suppress(FileNotFoundError):
                syscalls.unlink(name, dir_fd=self.fd)
        with contextlib.suppress(OSError):  # a boot trace may stay in it
            syscalls.rmdir(self._name, dir_fd=self._folder)

    def remove_if_unused(self) -> None:
        """Leave nothing beside an image that was refused, if only we made it. For whoever has the lock."""
        with contextlib.suppress(OSError):
            if self.lock >= 0 and self.names() == ["lock"]:
                syscalls.unlink("lock", dir_fd=self.fd)
                syscalls.rmdir(self._name, dir_fd=self._folder)


def read_owner(address: FileAddress) -> Owner | None:
    """What the owner marker of the image says; None if nobody holds the image for writing.

    Raises OSError, UnreadableError for a marker that cannot be read, and ForebayError for an image that nobody holds
    and that holds part of a checkpoint.
    """
    with Sidecar(address) as sidecar:
        try:
            sidecar.open()
        except FileNotFoundError:
            return None
        owner = sidecar.read_owner()
        if owner is not None and owner.gateway != NOBODY:
            return owner
        if redo.NAME in sidecar.names():
            raise ForebayError(
                f"{address.key} holds part of a checkpoint: run 'forebay recover {address.key}' first"
            )
        return None


def lock_image(address: FileAddress, file: OpenImage, *, need_locks: bool) -> None:
    """Take QEMU's locks for writing on the open image itself, for as long as its descriptor is open.

    Raises InUseError where somebody has it open without a gateway; ForebayError, if `need_locks`, for a file system
    without locks; and OSError.
    """
    try:
        take_locks(file.fd, WRITES)
    except InUse as fault:
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
