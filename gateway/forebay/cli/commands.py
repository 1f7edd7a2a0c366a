# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What each sub-command does. Arguments are checked already; the result is the exit code."""

import gc
import sys
from collections.abc import Callable
from importlib import import_module

from forebay.cli.asking import Arguments, absolute_image, daemon, print_json, progress_shown
from forebay.cli.peer import peer, rule
from forebay.errors import ForebayError
from forebay.units import format_size

# ------------------------------------------------------------------------------------- the daemon


def serve(arguments: Arguments) -> int:
    """`forebay serve`: run the daemon until it is told to end."""
    gc.disable()  # nothing that is imported goes again; the daemon has it enabled once it serves
    from pathlib import Path

    from forebay.config.model import Config
    from forebay.process.process import serve as run_daemon

    config = Config.load(arguments.config)
    state, run = (path and Path(path).absolute() for path in (arguments.state, arguments.run))
    return run_daemon(config, state, run)


def check_config(arguments: Arguments) -> int:
    """`forebay check-config`: say that the configuration is right, and what it may lack."""
    from forebay.config.model import Config

    config = Config.load(arguments.config)
    for warning in config.warnings():
        print(f"forebay: warning: {warning}", file=sys.stderr)
    print(f"{', '.join(map(str, config.files)) or 'built-in defaults'}: good")
    return 0


def configuration(arguments: Arguments) -> int:
    """`forebay reload` and `forebay dump-config`: what the daemon has, and what the files say."""
    commands = import_module("forebay.cli.settings.daemon")
    run = commands.reload if arguments.command == "reload" else commands.dump_config
    return int(run(arguments))


def demo(_: Arguments) -> int:
    """`forebay demo`: show everything on a throw-away directory."""
    from forebay.cli.demo import main

    main()
    return 0


# ------------------------------------------------------------------------------------------ disks


def attach(arguments: Arguments) -> int:
    """`forebay attach`: serve an image, and print where."""
    content = {
        "name": arguments.name,
        "image": absolute_image(arguments.image),
        "mode": arguments.mode,
        "cache_size": arguments.cache_size,
        "preload": arguments.preload,
        "read_only": arguments.read_only,
        "overlay": arguments.overlay,
        "format": arguments.format,
        "keep": arguments.keep,
        **_rates(arguments),
        **rule(arguments),
    }
    if arguments.incoming:
        content |= import_module("forebay.cli.moving").incoming(arguments)
    client = daemon(arguments)
    if arguments.wait is None or arguments.incoming:
        status = client.post("/disks", content)
    else:
        from forebay.cli.terminal.wait import when_free

        status = when_free(lambda: client.post("/disks", content), arguments.name, arguments.wait)
    if arguments.json:
        print_json(status)
    else:
        print(f"{status['name']}: {status['socket']}")
        if status.get("attached_already"):
            print(f"forebay: '{arguments.name}' is attached already, just so", file=sys.stderr)
        from forebay.libvirt.version import installed_version

        _warn_of_old_libvirt(installed_version())
    return 0


def _rates(arguments: Arguments) -> dict[str, int]:
    """How fast the disk may be used, as far as that was said."""
    keys = import_module("forebay.config.keys").RATES
    return {key: value for key in keys if (value := getattr(arguments, key)) is not None}


def _warn_of_old_libvirt(version: tuple[int, int, int] | None) -> None:
    """Say on stderr what follows from a libvirt that is too old for <reconnect>."""
    from forebay.libvirt.version import knows_reconnect, reconnect_warning

    if version is not None and not knows_reconnect(version):
        print(f"forebay: warning: {reconnect_warning(version)}", file=sys.stderr)


def detach(arguments: Arguments) -> int:
    """`forebay detach`: write back what is dirty, then stop serving."""
    flags = f"discard={int(arguments.discard)}&force={int(arguments.force)}"
    with progress_shown(f"detach {arguments.name}") as progress:
        daemon(arguments).follow("DELETE", f"/disks/{arguments.name}?{flags}", None, progress)
    print(f"{arguments.name}: detached")
    return 0


def status(arguments: Arguments) -> int:
    """`forebay status`: the table of disks, those that need a look, or what is told of the size of the cache."""
    from forebay.cli.status import show

    return show(arguments, daemon(arguments))


def hosts(arguments: Arguments) -> int:
    """`forebay summary` and `hosts`: how this host stands, and how others do, asked by ssh."""
    from forebay.cli.hosts import commands, summary

    if arguments.command == "summary":
        return summary.run(arguments, daemon(arguments))
    return commands.run(arguments, absolute_image)


