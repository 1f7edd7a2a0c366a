# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How far the handover of one disk's image is, on either host, and what may follow; gateway/README.md has the table."""

from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Any, Protocol

from forebay.handover.wishes import Progress
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


class Movement(Protocol):
    """The handover of a disk: of the image that it writes, or of an overlay. Calls raise ForebayError and OSError."""

    @property
    def phase(self) -> Phase:
        """How far it is."""

    async def run(self) -> None:
        """Do what others, and operators, ask for, until cancelled."""

    def status(self) -> dict[str, Any]:
        """Keys of the disk's status."""

    async def prepare(
        self, to: str, patience: float, progress: Progress, *, with_data: bool = False
    ) -> None:
        """Return when it is prepared for the host that asks, or was handed over; `to`: for that host alone.

        `with_data`: an overlay takes along what it has.
        """

    def wish(self, to: str, progress: Progress) -> AbstractContextManager[None]:
        """Within it the disk goes to that host alone."""

    async def finish(self, patience: float) -> None:
        """Return when it has come."""

    async def abort(self, patience: float) -> None:
        """End it: the disk stays where it is."""
