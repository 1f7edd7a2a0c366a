# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The file system: what pyfuse3 asks for. No request waits for ever, and no error but an errno leaves it."""

import contextlib
import errno
import itertools
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING

import pyfuse3

from forebay.doors.fuse.daemon import Daemon
from forebay.doors.fuse.link import Link
from forebay.doors.fuse.open_files import OpenFile, OpenFiles
from forebay.doors.fuse.places import DISKS, Found, Path, Place

if TYPE_CHECKING:
    from forebay.doors.fuse.core_door import CoreDoor

log = logging.getLogger("forebay.fuse")

ATTRIBUTE_SECONDS = 1.0
"""How long the kernel believes in names and attributes. Sizes do not change; disks come and go."""

BLOCK = 4096
"""Bytes: what statfs counts in, and what tools should write at least."""

LEAST_ZEROS = 4096
"""Bytes. Shorter writes are not looked at for being zeros."""

LEAST_KEPT, BUFFER, MOST_KEPT = 64 << 10, 1 << 20, 16
"""Bytes of reads worth a buffer that is used again, bytes of such a buffer (the kernel asks for no more), how many wait
for their next use. To make one costs as much as to fill it: a sixth of the CPU time of reading."""


@dataclass(eq=False)
class Node:
    """An inode that the kernel knows. It forgets it when it has given back as many as `lookups` references."""

    inode: int
    path: Path
    lookups: int = 0


class Nodes:
    """Inode numbers of paths. A path has the same one in every mount, so that file handles of backups stay valid."""

    def __init__(self) -> None:
        self._root = Node(pyfuse3.ROOT_INODE, ())
        self._nodes = {self._root.inode: self._root}
        self._inodes: dict[Path, int] = {(): self._root.inode}

    def path(self, inode: int) -> Path:
        """The path of an inode. Raises OSError(ESTALE) for one that was forgotten."""
        node = self._nodes.get(inode)
        if node is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return node.path

    def looked_up(self, path: Path) -> int:
        """The inode number of a path, with one reference of the kernel more."""
        node = self._nodes.get(inode := self.number(path))
        if node is None:
            node = self._nodes[inode] = Node(inode, path)
            self._inodes[path] = inode
        node.lookups += 1
        return inode

    def number(self, path: Path) -> int:
        """The inode number that a path has, or would get."""
        inode = self._inodes.get(path)
        if inode is None:
            digest = blake2b("/".join(path).encode(errors="surrogateescape"), digest_size=8)
            inode = int.from_bytes(digest.digest(), "big") >> 1 | 1 << 32
            while inode in self._nodes:
                inode += 1
        return inode

    def forget(self, inode: int, lookups: int) -> None:
        """Note that the kernel has given back so many references."""
        node = self._nodes.get(inode)
        if node is None or node is self._root:
            return
        node.lookups -= lookups
        if node.lookups <= 0:
            del self._nodes[inode], self._inodes[node.path]


