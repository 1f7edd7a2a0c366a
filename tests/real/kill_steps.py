# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Kills at named points: one gateway a mode, a life that passes them all, and a daemon that ends itself at one of them.

The life of a disk here: guests at work, a flush of the disk by command, a change of mode and back, detach and attach,
another disk that comes and goes. kill_plants.py ends the daemon at the n-th passing of a point; then it is started
without that, and everything is looked at twice.
"""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from real.disk_fixture import MODES
from real.kill_checker import Guest, Tally
from real.kill_daemon import KillableGateway, Refused
from real.kill_hunt import Ground
from real.kill_plants import SIDES
from real.processes import MIB, random_image

SHARE = 0.03
"""Of all points in each mode, in `make test`."""

OVERLAY = "overlay"

LIVES = (*MODES, OVERLAY)
"""In what a disk may live: a mode, or over an image."""

SETTINGS = {
    "cache": {"size": "8 MiB"},  # so small that things are evicted
    "defaults": {"max_lag": "1h", "max_dirty": "1 GiB"},  # written back on command
}

SIZE = 2 * MIB

AT_START = (
    "start: replayed",
    "start: committed",
    "start: journal of the image",
    "redo apply",
    "owner claim",
    "owner token",
    "owner swept",
)
"""Points that a start passes: they count from its beginning."""

EXTRA = "extra"


class Ended(Exception):
    """The daemon has ended."""


@dataclass
class Steps:
    """The kills of one life."""

    life: str
    seed: int
    tally: Tally
    reached: dict[str, int] = field(default_factory=dict)
    """Kills by side."""

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        overlay = self.life == OVERLAY
        self.ground = Ground(
            self.seed,
            self.tally,
            modes=[] if overlay else [self.life],
            overlays=[OVERLAY] if overlay else [],
            size=SIZE,
            settings=SETTINGS,
            depth=4,
        )
        self.gateway.allow_log("copying paused: the cache has no room")
        self.asked = ""  # the command under way
        self.extra = False  # whether that disk is there, as far as anybody was told

    @property
    def gateway(self) -> KillableGateway:
        return self.ground.gateway

    @property
    def guest(self) -> Guest:
        return self.ground.guests.all[0]

    def begin(self) -> None:
        random_image(self.gateway.images / "extra.raw", MIB, self.seed)
        self.ground.begin()
        self.gateway.kill()
        self.ground.killed()

    def end(self) -> None:
        """Compare with the image, and that the daemon had nothing to complain of."""
        self._started()
        self.ground.finish()
        loud = self.gateway.unexpected_log()
        assert not loud, "unexpected in the daemon's log:\n" + "\n".join(loud)
        self.gateway.remove()

    # -- one kill

    def passings(self, *, armed: bool = False) -> dict[str, int]:
        """How often each side is passed in a life that nobody ends; `armed`: from the start on."""
        self.gateway.launch(plant={"count": True}, armed=armed)
        assert self.gateway.ready(), self.gateway.log_text()
        self._connected()
        self.gateway.counters.arm()
        if not armed:
            self._live()
        counts = self.gateway.counters.counts()
        self.gateway.kill()
        self.ground.killed()
        return counts

    def kill_at(self, side: str, nth: int) -> bool:
        """Live until that passing, start again, and check. False: it was not passed so often."""
        point = side.partition(" ")[2]
        if point in ("redo apply", "start: journal of the image"):
            self._kill_at("after redo commit", 1)
        done = self._kill_at(side, nth, armed=point in AT_START)
        if done:
            self.reached[side] = self.reached.get(side, 0) + 1
            self.tally.kills += 1
        before = len(self.tally.lost)
        self._started()
        self.guest.compare_all()
        self._until(lambda: not self.guest.verifying)
        self._work(6)
        self.gateway.kill()
        self.ground.killed()
        for i in range(before, len(self.tally.lost)):
            self.tally.lost[i] = f"{side}, passing {nth}: {self.tally.lost[i]}"
        return done

    def _kill_at(self, side: str, nth: int, *, armed: bool = False) -> bool:
        self.gateway.launch(plant={"kill": side, "nth": nth}, armed=armed)
        try:
            if not self.gateway.ready():
                raise Ended
            self._connected()
            self.gateway.counters.arm()
            self._live()
        except Ended:
            self.ground.killed()
            return True
        self.gateway.kill()
        self.ground.killed()
        return False

    def _started(self) -> None:
        """Start without a plant: what was told to be there is."""
        if self.gateway.alive:
            return
        self.gateway.launch()
        assert self.gateway.ready(), self.gateway.log_text()
        self._connected()

    # -- after a start

    def _connected(self) -> None:
        """Bring the disks to where they were to be, and the guests to them. Raises Ended."""
        asked, self.asked = self.asked, ""
        there = {disk["name"] for disk in self._ask("GET", "/disks")}
        self._see_to_extra(EXTRA in there, asked)
        name = self.guest.name
        if name not in there:
            if asked not in ("detach", "attach"):
                self.guest.lose("the disk is not there after a start")
            self._attach()
        elif asked == "detach" and self.life == OVERLAY:
            self._look_at_overlay()
        self._connect()

    def _see_to_extra(self, there: bool, asked: str) -> None:
        if there != self.extra and asked != "extra":
            self.guest.lose(f"the other disk is {'there' if there else 'not there'} after a start")
        self.extra = there
        if there:
            self._detach_extra()

    def _look_at_overlay(self) -> None:
        """It was being detached: what it had is all there, or all gone."""
        import nbd

        handle = nbd.NBD()
        try:
            handle.connect_uri(self.guest.uri)
            found = b"".join(bytes(handle.pread(MIB, at)) for at in range(0, SIZE, MIB))
        except nbd.Error:
            raise self._ended() from None
        if found == self.ground.base:
            self.guest.model[:] = found

    def _connect(self) -> None:
        if not self.ground.guests.connect():
            raise self._ended()

    def _ended(self) -> Ended:
        if self.gateway.running:
            self.gateway.wait_ended()
        return Ended()

    # -- the life

    def _live(self) -> None:
        """All of it. Raises Ended."""
        self._work(30)
        self._beside("flush", "POST", f"/disks/{self.guest.name}/flush")
        self._work(20)
        for mode in self._other_modes():
            self._beside("mode", "POST", f"/disks/{self.guest.name}/mode", {"mode": mode})
            self._work(10)
        self._detach_and_attach()
        self._work(10)
        self._attach_extra()
        self._detach_extra()
        self._work(10)

    def _other_modes(self) -> list[str]:
        mine = "write-through" if self.life == OVERLAY else self.life
        others = [m for m in MODES if m != mine]
        return [self.rng.choice(others), mine]

    def _until(self, there: Callable[[], bool]) -> None:
        if not self.ground.until(there):
            raise self._ended()

    def _work(self, writes: int) -> None:
        target = self.tally.writes + writes
        self._until(lambda: self.tally.writes >= target)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Raises Ended. An answer that is a fault is one of the test's."""
        try:
            found = self.gateway.ask(method, path, body)
        except Refused as fault:
            if fault.code:
                raise
            raise self._ended() from None
        self.tally.controls += 1
        return found

    def _beside(
        self, asked: str, method: str, path: str, body: dict[str, Any] | None = None
    ) -> None:
        """The same while the guests go on."""
        self.asked = asked
        faults: list[BaseException] = []

        def ask() -> None:
            try:
                self.gateway.ask(method, path, body)
            except BaseException as fault:  # noqa: BLE001  (told below)
                faults.append(fault)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            self._until(lambda: not thread.is_alive())
        finally:
            thread.join()
        if not faults:
            self.tally.controls += 1
            self.asked = ""
        elif isinstance(faults[0], Refused) and not faults[0].code:
            raise self._ended()
        else:
            raise faults[0]

    def _attach(self) -> None:
        guest = self.guest
        self.asked = "attach"
        overlay = self.life == OVERLAY
        options = {"overlay": True} if overlay else {"mode": self.life}
        image = "base.raw" if overlay else f"{guest.name}.raw"
        if overlay:
            guest.model[:] = self.ground.base
        self._ask("POST", "/disks", {"name": guest.name, "image": f"images:{image}", **options})
        self.asked = ""

    def _detach_and_attach(self) -> None:
        if not self.ground.guests.quiesce():
            raise self._ended()
        self.guest.hang_up()
        self.ground.guests.go_on()
        self.asked = "detach"
        self._ask("DELETE", f"/disks/{self.guest.name}?force=1")
        if self.life != OVERLAY:
            path = self.ground.images[self.guest.name]
            if path.read_bytes() != bytes(self.guest.model):
                self.guest.lose("the image lacks something after detach")
        self._attach()
        self._connect()

    def _attach_extra(self) -> None:
        self.asked = "extra"
        self._ask(
            "POST", "/disks", {"name": EXTRA, "image": "images:extra.raw", "mode": "write-back"}
        )
        self.extra, self.asked = True, ""

    def _detach_extra(self) -> None:
        self.asked = "extra"
        self._ask("DELETE", f"/disks/{EXTRA}?force=1")
        self.extra, self.asked = False, ""


