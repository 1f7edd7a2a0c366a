# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The daemon is restarted, stopped or killed while the file server hangs. What is cached goes on being served."""

import time
from functools import partial

from lab.case import Case
from lab.hosts import Host, until
from lab.outcome import demand
from lab.place import Lab

SERVED = 40.0
"""Seconds in which the next daemon has to answer. It takes a few on a real host."""

STOPPED = 400.0
"""Seconds in which a stop has to end: what the unit's own limits add up to, and the emulation's slowness."""

SEED = 7


def prepare(lab: Lab) -> None:
    """A disk with data under way to the store, and a server that hangs."""
    lab.server.image("a.raw")
    lab.server.image("b.raw")
    lab.host.attach("a", "a.raw")
    lab.host.attach("b", "b.raw", "write-through")
    for disk in "ab":
        writer = lab.host.writer(disk, SEED, "--pause 0.01")
        writer.until_flushed(24)
        demand(not writer.stop().errors, "the client had errors before anything happened")
    lab.host.writer("a", SEED + 1, "--first 1 --pause 0.05")
    lab.host.do("dd if=/dev/urandom of=/mnt/nfs/images/x bs=64k count=1; true")
    lab.server.machine.stand_still()
    lab.host.console.start("forebay flush a")
    lab.host.writer("b", SEED + 1, "--pause 0.05")
    time.sleep(10)


def pid(host: Host) -> int:
    """Of the daemon, as systemd has it; 0 where it has none."""
    return int(host.do("systemctl show -p MainPID --value forebay"))


def served_by_another(host: Host, old: int) -> float:
    """Seconds until another daemon than `old` answers and serves what is cached."""
    began = time.monotonic()
    until("another daemon", lambda: pid(host) not in {0, old}, SERVED)
    until("an answer of it", lambda: host.status("a", 5.0), SERVED)
    read = f"nbdsh -u 'nbd+unix:///?socket={host.socket('a')}' -c 'h.pread(4096, {{}})'"
    until("a cached read", lambda: host.run(read.format(0), 10.0), SERVED)
    return time.monotonic() - began


def afterwards(lab: Lab) -> None:
    """The server comes back: everything is written back."""
    lab.server.machine.go_on()
    lab.host.until_flushed("a", 120.0)
    lab.host.until_state("a", "ready", 120.0)


def restart(command: str, lab: Lab) -> str:
    """`systemctl restart`, or a kill: the next daemon does not wait for the old one's store."""
    prepare(lab)
    old = pid(lab.host)
    lab.host.console.start(command.format(pid=old))
    took = served_by_another(lab.host, old)
    afterwards(lab)
    return f"served {took:.0f} s later"


def stop(lab: Lab) -> str:
    """`systemctl stop` ends, and a start after it serves what is cached."""
    prepare(lab)
    began = time.monotonic()
    old = pid(lab.host)
    lab.host.do("systemctl stop forebay", STOPPED)
    took = time.monotonic() - began
    lab.host.console.start("systemctl start forebay")
    served_by_another(lab.host, old)
    afterwards(lab)
    return f"stopped after {took:.0f} s"


CASES = [
    Case("hung server, restart", partial(restart, "systemctl restart forebay")),
    Case("hung server, kill", partial(restart, "kill -9 {pid}")),
    Case("hung server, stop and start", stop, short=False),
]
