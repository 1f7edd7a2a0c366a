# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The configuration: what can be set, what it means, and what is wrong with a file.

The models below are the manual: each field says what it does. Everything has a default that works,
so a host without a file is served too. A wrong file is refused as a whole, with every fault in it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from forebay.config.client import DEFAULT_RUN, config_path, read_toml
from forebay.config.faults import dotted, faults_of, told
from forebay.config.fields import (
    DOORS,
    KVM,
    Directory,
    Duration,
    FileMode,
    Group,
    HostName,
    Listen,
    ListenAddress,
    ModeName,
    OnChange,
    PeerRule,
    Port,
    Preload,
    Size,
    SocketGroup,
    SocketPeer,
    StoreName,
    User,
    socket_group,
)
from forebay.config.toml_text import toml_lines
from forebay.errors import ConfigError, ForebayError
from forebay.units import GIB, KIB, STAGING_PORT, Mode, did_you_mean, exact_duration, exact_size
from forebay_cache.format.superblock import SMALLEST

__all__ = ["Config", "ConfigError", "DiskSettings", "Mode", "Store"]

BLOCK_SIZES = (64 * KIB,)
"""What the cache's on-disk format knows, bytes."""

SHORTEST_TIMEOUT, LONGEST_TIMEOUT = 1.0, 600.0
"""Seconds. A disk that wakes up, or is busy with what others want of it, takes seconds to answer."""

SHORTEST_PURGE = 60.0
"""Seconds. Images that are attached again within minutes are what a cache is for."""

LONGEST_RUN = 107 - len("/disks/d.sock.new")
"""Bytes of path. The address of a Unix socket holds 107 (unix(7)); a disk's name is checked at attach."""


# ----------------------------------------------------------------------------------------- sections


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GatewaySection(_Section):
    """`[gateway]`: the daemon's directories and who may use its sockets."""

    state: Directory = Path("/var/lib/forebay")
    """The index, and the embedded cache device. Must survive a reboot."""
    run: Directory = Path(DEFAULT_RUN)
    """Sockets. libvirt overlays record the paths in it: the same on all hosts, for ever."""
    socket_owner: User | None = None
    """User that owns the disks' sockets; without it the daemon's own."""
    socket_group: SocketGroup | None = Field(default_factory=lambda: socket_group(KVM))
    """Group of the disks' sockets, the one QEMU runs in; the daemon's own on a host without kvm."""
    socket_mode: FileMode = 0o660
    """File mode of the disks' sockets; connecting needs write permission."""
    socket_peers: list[SocketPeer] | None = None
    """Users, and groups as "@name", whose processes may use the disks' sockets, asked of the kernel at each connection.
    Without it the user that libvirt runs QEMU as, where /etc/libvirt/qemu.conf can be read and owner, group and mode
    are left as they are; else those whom owner, group and mode let in. Root and the daemon's own user always may.
    """
    door_group: SocketGroup | None = Field(default_factory=lambda: socket_group(DOORS))
    """Group whose processes may use a disk beside the VM that has it: the nbdkit door, backup programs."""
    control_group: Group | None = None
    """Group that may use the control API (mode 0660); without it only the daemon's own user may (0600)."""
    core: bool = True
    """Serve with the compiled core, where it is installed; without it Python does the same, slower."""

    @field_validator("run")
    @classmethod
    def _sockets_fit(cls, run: Path) -> Path:
        length = len(os.fsencode(run))
        if length > LONGEST_RUN:
            raise ValueError(
                f"{length} bytes of path are too long for a Unix socket: use at most {LONGEST_RUN}"
            )
        return run


class CacheSection(_Section):
    """`[cache]`: where cached blocks lie."""

    device: Directory | None = None
    """Logical volume, block device or file; without it STATE/cache.img."""
    size: Size = 20 * GIB
    """Size of the file, where the device is one; a block device is used as a whole."""
    block_size: Size = BLOCK_SIZES[0]
    """Unit of placement on the device."""
    timeout: Duration = 30.0
    """After how many seconds a device, or an index, that does not answer counts as failed."""

    @field_validator("timeout")
    @classmethod
    def _within_bounds(cls, seconds: float) -> float:
        if not SHORTEST_TIMEOUT <= seconds <= LONGEST_TIMEOUT:
            raise ValueError(
                f"{exact_duration(seconds)} is not possible: use "
                f"{exact_duration(SHORTEST_TIMEOUT)} to {exact_duration(LONGEST_TIMEOUT)}"
            )
        return seconds

    @field_validator("size")
    @classmethod
    def _large_enough(cls, size: int) -> int:
        if size < SMALLEST:
            raise ValueError(
                f"{exact_size(size)} is too small: use at least {exact_size(SMALLEST)}"
            )
        return size

    @field_validator("block_size")
    @classmethod
    def _known_block_size(cls, size: int) -> int:
        if size not in BLOCK_SIZES:
            known = ", ".join(map(exact_size, BLOCK_SIZES))
            raise ValueError(f"{exact_size(size)} is not supported: use {known}")
        return size


