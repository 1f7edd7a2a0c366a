# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The end of a persistent disk: what only the cache of its host has is written to the image before anybody else."""

from __future__ import annotations

from collections.abc import Sequence

from forebay_one.remote import info, location, run_on, warning, words
from forebay_one.vm import DiskPath, Failed, disk_name, image_on_host

UNKNOWN, DOWN = 10, 11
"""What the script on the host ends with: Forebay has no such disk, or it does not answer and nothing is owed."""

SCRIPT = """\
name={name} image={image}
command -v forebay >/dev/null || exit {unknown}
if forebay status "$name" >/dev/null 2>&1; then
    told=$(forebay detach "$name" 2>&1) && exit 0
    if forebay status >/dev/null 2>&1 && ! forebay status "$name" >/dev/null 2>&1; then exit {unknown}; fi
    printf '%s\\n' "$told" >&2
    exit 1
fi
told=$(forebay status 2>&1 >/dev/null) && exit {unknown}
beside=$image.forebay
if [ -e "$beside" ] && {{ [ ! -x "$beside" ] || [ -L "$beside/owner" ]; }}; then
    printf '%s\\n' "$told" >&2
    exit 1
fi
exit {down}
"""
"""A disk that somebody else has detached meanwhile is done. `owner` stands beside an image that was not given back."""


def main(arguments: Sequence[str]) -> int:
    """Detach the disk, if the host has it. The exit code; raises Failed and OSError."""
    if len(arguments) != 4:
        raise Failed("wants HOST:SYSDIR/disk.I SOURCE VMID DSID")
    disk, source, vm, _ = arguments
    host, path = location(disk)
    at = DiskPath.read(path)
    name = disk_name(vm, at.id)
    image = image_on_host(source, at.directory)
    given = {"name": words(name), "image": words(image), "unknown": UNKNOWN, "down": DOWN}
    done = run_on(host, SCRIPT.format(**given))
    if done.code == 0:
        info(f"{name} on {host} is written back and detached")
    elif done.code == DOWN:
        warning(f"Forebay on {host} does not answer; the image of {name} is complete")
    elif done.code != UNKNOWN:
        raise Failed(
            f"what {name} has in the cache of {host} is not all in its image: {done.why}: mend that, then "
            f"onevm recover --retry {vm}"
        )
    return 0
