# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay import`: files as QEMU's and the packers' own tools make them, servers as they are, and what goes wrong."""

import contextlib
import gzip
import hashlib
import json
import lzma
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forebay.cli.main import main
from forebay.importing import feed, limits, making, web, work
from forebay.importing.sparse import SparseFile
from forebay.origin.worker import syscalls
from real.web_bed import Web, make_authority, numbered, serving

MIB = 1 << 20
DAEMON = 12345
SIZE = 12 * MIB


class Bed:
    """A store, and the command."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.config = folder / "forebay.toml"
        self._capsys = capsys
        for path in (self.store, folder / "state"):
            path.mkdir()
        self.config.write_text(
            f'[gateway]\nstate = "{folder}/state"\nrun = "{folder}/run"\n[stores.images]\npath = "{self.store}"\n'
        )

    def words(self, source: object, name: str, *options: str) -> list[str]:
        target = name if ":" in name or name.startswith("/") else f"images:{name}"
        return ["--config", str(self.config), "import", str(source), target, *options]

    def run(self, source: object, name: str = "new", *options: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of the command."""
        code = main(self.words(source, name, *options))
        told = self._capsys.readouterr()
        return code, told.out, told.err

    def imported(self, source: object, *options: str) -> bytes:
        """The image that the command made."""
        code, _, err = self.run(source, "new", *options)
        assert (code, err) == (0, "")
        assert self.left() == ["new"]
        return (self.store / "new").read_bytes()

    def refused(self, source: object, name: str = "new", *options: str, leaves: int = 0) -> str:
        """The one line that the command ends with."""
        code, out, err = self.run(source, name, *options)
        assert (code, out) == (1, "")
        assert len(err.splitlines()) == 1, err
        assert not (self.store / "new").exists()
        assert len(self.left()) == leaves, self.left()
        return err

    def left(self) -> list[str]:
        return sorted(os.listdir(self.store))


@pytest.fixture
def bed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bed:
    return Bed(tmp_path, capsys)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with data here and there, and zeros at its end."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    rng = random.Random(7)
    with path.open("wb") as file:
        for _ in range(30):
            file.seek(rng.randrange(SIZE - MIB) // 4096 * 4096)
            file.write(rng.randbytes(rng.choice((4096, 65536, 200_000))))
        file.truncate(SIZE)
    return path


def converted(disk: Path, folder: Path, *options: str, form: str = "qcow2") -> Path:
    """The disk as an image in another format."""
    path = folder / f"disk.{form}"
    how = ["-f", "raw", "-O", form, *options]
    subprocess.run(["qemu-img", "convert", *how, disk, path], check=True)
    return path


def packed(path: Path, tool: str) -> Path:
    words = {"gz": ["gzip", "-k"], "xz": ["xz", "-1k"], "zst": ["zstd", "-q"]}[tool]
    subprocess.run([*words, path], check=True)
    return path.with_name(f"{path.name}.{tool}")


# -------------------------------------------------------------------------------------------------------- what comes in

QCOW2 = [
    (),
    ("-c",),
    ("-o", "compat=0.10"),
    ("-c", "-o", "compression_type=zstd"),
    ("-o", "extended_l2=on,cluster_size=64k"),
    ("-o", "cluster_size=512"),
    ("-c", "-o", "cluster_size=2M"),
    ("-o", "preallocation=metadata"),
]


@pytest.mark.parametrize("options", QCOW2, ids=" ".join)
def test_a_qcow2_image_becomes_the_disk_that_its_guest_sees(
    bed: Bed, disk: Path, options: tuple[str, ...]
) -> None:
    source = converted(disk, bed.folder, *options)
    assert bed.imported(source) == disk.read_bytes()


@pytest.mark.parametrize("tool", ["gz", "xz", "zst"])
def test_what_is_packed_is_unpacked(bed: Bed, disk: Path, tool: str) -> None:
    copy = bed.folder / "disk.img"
    subprocess.run(["cp", "--sparse=always", disk, copy], check=True)
    assert bed.imported(packed(copy, tool)) == disk.read_bytes()


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("vmdk", ()),
        ("vmdk", ("-o", "subformat=streamOptimized")),
        ("vdi", ()),
        ("vhdx", ()),
        ("vhdx", ("-o", "subformat=fixed")),
    ],
)
@pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="no qemu-storage-daemon")
def test_an_image_in_another_format_becomes_the_disk_in_it(
    bed: Bed, disk: Path, form: str, options: tuple[str, ...]
) -> None:
    source = converted(disk, bed.folder, *options, form=form)
    assert bed.imported(source) == disk.read_bytes()
    (bed.store / "new").unlink()
    assert bed.imported(packed(source, "zst"), "--format", f"{form}.zst") == disk.read_bytes()


def test_a_packed_qcow2_image_is_unpacked_and_read(bed: Bed, disk: Path) -> None:
    assert bed.imported(packed(converted(disk, bed.folder), "xz")) == disk.read_bytes()


