# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Boot traces: what boots make of one, what is fetched in which order, and what of a file is believed."""

import json
import random
import struct
import zlib
from collections.abc import Iterable
from typing import Any

import pytest

from forebay.boot import trace as trace_module
from forebay.boot.encoding import LONGEST, BadTraceError, decoded, encoded
from forebay.boot.trace import MOST_BLOCKS, MOST_COUNTED, Boot, Read, Run, Trace
from forebay_cache.format.geometry import BLOCK

SIZE = 1000 * BLOCK + 5000
KEY = "images:a.raw"


def of(boots: Iterable[Boot], size: int = SIZE) -> Trace:
    """The trace of these boots, one after the other."""
    trace = Trace(size, mtime_ns=7, inode=9)
    for n, boot in enumerate(boots):
        trace = trace.with_boot(boot, now=100.5 + n)
    return trace


def boot(*read: int, unread: Iterable[int] = ()) -> Boot:
    """One that has read these blocks, one each 100 ms."""
    return Boot({n: 100 * i for i, n in enumerate(read)}, frozenset(unread))


# --------------------------------------------------------------------------------------------------------------- boots


def test_what_the_first_boot_read_is_usual() -> None:
    trace = of([boot(5, 3)])
    assert (trace.boots, trace.recorded, trace.usual()) == (1, 100, [3, 5])
    assert list(trace.blocks.items()) == [(5, Read(0, 1, 1)), (3, Read(100, 1, 1))]


def test_what_most_boots_read_stays_usual_and_what_few_do_is_forgotten() -> None:
    always = boot(1, 2, 3)
    once = Boot({1: 0, 2: 0, 3: 0, 9: 50}, frozenset())
    without = boot(1, 2, 3, unread=[9])
    assert of([always, once]).usual() == [1, 2, 3, 9]
    assert of([once, without]).usual() == [1, 2, 3]
    assert 9 in of([once, without, without, without]).blocks
    assert 9 not in of([once, without, without, without, without]).blocks
    assert of([once, without, once, once]).usual() == [1, 2, 3, 9]


def test_a_boot_that_says_nothing_of_a_block_changes_nothing_of_it() -> None:
    warm = boot(1)
    assert of([boot(1, 2), warm, warm]).blocks[2] == Read(100, 1, 1)
    assert of([boot(1, 2), boot(1, unread=[77])]).blocks.keys() == {1, 2}


def test_a_count_that_is_full_is_halved() -> None:
    trace = of([boot(1)] * (MOST_COUNTED + 1))
    assert trace.blocks[1] == Read(0, MOST_COUNTED // 2 + 1, MOST_COUNTED // 2 + 1)
    assert decoded(encoded(trace, KEY)) == trace


def test_a_trace_has_a_bound_and_keeps_what_most_boots_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace_module, "MOST_BLOCKS", 3)
    trace = of([boot(1, 2, 3), boot(1, 3, 4, 5, unread=[2])])
    assert trace.blocks.keys() == {1, 3, 4}


def test_what_is_hardly_a_boot() -> None:
    trace = of([boot(*range(100))])
    assert trace.is_hardly(boot(*range(24)))
    assert not trace.is_hardly(boot(*range(25)))
    assert not Trace(SIZE).is_hardly(boot(1))


# ---------------------------------------------------------------------------------------------------------------- runs


def test_neighbours_are_fetched_together_and_the_largest_of_one_time_first() -> None:
    read = {40: 0, 10: 100, 11: 1900, 12: 90, 50: 2500, 51: 2600, 60: 2500}
    assert of([Boot(read)]).runs() == [
        Run(10 * BLOCK, 3 * BLOCK),
        Run(40 * BLOCK, BLOCK),
        Run(50 * BLOCK, 2 * BLOCK),
        Run(60 * BLOCK, BLOCK),
    ]


