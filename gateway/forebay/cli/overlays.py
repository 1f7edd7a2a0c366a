# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay overlays`, `save`, `commit`, `revert`, `snapshot`, `snapshots`, `rollback` and `drop`."""

import argparse
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from forebay.cli.asking import Arguments, Daemon, print_json, progress_shown
from forebay.cli.resolve import agreed, print_saved
from forebay.errors import ForebayError
from forebay.units import format_size, natural

Parse = Callable[[str], Any]


def add_list(parser: argparse.ArgumentParser, _name: Parse, _image: Parse) -> None:
    """Add the arguments of `forebay overlays`."""
    _json(parser)


def add_save(parser: argparse.ArgumentParser, name: Parse, image: Parse) -> None:
    """Add the arguments of `forebay save`."""
    _disk(parser, name)
    add = parser.add_argument
    add("to", metavar="NEW", type=image, help="the new image, STORE:PATH")
    add("--format", choices=("raw", "qcow2"), default="raw", help="of the new image (default: raw)")
    add("--snapshot", metavar="SNAPSHOT", type=name, help="what the disk showed then, and not now")
    text = "save what there is, with zeros for what neither cache nor image has any more"
    add("--partial", action="store_true", help=text)
    _json(parser)


def add_commit(parser: argparse.ArgumentParser, name: Parse, _image: Parse) -> None:
    """Add the arguments of `forebay commit`."""
    _disk(parser, name)
    _json(parser)


def add_revert(parser: argparse.ArgumentParser, name: Parse, _image: Parse) -> None:
    """Add the arguments of `forebay revert`."""
    _disk(parser, name)
    parser.add_argument("--yes", action="store_true", help="without asking")
    parser.add_argument("--force", action="store_true", help=_FORCE)
    _json(parser)


def add_snapshot(parser: argparse.ArgumentParser, name: Parse, _image: Parse) -> None:
    """Add the arguments of `forebay snapshot` and `drop`."""
    _disk(parser, name)
    parser.add_argument("snapshot", metavar="SNAPSHOT", type=name, help="the snapshot")
    _json(parser)


def add_rollback(parser: argparse.ArgumentParser, name: Parse, _image: Parse) -> None:
    """Add the arguments of `forebay rollback`."""
    _disk(parser, name)
    add = parser.add_argument
    add("snapshot", metavar="SNAPSHOT", type=name, help="the snapshot, which stays")
    add("--drop-newer", action="store_true", help="give up the snapshots that are newer")
    add("--force", action="store_true", help=_FORCE)
    _json(parser)


_FORCE = "even while a client is connected, which will not know what it reads"


def _disk(parser: argparse.ArgumentParser, name: Parse) -> None:
    parser.add_argument("name", metavar="NAME", type=name, help="the disk")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


# --------------------------------------------------------------------------------------------------------- what they do


def show(arguments: Arguments, client: Daemon) -> int:
    """`forebay overlays`: print the table of overlays, or JSON."""
    overlays = client.get("/overlays")
    overlays.sort(key=lambda overlay: natural(overlay["name"]))
    if arguments.json:
        print_json(overlays)
        return 0
    from forebay.cli.terminal.render import image_shown

    rows = [
        [
            one["name"],
            image_shown(one["image"]),
            format_size(one["size"]),
            format_size(one["private_bytes"]),
            str(one["snapshots"]),
            "yes" if one["keep"] else "",
            _state(one),
        ]
        for one in overlays
    ]
    _print_table(rows, "NAME IMAGE SIZE> CHANGED> SNAPSHOTS> KEPT STATE")
    return 0


def _state(one: dict[str, Any]) -> str:
    """Whether it is attached; where it is, and is not served, `forebay status` says why."""
    if not one["attached"]:
        return f"since {_when(one['since'])}"
    return "attached" if one.get("served", True) else "not served"


def snapshots(arguments: Arguments, client: Daemon) -> int:
    """`forebay snapshots`: print the snapshots of a disk, the oldest first, or JSON."""
    found = client.get(f"/overlays/{arguments.name}/snapshots")
    if arguments.json:
        print_json(found)
    else:
        _print_table([[x["name"], _when(x["created"])] for x in found], "SNAPSHOT CREATED")
    return 0


def _print_table(rows: list[list[str]], headings: str) -> None:
    """Print a table; the fields of a heading with `>` behind it are aligned on the right."""
    from forebay.cli.terminal.render import Cell, Column, table, wants_colour

    terminal = sys.stdout.isatty()
    width = os.get_terminal_size().columns if terminal else None
    columns = [
        Column(heading.rstrip(">"), right=heading.endswith(">"), narrow=(20, 12, 8))
        for heading in headings.split()
    ]
    cells = [[Cell(text) for text in row] for row in rows]
    print("\n".join(table(columns, cells, colour=wants_colour(terminal), width=width)))


def _when(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def snapshot(arguments: Arguments, client: Daemon) -> int:
    """`forebay snapshot`: take one."""
    content = {"snapshot": arguments.snapshot}
    told = client.post(f"/overlays/{arguments.name}/snapshots", content)
    return _say(arguments, told, f"snapshot {told['name']} taken")


def rollback(arguments: Arguments, client: Daemon) -> int:
    """`forebay rollback`: go back to a snapshot."""
    content = {
        "snapshot": arguments.snapshot,
        "drop_newer": arguments.drop_newer,
        "force": arguments.force,
    }
    told = client.post(f"/overlays/{arguments.name}/rollback", content)
    return _say(arguments, told, f"as it was at {arguments.snapshot}")


def drop(arguments: Arguments, client: Daemon) -> int:
    """`forebay drop`: forget a snapshot."""
    content = {"snapshot": arguments.snapshot}
    with progress_shown(f"drop {arguments.snapshot}") as progress:
        told = client.follow("POST", f"/overlays/{arguments.name}/drop", content, progress)
    return _say(arguments, told, f"snapshot {arguments.snapshot} dropped")


def revert(arguments: Arguments, client: Daemon) -> int:
    """`forebay revert`: give up the changes."""

    def ask(*, sure: bool) -> Any:
        content = {"yes": sure, "force": arguments.force}
        return client.post(f"/overlays/{arguments.name}/revert", content)

    try:
        told = ask(sure=arguments.yes)
    except ForebayError as fault:
        if arguments.yes or not str(fault).endswith("say --yes") or not agreed(str(fault)):
            raise
        told = ask(sure=True)
    return _say(arguments, told, f"{format_size(told['freed_bytes'])} given up")


def commit(arguments: Arguments, client: Daemon) -> int:
    """`forebay commit`: write the changes to the image."""
    with progress_shown(f"commit {arguments.name}") as progress:
        told = client.follow("POST", f"/overlays/{arguments.name}/commit", {}, progress)
    return _say(arguments, told, f"its changes are in {told['image']}")


def save(arguments: Arguments, client: Daemon, to: str) -> int:
    """`forebay save`: make a new image of what the disk shows."""
    content = {
        "to": to,
        "format": arguments.format,
        "snapshot": arguments.snapshot,
        "partial": arguments.partial,
    }
    with progress_shown(f"save {arguments.name}") as progress:
        found = client.follow("POST", f"/disks/{arguments.name}/save", content, progress)
    if arguments.json:
        print_json(found)
    else:
        print_saved(found)
    return 0


def _say(arguments: Arguments, told: Any, text: str) -> int:
    if arguments.json:
        print_json(told)
    else:
        print(f"{arguments.name}: {text}")
    return 0
