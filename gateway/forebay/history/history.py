# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What happened on this host in the last 24 hours: looked at every ten seconds, and kept over a restart.

No disk depends on it: whatever goes wrong here goes to the log, and the history begins anew, or is missing.
"""

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import trio

from forebay.errors import ForebayError
from forebay.history.kept import Copy, copied, fill, load, save
from forebay.history.latencies import Latencies
from forebay.history.ring import OF_DISKS, OF_HOST, SUMS, Ring
from forebay.units import HEALTHY, LAG_TIMES, Mode
from forebay_fast.latency import Latency

log = logging.getLogger("forebay.daemon")

LOOK_SECONDS = 10.0
"""How often it is looked."""
HOST_STEP_SECONDS = 10
"""How long a step of the host is: 8640 of them are kept."""
DISK_STEP_SECONDS = 300
"""How long a step of a disk is: 288 of them are kept."""
MOST_DISKS = 200
"""Disks with a history, those that have most to tell. With the host's it takes 4.6 MB at most."""
HALF_LIFE_SECONDS = 3600.0
"""What a disk did so long ago counts for half, when it is decided which disks have a history."""
SAVE_SECONDS = 600.0
"""How often it is stored: so much is lost when the daemon is killed."""
LAST_SECONDS = 0.25
"""So long the end of the daemon waits for it to be stored."""
FILE = "history"
"""In STATE."""

FORMAT = 1
"""Of what is told."""
_AT_ONCE = 16
"""Disks that are copied between two turns of others."""
_LOOKED_AT_ONCE = 4
"""Disks that are looked at between two turns of others: half a millisecond, where each has read."""

Told = dict[str, Any]
Figures = dict[str, float]
Counted = tuple[float, ...]

COUNTERS = tuple(key for key in SUMS if key != "seconds")


