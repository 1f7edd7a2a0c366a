# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Long work of many tasks: of all of it, one slice runs in each turn of the event loop, however many there are.

A slice of 2 ms holds nobody up. A hundred of them in one turn, of a hundred requests that one client has sent, would.
"""

from __future__ import annotations

import trio

_turns: trio.lowlevel.RunVar[trio.Lock] = trio.lowlevel.RunVar("forebay_cache.turns")


async def next_turn() -> None:
    """Let all other tasks run. Of those that wait here one goes on in each turn of the loop, in the order they came.

    For tasks whose work has slices: before each of them.
    """
    try:
        lock = _turns.get()
    except LookupError:
        lock = trio.Lock()
        _turns.set(lock)
    async with lock:
        pass  # whoever has it awaits one turn, and gives it to the next one as that begins
