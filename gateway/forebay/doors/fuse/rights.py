# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The right to mount, which the process that serves gives up once the mount is there.

What reads requests and talks to the daemon needs no right but those of the daemon's user. To unmount takes the right to
mount, so a small child keeps it: it reads one byte at a time from a socket, knows three orders, and takes no path and
no number from anybody. It ends with the process that serves.
"""

import contextlib
import ctypes
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN, LAST_CAPABILITY = 1, 2, 21, 63

_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
_CAPABILITY_VERSION_3 = 0x20080522

_DONE, _FAILED = b"1", b"0"

_libc = ctypes.CDLL(None, use_errno=True)


def may_mount() -> bool:
    """True if this process may mount by itself; an ordinary user has fusermount3 for that."""
    return bool(_effective() >> CAP_SYS_ADMIN & 1)


def _effective() -> int:
    """The capabilities that are in effect, a bit each."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("CapEff:")).split()[1], 16)


class Keeper:
    """The child that keeps the right to mount at `where`. To be started before there are threads."""

    def __init__(self, where: Path, tune: Callable[[], None]) -> None:
        """`tune` is called in the child when the mount answers."""
        self._ours, its = socket.socketpair()
        self._lock = threading.Lock()
        child = os.fork()
        if not child:
            self._ours.close()
            _keep(its, where, tune)
        its.close()

    def _ask(self, order: bytes) -> bool:
        with self._lock, contextlib.suppress(OSError):
            self._ours.sendall(order)
            return self._ours.recv(1) == _DONE
        return False

    def wait_mounted(self) -> bool:
        """Return when the mount answers, and is tuned. Blocks. False if the child has failed."""
        return self._ask(b"t")

    def unmount(self) -> bool:
        """Unmount while requests are still answered. Blocks. False where files are open."""
        return self._ask(b"u")

    def cut_off(self) -> bool:
        """Take the mount away, whether or not files are open. Blocks."""
        return self._ask(b"d")


def _keep(orders: socket.socket, where: Path, tune: Callable[[], None]) -> NoReturn:
    """The life of the child."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the one that serves says when
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
        _set_capabilities(1 << CAP_SYS_ADMIN)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        while order := orders.recv(1):
            orders.sendall(_DONE if _obey(order, where, tune) else _FAILED)
        code = 0
    finally:
        os._exit(code)


def _obey(order: bytes, where: Path, tune: Callable[[], None]) -> bool:
    if order == b"t":
        with contextlib.suppress(OSError):
            os.stat(where)  # returns when it is served
            tune()
        return True
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if order == b"d" else 0)
    return bool(_libc.umount2(os.fsencode(where), flags) == 0)


def drop(run: Path) -> None:
    """Become the user that RUN belongs to, and give up every right; as root, all but to read what others own.

    To be called before there are threads. Raises OSError.
    """
    owner = run.stat() if run.exists() else os.stat("/")
    kept = 0
    if os.geteuid() == 0 and owner.st_uid:
        _drop_bounding()
        os.setgroups(_groups(owner.st_uid, owner.st_gid))
        os.setresgid(owner.st_gid, owner.st_gid, owner.st_gid)
        os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)
    elif os.geteuid() == 0:  # so runs the daemon: sockets and stores may be others'
        _drop_bounding()
        kept = 1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _set_capabilities(kept)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _groups(uid: int, gid: int) -> list[int]:
    import pwd  # noqa: PLC0415

    try:
        return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        return [gid]


def _drop_bounding() -> None:
    for number in range(LAST_CAPABILITY + 1):
        _libc.prctl(
            _PR_CAPBSET_DROP, number, 0, 0, 0
        )  # fails for those that this kernel does not know


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")


def _set_capabilities(kept: int) -> None:
    """Have these capabilities, and no others, permitted and in effect: capset(2)."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    if _libc.capset(header, data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"capset: {os.strerror(number)}")
