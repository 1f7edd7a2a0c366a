# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Reaching an image: its origin is opened, tried again when it cannot be, and waited for; or it must not be touched.

The states are in `MOVES`, and in gateway/README.md. The origin of an image that was reached stays open until the image
is closed, or turns out to be dead: a store that fails later shows in the errors of its calls, and its own time-outs and
connections go on.
"""

import errno
import logging
from collections.abc import Awaitable, Callable
from enum import Enum
from math import inf
from typing import TypeVar

import trio

from forebay.origin.calls import MAYBE_DEAD
from forebay.origin.protocol import Origin, close_quietly
from forebay_cache.states import Machine, Table

log = logging.getLogger("forebay.image")

T = TypeVar("T")

RETRY_SECONDS = 1.0
"""How soon an origin that could not be reached is tried again; doubled each time, up to RETRY_MOST."""
RETRY_MOST = 15.0

LEAST_PAUSE = 0.05
"""Seconds that a disk's watch waits at least, where another one was just trying."""

WATCH_SECONDS = 5.0
"""How often an image is looked at for changes that somebody else made."""

LOOK_SHARED_SECONDS = 4.0
"""For so long a look of one disk's watch is one for all disks on the image."""


class ImageState(Enum):
    """How an image stands."""

    AWAY = "away"
    REACHED = "reached"
    CONFLICT = "conflict"
    CLOSED = "closed"


MOVES: Table[ImageState] = {
    ImageState.AWAY: {
        ImageState.REACHED: "its origin was opened, and nothing that the cache has of it is wrong",
        ImageState.CONFLICT: "somebody else has it, or changed it, and the cache has data for it as it was",
        ImageState.CLOSED: "the last disk on it was detached",
    },
    ImageState.REACHED: {
        ImageState.AWAY: "its descriptor fails for ever, and it is opened anew; or it is handed over",
        ImageState.CONFLICT: "somebody else has it, or changed it, and it must not be gone on with",
        ImageState.CLOSED: "the last disk on it was detached",
    },
    ImageState.CONFLICT: {
        ImageState.CLOSED: "the last disk on it was detached",
    },
    ImageState.CLOSED: {},
}
"""`away`: not opened yet, or it could not be. Requests wait for it. `conflict`: nothing of it is read or written."""


