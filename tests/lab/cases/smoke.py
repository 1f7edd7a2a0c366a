# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A file system on a disk, by the kernel's own client, in each mode; and what stays beside the image: nothing."""

from functools import partial

from lab.case import Case
from lab.hosts import until
from lab.outcome import demand
from lab.place import Lab

DEVICE = "/dev/nbd0"
TREE = "/usr/lib/python3.11/json"
SHORT, MORE = ("write-back", "write-through"), ("none", "write-around", "full-copy")


def file_system(mode: str, lab: Lab) -> None:
    """mkfs, mount, write, unmount; the image on the server is the disk, and its file system is clean."""
    host, server = lab.host, lab.server
    server.image("a.raw", 32)
    host.attach("a", "a.raw", mode)
    core = host.status("a")["gateway"]["core"]
    demand(core, "the product was installed without its compiled core")
    host.do(f"nbd-client -unix {host.socket('a')} {DEVICE} -name a -b 4096")
    host.do(f"mkfs.ext4 -q {DEVICE} && mkdir -p /a && mount {DEVICE} /a", 300.0)
    host.do(f"cp -r {TREE} /a && sync -f /a && fstrim /a", 300.0)
    host.do(f"echo 3 >/proc/sys/vm/drop_caches; diff -r {TREE} /a/json && umount /a")
    host.flush("a")
    ask = "python3 -m lab.guest.sums {}"
    seen = host.do(ask.format(DEVICE)).split()
    image = server.do(ask.format(server.path("a.raw"))).split()
    other = [(n, *pair) for n, pair in enumerate(zip(seen, image, strict=True)) if len({*pair}) > 1]
    demand(not other, f"{len(other)} pieces of the image are not as on the disk: {other[:4]}")
    server.do(f"e2fsck -fn {server.path('a.raw')}")
    host.do(f"nbd-client -d {DEVICE}")
    until("detached", lambda: host.run("forebay detach a"), 60.0)
    left = server.run(f"ls -la {server.path('a.raw')}.forebay").output
    demand(not server.has_sidecar("a.raw"), f"a.raw.forebay stays after a detach: {left}")


CASES = [
    Case(f"smoke {mode}", partial(file_system, mode), short=mode in SHORT) for mode in SHORT + MORE
]
