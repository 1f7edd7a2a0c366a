# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The program of a store's process, and the calls that it makes; the daemon makes the same ones on local files.

Started by `process.py` as a file of its own: it imports nothing but the standard library, to be there in milliseconds
and to stay small. `main` first locks a file, which the store's process of the last daemon keeps locked until all that
it had begun has ended: what hung there cannot land on top of what is written now. Then it takes lines: each is a socket
and a piece of shared memory, for one call at a time, and has a thread. When the daemon ends, in whatever way, its end
of the control socket closes. This process ends then, too; the kernel closes its descriptors, and that takes as long as
the store does.

It may start servers as well (server.py), whose files it has open: it is their parent then, and ends with them.

A request is `HEAD` (bytes that follow), then `marshal` of (name of the call, arguments, keyword arguments). A reply is
the same with (True, result), or (False, errno, text, file name). Data to read or write lies in the shared memory.

Python has no wrapper for fallocate's modes, statx or openat2: those go through the C library. Sources: fallocate(2),
statx(2), openat2(2), linux/fs.h.
"""

import contextlib
import ctypes
import errno
import fcntl
import marshal
import mmap
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

HEAD = struct.Struct("<I")

SHARED = 1 << 20
"""Bytes of the shared memory of one line, and most that one call reads or writes."""

LOCK_SECONDS = 0.02
"""Between two looks whether the process before has ended."""

ENDED = "forebay: the process of this store has ended"

LINE, SERVER = b"L", b"S"
"""The first byte of what comes over the control socket: a new line, or a server to be started."""

LONGEST_MESSAGE = 64 << 10
"""Bytes of it, at most."""

LISTENING = "@LISTENING@"
"""What stands in the command of a server for the number of a descriptor."""

SERVER_LIMITS = (
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_AS, 4 << 30),
    (resource.RLIMIT_NOFILE, 256),
)
"""Bytes of a core file and of address space, and descriptors, that a server may have."""

PROGRAM_FILES = (
    *("/usr", "/lib", "/lib64", "/nix"),
    *("/etc/ld.so.cache", "/etc/ld.so.preload", "/dev/null"),
)
"""What programs are made of."""

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 444, 445, 446
_EXECUTE, _WRITE, _READ, _LIST, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_FILES_OF = ((1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 15) - 1, (1 << 16) - 1)
"""The rights on files that each version of Landlock knows."""

_AT_EMPTY_PATH = 0x1000
_AT_STATX_FORCE_SYNC = 0x2000
_STATX_BASIC_STATS = 0x07FF
_STATX_SIZE = 256
_SYS_OPENAT2 = 437  # the same number on every architecture but alpha (openat2(2), since Linux 5.6)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.statx.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_char_p,
)

Flat = tuple[tuple[float, ...], dict[str, Any]]
"""The arguments of os.stat_result, which itself cannot be sent."""


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def openat2(root: int, path: str, flags: int, resolve: int) -> int:
    """A new descriptor of `path` below `root`. Raises OSError."""
    how = _OpenHow(flags, 0, resolve)
    found = int(
        _libc.syscall(_SYS_OPENAT2, root, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
    )
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return found


def statx(fd: int) -> bytes:
    """The status of an open file as its server knows it now: struct statx. Raises OSError.

    AT_STATX_FORCE_SYNC because plain fstat on NFS answers from a cache that lags seconds behind.
    """
    found = ctypes.create_string_buffer(_STATX_SIZE)
    flags = _AT_EMPTY_PATH | _AT_STATX_FORCE_SYNC
    if _libc.statx(fd, b"", flags, _STATX_BASIC_STATS, found) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return found.raw


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Change what is allocated for the range. Raises OSError."""
    while _libc.fallocate64(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _flat(found: os.stat_result) -> Flat:
    flat: Flat = found.__reduce__()[1]  # type: ignore[assignment]
    return flat


def _fstat(fd: int) -> Flat:
    return _flat(os.fstat(fd))


def _stat(path: str, **how: Any) -> Flat:
    return _flat(os.stat(path, **how))


def room(fd: int) -> tuple[int, int]:
    """Bytes that a file system still takes of this user's, and that it has in all. Raises OSError."""
    found = os.statvfs(fd)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def holders(fd: int, programs: tuple[str, ...]) -> list[tuple[str, int]]:
    """Who has the open file open as well: name and pid of the programs of this host whose name begins so.

    The pid is 0 for another descriptor of this process. What this user may not see is left out.
    """
    image = os.fstat(fd)
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if pid == str(os.getpid()):
                if _open_at(pid, image) - {fd}:
                    found.append(("", 0))
            elif (name := _name(pid)).startswith(programs) and _open_at(pid, image):
                found.append((name, int(pid)))
    return found


def _name(pid: str) -> str:
    """The name of the process's program. Raises OSError."""
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        return file.read().strip()


def _open_at(pid: str, image: os.stat_result) -> set[int]:
    """The numbers of the descriptors that the process has of the file. Raises OSError."""
    found = set()
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), image):
                found.add(int(number))
    return found


