# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A trio NBD client: one connection, many requests in flight."""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import trio

from forebay_nbd.client.connecting import Address, name_of, open_export
from forebay_nbd.client.negotiation import Negotiated
from forebay_nbd.protocol import events as ev
from forebay_nbd.protocol.replies import ReplyReader
from forebay_nbd.protocol.requests import encode_request
from forebay_nbd.protocol.wire import (
    BASE_ALLOCATION,
    Buffer,
    Cmd,
    CmdFlag,
    Flag,
    ProtocolError,
    local_errno,
    remaining,
)

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
"""How long connecting, and after that the handshake, may take each."""
MAX_RANGE = 1 << 30
"""Longest TRIM, WRITE_ZEROES, CACHE and BLOCK_STATUS sent, bytes: the field has 32 bits, and some servers work through
such a range before they answer anything else."""
RECEIVES_PER_TURN = 32
"""How often replies are received in a row before other tasks run."""

_NO_FLAGS = CmdFlag(0)


@dataclass(slots=True, eq=False)
class _InFlight:
    """A request without a complete reply, and what has come in reply to it so far."""

    done: trio.Event = field(default_factory=trio.Event)
    """Set when the reply is complete, or will not come."""
    error: OSError | None = None
    """The first error of the reply, or why it will not come."""
    extents: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """Extents (length, flags) from BLOCK_STATUS chunks, by the number of the metadata context."""


