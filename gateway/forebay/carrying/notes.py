# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What two hosts say to each other about an overlay that moves: JSON objects beside its image, checked as such.

Neither gives anybody a right: the token does (:mod:`forebay.carrying.beside`).
"""

import json
import re
from dataclasses import asdict, dataclass
from typing import Self

from forebay.sidecar.incoming import LONGEST as LONGEST_NOTE
from forebay.sidecar.incoming import Incoming
from forebay.sidecar.record import LARGEST, check_number, check_text, parse_object

FORMAT = 1

REFUSED, COPYING, PREPARED, RELEASED = "refused", "copying", "prepared", "released"
PHASES = (REFUSED, COPYING, PREPARED, RELEASED)

_LONGEST = {"gateway": 64, "host": 255, "disk": 64, "to": 64, "move": 16, "phase": 16, "why": 1024}
_NUMBERS = ("size", "image_size", "image_time", "length", "synced", "beat")


@dataclass(frozen=True)
class Asked(Incoming):
    """Who asks for an overlay, from where; as of an image, and with the number of the read that waits there."""

    sync: int = 0
    """Reads up to this number, from 1, wait for what was written until they were asked."""

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """As of an image. Raises ValueError."""
        check_number("sync", parse_object(text).get("sync"), LARGEST)
        return super().parse(text)


@dataclass(frozen=True)
class Offer:
    """What the host says that has the overlay."""

    gateway: str
    host: str
    disk: str
    to: str
    """The gateway that it is for."""
    move: str
    """Which move it is: 16 hexadecimal digits; empty where it is refused."""
    phase: str
    """`refused`: `why` says it. `copying`: it is not to be read yet. `prepared`: what it had a moment ago is in the
    file, `length` bytes of it. `released`: all that it has."""
    why: str = ""
    size: int = 0
    """Bytes of the disk."""
    image_size: int = 0
    image_time: int = 0
    """Of the image that it lies over: bytes, and when it was changed, in ns since the epoch."""
    length: int = 0
    """Bytes of the file that count."""
    synced: int = 0
    """Reads up to this number have all that they wait for in it."""
    beat: int = 0
    format: int = FORMAT

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """What the text says, which anybody may have written who may write beside the image. Raises ValueError."""
        found = parse_object(text)
        if found.get("format") != FORMAT:
            raise ValueError("of a format that is not known")
        for name, longest in _LONGEST.items():
            check_text(name, found.get(name), longest)
        for name in _NUMBERS:
            check_number(name, found.get(name), LARGEST)
        if found["phase"] not in PHASES or not found["gateway"]:
            raise ValueError("of a phase that is not known, or of nobody")
        if found["phase"] != REFUSED and not re.fullmatch("[0-9a-f]{16}", found["move"]):
            raise ValueError("of no move")
        return cls(**{name: found[name] for name in cls.__dataclass_fields__})


def text_of(note: Asked | Offer) -> bytes:
    """What is written of it."""
    text = (json.dumps(asdict(note)) + "\n").encode()
    assert len(text) <= LONGEST_NOTE, "each part of it has its limit"
    return text
