# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A file system that passes everything through and writes down, in one order, what was written and what was synced.

`python recorder.py MOUNT BACKING LOG SEED` mounts at MOUNT what BACKING holds (regular files in one level of
directories or more), says READY on its standard output, and ends when it is unmounted. It has to be a process of its
own: LMDB maps files of it, and who opens a map on a mount that the same process serves waits for itself.

The log is a row of tuples, each as `marshal.dump` writes it; `crash_log.py` reads it:

    ("create", directory, name, node, is_directory)    ("unlink", directory, name)
    ("rename", directory, old name, directory, new name)
    ("write", node, offset, bytes, mtime_ns, ctime_ns)   ("truncate", node, size, mtime_ns, ctime_ns)
    ("sync", number, node, data only)     a sync was asked for: it takes in what is in the log before this
    ("synced", number)                    it was answered
    ("mark", bytes)                       somebody wrote these bytes into the file `marks` at the top
    ("begin",)                            what comes before was there when the recorder started: it is durable

A node is what the file system says of the file: its inode number, which is that of the file in BACKING. A sync takes
a random while, so that things happen beside it. The times of files are by a clock of this file system's own.

A mark that is an order, as `marshal.dumps(("order", name, value))`, is obeyed: `clock` goes on by so many seconds,
`device` makes every write and sync of the cache device take so many seconds, or, infinite, until the next such order,
and `sync` makes all durable that was written so far. Not passed on, because pyfuse3 does not offer them: fallocate (the
kernel answers EOPNOTSUPP, so that trims are ignored, and zeros written) and SEEK_HOLE (all is data).
"""

import errno
import marshal
import math
import os
import random
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyfuse3
import trio

from forebay.doors.fuse.awake import kept_awake

ROOT = pyfuse3.ROOT_INODE
MARKS = 2
MARKS_NAME = b"marks"
DEVICE_NAME = b"cache.img"
DIRECTORIES = 1 << 40
"""Numbers of directories begin here: files have those of the backing file system."""

SYNC_SECONDS = (0.0, 0.0, 0.0005, 0.002)
"""What a sync takes on top, by chance."""

NAMES_STAY = 1000.0
"""Seconds for which the kernel may believe a name: nobody changes one but through the mount."""


class Node:
    """A file or a directory. A file that was removed stays until the end: its number is not used again."""

    def __init__(self, number: int, fd: int = -1) -> None:
        self.number = number
        self.fd = fd
        self.links = 1
        self.mode = 0o755
        self.times = (time.time_ns(),) * 2  # mtime and ctime
        self.children: dict[bytes, Node] = {}

    @property
    def is_directory(self) -> bool:
        return self.fd < 0


class Recorder(pyfuse3.Operations):  # type: ignore[misc]
    """All state is changed without an await, so the order in the log is the order in which things happened."""

    def __init__(self, backing: Path, log: BinaryIO, seed: str) -> None:
        super().__init__()
        self._backing = os.open(backing, os.O_RDONLY | os.O_DIRECTORY)
        self._store = backing.with_name(backing.name + ".files")
        self._store.mkdir()
        self._log = log
        self._random = random.Random(seed)
        self._made = 0
        self._syncs = 0
        self._ahead = 0  # ns by which our clock goes before the host's
        self._slowness = 0.0
        self._changed = trio.Event()  # the slowness of the device was
        self._nodes: dict[int, Node] = {ROOT: Node(ROOT)}
        self._take_in(self._nodes[ROOT], backing)
        marks = Node(MARKS, os.open(os.devnull, os.O_RDWR))
        self._nodes[MARKS] = self._nodes[ROOT].children[MARKS_NAME] = marks
        self._note("begin")

    def _note(self, *record: Any) -> None:
        marshal.dump(record, self._log)

    def _take_in(self, directory: Node, path: Path) -> None:
        for entry in sorted(path.iterdir()):
            node = self._add(directory, os.fsencode(entry.name), entry if entry.is_file() else None)
            if entry.is_file():
                self._note("write", node.number, 0, entry.read_bytes(), *node.times)
            else:
                self._take_in(node, entry)

    def _add(self, directory: Node, name: bytes, path: Path | None) -> Node:
        """A new node; `path`: the file, which exists. None: a directory."""
        if path is None:
            self._made += 1
            node = Node(DIRECTORIES + self._made)
        else:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            node = Node(os.fstat(fd).st_ino, fd)
            node.mode = stat.S_IMODE(os.fstat(fd).st_mode)
        self._times(node)
        self._nodes[node.number] = directory.children[name] = node
        self._note("create", directory.number, name, node.number, path is None)
        return node

    def _times(self, node: Node) -> tuple[int, int]:
        """Those of a file that has changed just now."""
        now = time.time_ns() + self._ahead
        node.times = now, now
        return node.times

    # -- orders -----------------------------------------------------------------------------------------------

    def _obey(self, name: str, value: float) -> None:
        if name == "clock":
            self._ahead += int(value * 1e9)
        elif name == "device":
            self._slowness = value
            self._changed.set()
            self._changed = trio.Event()
        else:
            for number, node in self._nodes.items():
                if number != MARKS:
                    self._syncs += 1
                    self._note("sync", self._syncs, node.number, False)
                    self._note("synced", self._syncs)

    async def _be_slow(self, fh: int) -> None:
        """Before a write or a sync is made."""
        if self._slowness and self._nodes[fh] is self._device():
            if math.isinf(self._slowness):
                await self._changed.wait()
            else:
                await trio.sleep(self._slowness * 2 * self._random.random())

    def _device(self) -> Node | None:
        state = self._nodes[ROOT].children.get(b"state")
        return state.children.get(DEVICE_NAME) if state else None

    # -- names ------------------------------------------------------------------------------------------------

    def _child(self, directory: int, name: bytes) -> Node:
        try:
            return self._nodes[directory].children[name]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ENOENT) from None

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        if name == b".":
            return self._attributes(self._nodes[parent_inode])
        return self._attributes(self._child(parent_inode, name))

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        return self._attributes(self._nodes[inode])

    def _attributes(self, node: Node) -> Any:
        found = os.fstat(node.fd if not node.is_directory else self._backing)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.number
        entry.st_mode = node.mode | (stat.S_IFDIR if node.is_directory else stat.S_IFREG)
        entry.st_nlink = node.links
        entry.st_uid, entry.st_gid = found.st_uid, found.st_gid
        entry.st_size = found.st_size if stat.S_ISREG(found.st_mode) else 0
        entry.st_blocks = found.st_blocks
        entry.st_blksize = 4096
        entry.st_atime_ns = entry.st_mtime_ns = node.times[0]
        entry.st_ctime_ns = node.times[1]
        entry.entry_timeout, entry.attr_timeout = NAMES_STAY, 0
        return entry

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any = None
    ) -> tuple[Any, Any]:
        self._made += 1
        path = self._store / str(self._made)
        path.touch(mode=stat.S_IMODE(mode))
        node = self._add(self._nodes[parent_inode], name, path)
        return pyfuse3.FileInfo(fh=node.number), self._attributes(node)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any = None) -> Any:
        if name in self._nodes[parent_inode].children:
            raise pyfuse3.FUSEError(errno.EEXIST)
        node = self._add(self._nodes[parent_inode], name, None)
        node.mode = stat.S_IMODE(mode)
        return self._attributes(node)

    async def unlink(self, parent_inode: int, name: bytes, ctx: Any = None) -> None:
        self._child(parent_inode, name)
        self._gone(self._nodes[parent_inode].children.pop(name))
        self._note("unlink", parent_inode, name)

    @staticmethod
    def _gone(node: Node) -> None:
        node.links -= 1

    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any = None) -> None:
        if self._child(parent_inode, name).children:
            raise pyfuse3.FUSEError(errno.ENOTEMPTY)
        await self.unlink(parent_inode, name, ctx)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: Any = None,
    ) -> None:
        if flags:
            raise pyfuse3.FUSEError(errno.EINVAL)
        self._child(parent_inode_old, name_old)
        old, new = (self._nodes[n].children for n in (parent_inode_old, parent_inode_new))
        replaced = new.get(name_new)
        new[name_new] = old.pop(name_old)
        if replaced is not None:
            self._gone(replaced)
        self._note("rename", parent_inode_old, name_old, parent_inode_new, name_new)

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        for n, (name, node) in enumerate(sorted(self._nodes[fh].children.items())):
            if n >= start_id and not pyfuse3.readdir_reply(
                token, name, self._attributes(node), n + 1
            ):
                return

    # -- content ----------------------------------------------------------------------------------------------

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any) -> Any:
        node = self._nodes[inode]
        if fields.update_size and inode != MARKS:
            self._truncate(node, attr.st_size)
        if fields.update_mode:
            node.mode = stat.S_IMODE(attr.st_mode)
        return self._attributes(node)

    def _truncate(self, node: Node, size: int) -> None:
        os.ftruncate(node.fd, size)
        self._note("truncate", node.number, size, *self._times(node))

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        if inode == MARKS:
            return pyfuse3.FileInfo(fh=inode, direct_io=True)
        if flags & os.O_TRUNC:
            self._truncate(self._nodes[inode], 0)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return os.pread(self._nodes[fh].fd, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        if fh == MARKS:
            self._note("mark", bytes(buf))
            kind, *order = marshal.loads(buf)
            if kind == "order":
                self._obey(*order)
            return len(buf)
        await self._be_slow(fh)
        node = self._nodes[fh]
        done = os.pwrite(node.fd, buf, off)
        self._note("write", fh, off, bytes(buf[:done]), *self._times(node))
        return done

    async def fsync(self, fh: int, datasync: bool) -> None:
        self._syncs += 1
        number = self._syncs
        self._note("sync", number, fh, bool(datasync))
        await self._be_slow(fh)
        await trio.sleep(self._random.choice(SYNC_SECONDS))
        self._note("synced", number)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.fsync(fh, datasync)

    async def flush(self, fh: int) -> None:
        pass

    async def release(self, fh: int) -> None:
        pass

    async def releasedir(self, fh: int) -> None:
        pass

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        pass

    async def access(self, inode: int, mode: int, ctx: Any) -> bool:
        return True

    async def statfs(self, ctx: Any) -> Any:
        found, answer = os.fstatvfs(self._backing), pyfuse3.StatvfsData()
        for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"):
            setattr(answer, f"f_{name}", getattr(found, f"f_{name}"))
        answer.f_namemax = 255
        return answer


def main() -> None:
    mount, backing, log, seed = sys.argv[1:]
    with Path(log).open("xb", buffering=1 << 20) as file:
        recorder = Recorder(Path(backing), file, seed)
        options = {"fsname=forebay-recorder", "default_permissions"}
        pyfuse3.init(recorder, mount, options)
        print("READY", flush=True)
        try:
            trio.run(_serve)
        finally:
            pyfuse3.close(unmount=False)


async def _serve() -> None:
    async with kept_awake():
        await pyfuse3.main()


if __name__ == "__main__":
    main()
