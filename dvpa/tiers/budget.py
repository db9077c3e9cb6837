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

# A budget is met up to this share of itself: the costs of a million requests, summed in another
# order, differ by about 1e-10, and "the top tier for everyone" must not be over its own budget.
ROUNDING = 1e-9
UNITS = {"mean_flops": "flops", "mean_ms": "ms"}  # of the rest: activated_params
_SHARES = ("fraction", "min_quality")
_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_BUDGET = re.compile(
    r"(quality\s*>=)?\s*(\d+\.?\d*(?:e\+?\d+)?|\.\d+)\s*(%|ms|[kmgt]?flops?|[kmbt])?",
    flags=re.IGNORECASE | re.ASCII,
)
_EXAMPLES = "60%, 0.6, 1.5B, 300k, 2.5 GFLOPs, 25ms or quality>=0.97"


@dataclass(frozen=True)
class Budget:
    """What the tier map may spend; exactly one field is set.

    mean_activated: mean activated parameters per request. fraction: the same as a fraction of the
    top tier's, in (0, 1]. mean_flops, mean_ms: mean FLOPs and milliseconds per request.
    min_quality: the cheapest map that keeps this fraction of the top tier's quality, in (0, 1].
    """

    mean_activated: float | None = None
    fraction: float | None = None
    min_quality: float | None = None
    mean_flops: float | None = None
    mean_ms: float | None = None

    def __post_init__(self) -> None:
        given = self.to_dict()
        if len(given) != 1:
            raise ValueError(f"budget: set exactly one of {', '.join(asdict(self))}; got {given}")
        ((name, value),) = given.items()
        if not (isfinite(value) and value > 0.0):
            raise ValueError(f"budget: {name} {value} is not a finite number above 0")
        if name in _SHARES and value > 1.0:
            raise ValueError(f"budget: {name} {value} is outside (0, 1]")

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read "60%", "0.6" (fractions), "1.5B", "300k", "180e3" (parameters), "2.5 GFLOPs", "25ms"
        (per request) or "quality>=0.97".

        A bare number up to 1 is a fraction, above 1 it counts parameters. ValueError otherwise.
        """
        match = _BUDGET.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"budget: {text!r} is not like {_EXAMPLES}")
        quality, number, unit = match.group(1), float(match.group(2)), (match.group(3) or "")
        unit = unit.lower()
        if quality and unit not in ("", "%"):
            raise ValueError(f"budget: {text!r}: quality is a fraction, like quality>=0.97")
        if unit == "ms":
            return cls(mean_ms=number)
        if "flop" in unit:
            return cls(mean_flops=number * _SCALES[unit.partition("flop")[0]])
        if unit in _SCALES and unit:
            return cls(mean_activated=number * _SCALES[unit])
        fraction = number / 100 if unit == "%" else number
        if quality:
            return cls(min_quality=fraction)
        return cls(mean_activated=number) if not unit and number > 1.0 else cls(fraction=fraction)

    @property
    def unit(self) -> str:
        """What is counted: activated_params, flops or ms."""
        (name,) = self.to_dict()
        return UNITS.get(name, "activated_params")

    def mean_limit(self, costs: Sequence[float]) -> float | None:
        """Largest mean cost per request, in `unit`; None for a min_quality budget.

        costs: activated parameters per tier, which a fraction is of.
        """
        if self.min_quality is not None:
            return None
        ((name, value),) = self.to_dict().items()
        return value * costs[-1] if name == "fraction" else value

    def to_dict(self) -> dict[str, float]:
        """The one field that is set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, eq=False)
class Traffic:
    """Requests without outcomes: difficulty float64 [N] in [0, 1].

    costs: what each request costs at each tier, float64 [N, T], in the budget's unit; None where it
    is the tier alone that makes the price.
    """

    difficulty: Floats
    costs: Floats | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "difficulty", np.asarray(self.difficulty, dtype=np.float64))
        if self.difficulty.ndim != 1:
            raise ValueError(f"difficulty: shape {self.difficulty.shape} is not [N]")
        _check_unit_interval("difficulty", self.difficulty)
        if self.costs is not None:
            costs = np.asarray(self.costs, dtype=np.float64)
            object.__setattr__(self, "costs", costs)
            if costs.ndim != 2 or len(costs) != len(self):
                raise ValueError(f"costs: shape {costs.shape} is not [{len(self)}, T]")
            num_bad = int((~(np.isfinite(costs) & (costs > 0.0))).sum())
            if num_bad:
                raise ValueError(f"costs: {num_bad} values are not finite numbers above 0")

    def __len__(self) -> int:
        return len(self.difficulty)


@dataclass(frozen=True, eq=False)
class Split:
    """Outcomes of requests: difficulty float64 [N] and quality float64 [N, T], all in [0, 1].

    costs: as in `Traffic`.
    """

    difficulty: Floats
    quality: Floats
    costs: Floats | None = None

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
            _check_unit_interval(f"split: {name}", getattr(self, name))
        if self.costs is not None:
            object.__setattr__(self, "costs", self.traffic.costs)
            assert self.costs is not None
            if self.costs.shape != self.quality.shape:
                raise ValueError(
                    f"split: costs has shape {self.costs.shape}, quality {self.quality.shape}"
                )

    @property
    def traffic(self) -> Traffic:
        """The requests without their outcomes."""
        return Traffic(self.difficulty, self.costs)

    def __len__(self) -> int:
        return len(self.difficulty)


def _check_unit_interval(name: str, values: Floats) -> None:
    num_bad = int((~((values >= 0.0) & (values <= 1.0))).sum())
    if num_bad:
        raise ValueError(f"{name} has {num_bad} values that are NaN or outside [0, 1]")