def test_parts_of_a_cluster_that_are_zeros_or_not_there_are_zeros(bed: Bed) -> None:
    source = bed.folder / "x.qcow2"
    how = ["-o", "extended_l2=on,cluster_size=64k"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *how, source, "4M"], check=True)
    steps = ["write -P 5 0 64k", "write -z 4k 6k", "write -P 6 130k 2k", "discard 1M 64k"]
    words = [word for step in steps for word in ("-c", step)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, source], check=True, capture_output=True)
    image = bed.imported(source)
    assert image[:4096] == bytes([5]) * 4096
    assert image[4096:10240] == bytes(6144)
    assert image[10240:65536] == bytes([5]) * (65536 - 10240)
    assert image[130 * 1024 : 132 * 1024] == bytes([6]) * 2048
    assert image.count(0) == 4 * MIB - 65536 + 6144 - 2048


def test_a_raw_disk_is_copied_with_its_holes(bed: Bed, disk: Path) -> None:
    assert bed.imported(disk) == disk.read_bytes()
    assert (bed.store / "new").stat().st_blocks <= disk.stat().st_blocks + 16


def test_zeros_take_no_space_however_they_come(bed: Bed) -> None:
    source = bed.folder / "zeros.gz"
    with gzip.open(source, "wb", 1) as file:
        for _ in range(64):
            file.write(bytes(MIB))
    assert len(bed.imported(source)) == 64 * MIB
    assert (bed.store / "new").stat().st_blocks == 0


def test_streams_behind_each_other_are_one_with_or_without_padding(bed: Bed) -> None:
    source = bed.folder / "two"
    source.write_bytes(gzip.compress(b"a" * 1000) + gzip.compress(b"b" * 1048) + bytes(512))
    assert bed.imported(source) == b"a" * 1000 + b"b" * 1048


def test_an_odd_size_becomes_whole_sectors(bed: Bed) -> None:
    source = bed.folder / "odd"
    source.write_bytes(b"x" * 1000)
    assert bed.imported(source) == b"x" * 1000 + bytes(24)


def test_the_image_is_a_raw_disk_for_good_whatever_its_guest_wrote(bed: Bed) -> None:
    source = bed.folder / "inner"
    content = b"QFI\xfb" + bytes(MIB - 4)
    source.write_bytes(content)
    assert bed.imported(source, "--format", "raw") == content
    assert os.getxattr(bed.store / "new", "user.forebay.raw") == b"%d" % MIB


def test_the_result_is_told_for_people_and_for_programs(bed: Bed, disk: Path) -> None:
    checksum = hashlib.sha256(disk.read_bytes()).hexdigest()
    code, out, _ = bed.run(disk, "one", "--sha256", checksum.upper(), "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    result = lines[-1]["result"]
    assert code == 0
    assert lines[0]["phase"] == "write"
    assert {key: result[key] for key in ("image", "format", "size", "sha256")} == {
        "image": "images:one",
        "format": "raw",
        "size": SIZE,
        "sha256": checksum,
    }
    code, out, _ = bed.run(disk, "two", "--sha256", checksum)
    assert "images:two: 12M" in out
    assert checksum in out


# ---------------------------------------------------------------------------------------------------- what is refused


def qcow2_of(change: Callable[[bytearray], None]) -> Callable[[Path, Path], Path]:
    def make(disk: Path, folder: Path) -> Path:
        path = converted(disk, folder)
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)
        return path

    return make


def put(at: int, form: str, value: int) -> Callable[[Path, Path], Path]:
    return qcow2_of(lambda content: struct.pack_into(">" + form, content, at, value))


def put_in_tables(first: bool, value: int) -> Callable[[Path, Path], Path]:
    """Change each used entry of the first table, or of the second tables."""

    def change(content: bytearray) -> None:
        (l1,) = struct.unpack_from(">Q", content, 40)
        (l2,) = struct.unpack_from(">Q", content, l1)
        at, count = (l1, 1) if first else (l2 & 0xFFFFFFFFFFFE00, 8192)
        for n in range(count):
            if struct.unpack_from(">Q", content, at + 8 * n)[0]:
                struct.pack_into(">Q", content, at + 8 * n, value)

    return qcow2_of(change)


def backed(name: str) -> Callable[[Path, Path], Path]:
    def make(_disk: Path, folder: Path) -> Path:
        path = folder / "x.qcow2"
        words = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", name]
        subprocess.run([*words, path, "1M"], check=True)
        return path

    return make


def external(_disk: Path, folder: Path) -> Path:
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data", "x.qcow2", "1M"]
    subprocess.run(words, check=True, cwd=folder)
    return folder / "x.qcow2"


def holding(content: bytes) -> Callable[[Path, Path], Path]:
    def make(_disk: Path, folder: Path) -> Path:
        path = folder / "x"
        path.write_bytes(content)
        return path

    return make


