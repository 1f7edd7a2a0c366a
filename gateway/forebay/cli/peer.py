# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which processes may use a disk: `forebay peer`, and the arguments of `forebay attach` that say so."""

import argparse

from forebay.cli.asking import Arguments, daemon
from forebay.errors import ForebayError

PEER_RULES = ("first", "label", "any")
"""As `forebay.config.fields` has them, which takes longer to import."""


def add_rule(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `forebay attach`."""
    text = "who may use it: the process that is first (until it ends), those with the label, any"
    parser.add_argument("--peer", choices=PEER_RULES, help=text)
    _add_vm(parser)


def add_change(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `forebay peer`."""
    text = "first: the next process to connect has it until it ends; label: those with the label; any: all"
    parser.add_argument("peer", metavar="first|label|any", choices=PEER_RULES, help=text)
    _add_vm(parser)
    text = "hang up on who is connected now, but for root, the daemon's user and door_group"
    parser.add_argument("--evict", action="store_true", help=text)


def _add_vm(parser: argparse.ArgumentParser) -> None:
    """Add the arguments by which a VM is known."""
    text = "the security label that the VM's processes have"
    parser.add_argument("--label", metavar="LABEL", help=text)
    parser.add_argument("--user", metavar="USER", help="the user that the VM's processes have")


def rule(arguments: Arguments) -> dict[str, object]:
    """What the daemon is told. Raises ForebayError for a user that is not there."""
    user = arguments.user
    return {
        "peer": arguments.peer,
        "peer_label": arguments.label,
        "peer_user": None if user is None else _uid(user),
    }


def peer(arguments: Arguments) -> int:
    """`forebay peer`: say which processes may use a disk from now on."""
    content = {**rule(arguments), "evict": arguments.evict}
    status = daemon(arguments).post(f"/disks/{arguments.name}/peer", content)
    holder = status["peer_process"]
    print(f"{arguments.name}: {status['peer']}" + (f", process {holder} has it" if holder else ""))
    return 0


def _uid(user: str) -> int:
    """The number of a user, by name or number. Raises ForebayError."""
    import pwd

    try:
        return int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ForebayError(f"no user '{user}' on this host: see 'getent passwd'") from None
