# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The units under a real systemd, in a container: start, restart without guest errors, watchdog, drain, FUSE mount."""

import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forebay.events.kinds import KINDS
from forebay.origin.worker import program
from real.confined import CODE, EXPECTED, landlock
from real.container import REPOSITORY, Container
from real.disk_fixture import wait_for
from real.processes import MIB, accepts, random_image
from real.staging_bed import StagingHost, free_address, need_staging, running
from real.steady_guest import SteadyGuest

RESTARTS = int(os.environ.get("FOREBAY_RESTARTS", "5"))
"""Planned restarts under load: 20 is the bar, 5 are quick."""

UNITS = REPOSITORY / "systemd"
VENV = Path(os.environ.get("VENV", ".venv"))
PAUSE_SECONDS = 1.0 if RESTARTS >= 20 else 5.0
"""The bar, for a machine that does nothing else; in a quick run it may be busy."""

SIZE = 16 * MIB
IMAGES = "/var/lib/images"

STAGING = free_address()
"""At which it stages: it shares the network with the tests."""

CONFIG = f"""
[gateway]
state = "/var/lib/NAME"
run = "/run/NAME"
[cache]
size = "256 MiB"
[defaults]
max_lag = "1h"
[staging]
listen = "{STAGING}"
[stores.images]
path = "{IMAGES}"
"""

DROP_IN = """
[Service]
WatchdogSec=2
Environment=PYTHONPYCACHEPREFIX=/opt/pyc
"""


class Host:
    """A container with Forebay installed and running."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.run = container.run

    def install(self) -> None:
        environment = (REPOSITORY / VENV).resolve()
        _check_readable(environment)
        self.run(REPOSITORY / "tools/install.sh", "install", ENVIRONMENT=str(environment))
        self.run("install", "-d", "-o", "forebay", "-g", "forebay", IMAGES)
        self.run("install", "-d", "-m", "1777", "/opt/pyc")
        for name, config in (("forebay", "forebay.toml"), ("forebay-b", "b.toml")):
            self.write(f"/etc/forebay/{config}", CONFIG.replace("NAME", name))
        for unit in ("forebay", "forebay@", "forebay-fuse"):
            self.write(f"/etc/systemd/system/{unit}.service.d/test.conf", DROP_IN)
        self.run("systemctl", "daemon-reload")
        self.run("systemctl", "start", "forebay")

    def write(self, path: str, text: str) -> None:
        place = self.container.inside(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    def cli(self, *words: str) -> str:
        return self.run("forebay", *words).stdout

    def disk(self, name: str, mode: str = "write-back", *options: str) -> bytes:
        """A disk on an image of its own; the image's content."""
        image = self.container.inside(f"{IMAGES}/{name}.raw")
        content = random_image(image, SIZE, sum(name.encode()))
        self.run("chown", "forebay:", f"{IMAGES}/{name}.raw")
        control = self.container.inside("/run/forebay/control.sock")
        wait_for(lambda: accepts(control), "the daemon of the test before is not back")
        self.cli("attach", name, f"images:{name}.raw", "--mode", mode, *options)
        return content

    def status(self, name: str) -> dict[str, Any]:
        [found] = json.loads(self.cli("status", name, "--json"))
        assert isinstance(found, dict)
        return found

    def image(self, name: str) -> bytes:
        return self.container.inside(f"{IMAGES}/{name}.raw").read_bytes()

    def socket(self, name: str, run: str = "/run/forebay") -> Path:
        return self.container.inside(f"{run}/disks/{name}.sock")

    def uri(self, name: str, run: str = "/run/forebay") -> str:
        return f"nbd+unix:///?socket={self.socket(name, run)}"

    def pid(self, unit: str = "forebay") -> int:
        """Of the daemon, inside."""
        return int(self.container.show(f"{unit}.service", "MainPID"))


