# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The histograms of all disks and of the cache device, as `GET /latency` tells them: see docs/latency.md."""

import json
import math
from collections.abc import Callable, Iterable

import trio

from forebay.errors import ForebayError
from forebay.latency.requests import Requests
from forebay_cache import Cache
from forebay_fast.latency import EDGES, Latency

_AT_ONCE = 8
"""Disks that are told between two turns of others: below a millisecond."""


_EDGES = [edge if math.isfinite(edge) else None for edge in EDGES]


class Histograms:
    """Of one daemon."""

    def __init__(self, cache: Cache, disks: Callable[[], Iterable[tuple[str, Requests]]]) -> None:
        """`disks` gives names and requests of those that are served."""
        self._cache = cache
        self._disks = disks

    def each(self) -> list[tuple[str, Latency]]:
        """Name and histograms of each disk that is served."""
        return [(name, requests.latency) for name, requests in self._disks()]

    @property
    def device(self) -> Latency:
        """Those of the cache device."""
        return self._cache.threads.pace.latency

    async def told(self, name: str | None = None) -> bytes:
        """JSON: all of them, or of the disk of that name, and of the cache device. Raises ForebayError: there is none.

        Made disk by disk: there may be a thousand.
        """
        wanted = [one for one in self._disks() if name in (None, one[0])]
        if name is not None and not wanted:
            raise ForebayError(f"'{name}' is not served: see forebay status")
        found = []
        for n, (disk, requests) in enumerate(wanted, 1):
            latency = requests.latency.buckets_told()
            one = {"name": disk, "queue_depth": requests.depth, "latency": latency}
            found.append(json.dumps(one))
            if n % _AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        rest = json.dumps({"edges": _EDGES, "cache_device": self.device.buckets_told()})
        return f'{{"disks":[{",".join(found)}],{rest[1:]}'.encode()
