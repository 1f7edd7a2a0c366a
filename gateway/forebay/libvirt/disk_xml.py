# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The libvirt `<disk>` element of a disk (libvirt's formatdomain.rst, "Hard drives, ...")."""

import re
import zlib
from collections.abc import Mapping
from html import escape
from typing import Any

from forebay.config.keys import RATES
from forebay.libvirt.domain import NAMESPACE
from forebay.libvirt.version import Version, knows_reconnect
from forebay.units import exact_size

BUSES = {"vd": "virtio", "sd": "scsi", "hd": "ide", "xvd": "xen"}
"""The bus that a target's name stands for; libvirt guesses by the same prefixes."""

TARGET = re.compile(r"(vd|sd|hd|xvd)[a-z]{1,3}", re.ASCII)

RECONNECT_DELAY = 30
"""Seconds for which QEMU waits for a crashed daemon before the guest sees an error."""

LONGEST_SERIAL = 20
"""Bytes. virtio-blk's VIRTIO_BLK_ID_BYTES: a longer serial reaches the guest cut off."""


def parse_target(text: str) -> str:
    """A target device's name, unchanged. Raises ValueError."""
    if TARGET.fullmatch(text):
        return text
    raise ValueError(f"{text!r} is not a target: use vda, sda, hda or xvda, or a later letter")


def serial_of(name: str) -> str:
    """The serial for the guest: the disk's name, or where that is too long its beginning and a checksum of all."""
    if len(name) <= LONGEST_SERIAL:
        return name
    return f"{name[: LONGEST_SERIAL - 9]}-{zlib.crc32(name.encode()):08x}"


def _quoted(text: str) -> str:
    return f"'{escape(text)}'"  # &amp; &lt; &gt; &quot; &#x27; mean the same in XML


def _prefix(target: str) -> str:
    found = TARGET.fullmatch(target)
    assert found is not None, target
    return found.group(1)


def disk_element(disk: Mapping[str, Any], target: str, version: Version | None = None) -> str:
    """The element of a disk with that status, for `virsh attach-device` or a domain's `<devices>`.

    `cache='none'` leaves flushing to the guest; `cache='unsafe'` would hide its flushes from the gateway. `version` is
    the libvirt that will read it, None for a new one: versions before 9.2 drop `<reconnect>` without a word, so they
    are not given it.
    """
    bus = BUSES[_prefix(target)]
    reconnect = f"    <reconnect delay='{RECONNECT_DELAY}'/>\n" if knows_reconnect(version) else ""
    readonly = "  <readonly/>\n" if disk["read_only"] else ""
    return (
        "<disk type='network' device='disk'>\n"
        "  <driver name='qemu' type='raw' cache='none' discard='unmap' detect_zeroes='unmap'/>\n"
        f"  <source protocol='nbd' name={_quoted(disk['name'])}>\n"
        f"    <host transport='unix' socket={_quoted(disk['socket'])}/>\n"
        f"{reconnect}"
        "  </source>\n"
        f"  <target dev='{target}' bus='{bus}'/>\n"
        f"{readonly}"
        f"  <serial>{serial_of(disk['name'])}</serial>\n"
        "</disk>"
    )


def metadata_element(disk: Mapping[str, Any]) -> str:
    """The element for a domain's `<metadata>` from which the hook attaches this disk at the VM's start (domain.py).

    What the store's settings decide is left to them. It has no prefix, because `virsh metadata --set` takes no other.
    """
    given = {"name": disk["name"], "image": disk["image"], "mode": disk["mode"]}
    if disk.get("cache_size") is not None:
        given["cache_size"] = exact_size(disk["cache_size"])
    if (preload := disk.get("preload")) is not None:
        given["preload"] = preload if isinstance(preload, str) else exact_size(preload)
    for one in disk.get("settings") or ():
        if one["key"] in RATES and one["from"] == "disk":
            given[one["key"]] = str(one["value"])
    given |= {flag: "yes" for flag in ("read_only", "overlay") if disk[flag]}
    written = " ".join(f"{key.replace('_', '-')}={_quoted(given[key])}" for key in given)
    return f"<disks xmlns='{NAMESPACE}'>\n  <disk {written}/>\n</disks>"
