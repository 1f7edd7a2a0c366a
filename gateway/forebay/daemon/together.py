"""Several pieces of work at once, with one progress and one outcome."""

from collections.abc import Awaitable, Callable, Iterable

import trio

from forebay.errors import ForebayError
from forebay_cache import CacheError

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class Shares:
    """One progress made of several."""

    def __init__(self, count: int, progress: Progress) -> None:
        self._done = [0] * count
        self._total = [0] * count
        self._progress = progress

    def of(self, index: int) -> Progress:
        """The progress of one part."""

        def advance(done: int, total: int) -> None:
            self._done[index], self._total[index] = done, total
            self._progress(sum(self._done), sum(self._total))

        return advance


async def together(work: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """Do all of it at once. The first fault is raised when all have ended."""
    faults: list[Exception] = []

    async def one(do: Callable[[], Awaitable[object]]) -> None:
        try:
            await do()
        except (ForebayError, OSError, CacheError) as fault:
            faults.append(fault)

    async with trio.open_nursery() as nursery:
        for do in work:
            nursery.start_soon(one, do)
    if faults:
        raise faults[0]
