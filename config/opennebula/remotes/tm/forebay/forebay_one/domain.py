# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A libvirt domain, as oned writes it, with some of its disks taken to Forebay.

Only what has to be another is: the rest stays as it stands, byte by byte, since OpenNebula's own script for the host
looks for text in it that it wrote itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from xml.parsers import expat
from xml.sax.saxutils import escape

from forebay_one.vm import Disk, DiskPath, Failed, disk_name, image_on_host, normalised

NAMESPACE = "urn:forebay:libvirt:1"
"""Of the element that libvirt's hook of Forebay reads."""

RECONNECT_DELAY = 30
"""Seconds for which QEMU waits for a daemon that crashed."""

DISK = ("domain", "devices", "disk")
PARTS: dict[tuple[str, ...], str] = {(*DISK, "source"): "source", (*DISK, "driver"): "driver"}
METADATA = ("domain", "metadata")
SYSTEM_DATASTORE = "system_datastore"

IN_TEXT = re.compile(
    rb"<one:system_datastore>\s*(?:<!\[CDATA\[)?\s*(/[^<>\]\x00-\x1f]+?)\s*(?:\]\]>)?\s*</one:system_datastore>"
)
A_DISK = re.compile(rb"""<source\s+file=['"](/[^'"<>\x00-\x1f]+)/disk\.[0-9]+['"]""")


class _Tag:
    """An element of the text: its attributes, where its start tag begins and ends, and where all of it ends."""

    def __init__(self, attributes: dict[str, str], start: int, tag_end: int) -> None:
        self.attributes = attributes
        self.start = start
        self.tag_end = tag_end
        self.end = 0
        self.parts: dict[str, _Tag] = {}
        """Of a disk: its source, and its driver."""

    @property
    def is_empty(self) -> bool:
        """True for `<a/>`."""
        return self.end == self.tag_end


class _Reader:
    """Finds the elements that matter."""

    def __init__(self, text: bytes) -> None:
        self.disks: list[_Tag] = []
        self.metadata: _Tag | None = None
        self.system_datastore = ""
        self._text = text
        self._open: list[tuple[str, _Tag | None]] = []
        self._parser = expat.ParserCreate()
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._data
        self._parser.StartDoctypeDeclHandler = self._doctype
        self._parser.Parse(text, True)

    def _doctype(self, *_: object) -> None:
        raise Failed("a domain has no document type")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        path = (*(one for one, _ in self._open), name)
        self._open.append((name, self._tag(path, attributes)))
        if self._is_in_system_datastore():
            self.system_datastore = ""

    def _tag(self, path: tuple[str, ...], attributes: dict[str, str]) -> _Tag | None:
        if path not in (DISK, METADATA) and path not in PARTS:
            return None
        start = self._parser.CurrentByteIndex
        tag = _Tag(attributes, start, self._tag_end(start))
        if path == DISK:
            self.disks.append(tag)
        elif path == METADATA:
            self.metadata = tag
        else:
            self.disks[-1].parts[PARTS[path]] = tag
        return tag

    def _tag_end(self, start: int) -> int:
        """Where the start tag ends that begins there; `>` may stand in the value of an attribute."""
        quote = 0
        for at in range(start, len(self._text)):
            byte = self._text[at]
            if quote:
                quote = 0 if byte == quote else quote
            elif byte in b"'\"":
                quote = byte
            elif byte == ord(">"):
                return at + 1
        raise Failed("a tag does not end")

    def _end(self, _name: str) -> None:
        _, tag = self._open.pop()
        if tag is None:
            return
        if self._text[tag.tag_end - 2 : tag.tag_end] == b"/>":
            tag.end = tag.tag_end
        else:
            tag.end = self._text.index(b">", self._parser.CurrentByteIndex) + 1

    def _data(self, data: str) -> None:
        if self._is_in_system_datastore():
            self.system_datastore += data

    def _is_in_system_datastore(self) -> bool:
        names = [name for name, _ in self._open]
        return names[:2] == list(METADATA) and names[-1].rpartition(":")[2] == SYSTEM_DATASTORE


def _read(text: bytes) -> _Reader:
    try:
        return _Reader(text)
    except (expat.ExpatError, ValueError, LookupError) as fault:
        raise Failed(f"the domain cannot be read: {fault}") from None


