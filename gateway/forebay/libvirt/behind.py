# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Detaching behind libvirt's back: again and again, until it is done."""

import contextlib
import time
from collections.abc import Callable, Sequence

from forebay.errors import ForebayError
from forebay.libvirt.hold import Hold

DETACH_SECONDS = 3600.0
"""How long it is tried."""

DETACH_PAUSE = 1.0
"""Seconds until it is tried again; doubled each time, up to DETACH_PAUSE_MOST."""
DETACH_PAUSE_MOST = 30.0

Wanted = tuple[Callable[[], None], Hold]
"""What detaches a disk, and the hold on it. The call raises ForebayError and OSError."""


def detach_all(held: Sequence[Wanted], log: Callable[[str], None]) -> None:
    """Detach the disks, and give up the holds, until it is done, or for DETACH_SECONDS.

    A disk that cannot be detached now does not keep the others. What fails is told to `log`, once.
    """
    deadline = time.monotonic() + DETACH_SECONDS
    pause = DETACH_PAUSE
    told: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        left = [one for one in held if _is_ours(one[1], stack, log)]
        while left := [one for one in left if not _is_done(*one, told, log)]:
            if time.monotonic() + pause > deadline:
                break
            time.sleep(pause)
            pause = min(2 * pause, DETACH_PAUSE_MOST)
        for _, hold in left:
            name = hold.path.name
            log(
                f"disk '{name}' stays attached, and nobody tries again: "
                f"'forebay detach {name}' when the reason is gone"
            )


def _is_ours(hold: Hold, stack: contextlib.ExitStack, log: Callable[[str], None]) -> bool:
    """Be the process that detaches the disk, until the stack ends. False if another one is, or it cannot be told."""
    try:
        return stack.enter_context(hold.detaching())
    except OSError as fault:
        log(f"disk '{hold.path.name}' stays attached: {fault}")
        return False


def _is_done(
    detach: Callable[[], None], hold: Hold, told: dict[str, str], log: Callable[[str], None]
) -> bool:
    """Try to detach the disk, and give up the hold. False if that failed; `told` is what the log has, by disk."""
    name = hold.path.name
    try:
        detach()
        hold.drop()
    except (ForebayError, OSError) as fault:
        if told.get(name) != str(fault):
            told[name] = str(fault)
            log(f"disk '{name}' stays attached for now, and is tried again: {fault}")
        return False
    return True
