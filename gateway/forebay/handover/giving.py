# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The host that a VM leaves: another one asks for the image, it is prepared, let go, and taken back if need be.

While the marker says `prepared` or `released` nothing that was flushed is anywhere but in the image, durably: whenever
this host is lost, the other one finds all of it. The locks are what this host lets go last, so that as long as it
serves the image nobody else can take it, whatever the marker says.
"""

import errno
import logging
from collections.abc import Awaitable, Callable
from math import inf

import trio

from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay.events.telling import tell
from forebay.handover import hot
from forebay.handover.looks import Looks
from forebay.handover.phase import Phase, Phases
from forebay.handover.wishes import Wishes
from forebay.origin.addresses import FileAddress
from forebay.origin.threads import bounded
from forebay.sidecar.claim import Claim
from forebay.sidecar.files import read_owner
from forebay.sidecar.incoming import STALE_SECONDS, Incoming, who_asks

log = logging.getLogger("forebay.handover")

IDLE_SECONDS = 1.0
"""How often it is looked whether somebody asks; the image's watch reads that beside it every five seconds."""

PREPARED_SECONDS = 0.1
"""How often the store is asked while the image is prepared, and the VM is at work, or has rested for long."""

QUICK_SECONDS = 0.01
"""How often while the VM rests, as far as `Looks` allows: it may be paused, and run on the other host. By so much that
waits longer where QEMU stays connected. It is also how often it is looked whether it rests, which asks nobody."""

QUICK_FOR_SECONDS = 5.0
"""For so long after it has come to rest."""

REST_SECONDS = 0.02
"""In so long a VM that rests does nothing."""

CHECK_SECONDS = 1.0
"""How often more is looked at meanwhile than who asks."""

RELEASED_SECONDS = 5.0
"""How often it is looked whether the other host has given up."""

LIST_SECONDS = 2.0
"""How long it may take to write down which blocks are hot: it is a hint."""

RETURN_SECONDS = 0.2
"""Between two tries to take the image back."""


class Beats:
    """Whether who asks is there, by how its number grows: the clocks of two hosts are not compared."""

    def __init__(self) -> None:
        self._last: Incoming | None = None
        self._moved_at: float | None = None
        """When its number was seen to grow last; None: not yet."""
        self._since = 0.0
        """When the number that it has now was seen first."""

    def is_live(self, asked: Incoming | None) -> bool:
        """True if it asks still. What was found at first counts once its number has grown: it may be years old."""
        now = trio.current_time()
        last, self._last = self._last, asked
        if asked is None or last is None or last.gateway != asked.gateway:
            self._moved_at, self._since = None, now
            return False
        if asked.beat != last.beat:
            self._moved_at = self._since = now
        return self._moved_at is not None and now - self._moved_at < STALE_SECONDS

    def is_stale(self) -> bool:
        """True if it has not moved for so long that it is gone."""
        return self._last is not None and trio.current_time() - self._since >= STALE_SECONDS


class Rest:
    """For how long a VM has done nothing, as far as that was looked at."""

    def __init__(self, done: Callable[[], object]) -> None:
        """`done` returns another value whenever the VM has done something."""
        self._done = done
        self._last: object = None
        self._since = 0.0

    def seconds(self) -> float:
        """So long nothing was done; 0 at the first look."""
        now, done = trio.current_time(), self._done()
        if done != self._last:
            self._last, self._since = done, now
        return now - self._since


