# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.units import (
    GIB,
    KIB,
    LARGEST_SIZE,
    MIB,
    Mode,
    exact_duration,
    exact_size,
    format_duration,
    format_size,
    parse_duration,
    parse_name,
    parse_preload,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        (4096, 4096),
        ("512B", 512),
        ("64K", 64 * KIB),
        ("64k", 64 * KIB),
        ("64 KiB", 64 * KIB),
        ("20 GiB", 20 * GIB),
        (" 20GiB ", 20 * GIB),
        ("1.5G", 3 * GIB // 2),
        ("0.5 MiB", 512 * KIB),
        ("1.1K", 1126),  # a fraction of a byte is dropped
        ("1T", 1024 * GIB),
        (str(LARGEST_SIZE), LARGEST_SIZE),
        ("7E", 7 << 60),
    ],
)
def test_size_is_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "64K"),
        ("  ", "64K"),
        ("K", "64K"),
        ("-1", "64K"),
        ("+1", "64K"),
        ("1e9", "64K"),
        ("0x10", "64K"),
        ("1,5G", "64K"),
        ("1.G", "64K"),
        ("20 GiBs", "64K"),
        ("20 XB", "64K"),
        ("١٢", "64K"),  # digits, but nobody meant them
        ("20GB", "write G or GiB instead of GB"),
        ("1.5 mb", "write M or MiB instead of MB"),
        ("8E", "between 0 and 8 EiB"),
        (-1, "between 0 and 8 EiB"),
        (1 << 63, "between 0 and 8 EiB"),
        ("9" * 24, "between 0 and 8 EiB"),
        (True, "64K"),
        (1.5, "64K"),
        (None, "64K"),
        (["1"], "64K"),
    ],
)
def test_wrong_size_says_what_is_accepted(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_size(text)


@given(st.integers(0, LARGEST_SIZE))
def test_exact_size_is_read_back(size: int) -> None:
    assert parse_size(exact_size(size)) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (4097, "4097"), (KIB, "1 KiB"), (1536 * MIB, "1536 MiB"), (20 * GIB, "20 GiB")],
)
def test_exact_size_is_short(size: int, text: str) -> None:
    assert exact_size(size) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("30 s", 30),
        ("500ms", 0.5),
        ("0.1s", 0.1),
        ("2m", 120),
        ("2min", 120),
        ("1.5h", 5400),
        ("1d", 86400),
        ("7", 7),
        (7, 7),
        (0.25, 0.25),
        ("0", 0),
    ],
)
def test_duration_is_read(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *("", "s", "-1s", "1 hour", "1y", "1m30s", "nan"),
        *(float("nan"), float("inf"), -1, True, 10**400),
    ],
)
def test_wrong_duration_says_what_is_accepted(text: str | float) -> None:
    with pytest.raises(ValueError, match="write 30s, 500ms or 2m"):
        parse_duration(text)


@given(st.integers(0, 10**12))
def test_exact_duration_is_read_back(microseconds: int) -> None:
    seconds = microseconds / 10**6
    assert parse_duration(exact_duration(seconds)) == seconds


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (1023, "1023"),
        (1024, "1.0K"),
        (9.96 * KIB, "10K"),
        (1023 * KIB, "1023K"),
        (MIB - 1, "1.0M"),
        (20 * GIB, "20G"),
        (3 * GIB // 2, "1.5G"),
        (2048 << 60, "2048E"),
    ],
)
def test_size_for_people(size: float, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 7 << 60))
def test_size_for_people_is_narrow_and_near(size: int) -> None:
    text = format_size(size)
    assert len(text) <= 5
    assert parse_size(text) == pytest.approx(size, rel=0.06)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.25, "250ms"),
        (0.9996, "1.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (125, "2m05s"),
        (3599.7, "1h00m"),
        (12000, "3h20m"),
        (187200, "2d04h"),
    ],
)
def test_duration_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        (Mode.NONE, ["none", "NONE", "pt"]),
        (Mode.WRITE_AROUND, ["write-around", "AROUND", "wa"]),
        (Mode.WRITE_THROUGH, ["write-through", "THRU", "wt", "Write_Through"]),
        (Mode.WRITE_BACK, ["write-back", "BACK", "wb", "WB"]),
        (Mode.FULL_COPY, ["full-copy", "OFFLINE", "offline"]),
    ],
)
def test_every_name_of_a_mode_is_accepted_and_one_printed(mode: Mode, names: list[str]) -> None:
    assert [Mode.parse(name) for name in names] == [mode] * len(names)
    assert str(mode) == names[0]


@pytest.mark.parametrize("text", ["", "writebck", "fast", 5, None])
def test_wrong_mode_lists_the_modes(text: str) -> None:
    with pytest.raises(ValueError, match="none, write-around, write-through, write-back, full-cop"):
        Mode.parse(text)


def test_wrong_mode_is_guessed() -> None:
    with pytest.raises(ValueError, match="did you mean 'write-back'"):
        Mode.parse("writebck")


@pytest.mark.parametrize("name", ["a", "vm1-disk0", "A.b_c-9", "0", "a" * 64])
def test_name(name: str) -> None:
    assert parse_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-a", "_a", "a/b", "a b", "a\n", "ä", "a" * 65, "a\0", "٣"]
)
def test_wrong_name_says_what_is_accepted(name: str) -> None:
    with pytest.raises(ValueError, match="use 1 to 64 of"):
        parse_name(name)


def test_preload() -> None:
    assert [parse_preload(t) for t in ("trace", "ALL", "1M", 5)] == ["trace", "all", MIB, 5]
    with pytest.raises(ValueError, match="or 'trace' or 'all'"):
        parse_preload("some")
