# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay summary`: how this host stands, for people, for programs, and for OpenNebula's probe."""

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from forebay import __version__
from forebay.client import NoDaemonError
from forebay.units import MIB, format_duration, format_size, printable

Told = dict[str, Any]

MOST_WARM = 64
"""Images that OpenNebula is told of: all that a host reports has to fit into one datagram."""
MOST_SHOWN = 10
"""Images that people are told of."""

DOWN: Told = {"format": 1, "version": __version__, "state": "down"}
"""With `reasons`: the summary of a host whose daemon does not answer."""

_HASH = re.compile(r"[0-9a-f]{12,64}", re.ASCII)
"""What OpenNebula's datastores call an image."""


class Daemon(Protocol):
    """The daemon, as `forebay.client.Client` asks it."""

    def get(self, target: str) -> Any:
        """What the daemon says at `target`, decoded from JSON. Raises ForebayError."""


def run(arguments: argparse.Namespace, client: Daemon) -> int:
    """Print the summary. 0 where all is well, else 1; for a probe always 0, since it says how the host is."""
    try:
        told = client.get("/summary")
    except NoDaemonError as fault:
        told = {**DOWN, "reasons": [str(fault)]}
    if arguments.json:
        print(json.dumps(told, indent=2))
    else:
        lines: Callable[[Told], Iterator[str]] = opennebula if arguments.opennebula else text
        print("\n".join(map(printable, lines(told))))
    return 0 if told["state"] == "ok" or arguments.opennebula else 1


def text(told: Told) -> Iterator[str]:
    """The lines for people."""
    yield f"state   {told['state']}, forebay {told['version']}"
    for reason in told["reasons"]:
        yield f"        {reason}"
    if told["state"] == "down":
        return
    cache, hit = told["cache"], told["hit_percent"]
    used = format_size(cache["used_bytes"])
    yield f"cache   {used} of {format_size(cache['size'])}, {cache['device']}"
    yield f"hits    {'nothing was read' if hit is None else f'{hit}%'} in the last 5 minutes"
    dirty, lag = format_size(told["dirty_bytes"]), format_duration(told["lag_seconds"])
    yield f"disks   {told['disk_count']}, with {told['client_count']} clients, {dirty} dirty, lag {lag}"
    for one in told["stores"]:
        room = f", {format_size(one['free_bytes'])} free" if "free_bytes" in one else ""
        yield f"store   {one['store']}: {one['state']}{room}"
    for one in told["images"][:MOST_SHOWN]:
        yield f"warm    {one['image']}: {format_size(one['cached_bytes'])}, {percent(one)}%"
    if told["image_count"] > MOST_SHOWN:
        yield f"        and {told['image_count'] - MOST_SHOWN} more: see 'forebay images'"


def percent(image: Told) -> int:
    """How much of an image the cache has. One of which it has something, and whose size nobody knows, counts as all."""
    size, cached = image["size"], image["cached_bytes"]
    return min(100, round(100 * cached / size)) if size else 100


def opennebula(told: Told) -> Iterator[str]:
    """Attributes of a host, `NAME=VALUE`, as probes print them: sizes in MB, times in seconds, shares in percent."""
    yield f"FOREBAY_VERSION={_quoted(told['version'])}"
    yield f"FOREBAY_STATE={_quoted(told['state'])}"
    if "cache" not in told:  # nobody knows; what was told before stays, but for the room
        yield "LS_FREE=0"
        return
    cache = told["cache"]
    yield f"LS_MAD={_quoted(_kind(told, cache['device']))}"
    yield f"LS_PATH={_quoted(cache['device'])}"
    yield f"LS_MAX={cache['size'] // MIB}"
    yield f"LS_FREE={max(0, cache['size'] - cache['private_bytes']) // MIB}"
    yield f"FOREBAY_DIRTY={told['dirty_bytes'] // MIB}"
    yield f"FOREBAY_LAG={round(told['lag_seconds'])}"
    yield f"FOREBAY_HIT={round(told['hit_percent'] or 0)}"
    warm = {_attribute(one["image"]): percent(one) for one in told["images"]}
    cold = dict.fromkeys(map(_attribute, told["cold_images"]), 0)
    for found in (warm, {name: 0 for name in cold if name not in warm}):
        named = ((name, share) for name, share in found.items() if name)
        for _, (name, share) in zip(range(MOST_WARM), named, strict=False):
            yield f"FOREBAY_WARM_{name}={share}"


def _kind(told: Told, device: str) -> str:
    """What #2827 of OpenNebula's backlog calls the kind of local storage."""
    if not told["caches_by_default"]:
        return "dummy"
    return "lvm" if device.startswith("/dev/") and not os.path.isfile(device) else "file"


def _attribute(image: str) -> str:
    """The first twelve digits of the hash that is the image's name, in capitals, as OpenNebula has names of attributes;
    empty for an image with another name.
    """
    name = image.partition(":")[2].rpartition("/")[2]
    return name[:12].upper() if _HASH.fullmatch(name) else ""


def _quoted(value: str) -> str:
    """A value for OpenNebula's parser."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
