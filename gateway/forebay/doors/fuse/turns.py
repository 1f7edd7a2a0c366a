# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How pyfuse3's tasks wait for the kernel's next request: several requests in one turn of trio's loop.

pyfuse3 has its tasks queue at a lock, and the first of them waits in epoll, anew for each request: two turns of the
loop, two system calls and a registration before a request is even read. With `Turns` a task that is through looks
first whether a request is there already, which under load it is; only when there is none does one task, the leader,
wait in epoll. It wakes as many others as requests came the last time. That halves what a small request costs here.

pyfuse3 takes trio from a module variable, which its own support of asyncio replaces; so do we.
"""

import select
from typing import Any

import pyfuse3
import trio


class _NoLock:
    """A lock that everybody gets at once: who has to wait does so in Turns.wait_readable()."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass


def can_install() -> bool:
    """True if this version of pyfuse3 takes trio from a variable."""
    return hasattr(pyfuse3, "trio")


class Turns:
    """What pyfuse3 sees as trio, and as trio.lowlevel. There is one for a mount, installed before pyfuse3.main()."""

    Lock = _NoLock

    def __init__(self) -> None:
        self.lowlevel = self
        self._poll = select.poll()
        self._descriptor = -1
        self._waiting = trio.lowlevel.ParkingLot()
        self._led = False
        """True while a task waits in epoll for all."""
        self._woken = 0
        """Tasks that were woken and have not run yet."""
        self._taken = 0
        """Requests taken since a leader began to wait."""
        self._closing = False

    @classmethod
    def install(cls, turns: "Turns | None" = None) -> None:
        """Have pyfuse3 wait with `turns`, or a new one, if it is a version that takes trio from a variable."""
        if can_install():
            pyfuse3.trio = turns or cls()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel if hasattr(trio.lowlevel, name) else trio, name)

    async def wait_readable(self, descriptor: int) -> None:
        """Return when a request is there, which the caller then takes without awaiting anything in between.

        Raises trio.ClosedResourceError after notify_closing().
        """
        if descriptor != self._descriptor:
            self._descriptor = descriptor
            self._poll.register(descriptor, select.POLLIN)
        while not self._poll.poll(0):
            if self._closing:
                raise trio.ClosedResourceError
            if self._led:
                await self._waiting.park()
                self._woken -= 1
            else:
                await self._lead(descriptor)
        self._taken += 1
        if not (self._led or self._woken):
            self._wake(1)  # to lead

    async def _lead(self, descriptor: int) -> None:
        """Wait in epoll for all, then wake as many as requests came the last time."""
        self._led = True
        try:
            await trio.lowlevel.wait_readable(descriptor)
        finally:
            self._led = False
            self._wake(max(1, self._taken))
            self._taken = 0

    def _wake(self, count: int) -> None:
        self._woken += len(self._waiting.unpark(count=count))

    def notify_closing(self, descriptor: int) -> None:
        """Have everybody who waits get trio.ClosedResourceError: the descriptor is about to be closed."""
        self._closing = True
        trio.lowlevel.notify_closing(descriptor)
        self._wake(len(self._waiting))
