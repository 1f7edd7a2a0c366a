# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Whose the files beside an image are: a command that root runs works as that user.

Most file servers let root do nothing (`root_squash`), and what root makes on others the daemon could not remove.
"""

import contextlib
import os
import pwd
from collections.abc import Iterator
from pathlib import Path

from forebay.config.model import Config
from forebay.origin.addresses import SIDECAR

_ROOT = 0
NOBODY = 65534
"""Who owns files that a server shows without saying whose they are."""


@contextlib.contextmanager
def as_owner(config: Config, image: Path) -> Iterator[None]:
    """For root, in the body: the user whose files lie beside the image, or whose the daemon's state is.

    For everybody else, and where neither is known, nothing changes. For a program with one thread.
    """
    found = _owner(config, image) if os.geteuid() == _ROOT else None
    if found is None:
        yield
        return
    user, group = found
    before = os.getegid(), os.getgroups()
    os.setgroups(_groups(user, group))
    os.setegid(group)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(_ROOT)
        os.setegid(before[0])
        os.setgroups(before[1])


def become_owner(config: Config, image: Path) -> None:
    """Become the same user for good: for a command that goes on to read what strangers made."""
    found = _owner(config, image) if os.geteuid() == _ROOT else None
    if found is not None:
        user, group = found
        os.setgroups(_groups(user, group))
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)


def _owner(config: Config, image: Path) -> tuple[int, int] | None:
    """User and group of the first that root can see, and that is not root's."""
    beside = image.with_name(image.name + SIDECAR)
    for path in (beside, image, config.gateway.state):
        with contextlib.suppress(OSError):
            found = path.stat(follow_symlinks=False)
            if found.st_uid not in (_ROOT, NOBODY):
                return found.st_uid, found.st_gid
            if path == beside and found.st_uid == _ROOT:
                return None  # root's own daemon made it
    return None


def _groups(user: int, group: int) -> list[int]:
    """The groups of the user, as this host knows them."""
    try:
        known = pwd.getpwuid(user)
    except KeyError:
        return [group]
    return os.getgrouplist(known.pw_name, group)


def name_of_daemon(config: Config) -> str:
    """The user that the daemon of this host runs as, as far as its state directory tells."""
    try:
        return pwd.getpwuid(config.gateway.state.stat().st_uid).pw_name
    except (OSError, KeyError):
        return "forebay"
