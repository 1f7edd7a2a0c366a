# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What an owner marker says, and what an operator is told about it."""

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from forebay.errors import ForebayError, InUseError
from forebay.formats.magic import RAW
from forebay.origin.addresses import SIDECAR, FileAddress
from forebay.sidecar.locks import InUse
from forebay.units import FORMATS, format_size

FORMAT = 1
"""The format of the owner marker. One with a number that is not known was written by a newer version: refused."""

FORMAT_OF_VIRTUAL = 2
"""The same where the image is in some format, and the disk in it is written: not for who would take it for a raw one.
"""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

State = Literal["clean", "dirty"]
"""`clean`: the image has everything. `dirty`: the gateway has data that the image lacks."""


class TakenOver(ForebayError):
    """The image was ours, and is not any more: others may have written it, so nothing that we know of it holds."""


class ChangedError(TakenOver):
    """A checkpoint was committed beside the image, and the image is not what it was then: nothing is written to it."""

    def __init__(self, text: str, what: str) -> None:
        super().__init__(text)
        self.what = what
        """What is wrong, without what to do about it."""


class UnreadableError(ForebayError):
    """An owner marker that cannot be read, or does not count: nobody knows whose the image is."""

    def __init__(self, address: FileAddress, name: str, why: str) -> None:
        """`name` is where it lies in the directory beside the image."""
        self.what = (
            f"{address.key}: its owner marker {address.path}{SIDECAR}/{name} cannot be read ({why})"
        )
        """What is wrong, without what to do about it."""
        super().__init__(
            f"{self.what}: find out which gateway wrote the image, then move that out of the way"
        )


NOBODY = ""
"""The gateway in a marker that `forebay takeover` left: the next gateway may take the image."""

LARGEST = (1 << 63) - 1
"""The largest number that a marker may have."""

LONGEST_INSTANT = 40
"""Characters of an instant in ISO 8601, at most."""

PREPARED, RELEASED = "prepared", "released"
"""How far a handover is, in a marker: see `Owner.phase`."""

_LONGEST = {"gateway": 64, "host": 255, "boot_id": 64, "disk": 64, "to": 64}
"""Characters of each text in a marker, at most."""
_INSTANTS = ("since", "as_of", "dirty_since")
_MOST = {"pid": (1 << 31) - 1, "token": LARGEST, "dirty_bytes": LARGEST}
"""The largest value of each number in a marker; the smallest is 0."""
_MOST_DIGITS = 20
"""Of a number in JSON: as many as 64 bits need."""

_NEWER = {
    "as_of": "",
    "dirty_since": "",
    "dirty_bytes": 0,
    "image_format": RAW,
    "phase": "",
    "to": "",
}
"""What the markers of the first versions do not have, with what is read instead."""


