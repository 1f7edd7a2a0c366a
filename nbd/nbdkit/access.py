# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Who may use which disk through nbdkit: the rules file, and the address of the client that asks."""

import ctypes
import fnmatch
import ipaddress
import os
import socket
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Peer = ipaddress.IPv4Address | ipaddress.IPv6Address | None
"""The address of a client; None if it is on this host and connected through a Unix socket."""

SERVER = ctypes.CDLL(None)
"""nbdkit's functions for C plugins, since its Python module has none that tells who the client is. They know the
connection by the thread that calls."""


class RefusedError(Exception):
    """A client may not have what it asked for. The text goes to nbdkit's log; the client gets an error number only."""


@dataclass(frozen=True)
class Rule:
    """One [[allow]] table of the rules file: it gives disks to peers."""

    exports: tuple[str, ...]
    """Names of disks, as shell patterns."""
    peers: tuple[Network | None, ...]
    """Networks of clients; None stands for Unix sockets."""
    read_only: bool

    def is_for(self, name: str, peer: Peer) -> bool:
        """True if the rule gives the disk `name` to this peer."""
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exports):
            return False
        if peer is None:
            return None in self.peers
        return any(network is not None and peer in network for network in self.peers)


class Rules:
    """The rules file, which is read again whenever it has changed.

    A disk that no rule gives to a peer does not exist for that peer. While the file is missing or wrong, no new
    connection is allowed; those that exist are not closed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version: tuple[int, ...] = ()
        """Inode, size and times of the file when it was read last."""
        self._rules: list[Rule] = []

    def load(self) -> list[Rule]:
        """The rules that the file has now. Raises OSError, or ValueError that names the file and says what is wrong."""
        with self.path.open("rb") as file:
            stat = os.fstat(file.fileno())
            version = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            if version != self._version:
                try:
                    self._rules = parse_rules(tomllib.load(file))
                except ValueError as error:  # also what tomllib raises
                    raise ValueError(f"{self.path}: {error}") from error
                self._version = version
        return self._rules

    def rule_for(self, name: str, peer: Peer) -> Rule | None:
        """The rule that gives `name` to `peer`, or None; of several, one that allows writing. Raises as load()."""
        found = [rule for rule in self.load() if rule.is_for(name, peer)]
        return min(found, key=lambda rule: rule.read_only, default=None)


def parse_rules(content: dict[str, Any]) -> list[Rule]:
    """The rules of a file whose TOML is `content`. Raises ValueError that says which rule is wrong, and why."""
    tables = content.get("allow", [])
    if set(content) - {"allow"} or not isinstance(tables, list):
        raise ValueError("only [[allow]] tables may stand here")
    rules = []
    for number, table in enumerate(tables, 1):
        try:
            rules.append(parse_rule(table))
        except ValueError as error:
            raise ValueError(f"rule {number}: {error}") from error
    return rules


def parse_rule(table: dict[str, Any]) -> Rule:
    """The rule of one [[allow]] table. Raises ValueError that says what is wrong."""
    unknown = set(table) - {"exports", "peers", "read_only"}
    if unknown:
        raise ValueError(
            f"unknown key {min(unknown)!r}: a rule has exports, peers and maybe read_only"
        )
    for key in ("exports", "peers"):
        value = table.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(x, str) for x in value):
            raise ValueError(f"{key} has to be a list of one or more strings")
    read_only = table.get("read_only", False)
    if not isinstance(read_only, bool):
        raise ValueError("read_only has to be true or false")  # noqa: TRY004
    peers = tuple(None if x == "unix" else ipaddress.ip_network(x) for x in table["peers"])
    return Rule(tuple(table["exports"]), peers, read_only)


def current_peer() -> Peer:
    """The address of the client that this thread serves. Raises RefusedError if it has none that rules can name."""
    address = ctypes.create_string_buffer(128)  # sizeof(struct sockaddr_storage)
    length = ctypes.c_uint32(len(address))
    if SERVER.nbdkit_peer_name(address, ctypes.byref(length)):
        raise RefusedError("the client's address is not known")
    family = int.from_bytes(address.raw[:2], sys.byteorder)
    if family == socket.AF_UNIX:
        return None
    if family == socket.AF_INET:
        return ipaddress.IPv4Address(address.raw[4:8])
    if family == socket.AF_INET6:
        found = ipaddress.IPv6Address(address.raw[8:24])
        return found.ipv4_mapped or found
    raise RefusedError(f"no rule can name a peer of address family {family}")
