"""How many calls run at a time, where nothing but this server decides that."""

from __future__ import annotations

import asyncio


class CountedPlaces:
    """So many places, on one event loop. These are `Places`.

    Args:
        count: How many calls may run at a time.

    Attributes:
        left: How many are free.
    """

    def __init__(self, count: int) -> None:
        self.left = count
        self._waiter: asyncio.Future[None] | None = None

    async def take(self, most: int, seconds: float) -> list[CountedPlace]:
        """Wait until one is free; return it, and others that are. See `Places.take`."""
        if not self.left:
            self._waiter = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._waiter], timeout=seconds)
        taken = min(most, self.left)
        self.left -= taken
        return [CountedPlace(self) for _ in range(taken)]

    def give_up(self) -> None:
        """Wait no longer; who does not wait holds nothing."""

    def free(self) -> None:
        """Give one back."""
        self.left += 1
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class CountedPlace:
    """One of the places. This is a `Place`."""

    __slots__ = ("_places",)

    def __init__(self, places: CountedPlaces) -> None:
        self._places: CountedPlaces | None = places

    def leave(self) -> None:
        """Give it to the next. Doing so again does nothing."""
        places, self._places = self._places, None
        if places is not None:
            places.free()
