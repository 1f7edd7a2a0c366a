# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What STATE says of the volume that the cache lies on, and how that volume is found again.

A volume here is a cache's storage, of whatever kind: a logical volume, a file, a block device. `STATE/device.json` is
its record, written by `forebay cache create`. Without one, the cache is on whatever `[cache] device` names, and only
the uuids in superblock and index say whether that is right.

A logical volume is found by its uuid, which the kernel shows to everybody for every active volume
(`/sys/dev/block/MAJOR:MINOR/dm/uuid`), else by its tags, through `lvm`. So a volume that was renamed is found, and
another one that got its name is not taken for it.
"""

import json
import logging
import os
import stat
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from forebay.config.model import Config
from forebay.storage import lvm
from forebay.storage.owner import read_small
from forebay_cache import CacheError
from forebay_cache.states import Machine, Table

log = logging.getLogger("forebay.storage")

_SYS = Path("/sys")
_DEV = Path("/dev")


class Kind(StrEnum):
    """What a cache can lie on."""

    LVM = "lvm"
    FILE = "file"
    DEVICE = "device"


class VolumeState(StrEnum):
    """How far a volume is, by its record. The moves are in MOVES; gateway/STORAGE.md has the same table."""

    UNRECORDED = "unrecorded"
    """There is no record."""
    CREATING = "creating"
    READY = "ready"
    REMOVING = "removing"


MOVES: Table[VolumeState] = {
    VolumeState.UNRECORDED: {
        VolumeState.CREATING: "it is about to be made by `forebay cache create`, which says so first",
        VolumeState.REMOVING: "the daemon made it by itself, and `forebay cache remove` finds nothing dirty",
    },
    VolumeState.CREATING: {
        VolumeState.READY: "it is made, and formatted",
        VolumeState.UNRECORDED: "what was made of it is removed, as `create` failed or was killed",
    },
    VolumeState.READY: {
        VolumeState.REMOVING: "by `forebay cache remove`, which finds that nothing is dirty",
    },
    VolumeState.REMOVING: {
        VolumeState.UNRECORDED: "it is given back",
    },
}


@dataclass(frozen=True)
class VolumeRecord:
    """The volume of a cache. `uuid` is the cache's; `volume` and `group` are the uuid and group of a logical volume."""

    kind: Kind
    path: str
    uuid: str
    state: VolumeState = VolumeState.READY
    group: str = ""
    volume: str = ""
    place: str | None = None
    """The tag of the physical volumes that it is to lie on, as `@ssd`."""

    @classmethod
    def read(cls, found: dict[str, Any]) -> Self:
        """The record that the file has as `found`. Raises TypeError, ValueError and KeyError where it is none."""
        kind = Kind(found["kind"])
        state = VolumeState(found.get("state", VolumeState.READY))
        return cls(**found | {"kind": kind, "state": state})


def record_path(state: Path) -> Path:
    """Where the record lies."""
    return state / "device.json"


