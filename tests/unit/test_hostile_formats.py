# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Images that whoever wrote to a store may have made: each is refused with one line, before QEMU sees it.

What is refused here would have its reader open other files, talk to the network, or take memory without bound.
"""

import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from forebay.config.model import Config
from forebay.errors import ForebayError
from forebay.origin.addresses import Address, FileAddress, in_format, resolve
from forebay.origin.virtual.chain import MOST_FILES, close_all, look_at, open_chain

MIB = 1 << 20
Change = Callable[[bytearray], None]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Two stores, and a secret beside them."""
    (tmp_path / "secret").write_bytes(b"s" * MIB)
    for name in ("images", "others"):
        (tmp_path / name).mkdir()
    stores = {name: {"path": str(tmp_path / name)} for name in ("images", "others")}
    return Config.model_validate({"stores": stores})


@pytest.fixture
def images(config: Config) -> Path:
    return config.store("images").path


def make(path: Path, image_format: str = "qcow2", *options: str, size: str = "8M") -> Path:
    path.parent.mkdir(exist_ok=True)
    words = ["qemu-img", "create", "-q", "-u", "-f", image_format, *options, str(path), size]
    subprocess.run(words, check=True, cwd=path.parent)
    return path


def change(path: Path, *changes: tuple[int, bytes]) -> Path:
    with path.open("r+b") as file:
        for at, data in changes:
            file.seek(at)
            file.write(data)
    return path


def opened(config: Config, text: str, image_format: str = "qcow2", *, writes: bool = False) -> int:
    """How many files the chain of an image has. Raises ForebayError where one of them is refused."""
    address = in_format(resolve(config, text), image_format)
    assert isinstance(address, FileAddress)

    def locate(path: str) -> Address:
        return resolve(config, path)

    chain = open_chain(address, read_only=not writes, admitted=False, locate=locate)
    close_all(chain)
    return len(chain)


