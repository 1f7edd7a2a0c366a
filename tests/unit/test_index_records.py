# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Names of operators and tenants as the index keeps them: any text, of any length, never in a commit's way."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from forebay_cache import open_cache
from forebay_cache.format import ops
from forebay_cache.format.records import (
    LONGEST_NAME,
    LayerName,
    encode_name,
    pack_record,
    record_key,
    unpack_record,
)
from forebay_cache.offline.check import check

ODD = [
    "",
    "a",
    "a\0b",
    "\0",
    "\udcff\udc80",
    "ÿ",
    "é" * 252,
    "x" * 505,
    "x" * 506,
    "x" * 8192,
    "\ud800",
]


@pytest.mark.parametrize("name", ODD)
def test_a_record_comes_back_under_its_name(name: str) -> None:
    key, raw = pack_record("image", name, {"size": 1})
    assert len(key) <= 511
    assert unpack_record(key, raw) == ("image", name, {"size": 1})


@given(st.text(st.characters(categories=None), max_size=600), st.text(max_size=600))
def test_two_names_never_have_one_key(a: str, b: str) -> None:
    assert (record_key("image", a) == record_key("image", b)) == (a == b)


def test_short_keys_are_as_they_always_were() -> None:
    assert record_key("image", "images:a/b.raw") == b"image\0images:a/b.raw"
    assert record_key("image", "x" * 505) == b"image\0" + b"x" * 505


@pytest.mark.parametrize(
    "key", [b"image", b"\0a", b"image\0\xffabc", record_key("image", "x" * 600), b"image\0\x80"]
)
def test_what_is_no_record_is_told(key: bytes) -> None:
    with pytest.raises((ValueError, OSError)):
        unpack_record(key, b'{"name": "y", "value": {}}' if len(key) > 10 else b"{}")


@pytest.mark.parametrize("name", [x for x in ODD if x])
def test_a_layer_is_in_the_journal_with_its_name(name: str) -> None:
    (op,) = ops.unpack(ops.layer_made(7, LayerName.of_disk("d", 3, name)))
    assert (op.layer, op.name) == (7, LayerName.of_disk("d", 3, name))


def test_a_name_that_is_too_long_is_refused() -> None:
    with pytest.raises(OSError, match="too long") as refused:
        encode_name("x" * (LONGEST_NAME + 1))
    assert refused.value.errno == errno.ENAMETOOLONG


def test_what_cannot_be_stored_is_refused_and_no_commit_notices(tmp_path: Path) -> None:
    """Whatever is given to the cache: the records of others become durable."""

    async def story() -> None:
        cache = open_cache(tmp_path / "c.img", tmp_path / "index", size=4 << 20, boot="a")
        async with trio.open_nursery() as nursery:
            await nursery.start(cache.run)
            for name in ODD:
                cache.records.put("image", name, {"name": name})
                if name:
                    cache.layers.make(LayerName.of_image(name))
            with pytest.raises(OSError, match="too long"):
                cache.records.put("image", "x" * 9000, {})
            with pytest.raises(ValueError, match="of 65535 at most"):
                cache.layers.make(LayerName.of_image("x" * 70000))
            with pytest.raises(OSError, match="no JSON"):
                cache.records.put("image", "odd", {"a": object()})
            with pytest.raises(OSError, match="too large"):
                cache.records.put("image", "odd", {"a": "x" * (2 << 20)})
            cache.records.put("image", "x" * 9000, None)
            await cache.commit()
            cache.records.put("image", ODD[-2], None)
            await cache.commit()
            nursery.cancel_scope.cancel()
        await cache.close()

    trio.run(story)
    report = check(tmp_path / "c.img", tmp_path / "index", boot="a", progress=lambda *_: None)
    assert not report.faults, report.faults
    cache = open_cache(tmp_path / "c.img", tmp_path / "index", size=4 << 20, boot="a")
    assert set(cache.records.all("image")) == set(ODD) - {ODD[-2]}
    assert {x.name.image for x in cache.layers} == set(ODD) - {""}
    cache.release()


def test_opening_an_index_imports_nothing_more(tmp_path: Path) -> None:
    """Root's commands become the daemon's user before that, who may not be able to read our modules."""
    probe = (
        "import sys, pathlib; from forebay_cache.index.index import Index; before = set(sys.modules); "
        "Index(pathlib.Path(sys.argv[1]) / 'index', 10).close(); print(sorted(set(sys.modules) - before))"
    )
    words = [sys.executable, "-c", probe, str(tmp_path)]
    assert subprocess.run(words, check=True, capture_output=True).stdout == b"[]\n"
