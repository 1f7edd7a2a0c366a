# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The sections of the configuration that say nothing of disks: each field says what it does."""

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from forebay.config.client import DEFAULT_RUN
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
    Port,
    Size,
    SocketGroup,
    SocketPeer,
    User,
    socket_group,
)
from forebay.units import GIB, KIB, STAGING_PORT, exact_duration, exact_size
from forebay_cache.format.superblock import SMALLEST

BLOCK_SIZES = (64 * KIB,)
"""What the cache's on-disk format knows, bytes."""

SHORTEST_TIMEOUT, LONGEST_TIMEOUT = 1.0, 600.0
"""Seconds. A disk that wakes up, or is busy with what others want of it, takes seconds to answer."""

LONGEST_RUN = 107 - len("/disks/d.sock.new")
"""Bytes of path. The address of a Unix socket holds 107 (unix(7)); a disk's name is checked at attach."""


class Section(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GatewaySection(Section):
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


class CacheSection(Section):
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


class OriginsSection(Section):
    """`[origins]`: shell patterns of images outside all stores that may be attached; none at first."""

    nbd: list[str] = Field(default_factory=list)
    """NBD URIs, as `nbd://storage1/*`."""
    devices: list[str] = Field(default_factory=list)
    """Block devices, as `/dev/vg1/vm-*`."""
    https: list[str] = Field(default_factory=list)
    """URLs, as `https://images.example.org/`: all below it. Redirections lead to what is allowed here only."""
    ca_file: Directory | None = None
    """Certificates of who signs those of web servers, instead of the host's own."""


class FuseSection(Section):
    """`[fuse]`: who may read images through `forebay fuse --allow-other`, beside root."""

    owner: User | None = None
    group: Group | None = None
    """Where one of the two is set, they may read all images of all stores, as `mode` says, whatever the stores say."""
    mode: FileMode = 0o440
    """Otherwise who may read an image in its store, but at most so: by default nobody but its owner and its group."""


class HostsSection(Section):
    """`[hosts]`: the hosts that `forebay hosts` asks, where the command names none."""

    names: list[HostName] = Field(default_factory=list)
    """As ssh takes them: "ham0", "root@ham1.example.org"."""


class MetricsSection(Section):
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


class StagingSection(Section):
    """`[staging]`: where `forebay stager` is reached by the stagers of other hosts."""

    listen: ListenAddress = "0.0.0.0"  # noqa: S104  (only hosts that are named are let in)
    """The address that it listens at, and sends from."""
    port: Port = STAGING_PORT
    """TCP."""
