# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A listening socket that stays where clients look for it, whoever tidies up there."""

import logging
from collections.abc import Callable
from pathlib import Path

import trio

from forebay.errors import ForebayError

log = logging.getLogger("forebay.daemon")

LOOK_SECONDS = 5.0
"""How often is looked whether the path is still there."""


class NamedListener(trio.abc.Listener[trio.SocketStream]):
    """Listens on a Unix socket at `path`, and on a new one there when somebody has removed it.

    What lies there instead, if anything does, is somebody else's, and left alone.
    """

    def __init__(
        self, path: Path, listener: trio.SocketListener, again: Callable[[], trio.SocketListener]
    ) -> None:
        """`listener` is bound to `path`; `again` makes another. It may raise OSError, KeyError, ForebayError."""
        self.path = path
        self._listener = listener
        self._again = again
        self._ours = _inode(path)
        self._failed = False
        """True if the last try to make it anew failed, which is told once."""

    @property
    def socket(self) -> trio.socket.SocketType:
        """The listening socket, for now."""
        return self._listener.socket

    async def accept(self) -> trio.SocketStream:
        """The next client's connection. Raises OSError."""
        while True:
            with trio.move_on_after(LOOK_SECONDS):
                return await self._listener.accept()
            self._look()

    def _look(self) -> None:
        """Have a socket at the path, if nothing is there any more."""
        if not is_gone(self.path):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            found = self._again()
        except (OSError, KeyError, ForebayError) as fault:
            if not self._failed:
                log.error("somebody removed %s, and it cannot be made anew: %s", self.path, fault)
            self._failed = True
            return
        log.warning("somebody removed %s: made anew", self.path)
        self._failed = False
        self._listener.socket.close()
        self._listener, self._ours = found, _inode(self.path)

    async def aclose(self) -> None:
        """Listen no more. The path stays: see `remove`."""
        await self._listener.aclose()

    def remove(self) -> None:
        """Remove the path, unless something of somebody else lies there by now."""
        if self._ours is not None and _inode(self.path) == self._ours:
            self.path.unlink()


def is_gone(path: Path) -> bool:
    """True if nothing lies at `path`; False also where that cannot be told."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _inode(path: Path) -> tuple[int, int] | None:
    """Device and inode of what lies at `path`; None where nothing does, or that cannot be told."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