@dataclass(eq=False)
class Handle:
    """One open(2). `unflushed`: something was written through it since the last flush."""

    file: OpenFile
    writable: bool
    unflushed: bool = False


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Around each operation: whatever it raises becomes the errno that the program gets, EIO for faults of our own."""
    try:
        yield
    except OSError as fault:
        raise pyfuse3.FUSEError(fault.errno or errno.EIO) from None
    except pyfuse3.FUSEError:
        raise
    except Exception:
        log.exception("a fault of Forebay itself")
        raise pyfuse3.FUSEError(errno.EIO) from None


class Files(pyfuse3.Operations):  # type: ignore[misc]  # pyfuse3 has no types
    """The tree of `places`, one top directory each, and the files that are open in it."""

    supports_dot_lookup = False
    # a write that was acknowledged has to be with the daemon, not in the kernel's memory
    enable_writeback_cache = False

    def __init__(
        self,
        places: Mapping[str, Place],
        files: OpenFiles,
        daemon: Daemon,
        door: "CoreDoor | None" = None,
    ) -> None:
        """With a `door`, reads, writes and flushes of open files do not come here: it answers them."""
        super().__init__()
        self._door = door
        self._places = places
        self._files = files
        self._daemon = daemon
        self._nodes = Nodes()
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, tuple[Path, list[str]]] = {}
        self._buffers: list[memoryview] = []
        self._numbers = itertools.count(1)

    # -------------------------------------------------------------------------------------------- names and attributes

    async def _look(self, path: Path) -> Found:
        """What lies at a path. Raises OSError, ENOENT where nothing does."""
        if not path:
            return Found(folder=True, mode=0o555)
        if (file := self._files.get(path)) is not None:
            return file.found
        if path[0] not in self._places:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return self._files.dated(path, await self._places[path[0]].look(path[1:]))

    def _attributes(self, path: Path, found: Found) -> pyfuse3.EntryAttributes:
        """What lies at a path, as the kernel wants to be told of it."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = self._nodes.number(path)
        entry.st_mode = (stat.S_IFDIR if found.folder else stat.S_IFREG) | found.mode
        entry.st_nlink = 2 if found.folder else 1
        entry.st_uid, entry.st_gid = found.uid, found.gid
        entry.st_size, entry.st_blksize = found.size, BLOCK
        entry.st_blocks = found.blocks
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = found.mtime_ns
        entry.entry_timeout = entry.attr_timeout = ATTRIBUTE_SECONDS
        return entry

    async def lookup(
        self, parent_inode: int, name: bytes, _ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name in a directory."""
        with answered():
            path = (*self._nodes.path(parent_inode), os.fsdecode(name))
            entry = self._attributes(path, await self._look(path))
            self._nodes.looked_up(path)
            return entry

    async def forget(self, inode_list: list[tuple[int, int]]) -> None:
        """Take back references to inodes that the kernel has dropped."""
        for inode, lookups in inode_list:
            self._nodes.forget(inode, lookups)

    async def getattr(
        self, inode: int, _ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        """What stat(2) shows."""
        with answered():
            path = self._nodes.path(inode)
            return self._attributes(path, await self._look(path))

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        _fh: int | None,
        _ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Refuse what would change something; times are ours, and setting them is silently passed over.

        EPERM is among the answers to chown(2) that libvirt takes for "somebody else looks after this file".
        """
        with answered():
            path = self._nodes.path(inode)
            found = await self._look(path)
            changed = (
                (fields.update_uid and attr.st_uid != found.uid)
                or (fields.update_gid and attr.st_gid != found.gid)
                or (fields.update_mode and stat.S_IMODE(attr.st_mode) != found.mode)
                or (fields.update_size and attr.st_size != found.size)
            )
            if changed:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            return self._attributes(path, found)

    async def statfs(self, _ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """As large as all disks, and full: files come by `forebay attach`, not by writing. Asks nobody."""
        disks = self._daemon.last_known.values()
        told = pyfuse3.StatvfsData()
        told.f_bsize = told.f_frsize = BLOCK
        told.f_blocks = sum(disk.size for disk in disks) // BLOCK
        told.f_bfree = told.f_bavail = 0
        told.f_files, told.f_ffree, told.f_favail = len(disks), 0, 0
        told.f_namemax = 255
        return told

    # ------------------------------------------------------------------------------------------------- directories

    async def opendir(self, inode: int, _ctx: pyfuse3.RequestContext) -> int:
        """Take the names of a directory as they are now; the number of that listing."""
        with answered():
            path = self._nodes.path(inode)
            names = await self._places[path[0]].names(path[1:]) if path else list(self._places)
            number = next(self._numbers)
            self._listings[number] = (path, sorted(names))
            return number

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Names and attributes from the `start_id`th on. What is gone meanwhile is left out."""
        with answered():
            path, names = self._listings[fh]
            for number, name in enumerate(names[start_id:], start_id + 1):
                inside = (*path, name)
                try:
                    entry = self._attributes(inside, await self._look(inside))
                except (FileNotFoundError, PermissionError):
                    continue
                if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, number):
                    break
                self._nodes.looked_up(inside)

    async def releasedir(self, fh: int) -> None:
        """Forget a listing."""
        del self._listings[fh]

    # ------------------------------------------------------------------------------------------------------- files

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file. EROFS for writing to what is read-only, EPERM for cutting it off, EACCES for another's disk.

        The kernel's copies of a disk's pages are dropped, those of an image, which does not change, are kept: it drops
        them itself when the image's time or size changes.
        """
        with answered():
            path = self._nodes.path(inode)
            if flags & os.O_TRUNC:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            writable = flags & os.O_ACCMODE != os.O_RDONLY
            if path[0] == DISKS:
                disk = (await self._daemon.disks(fresh=True)).get(path[1])
                if disk is not None and not disk.is_for(ctx.uid, ctx.pid):
                    raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            file = await self._files.open(path)
            if writable and not file.found.mode & 0o222:
                await self._files.close(file)
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            number = next(self._numbers)
            self._handles[number] = Handle(file, writable)
            if self._door is not None:
                touched = partial(self._touched, inode, file)
                self._door.opened(number, file, writable, touched)
                self._tell(inode, file)
            settled = file.attached is not None
            return pyfuse3.FileInfo(fh=number, keep_cache=settled, direct_io=file.live)

    async def read(self, fh: int, off: int, size: int) -> bytes | bytearray | memoryview:
        """Up to `size` bytes from offset `off` on; fewer only at the end."""
        with answered():
            file = self._handles[fh].file
            length, link = min(size, file.found.size - off), _link_of(file)
            if length <= 0 or link is None:
                return b""
            if not LEAST_KEPT <= length <= BUFFER:
                return await link.pread(off, length)
            buffer = self._buffers.pop() if self._buffers else memoryview(bytearray(BUFFER))
            await link.pread_into(off, buffer[:length])
            # nobody else takes it too early: pyfuse3 answers the kernel before another task runs
            if len(self._buffers) < MOST_KEPT:
                self._buffers.append(buffer)
            return buffer[:length]

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write what fits before the end; ENOSPC behind it, as a block device answers."""
        with answered():
            handle = self._handles[fh]
            link, size = _link_of(handle.file), handle.file.found.size
            if off >= size or link is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if off + len(buf) > size:
                buf = buf[: size - off]
            handle.unflushed = True
            if _zeros(buf):
                await link.zero(off, len(buf))
            else:
                await link.pwrite(off, buf)
            return len(buf)

    async def fsync(self, fh: int, _datasync: bool) -> None:
        """Have what was written survive a power cut: NBD FLUSH."""
        with answered():
            handle = self._handles[fh]
            if handle.writable and (link := _link_of(handle.file)) is not None:
                handle.unflushed = False
                try:
                    await link.flush()
                except OSError:
                    handle.unflushed = True
                    raise
                self._files.touched(handle.file)

    async def flush(self, fh: int) -> None:
        """At close(2): flush what was written through this handle, so that somebody hears of a failure."""
        if self._handles[fh].unflushed:
            await self.fsync(fh, True)

    async def release(self, fh: int) -> None:
        """After the last close of a handle. Nobody can be told of failures any more."""
        handle = self._handles.pop(fh)
        if self._door is not None:
            handle.unflushed = self._door.closed(fh)
        if handle.unflushed:
            self._files.touched(handle.file)
        await self._files.close(handle.file)
        if self._door is not None and self._files.get(handle.file.path) is None:
            self._door.forget(self._nodes.number(handle.file.path))

    # what a door that answers requests itself has to know

    def _tell(self, inode: int, file: OpenFile) -> None:
        """Have the door know the attributes of an open file."""
        assert self._door is not None
        self._door.tell(inode, self._attributes(file.path, file.found))

    def _touched(self, inode: int, file: OpenFile) -> None:
        """Called by the door when what was written has reached the daemon."""
        self._files.touched(file)
        self._tell(inode, file)

    # ---------------------------------------------------------------------------------------- names are not made here

    async def create(self, *_: object) -> None:
        """Refuse: files come by `forebay attach`."""
        raise pyfuse3.FUSEError(errno.EROFS)

    mknod = mkdir = symlink = link = unlink = rmdir = rename = create


def _link_of(file: OpenFile) -> Link | None:
    """Its connection; None for an empty file. For files whose requests come here."""
    assert file.link is None or isinstance(file.link, Link)
    return file.link


def _zeros(data: bytes) -> bool:
    """True if all of it is zero. pyfuse3 passes no fallocate(2) on, so this is how programs zero ranges here."""
    if len(data) < LEAST_ZEROS or data[0] or data[-1] or data[len(data) // 2]:
        return False
    return data == bytes(len(data))
