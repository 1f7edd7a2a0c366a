# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The history in a file of STATE, so that a restart does not begin anew. It may be lost: nothing depends on it."""

import json
import math
import os
import stat
import zlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forebay.history.ring import Ring
from forebay.units import parse_name

FORMAT = 1
LARGEST = 16 << 20
"""Bytes of such a file at most."""

_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""What else may lie there is not waited for."""

Copy = tuple[int, dict[str, bytes]]
"""Of a ring: its newest step, and each column as bytes."""


def copied(ring: Ring) -> Copy:
    """A ring as it is now."""
    return ring.newest, {key: column.tobytes() for key, column in ring.columns.items()}


def save(path: Path, rings: Mapping[str, Copy]) -> None:
    """Write the file, whole or not at all; the host's ring is that of the name "". In a thread. Raises OSError."""
    heads: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name, (newest, columns) in rings.items():
        heads.append(
            {"name": name, "newest": newest, "keys": {k: len(v) for k, v in columns.items()}}
        )
        parts += columns.values()
    body = b"".join(parts)
    head = {"format": FORMAT, "crc32": zlib.crc32(body), "rings": heads}
    new = path.with_name(path.name + ".new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _FLAGS
    with open(os.open(new, flags, 0o600), "wb") as file:
        file.write(json.dumps(head).encode() + b"\n" + body)
    new.replace(path)


def load(path: Path) -> dict[str, Copy]:
    """What the file has, by name. In a thread. Raises OSError, or ValueError for one that `save` did not write."""
    with open(os.open(path, os.O_RDONLY | _FLAGS), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file")
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError("it is too long")
    text, _, body = data.partition(b"\n")
    try:
        head = json.loads(text)
        if head["format"] != FORMAT or head["crc32"] != zlib.crc32(body):
            raise ValueError("it is damaged, or of another version")
        return _parsed(head["rings"], body)
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as fault:
        raise ValueError(f"it does not say what it should: {fault}") from None


def _parsed(heads: list[dict[str, Any]], body: bytes) -> dict[str, Copy]:
    found: dict[str, Copy] = {}
    at = 0
    for head in heads:
        name, columns = head["name"], {}
        for key, length in head["keys"].items():
            columns[key] = body[at : at + length]
            at += length
        if not isinstance(head["newest"], int) or head["newest"] < -1:
            raise ValueError("it has a step that cannot be")
        found[parse_name(name) if name else ""] = head["newest"], columns
    if at != len(body):
        raise ValueError("it is cut, or too long")
    return found


def fill(ring: Ring, copy: Copy) -> bool:
    """Have a ring as it was. False, and nothing done, where that was another kind of ring, or has what is no figure.

    A figure that the ring has and the copy lacks stays empty.
    """
    newest, columns = copy
    known = {key: array("f") for key in columns if key in ring.columns}
    for key, column in known.items():
        if len(columns[key]) != 4 * ring.length:
            return False
        column.frombytes(columns[key])
        if not all(map(math.isfinite, column)) or min(column) < 0:
            return False
    ring.newest = newest
    ring.columns.update(known)
    return True
