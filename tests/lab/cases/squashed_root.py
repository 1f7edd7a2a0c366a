# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Root is nobody on the server: `recover` and `takeover` work all the same, as RECOVERY.md shows them."""

from lab.case import Case
from lab.hosts import LEASE_SECONDS, until
from lab.outcome import demand
from lab.place import Lab


def recover_and_take_over(lab: Lab) -> None:
    """The host is gone for good; everything is done as root on another one."""
    host, other, server = lab.host, lab.other, lab.server
    server.image("a.raw")
    host.attach("a", "a.raw")
    writer = host.writer("a", 7)
    writer.until_flushed(8)
    host.flush_beside([writer])
    writer.until_flushed(8)
    host.machine.stand_still()
    other.run("ls /mnt/nfs/images")
    seconds = 3 * LEASE_SECONDS + 200.0
    until("recovered", lambda: other.run("forebay recover images:a.raw"), seconds, 3.0)
    plain = other.run("forebay takeover images:a.raw")
    demand(plain.code == 1 and "--yes" in plain.output, f"takeover without --yes: {plain}")
    other.do("forebay takeover images:a.raw --yes")
    other.attach("a", "a.raw")
    found = server.check(server.path("a.raw"), 7)
    demand(found["instant"] and not found["unfit"], f"the image is of no one instant: {found}")


CASES = [Case("recover and takeover as root", recover_and_take_over)]
