# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What `forebay top` sees of the daemon: one look after the other, and what came to pass between two."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from forebay.cli.asking import Daemon
from forebay.cli.status import trouble

Told = Mapping[str, Any]
Row = dict[str, Any]

COUNTERS = (
    "reads",
    "writes",
    "read_bytes",
    "written_bytes",
    "origin_read_bytes",
    "origin_written_bytes",
)


@dataclass(frozen=True)
class Look:
    """What the daemon said at one time."""

    at: float
    """On the monotonic clock."""
    view: str
    disks: list[Told]
    cache: Told
    images: list[Told] = field(default_factory=list)
    stores: list[Told] = field(default_factory=list)


def look(client: Daemon, view: str) -> Look:
    """Ask the daemon for what `view` shows. Raises ForebayError."""
    disks, cache = client.get("/disks"), client.get("/cache")
    images = client.get("/images") if view == "images" else []
    stores = _stores(client) if view == "stores" else []
    return Look(time.monotonic(), view, disks, cache, images, stores)


def _stores(client: Daemon) -> list[Told]:
    """The stores: how they stand, and who reads by their sockets."""
    sockets = {one["store"]: one for one in client.get("/stores")}
    found = client.get("/summary").get("stores", [])
    return [{"clients": 0, "path": "", **sockets.get(one["store"], {}), **one} for one in found]


def disk_rows(now: Look, before: Look | None) -> list[Row]:
    """The disks, with what they did since the look before; None for what that cannot be known of."""
    then = {disk["name"]: disk for disk in before.disks} if before else {}
    seconds = now.at - before.at if before else 0.0
    return [_disk_row(disk, then.get(disk["name"]), seconds) for disk in now.disks]


def _disk_row(disk: Told, then: Told | None, seconds: float) -> Row:
    row: Row = {key: disk[key] for key in ("name", "image", "mode", "state", "clients", "size")}
    row |= {key: disk[key] for key in ("cached_bytes", "dirty_bytes", "lag_seconds")}
    row["trouble"] = trouble(disk)
    moved = _moved(disk, then) if then is not None and seconds > 0 else None
    for key in COUNTERS:
        row[f"{key}_per_second"] = moved[key] / seconds if moved else None
    asked = moved["read_hits"] + moved["read_misses"] if moved else 0
    row["hit_percent"] = 100 * moved["read_hits"] / asked if moved and asked else None
    for kind in ("hit", "origin_read"):
        found = (disk.get("latency") or {}).get(kind) or {}
        known = isinstance(found, dict) and found.get("count")
        row[f"{kind}_p99_seconds"] = found.get("p99_seconds") if known else None
    return row


def _moved(disk: Told, then: Told) -> dict[str, float] | None:
    """By how much the counters grew; None for a disk that began anew."""
    keys = (*COUNTERS, "read_hits", "read_misses")
    grown = {key: disk.get(key, 0) - then.get(key, 0) for key in keys}
    return None if min(grown.values()) < 0 else grown


def image_rows(now: Look) -> list[Row]:
    """The images, with who is on them."""
    keys = ("image", "format", "size", "cached_bytes", "cached_percent", "pinned")
    return [
        {key: image.get(key) for key in keys}
        | {"tags": ",".join(image["tags"]), "disks": len(image["disks"]), "trouble": None}
        for image in now.images
    ]


def store_rows(now: Look) -> list[Row]:
    """The stores, with the disks on them."""
    rows = []
    for store in now.stores:
        inside = f"{store['store']}:"
        disks = [disk for disk in now.disks if disk["image"].startswith(inside)]
        row: Row = {key: store.get(key) for key in ("store", "state", "free_bytes", "path")}
        row |= {"capacity": store.get("size"), "clients": store["clients"], "disks": len(disks)}
        row["dirty_bytes"] = sum(disk["dirty_bytes"] for disk in disks)
        row["lag_seconds"] = max((disk["lag_seconds"] for disk in disks), default=0)
        row["trouble"] = None if store["state"] == "ok" else f"{store['state']}: {store['reason']}"
        rows.append(row)
    return rows


def rows_of(now: Look, before: Look | None) -> list[Row]:
    """What is shown of a look."""
    if now.view == "images":
        return image_rows(now)
    return store_rows(now) if now.view == "stores" else disk_rows(now, before)


def totals(now: Look, before: Look | None) -> Row:
    """What all disks together do: the keys of a row, with sums; the lag is the longest."""
    rows = disk_rows(now, before)
    found: Row = {
        f"{key}_per_second": _sum(row[f"{key}_per_second"] for row in rows) if before else None
        for key in COUNTERS
    }
    hits = misses = 0.0
    then = {disk["name"]: disk for disk in before.disks} if before else {}
    for disk in now.disks:
        moved = _moved(disk, then[disk["name"]]) if disk["name"] in then else None
        if moved:
            hits, misses = hits + moved["read_hits"], misses + moved["read_misses"]
    found["hit_percent"] = 100 * hits / (hits + misses) if hits + misses else None
    found |= {"disks": len(rows), "clients": _sum(row["clients"] for row in rows)}
    found["dirty_bytes"] = _sum(row["dirty_bytes"] for row in rows)
    found["lag_seconds"] = max((row["lag_seconds"] for row in rows), default=0)
    found["troubled"] = sum(row["trouble"] is not None for row in rows)
    return found


def _sum(values: Iterable[float | None]) -> float:
    return sum(value for value in values if value is not None)
