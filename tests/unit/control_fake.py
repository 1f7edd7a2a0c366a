# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A gateway without disks, for what stands in front of it: the control API and the command."""

import json
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from forebay.boot.files import Found
from forebay.boot.trace import Read, Trace
from forebay.config.model import Config
from forebay.config.sections import GatewaySection
from forebay.control.prometheus.metrics import metrics_text
from forebay.control.server import serve_control
from forebay.doors.tenant import Rule
from forebay.errors import ForebayError
from forebay.origin.protocol import Identity
from forebay.units import GIB, MIB, Mode

Progress = Callable[[int, int], None]

CACHE = {
    "device": "/dev/vg0/forebay",
    "size": 20 * GIB,
    "used_bytes": 3 * GIB,
    "free_slots": 12,
    "evicted_blocks": 7,
    "state": "ok",
    "error": None,
}


GATEWAY = {"client_memory_bytes": 5 * MIB, "client_memory_limit_bytes": 256 * MIB}
GATEWAY |= {"kept_write_memory_bytes": 3 * MIB, "kept_write_memory_limit_bytes": 256 * MIB}


def disk(name: str, **differs: Any) -> dict[str, Any]:
    """A status with the contract's keys."""
    return {
        "name": name,
        "image": f"images:{name}.raw",
        "mode": "write-back",
        "state": "ready",
        "read_only": False,
        "overlay": False,
        "size": 20 * GIB,
        "cached_bytes": 3 * GIB,
        "dirty_bytes": 0,
        "lag_seconds": 0.0,
        "read_hits": 900,
        "read_misses": 100,
        "write_hits": 50,
        "write_misses": 5,
        "origin_read_bytes": 7 * MIB,
        "origin_written_bytes": MIB,
        "clients": 1,
        "socket": f"/run/forebay/disks/{name}.sock",
    } | differs


IMAGE = {
    "image": "images:a.raw",
    "format": "raw",
    "size": 2 * GIB,
    "allocated": GIB,
    "cached_bytes": GIB,
    "cached_percent": 50.0,
    "device_bytes": 512 * MIB,
    "pinned": True,
    "tags": ["debian", "lts"],
    "disks": ["web"],
    "last_used": 1000,
    "traces": [],
}


class FakeTraces:
    """Has a trace of each image."""

    def __init__(self, gateway: "FakeGateway") -> None:
        self._gateway = gateway

    async def find(self, image: str) -> Found:
        self._gateway._called("trace", image)
        blocks = {n: Read(1500, 2, 3) for n in range(16)}
        trace = Trace(GIB, boots=3, recorded=1000, blocks=blocks)
        return Found.of(image, trace, "a.raw.forebay/trace", Identity(GIB))

    async def drop(self, image: str) -> dict[str, Any]:
        self._gateway._called("drop_trace", image)
        return {"image": image, "dropped": True}


class FakeCatalogue:
    """Knows one image, and notes what is asked of it."""

    def __init__(self, gateway: "FakeGateway") -> None:
        self._gateway = gateway
        self.traces = FakeTraces(gateway)

    async def images(self, store: str | None) -> AsyncIterator[dict[str, Any]]:
        self._gateway._called("images", store)
        yield IMAGE

    async def warm(
        self, image: str, amount: int | str, rate: int | None, progress: Progress
    ) -> dict[str, Any]:
        self._gateway.calls.append(("warm", image, amount, rate))
        await self._gateway._work("warm", progress)
        return {"image": image, "size": GIB, "cached_bytes": GIB, "origin_read_bytes": MIB}

    async def tag(self, image: str, tags: list[str]) -> dict[str, Any]:
        self._gateway._called("tag", image, tags)
        return IMAGE

    async def untag(self, image: str, tags: list[str]) -> dict[str, Any]:
        self._gateway._called("untag", image, tags)
        return IMAGE | {"tags": []}

    async def pin(self, image: str) -> dict[str, Any]:
        self._gateway._called("pin", image)
        return IMAGE

    async def unpin(self, image: str) -> dict[str, Any]:
        self._gateway._called("unpin", image)
        return IMAGE | {"pinned": False}

    async def purge(self, images: list[str] | None, **which: Any) -> dict[str, Any]:
        self._gateway._called("purge", images, which)
        kept = [{"image": image, "why": "in use by web"} for image in images or []]
        purged = [{"image": "images:b.raw", "freed_bytes": 3 * MIB}]
        return {"purged": purged, "kept": kept, "freed_bytes": 3 * MIB, "dry_run": False}


