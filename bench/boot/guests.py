# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A real Linux boots alone, from the store, from Forebay in each way, and from a copy; and its reads are recorded."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bench.boot import recording
from bench.boot.forebay import PRELOADS, REPLAY, WARM, daemon
from bench.boot.linux import Booted, Guest, boot
from bench.boot.recording import Recording
from bench.boot.rows import Row
from bench.boot.store import held

from real.processes import nbdkit

FULL_COPY = "Forebay, full-copy"


def boot_each_way(guest: Guest, directory: Path, note: Callable[[Row], None]) -> None:
    """Boot the guest in each way, one after the other; `note` gets a row for each."""

    def booted(row: Row, disk: str) -> None:
        found: Booted = boot(guest, f"file={disk},format=raw,snapshot=on", directory / "console")
        row.seconds += found.seconds
        row.client_cpu = found.cpu_seconds

    with held(directory, guest.image) as store:
        row = Row("from the store", 1, 0.0)
        booted(row, store.uri)
        row.store_requests, row.store_bytes = store.taken()
        note(row)
        with daemon(directory, store) as forebay:
            for what, preload in PRELOADS.items():
                row = Row(what, 1, 0.0)
                with forebay.disks(row, ["vm"], overlay=True, preload=preload):
                    booted(row, forebay.uri("vm"))
                if what not in (REPLAY, WARM):
                    forebay.purge()
                note(row)
        with daemon(directory, store) as forebay:
            row = Row(FULL_COPY, 1, 0.0)
            with forebay.disks(row, ["vm"], mode="full-copy"):
                booted(row, forebay.uri("vm"))
            note(row)
        row, before, began = Row("copy, then boot", 1, 0.0), store.taken(), time.monotonic()
        copy = directory / "copy.raw"
        subprocess.run(["nbdcopy", store.uri, str(copy)], check=True)
        row.seconds = time.monotonic() - began
        booted(row, str(copy))
        copy.unlink()
        row.store_requests, row.store_bytes = store.taken().since(before)
        note(row)


def record(guest: Guest, directory: Path) -> Recording:
    """The guest's boot from a store that answers at once."""
    log = directory / "log"
    words = ("file", str(guest.image), f"logfile={log}")
    server = nbdkit(directory / "log.sock", *words, filters=["log", "cow"])
    try:
        began = time.time()
        found = boot(guest, f"file={server.uri},format=raw", directory / "console")
    finally:
        server.stop()
    return recording.of_log(log.read_text().splitlines(), found.seconds, began)
