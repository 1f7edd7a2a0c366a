# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Connecting to an NBD server: the client's socket, and the handshake on it."""

import errno
import socket

import trio

from forebay_nbd.client.negotiation import ClientMessage, Negotiated, Replies, negotiate
from forebay_nbd.protocol import events as ev
from forebay_nbd.protocol.handshake import ClientHandshake
from forebay_nbd.protocol.wire import ProtocolError

Address = str | tuple[str, int]
"""The path of a Unix socket, or a host and a port."""

SEND_BUFFER = 4 << 20
"""SO_SNDBUF asked for on Unix sockets, bytes; the kernel caps it (net.core.wmem_max). A write of 1 MiB, as FUSE has
them, leaves in one go: by default it takes six, each after a wait for the server to read."""
MAX_REPLIES = 100
"""Replies to one option that are accepted: real servers send about five. A server may send them without end."""


def name_of(address: Address) -> str:
    """An address as texts of errors begin with it."""
    return address if isinstance(address, str) else "{}:{}".format(*address)


async def open_export(
    address: Address,
    export: str,
    contexts: tuple[str, ...] = (),
    *,
    timeout: float,
    structured: bool = True,
) -> tuple[socket.socket, Negotiated, bytes]:
    """Connects to an export: a socket in transmission, what was agreed on, and bytes that came already.

    Connecting and the handshake may take `timeout` seconds each. Without `structured`, no structured replies are asked
    for. Raises OSError as `Client.connect` does. If cancelled, the socket is closed.
    """
    name = name_of(address)
    try:
        with trio.fail_after(timeout):
            sock = await connect(address)
    except trio.TooSlowError:
        raise TimeoutError(errno.ETIMEDOUT, f"{name}: no answer in {timeout:g} s") from None
    except OSError as exc:
        raise with_address(exc, name) from exc
    try:
        with trio.fail_after(timeout):
            negotiated, early = await do_handshake(sock, export, contexts, structured=structured)
    except BaseException as exc:
        trio.lowlevel.notify_closing(sock)
        sock.close()
        if isinstance(exc, trio.TooSlowError):
            raise TimeoutError(errno.ETIMEDOUT, f"{name}: no answer in {timeout:g} s") from None
        if isinstance(exc, ProtocolError):
            raise ConnectionError(errno.EPROTO, f"{name}: {exc}") from exc
        if isinstance(exc, OSError):
            raise with_address(exc, name) from exc
        raise
    return sock, negotiated, early


async def connect(address: Address) -> socket.socket:
    """A connected, non-blocking socket with the options that suit it. Raises OSError."""
    if isinstance(address, str):
        found = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await found.connect(address)
        except BaseException:
            found.close()
            raise
    else:
        found = (await trio.open_tcp_stream(*address)).socket
    sock = socket.socket(fileno=found.detach())
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return sock


async def do_handshake(
    sock: socket.socket, export: str, contexts: tuple[str, ...], *, structured: bool = True
) -> tuple[Negotiated, bytes]:
    """Asks the server for an export; transmission has begun when this returns.

    Returns what was agreed on, and the bytes that were received after the handshake. Raises OSError if the server
    refuses or hangs up, ProtocolError if it breaks the protocol. The socket stays open in any case, and is of no use
    after an exception or a cancellation.
    """
    handshake = ClientHandshake()
    greeting = await _receive(sock, handshake)
    if not isinstance(greeting, ev.Greeting):
        raise ProtocolError("no greeting")
    negotiation = negotiate(greeting, export, contexts, structured=structured)
    message = next(negotiation)
    while True:
        await _send(sock, handshake.send(message))
        replies = await _receive_replies(sock, handshake, message)
        try:
            message = negotiation.send(replies)
        except StopIteration as stop:
            negotiated: Negotiated = stop.value
            return negotiated, handshake.trailing()


async def _receive_replies(
    sock: socket.socket, handshake: ClientHandshake, message: ClientMessage
) -> Replies:
    """All replies to `message`, which was sent. Raises ProtocolError for more than MAX_REPLIES, and as _receive()."""
    replies: Replies = []
    while not isinstance(message, ev.ClientFlags) and not _is_complete(replies):
        reply = await _receive(sock, handshake)
        assert not isinstance(reply, ev.Greeting)
        replies.append(reply)
        if len(replies) > MAX_REPLIES:  # as fast as they come: nobody else would have a turn
            raise ProtocolError(f"more than {MAX_REPLIES} replies to one option")
    return replies


def _is_complete(replies: Replies) -> bool:
    """True if no further reply to the option follows these."""
    return bool(replies) and isinstance(replies[-1], (ev.Ack, ev.OptionError, ev.ExportBegins))


async def _receive(
    sock: socket.socket, handshake: ClientHandshake
) -> ev.Greeting | ev.HandshakeReply:
    """The server's next message. Raises ProtocolError, OSError, or ConnectionError if the server hangs up."""
    while isinstance(event := handshake.next_event(), ev.NeedData):
        try:
            data = sock.recv(4096)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
            continue
        if not data:
            raise ConnectionError(
                errno.ECONNRESET, "the server closed the connection during the handshake"
            )
        handshake.receive(data)
    return event


async def _send(sock: socket.socket, data: bytes) -> None:
    """Sends all of `data`. Raises OSError."""
    while data:
        try:
            data = data[sock.send(data) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


def with_address(exc: OSError, name: str) -> OSError:
    """An exception of the same type and errno as `exc` whose text begins with `name`, the address."""
    text = exc.strerror or str(exc) or type(exc).__name__
    return type(exc)(exc.errno or errno.ECONNREFUSED, f"{name}: {text}")
