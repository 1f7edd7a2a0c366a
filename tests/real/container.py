# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""This host's own system, booted once more in a container over a throw-away layer: a real systemd for the units.

Nothing is downloaded: the container's root is an overlay over `/`. What it needs, else a test skips and says so: root,
overlayfs, systemd and systemd-nspawn. It boots in two to three seconds and shares nothing but the network.
"""

import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from real.processes import end

REPOSITORY = Path(__file__).parents[2]

BOOT_SECONDS = 60.0
COMMAND_SECONDS = 40.0

LANDLOCK = "landlock_create_ruleset landlock_add_rule landlock_restrict_self"
"""What nspawn's own filter would refuse, and no host does: servers are confined with these."""

MESSAGE = 6000
"""Characters of the journal that a failure shows."""

_MASKED = ("libvirtd", "virtqemud", "libvirt-guests", "virtlogd", "systemd-resolved", "ssh", "cron")
"""Units of the host that have no business in the container."""


class Container:
    """A booted container. `root` is its file system as seen from outside, also when it has ended."""

    def __init__(self) -> None:
        _check_possible()
        self.directory = Path(tempfile.mkdtemp(prefix="fbc-", dir="/var/tmp"))
        self.root = self.directory / "root"
        self.log = self.directory / "log"
        self.nspawn: subprocess.Popen[bytes] | None = None
        self.init = 0
        for name in ("root", "upper", "work"):
            (self.directory / name).mkdir()
        upper, work = self.directory / "upper", self.directory / "work"
        options = f"lowerdir=/,upperdir={upper},workdir={work}"
        command = ["mount", "-t", "overlay", "overlay", "-o", options, str(self.root)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            shutil.rmtree(self.directory)
            pytest.skip(f"no overlay over / to have here: {made.stderr.strip()}")
        for unit in _MASKED:
            link = self.root / "etc/systemd/system" / f"{unit}.service"
            link.unlink(missing_ok=True)
            link.symlink_to("/dev/null")

    def boot(self) -> None:
        """Returns when the container's systemd answers."""
        command = ["systemd-nspawn", "--quiet", f"--directory={self.root}", "--register=no"]
        command += ["--keep-unit", "--console=pipe", f"--bind-ro={REPOSITORY}"]
        fuse = self.directory / "fuse"
        if Path("/dev/fuse").exists():
            os.mknod(fuse, stat.S_IFCHR | 0o666, Path("/dev/fuse").stat().st_rdev)
            fuse.chmod(0o666)  # as udev has it on any host
            command.append(f"--bind={fuse}:/dev/fuse")
        command.append(f"--system-call-filter={LANDLOCK}")
        command += ["--boot", "systemd.unit=basic.target"]
        with self.log.open("ab") as log:
            self.nspawn = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                start_new_session=True,
            )
        deadline = time.monotonic() + BOOT_SECONDS
        while not self._answers(self.nspawn):
            if self.nspawn.poll() is not None or time.monotonic() > deadline:
                text = self.log.read_text(errors="replace")
                self.remove()
                pytest.skip(f"no container boots here: {text[-300:]}")
            time.sleep(0.1)

    def _answers(self, nspawn: subprocess.Popen[bytes]) -> bool:
        children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children").read_text().split()
        if not children:
            return False
        self.init = int(children[0])
        found = self.run("systemctl", "is-active", "basic.target", check=False)
        return found.stdout.strip() == "active"

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        within: float = COMMAND_SECONDS,
        **environment: str,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in it to its end, `within` seconds. AssertionError, with output and journal, if it fails."""
        clean = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        done = subprocess.run(
            ["nsenter", "--target", str(self.init), "--all", *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            timeout=within,
            env={**clean, **environment},
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, (
            f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}{done.stderr}\n"
            + self.journal()[-MESSAGE:]
        )
        return done

    def popen(self, *command: str | Path, **options: Any) -> "subprocess.Popen[bytes]":
        """Start a command in it."""
        return subprocess.Popen(
            ["nsenter", "--target", str(self.init), "--all", *map(str, command)], **options
        )

    def inside(self, path: str | Path) -> Path:
        """A path of the running container, mounts of its own included."""
        return Path(f"/proc/{self.init}/root") / str(path).lstrip("/")

    def show(self, unit: str, key: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={key}", unit).stdout.strip()

    def journal(self, *arguments: str) -> str:
        """What was logged in it."""
        done = self.run("journalctl", "--no-pager", "--output=cat", *arguments, check=False)
        return done.stdout

    def power_off(self) -> None:
        """As an operator does it; returns when everything has ended."""
        assert self.nspawn is not None
        self.run("systemctl", "poweroff", check=False)
        self.nspawn.wait(COMMAND_SECONDS)

    def remove(self) -> None:
        """End it, whatever it does, and take everything away."""
        if self.nspawn is not None and self.nspawn.poll() is None:
            if self.init:
                os.kill(self.init, signal.SIGKILL)
            end(self.nspawn)
        subprocess.run(["umount", "--lazy", str(self.root)], check=False)
        shutil.rmtree(self.directory, ignore_errors=True)


def _check_possible() -> None:
    for tool in ("systemd-nspawn", "systemctl", "nsenter", "mount"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: apt-get install systemd-container")
    if os.getuid():
        pytest.skip("a container needs root")
    if not Path("/lib/systemd/systemd").exists():
        pytest.skip("this host has no systemd to boot")
