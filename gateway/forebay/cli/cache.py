# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay cache ACTION`: the device that the cache lies on."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from forebay.cli.asking import Arguments, Daemon, print_json, progress_shown
from forebay.errors import ForebayError
from forebay.units import format_size

BELONGS = {
    "vg": ("create",),
    "tag": ("create",),
    "device": ("create",),
    "file": ("create",),
    "size": ("create", "extend"),
    "force": ("format", "create"),
    "yes": ("repair",),
}
"""Which options go with which actions."""


def cache(arguments: Arguments, client: Daemon) -> int:
    """Do what `arguments.action` says. Raises ArgumentTypeError for options that do not go with it."""
    for option, actions in BELONGS.items():
        if getattr(arguments, option) not in (None, False) and arguments.action not in actions:
            names = " and ".join(f"'cache {action}'" for action in actions)
            raise argparse.ArgumentTypeError(f"argument --{option}: is for {names} only")
    return ACTIONS[arguments.action](arguments, client)


def info(arguments: Arguments, client: Daemon) -> int:
    """`forebay cache info`: print what it is and holds."""
    return _shown(arguments, client.get("/cache"))


def scrub(arguments: Arguments, client: Daemon) -> int:
    """`forebay cache scrub`: check everything on it, beside guests. Raises ForebayError for damaged dirty data."""
    with progress_shown("scrub") as progress:
        found = client.follow("POST", "/cache/scrub", None, progress)
    return _told(arguments, found)


def check(arguments: Arguments, _: Daemon) -> int:
    """`forebay cache check`: check it and its index, while no daemon runs. Raises ForebayError for damage."""
    from forebay.config.model import Config
    from forebay.storage.upkeep import check as run

    config = Config.load(arguments.config)
    with progress_shown("check") as progress:
        found = run(config, progress)
    _print(arguments, found, "faults")
    for fault in found["faults"]:
        print(f"forebay: {_fault_line(fault)}", file=sys.stderr)
    if found["damaged"]:
        raise ForebayError(
            found["hopeless"]
            or f"{found['device']}: the cache is damaged: 'forebay cache repair' drops what is clean of it"
        )
    return 0


def _fault_line(fault: dict[str, Any]) -> str:
    """A fault that a check found, in one line."""
    where = f": {fault['length']} bytes at {fault['offset']}" if fault["length"] else ""
    return f"{fault['what']}: {fault['text']}{where}"


def repair(arguments: Arguments, client: Daemon) -> int:
    """`forebay cache repair`: by the daemon where one runs, else here. Raises ForebayError for what stays damaged."""
    from forebay.client import NoDaemonError

    try:
        client.get("/cache")
    except NoDaemonError:
        return _repair_offline(arguments)
    if arguments.yes:
        raise ForebayError(
            "dirty data is dropped only while no daemon runs: stop it, then run this again"
        )
    with progress_shown("repair") as progress:
        found = client.follow("POST", "/cache/repair", None, progress)
    return _told(arguments, found)


def _repair_offline(arguments: Arguments) -> int:
    """Repair while no daemon runs. Raises ForebayError for what stays damaged."""
    from forebay.config.model import Config
    from forebay.storage.upkeep import repair as run

    config = Config.load(arguments.config)
    with progress_shown("repair") as progress:
        done = run(config, progress, drop_dirty=arguments.yes)
    if arguments.json:
        print_json(done)
    else:
        found = len(done["before"]["faults"])
        print(
            f"{found} faults; dropped: {done['dropped_clean']} clean, {done['dropped_private']} dirty blocks"
        )
    for fault in done["after"]["faults"]:
        print(f"forebay: {_fault_line(fault)}", file=sys.stderr)
    if done["after"]["damaged"]:
        raise ForebayError(
            "what only the cache has is damaged, and stays: run this with --yes to give it up, for what the image has"
        )
    return 0


def _told(arguments: Arguments, found: dict[str, Any]) -> int:
    """Print what the daemon has found. Raises ForebayError where dirty data is damaged."""
    _print(arguments, found, "damage")
    lines = [
        f"disk '{one['disk']}' of {one['image']}: {one['length']} bytes at {one['offset']}: {one['what']}"
        for one in found["damage"]
        if one["private"]
    ]
    for line in lines:
        print(f"forebay: {line}", file=sys.stderr)
    if lines:
        raise ForebayError(
            "data that only the cache has is damaged, and reads of it fail: write it anew in the guest, or stop the "
            "daemon and drop it with 'forebay cache repair --yes', for what the image has there"
        )
    return 0


