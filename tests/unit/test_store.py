# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

import os
from pathlib import Path

import pytest

from forebay.config.model import Config
from forebay.errors import ForebayError
from forebay.origin.addresses import DeviceAddress, FileAddress, NbdAddress, parse_nbd, resolve
from forebay.origin.calls import SystemCalls
from forebay.origin.opening import look, open_device, open_image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("images/vm.img", "images/deep/vm.img", "other/secret.img"):
        (tmp_path / name).write_bytes(b"x" * 4096)
    return tmp_path


@pytest.fixture
def config(root: Path) -> Config:
    return Config.model_validate(
        {
            "stores": {
                "images": {"path": str(root / "images")},
                "deep": {"path": str(root / "images" / "deep")},
            },
            "origins": {
                "nbd": ["nbd://storage*/vm-*", "nbd+unix:///*?socket=/run/nbd/*.sock"],
                "devices": ["/dev/vg1/vm-*"],
            },
        }
    )


def file_image(root: Path, path: str) -> FileAddress:
    return FileAddress("images", root / "images", path)


# ------------------------------------------------------------------------------------- resolving text


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("images:vm.img", "images:vm.img"),
        ("images:./deep//vm.img", "images:deep/vm.img"),
        ("deep:vm.img", "deep:vm.img"),
        ("{root}/images/vm.img", "images:vm.img"),
        ("{root}/images/deep/vm.img", "deep:vm.img"),
        ("{root}//images/../images/vm.img", "images:vm.img"),
        ("images:not/there/yet.img", "images:not/there/yet.img"),
        ("images:a b:c.img", "images:a b:c.img"),
        ("/dev/vg1/vm-7", "/dev/vg1/vm-7"),
        ("nbd://storage1/vm-7", "nbd://storage1/vm-7"),
        ("nbd://STORAGE1:10809/vm-7", "nbd://storage1/vm-7"),
        ("nbd+unix:///a/b?socket=/run/nbd/x.sock", "nbd+unix:///a/b?socket=/run/nbd/x.sock"),
    ],
)
def test_what_an_image_is_called(config: Config, root: Path, text: str, key: str) -> None:
    assert resolve(config, text.format(root=root)).key == key


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot name an image"),
        ("images:vm\n.img", "cannot name an image"),
        ("images:vm\0.img", "cannot name an image"),
        ("vm.img", "write STORE:vm.img"),
        ("imags:vm.img", "did you mean 'images'"),
        ("images:", "names a directory"),
        ("images:.", "names a directory"),
        ("images:../other/secret.img", "leads out of its store"),
        ("images:deep/../../other/secret.img", "leads out of its store"),
        ("images:/etc/passwd", "leads out of its store"),
        ("images:vm.img.forebay/owner", "Forebay's own files"),
        ("{root}/images", "names a directory"),
        ("{root}/images/../other/secret.img", "is in no store"),
        ("{root}/imagesx/vm.img", "is in no store"),
        ("/etc/passwd", "is in no store"),
        ("/dev/sda", 'devices = ["/dev/sda"]'),
        ("/dev/vg1/../sda", 'devices = ["/dev/sda"]'),
        ("nbd://elsewhere/vm-7", "may not be attached"),
        ("nbd://storage1/private", "may not be attached"),
        ("nbd://evil/storage1/vm-7", "may not be attached"),
        ("nbd://storage1/x/vm-7", "may not be attached"),
        ("nbds://storage1/vm-7", "nbds: is not served"),
        ("nbd+ssh://-oProxyCommand=x/vm-7", "nbd+ssh: is not served"),
        ("nbd://-oProxyCommand=x/vm-7", "not an NBD URI"),
        ("nbd://storage1:99999/vm-7", "not an NBD URI"),
        ("nbd://storage1/vm-7?x=1", "not an NBD URI"),
        ("nbd:unix:/run/x.sock", "not an NBD URI"),
        ("nbd+unix:///a", "not an NBD URI"),
        ("nbd+unix:///a?socket=/evil.sock&x=?socket=/run/nbd/x.sock", "not an NBD URI"),
        ("nbd+unix:///a?socket=/evil.sock%3Fsocket=/run/nbd/x.sock", "may not be attached"),
        ("nbd+unix:///a?socket=/tmp/x.sock", "may not be attached"),
    ],
)
def test_what_is_refused(config: Config, root: Path, text: str, says: str) -> None:
    with pytest.raises(ForebayError) as refused:
        resolve(config, text.format(root=root))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nbd+unix:///x?socket=/run/a#1", "a # in a name is written %23"),
        ("nbd+unix:///x?socket=/run/a#", "a # in a name is written %23"),
        ("nbd+unix:///x#?socket=/run/a", "a # in a name is written %23"),
        ("nbd+unix:///x?socket=/run/a?#", "a # in a name is written %23"),
        ("nbd://host/x#1", "a # in a name is written %23"),
        ("nbd://host/x#", "a # in a name is written %23"),
        ("nbd://host/x?", "no host and export"),
        ("nbd://me@host/x", "it has a user"),
        ("nbd://me:word@host/x", "it has a user"),
        ("nbd+unix://me@/x?socket=/run/a", "it has a user"),
        ("nbd+unix://host/x?socket=/run/a", "one socket has to follow"),
        ("nbd+unix:///x?socket=/run/a&socket=/run/b", "one socket has to follow"),
        ("nbd+unix:///x?socket=/run/a&tls-psk-file=/k", "one socket has to follow"),
        ("nbd+unix:///x?socket=/run/a;socket=/run/b", "one socket has to follow"),
        ("nbd+unix:///x?tls-certificates=/c&socket=/run/a", "one socket has to follow"),
        ("nbd+unix:///x?Socket=/run/a", "one socket has to follow"),
        ("nbd+unix:///x?socket=", "one socket has to follow"),
        ("nbd+unix:x?socket=/run/a", "one socket has to follow"),
        ("nbd+unix:///x?socket=run/a", "does not begin with /"),
        ("nbd+unix:///x?socket=/run/a%00b", "the socket has a zero byte"),
        ("nbd+unix:///x%00?socket=/run/a", "the export has a zero byte"),
        ("nbd://host/x%00", "the export has a zero byte"),
        ("nbd+unix:///x?socket=/run/%ff", "invalid start byte"),
        ("nbd://host/%ff", "invalid start byte"),
        ("nbd://host/50%", "% itself is written %25"),
        ("nbd+unix:///x?socket=/run/%zz", "% itself is written %25"),
        ("nbd+unix:///x?socket=/" + 107 * "a", "the socket has more than 107 bytes"),
        ("nbd://host/" + 4097 * "a", "the export has more than 4096 bytes"),
        ("nbd://host:0/x", "there is no port 0"),
        ("nbd://host:65536/x", "there is no port 65536"),
        ("nbd://host:" + 5000 * "9" + "/x", "there is no port"),
        ("nbd://host:-1/x", "no host and export"),
        ("nbd://host:1:2/x", "no host and export"),
        ("nbd://a[::1]:1/x", "no host and export"),
        ("nbd://[::1]a:1/x", "no host and export"),
        ("nbd://ho\tst/x", "no host and export"),
        ("nbd:///x", "no host and export"),
        ("nbd:host/x", "no host and export"),
    ],
)
def test_no_part_of_an_nbd_uri_is_passed_over(text: str, says: str) -> None:
    with pytest.raises(ForebayError, match="is not an NBD URI") as refused:
        parse_nbd(text)
    assert says in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("text", "image"),
    [
        ("nbd://host", NbdAddress("", host="host")),
        ("NBD://Host:/X", NbdAddress("X", host="host")),
        ("nbd://host:65535//x", NbdAddress("/x", host="host", port=65535)),
        ("nbd://[FE80::1]:1/", NbdAddress("", host="fe80::1", port=1)),
        ("nbd+unix://?socket=/run/a", NbdAddress("", socket="/run/a")),
        ("nbd+unix:///a+b%20c?socket=%2Frun/a+b%231?=", NbdAddress("a+b c", socket="/run/a+b#1?=")),
    ],
)
def test_what_an_nbd_uri_means(text: str, image: NbdAddress) -> None:
    assert parse_nbd(text) == image


