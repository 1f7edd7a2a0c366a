"""Disks of the daemon, and the connections to it that carry nbdkit's requests."""

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

MOST_LINKS = 32
"""Connections to the daemon for one disk, so many requests of it may wait for an origin at once. A third of what the
daemon accepts for a disk: the VM itself, and whoever else uses the socket, must get in."""

RETRY_SECONDS = (0.0, 0.05, 0.1, 0.2)
"""Waits before a connection to the daemon is tried again; the last one is repeated."""

BLOCK_SIZE = (1, 4096, 32 << 20)
"""Least, preferred and most bytes of a request, where the daemon says nothing."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What the daemon accepts as the name of a disk. Anything else never gets near a path."""

CONTEXT = "base:allocation"
"""The only metadata context that nbdkit has; `forebay:cached` is on the daemon's own sockets."""

SERVER = ctypes.CDLL(None)
"""nbdkit's functions for C plugins."""

T = TypeVar("T")


@dataclass(frozen=True)
class Traits:
    """What the daemon says of a disk when a connection to it begins."""

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

    @classmethod
    def of(cls, link: Any) -> "Traits":
        """The traits as `link`, a connected libnbd handle, was told them."""
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
    """The connections to the daemon for one disk, shared by all clients of that disk.

    A blocking libnbd handle has one request in flight, so there are as many handles as there are requests at one time.
    That any of them may carry any request is what multi-conn promises; without it there is one.
    """

    def __init__(self, path: Path, name: str, reconnect: float) -> None:
        """Connect, to see that the disk is there. `reconnect` is in seconds. Raises nbd.Error."""
        self.path = path
        self.name = name
        self.clients = 0
        self._reconnect = reconnect
        self._changed = threading.Condition()
        self._waiting = 0
        self._links = 1
        first = self._connect()
        self.traits = Traits.of(first)
        self._most = MOST_LINKS if self.traits.multi_conn else 1
        # the last one given back is the first one taken: as few are busy as will do
        self._idle: list[Any] = [first]

    def call(self, request: Callable[[Any], T]) -> T:
        """Let `request` do its work on a connected libnbd handle.

        It is repeated on a new connection when the daemon goes away, for as long as `reconnect` says: requests of NBD
        may be repeated, and what the daemon acknowledged it still has. Raises OSError: the daemon's answer, or EIO when
        it stayed away.
        """
        give_up: float | None = None
        attempt = 0
        while True:
            link = self._take()
            try:
                if link is None:
                    link = self._connect_again()
                return request(link)
            except nbd.Error as error:
                if link is not None and link.aio_is_ready():
                    raise failure(error.errnum or errno.EIO, error.string) from None
                link = None
                fault = error.string
            finally:
                self._give(link)
            self._drop_idle()
            if give_up is None:
                give_up = time.monotonic() + self._reconnect
            pause = RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)]
            attempt += 1
            if time.monotonic() + pause > give_up or not sleep(pause):
                raise failure(errno.EIO, f"{self.name}: the daemon is away: {fault}")

    def close(self) -> None:
        """Hang up; no client is left."""
        while self._idle:
            with contextlib.suppress(nbd.Error):
                self._idle.pop().shutdown()

    def _connect(self) -> Any:
        """A new connection. Raises nbd.Error."""
        link = nbd.NBD()
        link.set_export_name(self.name)
        link.set_pread_initialize(False)  # the buffer of a READ that fails is dropped
        link.add_meta_context(CONTEXT)
        link.connect_unix(str(self.path))
        return link

    def _connect_again(self) -> Any:
        """A further connection to the same disk. Raises nbd.Error, or OSError when it is another disk by now."""
        link = self._connect()
        if Traits.of(link) != self.traits:
            raise failure(errno.EIO, f"{self.name} is another disk by now: connect again")
        return link

    def _take(self) -> Any | None:
        """An idle connection, or None: the right to make one. Waits while there are as many as there may be."""
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

    def _give(self, link: Any | None) -> None:
        """Give back what _take() gave: the connection, or, None, the right to one."""
        if link is None:
            with self._changed:
                self._links -= 1
                self._changed.notify()
            return
        self._idle.append(link)
        if self._waiting:  # who began to wait before the append sees it, who did after is seen here
            with self._changed:
                self._changed.notify()

    def _drop_idle(self) -> None:
        """Forget the idle connections: when the daemon went away, it left them too."""
        with self._changed, contextlib.suppress(IndexError):
            while True:
                self._idle.pop()
                self._links -= 1
                self._changed.notify()


def failure(number: int, text: str) -> OSError:
    """The exception to raise in a callback; the client is answered with the error `number`."""
    nbdkit.set_error(number)
    return OSError(number, text)


def sleep(seconds: float) -> bool:
    """Wait; False at once when nbdkit is to end, or the client is gone."""
    return seconds == 0 or SERVER.nbdkit_nanosleep(0, int(seconds * 1e9)) == 0


class Disks:
    """The daemon's disks under `run`, and those that clients have open."""

    def __init__(self, run: Path, reconnect: float) -> None:
        self._directory = run / "disks"
        self._reconnect = reconnect
        self._lock = threading.Lock()
        self._open: dict[str, Disk] = {}

    def names(self) -> list[str]:
        """The disks that the daemon serves, sorted."""
        found = (path.name.removesuffix(".sock") for path in self._directory.glob("*.sock"))
        return sorted(name for name in found if NAME.fullmatch(name))

    def enter(self, name: str) -> Disk:
        """The disk `name`, with one client more. Raises nbd.Error when the daemon does not serve it."""
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

    def leave(self, disk: Disk) -> None:
        """A client hung up; with the last one the daemon's connections end."""
        with self._lock:
            disk.clients -= 1
            if disk.clients:
                return
            if self._open.get(disk.name) is disk:
                del self._open[disk.name]
        disk.close()
