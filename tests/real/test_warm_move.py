# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A VM that has moved finds on its new host what it used to find in the cache of the old one."""

import random
import time
from collections.abc import Callable
from typing import Any

from forebay_cache.format.geometry import BLOCK
from real.gateway_process import GatewayProcess
from real.processes import MIB

SIZE, HOT = 64 * MIB, 400
"""Bytes of the image, and the blocks of it that the VM reads again and again."""

BAR_SECONDS = 60.0
"""By then nine of ten reads hit again."""


def test_nine_of_ten_reads_hit_again_within_a_minute_of_a_move(
    make_gateway: Callable[..., GatewayProcess], connect: Callable[..., Any], rng: random.Random
) -> None:
    here = make_gateway({"stores.images": {"mode": "write-back"}})
    there = make_gateway({"stores.images": {"mode": "write-back", "path": str(here.images)}})
    (here.images / "a.raw").write_bytes(rng.randbytes(SIZE))
    here.attach("d", "a.raw")
    hot = rng.sample(range(SIZE // BLOCK), HOT)
    vm = connect(here.uri("d"))
    for block in hot * 2:
        vm.pread(4096, block * BLOCK)
    there.cli("attach", "d", "images:a.raw", "--incoming")
    vm.shutdown()
    vm = connect(there.uri("d"))
    vm.pwrite(bytes(4096), hot[0] * BLOCK)  # it runs there now
    moved = time.monotonic()
    while there.status("d")["cached_bytes"] < 0.95 * HOT * BLOCK:
        if time.monotonic() - moved > BAR_SECONDS:
            break  # what is there by now has to do
        time.sleep(0.2)
    took = time.monotonic() - moved
    before = there.status("d")
    for block in rng.sample(hot, HOT):
        vm.pread(4096, block * BLOCK)
    after = there.status("d")
    hits = after["read_hits"] - before["read_hits"]
    misses = after["read_misses"] - before["read_misses"]
    print(f"{hits} hits, {misses} misses, {took:.1f} s after the move")
    assert hits + misses >= HOT
    assert hits >= 0.9 * (hits + misses)
    vm.shutdown()
    here.cli("detach", "d")
    there.cli("detach", "d")
