# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The command line of QEMU's storage daemon for a chain of files: open files, and what each of them is.

Every name of a file is that of an open descriptor, and every `backing` is given, be it none: so QEMU opens nothing that
a file names. It takes its own locks on each file (locks.py says which of them we leave to it).
"""

import json
from typing import Any

from forebay.formats.magic import RAW
from forebay.origin.virtual import qcow2, vmdk
from forebay.origin.virtual.chain import Link
from forebay.origin.worker.program import LISTENING

PROGRAM = "qemu-storage-daemon"

TOP = "disk"
"""The name of the node that is exported."""


def command(chain: list[Link], fds: list[int], *, writable: bool, need_locks: bool) -> list[str]:
    """The command. `fds` are the descriptors of the files of the chain, in the process that starts it."""
    node: dict[str, Any] | None = None
    for depth in reversed(range(len(chain))):
        writes = writable and depth == 0
        node = _node(chain[depth].header.format, fds[depth], node, writes, need_locks=need_locks)
    assert node is not None, "a chain has a file"
    export = {
        "type": "nbd",
        "id": "export",
        "node-name": TOP,
        "name": "",
        "writable": writable,
    }
    return [
        PROGRAM,
        "--blockdev",
        json.dumps(node | {"node-name": TOP}),
        "--nbd-server",
        f"addr.type=fd,addr.str={LISTENING}",
        "--export",
        json.dumps(export),
    ]


def _node(
    image_format: str, fd: int, below: dict[str, Any] | None, writes: bool, *, need_locks: bool
) -> dict[str, Any]:
    """The node of one file, over the node of the one that it lies on."""
    access = {"read-only": not writes, "auto-read-only": False, "discard": "unmap"}
    node: dict[str, Any] = {
        "driver": image_format,
        **access,
        "file": {
            "driver": "file",
            "filename": f"/proc/self/fd/{fd}",
            "locking": "on" if need_locks and writes else "auto",
            **access,
        },
    }
    if image_format == qcow2.NAME:
        node |= {"backing": below, "lazy-refcounts": False}
    elif image_format == vmdk.NAME:
        node |= {"backing": None}
    else:
        assert below is None or image_format != RAW, "a raw file lies on none"
    return node
