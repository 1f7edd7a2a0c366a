# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How a file system is mounted, where that decides whether its locks keep others out, and whether it may lose writes.

A write to an NFS file system that is mounted `soft` is given up when its server does not answer, and may arrive later
or never; nfs(5) warns of silent corruption. Without locks that the server knows of, nothing keeps another host's
gateway or QEMU away; and those of NFS 3 outlive a host that dies, or are lost with the server and not noticed, where
those of NFS 4 are leases: who lost one cannot write any more. Such a store is served, but a disk that acknowledges
what the store does not have yet is refused. The file that says all this is /proc/self/mountinfo, proc(5).
"""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

_MOUNTINFO = Path("/proc/self/mountinfo")
_NFS = ("nfs", "nfs4")
_SOFT = ("soft", "softerr")
_LOCAL_LOCKS = ("nolock", "local_lock=all", "local_lock=posix")
"""With these an NFS client keeps the locks of fcntl(2) to itself."""
_NO_LEASES = ("vers=2", "vers=3")
_FOR_LOCKS = (
    (_LOCAL_LOCKS, "with locks"),
    (
        _NO_LEASES,
        "with vers=4.2, or set require_locks = false where nobody else can have its images",
    ),
)
_LOCAL = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "vfat", "xfs", "zfs", "bcachefs"}
_LOCAL |= {"devtmpfs", "ramfs", "rootfs", "tmpfs", "erofs", "squashfs", "overlay"}
"""Types of file systems whose calls wait for a device of this host and for nothing else."""
_MOST_LINKS = 40
"""Symbolic links that a path may go through, as for the kernel (path_resolution(7))."""
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo."""

    device: int
    """The device number of the file system, as os.makedev and st_dev give it."""
    point: str
    """The directory on which it is mounted."""
    kind: str
    """The type of the file system: ext4, nfs4."""
    source: str
    """What is mounted: a device, or server:/path."""
    options: frozenset[str]
    """The options of the mount and those of the file system."""


def parse(text: str) -> list[Mount]:
    """All mounts in the text of a mountinfo file, the latest last. Lines that make no sense are left out."""
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
    """A field without its escapes: blanks and backslashes are written in octal."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)


def of_this_process() -> list[Mount]:
    """The mounts that this process sees now. Empty where /proc cannot be read; touches no other file system."""
    try:
        return parse(_MOUNTINFO.read_text(errors="surrogateescape"))
    except OSError:
        return []


def latest(mounts: list[Mount], device: int) -> Mount | None:
    """The latest mount of the file system with that device number."""
    return next((mount for mount in reversed(mounts) if mount.device == device), None)


def is_network(mount: Mount) -> bool:
    """True for a file system whose calls wait for a server, or that is none of those known to be local."""
    return mount.kind not in _LOCAL


def is_local(path: str) -> bool:
    """True if no call on a file below the absolute path waits for a server, by the types of the mounts on its way.

    Touches no file system that is not local.
    """
    kinds = {mount.point: mount.kind for mount in of_this_process()}
    here, rest, links = "/", [part for part in path.split("/") if part], 0
    if kinds.get(here, "rootfs") not in _LOCAL:
        return False
    while rest:
        here = os.path.normpath(os.path.join(here, rest.pop(0)))
        if kinds.get(here, "rootfs") not in _LOCAL:
            return False
        target = _link_at(here)
        if target is not None:
            links += 1
            if links > _MOST_LINKS:
                return True  # and it cannot be opened
            rest = [part for part in target.split("/") if part] + rest
            here = "/" if target.startswith("/") else os.path.dirname(here)
    return True


def _link_at(path: str) -> str | None:
    """Where the symbolic link leads; None if that is none, or nothing is there."""
    try:
        return os.readlink(path) if stat.S_ISLNK(os.lstat(path).st_mode) else None
    except OSError:
        return None


def has_local_locks(mounts: list[Mount], device: int) -> bool:
    """True if the file system with that device number is NFS, and its client keeps locks to itself (nfs(5))."""
    mount = latest(mounts, device)
    return mount is not None and mount.kind in _NFS and not mount.options.isdisjoint(_LOCAL_LOCKS)


def why_not(mounts: list[Mount], device: int, *, locks: bool = True) -> str | None:
    """Why nothing is to be written back to the file system with that device number; None if nothing is against it.

    With `locks` False its locks are not asked for: the operator keeps others away, and has said so.
    """
    mount = latest(mounts, device)
    if mount is None or mount.kind not in _NFS:
        return None
    for wrong, right in ((_SOFT, "hard"), *(_FOR_LOCKS if locks else ())):
        bad = sorted(mount.options.intersection(wrong))
        if bad:
            return f"{mount.source} is mounted '{bad[0]}' on {mount.point}: mount it {right}"
    return None


def why_unsafe(device: int, *, locks: bool = True) -> str | None:
    """What `why_not` says of this host as it is now. None where /proc cannot be read."""
    return why_not(of_this_process(), device, locks=locks)
