"""What one client may cost: every bound of the server, named, with its reason."""

from dataclasses import dataclass

from forebay_nbd.protocol.wire import MAX_STRING


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a Server. Sizes in bytes, times in seconds. The defaults fit one socket per disk."""

    handshake_seconds: float = 10.0
    """A client that has not begun transmission by then is dropped: half-open sockets cost memory (CVE-2024-7409)."""
    connections: int = 100
    """Live connections of one server; more are closed at once. qemu's number for the same CVE."""
    options: int = 32
    """Options of one handshake; real clients need about five, a flood is cut off. nbdkit's number."""
    option_bytes: int = 8 << 10
    """Data of one option: the longest name, and queries, fit. More ends the connection unread (CVE-2017-15119)."""
    name_bytes: int = MAX_STRING
    """The protocol's own bound of a string."""
    queries: int = 32
    """Metadata queries of one option; there are two contexts to ask for."""
    inflight_requests: int = 64
    """Requests of one connection that may wait (misses, flushes); while so many do, its socket is not read. Requests
    answered at once are never counted, so a deep queue of hits runs at full speed."""
    inflight_bytes: int = 64 << 20
    """Their payload and reply bytes: two of the largest requests."""
    server_bytes: int = 256 << 20
    """The same over all connections of a server. When it is used up the longest stalled connection is dropped, so that
    silent clients cannot starve a live one."""
    batch_bytes: int = 8 << 20
    """Hits gathered before they are sent: bounds what has to be copied when the client does not read."""
    batch_buffers: int = 1000
    """Buffers of one sendmsg; the kernel takes 1024 (UIO_MAXIOV)."""
    stall_seconds: float = 1.0
    """Unsent buffers of the cache stay pinned for so long; then they are copied, and the cache may reuse the memory."""
    receive_buffer: int = 256 << 10
    """Per connection: 9,000 reads or 60 writes of 4 KiB in one recv."""
    in_place_bytes: int = 128 << 10
    """Payloads up to this are parsed inside the receive buffer, longer ones get a buffer of their own."""
    send_buffer: int = 1 << 20
    """SO_SNDBUF asked for; the kernel caps it (net.core.wmem_max). 64 replies of 4 KiB have to fit."""
    poll_seconds: float = 40e-6
    """Longest wait for the next request by polling instead of sleeping: about what waking up costs."""
    turn_seconds: float = 500e-6
    """A busy connection lets the other tasks run this often."""
    shutdown_seconds: float = 30.0
    """At shutdown, requests in flight have so long to finish."""
