# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""nbdkit plugin (Python, API version 2): the daemon's disks for clients on other hosts.

nbdkit --tls=require --tls-certificates=DIR --tls-verify-peer python plugin.py rules=FILE [run=DIR] ...

nbdkit does TCP, TLS and filters. This plugin decides who may use which disk (access.py), and passes requests on to the
disk's own socket in RUN/disks (links.py). README.md beside it is the manual. It runs in the interpreter that nbdkit
embeds, and needs nothing but the standard library and libnbd's Python binding.

nbdkit calls the functions whose names nbdkit-python-plugin(3) lists. An exception that one of them raises is logged by
nbdkit. The client is answered with EIO, or the number given to nbdkit.set_error() before; during the start, nbdkit
ends.
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
from access import SERVER, Peer, RefusedError, Rules, current_peer
from links import CONTEXT, NAME, Disk, Disks, Traits

import nbdkit

if not hasattr(nbd, "NBD"):  # the folder nbd/ of a checkout
    raise ImportError("libnbd's Python binding is missing: install python3-libnbd")

API_VERSION = 2

MAX_PAYLOAD = 32 << 20
"""Longest READ or WRITE that the daemon takes, bytes. nbdkit takes 64 MiB from its clients."""


# -- the start --------------------------------------------------------------------------------------------------------


class Settings:
    """The plugin's parameters, `key=value` on nbdkit's command line, and what is made from them."""

    run = Path("/run/forebay")
    """The daemon's directory of sockets."""
    reconnect = 30.0
    """For how many seconds requests wait for a daemon that went away."""
    insecure = False
    """Clients on the network are served even if they came without TLS."""
    rules: Rules
    disks: Disks

    def set(self, key: str, value: str) -> None:
        """Sets one parameter. Raises ValueError for an unknown one, or a wrong value."""
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

    def finish(self) -> None:
        """Called when all parameters are set. Raises ValueError, OSError: one is missing, or the rules are wrong."""
        if not hasattr(self, "rules"):
            raise ValueError("rules=FILE is missing: it says who may use which disk")
        self.rules.load()
        self.disks = Disks(self.run, self.reconnect)


SETTINGS = Settings()


def check_server(arguments: list[str], families: set[int]) -> None:
    """Raises ValueError unless nbdkit takes clients from the network with TLS only, and asks who they are.

    `arguments` are those of its command line, `families` the address families of the sockets that it listens on.
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
    """Called for each parameter."""
    SETTINGS.set(key, value)


def config_complete() -> None:
    """Called after the last parameter."""
    SETTINGS.finish()


def thread_model() -> int:
    """PARALLEL: requests that wait for an origin must not hold up others. README.md has the figures."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def after_fork() -> None:
    """Called when nbdkit listens, before it accepts. Raises as check_server()."""
    if not SETTINGS.insecure:
        arguments = Path("/proc/self/cmdline").read_text(errors="replace").split("\0")
        check_server(arguments, listening_families())


# -- connections ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Client:
    """One connection of a client: the handle `h` that nbdkit passes to the functions below."""

    disk: Disk
    read_only: bool
    """The client may not write, because of the disk, of its rule, or of how nbdkit was started."""

    @property
    def traits(self) -> Traits:
        """Size of the disk, and what it can do."""
        return self.disk.traits


def trusted_peer(is_tls: bool) -> Peer:
    """The client's address. Raises RefusedError if it came from the network without TLS and that is not allowed."""
    found = current_peer()
    if found is not None and not is_tls and not SETTINGS.insecure:
        raise RefusedError(f"{found} came without TLS: start nbdkit with --tls=require")
    return found


def list_exports(readonly: int, is_tls: int) -> list[str]:  # noqa: ARG001
    """The names of the disks that this client may use."""
    found = trusted_peer(bool(is_tls))
    return [name for name in SETTINGS.disks.names() if SETTINGS.rules.rule_for(name, found)]


def open(readonly: int) -> Client:
    """Begins the connection of a client to the disk that it named. Raises RefusedError if it may not have that."""
    name = nbdkit.export_name()
    found = trusted_peer(SERVER.nbdkit_is_tls() == 1)
    who = "a client on this host" if found is None else str(found)
    if not name:
        raise RefusedError(f"{who} asked for the default export: there is none, name a disk")
    if not NAME.fullmatch(name):
        raise RefusedError(f"{who} asked for {name[:64]!r}: no disk has such a name")
    rule = SETTINGS.rules.rule_for(name, found)
    if rule is None:
        raise RefusedError(f"{who} asked for {name}: no rule in {SETTINGS.rules.path} allows it")
    try:
        disk = SETTINGS.disks.acquire(name)
    except nbd.Error as error:
        raise RefusedError(f"{who} asked for {name}: {error.string}") from None
    nbdkit.debug(f"{who} opens {name}")
    return Client(disk, bool(readonly) or rule.read_only or disk.traits.read_only)


