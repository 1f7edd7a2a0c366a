# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A small real Linux for tests: Debian's kernel and busybox on a raw disk image that boots through a BIOS.

No loop device, no mount and no root are needed to make one. The image holds an MBR with syslinux's boot code, a FAT
partition with syslinux, the kernel and an initramfs, and an ext4 partition with the root file system. The guest's
console is its first serial port, and a loop there evaluates each line that comes.
"""

import gzip
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

KERNELS = (ROOT / ".lab" / "kernel", Path("/"))
"""Where a kernel and its modules may lie: what `make setup-libvirt` unpacked, or the host's own."""

MODULES = (
    "virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk",
)  # fmt: skip
"""In the order in which they are loaded. A kernel that has one of them built in has no file for it."""

SECTOR = 512
BOOT_START, BOOT_SECTORS = 2048, 36 * 2048
ROOT_START = BOOT_START + BOOT_SECTORS
ROOT_SECTORS = 24 * 2048
SIZE = (ROOT_START + ROOT_SECTORS) * SECTOR
"""Bytes of a guest's image: 61 MiB."""

TOOLS = ("busybox", "syslinux", "mcopy", "mformat", "mke2fs")
BOOT_CODE = (
    Path("/usr/lib/syslinux/mbr/mbr.bin"),
    Path("/usr/share/syslinux/mbr.bin"),
)

INITRAMFS_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for module in {modules}; do /bin/busybox insmod /modules/$module.ko; done
until [ -b /dev/vda2 ]; do /bin/busybox usleep 20000; done
/bin/busybox mount -t ext4 /dev/vda2 /root || exec /bin/busybox sh
/bin/busybox umount /dev
exec /bin/busybox switch_root /root /sbin/init
"""

ROOT_INIT = """\
#!/bin/busybox sh
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
echo 1 >/proc/sys/kernel/printk
stty -F /dev/ttyS0 -echo
exec </dev/ttyS0 >/dev/ttyS0 2>&1
echo "guest is up"
while true; do
    read -r line && eval "$line"
done
"""


def kernel() -> tuple[Path, Path]:
    """A kernel and the directory of its modules; skips where there is none."""
    for root in KERNELS:
        for image in sorted((root / "boot").glob("vmlinuz-*"), reverse=True):
            modules = root / "usr" / "lib" / "modules" / image.name.removeprefix("vmlinuz-")
            for found in (modules, root / "lib" / "modules" / modules.name):
                if found.is_dir() and os.access(image, os.R_OK):
                    return image, found
    pytest.skip("no kernel for a guest: `make setup-libvirt` fetches one")


def boot_code() -> bytes:
    """What the BIOS runs: syslinux's MBR, which starts the active partition."""
    for path in BOOT_CODE:
        if path.exists():
            return path.read_bytes()
    pytest.skip("no mbr.bin of syslinux: `make setup-libvirt` installs it")


def make_image(path: Path, work: Path) -> None:
    """Make the guest's image at `path`; `work` is an empty directory for what goes into it. Skips where a part is
    missing.
    """
    for tool in TOOLS:
        if shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None:
            pytest.skip(f"{tool} is not installed: `make setup-libvirt` installs it")
    image, modules = kernel()
    with path.open("wb") as file:
        file.truncate(SIZE)
    _root_file_system(path, work / "root")
    _boot_file_system(path, work, image, _initramfs(modules))
    with path.open("r+b") as file:
        file.write(boot_code().ljust(440, b"\0"))
        file.seek(446)
        file.write(_partition(0x80, 0x0E, BOOT_START, BOOT_SECTORS))
        file.write(_partition(0x00, 0x83, ROOT_START, ROOT_SECTORS))
        file.seek(510)
        file.write(b"\x55\xaa")


def _partition(flag: int, kind: int, start: int, sectors: int) -> bytes:
    """An entry of the partition table; cylinders and heads say: see the sector numbers."""
    beyond = b"\xfe\xff\xff"
    return struct.pack("<B3sB3sII", flag, beyond, kind, beyond, start, sectors)


def _root_file_system(image: Path, root: Path) -> None:
    for name in ("bin", "sbin", "proc", "sys", "dev", "tmp", "data"):
        (root / name).mkdir(parents=True)
    busybox = root / "bin" / "busybox"
    shutil.copy(_which("busybox"), busybox)
    applets = _run("busybox", "--list").stdout.split()
    for applet in applets:
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    init = root / "sbin" / "init"
    init.write_text(ROOT_INIT)
    init.chmod(0o755)
    place = f"-Eoffset={ROOT_START * SECTOR},lazy_itable_init=0,root_owner=0:0"
    blocks = f"{ROOT_SECTORS * SECTOR // 1024}k"
    _run(
        "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", place, "-d", str(root), str(image), blocks
    )


def _boot_file_system(image: Path, work: Path, kernel_image: Path, initramfs: bytes) -> None:
    at = ["-i", f"{image}@@{BOOT_START * SECTOR}"]
    _run(
        "mformat", *at, "-T", str(BOOT_SECTORS), "-h", "64", "-s", "32", "-H", str(BOOT_START), "::"
    )
    (work / "initramfs").write_bytes(initramfs)
    (work / "syslinux.cfg").write_text(
        "DEFAULT linux\nPROMPT 0\nTIMEOUT 0\nLABEL linux\nKERNEL vmlinuz\nINITRD initramfs\n"
        "APPEND console=ttyS0 quiet panic=1 tsc=unstable\n"
    )
    _run("mcopy", *at, str(kernel_image), "::vmlinuz")
    _run("mcopy", *at, str(work / "initramfs"), str(work / "syslinux.cfg"), "::")
    _run("syslinux", "--install", "--offset", str(BOOT_START * SECTOR), str(image))


def _initramfs(modules: Path) -> bytes:
    found = {}
    for name in MODULES:
        for path in modules.rglob(f"{name}.ko"):
            found[name] = path.read_bytes()
    files = {
        "init": (0o100755, INITRAMFS_INIT.format(modules=" ".join(found)).encode()),
        "bin": (0o40755, b""),
        "dev": (0o40755, b""),
        "root": (0o40755, b""),
        "modules": (0o40755, b""),
        "bin/busybox": (0o100755, Path(_which("busybox")).read_bytes()),
        **{f"modules/{name}.ko": (0o100644, content) for name, content in found.items()},
    }
    return gzip.compress(_cpio(files), compresslevel=1, mtime=0)


def _cpio(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """An archive in the format "newc" (the kernel's buffer-format.rst)."""
    archive = bytearray()
    trailer = {"TRAILER!!!": (0, b"")}
    for number, (name, (mode, content)) in enumerate({**files, **trailer}.items(), 1):
        links = 2 if mode & 0o40000 else 1
        numbers = (number, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08x" % value for value in numbers)
        archive += name.encode() + b"\0"
        archive += bytes(-len(archive) % 4)
        archive += content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def _which(tool: str) -> str:
    found = shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    assert found is not None
    return found


def _run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C"}
    return subprocess.run(
        [_which(tool), *arguments],
        check=True, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
