# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The handover of one overlay with what it has, from this host to another, or from another to this one."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import trio

from forebay.carrying.arriving import Arriving
from forebay.carrying.beside import Beside
from forebay.carrying.leaving import Leaving, Note
from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay.handover.phase import MOVES, Phase
from forebay.handover.wishes import Progress
from forebay.origin.addresses import FileAddress
from forebay_cache.states import Machine


class OverlayHandover:
    """As `forebay.handover.handover.Handover` of a disk that writes its image. `run` has to be running."""

    def __init__(
        self,
        disk: Disk,
        address: FileAddress,
        clients: Callable[[], int],
        note: Note,
        alone: Callable[[], AbstractAsyncContextManager[None]],
        give_up: Callable[[], None],
        move: str,
        *,
        is_leaving: bool,
    ) -> None:
        """The arguments are those of `Leaving` and `Arriving`. `is_leaving`: with the move `move` it was about to
        leave, and did not come.
        """
        first = Phase.RELEASED if is_leaving else Phase.NONE
        first = Phase.INCOMING if disk.source.comes else first
        self._disk = disk
        self._phases = Machine(MOVES, first, f"the handover of disk '{disk.name}'")
        beside = Beside(address, disk.name, disk.source.use.gateway)
        self._give_up = give_up
        self.arriving: Arriving | None = None
        if first is Phase.INCOMING:
            self.arriving = Arriving(disk, beside, self._phases, clients, note, give_up)
        left = move if is_leaving else ""
        self.leaving = Leaving(disk, beside, self._phases, clients, note, alone, left)
        self.leaving.taken = "" if is_leaving else move

    @property
    def phase(self) -> Phase:
        """How far it is."""
        return self._phases.state

    async def run(self) -> None:
        """Do both halves, until cancelled."""
        if self.arriving is not None:
            await self.arriving.run()
            self.leaving.taken = self.arriving.taken
        if self.phase is Phase.INCOMING:  # it is being detached
            await trio.sleep_forever()
        await self.leaving.run()

    def status(self) -> dict[str, Any]:
        """Keys of the disk's status."""
        asked = self.leaving.asked
        to = asked.host if asked is not None and self.phase is not Phase.NONE else ""
        return {"handover": self.phase.value, "handover_to": to}

    async def bring_in(self) -> None:
        """At an attach: have here what is there by now. Raises ForebayError and OSError."""
        if self.arriving is not None:
            await self.arriving.bring_in()

    async def leave(self, *, discard: bool) -> bool:
        """Before a detach: True if nothing of what it has here is to be kept. Raises ForebayError, and OSError."""
        if self.phase is Phase.INCOMING and self.arriving is not None:
            await self.arriving.leave()
            return True
        return await self.leaving.leave(discard=discard)

    # ----------------------------------------------------------------------------------------- what operators ask for

    def wish(self, to: str, progress: Progress) -> contextlib.AbstractContextManager[None]:
        """Within it it goes to that host alone: see `Wishes.wish`."""
        return self.leaving.wishes.wish(self._disk.name, to, progress)

    async def prepare(
        self, to: str, patience: float, progress: Progress, *, with_data: bool = False
    ) -> None:
        """As `Handover.prepare`. Without `with_data` the settings have to say that it may take its data along."""
        leaving, name = self.leaving, self._disk.name
        if self.phase is Phase.INCOMING:
            raise ForebayError(f"'{name}' is about to come here: it is prepared where it is")
        if not (with_data or leaving.may_leave):
            raise ForebayError(
                f"'{name}' cannot be handed over: what an overlay has lies here only: add --with-data, and it goes "
                f"along; or 'forebay save {name} NEW' makes an image of it"
            )
        before, leaving.is_allowed = leaving.is_allowed, True
        with self.wish(to, progress), trio.move_on_after(patience):
            while self.phase is Phase.NONE:
                moved = leaving.moved
                leaving.wake()
                with trio.move_on_after(1.0):
                    await moved.wait()
        if self.phase is Phase.NONE:
            leaving.is_allowed = before
            who = f"host {to} does not ask" if to else "no host asks"
            why = (
                leaving.error
                or f"{who} for it: run 'forebay attach … --overlay --incoming --with-data' there"
            )
            raise ForebayError(f"'{name}' is not prepared: {why}")

    async def finish(self, patience: float) -> None:
        """As `Handover.finish`."""
        if self.phase is Phase.NONE:
            return
        if self.arriving is None or self.phase is not Phase.INCOMING:
            raise ForebayError(f"'{self._disk.name}' goes to another host: finish it there")
        with trio.move_on_after(patience):
            while self.phase is Phase.INCOMING:
                self.arriving.want()
                with trio.move_on_after(1.0):
                    await self.arriving.moved.wait()
        if self.phase is Phase.INCOMING:
            raise ForebayError(f"'{self._disk.name}' has not come: {self.arriving.why_not()}")

    async def abort(self, patience: float) -> None:
        """As `Handover.abort`."""
        if self.phase is Phase.INCOMING:
            self._give_up()
            return
        if self.phase is Phase.PREPARED:
            self.leaving.refuse()
            with trio.move_on_after(patience):
                while self.phase is Phase.PREPARED:
                    await self.leaving.moved.wait()
        if self.phase is not Phase.NONE:
            raise ForebayError(
                f"'{self._disk.name}' was handed over: it comes back by itself when a client here wants it, and the "
                "other host has not taken it"
            )
        self.leaving.is_allowed = False
