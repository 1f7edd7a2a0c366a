# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The compiled core of the data path, and whether this process serves with it: see fast/README.md.

Whoever has two ways, a compiled one and one in Python that does the same, asks :func:`serves` when it makes its
objects: they keep to their way. Nothing else depends on the core.
"""

import os
from importlib.util import find_spec

__all__ = ["core", "missing", "serves", "use"]

VARIABLE = "FOREBAY_CORE"
"""Of the environment; "0" has a process serve without the core, whatever is set elsewhere."""


missing = ""
"""Why there is no `core`. Empty where there is one."""

try:
    from forebay_fast import core
except ImportError as error:
    core = None  # type: ignore[assignment]
    if find_spec("forebay_fast.core"):
        missing = str(error)
    else:
        missing = (
            "there was no C compiler, or there were no headers of Python, when it was installed"
        )

_wanted = os.environ.get(VARIABLE) != "0"


def serves() -> bool:
    """True if what is made from now on serves with the core."""
    return _wanted and not missing


def use(wanted: bool) -> None:
    """Have what is made from now on serve with the core, or not. The environment has the last word."""
    global _wanted  # noqa: PLW0603  (one for the process)
    _wanted = wanted and os.environ.get(VARIABLE) != "0"
