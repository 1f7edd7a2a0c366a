# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The command `forebay`: its arguments, and what its exit code says.

0 done; 1 failed, with one line on stderr that says what and what to do; 2 wrong usage. Scripts and hooks start the
command often, so what only some commands need is imported in them.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from forebay import __version__
from forebay.cli.peer import add_change, add_rule
from forebay.cli.streams import open_closed, show_any_text
from forebay.errors import ForebayError
from forebay.units import (
    Mode,
    did_you_mean,
    parse_amount,
    parse_duration,
    parse_name,
    parse_size,
    printable,
)

DONE, FAILED, WRONG_USAGE = 0, 1, 2


class _Formatter(argparse.HelpFormatter):
    """Help as wide as the terminal. argparse would ask shutil for the width, on every start and not only for help."""

    def __init__(self, prog: str) -> None:
        try:
            width = os.get_terminal_size().columns
        except OSError:
            width = 80
        super().__init__(prog, width=max(40, width - 2))


class Parser(argparse.ArgumentParser):
    """Parses arguments, and says in one line what is wrong with them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Say `message` on stderr, and end with exit code 2."""
        text = " ".join(message.split())
        if match := re.match(r"argument (\w+): invalid choice: '(.*)' \(choose from (.*)\)$", text):
            what, word, known = match.groups()
            hint = did_you_mean(word, known.replace("'", "").split(", "))
            text = f"argument {what}: no {what.lower()} '{word}'{hint}: use one of {known}"
        self.exit(WRONG_USAGE, f"{self.prog}: {printable(text)} (see '{self.prog} --help')\n")


def _checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which shows the text of ArgumentTypeError only, and not that of ValueError."""

    def check(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as fault:
            raise argparse.ArgumentTypeError(str(fault)) from None

    return check


def _imported(module: str, parse: str) -> Callable[[str], Any]:
    """The function `parse` of a module that is imported only where it is called."""
    return _checked(lambda text: getattr(__import__(module, fromlist=[parse]), parse)(text))  # noqa: PLW0108 (later)


def _some_text(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty: write STORE:PATH, a path in a store, or an nbd:// URI")
    return text


def _patience(text: str) -> float:
    from forebay.cli.wait import parse_patience

    return parse_patience(text)


def _path(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty: write a path")
    return os.path.abspath(text)


NAME, SIZE, MODE = _checked(parse_name), _checked(parse_size), _checked(Mode.parse)
PRELOAD, DURATION, IMAGE = _checked(parse_amount), _checked(parse_duration), _checked(_some_text)
PATH = _checked(_path)


class _Completion(argparse.Action):
    """`--print-completion SHELL`: for packagers; the results are shipped in config/completions."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        from forebay.cli.completion import completion

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
    parser.add_argument("--version", action="version", version=f"forebay {__version__}")
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


def _name(parser: Parser, **extra: Any) -> None:
    parser.add_argument("name", metavar="NAME", type=NAME, help="the disk", **extra)


def _json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def _nothing(parser: Parser) -> None:
    """For a sub-command without arguments of its own."""


def _serve(parser: Parser) -> None:
    parser.add_argument("--state", metavar="DIR", help="instead of gateway.state")
    parser.add_argument("--run", metavar="DIR", help="instead of gateway.run")


def _attach(parser: Parser) -> None:
    _name(parser)
    add = parser.add_argument
    add("image", metavar="IMAGE", type=IMAGE, help="STORE:PATH, a path in a store, or an NBD URI")
    add("--mode", metavar="MODE", type=MODE, help=", ".join(Mode))
    add(
        "--cache-size", metavar="SIZE", type=SIZE, help="most it may hold of the cache; 0: no limit"
    )
    add("--preload", metavar="SIZE|all", type=PRELOAD, help="what to bring in at once")
    add("--read-only", action="store_true", help="refuse writes")
    add("--overlay", action="store_true", help="keep writes private and drop them at detach")
    add_rule(parser)
    text = "while another host has the image, wait until it is free, or for as long as this says"
    add(
        "--wait", metavar="TIME", type=_checked(_patience), nargs="?", const=float("inf"), help=text
    )
    _json(parser)


def _detach(parser: Parser) -> None:
    _name(parser)
    add = parser.add_argument
    add("--discard", action="store_true", help="drop what is dirty instead of writing it back")
    add("--force", action="store_true", help="even while a client is connected to it")


def _status(parser: Parser) -> None:
    _name(parser, nargs="?")
    _json(parser)


def _stats(parser: Parser) -> None:
    text = "a disk; seconds between lines; how many lines"
    parser.add_argument("what", metavar="NAME | INTERVAL | COUNT", nargs="*", help=text)
    parser.usage = "forebay stats [--config FILE] [--json] [NAME] [INTERVAL [COUNT]]"
    _json(parser)


