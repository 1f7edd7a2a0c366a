# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay images`, `stores`, `warm`, `tag`, `untag`, `pin`, `unpin` and `purge`: images without a disk."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from forebay.cli.asking import Arguments, Daemon, Progress, print_json, progress_shown
from forebay.errors import ForebayError
from forebay.units import (
    format_size,
    natural,
    parse_duration,
    parse_name,
    parse_preload,
    parse_rate,
    parse_tag,
)

Check = Callable[[Callable[[str], Any]], Callable[[str], Any]]
"""Makes a function that parses text one that argparse can show the errors of."""


def add_list(parser: argparse.ArgumentParser, check: Check, _image: Callable[[str], Any]) -> None:
    """Add the arguments of `forebay images` and `stores`."""
    text = "of this store only"
    parser.add_argument("store", metavar="STORE", type=check(parse_name), nargs="?", help=text)
    _json(parser)


def add_warm(parser: argparse.ArgumentParser, check: Check, image: Callable[[str], Any]) -> None:
    """Add the arguments of `forebay warm`."""
    _image(parser, image)
    text = "so much from the start of the image, what boots read, or all of it (the default)"
    amount = check(parse_preload)
    parser.add_argument(
        "amount", metavar="SIZE|trace|all", type=amount, nargs="?", default="all", help=text
    )
    text = "bytes a second, of all warms together: the lowest that is asked for holds"
    parser.add_argument("--rate", metavar="SIZE", type=check(parse_rate), help=text)
    parser.add_argument(
        "--json", action="store_true", help="lines of JSON: how far it is, then the result"
    )


def add_tag(parser: argparse.ArgumentParser, check: Check, image: Callable[[str], Any]) -> None:
    """Add the arguments of `forebay tag` and `untag`."""
    _image(parser, image)
    parser.add_argument("tags", metavar="TAG", type=check(parse_tag), nargs="+", help="a name")
    _json(parser)


def add_pin(parser: argparse.ArgumentParser, _check: Check, image: Callable[[str], Any]) -> None:
    """Add the arguments of `forebay pin` and `unpin`."""
    _image(parser, image)
    _json(parser)


def add_purge(parser: argparse.ArgumentParser, check: Check, image: Callable[[str], Any]) -> None:
    """Add the arguments of `forebay purge`."""
    add = parser.add_argument
    text = "an image; without any, all that the options name"
    add("images", metavar="IMAGE", type=image, nargs="*", help=text)
    add("--tag", metavar="TAG", type=check(parse_tag), help="those with this tag")
    text = "those that were not used for so long: 30d, 12h"
    add("--older-than", metavar="TIME", type=check(parse_duration), help=text)
    add("--traces", action="store_true", help="their boot traces as well")
    add("--dry-run", action="store_true", help="say what would go, and change nothing")
    _json(parser)


def add_trace(parser: argparse.ArgumentParser, _check: Check, image: Callable[[str], Any]) -> None:
    """Add the arguments of `forebay trace`."""
    text = "show what is known, drop the trace, or export it, with every block, as JSON"
    parser.add_argument("action", choices=("show", "drop", "export"), help=text)
    _image(parser, image)
    _json(parser)


def _image(parser: argparse.ArgumentParser, image: Callable[[str], Any]) -> None:
    text = "STORE:PATH, a path in a store, or an NBD URI"
    parser.add_argument("image", metavar="IMAGE", type=image, help=text)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


# --------------------------------------------------------------------------------------------------------- what they do


def show(arguments: Arguments, client: Daemon) -> int:
    """`forebay images`: print the table of images, or JSON."""
    query = f"?store={quote(arguments.store)}" if arguments.store else ""
    images = client.get(f"/images{query}")
    images.sort(key=lambda image: natural(image["image"]))
    if arguments.json:
        print_json(images)
        return 0
    from forebay.cli.terminal.render import images_table, wants_colour

    terminal = sys.stdout.isatty()
    width = os.get_terminal_size().columns if terminal else None
    lines = images_table(images, time.time(), colour=wants_colour(terminal), width=width)
    print("\n".join(lines))
    if terminal and not images:
        print("no images yet: 'forebay warm IMAGE' brings one in, 'forebay attach' serves one")
    return 0


