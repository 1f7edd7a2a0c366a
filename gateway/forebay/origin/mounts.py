"""How the file system of a store is mounted, where that decides whether what it took can be lost without a word.

A write to an NFS file system that is mounted `soft` is given up when its server does not answer, and may arrive later
or never; nfs(5) warns of silent corruption. Without locks that the server knows of, nothing keeps another host's
gateway or QEMU away; and those of NFS 3 outlive a host that dies, or are lost with the server and not noticed, where
those of NFS 4 are leases: who lost one cannot write any more. Such a store is served, but a disk that acknowledges
what the store does not have yet is refused. The file is /proc/self/mountinfo, proc(5).
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

_MOUNTINFO = Path("/proc/self/mountinfo")
_NFS = ("nfs", "nfs4")
_SOFT = ("soft", "softerr")
_NO_LOCKS = ("nolock", "local_lock=all", "local_lock=posix", "local_lock=flock")
_NO_LEASES = ("vers=2", "vers=3")
_FOR_LOCKS = (
    (_NO_LOCKS, "with locks"),
    (
        _NO_LEASES,
        "with vers=4.2, or set require_locks = false where nobody else can have its images",
    ),
)
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo: `device` as os.makedev gives it, `options` those of the mount and of the file system."""

    device: int
    point: str
    kind: str
    source: str
    options: frozenset[str]


def parse(text: str) -> list[Mount]:
    """All mounts, the latest last. Lines that make no sense are left out."""
    found = []
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if not dash or len(fields) < 6 or len(rest) < 2 or ":" not in fields[2]:
            continue
        major, _, minor = fields[2].partition(":")
        if not (major.isdecimal() and minor.isdecimal()):
            continue
        options = {*fields[5].split(","), *(rest[2].split(",") if len(rest) > 2 else ())}
        device = os.makedev(int(major), int(minor))
        point, source = _plain(fields[4]), _plain(rest[1])
        found.append(Mount(device, point, rest[0], source, frozenset(options)))
    return found


def _plain(text: str) -> str:
    """Blanks and backslashes are written in octal."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)


def why_not(mounts: list[Mount], device: int, *, locks: bool = True) -> str | None:
    """Why nothing is to be written back to the file system with that device number; None: nothing is against it.

    `locks` False: the operator keeps others away, and says so.
    """
    for mount in reversed(mounts):
        if mount.device != device:
            continue
        if mount.kind not in _NFS:
            return None
        for wrong, right in ((_SOFT, "hard"), *(_FOR_LOCKS if locks else ())):
            bad = sorted(mount.options.intersection(wrong))
            if bad:
                return f"{mount.source} is mounted '{bad[0]}' on {mount.point}: mount it {right}"
        return None
    return None


def unsafe(device: int, *, locks: bool = True) -> str | None:
    """:func:`why_not`, of this host as it is now. Reads /proc only; None where that cannot be read."""
    try:
        mounts = parse(_MOUNTINFO.read_text(errors="surrogateescape"))
        return why_not(mounts, device, locks=locks)
    except OSError:
        return None
