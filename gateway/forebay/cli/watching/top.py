# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay top`: what goes on, on the whole terminal; as one table after the other where there is none that could."""

import json
import os
import sys
import time
from typing import Any

from forebay.cli.asking import Arguments, Daemon
from forebay.cli.watching import tables
from forebay.cli.watching.looking import Look, Row, look, rows_of, totals
from forebay.cli.watching.tables import Order
from forebay.client import NoDaemonError
from forebay.units import printable


def top(arguments: Arguments, client: Daemon) -> int:
    """Show it until told to end; the exit code."""
    heading = arguments.sort and tables.parse_heading(arguments.view, arguments.sort)
    order = Order(heading or None, arguments.reverse)
    if arguments.batch or arguments.json or not _has_screen():
        return _batch(arguments, client, order)
    from forebay.cli.watching.screen import show

    return show(arguments, client, order)


def _has_screen() -> bool:
    """True at a terminal that can move its cursor; else stderr says why one table follows the other."""
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        return False
    import curses

    terminal = os.environ.get("TERM", "")
    try:
        curses.setupterm()
        able = terminal != "dumb" and bool(curses.tigetstr("cup"))
    except curses.error:
        able = False
    if not able:
        text = f"the terminal '{terminal}' cannot show more than lines: one table follows the other"
        print(f"forebay: {printable(text)}", file=sys.stderr)
    return able


# ----------------------------------------------------------------------------------------------------- the other tables


def _batch(arguments: Arguments, client: Daemon, order: Order) -> int:
    """One table after the other. A daemon that is restarted meanwhile is waited for."""
    before, shown, away = look(client, arguments.view), 0, False
    try:
        while arguments.count is None or shown < arguments.count:
            time.sleep(arguments.interval)
            try:
                now = look(client, arguments.view)
            except NoDaemonError as fault:
                if not away:
                    print(f"forebay: {fault}; waiting for it", file=sys.stderr, flush=True)
                away = True
                continue
            _print(arguments, now, before, order, first=shown == 0)
            before, shown, away = now, shown + 1, False
    except KeyboardInterrupt:
        pass  # the way to end it
    return 0


def _print(arguments: Arguments, now: Look, before: Look, order: Order, *, first: bool) -> None:
    rows = tables.chosen(now.view, rows_of(now, before), find="", troubled=arguments.troubled)
    rows = tables.ordered(now.view, rows, order)
    if arguments.json:
        print(json.dumps(_told(now, before, rows)), flush=True)
        return
    width = os.get_terminal_size().columns if sys.stdout.isatty() else None
    text = [
        *tables.head(now, before),
        *tables.lines(now.view, rows, order, width),
        *tables.reasons(rows),
    ]
    print("\n".join([*([] if first else [""]), time.strftime("%H:%M:%S"), *text]), flush=True)


def _told(now: Look, before: Look, rows: list[Row]) -> dict[str, Any]:
    """One look as JSON tells it."""
    return {
        "time": round(time.time(), 3),
        "seconds": round(now.at - before.at, 3),
        "view": now.view,
        "totals": totals(now, before),
        now.view: rows,
    }
