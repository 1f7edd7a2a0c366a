# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The header of a qcow2 image that is to be served: what it needs, which tables QEMU reads, and what it lies on."""

import struct

from forebay.formats.qcow2 import HEAD, MAGIC, parse
from forebay.formats.qcow2 import Header as Parsed
from forebay.origin.virtual.header import CONVERT, File, Header

__all__ = ["MAGIC", "NAME", "read"]

NAME = "qcow2"

_TABLES = struct.Struct(">QIIQ")
_TABLES_AT = 48
_ORDER_AT = 96
_LARGEST_REFCOUNTS = 8 << 20
_MOST_SNAPSHOTS = 65536
_LEAST_SNAPSHOT = 40


def read(file: File) -> Header:
    """What the header says. Raises ForebayError for one that is refused, and OSError."""
    head = file.read(0, min(HEAD, file.length), "its header")
    try:
        parsed = parse(head, file.length)
    except ValueError as fault:
        raise file.refused(str(fault), "see qemu-img check, or restore it") from None
    if parsed.corrupt:
        raise file.refused("is marked as corrupt", "repair it with qemu-img check -r all")
    if parsed.encryption:
        raise file.refused(f"is encrypted ({parsed.encryption})", CONVERT)
    if parsed.external_data or parsed.data_file:
        raise file.refused("keeps its data in another file", CONVERT)
    _check_tables(file, parsed, head)
    backing = file.text(parsed.backing, "its backing file") if parsed.backing else None
    told = parsed.backing_format
    return Header(
        NAME,
        file.check_size(parsed.size),
        backing,
        file.text(told, "the format of its backing file") if backing and told else None,
        "has bitmaps of a backup program, which would not be kept right: remove them with qemu-img bitmap --remove"
        if parsed.bitmaps
        else None,
    )


def _check_tables(file: File, parsed: Parsed, head: bytes) -> None:
    """Raise ForebayError where a table that a reader does without, and QEMU reads, cannot be one."""
    at, clusters, snapshots, snapshots_at = _TABLES.unpack_from(head, _TABLES_AT)
    order = struct.unpack_from(">I", head, _ORDER_AT)[0] if parsed.version == 3 else 4
    if order > 6:
        raise file.bad(f"its reference counts have 2^{order} bits")
    if not 0 < clusters * parsed.cluster <= _LARGEST_REFCOUNTS:
        raise file.bad(f"its refcount table has {clusters} clusters")
    if snapshots > _MOST_SNAPSHOTS:
        raise file.bad(f"it has {snapshots} snapshots")
    places = [(at, 8, "its refcount table")]
    if snapshots:
        places.append((snapshots_at, _LEAST_SNAPSHOT * snapshots, "its table of snapshots"))
    for place, length, what in places:
        if place % parsed.cluster or place < parsed.cluster:
            raise file.bad(f"{what} lies at byte {place}")
        file.check_inside(place, length, what)
