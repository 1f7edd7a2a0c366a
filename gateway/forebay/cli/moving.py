# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay handover` and `forebay evacuate`: what they take, and what they tell."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from forebay.cli.asking import Arguments, Daemon, daemon, print_json, progress_shown
from forebay.errors import ForebayError
from forebay.units import parse_duration, printable

Parse = Callable[[str], Any]

_TOLD = {
    "prepared": "prepared: host {handover_to} takes it when the VM writes there",
    "released": "handed over to host {handover_to}",
    "incoming": "does not come: it is detached",
    "none": "the image is here, and stays",
}
"""By the phase that the disk is in afterwards."""


LONGEST_PATIENCE = 86400.0
"""Seconds. Who says `forever` waits for a day."""


def incoming(arguments: Arguments) -> dict[str, Any]:
    """What `attach --incoming` tells the daemon, which waits for the other host as long as it thinks right."""
    wait = arguments.wait
    patience = None if wait is None else min(wait, LONGEST_PATIENCE)
    return {"incoming": True, "with_data": arguments.with_data, "patience": patience}


def add_handover(
    parser: argparse.ArgumentParser, name: Parse, duration: Parse, text: Parse
) -> None:
    """Add the arguments of `forebay handover`."""
    add = parser.add_argument
    help_of_step = "prepare (on the host that has it), finish (on the other), or abort (on either)"
    add("step", metavar="STEP", choices=("prepare", "finish", "abort"), help=help_of_step)
    add("names", metavar="NAME", type=name, nargs="+", help="the disk")
    add("--to", metavar="HOST", type=text, help="prepare: for this host alone")
    help_of_data = "prepare: an overlay takes along what it has, through files beside its image"
    add("--with-data", action="store_true", help=help_of_data)
    help_of_timeout = "how long the other host may take (default: 30s)"
    add(
        "--timeout",
        metavar="TIME",
        type=duration,
        default=parse_duration("30s"),
        help=help_of_timeout,
    )
    add("--json", action="store_true", help="JSON instead of text")


def handover(arguments: Arguments) -> int:
    """`forebay handover`: do one step for each of the disks. The exit code: 1 if one of them failed."""
    client = daemon(arguments)
    done: list[dict[str, Any]] = []
    failed = False
    for name in arguments.names:
        try:
            done.append(_step(name, arguments, client))
        except ForebayError as fault:
            failed = True
            print(f"forebay: {printable(str(fault))}", file=sys.stderr)
            continue
        if not arguments.json:
            disk = done[-1]
            print(f"{name}: {_TOLD.get(disk['handover'], disk['handover']).format(**disk)}")
    if arguments.json:
        print_json(done)
    return 1 if failed else 0


def add_evacuate(
    parser: argparse.ArgumentParser, _name: Parse, duration: Parse, text: Parse
) -> None:
    """Add the arguments of `forebay evacuate`."""
    add = parser.add_argument
    add(
        "--to", metavar="HOST", type=text, help="wait for VMs that are moved to this host meanwhile"
    )
    help_of_timeout = "with --to: how long to wait for each (default: 10m)"
    add("--timeout", metavar="TIME", type=duration, default=600.0, help=help_of_timeout)
    add("--json", action="store_true", help="JSON instead of text")


def evacuate(arguments: Arguments) -> int:
    """`forebay evacuate`: empty this host. The exit code: 1 if anything is left."""
    content = {"to": arguments.to, "patience": arguments.timeout}
    with progress_shown("evacuate") as progress:
        told = daemon(arguments).follow("POST", "/evacuate", content, progress)
    if arguments.json:
        print_json(told)
    else:
        print("\n".join(f"{name}: released" for name in told["released"]) or "nothing was released")
    for one in told["left"]:
        print(f"forebay: {printable(one['name'])} stays: {printable(one['why'])}", file=sys.stderr)
    return 1 if told["left"] else 0


def _step(name: str, arguments: Arguments, client: Daemon) -> dict[str, Any]:
    """The disk's status, once the step is done."""
    content = {"step": arguments.step, "to": arguments.to, "patience": arguments.timeout}
    if arguments.with_data:
        content["with_data"] = True
    with progress_shown(f"{arguments.step} {name}") as progress:
        told: dict[str, Any] = client.follow("POST", f"/disks/{name}/handover", content, progress)
    return told
