# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Every bound of the server, with its reason: what one client, and all of them, may cost."""

from dataclasses import dataclass
from typing import Final

from forebay_nbd.protocol.wire import MAX_STRING

PROCESS_BYTES: Final = 256 << 20
"""Memory that the requests and replies of all servers of a process share, where no Budgets say otherwise."""
STATUS_BYTES: Final = 32 << 20
"""The same for BLOCK_STATUS: so many replies of the most extents are made, or wait to be taken, at one time."""
CONNECTION_BYTES: Final = 256 << 20
"""The same for connections: their receive buffers, and what the kernel may hold of their replies. Some 380 of them."""
STALL_BYTES: Final = 256 << 10
"""A client that moves fewer bytes than this in `stall_seconds` counts as one that does not move."""
_WMEM_MAX: Final = 208 << 10
OWN_CONNECTIONS: Final = 4
"""Connections of a server whose memory counts against nothing that others share: its VM gets in whatever clients of
other disks do."""
SERVER_REQUESTS: Final = 128
"""Requests of all connections of a server that may wait at one time, but for one of each connection, which always may.
What they wait for may come for all of them at once, a flush say, and other servers have no turn until each of them was
answered."""
REFUSALS: Final = 16
"""Clients for which there is no room that are told so at one time; on further ones the server hangs up."""
REFUSAL_SECONDS: Final = 2.0
"""How long one of them may take to hear it. It takes real clients a millisecond."""
STATUS_REQUESTS: Final = 2
"""BLOCK_STATUS requests of one connection that are carried out, or whose replies are sent, at one time. Others wait
their turn, and cost next to nothing meanwhile."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of a Server. Sizes in bytes, times in seconds. The defaults are for a server of one disk."""

    handshake_seconds: float = 10.0
    """A client that is not in transmission by then is dropped: half-open connections cost memory (CVE-2024-7409)."""
    connections: int = 100
    """Connections of one server in transmission at one time; further ones are refused what they ask for. QEMU's
    number for the same CVE. A few are kept for the process that was first, and those in the handshake count separately.
    """
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
    server_bytes: int = 64 << 20
    """The same for all connections of a server, with the copies of replies that clients do not take: a quarter of what
    all servers of a process share (`PROCESS_BYTES`), so that one disk cannot take all. If it is used up, the connection
    that has stalled for longest is dropped, so that silent clients cannot starve a live one. A server gets no more than
    a quarter of what all share for BLOCK_STATUS (`STATUS_BYTES`) and connections (`CONNECTION_BYTES`), too."""
    own_bytes: int = 1 << 20
    """Part of that which counts against nothing that others share: a disk goes on, with small requests, while those of
    a store that hangs hold all there is. Of the memory for BLOCK_STATUS a server has as much of its own."""
    status_extents: int = 4096
    """Extents of one reply. A client asks on from where a reply ends."""
    batch_bytes: int = 8 << 20
    """Replies gathered before they are sent: bounds what has to be copied if the client does not read."""
    batch_buffers: int = 1000
    """Buffers of one sendmsg(); the kernel takes 1024 (UIO_MAXIOV)."""
    stall_seconds: float = 1.0
    """Buffers that a client does not take stay pinned for so long, in all; then they are copied, and the export may
    reuse its memory. After so long a client that does not move may be dropped if its memory is needed."""
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

    @property
    def connection_bytes(self) -> int:
        """Bytes that a connection counts as: its receive buffer, and as much as the kernel holds of replies at most.

        The kernel takes twice what was asked for, of at most net.core.wmem_max, whose default is 208 KiB.
        """
        return self.receive_buffer + 2 * min(self.send_buffer, _WMEM_MAX)
