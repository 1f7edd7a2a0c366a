# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A command on a terminal: a real pty, whose other end pyte reads as a terminal would, and shows as text."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Self

import pyte

from real.processes import end

PATIENCE = 60.0
"""Seconds that a test waits for something to be shown."""


SHOTS = Path(os.environ.get("FOREBAY_SCREENSHOTS", Path(__file__).parents[2] / "build/screenshots"))
"""Where pictures of screens are kept, for whoever wants to look."""


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """`command` on a terminal of its own."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        columns: int = 80,
        lines: int = 24,
    ) -> None:
        self._ours, theirs = pty.openpty()
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        """All that was written to it."""
        self._set_size(columns, lines)
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=dict(environment),
            start_new_session=True,
            preexec_fn=_take_terminal,  # noqa: PLW1509  (it makes one system call)
        )  # fmt: skip
        os.close(theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end(self.process)
        os.close(self._ours)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        """Have another size, as the one does whose window is drawn larger."""
        self.screen.resize(lines, columns)
        self._set_size(columns, lines)
        self.process.send_signal(signal.SIGWINCH)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._ours, text.encode())

    def read(self, seconds: float) -> bool:
        """Take in what is written, waiting for so long for more. False once nobody has the other end any more."""
        while select.select([self._ours], [], [], seconds)[0]:
            try:
                data = os.read(self._ours, 1 << 16)
            except OSError:
                return False
            if not data:
                return False
            self.raw += data
            self._stream.feed(data)
            seconds = 0.02
        return True

    @property
    def shown(self) -> str:
        """The lines of the screen."""
        return "\n".join(self.screen.display)

    def wait_for(self, is_there: Callable[[str], object]) -> str:
        """What is shown, once that is true of it."""
        deadline = time.monotonic() + PATIENCE
        while not is_there(self.shown):
            assert time.monotonic() < deadline, f"never came to be:\n{self.shown}"
            self.read(0.1)
        return self.shown

    def ended(self) -> int:
        """The exit code, once it has ended."""
        deadline = time.monotonic() + PATIENCE
        while self.read(0.1) and time.monotonic() < deadline:
            pass
        return self.process.wait(PATIENCE)


def as_svg(screen: pyte.Screen) -> str:
    """A picture of the screen."""
    wide, high = 8.4, 18
    rows = []
    for y in range(screen.lines):
        row, x = screen.buffer[y], 0
        while x < screen.columns:
            one, begin = row[x], x
            while x < screen.columns and (row[x].reverse, row[x].fg, row[x].bold) == (
                one.reverse,
                one.fg,
                one.bold,
            ):
                x += 1
            text = "".join(row[n].data for n in range(begin, x))
            left, top = 8 + begin * wide, 8 + y * high
            colour = (
                "#ff8f87" if one.fg == "red" else "#a3acbc" if y == screen.lines - 1 else "#e7eaf0"
            )
            if one.reverse:
                rows.append(
                    f'<rect x="{left}" y="{top}" width="{(x - begin) * wide:.1f}" height="{high}" fill="#e7eaf0"/>'
                )
                colour = "#11151c"
            if text.strip():
                rows.append(
                    f'<text x="{left:.1f}" y="{top + 13}" fill="{colour}" textLength="{len(text.rstrip()) * wide:.1f}" '
                    f'xml:space="preserve">{escape(text.rstrip())}</text>'
                )
    width, height = 16 + screen.columns * wide, 16 + screen.lines * high
    return (
        "<!-- SPDX-FileCopyrightText: Forebay developers -->\n<!-- SPDX-License-Identifier: Apache-2.0 -->\n"
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        'font-family="monospace" font-size="14">\n'
        f'<rect width="100%" height="100%" rx="8" fill="#11151c"/>\n'
        + "\n".join(rows)
        + "\n</svg>\n"
    )
