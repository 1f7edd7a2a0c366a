# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Starts `forebay top` and `forebay page`."""

import ipaddress
import logging
import sys

from forebay.cli.asking import Arguments, daemon
from forebay.units import listen_text


def top(arguments: Arguments) -> int:
    """`forebay top`: show what goes on until told to end."""
    from forebay.cli.watching.top import top as show

    return show(arguments, daemon(arguments))


def page(arguments: Arguments) -> int:
    """`forebay page`: serve the page until told to end."""
    from forebay.page.server import run

    listen = arguments.listen
    if not ipaddress.ip_address(listen[0]).is_loopback:
        print(
            f"forebay: warning: whoever reaches {listen_text(listen)} sees the names of disks and images and what "
            "they do: there is no password; 'ssh -L' to a loopback address needs none",
            file=sys.stderr,
        )
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    run(daemon(arguments), listen, arguments.name)
    return 0
