# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the advisor knows, in a file, so that a restart does not begin anew. It may be lost: nothing depends on it."""

from __future__ import annotations

import json
import math
import os
import stat
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FORMAT: Final = 1
LARGEST: Final = 1 << 20
"""Bytes of such a file at most."""

_FLAGS: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""What else may lie there is not waited for."""


@dataclass(frozen=True)
class Kept:
    """Everything that is counted, and keys of blocks in an order that says how they were used."""

    uuid: str
    """Of the cache: keys mean nothing in another one."""
    since: float
    """When counting began, in seconds since the epoch."""
    limit: int
    numbers: Mapping[str, float]
    counts: array[float]
    """As `Distances.counts`."""
    keys: Mapping[str, array[int]]
    """By what they are of."""


def save(path: Path, kept: Kept) -> None:
    """Write the file, whole or not at all. In a thread. Raises OSError."""
    lengths = {name: len(keys) for name, keys in kept.keys.items()}
    head = {
        "format": FORMAT,
        "uuid": kept.uuid,
        "since": kept.since,
        "limit": kept.limit,
        "numbers": dict(kept.numbers),
        "counts": len(kept.counts),
        "keys": lengths,
    }
    text = json.dumps(head).encode() + b"\n"
    new = path.with_name(path.name + ".new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _FLAGS
    with open(os.open(new, flags, 0o600), "wb") as file:
        file.write(
            text
            + b"".join([kept.counts.tobytes(), *(keys.tobytes() for keys in kept.keys.values())])
        )
    new.replace(path)


def load(path: Path) -> Kept:
    """What the file has. Raises OSError, or ValueError for one that does not hold what `save` writes."""
    with open(os.open(path, os.O_RDONLY | _FLAGS), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file")
        data = file.read(LARGEST + 1)
    text, _, rest = data.partition(b"\n")
    head = json.loads(text)
    if len(data) > LARGEST or not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ValueError("it is not a file of this version")
    try:
        return _parsed(head, rest)
    except (KeyError, TypeError, AttributeError, OverflowError) as fault:
        raise ValueError(f"it does not say what it should: {fault}") from None


def _parsed(head: dict[str, Any], rest: bytes) -> Kept:
    lengths = [head["counts"], *head["keys"].values()]
    if any(length < 0 for length in lengths) or 8 * sum(lengths) != len(rest):
        raise ValueError("it is cut, or too long")
    numbers = {str(name): float(value) for name, value in head["numbers"].items()}
    parts = iter(_cut(rest, lengths))
    counts = array("d", next(parts))
    if not all(_is_amount(value) for value in (*numbers.values(), *counts, head["since"])):
        raise ValueError("it has a number that is none")
    keys = {name: array("Q", part) for name, part in zip(head["keys"], parts, strict=True)}
    return Kept(str(head["uuid"]), head["since"], int(head["limit"]), numbers, counts, keys)


def _cut(rest: bytes, lengths: Iterable[int]) -> list[bytes]:
    parts, at = [], 0
    for length in lengths:
        parts.append(rest[at : at + 8 * length])
        at += 8 * length
    return parts


def _is_amount(value: float) -> bool:
    return math.isfinite(value) and value >= 0
