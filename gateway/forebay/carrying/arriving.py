# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The host that an overlay comes to: it asks, brings in what there is while the VM is elsewhere, and at last the rest.

Reads that come before that are answered with what the old host had when they were asked: QEMU looks at a disk before
the VM moves, and a VM may read before it writes. The first write has the overlay taken: the token, and all there is.
"""

import contextlib
import errno
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from forebay.carrying.beside import FREE, LEFT, Beside, Token
from forebay.carrying.copying import TakingIn
from forebay.carrying.curtain import Curtain, joined
from forebay.carrying.leaving import Note
from forebay.carrying.notes import PREPARED, REFUSED, RELEASED, Asked, Offer
from forebay.disk.disk import Disk
from forebay.errors import ForebayError, advice
from forebay.events.telling import tell
from forebay.handover.looks import Looks
from forebay.handover.phase import Phase, Phases
from forebay.image.source import Source
from forebay.origin.threads import bounded
from forebay.sidecar.files import identity
from forebay.sidecar.incoming import LOOK_SECONDS
from forebay_cache.format.geometry import Buffer

log = logging.getLogger("forebay.handover")

T = TypeVar("T")

BEAT_SECONDS = 1.0
"""How often we say that we still ask, and look at what there is."""

TAKE_SECONDS, LATER_SECONDS = 0.005, 0.05
"""Between two looks while a request waits, as long as `Looks` allows, and later."""

COPYING_SECONDS = 30.0
"""How long an attach waits after the old host was last seen to copy, however long that takes."""

AGAIN_SECONDS = 30.0
"""How long an attach waits where what was offered is offered no more: its host may begin anew."""

LEFT_SECONDS, NEVER_SECONDS = 10.0, 300.0
"""After so long without a client, where there was one, and where there was none, the VM does not come."""


class Asking:
    """Asks for one overlay, and looks at what its host offers. Every method raises OSError."""

    def __init__(self, source: Source, beside: Beside) -> None:
        self.offer: Offer | None = None
        """What is offered to us, as far as that was looked at."""
        self.sync = 0
        self.wants = False
        self._beat = 0
        self._source = source
        self._beside = beside

    async def call(self, do: Callable[[], T]) -> T:
        """Make a blocking call on the store. Raises OSError."""
        with bounded(self._source.timeout, f"the move of '{self._source.use.disk}'"):
            return await self._source.threads.run(do)
        raise AssertionError("bounded() raises")

    async def beat(self) -> None:
        """Say that we ask still."""
        self._beat += 1
        use = self._source.use
        host = socket.gethostname()[:255]
        asked = Asked(use.gateway, host, use.disk, self._beat, self.wants, sync=self.sync)
        await self.call(lambda: self._beside.write(asked))

    async def look(self) -> Token | None:
        """Look at what is offered; the token of it, if it counts: if it is offered to us, or to nobody any more."""

        def look() -> tuple[Offer | None, Token | None]:
            offer = self._beside.offer()
            return offer, self._beside.token(
                offer.move
            ) if offer is not None and offer.move else None

        offer, token = await self.call(look)
        is_ours = offer is not None and offer.to == self._beside.gateway
        is_left = token is not None and token.where in (LEFT, self._beside.mine)
        self.offer = offer if is_ours or is_left else None
        return token if self.offer is not None else None

    async def ask(self, patience: float) -> None:
        """Return when something is offered that can be brought in. Raises ForebayError where that is not so after so
        many seconds, or is refused; then we ask no more.
        """
        disk = self._source.use.disk
        other = await self.call(self._beside.asked)
        if other is not None and other.gateway != self._beside.gateway:
            await trio.sleep(2 * LOOK_SECONDS)
            if await self.call(self._beside.asked) != other:
                raise ForebayError(
                    f"host {other.host} asks for '{disk}' already: detach that there first"
                )
        try:
            with trio.move_on_after(patience) as scope:
                while True:
                    await self.beat()
                    await trio.sleep(LOOK_SECONDS)
                    before = self.offer
                    await self.look()
                    if self.offer is not None and self.offer.phase in (PREPARED, RELEASED):
                        await self._check(self.offer)
                        return
                    if self.offer is not None and self.offer.phase == REFUSED:
                        raise ForebayError(f"host {self.offer.host}: {self.offer.why}")
                    if self.offer is not None and self.offer != before:  # it is at work on it
                        until = trio.current_time() + COPYING_SECONDS
                        scope.deadline = max(scope.deadline, until)
            raise ForebayError(
                f"no host hands over '{disk}' with its data, for {patience:g} s: 'forebay handover prepare {disk} "
                "--with-data' where it is, or set with_data = true there"
            )
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.withdraw()
            raise

    async def _check(self, offer: Offer) -> None:
        address = self._beside.address
        found = await self.call(lambda: identity(address))
        if (found.size, max(0, found.mtime_ns)) != (offer.image_size, offer.image_time):
            raise ForebayError(
                f"{address.key} is not here what it is on host {offer.host}: what '{offer.disk}' has is of that: "
                "see that both stores are one"
            )

    async def withdraw(self) -> None:
        """Ask no more. Raises nothing: what is not asked for any more is seen to be old."""
        try:
            await self.call(self._beside.withdraw)
        except OSError as fault:
            log.info("%s: it is asked for still: %s", self._source.use.disk, fault.strerror)


class Arriving:
    """The half of one overlay. `run` has to be running."""

    def __init__(
        self,
        disk: Disk,
        beside: Beside,
        phases: Phases,
        clients: Callable[[], int],
        note: Note,
        give_up: Callable[[], None],
    ) -> None:
        """`give_up` is called where the VM does not come."""
        self.error: str | None = None
        self.moved = trio.Event()
        """Set when it has come."""
        self.taken = ""
        """The move with which it has come, until the files of that are removed."""
        self._disk = disk
        self._beside = beside
        self._phases = phases
        self._clients = clients
        self._note = note
        self._give_up = give_up
        self._asking = Asking(disk.source, beside)
        self._wanted = False
        self._reads = self._answered = secrets.randbits(62)
        """The number of the last read that waits, or has waited; `_answered`: up to which they may be answered. They
        begin anywhere, so that no answer to a daemon of before is taken for one."""
        self._told = trio.Event()
        self._is_over = False
        """True once the disk is being detached."""
        self._is_final = False
        """True while the old host has let go: what is here is all."""
        self._woken = trio.Event()
        self._turn = trio.Lock()
        self.curtain = Curtain(disk, self.want)
        self.curtain.draw("it is about to come from another host", self._read)
        self._taking = TakingIn(disk, self.curtain.inner, beside, self._asking.call)

    def want(self) -> None:
        """Have it taken: somebody waits for it."""
        self._wanted = True
        self._woken.set()

    def why_not(self) -> str:
        """Why it has not come yet."""
        offer = self._asking.offer
        if self.error is not None or offer is None:
            return self.error or "no host offers it any more"
        return f"host {offer.host} has not let it go: it does when its VM there rests, or is gone"

    async def bring_in(self) -> None:
        """At an attach: have here what is there by now. Raises ForebayError, which says what to do; OSError."""
        fault: OSError | ForebayError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat_on)
            try:
                await self._pull_first()
            except (OSError, ForebayError) as why:
                fault = why
            nursery.cancel_scope.cancel()
        if fault is not None:
            raise fault

    async def _pull_first(self) -> None:
        until = trio.current_time() + AGAIN_SECONDS
        while not await self._pull():
            if trio.current_time() > until:
                raise ForebayError(f"'{self._disk.name}' has not come: {self.why_not()}")
            await trio.sleep(LOOK_SECONDS)

    async def _beat_on(self) -> None:
        while True:
            await self._try(self._asking.beat)
            await trio.sleep(BEAT_SECONDS)

    async def _pull(self) -> bool:
        """Have here what counts by now. False where nothing is offered. Raises OSError and ForebayError."""
        await self._asking.look()
        offer = self._asking.offer
        if (
            offer is None
            or offer.phase not in (PREPARED, RELEASED)
            or offer.size != self._disk.size
        ):
            self._is_final = False
            return False
        try:
            await self._taking.bring_in(offer)
        except FileNotFoundError:  # its host has called it off just now
            self._is_final = False
            return False
        except OSError as fault:
            raise ForebayError(
                f"'{self._disk.name}' has not come: {fault.strerror or fault}: "
                f"{advice(fault, 'see that cache and store work, then try again')}"
            ) from fault
        self._is_final = offer.phase == RELEASED and self._taking.has_all(offer)
        if self._is_final or self._answered < offer.synced <= self._reads:
            self._answered = self._reads if self._is_final else offer.synced
            event, self._told = self._told, trio.Event()
            event.set()
        return True

    async def run(self) -> None:
        """Ask until it is ours."""
        idle = trio.current_time() + NEVER_SECONDS
        while self._goes_on():
            with trio.move_on_after(BEAT_SECONDS):
                await self._woken.wait()
            self._woken = trio.Event()
            async with self._turn:
                if not self._goes_on():
                    break
                if self._wanted:
                    await self._until(lambda: False)
                elif self._reads > self._answered:
                    await self._until(lambda: self._reads <= self._answered)
                else:
                    await self._try(self._asking.beat)
                    await self._try(self._pull)
            if self._clients():
                idle = trio.current_time() + LEFT_SECONDS
            elif trio.current_time() > idle and self._phases.state is Phase.INCOMING:
                log.warning("%s: its VM did not come: it is detached", self._disk.name)
                self._give_up()
                await trio.sleep_forever()

    def _goes_on(self) -> bool:
        return self._phases.state is Phase.INCOMING and not self._is_over

    async def _try(self, do: Callable[[], Awaitable[object]]) -> bool:
        """True if it was done; else `error` says why not, and the log."""
        try:
            await do()
        except (OSError, ForebayError) as fault:
            why = getattr(fault, "strerror", None) or str(fault)
            if why != self.error:
                log.warning("%s: does not come yet: %s", self._disk.name, why)
            self.error = why
            return False
        self.error = None
        return True

    async def _until(self, is_done: Callable[[], bool]) -> None:
        """Ask, and look, as somebody waits: until it is taken, or that is so, or nobody waits any more."""
        looks, beat_at = Looks(), float("-inf")
        told: tuple[bool, int] | None = None
        while self._phases.state is Phase.INCOMING:
            now = trio.current_time()
            self._asking.wants = self._wanted
            self._asking.sync = self._reads if self._reads > self._answered else 0
            asks = (self._asking.wants, self._asking.sync)
            is_due = asks != told or now - beat_at >= BEAT_SECONDS
            if is_due and await self._try(self._asking.beat):
                told, beat_at = asks, now
            if await self._try(self._pull) and self._is_final and self._wanted:
                await self._try(self._take)
            if is_done() or (self._wanted and not self._is_waited_for()):
                break
            await trio.sleep(TAKE_SECONDS if looks.may() else LATER_SECONDS)
        self._wanted = self._asking.wants = False

    def _is_waited_for(self) -> bool:
        return self.curtain.is_waited_for or self._clients() > 0

    async def _take(self) -> None:
        """Take the token; then it is ours, whatever comes. Raises OSError and ForebayError, and is made again."""
        token = await self._asking.look()
        offer = self._asking.offer
        if (
            token is None
            or offer is None
            or offer.phase != RELEASED
            or not self._taking.has_all(offer)
        ):
            return
        await self._disk.image.cache.make_durable()
        was_left = token.where == LEFT
        if token.where != self._beside.mine:
            if not token.is_free:
                return
            free = token
            token = await self._asking.call(
                lambda: self._beside.hand_on(offer.move, free, self._beside.mine)
            )
            if token is None:
                return
        await self._note(Phase.NONE, offer.move)
        self.curtain.lift()
        self._phases.become(Phase.NONE)
        tell("handover", "it has come, with what it has", self._disk.name)
        self.moved.set()
        self._told.set()
        self.taken = offer.move
        # where the old host has it attached still, the token tells that where it is
        last = token if was_left else None
        if await self._try(lambda: self._asking.call(lambda: self._beside.end(offer.move, last))):
            self.taken = ""
            with contextlib.suppress(
                OSError, ForebayError
            ):  # what is gone is looked for once more after a restart
                await self._note(Phase.NONE, "")
        await self._asking.withdraw()

    async def _read(self, offset: int, length: int) -> Buffer:
        """What is read before it has come. Raises OSError(EIO) where the old host does not answer in time."""
        if not self._is_final:
            self._reads += 1
            mine = self._reads
            self._woken.set()
            with trio.move_on_after(self._disk.settings.origin_timeout):
                while self._answered < mine and self._phases.state is Phase.INCOMING:
                    await self._told.wait()
            if self._answered < mine and self._phases.state is Phase.INCOMING:
                raise OSError(errno.EIO, f"'{self._disk.name}' has not come: {self.why_not()}")
        view = self.curtain.inner if self._phases.state is Phase.INCOMING else self._disk.view
        return joined(await view.read(offset, length))

    async def leave(self) -> None:
        """Before the disk is detached: give back what was taken and not used. Raises OSError."""
        async with self._turn:
            self._is_over = True
            await self._asking.withdraw()
            token = await self._asking.look()
            offer = self._asking.offer
            if token is not None and offer is not None and token.where == self._beside.mine:
                await self._asking.call(lambda: self._beside.hand_on(offer.move, token, FREE))