def _fcntl(fd: int, command: int, argument: bytes) -> bytes:
    return fcntl.fcntl(fd, command, argument)


def _ioctl(fd: int, request: int, argument: bytes) -> bytes:
    return fcntl.ioctl(fd, request, argument)


OF_OS = {"close", "fdatasync", "fsync", "ftruncate", "link", "listdir", "lseek", "mkdir", "open"}
OF_OS |= {"getxattr", "posix_fadvise", "read", "readlink", "rename", "rmdir", "setxattr"}
OF_OS |= {"symlink", "unlink"}
"""Calls that are functions of `os`."""

OTHERS: dict[str, Callable[..., Any]] = {
    "fallocate": fallocate,
    "fcntl": _fcntl,
    "fstat": _fstat,
    "holders": holders,
    "ioctl": _ioctl,
    "openat2": openat2,
    "room": room,
    "stat": _stat,
    "statx": statx,
}
"""The other calls, by name. `preadv` and `pwritev` are made on the shared memory of the line."""


def make(name: str, *args: Any, **how: Any) -> Any:
    """Make the call of that name. Raises OSError."""
    if name in OF_OS:
        return getattr(os, name)(*args, **how)
    return OTHERS[name](*args, **how)


class Line:
    """This end of a line: a connected stream socket, and the memory shared with the other end."""

    def __init__(self, sock: socket.socket, memory: int) -> None:
        """Take over both descriptors."""
        self.sock = sock
        self.memory = memoryview(mmap.mmap(memory, SHARED))
        os.close(memory)

    def send(self, what: Any) -> None:
        """Send one request or reply. Raises OSError."""
        body = marshal.dumps(what)
        self.sock.sendall(HEAD.pack(len(body)) + body)

    def receive(self) -> Any:
        """The next one. Raises ConnectionError when the other end is gone."""
        (length,) = HEAD.unpack(self._exactly(HEAD.size))
        return marshal.loads(self._exactly(length))  # noqa: S302  (from the other half of this program)

    def _exactly(self, length: int) -> bytes:
        found = self.sock.recv(length, socket.MSG_WAITALL)
        while len(found) < length:
            more = self.sock.recv(length - len(found), socket.MSG_WAITALL)
            if not more:
                raise ConnectionError(ENDED)
            found += more
        return found

    def serve(self) -> None:
        """Make calls until the other end is gone."""
        with contextlib.suppress(OSError):
            while True:
                name, args, how = self.receive()
                self.send(self._outcome(name, args, how))

    def _outcome(self, name: str, args: tuple[Any, ...], how: dict[str, Any]) -> tuple[object, ...]:
        try:
            return True, self._make(name, args, how)
        except OSError as error:
            return False, error.errno or errno.EIO, error.strerror or str(error), error.filename
        except Exception as fault:  # noqa: BLE001  (it is told to whoever asked)
            return False, errno.EIO, f"{name}: {type(fault).__name__}: {fault}", None

    def _make(self, name: str, args: tuple[Any, ...], how: dict[str, Any]) -> object:
        if name == "preadv":
            fd, length, offset = args
            return os.preadv(fd, [self.memory[:length]], offset)
        if name == "pwritev":
            fd, length, offset = args
            return os.pwritev(fd, [self.memory[:length]], offset)
        return make(name, *args, **how)


