# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A disk of its own for a VM, over an image that nobody writes: a qcow2 file whose base is served by Forebay.

Nothing is copied, but where the image is raw or the datastore says QCOW2_STANDALONE: then the copy is read through the
cache. The layout is that of OpenNebula's qcow2 driver, whose scripts for snapshots, save-as and so on are used.
"""

from __future__ import annotations

import os
import sys

from forebay_one.remote import (
    REMOTES,
    Settings,
    asked,
    in_uri,
    info,
    location,
    run_on,
    script_name,
    settings,
    warning,
    words,
)
from forebay_one.vm import Disk, DiskPath, Failed, disk_name, disks, is_number, normalised

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

NO_SOCKET = "Forebay is down there, or its configuration has no such store with socket = true"
"""What is told before the socket's path."""

LOCAL_SYSTEMS = ("ssh", "local")
"""System datastores without a shared directory: such a host is asked about its disks by ssh."""


def main(arguments: Sequence[str]) -> int:
    """Make the disk. The exit code; raises Failed and OSError."""
    if len(arguments) != 4:
        raise Failed("wants FE:SOURCE HOST:SYSDIR/disk.I VMID DSID")
    source, destination, vm, store = arguments
    host, path = location(destination)
    at, image = DiskPath.read(path), normalised(source.partition(":")[2])
    disk_name(vm, at.id)  # checks the number of the VM
    disk = _disk(vm, at.id)
    if not disk.is_cached:
        info(f"CACHE_MODE is NONE: {at.path} is made on the mount of datastore {store}")
        return _by_the_stock_script(arguments)
    conf = settings()
    done = run_on(host, script(disk, image, at, _socket(conf, store)))
    if done.code == 0:
        info(f"{at.path} on {host} is a clone of {os.path.basename(image)} through Forebay")
        return 0
    if not conf.fallback:
        raise Failed(f"no clone through Forebay on {host}: {done.why}")
    warning(f"made on the mount of datastore {store}, since Forebay on {host} cannot: {done.why}")
    return _by_the_stock_script(arguments)


def _disk(vm: str, number: int) -> Disk:
    found = disks(asked(["onevm", "show", "-x", vm]))
    for disk in found:
        if disk.id == number:
            return disk
    raise Failed(f"VM {vm} has no disk {number}")


def _socket(conf: Settings, store: str) -> str:
    if not is_number(store, 15):
        raise Failed(f"{store!r} is not the number of a datastore")
    return f"{conf.run}/stores/one-{int(store)}.sock"


def script(disk: Disk, image: str, at: DiskPath, socket: str) -> str:
    """What the host is to do. If a step fails, nothing of the disk is left."""
    uri = f"nbd+unix:///{in_uri(os.path.basename(image))}?socket={in_uri(socket, '/')}"
    drop = words("rm", "-rf", "--", at.path, f"{at.path}.snap")
    lines = [
        "set -e -o pipefail",
        f"[ -S {words(socket)} ] || {{ {words('echo', f'{NO_SOCKET}: {socket}')} >&2; exit 1; }}",
        words("mkdir", "-p", "--", at.directory),
        *_monitoring(at),
        drop,
        f"undo() {{ {drop}; exit 1; }}",
        "trap undo ERR",
        *(_qcow2(disk, uri, at) if disk.get("FORMAT").lower() == "qcow2" else _raw(disk, uri, at)),
    ]
    return "\n".join(lines) + "\n"


def _monitoring(at: DiskPath) -> list[str]:
    """As OpenNebula's scripts: who asks about the disks of a host, by a file beside the VMs' directories."""
    file = words(f"{os.path.dirname(at.directory)}/.monitor")
    system = script_name().rpartition(".")[2]
    return [f"echo ssh >{file}"] if system in LOCAL_SYSTEMS else [f"rm -f -- {file}"]


def _qcow2(disk: Disk, uri: str, at: DiskPath) -> list[str]:
    name = f"disk.{at.id}"
    delta = f"{at.path}.snap/0"
    grown = [f"{disk.number('SIZE')}M"] if _grows(disk) else []
    if disk.is_yes("QCOW2_STANDALONE"):
        make = [
            words(
                "qemu-img", "convert", "-q", "-f", "qcow2", "-O", "qcow2", *_zeros(disk), uri, delta
            )
        ]
        make += [words("qemu-img", "resize", "-q", "-f", "qcow2", delta, *grown)] if grown else []
    else:
        make = [
            words(
                "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", uri, delta, *grown
            )
        ]
    return [
        words("mkdir", "--", f"{at.path}.snap"),
        *make,
        words("ln", "-s", "--", ".", f"{at.path}.snap/{name}.snap"),
        words("ln", "-s", "--", f"{name}.snap/0", at.path),
    ]


def _raw(disk: Disk, uri: str, at: DiskPath) -> list[str]:
    make = [
        words("qemu-img", "convert", "-q", "-f", "raw", "-O", "raw", *_zeros(disk), uri, at.path)
    ]
    if _grows(disk):
        make += [words("qemu-img", "resize", "-q", "-f", "raw", at.path, f"{disk.number('SIZE')}M")]
    return make


def _grows(disk: Disk) -> bool:
    return 0 < disk.number("ORIGINAL_SIZE") < disk.number("SIZE")


def _zeros(disk: Disk) -> list[str]:
    return ["-S", "0"] if disk.get("SPARSE").upper() == "NO" else []


def _by_the_stock_script(arguments: Sequence[str]) -> int:
    """Become the script of OpenNebula's qcow2 driver."""
    suffix = ".ssh" if script_name().rpartition(".")[2] in LOCAL_SYSTEMS else ""
    stock = f"{REMOTES}/tm/qcow2/clone{suffix}"
    sys.stderr.flush()
    os.execv(stock, [stock, *arguments])  # noqa: S606
