# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The parser of arguments, which says in one line what is wrong with them."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence

from forebay.units import did_you_mean, printable

TYPE_CHECKING = False  # `typing` takes 3 ms, on each start of the command
if TYPE_CHECKING:
    from typing import Any, NoReturn

WRONG_USAGE = 2
"""The exit code."""

JSON_VERSION = 1
"""Of what `--json` prints: docs/json.md."""


class _Formatter(argparse.HelpFormatter):
    """Help as wide as the terminal. argparse would ask shutil for the width, on every start and not only for help."""

    def __init__(self, prog: str) -> None:
        try:
            width = os.get_terminal_size().columns
        except OSError:
            width = 80
        super().__init__(prog, width=max(40, width - 2))


MOST_KNOWN = 200
"""Characters of what might be meant, and of what was given, that an error shows."""


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
            uses = f": use one of {known}" if len(known) <= MOST_KNOWN else ""  # --help has them
            text = f"argument {what}: no {what.lower()} '{word[:MOST_KNOWN]}'{hint}{uses}"
        self.exit(WRONG_USAGE, f"{self.prog}: {printable(text)} (see '{self.prog} --help')\n")


def without_json_version(words: Sequence[str], error: Callable[[str], NoReturn]) -> list[str]:
    """The arguments with `--json` for `--json=1`. `error` is called, with a text, where another version is asked for.

    argparse has no option whose value may only follow a `=`, and would take `vm1` of `status --json vm1` for it.
    """
    options = words[: words.index("--")] if "--" in words else words
    for word in options:
        if word.startswith("--json=") and word != f"--json={JSON_VERSION}":
            error(
                f"{word}: this forebay writes version {JSON_VERSION} of its JSON, --json={JSON_VERSION}"
            )
    plain = ["--json" if word == f"--json={JSON_VERSION}" else word for word in options]
    return [*plain, *words[len(options) :]]


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which shows the text of ArgumentTypeError only, and not that of ValueError."""

    def check(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as fault:
            raise argparse.ArgumentTypeError(str(fault)) from None

    return check


def imported(module: str, parse: str) -> Callable[[str], Any]:
    """The function `parse` of a module that is imported only where it is called."""
    return checked(lambda text: getattr(__import__(module, fromlist=[parse]), parse)(text))  # noqa: PLW0108 (later)
