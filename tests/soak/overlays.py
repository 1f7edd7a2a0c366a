# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Overlays that stay, in a soak: snapshots, rollback, drop, save, commit, revert, detach, and disks without an image.

Each command is cut short by a kill now and then. What a disk may be after it is a list of outcomes: one where the
command has answered, and two where nobody knows, of which the disk has to be one as a whole, with the snapshots of it.
They lie on the store that never fails, so that a command which is refused has changed nothing.
"""

import contextlib
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from real.kill_checker import Guest, Tally
from real.kill_daemon import Refused
from real.kill_hunt import Ground
from real.processes import MIB, random_image
from soak.commands import Commands

OWN = "k-own"
"""The disk that has an image for itself: it can be committed."""

DISKS = {"k-1": "k-base", "k-2": "k-base", OWN: "k-own", "k-scratch": ""}
"""The image of each; without one it lies in the cache only."""

MOST_SNAPSHOTS = 3
"""Of all disks together: each may take as much of the cache as a disk."""

Taken = dict[str, bytes]
"""What the disk showed at each snapshot, the oldest first."""

STEPS = ("snapshot", "rollback", "drop", "save", "commit", "revert", "detach", "discard")
WEIGHTS = (10, 6, 6, 8, 8, 3, 6, 3)


@dataclass(frozen=True)
class Outcome:
    """What a disk may be."""

    content: bytes
    taken: Taken
    base: bytes | None = None
    """What its image has; None: what it had."""


@dataclass
class Kept:
    """One disk."""

    guest: Guest
    image: Path | None
    base: bytes
    taken: Taken = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    """While it is away."""
    unsure: list[Taken] = field(default_factory=list)
    """The snapshots that it may have, where a command was cut short."""

    @property
    def name(self) -> str:
        return self.guest.name


class Overlays:
    """The steps of a soak. `at_rest` has a guest come to rest, and says whether it did."""

    def __init__(
        self,
        ground: Ground,
        commands: Commands,
        tally: Tally,
        rng: random.Random,
        at_rest: Callable[[Guest], bool],
        *,
        is_fragile: bool,
    ) -> None:
        """`is_fragile`: the cache device may hang, so that a command that fails may have been done."""
        self._ground = ground
        self._commands = commands
        self._tally = tally
        self._rng = rng
        self._at_rest = at_rest
        self._is_fragile = is_fragile
        self._all: dict[str, Kept] = {}
        self._serial = 0
        self.counts: dict[str, int] = {}

    def begin(self) -> None:
        """Make the images, and attach the disks."""
        images, made = self._ground.gateway.images, dict[str, bytes]()
        for name, image in DISKS.items():
            path = images / f"{image}.raw" if image else None
            if path is not None and image not in made:
                made[image] = random_image(path, MIB, self._rng.getrandbits(32), self._ground.holes)
            content = made.get(image, bytes(MIB))
            guest = Guest(
                name, self._ground.gateway.uri(name), content, self._tally,
                random.Random(self._rng.getrandbits(32)), depth=3, lenient=self._is_fragile,
            )  # fmt: skip
            self._all[name] = kept = Kept(guest, path, content)
            self._ground.guests.all.append(guest)
            self._attach(kept)

    def _attach(self, kept: Kept) -> None:
        image = f"images:{kept.image.name}" if kept.image else f"scratch:{MIB}"
        self._ground.gateway.attach_disk(kept.name, image, overlay=True, keep=True)

    def has(self, guest: Guest) -> bool:
        """Whether it is one of these."""
        return guest.name in self._all

    def base_of(self, guest: Guest) -> tuple[Path, bytes]:
        """The image of one of these, and what it has. For one without, that of another one stands."""
        kept = self._all[guest.name]
        kept = kept if kept.image is not None else self._all[OWN]
        assert kept.image is not None
        return kept.image, kept.base

    # -- steps

    def step(self) -> bool:
        """Do something with one of them. Whether it could be done now."""
        there = [one for one in self._all.values() if not one.guest.away and not one.unsure]
        if self._commands.busy or not there:
            return False
        kept, what = self._rng.choice(there), self._rng.choices(STEPS, WEIGHTS)[0]
        do: Callable[[Kept], bool] = getattr(self, f"_{what}")
        if not do(kept):
            return False
        self.counts[f"overlay {what}"] = self.counts.get(f"overlay {what}", 0) + 1
        return True

    def _snapshot(self, kept: Kept) -> bool:
        if sum(len(one.taken) for one in self._all.values()) >= MOST_SNAPSHOTS:
            return False
        if not self._at_rest(kept.guest):
            return False
        self._serial += 1
        name, before = f"s{self._serial}", kept.taken
        after = before | {name: bytes(kept.guest.model)}
        self._change(kept, "snapshots", name, before, after)
        return True

    def _drop(self, kept: Kept) -> bool:
        """While its guest goes on."""
        if not kept.taken:
            return False
        name, before = self._rng.choice(list(kept.taken)), kept.taken
        after = {one: content for one, content in before.items() if one != name}
        self._change(kept, "drop", name, before, after)
        return True

    def _change(self, kept: Kept, what: str, name: str, before: Taken, after: Taken) -> None:
        """A command on the snapshots, which changes nothing of the disk. Its guest, if at rest, goes on after it."""

        def then(fault: Refused | None) -> None:
            kept.guest.quiet = False
            kept.taken = after if fault is None else before
            if fault is not None and (not fault.code or self._is_fragile):
                kept.unsure = [before, after]

        path = f"/overlays/{kept.name}/{what}"
        self._commands.begin(
            f"{what} {name} of {kept.name}", "POST", path, {"snapshot": name}, then
        )

    def _save(self, kept: Kept) -> bool:
        """As it was at a snapshot, while its guest goes on; or as it is."""
        snapshot = self._rng.choice([None, *kept.taken])
        if snapshot is None and not self._at_rest(kept.guest):
            return False
        content = bytes(kept.guest.model) if snapshot is None else kept.taken[snapshot]
        self._serial += 1
        form = self._rng.choice(("raw", "qcow2"))
        path = self._ground.gateway.images / f"saved-{self._serial}.{form}"

        def then(fault: Refused | None) -> None:
            kept.guest.quiet = False
            if fault is None and not path.exists():
                kept.guest.lose(f"{path.name} was saved, and is not there")
            elif fault is not None and fault.code and path.exists():
                kept.guest.lose(f"{path.name} is there, and was refused: {fault}")
            if path.exists():
                self._look_at(kept, path, form, content)

        body: dict[str, Any] = {"to": f"images:{path.name}", "format": form}
        if snapshot is not None:
            body["snapshot"] = snapshot
        what = f"save of {kept.name}"
        self._commands.begin(what, "POST", f"/disks/{kept.name}/save", body, then)
        return True

    def _look_at(self, kept: Kept, path: Path, form: str, content: bytes) -> None:
        """An image that has its name is whole, and is what the disk showed."""
        self._tally.origins += 1
        raw = path
        if form == "qcow2":
            raw = path.with_suffix(".seen")
            command = ["qemu-img", "convert", "-f", form, "-O", "raw", str(path), str(raw)]
            done = subprocess.run(command, check=False, capture_output=True)
            if done.returncode:
                kept.guest.lose(f"{path.name} is no qcow2 image: {done.stderr.decode()}")
                return
        if raw.read_bytes() != content:
            kept.guest.lose(f"{path.name} is not what the disk showed")
            return
        raw.unlink()
        path.unlink(missing_ok=True)

    def _rollback(self, kept: Kept) -> bool:
        if not kept.taken:
            return False
        name = self._rng.choice(list(kept.taken))
        names = list(kept.taken)
        left = {one: kept.taken[one] for one in names[: names.index(name) + 1]}
        body = {"snapshot": name, "drop_newer": True}
        done = Outcome(kept.taken[name], left)
        return self._away(kept, "POST", f"/overlays/{kept.name}/rollback", body, done)

    def _revert(self, kept: Kept) -> bool:
        path = f"/overlays/{kept.name}/revert"
        return self._away(kept, "POST", path, {"yes": True}, Outcome(kept.base, {}))

    def _commit(self, kept: Kept) -> bool:
        if kept.name != OWN or kept.taken:
            return False

        def done() -> Outcome:
            content = bytes(kept.guest.model)
            return Outcome(content, {}, content)

        return self._away(kept, "POST", f"/overlays/{kept.name}/commit", None, done)

    def _detach(self, kept: Kept) -> bool:
        path = f"/disks/{kept.name}?force=1"
        return self._away(kept, "DELETE", path, None, lambda: self._as_it_is(kept))

    def _discard(self, kept: Kept) -> bool:
        path = f"/disks/{kept.name}?force=1&discard=1"
        return self._away(kept, "DELETE", path, None, Outcome(kept.base, {}))

    def _as_it_is(self, kept: Kept) -> Outcome:
        return Outcome(bytes(kept.guest.model), kept.taken)

    def _away(
        self,
        kept: Kept,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        done: Outcome | Callable[[], Outcome],
    ) -> bool:
        """A command on a disk whose guest is gone; `done` is what the disk is when it has succeeded."""
        if not self._at_rest(kept.guest):
            return False
        kept.guest.quiet = False
        kept.guest.hang_up()
        kept.guest.away = True
        before, after = self._as_it_is(kept), done() if callable(done) else done
        kept.outcomes = [after, before]

        def then(fault: Refused | None) -> None:
            if fault is None:
                kept.outcomes = [after]
            elif fault.code and not self._is_fragile:
                kept.outcomes = [before]

        self._commands.begin(f"{method} {path}", method, path, body, then)
        return True

    # -- after them

    def look(self) -> None:
        """Find out which snapshots there are, where a command was cut short. The daemon lives."""
        for kept in self._all.values():
            if kept.unsure and not kept.guest.away:
                with contextlib.suppress(Refused):
                    self._find_taken(kept)

    def _find_taken(self, kept: Kept) -> None:
        names = self._names(kept)
        found = [taken for taken in kept.unsure if list(taken) == names]
        if not found:
            kept.guest.lose(f"the snapshots are {names}, not one of {[*map(list, kept.unsure)]}")
        else:
            kept.taken, kept.unsure = found[0], []

    def _names(self, kept: Kept) -> list[str]:
        found = self._ground.gateway.ask("GET", f"/overlays/{kept.name}/snapshots")
        return [one["name"] for one in found]

    def bring_back(self, guest: Guest, *, there: bool) -> None:
        """Attach it if it is gone, see that it is one of what it may be, and let its guest go on; or later."""
        kept = self._all[guest.name]
        try:
            if not there:
                self._attach(kept)
            names, content = self._names(kept), self._content(kept)
        except Refused:
            return
        if content is None:
            return
        image = kept.image.read_bytes() if kept.image is not None else b""
        fits = [
            x
            for x in kept.outcomes
            if x.content == content and list(x.taken) == names and x.base in (None, image)
        ]
        if not fits:
            told = [(list(x.taken), x.content == content) for x in kept.outcomes]
            guest.lose(f"after a command it has the snapshots {names}, and of its outcomes {told}")
            return
        self._settle(kept, fits[0])
        self._tally.origins += kept.image is not None
        if kept.image is not None and image != kept.base:
            guest.lose(f"{kept.image.name} is not what it has to be")
            return
        guest.away = False
        guest.connect()

    def _settle(self, kept: Kept, outcome: Outcome) -> None:
        kept.guest.model[:] = outcome.content
        kept.taken, kept.outcomes = outcome.taken, []
        if outcome.base is not None:
            kept.base = outcome.base

    def _content(self, kept: Kept) -> bytes | None:
        """All of the disk; None: it cannot be read now."""
        import nbd

        handle = nbd.NBD()
        try:
            handle.connect_uri(kept.guest.uri)
            return bytes(handle.pread(kept.guest.size, 0))
        except nbd.Error:
            return None

    def last(self) -> None:
        """At the end: nothing of a save that was cut short is left in the store."""
        left = [path.name for path in self._ground.gateway.images.glob(".*.forebay")]
        if left:
            self._tally.lost.append(f"a save has left {left}")
