"""nbdkit plugin (Python, API version 2): the daemon's disks for clients on other hosts.

    nbdkit --tls=require --tls-certificates=DIR --tls-verify-peer python plugin.py rules=FILE [run=DIR] ...

nbdkit does TCP, TLS and filters. This plugin says who may use which disk (access.py), and passes requests on to the
disk's own socket in RUN/disks (links.py). README.md beside it is the manual. It runs in the interpreter that nbdkit
embeds, and needs nothing but the standard library and libnbd's Python binding.
"""

import contextlib
import itertools
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).absolute().parent))  # nbdkit adds no directory of its own

import nbd
from access import SERVER, Peer, RefusedError, Rules, peer
from links import CONTEXT, NAME, Disk, Disks, Traits

import nbdkit

if not hasattr(nbd, "NBD"):  # the folder nbd/ of a checkout
    raise ImportError("libnbd's Python binding is missing: install python3-libnbd")

API_VERSION = 2

MOST_PAYLOAD = 32 << 20
"""Bytes of one READ or WRITE that the daemon takes. nbdkit takes 64 MiB from its clients."""


# -- the start --------------------------------------------------------------------------------------------------------


class Settings:
    """The plugin's parameters, as `key=value` on nbdkit's command line, and what is made of them."""

    run = Path("/run/forebay")
    reconnect = 30.0  # seconds
    insecure = False
    rules: Rules
    disks: Disks

    def take(self, key: str, value: str) -> None:
        """One parameter. Raises ValueError."""
        if key == "run":
            self.run = Path(value).absolute()
        elif key == "rules":
            self.rules = Rules(Path(value).absolute())
        elif key == "reconnect":
            self.reconnect = float(value)
            if not 0 <= self.reconnect <= 3600:
                raise ValueError(f"reconnect={value}: seconds, from 0 to 3600")
        elif key == "insecure":
            if value not in {"true", "false"}:
                raise ValueError(f"insecure={value}: true or false")
            self.insecure = value == "true"
        else:
            raise ValueError(f"{key}: unknown parameter; there are rules, run, reconnect, insecure")

    def complete(self) -> None:
        """All parameters are there. Raises ValueError, OSError."""
        if not hasattr(self, "rules"):
            raise ValueError("rules=FILE is missing: it says who may use which disk")
        self.rules.load()
        self.disks = Disks(self.run, self.reconnect)


SETTINGS = Settings()


def check_server(arguments: list[str], families: set[int]) -> None:
    """Raise ValueError unless nbdkit asks clients on the network who they are.

    `arguments` are its command line's, `families` the address families that it listens on.
    """
    if families <= {socket.AF_UNIX}:
        return
    pairs = [f"{one}={two}" for one, two in itertools.pairwise(arguments)]
    if "--tls=require" not in arguments + pairs:
        raise ValueError(
            "on TCP nbdkit needs --tls=require; insecure=true lets everybody on the wire read along"
        )
    if not any(x == "--tls-verify-peer" or x.startswith("--tls-psk") for x in arguments):
        raise ValueError(
            "nbdkit needs --tls-verify-peer or --tls-psk=FILE, otherwise it takes clients that show no certificate "
            "at all; insecure=true allows that"
        )


def listening_families() -> set[int]:
    """The address families of the sockets that this process listens on."""
    families = set()
    for entry in os.listdir("/proc/self/fd"):
        # most are no sockets, and one is that of the listing itself
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry))) as sock:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                families.add(int(sock.family))
    return families


def config(key: str, value: str) -> None:
    SETTINGS.take(key, value)


def config_complete() -> None:
    SETTINGS.complete()


