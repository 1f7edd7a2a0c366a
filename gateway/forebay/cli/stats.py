# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay stats`: what the disks do, a line an interval, as vmstat and zpool iostat show it."""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from forebay.cli.asking import Daemon
from forebay.cli.terminal.render import Cell, Column, hit_percent, megabytes, rate, table
from forebay.units import format_duration, format_size, natural, parse_duration, parse_name

Disk = Mapping[str, Any]
T = TypeVar("T")

NUMBER = re.compile(r"\d+(\.\d+)?", re.ASCII)

HEADING_EVERY = 20
"""Lines between headings: one is in sight on the smallest terminal."""

HEADINGS = ("r/s", "w/s", "rMB/s", "wMB/s", "hit%", "orig-r", "orig-w", "dirty", "lag", "clients")
"""orig-r and orig-w are MB/s from and to the origins."""

COUNTERS = ("reads", "writes", "read_bytes", "written_bytes")
ORIGIN_COUNTERS = ("origin_read_bytes", "origin_written_bytes")

TOTAL_COLUMNS = (
    Column("NAME"),
    *(
        Column(heading, right=True)
        for heading in ("READS", "WRITES", "READ", "WRITTEN", "HIT%", "FROM-ORIGIN", "TO-ORIGIN")
    ),
    Column("DIRTY", right=True),
    Column("LAG", right=True),
)


@dataclass(frozen=True)
class Wanted:
    """Which disk (None: all together), seconds between lines (None: totals, once), how many lines."""

    name: str | None = None
    interval: float | None = None
    count: int | None = None


def parse_wanted(words: Sequence[str], names: Callable[[], Iterable[str]]) -> Wanted:
    """`[NAME] [INTERVAL [COUNT]]`. A number in front is INTERVAL, unless a disk in `names()` has that name.

    Raises argparse.ArgumentTypeError, before `names` is called.
    """
    if not words:
        return Wanted()
    if len(words) > 3:
        raise argparse.ArgumentTypeError("too many arguments: write [NAME] [INTERVAL [COUNT]]")
    if len(words) == 3 or not NUMBER.fullmatch(words[0]):
        return _with_name(words)
    numbers = Wanted(None, *_numbers(words))
    return _with_name(words) if words[0] in set(names()) else numbers


def _with_name(words: Sequence[str]) -> Wanted:
    """`NAME [INTERVAL [COUNT]]`. Raises argparse.ArgumentTypeError."""
    try:
        return Wanted(parse_name(words[0]), *_numbers(words[1:]))
    except ValueError as fault:
        raise argparse.ArgumentTypeError(f"argument NAME: {fault}") from None


def _numbers(words: Sequence[str]) -> tuple[float | None, int | None]:
    """`[INTERVAL [COUNT]]`: seconds, and how many lines. Raises argparse.ArgumentTypeError."""
    interval = count = None
    try:
        interval = parse_duration(words[0]) if words else None
    except ValueError as fault:
        raise argparse.ArgumentTypeError(f"argument INTERVAL: {fault}") from None
    if interval is not None and not 0.01 <= interval <= 86400:
        raise argparse.ArgumentTypeError("argument INTERVAL: use 10ms to 1d")
    if len(words) > 1:
        count = int(words[1]) if words[1].isascii() and words[1].isdigit() else 0
        if count < 1:
            raise argparse.ArgumentTypeError(f"argument COUNT: {words[1]!r} is no number above 0")
    return interval, count


# ---------------------------------------------------------------------------------------- numbers


def _counters(disk: Disk) -> dict[str, float]:
    """The disk's counters; requests are hits and misses where the daemon does not count them apart."""
    found = {key: disk.get(key, 0) for key in (*COUNTERS, *ORIGIN_COUNTERS)}
    for key, kind in (("reads", "read"), ("writes", "write")):
        if key not in disk:
            found[key] = disk[f"{kind}_hits"] + disk[f"{kind}_misses"]
    return found | {key: disk[key] for key in ("read_hits", "read_misses")}


def difference(before: Iterable[Disk], after: Iterable[Disk]) -> dict[str, float]:
    """By how much the counters of all disks grew, summed over the disks.

    A disk that was not there before counts in full, and so does one whose counters began anew, since the daemon was
    restarted.
    """
    earlier = {disk["name"]: _counters(disk) for disk in before}
    total = dict.fromkeys(_counters_of_nothing(), 0.0)
    for disk in after:
        now, then = _counters(disk), earlier.get(disk["name"], {})
        anew = any(now[key] < then.get(key, 0) for key in now)
        for key, value in now.items():
            total[key] += value if anew else value - then.get(key, 0)
    return total


def _counters_of_nothing() -> tuple[str, ...]:
    return (*COUNTERS, *ORIGIN_COUNTERS, "read_hits", "read_misses")


def rates(
    name: str | None, before: Iterable[Disk], after: Sequence[Disk], seconds: float
) -> dict[str, Any]:
    """One interval as JSON tells it: per second, bytes, a ratio of 0 to 1, and what is dirty now.

    None stands for what the daemon does not count.
    """
    moved = difference(before, after)
    asked = moved["read_hits"] + moved["read_misses"]
    counted = {"reads", "writes"}.union(*after)
    return {
        "time": round(time.time(), 3),
        "seconds": round(seconds, 3),
        "name": name,
        "disks": len(after),
        **{
            f"{key}_per_second": round(moved[key] / seconds, 3) if key in counted else None
            for key in (*COUNTERS, *ORIGIN_COUNTERS)
        },
        "hit_ratio": round(moved["read_hits"] / asked, 4) if asked else None,
        "dirty_bytes": sum(disk["dirty_bytes"] for disk in after),
        "lag_seconds": max((disk["lag_seconds"] for disk in after), default=0),
        "clients": sum(disk["clients"] for disk in after),
    }


