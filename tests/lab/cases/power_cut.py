# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The host loses its power under a client that writes, in each mode: the second boot finds all that was flushed.

Memory is lost, what the disks were given stays. What a disk's own cache may lose of it, `real/test_power_cuts.py` asks.
"""

from functools import partial

from lab.case import Case
from lab.hosts import until
from lab.outcome import demand
from lab.place import Lab

SEED = 80
MODES = ("none", "write-around", "write-through", "write-back", "full-copy")
STEPS = 12


def cut(lab: Lab) -> str:
    """All modes at once."""
    host, server = lab.host, lab.server
    host.configure(lag="5s")
    host.do("systemctl restart forebay", 200.0)
    running = {}
    for number, mode in enumerate(MODES):
        server.image(f"{mode}.raw")
        host.attach(mode, f"{mode}.raw", mode)
        running[mode] = host.writer(mode, SEED + number, "--pause 0.02")
    for writer in running.values():
        writer.until_flushed(STEPS)
    host.machine.stand_still()
    done = {mode: writer.now for mode, writer in running.items()}
    host.machine.cut_power()
    for mode, was in done.items():
        until(f"{mode} ready", partial(is_ready, lab, mode), 400.0)
        seed = running[mode].seed
        seen = host.check(host.socket(mode), seed, was.flushed)
        demand(not seen["lost"] and not seen["foreign"], f"{mode} lost flushed data: {seen}")
        again = host.writer(mode, seed, f"--first {seen['instant'] + 1}")
        again.until_flushed(STEPS)
        after = again.stop()
        host.flush(mode)
        image = server.check(server.path(f"{mode}.raw"), seed, after.flushed)
        demand(not image["lost"], f"{mode}: the image lacks what was flushed: {image}")
    return ", ".join(f"{mode} {was.flushed}" for mode, was in done.items()) + " steps"


def is_ready(lab: Lab, disk: str) -> bool:
    return lab.host.state(disk) in ("ready", "copying")


def many(times: int, lab: Lab) -> str:
    """Write-back, cut again and again; a copy of the client goes on from what it finds."""
    host = lab.host
    host.configure(lag="5s")
    host.do("systemctl restart forebay", 200.0)
    lab.server.image("a.raw")
    host.attach("a", "a.raw")
    first = 1
    for number in range(times):
        writer = host.writer("a", SEED, f"--pause 0.02 --first {first}")
        writer.until_flushed(STEPS + number)
        host.machine.stand_still()
        was = writer.now
        host.machine.cut_power()
        until("ready", partial(is_ready, lab, "a"), 400.0)
        seen = host.check(host.socket("a"), SEED, was.flushed)
        demand(not seen["lost"] and not seen["torn"], f"cut {number + 1} lost flushed data: {seen}")
        first = int(seen["instant"]) + 1
    return f"{times} cuts, {first} steps"


CASES = [
    Case("power cut in every mode", cut, short=False),
    Case("ten power cuts in write-back", partial(many, 10), short=False),
]
