# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The intent journal against a device that is a bytearray: order, wrapping, torn and stale frames."""

import random
import uuid
from types import SimpleNamespace
from typing import Any

import pytest

from forebay_cache.durable.journal import Journal, JournalFull, Position
from forebay_cache.format.superblock import JOURNAL_OFFSET

SIZE = 4096


class MemoryDevice:
    """Just what a journal needs of a device."""

    def __init__(self, seed: int = 1) -> None:
        self.layout = SimpleNamespace(
            journal_size=SIZE, uuid=uuid.UUID(int=random.Random(seed).getrandbits(128))
        )
        self.data = bytearray(JOURNAL_OFFSET + SIZE)
        self.most = 0

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data
        self.most = max(self.most, offset + len(data))

    def read_into(self, offset: int, buffers: list[bytearray]) -> None:
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)


def journal(device: Any, start: Position | None = None) -> Journal:
    return Journal(device, start or Position(0, 1))


def test_replay_gives_what_was_appended_in_order() -> None:
    device = MemoryDevice()
    written = journal(device)
    payloads = [bytes([n]) * n for n in range(1, 40)]
    for payload in payloads:
        written.append(payload)
    read = journal(device)
    assert list(read.replay()) == payloads
    assert read.head == written.head


@pytest.mark.parametrize("seed", range(20))
def test_ring_wraps_and_replay_starts_at_the_mark(seed: int) -> None:
    rnd = random.Random(seed)
    device = MemoryDevice()
    written = journal(device)
    start = written.head
    since: list[bytes] = []
    for _ in range(400):
        payload = rnd.randbytes(rnd.randrange(0, 300))
        if not written.fits(len(payload)):
            written.trim(written.mark())
            start, since = written.head, []
        written.append(payload)
        since.append(payload)
        if rnd.random() < 0.05:
            assert list(journal(device, start).replay()) == since
    assert device.most <= JOURNAL_OFFSET + SIZE


def test_full_ring_refuses_and_keeps_what_it_has() -> None:
    device = MemoryDevice()
    written = journal(device)
    count = 0
    while written.fits(100):
        written.append(bytes(100))
        count += 1
    with pytest.raises(JournalFull):
        written.append(bytes(100))
    assert len(list(journal(device).replay())) == count


def test_replay_ends_at_a_torn_frame() -> None:
    device = MemoryDevice()
    written = journal(device)
    ends = []
    for n in range(10):
        written.append(bytes([n]) * 50)
        ends.append(JOURNAL_OFFSET + written.head.offset)
    device.data[ends[5] + 30] ^= 1  # in the seventh frame
    assert [p[0] for p in journal(device).replay()] == [0, 1, 2, 3, 4, 5]


def test_frames_of_another_life_are_not_taken_for_ours() -> None:
    old = MemoryDevice(seed=1)
    journal(old).append(b"old")
    new = MemoryDevice(seed=2)
    new.data[:] = old.data
    assert list(journal(new).replay()) == []


def test_frames_behind_a_torn_one_stay_dead_when_numbers_jump() -> None:
    """Why recovery goes on with a gap in the sequence: the frame behind the torn one is whole, and would fit."""
    device = MemoryDevice()
    written = journal(device)
    for n in range(3):
        written.append(bytes([n]) * 40)
    device.data[JOURNAL_OFFSET + 64 + 30] ^= 1
    torn = journal(device)
    assert len(list(torn.replay())) == 1
    unlucky = Position(torn.head.offset, torn.head.sequence)
    lucky = Position(torn.head.offset, torn.head.sequence + (1 << 20))
    copy = MemoryDevice()
    copy.data[:] = device.data
    journal(copy, unlucky).append(bytes([9]) * 40)
    assert [p[0] for p in journal(copy, unlucky).replay()] == [9, 2]
    journal(device, lucky).append(bytes([9]) * 40)
    assert [p[0] for p in journal(device, lucky).replay()] == [9]
