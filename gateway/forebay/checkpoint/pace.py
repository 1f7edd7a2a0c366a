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
"""So much of a pass is always taken to be left: its end, too, takes time."""

WAIT_MOST = 0.5
"""Seconds that one piece of a write waits at most, unless the limit is reached: a guest must not take it for hung."""

SLACK = 0.004
"""Seconds by which a write may come early: short sleeps cost more than they are worth."""


class Amount(NamedTuple):
    """Of dirty data: bytes, and the slots that it lies in."""

    bytes: int
    slots: int


class Pace:
    """Of one disk. Times in seconds, as `now` everywhere."""

    def __init__(self) -> None:
        self._rates = (ASSUMED, ASSUMED_SLOTS)
        self._taken = Amount(0, 0)  # by the running pass
        self._began: float | None = None
        self._done = 0.0
        self._next = 0.0
        """When the next write may go."""

    # -- write-back -----------------------------------------------------------------------------------------

    @property
    def passing(self) -> bool:
        """Whether a pass is under way."""
        return self._began is not None

    def began(self, now: float, taken: Amount) -> None:
        """A pass over that much begins."""
        self._began, self._taken, self._done = now, taken, 0.0

    def advanced(self, done: float) -> None:
        """So much of the pass is done, 0 to 1."""
        self._done = done

    def ended(self, now: float, *, whole: bool) -> None:
        """`whole`: it did what it was to do, so it tells how fast write-back is."""
        if whole and self._began is not None and any(self._taken):
            took = max(now - self._began, 1e-3)
            self._rates = (
                self._taken.bytes / took or self._rates[0],
                self._taken.slots / took or self._rates[1],
            )
        self._began = None
        self._taken = Amount(0, 0)

    def _takes(self, now: float) -> float:
        """How long the running pass takes, as far as one can tell."""
        assert self._began is not None
        planned = max(n / rate for n, rate in zip(self._taken, self._rates, strict=True))
        if self._done > TELLING:
            return max(planned, (now - self._began) / self._done, 1e-3)
        return max(planned, now - self._began, 1e-3)

    def left(self, now: float) -> tuple[float, float]:
        """Of the running pass: the share that is left, and the seconds."""
        if self._began is None:
            return 1.0, 0.0
        takes = self._takes(now)
        share = max(LEAST_LEFT, 1 - (now - self._began) / takes)
        return share, share * takes

    # -- writes ---------------------------------------------------------------------------------------------

    def takes(self, now: float, added: Amount, dirty: Amount, most: Amount) -> float:
        """Seconds that adding so much should take, when so much is dirty."""
        share, seconds = self.left(now)
        found = 0.0
        for n, rate in enumerate(self._rates):
            if not added[n]:
                continue
            limit = max(most[n], 1)
            if self._began is not None and self._taken[n]:
                rate = self._taken[n] / self._takes(now)  # noqa: PLW2901  (as it is now)
            outstanding = (dirty[n] - (1 - share) * self._taken[n]) / limit
            if outstanding > LOW:
                slow = (outstanding - LOW) / max(HIGH - outstanding, 1e-3)
                found = max(found, added[n] / rate * slow)
            if dirty[n] > HIGH * limit:
                ramp = min(1.0, (dirty[n] / limit - HIGH) / RAMP)
                found = max(found, ramp * seconds * added[n] / max(limit - dirty[n], 1))
        return found

    def charge(self, now: float, seconds: float) -> None:
        """Something was added that should take so long."""
        self._next = min(max(self._next, now) + seconds, now + WAIT_MOST)

    def wait(self, now: float) -> float:
        """Seconds until something may be added."""
        return max(0.0, self._next - now)

    def relieve(self) -> None:
        """Nothing needs to be slowed down any more."""
        self._next = 0.0


def share(dirty: Amount, most: Amount) -> float:
    """Of the limits, the one that is nearer."""
    return max(n / max(limit, 1) for n, limit in zip(dirty, most, strict=True))
