# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Tables and lines for people: what `forebay status`, `stats` and `cache` print.

Plain aligned text; at a terminal the heading is bold, and what needs a look is coloured.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence

from forebay.units import HEALTHY, MIB, exact_size, format_duration, format_size, printable

TYPE_CHECKING = False  # `typing` takes 3 ms, on each start of the command
if TYPE_CHECKING:
    from typing import Any

BOLD, RED, YELLOW = "1", "31", "33"


class Cell:
    """One field of a table; `colour` is used at a terminal only."""

    __slots__ = ("colour", "text")

    def __init__(self, text: str, colour: str = "") -> None:
        self.text = text
        self.colour = colour


class Column:
    """A heading, on which side its fields are aligned, and how narrow it may become to fit a terminal.

    `narrow` (characters): one width after the other is tried, in turn with the other columns.
    """

    __slots__ = ("heading", "narrow", "right")

    def __init__(self, heading: str, right: bool = False, narrow: tuple[int, ...] = ()) -> None:
        self.heading = heading
        self.right = right
        self.narrow = narrow


STATUS_COLUMNS = (
    Column("NAME", narrow=(20, 8, 5)),
    Column("IMAGE", narrow=(12, 8, 5)),
    Column("SIZE", right=True),
    Column("MODE", narrow=(13, 8, 6)),
    Column("STATE"),
    Column("CACHED", right=True),
    Column("DIRTY", right=True),
    Column("LAG", right=True),
    Column("HIT%", right=True),
    Column("CLIENTS", right=True),
)


IMAGE_COLUMNS = (
    Column("IMAGE", narrow=(20, 12, 8)),
    Column("FORMAT"),
    Column("SIZE", right=True),
    Column("WARM", right=True),
    Column("PINNED"),
    Column("TAGS", narrow=(16, 8, 5)),
    Column("DISKS", right=True),
    Column("USED", right=True),
)

STORE_COLUMNS = (
    Column("STORE", narrow=(20, 12, 8)),
    Column("CLIENTS", right=True),
    Column("IMAGES", right=True),
    Column("SOCKET", narrow=(40, 24)),
    Column("PATH", narrow=(40, 24)),
)
SERVED_COLUMNS = (
    Column("IMAGE", narrow=(32, 20, 12)),
    Column("SIZE", right=True),
    Column("STATE"),
    Column("CACHED", right=True),
    Column("HIT%", right=True),
    Column("CLIENTS", right=True),
)


MOST_PADDED = 64
"""Characters to which a field is filled up where nothing is cut: one long name is not to widen every line."""


def wants_colour(terminal: bool) -> bool:
    """True if output is to be coloured: at a terminal that can, unless NO_COLOR (no-color.org) is set."""
    return terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[Cell]],
    *,
    colour: bool = False,
    width: int | None = None,
) -> list[str]:
    """Aligned lines, heading first. `width` (characters): columns that may shrink do, to fit it. Without it nothing is
    cut.
    """
    body = [[Cell(printable(cell.text), cell.colour) for cell in row] for row in rows]
    widths = [
        max(len(column.heading), *(len(row[i].text) for row in body), 0)
        for i, column in enumerate(columns)
    ]
    cut = width is not None
    if width is None:
        widths = [min(one, MOST_PADDED) for one in widths]
    else:
        _shrink(columns, widths, width)
    heading = [Cell(column.heading, BOLD) for column in columns]
    return [_line(columns, widths, row, colour, cut) for row in (heading, *body)]


def _shrink(columns: Sequence[Column], widths: list[int], width: int) -> None:
    """Make columns that may be narrow narrower, until the table has `width` characters, if that can be had."""
    excess = sum(widths) + 2 * (len(widths) - 1) - width
    for turn in range(max(len(column.narrow) for column in columns)):
        for i in sorted(range(len(columns)), key=lambda i: -widths[i]):
            if excess > 0 and turn < len(columns[i].narrow):
                before = widths[i]
                widths[i] = min(before, max(columns[i].narrow[turn], before - excess))
                excess -= before - widths[i]


