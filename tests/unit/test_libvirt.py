# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""libvirt's version, the metadata of a domain, and the script that adds reconnect-delay for old libvirts."""

import json
import os
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from forebay.cli.main import main
from forebay.errors import ForebayError, InUseError
from forebay.libvirt import free, hook, version
from forebay.libvirt.disk_xml import disk_element, metadata_element
from forebay.libvirt.domain import WantedDisk, read_domain
from forebay.libvirt.hook import logged_reason
from forebay.units import Mode
from unit.control_fake import FakeGateway, disk, served

Capture = pytest.CaptureFixture[str]

WRAPPER = Path(__file__).resolve().parents[2] / "config" / "libvirt" / "qemu-forebay"

# ----------------------------------------------------------------------------------------------------------- version


@pytest.mark.parametrize(
    ("text", "meant"), [("9.2", (9, 2, 0)), ("10.0.0", (10, 0, 0)), (" 11.3.0\n", (11, 3, 0))]
)
def test_versions(text: str, meant: version.Version) -> None:
    assert version.parse_version(text) == meant


@pytest.mark.parametrize("text", ["", "9", "9.2-1", "v9.2", "9.2.0.1", "nine"])
def test_wrong_versions(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a version of libvirt: write 9\.2 or"):
        version.parse_version(text)


def program(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def only_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one directory in which programs are looked for."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(version, "SYSTEM_PATH", str(tmp_path))
    return tmp_path


def test_the_installed_version_is_that_of_the_daemon(only_path: Path) -> None:
    assert version.installed_version() is None
    program(only_path, "virsh", "echo 11.0.0")
    assert version.installed_version() == (11, 0, 0)
    program(only_path, "libvirtd", 'echo "libvirtd (libvirt) 9.0.0"')
    assert version.installed_version() == (9, 0, 0)
    program(only_path, "virtqemud", "exit 1")  # says nothing: the next one is asked
    assert version.installed_version() == (9, 0, 0)


def test_reconnect_is_given_to_those_who_know_it() -> None:
    for known in (None, (9, 2, 0), (10, 0, 0)):
        assert "<reconnect delay='30'/>" in disk_element(disk("a"), "vda", known)
    for unknown in ((9, 1, 0), (8, 10, 0)):
        assert "reconnect" not in disk_element(disk("a"), "vda", unknown)


async def forebay(run: Path, *argv: str) -> int:
    """The command in this process, against the daemon in `run`."""
    config = run / "forebay.toml"
    config.write_text(f'[gateway]\nrun = "{run}"\n')
    return await trio.to_thread.run_sync(main, ["--config", str(config), *argv])


async def test_attach_and_xml_warn_of_an_old_libvirt(
    only_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(FakeGateway()) as run:
        for old, name in ((True, "a"), (False, "b")):
            program(only_path, "libvirtd", f"echo libvirtd {'9.1.0' if old else '9.2.0'}")
            assert await forebay(run, "attach", name, "images:a.raw") == 0
            out, err = capsys.readouterr()
            assert out == f"{name}: /run/forebay/disks/{name}.sock\n"
            warning = "forebay: warning: libvirt 9.1.0 drops <reconnect> (known from 9.2 on)"
            assert (err.startswith(warning) and len(err.splitlines()) == 1) if old else err == ""
            assert await forebay(run, "xml", name) == 0
            out, err = capsys.readouterr()
            assert ("<reconnect" in out, bool(err)) == (not old, old)
            assert await forebay(run, "xml", name, "--libvirt", "9.1" if not old else "10.0") == 0
            assert ("<reconnect" in capsys.readouterr().out) == old
        program(only_path, "libvirtd", "echo libvirtd 9.1.0")
        assert await forebay(run, "attach", "c", "images:a.raw", "--json") == 0
        assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------- metadata


def xml(inner: str) -> str:
    return (
        "<domain><name>vm1</name><uuid>u-1</uuid><metadata><a:x xmlns:a='urn:a'/>"
        f"<f:disks xmlns:f='urn:forebay:libvirt:1'>{inner}</f:disks></metadata></domain>"
    )


def test_metadata_has_the_arguments_of_attach() -> None:
    found = read_domain(
        xml(
            "<f:disk name='a' image='images:a.raw'/>"
            "<f:disk name='b' image='/x/b.raw' mode='wb' cache-size='1 GiB' preload='trace' overlay='yes'/>"
            "<f:disk name='c' image='nbd://h/c' read-only='true' preload='64K'/>"
            "<f:disk name='d' image='i:d' iops='500' bps='10M' iops-burst='0' bps-burst='1G' weight='5'/>"
        )
    )
    assert (found.name, found.uuid) == ("vm1", "u-1")
    assert found.disks == (
        WantedDisk("a", "images:a.raw"),
        WantedDisk("b", "/x/b.raw", Mode.WRITE_BACK, 1 << 30, "trace", overlay=True),
        WantedDisk("c", "nbd://h/c", preload=65536, read_only=True),
        WantedDisk("d", "i:d", iops=500, bps=10 << 20, iops_burst=0, bps_burst=1 << 30, weight=5),
    )
    assert read_domain("<domain><name>n</name><metadata/></domain>").disks == ()


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        ("<f:disk image='i:a'/>", "metadata: <disk name=''>: 'name' is missing"),
        ("<f:disk name='a'/>", "metadata: <disk name='a'>: 'image' is missing"),
        ("<f:disk name='../a' image='i:a'/>", "name: '../a' is not a name"),
        ("<f:disk name='a' image='a.raw'/>", "image: 'a.raw' is no image: write STORE:PATH"),
        ("<f:disk name='a' image='i:a' mode='fast'/>", "mode: 'fast' is not a mode"),
        ("<f:disk name='a' image='i:a' cache-size='big'/>", "cache-size: 'big' is not a size"),
        ("<f:disk name='a' image='i:a' preload='some'/>", "preload: 'some' is not a size"),
        ("<f:disk name='a' image='i:a' overlay='on'/>", "overlay: 'on' is neither yes nor no"),
        ("<f:disk name='a' image='i:a' cache='1G'/>", "no attribute 'cache' (did you mean 'cache-size'?)"),
        ("<f:disk name='a' image='i:a' overlay='yes' read-only='yes'/>", "either read-only or overlay"),
        ("<f:disk name='a' image='i:a'/><f:disk name='a' image='i:b'/>", "stands there twice"),
        ("<f:disk name='a' image='i:a'", "the domain's XML cannot be read"),
    ],
)  # fmt: skip
def test_wrong_metadata_is_one_line(inner: str, said: str) -> None:
    with pytest.raises(ForebayError) as fault:
        read_domain(xml(inner))
    assert said in str(fault.value)
    assert "\n" not in str(fault.value)


def test_printed_metadata_is_read_back() -> None:
    given = disk("it's<a>") | {"image": "images:a&b'.raw", "mode": "write-back", "overlay": True}
    given["name"] = "vm1"
    given["settings"] = [
        {"key": "iops", "value": 500, "from": "disk"},
        {"key": "bps", "value": "10 MiB", "from": "disk"},
        {"key": "iops_burst", "value": 7, "from": "store"},
        {"key": "max_lag", "value": "5s", "from": "disk"},
    ]
    document = f"<domain><name>n</name><metadata>{metadata_element(given)}</metadata></domain>"
    wanted = WantedDisk("vm1", "images:a&b'.raw", Mode.WRITE_BACK, overlay=True)
    wanted = replace(wanted, iops=500, bps=10 << 20)
    assert read_domain(document).disks == (wanted,)


# ------------------------------------------------------------------------------------------- why a domain has ended


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["{now}: starting up", "{now}: shutting down, reason=saved"], "saved"),
        (
            ["{now}: shutting down, reason=saved", "{now}: shutting down, reason=destroyed"],
            "destroyed",
        ),
        (["{now}: shutting down, reason=destroyed", "qemu: terminating on signal 15"], "destroyed"),
        (["{old}: shutting down, reason=destroyed"], None),
        (["{now}: starting up"], None),
        (["what: shutting down, reason=destroyed"], None),
        ([], None),
    ],
)
def test_reason_in_the_log(lines: list[str], reason: str | None, tmp_path: Path) -> None:
    form = "%Y-%m-%d %H:%M:%S.%f+0000"
    now = datetime.now(UTC)
    times = {"now": now.strftime(form), "old": (now - timedelta(minutes=5)).strftime(form)}
    (tmp_path / "vm1.log").write_text("".join(f"{line.format(**times)}\n" for line in lines))
    assert logged_reason("vm1", str(tmp_path)) == reason
    assert logged_reason("vm2", str(tmp_path)) is None


