# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Attaching a disk for a domain whose image another gateway may still write back: the domain came from its host."""

import time
from typing import Any

from forebay.client import Client
from forebay.errors import InUseError

FREE_SECONDS = 20.0
"""How long each disk of a domain waits for another gateway that serves its image. It is less than the hook has for a
start, so that the refusal says who that is, and how much it has to write back.
"""

PAUSE = 1.0
"""Seconds between two tries, each of which costs the store a few calls."""


def attach_when_free(client: Client, arguments: dict[str, Any]) -> None:
    """Attach a disk, and wait for a gateway that serves its image, but for none that is gone. Raises ForebayError.

    `arguments` as the control API has them. An image that is to be handed over was waited for once the first try ends.
    """
    deadline = time.monotonic() + (0.0 if arguments.get("incoming") else FREE_SECONDS)
    while True:
        try:
            client.post("/disks", arguments)
        except InUseError as fault:
            if not fault.holder.get("serves") or time.monotonic() >= deadline:
                raise
            time.sleep(PAUSE)
        else:
            return
