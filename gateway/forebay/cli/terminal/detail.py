# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The page of one disk: what `forebay status NAME` prints below the line of the table."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from forebay.cli.terminal.render import Cell, Column, boot_line, hit_percent, table
from forebay.units import format_duration, format_latency, format_size, printable

Told = Mapping[str, Any]

SETTING_COLUMNS = (Column("SETTING"), Column("VALUE"), Column("SAID BY"))
_LONGEST_NAME = 32
"""Characters of a process's name."""


class Daemon(Protocol):
    """The daemon, as `forebay.client.Client` asks it."""

    def get(self, target: str) -> Any:
        """What the daemon says at `target`, decoded from JSON. Raises ForebayError."""


def detail_lines(disk: Told, daemon: Daemon, *, colour: bool = False) -> list[str]:
    """All of it: where the disk is from, what it did, who uses it, its settings and where each is said.

    Raises ForebayError.
    """
    snapshots = daemon.get(f"/overlays/{disk['name']}/snapshots") if disk["overlay"] else []
    lines = [f"{name:9}  {printable(text)}" for name, text in _facts(disk, snapshots)]
    if boot := boot_line(disk):
        lines.append(boot)
    if not disk.get("settings"):
        return lines
    rows = [
        [Cell(str(one["key"])), Cell(_value(one["value"])), Cell(str(one["from"]))]
        for one in disk["settings"]
    ]
    return [*lines, "", *table(SETTING_COLUMNS, rows, colour=colour)]


def _value(value: object) -> str:
    """A setting as the configuration has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _facts(disk: Told, snapshots: Sequence[Told]) -> Iterator[tuple[str, str]]:
    state = str(disk["state"])
    yield "state", f"{state}: {disk['reason']}" if disk.get("reason") else state
    source = f", of store {disk['store']}" if disk.get("store") else ""
    yield "image", f"{disk['image']}, {disk.get('format', 'raw')}{source}"
    if disk["socket"]:
        yield "socket", str(disk["socket"])
    yield "clients", "; ".join(_clients(disk)) or "nobody is connected"
    own = format_size(disk.get("private_bytes", 0))
    cached, size = format_size(disk["cached_bytes"]), format_size(disk["size"])
    yield "cached", f"{cached} of {size}, {own} of it this disk's own"
    lag, dirty = format_duration(disk["lag_seconds"]), format_size(disk["dirty_bytes"])
    yield "dirty", f"{dirty}, lag {lag}"
    for what in ("read", "write"):
        hits, misses = disk[f"{what}_hits"], disk[f"{what}_misses"]
        amount = format_size(disk.get("read_bytes" if what == "read" else "written_bytes", 0))
        percent = hit_percent(hits, misses)
        share = f", {percent}% without the image" if hits + misses else ""
        yield f"{what}s", f"{hits + misses:.0f}, {amount}{share}"
    from_image, to_image = disk["origin_read_bytes"], disk["origin_written_bytes"]
    yield "traffic", f"{format_size(from_image)} from the image, {format_size(to_image)} to it"
    if waits := _waits(disk):
        yield "latency", waits
    if disk.get("origin_errors"):
        yield "errors", f"{disk['origin_errors']:.0f} requests that the image failed"
    if rates := _rates(disk):
        yield "rates", rates
    if disk.get("layers"):
        yield "layers", f"{disk['layers']:.0f}"
    if snapshots:
        yield "snapshots", " ".join(str(one["name"]) for one in snapshots)


def _rates(disk: Told) -> str:
    """How fast the disk may be used, and what came of it; empty where there never was a limit."""
    iops, bps = disk.get("iops", 0), disk.get("bps", 0)
    limits = [f"{iops:.0f} requests"] * bool(iops) + [format_size(bps)] * bool(bps)
    allowed = f"{' and '.join(limits)} a second" if limits else "no limit"
    waits = disk.get("throttled_waits", 0)
    if not waits:
        return allowed if limits else ""
    return f"{allowed}; clients waited for {format_duration(disk['throttled_seconds'])}, {waits:.0f} times"


def _waits(disk: Told) -> str:
    """`hit 12us/1.2ms, ...`: p50 and p99 of each kind of request that there was, and what waits now."""
    found = [
        f"{kind} {format_latency(of['p50_seconds'])}/{format_latency(of['p99_seconds'])}"
        for kind, of in (disk.get("latency") or {}).items()
        if of["count"] and not kind.startswith("origin_")
    ]
    if not found:
        return ""
    depth = disk.get("queue_depth", 0)
    slow = f", {disk['slow_requests']:.0f} were slow" if disk.get("slow_requests") else ""
    return f"{', '.join(found)} (p50/p99 since attach), {depth:.0f} waiting{slow}"


def _clients(disk: Told) -> Iterator[str]:
    """Each process that is connected, with how many connections; and what the rule says."""
    found: dict[int, int] = {}
    for one in disk.get("connections") or ():
        found[one["pid"]] = found.get(one["pid"], 0) + 1
    for pid, count in found.items():
        plural = "connection" if count == 1 else "connections"
        yield f"process {pid} ({_name(pid)}) with {count} {plural}"
    holder = disk.get("peer_process")
    if holder:
        yield f"process {holder} has it (peer {disk.get('peer')})"
    if disk.get("refused_clients"):
        yield f"{disk['refused_clients']:.0f} were refused"


def _name(pid: int) -> str:
    """What the process is called, by the kernel of this host."""
    with suppress(OSError, ValueError):
        name = Path(f"/proc/{int(pid)}/comm").read_text(errors="replace").strip()
        return name[:_LONGEST_NAME] or "?"
    return "gone"
