# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay events`: what has happened, and, with `--follow`, what happens."""

import json
import pwd
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from forebay.cli.asking import Arguments, Daemon, print_json
from forebay.cli.events.arguments import LAST_OF_FOLLOW
from forebay.units import printable

if TYPE_CHECKING:
    from typing import Protocol
else:
    Protocol = object  # as Daemon has it

Event = Mapping[str, Any]

AGAIN_SECONDS = 0.5
"""Between two tries to reach a daemon that went away."""


class Followed(Daemon, Protocol):
    """The daemon, which can be followed."""

    def lines(self, target: str) -> Iterator[Event | None]:
        """Each object of an answer that goes on; None now and then where there is none."""


def run(arguments: Arguments, client: Followed) -> int:
    """Show what is asked for; the exit code."""
    wanted = {"disk": arguments.name, "since": arguments.since, "last": arguments.last}
    if arguments.follow:
        if arguments.since is None and arguments.last is None:
            wanted["last"] = LAST_OF_FOLLOW
        try:
            return follow(client, wanted, _show_json if arguments.json else _show)
        except KeyboardInterrupt:  # the way to end it
            return 0
    found = client.get(_target(wanted))
    if arguments.json:
        print_json(found)
        return 0
    for event in found:
        _show(event)
    if not found:
        whose = f" of '{arguments.name}'" if arguments.name else ""
        print(f"forebay: no events{whose} are kept from then on", file=sys.stderr)
    return 0


def _target(wanted: Mapping[str, Any], **more: int) -> str:
    given = {key: value for key, value in {**wanted, **more}.items() if value is not None}
    return f"/events?{urlencode(given)}" if given else "/events"


def follow(client: Followed, wanted: dict[str, Any], show: Callable[[Event], None]) -> int:
    """Show events until nobody reads them. A daemon that is restarted meanwhile is waited for."""
    from forebay.client import NoDaemonError

    began, has_come, is_away = time.time(), False, False
    while True:
        fault = "the daemon ended"
        try:
            for event in client.lines(_target(wanted, follow=1)):
                has_come = True
                if is_away:
                    _say("the daemon is there again")
                    is_away = False
                if event is None:
                    if _nobody_reads():
                        return 0
                    continue
                show(event)
                if "id" in event:
                    wanted = {"disk": wanted["disk"], "after": event["id"]}
        except NoDaemonError as error:
            if not has_come:
                raise
            fault = str(error)
        if not is_away:
            _say(f"{fault}; waiting for it")
            is_away = True
        if "after" not in wanted:
            wanted = {"disk": wanted["disk"], "since": began}
        time.sleep(AGAIN_SECONDS)


def _say(text: str) -> None:
    print(f"forebay: {printable(text)}", file=sys.stderr, flush=True)


def _nobody_reads() -> bool:
    """True if stdout is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(found & (select.POLLERR | select.POLLHUP) for _, found in poll.poll(0))


def _show_json(event: Event) -> None:
    print(json.dumps(event), flush=True)


def _show(event: Event) -> None:
    print(line(event), flush=True)


def line(event: Event) -> str:
    """One event for people."""
    when = datetime.fromtimestamp(event["time"]).astimezone() if "time" in event else None
    shown = f"{when:%Y-%m-%d %H:%M:%S}" if when is not None else " " * 19
    about = f"{event['disk']}: " if event["disk"] else _image(event)
    return (
        f"{shown}  {printable(event['kind']):<10}  {printable(about + event['text'])}{_more(event)}"
    )


def _image(event: Event) -> str:
    return f"{event['image']}: " if event.get("image") else ""


def _more(event: Event) -> str:
    found = []
    if "asked_uid" in event:
        found.append(f"asked by {_user(event['asked_uid'])}, process {event['asked_pid']:.0f}")
    if event.get("untold"):
        found.append(f"{event['untold']:.0f} like it before were not told")
    return f" ({'; '.join(found)})" if found else ""


def _user(uid: float) -> str:
    try:
        return pwd.getpwuid(int(uid)).pw_name
    except (KeyError, OverflowError):
        return f"user {uid:.0f}"
