"""One attached disk: its source, what serves it, its socket, and the record that brings it back after a restart."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import trio

from forebay.config.model import Config, DiskSettings
from forebay.disk.disk import Disk
from forebay.doors.listener import Listener
from forebay.doors.restart import Sockets
from forebay.image.source import Source
from forebay.units import Mode

log = logging.getLogger("forebay.daemon")


@dataclass(frozen=True)
class Record:
    """What the index keeps of a disk: what the operator asked for, not what the configuration adds to it.

    `size` in bytes, as found at attach: a disk comes up without its origin. `mode`, `cache_size` and `preload` are None
    where the store's settings hold.
    """

    image: str
    key: str
    size: int
    read_only: bool = False
    overlay: bool = False
    mode: str | None = None
    cache_size: int | None = None
    preload: int | str | None = None

    @classmethod
    def read(cls, found: dict[str, Any]) -> Self:
        """From the index. Keys of newer versions are left out."""
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})

    def write(self) -> dict[str, Any]:
        """For the index."""
        return asdict(self)

    def settings(self, config: Config, store: str | None) -> DiskSettings:
        """With what the configuration says now. Raises ForebayError."""
        overrides = {"mode": self.mode, "cache_size": self.cache_size, "preload": self.preload}
        return config.disk_settings(store, overrides)

    def with_mode(self, mode: Mode) -> Self:
        """The same in another mode."""
        return replace(self, mode=mode.value)


class Attached:
    """A disk that is served."""

    def __init__(self, record: Record, source: Source, disk: Disk, listener: Listener) -> None:
        self.record = record
        self.source = source
        self.disk = disk
        self.listener = listener
        self.busy = trio.Lock()  # detach and mode changes, one at a time
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    @property
    def name(self) -> str:
        """The disk's name."""
        return self.source.use.disk

    async def start(self, nursery: trio.Nursery, earlier: Sockets | None = None) -> None:
        """Begin background work, then accept clients, and go on with those that the process before left.

        Raises ForebayError.
        """
        try:
            await nursery.start(self._run)
            await self.listener.open(nursery, earlier)
        except BaseException:
            if earlier is not None:
                earlier.hang_up()
            with trio.CancelScope(shield=True):
                await self.rest()
            raise

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            with self._scope:
                await self.disk.run(task_status=task_status)
        finally:
            self._ended.set()

    async def rest(self) -> None:
        """End background work."""
        self._scope.cancel()
        await self._ended.wait()

    def pulse(self) -> tuple[object, ...]:
        """Changes whenever something moves: a request is answered, the origin or the cache takes or gives something, or
        the origin comes or goes.
        """
        found = self.disk.status()
        counters = ("state", "reads", "writes", "cached_bytes", "private_bytes")
        origin = ("origin_read_bytes", "origin_written_bytes")
        return (self.listener.answered, *(found[key] for key in (*counters, *origin)))

    def status(self) -> dict[str, Any]:
        """The keys of the contract, and more."""
        return {
            **self.disk.status(),
            "clients": self.listener.clients,
            "socket": str(self.listener.path),
        }


class Absent:
    """A disk on record that cannot be served: its store is no longer configured, say. Shown, and kept."""

    def __init__(
        self, name: str, record: Record, why: str, lag: Callable[[], tuple[int, float]]
    ) -> None:
        """`lag` says what its image lacks: bytes, and seconds."""
        self.name = name
        self.record = record
        self.why = why
        self._lag = lag

    def status(self) -> dict[str, Any]:
        """As of a disk that does nothing."""
        dirty, age = (0, 0.0) if self.record.overlay else self._lag()
        counters = (
            "cached_bytes", "read_hits", "read_misses", "write_hits",
            "write_misses", "origin_read_bytes", "origin_written_bytes", "clients",
        )  # fmt: skip
        return {
            "name": self.name,
            "image": self.record.image,
            "mode": self.record.mode or "",
            "state": "failed",
            "read_only": self.record.read_only,
            "overlay": self.record.overlay,
            "size": self.record.size,
            **dict.fromkeys(counters, 0),
            "dirty_bytes": dirty,
            "lag_seconds": round(age, 3),
            "lag_bytes": dirty,
            "socket": "",
            "reason": self.why,
        }
