# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A libvirt of the test's own: its daemon, configuration, hooks, logs and sockets in a throw-away directory.

The daemon runs in a mount namespace in which /run, /etc/libvirt and libvirt's directories below /var are that
directory's, so a libvirt that the machine may have is neither seen nor disturbed. Guests are emulated: /dev/kvm is
hidden, so that a machine whose KVM does not work gives the same results as one that has none.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from real.gateway_process import GatewayProcess
from real.processes import end, need, wait_accepting

ROOT = Path(__file__).resolve().parents[2]
HOOK = ROOT / "config" / "libvirt" / "hooks" / "qemu.d" / "forebay"
WRAPPER = ROOT / "config" / "libvirt" / "qemu-forebay"
EMULATOR = Path("/usr/bin/qemu-system-x86_64")

VIRSH_TIMEOUT = 90.0
"""Seconds for one call of virsh. The first one waits for the probe of the emulators, about five."""

QEMU_CONF = """\
# no virtlogd, no cgroups, no /dev of its own: none of that is under test, and not every machine lets them be made
stdio_handler = "file"
namespaces = []
cgroup_controllers = []
security_driver = "none"
"""

LIBVIRTD_CONF = """\
auth_unix_rw = "none"
unix_sock_group = "root"
log_outputs = "2:file:/var/log/libvirt/libvirtd.log"
"""

NAMESPACE = """\
set -e
cd {directory}
mount --bind run /run
mount --bind etc /etc/libvirt
for name in lib cache log; do mount --bind $name /var/$name/libvirt; done
[ ! -e /dev/kvm ] || mount --bind nokvm /dev/kvm
exec {daemon} --pid-file /run/libvirtd.pid
"""


