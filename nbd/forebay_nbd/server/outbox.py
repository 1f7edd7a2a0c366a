# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Sending the replies of one connection.

Replies consist of slices of the export's own memory, which are valid only until the next await. They are sent at once
if the socket takes them. If it does not, a pin() of the export keeps them valid while the server waits for the client.
Once the pin is `stall_seconds` old, what is left is copied and the pin is released, whether the client has taken some
of it meanwhile or not: a client that reads slowly, or not at all, cannot keep the export from reusing its memory.
Copies are counted in the server's share of the daemon's budget.
"""

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable

import trio

from forebay_nbd.protocol.wire import Buffer, remaining
from forebay_nbd.server.budget import Pace, Share
from forebay_nbd.server.export import Export
from forebay_nbd.server.limits import STALL_BYTES, Limits

log = logging.getLogger(__name__)

_IOV_MAX = 1024
"""Buffers that one pwritev takes (limits.h)."""
_SLICE = 1 << 20
"""Bytes that are copied in one turn of the event loop."""


class Outbox:
    """The sending half of one connection, and what is waiting to be sent.

    `abort` is called when what a stalled client has not taken cannot be copied: it has to end the connection.
    """

    def __init__(
        self, sock: socket.socket, limits: Limits, budget: Share, abort: Callable[[], None]
    ) -> None:
        self._sock = sock
        self._limits = limits
        self._budget = budget
        self._abort = abort
        self._unsent: list[Buffer] = []
        self._waiters = trio.lowlevel.ParkingLot()
        """Tasks that wait in drain() while another one sends."""
        self._draining = False
        """A task is sending what is in `_unsent`."""
        self._copied = 0
        """Bytes of the budget reserved for copies in `_unsent`."""
        self._pin: int | None = None
        """The export's token while the slices in `_unsent` are pinned."""
        self._pin_ends = 0.0
        """Trio time when the pin has to be released."""
        self.export: Export | None = None
        """Whose memory replies consist of. None during the handshake, whose replies have memory of their own."""
        self.broken = False
        """The client is gone, or is to be dropped: everything sent from now on is dropped, too."""
        self._pace = Pace(STALL_BYTES)
        """Of the client, while something waits to be sent."""

    @property
    def stalled_since(self) -> float | None:
        """Trio time since when the client has hardly taken anything of what waits to be sent; None if nothing waits."""
        return self._pace.since

    def send(self, buffers: list[Buffer], total: int) -> bool:
        """Sends buffers of `total` bytes without waiting.

        True if all of it is sent, or dropped because the client is gone. False if some of it waits: then the caller
        must await drain() before anything else. The list must not be used by the caller any more.
        """
        if self.broken:
            return True
        if self._unsent:
            self._unsent += self._kept(buffers)
            return False
        most = self._limits.batch_buffers
        try:
            sent = self._sock.sendmsg(buffers if len(buffers) <= most else buffers[:most])
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self.fail(exc)
            return True
        if sent == total:
            return True
        self._unsent = remaining(buffers, sent)
        return False

    def _kept(self, buffers: list[Buffer]) -> list[Buffer]:
        """What has to be kept to send these buffers later: copies, if the pin was released and nothing is pinned."""
        if not self._draining or self._pin is not None:
            return buffers
        return self._copied_to_budget(buffers)

    def _copied_to_budget(self, buffers: list[Buffer]) -> list[Buffer]:
        """A copy of the buffers, counted in the budget. The connection is aborted if that is impossible."""
        size = sum(map(len, buffers))
        if not self._budget.reserve(size):
            log.info("connection dropped: no memory is left to keep what it does not take")
            self.broken = True
            self._abort()
            return []
        self._copied += size
        try:
            return [kernel_copy(buffers)]
        except OSError as exc:
            self.fail(exc)
            self._abort()
            return []

    async def drain(self) -> None:
        """Returns when nothing waits to be sent, or the client is gone.

        Several tasks may call it at one time; one of them sends. If it is cancelled, what is left is copied, and
        drain() can be called again.
        """
        while self._unsent:
            if self._draining:
                await self._waiters.park()
            else:
                await self._drain()

    async def _drain(self) -> None:
        """Sends all of `_unsent`, with the export's memory pinned for the first `stall_seconds` of that."""
        self._draining = True
        self._pin_ends = trio.current_time() + self._limits.stall_seconds
        if self.export is not None:
            self._pin = self.export.pin()
        try:
            while self._unsent and not self.broken:
                await self._wait_writable()
                self._send_unsent()
        finally:
            if self._unsent and not self.broken and self._pin is not None:
                self._unsent = self._copied_to_budget(self._unsent)  # cancelled: the pin ends here
            self._draining = False
            self._unpin()
            if self.broken or not self._unsent:
                self.discard()
            self._waiters.unpark_all()

    async def _wait_writable(self) -> None:
        """Returns when the socket takes bytes. When the pin has reached its age, copies what is left and unpins."""
        self._pace.wait()
        if self._pin is not None:
            with trio.move_on_at(self._pin_ends):
                await trio.lowlevel.wait_writable(self._sock)
                return
            with trio.CancelScope(shield=True):
                await self._copy_unsent()
            self._unpin()
            if self.broken:
                return
        await trio.lowlevel.wait_writable(self._sock)

    async def _copy_unsent(self) -> None:
        """Copy all that waits, what comes meanwhile too, by slices: of all connections one copies in a turn."""
        done = 0
        while done < len(self._unsent):
            behind, size = done, 0
            while behind < len(self._unsent) and size < _SLICE and behind - done < _IOV_MAX:
                size += len(self._unsent[behind])
                behind += 1
            part = self._unsent[done:behind]
            if size > _SLICE:  # the last one of these has more than there is room for
                room = len(part[-1]) - (size - _SLICE)
                whole = memoryview(part[-1])
                part[-1:] = [whole[:room]]
                self._unsent[behind - 1 : behind] = [whole[:room], whole[room:]]
            async with self._budget.budget.turns:
                pass
            if self.broken:
                return
            self._unsent[done:behind] = self._copied_to_budget(part)
            done += 1

    def _send_unsent(self) -> None:
        """Sends once what the socket takes of `_unsent`."""
        part = self._unsent[: self._limits.batch_buffers]
        try:
            sent = self._sock.sendmsg(part)
        except BlockingIOError:
            return
        except OSError as exc:
            self.fail(exc)
            return
        self._pace.move(sent)
        self._unsent = remaining(part, sent) + self._unsent[len(part) :]

    def keep(self, buffers: list[Buffer]) -> None:
        """Take what the compiled core could not send. The caller must await drain() before anything else."""
        self._unsent = buffers

    def fail(self, error: OSError) -> None:
        """Called when sending or copying failed: the client is gone, or the kernel cannot read a buffer (EFAULT).

        In both cases part of a reply may be sent, so no other reply can follow. The socket is shut down: a client that
        is still there has to see that at once, and not wait for replies that never come, and whoever receives from
        the socket here finds that nothing comes any more.
        """
        self.broken = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if error.errno == errno.EFAULT and self.export is not None:
            self.export.unreadable()

    def unsent(self) -> bytes:
        """A copy of the bytes that wait to be sent, for the process that resumes the connection. Raises OSError."""
        return kernel_copy(self._unsent)

    def discard(self) -> None:
        """Drops what waits to be sent, and releases its part of the budget."""
        self._unsent = []
        if self._copied:
            self._budget.release(self._copied)
            self._copied = 0
        self._pace.end()

    def _unpin(self) -> None:
        if self._pin is not None and self.export is not None:
            self.export.unpin(self._pin)
        self._pin = None


def kernel_copy(buffers: list[Buffer]) -> bytes:
    """The bytes of all buffers in one, copied by the kernel. Raises OSError if they cannot be read.

    The buffers may be slices of a map of a device. If the device cannot be read, a system call that is given the map
    fails, but a process that touches the map itself is ended by SIGBUS. So they are written to a file in memory first.
    """
    size = sum(map(len, buffers))
    fd = os.memfd_create("forebay-unsent")
    try:
        at = 0
        while at < size:
            written = os.pwritev(fd, buffers[:_IOV_MAX], at)
            at += written
            buffers = remaining(buffers[:_IOV_MAX], written) + buffers[_IOV_MAX:]
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)
