# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A VM and its disks, as oned writes them in XML.

OpenNebula starts the drivers for each disk, so what is imported here is little: below Python's own start.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from xml.etree import ElementTree as ET

MOST_XML = 16 << 20
"""Bytes. A VM with a hundred disks has below one MiB."""

LONGEST_NAME = 255
"""Of a file, in characters."""


class Failed(Exception):
    """Says in one line what is wrong."""


def normalised(path: str) -> str:
    """An absolute path without `//` and `.`; `..` is refused. Raises Failed."""
    if not path.startswith("/") or not path.isprintable() or ".." in path.split("/"):
        raise Failed(f"{path!r} is not an absolute path of printable characters without '..'")
    return "/" + os.path.normpath(path).lstrip("/")


def is_number(text: str, digits: int) -> bool:
    """True for a whole number of at most so many digits."""
    return text.isascii() and text.isdecimal() and len(text) <= digits


class DiskPath:
    """`SYSDIR/disk.I` on a host."""

    __slots__ = ("directory", "id")

    def __init__(self, directory: str, number: int) -> None:
        self.directory = directory
        self.id = number

    @classmethod
    def read(cls, path: str) -> DiskPath:
        """The parts of a path. Raises Failed."""
        directory, _, name = normalised(path).rpartition("/")
        number = name[len("disk.") :]
        if not directory or not name.startswith("disk.") or not is_number(number, 6):
            raise Failed(f"{path!r} is not the path of a VM's disk")
        return cls(directory, int(number))

    @property
    def path(self) -> str:
        """The path, normalised."""
        return f"{self.directory}/disk.{self.id}"


class Disk:
    """A DISK of a VM. Attributes that neither template nor image nor datastore has are empty."""

    __slots__ = ("attributes",)

    def __init__(self, attributes: Mapping[str, str]) -> None:
        self.attributes = attributes

    def get(self, key: str) -> str:
        """The value of an attribute."""
        return self.attributes.get(key, "").strip()

    def is_yes(self, key: str) -> bool:
        """True if the attribute says so."""
        return self.get(key).upper() in ("YES", "TRUE")

    def number(self, key: str) -> int:
        """The value of an attribute that is a whole number; 0 where it is none."""
        text = self.get(key)
        return int(text) if is_number(text, 15) else 0

    @property
    def id(self) -> int:
        """DISK_ID. Raises Failed."""
        text = self.get("DISK_ID")
        if not is_number(text, 6):
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
        """The value of an attribute that is a size, as `forebay` takes it; empty where there is none.

        One that has no unit is in MB, as everywhere in OpenNebula.
        """
        text = self.get(key)
        whole, dot, fraction = text.partition(".")
        is_bare = is_number(whole, 15) and (not dot or is_number(fraction, 6))
        return f"{text}M" if is_bare else text


def image_on_host(source: str, directory: str) -> str:
    """The path of an image on a host: the datastores lie beside each other there, in which the VM's directory is.

    `source` is the image's path on the front-end, `directory` the VM's on the host. Raises Failed.
    """
    base = os.path.dirname(os.path.dirname(directory))
    store, name = normalised(source).split("/")[-2:]
    if not store or not 0 < len(name) <= LONGEST_NAME:  # of printable characters
        raise Failed(f"{source!r} is not the path of an image")
    return f"{base.rstrip('/')}/{store}/{name}"


def disk_name(vm: str, disk: int) -> str:
    """What the disk is called in Forebay. Raises Failed."""
    if not is_number(vm, 15):
        raise Failed(f"{vm!r} is not the number of a VM")
    return f"one-{int(vm)}-{disk}"


def _no_document_type(*_: object) -> None:
    raise Failed("what OpenNebula says of the VM has a document type")


def _checked(text: bytes) -> bytes:
    """The text, of a length that can be. Raises Failed."""
    if len(text) > MOST_XML:
        raise Failed("what OpenNebula says of the VM is too long")
    return text


def read_xml(text: bytes) -> ET.Element:
    """The root of a text that oned has written. Raises Failed."""
    from xml.etree import ElementTree as ET  # noqa: PLC0415  (8 ms, and most drivers want disks alone)

    class Builder(ET.TreeBuilder):
        doctype = staticmethod(_no_document_type)

    try:
        # no document type, hence no entities
        parser = ET.XMLParser(target=Builder())  # noqa: S314
        return ET.fromstring(_checked(text), parser)  # noqa: S314
    except (ET.ParseError, ValueError, LookupError) as fault:
        raise Failed(f"what OpenNebula says of the VM cannot be read: {fault}") from None


OF_VM = ("TEMPLATE", "DISK")
"""Where a disk is within a `<VM>`."""


class _Disks:
    """Collects the attributes of disks while a text is read, as far as the first text of each goes."""

    def __init__(self, where: tuple[str, ...]) -> None:
        self.found: list[dict[str, str]] = []
        self._where = where
        self._open: list[str] = []
        self._is_first = False

    def begin(self, tag: str, _: object) -> None:
        self._open.append(tag)
        self._is_first = False
        _, *below = self._open
        if tuple(below) == self._where:
            self.found.append({})
        elif tuple(below[:-1]) == self._where:
            self.found[-1][tag] = ""
            self._is_first = True

    def end(self, _: str) -> None:
        self._open.pop()
        self._is_first = False

    def text(self, part: str) -> None:
        if self._is_first:
            self.found[-1][self._open[-1]] += part


def disks(text: bytes, where: tuple[str, ...] = OF_VM) -> list[Disk]:
    """The disks of a `<VM>`, in the text that oned has written of it. Raises Failed.

    `where` they are below the root, if that is something else.
    """
    from pyexpat import ExpatError, ParserCreate  # noqa: PLC0415  (beside `read_xml`)

    found, parser = _Disks(where), ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = _no_document_type
    parser.StartElementHandler = found.begin
    parser.EndElementHandler = found.end
    parser.CharacterDataHandler = found.text
    try:
        parser.Parse(_checked(text), True)
    except (ExpatError, ValueError, LookupError) as fault:
        raise Failed(f"what OpenNebula says of the VM cannot be read: {fault}") from None
    return [Disk(attributes) for attributes in found.found]
