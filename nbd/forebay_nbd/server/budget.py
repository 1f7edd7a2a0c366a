"""How many bytes the connections of one server may hold for requests in flight and for clients that do not read."""

import trio


class Budget:
    """A counted amount of memory, bytes, shared by the connections of one server."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._waiting = trio.lowlevel.ParkingLot()

    def take(self, count: int) -> bool:
        """Takes `count` if that many are left. One request is always let through, so that none waits for ever."""
        if self.used and self.used + count > self.limit:
            return False
        self.used += count
        return True

    def give(self, count: int) -> None:
        """Gives back what was taken."""
        assert 0 <= count <= self.used, "given back more than was taken"
        self.used -= count
        if self._waiting:
            self._waiting.unpark_all()

    async def changed(self) -> None:
        """Returns after the next give()."""
        await self._waiting.park()
