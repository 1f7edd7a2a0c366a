# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a check finds, and what that means for the exit code."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is; the better ones first."""

    OK = "ok"
    UNKNOWN = "unknown"
    """It could not be looked at."""
    WARNING = "warning"
    FAULT = "fault"


CODES = {Level.OK: 0, Level.UNKNOWN: 1, Level.WARNING: 1, Level.FAULT: 2}
"""Exit codes, as monitoring plugins have them."""


@dataclass(frozen=True)
class Finding:
    """What one check has found."""

    check: str
    level: Level
    text: str
    todo: str = ""
    """What to do; empty where all is well."""

    def line(self) -> str:
        """For people."""
        return f"{self.level:7}  {self.check:8}  {self.text}" + (
            f": {self.todo}" if self.todo else ""
        )

    def json(self) -> dict[str, str]:
        """For programs."""
        return {
            "check": self.check,
            "level": self.level.value,
            "text": self.text,
            "todo": self.todo,
        }


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check, Level.OK, text)


def unknown(check: str, text: str, todo: str) -> Finding:
    """It could not be looked at."""
    return Finding(check, Level.UNKNOWN, text, todo)


def warning(check: str, text: str, todo: str) -> Finding:
    """It works, and may not for long, or not as well as it could."""
    return Finding(check, Level.WARNING, text, todo)


def fault(check: str, text: str, todo: str) -> Finding:
    """It does not work."""
    return Finding(check, Level.FAULT, text, todo)


def worst(found: Iterable[Finding]) -> Level:
    """The worst level of all."""
    levels = list(Level)
    return max((one.level for one in found), key=levels.index, default=Level.OK)
