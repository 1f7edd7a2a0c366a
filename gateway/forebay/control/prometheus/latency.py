# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The histograms for Prometheus: twelve buckets of each, a power of four microseconds apart, so that sums over disks
and hosts make sense. A kind that never came to pass has no lines, since there may be very many disks.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

from forebay_fast.latency import BUCKETS, DEVICE_KINDS, REQUESTS, SUM, WIDTH, Latency

OCTAVES: Final = range(4, 25, 2)
"""Of which the ends are told: 16 us, 64 us, ... 16.8 s. They are ends of buckets, so the counts are exact."""
PLACES: Final = [4 * octave for octave in OCTAVES]
BOUNDS: Final = [f"{(1 << octave) / 1e6:.6f}".rstrip("0") for octave in OCTAVES]
AT_ONCE: Final = 8
"""Disks of which the lines are made between two turns of others: below a millisecond."""

Disks = Sequence[tuple[str, Latency]]
"""Label and histograms of each disk."""


def latency_lines(disks: Disks, device: Latency) -> Iterator[list[str]]:
    """The lines of all histograms, in slices of work. `disks` have their label, `disk="vm1"`, for a name."""
    yield from _family(
        "request_seconds",
        "How long requests took, from when the daemon saw them until they were answered.",
        "kind",
        [(n, kind) for n, kind in enumerate(REQUESTS)],
        disks,
    )
    names = ("read", "write", "sync")
    yield from _family(
        "origin_seconds",
        "How long calls to the image took.",
        "op",
        list(enumerate(names, len(REQUESTS))),
        disks,
    )
    ops = [(n, kind.removeprefix("device_")) for n, kind in enumerate(DEVICE_KINDS)]
    yield from _family(
        "device_seconds", "How long calls to the cache device took.", "op", ops, [("", device)]
    )


def _family(
    name: str, text: str, label: str, kinds: Sequence[tuple[int, str]], disks: Disks
) -> Iterator[list[str]]:
    """The lines of one family, for AT_ONCE disks at a time."""
    yield [f"# HELP forebay_{name} {text}", f"# TYPE forebay_{name} histogram"]
    for start in range(0, len(disks), AT_ONCE):
        found: list[str] = []
        for disk, latency in disks[start : start + AT_ONCE]:
            for kind, word in kinds:
                words = latency.counts[kind * WIDTH : (kind + 1) * WIDTH]
                passed = list(accumulate(words[:BUCKETS]))
                if passed[-1]:
                    labels = f'{disk},{label}="{word}"' if disk else f'{label}="{word}"'
                    found += _lines(f"forebay_{name}", labels, passed, words[SUM])
        yield found


def _lines(name: str, labels: str, passed: Sequence[int], nanoseconds: int) -> list[str]:
    """The lines of one histogram; `passed`: how many took so long or less, by bucket."""
    count = passed[-1]
    first = f"{name}_bucket{{{labels},le="
    return [
        *[f'{first}"{bound}"}} {passed[n]}' for n, bound in zip(PLACES, BOUNDS, strict=True)],
        f'{first}"+Inf"}} {count}',
        f"{name}_sum{{{labels}}} {nanoseconds / 1e9}",
        f"{name}_count{{{labels}}} {count}",
    ]
