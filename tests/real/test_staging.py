# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Staging with real hosts, and real libtorrent: who gets what from whom, and what a wrong, late or dead one costs."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from forebay.client import Client
from forebay.errors import ForebayError
from forebay.staging import orders
from forebay.staging.orders import Order
from real.disk_fixture import ask, wait_for
from real.fuse_mount import FuseMount, need_fuse
from real.gateway_process import GatewayProcess
from real.processes import MIB, random_image
from real.staging_bed import Liar, StagingHost, hosts

Make = Callable[..., GatewayProcess]

PIECE = 64 << 10
IMAGE = "images:a.raw"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    directory = tmp_path / "store"
    directory.mkdir()
    return directory


def torrent_of(host: StagingHost | GatewayProcess) -> bytes:
    gateway = host.gateway if isinstance(host, StagingHost) else host
    return base64.b64decode(ask(gateway, f"/stages/torrent?image={IMAGE}")["torrent"])


def begin(staging: list[StagingHost], *more: str, rate: str = "") -> None:
    """Have the first one give the image to the others; `more` are peers that are told of as well."""
    peers = ",".join([*(host.address for host in staging), *more])
    words = ["--rate", rate] if rate else []
    staging[0].stage(IMAGE, "--peers", peers, "--source", *words)
    for host in staging[1:]:
        host.stage(IMAGE, "--peers", peers, *words)


def purged(gateway: GatewayProcess) -> None:
    """Have the cache empty of the image, as soon as it was let go."""
    wait_for(
        lambda: gateway.cli("purge", IMAGE, check=False).returncode == 0, "the image was let go"
    )


# --------------------------------------------------------------------------------------------------- what gets where


def test_hosts_get_an_image_from_each_other_and_the_store_is_read_once(images: Path) -> None:
    holes = [(4 * MIB, 20 * MIB)]
    content = random_image(images / "a.raw", 24 * MIB + 5000, 1, holes)
    with hosts(3, images) as staging:
        made = staging[0].make(IMAGE)
        assert made["made"]
        assert made["origin_read_bytes"] <= 1.1 * len(content)
        begin(staging)
        for host in staging[1:]:
            told = host.wait_state("done")
            assert told["origin_read_bytes"] == 0, "all came from other hosts"
            assert told["refused_pieces"] == 0
        assert staging[0].told()["origin_read_bytes"] == 0, "it was read once"
        for host in staging:
            assert host.read("a.raw") == content
            [known] = json.loads(host.gateway.cli("images", "--json").stdout)
            assert known["cached_bytes"] == len(content)
            assert known["device_bytes"] <= 9 * MIB, "zeros take no room"
            assert not host.gateway.unexpected_log()


def test_a_host_that_lies_gets_nothing_into_a_cache(images: Path, tmp_path: Path) -> None:
    content = random_image(images / "a.raw", 8 * MIB, 2)
    wrong = bytes(byte ^ 0xFF for byte in content)
    with hosts(2, images) as staging:
        source, victim = staging
        source.gateway.cli("stage", IMAGE, "--peers", source.address, "--source")
        liar = Liar(torrent_of(source), wrong, tmp_path / "liar")
        try:
            liar.lie_to([victim.address])
            # at first the liar is all that there is to ask; the source comes when it has been believed
            victim.stage(IMAGE, "--peers", f"{victim.address},{liar.address}")
            wait_for(lambda: liar.sent > PIECE, "the liar has sent something")
            wait_for(lambda: victim.told()["refused_pieces"] > 0, "and was found out")
            assert victim.told()["cached_bytes"] == 0
            assert victim.read("a.raw") == content, "who reads the image sees the image"
            begin(staging, liar.address)
            victim.wait_state("done")
            assert victim.read("a.raw") == content
        finally:
            liar.close()


# ------------------------------------------------------------------------------------------------------ kills, changes


@pytest.mark.parametrize("dies", ["stager", "daemon"])
def test_a_host_goes_on_with_what_it_has_after_a_kill(images: Path, dies: str) -> None:
    content = random_image(images / "a.raw", 24 * MIB, 3)
    with hosts(2, images) as staging:
        victim = staging[1]
        begin(staging, rate="4M")
        wait_for(lambda: victim.told()["cached_bytes"] > 8 * MIB, "a third is there")
        if dies == "stager":
            victim.kill_stager()
            victim.start_stager()
        else:
            time.sleep(2.5)  # what was read until two seconds ago is on record
            victim.gateway.restart(kill=True)
        told = victim.wait_state("done")
        assert told["origin_read_bytes"] < 2 * MIB, "nearly all came from the other host"
        assert victim.read("a.raw") == content
        lacking = [
            int(line.split(" pieces are lacking")[0].rsplit(" ", 1)[1])
            for line in victim.log_text().splitlines()
            if " pieces are lacking" in line
        ]
        assert lacking[0] == len(content) // PIECE
        if dies == "stager":
            assert lacking[-1] < lacking[0], "what there was is not fetched again"


