# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What root's commands do under STATE is done as the user that STATE belongs to.

STATE is the daemon's. Links, pipes and names in it may be whatever that user wants them to be, so root must not open,
make, give away or remove anything there. A command that works in STATE therefore becomes that user first (`as_owner`):
what it makes is the daemon's, and what was planted leads it nowhere but where that user could go alone. What root alone
can do (LVM, a file or a device outside) is done as root, at paths that root named (`as_root`).
"""

import contextlib
import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from forebay.errors import ForebayError

DAEMON_USER = "forebay"
"""Who gets a STATE that root's command has to make, where this host has the user."""

LONGEST_RECORD = 64 << 10
"""Bytes of a small file in STATE. The largest has a few hundred."""


@contextlib.contextmanager
def as_owner(state: Path) -> Iterator[None]:
    """Run the body as the user that STATE belongs to; as who runs it already, unless that is root.

    STATE is made where it is missing, if root runs this. Raises ForebayError where STATE lies in a place that others
    could put another in, and OSError.
    """
    if os.geteuid() != 0:
        yield
        return
    uid, gid = _owner(_made(state))
    if uid == 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups(_groups_of(uid, gid))
    os.setresgid(gid, gid, 0)
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


@contextlib.contextmanager
def as_root() -> Iterator[None]:
    """Within `as_owner`, run the body as root again; elsewhere as who runs it already."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 or os.getresuid()[2] != 0:
        yield
        return
    os.setresuid(0, 0, 0)
    os.setresgid(0, 0, 0)
    try:
        yield
    finally:
        os.setresgid(gid, gid, 0)
        os.setresuid(uid, uid, 0)


def check_not_roots(state: Path) -> None:
    """Raises ForebayError for a daemon that root runs on the STATE of another user, who could not use it afterwards."""
    if os.geteuid() == 0 and state.exists():
        uid, _ = _owner(state)
        if uid != 0:
            name = user_name(uid)
            raise ForebayError(
                f"{state} belongs to user {name}: run the daemon as that user (its unit does), or as root with "
                "another --state"
            )


# ---------------------------------------------------------------------------------------------------- whose it is


def user_name(uid: int) -> str:
    """The name of a user, or its number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _groups_of(uid: int, gid: int) -> list[int]:
    try:
        return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        return [gid]


def _made(state: Path) -> Path:
    """STATE, made for the daemon's user where it was not there."""
    if not state.exists():
        above = next(one for one in state.parents if one.exists())
        if not is_roots(above):
            return above  # its owner makes it
        state.mkdir(mode=0o700, parents=True)
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(DAEMON_USER)
            os.chown(state, user.pw_uid, user.pw_gid)
    return state


def _owner(path: Path) -> tuple[int, int]:
    """User and group of a directory. Raises ForebayError where others could put another into its place."""
    found = path.stat()
    above = _on_the_way(path)
    others = {one.stat().st_uid for one in above} - {0, found.st_uid}
    if others or any(_is_writable(one, 0o002) for one in above):
        raise ForebayError(
            f"{path} lies below a directory of another user, who could put another there: run this as "
            f"user {user_name(found.st_uid)}"
        )
    return found.st_uid, found.st_gid


def _on_the_way(path: Path) -> set[Path]:
    """The directories above, both of the path as it is written and of where its links lead."""
    return {*Path(os.path.abspath(path)).parents, *path.resolve().parents}


def _is_writable(directory: Path, whose: int) -> bool:
    """True if the mode lets these change names in the directory that are not theirs."""
    mode = directory.stat().st_mode
    return bool(mode & whose) and not mode & stat.S_ISVTX


def is_roots(directory: Path) -> bool:
    """True if nobody but root can change what the names on the way to a directory, and in it, stand for."""
    found = directory.stat()
    if found.st_uid or found.st_mode & 0o022:
        return False
    above = _on_the_way(directory)
    return not any(one.stat().st_uid or _is_writable(one, 0o022) for one in above)


# ------------------------------------------------------------------------------------------- what may be planted


def read_small(path: Path) -> bytes:
    """What a small file holds. Raises OSError, also for what is no file: a link, or a pipe, which nobody writes to."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        check_is_file(fd, path)
        return file.read(LONGEST_RECORD)


def check_is_file(fd: int, path: Path) -> None:
    """Raises OSError for what is no regular file, or has another name as well."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise OSError(0, "not a file of Forebay's: remove it", str(path))


def check_access(state: Path, paths: Iterable[Path]) -> None:
    """Raises ForebayError for the first path that this process may not read and write: whose it is, and what to do."""
    for path in paths:
        if os.access(path, os.R_OK | os.W_OK, effective_ids=True):
            continue
        try:
            owner = path.stat()
        except OSError:
            continue
        mine, where = user_name(os.geteuid()), path
        if path.is_relative_to(state):
            where = state
        raise ForebayError(
            f"{path} belongs to user {user_name(owner.st_uid)}, and this is user {mine}, who may not read and write "
            f"it: run 'chown -hR {mine}: {where}' as root, then start again"
        )