class Reach:
    """The way to one image: its state, and its origin where there is one."""

    def __init__(
        self,
        key: str,
        open_origin: Callable[[], Awaitable[Origin | None]],
        compare: Callable[[Origin], Awaitable[None]],
        let_go: Callable[[], Awaitable[None]],
    ) -> None:
        """`open_origin` opens it, or returns None for an image that must not be touched; `compare` looks whether it is
        what it was. Both may call `stop`, and raise OSError where the image cannot be reached now. `let_go` lets go
        what holds the image beside the origin, and raises nothing.
        """
        self.unreachable: str | None = None
        """Why the last attempt failed; None once one went well."""
        self.withheld = ""
        """Why the image is not opened now, although it could be; empty: it is. See `withhold`."""
        self.on_wanted: Callable[[], None] = _nothing
        """Called when somebody waits for an image that is withheld."""
        self.conflict: str | None = None
        """Why the image must not be touched any more, and what to do: what `stop` was told."""
        self._is_told = False
        """True if the log says that it cannot be reached."""
        self._key = key
        self._open = open_origin
        self._compare = compare
        self._let_go = let_go
        self._machine = Machine(MOVES, ImageState.AWAY, f"image {key}")
        self._origin: Origin | None = None
        self._attempting = trio.Lock()
        self._waiting = trio.lowlevel.ParkingLot()
        """Tasks that wait until the image is not away any more."""
        self._next_attempt = 0.0
        self._pause = RETRY_SECONDS
        self._looked_at = -inf
        """When a watch began to look at the image last."""

    @property
    def state(self) -> ImageState:
        """How the image stands now."""
        return self._machine.state

    @property
    def origin(self) -> Origin | None:
        """The open origin; None where there is none. An image in state conflict may have one."""
        return self._origin

    def require_origin(self) -> Origin:
        """The open origin of an image that may be touched. Raises OSError(EIO), which says why there is none."""
        if self.conflict is not None:
            raise OSError(errno.EIO, self.conflict)
        if self._origin is None:
            why = self.unreachable or "no answer"
            raise OSError(errno.EIO, f"{self._key} cannot be reached: {why}")
        return self._origin

    # ------------------------------------------------------------------------------------------------------- reaching

    @property
    def is_being_attempted(self) -> bool:
        """True while an attempt to open the origin is under way."""
        return self._attempting.locked()

    async def attempt(self) -> None:
        """Open the origin if there is none. A failure is noted; before its time has come nothing is tried again.

        One attempt at a time: whoever comes meanwhile waits for its end.
        """
        async with self._attempting:
            if self.withheld:
                self.unreachable = self.withheld
                return
            if self._origin is not None or trio.current_time() < self._next_attempt:
                return
            try:
                origin = await self._open_compared()
            except OSError as error:
                self._failed(error.strerror or str(error))
            else:
                if origin is not None:
                    self._succeeded(origin)

    async def attempt_now(self) -> None:
        """The same, whether or not its time has come, of an image that is not withheld any more."""
        self.withheld, self._next_attempt, self._pause = "", 0.0, RETRY_SECONDS
        await self.attempt()

    async def withhold(self, why: str) -> None:
        """Let the image go, and do not open it until `attempt_now`: another host is to have it. `why`: for operators.

        What waits for the image goes on waiting. Nothing may be under way that changes it.
        """
        async with self._attempting:
            origin, self._origin = self._origin, None
            self.withheld = self.unreachable = why
            if self.state is ImageState.REACHED:
                self._machine.become(ImageState.AWAY)
            if origin is not None:
                await close_quietly(origin)
            await self._let_go()

    async def withhold_unless_reached(self, why: str) -> bool:
        """The same of an image that could not be reached so far. False, with nothing done, if it could be by now."""
        async with self._attempting:
            if self._origin is not None or self.conflict is not None:
                return False
            self.withheld = self.unreachable = why
            await self._let_go()
            return True

    async def made_again(self, call: Callable[[], Awaitable[T]]) -> T:
        """What the call returns, which is made once more where it failed by an origin that was dead, and is replaced.

        Raises OSError.
        """
        origin = self._origin if self.conflict is None else None
        try:
            return await call()
        except OSError as error:
            if error.errno not in MAYBE_DEAD or self.conflict is not None:
                raise
            if not await (self._has_come() if origin is None else self.renew(origin)):
                raise
        return await call()

    async def _has_come(self) -> bool:
        """True if there is an origin, where there was none: as while it is opened anew for somebody else."""
        await self.attempt()
        return self.conflict is None and self._origin is not None

    async def renew(self, origin: Origin) -> bool:
        """Open the image anew where that origin, of which a call has failed, is dead. True if it has another one now.

        It is locked and compared again as at the first time.
        """
        async with self._attempting:
            if self._origin is origin and self.conflict is None and await self._is_dead(origin):
                log.warning("%s: its descriptor fails: it is opened anew", self._key)
                self._origin = None
                self._machine.become(ImageState.AWAY)
                self.unreachable, self._is_told = "its descriptor fails", True
                self._next_attempt, self._pause = 0.0, RETRY_SECONDS
                await close_quietly(origin)
                await self._let_go()
        await self.attempt()
        return self.conflict is None and self._origin not in (None, origin)

    async def _is_dead(self, origin: Origin) -> bool:
        """True if the origin is dead, and nothing that was given up can change the image by it any more."""
        try:
            if not await origin.is_dead():
                return False
            await origin.quiesce()
        except OSError:
            return False
        return True

    async def _open_compared(self) -> Origin | None:
        """An open origin of an image that is what it was; None for one that must not be touched. Raises OSError."""
        origin = await self._open()
        if origin is not None:
            try:
                await self._compare(origin)
            except BaseException:
                await close_quietly(origin)  # with its locks, which the next attempt has to take
                raise
        return origin

    def _failed(self, why: str) -> None:
        if self.unreachable is None:
            log.warning("%s cannot be reached: %s", self._key, why)
            self._is_told = True
        self.unreachable = why
        self._next_attempt = trio.current_time() + self._pause
        self._pause = min(2 * self._pause, RETRY_MOST)

    def _succeeded(self, origin: Origin) -> None:
        if self._is_told:
            log.warning("%s can be reached again", self._key)
        self.unreachable, self._is_told = None, False
        self._pause = RETRY_SECONDS
        self._origin = origin
        if self.state is ImageState.AWAY:  # in a conflict it stays
            self._machine.become(ImageState.REACHED)
        self._waiting.unpark_all()

    async def wait(self, timeout: float) -> None:
        """Wait until the image is reached; the watch of its disks attempts that. Raises OSError(EIO).

        That is raised for an image that must not be touched, and after `timeout` seconds.
        """
        with trio.move_on_after(timeout):
            while self.state is ImageState.AWAY:
                if self.withheld:
                    self.on_wanted()
                await self._waiting.park()
        self.require_origin()

    def seconds_to_look(self) -> float:
        """In how many seconds the image should be looked at again, or attempted to be reached."""
        if self.state is not ImageState.AWAY:
            return WATCH_SECONDS
        return max(LEAST_PAUSE, self._next_attempt - trio.current_time())

    def is_look_due(self) -> bool:
        """True if the image is to be looked at now, by whoever asks: no other disk's watch has done that just before.

        A hundred overlays of one image need not ask its server a hundred times.
        """
        now = trio.current_time()
        if now - self._looked_at < LOOK_SHARED_SECONDS:
            return False
        self._looked_at = now
        return True

    @property
    def is_waited_for(self) -> bool:
        """True while somebody is in `wait`."""
        return self._waiting.statistics().tasks_waiting > 0

    # ------------------------------------------------------------------------------------------------------- the ends

    def stop(self, conflict: str) -> None:
        """Enter state conflict, until the image is closed. `conflict` says why, and what to do."""
        self._machine.become(ImageState.CONFLICT)
        self.conflict = conflict
        log.error("%s", conflict)
        self._waiting.unpark_all()

    async def close(self) -> None:
        """Close the origin: nobody uses the image any more. Raises OSError."""
        origin, self._origin = self._origin, None
        self._machine.become(ImageState.CLOSED)
        if origin is not None:
            await origin.close()


def _nothing() -> None:
    pass