def close(h: Client) -> None:
    """Called when a client has gone."""
    SETTINGS.disks.release(h.disk)


def get_size(h: Client) -> int:
    """The size of the disk in bytes."""
    return h.traits.size


def block_size(h: Client) -> tuple[int, int, int]:
    """Smallest, preferred and largest size of a request, bytes."""
    return h.traits.block_size


def is_rotational(h: Client) -> bool:
    """True if the disk's medium rotates."""
    return h.traits.rotational


def can_multi_conn(h: Client) -> bool:
    """True if a FLUSH on one connection covers writes on all others to the disk."""
    return h.traits.multi_conn


def can_write(h: Client) -> bool:
    """False makes nbdkit refuse all that writes."""
    return not h.read_only


def can_flush(h: Client) -> bool:
    """True if flush() may be called."""
    return h.traits.flush


def can_fua(h: Client) -> int:
    """NATIVE if the daemon knows the flag; else nbdkit calls flush() after the request."""
    return int(nbdkit.FUA_NATIVE if h.traits.fua else nbdkit.FUA_EMULATE)


def can_trim(h: Client) -> bool:
    """True if trim() may be called."""
    return h.traits.trim


def can_zero(h: Client) -> bool:
    """True if zero() may be called; else nbdkit writes zeros."""
    return h.traits.zero


def can_fast_zero(h: Client) -> bool:
    """True if zero() may be asked to fail with ENOTSUP rather than be slow."""
    return h.traits.fast_zero


def can_cache(h: Client) -> int:
    """NATIVE if cache() may be called."""
    return int(nbdkit.CACHE_NATIVE if h.traits.cache else nbdkit.CACHE_NONE)


def can_extents(h: Client) -> bool:
    """True if extents() may be called."""
    return h.traits.extents


# -- requests ---------------------------------------------------------------------------------------------------------


def nbd_flags(flags: int) -> int:
    """The command flags of libnbd for those of nbdkit, but for the two that say what zero() may do."""
    return (
        (nbd.CMD_FLAG_FUA if flags & nbdkit.FLAG_FUA else 0)
        | (nbd.CMD_FLAG_REQ_ONE if flags & nbdkit.FLAG_REQ_ONE else 0)
        | (nbd.CMD_FLAG_FAST_ZERO if flags & nbdkit.FLAG_FAST_ZERO else 0)
    )


def split(buf: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The parts of `buf` that the daemon takes in one READ or WRITE, each after its position in `buf`."""
    for at in range(0, len(buf), MAX_PAYLOAD):
        yield at, buf[at : at + MAX_PAYLOAD]


def pread(h: Client, buf: memoryview, offset: int, flags: int) -> None:  # noqa: ARG001
    """Fills `buf` with what lies from `offset` on. This and the functions below raise OSError, as Disk.call()."""
    for at, part in split(buf):
        part[:] = h.disk.call(methodcaller("pread", len(part), offset + at))


def pwrite(h: Client, buf: memoryview, offset: int, flags: int) -> None:
    """Writes `buf` at `offset`."""
    for at, part in split(buf):
        h.disk.call(methodcaller("pwrite", part, offset + at, nbd_flags(flags)))


def flush(h: Client, flags: int) -> None:  # noqa: ARG001
    """Makes all writes durable that were answered."""
    h.disk.call(methodcaller("flush"))


def trim(h: Client, count: int, offset: int, flags: int) -> None:
    """Tells the daemon that the content of a range of `count` bytes is no longer needed."""
    h.disk.call(methodcaller("trim", count, offset, nbd_flags(flags)))


def zero(h: Client, count: int, offset: int, flags: int) -> None:
    """Makes a range of `count` bytes read as zeros; it stays allocated unless `flags` has MAY_TRIM."""
    hole = 0 if flags & nbdkit.FLAG_MAY_TRIM else nbd.CMD_FLAG_NO_HOLE
    h.disk.call(methodcaller("zero", count, offset, nbd_flags(flags) | hole))


def cache(h: Client, count: int, offset: int, flags: int) -> None:  # noqa: ARG001
    """Tells the daemon that a range of `count` bytes is going to be read."""
    h.disk.call(methodcaller("cache", count, offset))


def extents(h: Client, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """The extents (offset, length, kind) of a range of `count` bytes.

    They never go beyond the range: nbdkit 1.32 aborts on one of 2**32 bytes (CVE-2025-47711).
    """
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
    """What the daemon replies to BLOCK_STATUS on `link`: length, flags, length, flags and so on. Raises nbd.Error."""
    words: list[int] = []

    def take(context: str, _offset: int, entries: list[int], _error: int) -> None:
        if context == CONTEXT:
            words.extend(entries)

    link.block_status(count, offset, take, flags)
    return words
