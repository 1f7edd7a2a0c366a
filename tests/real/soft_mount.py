# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`python -m real.soft_mount DIRECTORY -m forebay serve ...`: the daemon, told that DIRECTORY is an NFS mount, `soft`.

For the tests only: the line that the kernel would have in mountinfo is in a file beside that directory.
"""

import os
import sys
from pathlib import Path

from forebay.origin import mounts

LINE = "98 29 {major}:{minor} / {point} rw shared:9 - nfs4 nas:/export rw,vers=4.2,soft,timeo=600\n"


def main() -> int:
    directory, _, _, *arguments = sys.argv[1:]  # between them: -m forebay
    place = os.stat(directory).st_dev
    told = Path(f"{directory}.mountinfo")
    told.write_text(LINE.format(major=os.major(place), minor=os.minor(place), point=directory))
    mounts._MOUNTINFO = told
    from forebay.cli.main import main as forebay_main

    sys.argv = ["forebay", *arguments]
    return forebay_main()


if __name__ == "__main__":
    sys.exit(main())
