# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the catalogue knows of boot traces: the commands on them, and what the list of images tells."""

import contextlib
import errno
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from forebay.boot.boots import NO_TRACE, Boots
from forebay.boot.files import Found
from forebay.catalogue.entries import Entries
from forebay.config.model import Config
from forebay.errors import ForebayError, advice
from forebay.origin.addresses import Address, keys_of_name, resolve

log = logging.getLogger("forebay.boot")

LISTED = ("path", "fits", "boots", "recorded", "bytes", "requests", "seconds")
"""What the list of images tells of a trace: keys of `Found.told`."""

_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_LINKS = (errno.ELOOP, errno.EXDEV)


class Traces:
    """The boot traces of all images."""

    def __init__(
        self, config: Config, entries: Entries, boots: Boots, is_known: Callable[[str], bool]
    ) -> None:
        """`is_known`: true of the key of an image of which the cache has something, or which has an entry."""
        self._config = config
        self._entries = entries
        self._boots = boots
        self._is_known = is_known
        boots.on_known = self._note

    def _note(self, key: str, found: Found | None) -> None:
        entry = self._entries.get(key)
        told = None if found is None else {name: found.told()[name] for name in LISTED}
        if entry is not None and entry.trace != told:
            self._entries.put(key, replace(entry, trace=told))

    async def find(self, image: str) -> Found:
        """What boots from the image read. Raises ForebayError."""
        address = self._address(image)
        with _told_of(address):
            found = await self._boots.find(address, None)
        if found is None:
            raise ForebayError(NO_TRACE.format(address.key))
        return found

    async def drop(self, image: str) -> dict[str, Any]:
        """Forget what boots from the image read. Raises ForebayError."""
        address = self._address(image)
        with _told_of(address):
            return {"image": address.key, "dropped": await self._boots.drop(address)}
        raise AssertionError("it returns or raises")

    async def drop_if_possible(self, key: str) -> str:
        """Forget what boots from the image with that key read: `dropped`, `none`, or why it could not be dropped."""
        try:
            dropped = await self._boots.drop(resolve(self._config, key))
        except (OSError, ForebayError) as fault:
            return getattr(fault, "strerror", None) or str(fault)
        return "dropped" if dropped else "none"

    async def forget(self, key: str) -> None:
        """The image is gone: what boots from it read goes too."""
        became = await self.drop_if_possible(key)
        if became != "none":
            log.info("%s is gone: its boot trace: %s", key, became)

    def _address(self, image: str) -> Address:
        """The address of an image: where nothing is known of its bytes, that of the virtual disk in it."""
        address = resolve(self._config, image)
        if self._is_known(address.key):
            return address
        known = [key for key in keys_of_name(address.key) if self._is_known(key)]
        return resolve(self._config, known[0]) if known else address


@contextlib.contextmanager
def _told_of(address: Address) -> Iterator[None]:
    """Around what looks beside an image: a fault of storage becomes a ForebayError that names the image."""
    try:
        yield
    except OSError as fault:
        if fault.errno in _NO_SUCH_FILE:
            raise ForebayError(f"{address.key}: no such image: check the name") from fault
        if fault.errno in _LINKS:
            raise ForebayError(
                f"{address.key}: a symbolic link is on the way: name the file it leads to"
            ) from fault
        what = advice(fault, "see that its storage answers, then try again")
        raise ForebayError(f"{address.key}: {fault.strerror or fault}: {what}") from fault