ADVICE = {
    "since": 1000.0,
    "now": 1000.0 + 2 * 3600,
    "reads": 123_456,
    "hit_ratio": 0.871,
    "sampled_reads": 4000,
    "needed_reads": 1000,
    "enough": True,
    "sampled_share": 1 / 32,
    "size": 20 * GIB,
    "free_bytes": 8 * MIB,
    "sizes": [
        {"size": size * GIB, "hit_ratio": hit, "lru_hit_ratio": hit - 0.05}
        for size, hit in ((10, 0.78), (20, 0.872), (30, 0.914), (40, 0.94), (80, 0.943))
    ],
}


class FakeAdvice:
    """Says always the same."""

    def report(self) -> dict[str, Any]:
        return ADVICE


SUMMARY: dict[str, Any] = {
    "format": 1,
    "version": "0.1.0",
    "state": "ok",
    "reasons": [],
    "cache": {
        "device": "/dev/vg0/forebay",
        "size": 20 * GIB,
        "used_bytes": 3 * GIB,
        "private_bytes": 0,
    },
    "caches_by_default": True,
    "hit_percent": 97.1,
    "disk_count": 1,
    "client_count": 1,
    "dirty_bytes": 0,
    "lag_seconds": 0.0,
    "stores": [
        {"store": "images", "state": "ok", "reason": None, "free_bytes": GIB, "size": 2 * GIB}
    ],
    "image_count": 1,
    "images": [{"image": "images:a.raw", "size": 2 * GIB, "cached_bytes": GIB}],
    "cold_images": [],
}


class FakeHistory:
    """Says what it was asked for."""

    async def report(self, seconds: float, points: int, disk: str | None) -> dict[str, Any]:
        return {"seconds": seconds, "points": points, "disk": disk}


class FakeHistograms:
    """Tells what it was asked for."""

    async def told(self, name: str | None = None) -> bytes:
        if name == "none":
            raise ForebayError("'none' is not served")
        return json.dumps({"edges": [], "disks": [name or "all"], "cache_device": {}}).encode()


class FakeSummary:
    """Says always the same."""

    def __init__(self) -> None:
        self.history = FakeHistory()
        self.latency = FakeHistograms()

    async def report(self) -> dict[str, Any]:
        return SUMMARY


STORE = {
    "store": "images",
    "path": "/mnt/nfs/images",
    "socket": "/run/forebay/stores/images.sock",
    "reason": None,
    "clients": 3,
    "refused_clients": 1,
    "images": [
        {
            "image": "images:golden.raw",
            "clients": 3,
            "state": "ready",
            "reason": None,
            "size": 20 * GIB,
            "cached_bytes": GIB,
            "read_hits": 970,
            "read_misses": 30,
        }
    ],
}
OTHER_STORE = STORE | {"store": "bare", "path": "/mnt/b", "socket": "", "clients": 0, "images": []}


class FakeStores:
    """Two stores, one of which has a socket."""

    def status(self) -> list[dict[str, Any]]:
        return [STORE, OTHER_STORE]


OVERLAY = {
    "name": "web",
    "image": "images:a.raw",
    "size": 2 * GIB,
    "private_bytes": MIB,
    "snapshots": 1,
    "keep": True,
    "attached": True,
    "served": True,
    "since": None,
}
SNAPSHOT = {"name": "monday", "created": 1000}


