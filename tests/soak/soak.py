# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The soak: many disks in mixed modes on a store that fails and one that does not, and everything that can happen.

Every guest checks all that it reads. On the failing store guests repeat what is refused, as QEMU with werror=stop has
it done; on the other one nothing may ever be refused, whatever the first one does, but for want of room in the cache.
"""

import contextlib
import random
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from traceback import extract_tb
from types import MappingProxyType
from typing import Any

from real.disk_fixture import MODES
from real.kill_checker import BLOCK, Guest, Tally
from real.kill_daemon import Refused
from real.kill_hunt import Ground
from real.processes import MIB, random_image
from soak.commands import Commands
from soak.overlays import Overlays
from soak.store import FaultyStore, why_not

LIFE_SECONDS = 240.0
"""How long one gateway lives, with the settings that its seed gives it."""

FAULTS: tuple[dict[str, Any], ...] = (
    {"operations": ["write"], "errno": 28},
    {"operations": ["write", "fsync"], "errno": 5, "share": 0.3},
    {"operations": ["fsync"], "errno": 5},
    {"operations": ["fsync"], "errno": 28, "share": 0.5},
    {"operations": ["read"], "errno": 5, "share": 0.3},
    {"operations": ["read", "write", "fsync", "names"], "errno": 5, "share": 0.2},
    {"operations": ["read", "write", "fsync"], "delay": 0.05},
    {"operations": ["write"], "delay": 0.3},
    {"operations": ["read", "write", "fsync", "names"], "hang": True},
    {"operations": ["write"], "hang": True},
    {"operations": ["fsync"], "hang": True},
)

ACTIONS = (
    "kill",
    "fault",
    "mode",
    "flush",
    "preload",
    "scrub",
    "detach",
    "compare",
    "restart",
    "cache",
    "discard",
    "restore",
    "device",
    "image",
    "overlay",
)
WEIGHTS = (38, 10, 14, 9, 5, 4, 8, 5, 6, 1, 6, 4, 8, 8, 40)

DEVICE_FAULTS: tuple[dict[str, Any], ...] = (
    {"operations": ["write"], "delay": 0.01},
    {"operations": ["write", "fsync"], "delay": 0.1},
    {"operations": ["fsync"], "delay": 0.5},
    {"operations": ["write", "fsync"], "hang": True},
)
DEVICE_SHARE = 0.3
"""Of the lives: their cache device is on a file system that is slow, or hangs for longer than DEVICE_TIMEOUT."""

DEVICE_TIMEOUT = "2s"

KILLED_SHARE = 0.4
"""Of the commands on overlays that stay: the daemon is killed while one is under way, or just after it ..."""

KILLED_SECONDS = 0.03
"""... so long after it was sent, on average."""

RESTORED = ("write-back", "write-through")
"""Disks over whose images somebody puts a backup while the daemon is stopped: their store never fails, so that the
daemon knows what they looked like when it ended."""

STORE_TIMEOUT = "2s"
"""Shorter than most hangs: what is refused then is repeated."""

COMPARE_SECONDS = 90.0


@dataclass
class Soak:
    """One gateway's life."""

    seed: int
    tally: Tally
    parent: Path
    told: Callable[[Tally, str], None]
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.directory = self.parent / f"fb-soak-{self.seed:08x}"
        self.directory.mkdir(parents=True)
        self.store = None if why_not() else FaultyStore(self.directory)
        settings: dict[str, dict[str, Any]] = {
            "cache": {"size": f"{self.rng.choice((28, 36, 48))} MiB"},
            "defaults": {
                "max_lag": self.rng.choice(("100ms", "1s", "5s")),
                "max_dirty": self.rng.choice(("512 KiB", "4 MiB")),
            },
        }
        self.device = None
        if self.store is not None and self.rng.random() < DEVICE_SHARE:
            (self.directory / "device").mkdir()
            self.device = FaultyStore(self.directory / "device")
            settings["cache"] |= {
                "device": str(self.device.path / "cache.img"),
                "timeout": DEVICE_TIMEOUT,
            }
        if self.store is not None:
            settings["stores.faulty"] = {
                "path": str(self.store.path),
                "origin_timeout": STORE_TIMEOUT,
            }
        self.ground = Ground(
            self.seed,
            self.tally,
            self.directory,
            modes=("write-back", "write-through"),
            overlays=(),
            size=MIB,
            settings=settings,
            depth=4,
        )
        self.commands = Commands(self.ground.gateway, self.tally)
        self.overlays = Overlays(
            self.ground,
            self.commands,
            self.tally,
            random.Random(self.rng.getrandbits(32)),
            self._at_rest,
            is_fragile=self.device is not None,
        )
        self.overlays.counts = self.counts
        self.modes: dict[str, str] = {}
        self.next_action = self.next_return = self.fault_until = self.device_until = 0.0
        self.discarding: dict[str, int] = {}
        """Disks of which the operator gives up what is dirty: so many bytes at most."""

    # -- life

    def begin(self) -> None:
        self.ground.begin()
        self.modes = {name: name for name in ("write-back", "write-through")}
        store = "images" if self.store is None else "faulty"
        below = self.ground.gateway.images if self.store is None else self.store.source
        for mode in MODES:
            self._add(f"f-{mode}", store, below / f"f-{mode}.raw", mode=mode)
        base = below / "f-base.raw"
        self.ground.base = random_image(base, MIB, self.seed, self.ground.holes)
        for number in (1, 2):
            self._add(f"f-overlay-{number}", store, base, overlay=True)
        self.overlays.begin()
        for guest in self.ground.guests.all:
            guest.may_be_full = True
            if self.device is not None:  # while it hangs nobody knows whether a hole can be punched
                guest.trims = False
        assert self.ground.guests.connect()

    def _add(self, name: str, store: str, path: Path, **options: Any) -> None:
        overlay = bool(options.get("overlay"))
        content = self.ground.base
        if not overlay:
            content = random_image(path, MIB, self.rng.getrandbits(32), self.ground.holes)
            self.ground.images[name] = path
            self.modes[name] = options["mode"]
        self.ground.gateway.attach_disk(name, f"{store}:{path.name}", **options)
        guest = Guest(
            name,
            self.ground.gateway.uri(name),
            content,
            self.tally,
            random.Random(self.rng.getrandbits(32)),
            depth=3,
            lenient=self.store is not None,
            tears=self.store is not None,
            trims=self.store is None,
        )
        self.ground.guests.all.append(guest)

    def run(self, until: float) -> None:
        """Until that moment of the monotonic clock, or the first loss."""
        self.begin()
        while time.monotonic() < until and not self.tally.lost:
            self._turn()
        if not self.tally.lost:
            self._compare()
        if not self.tally.lost:
            self._last()

    def _turn(self) -> None:
        now = time.monotonic()
        self._mend()
        self.commands.look()
        self._return()
        self.overlays.look()
        if now > self.next_action:
            self.next_action = now + self.rng.expovariate(2.0)
            action = self.rng.choices(ACTIONS, WEIGHTS)[0]
            if self._act(action):
                self.counts[action] = self.counts.get(action, 0) + 1
        if not self.ground.guests.turn(0.02, self.ground.gateway.ended_fd):
            self._fell()
        self.told(self.tally, self._line())

    def _mend(self) -> None:
        """A fault has its time."""
        if self.store is not None and self.store.active and time.monotonic() > self.fault_until:
            self.store.fail()
        if self.device is not None and self.device.active and time.monotonic() > self.device_until:
            self.device.fail()

    def _line(self) -> str:
        faults = {"fault": self.store, "device": self.device}
        what = [
            f"{name} {' '.join(place.active['operations'])}"
            for name, place in faults.items()
            if place is not None and place.active
        ]
        what.append(self.commands.busy)
        return "".join(f", {text}" for text in what if text)

    def _fell(self) -> None:
        """A connection broke, and nobody had killed the daemon: it was told to end just now, or has a fault."""
        gateway = self.ground.gateway
        if gateway.alive and any(guest.connected for guest in self.ground.guests.all):
            return  # of a disk that is being detached by force
        code = gateway.wait_ended()
        raise RuntimeError(f"the daemon ended by itself: {code}\n{gateway.log_text()[-8000:]}")

    def _act(self, action: str) -> bool:
        """Whether it could be done now."""
        do: Callable[[], bool] = getattr(self, f"_do_{action}")
        return do()

    # -- what ends the daemon

    def _do_kill(self) -> bool:
        self.ground.gateway.send(9)  # type: ignore[arg-type]
        self._down()
        assert self.ground.gateway.code == -9, self.ground.gateway.log_text()[-8000:]
        self.tally.kills += 1
        while self.rng.random() < 0.2:  # again, in the middle of the start
            self.ground.gateway.launch(kill_after=self.rng.uniform(0.0, 0.3))
            if self.ground.gateway.ready():
                self.ground.guests.connect()
            while self.ground.gateway.alive:
                self._mend()
                self.ground.guests.turn(0.02, self.ground.gateway.ended_fd)
            self._down()
            self.tally.kills += 1
        self._up()
        return True

    def _do_restart(self, *, restore: bool = False) -> bool:
        self.commands.wait()
        for guest in self.ground.guests.all:
            guest.quiet = True
        self.ground.gateway.send(15)  # type: ignore[arg-type]
        deadline = time.monotonic() + 120
        while self.ground.gateway.alive:
            self._mend()
            self.ground.guests.turn(0.02, self.ground.gateway.ended_fd)
            assert time.monotonic() < deadline, "SIGTERM does not end it"
        self.ground.guests.go_on()
        self._down()
        assert self.ground.gateway.code == 0, self.ground.gateway.log_text()[-8000:]
        self.tally.restarts += 1
        self._up(self._restored_while_stopped() if restore else {})
        return True

    def _do_restore(self) -> bool:
        """Stop it, and put backups over images before it starts again.

        Not with a cache device that may hang as it stops: what the images looked like is not on record then.
        """
        if self.device is not None:
            return False
        return self._do_restart(restore=True)

    def _restored_while_stopped(self) -> dict[Guest, bytes]:
        """What somebody put over the images of some disks, whose guests have come to rest."""
        there = [g for g in self.ground.guests.all if g.name in RESTORED and g.idle and not g.away]
        # What is written within a minute of the end of a pass that was interrupted cannot be told from our own
        # (gateway/FAILURES.md); test_power_cuts.py has later backups.
        there = [g for g in there if not self._has_journal(self.ground.images[g.name])]
        some = self.rng.sample(there, self.rng.randint(0, len(there)))
        return {guest: self._put_backup(guest.name) for guest in some}

    @staticmethod
    def _has_journal(image: Path) -> bool:
        beside = image.with_name(image.name + ".forebay")
        return (beside / "redo").exists() or any(beside.glob("*/redo"))

    def _put_backup(self, name: str) -> bytes:
        """Write something else over an image, in place. What it is."""
        path = self.ground.images[name]
        backup = self.rng.randbytes(path.stat().st_size)
        with path.open("r+b") as file:
            file.write(backup)
        return backup

    def _resolve(self, guest: Guest, backup: bytes) -> None:
        """Out of the conflict, if there is one: the image is the backup, with what only the cache had, or without."""
        gateway, path = self.ground.gateway, f"/disks/{guest.name}"
        [found] = [disk for disk in gateway.ask("GET", "/disks") if disk["name"] == guest.name]
        dirty, keep = found["dirty_bytes"], self.rng.choice(("mine", "image"))
        if (found["state"] == "conflict") != bool(dirty):
            guest.lose(f"{found['state']} with {dirty} dirty bytes, over a backup")
        if dirty:
            body = {"keep": keep, "yes": True}
            gateway.ask("POST", f"{path}/resolve", body, timeout=COMPARE_SECONDS)
            self.counts[f"keep {keep}"] = self.counts.get(f"keep {keep}", 0) + 1
        image = self.ground.images[guest.name].read_bytes()
        mine = _blocks_that_differ(image, backup)
        if any(_block(image, n) != _block(guest.model, n) for n in mine):
            guest.lose("after a resolve the image has what neither the disk had nor the backup")
        # Of a pass that was interrupted there are two layers, and both may have a block.
        if dirty and keep == "mine" and 2 * len(mine) * BLOCK < dirty - BLOCK:
            guest.lose(f"{dirty} bytes were to be kept, and {len(mine)} blocks were")
        if mine and not (dirty and keep == "mine"):
            guest.lose("a backup was written over")
        guest.model[:] = image

    def _down(self) -> None:
        """It ends; what a store holds up holds up its end, too."""
        for place in (self.store, self.device):
            if place is not None and place.active.get("hang"):
                place.fail()
        self.ground.gateway.wait_ended()
        self.ground.guests.last_words()
        self.commands.wait()

    def _up(self, restored: Mapping[Guest, bytes] = MappingProxyType({})) -> None:
        gateway = self.ground.gateway
        gateway.launch()
        assert gateway.ready(), gateway.log_text()[-8000:]
        for guest, backup in restored.items():
            self._resolve(guest, backup)
        there = {disk["name"] for disk in gateway.ask("GET", "/disks")}
        for guest in self.ground.guests.all:
            if guest.away:
                self._bring_back(guest, guest.name in there)
            elif guest.name not in there:
                guest.lose("the disk is not there after a start")
        assert self.ground.guests.connect(), gateway.log_text()[-8000:]

    # -- what fails

    def _do_fault(self) -> bool:
        if self.store is None or self.store.active:
            return False
        fault = self.rng.choice(FAULTS)
        self.store.fail(**fault)
        self.fault_until = time.monotonic() + self.rng.uniform(0.3, 5.0)
        return True

    def _do_device(self) -> bool:
        if self.device is None or self.device.active:
            return False
        self.device.fail(**self.rng.choice(DEVICE_FAULTS))
        self.device_until = time.monotonic() + self.rng.uniform(0.3, 6.0)
        return True

    # -- commands

    def _command(self, what: str, path: str, body: dict[str, Any] | None = None) -> bool:
        if self.commands.busy:
            return False
        self.commands.begin(what, "POST", path, body)
        return True

    def _some(self, *, but_kept: bool = False) -> Guest:
        there = [guest for guest in self.ground.guests.all if not guest.away]
        return self.rng.choice([g for g in there if not (but_kept and self.overlays.has(g))])

    def _do_mode(self) -> bool:
        guest, mode = self._some(), self.rng.choice(MODES)
        return self._command(f"{guest.name} to {mode}", f"/disks/{guest.name}/mode", {"mode": mode})

    def _do_flush(self) -> bool:
        return self._command("flush", "/flush", {"timeout": self.rng.uniform(0.1, 10.0)})

    def _do_preload(self) -> bool:
        name = self._some().name
        return self._command(f"preload of {name}", f"/disks/{name}/preload", {"amount": "all"})

    def _do_image(self) -> bool:
        """Something is done with an image, whether or not a disk is on it."""
        names = ["base", "k-base", "k-own", *self.ground.images]
        image = f"images:{self.rng.choice(names)}.raw"
        what, body = self.rng.choice(
            (
                ("warm", {"image": image}),
                ("warm", {"image": image, "rate": "4M"}),
                ("pin", {"image": image}),
                ("unpin", {"image": image}),
                ("purge", {"images": [image]}),
                ("purge", {"older_than": 0}),
            )
        )
        return self._command(f"{what} of {image}", f"/images/{what}", body)

    def _do_scrub(self) -> bool:
        return self._command("scrub", "/cache/scrub")

    def _do_cache(self) -> bool:
        if self.commands.busy:
            return False
        size = self.ground.gateway.ask("GET", "/cache")["size"] + MIB
        return self._command("extend", "/cache/extend", {"size": size})

    def _do_discard(self) -> bool:
        return self._do_detach(discard=True)

    def _do_detach(self, *, discard: bool = False) -> bool:
        """Take a disk away whose guest has come to rest, and bring it back."""
        if self.commands.busy or (self.store and self.store.active):
            return False
        guest = self._some(but_kept=True)
        if not self._at_rest(guest):
            return False
        guest.quiet = False
        guest.hang_up()
        guest.away = True

        def then(fault: Refused | None) -> None:
            if fault is None or fault.code:
                self._bring_back(guest, there=fault is not None)

        path = f"/disks/{guest.name}?force=1"
        if discard:
            path += "&discard=1"
            if guest.name in self.ground.images:
                self.discarding[guest.name] = self._dirty_bytes(guest)
                self._begin_pass(guest)
        self.commands.begin(f"detach of {guest.name}", "DELETE", path, then=then)
        return True

    def _at_rest(self, guest: Guest) -> bool:
        """Have a guest come to rest, and be quiet; False: it does not, and goes on."""
        deadline = time.monotonic() + 20
        guest.quiet = True
        while not guest.idle and time.monotonic() < deadline:
            if not self.ground.guests.turn(0.02, self.ground.gateway.ended_fd):
                self._fell()
        guest.quiet = guest.idle
        return guest.quiet

    def _do_overlay(self) -> bool:
        if not self.overlays.step():
            return False
        if self.rng.random() < KILLED_SHARE:
            moment = time.monotonic() + self.rng.expovariate(1 / KILLED_SECONDS)
            while time.monotonic() < moment and self.ground.guests.turn(0.001):
                pass
            self.counts["kill"] = self.counts.get("kill", 0) + self._do_kill()
        return True

    def _dirty_bytes(self, guest: Guest) -> int:
        """What the image of a guest at rest lacks, at most."""
        disks = self.ground.gateway.ask("GET", "/disks")
        return next(int(disk["dirty_bytes"]) for disk in disks if disk["name"] == guest.name)

    def _begin_pass(self, guest: Guest) -> None:
        """Now and then, so that what is dirty is given up in the middle of it."""

        def flush() -> None:
            with contextlib.suppress(Refused):
                self.ground.gateway.ask("POST", f"/disks/{guest.name}/flush", {})

        if self.rng.random() < 0.5:
            threading.Thread(target=flush, daemon=True).start()
            time.sleep(self.rng.uniform(0.0, 0.02))

    def _image_has_most(self, guest: Guest, dirty: int) -> None:
        """After a discard: the image lacks no more than was dirty."""
        self.tally.origins += 1
        image = self.ground.images[guest.name].read_bytes()
        lacks = len(_blocks_that_differ(image, guest.model))
        if lacks * BLOCK > dirty + BLOCK:
            guest.lose(f"{lacks} blocks are gone with {dirty} bytes that were discarded")
        guest.model[:] = image

    def _image_has_all(self, guest: Guest) -> None:
        path = self.ground.images.get(guest.name)
        if path is None:
            guest.model[:] = self.ground.base
            return
        self.tally.origins += 1
        if path.read_bytes() != bytes(guest.model):
            guest.lose("the image lacks something after detach")

    def _bring_back(self, guest: Guest, there: bool) -> None:
        """Attach it again if it is gone, and let its guest go on. What cannot be done now is tried again."""
        overlay = guest.name not in self.ground.images
        if not self.ground.gateway.alive:
            return
        if self.overlays.has(guest):
            self.overlays.bring_back(guest, there=there)
            return
        if not there:
            options: dict[str, Any] = {"overlay": True} if overlay else {}
            if not overlay:
                options["mode"] = self.modes[guest.name]
            if guest.name not in self.discarding:
                self._image_has_all(guest)
                if not overlay and self.rng.random() < 0.3:
                    guest.model[:] = self._put_backup(guest.name)
            try:
                self.ground.gateway.attach_disk(guest.name, self._image(guest.name), **options)
            except Refused:  # a store that has begun to fail, or a kill
                self.tally.controls_failed += 1
                return
            if guest.name in self.discarding:
                self._image_has_most(guest, self.discarding[guest.name])
        elif overlay and not self._overlay_may_be_gone(guest):
            return
        self.discarding.pop(guest.name, None)
        guest.away = False
        guest.connect()

    def _return(self) -> None:
        """Bring back those for whom that could not be done."""
        away = [guest for guest in self.ground.guests.all if guest.away]
        failing = self.store is not None and self.store.active
        if not away or failing or self.commands.busy or time.monotonic() < self.next_return:
            return
        self.next_return = time.monotonic() + 1.0
        there = {disk["name"] for disk in self.ground.gateway.ask("GET", "/disks")}
        for guest in away:
            self._bring_back(guest, guest.name in there)

    def _image(self, name: str) -> str:
        store = "faulty" if self.store is not None and name.startswith("f-") else "images"
        file = "f-base" if name not in self.ground.images else name
        return f"{store}:{file}.raw"

    def _overlay_may_be_gone(self, guest: Guest) -> bool:
        """It was being detached: what it has of its own is all there or all gone. False: that cannot be read now."""
        import nbd

        handle = nbd.NBD()
        handle.connect_uri(guest.uri)
        try:
            found = bytes(handle.pread(guest.size, 0))
        except nbd.Error:
            return False
        if found == self.ground.base:
            guest.model[:] = self.ground.base
        return True

    # -- comparing

    def _do_compare(self) -> bool:
        if self.store is not None and self.store.active:
            return False
        self._compare()
        return True

    def _compare(self) -> None:
        """With the store well and the guests at rest: every disk twice, every image with its disk."""
        for place in (self.store, self.device):
            if place is not None:
                place.fail()
        self.commands.wait()
        deadline = time.monotonic() + COMPARE_SECONDS
        while away := [guest.name for guest in self.ground.guests.all if guest.away]:
            assert time.monotonic() < deadline, f"{', '.join(away)} does not come back"
            self._return()
            time.sleep(0.05)
        assert self.ground.guests.quiesce(COMPARE_SECONDS), "the daemon is gone"
        self._flushed()
        for guest in self.ground.guests.all:
            path, content = self._image_of(guest)
            self.tally.origins += 1
            if path.read_bytes() != content:
                guest.lose("the image differs after a flush")
            guest.compare_all()
        assert self.ground.guests.quiesce(COMPARE_SECONDS), "the daemon is gone"
        self.ground.guests.go_on()

    def _image_of(self, guest: Guest) -> tuple[Path, bytes]:
        """The image of a guest, and what it has to be after a flush. Those without an image stand for their base."""
        if self.overlays.has(guest):
            return self.overlays.base_of(guest)
        path = self.ground.images.get(guest.name)
        if path is not None:
            return path, bytes(guest.model)
        return self.ground.images["f-none"].with_name("f-base.raw"), self.ground.base

    def _flushed(self) -> None:
        deadline = time.monotonic() + COMPARE_SECONDS
        while True:
            try:
                self.ground.gateway.ask("POST", "/flush", {"timeout": 20.0}, timeout=60.0)
            except Refused as fault:  # a store that was just mended is tried again after a while
                if time.monotonic() > deadline:
                    raise RuntimeError(f"nothing fails any more, but: {fault}") from fault
                time.sleep(0.5)
            else:
                return

    def _last(self) -> None:
        """Scrub all of it, stop, and look at the log."""
        found = self.ground.gateway.ask("POST", "/cache/scrub", timeout=COMPARE_SECONDS)
        self.overlays.last()
        damaged = {key: n for key, n in found.items() if n and ("damage" in key or "lost" in key)}
        if damaged:
            self.tally.lost.append(f"scrub found {damaged}")
        self.ground.guests.hang_up()
        code = self.ground.gateway.stop()
        text = self.ground.gateway.log_text()
        if code or "Traceback" in text:
            self.tally.lost.append(f"the daemon's log has a traceback, or it ended with {code}")

    def remove(self, *, keep: bool) -> None:
        """End everything; `keep` the directory."""
        places = [place for place in (self.store, self.device) if place is not None]
        for place in places:
            place.fail()
        self.ground.gateway.end()
        for place in places:
            place.remove()
        if not keep:
            shutil.rmtree(self.directory, ignore_errors=True)


