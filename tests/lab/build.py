# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the lab's machines start from, made step by step from Debian's packages and this checkout.

A change of the product costs the last step only, and one of what the machines are made of the steps from there on.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from lab.debian import (
    PACKAGES,
    SUITE,
    make_boot,
    make_kernel,
    make_system,
)
from lab.machine import Parts
from lab.models import MODELS, address, hardware_address
from lab.steps import ROOT, SYSTEM_PATH, Builder, Step, digest, run

HERE = Path(__file__).resolve().parent
GUEST = HERE / "guest"

MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
    "fstrim.timer", "getty@tty1.service", "rpc-gssd.service", "nfs-blkmap.service", "systemd-timesyncd.service",
    "serial-getty@ttyS0.service", "systemd-networkd-wait-online.service", "systemd-logind.service",
    "quotacheck.service", "quotaon.service", "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service",
)  # fmt: skip
"""Units that only cost time."""

PRODUCT = (
    "gateway",
    "nbd",
    "cache",
    "fast",
    "config",
    "systemd",
    "tools",
    "bench",
    "docs",
    "tests/README.md",
    "Makefile",
    "hatch_build.py",
    "requirements.lock",
    "requirements-stage.lock",
)
"""What `make install` reads, beside the files in the checkout's root."""

BUILT_WITH = ("hatchling>=1.27", "cython>=3.0,<4", "pip")
"""What makes a wheel of the product."""

FOREBAY_ID = 950
"""User and group of the daemon, the same on all machines, as systemd/README.md asks."""

SYSTEM_SIZE, DATA_SIZE = "3G", "2G"


def build(place: Path, told: Callable[[str], None]) -> tuple[Parts, Builder]:
    """Make all that is not there yet. What machines start from, and the builder, for steps that follow."""
    builder = Builder(place, told)
    system = builder.run(Step("system", f"{SUITE} {PACKAGES}", make_system))
    kernel = builder.run(Step("kernel", "", make_kernel))
    boot = builder.run(
        Step("boot", digest([HERE / "debian.py"]), lambda into: make_boot(into, kernel))
    )
    requirements = digest([ROOT / "requirements.lock"]) + " ".join(BUILT_WITH)
    wheels = builder.run(Step("wheels", requirements, make_wheels))
    inputs = digest([HERE / "build.py", HERE / "models.py", *sources()])
    machine = builder.run(
        Step("machine", inputs, lambda into: make_machine(into, system, boot, wheels))
    )
    disks = (machine / "system.raw", machine / "data.raw")
    return Parts(boot / "vmlinuz", boot / "initramfs.gz", disks), builder


def make_wheels(into: Path) -> None:
    """What the product depends on and is built with, so that machines need no network."""
    run("/usr/bin/python3", "-m", "venv", str(into / "venv"))
    download = [str(into / "venv" / "bin" / "pip"), "download", "-q", "-d", str(into / "wheels")]
    run(*download, "--require-hashes", "-r", str(ROOT / "requirements.lock"))
    run(*download, *BUILT_WITH)


def make_machine(into: Path, system: Path, boot: Path, wheels: Path) -> None:
    """The disks: Debian with the product, installed by its own `make install`; and an empty one."""
    root = into / "root"
    run("cp", "-a", str(system / "root"), str(root))
    run("cp", "-a", str(boot / "modules"), str(root / "usr" / "lib"))
    _settle(root)
    _copy_product(root / "opt" / "forebay")
    shutil.copytree(wheels / "wheels", root / "opt" / "wheels")
    with _proc_in(root):
        _in_root(root, "make", "-C", "/opt/forebay", "install", log=into / "install.log")
    run("mke2fs", "-q", "-t", "ext4", "-d", str(root), str(into / "system.raw"), SYSTEM_SIZE)
    shutil.rmtree(root)
    with (into / "data.raw").open("wb") as data:
        data.truncate(int(DATA_SIZE.removesuffix("G")) << 30)


def _settle(root: Path) -> None:
    """Names, addresses, the agent, and a service or two less."""
    files = {
        "etc/machine-id": "",
        "etc/fstab": "",
        "etc/hostname": "lab\n",
        "etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=persistent\n",
        "etc/systemd/system/lab-agent.service": AGENT_UNIT,
        **network_files(),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    shutil.copytree(GUEST, root / "root" / "lab" / "guest", ignore=shutil.ignore_patterns("__*"))
    for unit in MASKED:
        link = root / "etc" / "systemd" / "system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    number = str(FOREBAY_ID)
    _in_root(root, "groupadd", "--system", "--gid", number, "forebay")
    home = ("--home-dir", "/var/lib/forebay", "--shell", "/usr/sbin/nologin")
    _in_root(root, "useradd", "--system", "--uid", number, "--gid", number, *home, "forebay")
    _in_root(root, "systemctl", "-q", "enable", "systemd-networkd", "lab-agent")
    _in_root(root, "systemctl", "-q", "disable", "nfs-server")


AGENT_UNIT = """\
[Unit]
Description=Commands of the lab
After=systemd-udevd.service
[Service]
ExecStart=/usr/bin/python3 -m lab.guest.agent
WorkingDirectory=/root
Restart=always
# what it started is not its own, and it is to be the last to go
KillMode=process
OOMScoreAdjust=-1000
[Install]
WantedBy=multi-user.target
"""

NETWORK = """\
[Match]
MACAddress={mac}
[Network]
Address={address}/24
LinkLocalAddressing=no
ConfigureWithoutCarrier=yes
IgnoreCarrierLoss=yes
[Link]
RequiredForOnline=no
"""


def network_files() -> dict[str, str]:
    """The same files for all machines: each takes what fits its hardware."""
    files, hosts = {}, "127.0.0.1 localhost\n"
    for model in MODELS:
        for interface, wire in enumerate(model.wires):
            mac, where = hardware_address(model, interface), address(model, wire)
            text = NETWORK.format(mac=mac, address=where)
            files[f"etc/systemd/network/{model.name}-{interface}.network"] = text
            hosts += f"{where} {model.name}\n"
    return {**files, "etc/hosts": hosts}


def sources() -> Iterator[Path]:
    """The files that go into a machine."""
    yield from sorted(GUEST.glob("*.py"))
    yield from sorted(
        path for path in ROOT.iterdir() if path.suffix in {".md", ".toml"} or path.name == "LICENSE"
    )
    for name in PRODUCT:
        path = ROOT / name
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (each for each in found if each.is_file() and not _is_made(each))


def _is_made(path: Path) -> bool:
    """Whether running or compiling the product in this checkout has left that file."""
    return "__pycache__" in path.parts or path.suffix in {".c", ".so", ".of"}


def _copy_product(into: Path) -> None:
    for path in sources():
        if GUEST not in path.parents:
            target = into / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


@contextlib.contextmanager
def _proc_in(root: Path) -> Iterator[None]:
    """bash asks for /proc where it gives one command another one's output."""
    run("mount", "-t", "proc", "proc", str(root / "proc"))
    try:
        yield
    finally:
        run("umount", str(root / "proc"))


def _in_root(root: Path, *command: str, log: Path | None = None) -> None:
    """A command in another root, which finds wheels there and no network."""
    environment = {
        "PATH": SYSTEM_PATH,
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "/opt/wheels",
    }
    run("chroot", str(root), *command, env=environment, log=log)
