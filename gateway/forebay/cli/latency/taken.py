# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What was counted between two looks at the daemon's histograms, added up over the disks that are asked for."""

import time
from array import array
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from forebay.errors import ForebayError
from forebay_fast.latency import (
    BUCKETS,
    DEVICE_KINDS,
    DISK_KINDS,
    MAX,
    REQUESTS,
    SUM,
    WIDTH,
    difference,
    summary_of,
    words_of,
)

KINDS = (*DISK_KINDS, *DEVICE_KINDS)

Told = Mapping[str, Any]
Histogram: TypeAlias = "array[int]"


class Look:
    """What the daemon told at one moment: by disk and kind its histogram. The cache device is the disk ""."""

    def __init__(self, told: Told) -> None:
        """Raises ForebayError for what no daemon tells."""
        self.at = time.monotonic()
        self.depths: dict[str, int] = {}
        self.of: dict[str, dict[str, Histogram]] = {}
        try:
            for disk in told["disks"]:
                self.depths[disk["name"]] = int(disk["queue_depth"])
                self.of[disk["name"]] = _words(disk["latency"])
            self.of[""] = _words(told["cache_device"])
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise ForebayError(
                f"the daemon's answer cannot be understood ({fault}): see that daemon and command are of one version"
            ) from None

    def summed(self, before: "Look | None" = None) -> dict[str, Histogram]:
        """By kind what all disks together, and the device, counted, `before` left out."""
        found = {kind: array("Q", bytes(8 * WIDTH)) for kind in KINDS}
        for name, kinds in self.of.items():
            then = before.of.get(name, {}) if before else {}
            for kind, words in kinds.items():
                if kind in found:
                    add(found[kind], difference(then.get(kind), words))
        return found


def _words(kinds: Told) -> dict[str, Histogram]:
    return {kind: words_of(one) for kind, one in kinds.items()}


def add(total: Histogram, words: Histogram) -> None:
    """Add one histogram to another."""
    longest = max(total[MAX], words[MAX])
    for n, count in enumerate(words):
        if count:
            total[n] += count
    total[MAX] = longest


def interval_told(name: str | None, before: Look, after: Look) -> dict[str, Any]:
    """One interval as `stats -l --json` tells it. `mean_depth`: of all requests, those that needed no waiting, too."""
    seconds = max(after.at - before.at, 1e-9)
    summed = after.summed(before)
    under_way = sum(summed[kind][SUM] for kind in REQUESTS) / 1e9
    return {
        "time": round(time.time(), 3),
        "seconds": round(seconds, 3),
        "name": name,
        "disks": len(after.depths),
        "queue_depth": sum(after.depths.values()),
        "mean_depth": round(under_way / seconds, 3),
        "latency": {kind: summary_of(summed[kind]) for kind in KINDS},
    }


def buckets_of(words: Histogram) -> list[list[int]]:
    """The buckets that are not empty: number and count."""
    return [[n, count] for n, count in enumerate(words[:BUCKETS]) if count]


def octaves_of(words: Histogram) -> list[int]:
    """How many requests took below 1 us, below 2, below 4 and so on; the last one: longer than all of these."""
    rest = words[1 : BUCKETS - 1]
    return [words[0], *(sum(rest[n : n + 4]) for n in range(0, len(rest), 4)), words[BUCKETS - 1]]


def chosen(kinds: Iterable[str], summed: Mapping[str, Histogram]) -> list[str]:
    """Those of the kinds of which there was any."""
    return [kind for kind in kinds if sum(summed[kind][:BUCKETS])]
