# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""State machines: which state something is in, and which move of it is legal.

A kind of thing (a layer, an image, a disk, a volume) has one enum of states and one :data:`Table` of moves, beside the
code that makes them, and the same table in the README of its folder, which a test compares. A move that the table does
not have is a bug: it is logged, and the state changes nevertheless, so that a guest is not stopped by it; where the
environment variable FOREBAY_STRICT is set, as in the tests, it raises :class:`IllegalMove`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

STRICT = "FOREBAY_STRICT"
"""The environment variable that makes illegal moves raise."""

S = TypeVar("S", bound=Enum)

Table = Mapping[S, Mapping[S, str]]
"""For each state, the states that may follow it, each with the reason why it does: a short clause, for the README."""


class IllegalMove(AssertionError):
    """A state was to follow another one that it must not follow."""


class Machine(Generic[S]):
    """The state of one thing. `name` says in messages which thing it is."""

    __slots__ = ("_name", "_state", "_table")

    def __init__(self, table: Table[S], start: S, name: str) -> None:
        self._table = table
        self._state = start
        self._name = name

    @property
    def state(self) -> S:
        """The state that it is in now."""
        return self._state

    def may_become(self, state: S) -> bool:
        """True if `state` is the present one, or may follow it."""
        return state is self._state or state in self._table[self._state]

    def become(self, state: S) -> None:
        """Enter a state; nothing happens if it is the present one.

        Raises IllegalMove for a move that the table does not have, if FOREBAY_STRICT is set; else such a move is
        logged as an error, and made.
        """
        if not self.may_become(state):
            text = f"{self._name}: {self._state.value} must not become {state.value}"
            if os.environ.get(STRICT):
                raise IllegalMove(text)
            log.error("%s", text)
        self._state = state


def rows(table: Table[S]) -> list[tuple[str, str, str]]:
    """(state, next state, reason) of each legal move, in the order of the table: the rows of a README's table."""
    return [
        (state.value, following.value, reason)
        for state, moves in table.items()
        for following, reason in moves.items()
    ]