def line(values: Mapping[str, Any]) -> str:
    """One interval as text, under `heading()`."""
    ratio = values["hit_ratio"]
    fields = (
        rate(values["reads_per_second"]),
        rate(values["writes_per_second"]),
        _megabytes(values["read_bytes_per_second"]),
        _megabytes(values["written_bytes_per_second"]),
        "-" if ratio is None else f"{100 * ratio:.1f}",
        _megabytes(values["origin_read_bytes_per_second"]),
        _megabytes(values["origin_written_bytes_per_second"]),
        format_size(values["dirty_bytes"]),
        format_duration(values["lag_seconds"]),
        str(values["clients"]),
    )
    return _aligned(fields)


def _megabytes(per_second: float | None) -> str:
    return "-" if per_second is None else megabytes(per_second)


def heading() -> str:
    """The names of a line's fields."""
    return _aligned(HEADINGS)


def _aligned(fields: Iterable[str]) -> str:
    return " ".join(field.rjust(7) for field in fields)


def total_row(disk: Disk) -> list[Cell]:
    """One disk's totals since it was attached or the daemon started."""
    counted = _counters(disk)
    texts = (
        disk["name"],
        f"{counted['reads']:.0f}",
        f"{counted['writes']:.0f}",
        format_size(counted["read_bytes"]) if "read_bytes" in disk else "-",
        format_size(counted["written_bytes"]) if "written_bytes" in disk else "-",
        hit_percent(counted["read_hits"], counted["read_misses"]),
        format_size(counted["origin_read_bytes"]),
        format_size(counted["origin_written_bytes"]),
        format_size(disk["dirty_bytes"]),
        format_duration(disk["lag_seconds"]),
    )
    return [Cell(text) for text in texts]


# ---------------------------------------------------------------------------------------- command


def stats(words: Sequence[str], client: Daemon, *, json_lines: bool) -> int:
    """Print totals, or a line an interval until interrupted; the exit code."""
    wanted = parse_wanted(words, lambda: [disk["name"] for disk in client.get("/disks")])
    if wanted.interval is None:
        disks = sorted(sample(client, wanted.name), key=lambda disk: natural(disk["name"]))
        if json_lines:
            print(json.dumps([_totals(disk) for disk in disks], indent=2))
        else:
            print("\n".join(table(TOTAL_COLUMNS, map(total_row, disks))))
        return 0
    try:
        for number, values in enumerate(intervals(client, wanted)):
            if json_lines:
                print(json.dumps(values), flush=True)
                continue
            if number % HEADING_EVERY == 0:
                print(heading())
            print(line(values), flush=True)
    except KeyboardInterrupt:
        pass  # the way to end it
    return 0


def _totals(disk: Disk) -> dict[str, Any]:
    """The totals of a disk as JSON tells them."""
    also = {
        key: disk.get(key, 0) for key in ("trims_ignored", "throttled_waits", "throttled_seconds")
    }
    return {"name": disk["name"], **_counters(disk), **also, "dirty_bytes": disk["dirty_bytes"]}


def sample(client: Daemon, name: str | None) -> list[Disk]:
    """The disks' status now."""
    return client.get("/disks") if name is None else [client.get(f"/disks/{name}")]


def intervals(client: Daemon, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Rates of one interval after the other. A daemon that is restarted meanwhile is waited for."""
    looks = _looks(lambda: (sample(client, wanted.name), time.monotonic()), wanted)
    before, then = next(looks)
    for after, now in looks:
        yield rates(wanted.name, before, after, now - then)
        before, then = after, now


def _looks(ask: Callable[[], T], wanted: Wanted) -> Iterator[T]:
    """What `ask` returns, now and at the end of each interval. A daemon that is restarted meanwhile is waited for."""
    from forebay.client import NoDaemonError

    assert wanted.interval is not None
    yield ask()
    due, shown, away = time.monotonic(), 0, False
    while wanted.count is None or shown < wanted.count:
        due = max(due + wanted.interval, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
        try:
            found = ask()
        except NoDaemonError as fault:
            if not away:
                print(f"forebay: {fault}; waiting for it", file=sys.stderr, flush=True)
            away = True
            continue
        yield found
        shown, away = shown + 1, False


def latency(words: Sequence[str], client: Daemon, *, wide: bool, json_lines: bool) -> int:
    """Print how long requests took, as `stats` does what there were; `wide`: as histograms."""
    from forebay.cli.latency.shown import each, once
    from forebay.cli.latency.taken import Look

    wanted = parse_wanted(words, lambda: [disk["name"] for disk in client.get("/disks")])
    target = "/latency" if wanted.name is None else f"/disks/{wanted.name}/latency"

    def ask() -> Look:
        return Look(client.get(target))

    if wanted.interval is None:
        print("\n".join(once(ask(), wanted.name, wide=wide, json_lines=json_lines)))
        return 0
    looks = _looks(ask, wanted)
    try:
        for lines in each(
            wanted.name, looks, wide=wide, json_lines=json_lines, every=HEADING_EVERY
        ):
            print("\n".join(lines), flush=True)
    except KeyboardInterrupt:
        pass  # the way to end it
    return 0
