# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""NFS 4.1 cannot punch holes: a guest's fstrim or mkfs must not fill the store with zeros."""

from functools import partial

from lab.case import Case
from lab.outcome import demand
from lab.place import Lab

MOUNT = "/mnt/nfs41"
SIZE = 64
"""MiB of the image."""

GROWTH = 4096
"""KiB that the image may grow by."""


def trim(mode: str, lab: Lab) -> str:
    """Trim and zero a thin image; its size on the server stays, and what was there stays or becomes zeros."""
    host, server = lab.host, lab.server
    host.mount("vers=4.1,nosharecache", MOUNT)
    host.configure(more=f'\n[stores.old]\npath = "{MOUNT}/images"\n')
    host.do("systemctl restart forebay")
    server.image("a.raw", SIZE)
    host.run(f"ls {MOUNT}/images")
    host.attach("a", "a.raw", mode, "old")
    disk = host.socket("a")
    host.do(f"python3 -m lab.guest.pieces {disk} write flush --pieces 4")
    host.flush("a")
    before = used(lab)
    for what in ("trim", "zero"):
        host.do(
            f"nbdsh -u 'nbd+unix:///?socket={disk}' -c "
            f"'[h.{what}(1 << 23, at << 23) for at in range(1, {SIZE >> 3})]; h.flush()'"
        )
    host.flush("a")
    after = used(lab)
    demand(after <= before + GROWTH, f"the image grew from {before} to {after} KiB")
    host.do(f"python3 -m lab.guest.pieces {disk} look --pieces 4")
    host.do(
        f"nbdsh -u 'nbd+unix:///?socket={disk}' -c "
        f"'assert not any(any(h.pread(1 << 20, at << 20)) for at in range(8, {SIZE}))'"
    )
    return f"{before} KiB, then {after}"


def used(lab: Lab) -> int:
    """KiB that the image takes on the server."""
    return int(lab.server.do(f"du -k {lab.server.path('a.raw')} | cut -f1"))


CASES = [
    Case("NFS 4.1, trim in write-through", partial(trim, "write-through")),
    *(
        Case(f"NFS 4.1, trim in {mode}", partial(trim, mode), short=False)
        for mode in ("write-back", "none", "write-around")
    ),
]
