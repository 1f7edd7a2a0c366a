# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay stage IMAGE --hosts A,B`: this host gives an image to many, which are told by ssh, and looked after by it.

What a host is told is the same each time, and how far it is is the answer: a host that was off, or lost its orders,
has them when it is back. Who ends this command ends nothing on the hosts; the next one goes on where they are.
"""

import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from forebay.cli.asking import Arguments, Daemon
from forebay.cli.hosts.answers import (
    FAULT,
    OFF,
    StrangeAnswer,
    decoded,
    last_line,
    number,
    trouble,
    word,
)
from forebay.cli.hosts.arguments import JOBS, chosen
from forebay.cli.hosts.ssh import Ended, Fleet
from forebay.cli.staging.arguments import MOST_HOSTS
from forebay.cli.staging.here import Told, make_torrent
from forebay.errors import ForebayError
from forebay.units import format_duration, format_size, parse_peer, printable

ANSWER_SECONDS = 75.0
"""What a host has to answer: it may have to reach its store first."""

LEAST_PAUSE = 2.0
"""Seconds between two rounds of questions; as many more as there are hundreds of hosts."""

ROUNDS = 3
"""So many rounds in a row a host may be in trouble before it is not waited for any more."""

LONGEST_COMMAND = 120 << 10
"""Bytes: the kernel takes 128 KiB for one word that a program is started with (execve(2))."""

DONE = "done"

_NUMBERS = ("size", "cached_bytes", "down_bytes_a_second", "up_bytes_a_second", "connected")


def stage_on(arguments: Arguments, client: Daemon, image: str) -> int:
    """Have an image in the caches of many hosts: 0 where all have it that are not off. Raises ForebayError, OSError."""
    hosts = chosen(arguments)
    if len(hosts) > MOST_HOSTS:
        raise ForebayError(f"{len(hosts)} hosts are too many: stage to {MOST_HOSTS} at a time")
    port = _port(arguments)
    peers = [_peer(arguments.name or socket.gethostname(), port), *(_peer(x, port) for x in hosts)]
    began = time.monotonic()
    torrent = make_torrent(client, image)
    image = torrent["image"]
    rate = arguments.rate
    words = ["--peers", ",".join(peers), *(["--rate", str(rate)] if rate else [])]
    command = _command(*words, image=image)
    if len(os.fsencode(command)) > LONGEST_COMMAND:
        raise ForebayError(
            f"the names of {len(hosts)} hosts are too long for one command: stage to fewer at a time"
        )

    def give() -> None:
        client.post("/stages", {"image": image, "peers": peers, "source": True, "rate": rate})

    with _bar(arguments, f"stage {image} to {len(hosts)} hosts") as advance:
        watch = _Watch(hosts, as_json=arguments.json, advance=advance)
        _until_done(arguments, give, command, hosts, watch)
    found = [watch.rows[host] for host in hosts]
    if not arguments.keep:
        _end(client, image, [one["host"] for one in found if one["state"] != OFF])
    return _told(arguments, torrent, found, time.monotonic() - began)


def _port(arguments: Arguments) -> int:
    """Where the stagers listen: on all hosts at the same port as here."""
    from forebay.config.model import Config

    return Config.load(arguments.config).staging.port


def _peer(host: str, port: int) -> str:
    """How stagers reach a host. `host` as ssh takes it, or with a port. Raises ForebayError."""
    name = host.rpartition("@")[2]
    if name.count(":") > 1 and not name.startswith("["):
        name = f"[{name}]"
    has_port = "]:" in name or name.count(":") == 1
    peer = name if has_port else f"{name}:{port}"
    try:
        parse_peer(peer)
    except ValueError as fault:
        raise ForebayError(f"{fault}: hosts have to reach each other by it") from None
    return peer


def _command(*words: str, image: str) -> str:
    """The command for the shell of a host."""
    return shlex.join(["forebay", "stage", "--json", *words, "--", image])


# --------------------------------------------------------------------------------------------------------------- rounds


def _until_done(
    arguments: Arguments,
    give: Callable[[], None],
    command: str,
    hosts: Sequence[str],
    watch: "_Watch",
) -> None:
    """Tell the hosts again and again, until each has all of the image, or is in trouble for too long.

    `give` has this host give it: again each time, since another command that stages the same image ends that.
    """
    deadline = time.monotonic() + (arguments.timeout or float("inf"))
    troubles = dict.fromkeys(hosts, 0)
    left = list(hosts)
    while left:
        give()
        fleet = Fleet(command, jobs=JOBS, timeout=ANSWER_SECONDS)
        with closing(fleet.run(left)) as answers:
            for ended in answers:
                row = _row(ended)
                troubles[ended.host] = troubles[ended.host] + 1 if row["size"] == 0 else 0
                watch.note(row)
        left = [x for x in left if watch.rows[x]["state"] != DONE and troubles[x] < ROUNDS]
        pause = LEAST_PAUSE + len(left) / 100
        if time.monotonic() + pause > deadline:
            return
        if left:
            time.sleep(pause)


def _row(ended: Ended) -> Told:
    """What is told of a host. Where it did not answer, its size is 0."""
    if not (ended.code or ended.late or ended.long):
        try:
            return {"host": ended.host, **decoded(ended.out, _checked)}
        except StrangeAnswer as fault:
            state, why = FAULT, str(fault)
    else:
        state, why = trouble(ended, ANSWER_SECONDS)
    return {"host": ended.host, "state": state, "why": why, **dict.fromkeys(_NUMBERS, 0)}


def _checked(found: Any) -> Told:
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
        raise StrangeAnswer("answers with no image that is staged")
    one = found[0]
    why = one.get("reason")
    told = {key: int(number(one, key)) for key in _NUMBERS}
    if not told["size"]:
        raise StrangeAnswer("answers with a size that cannot be")
    why = None if why is None else last_line(str(why))
    return {"state": word(one, "state"), "why": why, **told}


def _end(client: Daemon, image: str, hosts: Sequence[str]) -> None:
    """Stage the image no more, on the hosts and here. One that does not hear it goes on, and does no harm."""
    fleet = Fleet(_command("--end", image=image), jobs=JOBS, timeout=ANSWER_SECONDS)
    with closing(fleet.run(hosts)) as answers:
        for _ in answers:
            pass
    client.post("/stages/end", {"image": image})


# -------------------------------------------------------------------------------------------------------------- telling


class _Watch:
    """How far the hosts are: `rows` by host, and what is shown of them meanwhile."""

    def __init__(
        self, hosts: Sequence[str], *, as_json: bool, advance: Callable[[int, int], None]
    ) -> None:
        """`advance` is told of (bytes that the caches have, bytes in all)."""
        self.rows: dict[str, Told] = {}
        self._as_json = as_json
        self._hosts = hosts
        self._began = time.monotonic()
        self._advance = advance

    def note(self, row: Told) -> None:
        """Take down, and show, what is told of a host."""
        before = self.rows.get(row["host"], {})
        row["seconds"] = round(time.monotonic() - self._began, 1)
        self.rows[row["host"]] = row
        size = max(one["size"] for one in self.rows.values())
        self._advance(sum(x["cached_bytes"] for x in self.rows.values()), size * len(self._hosts))
        if self._as_json:
            print(json.dumps(row), flush=True)
        elif row["state"] == DONE:
            size_told, took = format_size(row["size"]), format_duration(row["seconds"])
            print(f"{row['host']}: {size_told} after {took}", flush=True)
        elif row["why"] and row["why"] != before.get("why"):
            print(f"{row['host']}: {printable(row['state'])}: {printable(row['why'])}", flush=True)


@contextmanager
def _bar(arguments: Arguments, what: str) -> Iterator[Callable[[int, int], None]]:
    if arguments.json or not (sys.stdout.isatty() and sys.stderr.isatty()):
        yield lambda _done, _total: None
        return
    from forebay.cli.terminal.progress import progress_bar

    with progress_bar(what) as advance:
        yield advance


def _told(arguments: Arguments, torrent: Told, found: Iterable[Told], seconds: float) -> int:
    """Print what came of it. The exit code."""
    states = [one["state"] for one in found]
    done, off = states.count(DONE), states.count(OFF)
    if arguments.json:
        result = {"image": torrent["image"], "size": torrent["size"], "hosts": len(states)}
        result |= {"done": done, "off": off, "seconds": round(seconds, 1)}
        print(json.dumps({"result": result}))
    else:
        rest = f", {off} are off" if off else ""
        took = format_duration(seconds)
        print(f"{torrent['image']}: {done} of {len(states)} hosts have it after {took}{rest}")
    return 0 if done + off == len(states) else 1
