"""Sequences whose items are made when they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Lazy(Generic[T]):
    """A sequence whose items are made when they are asked for."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of items."""

    @abstractmethod
    def __getitem__(self, at: int) -> T:
        """Return one item."""

    def __iter__(self) -> Iterator[T]:
        """Yield every item."""
        return (self[at] for at in range(len(self)))


class Made(Lazy[T]):
    """Items that a function makes from their position.

    Args:
        size: How many.
        make: Position to item.
    """

    def __init__(self, size: int, make: Callable[[int], T]) -> None:
        self._size, self._make = size, make

    def __len__(self) -> int:
        """Return the number of items."""
        return self._size

    def __getitem__(self, at: int) -> T:
        """Return one item."""
        if not 0 <= at < self._size:
            raise IndexError(at)
        return self._make(at)
