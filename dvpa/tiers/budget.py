"""What a tier map is fitted from: a stated budget and the outcomes of some requests.

N requests, T tiers.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Budget:
    """What the tier map may spend; exactly one field is set.

    mean_activated: mean activated parameters per request. fraction: the same as a fraction of the
    top tier's, in (0, 1]. min_quality: the cheapest map that keeps this fraction of the top tier's
    quality, in (0, 1].
    """

    mean_activated: float | None = None
    fraction: float | None = None
    min_quality: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"budget: set exactly one of mean_activated, fraction, min_quality; got {given}"
            )
        ((name, value),) = given.items()
        if not (isfinite(value) and value > 0.0):
            raise ValueError(f"budget: {name} {value} is not a finite number above 0")
        if name != "mean_activated" and value > 1.0:
            raise ValueError(f"budget: {name} {value} is outside (0, 1]")

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read "60%", "0.6" (fractions), "1.5B", "300k", "180e3" (parameters) or "quality>=0.97".

        A bare number up to 1 is a fraction, above 1 it counts parameters. ValueError otherwise.
        """
        pattern = r"(quality\s*>=)?\s*(\d+\.?\d*(?:e\+?\d+)?|\.\d+)\s*([%kmbt]?)"
        match = re.fullmatch(pattern, text.strip(), flags=re.IGNORECASE | re.ASCII)
        if match is None:
            raise ValueError(f"budget: {text!r} is not like 60%, 0.6, 1.5B, 300k or quality>=0.97")
        quality, number, unit = match.group(1), float(match.group(2)), match.group(3).lower()
        if unit and unit != "%":
            if quality:
                raise ValueError(f"budget: {text!r}: quality is a fraction, like quality>=0.97")
            return cls(mean_activated=number * {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[unit])
        fraction = number / 100 if unit == "%" else number
        if quality:
            return cls(min_quality=fraction)
        return cls(mean_activated=number) if not unit and number > 1.0 else cls(fraction=fraction)

    def mean_limit(self, costs: Sequence[float]) -> float | None:
        """Largest mean activated parameters per request; None for a min_quality budget."""
        return self.fraction * costs[-1] if self.fraction is not None else self.mean_activated


@dataclass(frozen=True, eq=False)
class Split:
    """Outcomes of requests: difficulty float64 [N] and quality float64 [N, T], all in [0, 1]."""

    difficulty: Floats
    quality: Floats

    def __post_init__(self) -> None:
        object.__setattr__(self, "difficulty", np.asarray(self.difficulty, dtype=np.float64))
        object.__setattr__(self, "quality", np.asarray(self.quality, dtype=np.float64))
        if (
            self.difficulty.ndim != 1
            or self.quality.ndim != 2
            or len(self.quality) != len(self.difficulty)
        ):
            shapes = f"{self.difficulty.shape} and {self.quality.shape}"
            raise ValueError(
                f"split: difficulty and quality have shapes {shapes}, not [N] and [N, T]"
            )
        for name in ("difficulty", "quality"):
            values = getattr(self, name)
            num_bad = int((~((values >= 0.0) & (values <= 1.0))).sum())
            if num_bad:
                raise ValueError(
                    f"split: {name} has {num_bad} values that are NaN or outside [0, 1]"
                )

    def __len__(self) -> int:
        return len(self.difficulty)
