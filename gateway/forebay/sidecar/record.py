"""What an owner marker says, and what an operator is told about it."""

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from forebay.errors import ForebayError, InUseError
from forebay.origin.addresses import FileAddress
from forebay.sidecar.locks import InUse
from forebay.units import format_size

FORMAT = 1
"""Of the owner file. A marker with another number is somebody newer's: refused."""


_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


State = Literal["clean", "dirty"]


class TakenOver(ForebayError):
    """An image that was ours is so no more: others may have written it, so nothing that we know of it holds."""


NOBODY = ""
"""The gateway of a marker that was left by `forebay takeover`: the next one may take it."""


_NEWER = {"as_of": "", "dirty_since": "", "dirty_bytes": 0}
"""What markers of the first versions do not have."""


@dataclass(frozen=True)
class Owner:
    """What the owner file says."""

    gateway: str
    host: str
    pid: int
    boot_id: str
    disk: str
    since: str
    state: State
    token: int
    as_of: str = ""
    dirty_since: str = ""
    dirty_bytes: int = 0
    format: int = FORMAT

    @classmethod
    def of_this_process(cls, gateway: str, disk: str) -> Self:
        """A new owner: nothing dirty, and no token yet."""
        return cls(
            gateway=gateway,
            host=socket.gethostname(),
            pid=os.getpid(),
            boot_id=_boot_id(),
            disk=disk,
            since=now(),
            state="clean",
            token=0,
        )

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Read an owner file. Raises ValueError."""
        try:
            found = json.loads(text)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError("not an owner file of this version")
        for name, missing in _NEWER.items():
            found.setdefault(name, missing)
        for name in ("gateway", "host", "boot_id", "disk", "since", "as_of", "dirty_since"):
            if not isinstance(found.get(name), str) or not found[name].isprintable():
                raise ValueError(f"'{name}' is not text")
        if found.get("state") not in ("clean", "dirty"):
            raise ValueError("'state' is neither clean nor dirty")
        if not all(isinstance(found.get(name), int) for name in ("pid", "token", "dirty_bytes")):
            raise ValueError("'pid', 'token' or 'dirty_bytes' is not a number")
        return cls(**{name: found[name] for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        """For messages: who, what for, since when."""
        return f"host {self.host} (disk '{self.disk}', {self.state}, since {self.since})"

    @property
    def lacks(self) -> str:
        """What that gateway has and the image has not."""
        some = (
            f"{format_size(self.dirty_bytes)} (at the last count)" if self.dirty_bytes else "data"
        )
        return f"{some} written since {self.dirty_since or self.as_of or self.since} that the image lacks"


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return ""  # a sandbox hides it: the token and the gateway's uuid still decide


# ---------------------------------------------------------------------------------------------------------- messages


def taken_over(image: FileAddress, found: Owner | None) -> TakenOver:
    """`found`: what the marker says now."""
    by = f" by {found}" if found is not None and found.gateway != NOBODY else ""
    return TakenOver(f"{image.key} was taken over{by}")


def in_use(label: str, fault: InUse) -> InUseError:
    """For an image that somebody has open without a gateway."""
    who = ", ".join(fault.by) or "QEMU, or a program like it, on another host or of another user"
    what = "is being written by" if fault.written else "is held unchanged by"
    return InUseError(
        f"{label} {what} {who}: shut that down first", {"program": who, "writes": fault.written}
    )


def held(image: FileAddress, owner: Owner | None) -> InUseError:
    """A gateway serves the image now."""
    lacks = f", with {owner.lacks}" if owner is not None and owner.state == "dirty" else ""
    return InUseError(
        f"{image.key} is in use by {owner or 'another gateway'}{lacks}: detach it there first, "
        "or attach it here with --read-only",
        asdict(owner) if owner else {},
    )


def left_behind(image: FileAddress, owner: Owner) -> InUseError:
    """A gateway does not serve the image now, and did not give it back."""
    if owner.state == "dirty":
        has, then = f"has {owner.lacks}", "gives that data up"
    else:
        has, then = "did not release it", "frees it, and nothing is lost"
    return InUseError(
        f"{image.key} belongs to {owner}, which {has}: detach it there; only if that gateway is "
        f"gone for good, 'forebay takeover {image.key}' {then}",
        asdict(owner),
    )
