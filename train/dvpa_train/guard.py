"""Steps that must not be taken: a loss or gradient that is not finite, a loss that jumps.

Large runs meet both. The run goes back to its last checkpoint and leaves the batch out, as PaLM's
did (arXiv 2204.02311, section 5.1).
"""

import math
import statistics
from collections import deque

from dvpa_train.config import GuardConfig


class RefusedStep(RuntimeError):
    """Step `step` of the stage (from 0) has not been taken."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason = step, reason


class Guard:
    """Looks at every step; `recent` are the last losses that were fine."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.recent: deque[float] = deque(maxlen=config.window)

    def check(self, step: int, loss: float) -> None:
        """Take note of a step's loss.

        Raises:
            RefusedStep: it is not finite, or too far above the median of the recent ones.
        """
        if not math.isfinite(loss):
            raise RefusedStep(step, f"the loss is {loss}")
        factor = self.config.spike_factor
        if factor and len(self.recent) == self.config.window:
            usual = statistics.median(self.recent)
            if loss > factor * usual:
                raise RefusedStep(step, f"the loss is {loss:.4g}, usually {usual:.4g}")
        self.recent.append(loss)

    def check_gradient(self, step: int, norm: float) -> None:
        """RefusedStep for a gradient norm that is not finite."""
        if not math.isfinite(norm):
            raise RefusedStep(step, f"the gradient norm is {norm}")
