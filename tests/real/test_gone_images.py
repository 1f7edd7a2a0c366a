# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Images that are deleted after use: the cache does not keep what it had of them."""

import json

from real.disk_fixture import wait_for
from real.gateway_process import GatewayProcess


def test_images_that_were_deleted_leave_nothing(gateway: GatewayProcess) -> None:
    for n in range(3):
        image = gateway.images / f"i{n}.raw"
        image.write_bytes(bytes([n + 1]) * (1 << 20))
        gateway.attach("vm", image.name)
        gateway.cli("preload", "vm", "all")
        gateway.cli("detach", "vm")
        if n:
            image.unlink()

    def slots() -> int:
        info = json.loads(gateway.cli("cache", "info", "--json").stdout)
        return int(info["slots"] - info["free_slots"])

    wait_for(lambda: slots() == 16, "the slots of images that are gone are still taken")
    info = json.loads(gateway.cli("cache", "info", "--json").stdout)
    assert info["reclaimed_images"] == 2
    assert info["clean_bytes"] == 1 << 20
