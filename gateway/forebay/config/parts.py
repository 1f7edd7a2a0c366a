# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The files that a configuration is made of: the one that is named, and `conf.d/*.toml` beside it.

They are merged table by table, in the order of their names, the named one first: where a key is in two of them, the
later one holds. A list is one value, as any other.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence

from forebay.errors import ConfigError

TYPE_CHECKING = False  # `typing` takes 3 ms, on each start of the command
if TYPE_CHECKING:
    from typing import Any

FOLDER = "conf.d"
"""Beside the file."""

MOST_PARTS = 1000
"""Files in it. More are no configuration that anybody wrote."""

LONGEST = 16 << 20
"""Bytes of one file."""

_UNQUOTED = ("Expected newline or end of document", "Invalid value")
"""How tomllib's messages begin where somebody wrote `size = 20 GiB` or `mode = write-back`."""


class Part:
    """One file."""

    __slots__ = ("data", "path", "text")

    def __init__(self, path: str, text: str, data: Mapping[str, Any]) -> None:
        self.path = path
        self.text = text
        self.data = data


class Merged:
    """All of them together."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.data: dict[str, Any] = {}
        self.doubled: list[str] = []
        """One line for each key that is in two files."""

    def part_of(self, keys: Sequence[str]) -> Part | None:
        """The file that has a key, the last one of several; else the last one that has the most of the tables above it.
        None where there is no file.
        """
        best, depth = None, -1
        for part in self.parts:
            if (found := _depth(part.data, keys)) >= depth:
                best, depth = part, found
        return best


def _depth(data: Any, keys: Sequence[str]) -> int:
    """How many of the keys, from the outermost on, lead somewhere."""
    for n, key in enumerate(keys):
        if not isinstance(data, Mapping) or key not in data:
            return n
        data = data[key]
    return len(keys)


def paths_beside(path: str) -> list[str]:
    """The files of FOLDER beside that path, in the order in which they count. Raises ConfigError."""
    folder = os.path.join(os.path.dirname(path), FOLDER)
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as fault:
        raise ConfigError(
            [f"{folder}: cannot be read: {fault.strerror}: check the folder and its permissions"]
        ) from None
    found = sorted(name for name in names if name.endswith(".toml") and name[0] != ".")
    if len(found) > MOST_PARTS:
        raise ConfigError([f"{folder}: {len(found)} files: use at most {MOST_PARTS}"])
    return [os.path.join(folder, name) for name in found]


def merged(paths: Sequence[str]) -> Merged:
    """What these files say together. Raises ConfigError, with the faults of all files that cannot be read."""
    found, faults = Merged(), list[str]()
    for path in paths:
        try:
            found.parts.append(Part(path, *read_toml(path)))
        except ConfigError as fault:
            faults += str(fault).splitlines()
    if faults:
        raise ConfigError(faults)
    for part in found.parts:
        _merge(found, found.data, part, part.data, ())
    return found


def _merge(
    found: Merged,
    into: dict[str, Any],
    part: Part,
    data: Mapping[str, Any],
    above: tuple[str, ...],
) -> None:
    for key, value in data.items():
        there, keys = into.get(key), (*above, key)
        if isinstance(value, dict) and (there is None or isinstance(there, dict)):
            _merge(found, into.setdefault(key, {}), part, value, keys)
            continue
        if key in into:
            before = [
                x.path for x in _before(found.parts, part) if _depth(x.data, keys) == len(keys)
            ]
            found.doubled.append(
                f"{part.path}: {'.'.join(keys)}: is in {before[-1]} as well: this one holds"
            )
        into[key] = value


def _before(parts: Sequence[Part], part: Part) -> Iterator[Part]:
    for one in parts:
        if one is part:
            return
        yield one


def read_toml(path: str) -> tuple[str, dict[str, Any]]:
    """The text of the file, and what it holds. Raises ConfigError when it cannot be read or is not TOML."""
    try:
        text = content_of(path).decode()
    except FileNotFoundError:
        raise ConfigError(
            [f"{path}: no such file: create it, or name another with --config or FOREBAY_CONFIG"]
        ) from None
    except OSError as fault:
        raise ConfigError(
            [f"{path}: cannot be read: {fault.strerror}: check the file and its permissions"]
        ) from None
    except UnicodeDecodeError as fault:
        raise ConfigError(
            [f"{path}: not UTF-8 text (byte {fault.start}): save it as UTF-8"]
        ) from None
    import tomllib  # noqa: PLC0415  (not where there is no file)

    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise ConfigError([_syntax_fault(path, text, str(fault))]) from None
    except RecursionError:
        raise ConfigError([f"{path}: nested too deeply: no configuration is"]) from None


def content_of(path: str) -> bytes:
    """What is in a file of a configuration. Raises OSError, and ConfigError for what is none, or too long."""
    with open(path, "rb", opener=_open) as file:
        found = file.read(LONGEST + 1)
    if len(found) > LONGEST:
        raise ConfigError([f"{path}: longer than {LONGEST >> 20} MiB: no configuration is"])
    return found


def _open(path: str, flags: int) -> int:
    """A descriptor. What lies in FOLDER has to be a plain file: others may have us wait for ever, here or for data."""
    if os.path.basename(os.path.dirname(path)) != FOLDER:
        return os.open(path, flags)
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError([f"{path}: is no plain file: remove it"])
    return fd


def _syntax_fault(path: str, text: str, fault: str) -> str:
    """What tomllib says is wrong, with the line that it means.

    Its messages end with `(at line 3, column 5)` or `(at end of document)`.
    """
    what, _, where = fault.rpartition(" (at ")
    where = where.rstrip(")")
    lines = text.splitlines()
    number = int(where.split(",")[0].split()[1]) if where.startswith("line ") else len(lines)
    shown = lines[number - 1].strip() if 0 < number <= len(lines) else ""
    quotes = ': text needs quotes, as in size = "20 GiB"' if what.startswith(_UNQUOTED) else ""
    return f"{path}:{number}: not TOML: {what}: {shown!r}{quotes}"
