# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Those who wait for a place, which one after the other gets: start-time fair queueing. No clock, and no I/O here.

Each payer has a clock of its own that shows how much he has had, divided by his weight. The next place goes to the one
whose clock is behind the others'. So of two who wait all the time, one with twice the weight gets twice as many places,
to within one place each. Who begins to wait has his clock put forward to where that of the last one served was: nobody
saves up for later.
"""

from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from forebay_nbd.throttle.weight import MOST, Weight

T = TypeVar("T")

PATIENCE: Final = 5.0
"""Seconds. Who has waited for so long is next, whatever the weights: a twelfth of what an origin has to answer in, by
default, so that no guest gets an error because of them. Others may wait for the same data, too."""

NOBODY: Final = Weight(MOST)
"""Pays for what no guest has asked for."""

payer: ContextVar[Weight] = ContextVar("forebay.origin.payer", default=NOBODY)
"""Who pays for what a task does, and for the tasks that it starts."""


@dataclass
class _Line(Generic[T]):
    """Those of one payer."""

    clock: float
    waiting: deque[tuple[float, T]] = field(default_factory=deque)
    """Each with the time at which it has come."""


class FairQueue(Generic[T]):
    """Those who wait, each given once."""

    def __init__(self) -> None:
        self._lines: dict[Weight, _Line[T]] = {}
        """Of all payers that have somebody waiting, or whose clock is ahead of `_clock`."""
        self._clock = 0.0
        """That of the last one served, before he was."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, payer: Weight, one: T, now: float) -> None:
        """Have `one` wait from `now` (seconds) on."""
        line = self._lines.get(payer)
        if line is None:
            line = self._lines[payer] = _Line(self._clock)
        line.clock = max(line.clock, self._clock)
        line.waiting.append((now, one))
        self._count += 1

    def pop(self, now: float) -> T:
        """The next one, who waits no more. Somebody has to wait."""
        waiting = [(payer, line) for payer, line in self._lines.items() if line.waiting]
        payer, line = min(waiting, key=lambda found: found[1].waiting[0][0])
        if now - line.waiting[0][0] < PATIENCE:
            payer, line = min(waiting, key=lambda found: (found[1].clock, found[1].waiting[0][0]))
            self._clock = line.clock
        line.clock += 1 / payer.value
        self._count -= 1
        found = line.waiting.popleft()[1]
        self._forget()
        return found

    def _forget(self) -> None:
        """The clocks of those who wait for nothing, and are not ahead of others."""
        for payer in [
            payer
            for payer, line in self._lines.items()
            if not line.waiting and line.clock <= self._clock
        ]:
            del self._lines[payer]

    def remove(self, payer: Weight, one: T) -> None:
        """It does not wait any more; it must be there."""
        line = self._lines[payer]
        line.waiting.remove(next(entry for entry in line.waiting if entry[1] is one))
        self._count -= 1