def test_an_image_that_changes_is_never_staged_as_it_was(images: Path) -> None:
    path = images / "a.raw"
    random_image(path, 16 * MIB, 4)
    with hosts(2, images) as staging:
        victim = staging[1]
        begin(staging, rate="2M")
        wait_for(lambda: victim.told()["cached_bytes"] > MIB, "some of it is there")
        new = random_image(images / "new", 16 * MIB, 5)
        path.write_bytes(new)  # the same file, with other content
        victim.gateway.allow_log("was changed by somebody else")
        staging[0].gateway.allow_log("was changed by somebody else")
        for host in staging:
            host.wait_reason("stage it anew")
        assert victim.read("a.raw") == new
        staging[0].stage(IMAGE, "--peers", staging[0].address, "--source")
        begin(staging)
        victim.wait_state("done")
        assert victim.read("a.raw") == new


def test_a_host_whose_source_is_gone_reads_the_store_in_the_end(images: Path) -> None:
    content = random_image(images / "a.raw", 4 * MIB, 6)
    with hosts(1, images) as [host]:
        host.kill_stager()
        host.gateway.cli("stage", IMAGE, "--peers", "127.0.0.9", "--source")
        host.gateway.cli("stage", IMAGE, "--end")
        purged(host.gateway)
        host.stage(IMAGE, "--peers", "127.0.0.9")
        assert host.told()["cached_bytes"] == 0
        code = (
            "import sys, forebay.swarm.stager as s; s.STALL_SECONDS = (1.0, 2.0); "
            "from forebay.cli import main; sys.exit(main(sys.argv[1:]))"
        )
        assert host.mount is not None
        words = ["stager", str(host.mount.path), "--config", str(host.gateway.config)]
        with host.log.open("ab") as log:
            host.stager = subprocess.Popen(
                [sys.executable, "-c", code, *words], stdout=log, stderr=log, cwd="/"
            )
        host.wait_state("done")
        assert host.read("a.raw") == content


# -------------------------------------------------------------------------------------------------- offers, by hand


@pytest.fixture
def offered(make_gateway: Make, images: Path) -> Iterator[tuple[GatewayProcess, Path, bytes]]:
    """A gateway that lacks an image, the file by which pieces of it are offered, and its content."""
    need_fuse()
    content = random_image(images / "a.raw", 40 * PIECE + 100, 7, [(8 * PIECE, 8 * PIECE)])
    gateway = make_gateway({"stores.images": {"path": str(images)}})
    gateway.cli("stage", IMAGE, "--peers", "127.0.0.9", "--source")
    gateway.cli("stage", IMAGE, "--end")
    purged(gateway)
    gateway.cli("stage", IMAGE, "--peers", "127.0.0.9")
    mount = FuseMount(gateway)
    try:
        yield gateway, mount.path / "stage" / "images" / "a.raw", content
    finally:
        mount.remove()


def told(gateway: GatewayProcess) -> dict[str, Any]:
    [one] = ask(gateway, "/stages")
    assert isinstance(one, dict)
    return one


def write(file: int, content: bytes, start: int, end: int, *, wrong: bool = False) -> None:
    data = bytes(end - start) if wrong else content[start:end]
    assert os.pwrite(file, data, start) == len(data)


