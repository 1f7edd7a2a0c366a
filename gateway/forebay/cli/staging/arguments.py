# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What `forebay stage` takes."""

import argparse
from collections.abc import Callable
from typing import Any

from forebay.units import parse_duration, parse_host, parse_peer, parse_rate

Check = Callable[[Callable[[str], Any]], Callable[[str], Any]]
"""Makes a function that parses text one that argparse can show the errors of."""

MOST_HOSTS = 1000
"""That stage together: each is told of all."""


def add(parser: argparse.ArgumentParser, check: Check, image: Callable[[str], Any]) -> None:
    """Add the arguments."""
    text = "STORE:PATH, or a path in a store; without it, what this host stages"
    parser.add_argument("image", metavar="IMAGE", type=image, nargs="?", help=text)
    what = parser.add_mutually_exclusive_group()
    text = "the hosts that are to have it, as ssh takes them; this one gives it to them"
    what.add_argument("--hosts", metavar="A,B", type=check(_hosts), help=text)
    what.add_argument("--hosts-file", metavar="FILE", help="a file with the hosts; - for stdin")
    text = "stage it on this host alone, with these: what the other two have each host do"
    what.add_argument("--peers", metavar="A,B", type=check(_peers), help=text)
    what.add_argument("--end", action="store_true", help="stage it no more on this host")
    text = "with --peers: this host has all of it to give, from its cache or the store"
    parser.add_argument("--source", action="store_true", help=text)
    text = "how the others reach this host, where that is not its host name"
    parser.add_argument("--as", dest="name", metavar="HOST[:PORT]", type=check(_peer), help=text)
    text = "bytes a second that each host sends at most, and receives"
    parser.add_argument("--rate", metavar="SIZE", type=check(parse_rate), help=text)
    text = "how long to wait for the hosts (default: no end)"
    parser.add_argument("--timeout", metavar="TIME", type=check(parse_duration), help=text)
    text = "go on giving when all have it, until 'forebay stage IMAGE --end'"
    parser.add_argument("--keep", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def _peer(text: str) -> str:
    parse_peer(text)
    return text


def _peers(text: str) -> list[str]:
    """Hosts, each perhaps with a port."""
    found = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if len(found) > MOST_HOSTS + 1:  # and the one that gives
        raise ValueError(f"{len(found)} hosts are too many: name {MOST_HOSTS + 1} at most")
    return [_peer(name) for name in found]


def _hosts(text: str) -> list[str]:
    """Hosts as ssh takes them."""
    return [parse_host(name.strip()) for name in text.split(",") if name.strip()]
