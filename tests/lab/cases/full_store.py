# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The store or a quota is full. NFS says so at the flush, once; a guest must not be told later that all is well."""

from functools import partial

from lab.case import Case
from lab.hosts import Host, Server, until
from lab.outcome import Failure, demand
from lab.place import Lab

MODES = ("write-through", "none", "write-around")
PIECES = 8
ROOM = 3_000_000
"""Bytes that are left: for some of the pieces, of a mebibyte each."""


def fill_quota(server: Server) -> None:
    """Leave room for some pieces in the quota of the daemon's user."""
    used = int(server.do("quota -u forebay -w 2>/dev/null | awk 'END {print $2+0}'"))
    server.do(
        f"quotaon -u /srv/store 2>/dev/null; setquota -u forebay 0 {used + 3000} 0 0 /srv/store"
    )


def clear_quota(server: Server) -> None:
    server.do("setquota -u forebay 0 0 0 0 /srv/store")


def between_nothing(host: Host) -> None:
    """The client goes on."""


def between_restart(host: Host) -> None:
    host.do("systemctl restart forebay", 200.0)


def between_kill(host: Host) -> None:
    host.do("kill -9 $(systemctl show -p MainPID --value forebay)")
    until("a daemon", lambda: host.status("a"), 200.0)


BETWEEN = {"": between_nothing, ", restart": between_restart, ", kill": between_kill}


def flush_fails(mode: str, cause: str, between: str, lab: Lab) -> str:
    """Whoever is told that a flush worked finds all that was acknowledged in the image."""
    host, server = lab.host, lab.server
    server.image("a.raw", 16)
    host.attach("a", "a.raw", mode)
    if cause == "quota":
        fill_quota(server)
    else:
        server.fill(ROOM)
    ask = f"python3 -m lab.guest.pieces {host.socket('a')} --pieces {PIECES}"
    first = host.run(f"{ask} write flush")
    if first:
        raise Failure("the store is full, and neither a write nor the flush fails")
    if cause == "quota":
        clear_quota(server)
    else:
        server.make_room()
    BETWEEN[between](host)
    again = [host.run(f"{ask} flush") for _ in range(2)]
    if any(again):
        missing = server.run(
            f"python3 -m lab.guest.pieces {server.path('a.raw')} {first_acked(first.output)} look"
        )
        demand(missing, f"a flush said that all is well: {missing.output.split()}")
    host.do(f"{ask} write flush", 200.0)
    server.do(f"python3 -m lab.guest.pieces {server.path('a.raw')} --pieces {PIECES} look")
    host.do(f"{ask} look")
    return (
        "the flush works, with everything"
        if any(again)
        else "the flush fails until all is written again"
    )


def first_acked(output: str) -> str:
    """For pieces.py: which were acknowledged, by what it printed."""
    acknowledged = [line.split()[1] for line in output.splitlines() if line.startswith("wrote ")]
    return "--only " + (",".join(acknowledged) or "none")


def write_back_waits(lab: Lab) -> str:
    """Write-back keeps what it cannot put anywhere, and goes on when there is room."""
    host, server = lab.host, lab.server
    host.configure(lag="4s")
    host.do("systemctl restart forebay")
    server.image("a.raw")
    host.attach("a", "a.raw")
    writer = host.writer("a", 7)
    writer.until_flushed(8)
    server.fill()
    host.until_state("a", "lagging", 300.0)
    writer.until_flushed(8)
    server.make_room()
    host.until_state("a", "ready", 300.0)
    done = writer.stop()
    host.flush("a")
    found = server.check(server.path("a.raw"), 7, done.flushed)
    demand(not found["lost"] and not found["unfit"], f"the image lacks what was flushed: {found}")
    demand(not done.errors, f"the client had errors: {done.errors[:3]}")
    return f"{done.acknowledged} writes"


CASES = [
    Case("full store, write-through", partial(flush_fails, "write-through", "store", "")),
    Case("full store, none", partial(flush_fails, "none", "store", "")),
    Case("full store, write-around", partial(flush_fails, "write-around", "store", "")),
    Case("full quota, write-through", partial(flush_fails, "write-through", "quota", "")),
    *(
        Case(
            f"full store, {mode}{between}",
            partial(flush_fails, mode, "store", between),
            short=False,
        )
        for mode in MODES
        for between in (", restart", ", kill")
    ),
    Case("full quota, none", partial(flush_fails, "none", "quota", ""), short=False),
    Case(
        "full quota, write-around", partial(flush_fails, "write-around", "quota", ""), short=False
    ),
    Case("full store, write-back", write_back_waits, short=False),
]
