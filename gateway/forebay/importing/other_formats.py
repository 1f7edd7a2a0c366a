# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a guest sees of a vmdk, vdi or vhdx image, read as a disk on it would be (origin/virtual): the header is looked
at here, then QEMU's storage daemon is given the one open file.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forebay.errors import ForebayError
from forebay.origin.addresses import Address, FileAddress
from forebay.origin.opening import OpenImage
from forebay.origin.virtual.opening import closing, open_virtual


@contextmanager
def opened(path: Path, disk: str, source: str) -> Iterator[OpenImage]:
    """The disk in an image in a file, open while the body runs. `source` names it in messages.

    Raises ForebayError for one that is refused, and OSError.
    """
    address = FileAddress(os.fspath(path.parent), path.parent, path.name, disk)
    try:
        found = open_virtual(address, read_only=True, run=None, locate=_nowhere, admitted=True)
    except ForebayError as fault:
        raise ForebayError(str(fault).replace(address.name, source)) from None
    with closing(found.fd):
        yield found


def _nowhere(name: str) -> Address:
    raise ForebayError(f"'{name}' is another file: flatten it with 'qemu-img convert'")
