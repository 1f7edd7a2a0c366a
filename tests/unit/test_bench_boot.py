# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The boot that `make bench-boot` replays, and its table."""

from bench.boot import BOOT_BYTES, IMAGE_BYTES, THINK_SECONDS, Row, boot_reads, table


def test_the_boot_is_always_the_same_and_reads_nothing_twice() -> None:
    reads = boot_reads()
    assert reads == boot_reads()
    assert sum(read.length for read in reads) == BOOT_BYTES
    assert round(sum(read.think for read in reads), 6) == THINK_SECONDS
    ends = 0
    for read in sorted(reads):
        assert ends <= read.offset
        ends = read.offset + read.length
    assert ends <= IMAGE_BYTES
    assert max(read.length for read in reads) == 128 << 10


def test_the_table_says_what_was_measured_and_what_was_computed() -> None:
    rows = [Row("a", 1, 1.25, 50, 7, 12.34), Row("b", 25, 30.0, is_computed=True)]
    assert table(rows, 100).splitlines()[2:] == [
        "| a | 1 | 1.2 s | 0.50 | 12.3 % |",
        "| b | 25 | 30.0 s (computed) |  |  |",
    ]
