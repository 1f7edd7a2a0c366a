# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What state disks are in, looked at once a second: it follows from facts, and nobody else says when it changes."""

import trio

from forebay.events.telling import SUBJECTS, Subject, tell

LOOK_SECONDS = 1.0

READY, CONFLICT = "ready", "conflict"

_AT_ONCE = 64
"""Disks that are looked at between two turns of others."""


async def watch_states() -> None:
    """Tell each change, until cancelled. Raises nothing."""
    seen: dict[str, str] = {}
    while True:
        seen = await look(seen)
        await trio.sleep(LOOK_SECONDS)


async def look(seen: dict[str, str]) -> dict[str, str]:
    """One look at all disks, each compared with `seen`: what to compare with the next time."""
    found = {}
    for n, (disk, subject) in enumerate(list(SUBJECTS.items()), 1):
        if n % _AT_ONCE == 0:
            await trio.lowlevel.checkpoint()
        was = seen.get(disk, READY)
        found[disk] = _look(disk, subject, was)
    return found


def _look(disk: str, subject: Subject, was: str) -> str:
    """The disk's state, told if it is another one than `was`."""
    try:
        now = subject.state()
        if now != was:
            _tell(disk, was, now, subject.reason())
    except Exception:  # noqa: BLE001 - what is wrong with it, its status says
        return was
    return now


def _tell(disk: str, was: str, now: str, reason: str) -> None:
    line = f"{disk}: {now}, was {was}"  # why, the log has said already
    text = f"{now}, was {was}" + (f": {reason}" if reason else "")
    if now == CONFLICT:
        tell("conflict", text, disk, line=line, was=was, now=now)
    else:
        tell("state", text, disk, line=line, was=was, now=now)
