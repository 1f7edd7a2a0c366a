# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""LVM through its own command, `lvm`: volume groups, and the logical volumes that carry a cache.

A volume is known by its tags and its uuid. Its name is the operator's, who may change it; a volume that happens to
have the name we once gave is not ours.
"""

import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from forebay.errors import ForebayError
from forebay.storage.owner import as_root
from forebay.units import format_size

CACHE_TAG = "forebay.cache"
"""On every logical volume that holds a cache."""

UUID_TAG = "forebay.uuid="
"""Followed by the uuid of the cache."""

_NAME = re.compile(r"[a-zA-Z0-9_+.][a-zA-Z0-9_+.-]{0,126}")
_RESERVED = re.compile(
    r"(snapshot|pvmove)|_(cdata|cmeta|corig|mimage|mlog|rimage|rmeta|tdata|tmeta|vorigin|vdata|wcorig|pmspare)"
)
_TAG = re.compile(r"[a-zA-Z0-9_+.-][a-zA-Z0-9_+.\-/=!:&#]{0,1022}")

REPORT_SECONDS = 60.0
"""How long a report may take. What changes something is waited for, however long."""

_LVS = "lv_name,vg_name,lv_size,lv_path,lv_tags,lv_attr,devices,lv_uuid"
_VGS = "vg_name,vg_uuid,vg_size,vg_free,vg_extent_size"
_PVS = "pv_name,vg_name,pv_size,pv_free,pv_tags"


@dataclass(frozen=True)
class Volume:
    """A logical volume. `size` in bytes; `attributes` as lvs(8) has them."""

    name: str
    group: str
    size: int
    path: str
    tags: frozenset[str]
    uuid: str
    attributes: str

    @property
    def label(self) -> str:
        """As LVM's commands take it."""
        return f"{self.group}/{self.name}"

    @property
    def active(self) -> bool:
        """True if there is a device to open."""
        return self.attributes[4:5] == "a"

    @property
    def open(self) -> bool:
        """True if somebody has it open."""
        return self.attributes[5:6] == "o"

    @property
    def cache(self) -> str | None:
        """The uuid of the cache that its tags name; None where they name none."""
        if CACHE_TAG not in self.tags:
            return None
        return next((t.removeprefix(UUID_TAG) for t in self.tags if t.startswith(UUID_TAG)), None)


@dataclass(frozen=True)
class Group:
    """A volume group. `free` and `extent` in bytes."""

    name: str
    free: int
    extent: int


def parse_group(text: str) -> str:
    """Check the name of a volume group. Raises ValueError."""
    if not _NAME.fullmatch(text) or text in (".", ".."):
        raise ValueError(f"'{text}' is not the name of a volume group: see 'vgs'")
    return text


def parse_tag(text: str) -> str:
    """Check a tag of physical volumes, written `@ssd` (or `ssd`): with the @. Raises ValueError."""
    if not _TAG.fullmatch(text.removeprefix("@")):
        raise ValueError(f"'{text}' is not a tag of LVM: write it as @ssd")
    return "@" + text.removeprefix("@")


def check_volume_name(name: str) -> None:
    """Raises ForebayError for what LVM does not allow as the name of a logical volume."""
    if not _NAME.fullmatch(name) or name in (".", "..") or _RESERVED.search(name):
        raise ForebayError(f"'{name}' cannot be the name of a logical volume: choose another")


# ------------------------------------------------------------------------------------------- asking


def caches() -> list[Volume]:
    """All logical volumes that carry a cache."""
    return _volumes(f"lv_tags={CACHE_TAG}")


def find(group: str, name: str) -> Volume | None:
    """The volume of that name: only to see if the name is taken."""
    found = _volumes(f"vg_name={group} && lv_name={name}")
    return found[0] if found else None


def _volumes(select: str) -> list[Volume]:
    """The volumes that LVM selects so."""
    rows = _report("lvs", "lv", _LVS, select)
    # A volume with several segments has a row for each.
    return list({row["lv_uuid"]: _volume(row) for row in rows}.values())


def _volume(row: dict[str, str]) -> Volume:
    return Volume(
        row["lv_name"],
        row["vg_name"],
        int(row["lv_size"]),
        row["lv_path"],
        frozenset(row["lv_tags"].split(",")) - {""},
        row["lv_uuid"],
        row["lv_attr"],
    )


