# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay hosts`: many hosts, asked and told by ssh. No daemon of its own: each answers for itself."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from forebay.cli.hosts import tables
from forebay.cli.hosts.answers import (
    DOWN,
    FAULT,
    OFF,
    StrangeAnswer,
    decoded,
    disks,
    numbers_of,
    summary,
    trouble,
)
from forebay.cli.hosts.arguments import JOBS, TIMEOUT, WARM_JOBS, chosen
from forebay.cli.hosts.ssh import Ended, Fleet, Lines, Whole
from forebay.cli.terminal.render import wants_colour
from forebay.units import HEALTHY, format_size, printable

Told = dict[str, Any]
"""What is told of one host: `host`, `state`, `why`, and what it answered."""

FINE = ("ok", OFF)
"""States of a host that are no fault."""
DONE = "done"


def run(arguments: argparse.Namespace, image: Callable[[str], str]) -> int:
    """`forebay hosts` and its actions. `image` makes of what was typed what a daemon takes. The exit code."""
    hosts = chosen(arguments)
    if arguments.action == "warm":
        return _warm(arguments, hosts, image(arguments.image))
    if arguments.action == "flush":
        return _flush(arguments, hosts)
    return _status(arguments, hosts) if arguments.action == "status" else _show(arguments, hosts)


# --------------------------------------------------------------------------------------------------------------- asking


def _show(arguments: argparse.Namespace, hosts: Sequence[str]) -> int:
    """How the hosts stand, or what is warm on them."""
    found = _asked(arguments, hosts, ["summary", "--json"], _summary)
    if arguments.json:
        _print_json(found)
    elif arguments.images:
        _print(tables.images(found, **_drawn()))
        _print_reasons(one for one in found if one.get("summary") is None)
    else:
        _print(tables.hosts(found, **_drawn()))
    return _code(found)


def _summary(data: bytes) -> Told:
    told = decoded(data, summary)
    return {"state": told["state"], "why": "; ".join(told["reasons"]) or None, "summary": told}


def _status(arguments: argparse.Namespace, hosts: Sequence[str]) -> int:
    """The disks of all hosts."""
    found = _asked(arguments, hosts, ["status", "--json"], _disks)
    if arguments.json:
        _print_json(found)
    else:
        _print(tables.disks(found, **_drawn()))
        _print_reasons(one for one in found if one.get("disks") is None or one["why"])
    return _code(found)


def _disks(data: bytes) -> Told:
    told = decoded(data, disks)
    bad = [disk for disk in told if disk["state"] not in HEALTHY]
    why = "; ".join(f"{disk['name']}: {disk['state']}: {disk['reason'] or '-'}" for disk in bad)
    return {"state": "degraded" if bad else "ok", "why": why or None, "disks": told}


def _asked(
    arguments: argparse.Namespace,
    hosts: Sequence[str],
    words: Sequence[str],
    read: Callable[[bytes], Told],
) -> list[Told]:
    """What each host answers, in the order in which they were named. Raises OSError."""
    timeout = arguments.timeout or TIMEOUT
    fleet = Fleet(_command(words), jobs=arguments.jobs or JOBS, timeout=timeout)
    found: dict[str, Told] = {}
    with closing(fleet.run(hosts)) as answers, _counted(len(hosts)) as count:
        for ended in answers:
            found[ended.host] = _read(ended, timeout, read)
            count(len(found))
    return [found[host] for host in hosts]


def _read(ended: Ended, timeout: float | None, read: Callable[[bytes], Told]) -> Told:
    """What is told of a host. A command that failed may have answered all the same: it says that no daemon is there."""
    host, usable = ended.host, ended.code in (0, 1) and not (ended.late or ended.long)
    if usable and ended.out.strip():
        try:
            return {"host": host, **read(ended.out)}
        except StrangeAnswer as fault:
            return {"host": host, "state": FAULT, "why": str(fault)}
    state, why = trouble(ended, timeout)
    no_daemon = usable and why.startswith("no daemon at ")
    return {"host": host, "state": DOWN if no_daemon else state, "why": why}


def _command(words: Sequence[str]) -> str:
    """The command for the shell of a host."""
    return shlex.join(["forebay", *words])


# -------------------------------------------------------------------------------------------------------------- working


def _warm(arguments: argparse.Namespace, hosts: Sequence[str], image: str) -> int:
    """Bring an image in on all hosts, some at a time."""
    rate = [] if arguments.rate is None else ["--rate", str(arguments.rate)]
    words = ["warm", "--json", *rate, "--", image, str(arguments.amount)]
    keys = ("size", "cached_bytes", "origin_read_bytes")

    def line(result: Told) -> str:
        cached, size = format_size(result["cached_bytes"]), format_size(result["size"])
        return f"{cached} of {size} cached, {format_size(result['origin_read_bytes'])} read"

    return _done(arguments, hosts, words, numbers_of(keys), line, arguments.jobs or WARM_JOBS)


