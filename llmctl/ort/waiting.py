"""Requests that wait, and whose turn it is."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First come, first served for each client; the clients take turns, however many requests each has."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, client: str, item: T) -> None:
        """To the end of the client's line; a client who had none is the last to have a turn."""
        self._lines.setdefault(client, deque()).append(item)
        self._count += 1

    def put_back(self, client: str, item: T) -> None:
        """To the head of the client's line; the client's turn is when it would have been."""
        self._lines.setdefault(client, deque()).appendleft(item)
        self._count += 1

    def first(self) -> T:
        """Whose turn it is; IndexError if nobody waits."""
        for line in self._lines.values():
            return line[0]
        raise IndexError("nobody waits")

    def pop(self) -> T:
        """Take the first one out; the client's next turn comes after everybody else's."""
        client, line = next(iter(self._lines.items()))
        item = line.popleft()
        self._count -= 1
        if line:
            self._lines.move_to_end(client)
        else:
            del self._lines[client]
        return item

    def remove(self, client: str, item: T) -> None:
        """This one waits no longer; ValueError if it did not."""
        line = self._lines.get(client, deque())
        line.remove(item)
        self._count -= 1
        if not line:
            del self._lines[client]
