"""How a long copy goes, in words: bytes so far, bytes a second, time left; no PyTorch."""

import time
from collections.abc import Callable

INTERVAL_S = 0.2  # between two words


class Pace:
    """Counts bytes towards `total` and tells `say` about them, a few times a second."""

    def __init__(
        self,
        total: int,
        say: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._say, self._clock = total, say, clock
        self._done = 0
        self._started = self._said = clock()

    def add(self, num_bytes: int) -> None:
        """So many more bytes are written."""
        self._done += num_bytes
        now = self._clock()
        if now - self._said < INTERVAL_S:
            return
        self._said = now
        rate = self._done / (now - self._started)
        left = max(0, round((self._total - self._done) / max(rate, 1.0)))
        self._say(
            f"writing {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, "
            f"{rate / 1e6:,.0f} MB/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
