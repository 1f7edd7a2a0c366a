# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The system calls on files of stores. Whoever touches a file of a store uses these, not those of `os` and `fcntl`.

A call on a local file system is made at once, in this thread. One on a file system that may hang is made by the store's
process, and this thread waits for the answer: such a wait ends with the daemon, while a call of its own might keep it
from ending for as long as the server is away. Which of the two it is, `open` decides by the path, and all others by the
descriptor, which is a handle where the store's process has it (process.py). In a program without such processes, as
`forebay recover`, all calls are made at once.

Every function blocks, takes what that of the same name in `os` takes, and raises OSError.
"""

import os
from collections.abc import Sequence
from typing import Any, cast

from forebay.origin.worker import program
from forebay.origin.worker.process import FIRST, Process, here, worker_of

Buffer = bytes | bytearray | memoryview


def _call(name: str, fd: int, *args: Any, **how: Any) -> Any:
    """Make the call where the descriptor is."""
    if fd >= FIRST:
        return worker_of(fd).call(name, fd, *args, **how)
    return program.make(name, fd, *args, **how)


def _call_at(name: str, folder: int, *args: Any, **how: Any) -> Any:
    """Make a call on a name in a folder; `how` has the folder, as dir_fd or the like."""
    if folder >= FIRST:
        return worker_of(folder).call(name, *args, **how)
    return program.make(name, *args, **how)


def _process_for(path: str) -> Process | None:
    """The store's process, if it is to open that path."""
    process: Process | None = getattr(here, "process", None)
    return None if process is None or process.is_local(path) else process


# ----------------------------------------------------------------------------------------------------------- opening