def test_only_what_is_right_becomes_data_of_the_image(
    offered: tuple[GatewayProcess, Path, bytes],
) -> None:
    gateway, path, content = offered
    zeros = told(gateway)["cached_bytes"]
    assert zeros == 8 * PIECE, "what the torrent says to be zeros is there without being sent"
    file = os.open(path, os.O_RDWR)
    try:
        write(file, content, 0, PIECE)
        assert told(gateway)["cached_bytes"] == zeros + PIECE
        write(file, content, PIECE, 2 * PIECE, wrong=True)
        assert os.pread(file, PIECE, PIECE) == bytes(PIECE), "who wrote it finds it wrong"
        assert told(gateway)["cached_bytes"] == zeros + PIECE
        assert told(gateway)["refused_pieces"] == 1
        write(file, content, PIECE, 2 * PIECE)  # the same piece, right this time
        assert told(gateway)["cached_bytes"] == zeros + 2 * PIECE
        for part in (3, 0, 2, 1):  # block by block, in any order
            start = 2 * PIECE + part * PIECE // 4
            write(file, content, start, start + PIECE // 4)
        assert told(gateway)["cached_bytes"] == zeros + 3 * PIECE
        write(file, content, 3 * PIECE + 7, 3 * PIECE + 1000)  # no more than a part
        assert os.pread(file, PIECE, 3 * PIECE) == content[3 * PIECE : 4 * PIECE]
        write(file, content, 40 * PIECE, len(content))  # the last one is short
        assert os.pread(file, 2 * PIECE, 39 * PIECE) == content[39 * PIECE :]
    finally:
        os.close(file)
    assert path.read_bytes() == content


def test_what_came_is_given_away_again_without_asking_the_daemon(
    offered: tuple[GatewayProcess, Path, bytes],
) -> None:
    gateway, path, content = offered
    file = os.open(path, os.O_RDWR)
    with ThreadPoolExecutor(1) as threads:
        try:
            write(file, content, 0, PIECE)
            assert os.pread(file, PIECE, 8 * PIECE) == content[8 * PIECE : 9 * PIECE]
            os.kill(gateway.pid, signal.SIGSTOP)
            for start in (0, 8 * PIECE):
                found = threads.submit(os.pread, file, PIECE, start).result(20)
                assert found == content[start : start + PIECE]
        finally:
            os.kill(gateway.pid, signal.SIGCONT)
            os.close(file)


def test_what_is_offered_and_wrong_is_seen_by_no_other_reader(
    offered: tuple[GatewayProcess, Path, bytes],
) -> None:
    gateway, path, content = offered
    other = path.parents[2] / "images" / "images" / "a.raw"
    file = os.open(path, os.O_RDWR)
    try:
        for start in range(0, 8 * PIECE, PIECE):
            write(file, content, start, start + PIECE, wrong=True)
        write(file, content, 9 * PIECE, 10 * PIECE - 1)
        assert other.read_bytes() == content
        assert told(gateway)["refused_pieces"] == 8
    finally:
        os.close(file)
    gateway.restart(kill=True)
    wait_for(other.exists, "the mount is back")
    assert other.read_bytes() == content


def test_offers_end_when_the_image_is_changed(
    offered: tuple[GatewayProcess, Path, bytes], images: Path
) -> None:
    gateway, path, content = offered
    gateway.allow_log("was changed by somebody else")
    file = os.open(path, os.O_RDWR)
    try:
        write(file, content, 0, PIECE)
        new = random_image(images / "new", len(content), 8)
        shutil.copyfile(images / "new", images / "a.raw")
        wait_for(lambda: not _takes(file, content, PIECE), "offers are refused")
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)  # as whoever stages does then
        with pytest.raises(OSError, match="Input/output"):
            os.pread(file, PIECE, 0)
    finally:
        os.close(file)
    assert (path.parents[2] / "images" / "images" / "a.raw").read_bytes() == new
    failed = gateway.cli("stage", IMAGE, "--peers", "127.0.0.9", check=False)
    assert failed.returncode == 1
    assert "stage it a" in failed.stderr, "again, or anew"


def _takes(file: int, content: bytes, start: int) -> bool:
    time.sleep(0.1)
    try:
        write(file, content, start, start + PIECE)
    except OSError:
        return False
    return True


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["images:none.raw", "--peers", "a", "--source"], "none.raw"),
        (["images:empty.raw", "--peers", "a", "--source"], "is empty"),
        (["images:a.raw", "--peers", "a"], "no torrent beside"),
        (["nbd://somewhere/x", "--peers", "a"], "images in stores"),
        (["--end"], "which image"),
    ],
)
def test_what_cannot_be_staged_is_refused_in_one_line(
    make_gateway: Make, images: Path, words: list[str], text: str
) -> None:
    gateway = make_gateway({"stores.images": {"path": str(images)}})
    random_image(images / "a.raw", MIB, 9)
    (images / "empty.raw").touch()
    failed = gateway.cli("stage", *words, check=False)
    assert failed.returncode == 1
    assert text in failed.stderr
    assert len(failed.stderr.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"d8:announce", b"i1e", os.urandom(3000)])
def test_a_torrent_that_is_none_is_passed_over_and_made_anew(
    make_gateway: Make, images: Path, content: bytes
) -> None:
    gateway = make_gateway({"stores.images": {"path": str(images)}})
    gateway.allow_log("is not used, no torrent")
    random_image(images / "a.raw", MIB, 10)
    (images / "a.raw.forebay").mkdir()
    (images / "a.raw.forebay" / "torrent").write_bytes(content)
    failed = gateway.cli("stage", IMAGE, "--peers", "a", check=False)
    assert "is not used" in failed.stderr
    gateway.cli("stage", IMAGE, "--peers", "a", "--source")
    assert torrent_of(gateway) == (images / "a.raw.forebay" / "torrent").read_bytes()


