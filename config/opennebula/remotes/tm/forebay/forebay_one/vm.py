# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A VM and its disks, as oned writes them in XML."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple
from xml.etree import ElementTree as ET

MOST_XML = 16 << 20
"""Bytes. A VM with a hundred disks has below one MiB."""

PATH_OF_DISK = re.compile(r"(?P<directory>/.*)/disk\.(?P<id>[0-9]{1,6})")

NUMBER = re.compile(r"[0-9]{1,15}(\.[0-9]{1,6})?")
"""A size that has no unit: MB, as everywhere in OpenNebula."""

NAME_OF_FILE = re.compile(r"[^/\x00-\x1f\x7f]{1,255}")


class Failed(Exception):
    """Says in one line what is wrong."""


def normalised(path: str) -> str:
    """An absolute path without `//` and `.`; `..` is refused. Raises Failed."""
    if not path.startswith("/") or not path.isprintable() or ".." in path.split("/"):
        raise Failed(f"{path!r} is not an absolute path of printable characters without '..'")
    return "/" + os.path.normpath(path).lstrip("/")


class DiskPath(NamedTuple):
    """`SYSDIR/disk.I` on a host."""

    directory: str
    id: int

    @classmethod
    def read(cls, path: str) -> DiskPath:
        """The parts of a path. Raises Failed."""
        found = PATH_OF_DISK.fullmatch(normalised(path))
        if found is None:
            raise Failed(f"{path!r} is not the path of a VM's disk")
        return cls(found["directory"], int(found["id"]))

    @property
    def path(self) -> str:
        """The path, normalised."""
        return f"{self.directory}/disk.{self.id}"


class Disk(NamedTuple):
    """A DISK of a VM. Attributes that neither template nor image nor datastore has are empty."""

    attributes: Mapping[str, str]

    def get(self, key: str) -> str:
        """The value of an attribute."""
        return self.attributes.get(key, "").strip()

    def is_yes(self, key: str) -> bool:
        """True if the attribute says so."""
        return self.get(key).upper() in ("YES", "TRUE")

    def number(self, key: str) -> int:
        """The value of an attribute that is a whole number; 0 where it is none."""
        text = self.get(key)
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else 0

    @property
    def id(self) -> int:
        """DISK_ID. Raises Failed."""
        text = self.get("DISK_ID")
        if not (text.isascii() and text.isdecimal() and len(text) < 7):
            raise Failed(f"DISK_ID is {text!r}")
        return int(text)

    @property
    def is_cached(self) -> bool:
        """True unless the disk is to pass Forebay by."""
        return self.get("CACHE_MODE").upper() != "NONE"

    @property
    def is_served(self) -> bool:
        """True if it is a persistent disk that the VM has through Forebay."""
        wanted = {"TM_MAD": "FOREBAY", "CLONE": "NO", "FORMAT": "RAW", "TYPE": "FILE"}
        return self.is_cached and all(self.get(k).upper() == v for k, v in wanted.items())

    def size(self, key: str) -> str:
        """The value of an attribute that is a size, as `forebay` takes it; empty where there is none."""
        text = self.get(key)
        return f"{text}M" if NUMBER.fullmatch(text) else text


def image_on_host(source: str, directory: str) -> str:
    """The path of an image on a host: the datastores lie beside each other there, in which the VM's directory is.

    `source` is the image's path on the front-end, `directory` the VM's on the host. Raises Failed.
    """
    base = os.path.dirname(os.path.dirname(directory))
    store, name = normalised(source).split("/")[-2:]
    if not store or NAME_OF_FILE.fullmatch(name) is None:
        raise Failed(f"{source!r} is not the path of an image")
    return f"{base.rstrip('/')}/{store}/{name}"


def disk_name(vm: str, disk: int) -> str:
    """What the disk is called in Forebay. Raises Failed."""
    if not (vm.isascii() and vm.isdecimal() and len(vm) < 16):
        raise Failed(f"{vm!r} is not the number of a VM")
    return f"one-{int(vm)}-{disk}"


class _Builder(ET.TreeBuilder):
    def doctype(self, *_: object) -> None:
        raise Failed("what OpenNebula says of the VM has a document type")


def read_xml(text: bytes) -> ET.Element:
    """The root of a text that oned has written. Raises Failed."""
    if len(text) > MOST_XML:
        raise Failed("what OpenNebula says of the VM is too long")
    try:
        # no document type, hence no entities
        return ET.fromstring(text, ET.XMLParser(target=_Builder()))  # noqa: S314
    except (ET.ParseError, ValueError, LookupError) as fault:
        raise Failed(f"what OpenNebula says of the VM cannot be read: {fault}") from None


def disks(vm: ET.Element) -> list[Disk]:
    """The disks of a `<VM>`."""
    return [
        Disk({one.tag: one.text or "" for one in found}) for found in vm.iterfind("./TEMPLATE/DISK")
    ]
