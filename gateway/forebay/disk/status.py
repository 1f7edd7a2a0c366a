# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What an operator is told about a disk: its state, why it is in it, and the keys of `forebay status --json`."""

from typing import Any

from forebay.checkpoint.counters import Counters
from forebay.checkpoint.dirty import Dirty
from forebay.checkpoint.schedule import WriteBack
from forebay.disk.modes import Modes
from forebay.disk.state import MOVES, DiskState, Facts, state_of
from forebay.image.image import Image
from forebay.image.source import Source
from forebay.units import Mode
from forebay_cache import View
from forebay_cache.format.geometry import SECTOR
from forebay_cache.states import Machine


class Status:
    """Of one disk. It changes nothing but the state, which is brought up to date when it is asked for."""

    def __init__(
        self,
        source: Source,
        image: Image,
        view: View,
        dirty: Dirty,
        writeback: WriteBack,
        modes: Modes,
        counters: Counters,
    ) -> None:
        self._source = source
        self._image = image
        self._cache = image.cache
        self._view = view
        self._dirty = dirty
        self._writeback = writeback
        self._modes = modes
        self._counters = counters
        self._machine = Machine(MOVES, DiskState.READY, f"disk '{source.use.disk}'")

    def state(self) -> DiskState:
        """The state at this instant; `reason` says more about it."""
        self._machine.become(state_of(self._facts()))
        return self._machine.state

    def _facts(self) -> Facts:
        copied = self._modes.copy.share
        return Facts(
            has_conflict=self._image.conflict is not None,
            cache_has_failed=self._cache.failed is not None,
            has_private=self._dirty.private_bytes > 0,
            is_coming=self._source.asking is not None or self._source.comes,
            is_given=bool(self._source.withheld or self._source.kept_back),
            is_away=self._image.origin is None,
            has_failed_pass=self._writeback.error is not None
            or self._image.writes.trouble is not None,
            is_copying=copied is not None and copied < 1,
            is_incomplete=self._modes.copy.is_incomplete,
        )

    def reason(self) -> str | None:
        """Why the state is not what it should be, and what to do, in one line; None where all is well."""
        if self._image.conflict is not None:
            return self._image.conflict
        if self._cache.failed is not None:
            return self._cache_trouble(self._cache.failed)
        return self._passing_trouble() or self._cache.commit.error

    def _cache_trouble(self, failed: OSError) -> str:
        where = f"cache device {self._cache.device.path}: {failed.strerror or failed}"
        only_here = self._dirty.private_bytes
        if not only_here:
            return f"{where}: the image is used without it, until it works again"
        return (
            f"{where}: {only_here} bytes are nowhere else: writes fail until it works again; "
            "detach with --discard to give them up"
        )

    def _passing_trouble(self) -> str | None:
        """What ends by itself."""
        if self._source.withheld or self._source.kept_back:
            return self._source.withheld or self._source.kept_back
        if self._image.reach.unreachable is not None:
            return f"{self._image.key} cannot be reached: {self._image.reach.unreachable}; tried again by itself"
        if self._writeback.error is not None:
            return f"write-back failed: {self._writeback.error}; tried again by itself"
        if self._modes.copy.paused:
            return f"copying pauses: {self._modes.copy.paused}; tried again by itself"
        if self._image.writes.trouble is not None:
            return (
                f"a flush of {self._image.key} failed: {self._image.writes.trouble}; what it may have lost is kept, "
                "and written again by itself"
            )
        return None

    def keys(self) -> dict[str, Any]:
        """All keys of `status --json` but `clients` and `socket`, which the daemon adds. Their names are a contract."""
        return {**self._settings(), **self._amounts(), **self._counts()}

    def _settings(self) -> dict[str, Any]:
        return {
            "name": self._source.use.disk,
            "image": self._image.key,
            "format": self._source.shown_format,
            "mode": self._modes.mode.value,
            "state": self.state().value,
            "reason": self.reason(),
            "read_only": self._source.use.read_only,
            "overlay": self._source.use.overlay,
            "keep": self._source.use.keep,
            "size": self._source.size,
        }

    def _amounts(self) -> dict[str, Any]:
        """Bytes; lag in seconds; `copied` from 0 to 1, None where no full copy is wanted.

        `unreadable_bytes`: of the image, by a full copy.
        """
        clean = 0 if self._modes.mode is Mode.NONE else self._image.layer.sectors * SECTOR
        own, dirty = self._dirty.private_bytes, self._dirty.bytes
        return {
            "cached_bytes": min(clean + own, self._source.size),
            "dirty_bytes": dirty,
            "private_bytes": own,
            "copied": self._modes.copy.share,
            "unreadable_bytes": self._modes.copy.unreadable_bytes,
            "lag_seconds": round(self._dirty.lag_seconds(), 3),
            "lag_bytes": dirty,
        }

    def _counts(self) -> dict[str, int]:
        view, counters = self._view, self._counters
        return {
            "reads": view.hits + view.misses,
            "writes": counters.write_hits + counters.write_misses,
            "read_bytes": view.read_bytes,
            "written_bytes": counters.written_bytes,
            "read_hits": view.hits,
            "read_misses": view.misses,
            "write_hits": counters.write_hits,
            "write_misses": counters.write_misses,
            "origin_read_bytes": counters.origin_read_bytes,
            "origin_written_bytes": counters.origin_written_bytes,
            "journal_written_bytes": counters.journal_written_bytes,
            "trims_ignored": counters.trims_ignored,
            "origin_errors": counters.origin_errors,
        }
