# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The host that an overlay leaves: what it has goes beside its image while its VM runs, then the rest, then the token.

As long as the token is at this host nobody else has the overlay, whatever else lies there. Once it is free the overlay
is hidden here, and comes back only with the token. What this host has of it in its cache stays until it is detached.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import trio

from forebay.carrying.beside import FREE, LEFT, Beside
from forebay.carrying.curtain import Curtain, joined
from forebay.carrying.notes import Asked
from forebay.carrying.parcel import Parcel, Shelf
from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay.events.telling import tell
from forebay.handover.giving import Beats, Rest
from forebay.handover.looks import Looks
from forebay.handover.phase import Phase, Phases
from forebay.handover.wishes import Wishes
from forebay.keeping.compact import compact
from forebay_cache.format.geometry import Buffer

log = logging.getLogger("forebay.handover")

IDLE_SECONDS, ASKED_SECONDS = 5.0, 0.2
"""How often it is looked whether somebody asks; and while somebody does."""

PREPARED_SECONDS = 0.1
"""How often the store is asked while the overlay is prepared, and the VM is at work, or has rested for long."""

QUICK_SECONDS, QUICK_FOR_SECONDS = 0.01, 5.0
"""How often while the VM rests, for so long, as far as `Looks` allows: it may be paused, and run on the other host."""

REST_SECONDS = 0.02
"""In so long a VM that rests does nothing."""

RELEASED_SECONDS = 2.0
"""How often it is looked whether the other host has taken it, or has given up."""

MOST_LAYERS = 4
"""So many rounds are frozen at a time."""

RETRY_SECONDS = 2.0
"""Between a step that failed and the next try."""

Note = Callable[[Phase, str], Awaitable[None]]
"""Puts phase and move on record, durably. Raises ForebayError and OSError."""


