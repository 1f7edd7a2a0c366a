# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What `forebay events` takes."""

import argparse
import re
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from forebay.units import parse_duration

Check = Callable[[Callable[[str], Any]], Callable[[str], Any]]
"""Makes a function that parses text one that argparse can show the errors of."""

LAST_OF_FOLLOW = 10
"""So many of before are shown where `--follow` stands alone."""


def add(parser: argparse.ArgumentParser, check: Check, name: Callable[[str], Any]) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("name", metavar="NAME", type=name, nargs="?", help="the disk; default: all, and the daemon")
    text = (
        f"go on with what happens, until interrupted; the last {LAST_OF_FOLLOW} before, or --since"
    )
    add("-f", "--follow", action="store_true", help=text)
    text = "what is not older: 2h, 30m, 14:05, today, yesterday, 2026-01-31, '2026-01-31 14:05'"
    add("--since", metavar="WHEN", type=check(parse_since), help=text)
    add("-n", "--last", metavar="N", type=check(_count), help="only the last N of these")
    add("--json", action="store_true", help="JSON instead of text; with --follow an object a line")


def _count(text: str) -> int:
    if re.fullmatch("[0-9]{1,9}", text, re.ASCII):
        return int(text)
    raise ValueError(f"{text[:80]!r} is no number of events")


def parse_since(text: str, now: float | None = None) -> float:
    """Seconds since 1970, of a moment that an operator names. Raises ValueError."""
    now = time.time() if now is None else now
    word = text.strip().lower()
    try:
        found = (
            now - parse_duration(word) if re.fullmatch(r"[\d.]+ *[a-z]+", word, re.ASCII) else None
        )
    except ValueError:
        found = None
    if found is None:
        found = _moment(word, datetime.fromtimestamp(now).astimezone())
    if found is None or found > now:
        where = "" if found is None else ", which lies ahead"
        raise ValueError(
            f"{text[:80]!r} is no moment of before{where}: write 2h, 14:05, today, or '2026-01-31 14:05'"
        )
    return max(0.0, found)


def _moment(word: str, now: datetime) -> float | None:
    """The moment that a clock or a calendar shows so; None for what is none."""
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    if word in ("today", "yesterday"):
        return (midnight - timedelta(days=word == "yesterday")).timestamp()
    if re.fullmatch(r"\d{1,2}:\d\d(:\d\d)?", word, re.ASCII):
        word = f"{midnight:%Y-%m-%d} {word:0>{5 if word.count(':') == 1 else 8}}"
    try:
        return datetime.fromisoformat(word.upper()).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
