# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A disk moves from host to host while its client, which stands for a VM, writes: over NFS as it is.

The client ends where a VM is paused, and another one goes on with the next step on the other host: what the first one
had acknowledged has to be there, whatever the kernels on both hosts have in memory of the image.
"""

from functools import partial

from lab.case import Case
from lab.hosts import Host, Writer, until
from lab.outcome import demand
from lab.place import Lab

SEED = 11

STEPS = 8
"""That a client flushes before it moves, and after."""


def moves(times: int, lab: Lab) -> str:
    """To and fro, so often."""
    here, there = lab.host, lab.other
    lab.server.image("a.raw")
    here.attach("a", "a.raw")
    writer = here.writer("a", SEED, "--pause 0.05")
    for _ in range(times):
        writer.until_flushed(STEPS)
        comes(there)
        writer = moved(lab, here, there, writer)
        here, there = there, here
    last = writer.stop()
    lab.server.run("sync")
    here.do("forebay detach a")
    found = lab.server.check(lab.server.path("a.raw"), SEED, last.flushed)
    demand(not found["lost"] and not found["torn"], f"blocks are lost after {times} moves: {found}")
    return f"{last.acknowledged} steps, {times} moves"


def comes(host: Host) -> None:
    host.run("ls /mnt/nfs/images")
    host.do("forebay attach a images:a.raw --incoming --wait 2m", 180.0)


def moved(lab: Lab, here: Host, there: Host, writer: Writer) -> Writer:
    """The client on the other host, which goes on, once all that the one here wrote was found there."""
    writer.until_flushed(STEPS)
    done = writer.stop()
    demand(not done.errors, f"the client had errors: {done.errors[:3]}")
    there.do("forebay handover finish a", 60.0)
    found = there.check(there.socket("a"), SEED, done.acknowledged, done.acknowledged)
    demand(not found["lost"] and not found["torn"], f"blocks are lost in a move: {found}")
    demand(here.state("a") == "handed-over", f"on the old host: {here.status('a')}")
    here.do("forebay detach a")
    return there.writer("a", SEED, f"--pause 0.05 --first {done.acknowledged + 1}")


def the_old_host_is_cut_off(lab: Lab) -> None:
    """Once it was prepared: the new host takes the image when the server has given its lock up."""
    lab.server.image("a.raw")
    lab.host.attach("a", "a.raw")
    writer = lab.host.writer("a", SEED, "--pause 0.05")
    writer.until_flushed(STEPS)
    comes(lab.other)
    writer.until_flushed(STEPS)
    writer.pause()
    done = writer.now
    lab.wires["h1"].cut()
    until("taken", partial(lab.other.run, "forebay handover finish a", 60.0), 600.0, 3.0)
    found = lab.other.check(lab.other.socket("a"), SEED, done.flushed)
    demand(not found["lost"], f"blocks that were flushed are lost: {found}")
    lab.wires["h1"].mend()
    writer.go_on()
    until("away", lambda: lab.host.state("a") in ("conflict", "degraded"), 300.0)
    writer.stop()


CASES = [
    Case("a disk moves twice", partial(moves, 2)),
    Case("a disk moves a hundred times", partial(moves, 100), short=False),
    Case("a disk moves away from a host that is cut off", the_old_host_is_cut_off, short=False),
]