def main(control: int, lock: int) -> None:
    """Serve the lines that come over the control socket, until its other end closes."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the daemon, not before
    sock = socket.socket(fileno=control)
    _wait_for_lock(sock, lock)
    servers: list[subprocess.Popen[bytes]] = []
    while True:
        message, fds, _, _ = socket.recv_fds(sock, LONGEST_MESSAGE, 2)
        if len(fds) != 2:
            _end(servers)
            os._exit(0)
        if message[:1] == SERVER:
            servers += _start(marshal.loads(message[1:]), *fds)  # noqa: S302  (as in `receive`)
            continue
        line = Line(socket.socket(fileno=fds[0]), fds[1])
        threading.Thread(target=line.serve, daemon=True).start()


def _start(
    what: tuple[list[str], list[int], list[int], list[str]], listening: int, errors: int
) -> list[subprocess.Popen[bytes]]:
    """Start a server; what it, or we, have to say against that goes to the file `errors`. None where it cannot start.

    `what` is the command, in which LISTENING stands for the descriptor of the socket at which it is to listen; the
    descriptors of the files that it may read, and those that it may write as well; and the paths of what it needs for
    the network, if it does. It is ended when we are.
    """
    command, reads, writes, network = what
    command = [part.replace(LISTENING, str(listening)) for part in command]
    try:
        return [
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(listening, *reads, *writes),
                preexec_fn=lambda: confine(reads, writes, network),  # noqa: PLW1509  (no thread of ours is needed in it)
                cwd="/",
            )
        ]
    except (OSError, subprocess.SubprocessError) as fault:
        os.write(errors, str(fault).encode())
        return []
    finally:
        os.close(listening)
        os.close(errors)


def _end(servers: list[subprocess.Popen[bytes]]) -> None:
    """Have all servers end, and return when they have: what they still have in memory is in their files then."""
    for server in servers:
        server.terminate()
    for server in servers:
        server.wait()


def confine(reads: list[int], writes: list[int], network: Sequence[str] = ()) -> None:
    """Take from this process, which is about to become a server, all that it does not need.

    It ends when its parent does; it has no privileges to gain, no core file, bounded memory and descriptors, and is
    ended before the daemon where memory runs out. Where the kernel has Landlock, it may open these files and what
    programs need, and no others, and (since Linux 6.7) neither listen nor connect over TCP. With `network`, it may
    connect, and read what lies at these paths. Source: prctl(2), landlock(7), linux/landlock.h.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for kind, most in SERVER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # the unit's filter, or a lower limit
            resource.setrlimit(kind, (most, most))
    with contextlib.suppress(OSError):
        badness = os.open("/proc/self/oom_score_adj", os.O_RDWR)
        if int(os.pread(badness, 16, 0)) < 0:  # of the daemon, after which this is to go
            os.write(badness, b"0")
        os.close(badness)
    version = int(_libc.syscall(_SYS_LANDLOCK_CREATE, None, 0, 1))
    if version < 1:
        return
    files = _FILES_OF[min(version, len(_FILES_OF)) - 1]
    net, scoped = (1 if network else 3, 3 if version >= 6 else 0) if version >= 4 else (0, 0)
    length = 8 if version < 4 else 16 if version < 6 else 24
    handled = struct.pack("=QQQ", files, net, scoped)[:length]
    rules = int(_libc.syscall(_SYS_LANDLOCK_CREATE, handled, len(handled), 0))
    if rules < 0:
        return
    for path in (*PROGRAM_FILES, *network):
        with contextlib.suppress(OSError):  # not every system has them all
            fd = os.open(path, os.O_PATH)
            more = _LIST | _EXECUTE if os.path.isdir(path) else _WRITE if path == os.devnull else 0
            _allow(rules, (_READ | more) & files, fd)
            os.close(fd)
    for fd in reads:
        _allow(rules, _READ, fd)
    for fd in writes:
        _allow(rules, (_READ | _WRITE | _TRUNCATE) & files, fd)
    _libc.syscall(_SYS_LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def _allow(rules: int, access: int, fd: int) -> None:
    """Add to a ruleset that what lies at, or beneath, the open file may be accessed so."""
    _libc.syscall(_SYS_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", access, fd), 0)


def _wait_for_lock(sock: socket.socket, lock: int) -> None:
    """Return when the lock is ours; end the process when the daemon ends meanwhile."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if poll.poll(1000 * LOCK_SECONDS):
            os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
