"""`forebay cache ACTION`: the device that the cache lies on."""

import argparse
from collections.abc import Callable
from typing import Any

from forebay.cli_commands import Arguments, print_json, progress_shown
from forebay.client import Client
from forebay.sizes import format_size

BELONGS = {
    "vg": ("create",),
    "tag": ("create",),
    "device": ("create",),
    "file": ("create",),
    "size": ("create", "extend"),
    "force": ("format", "create"),
}
"""Which options go with which actions."""


def cache(arguments: Arguments, client: Client) -> int:
    """Do what `arguments.action` says. Raises ArgumentTypeError for options that do not go with it."""
    for option, actions in BELONGS.items():
        if getattr(arguments, option) not in (None, False) and arguments.action not in actions:
            names = " and ".join(f"'cache {action}'" for action in actions)
            raise argparse.ArgumentTypeError(f"argument --{option}: is for {names} only")
    return ACTIONS[arguments.action](arguments, client)


def info(arguments: Arguments, client: Client) -> int:
    """What it is and holds."""
    return _shown(arguments, client.get("/cache"))


def scrub(arguments: Arguments, client: Client) -> int:
    """Check everything on it."""
    with progress_shown("scrub") as progress:
        found = client.follow("POST", "/cache/scrub", None, progress)
    return _shown(arguments, found)


def _shown(arguments: Arguments, found: dict[str, Any]) -> int:
    if arguments.json:
        print_json(found)
    else:
        from forebay.render import key_values  # noqa: PLC0415

        print("\n".join(key_values(found)))
    return 0


def create(arguments: Arguments, _: Client) -> int:
    """Provide storage for a cache and format it."""
    wanted = _wanted(arguments)
    from forebay.config import Config  # noqa: PLC0415
    from forebay.storage import Wanted  # noqa: PLC0415
    from forebay.storage import create as run  # noqa: PLC0415

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
    places = [name for name in ("vg", "device", "file") if getattr(arguments, name)]
    if len(places) != 1:
        raise argparse.ArgumentTypeError("say one of --vg VG, --device PATH or --file PATH")
    if arguments.tag and not arguments.vg:
        raise argparse.ArgumentTypeError("argument --tag: goes with --vg")
    if arguments.device and arguments.size is not None:
        raise argparse.ArgumentTypeError("argument --size: a block device is used as a whole")
    if not arguments.device and not arguments.size:
        raise argparse.ArgumentTypeError(f"argument --size: is needed with --{places[0]}")
    from pathlib import Path  # noqa: PLC0415

    return {
        "group": arguments.vg,
        "device": arguments.device and Path(arguments.device),
        "file": arguments.file and Path(arguments.file),
        "size": arguments.size,
        "place": arguments.tag,
        "force": arguments.force,
    }


def extend(arguments: Arguments, client: Client) -> int:
    """Make it larger, whether or not the daemon runs."""
    from forebay.config import Config  # noqa: PLC0415
    from forebay.storage import extend as run  # noqa: PLC0415

    config = Config.load(arguments.config)
    with progress_shown("extend") as progress:
        found = run(config, client, arguments.size, progress)
    if arguments.json:
        print_json(found)
    else:
        print(f"{found['device']}: {format_size(int(found['size']))}")
    return 0


def remove(arguments: Arguments, client: Client) -> int:
    """Drain it, then give its storage back."""
    from forebay.config import Config  # noqa: PLC0415
    from forebay.storage import remove as run  # noqa: PLC0415

    config = Config.load(arguments.config)
    with progress_shown("drain") as progress:
        record = run(config, client, progress)
    if arguments.json:
        print_json({"kind": record.kind, "device": record.path, "uuid": record.uuid})
    else:
        print(f"{record.path}: removed")
    return 0


def format_(arguments: Arguments, _: Client) -> int:
    """Make it empty."""
    from forebay.config import Config  # noqa: PLC0415
    from forebay.storage import format_again  # noqa: PLC0415
    from forebay.storage_record import locate  # noqa: PLC0415

    config = Config.load(arguments.config)
    format_again(config, force=arguments.force)
    print(f"{locate(config)}: formatted")
    return 0


ACTIONS: dict[str, Callable[[Arguments, Client], int]] = {
    "info": info,
    "create": create,
    "extend": extend,
    "format": format_,
    "remove": remove,
    "scrub": scrub,
}
