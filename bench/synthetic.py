# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Make a cache that is full, without filling it: an index that names every slot of a sparse device.

All blocks are clean and, as the device is sparse, zeros with the right checksums, so it can be served and read. For
measuring how a large cache starts and what memory it takes; 1 TiB takes 1.3 GB of disk for the index.
"""

import argparse
import os
import struct
import uuid
from array import array
from pathlib import Path

import lmdb

from forebay_cache.device.files import open_device, size_of
from forebay_cache.device.superblock import write_format
from forebay_cache.format.checksum import GROUP, ZERO_SECTOR_SUM
from forebay_cache.format.entry import pack
from forebay_cache.format.geometry import FULL, PAGE_BLOCKS, SECTORS
from forebay_cache.format.records import GROUP_KEY, PAGE_KEY, LayerName, LayerRecord
from forebay_cache.index.changes import Changes
from forebay_cache.index.index import Index

IMAGES = 16
BATCH = 1 << 18


def build(device: Path, index: Path, size: int) -> int:
    """Write device and index; the number of slots, all of them in use."""
    index.parent.mkdir(parents=True, exist_ok=True)
    fd = open_device(device, create_size=size)
    opened = Index(index, size_of(fd) // 65536)
    layout = write_format(fd, device, uuid.UUID(opened.meta.uuid))
    os.close(fd)
    pages_each = layout.slots // PAGE_BLOCKS // IMAGES
    slots = pages_each * IMAGES * PAGE_BLOCKS
    opened.meta.frontier, opened.meta.next_layer, opened.meta.fresh = slots, IMAGES + 1, False
    changes = Changes(opened.meta)
    for layer in range(1, IMAGES + 1):
        held = pages_each * PAGE_BLOCKS
        name = LayerName.of_image(f"images:synthetic{layer}.raw")
        changes.layers[layer] = LayerRecord(name, slots=held, sectors=held * SECTORS)
    opened.commit_now(changes)
    opened.close()
    _fill(index, slots, pages_each)
    return slots


def _fill(index: Path, slots: int, pages_each: int) -> None:
    env = lmdb.open(str(index), map_size=slots * 3072, max_dbs=8, sync=False, metasync=False)
    pages, sums = env.open_db(b"pages"), env.open_db(b"sums")
    value = struct.pack("<I", ZERO_SECTOR_SUM) * SECTORS * GROUP
    for start in range(0, slots, BATCH):
        groups = range(start // GROUP, -(-min(start + BATCH, slots) // GROUP))
        keys = ((GROUP_KEY.pack(group), value) for group in groups)
        with env.begin(write=True) as txn, txn.cursor(db=sums) as cursor:
            cursor.putmulti(keys, append=True)
    for layer in range(1, IMAGES + 1):
        with env.begin(write=True) as txn, txn.cursor(db=pages) as cursor:
            cursor.putmulti(
                ((PAGE_KEY.pack(layer, n), _page(layer, n, pages_each)) for n in range(pages_each)),
                append=True,
            )
    env.sync(True)
    env.close()


def _page(layer: int, number: int, pages_each: int) -> bytes:
    first = ((layer - 1) * pages_each + number) * PAGE_BLOCKS
    return array("Q", [pack(first + i, 0, FULL) for i in range(PAGE_BLOCKS)]).tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--size", type=int, required=True, help="bytes")
    given = parser.parse_args()
    print(f"{build(given.device, given.index, given.size)} slots indexed")


if __name__ == "__main__":
    main()
