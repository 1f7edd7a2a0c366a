# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A host loses its NFS locks: while it is cut off the server reboots, or gives them to somebody who asks."""

import time

from lab.case import Case
from lab.hosts import LEASE_SECONDS, Writer
from lab.outcome import demand
from lab.place import Lab

SEEDS = {"back": 7, "through": 8}
MODES = {"back": "write-back", "through": "write-through"}
AGAIN = 200.0
"""Seconds after which all has to work again by itself."""


def writers(lab: Lab) -> dict[str, Writer]:
    """A client that writes to a disk in each of the two modes."""
    found = {}
    for disk, mode in MODES.items():
        lab.server.image(f"{disk}.raw")
        lab.host.attach(disk, f"{disk}.raw", mode)
        found[disk] = lab.host.writer(disk, SEEDS[disk])
    for writer in found.values():
        writer.until_flushed(12)
    return found


def go_on(lab: Lab, running: dict[str, Writer]) -> str:
    """Both disks work again without a restart: writes and flushes, passes, the right data in both images."""
    began = time.monotonic()
    lab.host.flush_beside(list(running.values()), AGAIN)
    for disk, writer in running.items():
        lab.host.until_state(disk, "ready", AGAIN)
        writer.until_flushed(8, AGAIN)
    took = time.monotonic() - began
    for disk, writer in running.items():
        done = writer.stop()
        lab.host.flush(disk)
        seen = lab.host.checked(disk, writer)
        image = lab.server.check(lab.server.path(f"{disk}.raw"), SEEDS[disk], done.flushed)
        demand(not seen["lost"] and not image["lost"], f"{disk} lost flushed data: {seen}, {image}")
        demand(
            not seen["torn"] and not image["foreign"],
            f"{disk} holds what nobody wrote: {seen}, {image}",
        )
    return f"all works {took:.0f} s after the network"


def server_reboots(lab: Lab) -> str:
    """Locks cannot be reclaimed once the server's grace period is over."""
    running = writers(lab)
    lab.wires["h1"].cut()
    lab.server.machine.reset()
    lab.server.do("systemctl is-active nfs-server")
    time.sleep(2 * LEASE_SECONDS + 5)
    lab.wires["h1"].mend()
    return go_on(lab, running)


def others_ask(lab: Lab) -> str:
    """A lease that has run out is good until somebody asks for the lock; a second host does, and is refused."""
    running = writers(lab)
    lab.wires["h1"].cut()
    time.sleep(2 * LEASE_SECONDS)
    lab.other.run("ls /mnt/nfs/images")
    for disk, mode in MODES.items():
        answer = lab.other.run(f"forebay attach {disk} images:{disk}.raw --mode {mode}")
        demand(answer.code == 1, f"a second host got {disk}: {answer}")
    lab.wires["h1"].mend()
    return go_on(lab, running)


def server_hangs(lab: Lab) -> str:
    """Nothing is lost here: the server stands still for longer than `origin_timeout`."""
    running = writers(lab)
    lab.server.machine.stand_still()
    time.sleep(60)
    lab.server.machine.go_on()
    return go_on(lab, running)


CASES = [
    Case("lost locks, the server reboots", server_reboots),
    Case("lost locks, others ask", others_ask),
    Case("the server hangs for a minute", server_hangs, short=False),
]
