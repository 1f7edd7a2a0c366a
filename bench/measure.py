# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One measurement each: what a client did, in how long, and what CPU the server used for it."""

import json
import os
import random
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
US = 1e6
GIB = 1 << 30


@dataclass
class Sample:
    """One measurement. Times in microseconds; what does not apply is None."""

    iops: float | None = None
    bytes_per_second: float | None = None
    mean_us: float | None = None
    p50_us: float | None = None
    p99_us: float | None = None
    seconds: float | None = None
    cpu_us_per_request: float | None = None
    megabytes: float | None = None

    def dump(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in asdict(self).items() if value is not None}


def cpu_seconds(pid: int) -> float:
    """User and system time of the process, all its threads (proc(5), /proc/PID/stat fields 14, 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class CpuMeter:
    """CPU seconds that some processes used inside `with`."""

    used = 0.0

    def per_request(self, requests: int) -> float | None:
        return self.used / requests * US if requests and self.used else None


@contextmanager
def cpu_of(*pids: int) -> Iterator[CpuMeter]:
    meter = CpuMeter()
    before = sum(map(cpu_seconds, pids))
    yield meter
    meter.used = sum(map(cpu_seconds, pids)) - before


@contextmanager
def one_processor(*pids: int) -> Iterator[None]:
    """Inside `with`, all threads of `pids`, and whatever this process starts, are on the same processor."""
    threads = [int(thread) for pid in pids for thread in os.listdir(f"/proc/{pid}/task")]
    before = {thread: os.sched_getaffinity(thread) for thread in (0, *threads)}
    one = {max(before[0])}
    try:
        for thread in before:
            os.sched_setaffinity(thread, one)
        yield
    finally:
        for thread, processors in before.items():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, processors)


def fio(
    uris: Sequence[str], options: dict[str, Any], seconds: float, size: int, *pids: int
) -> Sample:
    """Run a fio job with the nbd engine on each export. `options` are fio's, `size` bytes of an export are used.

    `pids` are the servers. Raises RuntimeError with fio's output when it fails.
    """
    timed = {"time_based": 1, "runtime": f"{seconds * 1000:.0f}ms", "group_reporting": 1}
    first, *others = uris
    command = _command({**timed, **options, "output-format": "json", **_job(first, size)})
    for uri in others:
        command += _command(_job(uri, size))[1:]
    with cpu_of(*pids) as cpu:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or "{" not in done.stdout:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    [result] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    sides = [result[side] for side in ("read", "write") if result[side]["total_ios"]]
    requests = sum(side["total_ios"] for side in sides)
    main = max(sides, key=lambda side: int(side["total_ios"]))
    percentiles = main["clat_ns"].get("percentile", {})
    return Sample(
        iops=sum(side["iops"] for side in sides),
        bytes_per_second=sum(side["bw_bytes"] for side in sides),
        mean_us=main["lat_ns"]["mean"] / 1000,
        p50_us=percentiles.get("50.000000", 0) / 1000,
        p99_us=percentiles.get("99.000000", 0) / 1000,
        cpu_us_per_request=cpu.per_request(requests),
    )


def write(uri: str, size: int, count: int) -> None:
    """Write `count` times 4 KiB at random places of `size` bytes, as a guest's page cache does, unmeasured."""
    options = {"rw": "randwrite", "bs": "4k", "iodepth": 16, "number_ios": count}
    job = {**options, **_job(uri, size)}
    subprocess.run(_command(job), check=True, stdout=subprocess.DEVNULL)


def write_some(uri: str, size: int, count: int, seed: int) -> None:
    """The same, a few: without a process of its own."""
    handle, data = _connect(uri), random.Random(seed).randbytes(4096)
    for offset in islice(_offsets(size, seed), count):
        handle.pwrite(data, offset)
    handle.shutdown()


@contextmanager
def trimming(uri: str, size: int) -> Iterator[None]:
    """Inside `with` a client trims all of an export and zeroes it, again and again, a gibibyte with each request."""
    done = threading.Event()

    def trim() -> None:
        handle = _connect(uri)
        while not done.is_set():
            for step in (handle.trim, handle.zero):
                for offset in range(0, size, GIB):
                    step(min(GIB, size - offset), offset)
        handle.shutdown()

    with ThreadPoolExecutor(1) as threads:
        trimmed = threads.submit(trim)
        try:
            yield
        finally:
            done.set()
        trimmed.result()


