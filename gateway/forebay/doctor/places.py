# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The places on this host: cache device, index, directories, stores, as the daemon's user sees them."""

import os
from collections.abc import Iterator
from pathlib import Path

from forebay.config.model import Config, DiskSettings
from forebay.doctor.daemon import Daemon
from forebay.doctor.finding import Finding, fault, ok, unknown, warning
from forebay.doctor.probe import Look, User, look
from forebay.origin.mounts import Mount, is_network, latest, of_this_process, why_not
from forebay.storage.state import index_path
from forebay.units import MIB, Mode, format_size

LEAST_FREE, LITTLE_FREE = 16 * MIB, 0.05
"""Bytes, and share, of a file system."""
FSTAB = Path("/etc/fstab")
_RULES = ("/etc/udev/rules.d", "/usr/local/lib/udev/rules.d", "/usr/lib/udev/rules.d")
_RULE = "60-forebay.rules"
BEHIND = (Mode.WRITE_BACK, Mode.FULL_COPY)
"""Modes that acknowledge what the store does not have yet."""


def check(config: Config, daemon: Daemon) -> Iterator[Finding]:
    """Device, index, directories, udev, and each store."""
    if not daemon.user.may_be_taken:
        text = f"the daemon's user is {daemon.user.name}, and this one cannot look as that"
        yield unknown("places", text, "run it as root")
        return
    mounts = of_this_process()
    yield from _device(config, daemon)
    yield from _directories(config, daemon.user, mounts)
    for name in config.stores:
        yield from _store(config, name, daemon.user, mounts)


def _device(config: Config, daemon: Daemon) -> Iterator[Finding]:
    """The cache device."""
    told = daemon.told.get("cache", {}).get("device") if daemon.answers else None
    path, user = str(told or config.cache_device), daemon.user
    seen = look(path, user)
    if seen.kind == "missing" and config.cache.device is None:
        yield ok("device", f"{path} is made at the first start")
    elif seen.kind == "missing":
        todo = "activate it, correct [cache] device, or 'forebay cache create'"
        yield fault("device", f"{path} is not there", todo)
    elif seen.error:
        yield fault("device", f"{path}: {seen.error}", f"see that {user.name} may reach it")
    elif not (seen.may_read and seen.may_write):
        todo = "the udev rule does that" if seen.kind == "device" else f"chown {user.name} {path}"
        text = f"{path} is {seen.owner}'s, mode {seen.mode:04o}: {user.name} may not use it"
        yield fault("device", text, f"give it to {user.name} ({todo})")
    else:
        yield ok("device", f"{path}, a {'file' if seen.kind == 'file' else 'block device'}")
    if seen.kind == "device":
        yield from _udev(seen, user)


def _udev(seen: Look, user: User) -> Iterator[Finding]:
    """The rule that gives the cache's volume to the daemon at each boot."""
    found = [folder for folder in _RULES if os.path.exists(f"{folder}/{_RULE}")]
    if found:
        yield ok("udev", f"{found[0]}/{_RULE}")
    elif seen.owner.partition(":")[0] != user.name and user.uid:
        todo = "install it (make install), then udevadm control --reload"
        yield warning(
            "udev", f"no {_RULE}: who may use the device depends on the host's groups", todo
        )
    else:
        todo = "install it (make install): at the next boot the device may be another user's"
        yield warning("udev", f"no {_RULE}", todo)


def _directories(config: Config, user: User, mounts: list[Mount]) -> Iterator[Finding]:
    """STATE with the index, and RUN."""
    state, run = config.gateway.state, config.gateway.run
    index = index_path(config)
    seen = look(str(index), user)
    if seen.kind == "missing":
        seen, where = look(str(state), user), state
    else:
        where = index
    mount = latest(mounts, seen.device)
    owner = seen.owner.partition(":")[0]
    if seen.kind == "missing":
        yield ok("index", f"{index} is made at the first start")
    elif seen.error or not (seen.may_read and seen.may_write):
        text = seen.error or f"is {seen.owner}'s, mode {seen.mode:04o}"
        yield fault("index", f"{where} {text}", f"chown -R {user.name} {state}")
    elif user.uid == 0 and owner != user.name:
        todo = f"run the daemon as {owner} (its unit does), or as root with another gateway.state"
        yield fault("index", f"{where} belongs to {owner}: root's daemon refuses it", todo)
    elif mount is not None and is_network(mount):
        todo = "put gateway.state on a local disk: LMDB needs one"
        yield fault("index", f"{where} lies on {mount.kind} of {mount.source}", todo)
    else:
        yield _room("index", str(where), seen)
    seen = look(str(run), user)
    if seen.kind == "missing":
        yield ok("sockets", f"{run} is made at the first start")
    elif seen.error or not (seen.may_read and seen.may_write):
        text = seen.error or f"is {seen.owner}'s, mode {seen.mode:04o}"
        yield fault("sockets", f"{run} {text}", f"chown {user.name} {run}, or correct gateway.run")
    elif config.gateway.socket_group is None and config.gateway.socket_peers is None:
        todo = "name the group that QEMU runs in as gateway.socket_group"
        yield warning("sockets", "no group kvm: QEMU may not open the disks' sockets", todo)
    else:
        yield ok("sockets", f"{run}, for group {config.gateway.socket_group or 'of the daemon'}")


