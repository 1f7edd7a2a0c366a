# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Every client people use, in every mode: what they write is what they read, and what the image holds after a flush."""

import json
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from forebay_cache import View, invalidate, open_cache
from forebay_cache.format.records import LayerName
from real.disk_fixture import (
    CACHED_MODES,
    MODES,
    PRIVATE_MODES,
    OneDisk,
    allocated,
    run,
    run_together,
    wait_for,
)
from real.gateway_process import GatewayProcess
from real.processes import MIB, need, random_image

SIZE = 6 * MIB
HOLES = [(MIB, MIB), (4 * MIB, MIB)]

MakeDisk = Callable[..., OneDisk]
Connect = Callable[..., Any]


@pytest.fixture(scope="module")
def shared() -> Iterator[GatewayProcess]:
    """One daemon for all tests here, as a host has it: disks come and go."""
    gateway = GatewayProcess()
    try:
        gateway.start()
        yield gateway
        assert gateway.stop() == 0, gateway.log_text()
        assert not gateway.unexpected_log()
    finally:
        gateway.remove()


@pytest.fixture
def make_disk(shared: GatewayProcess, rng: random.Random) -> Iterator[MakeDisk]:
    """`make_disk("write-back", size, holes)`: an attached disk on a fresh image; detached after the test."""
    made: list[OneDisk] = []

    def make(
        mode: str, size: int = SIZE, holes: list[tuple[int, int]] | None = None, *options: str
    ) -> OneDisk:
        name = f"d{rng.getrandbits(40):x}"
        path = shared.images / f"{name}.raw"
        content = random_image(path, size, rng.getrandbits(32), HOLES if holes is None else holes)
        shared.attach(name, path.name, *options, mode=mode)
        made.append(OneDisk(shared, name, path, content))
        return made[-1]

    yield make
    for disk in made:
        shared.cli("detach", disk.name, "--force")
        disk.path.unlink()


# ------------------------------------------------------------------------------------------ libnbd


