# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The test bed: images, and every server that is measured, started once and warmed."""

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import copy_out, write_some

from real.gateway_process import GatewayProcess
from real.processes import NbdServer, nbdkit, qemu_nbd, random_image

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
ORIGIN_DELAY = 0.2
"""Seconds: the latency of the origin behind which parallel misses are measured."""

COLD_BYTES = 256 * MIB
"""What is read once, cold, through a gigabit: two seconds' worth."""

SYNC_BYTES = 64 * MIB
"""The region that 4 KiB writes with a flush each are spread over."""

ZEROS = 1 << 20
"""Bytes of cache file that are written at once."""

CHECKPOINT_LAGS = {"calm": "1h", "busy": "1s", "spread": "12s"}
"""`max_lag` of each disk: no checkpoint begins by itself; one follows the other; one takes almost five seconds."""

CHECKPOINT_WRITES = 6000
"""Of 4 KiB, at random places, for one checkpoint that is spread out: what a guest writes at a thousand a second."""

CHECKPOINT_BYTES = 64 * MIB
"""Of the disk that is written: so little that it is the checkpoints that are measured, and not `max_dirty`."""

MOST_ALLOCATED = 16 << 30
"""Bytes of cache file; the index of a terabyte is measured on a sparse one."""

VMS = 8
"""Virtual machines of one host, each with a disk of its own."""

NEIGHBOUR_BYTES = 4 << 30
"""Of the disk that is trimmed beside another one."""

LIMITS = {"C, one thread": "one", "C, a thread each": "each"}
"""Servers in C over tables like ours, see limit/server.c: how each is told to serve its connections."""

WARMINGS = 10
"""So often a disk is read at most, until all of it is in the cache."""

MISS_BYTES = 16 << 30
"""Enough different places that no miss hits what an earlier round brought in."""


SNAPSHOTS = {"none": 0, "one": 1, "ten": 10, "forebay": 100}
"""Snapshots of the overlays that are read."""

SNAPSHOT_BYTES = 32 << 20
SNAPSHOT_WRITES = 60
"""Of 4 KiB, between two snapshots, in so many bytes of the disk: blocks whose sectors are of ten snapshots and more."""


@dataclass
class Target:
    """One server under measurement: where it listens, and whose CPU time counts. Or several that do a work together."""

    uri: str
    pid: int
    gateway: GatewayProcess | None = None
    others: tuple["Target", ...] = ()

    @property
    def uris(self) -> list[str]:
        return [self.uri, *(uri for other in self.others for uri in other.uris)]

    @property
    def pids(self) -> set[int]:
        return {self.pid}.union(*(other.pids for other in self.others))

    def settle(self) -> None:
        """Let no background work of this server run into the next measurement."""
        if self.gateway:
            self.gateway.cli("flush", "--all", timeout=300)


