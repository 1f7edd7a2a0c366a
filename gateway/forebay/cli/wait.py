# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay attach --wait`: ask again until whoever has the image has given it back."""

import sys
import time
from collections.abc import Callable
from typing import Any

from forebay.errors import ForebayError, InUseError
from forebay.units import format_duration

PAUSE = 1.0
"""Seconds between two tries. Each costs the store a few calls."""

Status = dict[str, Any]


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
                if waited + PAUSE > patience:
                    raise InUseError(
                        f"{fault}; waited {format_duration(waited)}", fault.holder
                    ) from None
                line.show(str(fault), waited)
            _pause(name)
    finally:
        line.end()


def _pause(name: str) -> None:
    try:
        time.sleep(PAUSE)
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