def test_the_key_of_an_nbd_image_reads_back_as_the_same_image() -> None:
    for image in (
        NbdAddress("a b/ü?&#", host="10.0.0.1", port=1),
        NbdAddress("", host="fe80::1"),
        NbdAddress("x", socket="/run/a b?c&d=e#f.sock"),
    ):
        assert parse_nbd(image.key) == image


def test_a_server_that_is_matched_by_its_name_is_not_matched_by_an_export_with_that_name() -> None:
    config = Config.model_validate({"origins": {"nbd": ["nbd://*.storage/vm"]}})
    assert resolve(config, "nbd://a.storage/vm").key == "nbd://a.storage/vm"
    with pytest.raises(ForebayError):
        resolve(config, "nbd://evil/x.storage/vm")


# ------------------------------------------------------------------------------------------- opening


def test_an_image_is_opened_with_its_size(root: Path) -> None:
    opened = open_image(file_image(root, "deep/vm.img"), read_only=False)
    assert (opened.size, opened.read_only, opened.sector) == (4096, False, 1)
    found = opened.look()
    assert found.inode == os.fstat(opened.fd).st_ino
    os.close(opened.fd)


def test_the_name_is_looked_up_again(root: Path) -> None:
    image = file_image(root, "vm.img")
    opened = open_image(image, read_only=True)
    os.rename(root / "other" / "secret.img", root / "images" / "vm.img")
    assert look(image, SystemCalls()).inode != os.fstat(opened.fd).st_ino
    os.close(opened.fd)


