# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay import`: its options, and what it tells meanwhile."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from forebay.cli.asking import Arguments, progress_shown
from forebay.units import format_size, parse_size, printable

Check = Callable[[Callable[[str], Any]], Callable[[str], Any]]
"""Makes a function that parses text one that argparse can show the errors of."""

_LINE_SECONDS = 1.0
"""Between two lines of JSON that say how far it is."""


def add_all(parser: argparse.ArgumentParser, check: Check, image: Callable[[str], Any]) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("source", metavar="SOURCE", type=image, help="a file on this host, or an https:// URL")
    text = "STORE:NAME of the new image, or a path in a store"
    add("target", metavar="STORE:NAME", type=image, help=text)
    text = "refuse it unless the file, as it is fetched, has this checksum"
    add("--sha256", metavar="HEX", type=check(_parse_sum), help=text)
    text = "raw, qcow2, vmdk, vdi, vhdx, with .gz, .xz or .zst behind it if packed (default: by its start)"
    add("--format", metavar="FORMAT", type=check(_parse_kind), help=text)
    text = "most that the image may have (default: 1 TiB, and no more than a bomb would have)"
    add("--max-size", metavar="SIZE", type=check(parse_size), help=text)
    add(
        "--cacert",
        metavar="FILE",
        help="who signed the server's certificate, instead of the host's",
    )
    text = "fetch without TLS: whoever is on the way can change it"
    add("--allow-http", action="store_true", help=text)
    text = "drop what an interrupted import has left"
    add("--restart", action="store_true", help=text)
    text = "lines of JSON: how far it is, then the result"
    add("--json", action="store_true", help=text)


def _parse_sum(text: str) -> str:
    if len(text) == 64 and all(c in "0123456789abcdefABCDEF" for c in text):
        return text.lower()
    raise ValueError(f"{text[:80]!r} is no SHA-256: write its 64 hexadecimal digits")


def _parse_kind(text: str) -> Any:
    from forebay.importing.kinds import parse_kind

    return parse_kind(text)


def run(arguments: Arguments, target: str) -> int:
    """Import it. The exit code. Raises ForebayError, and OSError."""
    from forebay.config.model import Config
    from forebay.importing.limits import Limits
    from forebay.importing.making import Wish
    from forebay.importing.run import run as run_import

    most = arguments.max_size
    wish = Wish(
        source=arguments.source,
        target=target,
        sha256=arguments.sha256,
        kind=arguments.format,
        limits=Limits() if most is None else Limits(most, asked=True),
        ca_file=arguments.cacert,
        allow_http=arguments.allow_http,
        restart=arguments.restart,
    )
    config = Config.load(arguments.config)
    with ExitStack() as stack:
        shown = _Lines() if arguments.json else _Bars(stack, target)
        report = run_import(config, wish, shown, shown.tell)
    if arguments.json:
        print(json.dumps({"result": asdict(report)}))
        return 0
    data = format_size(report.allocated_bytes)
    print(f"{report.image}: {format_size(report.size)}, {data} of data, from {report.format}")
    if report.sha256:
        print(f"{report.image}: made of a file with the SHA-256 {report.sha256}")
    return 0


class _Lines:
    """How far it is, as lines of JSON."""

    def __init__(self) -> None:
        self._last = ("", 0.0)

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._last[0] != what or now - self._last[1] >= _LINE_SECONDS:
            self._last = what, now
            print(json.dumps({"phase": what, "done": done, "total": total}), flush=True)

    def tell(self, text: str) -> None:
        """Something that is not how far it is."""
        print(json.dumps({"note": text}), flush=True)


class _Bars:
    """The same as bars at a terminal, one for each thing that is done."""

    def __init__(self, stack: ExitStack, target: str) -> None:
        self._stack = stack
        self._target = target
        self._what = ""
        with progress_shown("") as self._advance:
            pass  # what that imports, this process cannot read any more as another user

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._stack.close()
            self._what = what
            self._advance = self._stack.enter_context(progress_shown(f"{what} {self._target}"))
        self._advance(done, total)

    def tell(self, text: str) -> None:
        """Something that is not how far it is."""
        print(f"forebay: {printable(text)}", file=sys.stderr)
