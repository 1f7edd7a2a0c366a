# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`make bench`: Forebay against nbdkit and qemu-nbd, the same work on the same image, in interleaved rounds."""

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path

from bench import measure, report
from bench.bed import (
    CHECKPOINT_BYTES,
    CHECKPOINT_WRITES,
    COLD_BYTES,
    MISS_BYTES,
    NEIGHBOUR_BYTES,
    SNAPSHOT_BYTES,
    SYNC_BYTES,
    VMS,
    Bed,
    Target,
    room,
)
from bench.measure import Sample
from bench.rows import ROWS, Row

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MIB = 1 << 20
TIB = 1 << 40

COPIES = 15
"""How many images' worth of room the bed takes at most: image, three copies, a cache of nine, and air."""

Results = dict[str, dict[str, list[Sample]]]
"""Samples by row and server, one of each round."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (5)")
    parser.add_argument("--quick", action="store_true", help="3 rounds of a second: two minutes")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement (3)")
    parser.add_argument("--size", type=int, default=512, help="of the image, MiB (512)")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose key contains TEXT")
    parser.add_argument("--peers-only", action="store_true", help="without Forebay: tries the bed")
    parser.add_argument(
        "--dir", type=Path, help="where images and caches lie (/dev/shm if it has room)"
    )
    parser.add_argument(
        "--disk", type=Path, default=Path("/var/tmp"), help="a real disk, for the row that flushes"
    )
    parser.add_argument("--report", action="store_true", help="no run: print the kept result again")
    parser.add_argument(
        "--readme", action="store_true", help="put the kept result into bench/README.md"
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.size = 3, 1.0, 256
    return options


def memory_directory(asked: Path | None, size: int) -> Path:
    """Where images and caches go: `asked`, or memory where it has room, or the disk."""
    shared = Path("/dev/shm")
    if asked:
        return asked
    if shared.is_dir() and room(shared) > COPIES * size:
        return shared
    return Path("/var/tmp")


class Run:
    """All rounds of all rows that were asked for."""

    def __init__(self, options: argparse.Namespace, memory: Path) -> None:
        self.options = options
        self.memory = memory
        self.results: Results = {}
        self.skipped: dict[str, str] = {}
        self.failed = False
        self.forebay = not options.peers_only

    def run(self) -> None:
        rows = [row for row in ROWS if self.options.only in row.key]
        for group in dict.fromkeys(row.group for row in rows):
            mine = [row for row in rows if row.group == group]
            try:
                with ExitStack() as stack:
                    bed = Bed(self.memory, self.options.disk, self.options.size * MIB, stack)
                    getattr(self, f"_run_{group}")(bed, mine)
            except (RuntimeError, AssertionError, OSError, subprocess.CalledProcessError) as fault:
                print(f"FAILED: {fault}", flush=True)  # the other rows are still worth having
                self.failed = True
                self.skipped |= {row.key: f"failed: {str(fault).splitlines()[0]}" for row in mine}

    def _rounds(self, names: list[str]) -> Iterator[tuple[int, str]]:
        """Every server in every round, each round beginning with another one."""
        for number in range(self.options.rounds):
            for turn in range(len(names)):
                yield number, names[(number + turn) % len(names)]

    def _note(self, row: Row, number: int, name: str, sample: Sample) -> None:
        self.results.setdefault(row.key, {}).setdefault(name, []).append(sample)
        value = report.shown(getattr(sample, row.measures), row.measures)
        cpu = sample.cpu_us_per_request
        spent = f"   {cpu:6.1f} µs CPU/request" if cpu else ""
        rounds = self.options.rounds
        print(f"  {number + 1}/{rounds}  {row.key:14} {name:16} {value:>12}{spent}", flush=True)

    def _fio_rows(self, rows: list[Row], targets: dict[str, Target], size: int) -> None:
        for row in rows:
            print(row.title, flush=True)
            for number, name in self._rounds(list(targets)):
                target, seconds = targets[name], self.options.seconds
                with measure.one_processor(*target.pids) if row.one_processor else nullcontext():
                    sample = measure.fio(target.uris, row.fio, seconds, size, *target.pids)
                target.settle()
                self._note(row, number, name, sample)

    def _run_read(self, bed: Bed, rows: list[Row]) -> None:
        self._fio_rows(rows, dict(bed.readers(self.forebay)), bed.size)

    def _run_write(self, bed: Bed, rows: list[Row]) -> None:
        # not all of the image: a write of 4 KiB takes a slot 16 times as large, and so much dirty begins a checkpoint
        self._fio_rows(rows, dict(bed.writers(self.forebay)), bed.size * 3 // 8)

    def _run_vms(self, bed: Bed, rows: list[Row]) -> None:
        self._fio_rows(rows, dict(bed.hosts(self.forebay)), bed.size // VMS * 3 // 8)

    def _run_neighbour(self, bed: Bed, rows: list[Row]) -> None:
        if not self.forebay:
            return
        read, trimmed = bed.neighbours()
        for row in rows:
            print(row.title, flush=True)
            for number, name in self._rounds(["alone", "forebay"]):
                beside = name == "forebay"
                with measure.trimming(trimmed.uri, NEIGHBOUR_BYTES) if beside else nullcontext():
                    seconds = self.options.seconds
                    sample = measure.fio(read.uris, row.fio, seconds, bed.size, read.pid)
                self._note(row, number, name, sample)

    def _run_sync(self, bed: Bed, rows: list[Row]) -> None:
        targets = dict(bed.syncers(self.forebay))
        [row] = rows
        print(row.title, flush=True)
        for number, name in self._rounds(["device", *targets]):
            seconds, seed = self.options.seconds, number
            if name == "device":
                sample = measure.device_write_sync(bed.sync_file, SYNC_BYTES, seconds, seed)
            else:
                target = targets[name]
                sample = measure.write_flush(target.uri, SYNC_BYTES, seconds, seed, target.pid)
                target.settle()
            self._note(row, number, name, sample)

    def _run_snapshots(self, bed: Bed, rows: list[Row]) -> None:
        if self.forebay:
            self._fio_rows(rows, bed.snapshotted(), SNAPSHOT_BYTES)

    def _run_checkpoint(self, bed: Bed, rows: list[Row]) -> None:
        if not self.forebay:
            return
        disks = bed.checkpointers()
        for row in rows:
            print(row.title, flush=True)
            running = self._busy if row.key == "checkpoint-after-checkpoint" else self._spread
            for number, name in self._rounds([row.bars[0].peer, "forebay"]):
                sample = (running if name == "forebay" else self._calm)(row, disks)
                self._note(row, number, name, sample)

    def _calm(self, row: Row, disks: dict[str, Target]) -> Sample:
        return self._beside(row, disks, "calm", running=False)

    def _busy(self, row: Row, disks: dict[str, Target]) -> Sample:
        """What is measured writes, and keeps the checkpoints busy itself."""
        return self._beside(row, disks, "busy", running=True)

    def _spread(self, row: Row, disks: dict[str, Target]) -> Sample:
        """Nobody but one checkpoint, beside what is measured."""
        target = disks["spread"]
        measure.write(target.uri, CHECKPOINT_BYTES, CHECKPOINT_WRITES)
        with measure.reading(target.uri, CHECKPOINT_BYTES):  # while guests rest it takes no time
            if not _goes_on(target, "spread", 60.0):
                raise RuntimeError(f"{row.key}: no checkpoint began")
            return self._beside(row, disks, "spread", running=True)

    def _beside(self, row: Row, disks: dict[str, Target], store: str, *, running: bool) -> Sample:
        """Measure on one of the disks. Raises RuntimeError unless a checkpoint ran all the time, or none did."""
        target = disks[store]
        before = _progress(target, store)
        sample = measure.fio(
            target.uris, row.fio, self.options.seconds, CHECKPOINT_BYTES, target.pid
        )
        done = _progress(target, store) - before
        if bool(done) != running or _goes_on(target, store, 1.0) != running:
            raise RuntimeError(f"{row.key} on {store}: {done} bytes were written back meanwhile")
        target.settle()
        return sample

    def _run_miss(self, bed: Bed, rows: list[Row]) -> None:
        targets = dict(bed.missers(self.forebay))
        [row] = rows
        print(row.title, flush=True)
        stride = MISS_BYTES // (8 * self.options.rounds) // MIB * MIB
        for number, name in self._rounds(list(targets)):
            # far apart and in another place each round: neither read-ahead nor an earlier round helps
            offsets = [(number + index * self.options.rounds) * stride for index in range(8)]
            sample = measure.parallel_misses(targets[name].uri, offsets)
            self._note(row, number, name, sample)

    def _run_cold(self, bed: Bed, rows: list[Row]) -> None:
        origin = bed.gigabit_origin()
        [row] = rows
        print(row.title, flush=True)
        for number, name in self._rounds(["origin", *(["forebay"] if self.forebay else [])]):
            if name == "origin":
                sample = measure.copy_out(origin.uri, COLD_BYTES)
            else:
                gateway = bed.gateway(bed.memory, 2 * COLD_BYTES)
                gateway.attach("cold", origin.uri, "--read-only", mode="write-through")
                sample = measure.copy_out(gateway.uri("cold"), COLD_BYTES, gateway.pid)
                gateway.remove()
            self._note(row, number, name, sample)

    def _run_memory(self, bed: Bed, rows: list[Row]) -> None:
        [row] = rows
        if not self.forebay:
            return
        if importlib.util.find_spec("bench.synthetic") is None:
            self.skipped[row.key] = "bench.synthetic, which makes such an index, is not there"
            return
        gateway = bed.gateway(bed.disk, TIB, start=False)
        places = ["--device", gateway.state / "cache.img", "--index", gateway.state / "index"]
        command = [sys.executable, "-m", "bench.synthetic", *places, "--size", TIB]
        subprocess.run([str(word) for word in command], check=True)
        gateway.start()
        self._note(row, 0, "forebay", Sample(megabytes=measure.memory(gateway.pid)))


def _progress(target: Target, disk: str) -> int:
    """Bytes that checkpoints have written, to journal and image."""
    assert target.gateway is not None
    status = target.gateway.status(disk)
    return int(status["journal_written_bytes"]) + int(status["origin_written_bytes"])


def _goes_on(target: Target, disk: str, seconds: float) -> bool:
    """Whether a checkpoint writes something within that time; one that is on its way does several times a second."""
    before, deadline = _progress(target, disk), time.monotonic() + seconds
    while _progress(target, disk) == before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def conditions(options: argparse.Namespace, memory: Path) -> dict[str, str]:
    """What a reader needs to judge the figures."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "forebay": _first_line("git", "-C", str(HERE), "rev-parse", "--short", "HEAD"),
        "machine": f"{os.cpu_count()} CPUs shared by client and server, Linux {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "fio": _first_line("fio", "--version"),
        "nbdkit": _first_line("nbdkit", "--version"),
        "qemu": _first_line("qemu-nbd", "--version"),
        "image": f"{options.size} MiB of random data on {memory} ({_file_system(memory)})",
        "disk": f"the row with flushes on {_file_system(options.disk)}",
        "rounds": f"{options.rounds} interleaved rounds of {options.seconds:g} s, medians",
    }


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0]


def _file_system(path: Path) -> str:
    return _first_line("stat", "--file-system", "--format=%T", str(path))


def main() -> int:
    options = arguments()
    kept = RESULTS / f"{'quick' if options.quick else 'bench'}.json"
    if options.report or options.readme:
        results = report.load(kept)
        print(report.text(results))
        if options.readme:
            report.fill_readme(report.PAGE, results)
        return 0
    memory = memory_directory(options.dir, options.size * MIB)
    os.environ["TMPDIR"] = str(memory)  # nbdkit's cache filter keeps its cache there
    run = Run(options, memory)
    run.run()
    results = report.Results(conditions(options, memory), run.results, run.skipped)
    print("\n" + report.text(results))
    if options.only or options.peers_only or run.failed:
        print("\nnot kept: a run of some rows, without Forebay or with a failure is no result")
        return int(run.failed)
    report.keep(results, kept)
    print(f"\nkept in {kept.relative_to(HERE.parent)}, with the same name .md and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