def cut_off(tool: str) -> Callable[[Path, Path], Path]:
    def make(disk: Path, folder: Path) -> Path:
        copy = folder / "disk.img"
        copy.write_bytes(disk.read_bytes())
        path = packed(copy, tool)
        os.truncate(path, path.stat().st_size * 2 // 3)
        return path

    return make


def cut_qcow2(disk: Path, folder: Path) -> Path:
    path = converted(disk, folder)
    os.truncate(path, path.stat().st_size // 2)
    return path


def greedy_xz(_disk: Path, folder: Path) -> Path:
    """A few bytes that ask for a dictionary of 1.5 GiB."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1536 << 20}]
    content = bytearray(lzma.compress(b"x" * 600, filters=[{**filters[0], "dict_size": 4096}]))
    header = bytearray(content[12:24])
    assert (
        header[2] == 0x21
    )  # the filter; its second property byte says how large the dictionary is
    header[4] = 40
    header[8:12] = struct.pack("<I", __import__("zlib").crc32(bytes(header[:8])))
    content[12:24] = header
    (folder / "x.xz").write_bytes(content)
    return folder / "x.xz"


def vmdk_on_another(disk: Path, folder: Path) -> Path:
    path = converted(disk, folder, form="vmdk")
    content = path.read_bytes().replace(b"parentCID=ffffffff", b"parentCID=12345678")
    path.write_bytes(content)
    return path


def vdi_on_another(disk: Path, folder: Path) -> Path:
    path = converted(disk, folder, form="vdi")
    content = bytearray(path.read_bytes())
    content[424 + 16 : 424 + 32] = b"u" * 16
    path.write_bytes(content)
    return path


HOSTILE: list[tuple[str, Callable[[Path, Path], Path], str]] = [
    ("a backing file outside", backed("/etc/shadow"), "backing file"),
    ("a backing file above", backed("../../etc/shadow"), "backing file"),
    ("a backing file by protocol", backed("nbd://10.0.0.1/x"), "backing file"),
    ("a backing file as json", backed('json:{"driver":"file","filename":"/etc/x"}'), "backing"),
    ("a name with a line feed", backed("a\nforebay: good"), "backing file"),
    ("data elsewhere", external, "in another file"),
    ("encrypted", put(32, "I", 2), "encrypted"),
    ("marked as corrupt", put(72, "Q", 2), "corrupt"),
    ("petabytes", put(24, "Q", 1 << 50), "tables|max-size"),
    ("all bits of the size", put(24, "Q", (1 << 64) - 1), "impossible size"),
    ("an unknown feature", put(72, "Q", 1 << 30), "not known"),
    ("tables behind the end", put_in_tables(True, 1 << 50), "cut off"),
    ("a table at an odd place", put_in_tables(True, 512), "damaged"),
    ("data behind the end", put_in_tables(False, 1 << 50), "cut off"),
    ("data at an odd place", put_in_tables(False, 512), "damaged"),
    ("clusters that are no streams", put_in_tables(False, 1 << 62 | 0x10000), "damaged"),
    ("packed clusters behind the end", put_in_tables(False, 1 << 62 | 1 << 50), "damaged"),
    ("cut off", cut_qcow2, "cut off"),
    ("gzip that is cut off", cut_off("gz"), "cut off"),
    ("xz that is cut off", cut_off("xz"), "cut off"),
    ("zstd that is cut off", cut_off("zst"), "cut off"),
    ("xz that wants memory", greedy_xz, "damaged|limit"),
    ("packed twice", holding(gzip.compress(gzip.compress(b"x" * 600))), "packed twice"),
    ("something behind a stream", holding(gzip.compress(b"x" * 600) + b"more"), "damaged"),
    ("nothing", holding(b""), "empty"),
    ("nothing, packed", holding(gzip.compress(b"")), "empty"),
    ("a web page", holding(b"<!DOCTYPE html>\n<html>"), "web page"),
    ("a zip archive", holding(b"PK\x03\x04" + bytes(600)), "unpack it"),
    ("a vmdk image without a header", holding(b"KDMV" + bytes(600)), "not a sound image"),
    (
        "a vmdk text",
        holding(b'# Disk DescriptorFile\nRW 1 FLAT "/etc/shadow" 0\n'.ljust(600)),
        "text",
    ),
    ("a vmdk image on another", vmdk_on_another, "differs from another"),
    (
        "a vdi image without a header",
        holding(bytes(64) + b"\x7f\x10\xda\xbe" + bytes(600)),
        "VDI of",
    ),
    ("a vdi image on another", vdi_on_another, "differs from another"),
    ("a vhdx image without a header", holding(b"vhdxfile" + bytes(600)), "not a sound image"),
    ("a qed image", holding(b"QED\0" + bytes(600)), "qed"),
]


@pytest.mark.parametrize(
    ("make", "text"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE]
)
def test_what_is_no_image_that_stands_for_itself_is_refused_with_one_line(
    bed: Bed, disk: Path, make: Callable[[Path, Path], Path], text: str
) -> None:
    told = bed.refused(make(disk, bed.folder))
    assert any(part in told for part in text.split("|")), told


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("images:../x", "leads out of its store"),
        ("images:/etc/x", "leads out of its store"),
        ("images:a/../../x", "leads out of its store"),
        ("images:", "a directory"),
        ("images:x.forebay", "Forebay's own"),
        ("images:x.forebay/y", "Forebay's own"),
        ("images:" + "x" * 300, "its name has 300 bytes: use at most 247"),
        ("images:no/such/folder", "folder that is there"),
        ("images:a\x1bb", "cannot name"),
        ("images:a\nb", "cannot name"),
        ("nowhere:x", "nowhere"),
        ("/etc/x", "in no store"),
        ("nbd://host/x", "nbd"),
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(bed: Bed, disk: Path, name: str, text: str) -> None:
    assert text in bed.refused(disk, name)


def test_a_link_in_the_store_leads_nowhere(bed: Bed, disk: Path) -> None:
    (bed.folder / "outside").mkdir()
    (bed.store / "link").symlink_to(bed.folder / "outside")
    (bed.store / "dangling").symlink_to(bed.folder / "outside" / "x")
    assert "link" in bed.refused(disk, "link/new", leaves=2)
    assert "is there already" in bed.refused(disk, "dangling", leaves=2)
    assert os.listdir(bed.folder / "outside") == []


def test_what_is_there_is_never_written_over(bed: Bed, disk: Path) -> None:
    (bed.store / "old").write_bytes(b"old")
    assert "is there already: choose another name" in bed.refused(disk, "old", leaves=1)
    assert (bed.store / "old").read_bytes() == b"old"


@pytest.mark.parametrize("source", ["no-such-file", ".", "/dev/zero"])
def test_a_source_that_is_no_file_is_refused(bed: Bed, source: str) -> None:
    bed.refused(source)


def test_a_pipe_is_not_waited_for(bed: Bed) -> None:
    os.mkfifo(bed.folder / "pipe")
    assert "not a regular file" in bed.refused(bed.folder / "pipe")


def test_another_checksum_is_refused_and_nothing_made(bed: Bed, disk: Path) -> None:
    for source in (disk, converted(disk, bed.folder)):
        told = bed.refused(source, "new", "--sha256", "0" * 64)
        assert hashlib.sha256(source.read_bytes()).hexdigest() in told


@pytest.mark.parametrize("option", ["--sha256=12", "--format=floppy", "--format=raw.rar"])
def test_an_option_that_means_nothing_is_wrong_usage(
    bed: Bed, disk: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bed.run(disk, "new", option)
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------- limits


def test_an_image_beyond_the_largest_size_is_refused(bed: Bed, disk: Path) -> None:
    copy = bed.folder / "disk.img"
    copy.write_bytes(disk.read_bytes())
    for source in (disk, converted(disk, bed.folder), packed(copy, "zst")):
        assert "--max-size" in bed.refused(source, "new", "--max-size", "11M")
    assert bed.imported(disk, "--max-size", "12M") == disk.read_bytes()


def test_a_bomb_is_refused_and_leaves_nothing(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FREELY", 4 * MIB)
    source = bed.folder / "bomb.xz"
    with lzma.open(source, "wb", preset=0) as file:
        for _ in range(64):
            file.write(b"x" * MIB)
    assert "made to fill a store" in bed.refused(source)
    assert bed.imported(source, "--max-size", "1G") == b"x" * 64 * MIB


def test_a_qcow2_image_whose_entries_all_lead_to_one_cluster_is_a_bomb(
    bed: Bed, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FREELY", 0)
    monkeypatch.setattr(limits, "RATIO", 2)

    def change(content: bytearray) -> None:
        (l1,) = struct.unpack_from(">Q", content, 40)
        l2 = struct.unpack_from(">Q", content, l1)[0] & 0xFFFFFFFFFFFE00
        used = [n for n in range(192) if struct.unpack_from(">Q", content, l2 + 8 * n)[0]]
        last = struct.unpack_from(">Q", content, l2 + 8 * used[0])[0] & 0xFFFFFFFFFFFE00
        for n in range(192):
            struct.pack_into(">Q", content, l2 + 8 * n, last)
        del content[last + 65536 :]

    assert "made to fill a store" in bed.refused(qcow2_of(change)(disk, bed.folder))


def test_a_store_without_room_is_told_before_anything_is_written(
    bed: Bed, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syscalls, "room", lambda _fd: (MIB, 100 * MIB))
    written: list[int] = []
    monkeypatch.setattr(SparseFile, "write", lambda *_: written.append(1))
    for source in (disk, converted(disk, bed.folder)):
        assert "make room there" in bed.refused(source)
    assert written == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_store_that_becomes_full_is_left_as_it_was(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "check_room", lambda *_: None)
    monkeypatch.setattr(work, "check_room", lambda *_: None)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "x", bed.store], check=True)
    try:
        source = bed.folder / "big.gz"
        source.write_bytes(gzip.compress(random.Random(1).randbytes(16 * MIB), 1))
        assert "make room there, and try again" in bed.refused(source)
    finally:
        subprocess.run(["umount", bed.store], check=True)


# -------------------------------------------------------------------------------------------------------- from the web


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def server(authority: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(web, "PAUSES", (0.0,) * 3)
    for name in (
        "https_proxy",
        "HTTPS_PROXY",
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    with serving(authority.parent, Web()) as found:
        yield found


def shapes(disk: Path, folder: Path) -> Iterator[bytes]:
    """The disk in each shape that takes a way of its own through the command."""
    copy = folder / "disk.img"
    copy.write_bytes(disk.read_bytes())
    yield disk.read_bytes()
    yield packed(copy, "zst").read_bytes()
    yield converted(disk, folder).read_bytes()
    yield converted(disk, folder, form="vmdk").read_bytes()
    yield packed(folder / "disk.qcow2", "gz").read_bytes()


def test_a_file_of_a_server_becomes_an_image_whatever_its_shape(
    bed: Bed, disk: Path, server: Web, authority: Path
) -> None:
    for content in shapes(disk, bed.folder):
        server.content = content
        assert bed.imported(server.url, "--cacert", str(authority)) == disk.read_bytes()
        (bed.store / "new").unlink()


def test_the_checksum_is_that_of_the_file_as_it_is_fetched(
    bed: Bed, disk: Path, server: Web, authority: Path
) -> None:
    for content in shapes(disk, bed.folder):
        server.content = content
        trusted = ("--cacert", str(authority), "--sha256")
        checksum = hashlib.sha256(content).hexdigest()
        assert bed.imported(server.url, *trusted, checksum) == disk.read_bytes()
        (bed.store / "new").unlink()
        assert checksum in bed.refused(server.url, "new", *trusted, "1" * 64)


def test_a_connection_that_breaks_is_made_again_and_goes_on(
    bed: Bed, disk: Path, server: Web, authority: Path
) -> None:
    for content in shapes(disk, bed.folder):
        third = len(content) // 3
        server.content, server.cuts, server.asked = content, [third, third], []
        assert bed.imported(server.url, "--cacert", str(authority)) == disk.read_bytes()
        assert server.asked == ["", f"bytes={third}-", f"bytes={2 * third}-"]
        (bed.store / "new").unlink()


def test_the_next_run_goes_on_where_one_that_was_left_alone_ended(
    bed: Bed, disk: Path, server: Web, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "PAUSES", ())
    for content in shapes(disk, bed.folder):
        half = len(content) // 2 // MIB * MIB
        server.content, server.cuts, server.asked = content, [half], []
        options = ("--cacert", str(authority))
        code, _, err = bed.run(server.url, "new", *options)
        assert code == 1
        assert "run the same command again" in err
        assert not (bed.store / "new").exists()
        code, _, err = bed.run(server.url, "new", *options)
        assert (code, "goes on where it was" in err) == (0, True)
        assert server.asked == ["", f"bytes={half}-"]
        assert bed.left() == ["new"]
        assert (bed.store / "new").read_bytes() == disk.read_bytes()
        (bed.store / "new").unlink()


STARTS_OVER: list[tuple[str, Callable[[Web], None]]] = [
    ("no ranges", lambda server: setattr(server, "ranges", False)),
    ("another file", lambda server: server.__dict__.update(tag='"two"', changed="later")),
    (
        "a file of another size",
        lambda server: setattr(server, "content", server.content + b"x" * 512),
    ),
    (
        "nothing that tells files apart",
        lambda server: server.__dict__.update(tag='W/"a"', changed=""),
    ),
]


@pytest.mark.parametrize("change", [row[1] for row in STARTS_OVER], ids=[x[0] for x in STARTS_OVER])
def test_what_cannot_be_gone_on_with_starts_over_and_says_so(
    bed: Bed,
    server: Web,
    authority: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Web], None],
) -> None:
    monkeypatch.setattr(web, "PAUSES", ())
    server.content, server.cuts = numbered(1024), [2 * MIB]
    options = ("--cacert", str(authority))
    assert bed.run(server.url, "new", *options)[0] == 1
    server.content = numbered(1024)[::-1]
    change(server)
    code, _, err = bed.run(server.url, "new", *options)
    assert (code, "starts over" in err) == (0, True)
    assert (bed.store / "new").read_bytes() == server.content


def test_a_file_that_changes_while_it_is_fetched_is_not_joined(
    bed: Bed, server: Web, authority: Path
) -> None:
    server.content, server.cuts = numbered(1024), [MIB]
    server.tag = server.changed = ""
    told = bed.refused(server.url, "new", "--cacert", str(authority), leaves=2)
    assert "does not say whether it has the same file still: run the same command again" in told


def test_a_server_that_begins_from_the_start_only_is_not_said_to_be_gone_on_with(
    bed: Bed, server: Web, authority: Path
) -> None:
    server.content, server.cuts, server.ranges = numbered(1024), [MIB], False
    told = bed.refused(server.url, "new", "--cacert", str(authority), leaves=2)
    assert "begins from the start only: run the same command again, which starts over" in told


@pytest.mark.parametrize("scheme", ["http", "ftp", "file"])
def test_a_redirection_leads_to_https_only(
    bed: Bed, server: Web, authority: Path, scheme: str
) -> None:
    server.statuses, server.location = [302], f"{scheme}://127.0.0.1/etc/passwd"
    for more in ((), ("--allow-http",)):
        server.statuses = [302]
        told = bed.refused(server.url, "new", "--cacert", str(authority), *more)
        assert "which is not https" in told or "is not allowed" in told


def test_a_redirection_to_https_is_followed_and_one_in_circles_is_not(
    bed: Bed, server: Web, authority: Path
) -> None:
    server.content, server.location = numbered(16), server.url
    server.statuses = [301, 307]
    assert bed.imported(server.url, "--cacert", str(authority)) == numbered(16)
    (bed.store / "new").unlink()
    server.statuses = [302] * 50
    told = bed.refused(server.url, "new", "--cacert", str(authority))
    assert "check the URL" in told
    assert "\\n" not in told


def test_only_http_is_for_those_who_say_so(bed: Bed) -> None:
    assert "is not https: say --allow-http" in bed.refused("http://127.0.0.1:1/x")
    assert "is not https: fetch it first" in bed.refused("ftp://127.0.0.1:1/x")


def test_a_server_that_nobody_vouches_for_is_refused(bed: Bed, server: Web) -> None:
    assert "--cacert" in bed.refused(server.url)


def test_http_is_for_those_who_say_so(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with serving(None, Web(numbered(16))) as plain:
        assert "--allow-http" in bed.refused(plain.url)
        assert bed.imported(plain.url, "--allow-http") == numbered(16)


ANSWERS: list[tuple[str, Callable[[Web], None], str]] = [
    ("not found", lambda server: setattr(server, "statuses", [404]), "404"),
    ("forbidden", lambda server: setattr(server, "statuses", [403]), "403"),
    ("packed unasked", lambda server: server.headers.update({"Content-Encoding": "br"}), "unasked"),
    ("without a length", lambda server: setattr(server, "length", False), "--sha256"),
    (
        "a part that was not asked for",
        lambda server: server.__dict__.update(cuts=[MIB], lie=512),
        "another part",
    ),
]


@pytest.mark.parametrize(
    ("change", "text"), [row[1:] for row in ANSWERS], ids=[row[0] for row in ANSWERS]
)
def test_an_answer_that_is_of_no_use_is_one_line(
    bed: Bed, server: Web, authority: Path, change: Callable[[Web], None], text: str
) -> None:
    server.content = numbered(1024)
    change(server)
    assert text in bed.refused(server.url, "new", "--cacert", str(authority))


def test_a_server_that_is_not_there_is_not_waited_for(
    bed: Bed, server: Web, authority: Path
) -> None:
    with serving(authority.parent, Web()) as gone:
        pass
    told = bed.refused(gone.url, "new", "--cacert", str(authority))
    assert "see that the server answers" in told


def test_a_server_that_is_busy_is_asked_again(bed: Bed, server: Web, authority: Path) -> None:
    server.content, server.statuses = numbered(16), [503, 429]
    assert bed.imported(server.url, "--cacert", str(authority)) == numbered(16)


@pytest.mark.parametrize(
    "url",
    [
        "https://",
        "https:///x",
        "https://host:99999/x",
        "https://user:secret@127.0.0.1/x",
        "https://host/a b",
        "https://host/\x1b[2J",
        "https://h\u00f6st/x",
        "ftp://host/x",
        "file:///etc/passwd",
        "https://host/" + "x" * 5000,
    ],
)
def test_what_is_no_url_is_refused(bed: Bed, url: str) -> None:
    assert "secret" not in bed.refused(url)


# ------------------------------------------------------------------------------------------------------------- its end


CHECKPOINTS = """
import sys, time
from forebay.importing import making
from forebay.importing import feed
making.CHECKPOINT = feed.CHECKPOINT = 1 << 20
note = making.Making._note_written
def slowly(self, end):
    note(self, end)
    print(end, flush=True)
    time.sleep(0.05)
making.Making._note_written = slowly
"""
INNER = """
import sys, time
from forebay.importing import making
unpacked = making.Making._unpacked_file
def slowly(self, content):
    found = unpacked(self, content)
    print(found.size, flush=True)
    time.sleep(60)
    return found
making.Making._unpacked_file = slowly
"""


@contextlib.contextmanager
def running(bed: Bed, *words: str, at: str = CHECKPOINTS) -> Iterator[subprocess.Popen[str]]:
    """The command as a process, which says a line at each checkpoint, of a mebibyte each, or where `at` says."""
    code = f"{at}\nfrom forebay.cli.main import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_what_is_on_record_and_what_has_a_name_is_durable(
    bed: Bed, disk: Path, server: Web, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record follows a sync of the file that it speaks of, and the name follows one of the image: in each way that
    the bytes may take."""
    for module in (feed, making):
        monkeypatch.setattr(module, "CHECKPOINT", MIB)
    steps: list[tuple[str, str]] = []

    def noted(name: str) -> None:
        call = getattr(syscalls, name)

        def made(*words: Any, **how: Any) -> Any:
            at = words[0]
            found = call(*words, **how)
            if isinstance(at, int):
                at = os.readlink(f"/proc/self/fd/{at}")
            steps.append((name, at.split(".")[-2] if at.endswith(".forebay") else at))
            return found

        monkeypatch.setattr(syscalls, name, made)

    for name in ("pwritev", "fdatasync", "fsync", "rename", "link"):
        noted(name)
    for content in shapes(disk, bed.folder):
        server.content = content
        steps.clear()
        assert bed.imported(server.url, "--cacert", str(authority)) == disk.read_bytes()
        (bed.store / "new").unlink()
        assert ("rename", "next") in steps
        for n, step in enumerate(steps):
            before = steps[:n]
            if step == ("rename", "next"):
                written = [x for x in before if x[1] == "next"]
                assert written[-2:] == [("pwritev", "next"), ("fsync", "next")]
            if step == ("link", "image"):
                assert [x for x in before if x[1] == "image"][-1] == ("fsync", "image")
                assert steps[n + 1] == ("fsync", str(bed.store))


def test_a_record_says_no_more_than_was_synced(
    bed: Bed, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (feed, making):
        monkeypatch.setattr(module, "CHECKPOINT", MIB)
    durable: list[int] = []
    written = [0]
    write, sync, save = SparseFile.write, SparseFile.sync, work.Work._save

    def writing(self: SparseFile, offset: int, data: bytes) -> None:
        write(self, offset, data)
        written[0] = offset + len(data)

    def syncing(self: SparseFile) -> None:
        before = written[0]
        sync(self)
        durable.append(before)

    def saving(self: work.Work) -> None:
        assert self.record.written <= max(durable, default=0)
        save(self)

    monkeypatch.setattr(SparseFile, "write", writing)
    monkeypatch.setattr(SparseFile, "sync", syncing)
    monkeypatch.setattr(work.Work, "_save", saving)
    assert bed.imported(converted(disk, bed.folder)) == disk.read_bytes()
    assert len(durable) > 3


def test_what_a_lost_host_left_behind_what_is_on_record_is_not_believed(
    bed: Bed, disk: Path
) -> None:
    source = converted(disk, bed.folder)
    with running(bed, *bed.words(source, "new")) as process:
        assert process.stdout is not None
        process.stdout.readline()
    (record,) = bed.store.glob("*.record.forebay")
    (image,) = bed.store.glob("*.image.forebay")
    written = json.loads(record.read_text())["written"]
    assert 0 < written < SIZE
    with image.open("r+b") as file:
        file.seek(written)
        file.write(b"x" * (SIZE - written))
    code, _, err = bed.run(source)
    assert (code, "goes on where it was" in err) == (0, True)
    assert (bed.store / "new").read_bytes() == disk.read_bytes()


def test_an_import_that_had_nothing_yet_says_that_it_starts_over(bed: Bed, disk: Path) -> None:
    source = packed(converted(disk, bed.folder), "zst")
    with running(bed, *bed.words(source, "new"), at=INNER) as process:
        assert process.stdout is not None
        process.stdout.readline()
    code, _, err = bed.run(source)
    assert (code, "starts over" in err) == (0, True)
    assert (bed.store / "new").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_import_that_is_ended_goes_on_in_the_next_run(
    bed: Bed, disk: Path, how: signal.Signals
) -> None:
    source = converted(disk, bed.folder)
    with running(bed, *bed.words(source, "new")) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.readline()
        process.send_signal(how)
        process.wait()
        told = process.stderr.read()
    assert process.returncode == (-9 if how is signal.SIGKILL else 1)
    if how is not signal.SIGKILL:
        assert "run the same command again" in told
        assert len(told.splitlines()) == 1
    assert not (bed.store / "new").exists()
    code, _, err = bed.run(source)
    assert (code, "goes on where it was" in err) == (0, True)
    assert (bed.store / "new").read_bytes() == disk.read_bytes()
    assert bed.left() == ["new"]


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_root_reads_the_source_and_the_daemons_user_does_the_rest(bed: Bed, disk: Path) -> None:
    """Which user may be one who cannot read our modules: all is imported before."""
    for folder in (*bed.folder.parents, bed.folder):
        if folder != Path("/") and folder.stat().st_uid == 0:
            folder.chmod(folder.stat().st_mode | 0o055)
    source = packed(converted(disk, bed.folder), "zst")
    source.chmod(0o600)
    for path in (bed.store, bed.folder / "state"):
        os.chown(path, DAEMON, DAEMON)
    code = (
        "import os, sys; from forebay.importing import run; become, before = run.become_owner, []\n"
        "def becoming(*words):\n    become(*words); before.extend(sys.modules)\n"
        "run.become_owner = becoming\n"
        "from forebay.cli.main import main; code = main(sys.argv[1:])\n"
        "print(code, os.getresuid(), sorted(set(sys.modules) - set(before)), file=sys.stderr)"
    )
    told = at_a_terminal([sys.executable, "-c", code, *bed.words(source, "new")])
    assert f"0 ({DAEMON}, {DAEMON}, {DAEMON}) []" in told
    assert (bed.store / "new").read_bytes() == disk.read_bytes()
    assert (bed.store / "new").stat().st_uid == DAEMON


def at_a_terminal(words: list[str]) -> str:
    """What a program says at a terminal."""
    ours, its = os.openpty()
    with subprocess.Popen(words, stdout=its, stderr=its):
        os.close(its)
        told = b""
        with contextlib.suppress(OSError):  # EIO: nobody has it open any more
            while part := os.read(ours, 65536):
                told += part
    os.close(ours)
    return told.decode()


def test_a_folder_that_the_daemons_user_may_not_write_to_is_told(
    bed: Bed, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(work, "open_folder_of", refused)
    assert "let the user" in bed.refused(disk)


def test_two_imports_of_one_name_do_not_meet(bed: Bed, disk: Path) -> None:
    source = converted(disk, bed.folder)
    with running(bed, *bed.words(source, "new")) as process:
        assert process.stdout is not None
        process.stdout.readline()
        code, _, err = bed.run(source)
        assert (code, "being imported by another command" in err) == (1, True)
        process.communicate()
    assert process.returncode == 0
    assert (bed.store / "new").read_bytes() == disk.read_bytes()


def test_a_file_that_has_become_somebodys_image_meanwhile_is_not_gone_on_with(
    bed: Bed, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another import ends between our open and our lock: what we have open is the image that it has made."""
    opened, others = work.Work._opened, [Bed.run]

    def opening(self: work.Work, kind: str) -> int:
        fd = opened(self, kind)
        if others:
            assert others.pop()(bed, disk)[0] == 0
            (bed.store / "new").rename(bed.store / "made")
        return fd

    monkeypatch.setattr(work.Work, "_opened", opening)
    other = bed.folder / "other"
    other.write_bytes(numbered(512))
    assert bed.run(other)[0] == 0
    assert (bed.store / "made").read_bytes() == disk.read_bytes()
    assert (bed.store / "new").read_bytes() == numbered(512)


def test_what_a_kill_has_left_is_dropped_where_the_source_was_changed_or_it_is_asked_for(
    bed: Bed, disk: Path
) -> None:
    for again in ("", "--restart"):
        source = converted(disk, bed.folder)
        with running(bed, *bed.words(source, "new")) as process:
            assert process.stdout is not None
            process.stdout.readline()
        expected = disk
        if not again:
            expected = bed.folder / "other.raw"
            expected.write_bytes(numbered(512))
            source.unlink()
            converted(expected, bed.folder)
        code, _, err = bed.run(source, "new", *filter(None, [again]))
        assert code == 0
        assert ("starts over" in err) == (not again)
        assert (bed.store / "new").read_bytes() == expected.read_bytes()
        (bed.store / "new").unlink()
        source.unlink()


def test_a_kill_between_the_two_names_of_an_image_leaves_one_to_the_next_run(
    bed: Bed, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = syscalls.link

    def killed(*words: Any, **how: Any) -> None:
        link(*words, **how)
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(syscalls, "link", killed)
        patched.setattr(work.Work, "drop", lambda _: None)
        with pytest.raises(SystemExit):
            bed.run(disk)
    assert (bed.store / "new").stat().st_nlink == 2
    code, _, err = bed.run(disk)
    assert (code, "is whole" in err) == (1, True)
    assert (bed.store / "new").stat().st_nlink == 1
    assert bed.left() == ["new"]


def test_what_others_planted_under_our_names_is_not_written_to(bed: Bed, disk: Path) -> None:
    victim = bed.folder / "victim"
    victim.write_bytes(b"precious")
    with running(bed, *bed.words(disk, "new")) as process:
        assert process.stdout is not None
        process.stdout.readline()
    names = bed.left()
    assert len(names) == 2
    for plant in (os.link, os.symlink):
        for name in names:
            (bed.store / name).unlink(missing_ok=True)
            plant(victim, bed.store / name)
        assert bed.imported(disk) == disk.read_bytes()
        assert victim.read_bytes() == b"precious"
        (bed.store / "new").unlink()


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"[" * 9999, b'{"fetched": -1}', b'{"written": 1e99}', b'{"more": 1}',
     b'{"source": {}, "format": "raw", "fetched": 99999999999, "written": 18446744073709551616}'],
)  # fmt: skip
def test_a_record_that_is_none_is_not_believed(bed: Bed, disk: Path, text: bytes) -> None:
    with running(bed, *bed.words(disk, "new")) as process:
        assert process.stdout is not None
        process.stdout.readline()
    (record,) = bed.store.glob("*.record.forebay")
    record.write_bytes(text)
    assert bed.imported(disk) == disk.read_bytes()


def test_what_a_host_has_left_for_a_week_is_removed_and_nothing_else(bed: Bed, disk: Path) -> None:
    ours = [f".{'a' * 32}{kind}.forebay" for kind in (".image", ".source", ".record")]
    others = [f".{'a' * 32}.forebay", "x.image", f".{'b' * 32}.image.forebay"]
    for name in (*ours, *others):
        (bed.store / name).write_bytes(b"")
        age = 0 if "b" * 32 in name else 8 * 86400
        os.utime(bed.store / name, (time.time() - age,) * 2)
    assert bed.run(disk)[0] == 0
    assert bed.left() == sorted([*others, "new"])


def test_a_source_that_changes_meanwhile_is_refused(
    bed: Bed, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = bed.folder / "disk.img"
    copy.write_bytes(disk.read_bytes())
    written = SparseFile.write

    def writing(self: SparseFile, offset: int, data: bytes) -> None:
        with copy.open("r+b") as file:
            file.write(b"changed")
        written(self, offset, data)

    monkeypatch.setattr(SparseFile, "write", writing)
    assert "was changed while it was read" in bed.refused(copy)
