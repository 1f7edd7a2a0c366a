# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Telling what has happened: one call, wherever it happens, for the log, the journal's fields and `forebay events`.

It costs nothing that waits, and raises nothing. Who keeps events is said by `keep_with`; without that they are in the
log only.
"""

import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from forebay.events.kinds import KEYS, KINDS, LARGEST, LONGEST_TEXT, PAUSE_SECONDS

_log = logging.getLogger("forebay.daemon")

Keep = Callable[[dict[str, Any]], None]
"""Keeps an event, which has all keys but `id` and `time`."""

MOST_LIMITS = 4096
"""Pairs of kind and disk of which it is known how many were told lately."""


class Subject(Protocol):
    """A disk, as far as events tell of it. Raises nothing that would be a fault."""

    image: str
    store: str

    def state(self) -> str:
        """The word in the column STATE."""

    def reason(self) -> str:
        """Why it is in that state; empty where all is well."""


@dataclass(frozen=True)
class Asker:
    """The process that asks the control API for something."""

    uid: int
    pid: int


ASKED: ContextVar[Asker | None] = ContextVar("asked", default=None)
"""Who has asked for what this task does; None: it does it by itself."""

SUBJECTS: dict[str, Subject] = {}
"""The disks by their names, those on record that are not served among them."""


class _Kept:
    """Where events go to."""

    keep: Keep | None = None


@contextlib.contextmanager
def keep_with(keep: Keep) -> Iterator[None]:
    """Within it all events are handed to `keep`, in whatever thread they happen."""
    _Kept.keep = keep
    try:
        yield
    finally:
        _Kept.keep = None


def by_itself() -> None:
    """Note that this task does what it does by itself, whoever asked for what it was begun with."""
    ASKED.set(None)


def tell(
    kind: str,
    text: str,
    disk: str = "",
    *,
    level: int = logging.INFO,
    log: logging.Logger = _log,
    line: str = "",
    exc_info: BaseException | None = None,
    **more: Any,
) -> None:
    """Tell an event: `text` is for people and without the disk's name. `line` is that of the log, where it is another
    one; `more` are keys of KEYS.

    What is told too often is counted only, but warnings are in the log in any case. Raises nothing.
    """
    try:
        untold = LIMITS.take(kind, disk)
        event = {"kind": kind, "text": text, **described(disk), **_asked(), **more}
        if untold:
            event["untold"] = untold
        if KINDS[kind].is_logged and (untold is not None or level > logging.INFO):
            said = (line or (f"{disk}: {text}" if disk else text)) + _by_whom()
            log.log(level, "%s", said, exc_info=exc_info, stacklevel=2, extra={"event": event})
        if _Kept.keep is not None and untold is not None:
            _Kept.keep(bounded(event))
    except Exception:  # noqa: BLE001 - what it is about goes on
        _log.exception("an event cannot be told")


def bounded(event: dict[str, Any]) -> dict[str, Any]:
    """The event with no text and no number that is too large."""
    found = {}
    for key, value in event.items():
        kind = KEYS[key]
        if kind is str:
            found[key] = value if len(value) <= LONGEST_TEXT else value[: LONGEST_TEXT - 1] + "…"
        else:
            found[key] = value if isinstance(value, bool) else max(0, min(value, LARGEST))
    return found


def described(disk: str) -> dict[str, str]:
    """The keys that say which disk it is, and how it is; empty where that is not known."""
    found = {"disk": disk, "image": "", "store": "", "state": ""}
    subject = SUBJECTS.get(disk)
    if subject is not None:
        with contextlib.suppress(Exception):  # it comes or goes at this moment
            found |= {"image": subject.image, "store": subject.store, "state": subject.state()}
    return found


def subject_of(word: str) -> dict[str, str]:
    """The same for a word of a message: the name of a disk, or the image of some."""
    if word in SUBJECTS:
        return described(word)
    for subject in list(SUBJECTS.values()):
        if subject.image == word:
            return {"image": word, "store": subject.store}
    return {}


def _asked() -> dict[str, int]:
    asker = ASKED.get()
    return {} if asker is None else {"asked_uid": asker.uid, "asked_pid": asker.pid}


def _by_whom() -> str:
    asker = ASKED.get()
    return "" if asker is None else f" (asked by process {asker.pid} of user {asker.uid})"


class Limits:
    """How often each kind is told of each disk: what happens in a loop would drive out everything else."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: OrderedDict[tuple[str, str], tuple[float, float, int]] = OrderedDict()
        """By kind and disk: how many may be told, as of which time, and how many were not since the last one."""

    def take(self, kind: str, disk: str) -> int | None:
        """How many were not told before this one; None: nor is this."""
        now, burst = self._clock(), KINDS[kind].burst
        left, since, untold = self._left.pop((kind, disk), (float(burst), now, 0))
        left = min(burst, left + (now - since) * burst / (20 * PAUSE_SECONDS))
        is_told = left >= 1
        self._left[kind, disk] = (left - 1, now, 0) if is_told else (left, now, untold + 1)
        if len(self._left) > MOST_LIMITS:
            self._left.popitem(last=False)
        return untold if is_told else None


LIMITS = Limits()
"""Of this process."""
