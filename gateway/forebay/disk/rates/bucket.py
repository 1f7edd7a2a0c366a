# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A token bucket: so many units per second, and more at once after a rest. It has no clock of its own."""

from array import array

from forebay_nbd.throttle.words import AT, BUCKET_WORDS, LEFT, MOST, RATE

REST_SECONDS = 0.1
"""A bucket holds at least what its rate brings in so many seconds: those who wait look at it a few times in them."""


class Bucket:
    """Units that may be used now. They may be requests, or bytes.

    In any time of T seconds no more than `most` + `rate` * T units are used, and of the last request as much as it is
    larger than `most`: one that is larger is let in when the bucket is full, and pays for the rest afterwards.
    """

    def __init__(self, words: "array[float] | None" = None, at: int = 0) -> None:
        """`words`: where it keeps its numbers, from place `at` on, for the compiled core as well."""
        self._words = array("d", (0.0,) * BUCKET_WORDS) if words is None else words
        self._first = at

    @property
    def rate(self) -> float:
        """Units per second; 0: no limit."""
        return self._words[self._first + RATE]

    @property
    def most(self) -> float:
        """Units in a full bucket."""
        return self._words[self._first + MOST]

    def set(self, rate: float, burst: float, now: float) -> None:
        """Have it bring `rate` units per second from `now` (seconds) on, and hold `burst`, or what REST_SECONDS bring.

        It is full if it had no limit until now; what was used before its time is paid for with the new rate.
        """
        words, first = self._words, self._first
        was_limited = self.rate > 0
        self._fill(now)
        most = max(burst, rate * REST_SECONDS, 1.0)
        words[first + RATE], words[first + MOST] = rate, most
        words[first + LEFT] = min(words[first + LEFT], most) if was_limited else most

    def _fill(self, now: float) -> None:
        """Add what the time has brought. A clock that goes back brings nothing."""
        words, first = self._words, self._first
        if now > words[first + AT]:
            brought = (now - words[first + AT]) * words[first + RATE]
            words[first + LEFT] = min(words[first + MOST], words[first + LEFT] + brought)
        words[first + AT] = now

    def seconds_until(self, units: float, now: float) -> float:
        """In how many seconds so many units may be used; 0.0: now."""
        if not self.rate:
            return 0.0
        self._fill(now)
        return max(0.0, min(units, self.most) - self._words[self._first + LEFT]) / self.rate

    def use(self, units: float) -> None:
        """Called when so many units are used, right after `seconds_until` has said 0.0."""
        if self.rate:
            self._words[self._first + LEFT] -= units