def test_a_request_is_a_megabyte_at_most_and_ends_with_the_image() -> None:
    runs = of([boot(*range(985, 1001))]).runs()
    assert sorted(runs) == [Run(985 * BLOCK, 15 * BLOCK + 5000)]
    runs = of([boot(*range(100, 140))]).runs()
    assert sorted(run.length // BLOCK for run in runs) == [8, 16, 16]
    assert of([boot(*range(100, 140))]).bytes() == 40 * BLOCK


def test_each_usual_block_is_fetched_exactly_once() -> None:
    dice = random.Random(1)
    for _ in range(50):
        read = {dice.randrange(1001): dice.randrange(20_000) for _ in range(300)}
        runs = of([Boot(read)]).runs()
        found = [n for run in runs for n in range(run.offset // BLOCK, -(-sum(run) // BLOCK))]
        assert sorted(found) == sorted(read)


# ------------------------------------------------------------------------------------------------------------ encoding


def parts(trace: Trace) -> tuple[dict[str, Any], bytes]:
    """Header and blocks of the bytes of a trace."""
    line, _, rest = encoded(trace, KEY).partition(b"\n")
    return json.loads(line), rest[:-4]


def whole(header: Any, body: bytes) -> bytes:
    """The bytes of a file with such a header and such blocks, and the right checksum."""
    data = (header if isinstance(header, bytes) else json.dumps(header).encode()) + b"\n" + body
    return data + struct.pack("<I", zlib.crc32(data))


def test_what_is_written_is_read() -> None:
    trace = of([boot(4, 1, 1000), boot(4, unread=[1])])
    assert decoded(encoded(trace, KEY)) == trace
    assert list(decoded(encoded(trace, KEY), KEY).blocks) == [4, 1, 1000]
    assert decoded(encoded(Trace(1), KEY)) == Trace(1)
    largest = Trace(1 << 62, blocks={n: Read(1, 1, 1) for n in range(MOST_BLOCKS)})
    assert len(encoded(largest, "x" * 2000)) <= LONGEST


def test_a_trace_of_another_image_is_refused_where_it_does_not_lie_beside_it() -> None:
    with pytest.raises(BadTraceError, match="of another image"):
        decoded(encoded(Trace(1), KEY), "images:b.raw")


def test_a_file_that_is_cut_off_or_damaged_anywhere_is_refused() -> None:
    data = encoded(of([boot(4, 1)]), KEY)
    for length in range(len(data)):
        with pytest.raises(BadTraceError):
            decoded(data[:length])
    for at in range(len(data)):
        with pytest.raises(BadTraceError):
            decoded(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
    for more in (data + b"x", data * 2, b"\0" * 5000, b"\n" * 100, b"x" * (LONGEST + 1)):
        with pytest.raises(BadTraceError):
            decoded(more)


HEADER, BODY = parts(of([boot(4, 1)]))


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ({}, b""),
        ([], b""),
        (b"[" * 3000, b""),
        (b"\xff\xfe", b""),
        (HEADER | {"version": 2}, BODY),
        (HEADER | {"forebay": "redo"}, BODY),
        (HEADER | {"size": -1}, BODY),
        (HEADER | {"size": 1 << 63}, BODY),
        (HEADER | {"size": True}, BODY),
        (HEADER | {"size": 4 * BLOCK}, BODY),
        (HEADER | {"size": 1e3}, BODY),
        (HEADER | {"inode": "9"}, BODY),
        (HEADER | {"boots": None}, BODY),
        (HEADER | {"blocks": 1}, BODY),
        (HEADER | {"blocks": 3}, BODY),
        (HEADER | {"blocks": 1 << 62}, BODY),
        (HEADER, BODY[:-1]),
        (HEADER | {"blocks": 4}, BODY * 2),
        (HEADER | {"blocks": 1}, struct.pack("<IIBB", 1001, 0, 1, 1)),
        (HEADER | {"blocks": 1}, struct.pack("<IIBB", 0xFFFFFFFF, 0, 1, 1)),
        (HEADER | {"blocks": 1}, struct.pack("<IIBB", 1, 0xFFFFFFFF, 1, 1)),
        (HEADER | {"blocks": 1}, struct.pack("<IIBB", 1, 0, 0, 0)),
        (HEADER | {"blocks": 1}, struct.pack("<IIBB", 1, 0, 2, 1)),
        (HEADER | {"blocks": 1}, struct.pack("<IIBB", 1, 0, 255, 255)),
    ],
)
def test_what_cannot_be_is_refused_although_its_checksum_is_right(header: Any, body: bytes) -> None:
    with pytest.raises(BadTraceError) as fault:
        decoded(whole(header, body))
    assert len(str(fault.value)) < 120
    assert decoded(whole(HEADER, BODY)) == of([boot(4, 1)])
