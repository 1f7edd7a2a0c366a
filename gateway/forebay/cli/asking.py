# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What most sub-commands need: the daemon to ask, and their answer on the terminal."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TYPE_CHECKING = False  # `typing` takes 3 ms, on each start of the command
if TYPE_CHECKING:
    from typing import Any, Protocol
else:
    Protocol = object

Arguments = argparse.Namespace

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class Daemon(Protocol):
    """The daemon, as `forebay.client.Client` asks it. Every method raises ForebayError."""

    def get(self, target: str) -> Any:
        """What the daemon says at `target`, decoded from JSON."""

    def post(self, target: str, content: dict[str, Any]) -> Any:
        """Send a JSON object and wait for the answer, however long it takes."""

    def follow(
        self, method: str, target: str, content: dict[str, Any] | None, progress: Progress
    ) -> Any:
        """Start work, pass its progress on, and return its result."""


def daemon(arguments: Arguments) -> Daemon:
    """The daemon that the configuration points at. Raises ForebayError for a file that cannot be read."""
    from forebay.client import Client
    from forebay.config.client import run_directory

    return Client(os.path.join(run_directory(arguments.config), "control.sock"))


def absolute_image(text: str) -> str:
    """An image as the daemon takes it. A path is made absolute: the daemon has a working directory of its own."""
    store, colon, _ = text.partition(":")
    if text.startswith("/") or (colon and "/" not in store):
        return text
    return os.path.abspath(text)


def print_json(content: Any) -> None:
    """Print an object, indented, and a line feed."""
    print(json.dumps(content, indent=2))


@contextmanager
def progress_shown(what: str) -> Iterator[Progress]:
    """A progress bar on stderr where both it and stdout are a terminal, else nothing."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        yield lambda _done, _total: None
        return
    from forebay.cli.terminal.progress import progress_bar

    with progress_bar(what) as advance:
        yield advance