def flush(arguments: Arguments) -> int:
    """`forebay flush`: write back. Raises ForebayError unless nothing is dirty then."""
    content = {
        "names": [arguments.name] if arguments.name else None,
        "timeout": arguments.timeout,
    }
    with progress_shown(f"flush {arguments.name or 'all disks'}") as progress:
        result = daemon(arguments).follow("POST", "/flush", content, progress)
    if arguments.json:
        print_json(result)
    if result["dirty_bytes"]:
        raise ForebayError(
            f"{format_size(result['dirty_bytes'])} are dirty again: guests went on writing; "
            "pause them, or choose mode write-through, and flush again"
        )
    if result["not_served"]:
        raise ForebayError(
            f"{', '.join(result['not_served'])}: not served, so what is dirty there stays: "
            "see 'forebay status'"
        )
    if not arguments.json:
        done = result["written_back_bytes"]
        written = f"{format_size(done)} written back, " if done else ""
        print(f"{arguments.name or 'all disks'}: {written}nothing is dirty")
    return 0


def mode(arguments: Arguments) -> int:
    """`forebay mode`: change the mode; what is dirty is written back first where write-back is left."""
    with progress_shown(f"mode {arguments.name}") as progress:
        disk = daemon(arguments).follow(
            "POST", f"/disks/{arguments.name}/mode", {"mode": arguments.mode}, progress
        )
    print(f"{disk['name']}: {disk['mode']}")
    return 0


def settings(arguments: Arguments) -> int:
    """`forebay get` and `forebay set`: the settings of disks."""
    return int(import_module("forebay.cli.settings.disks").run(arguments))


def preload(arguments: Arguments) -> int:
    """`forebay preload`: bring data into the cache."""
    with progress_shown(f"preload {arguments.name}") as progress:
        disk = daemon(arguments).follow(
            "POST", f"/disks/{arguments.name}/preload", {"amount": arguments.amount}, progress
        )
    print(f"{disk['name']}: {format_size(disk['cached_bytes'])} cached")
    return 0


def images(arguments: Arguments) -> int:
    """`forebay images` and `stores`: the images that the cache knows; the sockets of stores, and who reads by them."""
    from forebay.cli import images as commands

    show = commands.show_stores if arguments.command == "stores" else commands.show
    return show(arguments, daemon(arguments))


def image(arguments: Arguments) -> int:
    """`forebay warm`, `trace`, `tag`, `untag`, `pin` and `unpin`."""
    from forebay.cli import images as commands

    run = {"warm": commands.warm, "trace": commands.trace}.get(arguments.command, commands.mark)
    return run(arguments, daemon(arguments), absolute_image(arguments.image))


def purge(arguments: Arguments) -> int:
    """`forebay purge`: drop what the cache has of images that nobody uses."""
    from forebay.cli.images import purge as run

    return run(arguments, daemon(arguments), [absolute_image(image) for image in arguments.images])


def import_image(arguments: Arguments) -> int:
    """`forebay import`: make a new image of a file."""
    from forebay.cli.importing import run

    return run(arguments, absolute_image(arguments.target))


def overlays(arguments: Arguments) -> int:
    """`forebay overlays`, `commit`, `revert`, `snapshot`, `snapshots`, `rollback` and `drop`."""
    from forebay.cli import overlays as commands

    name = "show" if arguments.command == "overlays" else arguments.command
    done: int = getattr(commands, name)(arguments, daemon(arguments))
    return done


def save(arguments: Arguments) -> int:
    """`forebay save`: make a new image of what a disk shows."""
    from forebay.cli.overlays import save as run

    return run(arguments, daemon(arguments), absolute_image(arguments.to))


def resolve(arguments: Arguments) -> int:
    """`forebay resolve`: end a conflict, with the cache's data or with the image's; or save what the disk shows."""
    from forebay.cli.resolve import keep, save

    if arguments.save:
        return save(arguments, daemon(arguments), absolute_image(arguments.save))
    return keep(arguments, daemon(arguments), "mine" if arguments.keep_mine else "image")


def xml(arguments: Arguments) -> int:
    """`forebay xml`: print the <disk> element, or the metadata for the hook."""
    from forebay.libvirt.disk_xml import disk_element, metadata_element
    from forebay.libvirt.version import installed_version

    disk = daemon(arguments).get(f"/disks/{arguments.name}")
    if arguments.metadata:
        print(metadata_element(disk))
        return 0
    version = arguments.libvirt or installed_version()
    print(disk_element(disk, arguments.target, version))
    _warn_of_old_libvirt(version)
    return 0