def _line(
    columns: Sequence[Column], widths: Sequence[int], row: Sequence[Cell], colour: bool, cut: bool
) -> str:
    fields = []
    for column, width, cell in zip(columns, widths, row, strict=True):
        text = _middle_cut(cell.text, width) if cut else cell.text
        text = text.rjust(width) if column.right else text.ljust(width)
        fields.append(f"\x1b[{cell.colour}m{text}\x1b[0m" if colour and cell.colour else text)
    return "  ".join(fields).rstrip()


def _middle_cut(text: str, width: int) -> str:
    """Cut from the middle: the store in front and the file at the end tell images apart."""
    if len(text) <= width:
        return text
    mark = _cut_mark()
    front = (width - 1) // 2
    return text[:front] + mark + text[len(text) - (width - 1 - front) :]


def _cut_mark() -> str:
    """One character that stands for what was cut out, and that stdout can show in this locale."""
    try:
        "…".encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "~"
    return "…"


def hit_percent(hits: float, misses: float) -> str:
    """`97.3`, or `-` where nothing was asked."""
    return f"{100 * hits / (hits + misses):.1f}" if hits + misses > 0 else "-"


def mode_of(disk: Mapping[str, Any]) -> str:
    """The mode, and what else decides about writes: `write-back,overlay`."""
    marks = [mark for key, mark in (("overlay", "overlay"), ("read_only", "ro")) if disk[key]]
    return ",".join([disk["mode"], *marks] if disk["mode"] else marks) or "-"


def image_shown(image: str) -> str:
    """The name of an image as operators write it: `scratch:20G` for one that has its size in bytes."""
    scratch, colon, size = image.partition(":")
    if scratch != "scratch" or not size.isdecimal():
        return image
    return f"{scratch}{colon}{exact_size(int(size)).removesuffix('iB').replace(' ', '')}"


def status_row(disk: Mapping[str, Any]) -> list[Cell]:
    """One line of `forebay status`."""
    state = str(disk["state"])
    dirty = disk["dirty_bytes"]
    attention = YELLOW if dirty else ""
    return [
        Cell(disk["name"]),
        Cell(image_shown(disk["image"])),
        Cell(format_size(disk["size"])),
        Cell(mode_of(disk)),
        Cell(state, "" if state in HEALTHY else RED),
        Cell(format_size(disk["cached_bytes"])),
        Cell(format_size(dirty), attention),
        Cell(format_duration(disk["lag_seconds"]), attention),
        Cell(hit_percent(disk["read_hits"], disk["read_misses"])),
        Cell(str(disk["clients"])),
    ]


def total_line(disks: Sequence[Mapping[str, Any]]) -> str:
    """What all disks together have: what the disks on one image share is counted once."""
    shared: dict[str, int] = {}
    for disk in disks:
        own = disk.get("private_bytes", 0)
        clean = max(0, disk["cached_bytes"] - own)
        shared[disk["image"]] = max(shared.get(disk["image"], 0), clean)
    cached = sum(shared.values()) + sum(disk.get("private_bytes", 0) for disk in disks)
    dirty = sum(disk["dirty_bytes"] for disk in disks)
    return (
        f"{len(disks)} disks on {len(shared)} image{'s' if len(shared) > 1 else ''}: "
        f"{format_size(cached)} cached, what they share counted once, {format_size(dirty)} dirty"
    )


def images_table(
    images: Sequence[Mapping[str, Any]],
    now: float,
    *,
    colour: bool = False,
    width: int | None = None,
) -> list[str]:
    """The lines of `forebay images`; USED is how long ago, at `now` in seconds since the epoch."""
    rows = [_image_row(image, now) for image in images]
    return table(IMAGE_COLUMNS, rows, colour=colour, width=width)


def stores_table(
    stores: Iterable[Mapping[str, Any]], *, colour: bool = False, width: int | None = None
) -> list[str]:
    """The lines of `forebay stores`."""
    rows = [
        [
            Cell(store["store"]),
            Cell(str(store["clients"])),
            Cell(str(len(store["images"]))),
            Cell(store["socket"] or "-"),
            Cell(store["path"]),
        ]
        for store in stores
    ]
    return table(STORE_COLUMNS, rows, colour=colour, width=width)


def served_table(
    stores: Iterable[Mapping[str, Any]], *, colour: bool = False, width: int | None = None
) -> list[str]:
    """The lines of `forebay stores STORE`: the images that are read by its socket."""
    rows = [_served_row(image) for store in stores for image in store["images"]]
    return table(SERVED_COLUMNS, rows, colour=colour, width=width)


