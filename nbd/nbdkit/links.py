# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The daemon's disks, and the links: connections to the daemon on which requests of nbdkit's clients are passed on."""

import contextlib
import ctypes
import errno
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import nbd

import nbdkit

MAX_LINKS = 32
"""Links for one disk, and so requests for it at one time. This is a third of the connections that the daemon accepts
for a disk: the VM itself, and whoever else uses the socket, must get in."""

RETRY_SECONDS = (0.0, 0.05, 0.1, 0.2)
"""Waits before a request is tried again on a new link; the last one is repeated."""

BLOCK_SIZE = (1, 4096, 32 << 20)
"""Smallest, preferred and largest size of a request, bytes, if the daemon does not tell them."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""The names that the daemon accepts for disks. No other name may become part of a path."""

CONTEXT = "base:allocation"
"""The only metadata context that nbdkit has. `x-forebay:cached` can be had from the daemon's own sockets."""

SERVER = ctypes.CDLL(None)
"""nbdkit's functions for C plugins."""

T = TypeVar("T")


@dataclass(frozen=True)
class Traits:
    """What the daemon tells about a disk in the handshake: its size, and what it can do."""

    size: int
    read_only: bool
    rotational: bool
    multi_conn: bool
    flush: bool
    fua: bool
    trim: bool
    zero: bool
    fast_zero: bool
    cache: bool
    extents: bool
    block_size: tuple[int, int, int]
    """As BLOCK_SIZE."""

    @classmethod
    def of(cls, link: Any) -> "Traits":
        """The traits that `link`, a connected libnbd handle, was told."""
        least, preferred, most = (
            link.get_block_size(which)
            for which in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)
        )
        return cls(
            link.get_size(),
            link.is_read_only(),
            link.is_rotational(),
            link.can_multi_conn(),
            link.can_flush(),
            link.can_fua(),
            link.can_trim(),
            link.can_zero(),
            link.can_fast_zero(),
            link.can_cache(),
            link.can_meta_context(CONTEXT),
            (least, preferred, most) if least and preferred and most else BLOCK_SIZE,
        )


