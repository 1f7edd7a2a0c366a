"""The memory that all connections of a server may hold for requests in flight and for clients that do not read."""

import trio


class Budget:
    """An amount of memory in bytes, of which the connections of one server reserve parts. Only counts are kept here."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        """Bytes that are reserved now."""
        self._waiting = trio.lowlevel.ParkingLot()

    def reserve(self, count: int) -> bool:
        """Reserves `count` bytes; False, and nothing is reserved, if fewer are left.

        If nothing is reserved yet, any number is granted: no request is larger than all that there is.
        """
        if self.used and self.used + count > self.limit:
            return False
        self.used += count
        return True

    def release(self, count: int) -> None:
        """Gives `count` reserved bytes back, and wakes all that wait in released()."""
        assert 0 <= count <= self.used, "given back more than was taken"
        self.used -= count
        if self._waiting:
            self._waiting.unpark_all()

    async def released(self) -> None:
        """Returns after the next release(). What was released may have been reserved by others by then."""
        await self._waiting.park()
