# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What others do with an image on NFS, and Forebay, side by side: how fast, and what is left after faults.

Both cases write what they found to `results/comparison.json` and `.md` in the lab's directory. They hold where Forebay
keeps what it promises; what the others do is told, not judged.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab.case import Case
from lab.cases.contenders import CONTENDERS, Contender, Forebay
from lab.comparison_table import keep
from lab.hosts import Host, Writer, until
from lab.outcome import Failure, demand
from lab.place import Lab

SPEED_MEBIBYTES, FAULT_MEBIBYTES = 64, 8
SEED = 40
FLUSH_EVERY = 4
"""Steps of a writer."""

WARMING = 12
"""Rounds of the same reads before they count as warm: dm-cache takes what was read several times."""

HANG_SECONDS = 30.0
GOES_ON = 120.0
"""Seconds in which a client goes on when the server is back."""

DEVICE = "/dev/nbd0"
DROP = "sync; sleep 2; echo 3 >/proc/sys/vm/drop_caches"
"""What the host's page cache has would hide which cache there is on disk."""


# --------------------------------------------------------------------------------------------------------------- speed


def speed(lab: Lab) -> str:
    """Requests in a second, one after the other, as ratios to the plain file's, which is measured three times."""
    lab.server.do(f"head -c {SPEED_MEBIBYTES}M /dev/urandom >/srv/store/random", 600.0)
    plain, *rest = CONTENDERS
    found: dict[str, dict[str, float | str]] = {}
    plains = [figures_of(lab, plain)]
    for number, contender in enumerate(rest, 1):
        try:
            found[contender.key] = dict(figures_of(lab, contender))
        except Failure as failure:
            if isinstance(contender, Forebay):
                raise
            found[contender.key] = {"fails": str(failure)[:300]}
        lab.server.do(f"rm -f {lab.server.path(contender.image)}")
        if number in (len(rest) // 2, len(rest)):
            plains.append(figures_of(lab, plain))
    base = {what: sum(each[what] for each in plains) / len(plains) for what in plains[0]}
    found[plain.key] = dict(base)
    for row in found.values():
        row.update({f"{what}_ratio": float(row[what]) / base[what] for what in base if what in row})
    found[plain.key]["spread"] = max(
        max(each[what] for each in plains) / min(each[what] for each in plains) for what in base
    )
    keep(lab.results, CONTENDERS, found)
    back = found["back"]
    return ", ".join(f"{what} {float(back[what + '_ratio']):.2f}" for what in base)


def figures_of(lab: Lab, contender: Contender) -> dict[str, float]:
    """Of one, which is set up before and taken away afterwards."""
    host, path = lab.host, lab.server.path(contender.image)
    lab.server.do(f"cp /srv/store/random {path} && chown forebay:forebay {path}; chmod 666 {path}")
    host.run("ls /mnt/nfs/images")
    contender.begins(host)
    where = on_device(host, contender)
    buffered = "--buffered" if contender.buffered else ""

    def measured(what: str) -> float:
        host.do(DROP)
        return float(host.do(f"python3 -m lab.guest.speed {where} {what} {buffered}", 600.0))

    try:
        found = {"cold_read": measured("read")}
        warming = f"python3 -m lab.guest.speed {where} read {buffered} --rounds {WARMING}"
        host.do(warming, 900.0)
        found["warm_read"] = measured("read")
        found["write"] = measured("write")
        found["sync"] = measured("sync")
    finally:
        if where == DEVICE:
            host.run(f"nbd-client -d {DEVICE}; sleep 1")
    until(f"{contender.key} ends", lambda: tried(contender, host), 120.0)
    return found


def tried(contender: Contender, host: Host) -> bool:
    """Take it away; a client that has just left may be in the way for a moment."""
    try:
        contender.ends(host)
    except Failure:
        return False
    return True


def on_device(host: Host, contender: Contender) -> str:
    """A path that can be opened with O_DIRECT: sockets by the kernel's client."""
    where = contender.serves(host)
    if not where.endswith(".sock"):
        return where
    name = f"-name {contender.key}" if isinstance(contender, Forebay) else ""
    host.do(f"nbd-client -unix {where} {DEVICE} {name} -b 4096")
    return DEVICE


# -------------------------------------------------------------------------------------------------------------- faults


@dataclass
class Running:
    """A contender with a client that writes, and what is found of it."""

    contender: Contender
    writer: Writer
    found: dict[str, Any]

    @property
    def is_ours(self) -> bool:
        return isinstance(self.contender, Forebay)


def faults(lab: Lab) -> str:
    """A second host, a server that hangs, and a power cut, for all of them at the same time."""
    lab.host.configure(lag="5s")
    lab.host.do("systemctl restart forebay")
    running, found = all_of_them(lab)
    lab.other.run("ls /mnt/nfs/images")
    for each in running:
        found[each.contender.key]["refused"] = each.contender.is_refused(lab.other)
    server_hangs(lab, running)
    keep(lab.results, CONTENDERS, found)
    power_cut(lab, running)
    keep(lab.results, CONTENDERS, found)
    for each in running:
        if each.is_ours:
            keeps_promises(each)
    return f"{len(running)} compared"


def all_of_them(lab: Lab) -> tuple[list[Running], dict[str, dict[str, Any]]]:
    """Each on an image of its own, with a client."""
    running, found = [], {}
    for number, contender in enumerate(CONTENDERS):
        lab.server.image(contender.image, FAULT_MEBIBYTES)
        lab.server.do(f"chmod 666 {lab.server.path(contender.image)}")
        lab.host.run("ls /mnt/nfs/images")
        found[contender.key] = dict[str, Any]()
        try:
            contender.begins(lab.host)
            words = f"--pause 0.05 --flush-every {FLUSH_EVERY}"
            words += " --buffered" if contender.buffered else ""
            writer = Writer(lab.host, contender.serves(lab.host), SEED + number, words)
            writer.until_flushed(2 * FLUSH_EVERY)
        except Failure as failure:
            if isinstance(contender, Forebay):
                raise
            found[contender.key]["fails"] = str(failure)[:300]
        else:
            running.append(Running(contender, writer, found[contender.key]))
    return running, found


def flushed(running: Sequence[Running]) -> list[int]:
    return [each.writer.now.flushed for each in running]


def server_hangs(lab: Lab, running: Sequence[Running]) -> None:
    """Steps that were flushed while the server hung, beside those of the same time before."""
    counts = [flushed(running)]
    time.sleep(HANG_SECONDS)
    counts.append(flushed(running))
    lab.server.machine.stand_still()
    time.sleep(2.0)
    counts.append(flushed(running))
    time.sleep(HANG_SECONDS)
    counts.append(flushed(running))
    lab.server.machine.go_on()
    for each, *steps in zip(running, *counts, strict=True):
        start, before, hung, after = steps
        each.found["hang_before"], each.found["hang_flushed"] = before - start, after - hung
        each.found["hang_errors"] = len(each.writer.now.errors)
        try:
            each.writer.until_flushed(2 * FLUSH_EVERY, GOES_ON)
        except Failure:
            demand(
                not each.is_ours, f"{each.contender.title} does not go on when the server is back"
            )
            each.found["hang_stays"] = True
        each.found["hang_errors_after"] = len(each.writer.now.errors)


def power_cut(lab: Lab, running: Sequence[Running]) -> None:
    """The host loses its memory. First the images as they are without its cache, then with it once it is up again."""
    time.sleep(HANG_SECONDS)
    host = lab.host
    host.machine.stand_still()
    done = [each.writer.now for each in running]
    for each in running:
        if each.is_ours:
            command = f"ls /mnt/nfs/images; forebay recover images:{each.contender.image}"
            until("recovered", lambda ask=command: lab.other.run(ask), 400.0, 3.0)  # type: ignore[misc]
        each.found["alone"] = image_alone(lab, each)
    keep(lab.results, CONTENDERS, {each.contender.key: each.found for each in running})
    host.machine.cut_power()
    until(
        "the store is mounted", lambda: host.run("mountpoint -q /mnt/nfs || mount /mnt/nfs"), 300.0
    )
    for each, was in zip(running, done, strict=True):
        host.run("ls /mnt/nfs/images")
        try:
            each.contender.again(host)
            where = each.contender.serves(host)
            seen = host.check(where, each.writer.seed, was.flushed)
        except Failure as failure:
            each.found["cut"] = {"fails": str(failure)[:300]}
            demand(not each.is_ours, f"{each.contender.title} after a power cut: {failure}")
        else:
            each.found["cut"] = {"lost": seen["lost"], "flushed": was.flushed}


def image_alone(lab: Lab, each: Running) -> dict[str, int]:
    """Which of its blocks fit no instant: older than the last flush before the newest step that the image shows."""
    path, seed, skip = (
        lab.server.path(each.contender.image),
        each.writer.seed,
        each.contender.data_at,
    )
    seen = lab.server.check(path, seed, skip=skip)
    instant = int(seen["instant"])
    barrier = max(0, instant - 1) // FLUSH_EVERY * FLUSH_EVERY
    late = lab.server.check(path, seed, barrier, skip=skip)
    written = each.writer.now.acknowledged
    return {"instant": instant, "written": written, "unfit": int(late["lost"])}


def keeps_promises(each: Running) -> None:
    """Failure where Forebay does not do what it promises."""
    found, title = each.found, each.contender.title
    demand(found["refused"], f"{title}: a second host got the image")
    demand(not found["alone"]["unfit"], f"{title}: the image is of no one instant: {found}")
    demand(found["cut"].get("lost") == 0, f"{title}: flushed data after a power cut: {found}")
    if each.contender.key == "back":
        demand(found["hang_flushed"], f"{title}: writes stand while the server hangs: {found}")
        demand(not found["hang_errors_after"], f"{title}: errors: {found}")


CASES = [
    Case("comparison, speed", speed, short=False),
    Case("comparison, faults", faults, short=False),
]