def _check_readable(path: Path) -> None:
    if path.is_relative_to("/tmp") or path.is_relative_to("/var/tmp"):
        pytest.skip(f"{path}: the unit has a /tmp of its own, and does not see it there")
    for place in (path, *path.parents):
        if not place.stat().st_mode & 0o001:
            pytest.skip(f"{place} is closed to other users, and the daemon is one")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    pytest.importorskip("libnbdmod", reason="python3-libnbd is not installed")
    container = Container()
    try:
        container.boot()
        host = Host(container)
        host.install()
        yield host
    finally:
        container.remove()


# ----------------------------------------------------------------------------------------------- without a container


def exposure(unit: str) -> float:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNITS / unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.rsplit(": ", 1)[1].split()[0])


@pytest.mark.parametrize("unit", ["forebay.service", "forebay@.service"])
def test_the_daemon_is_shut_in(unit: str) -> None:
    found = exposure(unit)
    print(f"\n{unit}: exposure {found}")
    assert found <= 2.0


def test_the_fuse_door_is_shut_in_as_far_as_mounting_allows() -> None:
    assert exposure("forebay-fuse.service") <= 4.0
    hiding = ("ProtectSystem", "ProtectHome", "Private", "ReadOnlyPaths", "ProtectKernel", "Inacc")
    lines = (UNITS / "forebay-fuse.service").read_text().splitlines()
    assert not [line for line in lines if line.startswith(hiding)]


def test_the_process_that_stages_is_shut_in() -> None:
    assert exposure("forebay-stage.service") <= 2.0


def test_the_page_is_shut_in() -> None:
    assert exposure("forebay-page.service") <= 2.0


def test_instances_are_what_the_daemon_is() -> None:
    """All lines but those that name it."""

    def settings(unit: str) -> list[str]:
        lines = (UNITS / unit).read_text().replace("-%i", "").replace(" (%i)", "").splitlines()
        return [x for x in lines if "=" in x and x[0] != "#" and "FOREBAY_CONFIG" not in x]

    assert settings("forebay.service") == settings("forebay@.service")


# --------------------------------------------------------------------------------------------------- in the container