def _job(uri: str, size: int) -> dict[str, Any]:
    """Options of one job. Options of all jobs stand before the first one's name."""
    return {
        "name": "bench",
        "ioengine": "nbd",
        "uri": uri,
        "size": size,
        "norandommap": 1,
        "randrepeat": 0,
    }


def _command(job: dict[str, Any]) -> list[str]:
    return ["fio", *(f"--{key}={value}" for key, value in job.items())]


@contextmanager
def reading(uri: str, size: int) -> Iterator[None]:
    """Inside `with` there is a guest that reads now and then, so that the server does not take its guests to rest."""
    options = {"rw": "randread", "bs": "4k", "rate_iops": 30, "time_based": 1, "runtime": "1h"}
    job = {**options, **_job(uri, size)}
    with subprocess.Popen(_command(job), stdout=subprocess.DEVNULL) as reader:
        try:
            yield
        finally:
            reader.terminate()


def copy_out(uri: str, size: int, *pids: int) -> Sample:
    """Read a whole export once, with 64 requests in flight on each connection (nbdcopy to nowhere)."""
    with cpu_of(*pids) as cpu:
        start = time.perf_counter()
        subprocess.run(["nbdcopy", "--requests=64", uri, "null:"], check=True)
        seconds = time.perf_counter() - start
    return Sample(
        bytes_per_second=size / seconds,
        seconds=seconds,
        cpu_us_per_request=cpu.per_request(size // (256 << 10)),  # nbdcopy's request size
    )


def _connect(uri: str) -> Any:
    import nbd  # noqa: PLC0415 - the binding is needed by two rows only

    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


def _latencies(taken: list[float], cpu: float | None) -> Sample:
    cuts = statistics.quantiles(taken, n=100)
    return Sample(
        iops=len(taken) / sum(taken),
        mean_us=statistics.fmean(taken) * US,
        p50_us=cuts[49] * US,
        p99_us=cuts[98] * US,
        cpu_us_per_request=cpu,
    )


def _offsets(size: int, seed: int) -> Iterator[int]:
    generator = random.Random(seed)
    while True:
        yield generator.randrange(size // 4096) * 4096


def write_flush(uri: str, size: int, seconds: float, seed: int, *pids: int) -> Sample:
    """Write 4 KiB at a random place, flush, again; the latency is that of the pair."""
    handle, block, taken = _connect(uri), random.Random(seed).randbytes(4096), list[float]()
    end = time.perf_counter() + seconds
    with cpu_of(*pids) as cpu:
        for offset in _offsets(size, seed):
            start = time.perf_counter()
            handle.pwrite(block, offset)
            handle.flush()
            taken.append((now := time.perf_counter()) - start)
            if now > end:
                break
    handle.shutdown()
    return _latencies(taken, cpu.per_request(len(taken)))


def device_write_sync(path: Path, size: int, seconds: float, seed: int) -> Sample:
    """The same pair on a file that is allocated and written already: pwrite and fdatasync."""
    block, taken = random.Random(seed).randbytes(4096), list[float]()
    descriptor = os.open(path, os.O_RDWR)
    try:
        end = time.perf_counter() + seconds
        for offset in _offsets(size, seed):
            start = time.perf_counter()
            os.pwrite(descriptor, block, offset)
            os.fdatasync(descriptor)
            taken.append((now := time.perf_counter()) - start)
            if now > end:
                break
    finally:
        os.close(descriptor)
    return _latencies(taken, None)


def parallel_misses(uri: str, offsets: list[int]) -> Sample:
    """Read 4 KiB at each offset, all in flight at once; the time until the last one is there."""
    import nbd  # noqa: PLC0415 - see _connect

    handle = _connect(uri)
    start = time.perf_counter()
    cookies = {handle.aio_pread(nbd.Buffer(4096), offset) for offset in offsets}
    while cookies:
        handle.poll(-1)
        cookies -= {cookie for cookie in cookies if handle.aio_command_completed(cookie)}
    seconds = time.perf_counter() - start
    handle.shutdown()
    return Sample(seconds=seconds)


def memory(pid: int) -> float:
    """Resident memory of a process in megabytes (10^6), what it maps from files included."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/{pid}/status has no VmRSS")
