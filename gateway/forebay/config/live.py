# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The settings of a disk as they are now: its parts have them from here, so that a change reaches all at once."""

from forebay.config.model import DiskSettings


class LiveSettings:
    """Held by the parts of one disk. Who reads `now` reads it anew after each await that it depends on."""

    def __init__(self, now: DiskSettings) -> None:
        self.now = now
        """What holds at this instant: another object after each change."""
