"""Connecting to an NBD server: the socket, and the handshake on it."""

import errno
import socket

import trio

from forebay_nbd.client.haggle import Answers, Terms, haggle
from forebay_nbd.protocol import events as ev
from forebay_nbd.protocol.handshake import ClientHandshake
from forebay_nbd.protocol.wire import ProtocolError

Address = str | tuple[str, int]
"""The path of a Unix socket, or a host and a port."""

SEND_BUFFER = 4 << 20
"""SO_SNDBUF asked for on Unix sockets; the kernel caps it (net.core.wmem_max). A write of 1 MiB, as FUSE has them,
leaves in one go: by default it takes six, each after a wait for the server to read."""
MOST_ANSWERS = 100
"""Replies to one option that are believed: five come. A server may send them without end."""


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


async def shake_hands(
    sock: socket.socket, export: str, contexts: tuple[str, ...]
) -> tuple[Terms, bytes]:
    """The terms, and what the server has sent beyond the handshake."""
    hands = ClientHandshake()
    greeting = await _hear(sock, hands)
    if not isinstance(greeting, ev.Greeting):
        raise ProtocolError("no greeting")
    talk = haggle(greeting, export, contexts)
    question = next(talk)
    while True:
        await _say(sock, hands.send(question))
        answers: Answers = []
        while not isinstance(question, ev.ClientFlags) and not _ends(answers):
            reply = await _hear(sock, hands)
            assert not isinstance(reply, ev.Greeting)
            answers.append(reply)
            if len(answers) > MOST_ANSWERS:  # as fast as they come: nobody else would have a turn
                raise ProtocolError(f"more than {MOST_ANSWERS} replies to one option")
        try:
            question = talk.send(answers)
        except StopIteration as stop:
            terms: Terms = stop.value
            return terms, hands.trailing()


def _ends(answers: Answers) -> bool:
    return bool(answers) and isinstance(answers[-1], (ev.Ack, ev.OptionError, ev.ExportBegins))


async def _hear(
    sock: socket.socket, hands: ClientHandshake
) -> ev.Greeting | ev.OptionReply | ev.ExportBegins:
    while isinstance(event := hands.next_event(), ev.NeedData):
        try:
            data = sock.recv(4096)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
            continue
        if not data:
            raise ConnectionError(
                errno.ECONNRESET, "the server closed the connection during the handshake"
            )
        hands.receive(data)
    return event


async def _say(sock: socket.socket, data: bytes) -> None:
    while data:
        try:
            data = data[sock.send(data) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


def named(exc: OSError, name: str) -> OSError:
    """The same error, its text saying where."""
    text = exc.strerror or str(exc) or type(exc).__name__
    return type(exc)(exc.errno or errno.ECONNREFUSED, f"{name}: {text}")
