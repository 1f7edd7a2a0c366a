# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Our server against the clients it is for: libnbd, nbdinfo, nbdcopy, qemu-io, qemu-img, fio."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from forebay_nbd import Limits
from real.nbd_memory import MemoryExport, Running, serving
from real.processes import need

MIB = 1 << 20


async def run(*command: str, check: bool = True) -> str:
    need(command[0])
    with trio.fail_after(60):
        done = await trio.run_process(
            list(command), capture_stdout=True, stderr=subprocess.STDOUT, check=False
        )
    text: str = done.stdout.decode()
    assert not check or done.returncode == 0, text
    return text


async def in_thread(work: Any, *arguments: Any) -> Any:
    with trio.fail_after(60):
        return await trio.to_thread.run_sync(work, *arguments)


def libnbd() -> Any:
    pytest.importorskip("libnbdmod", reason="python3-libnbd is not installed: `make setup`")
    import nbd

    return nbd


@pytest.fixture
def noise(rng: random.Random) -> bytes:
    return rng.randbytes(3 * MIB)


async def test_nbdinfo_sees_what_we_offer(short_path: Path) -> None:
    async with serving(short_path) as running:
        told = json.loads(await run("nbdinfo", "--json", running.uri()))
        (export,) = told["exports"]
        assert told["structured"] is True
        assert export["export-name"] == "disk"
        assert export["export-size"] == running.export.size
        assert export["contexts"] == ["base:allocation", "forebay:cached"]
        assert (export["block_size_minimum"], export["block_size_preferred"]) == (1, 4096)
        assert export["block_size_maximum"] == 32 * MIB
        for able in ["cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"]:
            assert export[f"can_{able}"] is True, able
        assert not export["is_read_only"]
        assert not export["is_rotational"]


async def test_nbdinfo_lists_and_a_read_only_export_offers_no_writes(short_path: Path) -> None:
    async with serving(short_path, MemoryExport(read_only=True, rotational=True)) as running:
        told = json.loads(await run("nbdinfo", "--json", "--list", running.uri("")))
        (export,) = told["exports"]
        assert export["export-name"] == "disk"
        assert export["is_read_only"]
        assert export["is_rotational"]
        assert not export["can_trim"]
        assert not export["can_zero"]


async def test_nbdinfo_map_shows_the_holes(short_path: Path) -> None:
    async with serving(short_path) as running:
        running.export.memory[65536:131072] = b"x" * 65536
        extents = json.loads(await run("nbdinfo", "--json", "--map", running.uri()))
        assert [(e["offset"], e["length"], e["type"]) for e in extents] == [
            (0, 65536, 3),
            (65536, 65536, 0),
            (131072, running.export.size - 131072, 3),
        ]


@pytest.mark.parametrize("slow", [False, True], ids=["hits", "misses"])
async def test_nbdcopy_there_and_back(short_path: Path, noise: bytes, slow: bool) -> None:
    source, back = short_path / "in", short_path / "out"
    source.write_bytes(noise)
    export = MemoryExport(size=len(noise), slow=slow)
    export.gate.set()
    async with serving(short_path, export) as running:
        await run("nbdcopy", "--requests=64", "--connections=4", str(source), running.uri())
        assert export.memory == noise
        await run("nbdcopy", "--connections=4", "--flush", running.uri(), str(back))
        assert back.read_bytes() == noise


async def test_qemu_io_and_qemu_img(short_path: Path, noise: bytes) -> None:
    async with serving(short_path) as running:
        text = await run(
            *("qemu-io", "-f", "raw"),
            *("-c", "write -P 7 1000 70000", "-c", "read -P 7 1000 70000"),
            *("-c", "write -f -P 8 4096 4096", "-c", "read -P 8 4096 4096"),
            *("-c", "write -z 4096 4096", "-c", "read -P 0 4096 4096"),
            *("-c", "discard 65536 65536", "-c", "flush", "-c", "read -P 7 8192 1000"),
            running.uri(),
        )
        assert "failed" not in text
        assert "verification" not in text
        assert any(line.startswith("trim") for line in running.export.log)
        assert "flush" in running.export.log
        source = short_path / "image"
        source.write_bytes(noise)
        await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), running.uri())
        text = await run(
            "qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), running.uri()
        )
        assert "identical" in text


@pytest.mark.parametrize("slow", [False, True], ids=["hits", "misses"])
async def test_fio_verifies(short_path: Path, slow: bool) -> None:
    export = MemoryExport(slow=slow)
    export.gate.set()
    async with serving(short_path, export) as running:
        text = await run(
            *("fio", "--name=v", "--ioengine=nbd", f"--uri={running.uri()}", "--rw=randrw"),
            *("--bsrange=512-128k", "--iodepth=32", "--size=8M", "--verify=crc32c"),
            *("--verify_fatal=1", "--do_verify=1", "--output-format=terse"),
        )
        assert "verify" not in text.split(";", maxsplit=1)[0]


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
@pytest.mark.parametrize("slow", [False, True], ids=["hits", "misses"])
async def test_libnbd_every_command(
    short_path: Path, noise: bytes, structured: bool, slow: bool
) -> None:
    export = MemoryExport(slow=slow)
    export.gate.set()
    async with serving(short_path, export) as running:
        await in_thread(every_command, running, noise, structured)
        for line in ("write 9 512 fua=1", "flush", "cache 0 4096", "trim 0 4096 fua=1"):
            assert line in export.log
        assert "zero 4096 100 fua=1 no_hole=1 fast=0" in export.log
        assert "zero 4096 4096 fua=0 no_hole=0 fast=1" in export.log


