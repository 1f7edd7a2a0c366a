# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the process was given to read from and to write to."""

import io
import os
import sys


def open_closed() -> None:
    """Have descriptors 0 to 2 lead somewhere: else what is opened next gets their numbers, and messages go into it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (the lowest number is the one)


def show_any_text() -> None:
    """Have what the locale cannot show written as an escape: a name is no reason for a command to fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
