# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Torrents of images: what is written, what is read of foreign ones, and what a piece is compared with."""

import hashlib
import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.errors import ForebayError
from forebay.staging import bencode, orders
from forebay.staging.orders import Order
from forebay.staging.torrent import (
    HASH,
    LARGEST,
    LEAF,
    MOST_PIECES,
    BadTorrentError,
    Torrent,
    decoded,
    encoded,
    piece_hash,
    piece_length_of,
    width_of,
)
from forebay.units import parse_peer
from forebay_cache.format.geometry import BLOCK

SIZES = (1, 5000, LEAF, LEAF + 1, 4 * LEAF, 4 * LEAF + 1, 1 << 20, (3 << 20) + 77)


def torrent_of(content: bytes) -> Torrent:
    length = piece_length_of(len(content))
    width = width_of(len(content), length)
    hashes = (
        piece_hash(memoryview(content)[at : at + length], width)
        for at in range(0, len(content), length)
    )
    return Torrent(len(content), length, b"".join(hashes), 1_700_000_000_000_000_000, 42)


@pytest.mark.parametrize("size", SIZES)
def test_a_torrent_comes_back_as_it_was(size: int) -> None:
    torrent = torrent_of(random.Random(size).randbytes(size))
    assert decoded(encoded(torrent)) == torrent


@pytest.mark.parametrize("size", SIZES)
def test_libtorrent_makes_the_same_of_the_same_image(size: int, tmp_path: Path) -> None:
    if importlib.util.find_spec("libtorrent") is None:
        pytest.skip("libtorrent is not installed: make setup installs it where it can be had")
    import libtorrent as lt

    content = random.Random(size).randbytes(size)
    (tmp_path / "image").write_bytes(content)
    ours = torrent_of(content)
    files = lt.list_files(str(tmp_path / "image"))
    theirs = lt.create_torrent(files, ours.piece_length, lt.create_torrent.v2_only)
    lt.set_piece_hashes(theirs, str(tmp_path))
    their_hash = lt.torrent_info(theirs.generate()).info_hashes().v2
    read: Any = lt.bdecode(encoded(ours))
    assert lt.torrent_info(read).info_hashes().v2 == their_hash


def test_a_piece_is_right_only_as_a_whole() -> None:
    content = random.Random(1).randbytes(3 * 4 * LEAF + 10)
    torrent = torrent_of(content)
    assert torrent.pieces == 4
    for piece in range(4):
        offset, length = torrent.span(piece)
        data = content[offset : offset + length]
        assert torrent.is_right(piece, memoryview(data))
        assert not torrent.is_right((piece + 1) % 4, memoryview(data))
        for at in (0, length // 2, length - 1):
            wrong = bytearray(data)
            wrong[at] ^= 1
            assert not torrent.is_right(piece, memoryview(wrong))
        assert not torrent.is_right(piece, memoryview(data[:-1]))
    assert not torrent.is_right(0, memoryview(b""))


def test_pieces_of_zeros_are_known_by_their_hashes() -> None:
    piece = 4 * LEAF
    torrent = torrent_of(bytes(piece) + b"x" * piece + bytes(2 * piece) + bytes(5))
    assert list(torrent.zeros(0, torrent.pieces)) == [0, 2, 3, 4]
    assert list(torrent_of(bytes(100)).zeros(0, 1)) == [0]


@pytest.mark.parametrize("size", [1, 1 << 30, MOST_PIECES << 16, (MOST_PIECES << 16) + 1, LARGEST])
def test_no_torrent_has_too_many_pieces(size: int) -> None:
    assert -(-size // piece_length_of(size)) <= MOST_PIECES


def test_pieces_are_as_large_as_leaves_enough_of_them_to_give_away() -> None:
    lengths = [
        piece_length_of(size) for size in (1, 127 << 20, 128 << 20, 1 << 30, 4 << 30, LARGEST)
    ]
    assert lengths == [64 << 10, 64 << 10, 128 << 10, 1 << 20, 1 << 20, 4 << 20]


@pytest.mark.parametrize("length", [BLOCK, 4 << 20])
def test_a_torrent_with_other_pieces_than_are_made_here_is_used(length: int) -> None:
    content = random.Random(4).randbytes(9 * LEAF)
    hashes = [
        piece_hash(memoryview(content)[at : at + length], width_of(len(content), length))
        for at in range(0, len(content), length)
    ]
    torrent = Torrent(len(content), length, b"".join(hashes), 1, 1)
    assert decoded(encoded(torrent)) == torrent


@pytest.mark.parametrize("size", [-1, 0, LARGEST + 1])
def test_an_image_that_is_too_large_has_none(size: int) -> None:
    with pytest.raises(ValueError, match="can be staged"):
        piece_length_of(size)


# ------------------------------------------------------------------------------------------------------- foreign ones


def changed(*path: Any, to: Any) -> bytes:
    """A torrent in which one thing is another."""
    content = bencode.decoded(encoded(torrent_of(random.Random(2).randbytes(9 * LEAF))))
    place = content
    for key in path[:-1]:
        place = place[key]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return bencode.encoded(content)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"i5e",
        b"de",
        b"le",
        b"d" * 10000,
        b"l" * 10000 + b"e" * 10000,
        b"99999999999999999999999:",
        b"i" + b"9" * 5000 + b"e",
        b"d1:ai1e1:ai1ee",
        b"d1:bi1e1:ai1ee",
        b"i01e",
        b"i-0e",
        b"5:abc",
        b"x" * 100,
        encoded(torrent_of(b"a" * 100))[:-1],
        encoded(torrent_of(b"a" * 100)) + b"x",
        changed(b"info", b"piece length", to=LEAF),
        changed(b"info", b"piece length", to=0),
        changed(b"info", b"piece length", to=-1),
        changed(b"info", b"piece length", to=b"65536"),
        changed(b"info", b"meta version", to=1),
        changed(b"info", b"file tree", to={}),
        changed(b"info", b"file tree", b"image", b"", b"length", to=1 << 62),
        changed(b"info", b"file tree", b"image", b"", b"length", to=1 << 63),
        changed(b"info", b"file tree", b"image", b"", b"length", to=0),
        changed(b"info", b"file tree", b"image", b"", b"pieces root", to=7),
        changed(b"info", b"file tree", b"image", b"", b"pieces root", to=b"short"),
        changed(b"piece layers", to={}),
        changed(b"piece layers", to=[b"a"]),
        changed(b"forebay", to=None),
        changed(b"forebay", b"version", to=2),
        changed(b"forebay", b"inode", to=-1),
        changed(b"forebay", b"mtime_ns", to=b"now"),
    ],
)
def test_what_is_no_torrent_of_an_image_is_refused(data: bytes) -> None:
    with pytest.raises(BadTorrentError):
        decoded(data)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_torrent_or_refused(data: bytes) -> None:
    with pytest.raises(BadTorrentError):
        decoded(data)


