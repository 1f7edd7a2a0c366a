# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The same disk through every door: what holds for the NBD socket holds for the others (real/doors.py)."""

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from real.doors import DOORS, Door, DoorError, DoorHandle
from real.gateway_process import GatewayProcess

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB + 512
"""Not a multiple of anything the cache works in."""


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest, gateway: GatewayProcess) -> Iterator[Door]:
    with DOORS[request.param](gateway) as made:
        yield made


@pytest.fixture
def content(gateway: GatewayProcess, random_image: Any) -> bytearray:
    """The image `a.raw`, with a hole in the middle."""
    made = random_image(gateway.images / "a.raw", SIZE, holes=[(3 * MIB, MIB)])
    return bytearray(made)


def read_all(handle: DoorHandle, chunk: int = 777_777) -> bytes:
    """The whole disk in pieces that fit nothing."""
    size = handle.size
    return b"".join(handle.pread(min(chunk, size - at), at) for at in range(0, size, chunk))


def test_content_and_size_are_those_of_the_image(
    door: Door, gateway: GatewayProcess, content: bytearray
) -> None:
    gateway.attach("d", "a.raw", mode="write-through")
    handle = door.open("d")
    assert handle.size == SIZE
    assert read_all(handle) == content, "cold"
    assert read_all(handle, 64 * KIB) == content, "warm"
    handle.close()


@pytest.mark.parametrize("mode", ["write-back", "write-through"])
def test_random_work_against_a_bytearray(
    door: Door, gateway: GatewayProcess, content: bytearray, rng: random.Random, mode: str
) -> None:
    gateway.attach("d", "a.raw", mode=mode)
    handle = door.open("d")
    for step in range(250):
        length = rng.choice([1, 511, 512, 4 * KIB, rng.randrange(1, 20 * KIB), 200 * KIB])
        offset = rng.randrange(SIZE - length)
        match rng.choices(["read", "write", "zero", "flush", "reopen"], [9, 8, 2, 1, 0.3])[0]:
            case "read":
                found = handle.pread(length, offset)
                assert found == content[offset : offset + length], f"step {step}"
            case "write":
                data = rng.randbytes(length)
                handle.pwrite(data, offset)
                content[offset : offset + length] = data
            case "zero":
                handle.zero(length, offset)
                content[offset : offset + length] = bytes(length)
            case "flush":
                handle.flush()
            case _:
                handle.close()
                handle = door.open("d")
    assert read_all(handle) == content
    handle.flush()
    handle.close()
    gateway.cli("flush", "d")
    assert (gateway.images / "a.raw").read_bytes() == content


def test_large_requests_at_any_offset(
    door: Door, gateway: GatewayProcess, content: bytearray, rng: random.Random
) -> None:
    gateway.attach("d", "a.raw", mode="write-back")
    handle = door.open("d")
    data = rng.randbytes(5 * MIB + 13)
    handle.pwrite(data, 1_234_567)
    content[1_234_567 : 1_234_567 + len(data)] = data
    assert handle.pread(SIZE, 0) == content
    handle.zero(3 * MIB + 1, 77)
    content[77 : 77 + 3 * MIB + 1] = bytes(3 * MIB + 1)
    assert handle.pread(SIZE - 1, 1) == content[1:]
    handle.close()


def test_the_last_byte_can_be_written_and_none_behind_it(
    door: Door, gateway: GatewayProcess, content: bytearray
) -> None:
    gateway.attach("d", "a.raw", mode="write-back")
    handle = door.open("d")
    handle.pwrite(b"!", SIZE - 1)
    assert handle.pread(1, SIZE - 1) == b"!"
    with pytest.raises(DoorError):
        handle.pwrite(b"!", SIZE)
    with pytest.raises(DoorError):
        handle.pwrite(b"!!", SIZE - 1)
    with pytest.raises(DoorError):
        handle.pread(2, SIZE - 1)
    assert handle.size == SIZE
    handle.close()


def test_a_read_only_disk_refuses_writes(
    door: Door, gateway: GatewayProcess, content: bytearray
) -> None:
    gateway.attach("d", "a.raw", "--read-only")
    handle = door.open("d", read_only=True)
    assert handle.pread(100, 100) == content[100:200]
    with pytest.raises(DoorError):
        handle.pwrite(b"!", 0)
    with pytest.raises(DoorError):
        handle.zero(4096, 0)
    handle.close()
    assert (gateway.images / "a.raw").read_bytes() == content


def test_an_unknown_disk_is_refused_and_one_that_comes_is_found(
    door: Door, gateway: GatewayProcess, content: bytearray
) -> None:
    with pytest.raises(DoorError):
        door.open("d")
    gateway.attach("d", "a.raw")
    handle = door.open("d")
    assert handle.pread(10, 10) == content[10:20]
    handle.close()


def test_what_one_wrote_and_flushed_the_next_to_open_reads(
    door: Door, gateway: GatewayProcess, content: bytearray
) -> None:
    gateway.attach("d", "a.raw", mode="write-back")
    first = door.open("d")
    assert first.pread(4096, 8192) == content[8192:12288]
    with DOORS["socket"](gateway) as direct:
        other = direct.open("d")
        other.pwrite(b"x" * 4096, 8192)
        other.flush()
        other.close()
    second = door.open("d")
    assert second.pread(4096, 8192) == b"x" * 4096
    second.pwrite(b"y" * 4096, 8192)
    second.flush()
    with DOORS["socket"](gateway) as direct:
        other = direct.open("d")
        assert other.pread(4096, 8192) == b"y" * 4096
        other.close()
    first.close()
    second.close()


def test_what_was_acknowledged_survives_a_killed_daemon(
    door: Door, gateway: GatewayProcess, content: bytearray, rng: random.Random
) -> None:
    gateway.attach("d", "a.raw", mode="write-back")
    handle = door.open("d")
    for _ in range(50):
        offset, data = rng.randrange(SIZE - 9000), rng.randbytes(rng.randrange(1, 9000))
        handle.pwrite(data, offset)
        content[offset : offset + len(data)] = data
    gateway.restart(kill=True)
    handle.close()
    handle = door.open("d")
    assert read_all(handle) == content
    handle.close()


def test_several_at_once(
    door: Door, gateway: GatewayProcess, content: bytearray, rng: random.Random
) -> None:
    """Each has a region of its own, at sector borders that others share blocks with."""
    gateway.attach("d", "a.raw", mode="write-back")
    count, part = 8, 999 * KIB
    seeds = [rng.getrandbits(32) for _ in range(count)]
    faults: list[Exception] = []

    def work(index: int) -> None:
        try:
            mine, own = door.open("d"), random.Random(seeds[index])
            start = index * part
            for _ in range(60):
                length = own.randrange(1, 16 * KIB)
                offset = start + own.randrange(part - length)
                if own.random() < 0.5:
                    data = own.randbytes(length)
                    mine.pwrite(data, offset)
                    content[offset : offset + length] = data
                else:
                    assert mine.pread(length, offset) == content[offset : offset + length]
            mine.flush()
            mine.close()
        except (DoorError, AssertionError) as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults
    handle = door.open("d")
    assert read_all(handle) == content
    handle.close()
