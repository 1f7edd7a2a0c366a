# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay stage` and `forebay stager`: which of the things that they do is meant."""

from pathlib import Path

from forebay.cli.asking import Arguments, absolute_image, daemon
from forebay.cli.staging import here
from forebay.errors import ForebayError


def run(arguments: Arguments) -> int:
    """The one that is meant."""
    return stager(arguments) if arguments.command == "stager" else stage(arguments)


def stager(arguments: Arguments) -> int:
    """`forebay stager`: exchange what is staged with other hosts, until told to end."""
    from forebay.config.model import Config
    from forebay.swarm.stager import run as run_stager

    return run_stager(Config.load(arguments.config), Path(arguments.mount).absolute())


def stage(arguments: Arguments) -> int:
    """`forebay stage`: what this host stages; or have it stage something; or many hosts."""
    client = daemon(arguments)
    if arguments.image is None:
        _check_alone(arguments)
        return here.show(arguments, client.get("/stages"))
    image = absolute_image(arguments.image)
    if arguments.end:
        return here.end(arguments, client, image)
    if arguments.peers is not None:
        return here.show(arguments, [here.order(arguments, client, image)])
    if arguments.hosts is None and arguments.hosts_file is None:
        rows = client.get("/stages")
        return here.show(
            arguments, [one for one in rows if one["image"] in (image, arguments.image)]
        )
    from forebay.cli.staging.many import stage_on

    return stage_on(arguments, client, image)


def _check_alone(arguments: Arguments) -> None:
    """Raise ForebayError where something is said about no image."""
    if arguments.hosts or arguments.hosts_file or arguments.peers or arguments.end:
        raise ForebayError("say which image: forebay stage IMAGE --hosts A,B")
