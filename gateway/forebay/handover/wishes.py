# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What operators wish of the handover of one disk, for as long as their commands wait."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from forebay.errors import ForebayError

Progress = Callable[[int, int], None]


@dataclass(eq=False)
class _Wish:
    """Of one command."""

    to: str
    """The host to which alone the image is given; empty: whichever asks."""
    progress: Progress


class Wishes:
    """All of one disk. Those that name a host name the same one."""

    def __init__(self) -> None:
        self._all: list[_Wish] = []

    @contextlib.contextmanager
    def wish(self, disk: str, to: str, progress: Progress) -> Iterator[None]:
        """Within it the image of the disk is given to the host `to` alone, unless that is empty.

        `progress` is told how much of what was dirty is written back. Raises ForebayError where somebody else waits for
        another host.
        """
        other = next((one.to for one in self._all if one.to not in ("", to)), "")
        if to and other:
            raise ForebayError(
                f"'{disk}' is being prepared for host {other} already: end that command first, or leave --to out"
            )
        one = _Wish(to, progress)
        self._all.append(one)
        try:
            yield
        finally:
            self._all.remove(one)

    def allow(self, host: str) -> bool:
        """True if nobody wishes that the image goes to another host."""
        return all(one.to in ("", host) for one in self._all)

    def advance(self, done: int, total: int) -> None:
        """Tell everybody how much of what was dirty is written back."""
        for one in list(self._all):
            one.progress(done, total)
