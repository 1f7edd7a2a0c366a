# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The virtual disk of an image in some format, as a descriptor: a handle, whose calls worker/syscalls.py brings here.

What is read and written goes to a server that knows the format (server.py); what is asked about the file (its times,
its locks, who has it open) goes to the file. So all that is done with a raw image is done with the virtual disk in the
same way: the order of writes, the owner marker, checkpoints, recovery.

Everything here blocks, belongs in a thread, and raises OSError.
"""

import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from forebay.origin.calls import PUNCH_HOLE, ZERO_RANGE
from forebay.origin.protocol import ZERO
from forebay.origin.worker import process
from forebay.origin.worker.process import Worker
from forebay.origin.worker.server import CONNECTIONS, Connection, Start
from forebay_nbd.client.blocking import BlockingClient

LONGEST = 4 << 20
"""Bytes that one call reads or writes at most."""

LONGEST_ZERO = 1 << 30
"""Bytes that one request zeroes, or asks about, at most."""

LEFT_TO_QEMU = (101, 103, 201, 203)
"""The bytes of an image that QEMU has locks on when it writes it, which speak against those of any other: see
sidecar/locks.py. It takes them itself, on the descriptor by which it writes."""

_FLOCK = struct.Struct("hhqqi")
_STATX_SIZE, _STATX_SIZE_AT = struct.Struct("=Q"), 40
_FSTAT_SIZE = 6


class VirtualDisk:
    """One life of a server with its files. Implements forebay.origin.worker.process.Holder."""

    def __init__(
        self, name: str, worker: Worker, file: int, size: int, start: Start, *, writes: bool
    ) -> None:
        """`name` is that of the image, for messages; `file` is a handle of it at the worker, `size` that of the virtual
        disk, in bytes. `start` starts the server, at the first call that needs it. The worker ends with this.
        """
        self._writes = writes
        self._name = name
        self._worker = worker
        self._file = file
        self._size = size
        self._start = start
        self._starting = threading.Lock()
        self._places = threading.BoundedSemaphore(CONNECTIONS)
        self._free: list[Connection] | None = None
        """Connections that nobody uses; None before the server was started."""
        self._number = process.hold(self)
        self.handle = process.handle_of(self._number, 0)
        """The descriptor."""
        self._calls: dict[str, Callable[..., Any]] = {
            "close": self.close,
            "fallocate": self._fallocate,
            "fcntl": self._fcntl,
            "fdatasync": self._flush,
            "fsync": self._sync,
            "fstat": self._fstat,
            "lseek": self._seek,
            "posix_fadvise": self._forget,
            "statx": self._statx,
        }
        """What differs from the file."""

    def call(self, name: str, *args: Any, **how: Any) -> Any:
        """Make a call, whose first argument is the handle."""
        own = self._calls.get(name)
        if own is not None:
            return own(*args[1:], **how)
        if name in ("getxattr", "holders"):
            return self._of_file(name, *args[1:], **how)
        raise OSError(errno.ENOTSUP, f"{self._name}: {name} is not for an image in a format")

    def open(self, name: str, *_args: Any, **_how: Any) -> int:
        """Nothing lies beneath a virtual disk."""
        raise OSError(errno.ENOTDIR, f"{self._name}: {name}")

    # ------------------------------------------------------------------------------------------------------ the data

    def preadv(self, _handle: int, buffers: list[bytearray | memoryview], offset: int) -> int:
        """Read into the first of the buffers that is not empty. How many bytes; 0 at the end of the disk."""
        view = next((memoryview(one) for one in buffers if len(one)), memoryview(b""))
        view = view[: max(0, min(LONGEST, self._size - offset))]
        if view:
            with self._connection() as server:
                server.read_into(offset, view)
        return len(view)

    def pwritev(
        self, _handle: int, buffers: list[bytes | bytearray | memoryview], offset: int
    ) -> int:
        """Write the buffers, or the beginning of them. How many bytes."""
        data, count = [], 0
        for buffer in buffers:
            part = memoryview(buffer).cast("B")[: LONGEST - count]
            data.append(part)
            count += len(part)
        if offset + count > self._size:
            raise OSError(errno.ENOSPC, f"{self._name}: beyond the end of the disk")
        if count:
            with self._connection() as server:
                server.write(offset, data)
        return count

    def start(self) -> None:
        """Start the server, unless it was."""
        with self._connection():
            pass

    def wait(self, seconds: float) -> None:
        """Wait until its processes have ended, which closing it has them do, or for so long."""
        self._worker.wait(seconds)

    @contextmanager
    def _connection(self) -> Iterator[BlockingClient]:
        """A connection to the server, for the body. Where it breaks, this has ended."""
        with self._places:
            server = self._with_handshake(self._taken())
            try:
                yield server
            except ConnectionError as error:
                server.close()
                raise self._ended() from error
            except OSError:  # of the server, which says so and goes on
                self._give_back(server)
                raise
            except BaseException:
                server.close()
                raise
            self._give_back(server)

    def _with_handshake(self, connection: Connection) -> BlockingClient:
        if isinstance(connection, BlockingClient):
            return connection
        try:
            return BlockingClient(connection)
        except OSError as error:
            raise self._ended() from error

    def _ended(self) -> OSError:
        """End, and return what to raise."""
        self._end()
        return OSError(errno.EIO, f"{self._name}: its server has ended")

    def _taken(self) -> Connection:
        with self._starting:
            if not process.is_held(self.handle):
                raise OSError(errno.EIO, f"{self._name}: its server has ended")
            if self._free is None:
                try:
                    self._free = self._start(self._worker)
                except BaseException:
                    self._end()
                    raise
            return self._free.pop()

    def _give_back(self, server: BlockingClient) -> None:
        with self._starting:
            if self._free is not None and process.is_held(self.handle):
                self._free.append(server)
                return
        server.close()

    def close(self) -> None:
        """As closing the descriptor: return when the server has ended, and the locks of the files are free.

        The second call does nothing.
        """
        if process.is_held(self.handle):
            self._end()
            self._worker.wait()

    def _end(self) -> None:
        """From now on all calls fail. The server writes what it still has in memory, and ends."""
        process.let_go(self._number)
        free, self._free = self._free or [], []
        for connection in free:
            connection.close()
        self._worker.leave()

    def _flush(self) -> None:
        with self._connection() as server:
            server.flush()

    def _sync(self) -> None:
        """The times of the file are durable as well."""
        self._flush()
        self._of_file("fsync")

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        if mode not in (PUNCH_HOLE, ZERO_RANGE):
            raise OSError(errno.EOPNOTSUPP, f"{self._name}: fallocate in mode {mode}")
        end = min(
            offset + length, self._size
        )  # behind the end it is only asked whether it can be done
        for at in range(offset, end, LONGEST_ZERO):
            with self._connection() as server:
                server.zero(at, min(LONGEST_ZERO, end - at), no_hole=mode == ZERO_RANGE)

    def _seek(self, offset: int, whence: int) -> int:
        """As lseek with SEEK_DATA, or SEEK_HOLE. ENXIO: nothing follows."""
        wants_data, at = whence == os.SEEK_DATA, offset
        if at >= self._size:
            raise OSError(errno.ENXIO, f"{self._name}: beyond the end of the disk")
        while at < self._size:
            with self._connection() as server:
                extents = server.block_status(at, min(LONGEST_ZERO, self._size - at))
            for length, flags in extents:
                if bool(flags & ZERO) is not wants_data:
                    return at
                at += length
        if wants_data:
            raise OSError(errno.ENXIO, f"{self._name}: no data follows")
        return self._size

    def _forget(self, _offset: int, length: int, _advice: int) -> None:
        """What the server has in memory of the files is of before: another one has to be started."""
        if length == 0:
            self._end()

    # ------------------------------------------------------------------------------------------------------ the file

    def _of_file(self, name: str, *args: Any, **how: Any) -> Any:
        """Make a call on the file. Where the process that has it has ended, so have we."""
        try:
            return self._worker.call(name, self._file, *args, **how)
        except OSError:
            if self._worker.has_ended:
                self._end()
            raise

    def _statx(self) -> bytes:
        raw = bytearray(self._of_file("statx"))
        _STATX_SIZE.pack_into(raw, _STATX_SIZE_AT, self._size)
        return bytes(raw)

    def _fstat(self) -> Any:
        fields, more = self._of_file("fstat")
        return (*fields[:_FSTAT_SIZE], self._size, *fields[_FSTAT_SIZE + 1 :]), more

    def _fcntl(self, command: int, argument: bytes) -> Any:
        """Locks are taken on the file, but for those that the server takes."""
        if command == fcntl.F_OFD_SETLK and self._is_left_to_server(argument):
            return argument
        return self._of_file("fcntl", command, argument)

    def _is_left_to_server(self, argument: bytes) -> bool:
        return self._writes and _FLOCK.unpack(argument)[2] in LEFT_TO_QEMU
