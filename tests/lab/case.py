# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A case: a name, whether the short form has it, and what is done. It raises Failure where something does not hold."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lab.place import Lab


@dataclass(frozen=True)
class Case:
    """One thing that is tried; it begins on machines that have just been set up."""

    name: str
    does: Callable[[Lab], str | None]
    """May return a few words for the line that says that it holds."""

    short: bool = True


def chosen(cases: Iterable[Case], words: Iterable[str]) -> list[Case]:
    """The cases of the short form; with the word "all" all of them, else those whose names contain one of the words."""
    wanted = list(words)
    if not wanted:
        return [case for case in cases if case.short]
    if "all" in wanted:
        return list(cases)
    return [case for case in cases if any(word in case.name for word in wanted)]
