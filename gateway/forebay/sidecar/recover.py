# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The commands `forebay recover` and `forebay takeover`, for an image whose gateway is gone, on any host that sees it.

They need no daemon.
"""

import contextlib
import errno
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from forebay.config.model import Config
from forebay.errors import ForebayError
from forebay.formats.magic import RAW
from forebay.origin.addresses import FileAddress, resolve
from forebay.origin.opening import OpenImage, open_image
from forebay.origin.virtual.opening import open_virtual
from forebay.origin.worker import syscalls
from forebay.sidecar.files import Sidecar
from forebay.sidecar.record import NOBODY
from forebay.sidecar.takeover import Recovered, recover_image
from forebay.sidecar.user import as_owner, name_of_daemon
from forebay.units import format_size


def find(config: Config, text: str) -> FileAddress:
    """The address of an image named as for `attach`, or by any path, for a host that has no stores.

    Raises ForebayError.
    """
    path = Path(os.path.realpath(text))
    if "/" in text.partition(":")[0] and path.is_file():
        return FileAddress("", path.parent, path.name)
    found = resolve(config, text)
    if not isinstance(found, FileAddress):
        raise ForebayError(f"{text} is not a file, so there is nothing beside it to recover from")
    return found


def run(config: Config, text: str, *, take_over: bool = False, sure: bool = True) -> "Report":
    """Recover the image that `text` names, or take it over. What was done, for the command to print.

    The operator is `sure` that a checkpoint is to be finished in an image that was changed since, or copied; or, of
    taking it over, that what the other gateway has is given up.

    Raises ForebayError, also where taking it over would lose data and the operator is not `sure`. Blocks.
    """
    try:
        with as_owner(config, _path(config, text)):
            return _run(config, text, take_over=take_over, sure=sure)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ForebayError(_as_whom(config, text, error.strerror or "")) from None
        raise ForebayError(f"{text}: {error.strerror}") from None
    except ForebayError as fault:
        if isinstance(fault.__cause__, PermissionError):
            raise ForebayError(_as_whom(config, text, "Permission denied")) from None
        raise


def _as_whom(config: Config, text: str, why: str) -> str:
    """What to do where this user may not."""
    return (
        f"{text}: {why}: run it as the user whose the files beside it are, such as the daemon's "
        f"(sudo -u {name_of_daemon(config)} forebay ...)"
    )


def _path(config: Config, text: str) -> Path:
    """Where the image lies, as far as the name tells. Raises ForebayError."""
    if "/" in text.partition(":")[0]:
        with contextlib.suppress(ForebayError):
            found = resolve(config, text)
            if isinstance(found, FileAddress):
                return found.root / found.path
        return Path(os.path.realpath(text))
    found = resolve(config, text)
    return found.root / found.path if isinstance(found, FileAddress) else Path(os.devnull)


def _run(config: Config, text: str, *, take_over: bool, sure: bool) -> "Report":
    """The same as the user that we are. Raises ForebayError, and OSError."""
    address = find(config, text)
    need_locks = config.disk_settings(address.store or None).require_locks
    address, file = _opened(config, address, need_locks=need_locks)
    try:
        found = recover_image(address, file, need_locks=need_locks, sure=sure and not take_over)
        if take_over:
            if found.lacks_data and not sure:
                raise ForebayError(
                    f"{text}: {_later(found)} would be given up{_instant(found)}: bring that gateway back, or say --yes"
                )
            recover_image(address, file, take_over=True, need_locks=need_locks)
    finally:
        syscalls.close(file.fd)
    return Report(text, found, taken=take_over and found.owner is not None)


def _opened(
    config: Config, address: FileAddress, *, need_locks: bool
) -> tuple[FileAddress, OpenImage]:
    """The image, open as its last owner had it: its bytes, or the disk in it. Raises ForebayError, OSError."""
    if address.format == RAW:
        with Sidecar(address) as sidecar, sidecar.find() or contextlib.nullcontext() as left:
            if left is not None and left.owner is not None:
                address = replace(address, format=left.owner.image_format)
    if address.format == RAW:
        return address, open_image(address, read_only=False, admitted=True)
    return address, open_virtual(
        address,
        read_only=False,
        run=None,
        locate=partial(resolve, config),
        admitted=True,
        need_locks=need_locks,
    )


class Report:
    """What was done with an image, in words and as JSON."""

    def __init__(self, image: str, found: Recovered, *, taken: bool) -> None:
        """`image` is what the operator wrote; `taken`: True if it was taken over from somebody."""
        self._image = image
        self._found = found
        self._taken = taken

    def lines(self) -> list[str]:
        """Lines for people to read."""
        found, lines = self._found, []
        if found.finished is not None:
            lines.append(
                f"the checkpoint of {found.as_of or 'an unknown instant'} was finished (disk '{found.finished.disk}', "
                f"host {found.finished.host})"
            )
        elif found.dropped:
            lines.append(
                "a checkpoint that was not complete was dropped: none of it is in the image"
            )
        if found.lacks_data and self._taken:
            lines.append(f"taken over{_instant(found)}; {_later(found)} are given up")
        elif found.lacks_data:
            lines.append(
                f"whole{_instant(found)}; {_later(found)}: bring that gateway back, or 'forebay takeover'"
            )
        elif self._taken:
            lines.append("taken over; nothing is lost")
        elif not lines:
            lines.append("whole, and nothing to recover")
        return [f"{self._image}: {line}" for line in lines]

    def json(self) -> dict[str, object]:
        """What `--json` prints. `as_of` is null where it is not known, or where no gateway has later writes."""
        found = self._found
        owner = found.owner if found.owner and found.owner.gateway != NOBODY else None
        return {
            "image": self._image,
            "finished": found.finished is not None,
            "dropped": found.dropped,
            "as_of": (found.as_of or None) if found.lacks_data or found.finished else None,
            "lacks_data": found.lacks_data and not self._taken,
            "taken_over": self._taken,
            "owner": asdict(owner) if owner else None,
        }


def _instant(found: Recovered) -> str:
    """The instant that the image shows, as the end of a clause; empty where it is not known."""
    if found.as_of:
        return f" as of {found.as_of}"
    since = found.owner.since if found.owner else ""
    return f" as of {since}, when the disk was attached" if since and not found.finished else ""


def _later(found: Recovered) -> str:
    """What the image lacks, and who has it."""
    assert found.owner is not None
    owner = found.owner
    much = f" ({format_size(owner.dirty_bytes)} at the last count)" if owner.dirty_bytes else ""
    return f"later writes{much} that host {owner.host} has (disk '{owner.disk}')"
