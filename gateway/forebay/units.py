# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What operators write in a field, and what it means: sizes, durations, modes, disk names.

Cheap to import, because the command validates its arguments with it on every call. Every `parse_`
function takes what a person wrote and raises `ValueError` with a text that says what is accepted.
"""

import enum
import re
from collections.abc import Iterable

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_UNITS = "KMGTPE"
# texts, compiled when they are needed: compiling all of them takes 2 ms of each start of the command
_SIZE = r"(\d{1,24})(?:\.(\d{1,12}))?\s*(?:B|([KMGTPE])(iB)?)?"
_DECIMAL_UNIT = r"[\d.]+\s*([KMGTPE])B"
_DURATION = r"(\d{1,12})(?:\.(\d{1,12}))?\s*(ms|s|m|min|h|d)?"
LONGEST_SECONDS = 1e17
"""A duration in words, of at most twelve digits, is shorter."""
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_USER = r"[A-Za-z_][A-Za-z0-9._-]{0,63}"
_HOST = rf"(?:{_USER}@)?(?:[A-Za-z0-9_][A-Za-z0-9._-]{{0,252}}|[0-9A-Fa-f:]{{2,45}}(?:%[A-Za-z0-9._-]{{1,15}})?)"
_LOOSELY = re.IGNORECASE | re.ASCII

_MILLISECONDS = {
    "ms": 1,
    "s": 1000,
    "m": 60_000,
    "min": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
}

LOWEST_RATE = 64 * 1024
"""Bytes a second: what is brought in comes a megabyte at a time."""

LAG_TIMES = 2
"""A disk lags that is so many times `max_lag` behind: a checkpoint begins at half of it, and takes its time."""

HEALTHY = ("ready", "copying", "incoming", "handed-over")
"""States of a disk that need no look, those of a VM that moves among them."""

LARGEST_SIZE = (1 << 63) - 1
"""Bytes. NBD and lseek count in signed 64 bits; a larger number is a typing error."""


class Mode(enum.StrEnum):
    """How a disk reads and writes: design section 1. The value is the form that is printed."""

    NONE = "none"
    WRITE_AROUND = "write-around"
    WRITE_THROUGH = "write-through"
    WRITE_BACK = "write-back"
    FULL_COPY = "full-copy"

    @classmethod
    def parse(cls, text: object) -> "Mode":
        """The mode with this name, in any case. OpenNebula's names and `wt wb wa pt` are accepted, too.

        Raises ValueError that lists the modes.
        """
        word = text.strip().lower().replace("_", "-") if isinstance(text, str) else ""
        found = _MODES.get(word)
        if found is None:
            hint = did_you_mean(word, _MODES)
            raise ValueError(f"{text!r} is not a mode{hint}: use one of {', '.join(Mode)}")
        return found


_MODES = {mode.value: mode for mode in Mode} | {
    "around": Mode.WRITE_AROUND,
    "thru": Mode.WRITE_THROUGH,
    "back": Mode.WRITE_BACK,
    "offline": Mode.FULL_COPY,
    "pt": Mode.NONE,
    "wa": Mode.WRITE_AROUND,
    "wt": Mode.WRITE_THROUGH,
    "wb": Mode.WRITE_BACK,
}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known word nearest to `word`, or an empty text."""
    import difflib  # noqa: PLC0415  (only for a message, and the command starts on every hook)

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def parse_name(text: object) -> str:
    """A disk's name, unchanged. Raises ValueError."""
    if isinstance(text, str) and re.fullmatch(_NAME, text):
        return text
    raise ValueError(
        f"{text!r} is not a name: use 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit"
    )


def parse_tag(text: object) -> str:
    """A tag of an image, unchanged. Raises ValueError."""
    if isinstance(text, str) and re.fullmatch(_NAME, text):
        return text
    raise ValueError(
        f"{str(text)[:80]!r} is not a tag: use 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit"
    )


def parse_host(text: object) -> str:
    """A host as ssh takes it, unchanged: a name, an IPv4 or IPv6 address, with `USER@` in front where that is wanted.

    It never begins with a dash, which ssh would take for an option. Raises ValueError.
    """
    if isinstance(text, str) and re.fullmatch(_HOST, text):
        return text
    raise ValueError(
        f"{str(text)[:80]!r} is no host: write NAME or USER@NAME, with A-Z a-z 0-9 . _ - (an address may have : and %)"
    )