@pytest.mark.parametrize("mode", MODES)
def test_libnbd_at_any_byte(
    mode: str, make_disk: MakeDisk, connect: Connect, rng: random.Random
) -> None:
    """A size that is no multiple of anything, every command, two connections taking turns."""
    import nbd

    disk = make_disk(mode, SIZE - 1237)
    size = len(disk.content)
    model = bytearray(disk.content)
    clients = [connect(disk.uri, "base:allocation", "x-forebay:cached") for _ in range(2)]
    assert all(client.can_multi_conn() for client in clients)
    assert clients[0].get_size() == size
    for step in range(120):
        client = clients[step % 2]
        offset = rng.choice([rng.randrange(size), rng.randrange(size) & ~4095])
        length = min(size - offset, rng.choice([1, 100, 4096, 5000, 65536, 70000, 300_000]))
        flags = rng.choice([0, 0, nbd.CMD_FLAG_FUA])
        command = rng.choice(["write", "write", "zero", "trim", "cache", "flush", "read"])
        if command == "write":
            data = rng.randbytes(length)
            client.pwrite(data, offset, flags)
            model[offset : offset + length] = data
        elif command == "zero":
            client.zero(length, offset, flags | rng.choice([0, nbd.CMD_FLAG_NO_HOLE]))
            model[offset : offset + length] = bytes(length)
        elif command == "trim":
            client.trim(length, offset, flags)
            # whether the edges go is the server's choice; what they are now, they stay
            model[offset : offset + length] = client.pread(length, offset)
            inner = slice(-(-offset // 65536) * 65536, (offset + length) // 65536 * 65536)
            assert not any(model[inner])
        elif command == "cache":
            client.cache(length, offset)
        elif command == "flush":
            client.flush()
        low, high = max(0, offset - 5000), min(size, offset + length + 5000)
        other = clients[(step + 1) % 2]
        assert other.pread(high - low, low) == model[low:high], (step, command, offset, length)
    assert clients[0].pread(size, 0) == model
    assert disk.file_after_flush() == model


@pytest.mark.parametrize("mode", MODES)
def test_requests_of_32_mib(
    mode: str, make_disk: MakeDisk, connect: Connect, rng: random.Random
) -> None:
    import nbd

    disk = make_disk(mode, 33 * MIB, [(MIB, MIB)])
    client = connect(disk.uri)
    assert client.get_block_size(nbd.SIZE_MAXIMUM) == 32 * MIB
    assert client.get_block_size(nbd.SIZE_MINIMUM) == 1
    assert client.pread(32 * MIB, 12345) == disk.content[12345 : 12345 + 32 * MIB]
    data = rng.randbytes(16 * MIB) * 2
    client.pwrite(data, 7777)
    model = disk.content[:7777] + data + disk.content[7777 + len(data) :]
    assert client.pread(32 * MIB, MIB) == model[MIB:]
    assert client.pread(32 * MIB, 0) == model[: 32 * MIB]
    client.set_strict_mode(0)
    with pytest.raises(nbd.Error):
        client.pread(32 * MIB + 1, 0)
    assert client.pread(10, 33 * MIB - 10) == model[-10:], (
        "too much was asked, and no more happened"
    )
    assert disk.file_after_flush() == model


@pytest.mark.parametrize("mode", MODES)
def test_many_requests_in_flight_over_several_connections(
    mode: str, make_disk: MakeDisk, connect: Connect, rng: random.Random
) -> None:
    """Four connections with 32 writes each at once, no two on the same bytes; then all of it read at once."""
    import nbd

    disk = make_disk(mode)
    piece = SIZE // 128
    model = rng.randbytes(SIZE)
    clients = [connect(disk.uri) for _ in range(4)]
    order = rng.sample(range(128), 128)
    sent: list[tuple[Any, int]] = []
    for i, part in enumerate(order):
        buffer = nbd.Buffer.from_bytearray(bytearray(model[part * piece : (part + 1) * piece]))
        sent.append((clients[i % 4], clients[i % 4].aio_pwrite(buffer, part * piece)))
    _finish(clients, sent)
    sent.clear()
    buffers = [nbd.Buffer(piece) for _ in order]
    for i, part in enumerate(order):
        client = clients[(i + 1) % 4]
        sent.append((client, client.aio_pread(buffers[part], part * piece)))
    _finish(clients, sent)
    assert b"".join(bytes(buffer.to_bytearray()) for buffer in buffers) == model
    assert disk.file_after_flush() == model


def _finish(clients: list[Any], sent: list[tuple[Any, int]]) -> None:
    """Until everything sent is answered; nbd.Error when an answer is one."""
    for client in clients:
        while client.aio_in_flight():
            client.poll(-1)
    for client, cookie in sent:
        assert client.aio_command_completed(cookie)


# -------------------------------------------------------------------------------------------- qemu


@pytest.mark.parametrize("mode", MODES)
def test_qemu_io(mode: str, make_disk: MakeDisk) -> None:
    disk = make_disk(mode)
    commands = [
        "write -P 0xa5 0 64k",
        "write -P 0x5a -f 100k 300k",
        "read -P 0xa5 0 64k",
        "read -P 0x5a 100k 300k",
        "write -z 128k 64k",
        "write -z -u 1M 256k",
        "discard 2M 512k",
        "flush",
        "read -P 0 128k 64k",
        "read -P 0 1M 256k",
        "read -P 0 2M 512k",
        "read -P 0x5a 192k 208k",
        "aio_write -P 0x11 3M 1M",
        "aio_write -P 0x22 4M 1M",
        "aio_write -P 0x33 5M 1M",
        "aio_flush",
        "read -P 0x22 4M 1M",
    ]
    words = [word for command in commands for word in ("-c", command)]
    done = run("qemu-io", "-f", "raw", *words, disk.uri)
    assert "failed" not in done.stdout, done.stdout
    model = bytearray(disk.content)
    for offset, length, value in (
        (0, 64, 0xA5),
        (100, 300, 0x5A),
        (128, 64, 0),
        (1024, 256, 0),
        (2048, 512, 0),
        (3072, 1024, 0x11),
        (4096, 1024, 0x22),
        (5120, 1024, 0x33),
    ):
        model[offset << 10 : (offset + length) << 10] = bytes([value]) * (length << 10)
    assert disk.file_after_flush() == model
    assert disk.reads() == model


@pytest.mark.parametrize("mode", MODES)
def test_qemu_img(mode: str, make_disk: MakeDisk, tmp_path: Path, rng: random.Random) -> None:
    """Out of one disk, into another, and maps on the way."""
    disk = make_disk(mode)
    copy, other = tmp_path / "copy.raw", tmp_path / "other.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", disk.uri, copy)
    assert copy.read_bytes() == disk.content
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", disk.uri, copy)
    mapped = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", disk.uri).stdout)
    assert _zero_ranges(mapped) == HOLES

    model = random_image(copy, SIZE, rng.getrandbits(32), [(2 * MIB, 2 * MIB)])
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", copy, other)
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", other, disk.uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", disk.uri, other)
    mapped = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", disk.uri).stdout)
    zeros = _zero_ranges(mapped)
    assert all(not any(model[at : at + length]) for at, length in zeros), "data told as zeros"
    if mode in PRIVATE_MODES:
        assert zeros == [(2 * MIB, 2 * MIB)], "dirty zeros are told"
    assert disk.file_after_flush() == model


