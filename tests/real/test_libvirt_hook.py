# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The hook as libvirt calls it, on a real daemon and without libvirt: every operation, and when things are wrong."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from real.gateway_process import GatewayProcess
from real.processes import MIB, NbdServer
from real.tenant_process import TenantProcess

HOOK = Path(__file__).resolve().parents[2] / "config" / "libvirt" / "hooks" / "qemu.d" / "forebay"

UUID = "11111111-2222-3333-4444-555555555555"
OTHER = "99999999-2222-3333-4444-555555555555"


def domain(*disks: str, uuid: str = UUID, name: str = "vm1") -> str:
    inner = "".join(f"<disk {attributes}/>" for attributes in disks)
    return (
        f"<domain type='kvm' id='1'><name>{name}</name><uuid>{uuid}</uuid><metadata>"
        f"<disks xmlns='urn:forebay:libvirt:1'>{inner}</disks>"
        "</metadata></domain>"
    )


class Hook:
    """`hook("prepare", "begin", xml)` calls the script; `forebay` on its PATH is that of `gateway`."""

    def __init__(self, gateway: GatewayProcess, directory: Path) -> None:
        self.directory = directory
        self.calls = directory / "calls"
        command = directory / "forebay"
        command.write_text(
            f'#!/bin/sh\necho "$@" >>{self.calls}\n'
            f'FOREBAY_CONFIG={gateway.config} exec {sys.executable} -m forebay "$@"\n'
        )
        command.chmod(0o755)

    def __call__(
        self, operation: str, sub_operation: str, xml: str, *, extra: str = "-", name: str = "vm1"
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [HOOK, name, operation, sub_operation, extra],
            input=xml,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={
                "PATH": f"{self.directory}:/usr/sbin:/usr/bin:/sbin:/bin"
            },  # libvirt passes little
        )
        assert done.stdout == "", "libvirt would take this for the domain's XML"
        return done

    def prepare(self, xml: str, *, name: str = "vm1") -> None:
        done = self("prepare", "begin", xml, name=name)
        assert (done.returncode, done.stderr) == (0, "")

    def refused(self, xml: str, operation: str = "prepare") -> str:
        """What it says when it refuses, without the beginning that is always there."""
        done = self(operation, "begin", xml)
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        return line.removeprefix("forebay: domain 'vm1' cannot start: ")

    def release(self, xml: str, *, extra: str = "-", name: str = "vm1") -> None:
        done = self("release", "end", xml, extra=extra, name=name)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def hook(gateway: GatewayProcess, tmp_path: Path) -> Hook:
    with (gateway.images / "a.raw").open("wb") as file:
        file.truncate(4 * MIB)
    return Hook(gateway, tmp_path)


def names(gateway: GatewayProcess) -> list[str]:
    return [line.split()[0] for line in gateway.cli("status").stdout.splitlines()[1:]]