def group(name: str) -> Group:
    """The volume group of that name. Raises ForebayError when there is none."""
    rows = _report("vgs", "vg", _VGS, f"vg_name={name}")
    if not rows:
        raise ForebayError(f"no volume group '{name}': 'vgs' lists those there are")
    return Group(name, int(rows[0]["vg_free"]), int(rows[0]["vg_extent_size"]))


def free_space(name: str, place: str | None) -> int:
    """Bytes to be had in a volume group, on physical volumes with the tag `place`. Raises ForebayError."""
    found = group(name)
    if place is None:
        return found.free
    rows = _report("pvs", "pv", _PVS, f"vg_name={name}")
    tagged = [row for row in rows if place.removeprefix("@") in row["pv_tags"].split(",")]
    if not tagged:
        raise ForebayError(
            f"no physical volume of {name} has the tag {place}: set it with "
            f"'pvchange --addtag {place.removeprefix('@')} DEVICE'"
        )
    return sum(int(row["pv_free"]) for row in tagged)


def check_space(name: str, more: int, place: str | None) -> None:
    """Raises ForebayError when the volume group has fewer than `more` bytes left."""
    extent = group(name).extent
    needed, free = -(-more // extent) * extent, free_space(name, place)
    if needed > free:
        where = f"{name} on {place}" if place else name
        raise ForebayError(
            f"no space: {format_size(needed)} are needed and {where} has {format_size(free)} free: "
            "say less, or add a physical volume with 'vgextend'"
        )


# ----------------------------------------------------------------------------------------- changing


def create(group_name: str, name: str, size: int, tags: Sequence[str], place: str | None) -> None:
    """Make a logical volume of `size` bytes (LVM rounds up), zeroed at its start, on `place`."""
    words = ["-y", "-Zy", "-Wy", "-L", f"{size}b", "-n", name]
    for tag in tags:
        words += ["--addtag", tag]
    _run("lvcreate", *words, group_name, *_place(place))


def extend(volume: Volume, size: int, place: str | None) -> None:
    """Make it `size` bytes long; it may be in use meanwhile."""
    _run("lvextend", "-L", f"{size}b", volume.label, *_place(place))


def remove(volume: Volume) -> None:
    """Give its space back. LVM refuses while it is in use."""
    _run("lvremove", "-y", volume.label)


def retag(volume: Volume, drop: str, add: str) -> None:
    """Replace a tag of the volume by another one."""
    _run("lvchange", "--deltag", drop, "--addtag", add, volume.label)


def _place(place: str | None) -> list[str]:
    return [place] if place else []


# ------------------------------------------------------------------------------------------ running


def _report(command: str, key: str, columns: str, select: str) -> list[dict[str, str]]:
    """Rows of a report. `json` and not `json_std`, which older versions do not know: all values are text."""
    words = ["--reportformat", "json", "-o", columns, "--units", "b", "--nosuffix", "-S", select]
    text = _run(command, *words, timeout=REPORT_SECONDS)
    try:
        found: Any = json.loads(text)["report"][0][key]
        return list(found)
    except (ValueError, LookupError, TypeError):
        raise ForebayError(
            f"lvm {command}: its report was not understood: see what it prints"
        ) from None


def _run(command: str, *words: str, timeout: float | None = None) -> str:
    """What the command prints. Raises ForebayError with its first complaint."""
    environment = {**os.environ, "LC_ALL": "C", "LVM_SUPPRESS_FD_WARNINGS": "1"}
    try:
        with as_root():
            done = subprocess.run(
                ["lvm", command, *words],
                capture_output=True,
                text=True,
                check=False,
                stdin=subprocess.DEVNULL,
                env=environment,
                timeout=timeout,
            )
    except FileNotFoundError:
        raise ForebayError(
            "lvm is not installed: install lvm2, or use a block device (--device) or a file (--file)"
        ) from None
    except subprocess.TimeoutExpired:
        raise ForebayError(
            f"lvm {command} has not answered for {timeout:.0f} s: look for a device that hangs"
        ) from None
    if done.returncode:
        hint = "" if os.geteuid() == 0 else "; run it as root"
        raise ForebayError(f"lvm {command}: {_complaint(done.stderr)}{hint}")
    return done.stdout


def _complaint(text: str) -> str:
    lines = [line.strip().rstrip(".") for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if not line.startswith("WARNING")]
    return (errors or lines or ["failed and said nothing"])[0]
