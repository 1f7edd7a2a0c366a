# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The kinds of events, and the keys that an event may have. docs/events.md has the same tables."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """One kind of event."""

    message_id: str
    """Under which journald has it: 32 hexadecimal digits, the same for ever."""
    what: str
    """What has happened then, in a few words."""
    is_frequent: bool = False
    """True for what comes by itself and often: it must not drive out what is rare."""
    is_logged: bool = True
    """Whether the log has a line for each."""
    burst: int = 20
    """So many of one disk are told at once, and after that one in PAUSE_SECONDS."""


PAUSE_SECONDS = 5.0
"""Between two events of one kind and one disk, once there were too many at once."""

KINDS: dict[str, Kind] = {
    "start": Kind("24e99e565688481fbcebe3aa6a18ff37", "the daemon serves"),
    "stop": Kind("456ec635289f4022be6fcc682022a734", "the daemon ends"),
    "restart": Kind(
        "a8fe16bc556247b987ffa4ddd9258cf3", "the daemon leaves its clients to the next process"
    ),
    "attach": Kind("71afcd68fdd744299d6fc2a08148f132", "a disk was attached"),
    "detach": Kind("ce6f69b27e4645e1833a60bc90a5a565", "a disk was detached"),
    "mode": Kind("d80b4b6f192b45db8d3e2f9af4c63ed6", "the mode of a disk was changed"),
    "setting": Kind("cf6e7cf0793c493aa9104a01f7ab6125", "another setting of a disk was changed"),
    "config": Kind(
        "a8ac5a7f98414a0f8d7c9523b3574019", "the configuration was taken anew, or refused"
    ),
    "state": Kind("229635ad76054a59a17879942f451cc2", "a disk is in another state"),
    "conflict": Kind("68ddc243eede490c9baa835dc369eb91", "a disk is in conflict"),
    "resolve": Kind("2686223a858946e3a0140bff7fab3503", "a conflict was resolved"),
    "pass": Kind("c3cdd4e8755d463299353f2e3d5cfe0f", "writing back failed, or goes again"),
    "checkpoint": Kind(
        "e9c0bcf463be449bb1f26546d045f620",
        "the image has a later point in time",
        is_frequent=True,
        is_logged=False,
        burst=60,
    ),
    "client": Kind("d698c8cc04204819bc498f40db55742b", "a client came, or went", is_frequent=True),
    "slow": Kind(
        "5d1a0c8e4b7f4f62a3be9d7c60f2e418",
        "a request took longer than the setting slow",
        is_frequent=True,
    ),
    "handover": Kind(
        "ac8f685c7b1049289348752ebb1f45c7", "an image goes to another host, or comes from one"
    ),
    "command": Kind(
        "863a5e41850a459aa72c877fbedc3792",
        "somebody has asked for a change",
        is_frequent=True,
        burst=500,
    ),
}

KEYS: dict[str, type] = {
    "id": int,
    "time": float,
    "kind": str,
    "disk": str,
    "image": str,
    "store": str,
    "state": str,
    "text": str,
    "was": str,
    "now": str,
    "action": str,
    "ok": bool,
    "asked_uid": int,
    "asked_pid": int,
    "client_uid": int,
    "client_pid": int,
    "written_bytes": int,
    "took_seconds": float,
    "untold": int,
}
"""Of an event, with the kind of their values. The first eight are always there."""

ALWAYS = tuple(KEYS)[:8]

LONGEST_TEXT = 1000
"""Characters of a value."""

LARGEST = (1 << 53) - 1
"""Of whole numbers: every reader of JSON has them exactly."""


def checked(found: Any) -> dict[str, Any] | None:
    """An event as it was read from somewhere, without what cannot be in one; None if it is none."""
    if not isinstance(found, dict):
        return None
    event = {key: value for key, value in found.items() if _may_be(key, value)}
    return event if all(key in event for key in ALWAYS) and event["id"] > 0 else None


def _may_be(key: Any, value: Any) -> bool:
    """True if an event may have that value under that key."""
    kind = KEYS.get(key) if isinstance(key, str) else None
    if kind is str:
        return isinstance(value, str) and len(value) <= LONGEST_TEXT
    if kind is bool:
        return isinstance(value, bool)
    is_number = isinstance(value, int) or (kind is float and isinstance(value, float))
    return kind is not None and is_number and not isinstance(value, bool) and 0 <= value <= LARGEST
