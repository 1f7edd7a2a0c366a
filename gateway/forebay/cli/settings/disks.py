# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay get` and `forebay set`: the settings of disks, with where each is said, and changes while VMs run."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from forebay.cli.asking import Arguments, Daemon, daemon, print_json, progress_shown
from forebay.cli.terminal.parser import Parser, checked
from forebay.cli.terminal.render import Cell, Column, table, wants_colour
from forebay.config.keys import KEYS, listed, parse_changes
from forebay.errors import ForebayError
from forebay.units import did_you_mean, natural, parse_name

COLUMNS = (Column("NAME"), Column("SETTING"), Column("VALUE"), Column("SAID BY"))

Told = Mapping[str, Any]


def _any_key(text: str) -> str:
    """A setting that is told of disks. Raises ValueError."""
    if text in listed():
        return text
    raise ValueError(
        f"no setting {text[:64]!r}{did_you_mean(text, listed())}: there are {', '.join(listed())}"
    )


def _change(text: str) -> str:
    """KEY=VALUE. Raises ValueError."""
    parse_changes([text])
    return text


def add_get(parser: Parser) -> None:
    """Add the arguments of `forebay get`."""
    text = "the disk; default: all. A setting in its place, where no disk is called so: that of all disks"
    parser.add_argument("name", metavar="NAME", type=checked(parse_name), nargs="?", help=text)
    text = f"one of {', '.join(listed())}; default: all"
    parser.add_argument("key", metavar="KEY", type=checked(_any_key), nargs="?", help=text)
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def add_set(parser: Parser) -> None:
    """Add the arguments of `forebay set`."""
    parser.add_argument("name", metavar="NAME", type=checked(parse_name), help="the disk")
    rows = "; ".join(f"{key}: {row.what}" for key, row in KEYS.items())
    text = f"KEY= gives back what the store says, or [defaults]. All are set, or none. {rows}"
    parser.add_argument("changes", metavar="KEY=VALUE", type=checked(_change), nargs="+", help=text)
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def run(arguments: Arguments) -> int:
    """`forebay get` and `forebay set`."""
    client = daemon(arguments)
    if arguments.command == "get":
        return _get(arguments, client)
    return _set(arguments, client)


def _get(arguments: Arguments, client: Daemon) -> int:
    rows = _asked(client, arguments.name, arguments.key)
    rows.sort(key=lambda row: natural(row["name"]))
    if arguments.json:
        print_json(rows)
    else:
        _print(rows)
    return 0


def _asked(client: Daemon, name: str | None, key: str | None) -> list[Told]:
    """The settings that are wanted. Raises ForebayError."""
    if name is None:
        return list(client.get("/settings"))
    if key is None and name in listed():
        rows = client.get("/settings")
        if not any(row["name"] == name for row in rows):
            return [row for row in rows if row["key"] == name]
    rows = client.get(f"/disks/{name}/settings")
    return [row for row in rows if key in (None, row["key"])]


def _set(arguments: Arguments, client: Daemon) -> int:
    try:
        changes = parse_changes(arguments.changes)
    except ValueError as fault:
        raise ForebayError(str(fault)) from None
    path = f"/disks/{arguments.name}/settings"
    with progress_shown(f"set {arguments.name}") as progress:
        found = client.follow("POST", path, {"settings": changes}, progress)
    changed = [row for row in found["settings"] if row["key"] in changes]
    if arguments.json:
        print_json(changed)
    else:
        _print(changed)
    return 0


def _print(rows: Sequence[Told]) -> None:
    cells = [[Cell(str(row[key])) for key in ("name", "key")] for row in rows]
    for line, row in zip(cells, rows, strict=True):
        line += [Cell(_value(row["value"])), Cell(str(row["from"]))]
    print("\n".join(table(COLUMNS, cells, colour=wants_colour(sys.stdout.isatty()))))


def _value(value: object) -> str:
    """A setting as the configuration has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