class Libvirt:
    """A running libvirtd. `virsh("list")` asks it; `hooked(gateway)` has its hook talk to that gateway."""

    def __init__(self, hostname: str = "") -> None:
        """`hostname`: of a host of its own, as libvirt sees it, which domains can migrate to."""
        self.hostname = hostname
        need("unshare", "virsh", "qemu-system-x86_64")
        daemon = shutil.which("libvirtd", path=f"{os.environ['PATH']}:/usr/sbin")
        if daemon is None or os.geteuid() != 0:
            pytest.skip("libvirtd is not installed, or needs root: `make setup-libvirt`")
        self._daemon = daemon
        self.directory = Path(tempfile.mkdtemp(prefix="fb-", dir="/tmp"))
        self.directory.chmod(0o711)  # QEMU runs as another user
        for name in (
            "run/libvirt",
            "etc/hooks/qemu.d",
            "lib/qemu",
            "cache/qemu",
            "log/qemu",
            "bin",
            "vm",
        ):
            (self.directory / name).mkdir(parents=True)
        (self.directory / "etc" / "qemu.conf").write_text(QEMU_CONF)
        own = f'host_uuid = "{uuid.uuid4()}"\n' if hostname else ""
        (self.directory / "etc" / "libvirtd.conf").write_text(LIBVIRTD_CONF + own)
        nokvm = self.directory / "nokvm"
        nokvm.touch(
            mode=0o600
        )  # what QEMU's user cannot open counts as no KVM, and the probe is kept
        shutil.copy(HOOK, self.directory / "etc" / "hooks" / "qemu.d" / "forebay")
        self.wrapper = self.directory / "bin" / "qemu-forebay"
        shutil.copy(WRAPPER, self.wrapper)
        self.vm = self.directory / "vm"
        self.vm.chmod(0o777)
        self.socket = self.directory / "run" / "libvirt" / "libvirt-sock"
        self.process: subprocess.Popen[bytes] | None = None

    # -- life

    def start(self) -> None:
        """Start the daemon; it accepts then."""
        script = NAMESPACE.format(directory=self.directory, daemon=self._daemon)
        apart = ["unshare", "--mount", "--propagation=private"]
        if self.hostname:
            apart, script = [*apart, "--uts"], f"hostname {self.hostname}\n{script}"
        command = [*apart, "sh", "-c", script]
        log = self.directory / "out"
        environment = {**os.environ, "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}"}
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment
            )
        try:
            wait_accepting(self.process, self.socket, log)
        except RuntimeError as fault:
            end(self.process)
            pytest.skip(f"libvirtd does not start here: {str(fault).splitlines()[-1]}")

    def restart(self) -> None:
        """End the daemon and start it again; domains run on."""
        assert self.process is not None
        end(self.process)
        self.start()

    def remove(self) -> None:
        """End everything that runs here and remove the directory."""
        if self.process is not None:
            for name in self.virsh("list", "--name", check=False).stdout.split():
                self.virsh("destroy", name, check=False)
            end(self.process)
        for file in (self.directory / "run" / "libvirt" / "qemu").glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):  # a domain that could not be destroyed
                os.kill(int(file.read_text()), signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- asking

    def virsh(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `virsh ARGUMENTS`. Raises AssertionError with its output when `check` and it fails."""
        uri = f"qemu+unix:///system?socket={self.socket}"
        done = subprocess.run(
            ["virsh", "--connect", uri, *map(str, arguments)],
            capture_output=True, check=False, text=True, timeout=VIRSH_TIMEOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert not check or done.returncode == 0, (
            f"virsh {' '.join(map(str, arguments))}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done

    def version(self) -> tuple[int, ...]:
        """Of libvirt."""
        return tuple(map(int, self.virsh("--version").stdout.strip().split(".")))

    def hooked(self, gateway: GatewayProcess) -> None:
        """From now on the hook's `forebay` is that of this gateway."""
        command = self.directory / "bin" / "forebay"
        command.write_text(
            f'#!/bin/sh\nFOREBAY_CONFIG={gateway.config} exec {sys.executable} -m forebay "$@"\n'
        )
        command.chmod(0o755)

    # -- domains

    def define(
        self, name: str, *disks: str, metadata: str = "", emulator: Path | None = None
    ) -> None:
        """Define a domain with these `<disk>` elements, its console on a socket."""
        xml = self.vm / f"{name}.xml"
        xml.write_text(
            f"""<domain type='qemu'>
  <name>{name}</name>
  <metadata>{metadata}</metadata>
  <memory unit='MiB'>128</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>{emulator or self.emulator()}</emulator>
    {"".join(disks)}
    <controller type='usb' model='none'/>
    <serial type='unix'><source mode='bind' path='{self.vm / name}.console'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""
        )
        self.virsh("define", xml)

    def emulator(self) -> Path:
        """QEMU, or for a libvirt that drops <reconnect> the script that adds it."""
        return EMULATOR if self.version() >= (9, 2) else self.wrapper

    def start_domain(self, name: str) -> "Console":
        """`virsh start`; the console from its first character on."""
        self.virsh("start", name)
        return Console(Path(f"{self.vm / name}.console"))

    @contextlib.contextmanager
    def domain(self, name: str) -> Iterator[None]:
        """Whatever happens inside, the domain is gone afterwards."""
        try:
            yield
        finally:
            self.virsh("destroy", name, check=False)
            self.virsh("undefine", name, "--managed-save", "--snapshots-metadata", check=False)

    def running(self, name: str) -> bool:
        return self.virsh("domstate", name).stdout.strip() == "running"


class Console:
    """A guest of libvirt_guest.py: each line sent is evaluated there."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._text = ""
        self._count = 0

    def _until(self, pattern: str, seconds: float) -> re.Match[str]:
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self._text, re.DOTALL)) is None:
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} on the console for {seconds} s:\n{self._text[-3000:]}"
            self._socket.settimeout(left)
            with contextlib.suppress(TimeoutError):
                data = self._socket.recv(65536)
                assert data, f"the guest went away:\n{self._text[-3000:]}"
                self._text += data.decode(errors="replace").replace("\r", "")
        self._text = self._text[found.end() :]
        return found

    def wait_up(self, seconds: float = 60.0) -> None:
        self._until("guest is up\n", seconds)

    def run(self, command: str, *, seconds: float = 60.0) -> str:
        """What the command prints. Raises AssertionError when it fails or takes too long."""
        self._count += 1
        self._socket.sendall(f'{command}; echo "@{self._count} $?"\n'.encode())
        found = self._until(rf"(.*?)@{self._count} (\d+)\n", seconds)
        assert found.group(2) == "0", f"{command}: exit {found.group(2)}\n{found.group(1)}"
        return found.group(1).strip()

    def close(self) -> None:
        self._socket.close()
