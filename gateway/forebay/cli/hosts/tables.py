# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The tables of `forebay hosts`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from forebay.cli.terminal.render import RED, STATUS_COLUMNS, YELLOW, Cell, Column, status_row, table
from forebay.units import format_duration, format_size

Told = Mapping[str, Any]

COLUMNS = (
    Column("HOST", narrow=(24, 12)),
    Column("STATE"),
    Column("VERSION"),
    Column("CACHE", right=True),
    Column("FULL", right=True),
    Column("HIT%", right=True),
    Column("DISKS", right=True),
    Column("DIRTY", right=True),
    Column("LAG", right=True),
    Column("WHY", narrow=(60, 30, 12)),
)
IMAGE_COLUMNS = (
    Column("IMAGE", narrow=(40, 24, 12)),
    Column("SIZE", right=True),
    Column("WARM ON", narrow=(80, 40, 20)),
)

MOST_NAMED = 8
"""Hosts that are named for an image; the others are counted."""

_COLOURS = {"ok": "", "off": "", "slow": YELLOW}
"""By state; every other one is red."""


def hosts(found: Iterable[Told], *, colour: bool, width: int | None) -> list[str]:
    """How each host stands."""
    return table(COLUMNS, map(_host_row, found), colour=colour, width=width)


def _host_row(one: Told) -> list[Cell]:
    state = Cell(one["state"], _COLOURS.get(one["state"], RED))
    told = one.get("summary")
    if told is None or one["state"] == "down":
        version = told["version"] if told else ""
        blanks = [Cell("") for _ in COLUMNS[3:-1]]
        return [Cell(one["host"]), state, Cell(version), *blanks, Cell(one["why"] or "")]
    size, used = told["cache"]["size"], told["cache"]["used_bytes"]
    hit = told["hit_percent"]
    return [
        Cell(one["host"]),
        state,
        Cell(told["version"]),
        Cell(f"{format_size(used)}/{format_size(size)}"),
        Cell(f"{100 * used / size:.0f}%" if size else "-"),
        Cell("-" if hit is None else f"{hit:.1f}"),
        Cell(f"{told['disk_count']:.0f}"),
        Cell(format_size(told["dirty_bytes"]), YELLOW if told["dirty_bytes"] else ""),
        Cell(format_duration(told["lag_seconds"])),
        Cell(one["why"] or ""),
    ]


def images(found: Iterable[Told], *, colour: bool, width: int | None) -> list[str]:
    """What is warm, and where: the image of which most hosts have something comes first."""
    sizes: dict[str, float] = {}
    warm: dict[str, list[tuple[float, str]]] = {}
    for one in found:
        for image in (one.get("summary") or {}).get("images", ()):
            name, size = image["image"], image["size"]
            sizes[name] = max(sizes.get(name, 0), size)
            share = min(1.0, image["cached_bytes"] / size) if size else 1.0
            warm.setdefault(name, []).append((share, one["host"]))
    names = sorted(warm, key=lambda name: (-len(warm[name]), name))
    rows = [
        [Cell(name), Cell(format_size(sizes[name])), Cell(_where(warm[name]))] for name in names
    ]
    return table(IMAGE_COLUMNS, rows, colour=colour, width=width)


def _where(warm: Sequence[tuple[float, str]]) -> str:
    """`ham0 98%  ham2 12%`, those that have most first."""
    named = sorted(warm, key=lambda one: -one[0])[:MOST_NAMED]
    text = "  ".join(f"{host} {100 * share:.0f}%" for share, host in named)
    return f"{text}  and {len(warm) - len(named)} more" if len(warm) > len(named) else text


def disks(found: Iterable[Told], *, colour: bool, width: int | None) -> list[str]:
    """The disks of all hosts."""
    columns = (Column("HOST", narrow=(16, 8)), *STATUS_COLUMNS)
    rows = [
        [Cell(one["host"]), *status_row(disk)] for one in found for disk in one.get("disks") or ()
    ]
    return table(columns, rows, colour=colour, width=width)
