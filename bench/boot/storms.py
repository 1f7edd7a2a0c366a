# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The recorded boot by many guests at once: on one daemon, on peers, from copies."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.boot.forebay import COLD, PRELOADS, daemon
from bench.boot.linux import cpu_seconds
from bench.boot.recording import Recording
from bench.boot.replay import boot_together
from bench.boot.rows import Row
from bench.boot.store import Store, held

from real.processes import NbdServer, nbdkit

MIB = 1 << 20
PEER_STORM = 25
"""Guests at once on the peers: each of them reads all of its boot through the link by itself."""
COPY = "copy, then boot"

Note = Callable[[Row], None]


class Storms:
    """One recording, on one image of random data: what is in it does not matter, but that there are no holes."""

    def __init__(self, directory: Path, recording: Recording, image_bytes: int) -> None:
        self._directory = directory
        self._recording = recording
        self._bytes = image_bytes
        self._image = directory / "image.raw"
        with self._image.open("wb") as file:
            for at in range(0, image_bytes, 16 * MIB):
                file.write(os.urandom(min(16 * MIB, image_bytes - at)))

    def on_forebay(self, storms: list[int], note: Note) -> None:
        """Of each size: cold, then with the trace of that, then warm."""
        for vms in storms:
            with held(self._directory, self._image) as store, daemon(self._directory, store) as one:
                for what, preload in PRELOADS.items():
                    row = Row(what, vms, 0.0)
                    names = [f"vm{n}" for n in range(vms)]
                    with one.disks(row, names, overlay=True, preload=preload) as disks:
                        self._boot(row, disks)
                    if what == COLD:
                        one.purge()
                    note(row)

    def _boot(self, row: Row, disks: list[tuple[Path, str]]) -> None:
        storm = boot_together(disks, self._recording)
        row.seconds += storm.last
        row.median, row.client_cpu = storm.median, storm.client_cpu

    def from_the_store(self, note: Note) -> None:
        """A guest that reads the store itself."""
        with held(self._directory, self._image) as store:
            row = Row("from the store", 1, 0.0)
            self._boot(row, [(store.server.sock, "")])
            row.store_requests, row.store_bytes = store.taken()
        note(row)

    def from_copies(self, storms: list[int], note: Note) -> None:
        """Each guest has a copy of its own, made before it boots. That of one is measured; more share the link."""
        row, copy = Row(COPY, 1, 0.0, store_bytes=self._bytes), self._directory / "copy.raw"
        with held(self._directory, self._image) as store:
            since = time.monotonic()
            subprocess.run(["nbdcopy", store.uri, str(copy)], check=True)
            copied = time.monotonic() - since
        local = nbdkit(self._directory / "local.sock", "file", str(copy))
        try:
            self._boot(row, [(local.sock, "")])
        finally:
            local.stop()
            copy.unlink()
        booted = row.seconds
        for vms in storms:
            seconds = vms * copied + booted
            note(Row(COPY, vms, seconds, None, vms * self._bytes, is_computed=vms > 1))

    def on_peers(self, storms: list[int], note: Note) -> None:
        """A process for each guest, with an overlay that knows nothing of the others."""
        for what, start in (
            ("QEMU overlay, copy-on-read", self._qemu),
            ("nbdkit cow, cow-on-read", self._cow),
        ):
            for vms in (n for n in storms if n <= PEER_STORM):
                row = Row(what, vms, 0.0)
                with held(self._directory, self._image) as store:
                    with self._started(start, vms, store) as servers:
                        pids = [one.process.pid for one in servers]
                        self._boot(row, [(one.sock, "") for one in servers])
                        row.daemon_cpu = sum(map(cpu_seconds, pids))
                    row.store_requests, row.store_bytes = store.taken()
                note(row)

    @contextlib.contextmanager
    def _started(
        self, start: Callable[[int, Store], NbdServer], count: int, store: Store
    ) -> Iterator[list[NbdServer]]:
        with contextlib.ExitStack() as stack:
            servers = []
            for n in range(count):
                servers.append(start(n, store))
                stack.callback(servers[-1].stop)
            yield servers

    def _qemu(self, number: int, store: Store) -> NbdServer:
        overlay = self._directory / f"overlay{number}.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", store.uri]
        subprocess.run([*create, str(overlay)], check=True)
        graph = f"driver=copy-on-read,file.driver=qcow2,file.file.driver=file,file.file.filename={overlay}"
        sock = self._directory / f"qemu{number}.sock"
        command = ["qemu-nbd", "--persistent", "--shared=0", f"--socket={sock}", "--image-opts"]
        return NbdServer([*command, graph], sock)

    def _cow(self, number: int, store: Store) -> NbdServer:
        sock = self._directory / f"cow{number}.sock"
        return nbdkit(sock, "nbd", f"uri={store.uri}", "cow-on-read=true", filters=["cow"])
