# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The memory that clients may hold: requests in flight, replies that they do not take, and block status.

A `Budget` is what all connections of a process may hold together, one for each kind of memory (`Budgets`). Each server
has a `Share` of it: a small part that is its own, so that it goes on whatever others hold, and a most, so that no
server takes all. Only counts are kept here.
"""

import weakref
from dataclasses import dataclass, field
from typing import Protocol

import trio

from forebay_nbd.server.limits import CONNECTION_BYTES, PROCESS_BYTES, STATUS_BYTES


class Holder(Protocol):
    """A connection, as far as the memory that it holds is concerned."""

    @property
    def stalled_since(self) -> float | None:
        """Trio time since when memory is held for a client that does not move, or None: see `Pace`."""
        ...

    def abort(self) -> None:
        """Ends the connection at once; what it holds comes back soon."""


class Pace:
    """How long a client has been slow, while the server waits for it with memory in its hands.

    A client that moves fewer than `least` bytes counts as one that does not move at all: it could hold memory for as
    long as it likes otherwise, a byte at a time.
    """

    def __init__(self, least: int) -> None:
        self._least = least
        self._moved = 0
        self.since: float | None = None
        """Trio time since when it has moved fewer bytes than that; None if the server does not wait for it."""

    def wait(self) -> None:
        """The server waits for the client, from now on if it did not already."""
        if self.since is None:
            self.since, self._moved = trio.current_time(), 0

    def move(self, count: int) -> None:
        """The client has moved `count` bytes."""
        self._moved += count
        if self.since is not None and self._moved >= self._least:
            self.since, self._moved = trio.current_time(), 0

    def end(self) -> None:
        """The server does not wait for the client any more."""
        self.since = None


class Budget:
    """An amount of memory in bytes, of which servers reserve parts."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        """Bytes of the limit that are reserved now."""
        self.own = 0
        """Bytes that servers hold beside it, each within what is its own."""
        self.shares: weakref.WeakSet[Share] = weakref.WeakSet()
        """Those of all servers."""
        self.waiting = trio.lowlevel.ParkingLot()
        """Where tasks wait in released()."""
        self.turns = trio.Lock()
        """Held for a turn of the event loop by whoever is about to copy a slice into the memory that is counted."""

    def reserve(self, count: int) -> bool:
        """Reserves `count` bytes; False, and nothing is reserved, if fewer are left.

        If nothing is reserved yet, any number is granted: no request is larger than all that there is.
        """
        if self.used and self.used + count > self.limit:
            return False
        self.used += count
        return True

    def release(self, count: int) -> None:
        """Gives `count` reserved bytes back, and wakes all that wait in released()."""
        assert 0 <= count <= self.used, "given back more than was taken"
        self.used -= count
        self.wake()

    def wake(self) -> None:
        """Lets all that wait in released() try again."""
        if self.waiting:
            self.waiting.unpark_all()

    async def released(self) -> None:
        """Returns after the next release of anything. It may have been reserved by others by then."""
        await self.waiting.park()


@dataclass(frozen=True)
class Budgets:
    """What all servers of a process share."""

    requests: Budget = field(default_factory=lambda: Budget(PROCESS_BYTES))
    """Requests in flight, and replies that are not taken."""
    status: Budget = field(default_factory=lambda: Budget(STATUS_BYTES))
    """BLOCK_STATUS, from when it is carried out until its reply is sent."""
    connections: Budget = field(default_factory=lambda: Budget(CONNECTION_BYTES))
    """Buffers that a connection has as long as it is there, in this process and in the kernel."""


class Share:
    """What the connections of one server hold. `own` bytes count against nothing, more than `most` it never gets."""

    def __init__(self, budget: Budget, own: int = 0, most: int | None = None) -> None:
        self.budget = budget
        self.holders: set[Holder] = set()
        """The connections of the server."""
        self.requests = 0
        """How many requests of them are waiting in tasks of their own."""
        self.used = 0
        """Bytes that are reserved now."""
        self._own = own
        self._most = budget.limit if most is None else most
        self._refused_by_all = False
        """The last reserve() that failed did so since all servers together hold too much."""
        budget.shares.add(self)

    def _beyond_own(self, used: int) -> int:
        return max(0, used - self._own)

    def reserve(self, count: int) -> bool:
        """Reserves `count` bytes; False, and nothing is reserved, if the server or all together hold too much.

        A server that holds nothing is not refused for its own sake: no request is larger than what a server may have.
        """
        after = self.used + count
        self._refused_by_all = False
        if self.used and after > self._most:
            return False
        beyond = self._beyond_own(after) - self._beyond_own(self.used)
        if beyond and not self.budget.reserve(beyond):
            self._refused_by_all = True
            return False
        self.budget.own += count - beyond
        self.used = after
        return True

    def has_room(self, count: int) -> bool:
        """True if reserve() would reserve `count` bytes now."""
        if not self.reserve(count):
            return False
        self.release(count)
        return True

    def release(self, count: int) -> None:
        """Gives `count` reserved bytes back, and wakes all that wait in released(), of whatever server."""
        assert 0 <= count <= self.used, "given back more than was taken"
        beyond = self._beyond_own(self.used) - self._beyond_own(self.used - count)
        self.used -= count
        self.budget.own -= count - beyond
        if beyond:
            self.budget.release(beyond)
        else:
            self.budget.wake()

    async def released(self) -> None:
        """Returns after the next release of anything. It may have been reserved by others by then."""
        await self.budget.released()

    def drop_stalled(self, seconds: float) -> bool:
        """Called after reserve() failed: aborts the connection that has stalled for longest, and at least `seconds`.

        It is one of this server if that holds too much, and of any if all together do. False if there is none.
        """
        shares = self.budget.shares if self._refused_by_all else (self,)
        before = trio.current_time() - seconds
        stalled = [
            (since, id(one), one)
            for share in shares
            for one in share.holders
            if (since := one.stalled_since) is not None and since <= before
        ]
        if stalled:
            min(stalled)[2].abort()
        return bool(stalled)
