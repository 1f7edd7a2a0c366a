# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Kills at random moments: gateways that live for some kills each, guests that check, everything from one seed."""

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from real.disk_fixture import MODES
from real.kill_checker import Guest, Guests, Tally
from real.kill_daemon import KillableGateway, Refused
from real.processes import MIB, random_image

EXPECTED_LOG = r"opening images:\S+ no answer within 2 s|can be reached again"
"""None of the kills may bring the daemon to write anything loud. But to open an image at the start takes more than two
seconds on a host that is busy enough.
"""

FLUSH_SECONDS = 120.0

OVERLAYS = ("overlay-1", "overlay-2")


@dataclass
class Ground:
    """One gateway with a disk in every mode and two overlays of one image; from a seed."""

    seed: int
    tally: Tally
    parent: Path = Path("/tmp")
    modes: Iterable[str] = MODES
    overlays: Iterable[str] = OVERLAYS
    size: int = 0
    """Bytes of each image; 0: by the seed."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    plant: dict[str, Any] | None = None
    links: int = 2
    depth: int = 6
    lenient: bool = False

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        rng = self.rng
        self.size = self.size or rng.choice((2 * MIB, 4 * MIB, 4 * MIB + 512 * 9, 3 * MIB + 65536))
        cache = rng.choice((48, 64, 256))
        lag = rng.choice(("50ms", "300ms", "2s", "1h"))
        settings: dict[str, dict[str, Any]] = {
            "cache": {"size": f"{cache} MiB"},
            "defaults": {"max_lag": lag, "max_dirty": rng.choice(("1 MiB", "1 GiB"))},
        }
        for name, values in self.settings.items():
            settings.setdefault(name, {}).update(values)
        self.about = f"image {self.size}, cache {settings['cache']}, {settings['defaults']}"
        self.gateway = KillableGateway(settings, self.parent)
        self.gateway.allow_log(EXPECTED_LOG)
        self.images: dict[str, Path] = {}
        self.base = b""
        self.guests = Guests([])

    @property
    def holes(self) -> list[tuple[int, int]]:
        """Of each image: (offset, length) in bytes."""
        return [(self.size // 2 & -4096, self.size // 8 & -4096)]

    # -- life

    def begin(self) -> None:
        """Start the daemon, make images, attach disks, and connect the guests."""
        self.gateway.launch(plant=self.plant)
        assert self.gateway.ready(), self.gateway.log_text()
        for mode in self.modes:
            self._attach(mode, f"{mode}.raw", mode=mode)
        if self.overlays:
            base = self.gateway.images / "base.raw"
            self.base = random_image(base, self.size, self.seed ^ 1, self.holes)
        for name in self.overlays:
            self._attach(name, "base.raw", overlay=True)
        assert self.guests.connect()

    def _attach(self, name: str, file: str, **options: Any) -> None:
        path = self.gateway.images / file
        content = self.base
        if not options.get("overlay"):
            content = random_image(path, self.size, self.rng.getrandbits(32), self.holes)
            self.images[name] = path
        self.gateway.attach_disk(name, f"images:{file}", **options)
        self.guests.all.append(
            Guest(
                name,
                self.gateway.uri(name),
                content,
                self.tally,
                random.Random(self.rng.getrandbits(32)),
                links=self.links,
                depth=self.depth,
                lenient=self.lenient,
            )
        )

    def restart(self, **options: Any) -> bool:
        """Start it again, and have it say READY, with all disks and all guests. False: it ended before."""
        self.gateway.launch(plant=self.plant, **options)
        return self.gateway.ready() and self.listed() and self.guests.connect()

    def listed(self) -> bool:
        """Whether all disks are there; a loss if not. False also where the daemon ended meanwhile."""
        try:
            names = {disk["name"] for disk in self.gateway.ask("GET", "/disks")}
        except Refused:
            self.gateway.wait_ended()
            return False
        missing = [guest for guest in self.guests.all if guest.name not in names]
        for guest in missing:
            guest.lose("the disk is not there after a start")
        return not missing

    def killed(self) -> None:
        """It ended by SIGKILL, and what it had answered is taken in."""
        code = self.gateway.wait_ended()
        assert code == -9, f"the daemon ended by itself: {code}\n{self.gateway.log_text()}"
        self.guests.last_words()

    def kill(self) -> None:
        self.gateway.kill()
        self.killed()

    def until(self, there: Callable[[], bool], seconds: float = 60.0) -> bool:
        """Let the guests work until `there`, or the daemon's end. Whether the daemon lives."""
        deadline = time.monotonic() + seconds
        while not there():
            if not self.guests.turn(0.01, self.gateway.ended_fd) and not self._alive():
                return False
            if time.monotonic() > deadline:
                raise RuntimeError(f"the guests make no progress: {self._under_way()}")
        return True

    def _under_way(self) -> list[str]:
        links = [(guest, link) for guest in self.guests.all for link in guest.links]
        return [f"{guest.name}: {request}" for guest, link in links for request in link.busy]

    def _alive(self) -> bool:
        """A broken connection means that it is ending. A daemon that hangs up and lives is a fault."""
        if self.gateway.running:
            self.gateway.wait_ended()
        return False

    # -- comparing

    def compare_images(self) -> None:
        """With nothing under way: after a flush each image is what its disk is, and the base as it was."""
        assert self.guests.quiesce(), "the daemon is gone"
        self.gateway.ask("POST", "/flush", {"timeout": FLUSH_SECONDS}, timeout=2 * FLUSH_SECONDS)
        for guest in self.guests.all:
            path = self.images.get(guest.name)
            content = bytes(guest.model) if path else self.base
            found = (path or self.gateway.images / "base.raw").read_bytes()
            self.tally.origins += 1
            if found != content:
                at = next(i for i in range(len(content)) if content[i : i + 1] != found[i : i + 1])
                guest.lose(
                    f"the image differs after a flush, at byte {at}: expected "
                    f"{content[at : at + 48]!r}, found {found[at : at + 48]!r}"
                )
        self.guests.go_on()

    def finish(self) -> None:
        """Compare the images, look at everything once more, and stop the daemon."""
        self.compare_images()
        for guest in self.guests.all:
            guest.compare_all()
        assert self.guests.quiesce(), "the daemon is gone"
        self.guests.hang_up()
        code = self.gateway.stop()
        assert code == 0, f"SIGTERM: exit {code}\n{self.gateway.log_text()}"


