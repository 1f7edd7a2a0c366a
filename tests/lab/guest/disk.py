# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A disk of the gateway as a client sees it, by libnbd, with a connection that is made again when it breaks."""

import errno

import nbd

LONGEST = 1 << 20
"""Bytes of one request."""


class Disk:
    """The disk at one socket. Every method raises OSError with the server's errno."""

    def __init__(self, sock: str) -> None:
        self._sock = sock
        self._handle: nbd.NBD | None = None

    def connect(self) -> None:
        """Have a connection that works."""
        self._connected()

    def _connected(self) -> nbd.NBD:
        if self._handle is None or self._handle.aio_is_dead() or self._handle.aio_is_closed():
            handle = nbd.NBD()
            try:
                handle.connect_unix(self._sock)
            except nbd.Error as error:
                raise OSError(error.errnum or errno.ECONNREFUSED, error.string) from error
            self._handle = handle
        return self._handle

    @property
    def size(self) -> int:
        """Bytes."""
        return int(self._connected().get_size())

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at an offset."""
        return b"".join(
            self._asked("pread", min(LONGEST, offset + length - at), at)
            for at in range(offset, offset + length, LONGEST)
        )

    def write(self, data: bytes, offset: int) -> None:
        """Write, and return once it is acknowledged."""
        self._asked("pwrite", data, offset)

    def flush(self) -> None:
        """What was acknowledged is durable when this returns."""
        self._asked("flush")

    def trim(self, length: int, offset: int) -> None:
        """Say that these bytes are not needed."""
        self._asked("trim", length, offset)

    def zero(self, length: int, offset: int) -> None:
        """Write zeros; a hole will do."""
        self._asked("zero", length, offset)

    def _asked(self, what: str, *arguments: object) -> bytes:
        try:
            answer = getattr(self._connected(), what)(*arguments)
        except nbd.Error as error:
            raise OSError(error.errnum or errno.ENOTCONN, error.string) from error
        return bytes(answer) if answer is not None else b""
