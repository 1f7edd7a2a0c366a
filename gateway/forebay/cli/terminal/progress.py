# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A progress bar at a terminal, drawn by rich. Imported only there: rich takes 60 ms to start."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Advance = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@contextmanager
def progress_bar(what: str, console: Console | None = None) -> Iterator[Advance]:
    """Draw on stderr until left; call the result with (bytes done, bytes in all)."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )
    task = bar.add_task(what, total=None)

    def advance(done: int, total: int) -> None:
        if not total:
            return  # nothing to do: no bar
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield advance
        bar.update(task, completed=bar.tasks[0].total)
    finally:
        if bar.live.is_started:
            bar.stop()