def thread_model() -> int:
    """Requests that wait for an origin must not hold up others; README.md has the figures."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def after_fork() -> None:
    if not SETTINGS.insecure:
        arguments = Path("/proc/self/cmdline").read_text(errors="replace").split("\0")
        check_server(arguments, listening_families())


# -- connections ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Client:
    """One connection of a client: the handle that nbdkit passes to the functions below."""

    disk: Disk
    read_only: bool

    @property
    def traits(self) -> Traits:
        """What the disk can do."""
        return self.disk.traits


def trusted_peer(is_tls: bool) -> Peer:
    """Where the client is. Raises RefusedError when others could read along, or speak in its place."""
    found = peer()
    if found is not None and not is_tls and not SETTINGS.insecure:
        raise RefusedError(f"{found} came without TLS: start nbdkit with --tls=require")
    return found


def list_exports(readonly: int, is_tls: int) -> list[str]:  # noqa: ARG001
    """The disks that this client may use."""
    found = trusted_peer(bool(is_tls))
    return [name for name in SETTINGS.disks.names() if SETTINGS.rules.access(name, found)]


def open(readonly: int) -> Client:
    name = nbdkit.export_name()
    found = trusted_peer(SERVER.nbdkit_is_tls() == 1)
    who = "a client on this host" if found is None else str(found)
    if not name:
        raise RefusedError(f"{who} asked for the default export: there is none, name a disk")
    if not NAME.fullmatch(name):
        raise RefusedError(f"{who} asked for {name[:64]!r}: no disk has such a name")
    rule = SETTINGS.rules.access(name, found)
    if rule is None:
        raise RefusedError(f"{who} asked for {name}: no rule in {SETTINGS.rules.path} allows it")
    try:
        disk = SETTINGS.disks.enter(name)
    except nbd.Error as error:
        raise RefusedError(f"{who} asked for {name}: {error.string}") from None
    nbdkit.debug(f"{who} opens {name}")
    return Client(disk, bool(readonly) or rule.read_only or disk.traits.read_only)


def close(h: Client) -> None:
    SETTINGS.disks.leave(h.disk)


def get_size(h: Client) -> int:
    return h.traits.size


def block_size(h: Client) -> tuple[int, int, int]:
    return h.traits.block_size


def is_rotational(h: Client) -> bool:
    return h.traits.rotational


def can_multi_conn(h: Client) -> bool:
    return h.traits.multi_conn


def can_write(h: Client) -> bool:
    return not h.read_only


def can_flush(h: Client) -> bool:
    return h.traits.flush


def can_fua(h: Client) -> int:
    return int(nbdkit.FUA_NATIVE if h.traits.fua else nbdkit.FUA_EMULATE)


def can_trim(h: Client) -> bool:
    return h.traits.trim


def can_zero(h: Client) -> bool:
    return h.traits.zero


def can_fast_zero(h: Client) -> bool:
    return h.traits.fast_zero


def can_cache(h: Client) -> int:
    return int(nbdkit.CACHE_NATIVE if h.traits.cache else nbdkit.CACHE_NONE)


def can_extents(h: Client) -> bool:
    return h.traits.extents


# -- requests ---------------------------------------------------------------------------------------------------------


def nbd_flags(flags: int) -> int:
    """The protocol's flags for nbdkit's."""
    return (
        (nbd.CMD_FLAG_FUA if flags & nbdkit.FLAG_FUA else 0)
        | (nbd.CMD_FLAG_REQ_ONE if flags & nbdkit.FLAG_REQ_ONE else 0)
        | (nbd.CMD_FLAG_FAST_ZERO if flags & nbdkit.FLAG_FAST_ZERO else 0)
    )


def pieces(buf: memoryview) -> Iterator[tuple[int, memoryview]]:
    """What the daemon takes at once of a READ or WRITE: places in `buf`, and the parts of it that begin there."""
    for at in range(0, len(buf), MOST_PAYLOAD):
        yield at, buf[at : at + MOST_PAYLOAD]


def pread(h: Client, buf: memoryview, offset: int, flags: int) -> None:  # noqa: ARG001
    for at, part in pieces(buf):
        part[:] = h.disk.call(methodcaller("pread", len(part), offset + at))


def pwrite(h: Client, buf: memoryview, offset: int, flags: int) -> None:
    for at, part in pieces(buf):
        h.disk.call(methodcaller("pwrite", part, offset + at, nbd_flags(flags)))


def flush(h: Client, flags: int) -> None:  # noqa: ARG001
    h.disk.call(methodcaller("flush"))


def trim(h: Client, count: int, offset: int, flags: int) -> None:
    h.disk.call(methodcaller("trim", count, offset, nbd_flags(flags)))


def zero(h: Client, count: int, offset: int, flags: int) -> None:
    hole = 0 if flags & nbdkit.FLAG_MAY_TRIM else nbd.CMD_FLAG_NO_HOLE
    h.disk.call(methodcaller("zero", count, offset, nbd_flags(flags) | hole))


def cache(h: Client, count: int, offset: int, flags: int) -> None:  # noqa: ARG001
    h.disk.call(methodcaller("cache", count, offset))


def extents(h: Client, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """Extents of the range, and never beyond it: nbdkit 1.32 aborts on one of 2**32 bytes (CVE-2025-47711)."""
    words: list[int] = h.disk.call(lambda link: ask_extents(link, count, offset, nbd_flags(flags)))
    found = []
    end = offset + count
    for length, kind in zip(words[::2], words[1::2], strict=True):
        fitting = min(length, end - offset)
        found.append((offset, fitting, kind & (nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO)))
        offset += fitting
        if offset == end:
            break
    return found


def ask_extents(link: Any, count: int, offset: int, flags: int) -> list[int]:
    """The daemon's answer to BLOCK_STATUS: length, flags, length, flags, ..."""
    words: list[int] = []

    def take(context: str, _offset: int, entries: list[int], _error: int) -> None:
        if context == CONTEXT:
            words.extend(entries)

    link.block_status(count, offset, take, flags)
    return words
