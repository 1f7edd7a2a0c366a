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
    """Whoever waits, waits in Turns.wait_readable()."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass


class Turns:
    """What pyfuse3 sees as trio, and as trio.lowlevel. Of one mount; set up before pyfuse3.main()."""

    Lock = _NoLock

    def __init__(self) -> None:
        self.lowlevel = self
        self._poll = select.poll()
        self._descriptor = -1
        self._waiting = trio.lowlevel.ParkingLot()
        self._led = False
        self._woken = 0
        self._taken = 0
        self._closing = False

    @classmethod
    def install(cls) -> None:
        """Let pyfuse3 wait with one of its own, where it can."""
        if hasattr(pyfuse3, "trio"):
            pyfuse3.trio = cls()

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
        """The descriptor is about to be closed: everybody who waits gets trio.ClosedResourceError."""
        self._closing = True
        trio.lowlevel.notify_closing(descriptor)
        self._wake(len(self._waiting))
