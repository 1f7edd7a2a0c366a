# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Caches that an older version left behind, for `test_upgrade.py`: how they were made, and what they hold.

Run with the Python of an older checkout, this makes them anew, with the daemon and the command of that version:

    OLD/.venv/bin/python tests/real/old_cache.py tests/data

What is pending when a daemon is killed has to be the same each time. So where a cache is to be killed its daemon runs
within this script (`--held`): commits come only when they are asked for, and passes end when they have frozen a layer.
"""

import argparse
import importlib
import io
import json
import os
import runpy
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import lmdb

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from real.gateway_process import GatewayProcess
from real.processes import accepts

DATA = Path(__file__).resolve().parents[1] / "data"
BLOCK = 65536
SECTOR = 4096
SIZE = 16 * BLOCK
"""Bytes of each image."""
WARM = 8 * BLOCK
"""From the beginning of each image on, so many bytes were read."""
SETTINGS = {
    "cache": {"size": "4 MiB"},
    "defaults": {"max_lag": "1d", "mode": "write-back"},
}
IMAGES = ("own.raw", "base.raw", "through.raw")


class Disk(NamedTuple):
    """One disk of such a cache."""

    name: str
    image: str
    options: tuple[str, ...]


DISKS = (
    Disk("d", "own.raw", ("--mode", "write-back")),
    Disk("overlay", "base.raw", ("--overlay",)),
    Disk("t", "through.raw", ("--mode", "write-through")),
)


# -- what they hold ---------------------------------------------------------------------------------------------------


def sectors(label: str, first: int, count: int) -> bytes:
    """Sectors that say whose they are and which, and that compress well."""
    return b"".join(
        (f"{label} {n}\n".encode() * SECTOR)[:SECTOR] for n in range(first, first + count)
    )


FIRST = (0, sectors("first", 0, 8))
"""(offset, data) of what the guest of `d` writes before a pass: in the image of the cache that was stopped, in a frozen
layer of the one that was killed."""
WRITES: dict[str, list[tuple[int, bytes]]] = {
    "d": [
        (0, sectors("second", 0, 4)),  # over a part of the first
        (3 * BLOCK - SECTOR, sectors("across", 0, 2)),  # over the border of two blocks
        (9 * BLOCK, sectors("cold", 0, 16)),  # a block that was never read
        (10 * BLOCK, bytes(BLOCK)),
    ],
    "overlay": [(BLOCK, sectors("overlay", 0, 16)), (12 * BLOCK, sectors("overlay", 16, 3))],
    "t": [(2 * BLOCK, sectors("through", 0, 4))],
}
"""What the guests write, in order; `d` after FIRST."""


def image_content(image: str, kind: str) -> bytes:
    """What an image had when its cache was left."""
    content = sectors(image, 0, SIZE // SECTOR)
    if image == "through.raw":
        content = _written(content, WRITES["t"])
    if image == "own.raw" and kind == "stopped":
        content = _written(content, [FIRST])
    return content


def disk_content(disk: str) -> bytes:
    """What the guest of a disk has to read."""
    image = next(one.image for one in DISKS if one.name == disk)
    content = sectors(image, 0, SIZE // SECTOR)
    return _written(content, [*([FIRST] if disk == "d" else []), *WRITES[disk]])


def _written(content: bytes, writes: list[tuple[int, bytes]]) -> bytes:
    changed = bytearray(content)
    for offset, data in writes:
        changed[offset : offset + len(data)] = data
    return bytes(changed)


# -- laying them out --------------------------------------------------------------------------------------------------


def unpack(kind: str, into: Path, boot: str) -> None:
    """Lay a cache out as it was left: `state`, and `images` with owner markers and with what they had.

    `boot`: the boot id of the kernel under which that was.
    """
    with tarfile.open(DATA / f"cache-{kind}.tar.xz") as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            path = into / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_sparse(path, file.read())
    for image in IMAGES:
        (into / "images" / image).write_bytes(image_content(image, kind))
    _change_index(into, boot)


def _write_sparse(path: Path, content: bytes) -> None:
    """Only what is not zeros takes space."""
    with path.open("wb") as file:
        file.truncate(len(content))
        for at in range(0, len(content), SECTOR):
            part = content[at : at + SECTOR]
            if part.strip(b"\0"):
                file.seek(at)
                file.write(part)


def _change_index(root: Path, boot: str) -> None:
    """Have the index know the images as they are here (times and inode were those of others), and that boot id."""
    with lmdb.open(str(root / "state" / "index"), max_dbs=8) as env:
        meta, records = (env.open_db(name, create=False) for name in (b"meta", b"records"))
        with env.begin(write=True) as txn:
            state = json.loads(txn.get(b"state", db=meta) or b"")
            txn.put(b"state", json.dumps(state | {"boot_id": boot}).encode(), db=meta)
            for image in IMAGES:
                key = f"image\0images:{image}".encode()
                if json.loads(txn.get(key, db=records) or b"")["identity"] is not None:
                    info = (root / "images" / image).stat()
                    now = [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]
                    txn.put(key, json.dumps({"identity": now}).encode(), db=records)


def index_tables(index: Path) -> dict[str, dict[bytes, bytes]]:
    """All that an index has, by table, without any code of the cache."""
    found: dict[str, dict[bytes, bytes]] = {}
    with lmdb.open(str(index), readonly=True, lock=False, max_dbs=8) as env, env.begin() as txn:
        for name in ("meta", "pages", "sums", "layers", "hot", "records"):
            table = env.open_db(name.encode(), txn=txn, create=False)
            with txn.cursor(db=table) as cursor:
                found[name] = dict(cursor)
    return found


# -- making them ------------------------------------------------------------------------------------------------------


def make(kind: str, folder: Path) -> Path:
    """Make one, with the Forebay of this Python; returns where it is."""
    gateway = GatewayProcess(SETTINGS)
    try:
        for image in IMAGES:
            (gateway.images / image).write_bytes(sectors(image, 0, SIZE // SECTOR))
        gateway.start(under=(__file__, "--held") if kind == "killed" else ())
        _use(gateway, kind)
        if kind == "killed":
            gateway.kill()
        else:
            assert gateway.stop() == 0, gateway.log_text()
        for image in IMAGES:
            assert (gateway.images / image).read_bytes() == image_content(image, kind), image
        return _pack(gateway, folder / f"cache-{kind}.tar.xz")
    finally:
        print(gateway.log_text())
        gateway.remove()


def _use(gateway: GatewayProcess, kind: str) -> None:
    for disk in DISKS:
        gateway.attach(disk.name, disk.image, *disk.options)
        while not accepts(gateway.sock(disk.name)):
            time.sleep(0.01)
        guest = _connected(gateway, disk.name)
        guest.pread(WARM, 0)
        if disk.name != "d":
            _write(guest, WRITES[disk.name])
            guest.flush()
        guest.shutdown()
    time.sleep(1)  # what was read is stored behind the readers' backs
    guest = _connected(gateway, "d")
    _write(guest, [FIRST])
    if kind == "killed":
        gateway.cli("flush", "d", "--timeout", "2s", check=False)  # freezes, and goes no further
    else:
        gateway.cli("flush", "d")
    _write(guest, WRITES["d"][:1])
    guest.flush()
    _write(guest, WRITES["d"][1:])
    guest.zero(BLOCK, WRITES["d"][-1][0])


def _write(guest: Any, writes: list[tuple[int, bytes]]) -> None:
    for offset, data in writes:
        guest.pwrite(data, offset)


def _connected(gateway: GatewayProcess, disk: str) -> Any:
    import nbd

    guest = nbd.NBD()
    guest.connect_uri(gateway.uri(disk))
    return guest


def _pack(gateway: GatewayProcess, path: Path) -> Path:
    kept = [gateway.state / "cache.img", gateway.state / "index" / "data.mdb"]
    kept += sorted(gateway.images.glob("*.forebay/owner"))
    with tarfile.open(path, "w:xz", preset=9) as tar:
        for file in kept:
            info = tarfile.TarInfo(str(file.relative_to(gateway.directory)))
            info.size = file.stat().st_size
            tar.addfile(info, io.BytesIO(file.read_bytes()))
    return path


def _hold_up() -> None:
    """From now on this process commits only when it is asked to, and its passes go no further than freezing."""
    import trio

    async def held(*_: object) -> None:
        await trio.sleep_forever()

    importlib.import_module("forebay_cache.cache").__dict__["COMMIT_SECONDS"] = 1e6
    importlib.import_module("forebay.writeback").__dict__["WriteBack"]._write_out = held


def main() -> None:
    """Make all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for kind in ("stopped", "killed"):
        path = make(kind, folder)
        print(f"{path}: {os.stat(path).st_size} bytes")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--held"]:
        _hold_up()
        sys.argv = sys.argv[3:]  # --held -m forebay
        runpy.run_module("forebay", run_name="__main__", alter_sys=True)
    else:
        main()
