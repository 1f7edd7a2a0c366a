# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a disk does with its image."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Use:
    """What a disk does with its image: writes it, lies over it as an overlay, or reads it only."""

    disk: str
    """The name of the disk."""
    gateway: str
    """The uuid of this gateway's cache, by which other gateways know it."""
    read_only: bool = False
    overlay: bool = False
    keep: bool = False
    """True if what an overlay has is kept when it is detached."""
    comes_back: bool = False
    """True if the overlay is attached again, and goes on with what was kept of it."""
    need_locks: bool = True
    """True if an image without file locks is refused."""
    refresh: bool = True
    """True if the disk goes on with an image that somebody else changed, from what it has now, where nothing is lost by
    that."""
    as_bytes: bool = False
    """True if the bytes of the image are meant, whatever they look like: those of a qcow2 file, say."""

    is_coming: bool = False
    """True if another gateway writes the image, or has the overlay, and hands it over to the disk."""
    is_base: bool = False
    """True if disks of others lie over it, which are spoilt when it changes: qcow2 files of QEMU's."""

    @property
    def needs_still(self) -> bool:
        """True if the image has to stay as it is."""
        return self.overlay or self.is_base

    @property
    def writes(self) -> bool:
        """True if the disk writes the image itself."""
        return not (self.read_only or self.overlay)

    @property
    def shows_raw(self) -> bool:
        """True if the image counts as a raw disk from now on: who only asked for its bytes has not said so."""
        return self.writes or not self.as_bytes
