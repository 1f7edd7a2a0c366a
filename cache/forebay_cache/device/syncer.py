# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""fdatasync of the cache device for the event loop, without a thread where the kernel can do that.

A guest's flush waits for one fdatasync, which a good device does in less time than it takes to wake a thread and be
woken by it. So the kernel's asynchronous I/O does it (IOCB_CMD_FDSYNC, linux/aio_abi.h, since Linux 4.18): the loop
looks on for a moment, bounded, and if the device is slower than that it goes on with other work and an eventfd tells it
when it is done. A device that hangs stops nobody but those who wait for it, and these only for so long. Where the
kernel or a sandbox refuses, a thread does the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
from collections.abc import Callable

import trio

from forebay_cache.device import pace as timing
from forebay_cache.device.pace import Pace
from forebay_cache.device.worker import TIMEOUT, Worker, timed_out
from forebay_fast.latency import DEVICE_SYNC

LOOK_ON_SECONDS = 150e-6
"""The loop looks on for so long, and only while the device is that quick."""

QUICK_SECONDS = 500e-6
"""A sync that took no longer than this, waking up included, may be quick enough the next time."""

_NUMBERS = {
    "x86_64": (206, 207, 209, 208),
    "aarch64": (0, 1, 2, 4),
}  # setup, destroy, submit, getevents
_FDSYNC = 3
_RESFD = 1
_IOCB = struct.Struct("<QIiHhIQQqQII")
_EVENT = struct.Struct("<QQqq")
_TIMESPEC = struct.Struct("<qq")


class Run:
    """One sync by the kernel. ``error`` says how it ended, once ``has_ended``: None if it was a good one."""

    __slots__ = ("error", "has_ended")

    def __init__(self) -> None:
        self.has_ended = False
        self.error: OSError | None = None


