# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One move of an overlay as the host sees it that it leaves: its token, the file with what it has, and what is said."""

import contextlib
import secrets
import socket
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Self, TypeVar

import trio

from forebay.carrying.beside import Beside, Token
from forebay.carrying.copying import Rounds
from forebay.carrying.notes import COPYING, PREPARED, REFUSED, RELEASED, Asked, Offer
from forebay.disk.disk import Disk
from forebay.handover.wishes import Progress
from forebay.origin.threads import bounded
from forebay.sidecar.files import identity

T = TypeVar("T")

ROUND_SECONDS, ROUND_BYTES = 1.0, 4 << 20
"""A round is made while the overlay is prepared when so much was written, so long after the last: the VM waits for the
last one."""

MOST_TIMES, MOST_MORE = 3, 1 << 30
"""The file of a move may have so many times what the overlay has, and so many bytes more: then the rest waits for the
last round. A VM that writes the same blocks over and over fills no store."""

BEAT_SECONDS = 10.0
"""How often the offer says that this host is there still."""


class Shelf:
    """The directory beside the image of one overlay, whose calls are made in threads with the disk's time limit."""

    def __init__(self, disk: Disk, beside: Beside) -> None:
        self.disk = disk
        self.beside = beside

    async def call(self, do: Callable[[], T]) -> T:
        """Make a blocking call on the store. Raises OSError."""
        with bounded(self.disk.settings.origin_timeout, f"the move of '{self.disk.name}'"):
            return await self.disk.source.threads.run(do)
        raise AssertionError("bounded() raises")

    def offer(self, asked: Asked, phase: str, move: str, why: str = "") -> Offer:
        """What is said to who asks."""
        host, name = socket.gethostname()[:255], self.disk.name
        me, size = self.beside.gateway, self.disk.size
        return Offer(me, host, name, asked.gateway, move, phase, why[:256], size)

    async def refuse(self, asked: Asked, why: str) -> None:
        """Say why it does not move. Raises OSError."""
        offer = self.offer(asked, REFUSED, "", why)
        await self.call(lambda: self.beside.write(offer))


class Parcel:
    """One move. All calls raise OSError; what `begin` and `write` raise ends it: what was given up may be made late."""

    def __init__(self, shelf: Shelf, name: str) -> None:
        """`name`: 16 hexadecimal digits; one from before a restart can only be taken back, or be ended."""
        self.name = name
        self.token: Token | None = None
        """Where it was when it was looked at last."""
        self.is_whole = False
        """True once all that the overlay has is in the file, durably, and the offer says so."""
        self._shelf = shelf
        self._offer: Offer | None = None
        self._rounds: Rounds | None = None
        self._round_at = self._beat_at = -inf

    @classmethod
    def new(cls, shelf: Shelf) -> Self:
        """One that nobody has heard of."""
        return cls(shelf, secrets.token_hex(8))

    async def begin(self) -> None:
        """Make its files, the token here."""
        beside = self._shelf.beside
        self.token = await self._shelf.call(lambda: beside.begin(self.name))
        self._rounds = Rounds(self._shelf.disk, beside, self.name, self._shelf.call)

    async def fill(self, asked: Asked, progress: Progress) -> None:
        """Write what the overlay has, then what was written meanwhile, and say that it is prepared."""
        beside = self._shelf.beside
        found = await self._shelf.call(lambda: identity(beside.address))
        offer = self._shelf.offer(asked, COPYING, self.name)
        self._offer = replace(offer, image_size=found.size, image_time=max(0, found.mtime_ns))
        await self._say(COPYING, 0)
        fault: OSError | None = None
        ended = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat_until, ended)
            try:
                await self._written().write(progress)
                await self._written().write(_silent, durably=True)
            except OSError as why:
                fault = why
            ended.set()
        if fault is not None:
            raise fault
        await self._say(PREPARED, 0)

    async def _beat_until(self, ended: trio.Event) -> None:
        """Say that it is being copied. What was begun of that is not given up: it would be said late."""
        while not ended.is_set():
            with trio.move_on_after(BEAT_SECONDS):
                await ended.wait()
                return
            with contextlib.suppress(OSError):  # what comes next tells
                await self._say(COPYING, 0)

    def _written(self) -> Rounds:
        assert self._rounds is not None, "it was begun here"
        return self._rounds

    async def _say(self, phase: str, synced: int) -> None:
        """Say how much of the file counts now."""
        assert self._offer is not None
        offer = replace(
            self._offer,
            phase=phase,
            length=0 if phase == COPYING else self._written().length,
            synced=synced,
            beat=self._offer.beat + 1,
        )
        await self._shelf.call(lambda: self._shelf.beside.write(offer))
        self._offer, self._beat_at = offer, trio.current_time()

    def lacks(self, sync: int) -> bool:
        """True if who asks has reads that wait, which are not answered."""
        return self._offer is not None and sync not in (0, self._offer.synced)

    def is_round_due(self) -> bool:
        """True if so much was written since the last round that the VM would wait long for the last one."""
        if trio.current_time() - self._round_at < ROUND_SECONDS:
            return False
        most = MOST_TIMES * self._shelf.disk.dirty.private_bytes + MOST_MORE
        return self._written().waiting_bytes >= ROUND_BYTES and self._written().length < most

    async def write(self, sync: int = 0) -> None:
        """Write what has changed since the last round; reads up to number `sync` have what they wait for then."""
        await self._written().write(_silent)
        self._round_at = trio.current_time()
        assert self._offer is not None
        await self._say(PREPARED, sync or self._offer.synced)

    async def beat(self) -> None:
        """Say now and then that it is there still."""
        if trio.current_time() - self._beat_at >= BEAT_SECONDS and self._offer is not None:
            await self._say(self._offer.phase, self._offer.synced)

    async def say_again(self) -> None:
        """Say once more what was said last, where something that was given up has come late and says otherwise."""
        beside, offer = self._shelf.beside, self._offer
        found = await self._shelf.call(beside.offer)
        if offer is not None and found not in (None, offer):
            await self._shelf.call(lambda: beside.write(offer))

    async def close(self) -> None:
        """Write the rest: nothing is written to the overlay any more."""
        assert self._offer is not None
        await self._written().write(_silent, durably=True)
        await self._say(RELEASED, self._offer.synced)
        self.is_whole = True

    # ------------------------------------------------------------------------------------------------------ the token

    @property
    def is_here(self) -> bool:
        """True if this host has the token, as it was looked at last."""
        return self.token is not None and self.token.where == self._shelf.beside.mine

    @property
    def is_lost(self) -> bool:
        """True if another host has it, or has had it."""
        return self.token is None or not (self.token.is_free or self.is_here)

    async def look(self) -> None:
        """See where the token is."""
        self.token = await self._shelf.call(lambda: self._shelf.beside.token(self.name))

    async def hand_on(self, where: str) -> bool:
        """Have the token be there. False where another host was first."""
        token, beside = self.token, self._shelf.beside
        assert token is not None
        self.token = await self._shelf.call(lambda: beside.hand_on(self.name, token, where))
        return self.token is not None

    async def forget(self) -> None:
        """Remove the token, which is another host's: it has told who that is."""
        token = self.token
        if token is not None:
            await self._shelf.call(lambda: self._shelf.beside.forget(self.name, token))

    async def end(self) -> None:
        """Remove all of it."""
        await self._shelf.call(lambda: self._shelf.beside.end(self.name, self.token))


def _silent(_done: int, _total: int) -> None:
    """Progress that nobody looks at."""
