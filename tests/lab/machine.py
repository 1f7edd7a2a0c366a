# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One emulated machine: started, saved, restored, stopped for a while, reset, ended."""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.console import Console
from lab.models import Model, hardware_address
from lab.outcome import Failure
from lab.wire import Wire

CLOCK = "base=2026-01-01T00:00:00,clock=vm"
"""Machines have a time of their own, so that one that was saved and one that is reset later still agree."""

KERNEL_WORDS = (
    "console=ttyS0 quiet loglevel=4 systemd.show_status=0 net.ifnames=0"
    " mitigations=off nokaslr tsc=reliable no_timer_check"
)
START_SECONDS = 30.0
BOOT_SECONDS = 1200.0
SAVE_SECONDS = 300.0
CPU_GROUP = Path("/sys/fs/cgroup/cpu/forebay-lab")
CPU_PERIOD = 100_000
CPU_SHARES = 3 * 1024
"""Beside other processes the machines count as three, not as one."""


@dataclass(frozen=True)
class Parts:
    """Where the files are that all machines start from."""

    kernel: Path
    initramfs: Path
    disks: tuple[Path, ...]
    """What a machine's disks begin as; they are never written. The first one has its system."""


class Machine:
    """A machine in the directory `place`, of its own. Its disks are layers over those of `parts`."""

    def __init__(self, model: Model, parts: Parts, place: Path, wires: Sequence[Wire]) -> None:
        self.model = model
        self.console: Console | None = None
        self._parts = parts
        self._place = place
        self._wires = [wire for wire in wires if model.name in wire.ends]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return self.model.name

    def disk(self, number: int) -> Path:
        """The layer with what this machine wrote to a disk."""
        return self._place / f"disk{number}.qcow2"

    # --- life

    def start(self, state: Path | None = None) -> None:
        """Switch it on; with `state`, where it was when that was saved, and standing still until `go_on`."""
        self._place.mkdir(parents=True, exist_ok=True)
        for number, base in enumerate(self._parts.disks):
            self._make_layer(self.disk(number), base)
        incoming = [] if state is None else ["-incoming", f"exec:cat {state}"]
        with (self._place / "qemu.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command(), *incoming],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        confine(self._process.pid)
        self._wait_for_socket("agent")
        self.console = Console(self._place / "agent", self.name)

    def wait_restored(self) -> None:
        """Return once the saved state is in; it stands still."""
        self._wait_status("paused", SAVE_SECONDS)

    def save(self, state: Path) -> None:
        """Put what it is doing into `state`. It has to stand still, and ends by this."""
        self._ask("migrate-set-parameters", {"max-bandwidth": 1 << 40})
        self._ask("migrate", {"uri": f"exec:cat > {state}"})
        deadline = time.monotonic() + SAVE_SECONDS
        while (found := self._ask("query-migrate").get("status")) != "completed":
            if found == "failed" or time.monotonic() > deadline:
                raise Failure(f"{self.name}: saving its state: {found}")
            time.sleep(0.1)
        self.end()

    def end(self) -> None:
        """Switch it off, as if by its power cable."""
        if self.console is not None:
            self.console.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    # --- faults

    def stand_still(self) -> None:
        """It neither computes nor answers until `go_on`: as a server that hangs."""
        self._ask("stop")

    def go_on(self) -> None:
        """Compute again."""
        self._ask("cont")

    def reset(self) -> None:
        """Reboot it without warning, and return once it is up again."""
        self._ask("system_reset")
        assert self.console is not None
        self.console.close()
        self.console = Console(self._place / "agent", self.name)
        self.console.wait_awake(BOOT_SECONDS)

    def cut_power(self) -> None:
        """As `reset`, of a machine that stands still: what it had in memory is gone, and its disks are as they were."""
        assert self.console is not None
        self.console.close()
        self._ask("system_reset")
        self._ask("cont")
        self.console = Console(self._place / "agent", self.name)
        self.console.wait_awake(BOOT_SECONDS)

    # --- QEMU

    def _make_layer(self, path: Path, base: Path) -> None:
        kind = "qcow2" if base.suffix == ".qcow2" else "raw"
        path.unlink(missing_ok=True)
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", kind, str(path)],
            check=True,
        )

    def _command(self) -> list[str]:
        words = f"{KERNEL_WORDS} systemd.hostname={self.name} systemd.machine_id={self._identity()}"
        # it ends with the process that started it, however that ends
        command = ["setpriv", "--pdeathsig", "KILL"]
        command += [
            "qemu-system-x86_64",
            "-accel",
            "tcg,thread=single,tb-size=256",
            "-cpu",
            "max,-smap,-smep",
            "-smp",
            "1",
        ]
        command += ["-machine", "q35", "-m", str(self.model.memory), "-rtc", CLOCK]
        command += ["-nodefaults", "-no-user-config", "-display", "none"]
        command += ["-kernel", str(self._parts.kernel), "-initrd", str(self._parts.initramfs)]
        command += ["-append", words, "-serial", f"file:{self._place}/console.log"]
        command += [
            "-device",
            "virtio-serial-pci",
            "-object",
            "rng-random,filename=/dev/urandom,id=rng",
        ]
        command += ["-device", "virtio-rng-pci,rng=rng"]
        command += ["-chardev", f"socket,id=agent,path={self._place}/agent,server=on,wait=off"]
        command += ["-device", "virtserialport,chardev=agent,name=lab.agent"]
        command += ["-qmp", f"unix:{self._place}/qmp,server=on,wait=off"]
        for number in range(len(self._parts.disks)):
            command += self._disk_words(number)
        for number, wire in enumerate(self._wires):
            command += self._wire_words(number, wire)
        return command

    def _disk_words(self, number: int) -> list[str]:
        drive = f"file={self.disk(number)},format=qcow2,if=none,id=disk{number},discard=unmap"
        return ["-drive", f"{drive},cache=unsafe", "-device", f"virtio-blk-pci,drive=disk{number}"]

    def _wire_words(self, number: int, wire: Wire) -> list[str]:
        local, remote = wire.machines(self.name), wire.own(self.name)
        paths = f"local.type=unix,local.path={local},remote.type=unix,remote.path={remote}"
        mac = hardware_address(self.model, number)
        return [
            *("-netdev", f"dgram,id=wire{number},{paths}"),
            *("-device", f"virtio-net-pci,netdev=wire{number},mac={mac},host_mtu=9000"),
        ]

    def _identity(self) -> str:
        return f"{self.model.number:x}" * 32

    def _wait_for_socket(self, name: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                probe.connect(str(self._place / "qmp"))
                break
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = (self._place / "qemu.log").read_text(errors="replace")
                raise Failure(f"{self.name}: QEMU does not start: {log.strip()[-300:]}")
            time.sleep(0.05)

    def _wait_status(self, wanted: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (found := self._ask("query-status").get("status")) != wanted:
            if time.monotonic() > deadline:
                raise Failure(f"{self.name} is {found}, not {wanted}")
            time.sleep(0.05)

    def _ask(self, command: str, arguments: dict[str, object] | None = None) -> dict[str, Any]:
        """A command of QMP: what it returns. Failure where QEMU refuses it."""
        with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rw") as file:
            sock.connect(str(self._place / "qmp"))
            answer: dict[str, Any] = {}
            for name, given in (("qmp_capabilities", {}), (command, arguments or {})):
                file.write(json.dumps({"execute": name, "arguments": given}) + "\n")
                file.flush()
                answer = {}
                while "return" not in answer and "error" not in answer:
                    answer = json.loads(file.readline())
        if "error" in answer:
            raise Failure(f"{self.name}: {command}: {answer['error'].get('desc')}")
        found = answer["return"]
        return found if isinstance(found, dict) else {}


def confine(pid: int) -> None:
    """All machines together get LAB_CORES (1) of the host's processors, where it has control groups that can say so."""
    cores = float(os.environ.get("LAB_CORES", "1"))
    with contextlib.suppress(OSError):
        CPU_GROUP.mkdir(exist_ok=True)
        (CPU_GROUP / "cpu.shares").write_text(str(CPU_SHARES))
        (CPU_GROUP / "cpu.cfs_period_us").write_text(str(CPU_PERIOD))
        (CPU_GROUP / "cpu.cfs_quota_us").write_text(str(int(cores * CPU_PERIOD)))
        (CPU_GROUP / "cgroup.procs").write_text(str(pid))