def _block(content: bytes | bytearray, number: int) -> bytes:
    return bytes(content[number * BLOCK : (number + 1) * BLOCK])


def _blocks_that_differ(one: bytes, other: bytes | bytearray) -> list[int]:
    return [n for n in range(-(-len(one) // BLOCK)) if _block(one, n) != _block(other, n)]


def soak(
    seconds: float, seed: int, parent: Path, told: Callable[[Tally, str], None]
) -> tuple[Tally, dict[str, int]]:
    """So long, or to the first loss. What was counted, and how often what was done."""
    rng = random.Random(seed)
    tally = Tally()
    counts: dict[str, int] = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end and not tally.lost:
        one = Soak(rng.getrandbits(32), tally, parent, told, counts)
        broken = True
        try:
            one.run(min(end, time.monotonic() + LIFE_SECONDS))
            broken = bool(tally.lost)
        except KeyboardInterrupt:
            broken = False
            raise
        except Exception as fault:  # noqa: BLE001  (a loss like any other)
            where = " ".join(f"{at.name}:{at.lineno}" for at in extract_tb(fault.__traceback__))
            tally.lost.append(f"the soak broke: {fault!r:.4000}, in {where}")
        finally:
            one.remove(keep=broken)
        if broken:
            tally.lost.append(f"life {one.seed:08x} of seed {seed}, kept in {one.directory}")
    return tally, counts
