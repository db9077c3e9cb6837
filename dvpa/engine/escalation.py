"""Escalation while decoding: when a running request has become too unsure for its tier. No torch.

The statistic is the running mean of `1 - p`, where p is the probability of the likeliest next
token. Above `upper` the request goes up (one tier, or to the highest it may have), and the position
that was unsure is computed again there, so that the token in doubt is already the higher tier's;
the cache is kept. It can go up again only after the mean has been below `lower` in between
(hysteresis), at most `max_times`, and never down.
"""

from dataclasses import dataclass

STEPS = ("next", "highest")


@dataclass(frozen=True, kw_only=True)
class EscalationParams:
    """Bounds of the statistic; see above.

    Raises:
        ValueError: a field is out of range, or `lower` above `upper`.
    """

    upper: float = 0.7  # escalate above it
    lower: float = 0.4  # sure again below it
    smoothing: float = 0.5  # weight of the past in the running mean; 0: the last token alone
    max_times: int = 2
    step: str = "next"  # the tier to go to: the "next" one, or the "highest" the request may have

    def __post_init__(self) -> None:
        """Check every field."""
        if not 0.0 <= self.lower <= self.upper <= 1.0:
            raise ValueError(
                f"lower, upper: {self.lower}, {self.upper} must be 0 <= lower <= upper <= 1"
            )
        if not 0.0 <= self.smoothing < 1.0:
            raise ValueError(f"smoothing: {self.smoothing} must be in [0, 1)")
        if not 0 <= self.max_times <= 2:
            raise ValueError(f"max_times: {self.max_times} must be in 0 .. 2")
        if self.step not in STEPS:
            raise ValueError(f"step: {self.step!r} must be one of {', '.join(STEPS)}")


class Doubt:
    """The statistic of one request."""

    def __init__(self, params: EscalationParams) -> None:
        self._params = params
        self._mean: float | None = None
        self._is_armed = True
        self.num_escalations = 0

    def is_too_much(self, uncertainty: float) -> bool:
        """Take in one token's `1 - p`; True: escalate, and this token is to be judged again."""
        params = self._params
        mean = uncertainty
        if self._mean is not None:
            mean = params.smoothing * self._mean + (1 - params.smoothing) * uncertainty
        if mean > params.upper and self._is_armed and self.num_escalations < params.max_times:
            self._is_armed = False
            self.num_escalations += 1
            return True
        self._mean = mean
        self._is_armed = self._is_armed or mean < params.lower
        return False
