# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Records of the index: names of layers as they are stored, today and in format 2."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_cache.format import ops
from forebay_cache.format.records import (
    FORMAT,
    NAMES_ARE_TEXT,
    Kind,
    LayerName,
    LayerRecord,
)

disks = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
images = st.one_of(
    st.sampled_from(["images:a.raw", "nbd://[::1]:10809/x y", "/dev/vg0/lv", "bücher:ß:1"]),
    st.text(min_size=1, max_size=200),
)
names = st.one_of(
    st.builds(LayerName.of_image, images),
    st.builds(LayerName.of_disk, disks, st.integers(0, 2**40), st.one_of(st.just(""), images)),
)
counts = st.integers(0, 2**40)
records = st.builds(LayerRecord, names, counts, counts, st.booleans(), st.booleans())


@given(names)
def test_a_name_comes_back_from_the_journal(name: LayerName) -> None:
    assert LayerName.unpack(name.pack(), private=name.is_private) == name
    [op] = ops.unpack(ops.layer_made(7, name))
    assert (op.kind, op.layer, bool(op.side), op.name) == (ops.LAYER, 7, name.is_private, name)


@given(names)
def test_a_name_comes_back_from_the_journal_of_format_2(name: LayerName) -> None:
    text = str(name).encode()
    old = ops.HEAD.pack(ops.LAYER, name.is_private, len(text), 7, 0, 0) + text
    assert next(ops.unpack(old)).name == name


@given(records)
def test_a_record_comes_back_from_the_index(record: LayerRecord) -> None:
    assert LayerRecord.unpack(record.pack()) == record
    assert json.loads(record.pack()).keys() == {
        *("kind", "image", "disk", "generation", "parent"),
        *("slots", "sectors", "dead", "pinned"),
    }


@given(records)
def test_a_record_comes_back_from_an_index_of_format_2(record: LayerRecord) -> None:
    old = {
        "name": str(record.name),
        "private": record.private,
        "slots": record.slots,
        "sectors": record.sectors,
        "dead": record.dead,
        "pinned": record.pinned,
    }
    assert LayerRecord.unpack(json.dumps(old).encode(), NAMES_ARE_TEXT) == record


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("image:images:a.raw", LayerName(Kind.CLEAN, "images:a.raw")),
        ("image:nbd://h:1/e", LayerName(Kind.CLEAN, "nbd://h:1/e")),
        ("disk:vm-1:12:images:a.raw", LayerName(Kind.PRIVATE, "images:a.raw", "vm-1", 12)),
        ("disk:vm-1:3", LayerName(Kind.PRIVATE, "", "vm-1", 3)),  # before it said which image
    ],
)
def test_names_of_format_2(text: str, name: LayerName) -> None:
    assert LayerName.parse(text, private=name.is_private) == name
    assert str(name) == text


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("image:i", True),
        ("disk:d:1:i", False),
        ("disk:d:x:i", True),
        ("disk:d", True),
        ("disk:d::i", True),
        ("snapshot:i", False),
        ("", True),
    ],
)
def test_what_is_no_name_of_format_2(text: str, private: bool) -> None:
    with pytest.raises(ValueError, match="is no name of a"):
        LayerName.parse(text, private=private)


def test_an_early_record_of_format_2_has_less_to_say() -> None:
    raw = b'{"name": "image:i", "private": false}'
    assert LayerRecord.unpack(raw, NAMES_ARE_TEXT) == LayerRecord(LayerName.of_image("i"))


GOOD = LayerRecord(LayerName.of_disk("d", 1, "i"), 1, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"kind": None},
        {"image": 1},
        {"disk": None},
        {"generation": "1"},
        {"parent": "x"},
        {"slots": "1"},
        {"dead": 0},
        {"more": 1},
    ],
)
def test_a_record_that_makes_no_sense_is_a_value_error(change: dict[str, object]) -> None:
    found = json.loads(GOOD.pack()) | change
    with pytest.raises(ValueError, match=r"."):
        LayerRecord.unpack(json.dumps(found).encode())


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"{}", b"[" * 100_000, b"\xff"])
def test_what_is_no_record_is_a_value_error(raw: bytes) -> None:
    for version in (FORMAT, NAMES_ARE_TEXT):
        with pytest.raises(ValueError, match=r"."):
            LayerRecord.unpack(raw, version)


def test_a_record_of_another_format_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="no name of a layer"):
        LayerRecord.unpack(GOOD.pack(), NAMES_ARE_TEXT)


def test_a_name_of_both_kinds_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="both kinds"):
        LayerName.unpack(GOOD.name.pack(), private=False)


def test_what_a_layer_lies_on_does_not_tell_it_apart() -> None:
    """`parent` is about where a layer is, not whose: with another one it takes the place of the first."""
    name = LayerName(Kind.PRIVATE, "i", "d", 1, parent=5)
    assert name == LayerName.of_disk("d", 1, "i")
    assert LayerName.unpack(name.pack(), private=True).parent == 5


def test_a_name_fits_in_a_record_or_is_refused() -> None:
    name = LayerName.of_image("x" * (ops.LONGEST_NAME - len(LayerName.of_image("").pack())))
    [op] = ops.unpack(ops.layer_made(1, name))
    assert op.name == name
    with pytest.raises(ValueError, match="65536 bytes, of 65535 at most"):
        ops.layer_made(1, LayerName.of_image(f"{name.image}x"))
