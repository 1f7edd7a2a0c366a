# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The state of a disk, the word in the column STATE of `forebay status`: what it follows from, and what may follow it.

What each state means to an operator is said in gateway/FAILURES.md, the table of moves in gateway/README.md.
"""

from dataclasses import dataclass
from enum import StrEnum

from forebay_cache.states import Table


class DiskState(StrEnum):
    """One word for how a disk is. Of several that would fit, the first one here counts.

    The first and the last are the daemon's to say, the others follow from :class:`Facts`.
    """

    STOPPED = "stopped"
    """A fault of Forebay itself has ended its work; what a :class:`Disk` says of itself does not count any more."""
    CONFLICT = "conflict"
    """Its image is not the one it was served from, or is somebody else's."""
    BROKEN = "broken"
    """The cache device does not work, and has data that is nowhere else."""
    PASS_THROUGH = "pass-through"  # noqa: S105  (no password)
    """The cache device does not work, and the image has everything."""
    INCOMING = "incoming"
    """Its image is about to come from another host."""
    HANDED_OVER = "handed-over"
    """Its image was given to another host."""
    DEGRADED = "degraded"
    """The image cannot be reached."""
    LAGGING = "lagging"
    """The last checkpoint failed, or the last flush of an image that is written to directly."""
    COPYING = "copying"
    """A full copy is not complete."""
    INCOMPLETE = "incomplete"
    """A full copy has all but what cannot be read of the image."""
    READY = "ready"
    FAILED = "failed"
    """Of a disk on record that could not be brought back when the daemon started: there is no Disk of it. And of one of
    which a fault of Forebay itself keeps from being told how it is."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the state of a served disk follows from; see the states."""

    has_conflict: bool
    cache_has_failed: bool
    has_private: bool
    """Whether the cache has data of the disk that is nowhere else."""
    is_coming: bool
    """Whether the image is another host's, which hands it over to this disk."""
    is_given: bool
    """Whether the image was handed over to another host."""
    is_away: bool
    """Whether the image cannot be reached."""
    has_failed_pass: bool
    """Whether the last checkpoint failed, or the last flush of what went to the image directly."""
    is_copying: bool
    is_incomplete: bool
    """Whether a full copy lacks only what cannot be read."""


def state_of(facts: Facts) -> DiskState:
    """The state of a disk of which these are the facts."""
    if facts.has_conflict:
        return DiskState.CONFLICT
    if facts.cache_has_failed and facts.has_private:
        return DiskState.BROKEN
    if facts.cache_has_failed:
        return DiskState.PASS_THROUGH
    if facts.is_coming:
        return DiskState.INCOMING
    if facts.is_given:
        return DiskState.HANDED_OVER
    if facts.is_away:
        return DiskState.DEGRADED
    if facts.has_failed_pass:
        return DiskState.LAGGING
    if facts.is_copying and not facts.is_incomplete:
        return DiskState.COPYING
    if facts.is_incomplete:
        return DiskState.INCOMPLETE
    return DiskState.READY


_BECAUSE = {
    DiskState.BROKEN: "the cache device fails, and has data that is nowhere else",
    DiskState.PASS_THROUGH: "the cache device fails, and the image has everything",
    DiskState.INCOMING: "its image is about to come from another host",
    DiskState.HANDED_OVER: "its image was given to another host",
    DiskState.DEGRADED: "the image cannot be reached",
    DiskState.LAGGING: "a checkpoint fails, or a flush of the image",
    DiskState.COPYING: "a full copy is under way",
    DiskState.INCOMPLETE: "part of the image cannot be read for a full copy",
    DiskState.READY: "nothing is wrong any more",
    DiskState.CONFLICT: "somebody else writes or owns the image",
    DiskState.STOPPED: "a fault of Forebay itself ends the disk's work",
}
"""Why a disk enters each state. Those that pass can follow each other in any order, since a state is looked at now and
then, and what it follows from changes in between."""

FINAL = (DiskState.STOPPED, DiskState.FAILED)
"""After these nothing but the end of the disk comes: detach, or a restart."""

MOVES: Table[DiskState] = {
    state: {
        following: why
        for following, why in _BECAUSE.items()
        if state not in FINAL
        and following is not state
        and (state is not DiskState.CONFLICT or following is DiskState.STOPPED)
    }
    for state in DiskState
}
"""A conflict ends with the disk, too, unless that stops before."""
