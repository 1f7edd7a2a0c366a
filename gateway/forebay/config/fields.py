# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The kinds of value that a field of the configuration can have, each with what is accepted and how it is written.

A value that is refused raises ValueError with a text that says what is wrong, and what to write instead.
"""

import grp
import os
import pwd
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

from forebay.units import (
    Mode,
    did_you_mean,
    exact_duration,
    exact_size,
    listen_text,
    parse_bps,
    parse_duration,
    parse_host,
    parse_listen,
    parse_name,
    parse_preload,
    parse_requests,
    parse_size,
    parse_weight,
)

KVM = "kvm"
"""The default group of sockets: QEMU runs in it on Debian and Fedora."""

DOORS = "forebay-doors"
"""The default group of programs that may use a disk beside its VM."""


def _absolute(path: Path) -> Path:
    """An absolute path, without `..` and the like."""
    if not path.is_absolute():
        raise ValueError(f"'{path}' is not an absolute path: begin it with /")
    return Path(os.path.normpath(path))


def _octal(value: object) -> int:
    """A file mode written in octal, as text."""
    if isinstance(value, str) and 3 <= len(value) <= 4 and not value.strip("01234567"):
        return int(value, 8)
    raise ValueError(f'{value!r} is not a file mode: write it in octal and in quotes, as "0660"')


def _known_user(name: str) -> str:
    """The name of a user of this host."""
    try:
        pwd.getpwnam(name)
    except KeyError:
        hint = did_you_mean(name, (user.pw_name for user in pwd.getpwall()))
        raise ValueError(
            f"no user '{name}' on this host{hint}: create it, or leave the key out"
        ) from None
    return name


def _known_group(name: str) -> str:
    """The name of a group of this host."""
    try:
        grp.getgrnam(name)
    except KeyError:
        hint = did_you_mean(name, (group.gr_name for group in grp.getgrall()))
        raise ValueError(
            f"no group '{name}' on this host{hint}: create it, or leave the key out"
        ) from None
    return name


def socket_group(name: str) -> str | None:
    """A group of this host. KVM and DOORS may be missing, written or not, and are None then: a file fits all hosts."""
    try:
        return _known_group(name)
    except ValueError:
        if name not in (KVM, DOORS):
            raise
        return None


def _known_peer(name: str) -> str:
    """The name of a user, or of a group with an @ in front."""
    return f"@{_known_group(name[1:])}" if name.startswith("@") else _known_user(name)


def _store_name(text: str) -> str:
    """The name of a store, which stands before the colon of an image."""
    if parse_name(text).lower() == "nbd":
        raise ValueError("'nbd' cannot name a store, nbd: begins a URI: rename it")
    return text


def _above_zero(value: float) -> float:
    """A duration of more than 0 seconds."""
    if value <= 0:
        raise ValueError("must be more than zero: write 30s, 500ms or 2m")
    return value


def _preload_text(value: int | str) -> str:
    """As it is written in the file."""
    return value if isinstance(value, str) else exact_size(value)


def _address(text: str) -> str:
    """An IP address."""
    try:
        return str(ip_address(text))
    except ValueError:
        raise ValueError(f"'{text}' is no IP address: write it as 192.0.2.7") from None


def _port(number: int) -> int:
    """The number of a port."""
    if not 0 < number < 1 << 16:
        raise ValueError(f"{number} is no port: use 1 to 65535")
    return number


Size = Annotated[int, BeforeValidator(parse_size), PlainSerializer(exact_size, when_used="json")]
BytesPerSecond = Annotated[
    int, BeforeValidator(parse_bps), PlainSerializer(exact_size, when_used="json")
]
Requests = Annotated[int, BeforeValidator(parse_requests)]
Weight = Annotated[int, BeforeValidator(parse_weight)]
Preload = Annotated[
    int | str, BeforeValidator(parse_preload), PlainSerializer(_preload_text, when_used="json")
]
Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    AfterValidator(_above_zero),
    PlainSerializer(exact_duration, when_used="json"),
]
DurationOrNever = Annotated[
    float, BeforeValidator(parse_duration), PlainSerializer(exact_duration, when_used="json")
]
"""0 stands for never."""
Listen = Annotated[
    tuple[str, int], BeforeValidator(parse_listen), PlainSerializer(listen_text, when_used="json")
]
HostName = Annotated[str, AfterValidator(parse_host)]
StoreName = Annotated[str, AfterValidator(_store_name)]
ModeName = Annotated[Mode, BeforeValidator(Mode.parse)]
Directory = Annotated[Path, AfterValidator(_absolute)]
FileMode = Annotated[
    int, BeforeValidator(_octal), PlainSerializer(lambda mode: f"{mode:04o}", when_used="json")
]
ListenAddress = Annotated[str, AfterValidator(_address)]
Port = Annotated[int, AfterValidator(_port)]
OnChange = Literal["refresh", "refuse"]
PeerRule = Literal["first", "label", "any"]
User = Annotated[str, AfterValidator(_known_user)]
Group = Annotated[str, AfterValidator(_known_group)]
SocketGroup = Annotated[str, AfterValidator(socket_group)]
SocketPeer = Annotated[str, AfterValidator(_known_peer)]
