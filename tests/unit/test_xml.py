# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.libvirt.disk_xml import LONGEST_SERIAL, disk_element, parse_target, serial_of
from unit.control_fake import disk

ROOT = Path(__file__).resolve().parents[2]


def test_element_is_the_shipped_example() -> None:
    shipped = (ROOT / "config" / "libvirt" / "disk.xml").read_text()
    assert shipped[shipped.index("<disk ") :].strip() == disk_element(disk("vm1"), "vda")


def test_shipped_domain_holds_the_element() -> None:
    domain = ET.parse(ROOT / "config" / "libvirt" / "domain.xml")
    [found] = domain.iter("disk")
    expected = ET.fromstring(disk_element(disk("vm1"), "vda"))
    assert ET.canonicalize(ET.tostring(found), strip_text=True) == ET.canonicalize(
        ET.tostring(expected), strip_text=True
    )


def test_what_libvirt_reads() -> None:
    element = ET.fromstring(disk_element(disk("d", socket="/run/a&b'\"<c>.sock"), "vdb"))
    assert element.find("source/host").attrib == {  # type: ignore[union-attr]
        "transport": "unix",
        "socket": "/run/a&b'\"<c>.sock",
    }
    assert element.find("source").attrib == {"protocol": "nbd", "name": "d"}  # type: ignore[union-attr]
    assert element.find("readonly") is None
    assert (
        ET.fromstring(disk_element(disk("d", read_only=True), "vda")).find("readonly") is not None
    )


@pytest.mark.parametrize(
    ("target", "bus"),
    [("vda", "virtio"), ("vdzz", "virtio"), ("sdb", "scsi"), ("hda", "ide"), ("xvda", "xen")],
)
def test_bus_follows_from_the_target(target: str, bus: str) -> None:
    assert parse_target(target) == target
    assert f"<target dev='{target}' bus='{bus}'/>" in disk_element(disk("a"), target)


@pytest.mark.parametrize("target", ["", "vd", "vda1", "VDA", "nvme0n1", "vda'", "vdabcd"])
def test_wrong_target(target: str) -> None:
    with pytest.raises(ValueError, match="is not a target: use vda"):
        parse_target(target)


@given(st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True), unique=True))
def test_serials_fit_and_differ(names: list[str]) -> None:
    serials = [serial_of(name) for name in names]
    assert all(len(serial) <= LONGEST_SERIAL for serial in serials)
    assert len(set(serials)) == len(names)


def test_short_serial_is_the_name() -> None:
    assert serial_of("vm1-disk0") == "vm1-disk0"
    assert serial_of("production-database-0001-data").startswith("production-")