def directory_of(text: bytes) -> str:
    """The VM's directory on its host, however much of the domain can be read. Raises Failed.

    What oned says of it stands last: a template's RAW comes before.
    """
    try:
        found = _read(text).system_datastore.strip().encode(errors="surrogateescape")
    except Failed:
        found = b""
    written = [found] if found else IN_TEXT.findall(text)[-1:] or A_DISK.findall(text)[:1]
    if not written:
        raise Failed("the domain does not say in which directory the VM is")
    return normalised(written[0].decode(errors="surrogateescape"))


def through_forebay(text: bytes, vm: str, disks: Iterable[Disk], run: str) -> bytes:
    """The domain, with these disks on Forebay's sockets, and what libvirt's hook is told about them.

    `run` is the directory of the sockets on the host. Raises Failed.
    """
    domain = _read(text)
    directory = directory_of(text)
    edits: list[tuple[int, int, str]] = []
    wanted = []
    for disk in disks:
        at, name = DiskPath(directory, disk.id), disk_name(vm, disk.id)
        edits += _edits(_element(domain, at), name, f"{run}/disks/{name}.sock")
        wanted.append(_wanted(disk, name, image_on_host(disk.get("SOURCE"), directory)))
    if not wanted:
        return text
    edits.append(_metadata(domain, f"<disks xmlns='{NAMESPACE}'>{''.join(wanted)}</disks>"))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new.encode("ascii", "xmlcharrefreplace") + text[end:]
    return text


def _element(domain: _Reader, at: DiskPath) -> _Tag:
    found = [
        disk
        for disk in domain.disks
        if disk.attributes.get("type") == "file"
        and disk.attributes.get("device", "disk") == "disk"
        and _is_path(disk.parts.get("source"), at.path)
    ]
    if len(found) != 1:
        raise Failed(f"the domain has {len(found)} disks that are {at.path}, and not one")
    return found[0]


def _is_path(source: _Tag | None, path: str) -> bool:
    if source is None:
        return False
    try:
        return normalised(source.attributes.get("file", "")) == path
    except Failed:
        return False


def _edits(disk: _Tag, name: str, socket: str) -> list[tuple[int, int, str]]:
    source, driver = disk.parts["source"], disk.parts.get("driver")
    served = (
        f"<source protocol='nbd' name={_quoted(name)}><host transport='unix' socket={_quoted(socket)}/>"
        f"<reconnect delay='{RECONNECT_DELAY}'/></source>"
    )
    edits = [
        (disk.start, disk.tag_end, _tag("disk", {**disk.attributes, "type": "network"})),
        (source.start, source.end, served),
    ]
    if driver is not None:
        kept = {key: value for key, value in driver.attributes.items() if key != "io"}
        if kept.get("cache") == "unsafe":  # it would hide the guest's flushes
            kept["cache"] = "none"
        edits.append((driver.start, driver.tag_end, _tag("driver", kept, empty=driver.is_empty)))
    return edits


def _metadata(domain: _Reader, element: str) -> tuple[int, int, str]:
    """Where the element goes: to the end of the metadata there is."""
    found = domain.metadata
    if found is None:
        raise Failed("the domain has no metadata")
    if found.is_empty:
        return found.start, found.end, f"{_tag('metadata', found.attributes)}{element}</metadata>"
    end = found.end - len("</metadata>")
    return end, end, element


def _wanted(disk: Disk, name: str, image: str) -> str:
    """What `forebay attach` is to be told, as libvirt's hook reads it."""
    given = {
        "name": name,
        "image": image,
        "mode": disk.get("CACHE_MODE"),
        "cache-size": disk.size("CACHE_SIZE"),
        "preload": disk.size("PRELOAD_SIZE"),
        "weight": disk.get("CACHE_WEIGHT"),
        "read-only": "yes" if disk.is_yes("READONLY") else "",
    }
    return _tag("disk", {key: value for key, value in given.items() if value}, empty=True)


def _tag(name: str, attributes: Mapping[str, str], *, empty: bool = False) -> str:
    written = "".join(f" {key}={_quoted(value)}" for key, value in attributes.items())
    return f"<{name}{written}{'/' if empty else ''}>"


def _quoted(text: str) -> str:
    return "'" + escape(text, {"'": "&apos;", "\n": "&#10;", "\r": "&#13;", "\t": "&#9;"}) + "'"
