# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What Forebay tells an operator when something cannot be done."""

import errno

_ADVICE = {
    errno.ENOSPC: "make room there, and try again",
    errno.EDQUOT: "make room there, or raise the quota, and try again",
    errno.ETIMEDOUT: "see that the storage answers, and try again",
    errno.EROFS: "mount it for writing, and try again",
}


def advice(fault: Exception, otherwise: str) -> str:
    """What to do about a fault of storage; `otherwise` where it is not one of those that tell."""
    return _ADVICE.get(getattr(fault, "errno", None) or 0, otherwise)


class ForebayError(Exception):
    """Something asked for that cannot be done. The text is one line: what is wrong, and what to do about it."""


class InUseError(ForebayError):
    """An image that somebody else has: it may be free later."""

    def __init__(self, text: str, holder: dict[str, object]) -> None:
        """`holder` says for programs who that is: what the owner marker says, or which program has it open."""
        super().__init__(text)
        self.holder = holder


class ConfigError(ForebayError):
    """A configuration that was refused. The text has one line for each fault; `faults` has them one by one."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults
