"""Every bound of the server, with its reason: what one client, and all of them, may cost."""

from dataclasses import dataclass

from forebay_nbd.protocol.wire import MAX_STRING


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of a Server. Sizes in bytes, times in seconds. The defaults are for a server of one disk."""

    handshake_seconds: float = 10.0
    """A client that is not in transmission by then is dropped: half-open connections cost memory (CVE-2024-7409)."""
    connections: int = 100
    """Connections of one server at one time; further ones are closed at once. QEMU's number for the same CVE."""
    options: int = 32
    """Options of one handshake. Real clients need about five; with more the connection ends. nbdkit's number."""
    option_bytes: int = 8 << 10
    """Data of one option: the longest name fits, and queries. With more the connection ends (CVE-2017-15119)."""
    name_bytes: int = MAX_STRING
    """Longest name of an export that is looked for: the protocol's own bound of a string."""
    queries: int = 32
    """Metadata queries of one option; there are two contexts to ask for."""
    inflight_requests: int = 64
    """Requests of one connection that may wait at one time (misses, flushes). While so many do, its socket is not read.
    Requests answered at once are not counted, so a deep queue of hits runs at full speed."""
    inflight_bytes: int = 64 << 20
    """Payloads and read data of those requests: two of the largest requests."""
    server_bytes: int = 256 << 20
    """The same for all connections of a server, and the copies of replies that clients do not take. If it is used up,
    the connection that has stalled for longest is dropped, so that silent clients cannot starve a live one."""
    batch_bytes: int = 8 << 20
    """Replies gathered before they are sent: bounds what has to be copied if the client does not read."""
    batch_buffers: int = 1000
    """Buffers of one sendmsg(); the kernel takes 1024 (UIO_MAXIOV)."""
    stall_seconds: float = 1.0
    """Buffers that a client does not take stay pinned for so long; then they are copied, and the export may reuse its
    memory."""
    receive_buffer: int = 256 << 10
    """Memory that one connection receives into: 9,000 READs, or 60 WRITEs of 4 KiB, in one recv()."""
    in_place_bytes: int = 128 << 10
    """Longest payload that is handed out as part of the receive buffer; a longer one gets memory of its own."""
    send_buffer: int = 1 << 20
    """SO_SNDBUF asked for; the kernel caps it (net.core.wmem_max). 64 replies of 4 KiB have to fit."""
    poll_seconds: float = 40e-6
    """How long a connection polls for the next request before it sleeps: about what waking up costs."""
    turn_seconds: float = 500e-6
    """How long a busy connection may keep other tasks from running."""
    shutdown_seconds: float = 30.0
    """How long requests in flight may take after stop(); then the connection is aborted."""
