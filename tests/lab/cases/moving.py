# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A disk moves from host to host while its client, which stands for a VM, writes: over NFS as it is.

The client ends where a VM is paused, and another one goes on with the next step on the other host: what the first one
had acknowledged has to be there, whatever the kernels on both hosts have in memory of the image.
"""

import threading
import time
from collections import Counter
from functools import partial

from lab.case import Case
from lab.hosts import Host, Writer, until
from lab.outcome import demand
from lab.place import Lab

SEED = 11

STEPS = 8
"""That a client flushes before it moves, and after."""

KILL_AFTER = 4.0
"""Seconds after the new host has begun to ask: the old one has not prepared by then, or just has."""

MOST_CALLS = 200
"""NFS calls in a second of one host for one disk that moves. One look takes two or three."""


def moves(times: int, kills: bool, lab: Lab) -> str:
    """To and fro, so often; with `kills` a daemon is killed in the middle of each second move.

    `results/moves.txt` tells of each, while it goes on.
    """
    here, there = lab.host, lab.other
    lab.server.image("a.raw")
    here.attach("a", "a.raw")
    writer = here.writer("a", SEED, "--pause 0.05")
    pauses = []
    for number in range(times):
        writer.until_flushed(STEPS)
        victim = (None, here, None, there)[number % 4] if kills else None
        writer, pause = moved(lab, here, there, writer, victim)
        pauses.append(pause)
        told(lab, f"move {number + 1}: {pause:.1f} s, killed {victim and victim.name}")
        here, there = there, here
    last = writer.stop()
    demand(not last.heard, f"the client had errors: {last.heard[:3]}")
    lab.server.run("sync")
    here.do("forebay detach a")
    found = lab.server.check(lab.server.path("a.raw"), SEED, last.flushed)
    demand(not found["lost"] and not found["torn"], f"blocks are lost after {times} moves: {found}")
    pauses.sort()
    return f"{last.acknowledged} steps, {times} moves, of {pauses[len(pauses) // 2]:.1f} s each"


def told(lab: Lab, line: str) -> None:
    lab.results.mkdir(parents=True, exist_ok=True)
    with (lab.results / "moves.txt").open("a") as file:
        file.write(f"{line}\n")


def comes(host: Host) -> None:
    host.run("ls /mnt/nfs/images")
    host.do("forebay attach a images:a.raw --incoming --wait 3m", 240.0)


def killed(host: Host) -> None:
    host.do("kill -9 $(systemctl show -p MainPID --value forebay)")


def is_served(host: Host) -> bool:
    return bool(host.status("a"))


def moved(
    lab: Lab, here: Host, there: Host, writer: Writer, victim: Host | None = None
) -> tuple[Writer, float]:
    """The client on the other host, which goes on, once all that the one here wrote was found there.

    Beside it, for how many seconds nobody had the image for it.

    The daemon of `victim` is killed: the old host's while it is asked for the image, the new one's when it has asked.
    """
    if victim is here:
        threading.Timer(KILL_AFTER, killed, [here]).start()
    comes(there)
    if victim is there:
        killed(there)
        until("the daemon is back", partial(is_served, there), 200.0)
    writer.until_flushed(STEPS)
    done = writer.stop()
    began = time.monotonic()
    demand(not done.heard, f"the client had errors: {done.heard[:3]}")
    until("taken", partial(there.run, "forebay handover finish a", 60.0), 200.0)
    pause = time.monotonic() - began
    found = there.check(there.socket("a"), SEED, done.acknowledged, done.acknowledged)
    demand(not found["lost"] and not found["torn"], f"blocks are lost in a move: {found}")
    demand(here.state("a") == "handed-over", f"on the old host: {here.status('a')}")
    here.do("forebay detach a")
    return there.writer("a", SEED, f"--pause 0.05 --first {done.acknowledged + 1}"), pause


def calls_while_it_waits(lab: Lab) -> str:
    """A move that waits asks the server for no more than so many calls in a second, on either host."""
    here, there = lab.host, lab.other
    lab.server.image("a.raw")
    here.attach("a", "a.raw")
    writer = here.writer("a", SEED, "--pause 0.05")
    writer.until_flushed(STEPS)
    comes(there)
    found = {"the VM is at work": calls(lab, "h1", 5.0)}
    writer.pause()
    time.sleep(0.5)
    found["the VM rests"] = calls(lab, "h1", 3.0)
    time.sleep(5.0)
    found["the VM has rested for long"] = calls(lab, "h1", 5.0)
    found["the new host, before"] = calls(lab, "h2", 5.0)
    here.machine.stand_still()
    there.console.start("forebay handover finish a")
    time.sleep(1.0)
    found["the new host, which waits"] = calls(lab, "h2", 5.0)
    here.machine.go_on()
    most = max(found.values())
    text = ", ".join(f"{what} {rate:.0f}" for what, rate in found.items())
    told(lab, f"calls in a second: {text}")
    demand(most <= MOST_CALLS, f"more than {MOST_CALLS} NFS calls in a second: {text}")
    return f"NFS calls in a second: {text}"


def calls(lab: Lab, host: str, seconds: float) -> float:
    """NFS calls of a host in a second."""
    wire = lab.wires[host]
    wire.listen()
    time.sleep(seconds)
    names = Counter(name for sender, name in wire.calls if sender == host)
    told(lab, f"{host} in {seconds:.0f} s: {dict(names)}")
    return sum(names.values()) / seconds


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
    Case("a disk moves twice", partial(moves, 2, False)),
    Case("a disk moves a hundred times", partial(moves, 100, True), short=False),
    Case("NFS calls while a move waits", calls_while_it_waits, short=False),
    Case("a disk moves away from a host that is cut off", the_old_host_is_cut_off, short=False),
]