def make_gateway(parent: Path, cache_size: int) -> GatewayProcess:
    """A daemon, not started, with everything it has below `parent`.

    Its cache file was written once all through, as the file is that stands for the device in the row with flushes: what
    is measured is the cache as on a logical volume, not the file system, which enters each new place in its own journal
    before an fdatasync returns. Below /dev, and so in /dev/shm, the daemon makes no file itself.
    """
    gateway = GatewayProcess({"cache": {"size": str(cache_size)}}, parent)
    gateway.state.mkdir()
    with (gateway.state / "cache.img").open("wb") as file:
        if cache_size > MOST_ALLOCATED:
            file.truncate(cache_size)
        else:
            for _ in range(cache_size // ZEROS):
                file.write(bytes(ZEROS))
            os.fsync(file.fileno())
    return gateway


def together(targets: Sequence[Target]) -> Target:
    """All of them as one, which does a work that they share."""
    first, *others = targets
    return Target(first.uri, first.pid, first.gateway, tuple(others))


class Bed:
    """Everything that is started, in `memory` (a directory in memory where that fits) and on `disk`."""

    def __init__(self, memory: Path, disk: Path, size: int, stack: contextlib.ExitStack) -> None:
        self.size = size
        self.stack = stack
        self.memory = self._scratch(memory)
        self.disk = self._scratch(disk)

    def _scratch(self, parent: Path) -> Path:
        path = Path(tempfile.mkdtemp(prefix="fbb-", dir=parent))
        self.stack.callback(shutil.rmtree, path, ignore_errors=True)
        return path

    @functools.cached_property
    def image(self) -> Path:
        """Random data all through: holes would be answered without reading anything."""
        path = self.memory / "image.raw"
        random_image(path, self.size, seed=1)
        return path

    def _own_image(self, name: str) -> Path:
        """A copy of the image: writers do not share one."""
        return Path(shutil.copyfile(self.image, self.memory / f"{name}.raw"))

    def gateway(self, parent: Path, cache_size: int, *, start: bool = True) -> GatewayProcess:
        gateway = make_gateway(parent, cache_size)
        self.stack.callback(gateway.remove)
        if start:
            gateway.start()
        return gateway

    def _target(self, server: NbdServer, size: int | None = None) -> Target:
        """A server that was just started, warm. `size` is its image's, where that is another one."""
        self.stack.callback(server.stop)
        copy_out(server.uri, size or self.size)
        return Target(server.uri, server.process.pid)

    def _nbdkit(self, name: str, *plugin: str, filters: Sequence[str] = ()) -> NbdServer:
        return nbdkit(self.memory / f"{name}.sock", "file", *plugin, filters=filters)

    def limits(self) -> Iterator[tuple[str, Target]]:
        """What a server in C reaches that keeps tables and a journal as Forebay does, and does nothing else."""
        program = self.memory / "limit"
        warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-function")
        source = ("-I", HERE.parent / "fast" / "forebay_fast", HERE / "limit" / "server.c")
        command = ("cc", "-O2", *warnings, *source, "-o", program, "-lpthread")
        subprocess.run([str(word) for word in command], check=True)
        for name, how in LIMITS.items():
            sock = self.memory / f"{how}.sock"
            words = (program, sock, self.image, self.memory / f"{how}.device", how)
            yield name, self._target(NbdServer([str(word) for word in words], sock))

    def readers(self, forebay: bool) -> Iterator[tuple[str, Target]]:
        """Servers of one image that nobody writes, all warm."""
        image = str(self.image)
        yield "nbdkit file", self._target(self._nbdkit("kit", image))
        cached = self._nbdkit("kit-cache", image, "cache-on-read=true", filters=["cache"])
        yield "nbdkit cache", self._target(cached)
        # what it may write it locks, and the gateway could not have the image
        server = qemu_nbd(self.memory / "qemu.sock", self.image, "--read-only")
        yield "qemu-nbd", self._target(server)
        yield from self.limits()
        if forebay:
            gateway = self.gateway(self.memory, 6 * self.size)
            yield "forebay", self.disk_of(gateway, "r", self.image, "write-through")

    def writers(self, forebay: bool) -> Iterator[tuple[str, Target]]:
        """Servers that acknowledge a write when it is in their cache, each with an image of its own, all warm.

        None of them writes anything back meanwhile: nbdkit's filter never does, and no checkpoint begins by itself.
        What one costs, the rows with checkpoints measure.
        """
        kit = ("cache=writeback", "cache-on-read=true")
        image = str(self._own_image("kit-wb"))
        yield "nbdkit cache", self._target(self._nbdkit("kit-wb", image, *kit, filters=["cache"]))
        image_of_qemu = self._own_image("qemu-wb")
        server = qemu_nbd(self.memory / "qemu-wb.sock", image_of_qemu, "--cache=writeback")
        yield "qemu-nbd", self._target(server)
        yield from self.limits()
        if forebay:
            gateway = self._calm(6 * self.size)
            yield "forebay", self.disk_of(gateway, "w", self._own_image("w"), "write-back")

    def _calm(self, room: int) -> GatewayProcess:
        """A daemon, started, that begins no checkpoint by itself."""
        gateway = self.gateway(self.memory, room, start=False)
        limits = {"max_lag": "1h", "max_dirty": str(room)}
        gateway.configure({"cache": {"size": str(room)}, "defaults": limits})
        gateway.start()
        return gateway

    def hosts(self, forebay: bool) -> Iterator[tuple[str, Target]]:
        """VMS disks of one host, together as large as the image: a process each of the peers, and one Forebay."""
        size = self.size // VMS
        for peer in ("nbdkit cache", "qemu-nbd"):
            yield peer, together([self._vm(peer, number, size) for number in range(VMS)])
        if forebay:
            gateway = self._calm(6 * self.size)
            disks = [self._vm_image("f", number, size) for number in range(VMS)]
            name = "vm{}".format
            mode = "write-back"
            yield (
                "forebay",
                together([self.disk_of(gateway, name(n), disks[n], mode) for n in range(VMS)]),
            )

    def _vm_image(self, name: str, number: int, size: int) -> Path:
        path = self.memory / f"{name}{number}.raw"
        random_image(path, size, seed=number)
        return path

    def _vm(self, peer: str, number: int, size: int) -> Target:
        image, name = self._vm_image(peer[0], number, size), f"{peer[0]}{number}"
        if peer == "qemu-nbd":
            return self._target(
                qemu_nbd(self.memory / f"{name}.sock", image, "--cache=writeback"), size
            )
        kit = ("cache=writeback", "cache-on-read=true")
        return self._target(self._nbdkit(name, str(image), *kit, filters=["cache"]), size)

    def neighbours(self) -> tuple[Target, Target]:
        """Two disks of one daemon: one that is read, and a large empty one that is trimmed."""
        gateway = self._calm(6 * self.size)
        empty = self.memory / "empty.raw"
        with empty.open("wb") as file:
            file.truncate(NEIGHBOUR_BYTES)
        read = self.disk_of(gateway, "n", self._own_image("n"), "write-through")
        gateway.attach("t", self._stored(gateway, "t", empty).name, mode="write-back")
        return read, Target(gateway.uri("t"), gateway.pid, gateway)

    def checkpointers(self) -> dict[str, Target]:
        """A disk in write-back for each of CHECKPOINT_LAGS."""
        cache = 3 * len(CHECKPOINT_LAGS) * self.size
        gateway = self.gateway(self.memory, cache, start=False)
        stores: dict[str, dict[str, Any]] = {"cache": {"size": str(cache)}}
        for store, lag in CHECKPOINT_LAGS.items():
            path = gateway.directory / store
            path.mkdir()
            stores[f"stores.{store}"] = {"path": str(path), "mode": "write-back", "max_lag": lag}
            self._own_image(store).rename(path / "image.raw")
        gateway.configure(stores)
        gateway.start()
        found = {}
        for store in CHECKPOINT_LAGS:
            gateway.attach(store, f"{store}:image.raw")
            copy_out(gateway.uri(store), self.size)
            found[store] = Target(gateway.uri(store), gateway.pid, gateway)
        return found

    def snapshotted(self) -> dict[str, Target]:
        """An overlay for each of SNAPSHOTS: all with as many writes, at as many random places, in as many parts."""
        gateway = self.gateway(self.memory, 6 * self.size + (1 << 30))
        shared = gateway.images / "base.raw"
        os.link(self.image, shared)
        found = {}
        for name, count in SNAPSHOTS.items():
            gateway.attach(name, shared.name, "--overlay")
            uri, turns = gateway.uri(name), max(SNAPSHOTS.values())
            copy_out(uri, SNAPSHOT_BYTES)
            for n in range(turns):
                write_some(uri, SNAPSHOT_BYTES, SNAPSHOT_WRITES, seed=n)
                if n % (turns // count if count else turns + 1) == 0:
                    gateway.cli("snapshot", name, f"s{n}")
            copy_out(uri, SNAPSHOT_BYTES)
            found[name] = Target(uri, gateway.pid, gateway)
        return found

    def syncers(self, forebay: bool) -> Iterator[tuple[str, Target]]:
        """Write-back on the real disk, where a flush costs what the device takes."""
        random_image(self.sync_file, SYNC_BYTES, seed=2)
        with self.sync_file.open("rb") as file:
            os.fsync(file.fileno())
        if forebay:
            gateway = self.gateway(self.disk, 4 * SYNC_BYTES)
            image = self.disk / "sync.raw"
            random_image(image, SYNC_BYTES, seed=3)
            yield "forebay", self.disk_of(gateway, "s", image, "write-back")

    @property
    def sync_file(self) -> Path:
        return self.disk / "device.raw"

    def disk_of(self, gateway: GatewayProcess, name: str, image: Path, mode: str) -> Target:
        """Attach `image`, moved into the gateway's store, and warm it; the common image only to read."""
        shared = image == self.image
        stored = self._stored(gateway, name, image)
        gateway.attach(name, stored.name, *(["--read-only"] if shared else []), mode=mode)
        self._warm(gateway, name, stored.stat().st_size)
        return Target(gateway.uri(name), gateway.pid, gateway)

    def _warm(self, gateway: GatewayProcess, name: str, size: int) -> None:
        """Read until the cache has all of it: what comes faster from memory than it can be stored is not kept."""
        for _ in range(WARMINGS):
            copy_out(gateway.uri(name), size)
            if int(gateway.status(name)["cached_bytes"]) >= size:
                return
        raise RuntimeError(f"{name} is not in the cache after {WARMINGS} times")

    def _stored(self, gateway: GatewayProcess, name: str, image: Path) -> Path:
        """The image in the gateway's store: it is moved there, and the common one linked."""
        stored = gateway.images / f"{name}.raw"
        (os.link if image == self.image else os.rename)(image, stored)
        return stored

    def missers(self, forebay: bool) -> Iterator[tuple[str, Target]]:
        """An origin that answers late, bare and with caches in front of it; nothing warm."""
        slow = ("pattern", str(MISS_BYTES), f"rdelay={ORIGIN_DELAY * 1000:.0f}ms")
        origin = nbdkit(self.memory / "late.sock", *slow, filters=["delay"])
        self.stack.callback(origin.stop)
        yield "origin", Target(origin.uri, origin.process.pid)
        cached = nbdkit(
            self.memory / "late-cache.sock", *slow, "cache-on-read=true", filters=["cache", "delay"]
        )
        self.stack.callback(cached.stop)
        yield "nbdkit cache", Target(cached.uri, cached.process.pid)
        if forebay:
            gateway = self.gateway(self.memory, 64 * MIB)
            gateway.attach("m", origin.uri, "--read-only", mode="write-through")
            yield "forebay", Target(gateway.uri("m"), gateway.pid)

    def gigabit_origin(self) -> NbdServer:
        """1 ms away, through a gigabit. A small burstiness, or the first two seconds' worth would be free."""
        settings = ("rate=1G", "burstiness=0.1", "rdelay=1ms")
        server = nbdkit(
            self.memory / "far.sock",
            "pattern",
            str(COLD_BYTES),
            *settings,
            filters=["rate", "delay"],
        )
        self.stack.callback(server.stop)
        return server


def room(directory: Path) -> int:
    """Bytes free there, for the one who asks."""
    return shutil.disk_usage(directory).free
