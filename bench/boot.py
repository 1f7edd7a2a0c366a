# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`make bench-boot`: boots from one image whose store is a gigabit and a millisecond away, alone and in a storm.

The boot is synthetic and always the same (see `boot_reads`): what a Linux guest does to its disk, with the time that it
computes in between. So the seconds of a boot that waits for nothing are known, and everything above is waiting. A
virtual machine is a thread with a connection that asks for one thing after the other.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from bench.report import fill_between

from forebay.client import Client
from forebay_nbd.client.blocking import BlockingClient
from real.gateway_process import GatewayProcess
from real.processes import NbdServer, nbdkit

HERE = Path(__file__).resolve().parent
KEPT = HERE / "results" / "boot.json"
MIB = 1 << 20
KIB = 1 << 10
UNITS = {"bytes": 1, "KiB": KIB, "MiB": MIB, "GiB": 1 << 30}
"""Of the statistics of nbdkit."""
IMAGE_BYTES = 1 << 30
BOOT_BYTES = 143 * MIB
"""What a boot reads: of Windows 7 it was measured (Tang, FVD, 2011), a Debian server reads somewhat less."""
THINK_SECONDS = 8.0
"""What a boot takes that waits for nothing."""
LINK = ("rate=1G", "burstiness=0.05", "rdelay=1ms")
"""The store: 1 Gbit/s for all who read it, and a millisecond for each request; nbdkit knows no shorter delay."""
PEER_STORM = 25
"""Virtual machines at once on the peers: each of them reads all of its boot through the link by itself."""
BEGIN, END = "<!-- boot: begin -->", "<!-- boot: end -->"


class Read(NamedTuple):
    """One request of the guest, and for how long it computes when it has that."""

    offset: int
    length: int
    think: float


