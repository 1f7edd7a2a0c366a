# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The numbers of a Throttle that the compiled core reads and changes (`Turn.admits`), by their places in its `words`.

The core lets a request in where nobody waits and both buckets have what it takes, and counts it. Everything else is for
the Throttle to say: the core leaves the request where it is.
"""

from typing import Final

ON: Final = 0
"""Not 0: requests have to ask."""
WAITING: Final = 1
"""Connections that wait."""
CLOCK: Final = 2
"""Seconds by which the time of the buckets is ahead of CLOCK_MONOTONIC; not a number: the core lets nobody in."""
SIZE: Final = 3
"""Bytes that a request counts for at most."""
REQUESTS: Final = 4
"""Where the bucket of requests begins."""
BYTES: Final = 8
"""Where the bucket of bytes begins."""
WORDS: Final = 12

RATE, MOST, LEFT, AT = range(4)
"""In a bucket: what a second brings, 0 for no limit; units when it is full; those in it, and at what time."""
BUCKET_WORDS: Final = 4
