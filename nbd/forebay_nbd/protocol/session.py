# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What was agreed on with a client, and what another process needs to go on with its connection."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Session:
    """The state of a connection in transmission between two requests.

    Together with the socket it is all that another process needs for Server.resume().
    """

    export_name: str
    """The name by which the client asked for the export; it may be empty."""
    structured: bool
    """Structured replies were agreed on."""
    contexts: dict[int, str] = field(default_factory=dict)
    """The metadata contexts that were selected, by the number that BLOCK_STATUS chunks carry."""
    unparsed: bytes = b""
    """Requests received and not answered; mostly none. The first are those that had been begun, as many as the limits
    of requests in flight allow, then at most one request more, and what the receive buffer held."""
    unsent: bytes = b""
    """Replies that the client has not taken: they have to be sent before any other."""
