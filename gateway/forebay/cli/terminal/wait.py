# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay attach --wait`: ask again until whoever has the image has given it back."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from forebay.errors import ForebayError, InUseError
from forebay.units import format_duration, parse_duration

PAUSE = 1.0
"""Seconds between two tries. Each costs the store a few calls."""

FOREVER = "forever"
"""What may stand for a time."""

Status = dict[str, Any]


def parse_patience(text: str) -> float:
    """Seconds, from a duration or `forever`. Raises ValueError."""
    return float("inf") if text == FOREVER else parse_duration(text)


def with_wait_closed(words: Sequence[str]) -> list[str]:
    """The words of `attach`, in which a `--wait` without a time does not take the name that follows it for one."""
    closed = list(words)
    for i, word in enumerate(closed):
        if word == "--wait" and i + 1 < len(closed) and not _is_patience(closed[i + 1]):
            closed[i] = f"--wait={FOREVER}"
    return closed


def _is_patience(text: str) -> bool:
    try:
        parse_patience(text)
    except ValueError:
        return False
    return True


def when_free(attach: Callable[[], Status], name: str, patience: float) -> Status:
    """What `attach` returns, once the image is not in use any more; tells on stderr who is waited for.

    `patience` in seconds. Raises what `attach` raises but for that, and InUseError when there is no time left.
    """
    began = time.monotonic()
    line = _Line(sys.stderr.isatty())
    try:
        while True:
            try:
                return attach()
            except InUseError as fault:
                waited = time.monotonic() - began
                if waited >= patience:
                    raise InUseError(
                        f"{fault}; waited {format_duration(waited)}", fault.holder
                    ) from None
                line.show(str(fault), waited)
            _pause(name, min(PAUSE, patience - waited))
    finally:
        line.end()


def _pause(name: str, seconds: float) -> None:
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        raise ForebayError(
            f"interrupted: '{name}' is not attached, and nobody waits for it now"
        ) from None


class _Line:
    """One line that is written over at a terminal; elsewhere, one each time when it says something new."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal
        self._shown = ""

    def show(self, text: str, waited: float) -> None:
        """`waited` in seconds."""
        text = text.partition(": ")[0] if self._terminal else text
        if self._terminal:
            sys.stderr.write(f"\r\x1b[Kwaiting for {format_duration(waited)}: {text}")
        elif text != self._shown:
            sys.stderr.write(f"forebay: waiting: {text}\n")
        sys.stderr.flush()
        self._shown = text

    def end(self) -> None:
        """Leave the terminal as it was."""
        if self._terminal and self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
