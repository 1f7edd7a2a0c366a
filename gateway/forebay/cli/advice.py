# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay status --advice`: what the cache would find if it were larger, or smaller."""

from collections.abc import Mapping
from typing import Any

from forebay.cli.terminal.render import BOLD, Cell, Column, table
from forebay.units import format_duration, format_size

COLUMNS = (Column("CACHE", right=True), Column("HIT%", right=True), Column(""))

GAIN = 0.01
"""A larger cache that would find no more than this share of all reads more is not worth a word."""
_MOST_OF_IT = 0.9
"""The size to take is the smallest with this share of what the largest would gain."""
_OFF = 0.03
"""When what was computed for the present size is further than this from what was seen, the reader is told."""
_FREE_SHARE = 20
"""With more than one part of so many free, the cache is not full yet."""


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
