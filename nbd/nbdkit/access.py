"""Who may use which disk through nbdkit: the rules file, and what is known of the client that asks."""

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
"""Where a client is; None: on this host, connected through a Unix socket."""

# nbdkit's functions for C plugins; its Python module has none that tells who the client is. They know the connection by
# the thread that calls.
SERVER = ctypes.CDLL(None)


class RefusedError(Exception):
    """A client may not have what it asked for; the text is for nbdkit's log, the client gets an error number."""


@dataclass(frozen=True)
class Rule:
    """These disks (shell patterns) for these peers (networks; None: Unix sockets)."""

    exports: tuple[str, ...]
    peers: tuple[Network | None, ...]
    read_only: bool

    def fits(self, name: str, peer: Peer) -> bool:
        """Whether the rule speaks of this disk and this peer."""
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exports):
            return False
        if peer is None:
            return None in self.peers
        return any(network is not None and peer in network for network in self.peers)


class Rules:
    """Who may use which disk: the rules file, read again when it has changed.

    A disk that no rule gives to a peer does not exist for it. Where several rules fit, the one that grants most holds.
    While the file is missing or wrong nobody new gets in.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version: tuple[int, ...] = ()
        self._rules: list[Rule] = []

    def load(self) -> list[Rule]:
        """The rules as the file has them now. Raises OSError, or ValueError with the file and the fault."""
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

    def access(self, name: str, peer: Peer) -> Rule | None:
        """The rule that gives `name` to `peer`, or None. Raises as load()."""
        fitting = [rule for rule in self.load() if rule.fits(name, peer)]
        return min(fitting, key=lambda rule: rule.read_only, default=None)


def parse_rules(content: dict[str, Any]) -> list[Rule]:
    """Rules from the file's content. Raises ValueError that names the faulty rule."""
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
    """One [[allow]] table. Raises ValueError."""
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


def peer() -> Peer:
    """The address of the client that this thread serves. Raises RefusedError when it has none that rules can name."""
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
