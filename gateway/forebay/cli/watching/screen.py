# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The screen of `forebay top`: curses, keys, and a thread that asks the daemon, so that keys never wait for it."""

import curses
import locale
import os
import signal
import socket
import threading
import time
import unicodedata
from contextlib import suppress
from types import FrameType
from typing import Any

from forebay.cli.asking import Arguments, Daemon
from forebay.cli.terminal.render import wants_colour
from forebay.cli.watching import tables
from forebay.cli.watching.looking import Look, Row, look, rows_of
from forebay.cli.watching.tables import Order
from forebay.errors import ForebayError
from forebay.units import format_duration, printable

KEY_MS = 200
"""How long a key is waited for before it is looked whether there is something new to show."""
ESCAPE_MS = 25
LONGEST_FIND = 64
SMALLEST = (20, 6)
"""Columns and lines; a smaller terminal is told."""
MOST_REASONS = 3
MOST_IDLE = 50
"""So often in a row no key comes, and without any waiting, when the terminal is gone."""

FOOT = "q quit  h help  d disks  i images  s stores  <> sort  r turn  x trouble  / find"
HELP = (
    "d i s      disks, images, stores",
    "< >        sort by another column, or by none: what needs a look, and does most",
    "r          the other way round",
    "x          only what needs a look, or all again",
    "/          find names: type, Enter keeps it, Esc shows all again",
    "up down    one line; PgUp PgDn: a page; Home End: the first, the last",
    "+ -        twice as often, half as often",
    "space      look now",
    "q          quit",
    "",
    "Rates and hits are those since the look before. P99, STORE99: 99 of 100 reads",
    "that the cache answered, or the store, took at most so long, since attach.",
)

VIEW_KEYS = {"d": "disks", "i": "images", "s": "stores"}
MOVES = {
    curses.KEY_UP: -1,
    curses.KEY_DOWN: 1,
    ord("k"): -1,
    ord("j"): 1,
    curses.KEY_HOME: -(10**9),
    curses.KEY_END: 10**9,
}
ENTER, ESCAPE, BACKSPACE = (10, 13, curses.KEY_ENTER), 27, (8, 127, curses.KEY_BACKSPACE)


class Looker:
    """The thread that asks the daemon: what it saw last, and before, or why it saw nothing."""

    def __init__(self, client: Daemon, view: str, interval: float) -> None:
        self.view = view
        self.interval = interval
        self.now: Look | None = None
        self.before: Look | None = None
        self.fault = ""
        self.count = 0
        """Looks so far, those in vain among them."""
        self._client = client
        self._wake = threading.Event()
        threading.Thread(target=self._run, name="look", daemon=True).start()

    def wake(self) -> None:
        """Look now."""
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                found = look(self._client, self.view)
            except ForebayError as fault:
                self.fault = str(fault)
            except Exception as fault:  # noqa: BLE001  (it is shown, and tried again)
                self.fault = f"a fault of forebay itself: {type(fault).__name__}: {fault}"
            else:
                self.before, self.now, self.fault = self.now, found, ""
            self.count += 1
            self._wake.wait(self.interval)