class FakeOverlays:
    """Knows one overlay with one snapshot, and notes what is asked of it."""

    def __init__(self, gateway: "FakeGateway") -> None:
        self._gateway = gateway

    def all(self) -> list[dict[str, Any]]:
        self._gateway._called("overlays")
        return [OVERLAY]

    def snapshots(self, name: str) -> list[dict[str, Any]]:
        self._gateway._called("snapshots", name)
        return [SNAPSHOT]

    async def snapshot(self, name: str, snapshot: str) -> dict[str, Any]:
        self._gateway._called("snapshot", name, snapshot)
        return SNAPSHOT

    async def rollback(self, name: str, snapshot: str, **how: Any) -> dict[str, Any]:
        self._gateway._called("rollback", name, snapshot, how)
        return OVERLAY

    async def drop(self, name: str, snapshot: str, progress: Progress) -> dict[str, Any]:
        self._gateway._called("drop", name, snapshot)
        await self._gateway._work("drop", progress)
        return OVERLAY

    async def revert(self, name: str, **how: Any) -> dict[str, Any]:
        self._gateway._called("revert", name, how)
        return {"name": name, "image": "images:a.raw", "freed_bytes": MIB}

    async def commit(self, name: str, progress: Progress) -> dict[str, Any]:
        self._gateway._called("commit", name)
        await self._gateway._work("commit", progress)
        return OVERLAY


class FakeMoves:
    """Notes what is asked of it."""

    def __init__(self, gateway: "FakeGateway") -> None:
        self._gateway = gateway

    async def prepare(
        self, name: str, to: str, patience: float, progress: Progress, *, with_data: bool
    ) -> Any:
        self._gateway._called("prepare", name, to, patience, *(["with data"] if with_data else []))
        await self._gateway._work("prepare", progress)
        return self._gateway.disks[name] | {"handover": "prepared", "handover_to": to or "ham2"}

    async def evacuate(self, to: str, patience: float, progress: Progress) -> Any:
        self._gateway._called("evacuate", to, patience)
        await self._gateway._work("evacuate", progress)
        left = [{"name": name, "why": "its VM runs"} for name in self._gateway.disks]
        return {"released": [], "left": left, "dirty_bytes": 0}

    async def finish(self, name: str, patience: float) -> Any:
        self._gateway._called("finish", name, patience)
        return self._gateway.disks[name] | {"handover": "none", "handover_to": ""}

    async def abort(self, name: str, patience: float) -> Any:
        self._gateway._called("abort", name, patience)
        return self._gateway.disks[name] | {"handover": "none", "handover_to": ""}


STAGED: dict[str, Any] = {
    "image": "images:a.raw",
    "size": 20 * GIB,
    "state": "staging",
    "reason": None,
    "cached_bytes": 5 * GIB,
    "down_bytes_a_second": 90 * MIB,
    "up_bytes_a_second": 30 * MIB,
    "hosts": 40,
    "connected": 12,
    "source": False,
    "origin_read_bytes": 0,
    "refused_pieces": 0,
}


class FakeStaging:
    """One image is staged; what is asked for is taken down."""

    def __init__(self, gateway: "FakeGateway") -> None:
        self._gateway = gateway
        self.lacks = [[0, 4]]

    def status(self) -> list[dict[str, Any]]:
        return [STAGED]

    async def make(self, image: str, progress: Progress) -> dict[str, Any]:
        self._gateway._called("make_torrent", image)
        progress(GIB, 20 * GIB)
        return {"image": image, "size": 20 * GIB, "path": f"{image}.forebay/torrent", "made": True}

    async def torrent(self, image: str) -> dict[str, Any]:
        return {"image": image, "torrent": "ZA=="}

    async def lacking(self, image: str) -> dict[str, Any]:
        return {"image": image, "pieces": 9, "lacking": self.lacks}

    async def order(
        self, image: str, peers: Iterable[tuple[str, int]], *, source: bool, rate: int | None
    ) -> dict[str, Any]:
        self._gateway._called("stage", image, list(peers), source, rate)
        return STAGED

    async def end(self, image: str) -> dict[str, Any]:
        self._gateway._called("end_stage", image)
        return {"image": image, "ended": True}

    def report(self, rows: Iterable[dict[str, Any]], known: int | None) -> dict[str, Any]:
        self._gateway._called("report", list(rows))
        return {"orders": [], "known": 1}