def _print(arguments: Arguments, found: dict[str, Any], many: str) -> None:
    """Print what was found, as JSON, or as text without `many`, the key of what is told one by one."""
    _shown(arguments, found if arguments.json else {k: v for k, v in found.items() if k != many})


def _shown(arguments: Arguments, found: dict[str, Any]) -> int:
    """Print an object, as JSON or as text. The exit code."""
    if arguments.json:
        print_json(found)
    else:
        from forebay.cli.terminal.render import key_values

        print("\n".join(key_values(found)))
    return 0


def create(arguments: Arguments, _: Daemon) -> int:
    """`forebay cache create`: provide storage for a cache and format it."""
    wanted = _wanted(arguments)
    from forebay.config.model import Config
    from forebay.storage.volumes import Wanted
    from forebay.storage.volumes import create as run

    config = Config.load(arguments.config)
    with progress_shown("create") as progress:
        record = run(config, Wanted(**wanted), progress)
    if arguments.json:
        print_json({"kind": record.kind, "device": record.path, "uuid": record.uuid})
        return 0
    print(f"{record.path}: created, cache {record.uuid}")
    if config.cache.device is None:
        print(
            f'the daemon finds it; to say so in the configuration: [cache] device = "{record.path}"'
        )
    return 0


def _wanted(arguments: Arguments) -> dict[str, Any]:
    """The arguments of `storage.volumes.Wanted`. Raises ArgumentTypeError for options that do not go together."""
    places = [name for name in ("vg", "device", "file") if getattr(arguments, name)]
    if len(places) != 1:
        raise argparse.ArgumentTypeError("say one of --vg VG, --device PATH or --file PATH")
    if arguments.tag and not arguments.vg:
        raise argparse.ArgumentTypeError("argument --tag: goes with --vg")
    if arguments.device and arguments.size is not None:
        raise argparse.ArgumentTypeError("argument --size: a block device is used as a whole")
    if not arguments.device and not arguments.size:
        raise argparse.ArgumentTypeError(f"argument --size: is needed with --{places[0]}")
    from pathlib import Path

    return {
        "group": arguments.vg,
        "device": arguments.device and Path(arguments.device),
        "file": arguments.file and Path(arguments.file),
        "size": arguments.size,
        "place": arguments.tag,
        "force": arguments.force,
    }


def extend(arguments: Arguments, client: Daemon) -> int:
    """`forebay cache extend`: make it larger, with the daemon or without."""
    from forebay.config.model import Config
    from forebay.storage.volumes import extend as run

    config = Config.load(arguments.config)
    with progress_shown("extend") as progress:
        found = run(config, client, arguments.size, progress)
    if arguments.json:
        print_json(found)
    else:
        print(f"{found['device']}: {format_size(int(found['size']))}")
    return 0


def remove(arguments: Arguments, client: Daemon) -> int:
    """`forebay cache remove`: write back what is dirty, then give its storage back."""
    from forebay.config.model import Config
    from forebay.storage.volumes import remove as run

    config = Config.load(arguments.config)
    with progress_shown("drain") as progress:
        record = run(config, client, progress)
    if arguments.json:
        print_json({"kind": record.kind, "device": record.path, "uuid": record.uuid})
    else:
        print(f"{record.path}: removed")
    return 0


def format_(arguments: Arguments, _: Daemon) -> int:
    """`forebay cache format`: make it empty."""
    from forebay.config.model import Config
    from forebay.storage.volumes import format_again

    path = format_again(Config.load(arguments.config), force=arguments.force)
    print(f"{path}: formatted")
    return 0


ACTIONS: dict[str, Callable[[Arguments, Daemon], int]] = {
    "check": check,
    "info": info,
    "create": create,
    "extend": extend,
    "format": format_,
    "remove": remove,
    "repair": repair,
    "scrub": scrub,
}
"""By name of the action. They raise ForebayError."""
