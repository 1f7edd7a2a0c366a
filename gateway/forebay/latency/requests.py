# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The requests of one disk: how long they took, which of them wait now, and a line in the log for slow ones."""

import contextlib
import logging
import math
from collections.abc import Iterator
from time import perf_counter
from typing import Any, Final

from forebay.events.telling import tell
from forebay.latency.waits import ORIGIN, OTHER, Waits, begin_request, request_of_task
from forebay.units import format_duration, format_size
from forebay_fast.latency import FLUSH, HIT, MISS, WRITE, Latency
from forebay_nbd.server.export import Timing

log = logging.getLogger("forebay.disk")

QUIET_SECONDS: Final = 10.0
"""A disk has a line this often at most, and all disks together MOST_LINES: a store that hangs slows hundreds down."""
MOST_LINES: Final = 10

SHOWN: Final = 0.01
"""What a request waited for is told if it is a larger part than this of its time."""

KINDS: Final = {"read": HIT, "write": WRITE, "zero": WRITE, "flush": FLUSH}


class SlowLog:
    """Keeps slow requests from filling the log. One for all disks of the process."""

    def __init__(self) -> None:
        self._until = -math.inf
        self._left = MOST_LINES

    def may_tell(self, now: float) -> bool:
        """True if a line may be written at `now` (perf_counter()); then it counts as written."""
        if now >= self._until:
            self._until, self._left = now + QUIET_SECONDS, MOST_LINES
        self._left -= 1
        return self._left >= 0


_SLOW_LOG = SlowLog()


class Requests(Timing):
    """Of one disk. `latency` has all histograms of it."""

    def __init__(
        self, name: str, latency: Latency, slow: float, slow_log: SlowLog = _SLOW_LOG
    ) -> None:
        """`slow`: seconds from which a request is told of in the log; 0: none is."""
        super().__init__(latency)
        self.follow(slow)
        self._name = name
        self._log = slow_log
        self._waiting: dict[Waits | None, None] = {}
        """Those that wait, the oldest first."""
        self._told_at = -math.inf
        self._untold, self._longest = 0, 0.0
        """How many slow ones had no line since the last one, and how long the slowest of them took."""
        self.slow_requests = 0
        """How many there were."""

    def follow(self, slow: float) -> None:
        """Have another limit from now on: see `slow` of `__init__`."""
        self.slow_seconds = slow or math.inf

    @contextlib.contextmanager
    def one(self, what: str, offset: int = 0, length: int = 0) -> Iterator[None]:
        """Around what is done in a task of its own for one request of a client."""
        if request_of_task() in self._waiting:  # one is part of another: a TRIM makes zeros
            yield
            return
        waits = Waits(what, offset, length)
        self._waiting[waits] = None
        begin_request(waits)
        try:
            yield
        finally:
            del self._waiting[waits]

    @property
    def depth(self) -> int:
        """How many requests wait at this instant."""
        return len(self._waiting)

    def status(self) -> dict[str, Any]:
        """Keys of `forebay status --json`."""
        return {
            "queue_depth": self.depth,
            "slow_requests": self.slow_requests,
            "latency": self.latency.told(),
        }

    # -- what has ended

    def carried_out(self, command: int, offset: int, length: int, seconds: float) -> None:
        """Implements Timing."""
        waits = request_of_task()
        if waits is None:
            super().carried_out(command, offset, length, seconds)
            return
        kind = KINDS.get(waits.what)
        if kind == HIT and ORIGIN in waits.seconds:
            kind = MISS
        if kind is not None:
            self.latency.note(kind, seconds)
        if seconds >= self.slow_seconds:
            if not waits.is_told:
                self.slow_requests += 1
            self._tell(seconds, f"{_named(waits)} took {_parts(waits, seconds)}")

    def held_up(self, seconds: float) -> None:
        """Implements Timing: everything was there, and it was slow all the same."""
        self.slow_requests += 1
        self._tell(
            seconds,
            f"requests that the cache has all for took {format_duration(seconds)}: the event loop was held up, by the "
            "cache device or by a lack of processor time",
        )

    def look(self) -> None:
        """Tell of the request that waits for longest, if it is slow and was not told of. To be called now and then."""
        for waits in filter(None, self._waiting):
            seconds = perf_counter() - waits.began
            if seconds < self.slow_seconds:
                break
            if not waits.is_told:
                waits.is_told = True
                self.slow_requests += 1
                self._tell(
                    seconds, f"{_named(waits)} waits for {_parts(waits, seconds, waits.now())}"
                )

    def _tell(self, seconds: float, what: str) -> None:
        """An event, and a line in the log, unless there was one a moment ago."""
        now = perf_counter()
        if now - self._told_at < QUIET_SECONDS or not self._log.may_tell(now):
            self._untold += 1
            self._longest = max(self._longest, seconds)
            return
        text = what
        more: dict[str, Any] = {"took_seconds": round(seconds, 3)}
        if self._untold:
            text += f"; {self._untold} more since the last such line, up to {format_duration(self._longest)}"
            more["untold"] = self._untold
        self._told_at, self._untold, self._longest = now, 0, 0.0
        line = f"{self._name}: slow: {text}"
        tell("slow", text, self._name, level=logging.WARNING, log=log, line=line, **more)


def _named(waits: Waits) -> str:
    if not waits.length:
        return f"a {waits.what}"
    return f"a {waits.what} of {format_size(waits.length)} at {format_size(waits.offset)}"


def _parts(waits: Waits, seconds: float, now: str = "") -> str:
    """`3.2s: 3.1s for the origin, ...`, the longest first. `now`: what it still waits for."""
    parts = dict(waits.seconds)
    rest = seconds - sum(parts.values())
    parts[now or OTHER] = parts.get(now or OTHER, 0.0) + max(0.0, rest)
    shown = sorted(
        ((spent, what) for what, spent in parts.items() if spent >= SHOWN * seconds), reverse=True
    )
    text = ", ".join(f"{what} {format_duration(spent)}" for spent, what in shown)
    return f"{format_duration(seconds)}: {text}"
