# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The turns of a connection in the event loop, and how it waits for requests: whether it pays to poll first."""

import socket
from os import sched_yield
from time import perf_counter

import trio

import forebay_fast
from forebay_fast.loop import rest
from forebay_nbd.server.limits import Limits

LOST_IN_A_ROW = 3
"""Polls without a request after which there are none for a while."""

WAITS_WITHOUT = 200
"""How long that is, in waits. Then it is tried again: the client may have a processor of its own by now."""

SOON_POLLS = 4
"""A request that came within the time of so many polls: the next one may come during one."""

TURN_SHARE = 0.2
"""Part of `turn_seconds` that a connection has while others of the process are served as well."""


class Served:
    """Which connection of this process was served last: one that shares the event loop with others must not poll."""

    last: object = None


class Polling:
    """Whether it pays for one connection to poll its socket before it sleeps on it.

    It does where a client that answers at once has a processor of its own: to be woken takes longer than its next
    request. Where the two share one a poll may keep the client from sending, since sched_yield() need not let it run.
    """

    def __init__(self) -> None:
        self._soon = False
        """The last wait was so short that a poll would have been quicker."""
        self._lost = 0
        self._without = 0

    def pays(self) -> bool:
        """Asked once before each wait: True if it is to begin with a poll; say `won` or `lost` then."""
        if self._without:
            self._without -= 1
            return False
        return self._soon

    def won(self) -> None:
        """A request came during the poll."""
        self._lost = 0

    def lost(self) -> None:
        """None came."""
        self._lost += 1
        if self._lost == LOST_IN_A_ROW:
            self._lost = 0
            self._without = WAITS_WITHOUT

    def slept(self, *, soon: bool) -> None:
        """The connection has slept, and only a short time if `soon`."""
        self._soon = soon


class Turns:
    """Those of one connection."""

    def __init__(self, sock: socket.socket, limits: Limits) -> None:
        self._sock = sock
        self._limits = limits
        self._polling = Polling()
        self._alone = False
        """No other connection of this process was served during the last wait."""
        self.end_at = 0.0
        """perf_counter() when the other tasks have to be let run, even if there are requests to answer."""

    async def end_if_due(self) -> None:
        """Ends the turn if it has lasted as long as it may."""
        if perf_counter() > self.end_at:
            await self.end()

    def begin(self) -> None:
        """Called where others have just run."""
        self.end_at = perf_counter() + self._limits.turn_seconds * TURN_SHARE

    async def end(self) -> None:
        """Lets other tasks run. If another connection was served meanwhile, turns are shorter, without polling."""
        Served.last = self
        await trio.lowlevel.checkpoint()
        self._alone = Served.last is self
        share = 1.0 if self._alone else TURN_SHARE
        self.end_at = perf_counter() + self._limits.turn_seconds * share

    async def receive(self, space: memoryview, *, may_poll: bool) -> int:
        """Receives into `space` and returns how many bytes; 0 if the client is gone. Awaits only if nothing is there.

        Before it sleeps it polls, for as long as waking up would take, if it may, the last request came that soon,
        nobody else is kept waiting by that, and polls have not been in vain.
        """
        recv_into = self._sock.recv_into
        try:
            try:
                return recv_into(space)
            except BlockingIOError:
                pass
            asleep = perf_counter()
            if self._alone and may_poll and self._polling.pays():
                limit = asleep + self._limits.poll_seconds
                while perf_counter() < limit:
                    sched_yield()  # the client may be waiting for this very core
                    try:
                        count = recv_into(space)
                    except BlockingIOError:
                        continue
                    self._polling.won()
                    return count
                self._polling.lost()
            while True:
                await self._sleep(asleep)
                try:
                    return recv_into(space)
                except BlockingIOError:
                    pass
        except OSError:
            return 0

    async def wait_for_more(self, turn: "forebay_fast.core.Turn", *, may_poll: bool) -> bool:
        """Returns when there may be more to receive, or polling has received some; False if the client is gone."""
        asleep = perf_counter()
        if self._alone and may_poll and self._polling.pays():
            if turn.poll(self._limits.poll_seconds):
                self._polling.won()
                return True
            self._polling.lost()
        try:
            await self._sleep(asleep)
        except OSError:
            return False
        return True

    async def rest(self, wait: "forebay_fast.core.Wait", turn: "forebay_fast.core.Turn") -> int:
        """Has requests answered where the event loop waits, until Python has to look at one: returns as turn.run()."""
        Served.last = self
        try:
            return await rest(wait, turn)
        finally:
            self._alone = Served.last is self
            self.end_at = perf_counter() + self._limits.turn_seconds

    async def _sleep(self, asleep: float) -> None:
        """Returns when there is something to receive. It has waited for that since `asleep` (perf_counter())."""
        Served.last = self
        await trio.lowlevel.wait_readable(self._sock)
        now = perf_counter()
        self._polling.slept(soon=now - asleep < SOON_POLLS * self._limits.poll_seconds)
        self._alone = Served.last is self
        self.end_at = now + self._limits.turn_seconds
