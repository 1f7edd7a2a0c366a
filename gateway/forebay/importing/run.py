# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay import`, put together: source, unpacking, tables, image.

It needs no daemon, and does not run in it: what strangers made is read by a process of its own, as the daemon's user.
"""

import errno
import signal
from collections.abc import Callable
from typing import NoReturn

from forebay.config.model import Config
from forebay.errors import ForebayError, advice
from forebay.importing import unpack, web
from forebay.importing.making import Making, Progress, Report, Wish
from forebay.importing.source import LocalFile, Source
from forebay.importing.work import Work
from forebay.origin.addresses import FileAddress
from forebay.origin.new_image import address_of_new
from forebay.sidecar.user import become_owner, name_of_daemon

_FOR_GOOD = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Faults of a store at which what there is goes at once: others need the room."""


def run(config: Config, wish: Wish, progress: Progress, tell: Callable[[str], None]) -> Report:
    """Import a file. `tell` is called with what the operator has to know meanwhile.

    Raises ForebayError, and OSError. Becomes the user whose the daemon's state is, for good, where root runs it.
    """
    address = address_of_new(config, wish.target)
    unpack.prepare()
    web.prepare()
    source = _opened(config, wish, address)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        try:
            work = Work(address)
        except PermissionError as fault:
            raise _not_allowed(config, address, fault) from None
        except OSError as fault:
            what = advice(fault, "see that the storage answers, and run the same command again")
            raise ForebayError(f"{address.key}: {fault.strerror or fault}: {what}") from None
        return _made(Making(wish, source, work, progress, tell), work, source)
    finally:
        signal.signal(signal.SIGTERM, before)
        source.close()


def _made(making: Making, work: Work, source: Source) -> Report:
    """The image, made. What is of use to another run stays, where it ends for a reason that may pass."""
    try:
        return making.run()
    except BaseException as fault:
        making.stop()
        again = "run the same command again"
        if not _may_pass(fault):
            work.drop()
        elif making.keep():
            again += ", which goes on where it was"
        if isinstance(fault, KeyboardInterrupt):
            raise ForebayError(f"interrupted: {again}") from None
        if isinstance(fault, OSError):
            what = advice(fault, f"see that the storage answers, and {again}")
            if isinstance(fault, PermissionError):
                what = f"let the daemon's user read {source.name}, and write to the store"
            raise ForebayError(f"{work.address.key}: {fault.strerror}: {what}") from None
        if isinstance(fault, ValueError):
            raise ForebayError(f"{source.name} {fault}") from None
        raise


def _may_pass(fault: BaseException) -> bool:
    if isinstance(fault, OSError):
        return fault.errno not in _FOR_GOOD
    return isinstance(fault, web.AwayError | KeyboardInterrupt)


def _opened(config: Config, wish: Wish, address: FileAddress) -> Source:
    """The source, opened by whoever runs the command, or else by the daemon's user, who this process is then."""
    where = address.root / address.path
    text = wish.source
    if "://" in text:
        source = web.WebFile(
            text, ca_file=wish.ca_file, allow_http=wish.allow_http, trust=wish.sha256 is not None
        )
        become_owner(config, where)
        return source
    try:
        found = LocalFile(text)
    except PermissionError:  # a server that lets root do nothing
        become_owner(config, where)
        return LocalFile(text)
    become_owner(config, where)
    return found


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _not_allowed(config: Config, address: FileAddress, fault: OSError) -> ForebayError:
    user = name_of_daemon(config)
    folder = (address.root / address.path).parent
    return ForebayError(
        f"{folder}: {fault.strerror}: let the user {user} write there, and run this as root or as that user"
    )