def test_a_torrent_of_other_content_is_refused_and_orders_outlive_a_kill(
    make_gateway: Make, images: Path
) -> None:
    gateway = make_gateway({"stores.images": {"path": str(images)}})
    random_image(images / "a.raw", MIB, 11)
    gateway.cli("stage", IMAGE, "--peers", "a,b:7,[::1]:9", "--source", "--rate", "1M")
    before = told(gateway)
    gateway.restart(kill=True)
    after = told(gateway)
    assert (after["image"], after["hosts"], after["source"]) == (IMAGE, 3, True)
    assert before["size"] == after["size"]
    (images / "a.raw").write_bytes(os.urandom(MIB))
    gateway.allow_log("changed|another file")
    failed = gateway.cli("stage", IMAGE, "--peers", "a", check=False)
    assert "as it was before" in failed.stderr


def test_a_cache_that_cannot_hold_the_whole_image_takes_no_part(
    make_gateway: Make, images: Path
) -> None:
    random_image(images / "a.raw", 24 * MIB, 12)
    gateway = make_gateway({"stores.images": {"path": str(images)}, "cache": {"size": 16 * MIB}})
    gateway.cli("stage", IMAGE, "--peers", "a", "--source")  # it has the store to give from
    gateway.cli("stage", IMAGE, "--end")
    failed = gateway.cli("stage", IMAGE, "--peers", "a", check=False)
    assert failed.returncode == 1
    assert "of the cache here, which has" in failed.stderr, (
        "though less is lacking than it can hold"
    )
    assert "forebay cache extend" in failed.stderr
    assert ask(gateway, "/stages") == []


def test_two_who_want_a_torrent_at_once_have_the_same_one(make_gateway: Make, images: Path) -> None:
    gateway = make_gateway({"stores.images": {"path": str(images)}})
    random_image(images / "a.raw", 16 * MIB, 13)
    client = Client(str(gateway.control))

    def make(_number: int) -> bool:
        made = client.follow("POST", "/stages/torrent", {"image": IMAGE}, lambda _done, _all: None)
        return bool(made["made"])

    with ThreadPoolExecutor(3) as threads:
        assert sorted(threads.map(make, range(3))) == [False, False, True]


def test_an_order_that_cannot_be_kept_is_none_and_one_that_cannot_be_ended_stays(
    make_gateway: Make, images: Path
) -> None:
    gateway = make_gateway({"stores.images": {"path": str(images)}})
    for name in ("a.raw", "b.raw"):
        random_image(images / name, MIB, 11)
    gateway.cli("stage", IMAGE, "--peers", "a,b:7", "--source")
    in_the_way = gateway.state / f"{orders.FILE}.new"
    in_the_way.mkdir()
    for words in (("images:b.raw", "--peers", "a", "--source"), (IMAGE, "--end")):
        failed = gateway.cli("stage", *words, check=False)
        assert failed.returncode == 1
        assert f"{orders.FILE} cannot be written" in failed.stderr
        assert len(failed.stderr.splitlines()) == 1
    assert told(gateway)["hosts"] == 2
    [kept] = orders.load(gateway.state)
    assert (kept.image, len(kept.peers)) == (IMAGE, 2)
    in_the_way.rmdir()
    gateway.cli("stage", "images:b.raw", "--peers", "a", "--source")
    assert [one.image for one in orders.load(gateway.state)] == [IMAGE, "images:b.raw"]
    gateway.cli("stage", IMAGE, "--end")
    assert [one.image for one in orders.load(gateway.state)] == ["images:b.raw"]


def test_the_hosts_of_an_order_are_told_once(make_gateway: Make, images: Path) -> None:
    gateway = make_gateway({"stores.images": {"path": str(images)}})
    random_image(images / "a.raw", MIB, 11)
    client = Client(str(gateway.control))
    gateway.cli("stage", IMAGE, "--peers", "a", "--source")
    first = client.post("/stages/report", {"stages": []})
    assert first["orders"][0]["peers"] == [["a", 10881]]
    again = client.post("/stages/report", {"stages": [], "known": first["known"]})
    assert "peers" not in again["orders"][0]
    assert again["known"] == first["known"]
    gateway.cli("stage", IMAGE, "--peers", "a,b", "--source")
    for known in (first["known"], 0):
        changed = client.post("/stages/report", {"stages": [], "known": known})
        assert len(changed["orders"][0]["peers"]) == 2
    with pytest.raises(ForebayError, match="known"):
        client.post("/stages/report", {"stages": [], "known": "x"})


def test_what_is_staged_of_a_store_that_is_no_more_can_be_ended(
    make_gateway: Make, images: Path
) -> None:
    gateway = make_gateway({"stores.images": {"path": str(images)}})
    gateway.stop()
    orders.save(gateway.state, [Order("gone:a.raw", MIB, (("a", 1),))])
    gateway.start()
    assert told(gateway)["image"] == "gone:a.raw"
    assert "ended" in gateway.cli("stage", "gone:a.raw", "--end").stdout
    assert ask(gateway, "/stages") == []
    assert orders.load(gateway.state) == []
