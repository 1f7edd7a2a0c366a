# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay summary` and `doctor` of a real daemon; `forebay hosts` by a real sshd on loopback."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import wait_for
from real.fault_fs import FaultFs
from real.gateway_process import GatewayProcess
from real.processes import end

MIB = 1 << 20
SBIN = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
SEPARATION = Path("/run/sshd")
"""The empty directory that sshd insists on when root runs it."""

HASH = "0123456789abcdef0123456789abcdef"


class Ssh:
    """A server on loopback that runs the command of this checkout, and the configuration of a client that trusts it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    def serve(self, stack: contextlib.ExitStack, config: Path) -> None:
        """Start it; what is run by it finds that configuration of Forebay."""
        for name in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.home / name)]
            subprocess.run(command, check=True)
        if os.geteuid() == 0 and not SEPARATION.exists():
            SEPARATION.mkdir(0o755)
            stack.callback(SEPARATION.rmdir)
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        (self.home / "config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.home}/host\nPidFile none\n"
            f"AuthorizedKeysFile {self.home}/user.pub\nStrictModes no\nUsePAM no\n"
            f"PasswordAuthentication no\nPermitRootLogin prohibit-password\n"
            f"SetEnv PATH={path} FOREBAY_CONFIG={config}\n"
        )
        program = shutil.which("sshd", path=SBIN)
        assert program is not None
        log = stack.enter_context((self.home / "log").open("wb"))
        process = subprocess.Popen([program, "-D", "-e", "-f", f"{self.home}/config"], stderr=log)
        stack.callback(end, process)
        wait_for(self._listens, "sshd does not listen")

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def client(self) -> dict[str, str]:
        """The environment of a command whose ssh finds this server by every name: but nobody as `off`, and nobody who
        knows it as `stranger`.
        """
        (self.home / "client").write_text(
            f"Host off\n  Port 1\nHost stranger\n  PubkeyAuthentication no\n"
            f"Host *\n  HostName 127.0.0.1\n  Port {self.port}\n"
            f"  IdentityFile {self.home}/user\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.home}/known\n  HostKeyAlias here\n"
        )
        key = (self.home / "host.pub").read_text()
        (self.home / "known").write_text(f"here {key}")
        ssh, real = self.home / "bin" / "ssh", shutil.which("ssh")
        ssh.parent.mkdir()
        ssh.write_text(f'#!/bin/sh\nexec {real} -F {self.home}/client "$@"\n')
        ssh.chmod(0o755)
        return {**os.environ, "PATH": f"{ssh.parent}:{os.environ['PATH']}"}


@pytest.fixture
def ssh() -> Iterator[Callable[[GatewayProcess], dict[str, str]]]:
    """Call with a daemon: a server by which others reach it is started; the environment of a client of it."""
    if shutil.which("sshd", path=SBIN) is None or shutil.which("ssh") is None:
        pytest.skip("sshd is not installed: apt install openssh-server openssh-client")
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ssh-", dir="/tmp")))
        server = Ssh(home)

        def start(gateway: GatewayProcess) -> dict[str, str]:
            server.serve(stack, gateway.config)
            return server.client()

        yield start


def hosts(environment: dict[str, str], *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "forebay", "hosts", *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_hosts_are_asked_and_told_by_a_real_ssh(
    gateway: GatewayProcess, ssh: Callable[[GatewayProcess], dict[str, str]]
) -> None:
    image = gateway.images / "a b;$(false)'.raw"
    image.write_bytes(os.urandom(4 * MIB))
    environment = ssh(gateway)
    named = ["--hosts", "here0,here1,off"]

    done = hosts(environment, *named)
    assert done.returncode == 0, done
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        ["here0", "ok"],
        ["here1", "ok"],
        ["off", "off"],
    ]
    done = hosts(environment, "--hosts", "stranger", "--json")
    assert done.returncode == 1
    (told,) = json.loads(done.stdout)
    assert told["state"] == "error"
    assert "Permission denied" in told["why"]

    done = hosts(environment, "warm", "images:" + image.name, *named, "--jobs", "1")
    assert done.returncode == 0, done
    assert "here0: 4.0M of 4.0M cached, 4.0M read" in done.stdout
    assert "here1: 4.0M of 4.0M cached, 0 read" in done.stdout
    done = hosts(environment, *named, "--images")
    assert done.stdout.splitlines()[1].split()[-4:] == ["here0", "100%", "here1", "100%"]

    gateway.cli("attach", "vm1", "images:" + image.name, "--mode", "write-back")
    done = hosts(environment, "status", "--hosts", "here0")
    assert done.stdout.splitlines()[1].split()[:2] == ["here0", "vm1"]
    done = hosts(environment, "flush", *named)
    assert "here0: 0 written back, nothing is dirty" in done.stdout
    gateway.kill()
    done = hosts(environment, *named)
    assert done.returncode == 1
    assert [line.split()[1] for line in done.stdout.splitlines()[1:]] == ["down", "down", "off"]
    assert "no daemon at" in done.stdout
    done = hosts(environment, "status", "--hosts", "here0", "--json")
    assert json.loads(done.stdout)[0]["state"] == "down"


# ------------------------------------------------------------------------------------------------------------- summary


def summary(gateway: GatewayProcess, code: int = 0) -> dict[str, Any]:
    done = gateway.cli("summary", "--json", check=False)
    assert done.returncode == code, done
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_the_summary_of_a_daemon_is_one_answer(make_gateway: Callable[..., GatewayProcess]) -> None:
    gateway = make_gateway({"stores.gone": {"path": "/no/such/store"}})
    (gateway.images / HASH).write_bytes(os.urandom(3 * MIB))
    told = summary(gateway, 1)
    assert told["state"] == "degraded"
    assert told["reasons"] == ["gone: away: No such file or directory"]
    assert [one["state"] for one in told["stores"]] == ["ok", "away"]
    gateway.cli("warm", f"images:{HASH}")
    lines = gateway.cli("summary", "--opennebula", check=False).stdout.splitlines()
    assert lines[-1] == "FOREBAY_WARM_0123456789AB=100"
    assert 'FOREBAY_STATE="degraded"' in lines
    gateway.cli("purge", f"images:{HASH}")
    gateway.stop()
    down = gateway.cli("summary", "--opennebula", check=False)
    assert (down.returncode, down.stdout.splitlines()[1]) == (0, 'FOREBAY_STATE="down"')
    gateway.start()
    assert summary(gateway, 1)["cold_images"] == [f"images:{HASH}"]
    lines = gateway.cli("summary", "--opennebula", check=False).stdout.splitlines()
    assert lines[-1] == "FOREBAY_WARM_0123456789AB=0"
    assert gateway.cli("summary", check=False).stdout.startswith("state   degraded, forebay ")


def test_a_store_that_hangs_is_told_by_summary_and_doctor_and_holds_up_neither(
    make_gateway: Callable[..., GatewayProcess], short_path: Path
) -> None:
    faulty = FaultFs(short_path)
    try:
        gateway = make_gateway({"stores.far": {"path": str(faulty.path)}})
        assert summary(gateway)["state"] == "ok"
        doctor = gateway.cli("doctor", "--json", check=False)
        lines = {
            one["text"].partition(":")[0]: one for one in json.loads(doctor.stdout)["findings"]
        }
        assert (lines["far"]["level"], lines["images"]["level"]) == ("ok", "ok")

        assert faulty.process is not None
        faulty.process.send_signal(signal.SIGSTOP)
        told = {one["store"]: one for one in summary(gateway, 1)["stores"]}
        assert told["images"]["state"] == "ok"
        assert (told["far"]["state"], told["far"]["reason"][:13]) == ("slow", "no answer for")
        doctor = gateway.cli("doctor", "--json", check=False)
        assert doctor.returncode == 2
        lines = {
            one["text"].partition(":")[0]: one for one in json.loads(doctor.stdout)["findings"]
        }
        assert lines["images"]["level"] == "ok"
        assert (lines["far"]["level"], lines["far"]["todo"]) == (
            "fault",
            "see whether its server is up",
        )
        assert "no answer within 5 s" in lines["far"]["text"]

        faulty.process.send_signal(signal.SIGCONT)
        wait_for(lambda: gateway.cli("summary", check=False).returncode == 0, "it is not ok again")
        bundle = short_path / "report.tgz"
        gateway.cli("doctor", "--bundle", str(bundle), check=False)
        with tarfile.open(bundle) as tar:
            assert "forebay-report/daemon/summary.json" in tar.getnames()
        gateway.kill()
        assert "start it with" in gateway.cli("doctor", check=False).stdout
    finally:
        faulty.remove()