def libvirt_hook(arguments: Arguments) -> int:
    """`forebay libvirt-hook`: what libvirt's hook for QEMU does."""
    from forebay.libvirt.hook import run

    return run(
        arguments.domain,
        arguments.operation,
        arguments.sub_operation,
        arguments.extra,
        arguments.config,
    )


# ------------------------------------------------------------------------------------------ cache


def cache(arguments: Arguments) -> int:
    """`forebay cache`: look at the cache device; make, extend, format, check or remove it."""
    from forebay.cli.cache import cache as run

    return run(arguments, daemon(arguments))


def stats(arguments: Arguments) -> int:
    """`forebay stats`: print rates, or totals, or how long requests took."""
    from forebay.cli.stats import latency
    from forebay.cli.stats import stats as run

    if arguments.latency or arguments.histogram:
        return latency(
            arguments.what,
            daemon(arguments),
            wide=arguments.histogram,
            json_lines=arguments.json,
        )
    return run(arguments.what, daemon(arguments), json_lines=arguments.json)


def events(arguments: Arguments) -> int:
    """`forebay events`: print what has happened."""
    return int(import_module("forebay.cli.events.run").run(arguments, daemon(arguments)))


def doctor(arguments: Arguments) -> int:
    """`forebay doctor`: check this host and its daemon."""
    from forebay.cli.terminal.render import wants_colour
    from forebay.doctor.run import run

    return run(arguments, colour=wants_colour(sys.stdout.isatty()))


def fuse(arguments: Arguments) -> int:
    """`forebay fuse`: mount disks and images as files until told to end."""
    from pathlib import Path

    from forebay.config.model import Config
    from forebay.doors.fuse.mount import Settings, mount

    settings = Settings(
        allow_other=arguments.allow_other, wait=arguments.wait, patience=arguments.patience
    )
    return mount(Config.load(arguments.config), Path(arguments.mount), settings)


def recover(arguments: Arguments) -> int:
    """`forebay recover`: finish or drop a checkpoint beside an image, and say what point in time the image is at.

    `forebay takeover`: the same, and free the image for another gateway.
    """
    from forebay.config.model import Config
    from forebay.sidecar.recover import run

    take_over = arguments.command == "takeover"
    config = Config.load(arguments.config)
    report = run(config, arguments.image, take_over=take_over, sure=arguments.yes)
    if arguments.json:
        print_json(report.json())
    else:
        print("\n".join(report.lines()))
    return 0


def stage(arguments: Arguments) -> int:
    """`forebay stage` and `forebay stager`: an image in the caches of many hosts."""
    return int(import_module("forebay.cli.staging.run").run(arguments))


def moving(arguments: Arguments) -> int:
    """`forebay handover` and `forebay evacuate`."""
    return int(getattr(import_module("forebay.cli.moving"), arguments.command)(arguments))


def watching(arguments: Arguments) -> int:
    """`forebay top` and `forebay page`: what goes on."""
    return int(getattr(import_module("forebay.cli.watching.run"), arguments.command)(arguments))


RUN: dict[str, Callable[[Arguments], int]] = {
    "serve": serve,
    "attach": attach,
    "detach": detach,
    "status": status,
    **dict.fromkeys(("summary", "hosts"), hosts),
    "stats": stats,
    "events": events,
    **dict.fromkeys(("top", "page"), watching),
    "flush": flush,
    **dict.fromkeys(("get", "set"), settings),
    "mode": mode,
    "peer": peer,
    "preload": preload,
    **dict.fromkeys(("images", "stores"), images),
    **dict.fromkeys(("warm", "tag", "untag", "pin", "unpin", "trace"), image),
    "purge": purge,
    "import": import_image,
    "save": save,
    **dict.fromkeys(("overlays", "commit", "revert", "snapshot", "snapshots"), overlays),
    **dict.fromkeys(("rollback", "drop"), overlays),
    "resolve": resolve,
    **dict.fromkeys(("handover", "evacuate"), moving),
    "xml": xml,
    "libvirt-hook": libvirt_hook,
    "cache": cache,
    "recover": recover,
    "takeover": recover,
    "fuse": fuse,
    "doctor": doctor,
    **dict.fromkeys(("stage", "stager"), stage),
    "check-config": check_config,
    **dict.fromkeys(("reload", "dump-config"), configuration),
    "demo": demo,
}
"""By name: what runs a sub-command with its arguments. They raise ForebayError and OSError."""
