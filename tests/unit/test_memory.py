# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The daemon's memory has a bound, which systemd is told."""

import re
import uuid
from pathlib import Path

from forebay.daemon.figures import memory
from forebay.origin.threads import BACKGROUND_THREADS, FOREGROUND_THREADS
from forebay_cache.format.superblock import plan
from forebay_cache.read.fill import CHUNK

UNIT = Path(__file__).parents[2] / "systemd" / "forebay.service"
GIB = 1 << 30


def test_the_limit_in_the_unit_is_the_sum_of_all_budgets() -> None:
    """In whole GiB: neither less, nor more than the next one."""
    [given] = re.findall(r"^MemoryMax=(\d+)G$", UNIT.read_text(), re.MULTILINE)
    assert int(given) == -(-memory.ceiling() // GIB)


def test_what_the_sum_reckons_with_is_so() -> None:
    assert memory.STORE_CALLS == FOREGROUND_THREADS + BACKGROUND_THREADS
    assert CHUNK <= memory.MIB
    largest = max(plan(size << 30, uuid.UUID(int=1)).journal_size for size in (1, 100, 10_000))
    assert largest == memory.JOURNAL_MOST