@settings(deadline=None)
@given(st.data())
def test_a_torrent_with_a_wrong_byte_is_refused_or_of_other_hashes(data: st.DataObject) -> None:
    whole = bytearray(encoded(torrent_of(random.Random(3).randbytes(9 * LEAF))))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = decoded(bytes(whole))
    except BadTorrentError:
        return
    assert len(found.hashes) == HASH * found.pieces == HASH * -(-found.size // found.piece_length)


values = st.recursive(
    st.integers(-(10**18), 10**18) | st.binary(max_size=50),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.binary(max_size=9), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(values)
def test_bencoding_comes_back_as_it_was(value: Any) -> None:
    try:
        assert bencode.decoded(bencode.encoded(value)) == value
    except ValueError as fault:
        assert "more than a torrent" in str(fault)  # noqa: PT017  (only what is too deep)


# ------------------------------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ham1", ("ham1", 10881)),
        ("ham1.example.org:7", ("ham1.example.org", 7)),
        ("10.0.0.1", ("10.0.0.1", 10881)),
        ("fe80::1", ("fe80::1", 10881)),
        ("[fe80::1]:65535", ("fe80::1", 65535)),
    ],
)
def test_a_peer_is_a_host_and_a_port(text: str, found: tuple[str, int]) -> None:
    assert parse_peer(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-oProxyCommand=x",
        "-a:1",
        ".a",
        "a b",
        "a;b",
        "a:0",
        "a:65536",
        "a:x",
        "a:٣",
        "ä",
        "a" * 254,
        "a\n",
        "[]:1",
    ],
)
def test_what_is_no_peer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"host|port"):
        parse_peer(text)


def test_orders_come_back_as_they_were(tmp_path: Path) -> None:
    kept = [
        Order("images:a.raw", 5, (("ham1", 1), ("fe80::1", 2)), source=True, rate=7),
        Order("images:ü.raw", 1 << 40, ()),
    ]
    assert orders.load(tmp_path) == []
    orders.save(tmp_path, kept)
    assert orders.load(tmp_path) == kept


def test_as_many_orders_are_kept_as_may_be(tmp_path: Path) -> None:
    peers = tuple((f"{n}".rjust(253, "h"), 65535) for n in range(orders.MOST_PEERS))
    kept = [Order(f"images:{n}", 5, peers) for n in range(orders.MOST_ORDERS)]
    orders.save(tmp_path, kept)
    assert orders.load(tmp_path) == kept


def test_who_stages_an_image_that_is_staged_takes_no_hosts_from_others() -> None:
    first = Order("images:a.raw", 5, (("ham1", 1), ("ham2", 1)), source=True, rate=7)
    second = Order("images:a.raw", 5, (("ham2", 1), ("ham3", 1)))
    assert first.after(None) == first
    both = second.after(first)
    assert both.peers == (("ham1", 1), ("ham2", 1), ("ham3", 1))
    assert (both.source, both.rate) == (True, None), "it has all of it still; the later rate counts"
    assert second.after(both) == both, "told again, it is the same"
    hosts = tuple((f"{n}", 1) for n in range(orders.MOST_PEERS))
    full = Order("images:a.raw", 5, hosts)
    assert full.after(full) == full
    with pytest.raises(ForebayError, match="1001 hosts here already, and 1001 are the most"):
        first.after(full)


def test_the_hosts_of_an_order_are_not_copied_each_time_it_is_told() -> None:
    order = Order("images:a.raw", 5, (("ham1", 1),))
    assert order.told()["peers"] is order.peers


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}x",
        "[1]",
        "[{}]",
        "[" * 5000,
        '[{"image": 1, "size": 1, "peers": [], "source": false, "rate": null}]',
        '[{"image": "a", "size": 1.5, "peers": [], "source": false, "rate": null}]',
        '[{"image": "a", "size": 1, "peers": [["-x", 1]], "source": false, "rate": null}]',
        '[{"image": "a", "size": 1, "peers": [["x"]], "source": false, "rate": null}]',
        '[{"image": "a", "size": 1, "peers": [], "source": false, "rate": -1}]',
    ],
)
def test_a_file_of_orders_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / orders.FILE).write_text(text)
    with pytest.raises(ValueError, match=r"."):
        orders.load(tmp_path)


def test_the_hash_of_one_leaf_is_its_sha256() -> None:
    assert piece_hash(memoryview(b"abc"), 1) == hashlib.sha256(b"abc").digest()
