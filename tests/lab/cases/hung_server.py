# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The daemon is restarted, stopped or killed while the file server hangs. What is cached goes on being served."""

import time
from functools import partial

from lab.case import Case
from lab.hosts import Host, Writer, until
from lab.outcome import demand
from lab.place import Lab

SERVED = 120.0
"""Seconds in which the next daemon has to answer. It takes a few on a real host."""

STOPPED = 400.0
"""Seconds in which a stop has to end: what the unit's own limits add up to, and the emulation's slowness."""

SEED = 7


def prepare(lab: Lab) -> list[Writer]:
    """Disks with data under way to the store, their clients, and a server that hangs."""
    lab.server.image("a.raw")
    lab.server.image("b.raw")
    lab.host.attach("a", "a.raw")
    lab.host.attach("b", "b.raw", "write-through")
    for disk in "ab":
        writer = lab.host.writer(disk, SEED, "--pause 0.01")
        writer.until_flushed(24)
        demand(not writer.stop().errors, "the client had errors before anything happened")
        lab.host.checked(disk, writer)  # which reads all of it: it is cached now
    running = [lab.host.writer("a", SEED + 1)]
    lab.host.do("dd if=/dev/urandom of=/mnt/nfs/images/x bs=64k count=1; true")
    lab.server.machine.stand_still()
    lab.host.console.start("forebay flush a")
    running.append(lab.host.writer("b", SEED + 1))
    time.sleep(10)
    return running


def pid(host: Host) -> int:
    """Of the daemon, as systemd has it; 0 where it has none."""
    return int(host.do("systemctl show -p MainPID --value forebay"))


def served_by_another(host: Host, old: int) -> float:
    """Seconds until another daemon than `old` answers and serves what is cached."""
    began = time.monotonic()
    until("another daemon", lambda: pid(host) not in {0, old}, SERVED)
    until("an answer of it", lambda: host.status("a", 10.0), SERVED)
    read = f"nbdsh -u 'nbd+unix:///?socket={host.socket('a')}' -c 'h.pread(4096, {{}})'"
    until("a cached read", lambda: host.run(read.format(0), 10.0), SERVED)
    return time.monotonic() - began


def afterwards(lab: Lab, running: list[Writer]) -> None:
    """The server comes back: clients go on, and everything is written back."""
    lab.server.machine.go_on()
    for writer in running:
        writer.until_flushed(8, 300.0)
    lab.host.flush_beside(running)
    for disk, writer in zip("ab", running, strict=True):
        lab.host.until_state(disk, "ready", 300.0)
        done = writer.stop()
        lab.host.flush(disk)
        found = lab.server.check(lab.server.path(f"{disk}.raw"), SEED + 1, done.flushed)
        demand(not found["lost"], f"{disk} lost what was flushed: {found}")


def restart(command: str, lab: Lab) -> str:
    """`systemctl restart`, or a kill: the next daemon does not wait for the old one's store."""
    running = prepare(lab)
    old = pid(lab.host)
    lab.host.console.start(command.format(pid=old))
    took = served_by_another(lab.host, old)
    afterwards(lab, running)
    return f"served {took:.0f} s later"


def stop(lab: Lab) -> str:
    """`systemctl stop` ends, and a start after it serves what is cached."""
    running = prepare(lab)
    began = time.monotonic()
    old = pid(lab.host)
    lab.host.do("systemctl stop forebay", STOPPED)
    took = time.monotonic() - began
    lab.host.console.start("systemctl start forebay")
    served_by_another(lab.host, old)
    afterwards(lab, running)
    return f"stopped after {took:.0f} s"


CASES = [
    Case("hung server, restart", partial(restart, "systemctl restart forebay")),
    Case("hung server, kill", partial(restart, "kill -9 {pid}")),
    Case("hung server, stop and start", stop, short=False),
]
