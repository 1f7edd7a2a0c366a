# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What `forebay summary` and `forebay hosts` take, and which hosts are meant."""

import argparse
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

from forebay.cli.hosts.ssh import MOST_JOBS
from forebay.errors import ForebayError
from forebay.units import parse_duration, parse_host, parse_preload, parse_rate, printable

Check = Callable[[Callable[[str], Any]], Callable[[str], Any]]
"""Makes a function that parses text one that argparse can show the errors of."""

JOBS, WARM_JOBS = 16, 4
"""Hosts at a time: to ask, and to fetch an image from one file server."""
TIMEOUT = 10.0
"""Seconds that a host has to say how it stands."""
MOST_HOSTS = 10_000
LONGEST_LIST = 1 << 20
"""Bytes of a file of hosts."""


def add_summary(
    parser: argparse.ArgumentParser, _check: Check, _image: Callable[[str], Any]
) -> None:
    """Add the arguments of `forebay summary`."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="JSON instead of text")
    text = "attributes for OpenNebula's probe of a host; sizes in MB"
    form.add_argument("--opennebula", action="store_true", help=text)


def add_hosts(parser: argparse.ArgumentParser, check: Check, image: Callable[[str], Any]) -> None:
    """Add the arguments of `forebay hosts`."""
    _add_common(parser, check)
    parser.set_defaults(hosts=None, hosts_file=None, jobs=None, timeout=None, json=False)
    parser.add_argument("--images", action="store_true", help="what is warm, and where")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", prog=parser.prog)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text[0].upper() + text[1:])
        _add_common(sub, check)
        text = "configuration (default: that of 'forebay')"
        sub.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=text)
        return sub

    action("status", "the disks of all hosts")
    warm = action("warm", "bring an image in on all hosts")
    text = "STORE:PATH, or a path in a store, as the hosts know it"
    warm.add_argument("image", metavar="IMAGE", type=image, help=text)
    text = "so much from the start of the image, what boots read, or all of it (the default)"
    amount = check(parse_preload)
    warm.add_argument(
        "amount", metavar="SIZE|trace|all", type=amount, nargs="?", default="all", help=text
    )
    text = "bytes a second, on each host"
    warm.add_argument("--rate", metavar="SIZE", type=check(parse_rate), help=text)
    action("flush", "write back on all hosts until nothing is dirty")


def _add_common(parser: argparse.ArgumentParser, check: Check) -> None:
    """What may stand before the action and behind it."""

    def add(*names: str, **how: Any) -> None:
        parser.add_argument(*names, default=argparse.SUPPRESS, **how)

    text = "the hosts, as ssh takes them (default: hosts.names of the configuration)"
    add("--hosts", metavar="A,B", type=check(_hosts), help=text)
    text = "a file with the hosts, in lines or words; - for stdin"
    add("--hosts-file", metavar="FILE", help=text)
    text = f"hosts at a time (default: {JOBS}; warm: {WARM_JOBS})"
    add("--jobs", metavar="N", type=check(_jobs), help=text)
    text = f"what a host has (default: {TIMEOUT:.0f}s; warm and flush: no end)"
    add("--timeout", metavar="TIME", type=check(_limit), help=text)
    add("--json", action="store_true", help="JSON instead of text")


def _hosts(text: str) -> list[str]:
    return [parse_host(name.strip()) for name in text.split(",") if name.strip()]


def _jobs(text: str) -> int:
    if text.isascii() and text.isdecimal() and 0 < len(text) <= 3 and 1 <= int(text) <= MOST_JOBS:
        return int(text)
    raise ValueError(f"{text[:20]!r} is no number of hosts: use 1 to {MOST_JOBS}")


def _limit(text: str) -> float:
    seconds = parse_duration(text)
    if not 0.1 <= seconds <= 86400:
        raise ValueError(f"{text!r} is out of range: use 100ms to 1d")
    return seconds


def chosen(arguments: argparse.Namespace) -> list[str]:
    """The hosts that are meant, each once. Raises ForebayError where there are none, or too many."""
    found: list[str] = list(arguments.hosts or ())
    if arguments.hosts_file is not None:
        found += _from_file(arguments.hosts_file)
    elif arguments.hosts is None:
        from forebay.config.client import hosts_named

        found = hosts_named(arguments.config)
    hosts = list(dict.fromkeys(found))
    if not hosts:
        raise ForebayError(
            "no hosts: name them with --hosts A,B or --hosts-file FILE, or as hosts.names in the configuration"
        )
    if len(hosts) > MOST_HOSTS:
        raise ForebayError(f"{len(hosts)} hosts are too many: name {MOST_HOSTS} at most")
    return hosts


def _from_file(path: str) -> Iterable[str]:
    """The hosts in a file; what follows a # is not read. Raises ForebayError and OSError."""
    with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        data = file.read(LONGEST_LIST + 1)
    if len(data) > LONGEST_LIST:
        raise ForebayError(
            f"{path}: longer than {LONGEST_LIST >> 20} MiB: this is no list of hosts"
        )
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        for name in line.partition("#")[0].split():
            try:
                yield parse_host(name)
            except ValueError as fault:
                raise ForebayError(f"{printable(path)}:{number}: {fault}") from None