class FakeSettings:
    """Of each disk one setting; what is set is taken down."""

    def __init__(self, gateway: "FakeGateway") -> None:
        self._gateway = gateway

    def told(self, name: str) -> list[dict[str, Any]]:
        self._gateway.status(name)
        return [{"name": name, "key": "max_lag", "value": "30s", "from": "built in"}]

    async def all_told(self) -> AsyncIterator[dict[str, Any]]:
        for name in self._gateway.disks:
            yield self.told(name)[0]

    async def set(
        self, name: str, changes: Mapping[str, Any], progress: Progress
    ) -> dict[str, Any]:
        self._gateway._called("set", name, dict(changes))
        await self._gateway._work("set", progress)
        return self._gateway.status(name)[0]


class FakeReloading:
    """Has the built-in configuration, for ever."""

    def __init__(self, gateway: "FakeGateway") -> None:
        self._gateway = gateway
        self.settings = FakeSettings(gateway)

    def running(self) -> dict[str, Any]:
        return {"toml": Config().to_toml()}

    async def reload(self) -> dict[str, Any]:
        self._gateway._called("reload")
        return {"files": [], "lines": ["nothing is new"]}


class FakeGateway:
    """Holds statuses; work goes in `steps` of one MiB, and then waits for `finish` where that is set.

    `calls` are the requests that reached it, `fail` is raised by the next one, `cancelled` lists
    the work whose client hung up.
    """

    def __init__(self, *names: str, control_group: str | None = None) -> None:
        self.config = Config(gateway=GatewaySection(control_group=control_group))
        self.disks = {name: disk(name) for name in names}
        self.calls: list[tuple[Any, ...]] = []
        self.fail: Exception | None = None
        self.steps = 0
        self.finish: trio.Event | None = None
        self.cancelled: list[str] = []
        self.left_dirty = 0
        self.written_back = 0
        self.damage: list[dict[str, Any]] = []
        self.catalogue = FakeCatalogue(self)
        self.advice = FakeAdvice()
        self.summary = FakeSummary()
        self.stores = FakeStores()
        self.overlays = FakeOverlays(self)
        self.moves = FakeMoves(self)
        self.staging = FakeStaging(self)
        self.reloading = FakeReloading(self)
        self.began = trio.Event()
        self.ended = trio.Event()

    def _called(self, *call: Any) -> None:
        self.calls.append(call)
        if self.fail is not None:
            raise self.fail

    async def _work(self, what: str, progress: Progress) -> None:
        self.began.set()
        try:
            for step in range(self.steps):
                progress(step * MIB, self.steps * MIB)
                await trio.lowlevel.checkpoint()
            if self.finish is not None:
                await self.finish.wait()
        except trio.Cancelled:
            self.cancelled.append(what)
            raise
        finally:
            self.ended.set()
        if self.fail is not None:
            raise self.fail

    async def attach(self, name: str, image: str, **settings: Any) -> dict[str, Any]:
        self._called("attach", name, image, settings)
        again = name in self.disks
        if again and self.disks[name]["image"] != image:
            raise ForebayError(f"'{name}' is attached already: detach it, or choose another name")
        self.disks[name] = disk(name, image=image, mode=str(settings["mode"] or "write-through"))
        return self.disks[name] | {"attached_already": again}

    async def detach(self, name: str, *, discard: bool, force: bool, progress: Progress) -> None:
        self.calls.append(("detach", name, discard, force))
        await self._work("detach", progress)
        del self.disks[name]

    def status(self, name: str | None = None) -> list[dict[str, Any]]:
        if name is not None and name not in self.disks:
            raise ForebayError(f"no disk '{name}': see 'forebay status'")
        return [d for d in self.disks.values() if name in (None, d["name"])]

    async def flush(
        self, names: list[str] | None, *, timeout: float | None, progress: Progress
    ) -> None:
        self.calls.append(("flush", names, timeout))
        await self._work("flush", progress)
        for name in self.disks if names is None else names:
            self.disks[name]["dirty_bytes"] = self.left_dirty
            self.disks[name]["origin_written_bytes"] += self.written_back

    async def set_mode(self, name: str, mode: Mode, progress: Progress) -> dict[str, Any]:
        self.calls.append(("mode", name, mode))
        await self._work("mode", progress)
        self.disks[name]["mode"] = str(mode)
        return self.disks[name]

    async def set_peer(self, name: str, rule: Rule, *, evict: bool) -> dict[str, Any]:
        self.calls.append(("peer", name, rule, evict))
        await trio.lowlevel.checkpoint()
        return self.disks[name]

    async def preload(self, name: str, amount: int | str, progress: Progress) -> None:
        self.calls.append(("preload", name, amount))
        await self._work("preload", progress)

    async def resolve(
        self, name: str, keeps: str, *, sure: bool, progress: Progress
    ) -> dict[str, Any]:
        self.calls.append(("resolve", name, keeps, sure))
        await self._work("resolve", progress)
        if not sure:
            raise ForebayError(
                f"8.0M that only the cache has of '{name}' would be given up: say --yes"
            )
        return self.disks[name]

    async def save(
        self,
        name: str,
        to: str,
        *,
        partial: bool,
        form: str,
        snapshot: str | None,
        progress: Progress,
    ) -> dict[str, Any]:
        how = {"partial": partial, "form": form, "snapshot": snapshot}
        self.calls.append(("save", name, to, how))
        await self._work("save", progress)
        missing = [[4096, 8192]] if partial else []
        return {
            "name": name,
            "image": to,
            "size": 20 * GIB,
            "saved_bytes": 3 * MIB,
            "missing_bytes": sum(length for _, length in missing),
            "missing": missing,
        }

    def info(self) -> dict[str, Any]:
        self._called("info")
        return GATEWAY

    def cache_info(self) -> dict[str, Any]:
        self._called("cache_info")
        return CACHE

    async def extend_cache(self, size: int | None, progress: Progress) -> dict[str, Any]:
        self.calls.append(("extend", size))
        await self._work("extend", progress)
        return CACHE | {"size": size or 40 * GIB}

    async def release_cache(self, progress: Progress) -> dict[str, Any]:
        self.calls.append(("release",))
        await self._work("release", progress)
        return {"pid": 1}

    async def scrub(self, progress: Progress) -> dict[str, Any]:
        self.calls.append(("scrub",))
        await self._work("scrub", progress)
        return {"checked_bytes": 3 * GIB, "damage": self.damage}

    async def repair_cache(self, progress: Progress) -> dict[str, Any]:
        self.calls.append(("repair",))
        await self._work("repair", progress)
        return {"checked_bytes": 3 * GIB, "damage": self.damage}

    async def statuses(self) -> AsyncIterator[dict[str, Any]]:
        for one in self.status():
            yield one

    async def metrics(self) -> str:
        self._called("metrics")
        return metrics_text(self.status(), CACHE, GATEWAY)


@asynccontextmanager
async def served(gateway: FakeGateway) -> AsyncIterator[Path]:
    """The real control API on a socket of its own; gives the run directory."""
    with tempfile.TemporaryDirectory(prefix="fb-") as directory:
        run = Path(directory)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_control, gateway, run / "control.sock")
            yield run
            nursery.cancel_scope.cancel()
