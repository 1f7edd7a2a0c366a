# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The directories of the mount and what they hold: `disks/NAME`, `images/STORE/path` as the stores have them.

`stage/STORE/path` are the images once more, for the process that stages.
"""

import errno
import os
import pwd
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Protocol, TypeVar

import trio

from forebay.doors.fuse.daemon import Daemon, Served, disk_for
from forebay.origin.addresses import SIDECAR, is_nameable
from forebay.origin.calls import open_beneath

Path = tuple[str, ...]
"""Names from the root of the mount on; () is the root."""

DISKS, IMAGES, STAGE = "disks", "images", "stage"

STORE_SECONDS = 20.0
"""Longest wait for a store's directory. Then the answer is EIO: a hung file server must not hang the mount."""

BLOCK_UNIT = 512
"""Bytes in which stat counts what a file takes."""

STORE_THREADS = 4
"""Looks into one store at once; those that hang keep their place."""

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """A directory or a file. `mode` has the permissions only; `size` in bytes, `mtime_ns` since the epoch.

    `allocated`: bytes that it takes where it lies, None where nobody knows.
    """

    folder: bool
    mode: int
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    allocated: int | None = None

    @property
    def blocks(self) -> int:
        """What stat tells of the room that it takes, in units of 512 bytes.

        Not nothing where there is a size: what the store lacks the cache may have, and `tar` reads no file without one.
        """
        full = -(-self.size // BLOCK_UNIT)
        return full if self.allocated is None else min(full, max(1, self.allocated // BLOCK_UNIT))


class Place(Protocol):
    """One top directory. Paths are those below it; methods raise OSError."""

    async def look(self, path: Path) -> Found:
        """What lies at the path. ENOENT where nothing does, ENOTDIR where something on the way is no directory."""

    async def names(self, path: Path) -> list[str]:
        """The names in the directory."""


class DisksPlace:
    """`disks/`: each disk as a file, with the owner and the permissions of its socket."""

    def __init__(self, daemon: Daemon, started_ns: int) -> None:
        self._daemon = daemon
        self._started_ns = started_ns

    async def look(self, path: Path) -> Found:
        """The directory itself, or a disk."""
        if not path:
            return Found(folder=True, mode=0o555, mtime_ns=self._started_ns)
        disk = (await self._daemon.disks()).get(path[0])
        if disk is None:  # it may have been attached just now
            disk = (await self._daemon.disks(fresh=True)).get(path[0])
        if disk is None or len(path) > 1 or _ours(disk):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return found_disk(disk)

    async def names(self, path: Path) -> list[str]:
        """The disks, without those that stand for images."""
        if path:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        disks = await self._daemon.disks(fresh=True)
        return [disk.name for disk in disks.values() if not _ours(disk)]


@dataclass(frozen=True)
class Shown:
    """Who may read images: at most `mode`. Where `uid` or `gid` is not None, those have `mode`, whatever stores say."""

    mode: int = 0o440
    uid: int | None = None
    gid: int | None = None

    def of(self, found: Found) -> Found:
        """What lies in a store, as the mount shows it."""
        mode = self.mode & 0o444
        if found.folder:
            mode |= mode >> 2
        if self.uid is None and self.gid is None:
            return replace(found, mode=found.mode & mode)
        return replace(found, mode=mode, uid=self.uid or 0, gid=self.gid or 0)


class ImagesPlace:
    """`images/`: the stores, and in them what is a regular file or a directory. Nobody writes here.

    What has a name that no image can have is not there: it could not be opened.
    """

    def __init__(
        self, stores: Mapping[str, FilePath], started_ns: int, shown: Shown | None = None
    ) -> None:
        self._shown = shown or Shown()
        self._stores = stores
        self._started_ns = started_ns
        self._limits = {name: trio.CapacityLimiter(STORE_THREADS) for name in stores}

    async def look(self, path: Path) -> Found:
        """The directory of stores, a directory in a store, or an image."""
        if not path:
            return Found(folder=True, mode=0o555, mtime_ns=self._started_ns)
        return self._shown.of(await self._in_store(path, _look))

    async def names(self, path: Path) -> list[str]:
        """Stores, or the directories and images there."""
        if not path:
            return list(self._stores)
        return await self._in_store(path, _names)

    async def _in_store(self, path: Path, look: Callable[[FilePath, str], T]) -> T:
        """What `look`, which blocks, returns for a path in a store. Raises OSError, EIO after STORE_SECONDS."""
        store, *parts = path
        root, inside = self._stores.get(store), "/".join(parts) or "."
        ours = any(part.endswith(SIDECAR) for part in parts)
        if root is None or ours or not is_nameable(inside):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        with trio.move_on_after(STORE_SECONDS):
            return await trio.to_thread.run_sync(
                look, root, inside, abandon_on_cancel=True, limiter=self._limits[store]
            )
        raise OSError(errno.EIO, f"store {store} does not answer")


class StagePlace:
    """`stage/`: the images once more, for the mount's own user. What is written there is compared with a torrent."""

    def __init__(self, images: Place) -> None:
        self._images = images

    async def look(self, path: Path) -> Found:
        """A directory, or an image."""
        found = await self._images.look(path)
        mode = 0o700 if found.folder else 0o600
        return replace(found, mode=mode, uid=os.geteuid(), gid=os.getegid())

    async def names(self, path: Path) -> list[str]:
        """As the stores have them."""
        return await self._images.names(path)


def found_disk(disk: Served) -> Found:
    """A disk as a file, for those who could reach its socket. Raises OSError when its socket is gone."""
    path = FilePath(disk.socket)
    socket = os.lstat(path)  # in memory: it lies below /run
    mode = stat.S_IMODE(socket.st_mode) & (0o444 if disk.read_only else 0o666)
    uid, gid = socket.st_uid, socket.st_gid
    mode &= passable(path, uid, gid, mode)
    return Found(False, mode, uid, gid, size=disk.size, mtime_ns=socket.st_mtime_ns)


def passable(path: FilePath, uid: int, gid: int, mode: int) -> int:
    """What is left of `mode`, of a file or directory of these, if all directories above have to be passed as well.

    In the mount they are missing, so what they keep out has to be kept out here: as far as one owner, one group and all
    others can say it, and no more than is allowed in the place itself. Blocks.
    """
    for above in {*path.parents, *path.resolve().parents}:
        try:
            found, listed = above.stat(), has_access_list(above)
        except OSError:
            return mode & 0o700
        through = found.st_mode & (0o101 if listed else 0o111)
        if through == 0o111:
            continue
        mode &= 0o770  # who is kept out may be among the others
        mine = found.st_uid == uid
        group = through & 0o010 and (found.st_gid == gid or through & 0o001)
        if not (group and (mine or through & 0o100)):
            mode &= 0o707
        bit = 0o100 if mine else 0o010 if _is_member(uid, found.st_gid) else 0o001
        if not through & bit:
            mode &= 0o077
    return mode


def _is_member(uid: int, gid: int) -> bool:
    try:
        user = pwd.getpwuid(uid)
        return gid in os.getgrouplist(user.pw_name, user.pw_gid)
    except KeyError:
        return False


def has_access_list(path: FilePath | int) -> bool:
    """True if there is an access list: then the mode says what its group may at most, and not what it may."""
    try:
        return bool(os.getxattr(path, "system.posix_acl_access"))
    except OSError:
        return False


def _ours(disk: Served) -> bool:
    """True if a mount attached the disk, to serve an image by its path."""
    return disk.name == disk_for(disk.image)


def _look(root: FilePath, inside: str) -> Found:
    """What lies at `inside` below a store; links, devices and the like count as not there. Blocks. Raises OSError."""
    descriptor = _open(root, inside, os.O_PATH | os.O_NOFOLLOW)
    try:
        seen = os.fstat(descriptor)
        listed = has_access_list(FilePath(f"/proc/self/fd/{descriptor}"))
    finally:
        os.close(descriptor)
    folder = stat.S_ISDIR(seen.st_mode)
    if not folder and not stat.S_ISREG(seen.st_mode):
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    allowed = stat.S_IMODE(seen.st_mode) & (0o555 if folder else 0o444)
    if listed:
        allowed &= 0o505  # nobody knows what the group may
    if inside == ".":
        allowed = passable(root, seen.st_uid, seen.st_gid, allowed)
    size, blocks = (0, 0) if folder else (seen.st_size, seen.st_blocks)
    return Found(
        folder, allowed, seen.st_uid, seen.st_gid, size, seen.st_mtime_ns, blocks * BLOCK_UNIT
    )


def _names(root: FilePath, inside: str) -> list[str]:
    """The names of images and directories in a directory of a store. Blocks. Raises OSError."""
    descriptor = _open(root, inside, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.scandir(descriptor) as entries:
            return [
                entry.name
                for entry in entries
                if not entry.name.endswith(SIDECAR)
                and is_nameable(entry.name)
                and (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False))
            ]
    finally:
        os.close(descriptor)


def _open(root: FilePath, inside: str, flags: int) -> int:
    """A descriptor of what lies at `inside` below a store, reached without following links. Raises OSError."""
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_beneath(top, inside, flags)
    except OSError as fault:
        if fault.errno in (errno.ELOOP, errno.EXDEV):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        raise
    finally:
        os.close(top)