def _flush(arguments: argparse.Namespace, hosts: Sequence[str]) -> int:
    """Write back on all hosts."""
    keys = ("written_back_bytes", "dirty_bytes")

    def line(result: Told) -> str:
        return f"{format_size(result['written_back_bytes'])} written back, nothing is dirty"

    words = ["flush", "--json"]
    return _done(arguments, hosts, words, numbers_of(keys), line, arguments.jobs or JOBS)


def _done(
    arguments: argparse.Namespace,
    hosts: Sequence[str],
    words: Sequence[str],
    check: Callable[[Any], Told],
    line: Callable[[Told], str],
    jobs: int,
) -> int:
    """Have each host do some work, and tell of each when it is done: 0 where all did that are not off."""
    found: list[Told] = []
    streams = words[0] == "warm"
    with _progress(arguments, len(hosts)) as progress:
        fleet = Fleet(
            _command(words),
            jobs=jobs,
            timeout=arguments.timeout,
            sink=lambda host: Lines(lambda data: progress(host, data)) if streams else Whole(),
        )
        with closing(fleet.run(hosts)) as answers:
            for ended in answers:
                one = _result(ended, arguments.timeout, check)
                found.append(one)
                if arguments.json:
                    print(json.dumps(one), flush=True)
                elif one["state"] == DONE:
                    print(f"{one['host']}: {line(one['result'])}", flush=True)
                else:
                    print(f"{one['host']}: {printable(_told(one))}", flush=True)
    return 0 if all(one["state"] in (DONE, OFF) for one in found) else 1


def _result(ended: Ended, timeout: float | None, check: Callable[[Any], Told]) -> Told:
    """What came of the work on a host."""
    if ended.code or ended.late or ended.long:
        state, why = trouble(ended, timeout)
        return {"host": ended.host, "state": state, "why": why}
    try:
        result = decoded(ended.out, lambda found: check(_inner(found)))
    except StrangeAnswer as fault:
        return {"host": ended.host, "state": FAULT, "why": str(fault)}
    return {"host": ended.host, "state": DONE, "why": None, "result": result}


def _inner(found: Any) -> Any:
    """The result in the last line of work that streams, or the answer itself."""
    return found["result"] if isinstance(found, dict) and "result" in found else found


@contextmanager
def _progress(arguments: argparse.Namespace, hosts: int) -> Iterator[Callable[[str, bytes], None]]:
    """How far all hosts are together: as lines of JSON, or a bar at a terminal. Takes a host and a line of it."""
    shares: dict[str, tuple[float, float]] = {}
    with _bar(arguments, hosts) as advance:

        def progress(host: str, data: bytes) -> None:
            try:
                share = decoded(data, numbers_of(("done", "total")))
            except StrangeAnswer:
                return  # the last line counts, and is looked at in its time
            if not share["total"]:
                return
            if arguments.json:
                print(json.dumps({"host": host, **share}), flush=True)
            shares[host] = share["done"], share["total"]
            advance(*(sum(share[i] for share in shares.values()) for i in (0, 1)))

        yield progress


@contextmanager
def _bar(arguments: argparse.Namespace, hosts: int) -> Iterator[Callable[[float, float], None]]:
    if arguments.json or not (sys.stdout.isatty() and sys.stderr.isatty()):
        yield lambda _done, _total: None
        return
    from forebay.cli.terminal.progress import progress_bar

    with progress_bar(f"{arguments.action} on {hosts} hosts") as advance:
        yield lambda done, total: advance(int(done), int(total))


# -------------------------------------------------------------------------------------------------------------- telling


@contextmanager
def _counted(hosts: int) -> Iterator[Callable[[int], None]]:
    """How many hosts have answered, on stderr where that is a terminal; gone at the end."""
    if not sys.stderr.isatty():
        yield lambda _count: None
        return
    try:
        yield lambda count: print(
            f"\r{count} of {hosts} hosts", end="", file=sys.stderr, flush=True
        )
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _drawn() -> Told:
    """How tables are drawn where stdout leads."""
    terminal = sys.stdout.isatty()
    width = os.get_terminal_size().columns if terminal else None
    return {"colour": wants_colour(terminal), "width": width}


def _print(lines: Sequence[str]) -> None:
    print("\n".join(lines))


def _print_json(found: Sequence[Told]) -> None:
    print(json.dumps(found, indent=2))


def _print_reasons(found: Iterator[Told]) -> None:
    for one in found:
        print(f"{one['host']}: {printable(_told(one))}")


def _told(one: Told) -> str:
    return f"{one['state']}: {one['why']}" if one["why"] else str(one["state"])


def _code(found: Sequence[Told]) -> int:
    return 0 if all(one["state"] in FINE for one in found) else 1
