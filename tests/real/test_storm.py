# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A storm: some tens of overlays of one image at once, whose clients check all they read, and a kill in the middle.

The image is behind nbdkit, which writes down what it was asked for. ``FOREBAY_STORM=100`` has so many overlays.
"""

import os
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from real.kill_checker import Guest, Guests, Tally
from real.kill_daemon import KillableGateway
from real.processes import MIB, ONE_THREAD, NbdServer, random_image

COUNT = int(os.environ.get("FOREBAY_STORM", "24"))
SIZE = 6 * MIB
BLOCK = 65536
WRITES = 20
"""Of each overlay, before the kill and after it."""

_READ = re.compile(r"\bRead id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)")


def fetched(log: str) -> Counter[int]:
    """How often each block was read from the image."""
    found: Counter[int] = Counter()
    for offset, count in ((int(a, 16), int(b, 16)) for a, b in _READ.findall(log)):
        found.update(range(offset // BLOCK, -(-(offset + count) // BLOCK)))
    return found


def work(gateway: KillableGateway, guests: Guests, tally: Tally) -> None:
    """Until each has written, on average, as often as it is to, or something is lost."""
    target = tally.writes + COUNT * WRITES
    while tally.writes < target and not tally.lost:
        assert guests.turn(0.05), gateway.log_text()[-4000:]


def test_a_storm_reads_each_block_once_writes_no_image_and_goes_on_after_a_kill(
    start_nbdkit: Callable[..., NbdServer], tmp_path: Path, rng: random.Random
) -> None:
    base, log = tmp_path / "base.raw", tmp_path / "log"
    content = random_image(base, SIZE, 1, [(2 * MIB, MIB)])
    server = start_nbdkit("file", base, f"logfile={log}", filters=["log"], options=[ONE_THREAD])
    gateway, tally = KillableGateway({"cache": {"size": "256 MiB"}}), Tally()
    try:
        gateway.start()
        guests = Guests([])
        for n in range(COUNT):
            gateway.attach_disk(f"vm{n}", server.uri, overlay=True)
            dice = random.Random(rng.getrandbits(32))
            guest = Guest(f"vm{n}", gateway.uri(f"vm{n}"), content, tally, dice, depth=3)
            guests.all.append(guest)
        assert guests.connect()  # each reads all of it first
        work(gateway, guests, tally)
        before = log.read_text()
        gateway.kill()
        guests.last_words()
        gateway.start()
        assert guests.connect()
        work(gateway, guests, tally)
        assert guests.quiesce()
        for guest in guests.all:
            guest.compare_all()
        assert guests.quiesce()
        guests.hang_up()
        assert gateway.stop() == 0
    finally:
        gateway.remove()
    assert tally.lost == []
    assert tally.verified >= 3 * COUNT * SIZE // 4096
    said = log.read_text()
    assert not re.search(r"\b(Write|Zero|Trim) id=", said)
    assert base.read_bytes() == content
    first, second = fetched(before), fetched(said.removeprefix(before))
    assert set(first) == set(range(SIZE // BLOCK))
    assert max(first.values()) == 1
    assert not second or max(second.values()) == 1  # of the last two seconds before the kill
