"""Random choices that are the same on every machine and in every version of Python."""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Chance:
    """A stream of choices that depends only on its seeds and on the calls made so far.

    It uses `random.Random.random` only: the one method whose sequence for a seed Python promises never to change.
    """

    def __init__(self, *seeds: int | str):
        self._random = random.Random("/".join(str(seed) for seed in seeds)).random

    def between(self, low: int, high: int) -> int:
        """Returns an integer from `low` to `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def happens(self, percent: int) -> bool:
        """Returns True with a probability of `percent` in a hundred."""
        return self._random() * 100 < percent

    def pick(self, options: Sequence[T]) -> T:
        """Returns one of `options`, all equally likely."""
        return options[int(self._random() * len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """Returns all of `options` in a random order."""
        shuffled = list(options)
        for last in range(len(shuffled) - 1, 0, -1):
            other = self.between(0, last)
            shuffled[last], shuffled[other] = shuffled[other], shuffled[last]
        return shuffled
