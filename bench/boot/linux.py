# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A real guest: Debian with what a small server has, booted by QEMU without KVM until it asks for a login.

The image is made of Debian's packages, by the steps of the lab (tests/lab), once; that needs root, debootstrap and a
mirror. The kernel and its initramfs are handed to QEMU, as clouds do it that boot directly; all else is read from the
disk.
"""

import selectors
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab.debian import SUITE, install_needed, make_boot, make_kernel, mirror
from lab.outcome import Failure, Lacking
from lab.steps import ROOT, SYSTEM_PATH, Builder, Step, digest, run

PLACE = ROOT / ".lab" / "boot"
"""Where the image is kept between runs."""

PACKAGES = (
    "systemd", "systemd-sysv", "systemd-timesyncd", "libpam-systemd", "udev", "dbus", "kmod", "e2fsprogs", "iproute2",
    "ifupdown", "isc-dhcp-client", "procps", "openssh-server", "cron", "rsyslog", "logrotate", "sudo", "less",
    "vim-tiny", "python3", "polkitd", "unattended-upgrades", "apparmor", "ca-certificates", "locales",
)  # fmt: skip
"""What Debian's images for clouds have, but for cloud-init, which would ask an emulated guest for a minute."""

IMAGE_SIZE = "1G"
MEMORY_MIB = 512
PROMPT = b" login: "
BOOT_SECONDS = 900.0
"""An emulated guest takes half a minute, and on a machine with much else to do ten times that."""

KERNEL_WORDS = (
    "console=ttyS0 quiet net.ifnames=0 mitigations=off tsc=reliable no_timer_check"
    " systemd.hostname=guest systemd.machine_id=0123456789abcdef0123456789abcdef"
)


@dataclass(frozen=True)
class Guest:
    """What a guest boots from."""

    kernel: Path
    initramfs: Path
    image: Path


def build(told: Callable[[str], None], place: Path = PLACE) -> Guest:
    """The guest, made unless it is there. Raises Lacking where that cannot be had here."""
    install_needed(told)
    builder = Builder(place, told)
    system = builder.run(Step("system", f"{SUITE} {PACKAGES}", _make_system))
    kernel = builder.run(Step("kernel", "", make_kernel))
    inputs = digest([ROOT / "tests" / "lab" / "debian.py"])
    boot = builder.run(Step("boot", inputs, lambda into: make_boot(into, kernel)))
    image = builder.run(Step("image", IMAGE_SIZE, lambda into: _make_image(into, system, boot)))
    return Guest(boot / "vmlinuz", boot / "initramfs.gz", image / "debian.raw")


def _make_system(into: Path) -> None:
    root, packages = str(into / "root"), ",".join(PACKAGES)
    command = ("debootstrap", "--variant=minbase", f"--include={packages}", SUITE, root, mirror())
    try:
        run(*command, log=into / "debootstrap.log")
    except Failure as error:
        raise Lacking(f"debootstrap: {error}") from error


def _make_image(into: Path, system: Path, boot: Path) -> None:
    """One ext4 file system, with nothing in it that was not there after an installation."""
    root = into / "root"
    run("cp", "-a", str(system / "root"), str(root))
    run("cp", "-a", str(boot / "modules"), str(root / "usr" / "lib"))
    shutil.rmtree(root / "var" / "cache" / "apt" / "archives", ignore_errors=True)
    (root / "etc" / "fstab").write_text("/dev/vda / ext4 errors=remount-ro 0 1\n")
    (root / "etc" / "machine-id").write_text("")
    (root / "etc" / "network" / "interfaces").write_text("auto lo\niface lo inet loopback\n")
    environment = {"PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8"}
    run("chroot", str(root), "passwd", "--delete", "root", env=environment)
    run("mke2fs", "-q", "-t", "ext4", "-d", str(root), str(into / "debian.raw"), IMAGE_SIZE)
    shutil.rmtree(root)


@dataclass(frozen=True)
class Booted:
    """How a boot went: seconds until the prompt, and what of these QEMU computed."""

    seconds: float
    cpu_seconds: float


def boot(guest: Guest, disk: str, console: Path) -> Booted:
    """Boot from `disk`, the value of QEMU's -drive without an id. Raises Failure where no prompt comes."""
    command = [
        *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"),
        *("-accel", "tcg,thread=single,tb-size=256", "-cpu", "max,-smap,-smep", "-smp", "1"),
        *("-machine", "q35", "-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config"),
        *("-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-kernel", str(guest.kernel), "-initrd", str(guest.initramfs), "-append", KERNEL_WORDS),
        *(
            "-object",
            "rng-random,filename=/dev/urandom,id=rng",
            "-device",
            "virtio-rng-pci,rng=rng",
        ),
        *("-drive", f"{disk},if=none,id=disk", "-device", "virtio-blk-pci,drive=disk"),
    ]
    began = time.monotonic()
    with console.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
        )
        try:
            said = _until_prompt(process, began + BOOT_SECONDS)
            log.write(said)
            seconds, cpu = time.monotonic() - began, cpu_seconds(process.pid)
        finally:
            process.kill()
            process.communicate()
    if PROMPT not in said:
        raise Failure(f"no login prompt after {seconds:.0f} s: {console}")
    return Booted(seconds, cpu)


def _until_prompt(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """What the guest says until it asks for a login, ends, or has taken too long."""
    assert process.stdout is not None
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while PROMPT not in said and (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                part = process.stdout.read1(65536)  # type: ignore[attr-defined]
                if not part:
                    break
                said += part
    return said


def cpu_seconds(pid: int) -> float:
    """What all threads of a process have computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