# ------------------------------------------------------------------------------------------------------ the emulator


def test_the_script_adds_the_delay_to_our_disks_only(tmp_path: Path) -> None:
    def blockdev(path: str, **more: object) -> str:
        server = {"type": "unix", "path": path}
        content = {"driver": "nbd", "server": server, "export": "vm1", "node-name": "n", **more}
        return json.dumps(content, separators=(",", ":"))

    ours, own = "/run/forebay/disks/vm1.sock", {"reconnect-delay": 5}
    program(tmp_path, "qemu", 'for word; do printf "%s\\0" "$word"; done')
    given = ["-name", "a 'b' \"c\" $d\n", "-blockdev", blockdev(ours), blockdev("/run/x/vm1.sock"),
             blockdev(ours, **own), '{"driver":"file","filename":"/x"}', "",
             blockdev("/run/forebay/stores/images.sock")]  # fmt: skip
    done = subprocess.run(
        [WRAPPER, *given], check=True, capture_output=True, env={**os.environ, "QEMU": str(tmp_path / "qemu")}
    )  # fmt: skip
    got = done.stdout.decode().split("\0")[:-1]
    for at in (3, 7):
        assert json.loads(got.pop(at)) == {**json.loads(given.pop(at)), "reconnect-delay": 30}
    assert got == given


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_a_domain_does_not_start_on_a_disk_that_serves_nobody(state: str) -> None:
    found = {"state": state, "reason": "why, and what to do"}
    with pytest.raises(ForebayError, match="it is not served: why, and what to do"):
        hook._check_same(cast("Any", None), WantedDisk("d", "images:d.raw"), found)


