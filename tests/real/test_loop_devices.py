# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Cache and origin on block devices with sectors of 512 and of 4096 bytes."""

import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forebay_cache.device.files import open_device
from real.disk_fixture import cache_info, run
from real.gateway_process import GatewayProcess
from real.processes import MIB, loop_device, random_image

MakeGateway = Callable[..., GatewayProcess]
Connect = Callable[..., Any]

SECTORS = (512, 4096)
SIZE = 6 * MIB + 5 * 4096
"""Of the origin: no multiple of a block."""


def blank(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def churn(client: Any, model: bytearray, rng: random.Random, steps: int) -> None:
    """Writes, zeros and trims at any byte, each read back with what is around it."""
    size = len(model)
    for step in range(steps):
        offset = rng.randrange(size)
        length = min(size - offset, rng.choice([1, 511, 4096, 70_000, 500_000]))
        if step % 3:
            data = rng.randbytes(length)
            client.pwrite(data, offset)
        else:
            data = bytes(length)
            client.zero(length, offset)
        model[offset : offset + length] = data
        low, high = max(0, offset - 9000), min(size, offset + length + 9000)
        assert client.pread(high - low, low) == model[low:high]


@pytest.mark.parametrize("sector", SECTORS)
def test_the_cache_on_a_block_device(
    sector: int, make_gateway: MakeGateway, connect: Connect, tmp_path: Path, rng: random.Random
) -> None:
    """Smaller than the image, so that it evicts; killed and found again."""
    with loop_device(blank(tmp_path / "cache", 16 * MIB), sector) as device:
        gateway = make_gateway({"cache": {"device": str(device)}})
        path = gateway.images / "a.raw"
        model = bytearray(random_image(path, 24 * MIB + 4096, 1))
        gateway.attach("d", "a.raw", mode="write-back")
        client = connect(gateway.uri("d"))
        assert client.pread(24 * MIB, 0) == model[: 24 * MIB]
        churn(client, model, rng, 40)
        gateway.restart(kill=True)
        client = connect(gateway.uri("d"))
        assert client.pread(24 * MIB + 4096, 0) == model
        churn(client, model, rng, 20)
        client.flush()
        info = cache_info(gateway)
        assert info["device"] == str(device)
        assert info["size"] <= 16 * MIB
        assert not (gateway.state / "cache.img").exists()
        client.shutdown()
        gateway.cli("detach", "d")
        assert path.read_bytes() == model
        assert gateway.stop() == 0


@pytest.mark.parametrize("mode", ["write-around", "write-through", "write-back"])
@pytest.mark.parametrize("sector", SECTORS)
def test_the_origin_on_a_block_device(
    sector: int, mode: str, make_gateway: MakeGateway, connect: Connect, tmp_path: Path, rng: random.Random
) -> None:  # fmt: skip
    backing = tmp_path / "origin"
    model = bytearray(random_image(backing, SIZE, 1, [(MIB, MIB)]))
    with loop_device(backing, sector) as device:
        gateway = make_gateway({"origins": {"devices": [str(device)]}})
        gateway.attach("d", device, mode=mode)
        client = connect(gateway.uri("d"))
        assert client.get_size() == SIZE
        assert client.pread(SIZE, 0) == model
        churn(client, model, rng, 30)
        client.shutdown()
        gateway.restart(kill=True)
        client = connect(gateway.uri("d"))
        assert client.pread(SIZE, 0) == model
        client.shutdown()
        gateway.cli("detach", "d")
        assert gateway.stop() == 0
    assert backing.read_bytes() == model


@pytest.mark.parametrize(("below", "above"), [(512, 4096), (4096, 512)])
def test_both_on_block_devices(
    below: int, above: int, make_gateway: MakeGateway, connect: Connect, tmp_path: Path, rng: random.Random
) -> None:  # fmt: skip
    origin = tmp_path / "origin"
    model = bytearray(random_image(origin, SIZE, 1))
    cache = blank(tmp_path / "cache", 16 * MIB)
    with loop_device(origin, below) as image, loop_device(cache, above) as device:
        gateway = make_gateway({"cache": {"device": str(device)}})
        gateway.attach("d", image, mode="full-copy")
        client = connect(gateway.uri("d"))
        churn(client, model, rng, 20)
        client.shutdown()
        gateway.cli("detach", "d")
        assert run("cmp", origin, "-", check=False) is not None
        assert gateway.stop() == 0
    assert origin.read_bytes() == model


def test_a_device_that_is_in_use_is_refused(make_gateway: MakeGateway, tmp_path: Path) -> None:
    """As origin and as cache: one device, one purpose."""
    with loop_device(blank(tmp_path / "cache", 16 * MIB), 512) as device:
        gateway = make_gateway({"cache": {"device": str(device)}})
        done = gateway.cli("attach", "x", device, check=False)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert str(device) in done.stderr
        other = make_gateway({"cache": {"device": str(device)}}, start=False)
        done = other.cli("serve", check=False, timeout=30)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert str(device) in done.stderr
        gateway.kill()


def test_a_device_that_only_a_dead_process_still_maps_is_waited_for(tmp_path: Path) -> None:
    """As that of a daemon that was killed, while somebody looks at its memory."""
    with loop_device(blank(tmp_path / "cache", MIB), 512) as device:
        fd = os.open(device, os.O_RDWR | os.O_EXCL)
        left = mmap.mmap(fd, MIB)
        os.close(fd)
        tries = []

        def goes(seconds: float) -> None:
            tries.append(seconds)
            left.close()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("time.sleep", goes)
            os.close(open_device(device))
        assert len(tries) == 1


@pytest.mark.parametrize("sector", SECTORS)
def test_a_smaller_device_than_the_index_knows_is_refused(
    sector: int, make_gateway: MakeGateway, connect: Connect, tmp_path: Path
) -> None:
    cache = blank(tmp_path / "cache", 24 * MIB)
    with loop_device(cache, sector) as device:
        gateway = make_gateway({"cache": {"device": str(device)}})
        content = random_image(gateway.images / "a.raw", SIZE, 1)
        gateway.attach("d", "a.raw", mode="write-back")
        client = connect(gateway.uri("d"))
        client.pwrite(b"x" * 4096, MIB)
        gateway.stop()
    copy = tmp_path / "small"
    copy.write_bytes(cache.read_bytes()[: 18 * MIB])
    before = copy.read_bytes()
    with loop_device(copy, sector) as device:
        gateway.configure({"cache": {"device": str(device)}})
        done = gateway.cli("serve", check=False, timeout=30)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1, done.stderr
        assert str(device) in done.stderr
    assert copy.read_bytes() == before
    with loop_device(
        cache, sector
    ) as device:  # perhaps under another name: it is known by its uuid
        gateway.configure({"cache": {"device": str(device)}})
        gateway.start()
        expected = content[:MIB] + b"x" * 4096 + content[MIB + 4096 :]
        assert connect(gateway.uri("d")).pread(SIZE, 0) == expected
        gateway.kill()
