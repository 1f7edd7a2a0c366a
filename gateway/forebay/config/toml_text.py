# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""TOML as text: writing it, and finding where in a file a key stands. tomllib does neither."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


def toml_lines(data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The lines of sections that hold texts, numbers, lists and sections. Keys come before the sections below them."""
    for key, value in data.items():
        if not isinstance(value, dict):
            yield f"{_key(key)} = {_value(value)}"
    for key, value in data.items():
        if not isinstance(value, dict):
            continue
        path = prefix + _key(key)
        if not value or not all(isinstance(inner, dict) for inner in value.values()):
            yield f"[{path}]"
        yield from toml_lines(value, path + ".")
        yield ""


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _value(key)


def _value(value: str | list[str]) -> str:
    """A value as TOML has it. JSON's strings are TOML's basic strings but for DEL (toml.io 1.0, String)."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


_HEADER = re.compile(r"\s*\[([^\[\]]+)\]")
_ASSIGNMENT = re.compile(r"\s*([\w.\"-]+)\s*=")


def line_of(text: str, loc: tuple[int | str, ...]) -> int | None:
    """The number of the line with a key, else of its section's header, in a plainly written file; None for neither."""
    wanted = [str(part) for part in loc if isinstance(part, str)]
    section: list[str] = []
    header = None
    for number, line in enumerate(text.splitlines(), 1):
        if match := _HEADER.match(line):
            section = _parts(match.group(1))
            if section in (wanted, wanted[:-1]):
                header = number
        elif (match := _ASSIGNMENT.match(line)) and section + _parts(match.group(1)) == wanted:
            return number
    return header


def _parts(dotted: str) -> list[str]:
    """The parts of a dotted TOML key; those in quotes may have dots in them."""
    return [quoted or bare for quoted, bare in re.findall(r"\"([^\"]*)\"|([\w-]+)", dotted)]
