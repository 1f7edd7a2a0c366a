# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Figures in steps of time, of which the newest are kept: a ring with one column for each figure."""

from array import array
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

DAY_SECONDS = 86400

BACK_SECONDS = 3600.0
"""A clock that goes back by less is waited for, and what comes meanwhile counts for the newest step. Beyond it the
clock was wrong before, and the ring begins anew."""

SUMS = (
    "seconds",
    "read_hits",
    "read_misses",
    "read_bytes",
    "written_bytes",
    "origin_read_bytes",
    "origin_written_bytes",
    "origin_errors",
)
"""Figures that add up. `seconds` is how much of a step was looked at: what it lacks, the daemon did not run."""

LATENCIES = tuple(
    f"{kind}_{share}_seconds" for kind in ("hit", "origin_read") for share in ("p50", "p99")
)
"""How long reads took that the cache answered, and those of stores: half of them, and 99 of 100, at most so long."""

MOST = ("dirty_bytes", "lag_seconds", "clients", "troubled", *LATENCIES)
"""Figures of which the largest counts. `troubled`: disks that need a look."""

OF_DISKS = (*SUMS, *MOST)
OF_HOST = (*OF_DISKS, "disks", "conflicts", "cache_used_bytes")


class Span(NamedTuple):
    """Which part of a ring is asked for: the first step, how many buckets, how many steps each of them has."""

    first: int
    buckets: int
    steps: int


class Ring:
    """Columns of figures. A step is known by its number: seconds since the epoch, divided by its length."""

    def __init__(self, step_seconds: int, keys: Iterable[str]) -> None:
        self.step_seconds = step_seconds
        self.length = DAY_SECONDS // step_seconds
        """Steps that are kept."""
        self.newest = -1
        """The number of the newest step; -1 while there is none."""
        self.columns = {key: array("f", bytes(4 * self.length)) for key in keys}

    def add(self, now: float, figures: Mapping[str, float]) -> None:
        """Take in what was seen at `now`, in seconds since the epoch; a key that no column has is passed over."""
        self._turn(int(now // self.step_seconds))
        at = self.newest % self.length
        for key, value in figures.items():
            column = self.columns.get(key)
            if column is not None:
                column[at] = column[at] + value if key in SUMS else max(column[at], value)

    def _turn(self, number: int) -> None:
        """Have `number` as the newest step, with those that nobody has looked at empty."""
        if number < self.newest - BACK_SECONDS / self.step_seconds:
            self.newest = -1
        if number <= self.newest:
            return
        fresh = min(self.length, number - self.newest) if self.newest >= 0 else self.length
        first = (number - fresh + 1) % self.length
        begin = max(
            0, first + fresh - self.length
        )  # what is fresh beyond the end of a column is at its beginning
        empty = array("f", bytes(4 * fresh))
        for column in self.columns.values():
            column[first : first + fresh - begin] = empty[begin:]
            column[:begin] = empty[:begin]
        self.newest = number

    def is_older_than(self, now: float, seconds: float) -> bool:
        """True if the newest step ended so long before `now`."""
        return now - (self.newest + 1) * self.step_seconds >= seconds

    def span(self, now: float, seconds: float, points: int) -> Span:
        """The part of the last `seconds`, in at most `points` buckets of as many steps each, the last of which has the
        step of `now`.
        """
        wanted = max(1, min(self.length, round(seconds / self.step_seconds)))
        steps = -(-wanted // max(1, min(points, wanted)))
        buckets = -(-wanted // steps)
        last = int(now // self.step_seconds)
        return Span(last + 1 - buckets * steps, buckets, steps)

    def told(self, key: str, span: Span) -> list[float]:
        """One figure of each bucket; 0 for what is not known. At most a day of it, so it is a slice of work."""
        column = self.columns[key]
        fold: Callable[[array[float]], float] = sum if key in SUMS else max
        found = []
        for bucket in range(span.buckets):
            first = max(span.first + bucket * span.steps, self.newest - self.length + 1, 0)
            last = min(span.first + (bucket + 1) * span.steps - 1, self.newest)
            found.append(_rounded(fold(self._between(column, first, last))) if first <= last else 0)
        return found

    def _between(self, column: "array[float]", first: int, last: int) -> "array[float]":
        """The steps from `first` to `last`, both included, in order."""
        begin, end = first % self.length, last % self.length
        if begin <= end:
            return column[begin : end + 1]
        return column[begin:] + column[: end + 1]


def _rounded(value: float) -> float:
    """As short in JSON as it can be: the columns have seven digits."""
    return int(value) if value == int(value) or abs(value) >= 1e6 else float(f"{value:.4g}")
