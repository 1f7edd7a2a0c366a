# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What `forebay top` and `forebay page` take."""

import argparse
from collections.abc import Callable
from typing import Any

from forebay.units import parse_duration, parse_host, parse_listen

Check = Callable[[Callable[[str], Any]], Callable[[str], Any]]
"""Makes a function that parses text one that argparse can show the errors of."""

LISTEN = ("127.0.0.1", 9789)
SHORTEST, LONGEST = 0.1, 86400.0
"""Seconds between two looks."""
MOST_LOOKS = 10**9
VIEWS = ("disks", "images", "stores")


def add_top(parser: argparse.ArgumentParser, check: Check) -> None:
    """Add the arguments of `forebay top`."""
    add = parser.add_argument
    text = "what to show first: disks (default), images or stores"
    add("view", metavar="VIEW", nargs="?", choices=VIEWS, default=VIEWS[0], help=text)
    text = "time between two looks (default: 2s)"
    add("-d", "--interval", metavar="TIME", type=check(_interval), default=2.0, help=text)
    text = "end after so many looks"
    add("-n", "--count", metavar="N", type=check(_count), help=text)
    text = "print one table after the other, as where stdout is no terminal"
    add("-b", "--batch", action="store_true", help=text)
    add("-s", "--sort", metavar="COLUMN", help="by which column, as its heading says")
    add("-r", "--reverse", action="store_true", help="the other way round")
    add("-x", "--troubled", action="store_true", help="only what needs a look")
    add("--json", action="store_true", help="JSON instead of text: one object a look")


def add_page(parser: argparse.ArgumentParser, check: Check) -> None:
    """Add the arguments of `forebay page`."""
    add = parser.add_argument
    text = "where to listen (default: 127.0.0.1:9789)"
    add("--listen", metavar="ADDRESS:PORT", type=check(parse_listen), default=LISTEN, help=text)
    text = "a name of this host by which browsers ask, beside localhost and its addresses"
    add("--name", metavar="HOST", type=check(_name), action="append", default=[], help=text)


def _interval(text: str) -> float:
    seconds = parse_duration(text)
    if not SHORTEST <= seconds <= LONGEST:
        raise ValueError("use 100ms to 1d")
    return seconds


def _count(text: str) -> int:
    count = int(text) if text.isascii() and text.isdigit() and len(text) < 12 else 0
    if not 0 < count <= MOST_LOOKS:
        raise ValueError(f"{text[:80]!r} is no number of 1 to {MOST_LOOKS}")
    return count


def _name(text: str) -> str:
    if "@" in text or ":" in text:
        raise ValueError(f"{text[:80]!r} is no name of a host: write it without user and port")
    return parse_host(text)