def open(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:  # noqa: A001
    """As os.open: a descriptor or a handle, which `close` closes."""
    if dir_fd is not None:
        if dir_fd >= FIRST:
            return worker_of(dir_fd).open("open", path, flags, mode, dir_fd=dir_fd)
        return os.open(path, flags, mode, dir_fd=dir_fd)
    process = _process_for(path)
    if process is not None:
        return process.worker().open("open", path, flags, mode)
    return os.open(path, flags, mode)


def open_device(path: str, flags: int) -> int:
    """As os.open, for a block device: its driver may hang, wherever its node lies."""
    process: Process | None = getattr(here, "process", None)
    return os.open(path, flags) if process is None else process.worker().open("open", path, flags)


def openat2(root: int, path: str, flags: int, resolve: int) -> int:
    """A new descriptor or handle of `path` below `root`: see `program.openat2`."""
    if root >= FIRST:
        return worker_of(root).open("openat2", root, path, flags, resolve)
    return program.openat2(root, path, flags, resolve)


def close(fd: int) -> None:
    """As os.close."""
    _call("close", fd)


# ------------------------------------------------------------------------------------------------------------- names


def stat(path: str, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
    """As os.stat."""
    how = {"dir_fd": dir_fd, "follow_symlinks": follow_symlinks}
    process = _process_for(path) if dir_fd is None else None
    if process is not None:
        return _stat_result(process.worker().call("stat", path, **how))
    return _stat_result(_call_at("stat", dir_fd or 0, path, **how))


def stat_device(path: str) -> os.stat_result:
    """As os.stat, for a block device."""
    return os.stat(path)  # the node lies in /dev, and its driver is not asked


def mkdir(path: str, mode: int = 0o777, *, dir_fd: int) -> None:
    """As os.mkdir."""
    _call_at("mkdir", dir_fd, path, mode, dir_fd=dir_fd)


def rmdir(path: str, *, dir_fd: int) -> None:
    """As os.rmdir."""
    _call_at("rmdir", dir_fd, path, dir_fd=dir_fd)


def unlink(path: str, *, dir_fd: int) -> None:
    """As os.unlink."""
    _call_at("unlink", dir_fd, path, dir_fd=dir_fd)


def rename(src: str, dst: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
    """As os.rename; both folders are of one store."""
    _call_at("rename", src_dir_fd, src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)


def link(src: str, dst: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
    """As os.link, of the name itself; both folders are of one store."""
    how = {"src_dir_fd": src_dir_fd, "dst_dir_fd": dst_dir_fd, "follow_symlinks": False}
    _call_at("link", src_dir_fd, src, dst, **how)


def symlink(target: str, name: str, *, dir_fd: int) -> None:
    """As os.symlink."""
    _call_at("symlink", dir_fd, target, name, dir_fd=dir_fd)


def readlink(name: str, *, dir_fd: int) -> str:
    """As os.readlink."""
    return cast("str", _call_at("readlink", dir_fd, name, dir_fd=dir_fd))


def listdir(fd: int) -> list[str]:
    """As os.listdir, of an open directory."""
    return cast("list[str]", _call("listdir", fd))


# ----------------------------------------------------------------------------------------------------- reading, writing


def preadv(fd: int, buffers: list[bytearray | memoryview], offset: int) -> int:
    """As os.preadv."""
    return (
        worker_of(fd).preadv(fd, buffers, offset) if fd >= FIRST else os.preadv(fd, buffers, offset)
    )


def pread(fd: int, length: int, offset: int) -> bytes:
    """As os.pread, and less than `length` only at the end of the file."""
    found = bytearray(length)
    view = memoryview(found)
    done = 0
    while done < length and (count := preadv(fd, [view[done:]], offset + done)):
        done += count
    return bytes(view[:done])


def read(fd: int, length: int) -> bytes:
    """As os.read."""
    return cast("bytes", _call("read", fd, length))


def pwritev(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    """As os.pwritev."""
    if fd >= FIRST:
        return worker_of(fd).pwritev(fd, list(buffers), offset)
    return os.pwritev(fd, buffers, offset)


def pwrite(fd: int, data: Buffer, offset: int) -> int:
    """As os.pwrite."""
    return pwritev(fd, [data], offset)


def pwrite_all(fd: int, data: Buffer, offset: int) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        count = pwritev(fd, [view], offset)
        view, offset = view[count:], offset + count


def ftruncate(fd: int, length: int) -> None:
    """As os.ftruncate."""
    _call("ftruncate", fd, length)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Change what is allocated for the range: see `program.fallocate`."""
    _call("fallocate", fd, mode, offset, length)


def fsync(fd: int) -> None:
    """As os.fsync."""
    _call("fsync", fd)


def fdatasync(fd: int) -> None:
    """As os.fdatasync."""
    _call("fdatasync", fd)


# ----------------------------------------------------------------------------------------------------------- the rest


def fstat(fd: int) -> os.stat_result:
    """As os.fstat."""
    return _stat_result(_call("fstat", fd))


def statx(fd: int) -> bytes:
    """The status of an open file as its server knows it now: struct statx."""
    return cast("bytes", _call("statx", fd))


def lseek(fd: int, offset: int, whence: int) -> int:
    """As os.lseek."""
    return cast("int", _call("lseek", fd, offset, whence))


def posix_fadvise(fd: int, offset: int, length: int, advice: int) -> None:
    """As os.posix_fadvise."""
    _call("posix_fadvise", fd, offset, length, advice)


def fcntl(fd: int, command: int, argument: bytes) -> bytes:
    """As fcntl.fcntl with a structure, which it returns as the kernel leaves it."""
    return cast("bytes", _call("fcntl", fd, command, argument))


def ioctl(fd: int, request: int, argument: bytes) -> bytes:
    """As fcntl.ioctl with a structure, which it returns as the kernel leaves it."""
    return cast("bytes", _call("ioctl", fd, request, argument))


def getxattr(fd: int, attribute: str) -> bytes:
    """As os.getxattr, of an open file."""
    return cast("bytes", _call("getxattr", fd, attribute))


def setxattr(fd: int, attribute: str, value: bytes) -> None:
    """As os.setxattr, of an open file."""
    _call("setxattr", fd, attribute, value)


def room(fd: int) -> tuple[int, int]:
    """See `program.room`."""
    free, size = _call("room", fd)
    return free, size


def holders(fd: int, programs: tuple[str, ...]) -> list[tuple[str, int]]:
    """See `program.holders`."""
    return cast("list[tuple[str, int]]", _call("holders", fd, programs))


def _stat_result(flat: program.Flat) -> os.stat_result:
    return os.stat_result(*flat)
