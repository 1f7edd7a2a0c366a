# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The summary of this host: cache, disks, stores and what is warm, as `GET /summary` tells it."""

import heapq
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import trio

from forebay import __version__
from forebay.config.model import Config
from forebay.history.history import History
from forebay.latency.requests import Requests
from forebay.origin.threads import StoreThreads
from forebay.overview.health import StoreHealth
from forebay.overview.hits import RecentHits
from forebay.overview.latency import Histograms
from forebay.overview.remembered import Remembered
from forebay.units import HEALTHY, LAG_TIMES, Mode, format_duration
from forebay_cache import Cache

Told = dict[str, Any]

FORMAT = 1
"""Of the answer. Keys are only ever added to one."""
MOST_IMAGES = 1000
"""Images that are told: those of which the cache has most."""
MOST_REASONS = 16
"""Lines that say why not all is well."""

STATES = ("ok", "slow", "degraded")
"""The better ones first."""


class Summary:
    """The summary of one daemon."""

    def __init__(
        self,
        config: Config,
        cache: Cache,
        nursery: trio.Nursery,
        threads_of: Callable[[str], StoreThreads],
        statuses: Callable[[], AsyncIterator[Told]],
        images: Callable[[str | None], AsyncIterator[Told]],
        timings: Callable[[], Iterable[tuple[str, Requests]]],
    ) -> None:
        """`nursery` outlives it. `threads_of` gives the threads of a store, `statuses` what is told of each disk, and
        `images` of each image, `timings` the requests of each disk that is served.
        """
        self.latency = Histograms(cache, timings)
        self._config = config
        self._cache = cache
        self._statuses = statuses
        self._images = images
        self._hits = RecentHits(cache.views)
        self.history = History(config.gateway.state, statuses, cache.info, self.latency.each)
        self._stores = StoreHealth(config, nursery, threads_of)
        self._remembered = Remembered(config.gateway.run)

    async def run(self) -> None:
        """Count what is found in the cache, and note what happens, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hits.run)
            nursery.start_soon(self.history.run)

    async def report(self) -> Told:
        """What `forebay summary --json` prints. Waits for stores, for a bounded time; raises nothing expected."""
        stores = await self._stores.look()
        disks = Disks()
        async for disk in self._statuses():
            disks.add(disk)
        warmest = Warmest()
        async for image in self._images(None):
            warmest.add(image)
        warm = warmest.told()
        cache = self._cache.info()
        state, reasons = judged([*_of_cache(cache), *_of_stores(stores), *disks.found])
        return {
            "format": FORMAT,
            "version": __version__,
            "state": state,
            "reasons": reasons,
            "cache": _cache_told(cache),
            "caches_by_default": self._config.defaults.mode is not Mode.NONE,
            **await self._hits.told(trio.current_time()),
            **disks.told(),
            "stores": stores,
            "image_count": warmest.count,
            "images": warm,
            "cold_images": await self._remembered.gone(one["image"] for one in warm),
        }


Finding = tuple[str, str]
"""How bad something is, a word of STATES, and what it is."""


def judged(found: Iterable[Finding]) -> tuple[str, list[str]]:
    """The state of the host, and the lines that say why; the worst ones first."""
    worst_first = sorted(found, key=lambda one: -STATES.index(one[0]))
    if not worst_first:
        return STATES[0], []
    lines = [line for _, line in worst_first]
    if len(lines) > MOST_REASONS:
        lines = [*lines[: MOST_REASONS - 1], f"and {len(lines) - MOST_REASONS + 1} more"]
    return worst_first[0][0], lines


def _of_cache(cache: Told) -> Iterable[Finding]:
    if cache["state"] not in ("ok", "recovering"):
        yield "degraded", f"cache device {cache['device']}: {cache['state']}: {cache['error']}"


def _of_stores(stores: Iterable[Told]) -> Iterable[Finding]:
    for one in stores:
        if one["state"] != "ok":
            line = f"{one['store']}: {one['state']}: {one['reason']}"
            yield "slow" if one["state"] == "slow" else "degraded", line


def _cache_told(cache: Told) -> Told:
    keys = ("device", "state", "size", "used_bytes", "clean_bytes", "private_bytes")
    return {key: cache[key] for key in keys}


class Warmest:
    """The images of which the cache has most, found in as many steps as there are images: there may be very many."""

    def __init__(self) -> None:
        self.count = 0
        """All of which it has anything."""
        self._heap: list[tuple[int, str, int]] = []
        """Bytes that the cache has, name, size; the one of which it has least comes first."""

    def add(self, image: Told) -> None:
        """One image more, as `forebay images` tells it."""
        if not image["cached_bytes"]:
            return
        self.count += 1
        one = (image["cached_bytes"], image["image"], image["size"])
        if len(self._heap) < MOST_IMAGES:
            heapq.heappush(self._heap, one)
        else:
            heapq.heappushpop(self._heap, one)

    def told(self) -> list[Told]:
        """The list of the summary."""
        return [
            {"image": name, "size": size, "cached_bytes": cached}
            for cached, name, size in sorted(self._heap, reverse=True)
        ]


class Disks:
    """What all disks come to."""

    def __init__(self) -> None:
        self.found: list[Finding] = []
        """Of disks that need a look."""
        self._count = self._clients = self._dirty = 0
        self._lag = 0.0

    def add(self, disk: Told) -> None:
        """One disk more, by its status."""
        self._count += 1
        self._clients += disk["clients"]
        self._dirty += disk["dirty_bytes"]
        lag, most = disk["lag_seconds"], disk.get("max_lag_seconds")
        self._lag = max(self._lag, lag)
        if disk["state"] not in HEALTHY:
            why = disk.get("reason") or "see 'forebay status'"
            self.found.append(("degraded", f"{disk['name']}: {disk['state']}: {why}"))
        elif most and lag > LAG_TIMES * most and disk["mode"] == Mode.WRITE_BACK:
            behind = f"{format_duration(lag)} behind, with max_lag {format_duration(most)}"
            self.found.append(("slow", f"{disk['name']}: {behind}"))

    def told(self) -> Told:
        """The keys of the summary."""
        return {
            "disk_count": self._count,
            "client_count": self._clients,
            "dirty_bytes": self._dirty,
            "lag_seconds": round(self._lag, 3),
        }
