# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The mount served by the compiled core: reads and writes of open files do not reach pyfuse3, or Python.

The core reads /dev/fuse (`fast/forebay_fast/door.pxi`). What it does not serve itself goes to pyfuse3 by a socket that
takes the place of pyfuse3's descriptor: a request at a time, just before pyfuse3 receives. What pyfuse3 answers there a
thread passes on, which needs nothing of Python: so an answer that fills the socket stops nobody.
"""

import logging
import os
import signal
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable

import pyfuse3
import trio

from forebay.doors.fuse.core_link import CoreLink
from forebay.doors.fuse.open_files import OpenFile
from forebay.doors.fuse.turns import Turns
from forebay_fast import core
from forebay_fast.loop import rest

log = logging.getLogger("forebay.fuse")

_NANO = 1_000_000_000
_ATTRIBUTES = struct.Struct("=QI4x 3Q 3Q 3I 4I 4x I4x")
"""Valid for seconds and nanoseconds; inode, size, blocks; three times in seconds, the nanoseconds of these; mode,
links, owner, group; (no device;) the size of a block, (no flags)."""


class CoreDoor(Turns):
    """What pyfuse3 sees as trio, and what has the descriptor that pyfuse3 waits for.

    Installed before pyfuse3.main(); :meth:`close` has to come before pyfuse3.close().
    """

    def __init__(self, nursery: trio.Nursery, wait: "core.Wait") -> None:
        """`nursery` is for the tasks that serve; `wait` is where the running loop waits."""
        super().__init__()
        self.loop_wait = wait
        self._nursery = nursery
        self._others: deque[bytes] = deque()
        """Requests for pyfuse3."""
        self.device: core.FuseDevice | None = None
        self._kernel = -1
        """/dev/fuse."""
        self._handing: socket.socket | None = None
        """Where requests are handed to pyfuse3."""
        self._relay: threading.Thread | None = None
        self._serving = trio.CancelScope()
        self._served = trio.Event()

    def link(self, path: str, export: str, *, wait: float, patience: float) -> CoreLink:
        """A connection to the NBD socket `path`, not open yet. `wait` and `patience` as `Link` has them."""
        assert self.device is not None
        return CoreLink(
            self._nursery,
            path,
            export,
            wait=wait,
            patience=patience,
            requests=core.DiskConnection(self.device),
            loop_wait=self.loop_wait,
        )

    def opened(
        self, number: int, file: OpenFile, writable: bool, touched: Callable[[], None]
    ) -> None:
        """Serve this open(2) from now on. `touched` is called when what was written has reached the daemon."""
        assert self.device is not None
        requests = file.link.requests if isinstance(file.link, CoreLink) else None
        self.device.opened(number, core.FuseFile(requests, file.found.size, writable, touched))

    def tell(self, inode: int, entry: pyfuse3.EntryAttributes) -> None:
        """Answer so what the kernel asks about the attributes of an open file."""
        assert self.device is not None
        self.device.attributes[inode] = packed(entry)

    def forget(self, inode: int) -> None:
        """Leave it to pyfuse3 again."""
        assert self.device is not None
        self.device.attributes.pop(inode, None)

    def closed(self, number: int) -> bool:
        """After the last close. True if something was written since the last flush."""
        assert self.device is not None
        return self.device.closed(number)

    # ------------------------------------------------------------------------------------------- what pyfuse3 calls

    async def wait_readable(self, descriptor: int) -> None:
        """Return when pyfuse3 can receive a request. Raises trio.ClosedResourceError when there will be none."""
        if self._handing is None:
            self._take_over(descriptor)
        assert self._handing is not None
        while not self._others:
            if self._closing:
                raise trio.ClosedResourceError
            await self._waiting.park()
        self._handing.sendall(self._others.popleft())  # it is empty, and has room for one

    def notify_closing(self, _descriptor: int) -> None:
        """Have everybody who waits get trio.ClosedResourceError."""
        self._closing = True
        self._waiting.unpark_all()

    # --------------------------------------------------------------------------------------------------- the device

    def _take_over(self, descriptor: int) -> None:
        """Put a socket in the place of the descriptor, and serve what was there."""
        self._descriptor = descriptor
        self._kernel = os.dup(descriptor)
        os.set_blocking(self._kernel, False)
        self._handing, its = socket.socketpair()
        os.dup2(its.fileno(), descriptor, inheritable=False)
        its.close()
        self.device = core.FuseDevice(self._kernel, self._others, _complain)
        ends = self._handing.fileno(), self._kernel
        self._relay = threading.Thread(target=_relay, args=ends, name="fuse-relay", daemon=True)
        self._relay.start()
        self._nursery.start_soon(self._serve, self.device)

    async def _serve(self, device: "core.FuseDevice") -> None:
        """Have the core serve, and wake tasks of pyfuse3 for the rest, until it is unmounted."""
        try:
            with self._serving:
                while await rest(self.loop_wait, device) == core.OTHER:
                    self._waiting.unpark(count=len(self._others))
        finally:
            self._served.set()
            self.notify_closing(self._descriptor)

    async def close(self) -> None:
        """Serve no more, answer nobody any more, and give pyfuse3 its descriptor back."""
        if self._handing is None or self.device is None or self._relay is None:
            return
        self._serving.cancel()
        with trio.CancelScope(shield=True):
            await self._served.wait()
        self.device.end()
        os.dup2(self._kernel, self._descriptor, inheritable=False)
        self._relay.join()  # the socket has ended
        self._handing.close()
        os.close(self._kernel)
        self._handing = None


def packed(entry: pyfuse3.EntryAttributes) -> bytes:
    """The kernel's `struct fuse_attr_out`."""
    valid, part = divmod(int(entry.attr_timeout * _NANO), _NANO)
    times = [divmod(at, _NANO) for at in (entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns)]
    return _ATTRIBUTES.pack(
        *(valid, part, entry.st_ino, entry.st_size, entry.st_blocks),
        *(seconds for seconds, _ in times),
        *(nanoseconds for _, nanoseconds in times),
        *(entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid, entry.st_blksize),
    )


def _relay(source: int, kernel: int) -> None:
    """The thread that passes on what pyfuse3 answers. Signals are for the others: none ends a message in the middle."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    core.relay(source, kernel)


def _complain(number: int) -> None:
    log.error("the kernel does not take an answer: %s", os.strerror(number))
