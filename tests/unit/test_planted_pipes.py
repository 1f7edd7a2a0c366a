# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Where STATE has a pipe, or a link to one, in the place of a small file, nobody waits for who opens its other end."""

import os
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from forebay.history import kept as history
from forebay.staging import orders
from forebay_cache.curve import kept as curve

CURVE = curve.Kept("u", 0.0, 1, {}, array("d"), {})

LOADS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "staging": (orders.FILE, lambda path: orders.load(path.parent)),
    "history": ("history", history.load),
    "advice": ("curve", curve.load),
}
SAVES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "staging": (f"{orders.FILE}.new", lambda path: orders.save(path.parent, [])),
    "history": ("history.new", lambda path: history.save(path.with_suffix(""), {})),
    "advice": ("curve.new", lambda path: curve.save(path.with_suffix(""), CURVE)),
}


def plant(path: Path, how: str) -> None:
    if how == "a link":
        os.mkfifo(path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
    else:
        os.mkfifo(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("how", ["a pipe", "a link", "a pipe with a writer"])
@pytest.mark.parametrize("what", LOADS)
def test_it_is_not_read(what: str, how: str, tmp_path: Path) -> None:
    name, load = LOADS[what]
    plant(tmp_path / name, how)
    writer = os.open(tmp_path / name, os.O_RDWR) if "writer" in how else None
    with pytest.raises((OSError, ValueError)):
        load(tmp_path / name)
    if writer is not None:
        os.close(writer)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("how", ["a pipe", "a link"])
@pytest.mark.parametrize("what", SAVES)
def test_it_is_not_written(what: str, how: str, tmp_path: Path) -> None:
    name, save = SAVES[what]
    plant(tmp_path / name, how)
    with pytest.raises(OSError, match=r"."):
        save(tmp_path / name)
