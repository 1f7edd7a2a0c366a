# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The settings of disks while their VMs run: what they are and who says so, and how operators change them.

What can be set is the table in `forebay.config.keys`; what a disk does about a change is `Disk.adopt`, and for the mode
`Disk.set_mode`. A change is on record of the disk before it holds. Where the mode is among what changes, and cannot
become what was asked for, nothing of it holds.
"""

import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import trio

from forebay.config.model import Config, DiskSettings
from forebay.daemon.attached import Absent, Attached
from forebay.daemon.disks import Disks
from forebay.daemon.parallel import Progress
from forebay.daemon.record import DiskRecord, DiskRecords
from forebay.errors import ForebayError
from forebay.events.telling import tell
from forebay.image.boundary import breaks_the_cache
from forebay.origin.addresses import resolve
from forebay.overview.detail import settings_told
from forebay.units import Mode

log = logging.getLogger("forebay.daemon")

Told = dict[str, Any]
"""One setting of one disk: `name`, `key`, `value` as the configuration writes it, and `from`, who says so."""

AT_OPENING = ("on_change", "require_locks")
"""Settings of a disk that count when its image is opened."""

_AT_ONCE = 16
"""Disks whose settings are told between two turns of others."""


class Settings:
    """Those of all disks."""

    def __init__(self, config: Config, disks: Disks, records: DiskRecords) -> None:
        self._config = config
        self._disks = disks
        self._records = records

    # -- asking

    def told(self, name: str) -> list[Told]:
        """The settings of a disk. Raises ForebayError where there is none."""
        return self._rows(self._disks.find(name))

    async def all_told(self) -> AsyncIterator[Told]:
        """Those of all disks, in slices."""
        for n, one in enumerate(list(self._disks)):
            if n % _AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            for row in self._rows(one):
                yield row

    def _rows(self, one: Attached | Absent) -> list[Told]:
        """None of a disk that is not served because its image is not configured any more."""
        own = one.record.own()
        if isinstance(one, Attached):
            store, settings = one.source.address.store, one.disk.settings
        else:
            try:
                store = resolve(self._config, one.record.image).store
                settings = one.record.settings(self._config, store)
            except ForebayError:
                return []
        rows = settings_told(self._config, store, settings, own)
        return [{"name": one.name, **row} for row in rows]

    # -- the configuration has changed

    def follow(self, nursery: trio.Nursery) -> int:
        """Have all disks have what the configuration says now, where nothing was set of them. How many have something
        else than before. What takes time, or waits for another command, goes on in `nursery`.
        """
        changed = 0
        for attached in self._disks.all_attached():
            was, now = attached.disk.settings, self._wanted(attached)
            if was == now:
                continue
            changed += 1
            if attached.busy.locked() or was.mode != now.mode:
                nursery.start_soon(self._follow, attached, was.mode)
            if not attached.busy.locked():
                self._take(attached, now)
        return changed

    def _wanted(self, attached: Attached) -> DiskSettings:
        """What the disk is to have now. What counts when an image is opened is as it was then, until the next start."""
        wanted = attached.record.settings(self._config, attached.source.address.store)
        return wanted.model_copy(
            update={key: getattr(attached.disk.settings, key) for key in AT_OPENING}
        )

    def _take(self, attached: Attached, settings: DiskSettings) -> None:
        attached.disk.adopt(settings)
        attached.listener.tenant.rule = attached.record.rule(settings)

    async def _follow(self, attached: Attached, mode: Mode) -> None:
        """The same for one disk, when no other command changes it; `mode` is the one that it was to be in before."""
        try:
            async with self._disks.turn_attached(attached.name) as now:
                if now is attached and attached.fault is None:
                    self._take(attached, self._wanted(attached))
                    if attached.disk.settings.mode != mode:
                        await attached.disk.set_mode(Mode(attached.disk.settings.mode), _silent)
        except (ForebayError, OSError) as fault:
            log.warning(
                "%s: its settings do not follow the configuration: %s", attached.name, fault
            )
        except Exception as fault:
            if breaks_the_cache(fault):
                raise
            log.exception("%s: its settings do not follow the configuration", attached.name)

    # -- changing

    async def set(
        self, name: str, changes: Mapping[str, Any], progress: Progress
    ) -> dict[str, Any]:
        """Change settings of a disk, all or none of them; None gives back what the store says. The disk's status.

        `progress` is told of what has to be written back first where the mode becomes another. Raises ForebayError, and
        OSError where that fails.

        The index has it first: a start that finds another mode there than the data in the cache asks for leaves that
        mode in its own time, and what is refused has changed nothing.
        """
        async with self._disks.turn_attached(name) as attached:
            attached.check_serves()
            was, now = attached.record, attached.record.with_settings(changes)
            self._check(attached, now, changes)
            before = attached.disk.mode
            await self._records.change(name, was, now)
            try:
                self._adopt(attached, now)
                if "mode" in changes:
                    await attached.disk.set_mode(Mode(attached.disk.settings.mode), progress)
            except BaseException:
                self._adopt(attached, was)
                await self._put_back(attached)
                raise
            attached.record = now
            self._tell(attached, before, changes)
        return attached.status()

    async def _put_back(self, attached: Attached) -> None:
        """Have what holds on record again, durably. Where that fails, say so: the next start finds something else."""
        with trio.CancelScope(shield=True):
            try:
                await self._records.change(attached.name, attached.record, attached.record)
            except (ForebayError, OSError) as fault:
                text = (
                    f"what could not be set may be on record, and holds after a restart: {fault}; "
                    "then set it as it is meant to be"
                )
                tell("setting", text, attached.name, level=logging.WARNING, ok=False)

    def _tell(self, attached: Attached, before: Mode, changes: Mapping[str, Any]) -> None:
        mode = attached.disk.mode
        if "mode" in changes:
            text = f"mode {mode.value}, was {before.value}"
            tell("mode", text, attached.name, was=before.value, now=mode.value)
        values = {row["key"]: row["value"] for row in self._rows(attached)}
        others = [f"{key} {values.get(key)}" for key in changes if key != "mode"]
        if others:
            tell("setting", ", ".join(others), attached.name)

    def _check(self, attached: Attached, now: DiskRecord, changes: Mapping[str, Any]) -> None:
        """Raise ForebayError where the disk cannot have these."""
        settings = now.settings(self._config, attached.source.address.store)
        modes = attached.disk.modes
        if "mode" in changes:
            modes.check_may_enter(Mode(settings.mode), settings)
        if settings.cache_size != attached.disk.settings.cache_size:
            mode = Mode(settings.mode) if "mode" in changes else modes.mode
            modes.check_fits(mode, settings)

    def _adopt(self, attached: Attached, record: DiskRecord) -> None:
        """Have what follows from the record hold, but for the mode: that of the configuration as it is by now."""
        attached.disk.adopt(record.settings(self._config, attached.source.address.store))


def _silent(_done: int, _total: int) -> None:
    """Progress that nobody looks at."""
