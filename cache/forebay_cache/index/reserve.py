# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Room that the index keeps for itself: a file beside it, which is given up when its file system is full.

A commit rewrites some pages of the tree before it frees the old ones, so a little room is enough for many. Above all a
start needs it: it has to commit what it recovered before anything is served.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

from forebay_cache.errors import IndexFault

SIZE = 4 << 20
"""Bytes that are kept."""

_LEFT_FREE = 4 * SIZE
"""It is not made anew where less would be left to others."""

_AGAIN_SECONDS = 60.0
"""How soon it is tried again to make it."""


class Reserve:
    """The reserve of the index at ``path``. Used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._file = path / "reserve"
        self._is_kept = False
        self._try_at = 0.0

    def keep(self) -> None:
        """Have one from now on: :meth:`renew` makes it where there is none."""
        self._is_kept = True
        self.renew()

    def serve(self, commit: Callable[[], None]) -> None:
        """Run a commit, once more with the room that was kept if it finds none. Raises what it raises."""
        try:
            commit()
        except IndexFault as fault:
            if fault.errno != errno.ENOSPC or not self.give_up():
                raise
            commit()
        self.renew()

    def give_up(self) -> bool:
        """Give the room to whoever comes first. Returns False where there was none."""
        self._try_at = time.monotonic() + _AGAIN_SECONDS
        try:
            self._file.unlink()
        except OSError:
            return False
        return True

    def renew(self) -> None:
        """Make it if there is none, and if there is plenty of room. Raises nothing."""
        if not self._is_kept or time.monotonic() < self._try_at:
            return
        self._try_at = time.monotonic() + _AGAIN_SECONDS
        partial = self._file.with_name("reserve.new")
        try:
            if self._file.exists():
                return
            room = os.statvfs(self._file.parent)
            if room.f_bavail * room.f_frsize < SIZE + _LEFT_FREE:
                return
            partial.unlink(missing_ok=True)
            with partial.open("xb") as made:
                os.posix_fallocate(made.fileno(), 0, SIZE)
            partial.rename(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
