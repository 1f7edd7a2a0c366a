# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Whether it pays to poll a socket before sleeping on it."""

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
