# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The cache device's writes take long (dm-delay under the daemon's open volume): hits of other disks do not wait."""

import json
import time
from typing import Any

from lab.case import Case
from lab.hosts import Host
from lab.outcome import demand
from lab.place import Lab

SEED = 7
VOLUME = "vg0-forebay"
DELAY = 3000
"""Milliseconds of a write: ten times what the bar is for, since these machines are that much slower, or more."""

BOUND = DELAY * 20 // 300
"""Milliseconds that the 99th percentile of hits may have: 20 where writes take 300."""

WRITING = "--pause 0.05 --flush-every 1"


def delay(host: Host, milliseconds: int) -> None:
    """Have the volume's device delay each write, while it is in use."""
    table = host.do(f"dmsetup table {VOLUME}").split()
    start, length, kind, device, offset = table[:5]
    demand(kind in ("linear", "delay"), f"the volume is of another kind than expected: {table}")
    new = f"{start} {length} delay {device} {offset} 0 {device} {offset} {milliseconds}"
    host.do(
        f"modprobe dm-delay; dmsetup suspend {VOLUME} && dmsetup load {VOLUME} --table '{new}';"
        f" dmsetup resume {VOLUME}"
    )


def hits(host: Host, disk: str) -> dict[str, Any]:
    """See guest/hits.py."""
    found: dict[str, Any] = json.loads(
        host.do(f"python3 -m lab.guest.hits {host.socket(disk)}", 300.0)
    )
    return found


def others_go_on(lab: Lab) -> str:
    """One disk writes and flushes all the time; another one's hits, before and while writes are delayed."""
    host = lab.host
    for disk in "ab":
        lab.server.image(f"{disk}.raw")
        path = lab.server.path(f"{disk}.raw")
        lab.server.do(f"dd if=/dev/urandom of={path} bs=1M count=8 conv=notrunc")
        host.attach(disk, f"{disk}.raw")
    writer = host.writer("a", SEED, WRITING)
    writer.until_flushed(4)
    before = hits(host, "b")
    delay(host, DELAY)
    began, flushed = time.monotonic(), writer.now.flushed
    slow = hits(host, "b")
    most = (time.monotonic() - began) * 1000 / DELAY + 2
    demand(writer.now.flushed - flushed < most, "the delay delays nothing")
    demand(slow["p99"] < BOUND, f"hits of the other disk: {slow}; before the delay {before}")
    writer.until_flushed(2, 300.0)
    delay(host, 0)
    writer.until_flushed(2, 300.0)
    errors = writer.stop().errors
    demand(not errors, f"the writer was told of errors: {errors[:4]}")
    host.checked("a", writer)
    return f"p99 {slow['p99']:.0f} ms (before {before['p99']:.0f}), writes {DELAY} ms"


CASES = [Case("slow cache device", others_go_on, short=False)]