class Disk:
    """The links for one disk, shared by all clients of that disk. Its methods may be called by any thread.

    A blocking libnbd handle has one request in flight, so there are as many links as requests at one time. Any of them
    may carry any request, since the daemon promises multi-conn; if it did not, there would be one link.
    """

    def __init__(self, path: Path, name: str, reconnect: float) -> None:
        """Makes a first link, to the socket `path`. Raises nbd.Error if the daemon does not serve the disk there.

        `reconnect` is for how many seconds call() repeats a request.
        """
        self.path = path
        self.name = name
        self.clients = 0
        """Number of clients that have the disk open; kept by Disks, under its lock."""
        self._reconnect = reconnect
        self._changed = threading.Condition()
        """Notified when a link becomes idle, or there may be one more."""
        self._waiting = 0
        """Threads that wait for that."""
        self._links = 1
        """Links that there are, and that threads are making."""
        first = self._connect()
        self.traits = Traits.of(first)
        self._most = MAX_LINKS if self.traits.multi_conn else 1
        self._idle: list[Any] = [first]
        """Links without a request. The last one added is the first one taken, so that no more are used than needed."""

    def call(self, request: Callable[[Any], T]) -> T:
        """Calls `request` with a link, a connected libnbd handle, and returns what it returns.

        If the daemon goes away, it is called again with a new link, for `reconnect` seconds. That is right for every
        request of NBD: what the daemon acknowledged it still has, and anything else may be done twice. Raises OSError:
        the error that the daemon answered, or EIO if it stayed away or has another disk of that name by now.
        """
        give_up: float | None = None
        attempt = 0
        while True:
            link = self._acquire()
            try:
                if link is None:
                    link = self._connect_again()
                return request(link)
            except nbd.Error as error:
                if link is not None and link.aio_is_ready():
                    raise client_error(error.errnum or errno.EIO, error.string) from None
                link = None
                fault = error.string
            finally:
                self._release(link)
            self._drop_idle()
            if give_up is None:
                give_up = time.monotonic() + self._reconnect
            pause = RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)]
            attempt += 1
            if time.monotonic() + pause > give_up or not sleep(pause):
                raise client_error(errno.EIO, f"{self.name}: the daemon is away: {fault}")

    def close(self) -> None:
        """Closes all links. Called when no client is left, so all of them are idle."""
        while self._idle:
            with contextlib.suppress(nbd.Error):
                self._idle.pop().shutdown()

    def _connect(self) -> Any:
        """A new link. Raises nbd.Error."""
        link = nbd.NBD()
        link.set_export_name(self.name)
        link.set_pread_initialize(False)  # the buffer of a READ that fails is dropped
        link.add_meta_context(CONTEXT)
        link.connect_unix(str(self.path))
        return link

    def _connect_again(self) -> Any:
        """A new link to the same disk. Raises nbd.Error, or OSError if there is a disk with other traits by now."""
        link = self._connect()
        if Traits.of(link) != self.traits:
            raise client_error(errno.EIO, f"{self.name} is another disk by now: connect again")
        return link

    def _acquire(self) -> Any | None:
        """An idle link, or None: then the caller has to make one. Waits while neither is possible."""
        try:
            return self._idle.pop()  # without the lock: a list's methods are atomic
        except IndexError:
            pass
        with self._changed:
            self._waiting += 1
            try:
                while True:
                    with contextlib.suppress(IndexError):
                        return self._idle.pop()
                    if self._links < self._most:
                        self._links += 1
                        return None
                    self._changed.wait()
            finally:
                self._waiting -= 1

    def _release(self, link: Any | None) -> None:
        """Called after each _acquire(): `link` is idle from now on; None means that it is lost, or was not made."""
        if link is None:
            with self._changed:
                self._links -= 1
                self._changed.notify()
            return
        self._idle.append(link)
        # A thread that counts itself as waiting after this look finds the link when it looks at the list once more.
        if self._waiting:
            with self._changed:
                self._changed.notify()

    def _drop_idle(self) -> None:
        """Drops all idle links: called when the daemon went away, which ended them, too."""
        with self._changed, contextlib.suppress(IndexError):
            while True:
                self._idle.pop()
                self._links -= 1
                self._changed.notify()


def client_error(number: int, text: str) -> OSError:
    """An exception to be raised in a callback of nbdkit, which answers the client with the errno `number` then."""
    nbdkit.set_error(number)
    return OSError(number, text)


def sleep(seconds: float) -> bool:
    """Waits; True when the time is over, False as soon as nbdkit has to end or the client is gone."""
    return seconds == 0 or SERVER.nbdkit_nanosleep(0, int(seconds * 1e9)) == 0


class Disks:
    """The daemon's disks in the directory `run`, and which of them clients have open. Any thread may call its methods.

    `reconnect` is as for Disk.
    """

    def __init__(self, run: Path, reconnect: float) -> None:
        self._directory = run / "disks"
        self._reconnect = reconnect
        self._lock = threading.Lock()
        self._open: dict[str, Disk] = {}

    def names(self) -> list[str]:
        """The names of the disks that the daemon serves, sorted."""
        found = (path.name.removesuffix(".sock") for path in self._directory.glob("*.sock"))
        return sorted(name for name in found if NAME.fullmatch(name))

    def acquire(self, name: str) -> Disk:
        """The disk `name`, for one more client, which has to release() it. Raises nbd.Error if there is none."""
        fresh = Disk(self._directory / f"{name}.sock", name, self._reconnect)
        with self._lock:
            disk = self._open.get(name)
            if disk is None or disk.traits != fresh.traits:
                # also when it was attached anew, as another disk: its old clients are told at their next request
                disk = self._open[name] = fresh
            disk.clients += 1
        if disk is not fresh:
            fresh.close()
        return disk

    def release(self, disk: Disk) -> None:
        """Called once for each acquire(), when the client has gone. Closes the links if it was the last one."""
        with self._lock:
            disk.clients -= 1
            if disk.clients:
                return
            if self._open.get(disk.name) is disk:
                del self._open[disk.name]
        disk.close()
