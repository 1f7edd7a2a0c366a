# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The server hangs for a moment, reboots, withdraws its export, loses an image; the network is slow, and lossy."""

import time

from lab.case import Case
from lab.cases.lost_locks import MODES, SEEDS, go_on, writers
from lab.hosts import Writer, until
from lab.outcome import demand
from lab.place import Lab

HUNG_SECONDS = 15.0
"""Of what the store is given (`origin_timeout`) most, and not all: then nobody may hear of it."""

EXPORT = "10.9.0.0/16:/srv/store"
WITHDRAWN_SECONDS = 30.0
SLOW = "delay 150ms 50ms loss 3%"
SLOW_SECONDS = 60.0


def no_errors(writer: Writer, what: str) -> None:
    errors = writer.now.errors
    demand(not errors, f"{what}: the client heard of errors: {errors[:4]}")


def hangs_for_a_moment(lab: Lab) -> str:
    """Neither mode's client hears of it."""
    running = writers(lab)
    lab.server.machine.stand_still()
    time.sleep(HUNG_SECONDS)
    lab.server.machine.go_on()
    said = go_on(lab, running)
    for disk, writer in running.items():
        no_errors(writer, MODES[disk])
    return said


def reboots(lab: Lab) -> str:
    """Locks are claimed again in the server's grace period; a client of write-through hears of an error at most."""
    running = writers(lab)
    lab.server.machine.reset()
    until("the server", lambda: lab.server.run("systemctl is-active nfs-server"), 200.0)
    said = go_on(lab, running)
    no_errors(running["back"], "write-back")
    return f"{said}; {len(running['through'].now.errors)} errors in write-through"


def export_withdrawn(lab: Lab) -> str:
    """Calls fail at once (ESTALE, EACCES) instead of hanging: write-back goes on, and all is well when it is back."""
    running = writers(lab)
    lab.server.do(f"exportfs -u {EXPORT}; exportfs -f")
    back, began = running["back"], time.monotonic()
    lab.host.console.start("forebay flush back --timeout 20")
    back.until_flushed(12)
    lab.host.until_state("back", "lagging", 120.0)
    time.sleep(max(0.0, WITHDRAWN_SECONDS - (time.monotonic() - began)))
    lab.server.do("exportfs -ra")
    said = go_on(lab, running)
    no_errors(back, "write-back")
    through = {line.split()[-1] for line in running["through"].now.errors}
    # EACCES of the server is EPERM in NBD
    demand(through <= {"EIO", "EPERM"}, f"write-through was told {through}")
    return said


def image_deleted(lab: Lab) -> str:
    """On the server, under dirty data (ESTALE): the disk stops, and keeps that until it is given up."""
    host, server = lab.host, lab.server
    server.image("a.raw")
    host.attach("a", "a.raw")
    writer = host.writer("a", SEEDS["back"])
    writer.until_flushed(12)
    server.do(f"rm {server.path('a.raw')}")
    host.until_state("a", "conflict", 120.0)
    writer.stop()
    shown = host.status("a")
    demand(shown["dirty_bytes"], f"the dirty data is gone: {shown}")
    demand("a.raw" in shown["reason"], f"the reason does not name the image: {shown['reason']}")
    refused = host.run("forebay detach a")
    demand(refused.code == 1, f"a detach gives dirty data up: {refused}")
    host.do("forebay detach a --discard --force")
    demand(not server.run(f"test -e {server.path('a.raw')}"), "the image was made anew")
    return str(shown["reason"])[:120]


def slow_and_lossy(lab: Lab) -> str:
    """Frames of both ends are late, in another order, or lost: everything works, in its time."""
    for computer in (lab.host, lab.server):
        computer.do(f"modprobe sch_netem; tc qdisc add dev eth0 root netem {SLOW}")
    running = writers(lab)
    before = {disk: writer.now.flushed for disk, writer in running.items()}
    time.sleep(SLOW_SECONDS)
    steps = {disk: writer.now.flushed - before[disk] for disk, writer in running.items()}
    demand(steps["back"] and steps["through"], f"nothing was flushed: {steps}")
    go_on(lab, running)
    for disk, writer in running.items():
        no_errors(writer, MODES[disk])
    return f"{steps['back']} steps in write-back, {steps['through']} in write-through"


CASES = [
    Case("the server hangs for a moment", hangs_for_a_moment, short=False),
    Case("the server reboots", reboots, short=False),
    Case("the export is withdrawn", export_withdrawn, short=False),
    Case("an image is deleted on the server", image_deleted, short=False),
    Case("a slow and lossy network", slow_and_lossy, short=False),
]
