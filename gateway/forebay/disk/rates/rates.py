# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The rates of one disk, and the connections whose next request waits for them."""

import math
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import trio

from forebay.config.model import DiskSettings
from forebay.disk.rates.bucket import Bucket
from forebay_fast.loop import offset_of_clock
from forebay_nbd.protocol.wire import Cmd
from forebay_nbd.throttle.weight import Weight
from forebay_nbd.throttle.words import BYTES, CLOCK, ON, REQUESTS, SIZE, WAITING, WORDS

LEAST_SECONDS = 0.005
"""A wait is no shorter: to wake up for each request of a fast disk would cost more than to carry it out. What the time
brings meanwhile is there then."""

TURN_REQUESTS = 16
"""Requests after which a connection lets another one of its disk come first."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Requests and bytes per second, 0 for no limit; and how many at once after a rest, 0 for a tenth of these."""

    iops: int = 0
    bps: int = 0
    iops_burst: int = 0
    bps_burst: int = 0


def limits_of(settings: DiskSettings) -> Limits:
    """Those that the settings of a disk say."""
    return Limits(settings.iops, settings.bps, settings.iops_burst, settings.bps_burst)


class Rates:
    """Implements forebay_nbd's Throttle for a disk.

    Every request counts as one, but FLUSH, which is never asked for. READ, WRITE and CACHE count with their bytes, and
    WRITE_ZEROES where `zeros_go_to_image()`: it may have to be written there. TRIM has none.
    """

    def __init__(self, size: int, zeros_go_to_image: Callable[[], bool]) -> None:
        """`size` of the disk, bytes: nobody uses more at once."""
        self.is_on = False
        """See Throttle."""
        self.limits = Limits()
        self.weight = Weight()
        """See Throttle."""
        self._size = size
        self.words = array("d", (0.0,) * WORDS)
        """See Throttle."""
        self.words[SIZE], self.words[CLOCK] = size, math.nan
        self._zeros_go_to_image = zeros_go_to_image
        self._requests = Bucket(self.words, REQUESTS)
        self._bytes = Bucket(self.words, BYTES)
        self._waiting: deque[_Waiter] = deque()
        """Those whose next request waits. The first one may ask, the others wait for it to be served or to leave."""
        self._connections: set[_Waiter] = set()
        self.waits = 0
        """How often a connection had to wait."""
        self._seconds = 0.0
        self._since = 0.0
        """Trio time since when somebody waits, if somebody does."""

    def set(self, limits: Limits) -> None:
        """Have these limits from now on: whoever waits looks again. Called in the event loop."""
        if limits == self.limits:
            return
        now = trio.current_time()
        self._requests.set(limits.iops, limits.iops_burst, now)
        self._bytes.set(limits.bps, limits.bps_burst, now)
        self.limits = limits
        self.is_on = bool(limits.iops or limits.bps)
        self.words[ON], self.words[CLOCK] = self.is_on, offset_of_clock()
        for one in list(self._connections):
            one.wake()

    @property
    def seconds(self) -> float:
        """How long the disk had at least one connection waiting."""
        return self._seconds + (trio.current_time() - self._since if self._waiting else 0.0)

    def status(self) -> dict[str, Any]:
        """Keys of `forebay status --json`: what holds, 0 for no limit, and what came of it."""
        return {
            **asdict(self.limits),
            "weight": self.weight.value,
            "throttled_waits": self.waits,
            "throttled_seconds": round(self.seconds, 3),
        }

    def enter(self, wake: Callable[[], None]) -> "_Waiter":
        """Implements Throttle."""
        waiter = _Waiter(self, wake)
        self._connections.add(waiter)
        return waiter

    def _units(self, command: int, length: int) -> int:
        """The bytes that a request counts for."""
        if command in (Cmd.READ, Cmd.WRITE, Cmd.CACHE):
            return min(length, self._size)
        if command == Cmd.WRITE_ZEROES and self._zeros_go_to_image():
            return min(length, self._size)
        return 0

    def admit(self, waiter: "_Waiter", command: int, length: int) -> float:
        """What `Waiter.admit` says."""
        if not self._is_its_turn(waiter):
            return math.inf
        units, now = self._units(command, length), trio.current_time()
        wait = max(self._requests.seconds_until(1, now), self._bytes.seconds_until(units, now))
        if wait > 0.0:
            return max(wait, LEAST_SECONDS)
        self._requests.use(1)
        self._bytes.use(units)
        waiter.served += 1
        return 0.0

    def _is_its_turn(self, waiter: "_Waiter") -> bool:
        """True unless others come first. Who has been served for long, while others wait, becomes the last of them."""
        if not self._waiting:
            return True
        if self._waiting[0] is not waiter:
            return False
        if waiter.served < TURN_REQUESTS or len(self._waiting) == 1:
            return True
        self.pass_on(waiter)
        return False

    def wait(self, waiter: "_Waiter") -> None:
        """What `Waiter.wait` says."""
        if waiter.is_waiting:
            return
        if not self._waiting:
            self._since = trio.current_time()
        waiter.is_waiting, waiter.served = True, 0
        self._waiting.append(waiter)
        self.words[WAITING] = len(self._waiting)
        self.waits += 1

    def pass_on(self, waiter: "_Waiter") -> None:
        """What `Waiter.pass_on` says: if it was the first of those that wait, the next one is woken."""
        if not waiter.is_waiting:
            return
        was_first = self._waiting[0] is waiter
        self._waiting.remove(waiter)
        self.words[WAITING] = len(self._waiting)
        waiter.is_waiting, waiter.served = False, 0
        if not self._waiting:
            self._seconds += trio.current_time() - self._since
        elif was_first:
            self._waiting[0].wake()

    def leave(self, waiter: "_Waiter") -> None:
        """What `Waiter.leave` says."""
        self._connections.discard(waiter)
        self.pass_on(waiter)


class _Waiter:
    """Implements forebay_nbd's Waiter."""

    def __init__(self, rates: Rates, wake: Callable[[], None]) -> None:
        self._rates = rates
        self.wake = wake
        self.is_waiting = False
        self.served = 0
        """Requests that were let in since it has begun to wait."""

    def admit(self, command: int, length: int) -> float:
        """Implements Waiter."""
        return self._rates.admit(self, command, length)

    def wait(self) -> None:
        """Implements Waiter."""
        self._rates.wait(self)

    def pass_on(self) -> None:
        """Implements Waiter."""
        self._rates.pass_on(self)

    def leave(self) -> None:
        """Implements Waiter."""
        self._rates.leave(self)
