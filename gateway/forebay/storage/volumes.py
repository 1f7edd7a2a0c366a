# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay cache create`, `extend` and `remove`: storage for the cache, made, enlarged and given back.

What is about to be made or removed is on record before it happens (record.py). A command that was killed is
run again: it finds the record, and finishes or begins anew.
"""

import contextlib
import os
import select
import shutil
import signal
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from forebay.client import NoDaemonError, Progress
from forebay.config.model import Config
from forebay.errors import ForebayError
from forebay.storage import advice, lvm
from forebay.storage.kinds import storage_of
from forebay.storage.owner import as_owner, as_root
from forebay.storage.record import (
    Kind,
    VolumeRecord,
    VolumeState,
    locate,
    read_record,
    sync_directory,
    write_record,
)
from forebay.storage.state import format_cache, in_one_line, offline
from forebay.units import format_size
from forebay_cache import CacheError, extend_device, format_device, open_cache
from forebay_cache.device.files import open_device
from forebay_cache.format.geometry import SECTOR
from forebay_cache.format.superblock import SMALLEST
from forebay_cache.index.index import Index

STOP_SECONDS = 120.0
"""How long a daemon that was told to end may take: longer than it gives itself."""


class Daemon(Protocol):
    """The daemon that may be running on the cache, as `forebay.client.Client` asks it. Raises ForebayError."""

    def get(self, target: str) -> Any:
        """What it says at `target`. Raises NoDaemonError where none runs."""

    def follow(
        self, method: str, target: str, content: dict[str, Any] | None, progress: Progress
    ) -> Any:
        """Have it do some work; the result. Raises NoDaemonError where none runs."""


@dataclass(frozen=True)
class Wanted:
    """What `cache create` was asked for: one of the first three. `size` in bytes; `place` is a tag of LVM."""

    group: str | None = None
    device: Path | None = None
    file: Path | None = None
    size: int | None = None
    place: str | None = None
    force: bool = False


# ----------------------------------------------------------------------------------------- creating


def create(config: Config, wanted: Wanted, progress: Progress) -> VolumeRecord:
    """Provide storage and format it. Its record. Raises ForebayError, and leaves nothing behind then."""
    state = config.gateway.state
    if wanted.size is not None and wanted.size < SMALLEST:
        raise ForebayError(f"a cache of {wanted.size} bytes is too small: say at least {SMALLEST}")
    record = _planned(config, wanted)
    with offline(config):
        _clear_leftovers(state)
        _refuse_second(state)
        storage = storage_of(record)
        storage.check(wanted.size, force=wanted.force)
        write_record(state, record)
        try:
            record = storage.make(wanted.size, state, progress)
            _format(record, state / "index", force=wanted.force)
            record = replace(record, state=VolumeState.READY)
            write_record(state, record)
        except BaseException:
            _undo(state, record)
            raise
    return record


def _format(record: VolumeRecord, index: Path, *, force: bool) -> None:
    """Make the cache on storage that was named by who runs this, or was just made. Raises CacheError and OSError."""
    path, opened = Path(record.path), None
    if (
        record.kind is not Kind.FILE
    ):  # a device is the daemon's user's only after udev has seen what is on it
        with as_root():
            opened = open_device(path)
    format_device(path, index, force=force, ident=uuid.UUID(record.uuid), opened=opened)


def _planned(config: Config, wanted: Wanted) -> VolumeRecord:
    """The record before anything is made. Raises ForebayError when the configuration names another place."""
    configured = config.cache.device
    ident = str(uuid.uuid4())
    if wanted.group is not None:
        path = _volume_path(wanted.group, configured)
        return VolumeRecord(
            Kind.LVM, path, ident, VolumeState.CREATING, wanted.group, place=wanted.place
        )
    path_ = wanted.device or wanted.file
    assert path_ is not None
    if configured is not None and configured != path_:
        raise ForebayError(
            f"[cache] device is {configured}, not {path_}: correct {config.source}, then try again"
        )
    return VolumeRecord(
        Kind.DEVICE if wanted.device else Kind.FILE, str(path_), ident, VolumeState.CREATING
    )


def _volume_path(group: str, configured: Path | None) -> str:
    """`/dev/GROUP/NAME`, the name as the configuration has it. Raises ForebayError if it names another group."""
    if configured is None:
        return f"/dev/{group}/forebay"
    mapped = f"/dev/mapper/{group.replace('-', '--')}-"
    if configured.parent == Path("/dev") / group:
        return str(configured)
    if str(configured).startswith(mapped):
        name = str(configured).removeprefix(mapped).replace("--", "-")
        return f"/dev/{group}/{name}"
    raise ForebayError(
        f"[cache] device is {configured}, which is not in volume group {group}: write "
        f'device = "/dev/{group}/NAME" there, then try again'
    )


def _clear_leftovers(state: Path) -> None:
    """Remove what a `create` that was killed has made: nothing was ever stored in it."""
    record = read_record(state)
    if record is not None and record.state is VolumeState.CREATING:
        storage_of(record).drop()
        shutil.rmtree(state / "index", ignore_errors=True)
        write_record(state, None)


def _undo(state: Path, record: VolumeRecord) -> None:
    """Remove what a `create` that fails has made. What cannot be removed is left for the next one to clear."""
    with contextlib.suppress(ForebayError, CacheError, OSError):
        storage_of(record).drop()
        shutil.rmtree(state / "index", ignore_errors=True)
        write_record(state, None)


def _refuse_second(state: Path) -> None:
    """Raises ForebayError where STATE has a cache already."""
    record = read_record(state)
    index = state / "index"
    if record is None and (not index.exists() or _is_fresh(index)):
        return
    where = f" on {record.path}" if record else ""
    raise ForebayError(
        f"{state} has a cache already{where}: 'forebay cache extend' makes it larger, 'forebay cache "
        "remove' gives it back; another instance needs a 'state' of its own"
    )


def _is_fresh(index: Path) -> bool:
    """True if nothing was ever stored in the cache of that index."""
    opened = Index(index, 0)
    opened.close()
    return opened.meta.fresh


# ---------------------------------------------------------------------------------------- extending


def extend(config: Config, daemon: Daemon, size: int | None, progress: Progress) -> dict[str, Any]:
    """Make the storage `size` bytes long, or (None) use what it has become. What the cache is now, as GET /cache says.

    Raises ForebayError.
    """
    with in_one_line(), as_owner(config.gateway.state), _daemon_or_lock(config, daemon) as running:
        record = _record(config)
        if record.state is not VolumeState.READY:
            locate(config)  # says what to do
        rest = storage_of(record).enlarge(size)
        if running:
            content = {"size": rest}
            with as_root():
                found: dict[str, Any] = daemon.follow("POST", "/cache/extend", content, progress)
            return found
        path = locate(config)
        layout = extend_device(path, config.gateway.state / "index", rest, progress)
        return {"device": str(path), "uuid": str(layout.uuid), "size": layout.size}


@contextlib.contextmanager
def _daemon_or_lock(config: Config, daemon: Daemon) -> Iterator[bool]:
    """The body is given True if a daemon runs; else its STATE is held while the body runs."""
    try:
        with as_root():
            daemon.get("/cache")
    except NoDaemonError:
        with offline(config):
            yield False
    else:
        yield True


def _record(config: Config) -> VolumeRecord:
    """The record, or what can be told of a cache that was made without one. Raises ForebayError and CacheError."""
    record = read_record(config.gateway.state)
    if record is not None:
        path = (
            locate(config)
            if record.state is VolumeState.READY and record.kind is not Kind.LVM
            else record.path
        )
        return replace(record, path=str(path))
    path = locate(config)
    if not path.exists():
        raise ForebayError(f"{path}: there is no cache: 'forebay cache create' makes one")
    kind = Kind.DEVICE if stat.S_ISBLK(path.stat().st_mode) else Kind.FILE
    return VolumeRecord(kind, str(path), "")


# ----------------------------------------------------------------------------------------- removing


def remove(config: Config, daemon: Daemon, progress: Progress) -> VolumeRecord:
    """Write back what is dirty, end the daemon, give the storage back. The record of what was removed.

    Raises ForebayError while a disk is attached, or when anything is dirty still.
    """
    state = config.gateway.state
    _end_daemon(daemon, state, progress)
    with offline(config):
        record = _record(config)
        if record.state is VolumeState.READY:
            record = replace(record, uuid=_checked_empty(config), state=VolumeState.REMOVING)
            write_record(state, record)
        storage_of(record).drop()
        shutil.rmtree(state / "index", ignore_errors=True)
        advice.forget(state)
        sync_directory(state)
        write_record(state, None)
    return record


def _end_daemon(daemon: Daemon, state: Path, progress: Progress) -> None:
    """Have the daemon write back what is dirty, then end it. Nothing happens where none runs.

    It says itself which process it is: that is ended with the rights of its user, who owns STATE, and not with root's.

    Raises ForebayError, also while there are disks, which it refuses.
    """
    try:
        pid = daemon.follow("POST", "/cache/release", None, progress)["pid"]
    except NoDaemonError:
        return
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with as_owner(state):
            _terminate(process, pid)
    finally:
        os.close(process)


def _terminate(process: int, pid: int) -> None:
    """SIGTERM to the process behind a pidfd, and wait for its end. Raises ForebayError."""
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
    except PermissionError:
        raise ForebayError(f"the daemon (pid {pid}) is another user's: stop it first") from None
    except ProcessLookupError:
        return
    if not select.select([process], [], [], STOP_SECONDS)[0]:
        raise ForebayError(f"the daemon (pid {pid}) does not end: stop it, then try again")


def _checked_empty(config: Config) -> str:
    """The uuid of a cache that nobody needs any more. Raises ForebayError, CacheError."""
    state, path = config.gateway.state, locate(config)
    if not (state / "index").exists():
        raise ForebayError(
            f"{path}: its index is not at {state / 'index'}, so nobody knows what is dirty: correct "
            "'state', or drop it with 'forebay cache format --force'"
        )
    cache = open_cache(path, state / "index")  # what was journaled since the last commit counts
    try:
        disks = sorted(cache.records.all("disk"))
        kept = sorted(cache.records.all("kept"))
        dirty = sum(x.sectors for x in cache.layers if x.private and not x.is_dead) * SECTOR
    finally:
        cache.release()
    if disks:
        raise ForebayError(
            f"attached: {', '.join(disks)}: start the daemon, and detach them with 'forebay detach NAME'"
        )
    if kept:
        raise ForebayError(
            f"overlays that are kept: {', '.join(kept)}: start the daemon, and save them, or give their changes up "
            "with 'forebay revert NAME'"
        )
    if dirty:
        raise ForebayError(
            f"{path}: {format_size(dirty)} are dirty, only this cache has them: start the daemon and "
            "drain it with 'forebay flush --all'"
        )
    return cache.uuid


# --------------------------------------------------------------------------------------- formatting


def format_again(config: Config, *, force: bool) -> Path:
    """`forebay cache format`: an empty cache on the same device, whose path is returned. Raises ForebayError."""
    with as_owner(config.gateway.state), in_one_line():
        format_cache(config, force)
        _record_format(config.gateway.state)
        return locate(config)


def _record_format(state: Path) -> None:
    """Note in STATE, and on a logical volume, which cache is on the device now."""
    record = read_record(state)
    if record is None:
        return
    opened = Index(state / "index", 0)
    opened.close()
    write_record(state, replace(record, uuid=opened.meta.uuid))
    if record.kind is Kind.LVM:
        tags = (lvm.UUID_TAG + record.uuid, lvm.UUID_TAG + opened.meta.uuid)
        for volume in lvm.caches():
            if volume.uuid == record.volume:
                lvm.retag(volume, *tags)