def boot_reads(seed: int = 1) -> list[Read]:
    """The requests of a boot: files of 4 KiB to 4 MiB, half of them below 32 KiB, at random places of the image.

    A file is read from its start to its end in requests of up to 128 KiB, as the kernel's read-ahead does; then the
    guest computes for some milliseconds. No byte is read twice.
    """
    dice = random.Random(seed)
    taken: set[int] = set()
    files: list[tuple[int, int]] = []
    left = BOOT_BYTES
    while left > 0:
        size = min(left, max(4 * KIB, min(4 * MIB, int(dice.lognormvariate(10.4, 1.7)) & ~4095)))
        first = dice.randrange(IMAGE_BYTES // MIB * 16 - 64)
        blocks = set(range(first, first + size // (64 * KIB) + 1))
        if blocks & taken:
            continue
        taken |= blocks
        files.append((first * 64 * KIB, size))
        left -= size
    pauses = [dice.expovariate(1.0) for _ in files]
    scale = THINK_SECONDS / sum(pauses)
    reads = []
    for (offset, size), pause in zip(files, pauses, strict=True):
        for start in range(0, size, 128 * KIB):
            length = min(128 * KIB, size - start)
            is_last = start + length == size
            reads.append(Read(offset + start, length, pause * scale if is_last else 0.0))
    return reads


def replay(socket_path: Path, export: str, reads: list[Read], begin: threading.Barrier) -> None:
    """Boot one virtual machine. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(socket_path))
        client = BlockingClient(sock, export)
        buffer = memoryview(bytearray(128 * KIB))
        begin.wait()
        for offset, length, think in reads:
            client.read_into(offset, buffer[:length])
            if think:
                time.sleep(think)
        client.close()


def boot_all(disks: list[tuple[Path, str]], reads: list[Read]) -> float:
    """Boot a virtual machine from each of these sockets and exports, all at once. Seconds until the last has booted."""
    begin = threading.Barrier(len(disks) + 1)
    faults: list[BaseException] = []

    def boot(path: Path, export: str) -> None:
        try:
            replay(path, export, reads, begin)
        except BaseException as fault:  # noqa: BLE001  (raised below)
            faults.append(fault)
            begin.abort()

    threads = [threading.Thread(target=boot, args=disk) for disk in disks]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        begin.wait()
    since = time.monotonic()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return time.monotonic() - since


# ---------------------------------------------------------------------------------------------------------------- rows


@dataclass
class Row:
    """One line of the table."""

    what: str
    vms: int
    seconds: float
    """Until the last one has booted."""
    origin_bytes: int | None = None
    """What the store gave."""
    origin_requests: int | None = None
    waited_percent: float | None = None
    """The share of bytes for which a guest had to wait, in Forebay's own words."""
    is_computed: bool = False
    """True if it was not measured, but follows from what was."""


class Store:
    """The store: an NBD server that counts what it gives."""

    def __init__(self, directory: Path, image: Path) -> None:
        self.directory = directory
        self._image = image
        self._made = 0

    @contextlib.contextmanager
    def open(self, row: Row) -> Iterator[NbdServer]:
        """A fresh one; `row` gets what it gave, when it ends."""
        self._made += 1
        stats = self.directory / f"stats{self._made}"
        server = nbdkit(
            self.directory / f"store{self._made}.sock",
            "file",
            str(self._image),
            *LINK,
            f"statsfile={stats}",
            filters=["stats", "rate", "delay"],
        )
        try:
            yield server
        finally:
            server.stop()
        for line in stats.read_text().splitlines():
            words = line.split()
            if words[:1] == ["read:"]:
                row.origin_requests = int(words[1])
                row.origin_bytes = int(float(words[5]) * UNITS[words[6].rstrip(",")])


class Bench:
    """Everything that is measured, one after the other."""

    def __init__(self, directory: Path, storms: list[int], *, peers: bool) -> None:
        self.directory = directory
        self.image = directory / "image.raw"
        self.reads = boot_reads()
        self.blocks = {
            n
            for r in self.reads
            for n in range(r.offset >> 16, (r.offset + r.length - 1 >> 16) + 1)
        }
        """What a boot reads, in blocks of 64 KiB."""
        self.storms = storms
        self.peers = peers
        self.rows: list[Row] = []
        self.store = Store(directory, self.image)

    def note(self, row: Row) -> None:
        self.rows.append(row)
        print(
            f"{row.what}, {row.vms}: {row.seconds:.1f} s, {row.origin_bytes}, {row.waited_percent}",
            flush=True,
        )

    def run(self) -> None:
        with self.image.open("wb") as file:
            for _ in range(IMAGE_BYTES // (16 * MIB)):
                file.write(os.urandom(16 * MIB))
        self.direct()
        self.forebay()
        if self.peers:
            self.copy()
            self.of_peer("QEMU overlay, copy-on-read", self.qemu)
            self.of_peer("nbdkit cow, cow-on-read", self.cow)

    def direct(self) -> None:
        """A guest that reads the store itself."""
        row = Row("from the store", 1, 0)
        with self.store.open(row) as server:
            row.seconds = boot_all([(server.sock, "")], self.reads)
        self.note(row)

    # -- Forebay

    def forebay(self) -> None:
        for vms in self.storms:
            gateway = GatewayProcess({"cache": {"size": "4 GiB"}}, parent=self.directory)
            gateway.start()
            try:
                with self.store.open(Row("", 0, 0)) as server:
                    for what, preload in (
                        ("Forebay, cold, no trace", "0"),
                        ("Forebay, cold, replay", "trace"),
                        ("Forebay, warm", "0"),
                    ):
                        self.note(self.storm(gateway, server, what, vms, preload))
            finally:
                gateway.remove()

    def storm(
        self, gateway: GatewayProcess, server: NbdServer, what: str, vms: int, preload: str
    ) -> Row:
        names = [f"vm{n}" for n in range(vms)]
        daemon = Client(str(gateway.control))
        for name in names:
            wanted = {"name": name, "image": server.uri, "overlay": True, "preload": preload}
            daemon.post("/disks", wanted)
        seconds = boot_all([(gateway.sock(name), name) for name in names], self.reads)
        disks = [daemon.get(f"/disks/{name}") for name in names]
        read = sum(one["boot"]["read_bytes"] for one in disks)
        waited = sum(one["boot"]["waited_bytes"] for one in disks)
        row = Row(what, vms, seconds, sum(one["origin_read_bytes"] for one in disks))
        row.waited_percent = 100 * waited / read
        for name in names:
            daemon.follow("DELETE", f"/disks/{name}?force=1", None, lambda _done, _total: None)
        if "warm" not in what:
            time.sleep(1)  # the boot is recorded
        if what.endswith("no trace"):
            gateway.cli("purge", server.uri)
        return row

    # -- others

    def copy(self) -> None:
        """BonFIRE's way: each virtual machine has a copy of its own, made before it boots."""
        row, copy = Row("copy, then boot", 1, 0, IMAGE_BYTES), self.directory / "copy.raw"
        with self.store.open(row) as server:
            since = time.monotonic()
            subprocess.run(["nbdcopy", server.uri, str(copy)], check=True)
            copied = time.monotonic() - since
        local = nbdkit(self.directory / "local.sock", "file", str(copy))
        try:
            booted = boot_all([(local.sock, "")], self.reads)
        finally:
            local.stop()
            copy.unlink()
        row.seconds = copied + booted
        self.note(row)
        for vms in self.storms:
            if vms > 1:
                self.note(
                    Row(row.what, vms, vms * copied + booted, vms * IMAGE_BYTES, is_computed=True)
                )

    def of_peer(self, what: str, start: Callable[[int, NbdServer], NbdServer]) -> None:
        """A peer with an overlay for each virtual machine, which knows nothing of the others."""
        for vms in [n for n in self.storms if n <= PEER_STORM]:
            row = Row(what, vms, 0)
            with self.store.open(row) as server, contextlib.ExitStack() as stack:
                servers = [start(n, server) for n in range(vms)]
                for one in servers:
                    stack.callback(one.stop)
                row.seconds = boot_all([(one.sock, "") for one in servers], self.reads)
            self.note(row)

    def qemu(self, number: int, server: NbdServer) -> NbdServer:
        overlay = self.directory / f"overlay{number}.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", server.uri]
        subprocess.run([*create, str(overlay)], check=True)
        graph = f"driver=copy-on-read,file.driver=qcow2,file.file.driver=file,file.file.filename={overlay}"
        sock = self.directory / f"qemu{number}.sock"
        command = ["qemu-nbd", "--persistent", "--shared=0", f"--socket={sock}", "--image-opts"]
        return NbdServer([*command, graph], sock)

    def cow(self, number: int, server: NbdServer) -> NbdServer:
        sock = self.directory / f"cow{number}.sock"
        return nbdkit(sock, "nbd", f"uri={server.uri}", "cow-on-read=true", filters=["cow"])


# -------------------------------------------------------------------------------------------------------------- report


def table(rows: list[Row], distinct: int) -> str:
    """The rows as Markdown. `distinct`: bytes of the blocks that a boot reads."""
    found = [
        "| how | VMs | until the last has booted | bytes from the store, of one boot's | bytes waited for |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        seconds = f"{row.seconds:.1f} s" + (" (computed)" if row.is_computed else "")
        share = "" if row.origin_bytes is None else f"{row.origin_bytes / distinct:.2f}"
        waited = "" if row.waited_percent is None else f"{row.waited_percent:.1f} %"
        found.append(f"| {row.what} | {row.vms} | {seconds} | {share} | {waited} |")
    return "\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-boot", description=__doc__)
    parser.add_argument("--storms", default="1,25,100", help="virtual machines at once (1,25,100)")
    parser.add_argument("--no-peers", action="store_true", help="Forebay alone")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where all lies")
    parser.add_argument("--readme", action="store_true", help="put the kept result into the page")
    options = parser.parse_args()
    if not options.readme:
        with tempfile.TemporaryDirectory(prefix="fbb-", dir=options.dir) as directory:
            storms = [int(word) for word in options.storms.split(",")]
            bench = Bench(Path(directory), storms, peers=not options.no_peers)
            bench.run()
        host = f"{platform.machine()}, {os.cpu_count()} processors, Linux {platform.release()}"
        kept = {
            "host": host,
            "load": os.getloadavg()[0],
            "distinct_bytes": len(bench.blocks) * 64 * KIB,
            "requests": len(bench.reads),
            "rows": [asdict(row) for row in bench.rows],
        }
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    kept = json.loads(KEPT.read_text())
    text = table([Row(**row) for row in kept["rows"]], kept["distinct_bytes"])
    print(text)
    if options.readme:
        fill_between(HERE / "README.md", BEGIN, END, text + "\n")


if __name__ == "__main__":
    main()
