# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Several pieces of work at once, with one progress and one outcome."""

import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator

import trio

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class Shares:
    """One progress made of several."""

    def __init__(self, count: int, progress: Progress) -> None:
        """`count` parts; `progress` is called with the sums over all of them."""
        self._done = [0] * count
        self._total = [0] * count
        self._progress = progress

    def of(self, index: int) -> Progress:
        """The progress of one part."""

        def advance(done: int, total: int) -> None:
            self._done[index], self._total[index] = done, total
            self._progress(sum(self._done), sum(self._total))

        return advance


@contextlib.contextmanager
def told_of(disk: str) -> Iterator[None]:
    """Around the piece of work on one disk of several: a fault of storage says which disk it is of."""
    try:
        yield
    except OSError as fault:
        raise OSError(fault.errno, f"'{disk}': {fault.strerror or type(fault).__name__}") from fault


async def run_all(work: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """Do all of it at once. Whatever a piece raises, the others go on; the first fault is raised at the end."""
    faults: list[Exception] = []

    async def one(do: Callable[[], Awaitable[object]]) -> None:
        try:
            await do()
        except Exception as fault:  # noqa: BLE001  (raised below)
            faults.append(fault)

    async with trio.open_nursery() as nursery:
        for do in work:
            nursery.start_soon(one, do)
    if faults:
        raise faults[0]
