# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the page is told, asked of the daemon: as often as is good for the daemon, however many look at the page."""

import socket
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from urllib.parse import urlencode

import trio

from forebay.errors import ForebayError
from forebay.units import HEALTHY, LAG_TIMES, Mode

FRESH_SECONDS = 2.0
"""What the daemon said is told again for so long."""
MOST_KEPT = 32
"""Answers that are kept: the host and its history, and the history of some disks."""
MOST_THREADS = 2
"""Questions to the daemon at one time."""
MOST_DISKS = 200
MOST_IMAGES = 100
"""Disks and images that are told: those that need a look, and those of which there is most to tell, first."""
POINTS = 240
"""Of a chart: 6 minutes of a day, 15 s of an hour."""

DISK_KEYS = (
    "name",
    "image",
    "size",
    "mode",
    "state",
    "reason",
    "overlay",
    "read_only",
    "cached_bytes",
    "dirty_bytes",
    "lag_seconds",
    "max_lag_seconds",
    "clients",
    "reads",
    "writes",
    "read_bytes",
    "written_bytes",
    "read_hits",
    "read_misses",
    "origin_read_bytes",
    "origin_written_bytes",
    "origin_errors",
    "latency",
)
IMAGE_KEYS = ("image", "format", "size", "cached_bytes", "cached_percent", "pinned", "tags")

Told = dict[str, Any]


class Daemon(Protocol):
    """The daemon, as `forebay.client.Client` asks it."""

    def get(self, target: str) -> Any:
        """What the daemon says at `target`, decoded from JSON. Raises ForebayError."""


class Asking:
    """Questions to one daemon. Each is asked once, for all who want to know; a fault is an answer, too."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._limiter = trio.CapacityLimiter(MOST_THREADS)
        self._answers: OrderedDict[str, tuple[float, Told]] = OrderedDict()
        """By question: when it was answered, and what."""
        self._asking: dict[str, trio.Event] = {}

    async def now(self, find: str) -> Told:
        """How the host stands; of disks and images those in whose names `find` is."""
        told = await self._answer("", self._ask_all)
        if "error" in told:
            return told
        disks = [one for one in told["disks"] if find in one["name"] or find in one["image"]]
        images = [one for one in told["images"] if find in one["image"]]
        return {
            **told,
            "disks": disks[:MOST_DISKS],
            "disk_count": len(disks),
            "images": images[:MOST_IMAGES],
            "image_count": len(images),
        }

    async def history(self, seconds: float, disk: str | None) -> Told:
        """The last `seconds` of the host, or of a disk."""
        asked = {"seconds": f"{seconds:.0f}", "points": str(POINTS)} | (
            {"disk": disk} if disk else {}
        )
        target = f"/history?{urlencode(asked)}"
        return await self._answer(target, lambda: dict(self._daemon.get(target)))

    async def _answer(self, question: str, ask: Callable[[], Told]) -> Told:
        """What is known, if that is fresh, else what `ask` returns, called in a thread; `error` where it raises."""
        while True:
            known = self._answers.get(question)
            if known is not None and trio.current_time() - known[0] < FRESH_SECONDS:
                return known[1]
            asking = self._asking.get(question)
            if asking is None:
                break
            await asking.wait()
        self._asking[question] = trio.Event()
        try:
            told = await trio.to_thread.run_sync(
                _told, ask, limiter=self._limiter, abandon_on_cancel=True
            )
            self._answers[question] = trio.current_time(), told
            self._answers.move_to_end(question)
            while len(self._answers) > MOST_KEPT:
                self._answers.popitem(last=False)
        finally:
            self._asking.pop(question).set()
        return told

    def _ask_all(self) -> Told:
        """In a thread. Raises ForebayError."""
        summary = self._daemon.get("/summary")
        disks = sorted(self._daemon.get("/disks"), key=_most_to_tell)
        images = sorted(self._daemon.get("/images"), key=lambda one: -one["cached_bytes"])
        return {
            "host": socket.gethostname(),
            "summary": {key: value for key, value in summary.items() if "images" not in key},
            "troubled_count": sum(map(is_troubled, disks)),
            "disks": [_part(disk, DISK_KEYS) | {"troubled": is_troubled(disk)} for disk in disks],
            "images": [
                _part(image, IMAGE_KEYS) | {"disk_count": len(image["disks"])} for image in images
            ],
        }


def _told(ask: Callable[[], Told]) -> Told:
    try:
        return ask()
    except ForebayError as fault:
        return {"error": str(fault)}


def _part(told: Mapping[str, Any], keys: tuple[str, ...]) -> Told:
    return {key: told[key] for key in keys if key in told}


def is_troubled(disk: Mapping[str, Any]) -> bool:
    """True if `forebay status -x` would show the disk."""
    if disk["state"] not in HEALTHY:
        return True
    most = disk.get("max_lag_seconds")
    return bool(most and disk["lag_seconds"] > LAG_TIMES * most and disk["mode"] == Mode.WRITE_BACK)


def _most_to_tell(disk: Mapping[str, Any]) -> tuple[bool, float, float, float]:
    """A key by which what needs a look comes first, then what is behind, then what moved most."""
    moved = disk.get("read_bytes", 0) + disk.get("written_bytes", 0)
    return not is_troubled(disk), -disk["lag_seconds"], -disk["dirty_bytes"], -moved
