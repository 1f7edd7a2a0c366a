# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What an operator gives up in the middle of a life, and what somebody else does to the image: one step, of STEPS.

Each step ends with a new beginning, which the ledger is told: from then on the image and the disk are what the image
is now. What comes between has rules of its own (`crash_ledger.Phase`).
"""

import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from forebay.client import Client
from real.crash_ledger import CELL, backup_content, packed
from real.crash_marks import Marks
from real.crash_oracle import DISK, IMAGE_PATH, SIDECAR, STORE
from real.disk_fixture import wait_for
from real.gateway_process import GatewayProcess

STEPS = (
    "discard",
    "discard in a pass",
    "restore detached",
    "restore stopped",
    "restore under a journal",
)
LOG = (
    "dropped as asked|given up|changed by somebody else|replaced by another file|is resolved|was resolved"
    "|in conflict|conflict|its cached blocks are dropped|is not served|a checkpoint was not finished|copying paused"
    "|: saved as "
)
"""What a daemon may say loudly about them."""

LATER = 120.0
"""Seconds from the end of the daemon to the backup: what is written within a minute of a kill in the middle of applying
cannot be told from our own (gateway/FAILURES.md)."""

PATIENCE = 20.0
JOURNAL_SECONDS = 1.0


class Steps:
    """Does one step. `begin` comes while guests are at work, `end` when they have come to rest."""

    def __init__(
        self,
        gateway: GatewayProcess,
        marks: Marks,
        mount: Path,
        image: Path,
        rng: random.Random,
        *,
        start: Callable[[], None],
        attach: Callable[[], None],
    ) -> None:
        """`mount` is the recorder's, `image` the file below it. `start` starts the daemon, `attach` the disk."""
        self._gateway = gateway
        self._marks = marks
        self._mount = mount
        self._image = image
        self._random = rng
        self._start = start
        self._attach = attach
        self.wrong: list[str] = []

    @property
    def _client(self) -> Client:
        return Client(str(self._gateway.control))

    def begin(self, step: str) -> None:
        """While guests are at work. But for a restore that is done detached it ends their connections."""
        time.sleep(self._random.uniform(0.02, 0.3))
        if step in ("discard in a pass", "restore under a journal"):
            self._wait_for_journal()
        if step.startswith("discard"):
            self._discard()
        elif step == "restore stopped":
            self._gateway.stop()
        elif step == "restore under a journal":
            self._gateway.kill()

    def end(self, step: str, held: Mapping[int, bytes]) -> bytes | None:
        """With the guests gone; `held` is what cells are known to have held last. The new beginning; None: none."""
        if step.startswith("discard"):
            return self._begin_anew(self._attach)
        if step == "restore detached":
            self._detach()
            self._restore(detached=True)
            return self._begin_anew(self._attach)
        if step == "restore under a journal" and not self._has_journal():
            self._start()  # it was over just before the kill
            return None
        backup, before = self._restore(detached=False)
        self._start()
        return self._out_of_conflict(backup, before, held)

    # -- the operator

    def _discard(self) -> None:
        self._marks.say("discarding")
        self._delete("?force=true&discard=true")

    def _detach(self) -> None:
        self._marks.say("say", "detaching")
        self._delete("?force=true")

    def _delete(self, how: str) -> None:
        self._client.follow("DELETE", f"/disks/{DISK}{how}", None, nothing)
        self._marks.say("say", "detached")

    def _begin_anew(self, then: Callable[[], None] | None = None) -> bytes:
        """What the image holds now stays, durably, and is what the disk holds."""
        self._marks.say("order", "sync", 0.0)
        found = self._image.read_bytes()
        self._marks.say("became", packed(found))
        if then is not None:
            then()
        return found

    def _out_of_conflict(self, backup: bytes, before: bytes, held: Mapping[int, bytes]) -> bytes:
        state, dirty = self._status()
        if state != "conflict":
            if dirty:
                self.wrong.append(f"{state}, and {dirty} bytes are to be written over a backup")
            return self._begin_anew()
        if self._random.random() < 0.5:
            self._save(backup, before, held)
        how = self._random.choice(("mine", "mine", "image", "discard"))
        if how == "discard":
            self._marks.say("resolving", "image")
            self._delete("?force=true&discard=true")
        else:
            self._marks.say("resolving", how)
            content = {"keep": how, "yes": True}
            self._client.follow("POST", f"/disks/{DISK}/resolve", content, nothing)
        found = self._begin_anew(self._attach if how == "discard" else None)
        if how != "mine":
            if found != backup:
                self.wrong.append(f"resolved ({how}), and the image is not the backup")
        elif cells := lost(found, backup, before, held):
            self.wrong.append(f"cells {cells[:8]} were not kept, and are not the image's")
        return found

    def _status(self) -> tuple[str, int]:
        """State and dirty bytes, once the image was looked at."""
        found: list[tuple[str, int]] = []

        def is_known() -> bool:
            told = self._client.get(f"/disks/{DISK}")
            found[:] = [(told["state"], told["dirty_bytes"])]
            return told["state"] in ("ready", "conflict")

        wait_for(is_known, "the disk does not come back", PATIENCE)
        return found[0]

    def _save(self, backup: bytes, before: bytes, held: Mapping[int, bytes]) -> None:
        name = f"saved-{self._marks.number()}.raw"
        content = {"to": f"{STORE}:{name}", "partial": True}
        self._client.follow("POST", f"/disks/{DISK}/save", content, nothing)
        saved = (self._mount / STORE / name).read_bytes()
        self._marks.say("saved", name, packed(saved))
        if cells := lost(saved, saved, before, held):
            self.wrong.append(f"cells {cells[:8]} were not saved")

    # -- somebody else

    def _restore(self, *, detached: bool) -> tuple[bytes, bytes]:
        """Put a backup over the image, in place. It, and what the image held before."""
        self._marks.say("restoring")
        self._marks.say("order", "clock", LATER)
        before = self._image.read_bytes()
        backup = backup_content(len(before), self._marks.number())
        with (self._mount / IMAGE_PATH).open("r+b", buffering=0) as file:
            file.write(backup)
            os.fsync(file.fileno())
        assert self._image.read_bytes() == backup
        self._marks.say("order", "sync", 0.0)
        if not detached:
            self._marks.say("restored", packed(backup), packed(before))
        return backup, before

    def _has_journal(self) -> bool:
        beside = self._mount / SIDECAR
        return any(beside.glob("*/redo")) or (beside / "redo").exists()

    def _wait_for_journal(self) -> None:
        """Until there is a committed one, but not for long."""
        end = time.monotonic() + JOURNAL_SECONDS
        while time.monotonic() < end and self._gateway.alive and not self._has_journal():
            time.sleep(0.001)


def lost(found: bytes, backup: bytes, before: bytes, held: Mapping[int, bytes]) -> list[int]:
    """Cells that are neither what they are known to have held, nor gone with what the image had before the backup."""
    cells = []
    for cell, data in held.items():
        at = slice(cell * CELL, (cell + 1) * CELL)
        if found[at] != data and not (before[at] == data and found[at] == backup[at]):
            cells.append(cell)
    return cells


def nothing(done: int, total: int) -> None:
    """A progress that nobody watches."""