# ------------------------------------------------------------------------------------------------- another host's image


class TakenImage:
    """A daemon whose answer is what `holders` says, one by one; then it attaches."""

    def __init__(self, *holders: dict[str, object]) -> None:
        self.holders = list(holders)
        self.tries = 0

    def post(self, target: str, content: dict[str, Any]) -> None:
        assert (target, content) == ("/disks", {"name": "d"})
        self.tries += 1
        if self.holders:
            raise InUseError("images:a is in use, with 12 MiB dirty", self.holders.pop(0))


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were slept, which pass at once."""
    slept: list[float] = []
    monkeypatch.setattr(
        free, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    )
    return slept


def test_a_start_waits_while_another_gateway_serves_the_image(slept: list[float]) -> None:
    taken = TakenImage(*[{"gateway": "g", "serves": True}] * 7)
    free.attach_when_free(cast("Any", taken), {"name": "d"})
    assert (taken.tries, len(slept)) == (8, 7)


def test_it_is_refused_with_how_much_is_left_when_that_takes_too_long(slept: list[float]) -> None:
    taken = TakenImage(*[{"gateway": "g", "serves": True}] * 100)
    with pytest.raises(InUseError, match="12 MiB dirty"):
        free.attach_when_free(cast("Any", taken), {"name": "d"})
    assert sum(slept) == free.FREE_SECONDS


def test_all_disks_of_a_domain_that_comes_share_the_time_that_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(hook, "time", SimpleNamespace(monotonic=lambda: now[0]))
    disk, by = WantedDisk("d", "images:d.raw"), 1000.0 + hook.MIGRATE_SECONDS
    assert hook._coming(disk, by) == {"incoming": True, "patience": hook.MIGRATE_SECONDS}
    now[0] += 70.0
    assert hook._coming(disk, by)["patience"] == hook.MIGRATE_SECONDS - 70.0
    now[0] += 70.0
    assert hook._coming(disk, by)["patience"] == 1.0
    assert hook._coming(disk, None) == {}


def test_a_disk_that_has_not_come_is_not_waited_for_once_more(slept: list[float]) -> None:
    with pytest.raises(InUseError):
        free.attach_when_free(
            cast("Any", Comes({"gateway": "g", "serves": True})), {"incoming": True}
        )
    assert slept == []


class Comes(TakenImage):
    def post(self, target: str, content: dict[str, Any]) -> None:
        del content
        super().post(target, {"name": "d"})


@pytest.mark.parametrize("holder", [{"gateway": "g", "serves": False}, {"program": "qemu"}, {}])
def test_nobody_waits_for_a_gateway_that_is_gone_or_for_a_program(
    slept: list[float], holder: dict[str, object]
) -> None:
    with pytest.raises(InUseError):
        free.attach_when_free(cast("Any", TakenImage(holder)), {"name": "d"})
    assert slept == []