class Giving:
    """Gives the image of one disk away, and takes it back. `run` has to be running."""

    def __init__(
        self,
        disk: Disk,
        claim: Claim,
        phases: Phases,
        clients: Callable[[], int],
        note: Callable[[Phase], Awaitable[None]],
    ) -> None:
        """`clients` returns how many are connected; `note` puts the phase on record, durably: it raises ForebayError
        and OSError.
        """
        self.asked: Incoming | None = None
        """Who asks for the image, or has it."""
        self.error: str | None = None
        """Why the last step failed; None: it did not. It is tried again."""
        self.wishes = Wishes()
        """What operators wait for."""
        self.moved = trio.Event()
        """Set when anything has changed; another event takes its place then."""
        self._disk = disk
        self._claim = claim
        self._phases = phases
        self._clients = clients
        self._note = note
        self._beats = Beats()
        self._refused = ""
        """The gateway to which the operator does not want to give it."""
        self._looks = Looks()
        self._rest = Rest(lambda: (disk.counters.written_bytes, disk.image.identity.writes_ended))
        self._checked_at = -inf
        """When more was looked at last than who asks."""
        self._woken = trio.Event()

    def wake(self) -> None:
        """Have `run` look now: somebody waits for the image, a client has left, or an operator asks."""
        self._woken.set()

    def refuse(self) -> None:
        """Give the image to nobody who asks now."""
        self._refused = self.asked.gateway if self.asked is not None else ""
        self.wake()

    async def run(self) -> None:
        """Do what others ask for, until cancelled."""
        while True:
            await self._wait()
            try:
                await self._step()
            except (OSError, ForebayError) as fault:
                self._failed(fault)
            else:
                self.error = None
            event, self.moved = self.moved, trio.Event()
            event.set()

    async def _wait(self) -> None:
        if self._phases.state is Phase.PREPARED:
            await self._wait_prepared()
        else:
            is_released = self._phases.state is Phase.RELEASED
            with trio.move_on_after(RELEASED_SECONDS if is_released else IDLE_SECONDS):
                await self._woken.wait()
        self._woken = trio.Event()

    async def _wait_prepared(self) -> None:
        """Wait until it is time to ask the store, which depends on whether the VM rests, or a step has failed."""
        looked_at = trio.current_time()
        is_quick = False
        while not self._woken.is_set() and not is_quick:
            with trio.move_on_after(QUICK_SECONDS):
                await self._woken.wait()
            is_resting = REST_SECONDS <= self._rest.seconds() < QUICK_FOR_SECONDS
            may_go = self.error is None and (is_resting or not self._clients())
            is_quick = may_go and self._looks.may()
            if trio.current_time() - looked_at >= PREPARED_SECONDS:
                return

    def _failed(self, fault: Exception) -> None:
        why = getattr(fault, "strerror", None) or str(fault)
        if why != self.error:
            log.warning("%s: its handover waits: %s", self._disk.name, why)
        self.error = why

    async def _step(self) -> None:
        """One look, and what follows from it. Raises OSError and ForebayError, and is made again."""
        if self._disk.image.conflict is not None:
            return
        if self._phases.state is Phase.RELEASED:
            if self._disk.image.reach.is_waited_for or await self._is_left():
                await self._take_back()
            return
        if self._claim.asked_by is not None or self._phases.state is Phase.PREPARED:
            await self._look()
        asked = self._claim.asked_by
        is_live = self._beats.is_live(asked)
        if asked is None or asked.gateway != self._refused:
            self._refused = ""
        if self._phases.state is Phase.PREPARED:
            await self._go_on(asked if is_live else None)
        elif asked is not None and is_live and self._may_have(asked):
            await self._prepare(asked)
        else:
            await self._go_back()
            if asked is not None and self._beats.is_stale():
                await self._claim.forget_asked(asked)

    async def _look(self) -> None:
        """Look who asks, and now and then whether the image is still ours. Raises OSError."""
        now = trio.current_time()
        is_quick = self._phases.state is Phase.PREPARED and now - self._checked_at < CHECK_SECONDS
        await self._claim.check(asked_only=is_quick)
        if not is_quick:
            self._checked_at = now

    def _may_have(self, asked: Incoming) -> bool:
        return asked.gateway != self._refused and self.wishes.allow(asked.host)

    # ------------------------------------------------------------------------------------------------------ preparing

    async def _prepare(self, asked: Incoming) -> None:
        """Have everything in the image, and from now on what is flushed, and say beside it that it is so."""
        disk = self._disk
        await disk.modes.hold(self.wishes.advance)
        await disk.image.flush()
        if disk.dirty.mark.is_set or disk.dirty.mark.is_stale():
            await disk.dirty.mark.clear()
        await self._claim.set_phase(Phase.PREPARED, asked.gateway)
        self.asked = asked
        self._phases.become(Phase.PREPARED)
        with trio.move_on_after(LIST_SECONDS):  # the VM runs on meanwhile
            await hot.leave(disk)
        tell("handover", f"prepared to be handed over to host {asked.host}", disk.name)

    async def _go_on(self, asked: Incoming | None) -> None:
        """Let the image go as soon as that may be; `asked`: who asks still."""
        assert self.asked is not None, "somebody was prepared for"
        if asked is None or asked.gateway != self.asked.gateway or not self._may_have(asked):
            await self._claim.set_phase("", "")
            self._phases.become(Phase.NONE)
            text = f"stays: host {self.asked.host} does not ask any more"
            tell("handover", text, self._disk.name)
            self.asked = None
            await self._go_back()
            return
        rests = self._rest.seconds() >= REST_SECONDS and self._disk.image.is_all_durable()
        if not self._clients() or (asked.wants and rests):
            await self._release(asked)

    async def _go_back(self) -> None:
        """Be in the mode of before."""
        await self._note(Phase.NONE)
        if self._disk.modes.is_held:
            await hot.forget(self._disk.source)
        await self._disk.modes.let_go()

    # ------------------------------------------------------------------------------------------------------- releasing

    async def _release(self, asked: Incoming) -> None:
        """Let the image go: the record first, the marker, and the locks last. What is asked for meanwhile waits."""
        disk, image = self._disk, self._disk.image
        async with disk.modes.gate.closed():
            if self._clients() and not (asked.wants and image.is_all_durable()):
                return  # something was written just before the gate was shut
            await image.require_origin().quiesce()  # nothing that was given up may arrive later
            await image.flush()
            await image.look()
            if image.conflict is not None:
                return
            if image.identity.is_withdrawn():  # nobody would know later what was written since
                image.clean.refresh()
            disk.modes.show_clean(shown=False)
            try:
                await self._note(Phase.RELEASED)
                await self._claim.set_phase(Phase.RELEASED, asked.gateway)
            except BaseException:
                disk.modes.show_clean(shown=True)
                raise
            disk.source.withheld = f"it was handed over to host {asked.host}"
            self._phases.become(Phase.RELEASED)
            with trio.CancelScope(shield=True):
                await image.reach.withhold(disk.source.withheld)
        tell("handover", f"handed over to host {asked.host}", disk.name)

    async def _is_left(self) -> bool:
        """True if the host that may take the image does not ask for it any more, and has not taken it."""
        source = self._disk.source
        address = source.address
        assert isinstance(address, FileAddress), "only files are handed over"
        with bounded(self._disk.settings.origin_timeout, f"looking who has {source.key}"):
            asked = await source.threads.run(lambda: who_asks(address))
            owner = await source.threads.run(lambda: read_owner(address))
        if owner is None or owner.gateway != source.use.gateway:
            return False
        is_live = self._beats.is_live(asked)
        return (
            asked is None or asked.gateway != owner.to or (self._beats.is_stale() and not is_live)
        )

    async def _take_back(self) -> None:
        """Have the image again, unless the other host has taken it."""
        disk, reach = self._disk, self._disk.image.reach
        with trio.move_on_after(disk.settings.origin_timeout):
            await reach.attempt_now()
            while disk.image.origin is None and disk.image.conflict is None:
                await trio.sleep(RETURN_SECONDS)
                await reach.attempt_now()
        if disk.image.conflict is not None:
            return
        why = reach.unreachable or "no answer"
        if await reach.withhold_unless_reached(disk.source.withheld):
            raise OSError(errno.EIO, f"it cannot be taken back: {why}")
        disk.source.note_come()
        disk.modes.show_clean(shown=True)
        self._phases.become(Phase.NONE)
        tell("handover", "taken back", disk.name)
        self.wake()
