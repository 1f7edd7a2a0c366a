# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the control API asks of handovers."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from forebay.errors import ForebayError
from forebay.handover.phase import Movement
from forebay.handover.wishes import Progress


class Movable(Protocol):
    """What is needed of a disk that is attached."""

    @property
    def name(self) -> str:
        """The disk's name."""

    @property
    def handover(self) -> Movement | None:
        """The handover of its image; None where that cannot be."""

    def check_serves(self) -> None:
        """Raises ForebayError where the disk is stopped."""

    def status(self) -> dict[str, Any]:
        """The keys of its status."""


Evacuate = Callable[[str, float, Progress], Awaitable[dict[str, Any]]]


class Moves:
    """Handovers, as operators and hooks ask for them. All calls return the disk's status, and raise ForebayError and
    OSError. `patience` in seconds.
    """

    def __init__(self, find: Callable[[str], Movable], evacuate: Evacuate) -> None:
        """`find` returns the attached disk of that name; it raises ForebayError. `evacuate`: `Evacuation.run`."""
        self._find = find
        self.evacuate = evacuate
        """Empties this host: see `Evacuation.run`."""

    async def prepare(
        self,
        name: str,
        to: str,
        patience: float,
        progress: Progress,
        *,
        with_data: bool = False,
    ) -> dict[str, Any]:
        """Have the disk prepared for the host that asks for it; `to`: for that host alone; empty: for any. `with_data`:
        an overlay takes along what it has.
        """
        disk, handover = self._of(name)
        await handover.prepare(to, patience, progress, with_data=with_data)
        return disk.status()

    async def finish(self, name: str, patience: float) -> dict[str, Any]:
        """Have the disk take its image now, without waiting for the first write."""
        disk, handover = self._of(name)
        await handover.finish(patience)
        return disk.status()

    async def abort(self, name: str, patience: float) -> dict[str, Any]:
        """End the handover: the image stays where it is, and a disk that waits for it here is detached."""
        disk, handover = self._of(name)
        await handover.abort(patience)
        return disk.status()

    def _of(self, name: str) -> tuple[Movable, Movement]:
        disk = self._find(name)
        disk.check_serves()
        if disk.handover is None and disk.status().get("overlay"):
            raise ForebayError(
                f"'{name}' cannot be handed over: it has no store for what it would take along: 'forebay save {name} "
                "NEW' makes an image of it"
            )
        if disk.handover is None:
            raise ForebayError(
                f"'{name}' cannot be handed over: only disks that write raw image files are, in a store with locks"
            )
        return disk, disk.handover
