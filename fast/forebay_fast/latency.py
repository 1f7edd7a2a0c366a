# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How long requests took: histograms, in one flat array, into which the core and Python count alike.

Buckets are octaves from 1 us on, each in four equal parts: as 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4 us and so on, up to
134 s. So a percentile, which is told as the upper end of its bucket, is never too low, and at most a quarter too high
(a bucket is a quarter of its lower end wide, or less); below 1 us it is 1 us. Sum and maximum are exact. Each of these
is only ever added to, so what came to pass between two looks is the difference, whoever looks.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Final

UNIT_NS: Final = 250
"""Nanoseconds; a quarter of the shortest time that has a bucket of its own."""
OCTAVES: Final = 27
BUCKETS: Final = 4 * OCTAVES + 2
"""One below 1 us, four an octave, and one for all beyond the last."""
SUM: Final = BUCKETS
MAX: Final = BUCKETS + 1
WIDTH: Final = BUCKETS + 2
"""Words of one histogram: its buckets, the sum and the maximum, both in nanoseconds."""

LONGEST: Final = 1e6
"""Seconds that one request counts for at most."""
_WORD: Final = (1 << 64) - 1

REQUESTS: Final = ("hit", "miss", "write", "flush")
"""Kinds of requests of guests: READs that needed nothing of the origin, and that did; WRITE and WRITE_ZEROES; FLUSH."""
HIT, MISS, WRITE, FLUSH, ORIGIN_READ, ORIGIN_WRITE, ORIGIN_SYNC = range(7)
DISK_KINDS: Final = (*REQUESTS, "origin_read", "origin_write", "origin_sync")
"""The histograms of a disk, in order. HIT to FLUSH are the numbers that the core has, too."""
DEVICE_WRITE, DEVICE_SYNC = range(2)
DEVICE_KINDS: Final = ("device_write", "device_sync")
"""The histograms of the cache device, which all disks share."""


def bucket_of(nanoseconds: int) -> int:
    """The number of the bucket for a time."""
    units = nanoseconds // UNIT_NS
    if units < 4:
        return 0
    octave = units.bit_length() - 3
    return min(4 * octave + (units >> octave & 3) + 1, BUCKETS - 1)


def edge_of(bucket: int) -> float:
    """The upper end of a bucket in seconds; infinite of the last one."""
    if bucket == BUCKETS - 1:
        return float("inf")
    octave, part = divmod(bucket, 4)
    return (4 + part) * (1 << octave) * UNIT_NS / 1e9


EDGES: Final = tuple(map(edge_of, range(BUCKETS)))
"""The upper end of each bucket in seconds."""


class Latency:
    """Some histograms, by the numbers of their kinds. Only the event loop's thread counts."""

    __slots__ = ("counts", "kinds")

    def __init__(self, kinds: Sequence[str] = DISK_KINDS) -> None:
        self.kinds = kinds
        self.counts = array("Q", bytes(8 * WIDTH * len(kinds)))
        """Of each kind WIDTH words. The core counts there."""

    def note(self, kind: int, seconds: float, times: int = 1) -> None:
        """So many requests of a kind took so long each."""
        nanoseconds = int(min(seconds, LONGEST) * 1e9) if seconds > 0 else 0
        counts, first = self.counts, kind * WIDTH
        counts[first + bucket_of(nanoseconds)] += times
        counts[first + SUM] = counts[first + SUM] + nanoseconds * times & _WORD
        counts[first + MAX] = max(counts[first + MAX], nanoseconds)

    def of(self, kind: int) -> array[int]:
        """One histogram: a copy of its WIDTH words."""
        return self.counts[kind * WIDTH : (kind + 1) * WIDTH]

    def told(self) -> dict[str, dict[str, float]]:
        """By kind what `summary_of` says, of all that were counted."""
        words = self.counts
        return {
            name: summary_of(words[n * WIDTH : (n + 1) * WIDTH])
            for n, name in enumerate(self.kinds)
        }

    def buckets_told(self) -> dict[str, dict[str, object]]:
        """By kind `count`, `sum_seconds`, `max_seconds`, and `buckets`, those that are not empty: number and count."""
        found: dict[str, dict[str, object]] = {}
        for kind, name in enumerate(self.kinds):
            words = self.of(kind)
            buckets = [[n, count] for n, count in enumerate(words[:BUCKETS]) if count]
            found[name] = {
                "count": sum(count for _, count in buckets),
                "sum_seconds": words[SUM] / 1e9,
                "max_seconds": words[MAX] / 1e9,
                "buckets": buckets,
            }
        return found


def summary_of(words: Sequence[int]) -> dict[str, float]:
    """`count`, `mean_seconds`, `p50_seconds`, `p99_seconds` and `max_seconds` of WIDTH words; 0 of no requests."""
    most = words[MAX] / 1e9
    passed = list(accumulate(words[:BUCKETS]))
    count = passed[-1]
    return {
        "count": count,
        "mean_seconds": round(words[SUM] / max(1, count) / 1e9, 9),
        "p50_seconds": _percentile(passed, 0.5, most),
        "p99_seconds": _percentile(passed, 0.99, most),
        "max_seconds": most,
    }


def _percentile(passed: Sequence[int], share: float, most: float) -> float:
    """Seconds within which that share of the requests ended: the upper end of a bucket, and at most `most`.

    `passed`: how many requests took so long or less, by bucket.
    """
    if not passed[-1]:
        return 0.0
    return min(EDGES[bisect_left(passed, max(1, math.ceil(share * passed[-1])))], most)


def difference(before: Sequence[int] | None, after: Sequence[int]) -> array[int]:
    """The WIDTH words of what was counted between two looks; None, or a life that began anew meanwhile: all of it.

    The maximum is exact where it has grown meanwhile, else the upper end of the highest bucket that was counted in.
    """
    if before is None or any(was > now for was, now in zip(before, after, strict=True)):
        return array("Q", after)
    found = array("Q", (now - was for was, now in zip(before, after, strict=True)))
    found[MAX] = after[MAX]
    if after[MAX] == before[MAX]:
        highest = max((n for n in range(BUCKETS) if found[n]), default=-1)
        edge = EDGES[highest] if highest >= 0 else 0.0
        found[MAX] = min(after[MAX], int(edge * 1e9)) if edge != float("inf") else after[MAX]
    return found


def words_of(told: Mapping[str, object]) -> array[int]:
    """The WIDTH words of what `buckets_told` tells of one kind. Raises ValueError for what is none."""
    words = array("Q", bytes(8 * WIDTH))
    try:
        for number, count in told["buckets"]:  # type: ignore[attr-defined]
            if not 0 <= number < BUCKETS:
                continue  # a daemon that has more of them
            words[number] = count
        words[SUM] = int(float(told["sum_seconds"]) * 1e9)  # type: ignore[arg-type]
        words[MAX] = int(float(told["max_seconds"]) * 1e9)  # type: ignore[arg-type]
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"no histogram: {error}") from None
    return words