@dataclass(frozen=True)
class Owner:
    """What an owner marker says: a JSON object of these fields. Instants are UTC, ISO 8601."""

    gateway: str
    """The uuid of the gateway's cache; NOBODY after a takeover."""
    host: str
    pid: int
    boot_id: str
    """Of the host's kernel; empty where that is not known."""
    disk: str
    """The name of the disk that the image is attached as."""
    since: str
    """When the image was claimed."""
    state: State
    token: int
    """Larger than that of every owner before."""
    as_of: str = ""
    """The instant of the last checkpoint that the image has; empty where that is not known."""
    dirty_since: str = ""
    """All that the image lacks was written later than this."""
    dirty_bytes: int = 0
    """How much the image lacked when it was last counted."""
    format: int = FORMAT
    image_format: str = RAW
    """That of the image, where a checkpoint is of the disk in it."""
    phase: str = ""
    """`prepared`: all that a flush has answered for is in the image, durably, and so it stays. `released`: the same,
    and the locks are gone, or about to go. Empty: no handover is under way."""
    to: str = ""
    """The gateway that may take the image then."""

    @classmethod
    def of_this_process(cls, gateway: str, disk: str) -> Self:
        """This process, for that gateway and disk, as an owner that has nothing dirty, and no token yet."""
        return cls(
            gateway=gateway,
            host=socket.gethostname(),
            pid=os.getpid(),
            boot_id=boot_id(),
            disk=disk,
            since=now(),
            state="clean",
            token=0,
        )

    def of_image(self, image_format: str) -> Self:
        """The same of an image in that format."""
        version = FORMAT if image_format == RAW else FORMAT_OF_VIRTUAL
        return replace(self, format=version, image_format=image_format)

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """The owner that the text of a marker describes. Raises ValueError.

        Whoever may write to the folder of the image may have written that text, and what it says is shown to
        operators: every field has bounds.
        """
        found = parse_object(text)
        version = found.get("format")
        if type(version) is not int:
            raise ValueError("not an owner file")
        if version not in (FORMAT, FORMAT_OF_VIRTUAL):
            raise ValueError(f"format {version}, this version knows only {FORMAT_OF_VIRTUAL}")
        for name, missing in _NEWER.items():
            found.setdefault(name, missing)
        for name, longest in _LONGEST.items():
            check_text(name, found.get(name), longest)
        for name in _INSTANTS:
            check_instant(name, found.get(name))
        for name, most in _MOST.items():
            check_number(name, found.get(name), most)
        if found.get("state") not in ("clean", "dirty"):
            raise ValueError("'state' is neither clean nor dirty")
        if found["image_format"] not in FORMATS:
            raise ValueError("'image_format' is none")
        if found["phase"] not in ("", PREPARED, RELEASED):
            raise ValueError("'phase' is none")
        return cls(**{name: found[name] for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        """Which host it is, for which disk, and since when, for messages."""
        return f"host {self.host} (disk '{self.disk}', {self.state}, since {self.since})"

    def is_for(self, gateway: str) -> bool:
        """True if that gateway may take the image, once it has the locks: they are what the owner lets go last."""
        return self.phase != "" and self.to == gateway and self.state == "clean"

    @property
    def dirty_in_words(self) -> str:
        """How much that gateway has which the image lacks, and since when, for messages."""
        some = (
            f"{format_size(self.dirty_bytes)} (at the last count)" if self.dirty_bytes else "data"
        )
        return f"{some} written since {self.dirty_since or self.as_of or self.since} that the image lacks"


def parse_object(text: bytes) -> dict[str, Any]:
    """The JSON object in a text that anybody may have written. Raises ValueError, with a short printable text."""
    try:
        found = json.loads(text, parse_int=_parse_number, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError("not JSON text") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  (what is wrong is the text)
    return found


def _parse_number(digits: str) -> int:
    if len(digits) > _MOST_DIGITS + 1:  # a sign
        raise ValueError("a number that is too long")
    return int(digits)


def _refuse_constant(_word: str) -> None:
    raise ValueError("a number that is none")


def check_text(name: str, value: object, longest: int) -> None:
    """Raise ValueError unless the value of that field is printable text of at most `longest` characters."""
    if not isinstance(value, str) or len(value) > longest or not value.isprintable():
        raise ValueError(f"'{name}' is not text of at most {longest} characters")


def check_instant(name: str, value: object) -> None:
    """Raise ValueError unless the value of that field is an instant in ISO 8601, or empty."""
    check_text(name, value, LONGEST_INSTANT)
    try:
        if value:
            datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError(f"'{name}' is not an instant") from None


def check_number(name: str, value: object, most: int) -> None:
    """Raise ValueError unless the value of that field is a number from 0 to `most`."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"'{name}' is not a number from 0 to {most}")


def now() -> str:
    """This instant: UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def boot_id() -> str:
    """The kernel's boot id; empty where it cannot be read."""
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return ""  # a sandbox hides it: the token and the gateway's uuid still decide


# ---------------------------------------------------------------------------------------------------------- messages


def just_changing(address: FileAddress) -> ForebayError:
    """The error where somebody else has become the owner, or ceased to be, in the middle of what we do."""
    return ForebayError(f"{address.key}: its owner is just changing: try again")


def taken_over(address: FileAddress, found: Owner | None) -> TakenOver:
    """The error for an image that was ours. `found`: what the marker says now; None if there is none."""
    by = f" by {found}" if found is not None and found.gateway != NOBODY else ""
    return TakenOver(f"{address.key} was taken over{by}")


def in_use_by_program(label: str, fault: InUse) -> InUseError:
    """The error for an image that somebody has open without a gateway, whose locks are in the way of ours."""
    who = ", ".join(fault.by) or "QEMU, or a program like it, on another host or of another user"
    what = "is being written by" if fault.written else "is held unchanged by"
    return InUseError(
        f"{label} {what} {who}: shut that down first", {"program": who, "writes": fault.written}
    )


def in_use_by_gateway(address: FileAddress, owner: Owner | None) -> InUseError:
    """The error for an image that another gateway, or another daemon on this host, serves now."""
    lacks = f", with {owner.dirty_in_words}" if owner is not None and owner.state == "dirty" else ""
    return InUseError(
        f"{address.key} is in use by {owner or 'another gateway'}{lacks}: detach it there first, "
        "or attach it here with --read-only",
        (asdict(owner) if owner else {}) | {"serves": True},
    )


def left_behind(address: FileAddress, owner: Owner) -> InUseError:
    """The error for an image that another gateway does not serve now, and did not give back."""
    if owner.state == "dirty":
        has, then = f"has {owner.dirty_in_words}", "gives that data up"
    else:
        has, then = "did not release it", "frees it, and nothing is lost"
    return InUseError(
        f"{address.key} belongs to {owner}, which {has}: detach it there; only if that gateway is "
        f"gone for good, 'forebay takeover {address.key}' {then}",
        asdict(owner) | {"serves": False},
    )