def refused(
    config: Config, text: str, image_format: str, why: str, *, writes: bool = False
) -> None:
    """See that the image is refused, in one line that says what to do, with no descriptor left open."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ForebayError, match=why) as told:
        opened(config, text, image_format, writes=writes)
    line = str(told.value)
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert ": " in line
    assert os.listdir("/proc/self/fd") == before


# --------------------------------------------------------------------------------------------- what names other files

NAMES = [
    ("an absolute path outside", "{tmp}/secret", "in no store"),
    ("a system file", "/etc/passwd", "in no store"),
    ("a path that leads out", "../secret", "in no store"),
    ("a path that leads out further on", "sub/../../secret", "in no store"),
    ("a device", "/dev/vda", "in no store"),
    ("a process's file", "/proc/self/mem", "in no store"),
    ("json", 'json:{{"driver":"file","filename":"/etc/passwd"}}', "no file in a store"),
    ("json of a server", 'json:{{"driver":"nbd","host":"10.0.0.1"}}', "no file in a store"),
    ("nbd", "nbd:unix:/run/docker.sock", "no file in a store"),
    ("an nbd uri", "nbd://10.0.0.1/x", "no file in a store"),
    ("http", "http://169.254.169.254/latest", "no file in a store"),
    ("ssh", "ssh://root@host/etc/shadow", "no file in a store"),
    ("file", "file:/etc/passwd", "no file in a store"),
    ("fat", "fat:/etc", "no file in a store"),
    ("host device", "host_device:/dev/vda", "no file in a store"),
    ("fd set", "/dev/fdset/1", "in no store"),
    ("our own files", "a.qcow2.forebay/1/owner", "in no store"),
    ("a control character", "b\x1b[2Jase", "no name that can be read"),
    ("a file that is not there", "none.raw", "no such image"),
    ("a symbolic link that leads out", "link.raw", "symbolic link"),
    ("a directory", "folder.raw", "is a directory"),
    ("a pipe", "pipe.raw", "not a regular file"),
]


@pytest.mark.parametrize(("name", "why"), [x[1:] for x in NAMES], ids=[x[0] for x in NAMES])
def test_an_image_that_lies_on_what_is_no_image_of_a_store_is_refused(
    config: Config, images: Path, tmp_path: Path, name: str, why: str
) -> None:
    (images / "link.raw").symlink_to(tmp_path / "secret")
    (images / "folder.raw").mkdir()
    os.mkfifo(images / "pipe.raw")
    written = name.format(tmp=tmp_path).encode()
    path = make(images / "a.qcow2", "qcow2", "-b", "x" * len(written), "-F", "raw")
    at = struct.unpack(">Q", path.read_bytes()[8:16])[0]
    change(path, (at, written))
    refused(config, "images:a.qcow2", "qcow2", why)


def test_a_chain_within_the_stores_is_followed(config: Config, images: Path) -> None:
    make(images / "sub" / "base.qcow2")
    (config.store("others").path / "base.raw").write_bytes(b"b" * MIB)
    make(images / "relative.qcow2", "qcow2", "-b", "sub/base.qcow2", "-F", "qcow2")
    make(images / "sub" / "up.qcow2", "qcow2", "-b", "../relative.qcow2", "-F", "qcow2")
    make(
        images / "abs.qcow2",
        "qcow2",
        "-b",
        str(config.store("others").path / "base.raw"),
        "-F",
        "raw",
    )
    assert opened(config, "images:relative.qcow2") == 2
    assert opened(config, "images:sub/up.qcow2") == 3
    assert opened(config, "images:abs.qcow2") == 2


def test_a_chain_that_comes_back_to_itself_is_refused(config: Config, images: Path) -> None:
    make(images / "a.qcow2", "qcow2", "-b", "b.qcow2", "-F", "qcow2")
    make(images / "b.qcow2", "qcow2", "-b", "a.qcow2", "-F", "qcow2")
    refused(config, "images:a.qcow2", "qcow2", "lies on itself")
    os.link(images / "a.qcow2", images / "c.qcow2")
    refused(config, "images:c.qcow2", "qcow2", "lies on itself")


def test_a_chain_that_is_too_long_is_refused(config: Config, images: Path) -> None:
    make(images / "0.qcow2")
    for n in range(1, MOST_FILES + 1):
        make(images / f"{n}.qcow2", "qcow2", "-b", f"{n - 1}.qcow2", "-F", "qcow2")
    assert opened(config, f"images:{MOST_FILES - 1}.qcow2") == MOST_FILES
    refused(config, f"images:{MOST_FILES}.qcow2", "qcow2", "more than")


def test_the_format_of_a_backing_file_is_never_guessed(config: Config, images: Path) -> None:
    """A guest of the raw disk below may write the header of an image that lies on somebody else's."""
    make(images / "base", "qcow2")
    path = make(images / "a.qcow2", "qcow2", "-b", "base", "-F", "raw")
    assert opened(config, "images:a.qcow2") == 2
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack(">II", 0xE2792ACA, 3))
    change(path, (at, struct.pack(">II", 0x6803F857, 3)))
    refused(config, "images:a.qcow2", "qcow2", "does not say of which format")
    change(path, (at, struct.pack(">II", 0xE2792ACA, 3) + b"ssh"))
    refused(config, "images:a.qcow2", "qcow2", "which is not served")


# ------------------------------------------------------------------------------------------------- what cannot be

QCOW2 = [
    ("encrypted", 32, ">I", 1, "encrypted"),
    ("a data file elsewhere", 72, ">Q", 4, "in another file"),
    ("marked as corrupt", 72, ">Q", 2, "corrupt"),
    ("of a newer QEMU", 72, ">Q", 1 << 30, "not known"),
    ("of version 1", 4, ">I", 1, "version 1"),
    ("clusters of 2^40 bytes", 20, ">I", 40, "clusters"),
    ("an L1 table of 32 GiB", 36, ">I", 0xFFFFFFFF, "tables"),
    ("an L1 table behind the end", 40, ">Q", 1 << 50, "table of tables"),
    ("a refcount table of 256 TiB", 56, ">I", 0xFFFFFFFF, "refcount table"),
    ("no refcount table", 56, ">I", 0, "refcount table"),
    ("a refcount table in the header", 48, ">Q", 0, "refcount table lies"),
    ("a refcount table behind the end", 48, ">Q", 1 << 50, "refcount table lies"),
    ("reference counts of 2^60 bits", 96, ">I", 60, "reference counts"),
    ("four thousand million snapshots", 60, ">I", 0xFFFFFFFF, "snapshots"),
    ("snapshots behind the end", 60, ">I", 9, "snapshots"),
    ("a disk of 2^63 bytes", 24, ">Q", 1 << 63, "impossible size"),
    ("a disk of nothing", 24, ">Q", 0, "its virtual disk has 0 bytes"),
    ("a disk of an odd size", 24, ">Q", 1000, "its virtual disk has 1000 bytes"),
    ("a backing file's name of 4 GiB", 16, ">I", 0xFFFFFFFF, "backing file's name"),
    ("an extension of 4 GiB", 116, ">I", 0xFFFFFFFF, "cut off"),
]


