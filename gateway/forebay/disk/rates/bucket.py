# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A token bucket: so many units per second, and more at once after a rest. It has no clock of its own."""

REST_SECONDS = 0.1
"""A bucket holds at least what its rate brings in so many seconds: those who wait look at it a few times in them."""


class Bucket:
    """Units that may be used now. They may be requests, or bytes.

    In any time of T seconds no more than `most` + `rate` * T units are used, and of the last request as much as it is
    larger than `most`: one that is larger is let in when the bucket is full, and pays for the rest afterwards.
    """

    def __init__(self) -> None:
        self.rate = 0.0
        """Units per second; 0: no limit."""
        self.most = 0.0
        """Units in a full bucket."""
        self._left = 0.0
        """Units in it at `_at`. Below 0: so many were used before their time."""
        self._at = 0.0

    def set(self, rate: float, burst: float, now: float) -> None:
        """Have it bring `rate` units per second from `now` (seconds) on, and hold `burst`, or what REST_SECONDS bring.

        It is full if it had no limit until now; what was used before its time is paid for with the new rate.
        """
        was_limited = self.rate > 0
        self._fill(now)
        self.rate = rate
        self.most = max(burst, rate * REST_SECONDS, 1.0)
        self._left = min(self._left, self.most) if was_limited else self.most

    def _fill(self, now: float) -> None:
        """Add what the time has brought. A clock that goes back brings nothing."""
        if now > self._at:
            self._left = min(self.most, self._left + (now - self._at) * self.rate)
        self._at = now

    def seconds_until(self, units: float, now: float) -> float:
        """In how many seconds so many units may be used; 0.0: now."""
        if not self.rate:
            return 0.0
        self._fill(now)
        return max(0.0, min(units, self.most) - self._left) / self.rate

    def use(self, units: float) -> None:
        """Called when so many units are used, right after `seconds_until` has said 0.0."""
        if self.rate:
            self._left -= units
