# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which images a store has, as LIST shows them: bounded in number, depth and time."""

import contextlib
import os
import stat
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import trio

from forebay.origin.addresses import SIDECAR, is_nameable
from forebay.origin.calls import open_beneath
from forebay.origin.threads import StoreThreads, bounded
from forebay.origin.worker import syscalls
from forebay_nbd import Refused

MOST_LISTED = 1000
"""Images. One that is not listed can be asked for all the same."""

MOST_LOOKED_AT = 20000
"""Files and directories that one listing looks at."""

LONGEST_NAME = 1024
"""Bytes of a path below the store that is listed."""

LOOK_SECONDS = 10.0
"""How long a listing may take. What it has found by then is what it tells."""

STORE_SECONDS = LOOK_SECONDS + 5.0
"""After so long a store that hangs is an error to who asked."""

FRESH_SECONDS = 1.0
"""For so long a listing is the same for all who ask: each of them costs the store as many calls as it has files."""


class Listing:
    """The images of one store, by their paths below it."""

    def __init__(self, root: Path, threads: StoreThreads) -> None:
        self._root = root
        self._threads = threads
        self._alone = trio.Lock()
        self._names: list[str] | Refused = []
        self._found_at = float("-inf")

    async def names(self) -> list[str]:
        """Those that there are, sorted; of many, those that lie highest. Raises Refused where the store cannot tell."""
        async with self._alone:
            if trio.current_time() - self._found_at > FRESH_SECONDS:
                self._names = await self._look()
                self._found_at = trio.current_time()
        if isinstance(self._names, Refused):
            raise self._names
        return self._names

    async def _look(self) -> list[str] | Refused:
        """The names; or why there are none, which is one answer for all who wait for it."""
        try:
            with bounded(STORE_SECONDS, f"listing {self._root}"):
                return await self._threads.run(lambda: images_below(self._root), background=True)
        except OSError as fault:
            return Refused(f"{self._root} cannot be listed: {fault.strerror or fault}")


def images_below(root: Path) -> list[str]:
    """The paths of regular files that are not empty, below a directory: at most MOST_LISTED, sorted.

    Links, hidden files and Forebay's own are passed over, and what no client could ask for. Blocks. Raises OSError.
    """
    deadline = time.monotonic() + LOOK_SECONDS
    found: list[str] = []
    folders = deque([""])
    looked = 0
    top = syscalls.open(str(root), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while folders:
            for path, seen in _entries(top, folders.popleft()):
                looked += 1
                if stat.S_ISDIR(seen.st_mode):
                    folders.append(path)
                elif stat.S_ISREG(seen.st_mode) and seen.st_size:
                    found.append(path)
                if len(found) >= MOST_LISTED or looked >= MOST_LOOKED_AT or _is_over(deadline):
                    return sorted(found)
    finally:
        syscalls.close(top)
    return sorted(found)


def _is_over(deadline: float) -> bool:
    return time.monotonic() > deadline


def _entries(top: int, folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """What lies in a directory below `top`, by path; nothing where it cannot be read, or is gone by now."""
    with contextlib.suppress(OSError):
        fd = open_beneath(top, folder or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in sorted(syscalls.listdir(fd)):
                path = f"{folder}/{name}" if folder else name
                if _may_be_listed(name, path):
                    with contextlib.suppress(OSError):
                        yield path, syscalls.stat(name, dir_fd=fd, follow_symlinks=False)
        finally:
            syscalls.close(fd)


def _may_be_listed(name: str, path: str) -> bool:
    """True for a name that is nobody's secret, and that a client can ask for."""
    if name.startswith(".") or name.endswith(SIDECAR) or not is_nameable(path):
        return False
    return len(path.encode()) <= LONGEST_NAME