def parse_listen(text: object) -> tuple[str, int]:
    """Where to listen, as "ADDRESS:PORT" or "[ADDRESS]:PORT": a numeric address and a port. Raises ValueError."""
    import ipaddress  # noqa: PLC0415  (3 ms, which each command would wait for)

    if isinstance(text, tuple):
        return text
    given, _, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    bare = given[1:-1] if given.startswith("[") and given.endswith("]") else given
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        address = None
    is_written_right = address is not None and (address.version == 6) == (bare != given)
    if is_written_right and re.fullmatch("[0-9]{1,5}", port, re.ASCII) and 0 < int(port) < 1 << 16:
        return str(address), int(port)
    raise ValueError(
        f"{str(text)[:80]!r} is no address and port: write 127.0.0.1:9788, [::1]:9788, or 0.0.0.0:9788 for all"
    )


def listen_text(where: tuple[str, int]) -> str:
    """As `parse_listen` takes it."""
    address, port = where
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx")
"""That an image may be attached in."""


def parse_format(text: object) -> str:
    """How an image is to be read: `raw`, unchanged, or the format of the disk in it. Raises ValueError."""
    if isinstance(text, str) and text in FORMATS:
        return text
    raise ValueError(
        f"{str(text)[:80]!r} is no format that can be asked for: use {', '.join(FORMATS)}"
    )


def parse_rate(text: str | int) -> int:
    """Bytes a second, written as a size: `100M`. Raises ValueError."""
    rate = parse_size(text)
    if rate < LOWEST_RATE:
        raise ValueError(f"{text!r} is too slow: use at least {exact_size(LOWEST_RATE)} a second")
    return rate


MOST_REQUESTS = 1_000_000_000
"""A second, or at once: more than any host serves."""

MOST_WEIGHT = 10_000


def parse_requests(text: str | int) -> int:
    """How many requests, 0 for no limit. Raises ValueError."""
    given = text.strip() if isinstance(text, str) else text
    if isinstance(given, str) and given.isascii() and given.isdigit() and len(given) < 20:
        given = int(given)
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given <= MOST_REQUESTS:
        return given
    raise ValueError(
        f"{str(text)[:80]!r} is no number of requests: write a whole number up to {MOST_REQUESTS}, 0 for no limit"
    )


def parse_weight(text: str | int) -> int:
    """What a disk gets beside others. Raises ValueError."""
    given = text.strip() if isinstance(text, str) else text
    if isinstance(given, str) and given.isascii() and given.isdigit() and len(given) < 20:
        given = int(given)
    if isinstance(given, int) and not isinstance(given, bool) and 1 <= given <= MOST_WEIGHT:
        return given
    raise ValueError(
        f"{str(text)[:80]!r} is no weight: write a whole number from 1 to {MOST_WEIGHT}; disks have 100 by default"
    )


def parse_bps(text: str | int) -> int:
    """Bytes a second, written as a size: `100M`; 0 for no limit. Raises ValueError."""
    return parse_rate(text) if (size := parse_size(text)) else size


def parse_size(text: str | int) -> int:
    """Bytes, from `64K`, `20 GiB`, `1.5G` (binary units) or a bare number of bytes.

    A fraction of a byte is dropped. Raises ValueError.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return _size_in_range(text, str(text))
    match = re.fullmatch(_SIZE, text.strip(), _LOOSELY) if isinstance(text, str) else None
    if match is None:
        raise ValueError(_not_a_size(text))
    whole, fraction, unit, _ = match.groups(default="")
    power = _UNITS.index(unit.upper()) + 1 if unit else 0
    size = int(whole + fraction) * (1 << (10 * power)) // 10 ** len(fraction)
    return _size_in_range(size, str(text))


def _size_in_range(size: int, text: str) -> int:
    """`size`, written as `text`, if there can be such a size. Raises ValueError."""
    if 0 <= size <= LARGEST_SIZE:
        return size
    raise ValueError(f"'{text}' is out of range: a size lies between 0 and 8 EiB")


def _not_a_size(text: object) -> str:
    """What is wrong with a text that is no size."""
    decimal = re.fullmatch(_DECIMAL_UNIT, text.strip(), _LOOSELY) if isinstance(text, str) else None
    if decimal:
        unit = decimal.group(1).upper()
        return (
            f"{text!r} is not a size: units are binary, write {unit} or {unit}iB instead of {unit}B"
        )
    return f"{text!r} is not a size: write 64K, 20 GiB, 1.5G, or a number of bytes"


def parse_preload(text: str | int) -> int | str:
    """How much to preload: bytes (see `parse_size`), `trace` or `all`. Raises ValueError."""
    if isinstance(text, str) and text.strip().lower() in ("trace", "all"):
        return text.strip().lower()
    try:
        return parse_size(text)
    except ValueError as fault:
        raise ValueError(f"{fault}, or 'trace' or 'all'") from None


def parse_duration(text: str | float) -> float:
    """Seconds, from `30s`, `500ms`, `2m`, `1h`, `1d` or a bare number of seconds. Raises ValueError."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        if 0 <= text <= LONGEST_SECONDS:  # no integer that is too large for a float
            return float(text)
        raise ValueError(f"{text!r} is not a duration: write 30s, 500ms or 2m")
    match = re.fullmatch(_DURATION, text.strip(), _LOOSELY) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} is not a duration: write 30s, 500ms or 2m")
    whole, fraction, unit = match.groups(default="")
    milliseconds = int(whole + fraction) * _MILLISECONDS[unit.lower() or "s"]
    scale: int = 10 ** (len(fraction) + 3)
    return milliseconds / scale


