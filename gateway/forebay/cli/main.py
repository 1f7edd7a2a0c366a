# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The command `forebay`: its arguments, and what its exit code says.

0 done; 1 failed, with one line on stderr that says what and what to do; 2 wrong usage. Scripts and hooks start the
command often, so what only some commands need is imported in them.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence

from forebay import __version__
from forebay.cli.arguments import COMMANDS
from forebay.cli.terminal.parser import WRONG_USAGE, Parser, without_json_version
from forebay.cli.terminal.streams import open_closed, show_any_text
from forebay.errors import ForebayError
from forebay.units import printable

TYPE_CHECKING = False  # `typing` takes 3 ms, on each start of the command
if TYPE_CHECKING:
    from typing import Any

DONE, FAILED = 0, 1

LASTING = ("serve", "fuse", "stager", "page", "top")
"""Commands that go on for long: the garbage collector looks as often as always, or as they say."""

MANY = 100_000
"""Objects that the others may make before it looks; asking the daemon makes a tenth of that."""


class _Completion(argparse.Action):
    """`--print-completion SHELL`: for packagers; the results are shipped in config/completions."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        from forebay.cli.terminal.completion import completion

        try:
            print(completion(build_parser(), rest[1]), end="")
        except ForebayError as fault:
            parser.exit(FAILED, f"{parser.prog}: {fault}\n")
        parser.exit(DONE)


def build_parser(command: str | None = None) -> Parser:
    """The parser of the whole command, or, where `command` names one, with the arguments of that sub-command only.

    The latter is for speed: making all of them takes longer than asking the daemon.
    """
    parser = Parser(
        prog="forebay",
        description="VM disk images on shared storage, served to local VMs through a local cache.",
        epilog="Sizes are written 64K, 20 GiB or 1.5G; a bare number is bytes.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"forebay {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=("bash", "zsh", "tcsh"),
        help="print the completion script for a shell",
    )
    parser.add_argument("--config", metavar="FILE", help=_CONFIG_HELP)
    commands = parser.add_subparsers(
        prog="forebay", dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    for name in [command] if command in COMMANDS else COMMANDS:
        text, add = COMMANDS[name]
        # `--config` may stand behind the command too, without undoing one that stood before it
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:])
        sub.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=_CONFIG_HELP)
        add(sub)
    return parser


def command_in(argv: Sequence[str]) -> str | None:
    """The sub-command: the first word that is no option and no option's value; None where there is none."""
    words = iter(argv)
    for word in words:
        if word == "--config":
            next(words, None)
        elif not word.startswith("-"):
            return word
    return None


_CONFIG_HELP = "configuration (default: $FOREBAY_CONFIG, else /etc/forebay/forebay.toml)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: those of the process). Its exit code."""
    if argv is not None:
        return _main(argv, command_in(argv))
    command = command_in(words := sys.argv[1:])
    if command in LASTING:
        return _main(words, command)
    gc.set_threshold(MANY)
    try:
        return _main(words, command)
    finally:
        gc.freeze()  # the process ends: what it has is not looked through once more


def _main(words: Sequence[str], command: str | None) -> int:
    """Run `command` with all these words. The exit code."""
    open_closed()
    show_any_text()
    parser = build_parser(command)
    if command == "attach":
        from forebay.cli.terminal.wait import with_wait_closed

        words = with_wait_closed(words)
    arguments = parser.parse_args(without_json_version(words, parser.error))
    try:
        from forebay.cli.commands import RUN

        code = RUN[arguments.command](arguments)
        sys.stdout.flush()
        return code
    except argparse.ArgumentTypeError as fault:
        prog = f"{parser.prog} {arguments.command}"
        print(f"{prog}: {fault} (see '{prog} --help')", file=sys.stderr)
        return WRONG_USAGE
    except ForebayError as fault:
        return _failed(str(fault))
    except KeyboardInterrupt:
        return _failed("interrupted: what the daemon had begun is safe; run the command again")
    except BrokenPipeError:
        # who read our output has enough; keep the interpreter from flushing into it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as fault:
        where = f"{fault.filename}: " if fault.filename else ""
        return _failed(f"{where}{fault.strerror or fault}: check the path and its permissions")


def _failed(text: str) -> int:
    """Say on stderr what is wrong. The exit code."""
    for line in text.splitlines() or ["failed"]:
        print(f"forebay: {printable(line)}", file=sys.stderr)
    return FAILED