def sample(sides: list[str], rng: random.Random, share: float) -> list[str]:
    """So many of them, two at least, in their order."""
    chosen = set(rng.sample(sides, max(2, round(share * len(sides)))))
    return [side for side in sides if side in chosen]


def kill_everywhere(
    life: str,
    seed: int,
    tally: Tally,
    *,
    share: float = 1.0,
    more: int = 1,
    told: Callable[[Tally], None] = lambda _tally: None,
) -> tuple[dict[str, int], Path | None]:
    """A kill at each side of each point that this life passes: at the first passing and `more` random ones.

    `share`: of the sides. Kills by side, and the directory that is kept where something was lost.
    """
    steps = Steps(life, seed, tally)
    rng = steps.rng
    try:
        steps.begin()
        counts = steps.passings()
        counts |= {
            side: count
            for side, count in steps.passings(armed=True).items()
            if side.partition(" ")[2] in AT_START
        }
        if counts.get("after redo commit"):
            counts |= dict.fromkeys((f"{when} redo apply" for when in ("before", "after")), 1)
        for side in sample([side for side in SIDES if counts.get(side)], rng, share):
            count = counts[side]
            for nth in [1, *(rng.randint(2, count) for _ in range(more) if count > 1)][:count]:
                steps.kill_at(side, nth)
                told(tally)
                if tally.lost:
                    tally.lost.append(f"{life}, seed {seed}, {steps.gateway.directory}")
                    steps.gateway.end()
                    return steps.reached, steps.gateway.directory
        steps.end()
    except BaseException as fault:
        steps.gateway.end()
        fault.add_note(f"{life}, seed {seed}, directory {steps.gateway.directory}")
        raise
    return steps.reached, None