def test_it_runs_as_its_own_user_and_may_do_nothing_else(host: Host) -> None:
    status = host.container.inside(f"/proc/{host.pid()}/status").read_text()
    found = dict(line.split(":\t", 1) for line in status.splitlines())
    uid = int(host.run("id", "-u", "forebay").stdout)
    assert [int(x) for x in found["Uid"].split()] == [uid] * 4
    assert {int(found[key], 16) for key in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {0}
    assert found["NoNewPrivs"] == "1"
    assert host.container.show("forebay.service", "NotifyAccess") == "main"
    host.disk("rights")
    stat = host.run("stat", "-c", "%U:%G %a", "/run/forebay/disks/rights.sock").stdout.strip()
    assert stat == "forebay:kvm 660"
    assert accepts(host.socket("rights"))


def test_the_journal_has_fields(host: Host) -> None:
    """What `journalctl DISK=NAME` finds, of the daemon as its unit runs it; RUN and the name forge nothing."""
    host.disk("j")
    host.cli("mode", "j", "none")
    host.cli("detach", "j")
    told = host.run("journalctl", "DISK=j", "--output=json").stdout.splitlines()
    found = {one["FOREBAY_EVENT"]: one for one in map(json.loads, told) if "FOREBAY_EVENT" in one}
    assert {"attach", "mode", "detach"} <= set(found)
    for kind, one in found.items():
        assert one["MESSAGE_ID"] == KINDS[kind].message_id
        assert (one["IMAGE"], one["STORE"]) == ("images:j.raw", "images") or kind == "command"
        assert (one["PRIORITY"], one["SYSLOG_IDENTIFIER"]) == ("6", "forebay")
        assert one["_SYSTEMD_UNIT"] == "forebay.service"
    assert found["mode"]["STATE"] == "ready"
    assert found["mode"]["FOREBAY_ASKED_UID"] == "0"
    by_id = f"MESSAGE_ID={KINDS['mode'].message_id}"
    assert "j: mode none, was write-back" in host.run("journalctl", by_id, "--output=cat").stdout


def test_the_server_of_an_image_in_a_format_is_shut_in_as_the_units_leave_it(host: Host) -> None:
    """What the unit allows is enough for it, and for taking the rest away: the kernel refuses what is not its own."""
    raw, path = (host.container.inside(f"{IMAGES}/{name}") for name in ("plain", "f.qcow2"))
    content = random_image(raw, SIZE, 1)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    host.run("chown", "forebay:", f"{IMAGES}/f.qcow2")
    host.cli("attach", "f", "images:f.qcow2", "--mode", "write-through")
    raw.with_name("seen").unlink(missing_ok=True)
    subprocess.run(["nbdcopy", host.uri("f"), raw.with_name("seen")], check=True)
    assert raw.with_name("seen").read_bytes() == content
    pid = host.run("pgrep", "--newest", "qemu-storage-da").stdout.strip()
    status = host.container.inside(f"/proc/{pid}/status").read_text()
    found = dict(line.split(":\t", 1) for line in status.splitlines())
    uid = int(host.run("id", "-u", "forebay").stdout)
    assert [int(x) for x in found["Uid"].split()] == [uid] * 4
    assert {int(found[key], 16) for key in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {0}
    assert (found["NoNewPrivs"], found["Seccomp"].strip()) == ("1", "2")
    limits = host.container.inside(f"/proc/{pid}/limits").read_text()
    for name, most in (("address space", 4 << 30), ("core file size", 0)):
        assert f"Max {name} {most} {most}" in " ".join(limits.split()), limits
    host.cli("detach", "f")
    if landlock() >= 4:
        host.run("install", "-d", "-o", "forebay", "/opt/probe")
        host.run("runuser", "-u", "forebay", "--", "touch", *(f"/opt/probe/{x}" for x in "abc"))
        shell = 'exec 8</opt/probe/a 9<>/opt/probe/b; exec "$@"'
        python = (VENV.resolve() / "bin" / "python", "-I", "-S", "-c", CODE)
        words = ("sh", "-c", shell, "sh", *python, program.__file__, "8", "9", "/opt/probe/c")
        rules = [word for rule in shut_in("forebay.service") for word in ("-p", rule)]
        said = host.run("systemd-run", "--quiet", "--pipe", "--wait", *rules, *words).stdout
        assert said.splitlines() == EXPECTED


def shut_in(unit: str) -> list[str]:
    """The settings of a unit that say what its processes may do."""
    text = (UNITS / unit).read_text().partition("[Service]")[2].partition("[Install]")[0]
    keys = "User Group Capability Ambient NoNew Lock Memory Restrict System Keyring RemoveIPC Protect Private Device"
    wanted = (*keys.split(), "LimitCORE", "OOM", "UMask")
    return [line for line in text.splitlines() if line.startswith(wanted)]


def test_no_guest_error_in_planned_restarts(host: Host) -> None:
    """Guests that do not reconnect, writing and comparing; and a restart does not write back what is dirty."""
    host.disk("d1")
    host.disk("d2", "write-through")
    guests = [
        SteadyGuest(host.uri("d1"), length=4 * MIB, depth=16),
        SteadyGuest(host.uri("d1"), first=4 * MIB, length=4 * MIB, depth=1),
        SteadyGuest(host.uri("d2"), length=4 * MIB, depth=4),
    ]
    rng = random.Random(1)
    windows = []
    for guest in guests:
        guest.__enter__()
    try:
        for _ in range(RESTARTS):
            time.sleep(0.3 + rng.random() / 4)
            host.run("systemctl", "reset-failed", "forebay")  # no operator restarts so often
            begin = time.monotonic()
            host.run("systemctl", "restart", "forebay")
            windows.append((begin, time.monotonic() + 1))
        assert host.status("d1")["dirty_bytes"] > 0
        assert host.status("d1")["clients"] == 2
        seen = [guest.finish() for guest in guests]
    finally:
        for guest in guests:
            guest.__exit__(None, None, None)
    assert [one["errors"] for one in seen] == [[]] * len(guests)
    pauses = [
        max((b - a for one in seen for a, b in one["pauses"] if a < end and b > begin), default=0.0)
        for begin, end in windows
    ]
    print(
        f"\n{RESTARTS} x systemctl restart, {len(guests)} guests: 0 errors, pause median "
        f"{statistics.median(pauses):.3f} s, worst {max(pauses):.3f} s, "
        f"{sum(one['requests'] for one in seen)} requests"
    )
    assert statistics.median(pauses) < PAUSE_SECONDS
    assert host.container.show("forebay.service", "NRestarts") == "0"


def test_a_kill_leaves_nothing_in_the_store(host: Host) -> None:
    """Restarted by systemd; the old connection is over at once, and everything is there."""
    import nbd

    host.disk("k")
    client = nbd.NBD()
    client.connect_uri(host.uri("k"))
    client.pwrite(b"k" * 4096, 0)
    host.run("systemctl", "restart", "forebay")
    client.pwrite(b"K" * 4096, 4096)
    before = host.pid()
    host.run("kill", "-KILL", str(before))
    begin = time.monotonic()
    with pytest.raises(nbd.Error):
        client.pread(4096, 0)
    assert time.monotonic() - begin < 5
    wait_for(lambda: host.pid() not in (0, before), "not started again")
    wait_for(lambda: accepts(host.socket("k")), "does not listen")
    again = nbd.NBD()
    again.connect_uri(host.uri("k"))
    assert bytes(again.pread(8192, 0)) == b"k" * 4096 + b"K" * 4096
    again.shutdown()


def test_the_watchdog_ends_a_daemon_that_does_nothing(host: Host) -> None:
    host.disk("w")
    with SteadyGuest(host.uri("w"), length=MIB, depth=4, reconnect=True) as guest:
        time.sleep(0.3)
        stuck = host.pid()
        host.run("kill", "-STOP", str(stuck))
        wait_for(lambda: host.pid() not in (0, stuck), "the watchdog did not end it")
        wait_for(lambda: accepts(host.socket("w")), "does not listen")
        time.sleep(0.5)
        seen = guest.finish()
    assert seen["errors"] == []
    assert seen["reconnected"] >= 1
    assert "Watchdog timeout" in host.container.journal("--unit=forebay")


def test_a_stop_drains_and_hangs_up(host: Host) -> None:
    import nbd

    content = host.disk("s")
    client = nbd.NBD()
    client.connect_uri(host.uri("s"))
    client.pwrite(b"s" * MIB, MIB)
    assert host.image("s") == content
    host.run("systemctl", "stop", "forebay")
    assert host.image("s") == content[:MIB] + b"s" * MIB + content[2 * MIB :]
    with pytest.raises(nbd.Error):
        client.pread(4096, 0)
    assert host.container.show("forebay.service", "Result") == "success"
    assert host.container.show("forebay.service", "NFileDescriptorStore") == "0"
    host.run("systemctl", "start", "forebay")
    assert host.status("s")["dirty_bytes"] == 0


def test_a_daemon_that_cannot_start_hangs_up_in_the_end(host: Host) -> None:
    """As after a broken upgrade: the unit fails, and with it goes what it was to hand over."""
    import nbd

    host.disk("f")
    client = nbd.NBD()
    client.connect_uri(host.uri("f"))
    config = "/etc/forebay/forebay.toml"
    host.write(config, "broken")
    try:
        host.run("systemctl", "restart", "forebay", check=False)
        wait_for(
            lambda: host.container.show("forebay.service", "ActiveState") == "failed",
            "does not give up",
        )
        with pytest.raises(nbd.Error):
            client.pread(4096, 0)
    finally:
        host.write(config, CONFIG.replace("NAME", "forebay"))
        host.run("systemctl", "reset-failed", "forebay")
        host.run("systemctl", "start", "forebay")


def test_a_reload_takes_what_is_right_and_fails_for_what_is_wrong(host: Host) -> None:
    """`systemctl reload` is the exit code of `forebay reload`, in the unit's sandbox; guests and daemon stay."""
    import nbd

    part, before = "/etc/forebay/conf.d/10-other.toml", host.pid()
    host.disk("reloaded", "write-through")
    client = nbd.NBD()
    client.connect_uri(host.uri("reloaded"))
    host.run("install", "-d", "-o", "forebay", "/srv/other")
    try:
        host.write(part, '[stores.other]\npath = "/srv/other"\n[defaults]\nmax_lag = "7s"\n')
        host.run("systemctl", "reload", "forebay")
        assert "other" in host.cli("stores")
        assert host.status("reloaded")["max_lag_seconds"] == 7
        host.write(part, "[stores.other]\npaht = 1\n")
        with pytest.raises(AssertionError):
            host.run("systemctl", "reload", "forebay")
        log = host.run("journalctl", "-u", "forebay", "-n", "20", "--no-pager").stdout
        assert f"{part}:2: stores.other.paht: unknown key" in log
        assert host.container.show("forebay.service", "ActiveState") == "active"
        assert (host.pid(), host.status("reloaded")["max_lag_seconds"]) == (before, 7)
        client.pwrite(b"y" * 4096, 0)
    finally:
        client.shutdown()
        host.container.inside(part).unlink()
        host.run("systemctl", "reload", "forebay")
    assert "other" not in host.cli("stores")
    host.cli("detach", "reloaded")


def test_a_second_instance_has_everything_of_its_own(host: Host) -> None:
    host.run("systemctl", "start", "forebay@b")
    host.run("install", "-o", "forebay", "/dev/null", f"{IMAGES}/b.raw")
    host.run("truncate", "-s", "1M", f"{IMAGES}/b.raw")
    host.cli("attach", "b", "images:b.raw", "--config", "/etc/forebay/b.toml")
    assert accepts(host.socket("b", "/run/forebay-b"))
    with SteadyGuest(host.uri("b", "/run/forebay-b"), length=MIB, depth=4) as guest:
        host.run("systemctl", "restart", "forebay@b")
        assert guest.finish()["errors"] == []
    assert '"b"' not in host.cli("status", "--json")
    host.run("systemctl", "stop", "forebay@b")


def test_udev_knows_a_cache_by_its_content(host: Host) -> None:
    script = "/usr/local/lib/forebay/holds-cache"
    host.disk("u")
    assert host.run(script, "/var/lib/forebay/cache.img", check=False).returncode == 0
    for other in (f"{IMAGES}/u.raw", "/dev/zero", "/no/such"):
        assert host.run(script, other, check=False).returncode == 1
    rule = host.run("cat", "/usr/local/lib/udev/rules.d/60-forebay.rules").stdout
    assert f'PROGRAM=="{script} $devnode"' in rule


def test_a_mount_of_the_fuse_unit_is_seen_by_everybody(host: Host) -> None:
    if not Path("/dev/fuse").exists():
        pytest.skip("this kernel has no /dev/fuse")
    content = host.disk("m")
    host.run("systemctl", "start", "forebay-fuse")
    try:
        found = host.run("find", "/var/lib/forebay-fuse", "-name", "m*", "-type", "f").stdout
        path = next(line for line in found.split() if "/disks/" in line)
        assert host.run("sha256sum", path).stdout.split()[0] == sha256(content)
        host.run("systemctl", "restart", "forebay")
        assert host.run("sha256sum", path).stdout.split()[0] == sha256(content)
    finally:
        host.run("systemctl", "stop", "forebay-fuse")
    assert "/var/lib/forebay-fuse" not in host.run("cat", "/proc/mounts").stdout


def sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


LAST_WORDS = """
import nbd, signal, sys
client = nbd.NBD()
client.connect_unix(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (client.pwrite(b"last" * 1024, 4096), sys.exit(0)))
print("ready", flush=True)
while True:
    signal.pause()
"""


def test_the_page_is_that_of_a_user_who_owns_nothing_and_asks_by_its_group(host: Host) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = host.container.inside("/etc/forebay/forebay.toml")
    before = config.read_text()
    drop_in = f"[Service]\nEnvironment=FOREBAY_LISTEN={address} PYTHONPYCACHEPREFIX=/opt/pyc\n"
    host.write("/etc/systemd/system/forebay-page.service.d/test.conf", drop_in)
    host.run("systemctl", "daemon-reload")
    try:
        host.run("systemctl", "start", "forebay-page")

        def told() -> str:
            return host.run("curl", "-sS", f"http://{address}/now").stdout

        assert "no permission to use" in told()
        config.write_text(before.replace("[gateway]", '[gateway]\ncontrol_group = "forebay"'))
        host.run("systemctl", "restart", "forebay")
        wait_for(lambda: '"summary"' in told(), "the page is told")
        status = host.container.inside(f"/proc/{host.pid('forebay-page')}/status").read_text()
        found = dict(line.split(":\t", 1) for line in status.splitlines())
        user = int(host.run("id", "-u", "forebay").stdout)
        assert int(found["Uid"].split()[0]) not in (0, user)
        assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 0
        host.run("systemctl", "stop", "forebay-page")
        assert host.container.show("forebay-page.service", "Result") == "success"
    finally:
        config.write_text(before)
        host.run("systemctl", "stop", "forebay-page")
        host.run("systemctl", "restart", "forebay")


def test_the_unit_that_stages_gets_an_image_from_another_host_also_after_a_kill(host: Host) -> None:
    need_staging()
    content = random_image(host.container.inside(f"{IMAGES}/staged.raw"), 8 * MIB, 3)
    host.run("chown", "forebay:", f"{IMAGES}/staged.raw")
    host.run("systemctl", "start", "forebay-fuse", "forebay-stage")
    pid = host.pid("forebay-stage")
    host.run("systemctl", "kill", "--signal=KILL", "forebay-stage")
    wait_for(
        lambda: (
            host.pid("forebay-stage") not in (0, pid)
            and host.container.show("forebay-stage", "ActiveState") == "active"
        ),
        "systemd has started it again",
    )
    # by the overlay: a mount has given up the right to go through /proc
    with running([StagingHost(host.container.root / IMAGES.lstrip("/"))]) as [source]:
        peers = f"{source.address},{STAGING}"
        source.make("images:staged.raw")
        source.stage("images:staged.raw", "--peers", peers, "--source")
        host.cli("stage", "images:staged.raw", "--peers", peers)
        told: dict[str, Any] = {}

        def is_done() -> bool:
            told.update(json.loads(host.cli("stage", "--json"))[0])
            return bool(told["state"] == "done")

        try:
            wait_for(is_done, "the image is there", 60)
        except AssertionError as fault:
            journal = host.container.journal("-u", "forebay-stage", "-u", "forebay-fuse")
            raise AssertionError(f"{fault}: {told}\n{source.log_text()}\n{journal}") from None
        assert (told["origin_read_bytes"], told["refused_pieces"]) == (0, 0)
    host.cli("stage", "images:staged.raw", "--end")
    host.run("systemctl", "stop", "forebay-stage", "forebay-fuse")
    assert host.container.show("forebay-stage", "Result") == "success"
    host.cli("attach", "staged", "images:staged.raw", "--read-only")
    assert (
        subprocess.run(
            ["nbdcopy", "--", host.uri("staged"), "-"], capture_output=True, check=True
        ).stdout
        == content
    )
    host.cli("detach", "staged")


def test_at_shutdown_vms_end_first_then_it_drains(host: Host) -> None:
    """The last one: the container is off afterwards. A VM in its scope writes when it is told to end."""
    content = host.disk("v")
    host.write("/var/tmp/vm.py", LAST_WORDS)
    command = ["systemd-run", "--scope", "--slice=machine.slice", "--unit=machine-qemu-1"]
    command += ["/usr/bin/python3", "/var/tmp/vm.py", "/run/forebay/disks/v.sock"]
    vm = host.container.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert vm.stdout is not None
        assert vm.stdout.readline() == b"ready\n"
        assert "forebay.service" in host.container.show("machine-qemu-1.scope", "After")
        host.container.power_off()
    finally:
        if vm.poll() is None:
            vm.send_signal(signal.SIGKILL)
        vm.communicate()
    image = (host.container.root / IMAGES.lstrip("/") / "v.raw").read_bytes()
    assert image == content[:4096] + b"last" * 1024 + content[8192:]
