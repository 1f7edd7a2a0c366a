# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A file system that does what a failing store does: a directory passed through, with faults on command.

    python fault_fs.py DIRECTORY MOUNTPOINT

Says "ready" once it is mounted. Commands are lines of JSON on standard input: `{"operations": ["write", "fsync"],
"errno": 28, "share": 0.5, "delay": 0.1, "hang": false}` replaces the fault of before, `{}` ends it, and what hung goes
on then. Each command is answered by "done". Where standard input ends it unmounts. What fails fails before anything
was done; nothing is cached, and nothing is lost by itself.
"""

import errno
import json
import os
import random
import stat
import sys
from dataclasses import dataclass, field
from typing import Any

import pyfuse3
import trio

from forebay.doors.fuse.awake import kept_awake

OPERATIONS = ("read", "write", "fsync", "names")


@dataclass
class Fault:
    """What happens to these operations until the next command."""

    operations: tuple[str, ...] = ()
    errno: int = 0
    share: float = 1.0
    delay: float = 0.0
    hang: bool = False
    over: trio.Event = field(default_factory=trio.Event)


class Store(pyfuse3.Operations):  # type: ignore[misc]  # no types
    """Inodes are those of the directory below, but for the root."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, source: str) -> None:
        super().__init__()
        self.fault = Fault()
        self._rng = random.Random(1)
        self._paths: dict[int, str] = {pyfuse3.ROOT_INODE: source}

    async def _trouble(self, operation: str) -> None:
        fault = self.fault
        if operation not in fault.operations or self._rng.random() >= fault.share:
            return
        if fault.hang:
            await fault.over.wait()
        if fault.delay:
            await trio.sleep(fault.delay)
        if fault.errno:
            raise pyfuse3.FUSEError(fault.errno)

    # -- names

    def _below(self, parent: int, name: bytes) -> str:
        return os.path.join(self._paths[parent], os.fsdecode(name))

    def _attributes(self, found: os.stat_result, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        for key in (
            "st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size",
            "st_atime_ns", "st_mtime_ns", "st_ctime_ns",
        ):  # fmt: skip
            setattr(entry, key, getattr(found, key))
        entry.st_ino = inode
        entry.st_blksize, entry.st_blocks = 4096, found.st_blocks
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    def _entry(self, path: str) -> pyfuse3.EntryAttributes:
        found = self._call(os.lstat, path)
        self._paths[found.st_ino] = path
        return self._attributes(found, found.st_ino)

    def _call(self, do: Any, *arguments: Any) -> Any:
        try:
            return do(*arguments)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        await self._trouble("names")
        return self._entry(self._below(parent_inode, name))

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        return self._attributes(self._call(os.lstat, self._paths[inode]), inode)

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any) -> Any:
        path = self._paths[inode]
        if fields.update_size:
            self._call(os.truncate, path, attr.st_size)
        if fields.update_mode:
            self._call(os.chmod, path, stat.S_IMODE(attr.st_mode))
        return await self.getattr(inode)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> Any:
        await self._trouble("names")
        path = self._below(parent_inode, name)
        self._call(os.mkdir, path, mode)
        return self._entry(path)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        await self._trouble("names")
        self._call(os.rmdir, self._below(parent_inode, name))

    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        await self._trouble("names")
        self._call(os.unlink, self._below(parent_inode, name))

    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes,
        flags: int, ctx: Any,
    ) -> None:  # fmt: skip
        await self._trouble("names")
        to = self._below(parent_inode_new, name_new)
        self._call(os.rename, self._below(parent_inode_old, name_old), to)
        self._paths[self._call(os.lstat, to).st_ino] = to

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        names = sorted(self._call(os.listdir, self._paths[fh]))
        for number, name in enumerate(names[start_id:], start_id + 1):
            try:
                found = self._entry(os.path.join(self._paths[fh], name))
            except pyfuse3.FUSEError:
                continue
            if not pyfuse3.readdir_reply(token, os.fsencode(name), found, number):
                break

    async def forget(self, inode_list: Any) -> None:
        pass  # there are few

    async def statfs(self, ctx: Any) -> Any:
        found = os.statvfs(self._paths[pyfuse3.ROOT_INODE])
        answer = pyfuse3.StatvfsData()
        for key in (
            "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail",
        ):  # fmt: skip
            setattr(answer, key, getattr(found, key))
        answer.f_namemax = 255
        return answer

    # -- files

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        await self._trouble("names")
        mask = os.O_DIRECT | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        return pyfuse3.FileInfo(fh=self._call(os.open, self._paths[inode], flags & ~mask))

    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        await self._trouble("names")
        path = self._below(parent_inode, name)
        fd = self._call(os.open, path, flags & ~os.O_DIRECT | os.O_CREAT, mode)
        return pyfuse3.FileInfo(fh=fd), self._entry(path)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await self._trouble("read")
        data: bytes = self._call(os.pread, fh, size, off)
        return data

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        await self._trouble("write")
        count: int = self._call(os.pwrite, fh, buf, off)
        return count

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._trouble("fsync")  # and no more: power stays on

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._trouble("fsync")

    async def flush(self, fh: int) -> None:
        pass

    async def release(self, fh: int) -> None:
        os.close(fh)

    async def releasedir(self, fh: int) -> None:
        pass


async def obey(store: Store, scope: trio.CancelScope) -> None:
    """Do what standard input says."""
    buffer = b""
    while True:
        await trio.lowlevel.wait_readable(0)
        data = os.read(0, 65536)
        if not data:
            break
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            before, store.fault = store.fault, Fault(**json.loads(line))
            before.over.set()
            os.write(1, b"done\n")
    store.fault.over.set()
    store.fault = Fault()
    scope.cancel()


async def serve(store: Store) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(obey, store, nursery.cancel_scope)
        async with kept_awake():
            await pyfuse3.main()


def main() -> None:
    store = Store(sys.argv[1])
    options = {"fsname=forebay-soak", "default_permissions"} | set(pyfuse3.default_options)
    pyfuse3.init(store, sys.argv[2], options)
    os.write(1, b"ready\n")
    try:
        trio.run(serve, store)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