def _served_row(image: Mapping[str, Any]) -> list[Cell]:
    hits, misses = image.get("read_hits", 0), image.get("read_misses", 0)
    percent = f"{100 * hits / (hits + misses):.1f}" if hits + misses else "-"
    return [
        Cell(image["image"]),
        Cell(format_size(image.get("size", 0))),
        Cell(image["state"]),
        Cell(format_size(image.get("cached_bytes", 0))),
        Cell(percent),
        Cell(str(image["clients"])),
    ]


def _image_row(image: Mapping[str, Any], now: float) -> list[Cell]:
    percent, used = image["cached_percent"], image["last_used"]
    return [
        Cell(image["image"]),
        Cell(image["format"]),
        Cell(format_size(image["size"])),
        Cell("-" if percent is None else f"{percent:.0f}%"),
        Cell("yes" if image["pinned"] else "-"),
        Cell(",".join(image["tags"]) or "-"),
        Cell(str(len(image["disks"]))),
        Cell("-" if used is None else format_duration(max(0.0, now - used))),
    ]


def status_table(
    disks: Sequence[Mapping[str, Any]], *, colour: bool = False, width: int | None = None
) -> list[str]:
    """The lines of `forebay status`."""
    return table(STATUS_COLUMNS, map(status_row, disks), colour=colour, width=width)


def reasons(disks: Iterable[Mapping[str, Any]]) -> list[str]:
    """`name: state: why`, for the disks that need a look."""
    return [
        printable(f"{disk['name']}: {disk['state']}: {disk['reason']}")
        for disk in disks
        if disk.get("reason")
    ]


def boot_line(disk: Mapping[str, Any]) -> str:
    """`boot read 143M, 97% prefetched`; empty for a disk that has not booted, or of which nobody knows."""
    boot = disk.get("boot") or {}
    if not boot.get("read_bytes"):
        return ""
    so_far = "" if boot["state"] == "over" else " so far"
    return (
        f"boot read {format_size(boot['read_bytes'])}{so_far}, {boot['ready_percent']:.0f}% prefetched; "
        f"trace: {printable(boot['trace'])}"
    )


def trace_lines(trace: Mapping[str, Any], now: float) -> list[str]:
    """The lines of `forebay trace show`; `now` in seconds since the epoch."""
    plural = "boot" if trace["boots"] == 1 else "boots"
    age = format_duration(max(0.0, now - trace["recorded"]))
    amount, seconds = format_size(trace["bytes"]), format_duration(trace["seconds"])
    found = [
        f"{trace['image']}: {trace['boots']} {plural}, the last recorded {age} ago",
        f"most of them read {amount} in {seconds}, fetched with {trace['requests']} requests",
        f"kept in {trace['path']}",
    ]
    if trace["fits"] is False:
        found.append("the image was changed since: it is not replayed")
    return [printable(line) for line in found]


def key_values(values: Mapping[str, Any]) -> list[str]:
    """`key  value` lines; what is counted in bytes or seconds is shown in units."""
    wide = max(map(len, values), default=0)
    return [printable(f"{key.ljust(wide)}  {_shown(key, value)}") for key, value in values.items()]


def _shown(key: str, value: Any) -> str:
    """A value for people: with its unit, by what its key ends with."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (key.endswith("_bytes") or key in ("size", "block_size")):
        return f"{format_size(value)} ({value})" if value >= 1024 else str(value)
    if number and key.endswith("_seconds"):
        return format_duration(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def rate(per_second: float) -> str:
    """Requests per second in at most five characters: `0`, `12`, `1.2k`, `345k`."""
    for unit in ("", "k", "M"):
        if per_second < 999.5:
            return (
                f"{per_second:.0f}{unit}"
                if per_second >= 9.95 or not unit
                else f"{per_second:.1f}{unit}"
            )
        per_second /= 1000
    return f"{per_second:.0f}G"


def megabytes(per_second: float) -> str:
    """Bytes per second as MiB per second: `0.00`, `3.41`, `87.1`, `1240`."""
    amount = per_second / MIB
    return (
        f"{amount:.2f}"
        if amount < 9.995
        else f"{amount:.1f}"
        if amount < 99.95
        else f"{amount:.0f}"
    )
