# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Opening an image for a disk that is to come: what fails there says what to do, and nothing of it is left."""

import contextlib
from collections.abc import AsyncIterator, Iterator

import trio

from forebay.errors import ForebayError, advice
from forebay.image.source import Source


@contextlib.asynccontextmanager
async def abandoned_on_fault(source: Source) -> AsyncIterator[None]:
    """Let the image go if the body fails."""
    try:
        yield
    except BaseException:
        with trio.CancelScope(shield=True), contextlib.suppress(OSError, ForebayError):
            await source.abandon()
        raise


async def format_of(source: Source) -> str:
    """The format of an image that nobody has told that of. Raises ForebayError."""
    with _told(source):
        return await source.find_format()


async def prepared(source: Source) -> None:
    """Open the image and claim it. Raises ForebayError."""
    with _told(source):
        await source.prepare()


@contextlib.contextmanager
def _told(source: Source) -> Iterator[None]:
    """An error of storage in the body is a ForebayError, which says what to do."""
    try:
        yield
    except OSError as fault:
        raise ForebayError(
            f"{source.label}: {fault.strerror or fault}: "
            f"{advice(fault, 'see that its storage answers, then try again')}"
        ) from fault
