# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Who is at the other end of a Unix socket, by what the kernel says of them, and whether they may be there.

The file mode of a socket keeps others from connecting, as long as it is what we made it. This asks again at each
connection: a socket that somebody made writable for all, by a recursive chmod, a bind mount or a backup restored over
it, still lets nobody in that the configuration does not name.
"""

import errno
import grp
import os
import pwd
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from forebay.config.sections import GatewaySection

GROUP_MARK = "@"
"""In `socket_peers`, what a group's name begins with."""

_CREDENTIALS = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""

_SO_PEERGROUPS = 59
"""asm-generic/socket.h, since Linux 4.13."""

_GROUPS_BYTES = 1024
"""The most that getsockopt() of Python reads: 256 groups."""

QEMU_CONF = Path("/etc/libvirt/qemu.conf")
"""Where libvirt says which user runs QEMU."""

QEMU_USERS = ("libvirt-qemu", "qemu")
"""Which user does where that file names none: on Debian and its like, on Fedora and its like."""

_SO_PEERSEC = 31
"""asm-generic/socket.h."""

_LABEL_BYTES = 1024
"""The most that getsockopt() of Python reads. Labels of domains have 60."""

_MODE_BEHIND = re.compile(r" \((enforce|complain|kill|prompt|user|mixed)\)\Z")
"""What AppArmor puts behind a label."""

_GROUP_MAY, _OTHERS_MAY = 0o020, 0o002


class Connected(Protocol):
    """A connected Unix socket, Python's or trio's."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """See socket(7)."""


@dataclass(frozen=True)
class Peer:
    """A process as it was when it connected."""

    pid: int
    uid: int
    groups: frozenset[int]

    @classmethod
    def of(cls, sock: Connected) -> Self:
        """The one that is connected to us. Raises OSError."""
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, gid = _CREDENTIALS.unpack(raw)
        return cls(pid, uid, frozenset((gid, *_groups(sock, uid, gid))))

    def __str__(self) -> str:
        return f"process {self.pid} of user {self.uid}"


def _groups(sock: Connected, uid: int, gid: int) -> list[int]:
    """The supplementary groups of the process; where these are more than 256, the groups that its user is in."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError as error:
        if error.errno not in (errno.ERANGE, errno.ENOPROTOOPT):
            raise
        try:
            return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
        except KeyError:
            return []
    return [group for (group,) in struct.iter_unpack("I", raw)]


def qemu_user(configuration: Path = QEMU_CONF) -> int | None:
    """The user that libvirt runs QEMU as; None where it cannot be known: libvirt's file is absent, or root's alone."""
    try:
        text = configuration.read_text(errors="replace")
    except OSError:
        return None
    named = re.findall(r'^\s*user\s*=\s*"\+?([^"]*)"', text, re.MULTILINE)
    if named and named[-1].isdecimal():
        return int(named[-1])
    known = [one.pw_uid for one in pwd.getpwall() if one.pw_name in (named[-1:] or QEMU_USERS)]
    return known[0] if len(known) == 1 else None


def label_of(sock: Connected) -> str | None:
    """The security label of the process that connected; None where the kernel has none, or does not tell."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERSEC, _LABEL_BYTES)
    except OSError:
        return None
    return _MODE_BEHIND.sub("", raw.rstrip(b"\0").decode(errors="replace")) or None


@dataclass(frozen=True)
class Admission:
    """Who may connect to a socket. Root and the daemon's own user always may: they could do as they like anyway."""

    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    everybody: bool = False
    doors: int | None = None
    """The group of programs that may use a disk beside the VM that has it."""

    @classmethod
    def to_disks(cls, section: GatewaySection) -> Self:
        """Those whom `socket_peers` names; without it QEMU's user, if the configuration says nothing of the sockets and
        libvirt's can be read; else those whom owner, group and mode of the sockets let in.

        Raises KeyError for a user or group that this host does not have.
        """
        doors = _group(section.door_group) if section.door_group else None
        if section.socket_peers is not None:
            names = section.socket_peers
            return cls(
                frozenset(_user(name) for name in names if not name.startswith(GROUP_MARK)),
                frozenset(
                    _group(name.removeprefix(GROUP_MARK))
                    for name in names
                    if name.startswith(GROUP_MARK)
                ),
                doors=doors,
            )
        if not section.model_fields_set & {"socket_owner", "socket_group", "socket_mode"}:
            user = qemu_user()
            if user is not None:
                return cls(frozenset([user]), doors=doors)
        owner, group = section.socket_owner, section.socket_group
        return cls(
            frozenset([_user(owner)] if owner else []),
            frozenset(
                [_group(group) if group else os.getegid()]
                if section.socket_mode & _GROUP_MAY
                else []
            ),
            bool(section.socket_mode & _OTHERS_MAY),
            doors,
        )

    @classmethod
    def to_control(cls, group: str | None) -> Self:
        """The members of `control_group`. Raises KeyError for a group that this host does not have."""
        return cls(groups=frozenset([_group(group)] if group else []))

    def refused(self, sock: Connected) -> Peer | None:
        """The peer of a connection, if it may not be connected; None if it may. Raises OSError."""
        peer = Peer.of(sock)
        return None if self.admits(peer) else peer

    def admits(self, peer: Peer) -> bool:
        """True if the process may be connected."""
        known = peer.uid in self.users or peer.groups & self.groups
        return bool(self.everybody or known or _may_always(peer))

    def is_door(self, peer: Peer) -> bool:
        """True if the process may use a disk beside the VM that has it: a door, or one that could read it anyway."""
        return _may_always(peer) or self.doors in peer.groups


def _may_always(peer: Peer) -> bool:
    """True for root and the daemon's own user, who can read the cache and the images as well."""
    return peer.uid in (0, os.geteuid())


def _user(name: str) -> int:
    return pwd.getpwnam(name).pw_uid


def _group(name: str) -> int:
    return grp.getgrnam(name).gr_gid