def _zero_ranges(mapped: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(part["start"], part["length"]) for part in mapped if part["zero"]]


# ----------------------------------------------------------------------------------------- libnbd's tools


@pytest.mark.parametrize("mode", MODES)
def test_nbdcopy_both_ways(
    mode: str, make_disk: MakeDisk, tmp_path: Path, rng: random.Random
) -> None:
    disk = make_disk(mode, SIZE + 54321)
    copy = tmp_path / "copy.raw"
    parallel = ("--connections=4", "--threads=2", "--requests=16")
    for _ in range(2):  # cold and warm
        run("nbdcopy", *parallel, disk.uri, copy)
        assert copy.read_bytes() == disk.content
    model = random_image(copy, len(disk.content), rng.getrandbits(32), [(MIB, 2 * MIB)])
    run("nbdcopy", *parallel, "--flush", copy, disk.uri)
    assert disk.reads() == model
    assert disk.file_after_flush() == model
    second = make_disk(mode, len(model), [])
    run("nbdcopy", *parallel, disk.uri, second.uri)
    assert second.file_after_flush() == model


@pytest.mark.parametrize("mode", MODES)
def test_nbdinfo_tells_what_is_data_and_what_is_cached(mode: str, make_disk: MakeDisk) -> None:
    disk = make_disk(mode)
    [export] = json.loads(run("nbdinfo", "--json", disk.uri).stdout)["exports"]
    assert export["export-size"] == SIZE
    assert export["can_multi_conn"]
    assert export["can_cache"]
    assert export["can_fua"]
    assert not export["is_read_only"]
    assert set(export["contexts"]) >= {"base:allocation", "x-forebay:cached"}
    assert [(at, length) for at, length, flags in _map(disk, "base:allocation") if flags] == HOLES
    assert all(flags == 3 for _, _, flags in _map(disk, "base:allocation") if flags)

    run("qemu-io", "-f", "raw", "-c", "read 0 64k", "-c", "write -P 7 5M 64k", disk.uri)
    cached = _map(disk, "x-forebay:cached")
    assert _map(disk, "forebay:cached") == cached, "the name that it had before"
    assert sum(length for _, length, _ in cached) == SIZE
    if mode == "full-copy":
        assert _flag_at(cached, 0) == 1
    else:
        assert _flag_at(cached, 0) == (0 if mode == "none" else 1)
        assert _flag_at(cached, 3 * MIB) == 0, "nobody asked for it"
    written = {"write-through": 1, "write-back": 2, "full-copy": 2}.get(mode, 0)
    assert _flag_at(cached, 5 * MIB) == written
    disk.flush()
    if mode in PRIVATE_MODES:
        assert _flag_at(_map(disk, "x-forebay:cached"), 5 * MIB) == 1, "clean now"


def _map(disk: OneDisk, context: str) -> list[tuple[int, int, int]]:
    found = json.loads(run("nbdinfo", f"--map={context}", "--json", disk.uri).stdout)
    return [(part["offset"], part["length"], part["type"]) for part in found]


def _flag_at(found: list[tuple[int, int, int]], offset: int) -> int:
    [flags] = [flags for at, length, flags in found if at <= offset < at + length]
    return flags


# --------------------------------------------------------------------------------------------- fio