class Leaving:
    """The half of one overlay. `run` has to be running. `step` is what changes it: one at a time."""

    def __init__(
        self,
        disk: Disk,
        beside: Beside,
        phases: Phases,
        clients: Callable[[], int],
        note: Note,
        alone: Callable[[], AbstractAsyncContextManager[None]],
        move: str,
    ) -> None:
        """`alone`: around what no other command may change the disk during; raises OSError. `move`: the one that was
        under way when the daemon ended; empty: none was.
        """
        self.taken = ""
        """The move with which it came here, of which the files have to be removed; empty: of none."""
        self.asked: Asked | None = None
        """Who asks for the overlay, or has it."""
        self.error: str | None = None
        """Why the last step failed; None: it did not. It is tried again."""
        self.is_allowed = False
        """True while an operator has said that it may leave, whatever its settings say."""
        self.wishes = Wishes()
        self.moved = trio.Event()
        """Set when anything has changed; another event takes its place then."""
        self._shelf = Shelf(disk, beside)
        self._move = Parcel(self._shelf, move) if move else None
        """What is under way, or was when the daemon ended."""
        self._disk = disk
        self._phases = phases
        self._clients = clients
        self._note = note
        self._alone = alone
        self._beats = Beats()
        self._refused = ""
        self._looks = Looks()
        self._rest = Rest(lambda: (disk.counters.written_bytes, disk.counters.write_hits))
        self._woken = trio.Event()
        self._turn = trio.Lock()
        self.curtain = Curtain(disk, self.wake)
        if self._move is not None:
            self.curtain.draw("where it is has to be asked of its store first", self._read_back)

    def wake(self) -> None:
        """Have `run` look now."""
        self._woken.set()

    def refuse(self) -> None:
        """Give it to nobody who asks now."""
        self._refused = self.asked.gateway if self.asked is not None else ""
        self.wake()

    async def run(self) -> None:
        """Do what others ask for, until cancelled."""
        while True:
            await self._wait()
            try:
                async with self._turn:
                    await self._step()
            except (OSError, ForebayError) as fault:
                self._failed(fault)
            else:
                self.error = None
            event, self.moved = self.moved, trio.Event()
            event.set()
            if self.error is not None:
                await trio.sleep(RETRY_SECONDS)

    def _failed(self, fault: Exception) -> None:
        why = getattr(fault, "strerror", None) or str(fault)
        if why != self.error:
            log.warning("%s: its handover waits: %s", self._disk.name, why)
        self.error = why

    async def _wait(self) -> None:
        state = self._phases.state
        if state is Phase.PREPARED:
            await self._wait_prepared()
        else:
            seconds = RELEASED_SECONDS if state is Phase.RELEASED else IDLE_SECONDS
            if state is Phase.NONE and (self.asked or self._move or self.taken):
                seconds = ASKED_SECONDS
            with trio.move_on_after(seconds):
                await self._woken.wait()
        self._woken = trio.Event()

    async def _wait_prepared(self) -> None:
        """Wait until it is time to ask the store, which depends on whether the VM rests."""
        looked_at = trio.current_time()
        is_quick = False
        while not self._woken.is_set() and not is_quick:
            with trio.move_on_after(QUICK_SECONDS):
                await self._woken.wait()
            is_resting = REST_SECONDS <= self._rest.seconds() < QUICK_FOR_SECONDS
            is_quick = (is_resting or not self._clients()) and self._looks.may()
            if trio.current_time() - looked_at >= PREPARED_SECONDS:
                return

    @property
    def may_leave(self) -> bool:
        """True if an operator, or the settings, say that it may take what it has along."""
        return self.is_allowed or self._disk.settings.with_data

    async def _step(self) -> None:
        """One look, and what follows from it. Raises OSError and ForebayError, and is made again."""
        if self._phases.state is Phase.RELEASED:
            await self._look_released()
            return
        if self._phases.state is Phase.NONE and self._move is not None:
            await self._call_off()
            return
        if self.taken:
            taken = self.taken
            await self._shelf.call(lambda: self._shelf.beside.end(taken, None))
            await self._note(Phase.NONE, "")
            self.taken = ""
        if not self.may_leave and self._phases.state is Phase.NONE:
            self.asked = None
            return
        asked = await self._shelf.call(self._shelf.beside.asked)
        is_live = self._beats.is_live(asked)
        if asked is None or asked.gateway != self._refused:
            self._refused = ""
        if self._phases.state is Phase.PREPARED:
            await self._go_on(asked if is_live else None)
            return
        self.asked = asked
        if asked is not None and is_live and self._may_have(asked):
            await self._prepare(asked)

    def _may_have(self, asked: Asked) -> bool:
        return asked.gateway != self._refused and self.wishes.allow(asked.host)

    # ------------------------------------------------------------------------------------------------------ preparing

    async def _prepare(self, asked: Asked) -> None:
        """Have all that it has beside the image, and what was written meanwhile, and say so."""
        disk = self._disk
        if disk.dirty.snapshots.all():
            why = (
                f"'{disk.name}' has snapshots, which do not move: 'forebay drop' them there, or 'forebay save' it "
                "and attach that"
            )
            await self._shelf.refuse(asked, why)
            raise ForebayError(why)
        async with self._alone():  # commands that come later are refused
            disk.modes.is_held = True
            move = self._move = Parcel.new(self._shelf)
        async with self._ends_it():
            await move.begin()
            await self._note(Phase.PREPARED, move.name)
            await move.fill(asked, self.wishes.advance)
        self.asked = asked
        self._phases.become(Phase.PREPARED)
        tell("handover", f"prepared to be handed over to host {asked.host}", disk.name)

    @contextlib.asynccontextmanager
    async def _ends_it(self) -> AsyncIterator[None]:
        """Around what ends the move where it fails: then the overlay stays, and it begins anew."""
        try:
            yield
        except (OSError, ForebayError) as fault:
            self._failed(fault)
            await self._call_off()
            raise

    async def _call_off(self) -> None:
        """It stays, or is back: have nothing of the move any more. Raises OSError and ForebayError; called again.

        The move stays on record, as one whose files are to be removed, until they are: also over a kill.
        """
        move, disk = self._move, self._disk
        assert move is not None
        await self._note(Phase.NONE, move.name)
        if self._phases.state is Phase.PREPARED:
            self._phases.become(Phase.NONE)
        self.asked = None
        disk.modes.is_held = False
        await move.end()
        await self._note(Phase.NONE, "")
        self._move = None
        await self._join()

    async def _join(self) -> None:
        """Have what the rounds have frozen be one layer: else what is written over and over takes room each time."""
        await compact(self._disk.image.cache, self._disk.dirty, _silent, whole=False)

    # ------------------------------------------------------------------------------------------------ while it is ready

    async def _go_on(self, asked: Asked | None) -> None:
        """Let it go as soon as that may be; `asked`: who asks still."""
        move = self._move
        assert self.asked is not None
        assert move is not None
        if asked is None or asked.gateway != self.asked.gateway or not self._may_have(asked):
            text = f"stays: host {self.asked.host} does not ask any more"
            await self._call_off()
            tell("handover", text, self._disk.name)
            return
        rests = self._rest.seconds() >= REST_SECONDS
        if not self._clients() or (asked.wants and rests):
            await self._release()
        elif move.lacks(asked.sync) or move.is_round_due():
            async with self._ends_it():
                await move.write(asked.sync)
        else:
            await move.beat()
            if len(self._disk.dirty.frozen) > MOST_LAYERS:
                await self._join()

    # ------------------------------------------------------------------------------------------------------- releasing

    async def _release(self) -> None:
        """Write the rest, and let it go. What is asked for meanwhile waits."""
        disk, move, asked = self._disk, self._move, self.asked
        assert move is not None
        assert asked is not None
        async with disk.modes.gate.closed():
            self.curtain.draw(f"it was handed over to host {asked.host}", self._read_back)
        async with self._ends_it():
            try:
                await move.close()
            except BaseException:
                self.curtain.lift()
                raise
        self._phases.become(Phase.RELEASED)
        tell("handover", f"handed over to host {asked.host}", disk.name)
        await move.hand_on(FREE)  # where that fails nobody knows: the next look tells

    async def _look_released(self) -> None:
        """See whether the other host has it, and take it back where somebody here wants it, or nobody there does."""
        move = self._move
        assert move is not None
        await move.look()
        if move.is_lost:
            host = f"host {self.asked.host}" if self.asked is not None else "another host"
            self.curtain.fail(f"{host} has taken it over: 'forebay detach {self._disk.name}' here")
        elif self.curtain.is_waited_for or not await self._is_asked_for():
            await self._take_back()
        elif move.is_here and move.is_whole:
            await move.hand_on(FREE)
        elif move.is_whole:
            await move.say_again()
        elif move.is_here:  # the daemon was restarted before all of it was there
            await self._take_back()

    async def _is_asked_for(self) -> bool:
        """True if somebody asks for it, or may, as far as is known yet."""
        asked = await self._shelf.call(self._shelf.beside.asked)
        is_live = self._beats.is_live(asked)
        if self.asked is None:
            self.asked = asked
        return asked is not None and (is_live or not self._beats.is_stale())

    async def _take_back(self) -> None:
        """Have it again, unless the other host is first. What may still be under way finds the token renamed."""
        assert self._move is not None
        if not await self._move.hand_on(self._shelf.beside.mine):
            return  # the next look says who was
        self.curtain.lift()
        self._phases.become(Phase.NONE)
        tell("handover", "taken back", self._disk.name)
        self.wake()

    async def _read_back(self, offset: int, length: int) -> Buffer:
        """What is read while it is released: it has to come back for that."""
        await self.curtain.arrive()
        return joined(await self._disk.view.read(offset, length))

    # ---------------------------------------------------------------------------------------------------------- the end

    async def leave(self, *, discard: bool) -> bool:
        """Before the disk is detached: True if what it has is another host's from now on, and not to be kept here.

        Raises OSError and ForebayError: it is not to be detached then.
        """
        async with self._turn:
            if self._phases.state is Phase.PREPARED and not discard:
                await self._release()
            if self._phases.state is Phase.RELEASED:
                return await self._leave_released(discard=discard)
            if self._move is not None:
                try:
                    await self._call_off()
                except (
                    OSError
                ) as fault:  # the token is at this host, or was: nobody takes it for theirs
                    log.warning(
                        "%s: files of its move stay beside its image: %s",
                        self._disk.name,
                        fault.strerror,
                    )
            return False

    async def _leave_released(self, *, discard: bool) -> bool:
        move = self._move
        assert move is not None
        while True:
            await move.look()
            if move.is_lost:
                await move.forget()
                return True
            is_unfinished = move.is_here and not move.is_whole
            if is_unfinished or not (discard or await self._is_asked_for()):
                await self._take_back()
                if self._phases.state is Phase.NONE:
                    await self._call_off()
                    return False
            elif move.token is not None and (move.token.where == LEFT or await move.hand_on(LEFT)):
                return True


def _silent(_done: int, _total: int) -> None:
    """Progress that nobody looks at."""
