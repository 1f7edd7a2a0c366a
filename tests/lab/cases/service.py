# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""systemd and the daemon: restarts under load, one that hangs, one that is killed because memory is scarce."""

from lab.case import Case
from lab.hosts import Host, Writer, until
from lab.outcome import demand
from lab.place import Lab

SEEDS = {"back": 90, "through": 91}
MODES = {"back": "write-back", "through": "write-through"}
RESTARTS = 5


def running(lab: Lab) -> dict[str, Writer]:
    found = {}
    for disk, mode in MODES.items():
        lab.server.image(f"{disk}.raw")
        lab.host.attach(disk, f"{disk}.raw", mode)
        found[disk] = lab.host.writer(disk, SEEDS[disk], "--pause 0.01")
    for writer in found.values():
        writer.until_flushed(8)
    return found


def daemon(host: Host) -> int:
    return int(host.do("systemctl show -p MainPID --value forebay"))


def kept_all(lab: Lab, found: dict[str, Writer]) -> None:
    """Clients go on, and nothing that they flushed is lost."""
    for disk, writer in found.items():
        writer.until_flushed(8)
        done = writer.stop()
        lab.host.flush(disk)
        seen = lab.host.checked(disk, writer)
        image = lab.server.check(lab.server.path(f"{disk}.raw"), writer.seed, done.flushed)
        lost = seen["lost"] or image["lost"] or seen["foreign"]
        demand(not lost, f"{disk} lost flushed data: {seen}, {image}")


def restarts(lab: Lab) -> str:
    """Connections are handed over: nobody hears of it."""
    found = running(lab)
    for _ in range(RESTARTS):
        old = daemon(lab.host)
        lab.host.do("systemctl restart forebay", 300.0)
        demand(daemon(lab.host) not in (0, old), "systemctl restart started no other daemon")
        for writer in found.values():
            writer.until_flushed(4)
    kept_all(lab, found)
    for disk, writer in found.items():
        demand(not writer.now.errors, f"{disk}: errors in a restart: {writer.now.errors[:4]}")
    return f"{RESTARTS} restarts, no error"


def comes_back(lab: Lab, found: dict[str, Writer], old: int, seconds: float) -> str:
    """Another daemon serves, and clients heard of broken connections at most."""
    took = until("another daemon", lambda: daemon(lab.host) not in (0, old), seconds)
    until("an answer of it", lambda: lab.host.status("back", 10.0), 200.0)
    kept_all(lab, found)
    for disk, writer in found.items():
        demand(not writer.now.heard, f"{disk}: errors: {writer.now.heard[:4]}")
    return f"another daemon after {took:.0f} s"


def watchdog(lab: Lab) -> str:
    """A daemon that does nothing any more is ended by systemd, and another one started."""
    found = running(lab)
    old = daemon(lab.host)
    lab.host.do(f"kill -STOP {old}")
    said = comes_back(lab, found, old, 200.0)
    journal = lab.host.do("journalctl -b -u forebay --no-pager")
    demand("atchdog" in journal, "nothing in the journal says that it was the watchdog")
    return said


def out_of_memory(lab: Lab) -> str:
    """The kernel kills the daemon at its unit's limit of memory; systemd starts it again."""
    found = running(lab)
    old = daemon(lab.host)
    lab.host.do("systemctl set-property --runtime forebay.service MemoryMax=16M MemorySwapMax=0")
    until("the kill", lambda: daemon(lab.host) != old, 120.0, 0.3)
    lab.host.do("systemctl set-property --runtime forebay.service MemoryMax=5G")
    said = comes_back(lab, found, old, 200.0)
    journal = lab.host.do("journalctl -b --no-pager | grep -i -E 'oom|out of memory'")
    demand(journal, "nothing in the journal says why")
    return said


CASES = [
    Case("restarts under load", restarts, short=False),
    Case("a daemon that hangs (watchdog)", watchdog, short=False),
    Case("a daemon that is killed for memory", out_of_memory, short=False),
]
