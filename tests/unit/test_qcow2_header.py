# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The header of a qcow2 image: what QEMU's tool makes is understood, and what nobody could have made is refused."""

import struct
import subprocess
from pathlib import Path

import pytest

from forebay.formats.qcow2 import HEAD, Header, parse

MADE = [
    ("", {"version": 3, "cluster_bits": 16, "compression": "zlib", "l1_entries": 2}),
    ("compat=0.10", {"version": 2}),
    ("cluster_size=512", {"cluster_bits": 9, "l1_entries": 32768}),
    ("cluster_size=2M", {"cluster_bits": 21, "l1_entries": 1}),
    ("extended_l2=on,cluster_size=128k", {"extended": True, "l2_entries": 8192}),
    ("compression_type=zstd", {"compression": "zstd"}),
    ("data_file=data.raw", {"external_data": True, "data_file": b"data.raw"}),
    ("backing_file=/etc/passwd,backing_fmt=raw", {"backing": b"/etc/passwd"}),
]
"""Options of `qemu-img create`, and what the header says then."""


def made(folder: Path, options: str) -> bytes:
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "x.qcow2", "1G"]
    words[3:3] = ["-o", options] if options else []
    subprocess.run(words, check=True, cwd=folder)
    return (folder / "x.qcow2").read_bytes()


@pytest.mark.parametrize(("options", "expected"), MADE)
def test_what_qemu_makes_is_understood(
    tmp_path: Path, options: str, expected: dict[str, object]
) -> None:
    content = made(tmp_path, options)
    header = parse(content[:HEAD], len(content))
    assert header.size == 1 << 30
    assert {key: getattr(header, key) for key in expected} == expected


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return made(tmp_path_factory.mktemp("plain"), "")


def changed(plain: bytes, at: int, form: str, value: int) -> bytes:
    content = bytearray(plain)
    struct.pack_into(">" + form, content, at, value)
    return bytes(content)


def test_what_is_encrypted_or_damaged_says_so(plain: bytes) -> None:
    header = parse(changed(changed(plain, 32, "I", 2), 72, "Q", 2)[:HEAD], len(plain))
    assert (header.encryption, header.corrupt) == ("LUKS", True)


HOSTILE = [
    ("version 9", 4, "I", 9, "version 9"),
    ("clusters of a byte", 20, "I", 0, r"2\^0 bytes"),
    ("clusters of 4 GiB", 20, "I", 32, r"2\^32 bytes"),
    ("all numbers at their end: size", 24, "Q", (1 << 64) - 1, "impossible size"),
    ("a size beyond what tables can have", 24, "Q", 1 << 62, "impossible size"),
    ("an unknown cipher", 32, "I", 7, "encryption 7"),
    ("too few tables", 36, "I", 1, "1 tables"),
    ("too many tables", 36, "I", 0xFFFFFFFF, "4294967295 tables"),
    ("tables behind the end", 40, "Q", 1 << 40, "table of tables"),
    ("tables that begin at an odd byte", 40, "Q", 196609, "table of tables"),
    ("tables in the header", 40, "Q", 0, "table of tables"),
    ("an unknown feature", 72, "Q", 1 << 40, "not known"),
    ("a header without end", 100, "I", 0xFFFFFFF8, "a header of"),
    ("a header of nothing", 100, "I", 0, "a header of"),
    ("a header of odd length", 100, "I", 109, "a header of"),
    ("a compression nobody announced", 104, "B", 1, "compression 1"),
    ("an unknown compression", 104, "B", 200, "compression 200"),
    ("an extension that goes on behind the header", 116, "I", 0xFFFFFFFF, "cut off"),
    ("parts of small clusters", 72, "Q", 1 << 4, "not known|parts of"),
]


@pytest.mark.parametrize(
    ("at", "form", "value", "text"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE]
)
def test_what_nobody_could_have_made_is_refused(
    plain: bytes, at: int, form: str, value: int, text: str
) -> None:
    content = changed(plain, at, form, value)
    if value == 1 << 4:
        content = changed(content, 20, "I", 12)
    with pytest.raises(ValueError, match=text) as told:
        parse(content[:HEAD], len(content))
    assert len(str(told.value).splitlines()) == 1


def test_a_name_of_a_backing_file_that_lies_elsewhere_is_refused(plain: bytes) -> None:
    for at, length in ((1 << 20, 8), (512, 0), (512, 5000), (HEAD - 4, 8)):
        content = changed(changed(plain, 8, "Q", at), 16, "I", length)
        with pytest.raises(ValueError, match="backing file's name"):
            parse(content[:HEAD], len(content))


def test_extensions_without_end_are_refused(plain: bytes) -> None:
    content = bytearray(plain)
    content[112:4096] = struct.pack(">II", 7, 0) * ((4096 - 112) // 8)
    with pytest.raises(ValueError, match="without end"):
        parse(bytes(content[:HEAD]), len(content))


def test_each_cut_of_a_header_is_refused_or_understood(plain: bytes) -> None:
    for length in range(200):
        try:
            assert isinstance(parse(plain[:length], len(plain)), Header)
        except ValueError as told:
            assert str(told).startswith("is ")  # noqa: PT017  (either is right)
