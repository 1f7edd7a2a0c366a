# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The compiled core: its checksums are those of the on-disk format, and whoever wants to does without it."""

import random
import subprocess
import sys
import zlib
from collections.abc import Iterator

import pytest
from xxhash import xxh3_64_intdigest

import forebay_fast
from forebay_cache.format.checksum import ZERO_SECTOR_SUM, checksum

core = pytest.importorskip("forebay_fast.core", reason="the core is not compiled: make setup")

SECTOR = 4096


@pytest.fixture
def as_before() -> Iterator[None]:
    was = forebay_fast.serves()
    yield
    forebay_fast.use(was)


@pytest.mark.parametrize("portable", [False, True])
def test_its_checksum_is_that_of_the_format(rng: random.Random, portable: bool) -> None:
    for _ in range(200):
        sector = rng.randbytes(SECTOR)
        assert core.checksum(sector, portable=portable) == checksum(sector)
        assert checksum(sector) == xxh3_64_intdigest(sector) & 0xFFFFFFFF
    assert core.checksum(bytes(SECTOR), portable=portable) == ZERO_SECTOR_SUM
    for place in range(0, SECTOR, 61):  # every stripe counts, the last one included
        one_bit = bytes(place) + b"\1" + bytes(SECTOR - place - 1)
        assert core.checksum(one_bit, portable=portable) == checksum(one_bit)


@pytest.mark.parametrize("length", [0, 1, SECTOR - 1, SECTOR + 1, 2 * SECTOR])
def test_what_is_no_sector_has_no_checksum(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} bytes"):
        core.checksum(bytes(length))


def test_its_crc_is_that_of_zlib(rng: random.Random) -> None:
    for length in (*range(70), 511, 4096, 40_000):
        data, before = rng.randbytes(length), rng.getrandbits(32)
        assert core.crc32(data, before) == zlib.crc32(data, before)
        assert core.crc32(memoryview(data)) == zlib.crc32(data)


def test_a_setting_turns_it_off(as_before: None) -> None:
    forebay_fast.use(False)
    assert not forebay_fast.serves()


@pytest.mark.parametrize(("variable", "serves"), [({"FOREBAY_CORE": "0"}, "False"), ({}, "True")])
def test_the_environment_turns_it_off_whatever_is_set(
    variable: dict[str, str], serves: str
) -> None:
    program = "import forebay_fast; forebay_fast.use(True); print(forebay_fast.serves())"
    assert _run(program, variable) == serves


def test_without_it_the_package_says_why() -> None:
    program = (
        "import sys; sys.modules['forebay_fast.core'] = None\n"
        "import forebay_fast; forebay_fast.use(True); print(forebay_fast.serves(), forebay_fast.missing)"
    )
    assert _run(program, {}).startswith("False import of forebay_fast.core halted")


def _run(program: str, variables: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
