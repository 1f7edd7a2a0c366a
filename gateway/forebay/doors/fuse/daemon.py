# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the mount asks the daemon over its control socket: which disks there are; an image served, and let go again."""

import errno
import hashlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import trio

from forebay.client import Client, NoDaemonError
from forebay.errors import ForebayError

log = logging.getLogger("forebay.fuse")

FRESH_SECONDS = 0.5
"""How old a list of disks may be: a directory listing asks about each of its entries."""

ANSWER_SECONDS = 10.0
"""Longest wait for what the daemon answers from memory. Then the answer is EIO, never a hang."""

ATTACH_SECONDS = 70.0
"""Longest wait for an attach, which has to reach the store (its own limit is `origin_timeout`, usually 60 s)."""

THREADS = 8
"""Questions on their way at once."""

PREFIX = "fuse-"
"""What the names of disks begin with that the mount attaches for images."""

T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """A disk that the daemon serves. `size` in bytes; `image` as it was attached."""

    name: str
    size: int
    read_only: bool
    overlay: bool
    image: str
    socket: str
    clients: int
    peer: str = "any"
    peer_user: int | None = None
    peer_process: int | None = None

    def is_for(self, uid: int, pid: int) -> bool:
        """True if the daemon would let a process of that user, which has that thread or is it, use the disk."""
        if self.peer == "any" or uid in (0, os.geteuid()):
            return True
        if self.peer == "label" or self.peer_user not in (None, uid):
            return False  # no label is known of who opens a file
        return self.peer_process in (None, pid, _process_of(pid))


class Daemon:
    """The daemon at the control socket `path`, asked from threads. Methods raise OSError."""

    def __init__(self, path: str) -> None:
        self._client = Client(path)
        self._limiter = trio.CapacityLimiter(THREADS)
        self._asking = trio.Lock()
        self._known: dict[str, Served] = {}
        self._known_at = float("-inf")

    @property
    def last_known(self) -> dict[str, Served]:
        """The disks by name, as of the last time the daemon was asked."""
        return self._known

    async def disks(self, *, fresh: bool = False) -> dict[str, Served]:
        """The disks by name, as they were at most FRESH_SECONDS ago; `fresh`: as they are now."""
        asked_at = trio.current_time()
        async with self._asking:
            limit = asked_at if fresh else asked_at - FRESH_SECONDS
            if self._known_at < limit:
                now = trio.current_time()
                found = await self._ask(ANSWER_SECONDS, lambda: self._client.get("/disks"))
                self._known = {one["name"]: _served(one) for one in found if one["socket"]}
                self._known_at = now
        return self._known

    async def attach(self, image: str) -> None:
        """Serve `image` (STORE:path) read-only as the disk `disk_for(image)`; fine if it is served so already.

        Raises Refused when the daemon does not want to.
        """
        content = {
            "name": disk_for(image),
            "image": image,
            "mode": "write-through",  # for one who only reads: cached, and nothing is brought in unasked
            "preload": 0,
            "read_only": True,
            "gives_way": True,
            "format": "raw",  # a file of the mount is what the store has, bytes of qcow2 included
        }
        try:
            await self._ask(ATTACH_SECONDS, lambda: self._client.post("/disks", content))
        except Refused:
            there = (await self.disks(fresh=True)).get(disk_for(image))
            if there is None or there.image != image or not there.read_only:
                raise
        self._known_at = float("-inf")

    async def detach(self, name: str) -> None:
        """Detach a disk that a mount attached. Raises Refused, too, while somebody else reads it."""
        target = f"/disks/{name}"
        await self._ask(
            ANSWER_SECONDS,
            lambda: self._client.follow("DELETE", target, None, lambda _done, _total: None),
        )
        self._known_at = float("-inf")

    async def _ask(self, seconds: float, question: Callable[[], T]) -> T:
        """What `question`, which blocks, returns. Raises OSError(EIO) when that takes longer than so many seconds."""
        try:
            with trio.fail_after(seconds):
                return await trio.to_thread.run_sync(
                    question, abandon_on_cancel=True, limiter=self._limiter
                )
        except trio.TooSlowError:
            raise TimeoutError(errno.EIO, f"no answer from the daemon in {seconds:.0f} s") from None
        except NoDaemonError as fault:
            raise OSError(errno.EIO, str(fault)) from None
        except ForebayError as fault:
            raise Refused(errno.EIO, str(fault)) from None


class Refused(OSError):
    """The daemon answered, and does not do it. `strerror` is its own text."""


def disk_for(image: str) -> str:
    """The name of the disk that serves an image to mounts: the same for every mount, short enough for a socket."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", image.rpartition("/")[2].rpartition(":")[2])[:16]
    return f"{PREFIX}{name}-{hashlib.sha256(image.encode()).hexdigest()[:10]}"


def _process_of(thread: int) -> int | None:
    """The process that a thread is of; None if it is gone, or /proc does not tell."""
    try:
        with open(f"/proc/{thread}/status", encoding="ascii", errors="replace") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Tgid:"))
    except (OSError, StopIteration):
        return None


def _served(found: dict[str, Any]) -> Served:
    """A disk, from its object in the daemon's answer."""
    return Served(
        name=found["name"],
        size=found["size"],
        read_only=found["read_only"],
        overlay=found["overlay"],
        image=found["image"],
        socket=found["socket"],
        clients=found["clients"],
        peer=found.get("peer", "any"),
        peer_user=found.get("peer_user"),
        peer_process=found.get("peer_process"),
    )
