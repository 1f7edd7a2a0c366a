# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What `forebay stage` does on this host: it has the daemon stage something, and tells how far that is."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from forebay.cli.asking import Arguments, Daemon, print_json, progress_shown
from forebay.units import format_size

Told = dict[str, Any]
"""What is told of one image: the keys of `forebay stage --json`."""


def make_torrent(client: Daemon, image: str) -> Told:
    """Have a torrent beside the image; where it is. Raises ForebayError."""
    with progress_shown(f"read {image}") as progress:
        found: Told = client.follow("POST", "/stages/torrent", {"image": image}, progress)
    return found


def order(arguments: Arguments, client: Daemon, image: str) -> Told:
    """Have this host stage the image, with what it is told of it."""
    if arguments.source:
        make_torrent(client, image)
    content = {"image": image, "peers": arguments.peers}
    content |= {"source": arguments.source, "rate": arguments.rate}
    told: Told = client.post("/stages", content)
    return told


def end(arguments: Arguments, client: Daemon, image: str) -> int:
    """Have this host stage the image no more."""
    told = client.post("/stages/end", {"image": image})
    if arguments.json:
        print_json(told)
    else:
        print(f"{told['image']}: {'ended' if told['ended'] else 'was not staged here'}")
    return 0


def show(arguments: Arguments, rows: Sequence[Told]) -> int:
    """Print what is told of some images."""
    if arguments.json:
        print_json(list(rows))
        return 0
    print("\n".join(table(rows)))
    for one in rows:
        if one["reason"]:
            print(f"{one['image']}: {one['reason']}", file=sys.stderr)
    return 0


def table(rows: Sequence[Told]) -> list[str]:
    """The lines of a table of images."""
    from forebay.cli.terminal import render

    columns = [
        render.Column("IMAGE", narrow=(20, 12, 8)),
        *(render.Column(head, right=True) for head in ("SIZE", "CACHED")),
        render.Column("STATE"),
        *(render.Column(head, right=True) for head in ("DOWN", "UP", "HOSTS")),
    ]
    terminal = sys.stdout.isatty()
    return render.table(
        columns,
        [[render.Cell(text) for text in _cells(one)] for one in rows],
        colour=render.wants_colour(terminal),
        width=os.get_terminal_size().columns if terminal else None,
    )


def _cells(one: Told) -> tuple[str, ...]:
    share = 100 * one["cached_bytes"] // one["size"] if one["size"] else 0
    down, up = (format_size(one[f"{way}_bytes_a_second"]) for way in ("down", "up"))
    return (
        one["image"],
        format_size(one["size"]),
        f"{share}%",
        one["state"],
        f"{down}/s",
        f"{up}/s",
        f"{one['connected']}/{one['hosts']}",
    )
