# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The host that a VM comes to: it asks for the image, and takes it at the VM's first write.

Until then reads come from the store, past all caches, and nothing is kept of them. A write waits until the image is
ours: the locks, and a marker of ours, durably; it fails after the store's `origin_timeout`.
"""

import contextlib
import logging
from collections.abc import Awaitable, Callable

import trio

from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay.events.telling import tell
from forebay.handover.looks import Looks
from forebay.handover.phase import Phase, Phases
from forebay.sidecar.incoming import Asking

log = logging.getLogger("forebay.handover")

BEAT_SECONDS = 1.0
"""How often we say that we still ask."""

TAKE_SECONDS, LATER_SECONDS = 0.005, 0.05
"""Between two looks whether the image is let go, as long as `Looks` allows, and later; the VM waits."""

TRY_SECONDS = 1.0
"""How often it is tried to take an image that was not let go: its host may be gone, with its locks. A try costs more
than a look."""

LEFT_SECONDS = 10.0
"""After so long without a client, where there was one, the VM does not come."""

NEVER_SECONDS = 300.0
"""The same where there was none."""


class Coming:
    """Takes the image of one disk when the VM wants it. `run` has to be running."""

    def __init__(
        self,
        disk: Disk,
        asking: Asking,
        phases: Phases,
        clients: Callable[[], int],
        note: Callable[[Phase], Awaitable[None]],
        give_up: Callable[[], None],
    ) -> None:
        """`clients` and `note` as `Giving` has them; `give_up` is called where the VM does not come."""
        self.error: str | None = None
        """Why the image could not be taken so far."""
        self._disk = disk
        self._asking = asking
        self._phases = phases
        self._clients = clients
        self._note = note
        self._give_up = give_up
        self._wanted = trio.Event()
        self.moved = trio.Event()
        """Set when the image was taken."""

    def want(self) -> None:
        """Have the image taken: somebody waits for it."""
        self._wanted.set()

    def why_not(self) -> str:
        """Why it has not come yet, for operators."""
        owner = self._asking.owner
        if self.error is not None or owner is None:
            return self.error or "no answer"
        return f"{owner} has not let it go: it does when its VM there rests, or is gone"

    async def run(self) -> None:
        """Ask until the image is ours."""
        idle = trio.current_time() + NEVER_SECONDS
        while self._phases.state is Phase.INCOMING:
            with trio.move_on_after(BEAT_SECONDS):
                await self._wanted.wait()
            if self._wanted.is_set():
                self._wanted = trio.Event()
                await self._take()
                continue
            await self._beat(wants=False)
            if self._clients():
                idle = trio.current_time() + LEFT_SECONDS
            elif trio.current_time() > idle:
                log.warning("%s: its VM did not come: it is detached", self._disk.name)
                self._give_up()
                await trio.sleep_forever()

    async def _beat(self, *, wants: bool) -> None:
        try:
            await self._asking.beat(wants=wants)
            self.error = None
        except (OSError, ForebayError) as fault:
            why = getattr(fault, "strerror", None) or str(fault)
            if why != self.error:
                log.warning("%s: cannot ask for its image: %s", self._disk.name, why)
            self.error = why

    async def _take(self) -> None:
        """Have the image, as soon as its owner has let it go, unless nobody wants it any more."""
        image, reach = self._disk.image, self._disk.image.reach
        if (
            image.identity.is_withdrawn()
        ):  # of an earlier stay here: what was written since is not ours
            image.begin_anew()
        looks, tried_at = Looks(), trio.current_time()
        beat_at = float("-inf")
        while True:
            now = trio.current_time()
            if await self._is_let_go() or now - tried_at >= TRY_SECONDS:
                tried_at = now
                await self._try()
                if not await reach.withhold_unless_reached(self._disk.source.withheld):
                    break
            if now - beat_at >= BEAT_SECONDS:
                beat_at = now
                await self._beat(wants=True)
            await trio.sleep(TAKE_SECONDS if looks.may() else LATER_SECONDS)
            if not reach.is_waited_for and not self._clients():
                return
        if image.origin is not None:
            await self._taken()

    async def _is_let_go(self) -> bool:
        """True if the image can be taken, as far as is known."""
        try:
            await self._asking.look()
        except (OSError, ForebayError):  # of which a try tells more
            return False
        return self._asking.is_let_go()

    async def _try(self) -> None:
        """One try. Where a write waits that the cache takes, the marker says at once that the image lacks data."""
        disk = self._disk
        assert disk.source.claim is not None, "only a disk that writes comes"
        disk.source.claim.begins_dirty = (
            disk.modes.writes_private and disk.image.reach.is_waited_for
        )
        await disk.image.reach.attempt_now()

    async def _taken(self) -> None:
        disk = self._disk
        disk.source.note_come()
        disk.modes.show_clean(shown=True)
        self._phases.become(Phase.NONE)
        tell("handover", "its image was taken over from the host that it comes from", disk.name)
        self.moved.set()
        with contextlib.suppress(OSError, ForebayError):  # it is not asked for any more: that shows
            await self._asking.withdraw()
        with contextlib.suppress(OSError, ForebayError):  # `Giving` has it noted later
            await self._note(Phase.NONE)
