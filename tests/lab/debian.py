# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Debian for the lab: a system in a directory, a kernel, and what boots it."""

import gzip
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from lab.outcome import Failure, Lacking
from lab.steps import path_of, run

NEEDED = {
    "debootstrap": "debootstrap",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "mke2fs": "e2fsprogs",
    "depmod": "kmod",
}
"""Commands of this host, and Debian's package of each."""

SUITE = "bookworm"
PACKAGES = (
    "systemd", "systemd-sysv", "udev", "dbus", "kmod", "lvm2", "nfs-kernel-server", "nfs-common", "nbd-client",
    "e2fsprogs", "iproute2", "procps", "quota", "fuse3", "make", "python3", "python3-venv", "python3-libnbd",
    "python3-pyfuse3", "qemu-utils", "ca-certificates", "gcc", "libc6-dev", "python3-dev",
    "bcache-tools", "cachefilesd", "nbdkit",
)  # fmt: skip
"""What a hypervisor and a file server have, what `make install` asks for, what it compiles the core with, and what
Forebay is compared with."""

BOOT_MODULES = ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic")
MODULES = (
    *BOOT_MODULES, "virtio_net", "virtio_console", "virtio-rng", "nfs", "nfsv3", "nfsv4", "nfsd", "rpcsec_gss_krb5",
    "nbd", "dm-mod", "dm-flakey", "dm-delay", "fuse", "loop", "quota_v2", "autofs4", "configfs", "sch_netem",
    "crct10dif_common", "dm-cache", "dm-cache-smq", "bcache", "cachefiles", "softdog",
)  # fmt: skip
"""The kernel has 4000 more; these, and those that they need, make a small image."""


def install_needed(told: Callable[[str], None]) -> None:
    """Have the commands of NEEDED; Lacking where that is impossible."""
    if os.geteuid() != 0:
        raise Lacking("making machines needs root")
    missing = [package for command, package in NEEDED.items() if not path_of(command)]
    if not missing:
        return
    if not path_of("apt-get"):
        raise Lacking(f"no apt-get here to install {', '.join(missing)}")
    told(f"installing {' '.join(missing)}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing, env=quiet)
    except Failure as error:
        raise Lacking(f"cannot be installed: {' '.join(missing)}: {error}") from error


def mirror() -> str:
    """Where this host takes its packages from; Lacking where apt's sources do not say."""
    for path in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            first, *rest = line.split() or [""]
            found = [word for word in rest if word.startswith(("http://", "https://"))]
            if first in {"URIs:", "deb"} and found:
                return found[0]
    raise Lacking("apt's sources name no mirror that debootstrap could use (http or https)")


def make_system(into: Path) -> None:
    """Debian, in a directory."""
    packages = ",".join(PACKAGES)
    try:
        run(
            *("debootstrap", "--variant=minbase", f"--include={packages}"),
            *(SUITE, str(into / "root"), mirror()),
            log=into / "debootstrap.log",
        )
    except Failure as error:
        raise Lacking(f"debootstrap: {error}") from error
    for name in (
        "var/cache/apt/archives",
        "var/lib/apt/lists",
        "usr/share/doc",
        "usr/share/locale",
    ):
        shutil.rmtree(into / "root" / name, ignore_errors=True)


def make_kernel(into: Path) -> None:
    """Debian's kernel, unpacked and not installed."""
    answer = run("apt-cache", "depends", "linux-image-amd64")
    packages = [word for word in answer.split() if word.startswith("linux-image-")]
    versioned = [word for word in packages if word.removeprefix("linux-image-")[:1].isdigit()]
    if not versioned:
        raise Lacking("apt knows no linux-image-amd64: try apt-get update")
    run("apt-get", "download", "-qq", versioned[0], cwd=into)
    (package,) = into.glob("linux-image-*.deb")
    run("dpkg-deb", "-x", str(package), str(into))
    package.unlink()


def make_boot(into: Path, kernel: Path) -> None:
    """The kernel, the modules that machines may load, and an initramfs that mounts the first disk."""
    (image,) = (kernel / "boot").glob("vmlinuz-*")
    shutil.copy(image, into / "vmlinuz")
    (source,) = (kernel / "lib" / "modules").iterdir()
    run("depmod", "-b", str(kernel), source.name)
    kept = into / "modules" / source.name
    for file in closure(source, MODULES):
        (kept / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / file, kept / file)
    for path in source.glob("modules.builtin*"):
        shutil.copy(path, kept)
    shutil.copy(source / "modules.order", kept)
    # so that udev finds no driver that is not there
    (into / "lib").mkdir()
    (into / "lib" / "modules").symlink_to("../modules")
    run("depmod", "-b", str(into), source.name)
    _make_initramfs(into / "initramfs", source)


def _make_initramfs(work: Path, modules: Path) -> None:
    """`work` packed as `work`.gz: busybox, and the modules that lead to the first disk."""
    for name in ("bin", "proc", "sys", "dev", "root", "modules"):
        (work / name).mkdir(parents=True)
    shutil.copy(path_of("busybox") or "/bin/busybox", work / "bin" / "busybox")
    order = closure(modules, BOOT_MODULES)
    for name in order:
        shutil.copy(modules / name, work / "modules")
    (work / "order").write_text("".join(f"{Path(name).name}\n" for name in order))
    (work / "init").write_text(INITRAMFS_INIT)
    (work / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(work)) for path in sorted(work.rglob("*")))
    packed = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"],
        input=names.encode(),
        stdout=subprocess.PIPE,
        cwd=work,
        check=True,
    ).stdout
    work.with_suffix(".gz").write_bytes(gzip.compress(packed, 1, mtime=0))


INITRAMFS_INIT = """\
#!/bin/busybox sh
for it in "proc proc /proc" "sysfs sys /sys" "devtmpfs dev /dev"; do /bin/busybox mount -t $it; done
while read -r module; do /bin/busybox insmod /modules/$module; done </order
until [ -b /dev/vda ]; do /bin/busybox usleep 20000; done
/bin/busybox mount -t ext4 /dev/vda /root || exec /bin/busybox sh
for it in dev proc sys; do /bin/busybox mount --move /$it /root/$it; done
exec /bin/busybox switch_root /root /lib/systemd/systemd
"""


def closure(modules: Path, names: Iterable[str]) -> list[str]:
    """Files of kernel modules and of those that they need, in an order in which they can be loaded.

    A module that the kernel has built in has no file, and is left out.
    """
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()[::-1]
    by_name = {Path(path).name.split(".")[0].replace("-", "_"): path for path in needs}
    order: dict[str, None] = {}
    for name in names:
        file = by_name.get(name.replace("-", "_"))
        if file is not None:
            order |= dict.fromkeys([*needs[file], file])
    return list(order)