class Client:
    """A connection to one export. Offsets and lengths are bytes and have to lie inside `size`.

    Each method for a request raises OSError with the errno that the server sent. Once the connection has ended, all of
    them raise ConnectionError; there is no reconnecting. A request that is cancelled may or may not be carried out; if
    it is cancelled while it is being sent, the connection ends. The number of requests in flight is not bounded here.
    """

    def __init__(self, sock: socket.socket, negotiated: Negotiated, name: str) -> None:
        """Called by connect(). `sock` has just entered transmission; `name` is the address, for the texts of errors."""
        self.negotiated = negotiated
        self.size = negotiated.size
        self.read_only = negotiated.read_only
        self.name = name
        self._sock = sock
        self._reader = ReplyReader(negotiated.structured)
        self._in_flight: dict[int, _InFlight] = {}
        """By cookie."""
        self._cookie = 0
        """Of the request sent last."""
        self._sending = trio.Lock()
        """Held while a request is being sent, so that requests do not mix."""
        self._closed: str | None = None
        """Why the connection has ended; None while it lives."""
        self._receiving = trio.CancelScope()

    @classmethod
    async def connect(
        cls,
        nursery: trio.Nursery,
        address: Address,
        export: str = "",
        *,
        contexts: tuple[str, ...] = (BASE_ALLOCATION,),
        timeout: float = CONNECT_SECONDS,
    ) -> "Client":
        """Connects to an export. Replies are received by a task in `nursery`, which raises nothing.

        Selects those of the metadata contexts `contexts` that the server has. Connecting and the handshake may take
        `timeout` seconds each. Raises OSError whose text begins with the address and says what is wrong: ENOENT for an
        unknown export, TimeoutError, ConnectionError, or what connect(2) said. If cancelled, the socket is closed.
        """
        sock, negotiated, early = await open_export(address, export, contexts, timeout=timeout)
        client = cls(sock, negotiated, name_of(address))
        client._reader.feed(early)
        nursery.start_soon(client._receive)
        return client

    # --- requests ---------------------------------------------------------------------------
    async def pread(self, offset: int, length: int) -> bytearray:
        """Reads `length` bytes from `offset` on, whatever the smallest block of the server is."""
        low = self.negotiated.minimum_block
        start, stop = offset // low * low, -(-(offset + length) // low) * low
        data = bytearray(stop - start)
        await self.pread_into(start, memoryview(data))
        return (
            data if (start, stop) == (offset, offset + length) else data[offset - start :][:length]
        )

    async def pread_into(self, offset: int, view: memoryview) -> None:
        """Reads len(view) bytes from `offset` on into `view`.

        Raises OSError(EINVAL) unless offset and length are multiples of the server's smallest block. After a
        cancellation or an error a late reply may still be written into `view`: that memory must not be used for
        anything else.
        """
        low = self.negotiated.minimum_block
        if (offset | len(view)) % low:
            raise OSError(errno.EINVAL, f"{self.name}: not aligned to {low} bytes")
        sent = []
        for at, size in _split(offset, len(view), self.negotiated.maximum_payload // low * low):
            sink = view[at - offset : at - offset + size]
            sent.append(await self._send(Cmd.READ, at, size, sink=sink))
        await self._finish(sent)

    async def pwrite(self, offset: int, data: Buffer, fua: bool = False) -> None:
        """Writes `data` at `offset`; with `fua` it is durable when this returns. `data` must not change meanwhile.

        Raises OSError: EPERM if the export is read-only, EINVAL unless offset and length are multiples of the server's
        smallest block.
        """
        self._check_writable(offset, len(data))
        flags = CmdFlag.FUA if fua and self._has_flag(Flag.SEND_FUA) else _NO_FLAGS
        view = memoryview(data).cast("B")
        sent = []
        for at, size in _split(offset, len(view), self.negotiated.maximum_payload):
            sent.append(
                await self._send(Cmd.WRITE, at, size, flags, view[at - offset : at - offset + size])
            )
        await self._finish(sent)
        if fua and not flags:
            await self.flush()

    async def flush(self) -> None:
        """Makes all writes durable that have returned. Does nothing if the server does not know FLUSH."""
        if self._has_flag(Flag.SEND_FLUSH):
            await self._finish([await self._send(Cmd.FLUSH, 0, 0)])

    async def trim(self, offset: int, length: int) -> None:
        """Tells the server that the content of a range is no longer needed. Raises as zero()."""
        await self._request_range(Cmd.TRIM, Flag.SEND_TRIM, offset, length)

    async def zero(
        self, offset: int, length: int, *, no_hole: bool = False, fast: bool = False
    ) -> None:
        """Zeros a range; with `no_hole` it stays allocated.

        Raises OSError: ENOTSUP if the server does not know the command or, with `fast`, if it is no faster than writing
        zeros; EPERM if the export is read-only; EINVAL unless offset and length are multiples of the smallest block.
        """
        flags = CmdFlag.NO_HOLE if no_hole else _NO_FLAGS
        if fast:
            if not self._has_flag(Flag.SEND_FAST_ZERO):
                raise OSError(errno.ENOTSUP, f"{self.name}: no fast zeroes")
            flags |= CmdFlag.FAST_ZERO
        await self._request_range(Cmd.WRITE_ZEROES, Flag.SEND_WRITE_ZEROES, offset, length, flags)

    async def cache(self, offset: int, length: int) -> None:
        """Tells the server that a range is going to be read. Raises OSError(ENOTSUP) if it does not know CACHE."""
        await self._request_range(Cmd.CACHE, Flag.SEND_CACHE, offset, length)

    async def block_status(
        self, offset: int, length: int, context: str = BASE_ALLOCATION, *, one: bool = False
    ) -> list[tuple[int, int]]:
        """The extents (length, flags) of a metadata context from `offset` on, at least one.

        They may cover less than `length` bytes, and never more. With `one`, the server is asked for the first one only.
        Raises OSError(ENOTSUP) if the context was not selected.
        """
        contexts = self.negotiated.contexts
        number = next((i for i, known in contexts.items() if known == context), None)
        if number is None:
            raise OSError(errno.ENOTSUP, f"{self.name}: no metadata context {context}")
        flags = CmdFlag.REQ_ONE if one else _NO_FLAGS
        length = min(length, MAX_RANGE)
        sent = await self._send(Cmd.BLOCK_STATUS, offset, length, flags)
        await self._finish([sent])
        if number not in sent.extents:
            raise OSError(errno.EIO, f"{self.name}: the server left out {context}")
        return list(_clip(sent.extents[number], length))

    async def aclose(self) -> None:
        """Sends DISC, for at most a second, and closes the socket; requests in flight raise ConnectionError."""
        if self._closed is None:
            self._cookie += 1
            with trio.move_on_after(1) as scope:
                scope.shield = True
                await self._write(encode_request(ev.Request(Cmd.DISC, 0, self._cookie)))
        self._close("closed")
        await trio.lowlevel.cancel_shielded_checkpoint()

    # --- sending -----------------------------------------------------------------------------
    def _has_flag(self, flag: Flag) -> bool:
        return bool(self.negotiated.flags & flag)

    def _check_writable(self, offset: int, length: int) -> None:
        """Raises OSError if the export is read-only, or the range is not aligned to the smallest block."""
        if self.read_only:
            raise OSError(errno.EPERM, f"{self.name}: the export is read-only")
        low = self.negotiated.minimum_block
        if (offset | length) % low:
            raise OSError(errno.EINVAL, f"{self.name}: not aligned to {low} bytes")

    async def _request_range(
        self, command: Cmd, needs: Flag, offset: int, length: int, flags: CmdFlag = _NO_FLAGS
    ) -> None:
        """Sends a command without payload for a range, one part of MAX_RANGE bytes after the other. Raises OSError.

        `needs` is the transmission flag of servers that know the command.
        """
        if not self._has_flag(needs):
            raise OSError(errno.ENOTSUP, f"{self.name}: the server does not know {command.name}")
        if command != Cmd.CACHE:
            self._check_writable(offset, length)
        for at, size in _split(offset, length, MAX_RANGE):
            await self._finish([await self._send(command, at, size, flags)])

    async def _send(
        self,
        command: Cmd,
        offset: int,
        length: int,
        flags: CmdFlag = _NO_FLAGS,
        payload: Buffer = b"",
        sink: memoryview | None = None,
    ) -> _InFlight:
        """Sends one request, whose reply _finish() waits for. The data of a READ are put into `sink`.

        Raises ConnectionError if the connection has ended.
        """
        try:
            self._sending.acquire_nowait()  # which, unlike acquire(), lets nobody else run first
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            if self._closed is not None:
                raise ConnectionError(errno.ENOTCONN, f"{self.name}: {self._closed}")
            self._cookie += 1
            request = ev.Request(command, flags, self._cookie, offset, length, payload)
            sent = self._in_flight[request.cookie] = _InFlight()
            self._reader.expect(request, sink)
            await self._write(encode_request(request))
        finally:
            self._sending.release()
        return sent

    async def _write(self, buffers: list[Buffer]) -> None:
        """Sends all of `buffers`. If that fails or is cancelled, part of a request may be sent: the connection ends."""
        try:
            while buffers:
                try:
                    buffers = remaining(buffers, self._sock.sendmsg(buffers))
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._sock)
        except trio.ClosedResourceError:
            pass  # closed while we waited, which every request in flight has been told
        except OSError as exc:
            self._close(exc.strerror or "the connection broke")
        except trio.Cancelled:
            self._close("a request was given up while it was being sent")
            raise

    async def _finish(self, sent: list[_InFlight]) -> None:
        """Waits for the replies to all these requests. Raises the error of the first that failed."""
        for one in sent:
            await one.done.wait()
        for one in sent:
            if one.error is not None:
                raise one.error

    # --- receiving ---------------------------------------------------------------------------
    async def _receive(self) -> None:
        """The task that receives replies, started by connect(). It ends with the connection and raises nothing."""
        why = "closed"
        try:
            with self._receiving:
                await self._receive_until_closed()
        except trio.ClosedResourceError:
            pass
        except ProtocolError as exc:
            why = f"the server broke the protocol: {exc}"
        except OSError as exc:
            why = exc.strerror or "the connection broke"
        except Exception as exc:
            log.exception("%s: the connection failed", self.name)
            why = f"a fault of the client itself ({type(exc).__name__})"
        finally:
            self._close(why)

    async def _receive_until_closed(self) -> None:
        self._handle_received()
        while self._closed is None:
            await trio.lowlevel.wait_readable(self._sock)
            for _ in range(RECEIVES_PER_TURN):
                if not self._receive_once():
                    break

    def _receive_once(self) -> bool:
        """Receives and handles what has come; False if that is nothing. Raises OSError, ProtocolError."""
        try:
            count = self._sock.recv_into(self._reader.space())
        except BlockingIOError:
            return False
        if not count:
            raise ConnectionError(errno.ECONNRESET, "the server closed the connection")
        self._reader.received(count)
        self._handle_received()
        return True

    def _handle_received(self) -> None:
        """Handles all replies that are complete. Raises ProtocolError."""
        while not isinstance(event := self._reader.next_event(), ev.NeedData):
            self._handle_reply(event)

    def _handle_reply(self, event: ev.Reply) -> None:
        """Adds a reply or chunk to its request, which is done if it was the last."""
        request = self._in_flight[event.cookie]
        match event:
            case ev.SimpleReply(error=code) if code:
                request.error = OSError(
                    local_errno(code), f"{self.name}: {os.strerror(local_errno(code))}"
                )
            case ev.ErrorChunk(error=code, text=text):
                said = text or os.strerror(local_errno(code))
                request.error = request.error or OSError(local_errno(code), f"{self.name}: {said}")
            case ev.StatusChunk(context_id=number, extents=extents):
                request.extents[number] = extents
        if isinstance(event, (ev.SimpleReply, ev.NoneChunk)) or event.done:
            del self._in_flight[event.cookie]
            request.done.set()

    def _close(self, why: str) -> None:
        """Ends the connection, unless it has ended: requests in flight, and all later ones, raise ConnectionError."""
        if self._closed is not None:
            return
        self._closed = why
        self._receiving.cancel()
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()
        in_flight, self._in_flight = self._in_flight, {}
        for request in in_flight.values():
            request.error = ConnectionError(errno.ENOTCONN, f"{self.name}: {why}")
            request.done.set()


def _split(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    """The range [offset, offset + length) in parts of at most `most` bytes, each as (offset, length)."""
    for at in range(offset, offset + length, most):
        yield at, min(most, offset + length - at)


def _clip(extents: tuple[tuple[int, int], ...], length: int) -> Iterator[tuple[int, int]]:
    """The extents (length, flags) cut off after `length` bytes in all."""
    for size, flags in extents:
        if length <= 0:
            return
        yield min(size, length), flags
        length -= size
