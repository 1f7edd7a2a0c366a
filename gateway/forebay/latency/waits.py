# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a request that has to wait waits for: the places where it does say so, and the request's own task remembers.

A place says `with Waiting(ORIGIN): ...`. What is inside another one is counted there alone, and what goes on side by
side once, so that all of it together is never more than the request took.
"""

from contextvars import ContextVar
from time import perf_counter
from types import TracebackType
from typing import Final

ADMISSION, TURN, ORIGIN, DEVICE = "admission", "turn", "origin", "device"
"""`admission`: a write, for write-back, for room in the cache, or for a change of the mode. `turn`: for other writes to
the same sectors. `origin`: for the image and what lies beside it, also while it is away. `device`: for the cache
device, and to be checked or stored there."""
OTHER: Final = "other"
"""What is none of these: memory for requests, a processor, the event loop."""

_current: ContextVar["Waits | None"] = ContextVar("forebay.waits", default=None)


class Waits:
    """What one request has waited for."""

    __slots__ = ("_open", "_told", "began", "is_told", "length", "offset", "seconds", "what")

    def __init__(self, what: str, offset: int, length: int) -> None:
        """`what` is the command, in words."""
        self.what, self.offset, self.length = what, offset, length
        self.began = perf_counter()
        self.seconds: dict[str, float] = {}
        """By what it waited for; what it waits for now is not in it yet."""
        self.is_told = False
        """True once it was said that it is slow, although it has not ended."""
        self._told = 0.0  # of all `seconds` together
        self._open: dict[str, tuple[int, float, float]] = {}  # how many, since when, `_told` then

    def now(self) -> str:
        """What it waits for at this instant."""
        return next(reversed(self._open), OTHER)

    def begin(self, what: str) -> None:
        """It waits for that from now on, until as many `end`."""
        count, since, told = self._open.get(what) or (0, perf_counter(), self._told)
        self._open[what] = count + 1, since, told

    def end(self, what: str) -> None:
        """The counterpart of `begin`."""
        count, since, told = self._open[what]
        if count > 1:
            self._open[what] = count - 1, since, told
            return
        del self._open[what]
        own = max(0.0, perf_counter() - since - (self._told - told))
        self.seconds[what] = self.seconds.get(what, 0.0) + own
        self._told += own


def begin_request(waits: Waits) -> None:
    """From now on what this task, and those that it starts, wait for is counted there."""
    _current.set(waits)


def request_of_task() -> Waits | None:
    """What was given to `begin_request` last in this task; None in one that has nothing to do with a request."""
    return _current.get()


class Waiting:
    """A block of code in which a request waits for something; of no effect in a task that is none of a request."""

    __slots__ = ("_waits", "_what")

    def __init__(self, what: str) -> None:
        self._what = what
        self._waits: Waits | None = None

    def __enter__(self) -> None:
        self._waits = waits = _current.get()
        if waits is not None:
            waits.begin(self._what)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._waits is not None:
            self._waits.end(self._what)
