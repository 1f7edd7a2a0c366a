# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a request to the control API may carry, checked as the command checks its arguments."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

from forebay.config.fields import PeerRule
from forebay.config.keys import KEYS, RATES
from forebay.doors.tenant import Rule
from forebay.http.messages import HTTPException, Request
from forebay.units import (
    LONGEST_SECONDS,
    Mode,
    did_you_mean,
    parse_duration,
    parse_format,
    parse_name,
    parse_peer,
    parse_preload,
    parse_rate,
    parse_size,
    parse_tag,
)

LONGEST_BODY = 64 << 10
"""Bytes of a request's body. The largest sensible one, an attach, has a few hundred."""

LONGEST_STAGING = 512 << 10
"""The same of a request of staging: 1000 hosts with the longest names, or 64 images with theirs, are 320 KiB."""

LONGEST_LABEL = 512
"""Bytes of a label of a process. Those of domains have 60."""

LONGEST_HOST = 255
"""Characters of the name of a host."""

NO_USER = (1 << 32) - 1
"""The number that no user has."""

Parse = Callable[[Any], Any]
"""Makes of a value, as JSON or the query has it, what it means. Raises ValueError, which says what is accepted."""


def _text(value: Any) -> str:
    """Text that is not empty."""
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"{value!r} is not text: write it in quotes")


def _flag(value: Any) -> bool:
    """True or false: of JSON, or in words, for the query."""
    if isinstance(value, bool):
        return value
    words = {
        "": True,
        "1": True,
        "true": True,
        "yes": True,
        "0": False,
        "false": False,
        "no": False,
    }
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError(f"{value!r} is neither true nor false")


def _names(value: Any) -> list[str]:
    """A list of names of disks."""
    if isinstance(value, list):
        return [parse_name(name) for name in value]
    raise ValueError(f"{value!r} is not a list of names")


MOST_POINTS = 1000
"""Of a chart."""

MOST_PEERS = 1001
"""Hosts that stage together, at most."""

MOST_IMAGES = 1024
"""Images, or tags, that one request may name."""


def _images(value: Any) -> list[str]:
    """A list of images."""
    if isinstance(value, list) and 0 < len(value) <= MOST_IMAGES:
        return [_text(image) for image in value]
    raise ValueError(f"not a list of 1 to {MOST_IMAGES} images")


def _tags(value: Any) -> list[str]:
    """A list of tags."""
    if isinstance(value, list) and 0 < len(value) <= MOST_IMAGES:
        return [parse_tag(tag) for tag in value]
    raise ValueError(f"not a list of 1 to {MOST_IMAGES} tags")


def _peer(value: Any) -> str:
    """Which processes may use a disk."""
    if isinstance(value, str) and value in get_args(PeerRule):
        return str(value)
    raise ValueError(f"{value!r} is unknown: use {', '.join(get_args(PeerRule))}")


def _label(value: Any) -> str:
    """A security label, as SELinux or AppArmor has it."""
    if isinstance(value, str) and re.fullmatch(f"[!-~][ -~]{{0,{LONGEST_LABEL - 1}}}", value):
        return value
    raise ValueError(f"not the label of a process: at most {LONGEST_LABEL} printable characters")


