# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What can be set of one disk while its VM runs: the table KEYS, one row for each key.

A key has a field of that name in `DiskSettings` and in `Store` (forebay.config.model), where its default and its
meaning stand. With a row here it can be set, is on record of the disk, comes back after a restart, and is listed, with
where its value comes from. What a change does to a disk that is served: `Disk.adopt`.

The command imports this on each `forebay set`, so nothing here imports pydantic.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from forebay.units import (
    Mode,
    did_you_mean,
    parse_bps,
    parse_duration,
    parse_preload,
    parse_requests,
    parse_size,
    parse_weight,
)

LONGEST_VALUE = 64
"""Characters of a value, and of what an error shows of a key."""


class Key(NamedTuple):
    """One row."""

    parse: Callable[[Any], Any]
    """Makes of what an operator wrote, or of a number, what is kept on record: plain JSON. Raises ValueError."""
    what: str
    """For `forebay set --help`."""


def _duration(value: Any) -> float:
    """Seconds, more than none. Raises ValueError."""
    seconds = parse_duration(value)
    if seconds <= 0:
        raise ValueError("must be more than zero: write 30s, 500ms or 2m")
    return seconds


def _mode(value: Any) -> str:
    return Mode.parse(value).value


KEYS: dict[str, Key] = {
    "mode": Key(_mode, "how the disk reads and writes"),
    "cache_size": Key(parse_size, "most that it may hold of the cache; 0: no limit"),
    "preload": Key(parse_preload, "what the next start, or boot, brings in"),
    "max_lag": Key(_duration, "age at which dirty data is written back"),
    "max_dirty": Key(parse_size, "how much may be dirty"),
    "slow": Key(parse_duration, "from how long on a request is told of in the log; 0: none is"),
    "origin_timeout": Key(_duration, "after how long an image that does not answer is an error"),
    "iops": Key(parse_requests, "requests a second that its clients may make; 0: no limit"),
    "bps": Key(parse_bps, "bytes a second that they may read and write; 0: no limit"),
    "iops_burst": Key(parse_requests, "requests that may pass at once after a rest; 0: a tenth"),
    "bps_burst": Key(parse_size, "bytes, likewise; 0: a tenth"),
    "weight": Key(parse_weight, "what it gets beside others where requests wait, 1 to 10000"),
}

RATES = ("iops", "bps", "iops_burst", "bps_burst", "weight")
"""Of these, how fast the disk may be used, alone and beside others: an attach may say it, too."""

ELSEWHERE = {
    "peer": "is set with 'forebay peer'",
    "on_change": "is set in the configuration, for a store or in [defaults]",
    "require_locks": "is set in the configuration, for a store or in [defaults]",
    "with_data": "is set in the configuration, for a store or in [defaults]",
}
"""Settings of a disk that are listed with the others, and not set like them."""


def listed() -> list[str]:
    """All settings that are told of a disk."""
    return [*KEYS, *ELSEWHERE]


def check_key(key: str) -> None:
    """Raise ValueError where that cannot be set."""
    if key in ELSEWHERE:
        raise ValueError(f"{key} {ELSEWHERE[key]}")
    if key not in KEYS:
        hint = did_you_mean(key, KEYS)
        raise ValueError(f"no setting {key[:LONGEST_VALUE]!r}{hint}: there are {', '.join(KEYS)}")


def parse_change(key: str, value: Any) -> Any:
    """What is to be on record of that key; None for an empty value: what the store says, or [defaults]. Raises
    ValueError.
    """
    check_key(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str | int | float) or len(str(value)) > LONGEST_VALUE:
        raise ValueError(
            f"{key}: neither a number nor a text of at most {LONGEST_VALUE} characters"
        )
    try:
        return KEYS[key].parse(value)
    except ValueError as fault:
        raise ValueError(f"{key}: {fault}") from None


def parse_changes(words: Iterable[str]) -> dict[str, Any]:
    """The changes of KEY=VALUE, each key once. Raises ValueError."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word[:LONGEST_VALUE]!r} is no KEY=VALUE: write max_lag=10s")
        if key in found:
            raise ValueError(f"{key} is there twice: give it once")
        found[key] = parse_change(key, value)
    return found
