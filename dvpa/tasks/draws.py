"""Pseudo-random numbers that depend on a text key only: no state, no process, no Python version, no
PYTHONHASHSEED.
"""

import hashlib

_MASK = (1 << 64) - 1


def stable_hash(text: str) -> int:
    """64 bits of BLAKE2b: the same in every process and on every machine, unlike hash()."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Draws:
    """A stream of numbers: SplitMix64 (Steele, Lea and Flood 2014), its state seeded with the hash
    of a key.
    """

    __slots__ = ("_state",)

    def __init__(self, key: str) -> None:
        self._state = stable_hash(key)

    def bits(self) -> int:
        """The next 64 bits."""
        self._state = z = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def below(self, bound: int) -> int:
        """An integer in [0, bound); the bias of the multiplication is bound / 2^64."""
        return (self.bits() * bound) >> 64

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def fraction(self) -> float:
        """A number in [0, 1) with 53 bits."""
        return (self.bits() >> 11) * 2.0**-53