class Screen:
    """What is shown, and what keys change about it."""

    def __init__(self, window: "curses.window", looker: Looker, arguments: Arguments) -> None:
        self._window = window
        self._looker = looker
        self._order = Order(arguments.order.heading, arguments.order.reverse)
        self._troubled = arguments.troubled
        self._most = arguments.count
        self._find = ""
        self._types = False
        """What is typed is looked for."""
        self._helps = False
        self._first = 0
        """The first row on the screen."""
        self._made: tuple[Look | None, list[str], list[Row]] = (None, [], [])
        """What was made of the last look: there may be very many rows, and each key draws them."""
        self._colours = wants_colour(terminal=True) and _has_red()

    def run(self) -> None:
        """Show until told to end, or for as many looks as were asked for."""
        shown, is_new, at_once = -1, True, 0
        while at_once <= MOST_IDLE:
            if is_new or shown != self._looker.count or self._looker.fault:
                shown = self._looker.count
                self._draw()
            if self._most is not None and shown >= self._most:
                return
            began = time.monotonic()
            key = self._window.getch()
            is_new = key != -1
            if is_new and not self._take(key):
                return
            has_waited = time.monotonic() - began > KEY_MS / 4000
            at_once = 0 if is_new or has_waited else at_once + 1

    # -- keys

    def _take(self, key: int) -> bool:
        """Do what a key says. False if that is to end."""
        if self._types:
            self._type(key)
            return True
        if self._helps and key != curses.KEY_RESIZE:
            self._helps = False
            return key != ord("q")
        text = chr(key) if 0 < key < 128 else ""
        if text == "q":
            return False
        if text in VIEW_KEYS:
            self._show(VIEW_KEYS[text])
        elif text in ("<", ">") or key in (curses.KEY_LEFT, curses.KEY_RIGHT):
            self._sort(1 if text == ">" or key == curses.KEY_RIGHT else -1)
        elif key in MOVES or key in (curses.KEY_NPAGE, curses.KEY_PPAGE):
            page = max(1, self._window.getmaxyx()[0] - 6)
            self._first += MOVES.get(key, page if key == curses.KEY_NPAGE else -page)
        else:
            self._set(text)
        return True

    def _set(self, text: str) -> None:
        if text == "r":
            self._order = self._order._replace(reverse=not self._order.reverse)
        elif text == "x":
            self._troubled, self._first = not self._troubled, 0
        elif text == "/":
            self._types, self._find = True, ""
        elif text in ("h", "?"):
            self._helps = True
        elif text in ("+", "-"):
            factor = 0.5 if text == "+" else 2.0
            self._looker.interval = min(3600.0, max(0.25, self._looker.interval * factor))
            self._looker.wake()
        elif text == " ":
            self._looker.wake()

    def _type(self, key: int) -> None:
        if key in ENTER or key == ESCAPE:
            self._types = False
            self._find = "" if key == ESCAPE else self._find
        elif key in BACKSPACE:
            self._find = self._find[:-1]
        elif 32 <= key < 127 and len(self._find) < LONGEST_FIND:
            self._find += chr(key)
        self._first = 0

    def _show(self, view: str) -> None:
        self._looker.view, self._order, self._first = view, Order(), 0
        self._looker.wake()

    def _sort(self, step: int) -> None:
        width = self._window.getmaxyx()[1]
        headings = [None, *(one.heading for one in tables.columns_for(self._looker.view, width))]
        at = headings.index(self._order.heading) if self._order.heading in headings else 0
        self._order = Order(headings[(at + step) % len(headings)])

    # -- drawing

    def _draw(self) -> None:
        height, width = self._window.getmaxyx()
        self._window.erase()
        if width < SMALLEST[0] or height < SMALLEST[1]:
            self._put(0, "larger, please", 0)
        elif self._helps:
            for number, line in enumerate(HELP[: height - 1]):
                self._put(number, line, 0)
        else:
            self._draw_all(height, width)
        self._window.noutrefresh()
        curses.doupdate()

    def _draw_all(self, height: int, width: int) -> None:
        now, before, fault = self._looker.now, self._looker.before, self._looker.fault
        top = [
            f"forebay top on {socket.gethostname()}, every {format_duration(self._looker.interval)}"
        ]
        if now is not None:
            if now is not self._made[0]:
                self._made = now, tables.head(now, before), rows_of(now, before)
            top[0] += f", {time.strftime('%H:%M:%S')}"
            top += self._made[1]
        for number, line in enumerate(top):
            self._put(number, line, 0)
        at = len(top)
        if fault:
            age = (
                ""
                if now is None
                else f" (as it was {format_duration(time.monotonic() - now.at)} ago)"
            )
            self._put(at, f"{fault}{age}", self._red())
            at += 1
        if self._types or self._find:
            self._put(at, f"find: {self._find}{'_' if self._types else ''}", curses.A_BOLD)
            at += 1
        if now is None and not fault:
            self._put(at, "asking the daemon", 0)
        elif now is not None and now.view == self._looker.view:
            rows = tables.chosen(now.view, self._made[2], find=self._find, troubled=self._troubled)
            self._draw_rows(
                now.view, tables.ordered(now.view, rows, self._order), at, height, width
            )
        self._put(height - 1, FOOT, curses.A_DIM if self._colours else 0)

    def _draw_rows(self, view: str, rows: list[Row], at: int, height: int, width: int) -> None:
        """The table, and below it why rows need a look, as far as there is room."""
        why = tables.reasons(rows)[: min(MOST_REASONS, max(0, (height - at - 4) // 2))]
        room = max(0, height - at - 2 - len(why))
        self._first = max(0, min(self._first, len(rows) - room))
        shown = rows[self._first : self._first + room]
        lines = tables.lines(view, shown, self._order, width - 1)
        self._put(at, lines[0].ljust(width - 1), curses.A_REVERSE)
        for number, (line, row) in enumerate(zip(lines[1:], shown, strict=True)):
            attribute = 0 if row["trouble"] is None else self._red()
            self._put(at + 1 + number, line, attribute)
        for number, line in enumerate(why):
            self._put(height - 1 - len(why) + number, line, self._red())
        if not rows:
            text = (
                "none that needs a look"
                if self._troubled
                else "none" + (" with that name" if self._find else " yet")
            )
            self._put(at + 1, text, 0)

    def _red(self) -> int:
        return (curses.color_pair(1) if self._colours else 0) | curses.A_BOLD

    def _put(self, y: int, text: str, attribute: int) -> None:
        """One line, as far as it fits."""
        height, width = self._window.getmaxyx()
        if not 0 <= y < height:
            return
        try:
            self._window.addstr(y, 0, fitted(printable(text), width - 1), attribute)
        except curses.error:
            pass  # the terminal has become smaller meanwhile: it is drawn anew


def _has_red() -> bool:
    """True if the terminal can show red on what it has; that is its colour pair 1 then."""
    try:
        curses.init_pair(1, curses.COLOR_RED, -1)
    except (curses.error, ValueError):
        return False
    return curses.has_colors()


def fitted(text: str, width: int) -> str:
    """As much of the text as has room in so many columns, of which some characters take two, in this locale."""
    encoding = locale.getpreferredencoding(do_setlocale=False)
    text = text.encode(encoding, "replace").decode(encoding, "replace")
    for number, character in enumerate(text):
        width -= 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if width < 0:
            return text[:number]
    return text


def show(arguments: Arguments, client: Daemon, order: Order) -> int:
    """Show it until told to end. The exit code."""
    locale.setlocale(locale.LC_ALL, "")
    for name in ("LINES", "COLUMNS"):  # with which the size would be one that never changes
        os.environ.pop(name, None)
    arguments.order = order

    def main(window: "curses.window") -> None:
        curses.set_escdelay(ESCAPE_MS)
        window.timeout(KEY_MS)
        for way in (lambda: curses.curs_set(0), curses.use_default_colors):
            with suppress(curses.error):  # a terminal that cannot do that
                way()
        Screen(window, Looker(client, arguments.view, arguments.interval), arguments).run()

    signal.signal(signal.SIGTERM, _end)
    try:
        curses.wrapper(main)
    except (KeyboardInterrupt, _EndedError):
        pass  # the terminal is as it was
    return 0


class _EndedError(Exception):
    """SIGTERM."""


def _end(_: int, __: FrameType | None) -> Any:
    raise _EndedError
