# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The phases in the life of a connection to the server."""

import enum
from collections.abc import Mapping


class Phase(enum.Enum):
    """Where a connection is in its life."""

    HANDSHAKE = "handshake"
    """Options are exchanged, or nothing has happened yet."""
    TRANSMISSION = "transmission"
    """Requests are read and answered."""
    STOPPING = "stopping"
    """Nothing more is read; requests in flight are completed and their replies sent."""
    SUSPENDING = "suspending"
    """As STOPPING, but the socket is to be left open for another process."""
    SUSPENDED = "suspended"
    """The socket is open, and this process neither reads from it nor writes to it any more."""
    CLOSED = "closed"
    """The socket is closed."""


MOVES: Mapping[Phase, Mapping[Phase, str]] = {
    Phase.HANDSHAKE: {
        Phase.TRANSMISSION: "GO or EXPORT_NAME was answered, or resume()",
        Phase.STOPPING: "stop()",
        Phase.SUSPENDING: "suspend()",
        Phase.CLOSED: "the client left, broke the protocol or took too long; abort()",
    },
    Phase.TRANSMISSION: {
        Phase.STOPPING: "stop()",
        Phase.SUSPENDING: "suspend()",
        Phase.CLOSED: "the client left or broke the protocol; abort()",
    },
    Phase.STOPPING: {
        Phase.SUSPENDING: "suspend()",
        Phase.CLOSED: "all is answered and sent, the client left, or shutdown_seconds are over; abort()",
    },
    Phase.SUSPENDING: {
        Phase.SUSPENDED: "all is answered, or cancel_requests()",
        Phase.CLOSED: "it was in the handshake, or the client left; abort()",
    },
    Phase.SUSPENDED: {},
    Phase.CLOSED: {},
}
"""For each phase, those that may follow it, each with the reason why it does. The same table is in nbd/README.md."""
