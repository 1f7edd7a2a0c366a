# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The rows of the table: what is measured, on which servers, and the bar each has to pass."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Field = Literal["iops", "bytes_per_second", "mean_us", "p50_us", "p99_us", "seconds", "megabytes"]


@dataclass(frozen=True)
class Bar:
    """Forebay's median against a peer's (or a constant): at least, or at most, `limit` times it."""

    peer: str
    kind: Literal["at least", "at most", "above", "below"]
    limit: float

    def holds(self, ratio: float) -> bool:
        tests: dict[str, Callable[[float, float], bool]] = {
            "at least": lambda a, b: a >= b,
            "at most": lambda a, b: a <= b,
            "above": lambda a, b: a > b,
            "below": lambda a, b: a < b,
        }
        return tests[self.kind](ratio, self.limit)


@dataclass(frozen=True)
class Row:
    """One kind of work. `group` says which servers of the bed do it; `fio` holds fio's options.

    In a row of `one_processor`, client and server share one, as on a host whose processors are all busy.
    """

    key: str
    title: str
    group: Literal[
        "read",
        "write",
        "vms",
        "neighbour",
        "sync",
        "checkpoint",
        "snapshots",
        "miss",
        "cold",
        "memory",
    ]
    measures: Field
    bars: tuple[Bar, ...]
    fio: dict[str, Any] = field(default_factory=dict)
    one_processor: bool = False


def _random_read(depth: int, *bars: Bar, measures: Field = "iops") -> Row:
    return Row(
        f"read-qd{depth}",
        f"cached 4 KiB random read, depth {depth}",
        "read",
        measures,
        bars,
        {"rw": "randread", "bs": "4k", "iodepth": depth},
    )


def _mixed(kind: str, title: str, options: dict[str, Any], *bars: Bar) -> Row:
    """Random reads and writes, half and half."""
    group: Literal["write", "vms"] = "vms" if kind.startswith("vms") else "write"
    return Row(kind, title, group, "iops", bars, {"rw": "randrw", **options})


def _on_one_processor(row: Row, *bars: Bar) -> Row:
    title = f"{row.title}, client and server on one processor"
    return replace(row, key=f"{row.key}-shared", title=title, bars=bars, one_processor=True)


READ_ALONE = _random_read(1, Bar("nbdkit file", "at most", 0.6), measures="mean_us")
RWMJ = _mixed(
    "rwmj",
    "4 jobs, depth 4, 64 KiB random read and write, warm, write-back",
    {"bs": "64k", "iodepth": 4, "numjobs": 4},
    Bar("nbdkit cache", "at least", 1.2),
    Bar("qemu-nbd", "at least", 1.5),
)
WRITE = Row(
    "write-qd16",
    "write-back 4 KiB random write, depth 16",
    "write",
    "iops",
    (Bar("nbdkit cache", "at least", 3.0),),
    {"rw": "randwrite", "bs": "4k", "iodepth": 16},
)

ROWS = (
    READ_ALONE,
    _on_one_processor(READ_ALONE, Bar("nbdkit file", "at most", 0.7)),
    _random_read(16, Bar("nbdkit cache", "at least", 3.0), Bar("nbdkit file", "at least", 1.4)),
    _random_read(64, Bar("nbdkit cache", "at least", 5.5), Bar("nbdkit file", "at least", 1.9)),
    Row(
        "sequential",
        "cached 1 MiB sequential read, depth 4",
        "read",
        "bytes_per_second",
        (Bar("nbdkit file", "at least", 1.3),),
        {"rw": "read", "bs": "1m", "iodepth": 4},
    ),
    RWMJ,
    _on_one_processor(RWMJ, Bar("nbdkit cache", "at least", 1.0)),
    WRITE,
    _on_one_processor(WRITE, Bar("nbdkit cache", "at least", 2.0)),
    _mixed(
        "vms-4k",
        "8 VMs, a disk each, depth 2, 4 KiB random read and write, warm, write-back",
        {"bs": "4k", "iodepth": 2},
        Bar("nbdkit cache", "at least", 2.5),
    ),
    _mixed(
        "vms-64k",
        "8 VMs, a disk each, depth 2, 64 KiB random read and write, warm, write-back",
        {"bs": "64k", "iodepth": 2},
        Bar("nbdkit cache", "at least", 1.0),
    ),
    Row(
        "neighbour-trims",
        "cached 4 KiB random read, depth 1, p99, a neighbour trims and zeroes 4 GiB all the time",
        "neighbour",
        "p99_us",
        (Bar("20 ms", "below", 1.0),),
        {"rw": "randread", "bs": "4k", "iodepth": 1},
    ),
    Row(
        "write-flush",
        "write-back 4 KiB write and flush, depth 1",
        "sync",
        "p50_us",
        (Bar("device", "at most", 1.3),),
    ),
    Row(
        "checkpoint-read",
        "cached 4 KiB random read, depth 1, p99, a checkpoint running all the time",
        "checkpoint",
        "p99_us",
        (Bar("idle", "at most", 2.0),),
        {"rw": "randread", "bs": "4k", "iodepth": 1},
    ),
    Row(
        "checkpoint-write",
        "write-back 4 KiB random write, depth 16, a checkpoint running all the time",
        "checkpoint",
        "iops",
        (Bar("no checkpoint", "at least", 0.6),),
        {"rw": "randwrite", "bs": "4k", "iodepth": 16},
    ),
    Row(
        "checkpoint-after-checkpoint",
        "write-back 4 KiB random write, depth 16, one checkpoint after the other (max_lag 1 s)",
        "checkpoint",
        "iops",
        (Bar("no checkpoint", "at least", 0.65),),
        {"rw": "randwrite", "bs": "4k", "iodepth": 16},
    ),
    Row(
        "snapshots-qd1",
        "4 KiB random read of an overlay with 100 snapshots, written at random between them, depth 1",
        "snapshots",
        "mean_us",
        (Bar("none", "at most", 1.1), Bar("one", "at most", 1.1), Bar("ten", "at most", 1.1)),
        {"rw": "randread", "bs": "4k", "iodepth": 1},
    ),
    Row(
        "snapshots-qd16",
        "4 KiB random read of an overlay with 100 snapshots, written at random between them, depth 16",
        "snapshots",
        "iops",
        (Bar("none", "at least", 0.9), Bar("one", "at least", 0.9), Bar("ten", "at least", 0.9)),
        {"rw": "randread", "bs": "4k", "iodepth": 16},
    ),
    Row(
        "misses",
        "8 misses on different blocks, origin latency 200 ms",
        "miss",
        "seconds",
        (Bar("one latency", "at most", 1.2),),
    ),
    Row(
        "cold",
        "cold sequential read, origin 1 ms away through 1 Gbit/s",
        "cold",
        "bytes_per_second",
        (Bar("origin", "at least", 0.95),),
    ),
    Row(
        "memory",
        "daemon memory with 1 TiB of cache indexed",
        "memory",
        "megabytes",
        (Bar("300 MB", "below", 1.0),),
    ),
)

CONSTANTS: dict[str, float] = {"one latency": 0.2, "300 MB": 300.0, "20 ms": 20_000.0}
"""Bars that are a number, not a server; in the unit of the row."""
