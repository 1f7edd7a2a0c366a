# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What one writer writes: step K of a seed goes to certain blocks, and each sector of them names seed, step and block.

So whoever reads a block knows which write it shows, whether it is whole, and whether it lies at its place.
"""

import random
import struct
from collections.abc import Callable
from typing import Any

BLOCK = 4096
SECTOR = 512
_STAMP = struct.Struct("<8sQQQ")
_MAGIC = b"forebay?"
_LENGTHS = (1, 1, 1, 2, 4, 16)
"""Blocks of a write; one of these, by chance."""


def place(seed: int, step: int, blocks: int) -> tuple[int, int]:
    """First block and number of blocks of a step, on a disk of `blocks` blocks."""
    chosen = random.Random(seed << 32 | step)
    count = min(blocks, chosen.choice(_LENGTHS))
    return chosen.randrange(blocks - count + 1), count


def content(seed: int, step: int, first: int, count: int) -> bytes:
    """What step `step` writes to `count` blocks from `first` on."""
    sectors = BLOCK // SECTOR
    return b"".join(
        _STAMP.pack(_MAGIC, seed, step, block).ljust(SECTOR, b"\0") * sectors
        for block in range(first, first + count)
    )


def newest(seed: int, last: int, blocks: int) -> list[int]:
    """For each block the last step up to `last` that wrote it; 0 where none did."""
    steps = [0] * blocks
    for step in range(1, last + 1):
        first, count = place(seed, step, blocks)
        steps[first : first + count] = [step] * count
    return steps


def steps_of(data: bytes, seed: int, block: int) -> set[int]:
    """The steps that the sectors of a block show: 0 for zeros, -1 for what is not of this seed or place."""
    found = set()
    for at in range(0, BLOCK, SECTOR):
        magic, whose, step, where = _STAMP.unpack_from(data, at)
        if not any(data[at : at + SECTOR]):
            found.add(0)
        elif (magic, whose, where) == (_MAGIC, seed, block):
            found.add(step)
        else:
            found.add(-1)
    return found


def survey(read: Callable[[int, int], bytes], seed: int, blocks: int) -> list[set[int]]:
    """`steps_of` for each block of a disk; `read` takes offset and length in bytes."""
    piece = 256
    found = []
    for first in range(0, blocks, piece):
        count = min(piece, blocks - first)
        data = read(first * BLOCK, count * BLOCK)
        found += [
            steps_of(data[i * BLOCK : (i + 1) * BLOCK], seed, first + i) for i in range(count)
        ]
    return found


def verdict(found: list[set[int]], seed: int, flushed: int, asked: int) -> dict[str, Any]:
    """What a survey shows, where steps up to `flushed` were flushed, and up to `asked` begun.

    `lost`: blocks that were flushed, and are older, or another's; `examples` of them are block, steps found, step
    wanted. `future`: blocks newer than what was begun. `foreign`: with something else in them. `torn`: of more than one
    step. `instant`: the newest step; `unfit`: blocks that are not as they were right after that step.
    """
    want = newest(seed, flushed, len(found))
    instant = max((max(steps) for steps in found), default=0)
    fit = newest(seed, max(instant, 0), len(found))
    lost = [block for block, steps in enumerate(found) if want[block] and want[block] > min(steps)]
    return {
        "lost": len(lost),
        "examples": [(block, sorted(found[block]), want[block]) for block in lost[:4]],
        "future": sum(max(steps) > asked for steps in found),
        "foreign": sum(-1 in steps for steps in found),
        "torn": sum(len(steps) > 1 for steps in found),
        "instant": max(instant, 0),
        "unfit": sum(steps != {fit[block]} for block, steps in enumerate(found)),
    }