def every_command(running: Running, noise: bytes, structured: bool) -> None:
    nbd = libnbd()
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    h.add_meta_context("base:allocation")
    h.add_meta_context("forebay:cached")
    h.set_export_name("disk")
    h.connect_unix(running.path)
    assert h.get_structured_replies_negotiated() == structured
    for offset, length in ((0, 1), (1, 4096), (4095, 65537), (3, 200_000), (0, 3 * MIB)):
        h.pwrite(noise[:length], offset)
        assert h.pread(length, offset) == noise[:length]
    h.pwrite(noise[:512], 9, nbd.CMD_FLAG_FUA)
    h.flush()
    h.cache(4096, 0)
    h.trim(4096, 0, nbd.CMD_FLAG_FUA)
    h.zero(100, 4096, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
    h.zero(4096, 4096, nbd.CMD_FLAG_FAST_ZERO)
    assert h.pread(8192, 0) == bytes(8192)
    with pytest.raises(nbd.Error, match="not supported"):
        h.zero(4096, 1, nbd.CMD_FLAG_FAST_ZERO)
    if structured:
        chunks: list[tuple[int, bytes]] = []
        h.pread_structured(
            100, 5, lambda data, at, *_: chunks.append((at, bytes(data))), nbd.CMD_FLAG_DF
        )
        assert chunks == [(5, bytes(100))]
        seen: dict[str, list[int]] = {}
        h.block_status(1 * MIB, 7, lambda name, _offset, found, _error: seen.update({name: found}))
        assert set(seen) == {"base:allocation", "forebay:cached"}
        assert seen["forebay:cached"] == [running.export.size - 7, 1]
        h.block_status(
            5000, 7, lambda name, _o, found, _e: seen.update({name: found}), nbd.CMD_FLAG_REQ_ONE
        )
        assert seen["forebay:cached"] == [5000, 1]
    h.shutdown()


async def test_libnbd_errors_keep_the_connection(short_path: Path) -> None:
    async with serving(short_path, MemoryExport(size=10_000)) as running:

        def work() -> None:
            nbd = libnbd()
            h = nbd.NBD()
            h.set_strict_mode(0)
            h.connect_uri(running.uri())
            for wrong, name in (
                (lambda: h.pread(512, 9_999), "EINVAL"),
                (lambda: h.pwrite(b"x" * 512, 9_999), "ENOSPC"),
                (lambda: h.pwrite(b"x" * 300_000, 9_999), "ENOSPC"),
                (lambda: h.zero(512, 9_999), "ENOSPC"),
                (lambda: h.trim(512, 9_999), "EINVAL"),
                (lambda: h.cache(512, 9_999), "EINVAL"),
                (lambda: h.pread(33 * MIB, 0), "EINVAL"),
                (lambda: h.pread(1, 0, 0x200), "EINVAL"),
                (lambda: h.block_status(512, 0, lambda *_: 0), "EINVAL"),
            ):
                with pytest.raises(nbd.Error) as caught:
                    wrong()  # type: ignore[no-untyped-call]
                assert caught.value.errno == name
            assert h.pread(10_000, 0) == bytes(10_000)
            h.shutdown()

        await in_thread(work)


async def test_read_only_means_eperm(short_path: Path) -> None:
    async with serving(short_path, MemoryExport(read_only=True)) as running:

        def work() -> None:
            nbd = libnbd()
            h = nbd.NBD()
            h.set_strict_mode(0)
            h.connect_uri(running.uri())
            for wrong in (
                lambda: h.pwrite(b"x", 0),
                lambda: h.pwrite(b"x" * 300_000, 0),
                lambda: h.zero(1, 0),
                lambda: h.trim(1, 0),
            ):
                with pytest.raises(nbd.Error) as caught:
                    wrong()  # type: ignore[no-untyped-call]
                assert caught.value.errno == "EPERM"
            h.flush()
            assert h.pread(9, 0) == bytes(9)
            h.shutdown()

        await in_thread(work)


async def test_the_largest_requests(short_path: Path, rng: random.Random) -> None:
    size = 40 * MIB
    for slow in (False, True):
        export = MemoryExport(size=size, slow=slow)
        export.gate.set()
        directory = short_path / str(slow)
        directory.mkdir()
        async with serving(directory, export, Limits(send_buffer=64 << 10)) as running:

            def work(running: Running = running) -> None:
                data = rng.randbytes(32 * MIB)
                h = libnbd().NBD()
                h.connect_uri(running.uri())
                h.pwrite(data, 12_345)
                assert h.pread(len(data), 12_345) == data
                h.shutdown()

            await in_thread(work)


async def test_an_unknown_export(short_path: Path) -> None:
    async with serving(short_path) as running:
        for name in ("nothing", "x" * 4000, "%3000d"):
            text = await run("nbdinfo", running.uri(name), check=False)
            assert "replied with error" in text
        await run("nbdinfo", running.uri())
