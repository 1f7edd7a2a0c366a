# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How a case ends other than well."""


class Failure(Exception):
    """What the case asks for does not hold, or a machine does not do what it should."""


class Lacking(Exception):
    """The lab cannot be had here, and why."""


def demand(holds: object, what: str) -> None:
    """Failure, unless it holds; `what` says what was seen."""
    if not holds:
        raise Failure(what)