def show_stores(arguments: Arguments, client: Daemon) -> int:
    """`forebay stores`: print the table of stores, or of the images that are read by the socket of the one, or JSON."""
    found = client.get("/stores")
    found.sort(key=lambda store: natural(store["store"]))
    if arguments.store is not None:
        found = [one for one in found if one["store"] == arguments.store]
        if not found:
            raise ForebayError(f"no store '{arguments.store}': see forebay stores")
    if arguments.json:
        print_json(found)
        return 0
    from forebay.cli.terminal.render import served_table, stores_table, wants_colour

    terminal = sys.stdout.isatty()
    width = os.get_terminal_size().columns if terminal else None
    draw = stores_table if arguments.store is None else served_table
    print("\n".join(draw(found, colour=wants_colour(terminal), width=width)))
    for one in found:
        if one["reason"]:
            print(f"{one['store']}: {one['reason']}")
    return 0


def warm(arguments: Arguments, client: Daemon, image: str) -> int:
    """`forebay warm`: bring an image into the cache."""
    content = {"image": image, "amount": arguments.amount, "rate": arguments.rate}
    with _progress(arguments) as progress:
        result = client.follow("POST", "/images/warm", content, progress)
    if arguments.json:
        print(json.dumps({"result": result}))
        return 0
    read = format_size(result["origin_read_bytes"])
    print(
        f"{result['image']}: {format_size(result['cached_bytes'])} of {format_size(result['size'])} cached, {read} read"
    )
    return 0


@contextmanager
def _progress(arguments: Arguments) -> Iterator[Progress]:
    """How far a warm is: as lines of JSON, or as a bar at a terminal."""
    if arguments.json:
        yield lambda done, total: print(json.dumps({"done": done, "total": total}), flush=True)
        return
    with progress_shown(f"warm {arguments.image}") as progress:
        yield progress


def mark(arguments: Arguments, client: Daemon, image: str) -> int:
    """`forebay tag`, `untag`, `pin` and `unpin`: say something about an image."""
    content = {"image": image}
    if arguments.command in ("tag", "untag"):
        content["tags"] = arguments.tags
    told = client.post(f"/images/{arguments.command}", content)
    if arguments.json:
        print_json(told)
    elif arguments.command in ("tag", "untag"):
        print(f"{told['image']}: {' '.join(told['tags']) or 'no tags'}")
    else:
        print(f"{told['image']}: {'pinned' if told['pinned'] else 'not pinned'}")
    return 0


def trace(arguments: Arguments, client: Daemon, image: str) -> int:
    """`forebay trace`: what is known of the boots from an image; or forget that."""
    if arguments.action == "drop":
        dropped = client.post("/images/trace/drop", {"image": image})
        if arguments.json:
            print_json(dropped)
        else:
            print(
                f"{dropped['image']}: {'dropped' if dropped['dropped'] else 'there was no trace'}"
            )
        return 0
    export = arguments.action == "export"
    told = client.get(f"/images/trace?image={quote(image)}&export={int(export)}")
    if export:
        print(json.dumps(told))
    elif arguments.json:
        print_json(told)
    else:
        from forebay.cli.terminal.render import trace_lines

        print("\n".join(trace_lines(told, time.time())))
    return 0


def purge(arguments: Arguments, client: Daemon, images: list[str]) -> int:
    """`forebay purge`: drop what the cache has of images. Raises ForebayError where one that was named is kept."""
    content = {
        "images": images or None,
        "tag": arguments.tag,
        "older_than": arguments.older_than,
        "dry_run": arguments.dry_run,
        "traces": arguments.traces,
    }
    if not images and arguments.tag is None and arguments.older_than is None:
        raise argparse.ArgumentTypeError("name images, or say --tag or --older-than")
    result = client.post("/images/purge", content)
    if arguments.json:
        print_json(result)
    else:
        would = "would free" if arguments.dry_run else "freed"
        for one in result["purged"]:
            trace = f", boot trace: {one['trace']}" if "trace" in one else ""
            print(f"{one['image']}: {would} {format_size(one['freed_bytes'])}{trace}")
        for one in result["kept"]:
            print(f"{one['image']}: kept, {one['why']}")
        print(
            f"{would} {format_size(result['freed_bytes'])} of {len(result['purged'])} images, "
            f"{len(result['kept'])} kept"
        )
    if images and result["kept"]:
        one = result["kept"][0]
        raise ForebayError(
            f"{one['image']} is kept ({one['why']}): detach its disks, or unpin it, then purge it again"
        )
    return 0
