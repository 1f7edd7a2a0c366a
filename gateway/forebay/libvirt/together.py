# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The disks of a domain that comes are waited for side by side: all together no longer than for one."""

from collections.abc import Callable, Iterable
from threading import Thread

from forebay.libvirt.domain import WantedDisk

Attach = Callable[[WantedDisk], None]


def attach_together(disks: Iterable[WantedDisk], attach: Attach) -> None:
    """Attach all of them, each in a thread. Raises what the first one raised that failed, when all have ended."""
    disks = list(disks)
    faults: dict[str, Exception] = {}

    def attach_one(disk: WantedDisk) -> None:
        try:
            attach(disk)
        except Exception as fault:  # noqa: BLE001  (raised below)
            faults[disk.name] = fault

    threads = [Thread(target=attach_one, args=(disk,), daemon=True) for disk in disks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for disk in disks:
        if disk.name in faults:
            raise faults[disk.name]
