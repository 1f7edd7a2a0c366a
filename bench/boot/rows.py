# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What was measured: one row for each way to boot, and how rows read as a table."""

from dataclasses import dataclass

HEAD = (
    "how",
    "VMs",
    "median / last has booted, s",
    "bytes from the store",
    "requests to it",
    "bytes waited for",
    "daemon's CPU, s",
    "clients' CPU, s",
)


@dataclass
class Row:
    """One way, so many virtual machines."""

    what: str
    vms: int
    seconds: float
    """Until the last one has booted, from when they were switched on; with what has to be done before."""
    median: float | None = None
    """Until half of them have."""
    store_bytes: int | None = None
    store_requests: int | None = None
    waited_percent: float | None = None
    """The share of what guests read for which they had to wait, in Forebay's own words."""
    daemon_cpu: float | None = None
    client_cpu: float | None = None
    is_computed: bool = False
    """True if it follows from what was measured, and was not."""


def _shown(value: float | None, text: str) -> str:
    return "" if value is None else text.format(value)


def cells(row: Row, distinct: int) -> list[str]:
    """The cells of HEAD. `distinct`: bytes of the blocks that one boot reads."""
    seconds = f"{row.seconds:.1f}"
    if row.median is not None and row.vms > 1:
        seconds = f"{row.median:.1f} / {seconds}"
    share = None if row.store_bytes is None else row.store_bytes / distinct
    return [
        row.what,
        str(row.vms),
        seconds + (" (computed)" if row.is_computed else ""),
        _shown(share, "{:.2f}"),
        _shown(row.store_requests, "{}"),
        _shown(row.waited_percent, "{:.1f} %"),
        _shown(row.daemon_cpu, "{:.1f}"),
        _shown(row.client_cpu, "{:.1f}"),
    ]


def table(rows: list[Row], distinct: int, head: tuple[str, ...] = HEAD) -> str:
    """As Markdown; columns in which nothing stands are left out."""
    lines = [cells(row, distinct) for row in rows]
    kept = [n for n in range(len(head)) if any(line[n] for line in lines)]
    shown = [[head[n] for n in kept], ["---"] * len(kept)]
    shown += [[line[n] for n in kept] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)
