# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A disk is plugged into a running VM."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

from forebay_one.deploy import remote_directory
from forebay_one.remote import checked_host, pass_on, run_on, warning, words
from forebay_one.vm import OF_VM, Disk, DiskPath, Failed, disk_name, disks, image_on_host

SCRIPT = """set -o pipefail
LIBVIRT_URI=
[ ! -r {rc} ] || . {rc}
virsh=(virsh --connect "${{LIBVIRT_URI:-qemu:///system}}")
{attach} >/dev/null || exit 1
{xml} | "${{virsh[@]}}" attach-device {domain} /dev/stdin && exit 0
{detach} >/dev/null 2>&1
exit 1
"""
"""The detach comes after the line that says what is wrong. It is refused where the VM has the disk already."""

LIMITS = ("TOTAL", "READ", "WRITE")


def main(arguments: Sequence[str]) -> int:
    """Plug the disk in. The exit code; raises Failed and OSError."""
    if len(arguments) != 7:
        raise Failed("wants DEPLOY_ID PATH TARGET INDEX DRV_MESSAGE VMID HOST")
    domain, path, target, _, message, vm, host = arguments
    checked_host(host)
    disk = _disk(message)
    if disk is None or not disk.is_served:
        return _by_the_stock_script(arguments, host)
    at = DiskPath.read(path)
    name = disk_name(vm, at.id)
    if any(key.startswith(LIMITS) and "_SEC" in key for key in disk.attributes):
        warning(f"the limits of {name} hold from the next start of the VM on")
    image = image_on_host(disk.get("SOURCE"), at.directory)
    script = SCRIPT.format(
        rc=words(f"{remote_directory()}/etc/vmm/kvm/kvmrc"),
        attach=words("forebay", "attach", name, image, *_options(disk)),
        xml=words("forebay", "xml", name, f"--target={target}"),
        detach=words("forebay", "detach", name),
        domain=words(domain),
    )
    done = run_on(host, script)
    if done.code != 0:
        raise Failed(f"{name} is not plugged into {domain}: {done.why}")
    return 0


def _disk(message: str) -> Disk | None:
    """The disk that is plugged in; None where the message cannot be understood."""
    try:
        found = disks(base64.b64decode(message), ("VM", *OF_VM))
        [disk] = [one for one in found if one.get("ATTACH") == "YES"]
    except (Failed, ValueError, binascii.Error):
        return None
    return disk


def _options(disk: Disk) -> list[str]:
    given = {
        "mode": disk.get("CACHE_MODE"),
        "cache-size": disk.size("CACHE_SIZE"),
        "preload": disk.size("PRELOAD_SIZE"),
        "weight": disk.get("CACHE_WEIGHT"),
    }
    options = [f"--{key}={value}" for key, value in given.items() if value]
    return [*options, "--read-only"] if disk.is_yes("READONLY") else options


def _by_the_stock_script(arguments: Sequence[str], host: str) -> int:
    """Have OpenNebula's own script on the host do it."""
    stock = words(f"{remote_directory()}/vmm/kvm/attach_disk", *arguments)
    return pass_on(run_on(host, f"exec {stock}\n"))