@pytest.mark.parametrize("row", QCOW2, ids=[row[0] for row in QCOW2])
def test_a_qcow2_image_that_cannot_be_is_refused(
    config: Config, images: Path, row: tuple[str, int, str, int, str]
) -> None:
    _, at, form, value, why = row
    path = make(images / "a.qcow2", "qcow2", "-b", "base.raw", "-F", "raw")
    (images / "base.raw").write_bytes(bytes(MIB))
    change(path, (at, struct.pack(form, value)))
    refused(config, "images:a.qcow2", "qcow2", why)


def test_a_disk_that_is_too_large_is_refused(config: Config, images: Path) -> None:
    make(images / "a.qcow2", "qcow2", "-o", "cluster_size=2M", size="65T")
    refused(config, "images:a.qcow2", "qcow2", "64 TiB")


def test_an_image_with_bitmaps_is_only_read(config: Config, images: Path) -> None:
    path = make(images / "a.qcow2")
    subprocess.run(["qemu-img", "bitmap", "--add", str(path), "b0"], check=True)
    assert opened(config, "images:a.qcow2") == 1
    refused(config, "images:a.qcow2", "qcow2", "bitmaps", writes=True)


DELTAS = [
    ("vdi of a snapshot", "vdi", [(76, struct.pack("<I", 4))], "differs from another"),
    ("vdi with a parent", "vdi", [(440, b"\x01" * 16)], "differs from another"),
    ("vdi of a newer version", "vdi", [(68, b"\xff" * 4)], "version"),
    ("vdi with blocks of 4 GiB", "vdi", [(376, b"\xff" * 4)], "blocks have"),
    ("vdi with too few blocks", "vdi", [(384, b"\0" * 4)], "blocks for"),
    ("vdi with a map of 16 GiB", "vdi", [(384, b"\xff" * 4)], "blocks for"),
    ("vdi with a map behind its end", "vdi", [(340, struct.pack("<II", 1 << 30, 1 << 31))], "map"),
    ("vdi of 2^60 bytes", "vdi", [(368, struct.pack("<Q", 1 << 60))], "blocks for"),
    ("vmdk that is only a text", "vmdk", [(12, bytes(8))], "names other files"),
    ("vmdk with a parent", "vmdk", [(512, b"parentFileNameHint=/etc/passwd\n")], "differs from"),
    ("vmdk of extents", "vmdk", [(512, b'createType="twoGbMaxExtentSparse"\n\0')], "other files"),
    ("vmdk on a device", "vmdk", [(512, b'createType="fullDevice"\n\0')], "other files"),
    ("vmdk with grains of 1 TiB", "vmdk", [(20, struct.pack("<Q", 1 << 31))], "grains"),
    ("vmdk with no grain tables", "vmdk", [(44, bytes(4))], "grain tables"),
    ("vmdk with a text of 1 TiB", "vmdk", [(36, struct.pack("<Q", 1 << 31))], "descriptor has"),
    ("vmdk of 2^60 bytes", "vmdk", [(12, struct.pack("<Q", 1 << 51))], "virtual disk has"),
    ("vmdk whose end is missing", "vmdk", [(56, b"\xff" * 8)], "version 0"),
    ("vhdx with a parent", "vhdx", "parent", "differs from another"),
    ("vhdx without a region table", "vhdx", [(192 << 10, bytes(4))], "region table"),
    ("vhdx with no end of regions", "vhdx", [((192 << 10) + 8, b"\xff" * 4)], "region table"),
    ("vhdx with regions behind its end", "vhdx", "far", "beyond its end"),
    ("vhdx of 2^60 bytes", "vhdx", "huge", "virtual disk has"),
    ("vhdx with blocks of nothing", "vhdx", "blocks", "blocks have"),
]