def _room(check: str, path: str, seen: Look) -> Finding:
    """How much room the file system of a path has."""
    text = f"{path}: {format_size(seen.free)} of {format_size(seen.size)} free"
    if seen.size and seen.free < LEAST_FREE:
        return fault(check, text, "make room there")
    if seen.size and seen.free < LITTLE_FREE * seen.size:
        return warning(check, text, "make room there")
    return ok(check, text)


# -------------------------------------------------------------------------------------------------------------- stores


def _store(config: Config, name: str, user: User, mounts: list[Mount]) -> Iterator[Finding]:
    """One store: there, mounted as it has to be, of use to the daemon's user, with room."""
    settings, path = config.disk_settings(name), str(config.store(name).path)
    seen = look(path, user)
    what = f"{name}: {path}"
    absent = missing_mount(path, mounts)
    if absent is not None:
        text = f"{what} lies on {absent}, which is in {FSTAB} and not mounted"
        yield fault("store", text, f"mount {absent}")
    elif seen.kind == "missing":
        yield fault("store", f"{what} is not there", "mount it, or correct its path")
    elif seen.kind == "hangs":
        yield fault("store", f"{what}: {seen.error}", "see whether its server is up")
    elif seen.error:
        yield fault("store", f"{what}: {seen.error}", f"see that {user.name} may reach it")
    elif seen.kind != "dir":
        yield fault("store", f"{what} is no directory", "correct its path")
    elif not seen.may_read:
        text = f"{what} is {seen.owner}'s, mode {seen.mode:04o}: {user.name} may not read it"
        yield fault("store", text, f"let {user.name} read it, by its group or an access list")
    else:
        yield from _mounted(what, settings, seen, user, mounts)


def _mounted(
    what: str, settings: DiskSettings, seen: Look, user: User, mounts: list[Mount]
) -> Iterator[Finding]:
    """A store that can be read."""
    mount = latest(mounts, seen.device)
    how = f"{mount.kind} {_version(mount)}".strip() if mount is not None else "unknown"
    unsafe = why_not(mounts, seen.device, locks=settings.require_locks)
    behind = settings.mode in BEHIND
    if unsafe is not None:
        text, _, todo = unsafe.rpartition(": ")
        refused = f", and mode {settings.mode} is refused there" if behind else ""
        yield (fault if behind else warning)("store", f"{what}: {text}{refused}", todo)
    elif seen.read_only and behind:
        text = f"{what} is mounted read-only, and its mode is {settings.mode}"
        yield fault("store", text, "mount it for writing")
    elif not seen.may_write:
        text = f"{what} ({how}): {user.name} may not make files there"
        todo = f"that is enough for overlays; to write images, let {user.name} write"
        yield warning("store", text, todo)
    else:
        yield _room("store", f"{what} ({how})", seen)


def _version(mount: Mount) -> str:
    """What of an NFS mount's options is looked for."""
    shown = ("vers=", "soft", "softerr", "hard", "nolock", "local_lock=")
    return ",".join(sorted(option for option in mount.options if option.startswith(shown)))


def missing_mount(path: str, mounts: list[Mount], fstab: Path = FSTAB) -> str | None:
    """The directory on the way to `path` on which fstab has something mounted, where nothing is; None for none."""
    try:
        lines = fstab.read_text(errors="replace").splitlines()
    except OSError:
        return None
    there = {mount.point for mount in mounts}
    for line in lines:
        fields = line.split("#")[0].split()
        if len(fields) >= 2 and fields[1].startswith("/") and fields[1] != "/":
            point = os.path.normpath(fields[1].replace("\\040", " "))
            if f"{path}/".startswith(f"{point}/") and point not in there:
                return point
    return None
