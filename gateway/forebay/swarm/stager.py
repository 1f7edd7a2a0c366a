# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay stager MOUNT`: asks the daemon once a second what is to be staged, and does it.

It has nothing of its own on any disk. What an image lacks is asked of the daemon's cache whenever the image is begun
with, so whichever of the two was killed, they go on with what there is.
"""

import base64
import logging
import random
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import quote

from forebay.client import Client
from forebay.config.model import Config
from forebay.errors import ForebayError
from forebay.swarm.engine import Engine, Figures
from forebay.systemd import notify

log = logging.getLogger("forebay.stager")

TURN_SECONDS = 1.0
"""How often the daemon is asked, and told."""

CONNECT_SECONDS = 5.0
"""How often hosts are tried that are not connected."""

NAME_SECONDS = 60.0
"""After so long a name is looked up again."""

AGAIN_SECONDS = 5.0
"""How soon an image is begun anew after trouble with it."""

LONGEST_PAUSE = 320.0
"""Seconds. The same after all of it has come and the cache did not keep it: twice as long each time, up to this, since
it comes from other hosts once more."""

STALL_SECONDS = (60.0, 180.0)
"""When nothing has come for so long, somewhere between the two, no host has what is lacking: then the store is read. At
random, so that of many hosts one begins, and the others get it from that."""

WRITE_SECONDS = 10.0
"""When nothing of what came has reached the cache for so long, it does not any more."""

LONGEST_REASON = 1000
"""Characters of a reason that the daemon is told: it takes the reasons of all orders in one request."""

STORE, COMPLETE = "store", "seeding"
"""The states in which the store is read, and in which the cache has all of it."""


@dataclass(eq=False)
class Job:
    """One order under way."""

    order: dict[str, Any]
    state: str = "starting"
    reason: str | None = None
    not_before: float = 0.0
    """Monotonic time before which it is not begun anew."""
    figures: Figures = field(default_factory=lambda: Figures(0, 0, 0, False, 0))
    connected_at: float = float("-inf")
    moved_at: float = 0.0
    """When something came last."""
    patience: float = field(default_factory=lambda: random.uniform(*STALL_SECONDS))  # noqa: S311  (not to guess at)
    left: int = -1
    """Pieces that the cache lacked when the engine had all of them, and since when it is so many."""
    left_at: float = 0.0
    warming: "Future[Any] | None" = None
    pause: float = AGAIN_SECONDS
    """Seconds until it is begun anew when the cache did not keep what came."""

    def row(self) -> dict[str, Any]:
        """What the daemon is told."""
        return {
            "image": self.order["image"],
            "state": self.state,
            "reason": self.reason and self.reason[:LONGEST_REASON],
            "down": self.figures.down,
            "up": self.figures.up,
            "connected": self.figures.connected,
        }


@dataclass(eq=False)
class _Name:
    """What is known of a name, when it was looked up last, and the look-up that goes on."""

    address: str | None = None
    asked: float = float("-inf")
    asking: "Future[str | None] | None" = None


class Names:
    """Addresses of hosts, looked up in threads: a name server that hangs holds up nobody, and takes no host away."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        """`threads` are for this alone."""
        self._threads = threads
        self._known: dict[str, _Name] = {}

    def address(self, host: str) -> str | None:
        """The IP address of a host, the last one that was found; None where there was none yet."""
        if _is_address(host):
            return host
        name = self._known.setdefault(host, _Name())
        if name.asking is not None and name.asking.done():
            name.address, name.asking = name.asking.result() or name.address, None
        if name.asking is None and time.monotonic() - name.asked > NAME_SECONDS:
            name.asked, name.asking = time.monotonic(), self._threads.submit(_address, host)
        return name.address


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _address(host: str) -> str | None:
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as fault:
        log.warning("%s: %s", host, getattr(fault, "strerror", None) or fault)
        return None


class Stager:
    """All jobs of this host."""

    def __init__(self, client: Client, mount: Path, engine: Engine) -> None:
        self._client = client
        self._mount = mount
        self._engine = engine
        self._threads = ThreadPoolExecutor(8, "stager")
        self._lookups = ThreadPoolExecutor(4, "names")
        self._names = Names(self._lookups)
        self._jobs: dict[str, Job] = {}
        self._is_away = False
        self._known: int | None = None
        """The number of the daemon's last answer: then it need not tell all hosts again."""

    def turn(self) -> None:
        """One second's work. Raises nothing that is expected."""
        try:
            content: dict[str, Any] = {"stages": [job.row() for job in self._jobs.values()]}
            if self._known is not None:
                content["known"] = self._known
            answer = self._client.post("/stages/report", content)
            orders, self._known = answer["orders"], answer.get("known")
        except ForebayError as fault:
            if not self._is_away:
                log.warning("%s", fault)
            self._is_away = True
            return
        self._is_away = False
        self._follow({one["image"]: one for one in orders})
        for image, why in self._engine.troubles():
            self._again(self._jobs[image], why)
        hosts = {host for job in self._jobs.values() for host, _ in job.order["peers"]}
        self._engine.allow(filter(None, map(self._names.address, hosts)))
        for job in self._jobs.values():
            if job.order["stale"] is not None and job.order["image"] in self._engine.images():
                self._again(job, job.order["stale"])
            try:
                self._work(job)
            except (ForebayError, OSError) as fault:
                self._again(job, str(fault))

    def close(self) -> None:
        """End all of it."""
        self._engine.close()
        for threads in (self._threads, self._lookups):
            threads.shutdown(wait=False, cancel_futures=True)

    def _follow(self, orders: dict[str, dict[str, Any]]) -> None:
        """Have a job for each order, and no others."""
        for image in self._jobs.keys() - orders.keys():
            if image in self._engine.images():
                self._engine.remove(image)
            del self._jobs[image]
            log.info("%s: ended", image)
        for image, order in orders.items():
            if image in self._jobs and "peers" not in order:
                order["peers"] = self._jobs[image].order["peers"]
            job = self._jobs.setdefault(image, Job(order))
            if job.order["rate"] != order["rate"] and image in self._engine.images():
                self._engine.limit(image, order["rate"])
            job.order = order

    def _again(self, job: Job, why: str) -> None:
        """Begin anew soon: what there is then is asked of the daemon."""
        image = job.order["image"]
        if job.reason != why:
            log.warning("%s: %s", image, why)
        job.state, job.reason = "failed", why
        job.not_before = time.monotonic() + AGAIN_SECONDS
        if image in self._engine.images():
            self._engine.remove(image)

    def _work(self, job: Job) -> None:
        """One look at a job. Raises ForebayError and OSError."""
        image, now = job.order["image"], time.monotonic()
        if image not in self._engine.images():
            if now < job.not_before:
                return
            self._begin(job)
        before, job.figures = job.figures, self._engine.figures(image)
        self._engine.bound_memory(image, job.figures)
        if job.figures.received != before.received or job.figures.is_complete:
            job.moved_at = now
        if not job.figures.connected or now - job.connected_at > CONNECT_SECONDS:
            job.connected_at = now
            for host, port in job.order["peers"]:
                if address := self._names.address(host):
                    self._engine.connect(image, address, port)
        if job.order["source"]:
            job.state = COMPLETE
        elif not job.figures.is_complete:
            job.state, job.reason = "staging", None
            self._mind_the_store(job, now)
        elif job.state != COMPLETE:
            self._look_if_complete(job, now)

    def _begin(self, job: Job) -> None:
        """Add an image, with what the cache has of it."""
        image = job.order["image"]
        torrent = self._client.get(f"/stages/torrent?image={quote(image)}")["torrent"]
        lacking = self._client.get(f"/stages/lacking?image={quote(image)}")["lacking"]
        store, _, path = image.partition(":")
        where = self._mount / "stage" / store / path
        # a source reads the store for what its cache lacks
        runs = [] if job.order["source"] else [(int(first), int(count)) for first, count in lacking]
        self._engine.add(image, base64.b64decode(torrent), where, runs, job.order["rate"])
        job.figures = Figures(0, 0, 0, not runs, 0)
        job.state = "staging"
        job.reason, job.connected_at, job.moved_at = None, float("-inf"), time.monotonic()
        log.info("%s: %s, %d pieces are lacking", image, job.state, sum(n for _, n in runs))

    def _look_if_complete(self, job: Job, now: float) -> None:
        """The engine has all of it, and may still be writing. What the cache lacks in the end is fetched again."""
        image = job.order["image"]
        lacking = self._client.get(f"/stages/lacking?image={quote(image)}")["lacking"]
        left = sum(count for _, count in lacking)
        if not left:
            job.state = COMPLETE
            log.info("%s: complete", image)
        elif left != job.left:
            job.left, job.left_at = left, now
        elif now - job.left_at > WRITE_SECONDS:
            self._again(
                job, f"{left} pieces came and are not in the cache: it has no room, or was killed"
            )
            job.not_before = now + job.pause
            job.pause = min(2 * job.pause, LONGEST_PAUSE)

    def _mind_the_store(self, job: Job, now: float) -> None:
        """Read the store when no other host has given anything for a long time; then begin anew with that."""
        image = job.order["image"]
        if job.warming is None and now - job.moved_at > job.patience:
            log.warning("%s: no host gives what is lacking: the store is read", image)
            job.warming = self._threads.submit(self._warm, image)
        elif job.warming is not None and job.warming.done():
            done, job.warming = job.warming, None
            why = done.exception()
            job.moved_at = now
            self._engine.remove(image)
            if why is not None:
                self._again(job, str(why))
            return
        if job.warming is not None:
            job.state = STORE

    def _warm(self, image: str) -> None:
        content = {"image": image, "amount": "all"}
        self._client.follow("POST", "/images/warm", content, lambda _done, _total: None)


def run(config: Config, mount: Path) -> int:
    """Stage until SIGTERM or SIGINT; 0. Raises ForebayError where it cannot begin."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s"
    )
    if not (mount / "stage").is_dir():
        raise ForebayError(f"{mount}: 'forebay fuse' has nothing mounted there: start that first")
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    engine = Engine(config.staging.listen, config.staging.port)
    stager = Stager(Client(str(config.gateway.run / "control.sock")), mount, engine)
    notify("READY=1")
    log.info("at %s, port %d", config.staging.listen, config.staging.port)
    while not ending.is_set():
        stager.turn()
        notify("WATCHDOG=1", wait=False)
        ending.wait(TURN_SECONDS)
    notify("STOPPING=1")
    stager.close()
    return 0