def hunt(
    kills: int,
    seed: int,
    tally: Tally,
    *,
    life: int = 100,
    parent: Path = Path("/tmp"),
    told: Callable[[Tally], None] = lambda _tally: None,
    over: Callable[[], bool] = lambda: False,
    **ground: Any,
) -> Path | None:
    """Kill that many daemons, `life` of them on one gateway. Ends at the first loss: its directory, which is kept."""
    rng = random.Random(seed)
    while tally.kills < kills and not over():
        one = Ground(rng.getrandbits(32), tally, parent, **ground)
        try:
            _one_life(one, min(life, kills - tally.kills), told, over)
        except KeyboardInterrupt:
            one.gateway.remove()
            raise
        except BaseException as fault:
            one.gateway.end()
            fault.add_note(f"seed {seed}, {one.about}, directory {one.gateway.directory}")
            raise
        if tally.lost:
            tally.lost.append(f"seed {seed}, {one.about}, directory {one.gateway.directory}")
            one.gateway.end()
            return one.gateway.directory
        one.gateway.remove()
    return None


def _one_life(
    ground: Ground, kills: int, told: Callable[[Tally], None], over: Callable[[], bool]
) -> None:
    rng, tally = ground.rng, ground.tally
    ground.begin()
    for _ in range(kills):
        _until_killed(ground, _moment(rng))
        if tally.lost:
            return
        tally.kills += 1
        told(tally)
        if over():
            break
        if rng.random() < 0.04:
            _back(ground)
            ground.compare_images()
    _back(ground)
    if not tally.lost:
        ground.finish()
        loud = ground.gateway.unexpected_log()
        assert not loud, "unexpected in the daemon's log:\n" + "\n".join(loud)


def _back(ground: Ground) -> None:
    if not ground.gateway.alive and not ground.tally.lost:
        assert ground.restart() or ground.tally.lost, ground.gateway.log_text()


def _moment(rng: random.Random) -> tuple[str, float]:
    """When to kill: after so many seconds from the start, which may be in the middle of it, or so many answers."""
    if rng.random() < 0.35:
        return "seconds", rng.uniform(0.0, 0.6)
    return "answers", rng.randrange(1, 500)


def _until_killed(ground: Ground, moment: tuple[str, float]) -> None:
    """Start the daemon if it does not run, and have it killed at that moment."""
    kind, amount = moment
    tally, gateway = ground.tally, ground.gateway
    if kind == "seconds" and not gateway.alive:
        if ground.restart(kill_after=amount):
            ground.until(lambda: not gateway.alive)
        ground.killed()
        return
    _back(ground)
    if tally.lost:
        return
    target = tally.writes + int(amount)
    ground.until(lambda: tally.writes >= target)
    ground.kill()
