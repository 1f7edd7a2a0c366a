"""Sending replies: at once where the socket takes them, else in the background of whoever has to wait.

Replies carry slices of the export's own memory, which are valid only until the next await. What the socket did not
take is therefore held under pin(); a client that does not read for `stall_seconds` has the rest copied, and the pin
is given back, so that one sleeping client cannot keep the cache from reusing its memory.
"""

import errno
import os
import socket
from collections.abc import Callable

import trio

from forebay_nbd.protocol.wire import Buffer, rest
from forebay_nbd.server.budget import Budget
from forebay_nbd.server.export import Export
from forebay_nbd.server.limits import Limits

_IOV_MAX = 1024
"""Buffers that one pwritev takes (limits.h)."""


class Outbox:
    """The sending half of one connection. `give_up` is called when the stalled rest does not fit into the budget."""

    def __init__(
        self, sock: socket.socket, limits: Limits, budget: Budget, give_up: Callable[[], None]
    ) -> None:
        self._sock = sock
        self._limits = limits
        self._budget = budget
        self._give_up = give_up
        self._unsent: list[Buffer] = []
        self._waiters = trio.lowlevel.ParkingLot()
        self._draining = False
        self._copied = 0
        self._pin: int | None = None
        self.export: Export | None = None
        self.broken = False
        """The peer is gone: everything sent from now on is dropped."""
        self.stalled_since: float | None = None
        """Trio time since when the client has not taken a byte that we wait to send."""

    @property
    def pending(self) -> bool:
        """Something waits to be sent: drain() before more is made."""
        return bool(self._unsent)

    def send(self, buffers: list[Buffer], total: int) -> bool:
        """Sends buffers of `total` bytes without waiting. False: some are left, and the caller has to drain().

        The list belongs to the outbox from now on.
        """
        if self.broken:
            return True
        if self._unsent:
            self._unsent += self._keep(buffers)
            return False
        most = self._limits.batch_buffers
        try:
            sent = self._sock.sendmsg(buffers if len(buffers) <= most else buffers[:most])
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._break(exc)
            return True
        if sent == total:
            return True
        self._unsent = rest(buffers, sent)
        return False

    def _keep(self, buffers: list[Buffer]) -> list[Buffer]:
        """Without a pin (the client has stalled) what joins the queue has to be copied."""
        if not self._draining or self._pin is not None:
            return buffers
        return self._copy(buffers)

    def _copy(self, buffers: list[Buffer]) -> list[Buffer]:
        size = sum(map(len, buffers))
        if not self._budget.take(size):
            self.broken = True
            self._give_up()
            return []
        self._copied += size
        try:
            return [copied(buffers)]
        except OSError:
            self.broken = True
            self._give_up()
            return []

    async def drain(self) -> None:
        """Waits until nothing is left to send, or the peer is gone. When cancelled, call it again for the rest."""
        while self._unsent:
            if self._draining:
                await self._waiters.park()
            else:
                await self._drain()

    async def _drain(self) -> None:
        self._draining = True
        if self.export is not None:
            self._pin = self.export.pin()
        try:
            while self._unsent and not self.broken:
                await self._writable()
                self._send_more()
        finally:
            if (
                self._unsent and not self.broken and self._pin is not None
            ):  # cancelled: the pin goes, so copy
                self._unsent = self._copy(self._unsent)
            self._draining = False
            self._unpin()
            if self.broken or not self._unsent:
                self.discard()
            self._waiters.unpark_all()

    async def _writable(self) -> None:
        """Waits until the socket takes bytes; copies and unpins after stall_seconds."""
        self.stalled_since = trio.current_time()
        if self._pin is not None:
            with trio.move_on_after(self._limits.stall_seconds):
                await trio.lowlevel.wait_writable(self._sock)
                return
            self._unsent = self._copy(self._unsent)
            self._unpin()
        await trio.lowlevel.wait_writable(self._sock)

    def _send_more(self) -> None:
        part = self._unsent[: self._limits.batch_buffers]
        try:
            sent = self._sock.sendmsg(part)
        except BlockingIOError:
            return
        except OSError as exc:
            self._break(exc)
            return
        self.stalled_since = None
        self._unsent = rest(part, sent) + self._unsent[len(part) :]

    def _break(self, error: OSError) -> None:
        """The peer is gone, or what it was to get cannot be read: part of a reply may be sent, so there is no other."""
        self.broken = True
        if error.errno == errno.EFAULT and self.export is not None:
            self.export.unreadable()

    def unsent(self) -> bytes:
        """What the socket did not take yet; another process may go on with it. Raises OSError."""
        return copied(self._unsent)

    def discard(self) -> None:
        """Drops what is left, at the end of the connection."""
        self._unsent = []
        self._forget_copies()

    def _forget_copies(self) -> None:
        if self._copied:
            self._budget.give(self._copied)
            self._copied = 0
        self.stalled_since = None

    def _unpin(self) -> None:
        if self._pin is not None and self.export is not None:
            self.export.unpin(self._pin)
        self._pin = None


def copied(buffers: list[Buffer]) -> bytes:
    """The bytes of all buffers. Raises OSError: they cannot be read.

    The kernel copies, through a file in memory. The buffers may be slices of a device's map; where the device cannot
    be read, that is an error of a system call, but SIGBUS, the end of the process, for whoever touches the map itself.
    """
    size = sum(map(len, buffers))
    fd = os.memfd_create("forebay-unsent")
    try:
        at = 0
        while at < size:
            written = os.pwritev(fd, buffers[:_IOV_MAX], at)
            at += written
            buffers = rest(buffers[:_IOV_MAX], written) + buffers[_IOV_MAX:]
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)
