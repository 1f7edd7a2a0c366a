# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The command. Nothing here is imported before it is needed: hooks and monitoring call it often."""

import gc

_looked = gc.isenabled()
gc.disable()  # what is imported stays: the garbage collector would look through it time and again
from forebay.cli.main import main  # noqa: E402

if _looked:
    gc.enable()

__all__ = ["main"]
