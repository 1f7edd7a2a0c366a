# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What somebody who may write to a store can lay there: no name leads to anything but a file in it, and none waits."""

import os
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from forebay.errors import ForebayError
from forebay.origin.addresses import FileAddress
from forebay.origin.calls import open_beneath
from forebay.origin.opening import OpenImage, open_image
from forebay.origin.worker import program
from real.gateway_process import GatewayProcess

SECRET = b"secret" * 1000
OWN = b"own" * 2000

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make devices and mounts")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with an image in it, and a file beside the store that is nobody's business."""
    (tmp_path / "secret.raw").write_bytes(SECRET)
    store = tmp_path / "store"
    (store / "folder").mkdir(parents=True)
    (store / "own.raw").write_bytes(OWN)
    (store / "folder" / "secret.raw").write_bytes(OWN)
    return store


def opened(root: Path, path: str, *, read_only: bool = False) -> bytes:
    """What an image of that path would show."""
    image: OpenImage = open_image(FileAddress("images", root, path), read_only=read_only)
    try:
        return os.pread(image.fd, 1 << 20, 0)
    finally:
        os.close(image.fd)


@pytest.fixture(params=["openat2", "without openat2"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways of walking a path: the kernel's, and ours where a sandbox forbids that."""
    if request.param == "openat2":
        yield request.param
        return
    with mock.patch.object(program, "_SYS_OPENAT2", 100_000):  # ENOSYS
        yield request.param


LAID: dict[str, tuple[str, Callable[[Path], object]]] = {
    "link to a file outside": ("x", lambda at: (at / "x").symlink_to("../secret.raw")),
    "link to a file inside": ("x", lambda at: (at / "x").symlink_to("own.raw")),
    "absolute link": ("x", lambda at: (at / "x").symlink_to(at.parent / "secret.raw")),
    "link to a folder outside": ("x/secret.raw", lambda at: (at / "x").symlink_to("..")),
    "link in a folder": (
        "folder/x",
        lambda at: (at / "folder" / "x").symlink_to("../../secret.raw"),
    ),
    "link to the process": ("x/secret.raw", lambda at: (at / "x").symlink_to("/proc/self/cwd")),
    "link to itself": ("x", lambda at: (at / "x").symlink_to("x")),
    "pipe": ("x", lambda at: os.mkfifo(at / "x")),
    "folder": ("folder", lambda at: None),
    "nothing in it": ("x", lambda at: (at / "x").touch()),
    "two names": ("x", lambda at: os.link(at.parent / "secret.raw", at / "x")),
}


@pytest.mark.parametrize("name", LAID)
def test_what_is_laid_in_a_store_is_refused(root: Path, way: str, name: str) -> None:
    path, lay = LAID[name]
    lay(root)
    with pytest.raises(ForebayError):
        opened(root, path)
    assert opened(root, "own.raw") == OWN


@needs_root
@pytest.mark.parametrize("kind", [stat.S_IFBLK, stat.S_IFCHR], ids=["block", "character"])
def test_device_nodes_are_refused(root: Path, way: str, kind: int) -> None:
    """A node in a store is no image, whatever device it leads to."""
    device = os.makedev(7, 200) if kind == stat.S_IFBLK else os.makedev(1, 5)  # loop200; /dev/zero
    try:
        os.mknod(root / "x.raw", kind | 0o666, device)
    except PermissionError:
        pytest.skip("no device nodes can be made here")
    with pytest.raises((ForebayError, OSError)):
        opened(root, "x.raw", read_only=True)


@needs_root
def test_a_mounted_proc_leads_nowhere(root: Path, way: str) -> None:
    """Magic links lead anywhere at all, and need no symbolic link that could be read."""
    (root / "proc").mkdir()
    done = subprocess.run(
        ["mount", "--bind", "/proc", str(root / "proc")], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("nothing can be mounted here")
    secret = os.open(root.parent / "secret.raw", os.O_RDONLY)
    try:
        for path in (
            f"proc/self/fd/{secret}",
            f"proc/{os.getpid()}/root{root.parent}/secret.raw",
            "proc/self/cwd/x",
        ):
            for read_only in (True, False):
                with pytest.raises((ForebayError, OSError)):
                    opened(root, path, read_only=read_only)
    finally:
        os.close(secret)
        subprocess.run(["umount", "--lazy", str(root / "proc")], check=True)


def test_dots_lead_nowhere(root: Path, way: str) -> None:
    """Names with dots do not get so far; were one to, the walk itself stays below the store."""
    fd = os.open(root, os.O_PATH)
    try:
        for path in ("../secret.raw", "folder/../../secret.raw", "/etc/passwd"):
            with pytest.raises(OSError, match="."):
                open_beneath(fd, path, os.O_RDONLY)
    finally:
        os.close(fd)


def test_a_folder_that_turns_into_a_link_meanwhile(root: Path, way: str) -> None:
    """TOCTOU: `folder` is a folder, a link to outside, a folder, ... as fast as one can; only OWN is ever seen."""
    (root / "evil").symlink_to("..")
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            os.rename(root / "folder", root / "aside")
            os.rename(root / "evil", root / "folder")
            os.rename(root / "folder", root / "evil")
            os.rename(root / "aside", root / "folder")

    thread = threading.Thread(target=swap)
    thread.start()
    seen = refused = 0
    try:
        while seen + refused < 3000:
            try:
                assert opened(root, "folder/secret.raw") == OWN
                seen += 1
            except (ForebayError, FileNotFoundError):
                refused += 1
    finally:
        over.set()
        thread.join()
    assert seen
    assert refused


def _pipe(at: Path) -> None:
    os.mkfifo(at)


def _link(at: Path) -> None:
    at.symlink_to("../../secret.raw" if at.parent.suffix else at.parent)


BESIDE: list[tuple[str, Callable[[Path], object]]] = [
    ("", _link),
    ("", Path.touch),
    *(
        (name, lay)
        for name in ("owner", "lock", "redo", "owner.new", "redo.new")
        for lay in (_pipe, _link)
    ),
    ("owner", Path.mkdir),
    ("redo", Path.mkdir),
]
"""Names in the directory beside an image (none: that itself), and what lies there."""


def test_what_is_laid_beside_an_image_neither_hangs_nor_is_followed(
    gateway: GatewayProcess,
) -> None:
    """Each attach is answered in one line, or goes well; what the links lead to is as it was."""
    secret = gateway.directory / "secret.raw"
    secret.write_bytes(SECRET)
    gateway.allow_log("marker|owner")
    for number, (name, lay) in enumerate(BESIDE):
        image = gateway.images / f"{number}.raw"
        image.write_bytes(OWN)
        beside = image.with_name(image.name + ".forebay")
        if name:
            beside.mkdir()
        lay(beside / name)
        done = gateway.cli(
            "attach", f"d{number}", f"images:{image.name}", "--mode", "write-back", check=False
        )
        assert done.returncode in (0, 1), name
        assert len(done.stderr.splitlines()) <= 1, (name, done.stderr)
        assert secret.read_bytes() == SECRET, name
        assert image.read_bytes() == OWN, name
        if done.returncode == 0:
            gateway.cli("detach", f"d{number}")
    (gateway.images / "good.raw").write_bytes(OWN)
    gateway.attach("good", "good.raw", mode="write-back")
