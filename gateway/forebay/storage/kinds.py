# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The kinds of local storage that can hold a cache: a logical volume that we make, a file that we make, and a block
device that is there already (what OpenNebula's proposal #2827 calls the drivers lvm, file and dummy).

Each has the same four verbs. `check` refuses before anything has changed; `make` provides the storage; `enlarge` makes
it larger as far as that is not the cache's own work; `drop` gives it back, is content when it is gone already, and
leaves alone what is not this cache's any more.
"""

import contextlib
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from forebay.errors import ForebayError
from forebay.storage import lvm
from forebay.storage.owner import as_root, is_roots
from forebay.storage.record import (
    Kind,
    VolumeRecord,
    find_volume,
    sync_directory,
)
from forebay.units import format_size
from forebay_cache.device.extend import Progress, reserve
from forebay_cache.device.files import open_device
from forebay_cache.device.superblock import erase, is_blank, read_superblock


class Storage(Protocol):
    """What a cache can lie on. Every method raises ForebayError, CacheError and OSError."""

    def check(self, size: int | None, *, force: bool) -> None:
        """Raise ForebayError for what cannot be made: `size` in bytes, None where the storage has a size already."""

    def make(self, size: int | None, state: Path, progress: Progress) -> VolumeRecord:
        """Provide `size` bytes. The record, with what is known of it now. `state` is the directory STATE."""

    def enlarge(self, size: int | None) -> int | None:
        """Make it `size` bytes long as far as the cache cannot do so itself. What to ask the cache for then."""

    def drop(self) -> None:
        """Give it back. What it held is gone."""


def storage_of(record: VolumeRecord) -> Storage:
    """The storage that a record describes."""
    kinds: dict[str, type[OnVolume | InFile | OnDevice]] = {
        Kind.LVM: OnVolume,
        Kind.FILE: InFile,
        Kind.DEVICE: OnDevice,
    }
    return kinds[record.kind](record)


@dataclass
class OnVolume:
    """A logical volume; `record.path` is `/dev/GROUP/NAME`."""

    record: VolumeRecord

    def check(self, size: int | None, *, force: bool) -> None:
        """Raises ForebayError unless the group is there and has room, and the name is free."""
        del force  # what another volume holds is never ours to overwrite
        name, group = Path(self.record.path).name, self.record.group
        lvm.check_volume_name(name)
        lvm.group(group)
        taken = lvm.find(group, name)
        if taken is not None:
            what = f"a Forebay cache ({taken.cache})" if taken.cache else "not a Forebay cache"
            raise ForebayError(
                f"{taken.label} is there already, {what}: choose another name in [cache] device, or "
                "remove it"
            )
        lvm.check_space(group, size or 0, self.record.place)

    def make(self, size: int | None, state: Path, progress: Progress) -> VolumeRecord:
        """Make it, with the tags by which it is found again."""
        del state, progress
        record, name = self.record, Path(self.record.path).name
        tags = (lvm.CACHE_TAG, lvm.UUID_TAG + record.uuid)
        lvm.create(record.group, name, size or 0, tags, record.place)
        volume = find_volume(record, Path(record.path))
        return replace(record, path=volume.path, volume=volume.uuid)

    def enlarge(self, size: int | None) -> int | None:
        """By lvextend, under whatever name the volume has now."""
        volume = find_volume(self.record, Path(self.record.path))
        if size is not None and size < volume.size:
            raise _shrinks(volume.label, volume.size)
        if size is not None and size > volume.size:
            lvm.check_space(volume.group, size - volume.size, self.record.place)
            lvm.extend(volume, size, self.record.place)
        return None

    def drop(self) -> None:
        """Erase the superblock, so that whoever gets these extents next holds no cache; then lvremove."""
        for volume in lvm.caches():
            if volume.cache == self.record.uuid or volume.uuid == self.record.volume:
                if volume.active:
                    with as_root():  # LVM says that this is a cache
                        _erase(Path(volume.path), self.record.uuid)
                lvm.remove(volume)


@dataclass
class InFile:
    """A regular file with space of its own."""

    record: VolumeRecord

    def check(self, size: int | None, *, force: bool) -> None:
        """Raises ForebayError unless the path is free, and the file system has room."""
        del force
        path = Path(self.record.path)
        try:
            with _in_roots_place(path):
                taken, room = os.path.lexists(path), os.statvfs(path.parent)
        except OSError as fault:
            raise ForebayError(
                f"{path.parent}: {fault.strerror}: make the directory first"
            ) from None
        if taken:
            raise ForebayError(f"{path}: is there already: remove it, or choose another path")
        free = room.f_bavail * room.f_frsize
        if (size or 0) > free:
            raise ForebayError(
                f"no space: {format_size(size or 0)} are needed and {path.parent} has "
                f"{format_size(free)} free: say less, or make room there"
            )

    def make(self, size: int | None, state: Path, progress: Progress) -> VolumeRecord:
        """Make it under its own name, for the owner of STATE: the record says that it is not ready."""
        del state
        path = Path(self.record.path)
        uid, gid = os.geteuid(), os.getegid()
        with _in_roots_place(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.fchown(fd, uid, gid)
            sync_directory(path.parent)
        try:
            reserve(fd, path, size or 0, progress)
        finally:
            os.close(fd)
        return self.record

    def enlarge(self, size: int | None) -> int | None:
        """Nothing to do: whoever has it open makes it longer."""
        return size

    def drop(self) -> None:
        """Remove it, unless somebody put another file there."""
        path = Path(self.record.path)
        if path.exists() and _erase(path, self.record.uuid):
            uid = os.geteuid()
            with _in_roots_place(path):
                if path.lstat().st_uid == uid or os.geteuid() == uid:
                    path.unlink()
                    sync_directory(path.parent)


@dataclass
class OnDevice:
    """A block device that is there already and stays there."""

    record: VolumeRecord

    def check(self, size: int | None, *, force: bool) -> None:
        """Raises ForebayError unless it is a block device. What it holds is looked at when it is formatted."""
        path = Path(self.record.path)
        try:
            info = path.stat()
        except OSError as fault:
            raise ForebayError(f"{path}: {fault.strerror}: 'lsblk' lists what there is") from None
        if not stat.S_ISBLK(info.st_mode):
            raise ForebayError(f"{path}: not a block device: for a file say --file and --size")
        del size, force

    def make(self, size: int | None, state: Path, progress: Progress) -> VolumeRecord:
        """Nothing to do: it is there."""
        del size, state, progress
        return self.record

    def enlarge(self, size: int | None) -> int | None:
        """Nothing to do: its owner makes it longer, and says no size. Raises ForebayError for one."""
        if size is not None:
            raise ForebayError(
                f"{self.record.path}: a block device is not ours to make larger: do so, then run "
                "'forebay cache extend' without --size"
            )
        return None

    def drop(self) -> None:
        """Erase the superblock."""
        _erase(Path(self.record.path), self.record.uuid)


def _in_roots_place(path: Path) -> contextlib.AbstractContextManager[None]:
    """Root, where none but root can change what the path stands for: what is made or removed is what was named."""
    with as_root():
        found = is_roots(path.parent)
    return as_root() if found else contextlib.nullcontext()


def _shrinks(what: str, size: int) -> ForebayError:
    """For a volume that is to become smaller than the `size` bytes that it has."""
    return ForebayError(
        f"{what}: has {format_size(size)} ({size} bytes) already: a cache only grows; for a smaller one "
        "remove it and create another"
    )


def _erase(path: Path, uuid: str) -> bool:
    """Erase the superblock of this cache. True if nothing of a cache is left; False if something else lies there."""
    fd = open_device(path)
    try:
        layout = read_superblock(fd, path)
        if layout is None:
            return is_blank(fd)
        if str(layout.uuid) == uuid:
            erase(fd)
        return str(layout.uuid) == uuid
    finally:
        os.close(fd)