def exact_size(size: int) -> str:
    """The shortest text that `parse_size` reads back as exactly `size` bytes: `20 GiB`, `1536 MiB`, `4097`."""
    for power in range(len(_UNITS), 0, -1):
        if size and size % (1 << (10 * power)) == 0:
            return f"{size >> (10 * power)} {_UNITS[power - 1]}iB"
    return str(size)


def exact_duration(seconds: float) -> str:
    """A text that `parse_duration` reads back as exactly `seconds`: `30s`, `0.25s`."""
    return f"{seconds:.12f}".rstrip("0").rstrip(".") + "s"


def format_size(size: float) -> str:
    """For people, at most five characters wide where it can be: `512`, `4.0K`, `20G`, `1.5T`."""
    if size < KIB:
        return f"{size:.0f}"
    for unit in _UNITS:
        size /= KIB
        if size < 9.95:
            return f"{size:.1f}{unit}"
        if size < 1023.5:
            return f"{size:.0f}{unit}"
    return f"{size:.0f}{_UNITS[-1]}"


def format_duration(seconds: float) -> str:
    """For people: `0s`, `250ms`, `1.2s`, `45s`, `2m05s`, `3h20m`, `2d04h`."""
    if 0 < seconds < 0.9995:
        return f"{max(1, round(seconds * 1000))}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s" if seconds else "0s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_latency(seconds: float) -> str:
    """A time in at most five characters: `12us`, `1.2ms`, `85ms`, `3.2s`, `2m`."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f}us"
    if seconds < 0.9995:
        milliseconds = seconds * 1e3
        return f"{milliseconds:.1f}ms" if milliseconds < 9.95 else f"{milliseconds:.0f}ms"
    if seconds < 99.5:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}m"


def natural(text: str) -> tuple[list[tuple[bool, int, str]], str]:
    """What to sort names by, so that `vm10` comes behind `vm9`: numbers in them count as such, before other text."""
    return [_part(part) for part in re.findall(r"[0-9]+|[^0-9]+", text)], text


def _part(text: str) -> tuple[bool, int, str]:
    """Of digits, or of none. Digits are compared as text: there may be more of them than Python makes a number of."""
    if text[0] not in "0123456789":
        return True, 0, text
    digits = text.lstrip("0")
    return False, len(digits), digits


def printable(text: str) -> str:
    """The text with every character that a terminal would act on, or cannot show, written as an escape.

    What others wrote (names of images, the owner of a marker, a daemon's answers) is not to move the cursor.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


STAGING_PORT = 10881
"""Where the stagers of other hosts are reached, unless something else is said."""

_LONGEST_HOST = 253
"""Characters of a name (RFC 1035)."""


def parse_peer(text: str) -> tuple[str, int]:
    """Host and port of `host`, `host:port` or `[address]:port`. Raises ValueError; also for what begins with a dash."""
    has_port = text.count(":") == 1 or "]:" in text
    host, _, port = text.rpartition(":") if has_port else (text, "", "")
    host = host.removeprefix("[").removesuffix("]")
    plain = re.sub("[-._:]", "", host)
    if not 0 < len(host) <= _LONGEST_HOST or not (plain.isascii() and plain.isalnum()):
        raise ValueError(f"{text[:64]!r} is not the name or the address of a host")
    if host[0] in "-.":
        raise ValueError(f"{text[:64]!r} is not the name of a host: it begins with {host[0]}")
    if not has_port:
        return host, STAGING_PORT
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 1 << 16):
        raise ValueError(f"{text[:64]!r}: a port is a number from 1 to 65535")
    return host, int(port)
