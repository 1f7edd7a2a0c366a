# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The configuration, taken anew while VMs run: stores, origins, and what holds for disks where nobody set it of them.

All of it or nothing: a file that is wrong, or would take the image from under a disk, is refused, and what held before
holds. The directories, the cache and where metrics are read take a restart, which is said.
"""

import logging
from collections.abc import Iterable
from typing import Any

import trio

from forebay.config.model import FIXED, Config
from forebay.daemon.arrivals import Arrivals
from forebay.daemon.attached import Absent
from forebay.daemon.disks import Disks
from forebay.daemon.record import DiskRecords
from forebay.daemon.settings import Settings
from forebay.errors import ConfigError, ForebayError
from forebay.events.telling import tell
from forebay.image.boundary import breaks_the_cache
from forebay.origin.addresses import resolve
from forebay.stores.sockets import StoreSockets

log = logging.getLogger("forebay.daemon")

ELSEWHERE = {"fuse": "forebay-fuse", "staging": "forebay-stage"}
"""Sections that processes of their own read at their start, with the unit of each."""

MOST_NAMED = 5
"""Disks that an error names, at most."""


class Reloading:
    """Takes the configuration anew, one at a time."""

    def __init__(
        self,
        config: Config,
        nursery: trio.Nursery,
        disks: Disks,
        records: DiskRecords,
        stores: StoreSockets,
        arrivals: Arrivals,
    ) -> None:
        """`config` is the object that all parts of the daemon share. `nursery` is the long-lived one."""
        self._config = config
        self._nursery = nursery
        self._disks = disks
        self.settings = Settings(config, disks, records)
        """What follows for disks."""
        self._stores = stores
        self._arrivals = arrivals
        self._alone = trio.Lock()

    def running(self) -> dict[str, Any]:
        """The configuration that holds, as `toml`."""
        return {"toml": self._config.to_toml()}

    async def reload(self) -> dict[str, Any]:
        """Take what the files say now; what is new. Raises ConfigError and ForebayError, and nothing has changed then.

        The log has one line of it, either way.
        """
        async with self._alone:
            try:
                new = await trio.to_thread.run_sync(self._config.again, abandon_on_cancel=True)
                self._check(new)
            except (ConfigError, ForebayError) as fault:
                what = "; ".join(str(fault).splitlines())
                text = f"the configuration is not taken, that of before holds: {what}"
                tell("config", text, level=logging.ERROR)
                raise
            told, lost = self._told(new), self._lost()
            self._config.follow(new)
            told["disks_changed"] = self.settings.follow(self._nursery)
            for one in lost:
                if self._is_known(self._config, one):
                    self._nursery.start_soon(self._bring_back, one)
            with trio.CancelScope(shield=True):
                await self._stores.follow()
        tell("config", f"the configuration was taken anew: {'; '.join(_lines(told))}")
        return {**told, "lines": _lines(told)}

    # -- what is refused

    def _check(self, new: Config) -> None:
        """Raise ForebayError where disks that are served could not go on with that."""
        users: dict[str, list[str]] = {}
        for name, image in self._images():
            if (why := self._why_lost(new, name, image)) is not None:
                users.setdefault(why, []).append(name)
        for why, names in users.items():
            others = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            raise ForebayError(
                f"{why}, and {', '.join(names[:MOST_NAMED])}{others} would lose the image: detach that first, or keep "
                "its store as it is"
            )
        self._stores.check(new)

    def _images(self) -> Iterable[tuple[str, str]]:
        """Name and image of each disk that is served, or on its way."""
        yield from ((one.name, one.record.image) for one in self._disks.all_attached())
        yield from self._disks.coming()

    def _why_lost(self, new: Config, name: str, image: str) -> str | None:
        """Why the disk could not have its image by that configuration, in words; None if it could."""
        try:
            found = resolve(new, image)
            known = self._disks.known(name)
            if known is not None:
                known.record.settings(new, found.store)
        except ForebayError as fault:
            return str(fault).partition(":")[0]
        if found != resolve(self._config, image):
            return f"{image} would be another image"
        return None

    # -- what is new

    def _told(self, new: Config) -> dict[str, Any]:
        was, now = self._config.stores, new.stores
        restart = self._config.changed(new, FIXED)
        elsewhere = [unit for part, unit in ELSEWHERE.items() if self._config.changed(new, [part])]
        return {
            "files": [str(path) for path in new.files],
            "stores_added": [name for name in now if name not in was],
            "stores_removed": [name for name in was if name not in now],
            "stores_changed": [name for name in now if name in was and now[name] != was[name]],
            "changed": self._config.changed(new, ["defaults", "origins"]),
            "restart": restart,
            "restart_units": elsewhere,
        }

    def _lost(self) -> list[Absent]:
        """Disks that are not served because their image is not configured."""
        return [
            one
            for one in self._disks
            if isinstance(one, Absent) and not self._is_known(self._config, one)
        ]

    @staticmethod
    def _is_known(config: Config, one: Absent) -> bool:
        try:
            one.record.settings(config, resolve(config, one.record.image).store)
        except ForebayError:
            return False
        return True

    async def _bring_back(self, one: Absent) -> None:
        """Serve a disk whose image is configured again."""
        try:
            async with self._disks.turn(one.name) as found:
                if found is one:
                    await self._arrivals.bring_back(one.name, one.record)
        except ForebayError as fault:
            log.warning("%s", fault)
        except Exception as fault:
            if breaks_the_cache(fault):
                raise
            log.exception("disk '%s' is not served", one.name)


def _lines(told: dict[str, Any]) -> list[str]:
    """The same for people, one line for each thing that is new."""
    found = []
    for key, word in (("added", "new"), ("changed", "changed"), ("removed", "gone")):
        if names := told[f"stores_{key}"]:
            found.append(f"stores {word}: {', '.join(names)}")
    if told["changed"]:
        found.append(f"changed: {', '.join(told['changed'])}")
    if told["disks_changed"]:
        found.append(f"disks with other settings: {told['disks_changed']}")
    if told["restart"]:
        found.append(f"{', '.join(told['restart'])}: as before until the daemon is restarted")
    if told["restart_units"]:
        found.append(f"{', '.join(told['restart_units'])}: as before until restarted")
    return found or ["nothing is new"]
