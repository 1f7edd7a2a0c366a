# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Mounts that may lose what they acknowledged, or whose locks keep nobody out: write-back is refused on them, in a line
that says how to mount the store.
"""

from lab.case import Case
from lab.hosts import MOUNT, Host
from lab.models import SERVER, address
from lab.outcome import demand
from lab.place import Lab

MOUNTS = {
    "soft": ("soft,vers=4.2", "mounted 'soft' on /mnt/soft: mount it hard"),
    "softerr": ("softerr,vers=4.2", "mounted 'softerr' on /mnt/softerr: mount it hard"),
    "v3": ("hard,vers=3", "mounted 'vers=3' on /mnt/v3: mount it with vers=4.2"),
    "nolock": ("hard,vers=3,nolock", "on /mnt/nolock: mount it with locks"),
}
"""Name, options, and what has to be said."""

WRITTEN_THROUGH = ("soft", "softerr", "v3")
"""Where a disk that has everything in the image at each flush may be."""


def refused(lab: Lab) -> str:
    """Every such mount, in both modes that acknowledge before the store has it; and what is not refused works."""
    host = lab.host
    server = address(SERVER, host.machine.model.wires[0])
    host.configure(
        more="".join(f'\n[stores.{name}]\npath = "/mnt/{name}/images"\n' for name in MOUNTS)
    )
    for name, (options, _) in MOUNTS.items():
        lab.server.image(f"{name}.raw")
        mount = f"mount -t nfs -o {options},nosharecache {server}:/srv/store /mnt/{name}"
        host.do(f"mkdir -p /mnt/{name} && {mount} && ls /mnt/{name}/images")
    host.do("systemctl reload forebay")
    for name, (_, words) in MOUNTS.items():
        for mode in ("write-back", "full-copy"):
            is_refused(host, f"forebay attach {name} {name}:{name}.raw --mode {mode}", words)
    is_refused(host, "forebay attach n nolock:nolock.raw --mode write-through", "locks")
    for seed, name in enumerate(WRITTEN_THROUGH):
        written_through(lab, name, 50 + seed)
    return f"{len(MOUNTS)} mounts"


def is_refused(host: Host, command: str, words: str) -> None:
    answer = host.run(command)
    lines = answer.output.strip().splitlines()
    demand(answer.code == 1, f"{command}: {answer}")
    demand(len(lines) == 1 and words in lines[0], f"not one line with '{words}': {lines}")


def written_through(lab: Lab, name: str, seed: int) -> None:
    """A disk that writes through has all that was flushed in the image; it is not taken into write-back either."""
    host = lab.host
    host.attach(name, f"{name}.raw", "write-through", name)
    is_refused(host, f"forebay mode {name} write-back", MOUNTS[name][1])
    writer = host.writer(name, seed)
    writer.until_flushed(8)
    done = writer.stop()
    demand(not done.errors, f"errors on {name}: {done.errors[:3]}")
    found = lab.server.check(lab.server.path(f"{name}.raw"), seed, done.flushed)
    demand(not found["lost"], f"flushed data on {name} is not in the image: {found}")
    host.do(f"ls {MOUNT}/images; forebay detach {name}")


CASES = [Case("soft, nolock and NFS 3 are refused", refused, short=False)]
