# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The handover of one disk's image: from this host to another, or from another to this one.

The directory beside the image is the only channel between the two: who comes writes there that it asks
(`sidecar/incoming.py`), the owner answers in its marker (`Owner.phase`).
"""

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay.formats.magic import RAW
from forebay.handover import hot
from forebay.handover.coming import Coming
from forebay.handover.giving import Giving
from forebay.handover.phase import MOVES, Phase
from forebay.handover.wishes import Progress
from forebay_cache.states import Machine


class Handover:
    """Of one disk. `run` has to be running."""

    def __init__(
        self,
        disk: Disk,
        clients: Callable[[], int],
        note: Callable[[Phase], Awaitable[None]],
        give_up: Callable[[], None],
    ) -> None:
        """`clients` returns how many are connected. `note` puts the phase on record; it raises ForebayError and
        OSError. `give_up` detaches a disk whose VM does not come.
        """
        source = disk.source
        assert source.claim is not None, "only a disk that writes a file hands it over"
        first = Phase.RELEASED if source.withheld else Phase.NONE
        first = Phase.INCOMING if source.asking is not None else first
        self._disk = disk
        self._phases = Machine(MOVES, first, f"the handover of disk '{disk.name}'")
        self.giving = Giving(disk, source.claim, self._phases, clients, note)
        self.coming: Coming | None = None
        if source.asking is not None:
            self.coming = Coming(disk, source.asking, self._phases, clients, note, give_up)
        self._give_up = give_up
        disk.image.reach.on_wanted = self._want

    @property
    def phase(self) -> Phase:
        """How far it is."""
        return self._phases.state

    def _want(self) -> None:
        if self.phase is Phase.INCOMING and self.coming is not None:
            self.coming.want()
        else:
            self.giving.wake()

    async def run(self) -> None:
        """Do both halves, until cancelled."""
        async with trio.open_nursery() as nursery:
            if self.coming is not None:
                await self.coming.run()
                nursery.start_soon(hot.warm, self._disk)
            await self.giving.run()

    def status(self) -> dict[str, Any]:
        """Keys of the disk's status."""
        asked = self.giving.asked
        to = asked.host if asked is not None and self.phase is not Phase.NONE else ""
        return {"handover": self.phase.value, "handover_to": to}

    # ----------------------------------------------------------------------------------------- what operators ask for

    async def prepare(
        self, to: str, patience: float, progress: Progress, *, with_data: bool = False
    ) -> None:
        """Return when the image is prepared for the host that asks, or was handed over; `to`: for that host alone.

        Raises ForebayError where nobody asks, or something fails, for `patience` seconds.
        """
        del with_data  # its image has that
        giving = self.giving
        if self.phase is Phase.INCOMING:
            raise ForebayError(
                f"'{self._disk.name}' is about to come here: it is prepared where it is"
            )
        with self.wish(to, progress), trio.move_on_after(patience):
            while self.phase is Phase.NONE:
                moved = giving.moved
                await self._disk.image.look()
                giving.wake()
                with trio.move_on_after(1.0):
                    await moved.wait()
        if self.phase is Phase.NONE:
            who = f"host {to} does not ask" if to else "no host asks"
            why = giving.error or f"{who} for it: run 'forebay attach … --incoming' there"
            raise ForebayError(f"'{self._disk.name}' is not prepared: {why}")

    def wish(self, to: str, progress: Progress) -> contextlib.AbstractContextManager[None]:
        """Within it the image goes to that host alone: see `Wishes.wish`."""
        return self.giving.wishes.wish(self._disk.name, to, progress)

    async def finish(self, patience: float) -> None:
        """Return when the image was taken: its VM runs here. Raises ForebayError where it is not let go."""
        if self.phase is Phase.NONE:
            return
        if self.coming is None:
            raise ForebayError(f"'{self._disk.name}' goes to another host: finish it there")
        with trio.move_on_after(patience):
            while self.phase is Phase.INCOMING:
                self.coming.want()
                with trio.move_on_after(1.0):
                    await self.coming.moved.wait()
        if self.phase is Phase.INCOMING:
            why = self._disk.image.conflict or self.coming.why_not()
            raise ForebayError(f"'{self._disk.name}' has not come: {why}")

    async def abort(self, patience: float) -> None:
        """End it: the image stays where it is. Raises ForebayError where it was let go already."""
        if self.phase is Phase.INCOMING:
            self._give_up()
            return
        if self.phase is Phase.PREPARED:
            self.giving.refuse()
            with trio.move_on_after(patience):
                while self.phase is Phase.PREPARED:
                    await self.giving.moved.wait()
        if self.phase is not Phase.NONE:
            raise ForebayError(
                f"'{self._disk.name}' was handed over: it comes back by itself when a client here wants it, and the "
                "other host has not taken it"
            )


def handover_of(
    disk: Disk,
    clients: Callable[[], int],
    note: Callable[[Phase], Awaitable[None]],
    give_up: Callable[[], None],
) -> Handover | None:
    """The handover of a disk; None where its image cannot be handed over."""
    use = disk.source.use
    is_file = disk.source.claim is not None and disk.source.shown_format == RAW
    return Handover(disk, clients, note, give_up) if is_file and use.need_locks else None