class DiskSettings(_Section):
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
    on_change: OnChange = "refresh"
    """What to do when somebody else changes an image while it is in use: `refresh`, forget what is cached of it and go
    on with what is there now, or `refuse`, serve nothing until it is attached anew. With data in the cache that belongs
    on the image as it was, it is always the latter.
    """
    peer: PeerRule = "first"
    """Which processes may use the disk, of those that may connect at all. `first`: the one that connects first has it
    until it ends, and where libvirt's hook has told user and label of the VM, only such a process. `label`: all with
    that label, and no others. `any`: all. Root, the daemon's user and `gateway.door_group` always may.
    """
    require_locks: bool = True
    """True: an image is refused for writing where its file system has no locks that other hosts see."""


class Store(_Section):
    """`[stores.NAME]`: a directory of images, and what differs from `[defaults]` for them."""

    path: Directory
    """The directory. It may be absent when the daemon starts."""
    mode: ModeName | None = None
    cache_size: Size | None = None
    preload: Preload | None = None
    max_lag: Duration | None = None
    max_dirty: Size | None = None
    origin_timeout: Duration | None = None
    on_change: OnChange | None = None
    peer: PeerRule | None = None
    require_locks: bool | None = None
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


class OriginsSection(_Section):
    """`[origins]`: shell patterns of images outside all stores that may be attached; none at first."""

    nbd: list[str] = Field(default_factory=list)
    """NBD URIs, as `nbd://storage1/*`."""
    devices: list[str] = Field(default_factory=list)
    """Block devices, as `/dev/vg1/vm-*`."""
    https: list[str] = Field(default_factory=list)
    """URLs, as `https://images.example.org/`: all below it. Redirections lead to what is allowed here only."""
    ca_file: Directory | None = None
    """Certificates of who signs those of web servers, instead of the host's own."""


class FuseSection(_Section):
    """`[fuse]`: who may read images through `forebay fuse --allow-other`, beside root."""

    owner: User | None = None
    group: Group | None = None
    """Where one of the two is set, they may read all images of all stores, as `mode` says, whatever the stores say."""
    mode: FileMode = 0o440
    """Otherwise who may read an image in its store, but at most so: by default nobody but its owner and its group."""


class HostsSection(_Section):
    """`[hosts]`: the hosts that `forebay hosts` asks, where the command names none."""

    names: list[HostName] = Field(default_factory=list)
    """As ssh takes them: "ham0", "root@ham1.example.org"."""


class MetricsSection(_Section):
    """`[metrics]`: where Prometheus reads, without a right to anything else. Off by default."""

    listen: Listen | None = None
    """Address and port, as "127.0.0.1:9788" or "[::1]:9788"."""
    tls_certificate: Directory | None = None
    """A file in PEM, with what is between it and its authority; with it TLS only. Read again when it has changed."""
    tls_key: Directory | None = Field(default=None, validate_default=True)

    @field_validator("tls_key")
    @classmethod
    def _with_certificate(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        if (info.data.get("tls_certificate") is None) != (key is None):
            raise ValueError("tls_certificate and tls_key go together: give both, or neither")
        return key


class StagingSection(_Section):
    """`[staging]`: where `forebay stager` is reached by the stagers of other hosts."""

    listen: ListenAddress = "0.0.0.0"  # noqa: S104  (only hosts that are named are let in)
    """The address that it listens at, and sends from."""
    port: Port = STAGING_PORT
    """TCP."""


# ----------------------------------------------------------------------------------- the whole file


class Config(_Section):
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

    _source: Path | None = PrivateAttr(None)

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
        """The configuration in `path`, or where FOREBAY_CONFIG says, or in the default place, or the built-in one.

        Raises ConfigError with one line for each fault of the file.
        """
        source = config_path(path)
        if source is None:
            return cls()
        text, data = read_toml(source)
        try:
            config = cls.model_validate(data)
        except ValidationError as refused:
            raise ConfigError(faults_of(source, text, refused, _sections())) from None
        config._source = Path(source)  # noqa: SLF001  (its own class)
        return config

    @property
    def source(self) -> Path | None:
        """The file it was read from; None for the built-in defaults."""
        return self._source

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
        merged = self.defaults.model_dump()
        if store is not None:
            merged |= self.store(store).model_dump(
                exclude_none=True, exclude={"path", "purge_after", "socket"}
            )
        merged |= {key: value for key, value in (overrides or {}).items() if value is not None}
        try:
            return DiskSettings.model_validate(merged)
        except ValidationError as refused:
            fault = refused.errors()[0]
            raise ForebayError(f"{dotted(fault['loc'])}: {told(fault, _sections())}") from None

    def store(self, name: str) -> Store:
        """The store with this name. Raises ForebayError."""
        if name in self.stores:
            return self.stores[name]
        known = ", ".join(self.stores) or "none are configured"
        raise ForebayError(
            f"no store '{name}'{did_you_mean(name, self.stores)}: stores are {known}"
        )

    def warnings(self) -> list[str]:
        """What is allowed but perhaps not meant: one line each."""
        found = []
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
        """The effective configuration as TOML; reading it back gives an equal one."""
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