def link_out(images: Path) -> None:
    (images / "x.img").symlink_to("../other/secret.img")


def link_inside(images: Path) -> None:
    (images / "x.img").symlink_to("vm.img")


def folder_link(images: Path) -> None:
    (images / "x.img").symlink_to(images.parent / "other")


@pytest.mark.parametrize(
    ("make", "path", "says"),
    [
        (link_out, "x.img", "symbolic link"),
        (link_inside, "x.img", "symbolic link"),
        (folder_link, "x.img/secret.img", "symbolic link"),
        (lambda images: None, "none.img", "no such image"),
        (lambda images: None, "vm.img/none.img", "no such image"),
        (lambda images: None, "n" * 300, "no such image"),
        (lambda images: None, "deep", "is a directory"),
        (lambda images: os.mkfifo(images / "x.img"), "x.img", "not a regular file"),
        (lambda images: (images / "x.img").touch(), "x.img", "is empty"),
        (lambda images: os.link(images / "vm.img", images / "x.img"), "x.img", "hard links"),
        (lambda images: (images / "x.img").write_bytes(b"QFI\xfb\0\0\0\3"), "x.img", "qcow2"),
        (lambda images: (images / "x.img").write_bytes(b"KDMV\1\0\0\0"), "x.img", "vmdk"),
    ],
)
def test_what_is_not_opened(root: Path, make: object, path: str, says: str) -> None:
    assert callable(make)
    make(root / "images")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ForebayError, match=says) as refused:
        open_image(file_image(root, path), read_only=False)
    assert "\n" not in str(refused.value)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_store_that_is_not_mounted_is_named(root: Path) -> None:
    with pytest.raises(ForebayError, match="mount the store 'images'"):
        open_image(FileAddress("images", root / "gone", "vm.img"), read_only=False)


def test_a_file_with_two_names_is_read_but_not_written(root: Path) -> None:
    os.link(root / "images" / "vm.img", root / "images" / "x.img")
    os.close(open_image(file_image(root, "x.img"), read_only=True).fd)


def test_raw_content_that_looks_like_qcow2_is_served_where_that_is_meant(root: Path) -> None:
    for name in ("x.raw", "x.img"):
        (root / "images" / name).write_bytes(b"QFI\xfb" + bytes(508))
    os.close(open_image(file_image(root, "x.raw"), read_only=False).fd)
    # it was attached before: what the guest wrote there since is its own business
    os.close(open_image(file_image(root, "x.img"), read_only=False, admitted=True).fd)


def test_without_openat2_links_are_refused_all_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.origin.worker.program._SYS_OPENAT2", 9999)
    link_out(root / "images")
    (root / "images" / "link").symlink_to("deep")
    os.close(open_image(file_image(root, "deep/vm.img"), read_only=False).fd)
    for path in ("x.img", "link/vm.img", "none/vm.img"):
        with pytest.raises(ForebayError, match=r"symbolic link|no such image"):
            open_image(file_image(root, path), read_only=False)


def test_a_file_is_no_device(root: Path) -> None:
    with pytest.raises(ForebayError, match="not a block device"):
        open_device(DeviceAddress(str(root / "images" / "vm.img")), read_only=True)
    with pytest.raises(ForebayError, match="no such device"):
        open_device(DeviceAddress("/dev/none"), read_only=True)
