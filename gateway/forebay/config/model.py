# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The configuration: what can be set, what it means, and what is wrong with a file.

The models below are the manual: each field says what it does. Everything has a default that works,
so a host without a file is served too. A wrong file is refused as a whole, with every fault in it.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
)

from forebay.config.client import config_files, config_path
from forebay.config.faults import dotted, faults_of, told
from forebay.config.fields import (
    KVM,
    BytesPerSecond,
    Directory,
    Duration,
    DurationOrNever,
    ModeName,
    OnChange,
    PeerRule,
    Preload,
    Requests,
    Size,
    StoreName,
    Weight,
)
from forebay.config.parts import Merged, merged
from forebay.config.sections import (
    CacheSection,
    FuseSection,
    GatewaySection,
    HostsSection,
    MetricsSection,
    OriginsSection,
    Section,
    StagingSection,
)
from forebay.config.toml_text import toml_lines
from forebay.errors import ConfigError, ForebayError
from forebay.units import GIB, Mode, did_you_mean, exact_duration

__all__ = ["Config", "ConfigError", "DiskSettings", "Mode", "Store"]

FIXED = ("gateway", "cache", "metrics")
"""Sections that hold from start to end of a daemon."""

SHORTEST_PURGE = 60.0
"""Seconds. Images that are attached again within minutes are what a cache is for."""


# ------------------------------------------------------------------------------------------- disks


class DiskSettings(Section):
    """What holds for one disk, and the built-in defaults (`[defaults]`)."""

    mode: ModeName = Mode.WRITE_THROUGH
    """How the disk reads and writes."""
    cache_size: Size = 0
    """Most that the disk may hold of the cache, bytes; 0: no limit of its own."""
    preload: Preload = 0
    """What attach brings in: bytes from the start of the image, `all`, or `trace`, what boots read. That is the default
    for overlays."""
    max_lag: Duration = 30.0
    """Seconds for which data may be dirty before it is written back."""
    max_dirty: Size = GIB
    """Bytes that may be dirty; from a quarter of them on, writes are slowed down towards write-back's speed."""
    origin_timeout: Duration = 60.0
    """Seconds after which an origin that does not answer is an error to the guest."""
    slow: DurationOrNever = 10.0
    """Seconds from which a request is told of in the log, with what it waited for; 0: none is."""
    on_change: OnChange = "refresh"
    """What to do when somebody else changes an image while it is in use: `refresh`, forget what is cached of it and go
    on with what is there now, or `refuse`, serve nothing until it is attached anew. With data in the cache that belongs
    on the image as it was, it is always the latter.
    """
    iops: Requests = 0
    """Requests that the disk's clients may make in a second, all together; 0: no limit. FLUSH does not count."""
    bps: BytesPerSecond = 0
    """Bytes that they may read and write in a second; 0: no limit."""
    iops_burst: Requests = 0
    """Requests that they may make at once after a rest; 0, and anything below that: a tenth of `iops`."""
    bps_burst: Size = 0
    """Bytes, likewise; 0, and anything below that: a tenth of `bps`."""
    weight: Weight = 100
    """What it gets beside others, from 1 to 10000: where the requests of two disks wait, for the daemon or for a store,
    one with twice the weight has twice as many carried out. Who waits for nobody has everything."""
    peer: PeerRule = "first"
    """Which processes may use the disk, of those that may connect at all. `first`: the one that connects first has it
    until it ends, and where libvirt's hook has told user and label of the VM, only such a process. `label`: all with
    that label, and no others. `any`: all. Root, the daemon's user and `gateway.door_group` always may.
    """
    require_locks: bool = True
    """True: an image is refused for writing where its file system has no locks that other hosts see."""
    with_data: bool = False
    """True: an overlay that moves to another host takes along what it has, through files beside its image."""


class Store(Section):
    """`[stores.NAME]`: a directory of images, and what differs from `[defaults]` for them."""

    path: Directory
    """The directory. It may be absent when the daemon starts."""
    mode: ModeName | None = None
    cache_size: Size | None = None
    preload: Preload | None = None
    max_lag: Duration | None = None
    max_dirty: Size | None = None
    origin_timeout: Duration | None = None
    slow: DurationOrNever | None = None
    on_change: OnChange | None = None
    iops: Requests | None = None
    bps: BytesPerSecond | None = None
    iops_burst: Requests | None = None
    bps_burst: Size | None = None
    weight: Weight | None = None
    peer: PeerRule | None = None
    require_locks: bool | None = None
    with_data: bool | None = None
    purge_after: Duration | None = None
    """Seconds after which what the cache has of an image that nobody uses is dropped; without it nothing is."""
    socket: bool = False
    """True: RUN/stores/NAME.sock serves every image of the store, read-only, by its path: base images of overlays. Who
    may connect reads all of them."""

    @field_validator("purge_after")
    @classmethod
    def _not_at_once(cls, seconds: float | None) -> float | None:
        if seconds is not None and seconds < SHORTEST_PURGE:
            raise ValueError(
                f"{exact_duration(seconds)} is too short: use at least {exact_duration(SHORTEST_PURGE)}"
            )
        return seconds


# ----------------------------------------------------------------------------------- the whole file


