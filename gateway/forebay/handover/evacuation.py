# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A host is emptied for maintenance: what is dirty goes to the images, and what nobody uses is given back.

A disk whose VM runs stays, and writes through from then on: the host may go at any time, and the image has all that was
flushed.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import trio

from forebay.disk.modes import PRIVATE_MODES
from forebay.errors import ForebayError
from forebay.handover.moves import Movable
from forebay.handover.phase import Phase
from forebay.handover.wishes import Progress
from forebay.units import Mode

RUNS = "its VM runs here: move it, or shut it down; until then it writes through"
ITS_OWN = "what it wrote lies here only: 'forebay save' or 'forebay commit' it, or detach it to give that up"

_WRITES_THROUGH = (*PRIVATE_MODES, Mode.WRITE_THROUGH)
"""Modes of disks that are to write through from then on: also where they do for a handover, which may come to nothing.
"""


class Leaving(Movable, Protocol):
    """What is needed of a disk that is attached."""

    @property
    def clients(self) -> int:
        """How many clients are connected."""

    async def drain(self, progress: Progress) -> None:
        """Write back everything that is dirty. Raises OSError and ForebayError."""


class Detach(Protocol):
    """As `Departures.detach`."""

    async def __call__(self, name: str, *, spare: bool = False, progress: Progress) -> None:
        """Detach a disk. Raises ForebayError and OSError."""


SetMode = Callable[[str, Mode, Progress], Awaitable[Any]]


class Evacuation:
    """Of all disks of this host."""

    def __init__(
        self,
        disks: Callable[[], Sequence[Leaving]],
        told: Callable[[], list[dict[str, Any]]],
        detach: Detach,
        set_mode: SetMode,
    ) -> None:
        """`disks` returns those that are attached, `told` the status of all, those included that are not served."""
        self._disks = disks
        self._told = told
        self._detach = detach
        self._set_mode = set_mode

    async def run(self, to: str, patience: float, progress: Progress) -> dict[str, Any]:
        """Empty the host, all disks at once: names of those that are `released`, and name and reason of those `left`.

        `to`: a host to which VMs are moved meanwhile, which is waited for, for `patience` seconds. Raises nothing that
        is of one disk.
        """
        amounts: dict[str, tuple[int, int]] = {}
        disks = self._disks()
        names = {disk.name for disk in disks}
        left = {one["name"]: str(one["reason"]) for one in self._told() if one["name"] not in names}

        async def leave(disk: Leaving) -> None:
            def advance(done: int, total: int) -> None:
                amounts[disk.name] = (done, total)
                progress(sum(x for x, _ in amounts.values()), sum(x for _, x in amounts.values()))

            try:
                left[disk.name] = await self._leave(disk, to, patience, advance)
            except (OSError, ForebayError) as fault:
                left[disk.name] = getattr(fault, "strerror", None) or str(fault)

        async with trio.open_nursery() as nursery:
            for disk in disks:
                nursery.start_soon(leave, disk)
        return {
            "released": sorted(name for name, why in left.items() if not why),
            "left": [{"name": name, "why": left[name]} for name in sorted(left) if left[name]],
            "dirty_bytes": sum(disk.status()["dirty_bytes"] for disk in self._disks()),
        }

    async def _leave(self, disk: Leaving, to: str, patience: float, progress: Progress) -> str:
        """Have one disk leave. Why it stays; empty if it does not. Raises OSError and ForebayError."""
        await disk.drain(progress)
        why = RUNS
        if disk.clients and to and disk.handover is not None:
            why = await self._move(disk, to, patience, progress) or RUNS
        told = disk.status()  # a VM may have run, and written, meanwhile
        if told["overlay"] and told["private_bytes"]:
            return ITS_OWN
        if not disk.clients:
            await self._detach(disk.name, spare=True, progress=progress)
            return ""
        if Mode(told["mode"]) in _WRITES_THROUGH and not told["overlay"] and not told["read_only"]:
            await self._set_mode(disk.name, Mode.WRITE_THROUGH, progress)
        return why

    async def _move(self, disk: Leaving, to: str, patience: float, progress: Progress) -> str:
        """Wait until the VM has gone to that host. Why it has not; empty if it has."""
        assert disk.handover is not None, "it can be handed over"
        try:
            with disk.handover.wish(to, _silent), trio.move_on_after(patience):
                await disk.handover.prepare(to, patience, progress)
                while disk.clients or disk.handover.phase is Phase.PREPARED:  # noqa: ASYNC110 (nobody tells)
                    await trio.sleep(1.0)
                return ""
        except ForebayError as fault:  # it has to write through all the same
            return str(fault)
        return f"its VM has not gone to host {to} for {patience:g} s: it writes through"


def _silent(_done: int, _total: int) -> None:
    pass
