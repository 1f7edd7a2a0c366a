# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Names and folders of images that leave no room for the directory beside them, or for us."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forebay.errors import ForebayError
from forebay.origin.addresses import FileAddress
from forebay.sidecar.files import Sidecar, read_owner
from forebay.sidecar.record import UnreadableError


def image(root: Path, name: str) -> FileAddress:
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(bytes(4096))
    return FileAddress("images", root, name)


@contextmanager
def nobody() -> Iterator[None]:
    """As a user who may only what everybody may."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["n" * 247, "é" * 123])
def test_the_longest_name_with_room_beside_it(name: str, tmp_path: Path) -> None:
    with Sidecar(image(tmp_path, name)) as sidecar:
        sidecar.make()
    assert (tmp_path / f"{name}.forebay").is_dir()


@pytest.mark.parametrize("name", ["n" * 248, "n" * 255, "é" * 124, "f/" + "n" * 250])
def test_a_name_without_room_beside_it_can_be_read_and_not_written(
    name: str, tmp_path: Path
) -> None:
    address = image(tmp_path, name)
    assert read_owner(address) is None
    with (
        Sidecar(address) as sidecar,
        pytest.raises(ForebayError, match="use at most 247 bytes, or attach it with --read-only"),
    ):
        sidecar.make()


@pytest.mark.parametrize(
    "plant",
    [
        Path.touch,
        lambda path: path.symlink_to("/"),
        lambda path: path.symlink_to("/not/there"),
        os.mkfifo,
    ],
    ids=["file", "link", "dangling link", "pipe"],
)
def test_what_is_no_directory_beside_an_image_is_named(
    plant: Callable[[Path], object], tmp_path: Path
) -> None:
    address = image(tmp_path, "vm.raw")
    plant(tmp_path / "vm.raw.forebay")
    with pytest.raises(UnreadableError, match=r"\(vm.raw.forebay is not a directory\)"):
        read_owner(address)
    with Sidecar(address) as sidecar, pytest.raises(UnreadableError, match="is not a directory"):
        sidecar.make()


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (0o711, "the directory that it lies in cannot be read: let the daemon's user read it"),
        (0o733, "the directory that it lies in cannot be read: let the daemon's user read it"),
        (0o755, "vm.raw.forebay cannot be made beside it"),
    ],
)
def test_a_folder_that_may_be_passed_is_enough_to_read_and_not_to_write(
    mode: int, said: str, tmp_path: Path
) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    address = image(tmp_path, "sub/vm.raw")
    (tmp_path / "sub").chmod(mode)
    with nobody():
        assert read_owner(address) is None
        with Sidecar(address) as sidecar, pytest.raises(ForebayError, match=said):
            sidecar.make()
    assert os.listdir(tmp_path / "sub") == ["vm.raw"]
