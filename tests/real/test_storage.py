# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay cache create` and `remove`: a logical volume (of a recorded lvm), a file, a block device."""

import contextlib
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forebay_cache import open_cache
from real import fake_lvm
from real.disk_fixture import cache_info, run, wait_for
from real.gateway_process import GatewayProcess
from real.processes import MIB, loop_device, need, random_image

MakeGateway = Callable[..., GatewayProcess]
Connect = Callable[..., Any]

IMAGE = 12 * MIB
SIZE = 16 * MIB


class Lvm:
    """The recorded lvm on PATH, with a volume group `vg0` on a fast disk (`@ssd`) and a slow one."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "bin").mkdir(parents=True)
        command = home / "bin" / "lvm"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_lvm.__file__} "$@"\n')
        command.chmod(0o755)
        self.write(
            {
                "vg": "vg0",
                "pvs": {
                    "/dev/fast": {"size": 64 * MIB, "tags": ["ssd"]},
                    "/dev/slow": {"size": 256 * MIB, "tags": []},
                },
                "lvs": [],
                "made": 0,
                "kill": "",
                "fail": {},
            }
        )

    def read(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.home / "state.json").read_text())
        return state

    def write(self, state: dict[str, Any]) -> None:
        (self.home / "state.json").write_text(json.dumps(state, indent=2))

    def set(self, **changes: Any) -> None:
        self.write(self.read() | changes)

    def volumes(self) -> list[str]:
        return [lv["name"] for lv in self.read()["lvs"]]

    def changes(self) -> list[str]:
        """The commands that changed something."""
        path = self.home / "calls"
        calls = path.read_text().splitlines() if path.exists() else []
        return [line for line in calls if line.split()[0] not in ("lvs", "vgs", "pvs")]

    def path(self, name: str) -> Path:
        return self.home / "dev" / "vg0" / name

    def rename(self, name: str, new: str) -> None:
        state = self.read()
        state["lvs"][self.volumes().index(name)]["name"] = new
        self.write(state)
        self.path(name).rename(self.path(new))

    def add(self, name: str, tags: list[str]) -> None:
        """A volume that somebody else made."""
        state = self.read()
        segments = fake_lvm.allocate(state, 2 * SIZE, None)
        fake_lvm.add(state, name, 2 * SIZE, tags, segments)
        self.write(state)

    def remove(self) -> None:
        for lv in self.read()["lvs"]:
            subprocess.run(["losetup", "--detach", lv["loop"]], check=False)


@pytest.fixture
def lvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lvm]:
    need("losetup")
    with contextlib.ExitStack() as stack:
        probe = tmp_path / "probe"
        probe.write_bytes(bytes(MIB))
        stack.enter_context(loop_device(probe, 512))  # skips where there are none
        made = Lvm(tmp_path / "lvm")
        monkeypatch.setenv("FAKE_LVM", str(made.home))
        monkeypatch.setattr(fake_lvm, "HOME", made.home)
        monkeypatch.setenv("PATH", f"{made.home / 'bin'}:{os.environ['PATH']}")
        stack.callback(made.remove)
        yield made


LEFT_OF_THE_HOST = {"lock", "events", "history"}
"""What is in STATE without a cache: what happened on this host stays known."""


def refused(gateway: GatewayProcess, *words: str, said: str) -> None:
    done = gateway.cli("cache", *words, check=False)
    assert done.returncode == 1, done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    assert re.search(said, done.stderr), done.stderr
    assert done.stdout == ""


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in sorted(directory.rglob("*"))
        if path.name not in ("lock", "calls") and stat.S_IFMT(path.stat().st_mode) != stat.S_IFBLK
    }


# ------------------------------------------------------------------------------- the life of a volume


def test_a_volume_from_create_to_remove(
    lvm: Lvm, make_gateway: MakeGateway, connect: Connect
) -> None:
    """Made, tagged, formatted, used, renamed, extended in use, refused to be dropped, drained, removed."""
    gateway = make_gateway(start=False)
    done = gateway.cli("cache", "create", "--vg", "vg0", "--size", "15M", "--tag", "@ssd", "--json")
    made = json.loads(done.stdout)
    assert made["device"] == str(lvm.path("forebay"))
    tags = f"--addtag forebay.cache --addtag forebay.uuid={made['uuid']}"
    assert lvm.changes() == [f"lvcreate -y -Zy -Wy -L 15728640b -n forebay {tags} vg0 @ssd"]
    [volume] = lvm.read()["lvs"]
    assert volume["segments"] == [["/dev/fast", SIZE]]

    gateway.start()
    model = bytearray(random_image(gateway.images / "a.raw", IMAGE, 1))
    gateway.attach("d", "a.raw", mode="write-back")
    client = connect(gateway.uri("d"))
    client.pwrite(b"x" * MIB, MIB)
    model[MIB : 2 * MIB] = b"x" * MIB
    info = cache_info(gateway)
    assert (info["uuid"], info["size"]) == (made["uuid"], SIZE)
    with pytest.raises(OSError, match="busy"):
        os.open(volume["loop"], os.O_RDWR | os.O_EXCL)

    gateway.kill()
    lvm.rename("forebay", "renamed")
    lvm.add("forebay", [])
    foreign = Path(lvm.read()["lvs"][1]["backing"]).read_bytes()
    gateway.start()
    client = connect(gateway.uri("d"))
    assert client.pread(IMAGE, 0) == model
    assert cache_info(gateway)["device"] == str(lvm.path("renamed"))

    gateway.cli("cache", "extend", "--size", "32M")
    assert lvm.changes()[1:] == ["lvextend -L 33554432b vg0/renamed @ssd"]
    assert cache_info(gateway)["size"] == 2 * SIZE
    assert client.pread(IMAGE, 0) == model

    refused(gateway, "remove", said="in use: d: stop the VMs and detach")
    client.shutdown()
    wait_for(lambda: gateway.status("d")["clients"] == 0, "a client is left")
    refused(gateway, "remove", said="attached: d: detach them with 'forebay detach NAME' first")
    assert gateway.alive
    gateway.cli("detach", "d")
    done = gateway.cli("cache", "remove")
    assert done.stdout.endswith(": removed\n")
    assert gateway.process is not None
    assert gateway.process.wait(20) == 0
    assert lvm.changes()[2:] == ["lvremove -y vg0/renamed"]
    assert lvm.volumes() == ["forebay"]
    assert Path(lvm.read()["lvs"][0]["backing"]).read_bytes() == foreign
    assert {path.name for path in gateway.state.iterdir()} <= LEFT_OF_THE_HOST
    assert (gateway.images / "a.raw").read_bytes() == model


def test_a_foreign_volume_of_that_name_is_refused(lvm: Lvm, make_gateway: MakeGateway) -> None:
    gateway = make_gateway(start=False)
    gateway.cli("cache", "create", "--vg", "vg0", "--size", "16M")
    state = lvm.read()
    fake_lvm.drop(state, state["lvs"][0])
    lvm.write(state)
    lvm.add("forebay", ["forebay.cache", "forebay.uuid=00000000-0000-4000-8000-000000000000"])
    before = contents(lvm.home)
    said = "forebay: is another device, and no logical volume has the tag forebay.uuid="
    done = gateway.cli("serve", check=False, timeout=30)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert said in done.stderr
    refused(gateway, "extend", "--size", "64M", said=said)
    refused(gateway, "remove", said=said)
    assert contents(lvm.home) == before


def test_two_volumes_that_claim_to_be_the_cache(lvm: Lvm, make_gateway: MakeGateway) -> None:
    """A copy that somebody made has the tags, and not the uuid: the original is taken."""
    gateway = make_gateway(start=False)
    gateway.cli("cache", "create", "--vg", "vg0", "--size", "16M")
    lvm.rename("forebay", "original")
    lvm.add("forebay", lvm.read()["lvs"][0]["tags"])
    gateway.start()
    assert cache_info(gateway)["device"] == str(lvm.path("original"))
    gateway.stop()
    state = lvm.read()
    state["lvs"][0]["uuid"] = "somebody restored it under another"
    lvm.write(state)
    done = gateway.cli("serve", check=False, timeout=30)
    assert re.search(r"vg0/forebay and vg0/original both claim to be cache .*\n$", done.stderr)


def test_an_inactive_volume_is_named(lvm: Lvm, make_gateway: MakeGateway) -> None:
    gateway = make_gateway(start=False)
    gateway.cli("cache", "create", "--vg", "vg0", "--size", "16M")
    state = lvm.read()
    state["lvs"][0]["active"] = False
    lvm.write(state)
    done = gateway.cli("serve", check=False, timeout=30)
    assert done.returncode == 1
    assert "vg0/forebay: not active: run 'lvchange -ay vg0/forebay'\n" in done.stderr


def test_format_gives_the_volume_its_new_uuid(lvm: Lvm, make_gateway: MakeGateway) -> None:
    gateway = make_gateway(start=False)
    gateway.cli("cache", "create", "--vg", "vg0", "--size", "16M")
    gateway.cli("cache", "format", "--force")
    gateway.start()
    uuid = cache_info(gateway)["uuid"]
    assert sorted(lvm.read()["lvs"][0]["tags"]) == ["forebay.cache", f"forebay.uuid={uuid}"]
    lvm.rename("forebay", "other")
    gateway.restart()
    gateway.cli("cache", "remove")
    assert lvm.volumes() == []


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vg", "vg9", "--size", "16M"], "no volume group 'vg9': 'vgs' lists"),
        (["--vg", "vg0", "--size", "1G"], r"no space: 1\.0G are needed and vg0 has 288M free"),
        (
            ["--vg", "vg0", "--size", "80M", "--tag", "@ssd"],
            "no space: 80M are needed and vg0 on @ssd has 32M free",
        ),
        (
            ["--vg", "vg0", "--size", "16M", "--tag", "@nvme"],
            "no physical volume of vg0 has the tag @nvme: set it with 'pvchange --addtag nvme",
        ),
        (["--vg", "vg0", "--size", "1M"], "1048576 bytes is too small"),
        (["--file", "/nowhere/x", "--size", "16M"], "/nowhere: No such file or directory"),
        (["--file", "/etc/passwd", "--size", "16M"], "/etc/passwd: is there already"),
        (["--device", "/etc/passwd"], "/etc/passwd: not a block device"),
        (["--device", "/dev/nowhere"], "/dev/nowhere: No such file or directory"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    words: list[str], said: str, lvm: Lvm, make_gateway: MakeGateway
) -> None:
    lvm.add("data", [])
    gateway = make_gateway(start=False)
    before = contents(lvm.home)
    refused(gateway, "create", *words, said=said)
    assert contents(lvm.home) == before
    assert lvm.changes() == []
    assert contents(gateway.state) == {}


def test_a_name_that_is_taken(lvm: Lvm, make_gateway: MakeGateway) -> None:
    lvm.add("forebay", [])
    lvm.add("other", ["forebay.cache", "forebay.uuid=4711"])
    gateway = make_gateway(start=False)
    words = ("create", "--vg", "vg0", "--size", "16M")
    refused(gateway, *words, said="vg0/forebay is there already, not a Forebay cache: choose")
    gateway.configure({"cache": {"device": "/dev/mapper/vg0-other"}})
    refused(gateway, *words, said=r"vg0/other is there already, a Forebay cache \(4711\)")
    gateway.configure({"cache": {"device": "/dev/vg1/x"}})
    refused(gateway, *words, said=r'not in volume group vg0: write device = "/dev/vg0/NAME"')
    gateway.configure({"cache": {"device": "/dev/vg0/pvmove1"}})
    refused(gateway, *words, said="'pvmove1' cannot be the name of a logical volume")
    assert lvm.changes() == []


def test_a_second_cache_is_refused(lvm: Lvm, make_gateway: MakeGateway, tmp_path: Path) -> None:
    gateway = make_gateway(start=False)
    gateway.cli("cache", "create", "--vg", "vg0", "--size", "16M")
    refused(gateway, "create", "--vg", "vg0", "--size", "16M", said="has a cache already on /")
    file = str(tmp_path / "file")
    refused(gateway, "create", "--file", file, "--size", "16M", said="has a cache already on /")
    embedded = make_gateway()
    refused(embedded, "create", "--file", file, "--size", "16M", said="in use by a daemon")
    embedded.stop()
    refused(embedded, "create", "--file", file, "--size", "16M", said="has a cache already: ")
    assert not Path(file).exists()
    assert len(lvm.volumes()) == 1


def test_lvm_that_fails_or_is_not_there(
    lvm: Lvm, make_gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gateway = make_gateway(start=False)
    words = ("create", "--vg", "vg0", "--size", "16M")
    lvm.set(fail={"lvcreate": "Device busy."})
    refused(gateway, *words, said=r"lvm lvcreate: Device busy\n")
    assert contents(gateway.state) == {}
    lvm.set(fail={})
    gateway.cli("cache", *words)
    lvm.set(fail={"lvextend": "Device busy."})
    refused(gateway, "extend", "--size", "32M", said=r"lvm lvextend: Device busy\n")
    lvm.set(fail={})
    refused(gateway, "extend", "--size", "12M", said=r"has 16M .* a cache only grows")
    refused(gateway, "extend", "--size", "1G", said="no space: ")
    held = os.open(lvm.read()["lvs"][0]["loop"], os.O_RDONLY | os.O_EXCL)
    refused(gateway, "remove", said="in use by another program")
    os.close(held)
    gateway.cli("cache", "remove")
    empty = tmp_path / "empty"
    empty.mkdir()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(empty))
        refused(gateway, *words, said="lvm is not installed: install lvm2, or use a block device")


# ------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("point", ["before lvcreate", "after lvcreate"])
def test_create_that_was_killed_is_run_again(
    point: str, lvm: Lvm, make_gateway: MakeGateway
) -> None:
    gateway = make_gateway(start=False)
    words = ("cache", "create", "--vg", "vg0", "--size", "16M")
    lvm.set(kill=point)
    assert gateway.cli(*words, check=False).returncode == -9
    lvm.set(kill="")
    done = gateway.cli("serve", check=False, timeout=30)
    assert "'forebay cache create' was interrupted: run it again" in done.stderr
    gateway.cli(*words)
    assert lvm.volumes() == ["forebay"]
    gateway.start()
    gateway.stop()


@pytest.mark.parametrize("point", ["before lvremove", "after lvremove"])
def test_remove_that_was_killed_is_run_again(
    point: str, lvm: Lvm, make_gateway: MakeGateway
) -> None:
    gateway = make_gateway(start=False)
    gateway.cli("cache", "create", "--vg", "vg0", "--size", "16M")
    lvm.set(kill=point)
    assert gateway.cli("cache", "remove", check=False).returncode == -9
    lvm.set(kill="")
    done = gateway.cli("serve", check=False, timeout=30)
    assert "'forebay cache remove' was interrupted: run it again" in done.stderr
    gateway.cli("cache", "remove")
    assert lvm.volumes() == []
    assert {path.name for path in gateway.state.iterdir()} <= LEFT_OF_THE_HOST


@pytest.mark.parametrize("point", ["before lvextend", "after lvextend"])
def test_extend_that_was_killed_is_run_again(
    point: str, lvm: Lvm, make_gateway: MakeGateway
) -> None:
    """The volume may be larger than the cache on it then: that is in order."""
    gateway = make_gateway(start=False)
    gateway.cli("cache", "create", "--vg", "vg0", "--size", "16M")
    gateway.start()
    lvm.set(kill=point)
    assert gateway.cli("cache", "extend", "--size", "32M", check=False).returncode == -9
    lvm.set(kill="")
    gateway.restart(kill=True)
    assert cache_info(gateway)["size"] == SIZE
    gateway.cli("cache", "extend", "--size", "32M")
    assert cache_info(gateway)["size"] == 2 * SIZE
    assert len(lvm.changes()) == 2 + (point == "before lvextend")
    gateway.stop()


# ---------------------------------------------------------------------------------- files and devices


def test_a_file_from_create_to_remove(
    make_gateway: MakeGateway, connect: Connect, tmp_path: Path
) -> None:
    gateway = make_gateway(start=False)
    path = tmp_path / "cache file"
    gateway.cli("cache", "create", "--file", path, "--size", "16M")
    assert path.stat().st_size == SIZE
    assert path.stat().st_blocks * 512 >= SIZE, "it has no space of its own"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    gateway.start()
    model = bytearray(random_image(gateway.images / "a.raw", IMAGE, 1))
    gateway.attach("d", "a.raw", mode="write-back")
    client = connect(gateway.uri("d"))
    client.pwrite(b"x" * MIB, MIB)
    model[MIB : 2 * MIB] = b"x" * MIB
    gateway.kill()
    refused(gateway, "remove", said="attached: d: start the daemon, and detach")
    gateway.start()
    assert connect(gateway.uri("d")).pread(IMAGE, 0) == model
    gateway.cli("cache", "extend", "--size", "32M")
    assert path.stat().st_blocks * 512 >= 2 * SIZE
    gateway.cli("detach", "d", "--force")
    gateway.cli("cache", "remove")
    assert not path.exists()
    assert (gateway.images / "a.raw").read_bytes() == model
    assert not (gateway.state / "cache.img").exists()


def test_a_device_from_create_to_remove(make_gateway: MakeGateway, tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(b"somebody's data" + bytes(SIZE - 15))
    with loop_device(backing, 4096) as device:
        gateway = make_gateway(start=False)
        words = ("create", "--device", str(device))
        refused(gateway, *words, said="holds data that is not Forebay's; use --force")
        assert backing.read_bytes()[:15] == b"somebody's data"
        assert contents(gateway.state) == {}
        gateway.cli("cache", *words, "--force")
        gateway.start()
        other = make_gateway(start=False)
        refused(other, *words, "--force", said="in use by another program")
        gateway.cli("cache", "remove")
        assert device.exists()
        assert backing.read_bytes()[:8192] == bytes(8192)
        other.cli("cache", *words, "--force")
        other.cli("cache", "remove")


def test_the_embedded_file_is_removed_too(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    gateway.cli("cache", "remove")
    assert {path.name for path in gateway.state.iterdir()} <= LEFT_OF_THE_HOST
    refused(gateway, "remove", said="there is no cache")
    refused(gateway, "extend", said="there is no cache")
    gateway.start()
    gateway.stop()


def test_data_that_only_the_cache_has_is_not_removed(make_gateway: MakeGateway) -> None:
    """Also where no disk is left to which it belongs."""
    gateway = make_gateway()
    random_image(gateway.images / "a.raw", IMAGE, 1)
    gateway.attach("d", "a.raw", mode="write-back")
    run("qemu-io", "-f", "raw", "-c", "write 0 1M", gateway.uri("d"))
    gateway.kill()
    cache = open_cache(gateway.state / "cache.img", gateway.state / "index")
    cache.records.put("disk", "d", None)
    snapshot = cache.commit.snapshot()
    cache.index.commit_now(snapshot.changes)
    snapshot.succeeded()
    cache.release()
    before = (gateway.state / "cache.img").read_bytes()
    refused(gateway, "remove", said=r"cache.img: 1\.0M are dirty, only this cache has them")
    assert (gateway.state / "cache.img").read_bytes() == before


def test_remove_drains_first(make_gateway: MakeGateway, connect: Connect) -> None:
    """What it refuses to remove is written back all the same."""
    gateway = make_gateway({"defaults": {"max_lag": "1h"}})
    model = bytearray(random_image(gateway.images / "a.raw", IMAGE, 1))
    gateway.attach("d", "a.raw", mode="write-back")
    client = connect(gateway.uri("d"))
    client.pwrite(b"x" * MIB, MIB)
    model[MIB : 2 * MIB] = b"x" * MIB
    client.shutdown()
    wait_for(lambda: gateway.status("d")["clients"] == 0, "a client is left")
    assert gateway.status("d")["dirty_bytes"] == MIB
    refused(gateway, "remove", said="attached: d")
    assert gateway.status("d")["dirty_bytes"] == 0
    assert (gateway.images / "a.raw").read_bytes() == model
    gateway.stop()
