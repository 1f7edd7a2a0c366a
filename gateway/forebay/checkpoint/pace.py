# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How fast a disk's writes may become dirty: slower and slower towards the limit, so that they never run into it.

Two things are limited: bytes (`max_dirty`), and slots of the cache, of which a few bytes take a whole one. What is
said here holds for each of them; the slower one counts.

Up to LOW of the limit nothing is slowed down. There a pass of write-back begins, and what a write adds takes

    added / rate * (outstanding - LOW) / (HIGH - outstanding)

seconds, where the rate is that of write-back, as measured, and outstanding is what is dirty less what the running pass
has done already. (A pass gives back all that it took at its end: were that what counts, guests would stop and go.)
Half way between LOW and HIGH writes are as fast as write-back, so there it stays with a guest that would be faster.
At most twice as much is dirty then, when a pass ends: so HIGH is half of the limit.

That it stays below the limit even if the pass should take longer than it looked like at first is the business of a
second term, beyond HIGH: what is left to the limit has to last until the pass is over.
"""

from typing import NamedTuple

LOW, HIGH = 0.25, 0.5
"""Shares of the limit."""

RAMP = 0.25
"""Over so much of the limit, from HIGH on, the second term comes in."""

ASSUMED = 100e6
"""Bytes a second, of a store that was not measured yet: what a gigabit takes."""

ASSUMED_SLOTS = 1500.0
"""Slots a second: the same."""

TELLING = 0.02
"""So much of a pass has to be done before it says how long the whole will take."""

LEAST_LEFT = 0.05
"""So much of a pass is always taken to be left, for its end takes time, too."""

WAIT_MOST = 0.5
"""Seconds that one piece of a write waits at most, unless the limit is reached: a guest must not take it for hung."""

SLACK = 0.004
"""Seconds by which a write may come early: short sleeps cost more than they are worth."""


class Amount(NamedTuple):
    """How much dirty data: bytes, and the slots of the cache that it lies in."""

    bytes: int
    slots: int


class Pace:
    """Of one disk: how fast its write-back is, and how long the next write has to wait for that.

    It has no clock of its own: `now` is the caller's, in seconds.
    """

    def __init__(self) -> None:
        self._rates = (ASSUMED, ASSUMED_SLOTS)
        """Bytes and slots a second, of the last pass that was done to its end."""
        self._taken = Amount(0, 0)
        """What the running pass has to write; nothing between two passes."""
        self._began: float | None = None
        """When the running pass began; None between two passes."""
        self._done = 0.0
        """Which part of the running pass is done, 0 to 1."""
        self._next = 0.0
        """When the next write may go."""

    # -- write-back -----------------------------------------------------------------------------------------

    @property
    def is_passing(self) -> bool:
        """True while a pass is under way."""
        return self._began is not None

    def begin_pass(self, now: float, taken: Amount) -> None:
        """Called when a pass over that much begins."""
        self._began, self._taken, self._done = now, taken, 0.0

    def advance(self, done: float) -> None:
        """Called as the pass goes on; `done` is the part of it that is done, 0 to 1."""
        self._done = done

    def end_pass(self, now: float, *, whole: bool) -> None:
        """Called when the pass ends, `whole` if it did all that it was to do: then it tells how fast write-back is."""
        if whole and self._began is not None and any(self._taken):
            took = max(now - self._began, 1e-3)
            self._rates = (
                self._taken.bytes / took or self._rates[0],
                self._taken.slots / took or self._rates[1],
            )
        self._began = None
        self._taken = Amount(0, 0)

    def _takes(self, now: float) -> float:
        """Seconds that the running pass will have taken at its end, estimated from the rates and from its progress."""
        assert self._began is not None
        planned = max(n / rate for n, rate in zip(self._taken, self._rates, strict=True))
        if self._done > TELLING:
            return max(planned, (now - self._began) / self._done, 1e-3)
        return max(planned, now - self._began, 1e-3)

    def left(self, now: float) -> tuple[float, float]:
        """What is left of the running pass: a part of it, 0 to 1, and seconds. Without one: 1 and 0."""
        if self._began is None:
            return 1.0, 0.0
        takes = self._takes(now)
        part = max(LEAST_LEFT, 1 - (now - self._began) / takes)
        return part, part * takes

    # -- writes ---------------------------------------------------------------------------------------------

    def seconds_to_add(self, now: float, added: Amount, dirty: Amount, most: Amount) -> float:
        """Seconds that writing `added` should take while `dirty` of at most `most` is dirty: the formula above."""
        left, seconds = self.left(now)
        found = 0.0
        for n, rate in enumerate(self._rates):
            if not added[n]:
                continue
            limit = max(most[n], 1)
            if self._began is not None and self._taken[n]:
                rate = self._taken[n] / self._takes(now)  # noqa: PLW2901  (as it is now)
            outstanding = (dirty[n] - (1 - left) * self._taken[n]) / limit
            if outstanding > LOW:
                slow = (outstanding - LOW) / max(HIGH - outstanding, 1e-3)
                found = max(found, added[n] / rate * slow)
            if dirty[n] > HIGH * limit:
                ramp = min(1.0, (dirty[n] / limit - HIGH) / RAMP)
                found = max(found, ramp * seconds * added[n] / max(limit - dirty[n], 1))
        return found

    def charge(self, now: float, seconds: float) -> None:
        """Have the next write wait `seconds` longer, for one that was made at once; WAIT_MOST from now at most."""
        self._next = min(max(self._next, now) + seconds, now + WAIT_MOST)

    def seconds_to_wait(self, now: float) -> float:
        """Seconds until the next write may be made; 0: now."""
        return max(0.0, self._next - now)

    def relieve(self) -> None:
        """Let the next write go at once: so little is dirty that nothing has to be slowed down."""
        self._next = 0.0


def share(dirty: Amount, most: Amount) -> float:
    """Which part of its limit is used up, 0 to 1 and beyond: of bytes or of slots, whichever is more."""
    return max(n / max(limit, 1) for n, limit in zip(dirty, most, strict=True))
