# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The start of a VM: its persistent disks of Forebay datastores are taken to Forebay's sockets.

This runs for every VM of the cluster. Whatever is wrong with what it reads, a VM starts as it would without it.
"""

from __future__ import annotations

import base64
import binascii
import os
import sys
from collections.abc import Sequence

from forebay_one.domain import directory_of, through_forebay
from forebay_one.remote import (
    REMOTES,
    checked_host,
    error,
    pass_on,
    run_on,
    settings,
    warning,
    words,
)
from forebay_one.vm import MOST_XML, Failed, disks

DEFAULT_REMOTE = "/var/tmp/one"  # noqa: S108  (OpenNebula's own)

LONGEST_READ = 2 * MOST_XML
"""Bytes that are read of what may be written in base64."""

END = "END-OF-FOREBAY"

SCRIPT = """set -e -o pipefail
[ -x {deploy} ] || {{ echo 'OpenNebula has no scripts there: onehost sync --force' >&2; exit 1; }}
mkdir -p -- {directory}
{files}base64 -d <<'{end}' | {deploy} {arguments}
{domain}{end}
"""


def main(arguments: Sequence[str]) -> int:
    """Deploy the VM. The exit code of OpenNebula's script on the host; raises Failed and OSError."""
    if len(arguments) < 4:
        raise Failed("wants FILE HOST VMID HOST")
    file, host, vm = arguments[:3]
    given = sys.stdin.buffer.read(LONGEST_READ)
    domain = _domain(file, given)
    directory = directory_of(domain)
    script = SCRIPT.format(
        deploy=words(f"{remote_directory()}/vmm/kvm/deploy"),
        directory=words(directory),
        files="".join(
            _copied(beside(file, name), f"{directory}/{name}") for name in ("vm.xml", "ds.xml")
        ),
        arguments=words(f"{directory}/{os.path.basename(file)}", *arguments[1:]),
        domain=_encoded(_rewritten(domain, beside(file, "vm.xml"), vm)),
        end=END,
    )
    done = run_on(checked_host(host), script)
    code = pass_on(done)
    if code != 0:
        error(f"VM {vm} does not start on {host}: {done.why}")
    return code


def _domain(file: str, given: bytes) -> bytes:
    """The domain, from its file; where that cannot be read, from what the driver was given.

    Raises OSError, and Failed for one that is longer than any that libvirt takes.
    """
    try:
        with open(file, "rb") as opened:
            domain = opened.read(MOST_XML + 1)
    except OSError:
        domain = decoded(given)
        if not domain:
            raise
    if len(domain) > MOST_XML:
        raise Failed(f"{file} is longer than {MOST_XML >> 20} MiB, which libvirt does not take")
    return domain


def _rewritten(domain: bytes, vm_xml: bytes, vm: str) -> bytes:
    """The domain as it is to be; as it is, with a line in the log, where that cannot be made."""
    try:
        served = [disk for disk in disks(vm_xml) if disk.is_served]
        return through_forebay(domain, vm, served, settings().run) if served else domain
    except Exception as fault:  # noqa: BLE001  (a VM that is none of ours must start)
        warning(f"VM {vm} starts without Forebay: {fault}")
        return domain


def beside(file: str, name: str) -> bytes:
    """What lies beside the file; empty where it cannot be read. OpenNebula's driver writes it in base64."""
    try:
        with open(os.path.join(os.path.dirname(file), name), "rb") as opened:
            return decoded(opened.read(LONGEST_READ))
    except OSError:
        return b""


def decoded(text: bytes) -> bytes:
    """What may be written in base64, in plain."""
    if text.lstrip().startswith(b"<"):
        return text
    try:
        return base64.b64decode(text, validate=False)
    except binascii.Error:
        return text


def remote_directory() -> str:
    """Where OpenNebula's scripts lie on the hosts: SCRIPTS_REMOTE_DIR."""
    try:
        with open(f"{REMOTES}/../config", encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return DEFAULT_REMOTE
    found = [
        x.partition("=")[2].strip(" \"'") for x in lines if x.startswith("SCRIPTS_REMOTE_DIR=")
    ]
    return found[0] if found and found[0].startswith("/") else DEFAULT_REMOTE


def _copied(content: bytes, path: str) -> str:
    return f"base64 -d >{words(path)} <<'{END}'\n{_encoded(content)}{END}\n" if content else ""


def _encoded(content: bytes) -> str:
    return base64.encodebytes(content).decode()
