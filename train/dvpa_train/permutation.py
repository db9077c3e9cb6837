"""A seeded permutation of any size that needs no memory: a Feistel network with cycle walking.

A shuffled index array of a 7T-token epoch would take gigabytes in every process. A Feistel network
(Luby and Rackoff, 1988) permutes numbers of 2b bits whatever its round function; numbers that land
beyond the size are permuted again until they do not (Black and Rogaway, 2002: "cycle walking"),
fewer than four times on average. Its order is as good as its mixing, not uniform over all
permutations; data order needs no more.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

ROUNDS = 6
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64


class Permutation:
    """`p(i)` for i in 0 .. size - 1; depends on `size` and `key` only, on every machine.

    Raises:
        ValueError: size below 1.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        if size < 1:
            raise ValueError(f"size: {size} must be 1 or more")
        self.size = size
        bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._bits, self._mask = np.uint64(bits), np.uint64((1 << bits) - 1)
        self._keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)

    def __call__(self, numbers: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """int64 [N] -> int64 [N].

        Raises:
            ValueError: a number outside 0 .. size - 1.
        """
        found = np.atleast_1d(np.asarray(numbers, dtype=np.int64))
        if len(found) and not 0 <= found.min() <= found.max() < self.size:
            raise ValueError(f"numbers: must be in 0 .. {self.size - 1}")
        walked = self._permute(found.astype(np.uint64))
        outside = walked >= self.size
        while outside.any():
            walked[outside] = self._permute(walked[outside])
            outside = walked >= self.size
        return walked.astype(np.int64)

    def _permute(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = numbers >> self._bits, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        joined: npt.NDArray[np.uint64] = (left << self._bits) | right
        return joined


def _mix(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The finaliser of splitmix64, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIERS[0]
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIERS[1]
    return x ^ (x >> np.uint64(31))