def read_record(state: Path) -> VolumeRecord | None:
    """The record in STATE; None where there is none. Raises CacheError for one that cannot be understood."""
    path = record_path(state)
    try:
        return VolumeRecord.read(json.loads(read_small(path)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CacheError(
            f"{path}: cannot be understood: remove it, and let [cache] device name the device"
        ) from None


def write_record(state: Path, record: VolumeRecord | None) -> None:
    """Replace the record, or (None) remove it; durable when this returns. Raises OSError.

    Raises CacheError where the present one cannot be understood. The state of the new one has to be a move from that of
    the present one.
    """
    _machine(state).become(VolumeState.UNRECORDED if record is None else record.state)
    path = record_path(state)
    if record is None:
        path.unlink(missing_ok=True)
    else:
        partial = path.with_name(path.name + ".new")
        partial.unlink(missing_ok=True)
        with partial.open("x") as file:
            json.dump(asdict(record), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    sync_directory(state)


def _machine(state: Path) -> Machine[VolumeState]:
    """The present state of the volume whose record lies in STATE."""
    present = read_record(state)
    found = VolumeState.UNRECORDED if present is None else present.state
    return Machine(MOVES, found, f"the cache volume of {state}")


def sync_directory(path: Path) -> None:
    """Make creations, renames and removals in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ------------------------------------------------------------------------------------------ finding


def locate(config: Config) -> Path:
    """Where the cache lies. Only the embedded file is made when it is missing: a device that is gone stays gone.

    Raises CacheError and ForebayError.
    """
    record = read_record(config.gateway.state)
    if record is None:
        return _as_configured(config)
    if record.state is not VolumeState.READY:
        verb = "create" if record.state is VolumeState.CREATING else "remove"
        raise CacheError(
            f"{record.path}: 'forebay cache {verb}' was interrupted: run it again, so that it ends"
        )
    if record.kind is Kind.LVM:
        return Path(locate_volume(record, config.cache.device))
    path = config.cache.device or Path(record.path)
    if not path.exists():
        raise CacheError(f"{path}: no such {record.kind}: bring it back, or correct [cache] device")
    return path


def _as_configured(config: Config) -> Path:
    path = config.cache_device
    memory = path.is_relative_to("/dev/shm")  # noqa: S108  files in memory, for tests and benchmarks
    if path.is_relative_to(_DEV) and not memory and not path.exists():
        raise CacheError(f"{path}: no such device: activate it, or correct [cache] device")
    return path


def locate_volume(record: VolumeRecord, configured: Path | None) -> str:
    """The path of the logical volume that holds the cache, whatever its name is. Raises CacheError, ForebayError."""
    expected = configured or Path(record.path)
    if record.volume and volume_behind(expected) == _bare(record.volume):
        return str(expected)
    found = _by_kernel(record.volume) or find_volume(record, expected).path
    if not _same(found, expected):
        level = logging.WARNING if configured else logging.INFO
        log.log(
            level, "the cache was on %s and is on %s now: correct [cache] device", expected, found
        )
    return found


def find_volume(record: VolumeRecord, expected: Path) -> lvm.Volume:
    """The active volume that carries the cache's tags, or has its uuid. Raises CacheError, ForebayError."""
    known = [v for v in lvm.caches() if record.volume == v.uuid or record.uuid == v.cache]
    mine = [v for v in known if record.volume == v.uuid] or known
    if not mine:
        what = "is another device" if expected.exists() else "is missing"
        raise CacheError(
            f"{expected}: {what}, and no logical volume has the tag {lvm.UUID_TAG}{record.uuid}: "
            "bring the cache's volume back; 'lvs -o +lv_tags' lists what is there"
        )
    if len(mine) > 1:
        raise CacheError(
            f"{' and '.join(sorted(v.label for v in mine))} both claim to be cache {record.uuid}: take "
            f"the tag {lvm.CACHE_TAG} off the wrong one"
        )
    if not mine[0].active:
        raise CacheError(f"{mine[0].label}: not active: run 'lvchange -ay {mine[0].label}'")
    return mine[0]


def volume_behind(path: Path) -> str | None:
    """The uuid, without dashes, of the logical volume that a block device is."""
    try:
        info = path.stat()
    except OSError:
        return None
    if not stat.S_ISBLK(info.st_mode):
        return None
    major, minor = os.major(info.st_rdev), os.minor(info.st_rdev)
    return _volume_in(_SYS / "dev/block" / f"{major}:{minor}" / "dm")


def _by_kernel(volume: str) -> str | None:
    """The path of an active logical volume."""
    for directory in _SYS.glob("class/block/dm-*/dm"):
        if volume and _volume_in(directory) == _bare(volume):
            return str(_DEV / "mapper" / (directory / "name").read_text().strip())
    return None


def _volume_in(directory: Path) -> str | None:
    """device-mapper's own identity of what LVM made: `LVM-`, 32 characters of the group's uuid, 32 of the volume's."""
    try:
        text = (directory / "uuid").read_text().strip()
    except OSError:
        return None
    return text[36:] if text.startswith("LVM-") and len(text) == 68 else None


def _bare(uuid: str) -> str:
    return uuid.replace("-", "")


def _same(found: str, expected: Path) -> bool:
    try:
        return expected.samefile(found)
    except OSError:
        return False
