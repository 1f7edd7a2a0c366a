# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay status`: the table of disks; with `-x` those that need a look; with `--advice` what is told of the cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from forebay.cli.asking import Arguments, Daemon, print_json
from forebay.cli.terminal import render
from forebay.cli.terminal.render import BOLD, Cell, Column, table
from forebay.units import HEALTHY, LAG_TIMES, Mode, format_duration, format_size, natural, printable

TYPE_CHECKING = False  # `typing` takes 3 ms, on each start of the command
if TYPE_CHECKING:
    from typing import Any

FINE, TROUBLED = 0, 1
"""Exit codes of `forebay status -x`."""

COLUMNS = (Column("CACHE", right=True), Column("HIT%", right=True), Column(""))

GAIN = 0.01
"""A larger cache that would find no more than this share of all reads more is not worth a word."""
_MOST_OF_IT = 0.9
"""The size to take is the smallest with this share of what the largest would gain."""
_OFF = 0.03
"""When what was computed for the present size is further than this from what was seen, the reader is told."""
_FREE_SHARE = 20
"""With more than one part of so many free, the cache is not full yet."""


# ------------------------------------------------------------------------------------------------------------ the disks


def show(arguments: Arguments, client: Daemon) -> int:
    """`forebay status`: print the table of disks, or JSON; or what is told of the size of the cache."""
    if arguments.advice:
        return _advice(client.get("/advice"), as_json=arguments.json)
    one = arguments.name
    disks = [client.get(f"/disks/{one}")] if one else client.get("/disks")
    disks.sort(key=lambda disk: natural(disk["name"]))
    if arguments.troubled:
        return _troubled(disks, one, as_json=arguments.json)
    if arguments.json:
        print_json(disks)
        return 0
    _print_table(disks)
    terminal = sys.stdout.isatty()
    if terminal and len(disks) > 1:
        print("", render.total_line(disks), sep="\n")
    if one:
        from forebay.cli.terminal.detail import detail_lines

        print("", *detail_lines(disks[0], client, colour=render.wants_colour(terminal)), sep="\n")
    elif terminal and (why := render.reasons(disks)):
        print("", *why, sep="\n")
    if terminal and not disks:
        print("no disks yet: 'forebay attach NAME IMAGE' serves one")
    return 0


def _print_table(disks: Sequence[Mapping[str, Any]]) -> None:
    terminal = sys.stdout.isatty()
    width = os.get_terminal_size().columns if terminal else None
    print("\n".join(render.status_table(disks, colour=render.wants_colour(terminal), width=width)))


def _troubled(disks: Sequence[Mapping[str, Any]], one: str | None, *, as_json: bool) -> int:
    """Print the disks that need a look, with what is wrong. The exit code."""
    found = [(disk, text) for disk in disks if (text := trouble(disk)) is not None]
    if as_json:
        print_json([disk for disk, _ in found])
    elif found:
        _print_table([disk for disk, _ in found])
        print("", *(printable(f"{disk['name']}: {text}") for disk, text in found), sep="\n")
    else:
        print(f"{one} is fine" if one else "all disks are fine")
    return TROUBLED if found else FINE


def trouble(disk: Mapping[str, Any]) -> str | None:
    """What is wrong with a disk, by its status, and what to do, in one line; None where nothing is."""
    if disk["state"] not in HEALTHY:
        return f"{disk['state']}: {disk.get('reason') or 'the log of the daemon says why'}"
    lag, most = disk["lag_seconds"], disk.get("max_lag_seconds")
    if disk["mode"] == Mode.WRITE_BACK and most and lag > LAG_TIMES * most:
        return (
            f"lag: the image is {format_duration(lag)} behind, with max_lag {format_duration(most)}: "
            "see with 'forebay stats' what the store takes"
        )
    return None


# ----------------------------------------------------------------------------------------------------------- the advice


def _advice(told: Any, *, as_json: bool) -> int:
    if as_json:
        print_json(told)
        return 0
    print("\n".join(advice_lines(told, colour=render.wants_colour(sys.stdout.isatty()))))
    return 0


def advice_lines(told: Mapping[str, Any], *, colour: bool = False) -> list[str]:
    """What `forebay status --advice` prints of the answer of `/advice`."""
    since = f"in the last {format_duration(max(0.0, told['now'] - told['since']))}"
    if not told["enough"]:
        seen, needed = told["sampled_reads"], told["needed_reads"]
        return [f"Too little was read {since} to say anything: {seen} of {needed} samples."]
    rows = [_row(told, one) for one in told["sizes"]]
    hit = _percent(told["hit_ratio"])
    return [
        f"Of {told['reads']} blocks that were read {since} {hit} % were in the cache.",
        *table(COLUMNS, rows, colour=colour),
        *_warnings(told),
        *verdicts(told),
    ]


def _row(told: Mapping[str, Any], one: Mapping[str, Any]) -> list[Cell]:
    now = one["size"] == told["size"]
    return [
        Cell(format_size(one["size"]), BOLD if now else ""),
        Cell(_percent(one["hit_ratio"])),
        Cell("now" if now else ""),
    ]


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.1f}"


def _warnings(told: Mapping[str, Any]) -> list[str]:
    """Where the figures are to be doubted."""
    computed = _of_size(told, told["size"])
    if abs(computed - told["hit_ratio"]) <= _OFF:
        return []
    text = "{} % were computed for the present size: trust the differences, and not the figures."
    return [text.format(_percent(computed))]


def verdicts(told: Mapping[str, Any]) -> list[str]:
    """What to do, in a line or two."""
    if told["free_bytes"] * _FREE_SHARE > told["size"]:
        return [f"{format_size(told['free_bytes'])} are free: more room would gain nothing yet."]
    now, best = _of_size(told, told["size"]), max(one["hit_ratio"] for one in told["sizes"])
    found = []
    if best - now < GAIN:
        found.append("More room would gain next to nothing.")
    else:
        enough = now + _MOST_OF_IT * (best - now)
        size = min(one["size"] for one in told["sizes"] if one["hit_ratio"] >= enough)
        found.append(_more(told, size))
    smallest = min(one["size"] for one in told["sizes"])
    if now - _of_size(told, smallest) < GAIN:
        found.append(f"{format_size(smallest)} would do as well.")
    return found


def _more(told: Mapping[str, Any], size: int) -> str:
    hit = _percent(_of_size(told, size))
    return f"With {format_size(size - told['size'])} more you would hit {hit} %."


def _of_size(told: Mapping[str, Any], size: int) -> float:
    return float(next(one["hit_ratio"] for one in told["sizes"] if one["size"] == size))
