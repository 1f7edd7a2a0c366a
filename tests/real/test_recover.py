# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The host is gone in the middle of things: what the image is worth without its cache, and who may have it then."""

import json
import random
import struct
import threading
import time
from collections.abc import Callable
from typing import Self

import nbd
import pytest

from real.gateway_process import GatewayProcess

SECTOR = 4096
COUNT = 4096
"""Sectors that are written round and round: a pass takes a good part of the time between two flushes."""


class Guest:
    """Writes 1, 2, 3... one after the other, each into the next sector, until the daemon dies."""

    def __init__(self, uri: str) -> None:
        self.acked = 0
        self._uri = uri
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)

    def _run(self) -> None:
        client = nbd.NBD()
        client.connect_uri(self._uri)
        try:
            while True:
                number = self.acked + 1
                client.pwrite(
                    struct.pack("<Q", number) * (SECTOR // 8), (number - 1) % COUNT * SECTOR
                )
                self.acked = number
        except nbd.Error:
            pass


def last_of(image: bytes) -> int:
    """The number k such that the image is what it was right after k was written, and before the next one."""
    found: list[int] = []
    for at in range(0, COUNT * SECTOR, SECTOR):
        numbers = set(struct.unpack_from(f"<{SECTOR // 8}Q", image, at))
        assert len(numbers) == 1, f"a torn sector at {at}: {numbers}"
        found.append(numbers.pop())
    last = max(found)
    for sector, number in enumerate(found):
        expected = last - (last - 1 - sector) % COUNT
        assert number == max(expected, 0), (
            f"sector {sector} has {number}; of {last} it is {expected}"
        )
    return last


def test_without_its_cache_the_image_is_of_one_instant(
    make_gateway: Callable[..., GatewayProcess], rng: random.Random
) -> None:
    """Eight hosts lost while a guest writes and pass follows pass; none of them comes back."""
    finished = 0
    for round_ in range(8):
        gateway = make_gateway()
        path = gateway.images / "a.raw"
        path.write_bytes(bytes(COUNT * SECTOR))
        gateway.attach("d", "a.raw", mode="write-back")
        with Guest(gateway.uri("d")) as guest:
            written_back = 0
            end = time.monotonic() + rng.uniform(0.3, 1.2)
            killer = threading.Timer(end - time.monotonic(), gateway.kill)
            killer.start()
            while gateway.alive:
                before = guest.acked
                if gateway.cli("flush", "d", check=False).returncode == 0:
                    written_back = before
            killer.join()
        report = json.loads(gateway.cli("recover", "images:a.raw", "--json").stdout)
        last = last_of(path.read_bytes())
        assert written_back <= last <= guest.acked + 1, f"round {round_}"
        finished += report["finished"]
        assert report["owner"]["disk"] == "d"
        again = json.loads(gateway.cli("recover", "images:a.raw", "--json").stdout)
        assert not again["finished"]
        assert not again["dropped"]
        assert last_of(path.read_bytes()) == last
    print(f"{finished} of 8 were in the middle of writing the image")


def test_a_gateway_that_is_gone_is_taken_over(
    make_gateway: Callable[..., GatewayProcess],
) -> None:
    gone, next_ = make_gateway(), make_gateway()
    next_.configure({"stores.images": {"path": str(gone.images)}})
    next_.restart()
    path = gone.images / "a.raw"
    path.write_bytes(bytes(1 << 20))
    gone.attach("d", "a.raw", mode="write-back")
    client = nbd.NBD()
    client.connect_uri(gone.uri("d"))
    client.pwrite(b"1" * SECTOR, 0)
    assert gone.cli("flush", "d").returncode == 0
    client.pwrite(b"2" * SECTOR, 0)
    refused = gone.cli("recover", "images:a.raw", check=False)
    assert refused.returncode == 1
    assert "which serves it now" in refused.stderr
    gone.kill()
    refused = next_.cli("attach", "e", "images:a.raw", check=False)
    assert refused.returncode == 1
    assert "forebay takeover images:a.raw" in refused.stderr
    told = next_.cli("recover", "images:a.raw").stdout
    assert "as of 20" in told
    assert "later writes that host" in told
    refused = next_.cli("takeover", "images:a.raw", check=False)
    assert refused.returncode == 1
    assert "say --yes" in refused.stderr
    assert next_.cli("attach", "e", "images:a.raw", check=False).returncode == 1
    assert "are given up" in next_.cli("takeover", "images:a.raw", "--yes").stdout
    next_.attach("e", "a.raw", mode="write-back")
    client = nbd.NBD()
    client.connect_uri(next_.uri("e"))
    assert client.pread(SECTOR, 0) == b"1" * SECTOR
    client.pwrite(b"3" * SECTOR, SECTOR)
    client.shutdown()
    next_.cli("detach", "e")
    # The one that was gone comes back, and finds out.
    gone.allow_log(".*")
    gone.start()
    status = gone.status("d")
    assert status["state"] == "conflict", status
    assert "was taken over" in status["reason"]
    client = nbd.NBD()
    client.connect_uri(gone.uri("d"))
    for offset in (0, SECTOR):
        with pytest.raises(nbd.Error):
            client.pread(SECTOR, offset)
    client.shutdown()
    gone.cli("flush", "d", check=False)
    assert path.read_bytes()[: 2 * SECTOR] == b"1" * SECTOR + b"3" * SECTOR
    gone.cli("detach", "d", "--discard", "--force")
    assert path.read_bytes()[: 2 * SECTOR] == b"1" * SECTOR + b"3" * SECTOR


def test_one_that_comes_back_with_nothing_of_its_own_goes_on_with_what_is_there(
    make_gateway: Callable[..., GatewayProcess],
) -> None:
    gone, next_ = make_gateway(), make_gateway()
    next_.configure({"stores.images": {"path": str(gone.images)}})
    next_.restart()
    path = gone.images / "a.raw"
    path.write_bytes(bytes(1 << 20))
    gone.attach("d", "a.raw", mode="write-through")
    client = nbd.NBD()
    client.connect_uri(gone.uri("d"))
    client.pwrite(b"1" * SECTOR, 0)
    client.flush()
    gone.kill()
    assert "nothing is lost" in next_.cli("takeover", "images:a.raw").stdout
    next_.attach("e", "a.raw", mode="write-back")
    other = nbd.NBD()
    other.connect_uri(next_.uri("e"))
    other.pwrite(b"2" * SECTOR, 0)
    next_.cli("flush", "e")
    # While the other one has it: nothing is read from here, neither old nor new.
    gone.allow_log(".*")
    gone.configure({"defaults": {"origin_timeout": "1s"}})
    gone.start()
    client = nbd.NBD()
    client.connect_uri(gone.uri("d"))
    with pytest.raises(nbd.Error):
        client.pread(SECTOR, 0)
    other.shutdown()
    next_.cli("detach", "e")
    gone.restart()
    client = nbd.NBD()
    client.connect_uri(gone.uri("d"))
    assert client.pread(SECTOR, 0) == b"2" * SECTOR
    assert gone.status("d")["state"] == "ready"


def test_what_has_nothing_to_recover(gateway: GatewayProcess) -> None:
    path = gateway.images / "a.raw"
    path.write_bytes(bytes(1 << 20))
    assert "nothing to recover" in gateway.cli("recover", "images:a.raw").stdout
    assert "nothing to recover" in gateway.cli("recover", str(path)).stdout
    elsewhere = gateway.directory / "b.raw"
    elsewhere.write_bytes(bytes(1 << 20))
    assert "nothing to recover" in gateway.cli("recover", str(elsewhere)).stdout
    assert [x.name for x in gateway.images.iterdir()] == ["a.raw"]
    for wrong in ("images:none.raw", "nowhere:a.raw", str(gateway.directory / "none.raw")):
        refused = gateway.cli("recover", wrong, check=False)
        assert refused.returncode == 1, wrong
        assert len(refused.stderr.splitlines()) == 1
