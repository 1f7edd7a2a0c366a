# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""TRIM, zeroes, and zeroes that keep their space, on stores that can punch holes and on stores that cannot."""

import contextlib
import json
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import MODES, PRIVATE_MODES, OneDisk, allocated, ask_text, run
from real.fault_fs import FaultFs
from real.gateway_process import GatewayProcess
from real.processes import MIB, need, random_image

MakeGateway = Callable[..., GatewayProcess]
Connect = Callable[..., Any]

SIZE = 16 * MIB
HOLES = [(2 * MIB, 12 * MIB)]
DATA = 4 * MIB

PLACES = ("punches", "tells holes", "tells nothing")
"""File systems: one that has all; one without fallocate, as NFS 4.1; and one that calls everything data as well."""

NO_FALLOCATE = """
#define _GNU_SOURCE
#include <errno.h>
#include <sys/types.h>
int fallocate(int fd, int mode, off_t at, off_t length) { errno = EOPNOTSUPP; return -1; }
int fallocate64(int fd, int mode, off_t at, off_t length) { errno = EOPNOTSUPP; return -1; }
"""


@pytest.fixture(scope="module")
def no_fallocate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to be loaded first, with which no file system has fallocate."""
    need("cc")
    directory = tmp_path_factory.mktemp("preload")
    source, library = directory / "preload.c", directory / "preload.so"
    source.write_text(NO_FALLOCATE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


class Bed:
    """A daemon whose images lie on such a file system; `images` is where their blocks can be counted."""

    def __init__(self, gateway: GatewayProcess, images: Path, preload: Path | None) -> None:
        self.gateway = gateway
        self._images = images
        self._preload = preload
        self.start()

    def start(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if self._preload is not None:
                patch.setenv("LD_PRELOAD", str(self._preload))
            self.gateway.start()

    def kill(self) -> None:
        """Kill the daemon, and start it again."""
        self.gateway.kill()
        self.start()

    def disk(self, mode: str, *options: str, holes: list[tuple[int, int]] | None = None) -> OneDisk:
        path = self._images / f"{mode}.raw"
        content = random_image(path, SIZE, 5, HOLES if holes is None else holes)
        self.gateway.attach(mode, path.name, *options, mode=mode)
        return OneDisk(self.gateway, mode, path, content)


@pytest.fixture
def bed(
    make_gateway: MakeGateway, short_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[[str], Bed]]:
    """`bed(place)`; passes of write-back are made when they are asked for."""
    with contextlib.ExitStack() as stack:

        def make(place: str) -> Bed:
            images, preload = short_path / "images", None
            settings = {"defaults": {"max_lag": "1h"}, "stores.images": {"path": str(images)}}
            if place == "tells nothing":
                fs = FaultFs(short_path / "fs")
                stack.callback(fs.remove)
                settings["stores.images"]["path"] = str(fs.path)
                images = fs.backing
            else:
                images.mkdir()
            if place == "tells holes":
                preload = request.getfixturevalue("no_fallocate")
            made = Bed(make_gateway(settings, start=False), images, preload)
            stack.callback(made.gateway.kill)
            return made

        yield make


def free_ranges(rng: random.Random) -> list[tuple[int, int]]:
    """(offset, length) of what mkfs and then fstrim discard: all of the disk, then parts of it, at any byte."""
    some = [(rng.randrange(SIZE - MIB), rng.randrange(8192, MIB)) for _ in range(20)]
    return [(0, SIZE // 2), (SIZE // 2, SIZE // 2), *some]


# ---------------------------------------------------------------------------------------------------------------- trim


@pytest.mark.parametrize("place", PLACES[1:])
def test_a_trim_is_ignored_where_no_hole_can_be_punched(
    place: str, bed: Callable[[str], Bed], connect: Connect, rng: random.Random
) -> None:
    """In each mode: what was read before is read after, the image gets nothing, and it is counted."""
    it = bed(place)
    models: dict[str, tuple[OneDisk, bytes, int]] = {}
    for mode in MODES:
        disk = it.disk(mode)
        client = connect(disk.uri)
        assert client.can_trim(), "it is a hint"
        assert client.pread(MIB, 0) == disk.content[:MIB]
        space = allocated(disk.path)
        for offset, length in free_ranges(rng):
            client.trim(length, offset)
        run("qemu-io", "-f", "raw", "-c", "discard 0 16M", "-c", "flush", disk.uri)
        assert client.pread(SIZE, 0) == disk.content, mode
        status = disk.status()
        assert status["trims_ignored"] == 23, mode
        assert status["dirty_bytes"] == 0, mode
        assert f'forebay_trims_ignored_total{{disk="{mode}"}} 23' in ask_text(
            it.gateway, "/metrics"
        )
        client.pwrite(b"w" * MIB, 8 * MIB)
        client.trim(MIB, 8 * MIB)
        model = disk.content[: 8 * MIB] + b"w" * MIB + disk.content[9 * MIB :]
        assert client.pread(SIZE, 0) == model, mode
        client.flush()
        client.shutdown()
        models[mode] = disk, model, space
    totals = json.loads(it.gateway.cli("stats", "--json").stdout)
    assert {disk["name"]: disk["trims_ignored"] for disk in totals} == dict.fromkeys(MODES, 24)
    it.kill()
    for mode, (disk, model, space) in models.items():
        client = connect(disk.uri)
        client.trim(SIZE, 0)
        assert client.pread(SIZE, 0) == model, mode
        assert disk.file_after_flush() == model, mode
        assert allocated(disk.path) <= space + MIB + 65536, mode
        assert disk.status()["trims_ignored"] == 1, mode


def test_a_trim_gives_space_back_where_holes_can_be_punched(
    bed: Callable[[str], Bed], connect: Connect
) -> None:
    it = bed("punches")
    models: dict[str, tuple[OneDisk, bytes]] = {}
    for mode in MODES:
        disk = it.disk(mode)
        client = connect(disk.uri)
        client.trim(MIB, 0)
        client.trim(5000, 14 * MIB + 100)  # no whole sector
        models[mode] = disk, bytes(MIB) + disk.content[MIB:]
        assert client.pread(SIZE, 0) == models[mode][1], mode
        client.flush()
        client.shutdown()
    it.kill()
    for mode, (disk, model) in models.items():
        assert disk.file_after_flush() == model, mode
        assert allocated(disk.path) <= DATA - MIB + 65536, mode
        assert disk.status()["trims_ignored"] == 0, mode


@pytest.mark.parametrize("place", PLACES[1:])
def test_an_overlay_takes_every_trim(
    place: str, bed: Callable[[str], Bed], connect: Connect
) -> None:
    """Nothing of it is meant for the store; what it holds itself comes free."""
    it = bed(place)
    disk = it.disk("write-through", "--overlay")
    client = connect(disk.uri)
    client.pwrite(b"o" * MIB, 0)
    client.trim(8 * MIB, 0)
    model = bytes(8 * MIB) + disk.content[8 * MIB :]
    assert client.pread(SIZE, 0) == model
    client.flush()
    client.shutdown()
    it.kill()
    client = connect(disk.uri)
    assert client.pread(SIZE, 0) == model
    client.trim(SIZE - 8 * MIB, 8 * MIB)
    assert client.pread(SIZE, 0) == bytes(SIZE)
    assert disk.status()["trims_ignored"] == 0
    assert disk.path.read_bytes() == disk.content


def test_a_server_without_holes_is_known_after_one_trim(
    start_nbdkit: Callable[..., Any],
    bed: Callable[[str], Bed],
    connect: Connect,
    tmp_path: Path,
) -> None:
    """An image behind NBD: TRIM is passed over once the server has refused to zero without writing."""
    path = tmp_path / "image.raw"
    content = random_image(path, SIZE, 5, HOLES)
    how = ("zeromode=plugin", "fastzeromode=slow")
    server = start_nbdkit("file", path, *how, filters=["nozero"])
    it = bed("punches")
    it.gateway.attach("d", server.uri, mode="write-through")
    disk = OneDisk(it.gateway, "d", path, content)
    client = connect(disk.uri)
    client.trim(MIB, 0)
    client.trim(12 * MIB, MIB)
    model = bytes(MIB) + content[MIB:]
    assert client.pread(SIZE, 0) == model
    assert disk.status()["trims_ignored"] == 1
    assert disk.file_after_flush() == model


# -------------------------------------------------------------------------------------------------------------- zeroes


def test_zeroes_leave_holes_alone(bed: Callable[[str], Bed], connect: Connect) -> None:
    """They take no space that was not there, in no mode, where a hole cannot be punched and can be told."""
    it = bed("tells holes")
    for mode in MODES:
        disk = it.disk(mode)
        space = allocated(disk.path)
        client = connect(disk.uri)
        client.zero(12 * MIB, MIB + 1000)
        model = bytearray(disk.content)
        model[MIB + 1000 : 13 * MIB + 1000] = bytes(12 * MIB)
        assert client.pread(SIZE, 0) == model, mode
        client.shutdown()
        assert disk.file_after_flush() == model, mode
        assert allocated(disk.path) <= space + 65536, mode


@pytest.mark.parametrize("place", PLACES)
def test_zeroes_that_keep_their_space_have_it_in_the_image(
    place: str, bed: Callable[[str], Bed], connect: Connect
) -> None:
    """Also after a kill before the pass."""
    import nbd

    it = bed(place)
    disks: list[tuple[OneDisk, int]] = []
    for mode in MODES:
        disk = it.disk(mode, holes=[(0, SIZE)])
        disks.append((disk, allocated(disk.path)))
        run("qemu-io", "-f", "raw", "-c", "write -z 1M 4M", disk.uri)
        client = connect(disk.uri)
        client.zero(4 * MIB, 8 * MIB + 512, nbd.CMD_FLAG_NO_HOLE)
        client.zero(MIB, 14 * MIB)
        client.flush()
        client.shutdown()
    it.kill()
    for disk, before in disks:
        if disk.name in PRIVATE_MODES:
            assert allocated(disk.path) <= before, "nothing is home yet"
        assert disk.file_after_flush() == bytes(SIZE), disk.name
        assert allocated(disk.path) >= before + 8 * MIB, disk.name
        if place != "tells nothing":
            assert allocated(disk.path) <= before + 8 * MIB + 131072, "the last one may be a hole"


def test_space_that_is_not_to_be_kept_any_more_is_not_taken(
    bed: Callable[[str], Bed], connect: Connect
) -> None:
    """A trim, or zeroes without NO_HOLE, or data, take the place of zeroes that keep their space, before the pass."""
    import nbd

    it = bed("punches")
    disks = [it.disk(mode, holes=[(0, SIZE)]) for mode in PRIVATE_MODES]
    for disk in disks:
        client = connect(disk.uri)
        client.zero(12 * MIB, 0, nbd.CMD_FLAG_NO_HOLE)
        client.flush()
        client.trim(4 * MIB, 0)
        client.zero(4 * MIB - 8192, 4 * MIB)
        client.pwrite(b"d" * 65536, 9 * MIB)
        client.trim(65536, 9 * MIB)
        client.zero(MIB, 10 * MIB)
        client.zero(MIB, 10 * MIB, nbd.CMD_FLAG_NO_HOLE)
        client.shutdown()
    it.kill()
    for disk in disks:
        assert disk.file_after_flush() == bytes(SIZE), disk.name
        assert 4 * MIB - 131072 <= allocated(disk.path) <= 4 * MIB + 65536, disk.name