class Syncer:
    """Makes what was written to one descriptor durable. One call at a time."""

    def __init__(
        self,
        fd: int,
        sync: Callable[[], None],
        pace: Pace | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        """``sync`` does the same in a thread, where the kernel's way is not to be had. May raise OSError.

        After ``timeout`` seconds a sync is given up. There is no other until it has ended all the same.
        """
        self._sync = sync
        self._pace = pace or Pace()
        self._timeout = timeout
        self._number = 0
        self._worker: Worker | None = None
        self._quick = True
        self.run = Run()
        """The sync that was begun last; of use where :meth:`start` has begun it."""
        self.pending = False
        """True while a sync that was begun has not ended, as far as anybody has looked."""
        self.seconds = 0.0
        """How long syncs by the kernel take, the newest ones counting most."""
        self._began = 0.0
        self._is_awaited = False
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._context = ctypes.c_ulong(0)
        self._iocb = ctypes.create_string_buffer(
            _IOCB.pack(0, 0, 0, _FDSYNC, 0, fd, 0, 0, 0, 0, _RESFD, self._event)
        )
        self._list = (ctypes.c_void_p * 1)(ctypes.addressof(self._iocb))
        self._done = ctypes.create_string_buffer(_EVENT.size)
        self._moment = ctypes.create_string_buffer(_TIMESPEC.pack(0, int(LOOK_ON_SECONDS * 1e9)))
        self._no_time = ctypes.create_string_buffer(_TIMESPEC.pack(0, 0))
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long
        self._numbers = _NUMBERS.get(platform.machine())
        if self._numbers is None or self._call(0, 1, ctypes.byref(self._context)) < 0:
            self._use_thread()

    def _call(self, which: int, *arguments: object) -> int:
        assert self._numbers is not None
        return int(self._syscall(ctypes.c_long(self._numbers[which]), *arguments))

    def _use_thread(self) -> None:
        self._numbers = None
        self._worker = Worker("device-sync")

    @property
    def hangs(self) -> bool:
        """True while a sync is under way that was given up, or was begun by :meth:`now`."""
        return self.pending or (self._worker is not None and self._worker.is_hanging)

    @property
    def quick(self) -> bool:
        """True if :meth:`now` is worth a try: the last sync was quick, and needed no thread."""
        return self._quick and self._worker is None

    def now(self) -> bool:
        """Sync, if the device is done in a moment. Returns False if it is not: :meth:`finish` waits for it then.

        Raises OSError: then nothing may be assumed durable.
        """
        if not self._begin():
            return False
        if not self._get(self._moment):
            return False
        self._drain()
        self._done_with()
        return True

    async def finish(self) -> None:
        """Wait for the end of a sync that was begun, if it has not ended. Raises OSError. Not cancellable."""
        if self.pending:
            await self._wait()

    def start(self) -> bool:
        """Begin a sync: the descriptor :meth:`fileno` is readable when it may have ended, and :meth:`collect` sees.

        Returns False if that needs a thread. Raises OSError.
        """
        return self._begin()

    def fileno(self) -> int:
        """Readable when a sync by the kernel has ended, until somebody has collected it."""
        return self._event

    def collect(self) -> None:
        """See whether the sync under way has ended. Raises OSError if it has, and failed."""
        if self.pending and self._worker is None and self._get(self._no_time):
            if not self._is_awaited:  # else that task has to be woken
                self._drain()
            self._done_with()

    def look(self) -> None:
        """See whether a sync that was given up has ended. How is of no interest: the device has failed by it."""
        with contextlib.suppress(OSError):
            self.collect()

    async def __call__(self) -> None:
        """Sync, and return when it is done. Raises OSError: then nothing may be assumed durable. Not cancellable."""
        if self._begin():
            if self._quick and self._get(self._moment):
                self._drain()
                self._done_with()
            else:
                await self._wait()
        else:
            await self._sync_in_thread()

    async def _sync_in_thread(self) -> None:
        assert self._worker is not None
        self._number, began = self._pace.begin(), timing.clock()
        try:
            await self._worker.run(self._sync, self._timeout)
        finally:
            self._pace.end(self._number)
            self._pace.latency.note(DEVICE_SYNC, timing.clock() - began)

    def _begin(self) -> bool:
        """Begin a sync. Returns False if the kernel does not do it: from now on a thread has to. Raises OSError."""
        assert not self.pending
        if self._worker is not None:
            return False
        if self._call(2, self._context, 1, self._list) == 1:
            self.pending = True
            self.run = Run()
            self._number = self._pace.begin()
            self._began = timing.clock()
            return True
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EAGAIN):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._use_thread()
        return False

    async def _wait(self) -> None:
        """Wait for the sync that was begun, and raise what it ended with, or OSError(ETIMEDOUT)."""
        began, run = trio.current_time(), self.run
        self._is_awaited = True
        with trio.CancelScope(shield=True, deadline=began + self._timeout) as scope:
            while not run.has_ended and not self._get(self._no_time):
                await trio.lowlevel.wait_readable(self._event)
                self._drain()
        self._is_awaited = False
        if scope.cancelled_caught:
            raise timed_out(self._timeout)
        self._drain()
        self._quick = trio.current_time() - began < QUICK_SECONDS
        if not run.has_ended:
            self._done_with()
        elif run.error is not None:
            raise run.error

    def _get(self, patience: object) -> bool:
        return self._call(3, self._context, 1, 1, self._done, patience) == 1

    def _drain(self) -> None:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            pass

    def _done_with(self) -> None:
        self.pending = False
        self._pace.end(self._number)
        took = timing.clock() - self._began
        self._pace.latency.note(DEVICE_SYNC, took)
        self.seconds += (took - self.seconds) / 8
        self.run.has_ended = True
        result = int(_EVENT.unpack(self._done)[2])
        if result < 0:
            self.run.error = OSError(-result, os.strerror(-result))
            raise self.run.error

    def close(self) -> None:
        """Give the kernel's context, the eventfd or the thread back. A sync that hangs keeps what it has."""
        if self._worker is not None:
            self._worker.close()
        elif self._numbers is not None and not self.pending:
            self._call(1, self._context)
        if not self.pending:
            os.close(self._event)
