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
import socket
import struct
from dataclasses import dataclass
from typing import Protocol, Self

from forebay.config.model import GatewaySection

GROUP_MARK = "@"
"""In `socket_peers`, what a group's name begins with."""

_CREDENTIALS = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""

_SO_PEERGROUPS = 59
"""asm-generic/socket.h, since Linux 4.13."""

_GROUPS_BYTES = 1024
"""The most that getsockopt() of Python reads: 256 groups."""

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


@dataclass(frozen=True)
class Admission:
    """Who may connect to a socket. Root and the daemon's own user always may: they could do as they like anyway."""

    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    everybody: bool = False

    @classmethod
    def to_disks(cls, section: GatewaySection) -> Self:
        """Those whom `socket_peers` names; without it, those whom owner, group and mode of the sockets let in.

        Raises KeyError for a user or group that this host does not have.
        """
        if section.socket_peers is not None:
            return cls(
                frozenset(
                    pwd.getpwnam(name).pw_uid
                    for name in section.socket_peers
                    if not name.startswith(GROUP_MARK)
                ),
                frozenset(
                    grp.getgrnam(name.removeprefix(GROUP_MARK)).gr_gid
                    for name in section.socket_peers
                    if name.startswith(GROUP_MARK)
                ),
            )
        owner, group = section.socket_owner, section.socket_group
        group_id = grp.getgrnam(group).gr_gid if group else os.getegid()
        return cls(
            frozenset([pwd.getpwnam(owner).pw_uid] if owner else []),
            frozenset([group_id] if section.socket_mode & _GROUP_MAY else []),
            bool(section.socket_mode & _OTHERS_MAY),
        )

    @classmethod
    def to_control(cls, group: str | None) -> Self:
        """The members of `control_group`. Raises KeyError for a group that this host does not have."""
        return cls(groups=frozenset([grp.getgrnam(group).gr_gid] if group else []))

    def refused(self, sock: Connected) -> Peer | None:
        """The peer of a connection, if it may not be connected; None if it may. Raises OSError."""
        peer = Peer.of(sock)
        known = peer.uid in (0, os.geteuid()) or peer.uid in self.users
        return None if self.everybody or known or peer.groups & self.groups else peer
