# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""In which format an image is attached that nobody has told the format of.

A guest may write whatever it likes to the start of its raw disk, the header of a qcow2 image that lies on somebody
else's image included. So first bytes alone never make an image one in a format: its name has to say so as well, which
whoever put it into the store has chosen, or the operator.
"""

from forebay.errors import ForebayError
from forebay.formats.magic import RAW
from forebay.origin.addresses import FileAddress
from forebay.origin.opening import OpenImage
from forebay.origin.virtual.chain import READERS

ENDS = {"qcow2": (".qcow2", ".qcow"), "vmdk": (".vmdk",), "vdi": (".vdi",), "vhdx": (".vhdx",)}
"""What the names of images in each format end in."""


def named_format(address: FileAddress, file: OpenImage) -> str:
    """The format of an open image. `file.format` is raw where it was a raw disk before, or its name says so.

    Raises ForebayError where the operator has to tell it.
    """
    found = file.format or RAW
    if found == RAW or address.path.lower().endswith(ENDS.get(found, ())):
        return found
    if found not in READERS:
        raise ForebayError(
            f"{address.key} is in {found} format, which is not served: convert it with qemu-img convert -O raw, or "
            "say --format raw for its bytes"
        )
    raise ForebayError(
        f"{address.key} is in {found} format, or a guest made it look so: say --format {found} for the disk in it, or "
        "--format raw for its bytes"
    )