def _uid(value: Any) -> int:
    """The number of a user."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < NO_USER:
        return value
    raise ValueError("not the number of a user")


def _format_saved(value: Any) -> str:
    """The format of an image that is made."""
    if value in ("raw", "qcow2"):
        return str(value)
    raise ValueError(f"{value!r} is neither raw nor qcow2")


def _keep(value: Any) -> str:
    """Whose data is kept in a conflict."""
    if value in ("mine", "image"):
        return str(value)
    raise ValueError(f"{value!r} is neither mine nor image")


def _step(value: Any) -> str:
    """What is done about a handover."""
    if value in ("prepare", "finish", "abort"):
        return str(value)
    raise ValueError(f"{value!r} is neither prepare nor finish nor abort")


def _host(value: Any) -> str:
    """The name of a host."""
    if isinstance(value, str) and 0 < len(value) <= LONGEST_HOST and value.isprintable():
        return value
    raise ValueError(f"not the name of a host: at most {LONGEST_HOST} printable characters")


def _points(value: Any) -> int:
    """How many points of a chart; of the query, so it may be text."""
    text = str(value)
    if re.fullmatch("[0-9]{1,4}", text, re.ASCII) and 0 < int(text) <= MOST_POINTS:
        return int(text)
    raise ValueError(f"{text[:80]!r} is no number of 1 to {MOST_POINTS}")


def _peers(value: Any) -> list[tuple[str, int]]:
    """A list of hosts, each with a port."""
    if not isinstance(value, list) or len(value) > MOST_PEERS:
        raise ValueError(f"not a list of at most {MOST_PEERS} hosts")
    return [parse_peer(_text(one)) for one in value]


_REPORT: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("image", "state"), str),
    "reason": (str, type(None)),
    **dict.fromkeys(("down", "up", "connected"), int),
}


def _reports(value: Any) -> list[dict[str, Any]]:
    """A list of how far orders are."""
    if not isinstance(value, list) or len(value) > MOST_IMAGES:
        raise ValueError(f"not a list of at most {MOST_IMAGES} reports")
    if not all(isinstance(row, dict) and _is_report(row) for row in value):
        raise ValueError(f"not a list of reports, each with {', '.join(_REPORT)}")
    return value


def _serial(value: Any) -> int:
    """A number that an answer had."""
    if type(value) is not int:
        raise ValueError("not a whole number")
    return value


def _is_report(row: dict[str, Any]) -> bool:
    return all(isinstance(row.get(key), kind) for key, kind in _REPORT.items())


ATTACH: dict[str, Parse] = {
    "name": parse_name,
    "image": _text,
    "mode": Mode.parse,
    "cache_size": parse_size,
    "preload": parse_preload,
    **{key: KEYS[key].parse for key in RATES},
    "read_only": _flag,
    "overlay": _flag,
    "keep": _flag,
    "gives_way": _flag,
    "format": parse_format,
    "peer": _peer,
    "peer_label": _label,
    "peer_user": _uid,
    "incoming": _flag,
    "with_data": _flag,
    "patience": parse_duration,
}
HANDOVER: dict[str, Parse] = {
    "step": _step,
    "to": _host,
    "patience": parse_duration,
    "with_data": _flag,
}
EVACUATE: dict[str, Parse] = {"to": _host, "patience": parse_duration}
DETACH: dict[str, Parse] = {"discard": _flag, "force": _flag}
EXTEND: dict[str, Parse] = {"size": parse_size}
FLUSH: dict[str, Parse] = {"timeout": parse_duration}
FLUSH_MANY: dict[str, Parse] = {"names": _names, "timeout": parse_duration}
MODE: dict[str, Parse] = {"mode": Mode.parse}
PEER: dict[str, Parse] = {
    "peer": _peer,
    "peer_label": _label,
    "peer_user": _uid,
    "evict": _flag,
}
RESOLVE: dict[str, Parse] = {"keep": _keep, "yes": _flag}
SAVE: dict[str, Parse] = {
    "to": _text,
    "partial": _flag,
    "format": _format_saved,
    "snapshot": parse_name,
}
PRELOAD: dict[str, Parse] = {"amount": parse_preload}

REVERT: dict[str, Parse] = {"yes": _flag, "force": _flag}
SNAPSHOT: dict[str, Parse] = {"snapshot": parse_name}
ROLLBACK: dict[str, Parse] = {"snapshot": parse_name, "drop_newer": _flag, "force": _flag}


def _count(value: Any) -> int:
    """A whole number that is not negative."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,16}", value, re.ASCII):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**16:
        return value
    raise ValueError(f"{value!r} is no whole number of at most 16 digits")


def _moment(value: Any) -> float:
    """Seconds since 1970."""
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = -1.0
    if 0 <= seconds <= LONGEST_SECONDS:
        return seconds
    raise ValueError(f"{str(value)[:80]!r} is not a number of seconds since 1970")


EVENTS: dict[str, Parse] = {
    "disk": parse_name,
    "since": _moment,
    "after": _count,
    "last": _count,
    "follow": _flag,
}
IMAGES: dict[str, Parse] = {"store": _text}
HISTORY: dict[str, Parse] = {"seconds": parse_duration, "points": _points, "disk": parse_name}
WARM: dict[str, Parse] = {"image": _text, "amount": parse_preload, "rate": parse_rate}
MARK: dict[str, Parse] = {"image": _text}
TRACE: dict[str, Parse] = {"image": _text, "export": _flag}
ORDER: dict[str, Parse] = {
    "image": _text,
    "peers": _peers,
    "source": _flag,
    "rate": parse_rate,
}
REPORT: dict[str, Parse] = {"stages": _reports, "known": _serial}
TAG: dict[str, Parse] = {"image": _text, "tags": _tags}
PURGE: dict[str, Parse] = {
    "images": _images,
    "tag": parse_tag,
    "older_than": parse_duration,
    "dry_run": _flag,
    "traces": _flag,
}


def rule_in(given: Mapping[str, Any]) -> Rule:
    """Which processes may use a disk, as a request says."""
    return Rule(given.get("peer"), given.get("peer_label"), given.get("peer_user"))


async def arguments(
    request: Request,
    known: Mapping[str, Parse],
    required: tuple[str, ...] = (),
    longest: int = LONGEST_BODY,
) -> dict[str, Any]:
    """The keys of the query and of the JSON body, parsed; null counts as absent. Raises HTTPException (400, 413).

    `known` says which keys there may be, `required` which there have to be, `longest` how many bytes the body may have.
    """
    given: dict[str, Any] = dict(request.query_params)
    given |= _object(await request.body(longest))
    parsed = {}
    for key, value in given.items():
        if key not in known:
            raise HTTPException(
                400, f"{key}: unknown{did_you_mean(key, known)}: known are {', '.join(known)}"
            )
        if value is None:
            continue
        try:
            parsed[key] = known[key](value)
        except ValueError as fault:
            raise HTTPException(400, f"{key}: {fault}") from None
    if missing := [key for key in required if key not in parsed]:
        raise HTTPException(400, f"{missing[0]}: is required: send it in a JSON object")
    return parsed


def _object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; empty for none. Raises HTTPException (400)."""
    if not body.strip():
        return {}
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise HTTPException(400, 'the request is not a JSON object: send {"key": value, ...}')
    return found
