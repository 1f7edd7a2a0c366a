# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay stats -l` and `-w`: tables and lines of how long requests took."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from forebay.cli.latency.taken import KINDS, Histogram, Look, buckets_of, interval_told, octaves_of
from forebay.cli.terminal.render import Cell, Column, table
from forebay.units import format_latency, natural
from forebay_fast.latency import BUCKETS, DEVICE_KINDS, DISK_KINDS, EDGES, REQUESTS, summary_of

DEVICE = "cache device"
"""What stands where the name of a disk does."""

COLUMNS = (
    Column("NAME", narrow=(20, 12)),
    Column("KIND"),
    Column("COUNT", right=True),
    Column("MEAN", right=True),
    Column("P50", right=True),
    Column("P99", right=True),
    Column("MAX", right=True),
)
SHORT = {"origin_read": "orig-r", "origin_write": "orig-w", "origin_sync": "orig-s"} | {
    "device_write": "dev-w",
    "device_sync": "dev-s",
}
FIGURES = ("p50_seconds", "p99_seconds", "max_seconds")
Ask = Callable[[], Look]


# -------------------------------------------------------------------------------------------- since attach


def totals(look: Look) -> list[str]:
    """The table of `stats -l`: a line for each disk and kind that there was."""
    rows: list[list[Cell]] = []
    for name in sorted(look.of, key=lambda one: (not one, natural(one))):
        for kind in DISK_KINDS if name else DEVICE_KINDS:
            words = look.of[name].get(kind)
            if words is not None and any(words[:BUCKETS]):
                found = summary_of(words)
                texts = [format_latency(found[key]) for key in ("mean_seconds", *FIGURES)]
                rows.append([Cell(name or DEVICE), Cell(kind), Cell(f"{found['count']}")])
                rows[-1] += map(Cell, texts)
    return table(COLUMNS, rows)


def totals_told(look: Look) -> list[dict[str, Any]]:
    """The same as JSON: a list; the cache device, whose name is null, comes last."""
    return [
        {
            "name": name or None,
            "queue_depth": look.depths.get(name),
            "latency": {kind: summary_of(words) for kind, words in look.of[name].items()},
        }
        for name in sorted(look.of, key=lambda one: (not one, natural(one)))
    ]


# -------------------------------------------------------------------------------------------- intervals


def heading() -> list[str]:
    """Two lines: the kinds, and what is told of each."""
    kinds = "".join(kind.center(18) for kind in REQUESTS)
    figures = "".join(word.rjust(6) for word in ("p50", "p99", "max"))
    return [f"{'':5}{kinds}".rstrip(), f"{'depth':>5}{figures * len(REQUESTS)}"]


def line(told: Mapping[str, Any]) -> str:
    """One interval, under `heading()`."""
    fields = [f"{told['mean_depth']:5.1f}"]
    for kind in REQUESTS:
        found = told["latency"][kind]
        fields += [
            (format_latency(found[key]) if found["count"] else "-").rjust(6) for key in FIGURES
        ]
    return "".join(fields)


# -------------------------------------------------------------------------------------------- histograms


def histogram(summed: Mapping[str, Histogram]) -> list[str]:
    """The table of `stats -w`: how many of each kind took at most so long, by octaves."""
    octaves = {kind: octaves_of(summed[kind]) for kind in KINDS}
    used = [n for n in range(len(octaves["hit"])) if any(one[n] for one in octaves.values())]
    columns = (Column("LATENCY", right=True), *(_column(kind) for kind in KINDS))
    rows = [
        [
            Cell(_bound(n)),
            *(Cell(str(octaves[kind][n]) if octaves[kind][n] else "-") for kind in KINDS),
        ]
        for n in range(min(used, default=0), max(used, default=-1) + 1)
    ]
    return table(columns, rows)


def _column(kind: str) -> Column:
    return Column(SHORT.get(kind, kind).upper(), right=True)


def _bound(octave: int) -> str:
    """Within which time those took that are counted there."""
    bucket = 4 * octave
    return (
        f"<{format_latency(EDGES[bucket])}"
        if bucket < BUCKETS - 1
        else f">{format_latency(EDGES[bucket - 4])}"
    )


def histogram_told(name: str | None, before: Look | None, after: Look) -> dict[str, Any]:
    """The same as JSON; `before` None: since attach. `edges`: the upper ends of buckets, seconds; the last has none."""
    summed = after.summed(before)
    return {
        "time": round(time.time(), 3),
        "seconds": round(after.at - before.at, 3) if before else None,
        "name": name,
        "edges": list(EDGES[:-1]),
        "histograms": {
            kind: {**summary_of(words), "buckets": buckets_of(words)}
            for kind, words in summed.items()
        },
    }


# -------------------------------------------------------------------------------------------- the command


def once(look: Look, name: str | None, *, wide: bool, json_lines: bool) -> list[str]:
    """What is printed without an interval: since attach."""
    if json_lines:
        told = histogram_told(name, None, look) if wide else totals_told(look)
        return [json.dumps(told, indent=None if wide else 2)]
    return histogram(look.summed()) if wide else totals(look)


def each(
    name: str | None, looks: Iterable[Look], *, wide: bool, json_lines: bool, every: int
) -> Iterator[list[str]]:
    """The lines of one interval after the other; `every` so many of them a heading, where they are lines of a table."""
    before: Look | None = None
    for number, after in enumerate(looks, -1):
        if before is not None:
            yield _lines(name, before, after, wide, json_lines, number % every == 0)
        before = after


def _lines(
    name: str | None, before: Look, after: Look, wide: bool, json_lines: bool, has_heading: bool
) -> list[str]:
    if json_lines:
        told = histogram_told(name, before, after) if wide else interval_told(name, before, after)
        return [json.dumps(told)]
    if wide:
        return [*histogram(after.summed(before)), ""]
    found: Sequence[str] = heading() if has_heading else ()
    return [*found, line(interval_told(name, before, after))]