async def test_a_late_fill_does_not_overwrite_what_was_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fio finds in one run of ten, step by step: a fill read the origin before a write, and is stored after it."""
    import forebay_cache.blocks.store

    cache = open_cache(tmp_path / "cache", tmp_path / "index", size=16 * MIB, block_size=65536)
    layer = cache.layers.make(LayerName.of_image("i"))
    until = threading.Event()
    really = forebay_cache.blocks.store._write

    async def store(first: int, data: bytes) -> None:
        with cache.in_flight.filling(layer, [0]) as cells:
            view = memoryview(data)
            await forebay_cache.blocks.store.store(cache, layer, first * 4096, view, cells)

    def late(*arguments: Any) -> None:
        monkeypatch.setattr(forebay_cache.blocks.store, "_write", really)
        until.wait(3)
        really(*arguments)

    async def nothing(offset: int, length: int) -> bytes:
        return b"n" * length  # not cached is right too

    await store(15, b"x" * 4096)  # the block has its slot
    monkeypatch.setattr(forebay_cache.blocks.store, "_write", late)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store, 0, b"o" * 8192)
            await trio.testing.wait_all_tasks_blocked()
            await invalidate(cache, layer, 0, 4096)
            cache.in_flight.overtake(layer, 0, 4096)
            with trio.move_on_after(1):  # it may wait for the fill, and it may store nothing
                await store(0, b"n" * 4096)
            until.set()
        view = View(cache, [], layer, nothing)
        assert b"".join(await view.read(0, 4096)) == b"n" * 4096
    finally:
        until.set()
        cache.release()


@pytest.mark.parametrize("mode", MODES)
def test_fio_verifies(mode: str, make_disk: MakeDisk, tmp_path: Path) -> None:
    """Three jobs, each on a connection and a part of its own, odd block sizes; all at once."""
    need("fio")
    disk = make_disk(mode, 24 * MIB, [])
    jobs = [
        [
            "fio",
            f"--name=v{number}",
            "--ioengine=nbd",
            f"--uri={disk.uri}",
            f"--rw={rw}",
            f"--bsrange={sizes}",
            "--bs_unaligned=1",
            "--iodepth=16",
            f"--offset={number * 8 * MIB}",
            "--size=8M",
            "--io_size=6M",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--do_verify=1",
            "--fsync=100",
            f"--aux-path={tmp_path}",
        ]
        for number, (rw, sizes) in enumerate(
            [("randwrite", "4k-64k"), ("randrw", "512-32k"), ("write", "1m-1m")]
        )
    ]
    run_together(*jobs)
    assert disk.file_after_flush() == disk.reads()


# ------------------------------------------------------------------------------------------ sparse


@pytest.mark.parametrize("mode", MODES)
def test_a_sparse_image_stays_sparse(mode: str, make_disk: MakeDisk, tmp_path: Path) -> None:
    """Reading, copying zeros onto holes and zeroing never allocate; zeroing and trimming give space back."""
    disk = make_disk(mode, 16 * MIB, [(MIB, 15 * MIB)])
    before = allocated(disk.path)
    assert before < 2 * MIB
    assert disk.reads() == disk.content
    run("qemu-io", "-f", "raw", "-c", "write -z -u 4M 4M", "-c", "discard 9M 1M", disk.uri)
    disk.flush()
    assert allocated(disk.path) <= before, "holes that are zeroed stay holes"
    run("qemu-io", "-f", "raw", "-c", "write -P 1 8M 4M", disk.uri)
    disk.flush()
    assert allocated(disk.path) >= 5 * MIB - 65536
    run("qemu-io", "-f", "raw", "-c", "write -z -u 8M 3M", "-c", "discard 11M 1M", disk.uri)
    disk.flush()
    assert allocated(disk.path) <= before + 65536, "what was given back is given back"
    assert disk.path.read_bytes() == disk.content


@pytest.mark.parametrize("mode", MODES)
def test_a_sparse_copy_arrives_sparse(mode: str, make_disk: MakeDisk, tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    model = random_image(source, 16 * MIB, 4, [(MIB, 14 * MIB)])
    disk = make_disk(mode, 16 * MIB, [(0, 16 * MIB)])
    run("nbdcopy", "--destination-is-zero", source, disk.uri)
    assert disk.file_after_flush() == model
    assert allocated(disk.path) < 3 * MIB


# ------------------------------------------------------------------------------------ mode changes


def test_the_mode_changes_under_a_client(
    make_disk: MakeDisk, connect: Connect, rng: random.Random
) -> None:
    """A client writes, reads and verifies without a pause through every change from one mode to another."""
    disk = make_disk("none")
    model = bytearray(disk.content)
    client = connect(disk.uri)
    stop = threading.Event()
    faults: list[BaseException] = []
    rounds, seen = [0], [0]

    def work() -> None:
        try:
            while not stop.is_set():
                offset = rng.randrange(SIZE - 200_000)
                offset &= ~4095 if rng.random() < 0.7 else ~0
                data = rng.randbytes(rng.choice([512, 4096, 100_000]))
                client.pwrite(data, offset)
                model[offset : offset + len(data)] = data
                at = rng.randrange(SIZE - 200_000)
                for low, high in ((offset - 10, offset + len(data) + 10), (at, at + 200_000)):
                    start = max(0, low)
                    assert client.pread(high - start, start) == model[start:high]
                if not rounds[0] % 50:
                    client.flush()
                rounds[0] += 1
                stop.wait(0.01)  # see below for one that never waits
        except BaseException as fault:  # noqa: BLE001  (told by the main thread)
            faults.append(fault)

    pairs = [(a, b) for a in MODES for b in MODES if a != b]
    worker = threading.Thread(target=work)
    worker.start()
    try:
        for mode in _round_trip(pairs):
            disk.gateway.cli("mode", disk.name, mode)
            assert disk.status()["mode"] == mode
            seen[0] = rounds[0] + 2
            wait_for(lambda: bool(faults) or rounds[0] > seen[0], f"stuck in {mode}")
            assert not faults, (mode, faults)
    finally:
        stop.set()
        worker.join()
    assert not faults, faults
    assert client.pread(SIZE, 0) == model
    assert disk.file_after_flush() == model


def _round_trip(pairs: list[tuple[str, str]]) -> list[str]:
    """A way through all changes: after a from b, whatever has not been done from there yet."""
    left, at, way = list(pairs), pairs[0][0], []
    while left:
        step = next((pair for pair in left if pair[0] == at), left[0])
        if step[0] != at:
            way.append(step[0])
        left.remove(step)
        at = step[1]
        way.append(at)
    return way


@pytest.mark.parametrize("command", ["mode", "flush"])
def test_a_client_that_never_pauses_does_not_hold_up(
    command: str, make_disk: MakeDisk, tmp_path: Path
) -> None:
    """Sixteen writes in flight all the time: a flush is of what was there when it was asked for."""
    need("fio")
    disk = make_disk("write-back", 64 * MIB, [])
    job = [
        "fio",
        "--name=busy",
        "--thread",
        "--ioengine=nbd",
        f"--uri={disk.uri}",
        "--rw=randwrite",
    ]
    job += ["--bs=4k", "--iodepth=16", "--size=64M", "--time_based", "--runtime=60"]
    with subprocess.Popen([*job, f"--aux-path={tmp_path}"], stdout=subprocess.DEVNULL) as busy:
        try:
            wait_for(lambda: disk.status()["dirty_bytes"] > 8 * MIB, "nothing is written")
            words = (
                ["mode", disk.name, "write-through"] if command == "mode" else ["flush", disk.name]
            )
            disk.gateway.cli(*words, timeout=40)
        finally:
            busy.kill()


def test_the_copy_of_a_full_copy_comes_by_itself(make_disk: MakeDisk) -> None:
    disk = make_disk("full-copy")
    wait_for(lambda: disk.status()["cached_bytes"] == SIZE, "not all of the image was copied in")
    read = disk.status()["origin_read_bytes"]
    assert disk.reads() == disk.content
    assert disk.status()["origin_read_bytes"] == read, "all of it is here"


@pytest.mark.parametrize("mode", CACHED_MODES)
def test_what_was_read_once_is_a_hit(mode: str, make_disk: MakeDisk) -> None:
    disk = make_disk(mode)
    assert disk.reads() == disk.content
    before = disk.status()
    assert 0 < before["origin_read_bytes"] <= SIZE, "no byte was fetched twice"
    assert disk.reads() == disk.content
    after = disk.status()
    assert after["origin_read_bytes"] == before["origin_read_bytes"]
    assert after["read_misses"] == before["read_misses"]
    assert after["read_hits"] > before["read_hits"]


def test_a_read_only_disk_refuses_writes(
    make_disk: MakeDisk, connect: Connect, tmp_path: Path
) -> None:
    import nbd

    disk = make_disk("write-back", SIZE, None, "--read-only")
    client = connect(disk.uri)
    assert client.is_read_only()
    client.set_strict_mode(0)
    for write, what in ((client.pwrite, b"x"), (client.zero, 4096), (client.trim, 4096)):
        with pytest.raises(nbd.Error, match="ermitted|ead-only|EPERM|EROFS"):
            write(what, 0)
    assert client.pread(SIZE, 0) == disk.content
    denied = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 4k", disk.uri], capture_output=True, check=False
    )
    assert denied.returncode
    assert disk.path.read_bytes() == disk.content
