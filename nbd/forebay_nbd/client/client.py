"""A trio NBD client: one connection, many requests in flight."""

import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import trio

from forebay_nbd.client.connecting import Address, connect, named, shake_hands
from forebay_nbd.client.haggle import Terms
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
    rest,
)

CONNECT_SECONDS = 10.0
"""A server that has not let us in by then is not there."""
MAX_RANGE = 1 << 30
"""Longest TRIM, WRITE_ZEROES, CACHE and BLOCK_STATUS sent, bytes: the field has 32 bits, and some servers work through
such a range before they answer anything else."""
TURNS = 32
"""Receives in a row before other tasks run."""


_PLAIN = CmdFlag(0)


@dataclass(slots=True, eq=False)
class _Call:
    """A request that is out, and what has come for it."""

    done: trio.Event = field(default_factory=trio.Event)
    error: OSError | None = None
    extents: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)


class Client:
    """A connected export. Offsets and lengths are bytes and have to lie inside `size`.

    All methods raise OSError with the errno the server sent, and ConnectionError once the connection is dead; there is
    no reconnecting. A cancelled request may or may not have been carried out. How many requests are in flight is the
    caller's business.
    """

    def __init__(self, sock: socket.socket, terms: Terms, name: str) -> None:
        self.terms = terms
        self.size = terms.size
        self.read_only = bool(terms.flags & Flag.READ_ONLY)
        self.name = name
        self._sock = sock
        self._reader = ReplyReader(terms.structured)
        self._calls: dict[int, _Call] = {}
        self._cookie = 0
        self._sending = trio.Lock()
        self._dead: str | None = None
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
        """Connects to an export. Replies are received by a task in `nursery`, which never fails.

        Raises OSError whose text names the address and says what is wrong: ENOENT for an unknown export, TimeoutError,
        ConnectionError, or what connect(2) said.
        """
        name = address if isinstance(address, str) else "{}:{}".format(*address)
        try:
            with trio.fail_after(timeout):
                sock = await connect(address)
        except trio.TooSlowError:
            raise TimeoutError(errno.ETIMEDOUT, f"{name}: no answer in {timeout:g} s") from None
        except OSError as exc:
            raise named(exc, name) from exc
        try:
            with trio.fail_after(timeout):
                terms, early = await shake_hands(sock, export, contexts)
        except BaseException as exc:
            trio.lowlevel.notify_closing(sock)
            sock.close()
            if isinstance(exc, trio.TooSlowError):
                raise TimeoutError(errno.ETIMEDOUT, f"{name}: no answer in {timeout:g} s") from None
            if isinstance(exc, ProtocolError):
                raise ConnectionError(errno.EPROTO, f"{name}: {exc}") from exc
            if isinstance(exc, OSError):
                raise named(exc, name) from exc
            raise
        client = cls(sock, terms, name)
        client._reader.feed(early)
        nursery.start_soon(client._receive)
        return client

    # --- requests ---------------------------------------------------------------------------
    async def pread(self, offset: int, length: int) -> bytearray:
        """`length` bytes from `offset` on."""
        low = self.terms.minimum_block
        start, stop = offset // low * low, -(-(offset + length) // low) * low
        data = bytearray(stop - start)
        await self.pread_into(start, memoryview(data))
        return (
            data if (start, stop) == (offset, offset + length) else data[offset - start :][:length]
        )

    async def pread_into(self, offset: int, view: memoryview) -> None:
        """Fills `view` with what lies from `offset` on. OSError(EINVAL) unless both ends lie on the smallest block.

        When it was cancelled, a late reply may still write into `view`: that memory is not to be used again.
        """
        low = self.terms.minimum_block
        if (offset | len(view)) % low:
            raise OSError(errno.EINVAL, f"{self.name}: not aligned to {low} bytes")
        calls = []
        for at, size in _pieces(offset, len(view), self.terms.maximum_payload // low * low):
            sink = view[at - offset : at - offset + size]
            calls.append(await self._send(Cmd.READ, at, size, sink=sink))
        await self._finish(calls)

    async def pwrite(self, offset: int, data: Buffer, fua: bool = False) -> None:
        """Writes `data` at `offset`; with `fua` it is durable when this returns. `data` must not change meanwhile."""
        self._check_writable(offset, len(data))
        flags = CmdFlag.FUA if fua and self._can(Flag.SEND_FUA) else _PLAIN
        view = memoryview(data).cast("B")
        calls = []
        for at, size in _pieces(offset, len(view), self.terms.maximum_payload):
            calls.append(
                await self._send(Cmd.WRITE, at, size, flags, view[at - offset : at - offset + size])
            )
        await self._finish(calls)
        if fua and not flags:
            await self.flush()

    async def flush(self) -> None:
        """All completed writes are durable when this returns. A server without FLUSH has no cache to speak of."""
        if self._can(Flag.SEND_FLUSH):
            await self._finish([await self._send(Cmd.FLUSH, 0, 0)])

    async def trim(self, offset: int, length: int) -> None:
        """The content is no longer needed. OSError(ENOTSUP) where the server does not know TRIM."""
        await self._range(Cmd.TRIM, Flag.SEND_TRIM, offset, length)

    async def zero(
        self, offset: int, length: int, *, no_hole: bool = False, fast: bool = False
    ) -> None:
        """The range reads as zeros. OSError(ENOTSUP) where the server cannot, or, with `fast`, not fast."""
        flags = CmdFlag.NO_HOLE if no_hole else _PLAIN
        if fast:
            if not self._can(Flag.SEND_FAST_ZERO):
                raise OSError(errno.ENOTSUP, f"{self.name}: no fast zeroes")
            flags |= CmdFlag.FAST_ZERO
        await self._range(Cmd.WRITE_ZEROES, Flag.SEND_WRITE_ZEROES, offset, length, flags)

    async def cache(self, offset: int, length: int) -> None:
        """A hint that the range will be read. OSError(ENOTSUP) where the server does not take hints."""
        await self._range(Cmd.CACHE, Flag.SEND_CACHE, offset, length)

    async def block_status(
        self, offset: int, length: int, context: str = BASE_ALLOCATION, *, one: bool = False
    ) -> list[tuple[int, int]]:
        """At least one (length, flags) from `offset` on; they may cover less than was asked for, and never more.

        OSError(ENOTSUP) where the context was not agreed on.
        """
        number = next((i for i, known in self.terms.contexts.items() if known == context), None)
        if number is None:
            raise OSError(errno.ENOTSUP, f"{self.name}: no metadata context {context}")
        flags = CmdFlag.REQ_ONE if one else _PLAIN
        length = min(length, MAX_RANGE)
        call = await self._send(Cmd.BLOCK_STATUS, offset, length, flags)
        await self._finish([call])
        if number not in call.extents:
            raise OSError(errno.EIO, f"{self.name}: the server left out {context}")
        return list(_within(call.extents[number], length))

    async def aclose(self) -> None:
        """Says goodbye and closes; requests in flight fail with ConnectionError."""
        if self._dead is None:
            self._cookie += 1
            with trio.move_on_after(1) as scope:
                scope.shield = True
                await self._write(encode_request(ev.Request(Cmd.DISC, 0, self._cookie)))
        self._die("closed")
        await trio.lowlevel.cancel_shielded_checkpoint()

    # --- sending -----------------------------------------------------------------------------
    def _can(self, flag: Flag) -> bool:
        return bool(self.terms.flags & flag)

    def _check_writable(self, offset: int, length: int) -> None:
        if self.read_only:
            raise OSError(errno.EPERM, f"{self.name}: the export is read-only")
        if (offset | length) % self.terms.minimum_block:
            raise OSError(
                errno.EINVAL, f"{self.name}: not aligned to {self.terms.minimum_block} bytes"
            )

    async def _range(
        self, command: Cmd, needs: Flag, offset: int, length: int, flags: CmdFlag = _PLAIN
    ) -> None:
        if not self._can(needs):
            raise OSError(errno.ENOTSUP, f"{self.name}: the server does not know {command.name}")
        if command != Cmd.CACHE:
            self._check_writable(offset, length)
        for at, size in _pieces(offset, length, MAX_RANGE):
            await self._finish([await self._send(command, at, size, flags)])

    async def _send(
        self,
        command: Cmd,
        offset: int,
        length: int,
        flags: CmdFlag = _PLAIN,
        payload: Buffer = b"",
        sink: memoryview | None = None,
    ) -> _Call:
        """Sends one request; _finish() waits for what comes of it."""
        try:
            self._sending.acquire_nowait()  # which, unlike acquire(), lets nobody else run first
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            if self._dead is not None:
                raise ConnectionError(errno.ENOTCONN, f"{self.name}: {self._dead}")
            self._cookie += 1
            request = ev.Request(command, flags, self._cookie, offset, length, payload)
            call = self._calls[request.cookie] = _Call()
            self._reader.expect(request, sink)
            await self._write(encode_request(request))
        finally:
            self._sending.release()
        return call

    async def _write(self, buffers: list[Buffer]) -> None:
        """Sends all of it. If cancelled half-way the stream is beyond repair, and the connection is dead."""
        try:
            while buffers:
                try:
                    buffers = rest(buffers, self._sock.sendmsg(buffers))
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._sock)
        except trio.ClosedResourceError:
            pass  # died while we waited, and every call knows
        except OSError as exc:
            self._die(exc.strerror or "the connection broke")
        except trio.Cancelled:
            self._die("a request was given up while it was being sent")
            raise

    async def _finish(self, calls: list[_Call]) -> None:
        """Waits for the replies to all calls and raises the first error."""
        for call in calls:
            await call.done.wait()
        for call in calls:
            if call.error is not None:
                raise call.error

    # --- receiving ---------------------------------------------------------------------------
    async def _receive(self) -> None:
        why = "closed"
        try:
            with self._receiving:
                await self._receive_until_death()
        except trio.ClosedResourceError:
            pass
        except ProtocolError as exc:
            why = f"the server broke the protocol: {exc}"
        except OSError as exc:
            why = exc.strerror or "the connection broke"
        finally:
            self._die(why)

    async def _receive_until_death(self) -> None:
        self._take_events()
        while self._dead is None:
            await trio.lowlevel.wait_readable(self._sock)
            for _ in range(TURNS):
                if not self._receive_once():
                    break

    def _receive_once(self) -> bool:
        """Takes what is there; False when that is nothing."""
        try:
            count = self._sock.recv_into(self._reader.space())
        except BlockingIOError:
            return False
        if not count:
            raise ConnectionError(errno.ECONNRESET, "the server closed the connection")
        self._reader.received(count)
        self._take_events()
        return True

    def _take_events(self) -> None:
        while not isinstance(event := self._reader.next_event(), ev.NeedData):
            self._note(event)

    def _note(self, event: ev.Reply) -> None:
        call = self._calls[event.cookie]
        match event:
            case ev.SimpleReply(error=code) if code:
                call.error = OSError(
                    local_errno(code), f"{self.name}: {os.strerror(local_errno(code))}"
                )
            case ev.ErrorChunk(error=code, text=text):
                said = text or os.strerror(local_errno(code))
                call.error = call.error or OSError(local_errno(code), f"{self.name}: {said}")
            case ev.StatusChunk(context_id=number, extents=extents):
                call.extents[number] = extents
        if isinstance(event, (ev.SimpleReply, ev.NoneChunk)) or event.done:
            del self._calls[event.cookie]
            call.done.set()

    def _die(self, why: str) -> None:
        """Nothing will be sent or received any more; what is in flight fails."""
        if self._dead is not None:
            return
        self._dead = why
        self._receiving.cancel()
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.error = ConnectionError(errno.ENOTCONN, f"{self.name}: {why}")
            call.done.set()


def _pieces(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    """[offset, offset + length) in parts of at most `most` bytes."""
    for at in range(offset, offset + length, most):
        yield at, min(most, offset + length - at)


def _within(extents: tuple[tuple[int, int], ...], length: int) -> Iterator[tuple[int, int]]:
    """The extents cut off after `length` bytes."""
    for size, flags in extents:
        if length <= 0:
            return
        yield min(size, length), flags
        length -= size