class History:
    """The history of one daemon."""

    def __init__(
        self,
        state: Path,
        statuses: Callable[[], AsyncIterator[Told]],
        cache_info: Callable[[], Told],
        latencies: Callable[[], Iterable[tuple[str, Latency]]],
    ) -> None:
        """`statuses` gives what is told of each disk, `cache_info` what is told of the cache, `latencies` how long the
        requests of each disk took.
        """
        self._path = state / FILE
        self._statuses = statuses
        self._cache_info = cache_info
        self._all_latencies = latencies
        self._latencies = Latencies()
        self._clock: Callable[[], float] = time.time
        self.host = Ring(HOST_STEP_SECONDS, OF_HOST)
        self.disks: dict[str, Ring] = {}
        self._weights: dict[str, float] = {}
        """By disk: bytes that it moved, those long ago for less, and that it has dirty."""
        self._counted: dict[str, Counted] = {}
        """What each disk had counted at the last look."""
        self._looked: float | None = None
        """When that was, on the monotonic clock."""
        self._is_complete = False
        """It has what its file had."""
        self._saving = trio.Lock()

    # -- looking

    async def run(self) -> None:
        """Look every step, until cancelled."""
        try:
            await self._run()
        except Exception:
            log.exception("a fault of Forebay itself: the history ends here until the next start")

    async def _run(self) -> None:
        await self._restore()
        self._looked = saved = trio.current_time()
        while True:
            await trio.sleep(LOOK_SECONDS)
            await self.look()
            if trio.current_time() - saved >= SAVE_SECONDS:
                await self.save()
                saved = trio.current_time()

    async def look(self) -> None:
        """Take in what came to pass since the last look."""
        now, monotonic = self._clock(), trio.current_time()
        seconds = monotonic - (monotonic if self._looked is None else self._looked)
        self._looked = monotonic
        host: Figures = dict.fromkeys(OF_HOST, 0.0)
        counted: dict[str, Counted] = {}
        self._latencies.begin()
        latencies = dict(self._all_latencies())
        async for disk in self._statuses():
            figures = self._figures(disk, counted) | {"seconds": seconds}
            _join(host, figures)
            figures |= self._latencies.of(disk["name"], latencies.get(disk["name"]))
            host["conflicts"] += disk["state"] == "conflict"
            host["disks"] += 1
            self._note(disk["name"], figures, now, seconds)
            if len(counted) % _LOOKED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        self._counted = counted
        host["seconds"] = seconds
        host |= self._latencies.of_all()
        host["cache_used_bytes"] = self._cache_info()["used_bytes"]
        self.host.add(now, host)
        self._leave_out(now)

    def _figures(self, disk: Told, counted: dict[str, Counted]) -> Figures:
        """What a disk did since the last look, and how it is; what it has counted goes into `counted`."""
        after = tuple(float(disk.get(key, 0)) for key in COUNTERS)
        before = self._counted.get(disk["name"], (0.0,) * len(after))
        if any(new < old for new, old in zip(after, before, strict=True)):
            before = (0.0,) * len(after)  # another disk by that name
        counted[disk["name"]] = after
        moved = {key: new - old for key, new, old in zip(COUNTERS, after, before, strict=True)}
        return moved | {
            "dirty_bytes": disk["dirty_bytes"],
            "lag_seconds": disk["lag_seconds"],
            "clients": disk["clients"],
            "troubled": float(_is_troubled(disk)),
        }

    def _note(self, name: str, figures: Figures, now: float, seconds: float) -> None:
        """Take in what one disk did, if it has a history, and whether it should have one."""
        moved = sum(figures[key] for key in COUNTERS if key.endswith("_bytes"))
        fade = 0.5 ** (seconds / HALF_LIFE_SECONDS)
        self._weights[name] = self._weights.get(name, 0.0) * fade + moved + figures["dirty_bytes"]
        if name not in self.disks and len(self.disks) < MOST_DISKS:
            self.disks[name] = Ring(DISK_STEP_SECONDS, OF_DISKS)
        if name in self.disks:
            self.disks[name].add(now, figures)

    def _leave_out(self, now: float) -> None:
        """Forget disks that are gone for a day, and give the place of the least one to a disk that has more to tell."""
        for name in [n for n, ring in self.disks.items() if ring.is_older_than(now, 86400)]:
            del self.disks[name]
        gone = self._weights.keys() - self._counted.keys()
        for name in [name for name in gone if name not in self.disks]:
            del self._weights[name]
        for name in gone & self._weights.keys():
            self._weights[name] *= 0.5 ** (LOOK_SECONDS / HALF_LIFE_SECONDS)
        others = [name for name in self._weights if name not in self.disks]
        if others and self.disks:
            most = max(others, key=self._weights.__getitem__)
            least = min(self.disks, key=lambda name: self._weights.get(name, 0.0))
            if self._weights[most] > 2 * self._weights.get(least, 0.0):
                del self.disks[least]
                ring = self.disks[most] = Ring(DISK_STEP_SECONDS, OF_DISKS)
                ring.add(now, {})

    # -- telling

    async def report(self, seconds: float, points: int, disk: str | None) -> Told:
        """What `GET /history` tells: the last `seconds`, in at most `points` buckets, of the host or of one disk.

        Raises ForebayError for a disk that has no history.
        """
        ring = self.host if disk is None else self.disks.get(disk)
        if ring is None:
            raise ForebayError(
                f"nothing is known of '{disk}' yet: it is no disk, new, or not among the {MOST_DISKS} busiest"
            )
        now = self._clock()
        span = ring.span(now, seconds, points)
        told: Told = {
            "format": FORMAT,
            "now": now,
            "disk": disk,
            "begin": span.first * ring.step_seconds,
            "step_seconds": span.steps * ring.step_seconds,
            "series": [],
        }
        for key in list(ring.columns):
            told["series"].append({"figure": key, "values": ring.told(key, span)})
            await trio.lowlevel.checkpoint()
        return told

    # -- over restarts

    async def _restore(self) -> None:
        try:
            found = await trio.to_thread.run_sync(load, self._path)
            await self._take(found)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as fault:
            log.warning("%s is not used, the history begins anew: %s", self._path, fault)
        self._is_complete = True

    async def _take(self, found: Mapping[str, Copy]) -> None:
        """Have what the file had, beside what there is already of disks."""
        for name, copy in found.items():
            await trio.lowlevel.checkpoint()
            if not name:
                fill(self.host, copy)
            elif len(self.disks) < MOST_DISKS:
                ring = Ring(DISK_STEP_SECONDS, OF_DISKS)
                if fill(ring, copy):
                    self.disks[name] = ring
                    self._weights[name] = 0.0

    async def save(self) -> None:
        """Store what is known. The log says so where that fails; cancelled, it may be stored all the same."""
        if not self._is_complete:
            return
        async with self._saving:
            rings = {"": copied(self.host)}
            for number, (name, ring) in enumerate(list(self.disks.items())):
                if number % _AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
                rings[name] = copied(ring)
            try:
                await trio.to_thread.run_sync(save, self._path, rings, abandon_on_cancel=True)
            except OSError as fault:
                log.info("%s cannot be written: %s", self._path, fault.strerror or fault)

    async def save_at_last(self) -> None:
        """The same at the end of the daemon, which does not wait for long."""
        with trio.move_on_after(LAST_SECONDS):
            await self.save()


def _join(host: Figures, disk: Figures) -> None:
    """Take what a disk did into what all of them did: the lag is the longest, all else adds up."""
    for key, value in disk.items():
        host[key] = max(host[key], value) if key == "lag_seconds" else host[key] + value


def _is_troubled(disk: Told) -> bool:
    """True if `forebay status -x` would show it."""
    most = disk.get("max_lag_seconds")
    late = most and disk["lag_seconds"] > LAG_TIMES * most and disk["mode"] == Mode.WRITE_BACK
    return disk["state"] not in HEALTHY or bool(late)
