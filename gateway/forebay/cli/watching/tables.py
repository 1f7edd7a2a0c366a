# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The tables of `forebay top`: which columns there are, in which order the rows stand, how both become lines."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from forebay.cli.terminal import render
from forebay.cli.terminal.render import Cell
from forebay.cli.watching.looking import Look, Row, totals
from forebay.units import did_you_mean, format_duration, format_size, natural, printable


class Column(NamedTuple):
    """One column: what of a row it shows, and how."""

    heading: str
    key: str
    shown: Callable[[Any], str] = str
    right: bool = True
    narrow: tuple[int, ...] = ()
    from_width: int = 0
    """On narrower terminals it is left out."""


def _percent(value: float) -> str:
    return f"{value:.1f}"


def _fine(seconds: float) -> str:
    """A latency: `87us`, `1.2ms`, `3.4s`."""
    if seconds < 0.0009995:
        return f"{seconds * 1e6:.0f}us"
    return f"{seconds * 1e3:.1f}ms" if seconds < 0.9995 else f"{seconds:.1f}s"


def _yes(value: object) -> str:
    return "yes" if value else "-"


DISKS = (
    Column("NAME", "name", right=False, narrow=(24, 16, 10)),
    Column("STATE", "state", right=False, narrow=(11, 8)),
    Column("R/S", "reads_per_second", render.rate),
    Column("W/S", "writes_per_second", render.rate),
    Column("RMB/S", "read_bytes_per_second", render.megabytes),
    Column("WMB/S", "written_bytes_per_second", render.megabytes),
    Column("HIT%", "hit_percent", _percent),
    Column("DIRTY", "dirty_bytes", format_size),
    Column("LAG", "lag_seconds", format_duration),
    Column("P99", "hit_p99_seconds", _fine, from_width=90),
    Column("STORE99", "origin_read_p99_seconds", _fine, from_width=90),
    Column("FROM-MB/S", "origin_read_bytes_per_second", render.megabytes, from_width=130),
    Column("TO-MB/S", "origin_written_bytes_per_second", render.megabytes, from_width=130),
    Column("CACHED", "cached_bytes", format_size, from_width=110),
    Column("VMS", "clients", from_width=110),
    Column("IMAGE", "image", render.image_shown, right=False, narrow=(40, 24, 12), from_width=110),
)
IMAGES = (
    Column("IMAGE", "image", right=False, narrow=(40, 24, 12)),
    Column("FORMAT", "format", right=False),
    Column("SIZE", "size", format_size),
    Column("CACHED", "cached_bytes", format_size),
    Column("WARM%", "cached_percent", _percent),
    Column("DISKS", "disks"),
    Column("PINNED", "pinned", _yes, right=False, from_width=72),
    Column("TAGS", "tags", right=False, narrow=(20, 10, 6), from_width=80),
)
STORES = (
    Column("STORE", "store", right=False, narrow=(24, 16, 10)),
    Column("STATE", "state", right=False),
    Column("FREE", "free_bytes", format_size),
    Column("SIZE", "capacity", format_size),
    Column("DISKS", "disks"),
    Column("DIRTY", "dirty_bytes", format_size),
    Column("LAG", "lag_seconds", format_duration),
    Column("VMS", "clients", from_width=72),
    Column("PATH", "path", right=False, narrow=(40, 24, 12), from_width=80),
)
VIEWS = {"disks": DISKS, "images": IMAGES, "stores": STORES}


RATES = (
    ("read", "read_bytes_per_second"),
    ("from stores", "origin_read_bytes_per_second"),
    ("written", "written_bytes_per_second"),
    ("to stores", "origin_written_bytes_per_second"),
)


class Order(NamedTuple):
    """By which heading rows stand, None for what needs a look and does most first, and whether the other way round."""

    heading: str | None = None
    reverse: bool = False


