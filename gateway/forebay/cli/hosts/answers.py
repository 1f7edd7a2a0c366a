# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What hosts answer, as far as it makes sense: another host's text is not to be trusted with memory or a terminal."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from forebay.cli.hosts.ssh import Ended
from forebay.units import format_duration, printable

T = TypeVar("T")
Told = dict[str, Any]

OFF, HANGS, FAULT, DOWN = "off", "hangs", "error", "down"
"""States of a host beside those that a daemon tells: nobody there; no answer in time; an answer that is none; no
daemon."""

LONGEST_TEXT = 300
"""Characters of a reason."""
LONGEST_IMAGE = 4300
"""Characters of an image: a store's name and the longest path."""
LONGEST_WORD = 64
"""Characters of a state, a version, a mode, a name."""
MOST_ROWS = 10_000
"""Disks, or images, of one host."""
MOST_NUMBER = (1 << 63) - 1
SSH_FAILED = 255
NOT_FOUND = 127

_UNREACHED = ("ssh: connect to host ", "connect failed: ")
"""What ssh says, itself or for a host on the way, where nobody answers at that address."""


class StrangeAnswer(Exception):
    """What answers is not what was asked for."""


def trouble(ended: Ended, timeout: float | None) -> tuple[str, str]:
    """State and reason of a host whose answer does not count."""
    said = last_line(ended.err)
    if ended.late:
        return HANGS, f"no answer within {format_duration(timeout or 0)}"
    if ended.long:
        return FAULT, "says more than a Forebay daemon has to say"
    if ended.code == SSH_FAILED:
        return (OFF if any(what in ended.err for what in _UNREACHED) else FAULT), said
    if ended.code == NOT_FOUND:
        return FAULT, "no command 'forebay' there: install it, and have it in PATH for ssh"
    if ended.code < 0:
        return FAULT, f"ssh was ended by signal {-ended.code}"
    return FAULT, said.removeprefix("forebay: ")


def last_line(text: str) -> str:
    """The last line that says something, fit for a terminal."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable(lines[-1][:LONGEST_TEXT]) if lines else "failed, and did not say why"


def decoded(data: bytes, check: Callable[[Any], T]) -> T:
    """What the JSON text means, by `check`. Raises StrangeAnswer."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise StrangeAnswer("answers no JSON") from None
    return check(found)


def summary(found: Any) -> Told:
    """The summary of a host, and nothing else. Raises StrangeAnswer."""
    told = _object(found)
    cache = _object(told.get("cache", {}))
    return {
        "version": word(told, "version"),
        "state": word(told, "state"),
        "reasons": [_text(one) for one in _list(told, "reasons")[:16]],
        "cache": {key: number(cache, key) for key in ("size", "used_bytes", "private_bytes")},
        "hit_percent": None if told.get("hit_percent") is None else number(told, "hit_percent"),
        **{key: number(told, key) for key in ("disk_count", "dirty_bytes", "lag_seconds")},
        "stores": [_store(_object(one)) for one in _list(told, "stores")],
        "images": [_image(_object(one)) for one in _list(told, "images")],
    }


def _store(one: Mapping[str, Any]) -> Told:
    reason = one.get("reason")
    return {
        "store": word(one, "store"),
        "state": word(one, "state"),
        "reason": None if reason is None else _text(reason),
    }


def _image(one: Mapping[str, Any]) -> Told:
    return {
        "image": word(one, "image", LONGEST_IMAGE),
        "size": number(one, "size"),
        "cached_bytes": number(one, "cached_bytes"),
    }


def disks(found: Any) -> list[Told]:
    """The status of the disks of a host, as far as the table needs it. Raises StrangeAnswer."""
    return [_disk(_object(one)) for one in _rows(found)]


_OF_A_DISK = (
    *("size", "cached_bytes", "dirty_bytes", "lag_seconds"),
    *("read_hits", "read_misses", "clients"),
)


def _disk(one: Mapping[str, Any]) -> Told:
    reason = one.get("reason")
    return {
        "name": word(one, "name"),
        "image": word(one, "image", LONGEST_IMAGE),
        "mode": word(one, "mode"),
        "state": word(one, "state"),
        "reason": None if reason is None else _text(reason),
        "overlay": one.get("overlay") is True,
        "read_only": one.get("read_only") is True,
        **{key: number(one, key) for key in _OF_A_DISK},
    }


def numbers_of(keys: Iterable[str]) -> Callable[[Any], Told]:
    """A check of an object that has these numbers."""
    return lambda found: {key: number(_object(found), key) for key in keys}


def number(found: Mapping[str, Any], key: str) -> float:
    """A number that an amount can be; 0 where there is none. Raises StrangeAnswer."""
    value = found.get(key, 0)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < MOST_NUMBER:
        return value
    raise StrangeAnswer(f"answers with a '{key}' that cannot be")


def word(found: Mapping[str, Any], key: str, longest: int = LONGEST_WORD) -> str:
    """Text of a bounded length. Raises StrangeAnswer."""
    value = found.get(key, "")
    if isinstance(value, str) and len(value) <= longest:
        return value
    raise StrangeAnswer(f"answers with a '{key}' that cannot be")


def _text(value: Any) -> str:
    """What a host says to people, cut where it is long. Raises StrangeAnswer."""
    if isinstance(value, str):
        return value[:LONGEST_TEXT]
    raise StrangeAnswer("answers with a reason that is no text")


def _object(found: Any) -> Mapping[str, Any]:
    if isinstance(found, dict):
        return found
    raise StrangeAnswer("answers no object")


def _list(found: Mapping[str, Any], key: str) -> list[Any]:
    return _rows(found.get(key, []))


def _rows(found: Any) -> list[Any]:
    if isinstance(found, list) and len(found) <= MOST_ROWS:
        return found
    raise StrangeAnswer("answers with a list that cannot be")