class Config(Section):
    """A configuration that was found right."""

    gateway: GatewaySection = Field(default_factory=GatewaySection)
    cache: CacheSection = Field(default_factory=CacheSection)
    defaults: DiskSettings = Field(default_factory=DiskSettings)
    stores: dict[StoreName, Store] = Field(default_factory=dict)
    origins: OriginsSection = Field(default_factory=OriginsSection)
    fuse: FuseSection = Field(default_factory=FuseSection)
    hosts: HostsSection = Field(default_factory=HostsSection)
    metrics: MetricsSection = Field(default_factory=MetricsSection)
    staging: StagingSection = Field(default_factory=StagingSection)

    _named: str | None = PrivateAttr(None)
    _files: list[Path] = PrivateAttr(default_factory=list)
    _doubled: list[str] = PrivateAttr(default_factory=list)
    _places: dict[str, Path] = PrivateAttr(default_factory=dict)

    @field_validator("stores")
    @classmethod
    def _one_store_a_directory(cls, stores: dict[str, Store]) -> dict[str, Store]:
        seen: dict[Path, str] = {}
        for name, store in stores.items():
            other = seen.setdefault(store.path, name)
            if other != name:
                raise ValueError(
                    f"'{other}' and '{name}' are the same directory {store.path}: remove one"
                )
        return stores

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> Self:
        """The configuration in `path`, or where FOREBAY_CONFIG says, or in the default place, or the built-in one; with
        what `conf.d` beside it says.

        Raises ConfigError with one line for each fault of the files.
        """
        named = config_path(path)
        found = merged(config_files(path))
        try:
            config = cls.model_validate(found.data)
        except ValidationError as refused:
            raise ConfigError(faults_of(found, refused, _sections())) from None
        config._note_files(named, found)  # noqa: SLF001  (its own class)
        return config

    def _note_files(self, named: str | None, found: Merged) -> None:
        self._named = named and os.path.abspath(named)
        self._files = [Path(part.path) for part in found.parts]
        self._doubled = found.doubled

    @property
    def files(self) -> list[Path]:
        """What it was read from, in the order in which it counts; empty for the built-in defaults."""
        return list(self._files)

    @property
    def source(self) -> Path | None:
        """The first of these files."""
        return self._files[0] if self._files else None

    def at(self, **places: Path | None) -> Self:
        """The same with other directories, `state` or `run`; None: as it is."""
        given = {name: path for name, path in places.items() if path is not None}
        found = self.model_copy(update={"gateway": self.gateway.model_copy(update=given)})
        found._places = given  # noqa: SLF001  (the same)
        return found

    # -- while a daemon runs

    def again(self) -> Self:
        """What its files say now, with the same directories as by `at`. Raises ConfigError."""
        return self.load(self._named).at(**self._places)

    def follow(self, new: Self) -> None:
        """Have all be as in `new`, but for FIXED: for the one object that the parts of a daemon share.

        A critical section: all of it at once.
        """
        for name in type(self).model_fields:
            if name not in FIXED:
                self.__dict__[name] = getattr(new, name)
        self._files, self._doubled = new._files, new._doubled

    def changed(self, new: Self, sections: Iterable[str]) -> list[str]:
        """The keys in these sections that are otherwise in `new`: `gateway.run`."""
        return [
            f"{section}.{key}"
            for section in sections
            for key in type(getattr(self, section)).model_fields
            if getattr(getattr(self, section), key) != getattr(getattr(new, section), key)
        ]

    # -- what it says

    @property
    def cache_device(self) -> Path:
        """`cache.device`, or the embedded default STATE/cache.img."""
        return self.cache.device or self.gateway.state / "cache.img"

    def disk_settings(
        self, store: str | None, overrides: Mapping[str, Any] | None = None
    ) -> DiskSettings:
        """What holds for a disk in `store` (None: outside all stores): defaults, then the store, then `overrides`.

        Overrides are values or text as in the file; those that are None do not count. Raises ForebayError.
        """
        values = self.defaults.model_dump()
        if store is not None:
            values |= self.store(store).model_dump(
                exclude_none=True, exclude={"path", "purge_after", "socket"}
            )
        values |= {key: value for key, value in (overrides or {}).items() if value is not None}
        try:
            return DiskSettings.model_validate(values)
        except ValidationError as refused:
            fault = refused.errors()[0]
            raise ForebayError(f"{dotted(fault['loc'])}: {told(fault, _sections())}") from None

    def store(self, name: str) -> Store:
        """The store with this name. Raises ForebayError."""
        if name in self.stores:
            return self.stores[name]
        known = f"stores are {', '.join(self.stores)}" if self.stores else "none is configured"
        raise ForebayError(
            f"no store '{name}'{did_you_mean(name, self.stores)}: {known}; after a change of the file: forebay reload"
        )

    def warnings(self) -> list[str]:
        """What is allowed but perhaps not meant: one line each."""
        found = list(self._doubled)
        if self.gateway.socket_group is None:
            found.append(
                f"gateway.socket_group: no group '{KVM}' on this host, sockets are the daemon's own: "
                "name the group that QEMU runs in"
            )
        if not (self.stores or self.origins.nbd or self.origins.devices or self.origins.https):
            found.append(
                "no image can be attached: add a [stores.NAME] with a path, a directory of images"
            )
        found += (
            f"stores.{name}.path: {store.path} is no directory now: mount it before attaching"
            for name, store in self.stores.items()
            if not store.path.is_dir()
        )
        return found

    def says_preload(self, store: str | None) -> bool:
        """True if the file says what attach brings in of images in `store` (None: outside all stores)."""
        in_store = store in self.stores and self.stores[store].preload is not None
        return in_store or "preload" in self.defaults.model_fields_set

    def to_toml(self) -> str:
        """What holds as TOML; reading it back gives an equal one."""
        return "\n".join(toml_lines(self.model_dump(mode="json", exclude_none=True)))


def _sections() -> dict[str, type[BaseModel]]:
    """What `forebay.config.faults` needs to know of the models."""
    return {
        "": Config,
        "gateway": GatewaySection,
        "cache": CacheSection,
        "defaults": DiskSettings,
        "stores.NAME": Store,
        "origins": OriginsSection,
        "fuse": FuseSection,
        "hosts": HostsSection,
        "metrics": MetricsSection,
        "staging": StagingSection,
    }