def parse_heading(view: str, text: str) -> str:
    """The heading that is meant. Raises argparse.ArgumentTypeError."""
    headings = [column.heading for column in VIEWS[view]]
    if text.upper() in headings:
        return text.upper()
    hint = did_you_mean(text.upper(), headings)
    raise argparse.ArgumentTypeError(
        f"argument --sort: no column {text[:80]!r}{hint}: use one of {', '.join(headings)}"
    )


def columns_for(view: str, width: int | None) -> list[Column]:
    """The columns that a terminal of that width shows; None: as wide as one likes."""
    return [one for one in VIEWS[view] if width is None or width >= one.from_width]


def ordered(view: str, rows: Iterable[Row], order: Order) -> list[Row]:
    """The rows in that order. Of numbers the largest come first, of texts those that begin with A."""
    name = VIEWS[view][0].key
    found = sorted(rows, key=lambda row: natural(row[name]))
    column = next((one for one in VIEWS[view] if one.heading == order.heading), None)
    if column is None:
        found.sort(key=_least)
    elif not column.right:
        found.sort(key=lambda row: natural(str(row[column.key] or "")))
    else:
        found.sort(
            key=lambda row: -1.0 if row[column.key] is None else row[column.key], reverse=True
        )
    return found[::-1] if order.reverse else found


def _least(row: Row) -> tuple[bool, float]:
    """A key by which what needs a look comes first, then what does most, then what the cache has most of."""
    keys = ("read_bytes_per_second", "written_bytes_per_second")
    moved = sum(row.get(key) or 0.0 for key in keys)
    return row["trouble"] is None, -(moved or row.get("cached_bytes", 0) / 1e18)


def chosen(view: str, rows: Iterable[Row], *, find: str, troubled: bool) -> list[Row]:
    """The rows that need a look (`troubled`), and in whose names `find` is, whatever the case."""
    keys = ("name", "image") if view == "disks" else (VIEWS[view][0].key,)
    sought = find.lower()
    return [
        row
        for row in rows
        if (not troubled or row["trouble"] is not None)
        and any(sought in row[key].lower() for key in keys)
    ]


def lines(view: str, rows: Sequence[Row], order: Order, width: int | None) -> list[str]:
    """The heading and a line for each row; the column by which they stand is marked."""
    columns = columns_for(view, width)
    marked = [
        render.Column(_marked(one, order), right=one.right, narrow=one.narrow) for one in columns
    ]
    cells = [[Cell(_text(one, row)) for one in columns] for row in rows]
    return render.table(marked, cells, width=width)


def _marked(column: Column, order: Order) -> str:
    if column.heading != order.heading:
        return column.heading
    downward = column.right != order.reverse
    return f"{column.heading}{'v' if downward else '^'}"


def _text(column: Column, row: Row) -> str:
    value = row[column.key]
    return "-" if value is None or value == "" else column.shown(value)


def head(now: Look, before: Look | None) -> list[str]:
    """What stands above the table: how all is, and what all disks together do."""
    found = totals(now, before)
    look_at = f"{found['troubled']} need a look" if found["troubled"] else "all is well"
    cache = now.cache
    state = "" if cache["state"] == "ok" else f", {cache['state']}"
    used = f"cache {format_size(cache['used_bytes'])} of {format_size(cache['size'])}{state}"
    disks = f"{found['disks']} disks, {look_at}, {found['clients']:.0f} clients"
    dirty = (
        f"{format_size(found['dirty_bytes'])} dirty, lag {format_duration(found['lag_seconds'])}"
    )
    rates = [f"{what} {_rate(found[key])}" for what, key in RATES]
    hits = found["hit_percent"]
    rates.append(f"hits {'-' if hits is None else f'{hits:.1f}%'}")
    return [f"{disks}; {dirty}; {used}", ", ".join(rates)]


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{format_size(value)}/s"


def reasons(rows: list[Row]) -> list[str]:
    """Why rows need a look, one line each."""
    named = ((row.get("name") or row.get("store"), row["trouble"]) for row in rows)
    return [printable(f"{name}: {why}") for name, why in named if why is not None]
