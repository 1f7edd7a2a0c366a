# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Looking at a path as the daemon's user, in a child that may hang: the store's server may be away, or refuse root."""

import grp
import json
import os
import pwd
import select
import signal
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

SECONDS = 5.0
"""A path that is not looked at by then hangs."""
_LONGEST = 64 << 10


@dataclass(frozen=True)
class User:
    """As whom to look."""

    uid: int
    gid: int

    @property
    def name(self) -> str:
        """For people."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return f"user {self.uid}"

    def groups(self) -> list[int]:
        """All groups that the user is in."""
        with suppress(KeyError):
            return os.getgrouplist(pwd.getpwuid(self.uid).pw_name, self.gid)
        return [self.gid]

    @property
    def may_be_taken(self) -> bool:
        """True if this process can look as that user."""
        return os.geteuid() in (0, self.uid)


@dataclass(frozen=True)
class Look:
    """What was seen of a path."""

    kind: str
    """dir, file, device, other; missing; hangs; error."""
    error: str = ""
    device: int = 0
    """The number of the file system it lies on."""
    owner: str = ""
    mode: int = 0
    may_read: bool = False
    """And search, where it is a directory."""
    may_write: bool = False
    read_only: bool = False
    """Mounted so at that place: the same file system may be mounted otherwise elsewhere."""
    free: int = 0
    """Bytes that the file system takes of that user."""
    size: int = 0


def look(path: str, user: User, seconds: float = SECONDS) -> Look:
    """What that user sees of a path. A child does it, and is left behind where it hangs."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _in_child(path, user, reading, writing)
    os.close(writing)
    try:
        said = _said(reading, time.monotonic() + seconds)
    finally:
        os.close(reading)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _reap(child)
    if said is None:
        return Look("hangs", f"no answer within {seconds:g} s")
    try:
        return Look(**json.loads(said))
    except (ValueError, TypeError):
        return Look("error", "it could not be looked at")


def _said(fd: int, deadline: float) -> bytes | None:
    """All that the child says; None where it does not end in time."""
    said = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([fd], [], [], left)[0]:
            break
        piece = os.read(fd, _LONGEST)
        if not piece:
            return said
        said += piece
    return None


def _reap(child: int) -> None:
    """Take the child away, if it has ended: one that hangs in the kernel ends when it can."""
    for _ in range(20):
        with suppress(ChildProcessError):
            if os.waitpid(child, os.WNOHANG)[0] == 0:
                time.sleep(0.005)
                continue
        return


def _in_child(path: str, user: User, reading: int, writing: int) -> None:
    """Look, say what was seen, and end, whatever happens."""
    try:
        os.close(reading)
        if os.geteuid() != user.uid:
            os.setgroups(user.groups())
            os.setgid(user.gid)
            os.setuid(user.uid)
        os.write(writing, json.dumps(seen(path)).encode())
    except BaseException:  # noqa: BLE001  (nothing of this copy of the process is to run on)
        os._exit(1)
    os._exit(0)


def seen(path: str) -> dict[str, Any]:
    """The fields of a Look."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return {"kind": "missing"}
    except OSError as error:
        return {"kind": "error", "error": error.strerror or str(error)}
    is_dir = stat.S_ISDIR(status.st_mode)
    found: dict[str, Any] = {
        "kind": _kind(status.st_mode),
        "device": status.st_dev,
        "owner": f"{_user(status.st_uid)}:{_group(status.st_gid)}",
        "mode": stat.S_IMODE(status.st_mode),
        "may_read": os.access(path, os.R_OK | (os.X_OK if is_dir else 0)),
        "may_write": os.access(path, os.W_OK),
    }
    with suppress(OSError):
        room = os.statvfs(path)
        found |= {"free": room.f_bavail * room.f_frsize, "size": room.f_blocks * room.f_frsize}
        found["read_only"] = bool(room.f_flag & os.ST_RDONLY)
    return found


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "dir"
    if stat.S_ISREG(mode):
        return "file"
    return "device" if stat.S_ISBLK(mode) else "other"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
