# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which images were told to be warm since the host started, so that one that is cold again can be told as that.

OpenNebula merges what a host reports into what it knows, and removes nothing by itself.
"""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import trio

log = logging.getLogger("forebay.overview")

FILE = "warm-images"
"""In RUN, which is empty after a boot."""
MOST = 2000
"""Images that are remembered: the last ones."""
LONGEST = 16 << 20
"""Bytes of the file: so many names, each of the longest path."""


class Remembered:
    """The images that were told, in memory and in RUN."""

    def __init__(self, run: Path) -> None:
        self._path = run / FILE
        self._told: dict[str, None] | None = None
        """Those told last come last; None until the file was read."""
        self._changing = trio.Lock()

    async def gone(self, warm: Iterable[str]) -> list[str]:
        """Note that these are told as warm; those told before that are not warm now, the last ones first."""
        now = dict.fromkeys(warm)
        async with self._changing:
            if self._told is None:
                self._told = dict.fromkeys(await trio.to_thread.run_sync(_read, self._path))
            gone = [key for key in self._told if key not in now]
            told = dict.fromkeys([*gone, *now][-MOST:])
            if told.keys() != self._told.keys():
                await trio.to_thread.run_sync(_write, self._path, list(told))
            self._told = told
        return gone[::-1]


def _read(path: Path) -> list[str]:
    """What the file has; nothing where there is none, or it makes no sense."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(LONGEST))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as fault:
        log.info("%s is not used: %s", path, fault)
        return []
    return [one for one in found if isinstance(one, str)][:MOST] if isinstance(found, list) else []


def _write(path: Path, keys: list[str]) -> None:
    """Replace the file. Without it a restart forgets which images were warm before: the log says so."""
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_text(json.dumps(keys))
        os.replace(new, path)
    except OSError as fault:
        log.info("%s cannot be written: %s", path, fault.strerror or fault)
