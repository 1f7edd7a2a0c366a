# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A file system that fails on command: a directory seen through FUSE, in a process of its own.

    python fault_server.py MOUNTPOINT DIRECTORY SOCKET [writeback]

Each line on the Unix socket is a command, a JSON object; each gets one line back. `fail` adds a rule, `lift` removes
all and lets go what hangs, `lose_locks` has every descriptor that is open fail for ever, `forget` has the kernel read
everything anew, `counts` tells how many calls there were.

The fault model. A rule names a call (`read`, `write`, `fsync`, `open`, `getattr`, and `flush`, which every close of a
descriptor waits for), a pattern for the file's name, and what happens to so many calls, or (-1) to all, after so many
that go well, and, if `end` is given, only to those of bytes from `start` to `end`: an error, a delay in seconds, no
answer until the rules are lifted, half of a write. A write is visible at once, to everybody. It is durable with the
next fsync of its file that succeeds. An fsync that fails with `lose` takes back what was not durable, as a server
does that has thrown it away; later ones succeed, and say nothing about it. What the kernel of this host has in memory
of the file stays as it was written, until `forget`. With `writeback` the kernel keeps what is written, as that of an
NFS client does, until somebody asks for it: fsync, close, or time.
"""

import errno
import fnmatch
import json
import os
import stat
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyfuse3
import trio

from forebay.doors.fuse.awake import kept_awake


@dataclass
class Rule:
    call: str
    name: str = "*"
    error: str = ""
    after: int = 0
    times: int = -1
    start: int = 0
    end: int = 0
    delay: float = 0.0
    hang: bool = False
    short: bool = False
    lose: bool = False


class Faults:
    def __init__(self) -> None:
        self.rules: list[Rule] = []
        self.counts: Counter[str] = Counter()
        self._lifted = trio.Event()

    def lift(self) -> None:
        self.rules.clear()
        event, self._lifted = self._lifted, trio.Event()
        event.set()

    async def meet(self, call: str, path: str, offset: int = 0, size: int = 0) -> Rule | None:
        """Wait as told, and raise what is to be raised by the call itself: all but for fsync."""
        self.counts[call] += 1
        name = os.path.basename(path)
        for rule in self.rules:
            if rule.end and not (rule.start < offset + size and offset < rule.end):
                continue
            if rule.call == call and rule.times and fnmatch.fnmatch(name, rule.name):
                if rule.after:
                    rule.after -= 1
                    continue
                rule.times -= 1
                if rule.delay:
                    await trio.sleep(rule.delay)
                if rule.hang:
                    await self._lifted.wait()
                    return None
                if rule.error and not rule.lose:
                    raise pyfuse3.FUSEError(getattr(errno, rule.error))
                return rule
        return None


class FaultFs(pyfuse3.Operations):  # type: ignore[misc]
    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, root: str, faults: Faults) -> None:
        super().__init__()
        self._faults = faults
        self._paths = {pyfuse3.ROOT_INODE: root}
        self._open: dict[int, str] = {}  # descriptors, with their path
        self._dead: set[int] = set()
        self._undone: dict[int, list[tuple[int, bytes]]] = {}  # by inode: what was there before

    # -- names

    def _path(self, inode: int, name: bytes | None = None) -> str:
        try:
            path = self._paths[inode]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None
        return path if name is None else os.path.join(path, os.fsdecode(name))

    def _entry(self, found: os.stat_result, path: str | None) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        for field in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_blocks"):
            setattr(entry, field, getattr(found, field))
        for field in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(entry, field, getattr(found, field))
        entry.st_ino = found.st_ino
        if path is not None:
            if path == self._paths[pyfuse3.ROOT_INODE]:
                entry.st_ino = pyfuse3.ROOT_INODE
            else:
                self._paths[found.st_ino] = path
        entry.attr_timeout = entry.entry_timeout = 0
        if path is not None and path.endswith(".img"):
            entry.st_mtime_ns = (
                0  # if that changed, the kernel would forget the pages of a cache device
            )
        entry.generation = 0
        return entry

    def _look(self, path: str) -> pyfuse3.EntryAttributes:
        try:
            return self._entry(os.lstat(path), path)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno) from None

    async def lookup(self, parent: int, name: bytes, ctx: Any) -> Any:
        return self._look(self._path(parent, name))

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        path = self._path(inode)
        await self._faults.meet("getattr", path)
        try:
            return self._entry(os.lstat(path), path)
        except FileNotFoundError:
            for fd in self._open:
                found = os.fstat(fd)
                if found.st_ino == inode:
                    return self._entry(found, None)
            raise pyfuse3.FUSEError(errno.ESTALE) from None

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        path = self._path(inode)
        try:
            if fields.update_size:
                os.truncate(path if fh is None else fh, attr.st_size)
            if fields.update_mode:
                os.chmod(path, stat.S_IMODE(attr.st_mode))
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno) from None
        return await self.getattr(inode)

    async def forget(self, inode_list: Any) -> None:
        pass

    async def access(self, inode: int, mode: int, ctx: Any) -> bool:
        return True

    async def statfs(self, ctx: Any) -> Any:
        found = os.statvfs(self._paths[pyfuse3.ROOT_INODE])
        data = pyfuse3.StatvfsData()
        for field in (
            "f_bsize",
            "f_frsize",
            "f_blocks",
            "f_bfree",
            "f_bavail",
            "f_files",
            "f_ffree",
            "f_favail",
        ):
            setattr(data, field, getattr(found, field))
        return data

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        path = self._path(fh)
        for number, name in enumerate(sorted(os.listdir(path)), 1):
            if number > start_id:
                entry = self._look(os.path.join(path, name))
                if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, number):
                    return

    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> Any:
        path = self._path(parent, name)
        await self._faults.meet("mkdir", path)
        return self._changed(lambda: os.mkdir(path, mode), path)

    def _changed(self, do: Any, path: str | None = None) -> Any:
        try:
            do()
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno) from None
        return self._look(path) if path else None

    async def rmdir(self, parent: int, name: bytes, ctx: Any) -> None:
        self._changed(lambda: os.rmdir(self._path(parent, name)))

    async def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
        self._changed(lambda: os.unlink(self._path(parent, name)))

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: Any
    ) -> None:
        old, new = self._path(parent, name), self._path(new_parent, new_name)
        self._changed(lambda: os.rename(old, new))
        for inode, path in self._paths.items():
            if path == old or path.startswith(old + "/"):
                self._paths[inode] = new + path[len(old) :]

    # -- files

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        path = self._path(inode)
        await self._faults.meet("open", path)
        return self._opened(path, flags & ~(os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_APPEND))

    def _opened(self, path: str, flags: int, mode: int = 0) -> Any:
        try:
            flags = flags & ~os.O_ACCMODE | os.O_RDWR  # what was there is read before it is written
            fd = os.open(path, flags | os.O_CLOEXEC, mode)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno) from None
        self._open[fd] = path
        return pyfuse3.FileInfo(fh=fd)

    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        path = self._path(parent, name)
        await self._faults.meet("open", path)
        info = self._opened(path, (flags | os.O_CREAT) & ~os.O_DIRECT, mode)
        return info, self._look(path)

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        self._check_alive(fh)
        await self._faults.meet("read", self._open[fh], offset, size)
        return os.pread(fh, size, offset)

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        self._check_alive(fh)
        rule = await self._faults.meet("write", self._open[fh])
        if rule is not None and rule.short:
            data = data[: max(1, len(data) // 2)]
        before = (offset, os.pread(fh, len(data), offset))
        self._undone.setdefault(os.fstat(fh).st_ino, []).append(before)
        try:
            return os.pwrite(fh, data, offset)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno) from None

    def lose_locks(self) -> None:
        """What is open now gives EIO for ever, and has lost what was not durable."""
        for fd in self._open:
            for offset, data in reversed(self._undone.pop(os.fstat(fd).st_ino, [])):
                os.pwrite(fd, data, offset)
        self._dead |= set(self._open)

    def _check_alive(self, fh: int) -> None:
        if fh in self._dead:
            raise pyfuse3.FUSEError(errno.EIO)

    async def flush(self, fh: int) -> None:
        await self._faults.meet("flush", self._open[fh])

    async def fsync(self, fh: int, datasync: bool) -> None:
        self._check_alive(fh)
        rule = await self._faults.meet("fsync", self._open[fh])
        undone = self._undone.pop(os.fstat(fh).st_ino, [])
        if rule is not None and rule.lose:
            for offset, data in reversed(undone):
                os.pwrite(fh, data, offset)
            raise pyfuse3.FUSEError(getattr(errno, rule.error))

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        pass

    async def releasedir(self, fh: int) -> None:
        pass

    async def release(self, fh: int) -> None:
        del self._open[fh]
        self._dead.discard(fh)
        os.close(fh)

    def forget_pages(self) -> None:
        for inode in list(self._paths):
            try:
                pyfuse3.invalidate_inode(inode)
            except OSError:
                pass


async def _serve(stream: trio.SocketStream, fs: FaultFs, faults: Faults) -> None:
    text = b""
    async for part in stream:
        text += part
        while b"\n" in text:
            line, _, text = text.partition(b"\n")
            command = json.loads(line)
            what, answer = command.pop("do"), {}
            if what == "fail":
                faults.rules.append(Rule(**command))
            elif what == "lift":
                faults.lift()
            elif what == "lose_locks":
                fs.lose_locks()
            elif what == "forget":
                await trio.to_thread.run_sync(fs.forget_pages)
            elif what == "counts":
                answer = dict(faults.counts)
            await stream.send_all(json.dumps(answer).encode() + b"\n")


async def _main(*arguments: str) -> None:
    mountpoint, root, address, *how = arguments
    faults = Faults()
    fs = FaultFs(root, faults)
    fs.enable_writeback_cache = "writeback" in how
    options = {*pyfuse3.default_options, "fsname=forebay-faults", "default_permissions"}
    pyfuse3.init(fs, mountpoint, options)
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as sock:
        await sock.bind(address)
        sock.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                trio.serve_listeners,
                lambda stream: _serve(stream, fs, faults),
                [trio.SocketListener(sock)],
            )
            async with kept_awake():
                await pyfuse3.main()


if __name__ == "__main__":
    trio.run(_main, *sys.argv[1:])
