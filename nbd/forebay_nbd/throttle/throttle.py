# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The interface between a connection and whoever says how fast an export may be used."""

from array import array
from collections.abc import Callable
from typing import Final, Protocol

from forebay_nbd.protocol.wire import Cmd
from forebay_nbd.throttle.weight import Weight

FREE: Final = frozenset((Cmd.FLUSH, Cmd.DISC))
"""What never has to wait: a guest that flushes wants what it has to be safe, and one that leaves, its end."""


class Waiter(Protocol):
    """The place of one connection among those of its export."""

    def admit(self, command: int, length: int) -> float:
        """0.0 if a request may be carried out now, which is counted then; otherwise in how many seconds to ask again.

        `length` in bytes. Never called for a command of FREE. infinity: others come first.
        """

    def wait(self) -> None:
        """Called when the connection is going to wait: it has a place among all that do, until pass_on().

        `wake` is called when it is the first of them.
        """

    def pass_on(self) -> None:
        """Called when it does something else than to wait: others come first now."""

    def leave(self) -> None:
        """Called once: the connection has ended."""


class Throttle(Protocol):
    """How fast an export may be used, by all its connections together."""

    is_on: bool
    """False: nothing is limited for now, and nobody has to ask. `wake` of all is called when it changes."""
    weight: Weight
    """What it gets beside others, limited or not; the same one for good."""

    words: "array[float]"
    """Its numbers for the compiled core: see `throttle.words`."""

    def enter(self, wake: Callable[[], None]) -> Waiter:
        """Called for each connection. `wake` is called when it is worth to look at `is_on`, and to ask, again."""