def vhdx(path: Path, how: str) -> list[tuple[int, bytes]]:
    """What to change in a VHDX image."""
    content = path.read_bytes()
    table = 192 << 10
    regions = [struct.unpack_from("<16sQII", content, table + 16 + 32 * n) for n in range(2)]
    n, at = next((n, at) for n, (_, at, _, _) in enumerate(regions) if content[at:][:4] == b"meta")
    if how == "far":
        return [(table + 16 + 32 * n + 16, struct.pack("<Q", 1 << 50))]
    items = [struct.unpack_from("<16sII", content, at + 32 + 32 * k) for k in range(5)]
    parameters = next(at + offset for guid, offset, _ in items if guid[:4] == b"\x37\x67\xa1\xca")
    size = next(at + offset for guid, offset, _ in items if guid[:4] == b"\x24\x42\xa5\x2f")
    return {
        "parent": [(parameters + 4, struct.pack("<I", 2))],
        "blocks": [(parameters, bytes(4))],
        "huge": [(size, struct.pack("<Q", 1 << 60))],
    }[how]


@pytest.mark.parametrize("row", DELTAS, ids=[row[0] for row in DELTAS])
def test_an_image_of_another_format_that_cannot_be_or_names_others_is_refused(
    config: Config, images: Path, row: tuple[str, str, list[tuple[int, bytes]] | str, str]
) -> None:
    _, image_format, changes, why = row
    path = make(images / f"a.{image_format}", image_format)
    assert opened(config, f"images:{path.name}", image_format) == 1
    change(path, *(vhdx(path, changes) if isinstance(changes, str) else changes))
    refused(config, f"images:{path.name}", image_format, why)


def test_a_text_that_names_other_files_is_refused(config: Config, images: Path) -> None:
    text = '# Disk DescriptorFile\ncreateType="monolithicFlat"\nRW 2048 FLAT "/etc/passwd" 0\n'
    (images / "a.vmdk").write_text(text.ljust(1024))
    refused(config, "images:a.vmdk", "vmdk", "only a text")


def test_a_streamed_vmdk_is_only_read(config: Config, images: Path) -> None:
    (images.parent / "raw").write_bytes(b"a" * MIB)
    words = ["qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized"]
    subprocess.run([*words, str(images.parent / "raw"), str(images / "a.vmdk")], check=True)
    assert opened(config, "images:a.vmdk", "vmdk") == 1
    refused(config, "images:a.vmdk", "vmdk", "compressed", writes=True)


@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_every_cut_of_an_image_is_refused_or_understood(
    config: Config, images: Path, image_format: str
) -> None:
    whole = make(images / "whole", image_format).read_bytes()
    path = images / f"a.{image_format}"
    for length in (1, 3, 4, 8, 63, 71, 72, 100, 104, 105, 300, 511, 512, 513, 1024, 65535, 196608):
        path.write_bytes(whole[:length])
        try:
            assert opened(config, f"images:{path.name}", image_format) == 1
        except ForebayError as fault:
            assert len(str(fault).splitlines()) == 1  # noqa: PT017  (either is right)


@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_an_image_with_any_bytes_changed_is_refused_in_one_line_or_understood(
    tmp_path: Path, rng: random.Random, image_format: str
) -> None:
    options = ("-b", "base.raw", "-F", "raw") if image_format == "qcow2" else ()
    path = make(tmp_path / "whole", image_format, *options)
    whole = path.read_bytes()
    places = [*range(600)] if image_format != "vhdx" else [*range(600), *range(192 << 10, 197000)]
    fd = os.open(path, os.O_RDWR)
    for _ in range(500):
        at = rng.choice(places)
        data = rng.choice((b"\xff", b"\0", b"\xff" * 8, b"\0" * 8, rng.randbytes(4)))
        os.pwrite(fd, data, at)
        try:
            look_at("images:a", fd, len(whole), image_format)
        except ForebayError as fault:
            assert str(fault).isprintable()  # noqa: PT017  (either is right)
        os.pwrite(fd, whole[at : at + len(data)], at)
    os.close(fd)
