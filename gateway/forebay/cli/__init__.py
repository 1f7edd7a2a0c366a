# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The command. Nothing here is imported before it is needed: hooks and monitoring call it often."""

from forebay.cli.main import main

__all__ = ["main"]