def until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(pid: int) -> bool:
    """Whether the process is gone, or waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_prepare_attaches_and_release_detaches_each_as_often_as_it_is_called(
    gateway: GatewayProcess, hook: Hook
) -> None:
    xml = domain(
        "name='a' image='images:a.raw' mode='write-back' cache-size='1 MiB' preload='64K'",
        "name='b' image='images:a.raw' overlay='no' read-only='no'",
    )
    assert "'b': images:a.raw is written by disk 'a'" in hook.refused(xml)
    assert names(gateway) == []
    xml = domain("name='a' image='images:a.raw' mode='BACK' cache-size='1 MiB' preload='64K'")
    for _ in range(2):
        hook.prepare(xml)
        assert gateway.status("a")["mode"] == "write-back"
        hook("start", "begin", xml)
        hook("started", "begin", xml)
    until(lambda: gateway.status("a")["cached_bytes"] == 64 << 10)
    hook("stopped", "end", xml)
    assert names(gateway) == ["a"]
    for _ in range(2):
        hook.release(xml)
        assert names(gateway) == []


def test_a_domain_of_others_never_reaches_forebay(gateway: GatewayProcess, hook: Hook) -> None:
    gateway.kill()
    xml = "<domain><name>vm1</name><uuid>1</uuid><metadata/></domain>"
    starts = [(operation, "begin") for operation in ("prepare", "start", "migrate", "restore")]
    for operation, sub_operation in [*starts, ("stopped", "end"), ("release", "end")]:
        done = hook(operation, sub_operation, xml)
        assert (done.returncode, done.stderr) == (0, "")
    ours = domain("name='a' image='images:a.raw'")
    for operation in ("started", "reconnect", "attach"):
        done = hook(operation, "begin", ours)
        assert (done.returncode, done.stderr) == (0, "")
    assert not hook.calls.exists()


def test_what_is_wrong_is_one_line(gateway: GatewayProcess, hook: Hook) -> None:
    assert hook.refused(domain("name='a' image='images:none.raw'")).startswith("disk 'a': ")
    said = hook.refused(domain("name='a' image='images:a.raw' mod='wb'"))
    assert said.startswith(
        "metadata: <disk name='a'>: no attribute 'mod' (did you mean 'mode'?): use "
    )
    gateway.stop()
    said = hook.refused(domain("name='a' image='images:a.raw'"))
    assert said.startswith("disk 'a': no daemon at ")
    (hook.directory / "forebay").unlink()
    broken = hook("prepare", "begin", domain("name='a' image='images:a.raw'"))
    assert broken.returncode == 127
    assert "forebay: not found" in broken.stderr
    assert hook("release", "end", domain("name='a' image='images:a.raw'")).returncode == 0


def test_a_disk_that_is_there_already_is_taken_when_it_is_the_one(
    gateway: GatewayProcess, hook: Hook
) -> None:
    gateway.attach("a", "a.raw", mode="write-through")
    (gateway.images / "b.raw").write_bytes(bytes(MIB))
    gone = "'forebay detach a'"
    said = hook.refused(domain("name='a' image='images:b.raw'"))
    assert said == f"disk 'a': it is attached to images:a.raw, not to images:b.raw: {gone}"
    said = hook.refused(domain("name='a' image='images:a.raw' overlay='yes'"))
    assert said == f"disk 'a': it is attached not as overlay: {gone}"
    hook.release(domain("name='a' image='images:a.raw'"))
    assert names(gateway) == ["a"], "nobody took it"
    by_path = domain(f"name='a' image='{gateway.images}/a.raw' mode='wb'")
    hook.prepare(by_path)
    assert gateway.status("a")["mode"] == "write-back"
    hook.release(by_path)
    assert names(gateway) == []


def test_a_disk_of_another_domain_is_neither_taken_nor_detached(
    gateway: GatewayProcess, hook: Hook
) -> None:
    ours = domain("name='a' image='images:a.raw'")
    theirs = domain("name='a' image='images:a.raw'", uuid=OTHER, name="vm2")
    hook.prepare(theirs, name="vm2")
    said = hook.refused(ours)
    assert said.startswith("disk 'a': it is attached for domain 'vm2': stop that, or")
    hook.release(ours)
    assert names(gateway) == ["a"]
    gateway.cli("detach", "a")  # what the line tells to do
    hook.prepare(ours)
    hook.release(theirs, name="vm2")
    assert names(gateway) == ["a"]


def with_labels(xml: str, *elements: str) -> str:
    """The domain as libvirt has it when it starts QEMU: it knows then as whom."""
    seclabels = "".join(elements)
    return xml.replace("</domain>", f"{seclabels}</domain>")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_a_disk_is_its_domains_when_that_starts(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    gateway = make_gateway({"gateway": {"socket_mode": "0666"}})
    hook = Hook(gateway, tmp_path)
    (gateway.images / "a.raw").write_bytes(bytes(MIB))
    xml = domain("name='d' image='images:a.raw'")
    dac = "<seclabel type='dynamic' model='dac'><label>+65534:+65534</label></seclabel>"
    mac = "<seclabel type='dynamic' model='apparmor'><label>libvirt-1</label></seclabel>"
    hook.prepare(xml)
    for path in (gateway.directory, gateway.run, gateway.run / "disks"):
        path.chmod(0o755)
    gateway.allow_log("is refused")
    disk = gateway.sock("d")
    mine, other, stranger, root = (TenantProcess(uid, 65534) for uid in (65534, 65534, 7, 0))
    try:
        assert other.gets_in(disk), "who waits for disks to appear is first"
        assert root.gets_in(disk)
        hook.prepare(xml)
        done = hook("start", "begin", with_labels(xml, dac, mac))
        assert (done.returncode, done.stderr) == (0, "")
        status = gateway.status("d")
        assert (status["peer_label"], status["peer_user"]) == ("libvirt-1", 65534)
        assert status["peer_process"] is None
        assert not stranger.gets_in(disk)
        assert mine.gets_in(disk)
        assert not other.gets_in(disk)
        assert hook("start", "begin", xml).returncode == 0
        assert gateway.status("d")["peer_label"] is None, "a domain without labels again"
        strict = domain("name='d' image='images:a.raw' peer='label'")
        assert hook("start", "begin", with_labels(strict, mac)).returncode == 0
        assert gateway.status("d")["peer"] == "label"
        assert not mine.gets_in(disk), "this kernel tells no labels"
    finally:
        for one in (mine, other, stranger, root):
            one.end()


def test_a_domain_does_not_start_where_its_disk_cannot_be_given_to_it(
    gateway: GatewayProcess, hook: Hook
) -> None:
    said = hook.refused(domain("name='d' image='images:a.raw'"), "start")
    assert said.startswith("no disk 'd'")


def test_what_release_could_not_do_is_tried_until_it_is_done(
    gateway: GatewayProcess, hook: Hook, connect: Callable[..., object]
) -> None:
    xml = domain("name='a' image='images:a.raw' mode='write-back'")
    hook.prepare(xml)
    gateway.stop()
    hook.release(xml)
    gateway.start()
    until(lambda: names(gateway) == [], 40)
    hook.prepare(xml)
    client = connect(gateway.uri("a"))
    hook.release(xml)  # somebody is still connected
    assert names(gateway) == ["a"]
    hook.prepare(xml)  # found as it is, and not detached any more
    client.shutdown()  # type: ignore[attr-defined]
    until(lambda: gateway.status("a")["clients"] == 0)
    hook.release(xml)
    until(lambda: names(gateway) == [], 40)


@pytest.fixture
def slow_overlay(
    make_gateway: Callable[..., GatewayProcess],
    start_nbdkit: Callable[..., NbdServer],
) -> tuple[GatewayProcess, str]:
    """A gateway, and the XML of a domain with an overlay on an image whose reads take 4 s."""
    gateway = make_gateway()
    origin = start_nbdkit("memory", "4M", "rdelay=4", filters=["delay"])
    uri = origin.uri.replace("&", "&amp;")
    return gateway, domain(f"name='a' image='{uri}' overlay='yes'")


KILLED = """
import nbd, sys, time
client = nbd.NBD()
client.connect_uri(sys.argv[1])
client.zero(4096, 0)
client.pwrite(b"S" * 4096, 0)
client.aio_pread(nbd.Buffer(4096), 1 << 20)
client.poll(1)
print("reads", flush=True)
time.sleep(1000)
"""


def test_a_killed_vm_with_a_read_under_way_keeps_no_disk_attached(
    slow_overlay: tuple[GatewayProcess, str], tmp_path: Path, connect: Callable[..., object]
) -> None:
    gateway, xml = slow_overlay
    hook = Hook(gateway, tmp_path)
    hook.prepare(xml)
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", KILLED, gateway.uri("a")], stdout=subprocess.PIPE
    ) as vm:
        assert vm.stdout is not None
        assert vm.stdout.readline() == b"reads\n"
        assert gateway.status("a")["clients"] == 1
        vm.kill()
    until(lambda: gateway.status("a")["clients"] == 0, 3)
    hook.release(xml, extra="destroyed")
    until(lambda: names(gateway) == [], 3)


@pytest.mark.parametrize("kept", [False, True])
def test_an_overlay_that_a_run_left_behind_is_empty_unless_it_was_saved(
    gateway: GatewayProcess, hook: Hook, connect: Callable[..., object], kept: bool
) -> None:
    xml = domain("name='a' image='images:a.raw' overlay='yes'")
    hook.prepare(xml)
    client = connect(gateway.uri("a"))
    client.pwrite(b"S" * 4096, 0)  # type: ignore[attr-defined]
    client.shutdown()  # type: ignore[attr-defined]
    until(lambda: gateway.status("a")["clients"] == 0)
    if kept:
        hook.release(xml, extra="saved")
        assert hook("restore", "begin", xml).returncode == 0
    hook.prepare(xml)  # without it, as where the host's libvirtd was killed
    data = connect(gateway.uri("a")).pread(4096, 0)  # type: ignore[attr-defined]
    assert data == (b"S" if kept else b"\0") * 4096


def test_a_store_that_hangs_does_not_hold_up_the_end_nor_the_next_start(
    gateway: GatewayProcess,
    hook: Hook,
    start_nbdkit: Callable[..., NbdServer],
    connect: Callable[..., object],
) -> None:
    origin = start_nbdkit("memory", "4M")
    xml = domain(f"name='a' image='{origin.uri.replace('&', '&amp;')}' mode='write-back'")
    hook.prepare(xml)
    origin.pause()
    client = connect(gateway.uri("a"))
    client.pwrite(b"x" * 65536, 0)  # type: ignore[attr-defined]
    client.flush()  # type: ignore[attr-defined]
    client.shutdown()  # type: ignore[attr-defined]
    until(lambda: gateway.status("a")["clients"] == 0)
    began = time.monotonic()
    hook.release(xml)
    assert 4 < time.monotonic() - began < 15
    behind = int((gateway.directory / "libvirt-run" / "a").read_text().split()[-1])
    assert not ended(behind)
    began = time.monotonic()
    hook.prepare(xml)
    assert time.monotonic() - began < 4
    assert ended(behind)
    assert gateway.status("a")["dirty_bytes"] == 65536
    client = connect(gateway.uri("a"))
    assert client.pread(65536, 0) == b"x" * 65536  # type: ignore[attr-defined]
    client.shutdown()  # type: ignore[attr-defined]
    until(lambda: gateway.status("a")["clients"] == 0)
    origin.resume()
    hook.release(xml)
    until(lambda: names(gateway) == [])
    assert connect(origin.uri).pread(65536, 0) == b"x" * 65536  # type: ignore[attr-defined]


def test_a_daemon_that_hangs_does_not_hold_up_a_start_for_ever(
    gateway: GatewayProcess, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys; from forebay import cli; from forebay.libvirt import hook; "
        "hook.PREPARE_SECONDS = 1.0; sys.exit(cli.main(sys.argv[1:]))"
    )
    os.kill(gateway.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, "--config", str(gateway.config), "libvirt-hook", "vm1",
             "prepare", "begin"],
            input=domain("name='a' image='images:a.raw'"), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert time.monotonic() - began < 10
    finally:
        os.kill(gateway.pid, signal.SIGCONT)
    assert done.returncode == 1
    assert "no answer for 1 s" in done.stderr


@pytest.mark.parametrize(
    ("extra", "kept"), [("saved", True), ("-", True), ("destroyed", False), ("shutdown", False)]
)
def test_an_overlay_stays_for_a_domain_that_comes_back(
    gateway: GatewayProcess, hook: Hook, extra: str, kept: bool
) -> None:
    xml = domain("name='a' image='images:a.raw' overlay='yes'")
    hook.prepare(xml)
    hook.release(xml, extra=extra)
    assert names(gateway) == (["a"] if kept else [])
    done = hook("restore", "begin", xml)
    assert done.returncode == (0 if kept else 1)
    if not kept:
        assert "what it wrote to overlay 'a' is gone" in done.stderr


def test_disks_of_two_instances(
    gateway: GatewayProcess, hook: Hook, make_gateway: Callable[..., GatewayProcess]
) -> None:
    fast = make_gateway()
    (fast.images / "a.raw").write_bytes(bytes(MIB))
    (gateway.directory / "fast.toml").symlink_to(fast.config)
    ours = "name='a' image='images:a.raw'"
    said = hook.refused(domain(ours, "name='b' image='images:a.raw' instance='slow'"))
    assert "slow.toml: no such file" in said
    xml = domain(ours, "name='b' image='images:a.raw' instance='fast'")
    hook.prepare(xml)
    assert (names(gateway), names(fast)) == (["a"], ["b"])
    hook.release(xml)
    assert (names(gateway), names(fast)) == ([], [])


def test_an_overlay_does_not_migrate(gateway: GatewayProcess, hook: Hook) -> None:
    done = hook("migrate", "begin", domain("name='a' image='images:a.raw' overlay='yes'"))
    assert done.returncode == 1
    assert (
        "domain 'vm1' cannot come here: disk 'a': what an overlay has lies on its own"
        in done.stderr
    )
    assert "add --with-data, and it goes along" in done.stderr
    assert names(gateway) == []


def test_a_disk_comes_along_when_its_domain_migrates(
    make_gateway: Callable[..., GatewayProcess], gateway: GatewayProcess, hook: Hook
) -> None:
    there = make_gateway({"stores.images": {"path": str(gateway.images), "mode": "write-back"}})
    there.attach("a", "a.raw")
    (gateway.images / "b.raw").write_bytes(bytes(MIB))
    xml = domain("name='a' image='images:a.raw'", "name='b' image='images:b.raw' read-only='yes'")
    assert hook("migrate", "begin", xml).returncode == 0
    assert (gateway.status("a")["state"], gateway.status("b")["state"]) == ("incoming", "ready")
    assert there.status("a")["handover"] in ("prepared", "released")
    hook.prepare(xml)
    assert gateway.status("a")["state"] == "incoming"
    gateway.cli("handover", "finish", "a")
    assert gateway.status("a")["state"] == "ready"
    assert there.status("a")["state"] == "handed-over"
    there.cli("detach", "a")
    hook.release(xml)
    assert names(gateway) == []
    assert not (gateway.images / "a.raw.forebay").exists()


def test_a_domain_stays_where_it_is_if_a_disk_cannot_come(
    make_gateway: Callable[..., GatewayProcess], gateway: GatewayProcess, hook: Hook
) -> None:
    there = make_gateway({"stores.images": {"path": str(gateway.images), "mode": "write-back"}})
    there.attach("a", "a.raw")
    xml = domain("name='a' image='images:a.raw'", "name='b' image='images:not-there.raw'")
    done = hook("migrate", "begin", xml)
    assert done.returncode == 1
    assert "domain 'vm1' cannot come here: disk 'b': images:not-there.raw" in done.stderr
    assert names(gateway) == []


def test_metadata_printed_by_the_command_is_what_the_hook_reads(
    gateway: GatewayProcess, hook: Hook
) -> None:
    gateway.attach("a", "a.raw", "--overlay", mode="write-through")
    printed = gateway.cli("xml", "a", "--metadata").stdout
    gateway.cli("detach", "a")
    xml = f"<domain><name>vm1</name><uuid>{UUID}</uuid><metadata>{printed}</metadata></domain>"
    hook.prepare(xml)
    status = gateway.status("a")
    assert (status["mode"], status["overlay"]) == ("write-through", True)