def _flush(parser: Parser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("name", metavar="NAME", type=NAME, nargs="?", help="the disk; default: all")
    which.add_argument("--all", action="store_true", help="all disks")
    parser.add_argument("--timeout", metavar="TIME", type=DURATION, help="give up after 30s, 2m")
    _json(parser)


def _peer(parser: Parser) -> None:
    _name(parser)
    add_change(parser)


def _mode(parser: Parser) -> None:
    _name(parser)
    parser.add_argument("mode", metavar="MODE", type=MODE, help=", ".join(Mode))


def _preload(parser: Parser) -> None:
    _name(parser)
    text = "so much from the start of the image, or all of it"
    parser.add_argument("amount", metavar="SIZE|all", type=PRELOAD, help=text)


def _images(parser: Parser, add: str) -> None:
    module = __import__("forebay.cli.images", fromlist=[add])
    getattr(module, add)(parser, _checked, IMAGE)


def _resolve(parser: Parser) -> None:
    __import__("forebay.cli.resolve", fromlist=["add_all"]).add_all(parser, NAME, IMAGE)


def _xml(parser: Parser) -> None:
    _name(parser)
    target = _imported("forebay.libvirt.disk_xml", "parse_target")
    parser.add_argument("--target", metavar="DEV", type=target, default="vda", help="default: vda")
    text = "for this version of libvirt (default: the one on this host)"
    parser.add_argument(
        "--libvirt",
        metavar="VERSION",
        type=_imported("forebay.libvirt.version", "parse_version"),
        help=text,
    )
    text = "the <metadata> element from which libvirt's hook attaches it"
    parser.add_argument("--metadata", action="store_true", help=text)


def _libvirt_hook(parser: Parser) -> None:
    for name in ("domain", "operation", "sub_operation"):
        parser.add_argument(name, metavar=name.upper())
    parser.add_argument("extra", metavar="EXTRA", nargs="?", default="-")


def _cache(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "action",
        metavar="ACTION",
        choices=("check", "info", "create", "extend", "format", "remove", "repair", "scrub"),
        nargs="?",
        default="info",
        help="info, create, extend, format, remove, scrub (beside guests), check (without a daemon) or repair",
    )
    add(
        "--vg",
        metavar="VG",
        type=_imported("forebay.storage.lvm", "parse_group"),
        help="create: a logical volume, in this group",
    )
    add(
        "--tag",
        metavar="@TAG",
        type=_imported("forebay.storage.lvm", "parse_tag"),
        help="create: on disks with this tag of LVM",
    )
    add("--device", metavar="PATH", type=PATH, help="create: on this block device")
    add("--file", metavar="PATH", type=PATH, help="create: in this file, which is not there yet")
    add("--size", metavar="SIZE", type=SIZE, help="create, extend: how large it is to be")
    text = "create, format: a device that holds something unknown"
    add("--force", action="store_true", help=text)
    text = "repair: drop dirty data that is damaged, too"
    add("--yes", action="store_true", help=text)
    _json(parser)


def _beside(parser: Parser, sure: str) -> None:
    parser.add_argument("image", metavar="IMAGE", type=IMAGE, help="STORE:PATH, or any path")
    parser.add_argument("--yes", action="store_true", help=sure)
    _json(parser)


_ANYWAY = "finish a checkpoint although the image was changed since it began, or is a copy"
_GIVE_UP = "give up what the other gateway has and the image lacks"


def _fuse(parser: Parser) -> None:
    add = parser.add_argument
    add("mount", metavar="MOUNT", help="the directory to mount at")
    add("--allow-other", action="store_true", help="let other users in, as far as modes allow")
    text = "how long a request waits for a daemon that is away, then fails (default: 10s)"
    add("--wait", metavar="TIME", type=DURATION, default=10.0, help=text)
    text = "how long a daemon may answer nothing until it counts as away (default: 2m)"
    add("--patience", metavar="TIME", type=DURATION, default=120.0, help=text)


COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "serve": ("run the daemon in the foreground", _serve),
    "attach": ("serve an image as a disk", _attach),
    "detach": ("write back what is dirty and stop serving a disk", _detach),
    "status": ("what is served, and how it is", _status),
    "stats": ("rates, one line an interval", _stats),
    "flush": ("write back until nothing is dirty", _flush),
    "mode": ("change how a disk reads and writes", _mode),
    "peer": ("say which processes may use a disk", _peer),
    "preload": ("bring part of an image into the cache", _preload),
    "images": ("what the cache has of which image", partial(_images, add="add_list")),
    "warm": ("bring an image in without a disk", partial(_images, add="add_warm")),
    "tag": ("give an image tags", partial(_images, add="add_tag")),
    "untag": ("take tags away", partial(_images, add="add_tag")),
    "pin": ("keep an image in the cache", partial(_images, add="add_pin")),
    "unpin": ("let it leave the cache again", partial(_images, add="add_pin")),
    "purge": (
        "drop what the cache has of images",
        partial(_images, add="add_purge"),
    ),
    "resolve": ("go on after somebody else changed an image, with its data kept", _resolve),
    "xml": ("the libvirt <disk> element of a disk", _xml),
    "libvirt-hook": ("what libvirt's hook calls, with the domain's XML on stdin", _libvirt_hook),
    "cache": ("look at, make, extend, check or remove the cache device", _cache),
    "recover": (
        "finish what a gateway that is gone had begun with an image",
        partial(_beside, sure=_ANYWAY),
    ),
    "takeover": (
        "take an image from a gateway that is gone for good",
        partial(_beside, sure=_GIVE_UP),
    ),
    "fuse": ("mount disks and images as files, in the foreground", _fuse),
    "check-config": ("say what is wrong with the configuration", _nothing),
    "dump-config": ("print the effective configuration", _json),
    "demo": ("show everything on a throw-away directory", _nothing),
}
"""By name: what it does, and what adds its arguments to its parser."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: those of the process). Its exit code."""
    words = sys.argv[1:] if argv is None else argv
    open_closed()
    show_any_text()
    command = command_in(words)
    parser = build_parser(command)
    if command == "attach":
        from forebay.cli.wait import with_wait_closed

        words = with_wait_closed(words)
    arguments = parser.parse_args(words)
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
