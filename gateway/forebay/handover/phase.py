# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How far the handover of one disk's image is, on either host, and what may follow; gateway/README.md has the table."""

from enum import StrEnum

from forebay.sidecar import record
from forebay_cache.states import Machine, Table


class Phase(StrEnum):
    """The key `handover` of `forebay status --json`. What is on record of a disk is one of these, too."""

    NONE = "none"
    """The image is the disk's own, and no other host is about to have it."""
    PREPARED = record.PREPARED
    """All that is flushed is in the image, durably, and goes there at once. The VM runs here."""
    RELEASED = record.RELEASED
    """The image was let go. The VM runs on the other host, or is about to, or comes back."""
    INCOMING = "incoming"
    """The image is another host's, and this one asks for it."""


MOVES: Table[Phase] = {
    Phase.NONE: {
        Phase.PREPARED: "another host asks for it, and what is flushed is in the image",
    },
    Phase.PREPARED: {
        Phase.NONE: "nobody asks any more, or the operator ends it",
        Phase.RELEASED: "no client is connected, or the VM rests and writes on the other host",
    },
    Phase.RELEASED: {
        Phase.NONE: "a client came back, or the other host gave up, before that had taken it",
    },
    Phase.INCOMING: {
        Phase.NONE: "the VM writes here, and the image was taken",
    },
}

Phases = Machine[Phase]
