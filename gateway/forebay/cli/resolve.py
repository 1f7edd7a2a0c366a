# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay resolve`: what is asked before data is given up, and what is told afterwards."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from forebay.cli.asking import Arguments, Daemon, print_json, progress_shown
from forebay.errors import ForebayError
from forebay.units import format_size

_KEPT = {
    "mine": "goes on with what the cache has, over the image as it is now",
    "image": "goes on with the image as it is now",
}


def add_all(
    parser: argparse.ArgumentParser, name: Callable[[str], Any], image: Callable[[str], Any]
) -> None:
    """Add the arguments of the command; `name` and `image` parse that of a disk, and of an image."""
    parser.add_argument("name", metavar="NAME", type=name, help="the disk")
    parser.add_argument("--json", action="store_true", help="JSON instead of text")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    text = "go on with the image as it is now, and write what the cache has over it"
    add("--keep-mine", action="store_true", help=text)
    text = "go on with the image as it is now, and give up what only the cache has"
    add("--keep-image", action="store_true", help=text)
    text = "make a new image, STORE:PATH, of what the disk shows, and change nothing else"
    add("--save", metavar="NEW", type=image, help=text)
    add = parser.add_argument
    text = "save what there is, with zeros for what neither cache nor image has any more"
    add("--partial", action="store_true", help=text)
    add("--yes", action="store_true", help="without asking, where data is given up")


def keep(arguments: Arguments, client: Daemon, what: str) -> int:
    """End the conflict of a disk, with the data of `what`: mine (the cache's) or image. The exit code."""
    sure = arguments.yes
    try:
        disk = _keep(arguments.name, client, what, sure=sure)
    except ForebayError as fault:
        if sure or not str(fault).endswith(_SAY_YES) or not agreed(str(fault)):
            raise
        disk = _keep(arguments.name, client, what, sure=True)
    if arguments.json:
        print_json(disk)
    else:
        print(f"{disk['name']}: {_KEPT[what]}")
    return 0


_SAY_YES = ("say --yes", "say --yes, or --save them first")
"""What the daemon's answer ends with where only a word is missing."""


def agreed(what: str) -> bool:
    """Ask at a terminal. False where there is none, or the answer is not yes."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"{what.rpartition(': ')[0]}. Go on? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _keep(name: str, client: Daemon, what: str, *, sure: bool) -> Any:
    with progress_shown(f"resolve {name}") as progress:
        content = {"keep": what, "yes": sure}
        return client.follow("POST", f"/disks/{name}/resolve", content, progress)


def save(arguments: Arguments, client: Daemon, to: str) -> int:
    """Save what a disk shows as the new image `to`. The exit code."""
    name = arguments.name
    with progress_shown(f"save {name}") as progress:
        content = {"to": to, "partial": arguments.partial}
        found = client.follow("POST", f"/disks/{name}/save", content, progress)
    if arguments.json:
        print_json(found)
    else:
        print_saved(found)
    return 0


def print_saved(found: Any) -> None:
    """Say what was saved, and what is missing there."""
    name = found["name"]
    print(f"{name}: saved as {found['image']}, {format_size(found['saved_bytes'])} of data")
    for offset, length in found["missing"]:
        print(f"{name}: missing, zeros now: {length} bytes at {offset}", file=sys.stderr)
    if found["missing_bytes"]:
        much = format_size(found["missing_bytes"])
        print(f"{name}: {much} are missing in {found['image']}", file=sys.stderr)
